"""What a soak measured, judged and drawn: slopes by Theil-Sen, and small charts as one SVG."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import theilslopes

BINS = 120  # medians of so many equal times, against the noise of single seconds
WIDTH, HEIGHT, LEFT, GAP, COLUMNS = 460, 130, 56, 34, 2


@dataclass(frozen=True)
class Series:
    """One figure over time: its name, unit, the growth per hour that still counts as flat, and its values."""

    name: str
    unit: str
    allowed: float
    points: list[tuple[float, float]]  # seconds, value

    def binned(self, bins: int = BINS) -> list[tuple[float, float]]:
        """Medians of equal parts of the time."""
        if len(self.points) <= bins:
            return self.points
        begin, end = self.points[0][0], self.points[-1][0]
        parts: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
        for at, value in self.points:
            parts[min(bins - 1, int((at - begin) / (end - begin) * bins))].append((at, value))
        return [
            (statistics.median(at for at, _ in part), statistics.median(value for _, value in part))
            for part in parts
            if part
        ]


@dataclass(frozen=True)
class Verdict:
    series: Series
    middle: float
    most: float
    slope: float  # an hour
    low: float  # the 95 % interval of the slope
    high: float

    @property
    def word(self) -> str:
        """flat, rising, or what cannot be told from so short a time."""
        if self.low > self.series.allowed:
            return "RISING"
        return "flat" if self.high <= self.series.allowed else "too short to tell"


def judge(series: Series) -> Verdict:
    """The robust slope per hour of one figure; its points must be two or more."""
    binned = series.binned()
    hours = [at / 3600 for at, _ in binned]
    slope, _, low, high = theilslopes([value for _, value in binned], hours, 0.95)
    values = [value for _, value in series.points]
    return Verdict(series, statistics.median(values), max(values), float(slope), float(low), float(high))


def table(verdicts: list[Verdict]) -> str:
    lines = [f"{'figure':<34}{'median':>10}{'most':>10}{'slope/hour (95 %)':>34}{'allowed':>10}  verdict"]
    for one in verdicts:
        slope = f"{one.slope:+.2f} ({one.low:+.2f} to {one.high:+.2f})"
        name = f"{one.series.name}, {one.series.unit}" if one.series.unit else one.series.name
        figures = f"{one.middle:>10.2f}{one.most:>10.2f}{slope:>34}{one.series.allowed:>10.2f}"
        lines.append(f"{name:<34}{figures}  {one.word}")
    return "\n".join(lines)


def draw(path: Path, title: str, all_series: list[Series], judged_from_s: float) -> None:
    """All figures as one SVG, each from zero; what came before the judged time is pale."""
    rows = -(-len(all_series) // COLUMNS)
    width, height = COLUMNS * (WIDTH + LEFT + 20), 40 + rows * (HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="10" y="20" font-size="15">{title}</text>',
    ]
    for index, series in enumerate(all_series):
        x = LEFT + index % COLUMNS * (WIDTH + LEFT + 20)
        y = 56 + index // COLUMNS * (HEIGHT + GAP)
        parts += _chart(series, x, y, judged_from_s)
    path.write_text("\n".join([*parts, "</svg>\n"]))


def _chart(series: Series, x: int, y: int, judged_from_s: float) -> list[str]:
    points = _extremes(series.points)
    last = max(1.0, points[-1][0])
    top = max(max(value for _, value in points) * 1.1, 1e-9)
    width, height = WIDTH, HEIGHT - 20

    def place(at: float, value: float) -> str:
        return f"{x + at / last * width:.1f},{y + height - value / top * height:.1f}"

    name = f"{series.name} ({series.unit})" if series.unit else series.name
    lines = [f'<text x="{x}" y="{y - 6}" fill="#333">{name}</text>']
    for share in (0, 0.5, 1):
        level = y + height - share * height
        lines.append(f'<path d="M{x} {level:.1f}h{width}" stroke="#ddd"/>')
        label = f"{share * top:.3g}"
        lines.append(f'<text x="{x - 5}" y="{level + 4:.1f}" text-anchor="end" fill="#666">{label}</text>')
    right, under = x + width, y + height + 14
    lines.append(f'<text x="{right}" y="{under}" text-anchor="end" fill="#666">{last / 60:.0f} min</text>')
    for colour, chosen in (
        ("#b8c4d4", [point for point in points if point[0] <= judged_from_s]),
        ("#0b62d0", [point for point in points if point[0] >= judged_from_s]),
    ):
        if chosen:
            line = " ".join(place(*point) for point in chosen)
            lines.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.2" points="{line}"/>')
    return lines


def _extremes(points: list[tuple[float, float]], bins: int = 200) -> list[tuple[float, float]]:
    """At most two points for each part of the time, its least and its most: no peak is lost."""
    if len(points) <= 2 * bins:
        return points
    size = -(-len(points) // bins)
    kept = []
    for begin in range(0, len(points), size):
        part = points[begin : begin + size]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept
