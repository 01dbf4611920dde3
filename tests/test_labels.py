"""Labels of runs and scenarios: said once, kept everywhere, and found again."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import pytest
from chromium import Chromium
from conftest import ROOT, LoadManager, cluster_config
from test_cli import cli
from test_dashboard import Page, fill, leave_the_page_before
from test_store import postgres_url  # noqa: F401 - a fixture
from waiting import eventually

LABELS = ["release 4.2", "black, friday", "🚀 @channel <b>"]
SCENARIOS = [{"id": "browse", "labels": ["nightly", "browse"]}, {"id": "bare"}]


@pytest.fixture(params=["sqlite", "postgresql"])
def labelled(request, load_manager, fake) -> LoadManager:
    """A Load Manager on either database, whose scenario `browse` has labels."""
    storage = {"url": request.getfixturevalue("postgres_url")} if request.param == "postgresql" else {}
    return load_manager(
        cluster_config(fake.url), scenarios=SCENARIOS, **({"storage": storage} if storage else {})
    )


@pytest.fixture(scope="module")
def browser():
    with Chromium() as browser:
        browser.size(1400, 1000)
        yield browser


def over(lm: LoadManager, **changes) -> dict:
    """A run that was stopped."""
    run = lm.create(**changes)
    assert run.status == 201, run.body
    lm.post(f"/v1/tests/{run.json['id']}/stop")
    return lm.wait_for(run.json["id"], "Finished")


def found(lm: LoadManager, query: str) -> list[str]:
    answer = lm.get(f"/v1/tests?{query}")
    assert answer.status == 200, answer.body
    return [run["id"] for run in answer.json]


def test_a_run_has_the_labels_of_its_create_or_of_its_scenario_also_after_a_restart(labelled):
    own = over(labelled, labels=LABELS)
    given = over(labelled)
    none = over(labelled, labels=[])
    bare = over(labelled, scenarioId="bare")
    assert own["labels"] == LABELS
    assert given["labels"] == ["nightly", "browse"]
    assert "labels" not in none and "labels" not in bare
    labelled.restart()
    assert [labelled.run(run["id"]) for run in (own, given, none, bare)] == [own, given, none, bare]
    assert labelled.get("/v1/scenarios").json == SCENARIOS


def test_a_rerun_has_the_labels_of_the_first_run_or_others(lm):
    first = over(lm, labels=["a"])
    again = lm.post(f"/v1/tests/{first['id']}/rerun").json
    assert again["labels"] == ["a"]
    lm.post(f"/v1/tests/{again['id']}/stop")
    lm.wait_for(again["id"], "Finished")
    other = lm.post(f"/v1/tests/{first['id']}/rerun", {"labels": ["b", "c"]}).json
    assert other["labels"] == ["b", "c"]
    lm.post(f"/v1/tests/{other['id']}/stop")


def test_a_list_has_the_runs_with_all_labels_asked_for_page_by_page(labelled):
    both = over(labelled, labels=["red", "big one"])
    red = over(labelled, labels=["red"])
    over(labelled, labels=["reddish"])
    assert found(labelled, "label=red") == [red["id"], both["id"]]
    assert found(labelled, "label=red&label=big+one") == [both["id"]]
    assert found(labelled, "label=red&label=none") == found(labelled, "label=Red") == []
    assert found(labelled, "search=BIG+o") == [both["id"]], "the search looks into labels, too"
    first = labelled.get("/v1/tests?label=red&label=big+one&limit=1")
    assert "link" not in first.headers
    page = labelled.get("/v1/tests?label=red&limit=1")
    rest = page.headers["link"].split(">")[0].removeprefix("<")
    assert [run["id"] for run in labelled.get(rest).json] == [both["id"]]


def test_both_labels_of_a_question_are_in_the_link_to_its_next_page(lm):
    for _ in range(2):
        over(lm, labels=["a", "b"])
    link = lm.get("/v1/tests?label=a&label=b&limit=1").headers["link"]
    assert "label=a&label=b&" in link


def test_labels_travel_with_an_export_and_stand_in_reports_and_csv(lm, load_manager):
    run = over(lm, labels=LABELS)
    exported = lm.get(f"/v1/tests/{run['id']}/export")
    elsewhere = load_manager(cluster_config("http://127.0.0.1:9"))
    imported = elsewhere.post("/v1/tests/import", exported.body)
    assert (imported.status, imported.json["labels"]) == (201, LABELS)
    assert found(elsewhere, "label=release+4.2") == [run["id"]]
    page = lm.get(f"/v1/tests/{run['id']}/report.html").body.decode()
    assert "release 4.2, black, friday, 🚀 @channel &lt;b&gt;" in page
    for name in ("report.md", "summary.md"):
        text = lm.get(f"/v1/tests/{run['id']}/{name}").body.decode()
        assert "**release 4.2**, **black, friday**" in text, name
        assert "@channel" not in text and "<b>" not in text, f"{name} makes a mention or markup of a label"
    rows = csv.DictReader(io.StringIO(lm.get(f"/v1/tests/{run['id']}/scenario.csv").body.decode()))
    assert [row["labels"] for row in rows] == [", ".join(LABELS)]


def test_a_file_of_locust_is_imported_with_the_labels_it_is_given(lm):
    head = "Type,Name,Request Count,Failure Count,Median Response Time,Average Response Time"
    body = {
        "format": "locust-csv", "tenantId": "acme", "envId": "dev", "scenarioId": "browse", "labels": ["ci"],
        "startedAt": "2026-01-01T00:00:00Z", "finishedAt": "2026-01-01T00:01:00Z",
        "stats": f"{head}\nGET,/a,10,0,5,6\n,Aggregated,10,0,5,6\n",
    }  # fmt: skip
    answer = lm.post("/v1/tests/import", body)
    assert (answer.status, answer.json.get("labels")) == (201, ["ci"]), answer.body


@pytest.mark.parametrize(
    "wrong",
    ["red", {"red": 1}, [1], [None], [""], ["x" * 61], ["a\nb"], ["a", "a"], [str(n) for n in range(21)],
        [["a"]], 5, True],
)  # fmt: skip
def test_wrong_labels_are_refused_by_name(lm, wrong):
    answer = lm.create(labels=wrong)
    assert answer.status == 400 and list(answer.json["fields"]) == ["labels"], answer.body
    assert "a list of at most 20 different texts of 1 to 60" in answer.json["fields"]["labels"]


def test_most_labels_and_the_longest_are_taken(lm):
    most = [f"{number:02}" + "🦗" * 58 for number in range(20)]
    assert over(lm, labels=most)["labels"] == most


def test_a_wrong_label_in_a_question_is_refused_by_name(lm):
    answer = lm.get("/v1/tests?label=" + "x" * 61)
    assert (answer.status, list(answer.json["fields"])) == (400, ["label"])


def test_wrong_labels_of_a_scenario_are_a_problem_of_the_configuration(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"scenarios": [{"id": "a", "labels": ["x", "x"]}]}))
    told = subprocess.run(
        [sys.executable, str(ROOT / "loadmanager.py"), "check", "-config", str(config)],
        capture_output=True, text=True, timeout=40,
    )  # fmt: skip
    assert told.returncode == 2 and "scenarios[0].labels" in told.stdout + told.stderr, told
    assert "Traceback" not in told.stderr


def test_the_api_document_tells_of_labels(lm):
    document = lm.get("/openapi.json").json
    texts = {"type": "array", "items": {"type": "string"}}
    schemas = document["components"]["schemas"]
    assert schemas["Run"]["properties"]["labels"] == schemas["Scenario"]["properties"]["labels"] == texts
    create = document["paths"]["/v1/tests"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert create["properties"]["labels"]["anyOf"][0]["maxItems"] == 20
    (label,) = [one for one in document["paths"]["/v1/tests"]["get"]["parameters"] if one["name"] == "label"]
    assert label["schema"]["type"] == "array"


def test_the_command_starts_lists_and_shows_runs_with_labels(lm):
    create = ("--tenant", "acme", "--env", "dev", "--scenario", "browse", "-u", "5", "-r", "5")
    started = cli(lm.url, "run", *create, "--detach", "--label", "red", "--label", "big one")
    assert started.returncode == 0, started.stderr
    (run,) = lm.get("/v1/tests").json
    assert run["labels"] == ["red", "big one"]
    listed = cli(lm.url, "list", "--label", "red", "--label", "big one", "--json")
    assert [one["id"] for one in json.loads(listed.stdout)] == [run["id"]]
    assert json.loads(cli(lm.url, "list", "--label", "blue", "--json").stdout) == []
    assert "red, big one" in cli(lm.url, "show", "latest").stdout
    wrong = cli(lm.url, "run", *create, "--label", "x" * 61)
    assert wrong.returncode != 0 and "labels" in wrong.stderr and "Traceback" not in wrong.stderr
    lm.post(f"/v1/tests/{run['id']}/stop")


def test_the_page_asks_for_labels_shows_them_and_finds_runs_by_them(browser, load_manager, fake):
    lm = load_manager(cluster_config(fake.url))
    other = over(lm, labels=["blue"])
    leave_the_page_before(browser)
    page = Page(browser, lm)
    page.sign_in()
    page.press("Start a test")
    fill(page, "#start-dialog", scenarioId="browse", labels="release 4.2\n <b>big</b>, one ")
    page.press("Start test", "#start-dialog")
    page.shows("Status", ".run-head", 20)
    run = lm.run(page.driver.current_url.rsplit("/", 1)[1])
    assert run["labels"] == ["release 4.2", "<b>big</b>, one"]
    page.press("Details", "main")
    page.shows("release 4.2, <b>big</b>, one", ".details")
    lm.post(f"/v1/tests/{run['id']}/stop")
    lm.wait_for(run["id"], "Finished")
    page.open()
    eventually(lambda: run["id"] in links(page) and other["id"] in links(page), what="both runs in the list")
    page.one("#filter").send_keys("RELEASE 4")
    eventually(
        lambda: run["id"] in links(page) and other["id"] not in links(page), what="only the labelled run"
    )


def links(page: Page) -> str:
    return " ".join(link.get_attribute("href") or "" for link in page.all("main a[href*='#/runs/']"))
