"""Reports of a real run that had failures and exceptions, with names that try to be markup or formulas."""

from __future__ import annotations

import csv
import html.parser
import io
import json
import os
import subprocess
import sys

import pytest
from conftest import API_TOKEN, LoadManager, base_config, cluster_config
from locust_process import LocustCluster, find_free_port
from target import Target
from waiting import eventually

import loadmanager

HOSTILE = """
from locust import HttpUser, constant, task

class Visitor(HttpUser):
    wait_time = constant(0.1)

    @task(5)
    def good(self):
        self.client.get("/api/items", name="<script>alert(1)</script>")

    @task(2)
    def formula(self):
        self.client.get("/", name="=HYPERLINK(1)|x")

    @task(2)
    def failing(self):
        with self.client.get("/", name="failing", catch_response=True) as response:
            response.failure("<img src=x onerror=alert(2)>")

    @task(1)
    def raising(self):
        raise RuntimeError("boom <b>in</b> task")
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(Load Manager, run, cluster) of a real run of 7 s that is over."""
    port = find_free_port()
    manager = LoadManager(
        tmp_path_factory.mktemp("reports"),
        base_config(
            cluster_config(f"http://127.0.0.1:{port}"),
            orchestrator={"metricsPollIntervalSeconds": 1, "lostAfterSeconds": 10},
        ),
    ).start()
    with (
        Target() as target,
        LocustCluster(
            HOSTILE, 1, {}, ["--host", target.url], worker_args=["--host", target.url], web_port=port
        ) as locust,
    ):
        run = manager.create(
            durationSeconds=7, scenarioId="<b>browse</b>", metadata={"note": "</pre><script>x</script>"}
        ).json
        assert manager.post(f"/v1/tests/{run['id']}/annotations", {"text": "deploy <i>now</i>"}).status == 201
        manager.wait_for(run["id"], "Running")
        assert manager.post(f"/v1/tests/{run['id']}/users", {"targetUsers": 8}).status == 200
        final = manager.wait_for(run["id"], "Finished")
        yield manager, final, locust
    manager.end()


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text.append(data)


def test_report_page_is_inert_and_complete(finished):
    manager, run, _ = finished
    answer = manager.get(f"/v1/tests/{run['id']}/report.html")
    assert answer.status == 200 and "default-src 'none'" in answer.headers["content-security-policy"]
    page = Tags()
    page.feed(answer.body.decode())
    assert not {"script", "img", "b>", "i", "link", "iframe"} & set(page.seen), set(page.seen)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("href", "src")]
    text = "".join(page.text)
    for words in (
        "<script>alert(1)</script>",
        "<b>browse</b>",
        "deploy <i>now</i>",
        "boom <b>in</b> task",
        "onerror=alert(2)",
        "Aggregated",
        "hooks_absent",
    ):
        assert words in text, f"{words} is missing in the report"
    assert page.seen.count("svg") == 3 and page.seen.count("polyline") == 5


def test_changed_users_are_in_every_report_and_on_the_terminal(finished):
    manager, run, _ = finished
    words = "5 users at 5/s, changed to 8 users at 5/s after "
    text = {
        name: manager.get(f"/v1/tests/{run['id']}/{name}").body.decode()
        for name in ("report.html", "report.md", "summary.md")
    }
    assert "Changes of the load" in text["report.html"] and "8 users at 5/s, by api" in text["report.html"]
    assert words in text["report.md"] and words in text["summary.md"]
    shown = command(manager, "show", run["id"])
    assert words in shown and "users 8 at most, of 5→8" in shown
    assert "5→8" in command(manager, "list")


