"""The page in a real Chromium, for `make bench`, by the browser's own timing and counting (DevTools)."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from bench_rows import FOLDER, both, head, row, scaled
from fake_masters import Fakes
from measured_program import API_TOKEN, AS_MODULE, Program

LONG_S, WATCHED_S = 28_800, 3_600
TABS = 50
WATCH_S = 60.0  # of an hour: what a tab takes is the same each minute

# Noted by the page itself, at the frame after its charts were drawn first.
NOTE_JS = """
window.noted = {};
new PerformanceObserver((list) => { for (const one of list.getEntries()) window.noted.largest = one.startTime;
  })
  .observe({type: "largest-contentful-paint", buffered: true});
(function look() {
  const group = typeof view !== "undefined" && view && view.group;
  if (group && group.points.length > 300 && group.charts.every((chart) => chart.yOf)) {
    requestAnimationFrame(() => { window.noted.drawn = performance.now(); });
  } else requestAnimationFrame(look);
})();
"""
PAINT_JS = """
const paint = performance.getEntriesByType("paint").find((one) => one.name === "first-contentful-paint");
const filled = document.querySelectorAll("main table tr, main .tile").length > 3;
return paint && filled ? {first: paint.startTime, ...window.noted} : null
"""
FRAMES_JS = """const took = []; for (let t = 0; t < 28800; t += 300) { view.group.hover = t;
    const from = performance.now(); view.group.charts.forEach((chart) => chart.draw());
    took.push(performance.now() - from); }
    view.group.hover = null; return took"""
SEEN_JS = """window.seen = {}; const tile = view.parts.requests; new MutationObserver(() => {
    window.seen[tile.textContent] = Date.now() / 1000; }).observe(tile,
      {childList: true, characterData: true, subtree: true});"""


def page_figures() -> None:
    head("the page, in a real Chromium")
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        row("the page in a browser", "skipped: needs chromium and chromium-driver")
        return
    from chromium import Chromium

    with seeded() as (program, long_id, watched_id), Chromium() as browser:
        sign_in(browser, program)
        overview(browser, program)
        eight_hours(browser, program, long_id)
        watching(browser, program, watched_id)
        pushed(browser, program)
        many_tabs(browser, program, watched_id)


@contextmanager
def seeded() -> Iterator[tuple[Program, str, str]]:
    """A server with 200 runs, one of eight hours, and one that has run for an hour and goes on."""
    from seeded_runs import SeededRuns

    folder = FOLDER / "page"
    folder.mkdir()
    fakes = Fakes(1, hooks=1)
    with SeededRuns(folder / "lm.db") as runs:
        for number in range(200):
            runs.finished("checkout", age_s=90_000 - 60 * number, samples=2)
        long_id = runs.finished("soak", age_s=30_000, seconds=LONG_S, samples=int(scaled(LONG_S, 2000)))
        watched_id = runs.running("watched", WATCHED_S, int(scaled(WATCHED_S, 400)), "c0", "t", "e0")
    port = fakes.ports[0]
    fakes.users[port], fakes.run_ids[port], fakes.requests[port] = 5, watched_id, 700_000
    places = [{"id": "c0", "tenantId": "t", "envId": "e0", "baseUrl": f"http://127.0.0.1:{port}"}]
    places.append({"id": "c1", "tenantId": "t", "envId": "pushed", "baseUrl": "http://127.0.0.1:9"})
    config = {
        "storage": {"url": "sqlite:///lm.db"}, "locustClusters": places,
        "orchestrator": {"metricsPollIntervalSeconds": 1, "lostAfterSeconds": 600},
    }  # fmt: skip
    with Program(folder, config, AS_MODULE) as program:
        status = program.call("GET", f"/v1/tests/{watched_id}")["status"]
        assert status == "Running", f"the run of an hour is {status}"
        yield program, long_id, watched_id


def sign_in(browser: Any, program: Program) -> None:
    browser.size(1400, 1000)
    browser.driver.get(program.url)
    ask = (
        "fetch('/session', {method: 'POST', headers: {'Content-Type': 'application/json'}, "
        "body: JSON.stringify({token: arguments[0]})})"
    )
    browser.driver.execute_async_script(f"const done = arguments[1]; {ask}.then(() => done())", API_TOKEN)
    browser.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": NOTE_JS})
    browser.driver.execute_cdp_cmd("Performance.enable", {})


def until(browser: Any, script: str, *arguments: Any, within_s: float = 20.0) -> Any:
    """What the script gives, once that is true."""
    give_up_at = time.monotonic() + within_s
    while time.monotonic() < give_up_at:
        found = browser.driver.execute_script(script, *arguments)
        if found:
            return found
        time.sleep(0.01)
    raise TimeoutError(script)


def opened(browser: Any, url: str, until_script: str = PAINT_JS) -> tuple[dict[str, float], int]:
    """The browser's own times (ms since the navigation), and the bytes that came over the wire."""
    browser.driver.get("about:blank")
    browser.driver.get_log("performance")
    browser.driver.get(url)
    times = until(browser, until_script)
    time.sleep(0.3)  # the last bytes of what came beside it
    return times, received_bytes(browser)


