"""The page's JavaScript without a browser: it parses, its pure functions do, its parts go out and come
back."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import page
import pytest
from conftest import API_TOKEN

import loadmanager

ROOT = Path(loadmanager.__file__).parent
NODE = shutil.which("node") or shutil.which("nodejs")
# What the tools of the page take from a browser when they are loaded.
STAND_INS = """const document = {addEventListener() {}}; const location = {};
const addEventListener = () => {};
class BroadcastChannel {}"""
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")


def evaluate(expression: str) -> object:
    """What an expression gives beside the page's tools and forms, through node."""
    parts = (STAND_INS, loadmanager.PAGE_TOOLS_JS, loadmanager.PAGE_FORMS_JS, CHART_DATA_JS)
    script = loadmanager._with_series("", "\n".join(parts))[1]
    program = script + f"\nconsole.log(JSON.stringify({expression}));"
    done = subprocess.run([NODE, "-"], input=program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def function_text(source: str, name: str) -> str:
    """A top-level function of the page, or a constant, as it is written."""
    start = min(at for word in ("function", "const") if (at := source.find(f"\n{word} {name}")) >= 0)
    ends = [at for end in ("\n}\n", "\n};\n", ";\n") if (at := source.find(end, start)) >= 0]
    is_function = source.startswith("\nfunction", start)
    return source[start : source.find("\n}\n", start) + 3 if is_function else min(ends) + 3]


CHART_DATA_JS = "".join(
    function_text(loadmanager.PAGE_RUN_JS, name)
    for name in ("DRAWN", "seriesOf", "pointsOf", "speaksOf", "judgementOf", "figuresOf")
)


@needs_node
@pytest.mark.parametrize("script", ["PAGE_JS", "DOCS_JS"])
def test_script_parses(script, tmp_path):
    file = tmp_path / "page.js"
    file.write_text(getattr(loadmanager, script))
    done = subprocess.run([NODE, "--check", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_function_and_class_of_the_css_and_the_script_is_used():
    script = loadmanager.PAGE_JS
    names = re.findall(r"^(?:async )?(?:function|class|const|let) (\w+)", script, re.M)
    unused = [name for name in names if len(re.findall(rf"\b{re.escape(name)}\b", script)) < 2]
    assert unused == []
    classes = {name for name in re.findall(r"\.([a-z][\w-]*)", re.sub(r"[^{}]*;", "", loadmanager.PAGE_CSS))}
    words = set(re.findall(r"[\w-]+", script + loadmanager.DASHBOARD_PAGE))
    assert classes - words == set()


def test_nothing_on_the_page_moves_without_end():
    """A dot that pulses has a browser draw sixty times a second, for as long as a run takes."""
    assert "infinite" not in loadmanager.PAGE_CSS


@needs_node
def test_durations_are_read_and_written_as_people_do():
    texts = ["90", "90s", "5m", "1h30m", "1 h 30 m", "", "soon", "1h30x", "-5"]
    assert evaluate(f"{json.dumps(texts)}.map(parseSpan)") == [
        90,
        90,
        300,
        5400,
        5400,
        None,
        None,
        None,
        None,
    ]
    assert evaluate("[0, 59, 61, 5400, 90000].map(span)") == ["0s", "59s", "1m1s", "1h30m", "1d1h"]
    assert evaluate("[0, 61, 3723].map(clock)") == ["0:00", "1:01", "1:02:03"]


@needs_node
def test_numbers_that_locust_did_not_give_are_a_dash_and_few_failures_are_not_none():
    assert evaluate("[null, undefined, NaN, '5'].map(count)") == ["\u2013"] * 4
    assert evaluate("[0, 0.001, 0.5, 12.34].map(percent)") == ["0%", "<0.01%", "0.50%", "12.3%"]
    assert evaluate("[0.5, -0.031].map(signedPercent)") == ["+50.0%", "\u22123.1%"]


def test_page_and_report_draw_the_same_table_of_series():
    css, js = loadmanager.page_parts(None)
    assert "/*series" not in css + js
    for one in loadmanager.SERIES.values():
        assert f"--{one.name}: {one.light};" in css and f"--{one.name}: {one.dark};" in css
        assert json.dumps(one.label) in js and set(one.keys) <= set(loadmanager.SAMPLE_KEYS)


@needs_node
def test_users_of_a_run_show_their_changes():
    run = {"targetUsers": 10, "startedAt": "2026-11-25T03:00:00Z", "usersChanges": []}
    change = {"at": "2026-11-25T03:00:08Z", "targetUsers": 20, "spawnRate": 2, "by": "kim"}
    assert evaluate(f"usersText({json.dumps(run)})") == "10"
    run["usersChanges"] = [change]
    assert evaluate(f"usersText({json.dumps(run)})") == "10 \u2192 20"
    assert (
        evaluate(f"changeText({json.dumps(run)}, {json.dumps(change)})")
        == "20 users at 2/s after 0:08, by kim"
    )
    run["usersChanges"] = [change] * 9
    assert evaluate(f"usersText({json.dumps(run)})") == "10 \u2192 \u2026 \u2192 20"


@needs_node
def test_form_texts_become_json_or_say_what_is_wrong():
    assert evaluate(r"parsePairs('a=1\n\n b = x=y ')") == {"a": "1", "b": "x=y"}
    assert evaluate("(() => { try { parsePairs('nothing') } catch (error) { return error.message } })()") == (
        "each line is key=value; this one is not: nothing"
    )
    long_form = {"metric": "p95ResponseMs", "max": 5}
    text = "errorRate < 1\n" + json.dumps(long_form)
    assert evaluate(f"parseThresholds({json.dumps(text)})") == ["errorRate < 1", long_form]
    wrong = evaluate("parseLoad({targetUsers: '1.5', spawnRate: '0', durationSeconds: 'soon'}).problems")
    assert set(wrong) == {"targetUsers", "spawnRate", "durationSeconds"}
    right = evaluate("parseLoad({targetUsers: '5', spawnRate: '0.5', durationSeconds: ''})")
    assert right == {"load": {"targetUsers": 5, "spawnRate": 0.5}, "problems": {}}


@needs_node
def test_judgement_is_the_servers_word_or_what_its_lists_say():
    compared = {
        "tolerances": {"p95ResponseMs": "10%", "errorRate": "0.5"},
        "regressions": ["GET /a: p95ResponseMs went from 1 to 2"],
        "warnings": ["totals: errorRate not judged: 3 requests"],
    }
    words = evaluate(
        f"""((compared) => [
        ['GET /a', 'p95ResponseMs'], ['GET /ab', 'p95ResponseMs'], [null, 'errorRate'],
        [null, 'totalRps']].map(
        ([endpoint, metric]) => judgementOf(compared, {{endpoint, metric, change: 1,
          judgement: 'improvement'}}).word))({json.dumps(compared)})"""
    )
    assert words == ["regression", "within tolerance", "cannot tell", "not judged"]
    own = evaluate("judgementOf({judgement: 'no regression'}, {judgement: 'improvement', reason: 'why'})")
    assert own == {"word": "improvement", "why": "why"}


def test_parts_taken_out_and_put_back_leave_the_program_as_it_was(tmp_path, monkeypatch):
    copy = tmp_path / "loadmanager.py"
    shutil.copy(ROOT / "loadmanager.py", copy)
    monkeypatch.setattr(page, "MODULE", copy)
    page.take_out(tmp_path / "page")
    assert sorted(file.name for file in (tmp_path / "page").iterdir()) == sorted(
        loadmanager.PAGE_PARTS.values()
    )
    page.put_back(tmp_path / "page")
    assert copy.read_bytes() == (ROOT / "loadmanager.py").read_bytes()
    charts = tmp_path / "page" / "charts.js"
    charts.write_text(charts.read_text() + "// \\d more\n")
    page.put_back(tmp_path / "page")
    assert "// \\d more\n" in copy.read_text() and len(copy.read_text().splitlines()) == 1 + len(
        (ROOT / "loadmanager.py").read_text().splitlines()
    )
    charts.write_text('x = """')
    with pytest.raises(SystemExit, match="three double quotes"):
        page.put_back(tmp_path / "page")


def test_parts_are_served_from_a_folder_as_they_are_now(load_manager, tmp_path):
    folder = tmp_path / "page"
    page.take_out(folder)
    lm = load_manager(environment={"LOADMANAGER_PAGE_DIR": str(folder)})
    before = lm.get("/", token=None)
    assert b"first change" not in before.body
    (folder / "charts.js").write_text("// first change\n")
    after = lm.get("/", token=None)
    assert b"first change" in after.body
    assert after.headers["content-security-policy"] != before.headers["content-security-policy"]


def test_tool_says_how_it_is_used(capsys):
    done = subprocess.run([sys.executable, page.__file__], capture_output=True, text=True, timeout=60)
    assert (
        done.returncode == 1
        and "python tests/page.py out DIR" in done.stderr
        and API_TOKEN not in done.stderr
    )