def command(manager: LoadManager, *arguments: str) -> str:
    """What the command line prints."""
    server = ("--url", manager.url)
    environment = {**os.environ, "LOADMANAGER_TOKEN": API_TOKEN, "PYTHONIOENCODING": "utf-8"}
    program = [sys.executable, loadmanager.__file__, *arguments, *server]
    done = subprocess.run(program, capture_output=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode()


def test_finished_run_shows_the_users_it_had(finished):
    manager, run, _ = finished
    samples = manager.get(f"/v1/tests/{run['id']}/metrics").json["points"]
    peak = max(point["currentUsers"] for point in samples if point["currentUsers"] is not None)
    assert peak == 8
    assert "at most 8 users" in manager.get(f"/v1/tests/{run['id']}/report.md").body.decode()
    assert "<b>8</b>users, at most" in manager.get(f"/v1/tests/{run['id']}/report.html").body.decode()


def sample(at: float, source: str, users: int | None, rps: float | None) -> loadmanager.Sample:
    fields = dict.fromkeys(loadmanager.Sample._fields)
    return loadmanager.Sample(
        **{**fields, "run_id": "r", "at": at, "source": source, "users": users, "rps": rps}
    )


def test_line_of_a_chart_takes_each_figure_from_one_source_and_ends_with_users():
    samples = [
        sample(1.0, "poll", 10, 0.0),  # up to 2 s old: Locust's cache
        sample(1.2, "push", 20, 5.0),
        sample(2.0, "poll", 10, 0.0),
        sample(2.2, "push", 20, 6.0),
        sample(3.2, "push", 0, 6.0),
        sample(3.5, "final", 20, 28.0),
    ]
    assert loadmanager.line_points(samples, "users") == [(1.2, 20), (2.2, 20)]
    assert loadmanager.line_points(samples, "rps") == [(1.2, 5.0), (2.2, 6.0), (3.2, 6.0)]
    polled = [one for one in samples if one.source != "push"]
    assert loadmanager.line_points(polled, "users") == [(1.0, 10), (2.0, 10)]
    assert loadmanager.line_points(polled, "rps")[-1] == (3.5, 28.0), "too short for a rate: the whole run's"


def test_failures_and_exceptions_are_locust_s(finished):
    manager, run, locust = finished
    kept = manager.get(f"/v1/tests/{run['id']}/failures").json
    (failure,) = kept["failures"]
    assert failure["name"] == "failing" and "onerror" in failure["error"]
    assert failure["occurrences"] == run["lastMetrics"]["totalFailures"]
    (exception,) = kept["exceptions"]
    assert "boom" in exception["message"] and "RuntimeError" in exception["traceback"]
    assert exception["count"] == locust.get("/exceptions")["exceptions"][0]["count"]


def test_csv_cells_are_no_formulas_and_numbers_are_the_run_s(finished):
    manager, run, _ = finished
    rows = list(csv.DictReader(io.StringIO(manager.get(f"/v1/tests/{run['id']}/requests.csv").body.decode())))
    assert "'=HYPERLINK(1)|x" in [row["name"] for row in rows]
    assert int(rows[-1]["numRequests"]) == run["lastMetrics"]["totalRequests"]
    samples = list(
        csv.DictReader(io.StringIO(manager.get(f"/v1/tests/{run['id']}/metrics.csv").body.decode()))
    )
    assert len(samples) == manager.get(f"/v1/tests/{run['id']}/metrics").json["total"]
    assert int(samples[-1]["totalRequests"]) == run["lastMetrics"]["totalRequests"]


def test_markdown_has_a_table_that_names_cannot_break(finished):
    manager, run, _ = finished
    text = manager.get(f"/v1/tests/{run['id']}/report.md").body.decode()
    table = [line for line in text.splitlines() if line.startswith("| ")]
    widths = {
        line.replace("\\|", "").count("|") for line in table if "HYPERLINK" in line or "Aggregated" in line
    }
    assert len(widths) == 1, f"a name broke the table: {table}"
    assert "<script>" not in text and "<img" not in text


def test_locust_s_own_report_is_kept_and_sandboxed(finished):
    manager, run, _ = finished
    answer = manager.get(f"/v1/tests/{run['id']}/locust-report.html?download=1")
    assert (
        answer.status == 200
        and b"<html" in answer.body
        and "sandbox" in answer.headers["content-security-policy"]
    )
    assert answer.headers["content-disposition"] == f'attachment; filename="{run["id"]}-locust-report.html"'


def test_everything_is_there_after_a_restart_and_gone_with_the_run(finished):
    manager, run, locust = finished
    before = {
        name: manager.get(f"/v1/tests/{run['id']}/{name}").body
        for name in ("failures", "annotations", "report.md", "locust-report.html")
    }
    manager.kill9()
    manager.restart()
    for name, body in before.items():
        assert manager.get(f"/v1/tests/{run['id']}/{name}").body == body, f"{name} changed with the restart"
    again = manager.post(f"/v1/tests/{run['id']}/rerun").json
    manager.post(f"/v1/tests/{again['id']}/stop")
    manager.wait_for(again["id"], "Finished")
    assert manager.request("DELETE", f"/v1/tests/{again['id']}").status == 204
    assert manager.get(f"/v1/tests/{again['id']}/failures").status == 404


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": ""},
        {"text": 5},
        {"text": "x" * 1001},
        {"text": "x", "at": "soon"},
        {"text": "x", "more": 1},
        {"text": "a\nb"},
        {"text": "x", "at": "0001-01-01T00:00:00Z"},
        {"text": "x", "at": "999999999999"},
    ],
)
def test_bad_annotation_is_refused_by_field(finished, body):
    manager, run, _ = finished
    answer = manager.post(f"/v1/tests/{run['id']}/annotations", body)
    assert answer.status == 400 and len(answer.json["fields"]) == 1


def test_run_without_numbers_has_reports_too(finished):
    manager, _, _ = finished
    manager_down = manager.post(
        "/v1/tests",
        {
            "tenantId": "acme",
            "envId": "dev",
            "scenarioId": "x",
            "targetUsers": 1,
            "spawnRate": 1,
            "queue": True,
        },
    )
    run_id = manager_down.json.get("id") or manager_down.json["runId"]
    for name in ("report.html", "report.md", "metrics.csv", "requests.csv"):
        assert manager.get(f"/v1/tests/{run_id}/{name}").status == 200, name
    eventually(lambda: manager.post(f"/v1/tests/{run_id}/stop").status in (200, 409), 10)


def test_chart_axes_are_round_numbers():
    assert [loadmanager._round_up(value) for value in (0, 0.3, 1, 1.1, 7, 99, 101, 240)] == [
        1,
        0.5,
        1,
        2,
        10,
        100,
        200,
        250,
    ]
    assert (
        json.dumps([loadmanager.duration_text(s) for s in (0, 59, 61, 3661)])
        == '["0s", "59s", "1m 1s", "1h 1m 1s"]'
    )