def received_bytes(browser: Any) -> int:
    """Bytes over the wire since the last call, of whole answers and of streams so far."""
    count = 0
    for entry in browser.driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.dataReceived":
            count += message["params"]["encodedDataLength"]
        elif message["method"] == "Network.responseReceived":
            count += int(message["params"]["response"]["encodedDataLength"])
    return count


def overview(browser: Any, program: Program) -> None:
    found = [opened(browser, f"{program.url}/#/") for _ in range(int(scaled(5, 2)))]
    firsts, largest = ([times[name] for times, _ in found] for name in ("first", "largest"))
    row("overview, 200 runs: first contentful paint", both(firsts, "ms", 0), "<= 500 ms", max(firsts) <= 500)
    row("  largest paint (the runs)", both(largest, "ms", 0), "<= 1,000 ms", max(largest) <= 1000)
    size = statistics.median(count for _, count in found) / 1024
    row("  received, the page and its data", f"{size:.0f} KiB", "<= 100 KiB", size <= 100)


def eight_hours(browser: Any, program: Program, long_id: str) -> None:
    drawn = "if (!window.noted || !window.noted.drawn) return null;" + PAINT_JS
    found = [opened(browser, f"{program.url}/#/runs/{long_id}", drawn) for _ in range(int(scaled(5, 2)))]
    for what, name, most in (
        ("first contentful paint", "first", 500),
        ("its three charts drawn", "drawn", 1000),
    ):
        values = [times[name] for times, _ in found]
        row(f"a run of 8 h, 28,800 samples: {what}", both(values, "ms", 0), f"<= {most:,} ms",
            max(values) <= most)  # fmt: skip
    size = statistics.median(count for _, count in found) / 1024
    row("  received, the page and its data", f"{size:.0f} KiB", "<= 150 KiB", size <= 150)
    frames = browser.driver.execute_script(FRAMES_JS)
    row("  its three charts drawn once", both(frames, "ms"), "median <= 16 ms",
        statistics.median(frames) <= 16)  # fmt: skip


def task_s(browser: Any) -> dict[str, float]:
    """Seconds of the tab's main thread so far: all of it, script, layout."""
    metrics = browser.driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    found = {metric["name"]: metric["value"] for metric in metrics}
    return {name: found[name] for name in ("TaskDuration", "ScriptDuration", "LayoutDuration",
        "RecalcStyleDuration")}  # fmt: skip


def browser_cpu_s(browser: Any) -> float:
    """Processor seconds of all processes of the browser so far."""
    driver = psutil.Process(browser.driver.service.process.pid)
    times = [process.cpu_times() for process in driver.children(recursive=True)]
    return sum(time_.user + time_.system for time_ in times)


def watching(browser: Any, program: Program, run_id: str) -> None:
    """A visible tab at a run of an hour that gets new numbers each second, then the same tab hidden."""
    opened(browser, f"{program.url}/#/runs/{run_id}")
    time.sleep(1)
    seconds = scaled(WATCH_S, 2)
    tab = browser.driver.current_window_handle
    share, tasks, size = over(browser, seconds)
    ours = 100 * tasks["TaskDuration"] / seconds
    row(f"a tab that watches a run of 1 h, over {seconds:.0f} s: its thread", f"{ours:.1f} % of a core",
        "<= 3 %", ours <= 3)  # fmt: skip
    parts = "; ".join(f"{name[:-8].lower()} {100 * tasks[name] / seconds:.1f}" for name in list(tasks)[1:])
    row("  of which", f"{parts} %")
    row("  all of the browser's processes", f"{share:.1f} % of a core", "<= 5 %", share <= 5)
    row("  received", f"{size / 1024 / seconds * 60:.0f} KiB a minute", "<= 300 KiB",
        size / 1024 / seconds * 60 <= 300)  # fmt: skip
    browser.driver.switch_to.new_window("tab")
    other = browser.driver.current_window_handle
    browser.driver.switch_to.window(tab)
    is_hidden = browser.driver.execute_script("return document.hidden")
    row("  behind another tab it is hidden", "yes" if is_hidden else "no: this browser shows all tabs")
    browser.driver.switch_to.window(other)
    browser.driver.close()
    browser.driver.switch_to.window(tab)


def over(browser: Any, seconds: float) -> tuple[float, dict[str, float], int]:
    """Percent of a core by the browser, seconds of the tab's thread, bytes, in a window of time."""
    received_bytes(browser)
    before, cpu_s, began = task_s(browser), browser_cpu_s(browser), time.monotonic()
    time.sleep(seconds)
    after, spent = task_s(browser), browser_cpu_s(browser) - cpu_s
    share = 100 * spent / (time.monotonic() - began)
    return share, {name: after[name] - before[name] for name in before}, received_bytes(browser)


def pushed(browser: Any, program: Program) -> None:
    place = {"tenantId": "t", "envId": "pushed", "targetUsers": 5, "spawnRate": 5}
    run_id = program.call("POST", "/v1/internal/locust/register-external", place, callback=True)["runId"]
    browser.driver.get("about:blank")
    browser.driver.get(f"{program.url}/#/runs/{run_id}")
    until(browser, "return typeof view !== 'undefined' && view && view.parts && true")
    browser.driver.execute_script(SEEN_JS)
    delays = []
    for number in range(777_001, 777_001 + int(scaled(20, 3))):
        metrics = {"totalRps": 10.0, "totalRequests": number, "totalFailures": 0, "errorRate": 0.0,
            "currentUsers": 5}  # fmt: skip
        began = time.time()
        program.call("POST", "/v1/internal/locust/metrics", {"runId": run_id, "metrics": metrics},
            callback=True)  # fmt: skip
        delays.append(until(browser, "return window.seen[arguments[0]]", f"{number:,}") - began)
    row("a pushed number on the screen", both(delays, "s", 2), "<= 1 s", max(delays) <= 1)


def many_tabs(browser: Any, program: Program, run_id: str) -> None:
    """So many tabs of one browser at the same run; then another one must paint as fast as the first."""
    tabs = int(scaled(TABS, 8))
    before = program.resident_mib(), program.descriptors(), program.threads()
    for _ in range(tabs - 1):
        browser.driver.execute_cdp_cmd("Target.createTarget",
            {"url": f"{program.url}/#/runs/{run_id}", "background": True})  # fmt: skip
        time.sleep(0.1)
    time.sleep(scaled(25, 3))  # hidden ones give their connection back after 20 s
    cpu_s, seconds = program.cpu_s(), scaled(20, 2)
    time.sleep(seconds)
    share = 100 * (program.cpu_s() - cpu_s) / seconds
    browser.driver.switch_to.new_window("tab")
    browser.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": NOTE_JS})
    try:
        times, _ = opened(browser, f"{program.url}/#/runs/{run_id}")
        row(f"{tabs} tabs open: the last one's first paint", f"{times['first']:.0f} ms", "<= 1,000 ms",
            times["first"] <= 1000)  # fmt: skip
    except TimeoutError:
        row(f"{tabs} tabs open: the last one's first paint", "NONE within 20 s", "<= 1,000 ms", False)
    after = program.resident_mib(), program.descriptors(), program.threads()
    row("  the server's processor time", f"{share:.1f} % of a core", "<= 5 %", share <= 5)
    words = [f"{one:.0f} \u2192 {two:.0f}" for one, two in zip(before, after, strict=True)]
    more = after[1] - before[1]
    row("  its memory (MiB); descriptors; threads", "; ".join(words), "<= 2 descriptors a tab",
        more <= 2 * tabs)  # fmt: skip
