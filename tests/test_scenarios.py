"""What a scenarioId means, stages, and users changed in a running load; on real Locust where Locust
decides."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from conftest import API_TOKEN, CALLBACK_TOKEN, ROOT, cluster_config, create_body
from locust_process import LocustCluster, find_free_port
from target import Target
from test_lifecycle import RULES
from waiting import eventually

import loadmanager

LOCUSTFILE = """
import loadmanager_hooks
from locust import HttpUser, constant, events, tag, task

@events.init_command_line_parser.add_listener
def _(parser):
    parser.add_argument("--page-size", type=int, default=10)

class Buyer(HttpUser):
    wait_time = constant(0.05)

    @tag("read")
    @task
    def browse(self):
        size = self.environment.parsed_options.page_size
        self.client.get("/read", params={"size": size}, name=f"/read {size}")

    @tag("write")
    @task
    def buy(self):
        self.client.post("/write")

class Seller(HttpUser):
    wait_time = constant(0.05)

    @tag("read")
    @task
    def sell(self):
        self.client.get("/sell")
"""
SCENARIOS = [
    {"id": "checkout", "description": "buyers only", "userClasses": ["Buyer"], "options": {"page-size": 25},
        "targetUsers": 3, "spawnRate": 3, "durationSeconds": 3,
     "thresholds": ["errorRate < 50"], "tenants": ["acme"]},
    {"id": "waves", "stages": [{"targetUsers": 2, "spawnRate": 10, "durationSeconds": 3},
        {"targetUsers": 6, "spawnRate": 10, "durationSeconds": 4}]},
    {"id": "others", "targetUsers": 1, "spawnRate": 1, "tenants": ["globex"]},
]  # fmt: skip


@pytest.fixture(scope="module")
def targets():
    with Target() as one, Target() as other:
        yield one, other


@pytest.fixture
def lm(load_manager, targets, tmp_path):
    """A Load Manager with scenarios, and a real master with --class-picker and two workers."""
    locustfile = tmp_path / "locustfile.py"
    locustfile.write_text(LOCUSTFILE)
    (tmp_path / "loadmanager_hooks.py").write_text((ROOT / "locust" / "loadmanager_hooks.py").read_text())
    port = find_free_port()
    lm = load_manager(cluster_config(f"http://127.0.0.1:{port}"), orchestrator=RULES, scenarios=SCENARIOS)
    environment = {
        "CONTROL_PLANE_URL": lm.url,
        "CONTROL_PLANE_TOKEN": CALLBACK_TOKEN,
        "METRICS_PUSH_INTERVAL": "1",
    }
    lm.locust = LocustCluster(
        locustfile,
        2,
        environment,
        ["--host", targets[0].url, "--class-picker"],
        worker_args=["--host", targets[0].url],
        web_port=port,
    ).start()
    for target in targets:
        target.counts.clear()
    yield lm
    lm.locust.stop()


def create(lm, scenario, **more):
    return lm.post("/v1/tests", {"tenantId": "acme", "envId": "dev", "scenarioId": scenario, **more})


def finished(lm, scenario, **more):
    created = create(lm, scenario, **more)
    assert created.status == 201, created.body
    return lm.wait_for(created.json["id"], "Finished", within_s=40)


def endpoints(run):
    return {row["name"] for row in run["lastMetrics"]["requestStats"].values()}


def test_what_a_scenario_gives_travels_to_locust_and_nothing_of_it_stays_for_the_next_run(lm, targets):
    run = finished(lm, "checkout")
    assert (run["targetUsers"], run["spawnRate"], run["durationSeconds"]) == (3, 3, 3)
    assert (run["userClasses"], run["options"], run["verdict"]) == (["Buyer"], {"page_size": 25}, "passed")
    assert endpoints(run) == {"/read 25", "/write"}
    assert run["lastMetrics"]["totalRequests"] > 0 == targets[1].total

    tagged = finished(
        lm, "checkout", tags=["write"], host=targets[1].url, options={"page_size": 5}, durationSeconds=2
    )
    assert endpoints(tagged) == {"/write"} and (tagged["host"], tagged["tags"]) == (targets[1].url, ["write"])
    assert set(targets[1].counts) == {"/write"}

    seen = targets[1].total
    plain = finished(lm, "waves")
    assert endpoints(plain) == {"/read 10", "/write", "/sell"}, (
        "classes, tags or options of an earlier run were left in Locust"
    )
    assert targets[1].total == seen, "the host of an earlier run was left in Locust"
    assert "users_not_reached" not in [warning["code"] for warning in plain.get("warnings", ())]
    lm.locust.swarm(2, 2, host=targets[1].url)  # somebody chooses another host in Locust's own page
    eventually(lambda: targets[1].total > seen, 10)
    lm.locust.post("/stop")
    eventually(
        lambda: not lm.get("/v1/tests?status=Pending,Running,Stopping").json,
        10,
        what="the test of Locust's page is over",
    )
    seen = targets[1].total
    finished(lm, "waves", stages=[{"targetUsers": 1, "spawnRate": 1, "durationSeconds": 2}])
    assert targets[1].total > seen, "what was chosen in Locust's page stays, as without us"
    again = lm.post(f"/v1/tests/{tagged['id']}/rerun", {}).json
    assert {name: again[name] for name in ("host", "tags", "userClasses", "options")} == {
        name: tagged[name] for name in ("host", "tags", "userClasses", "options")
    }
    assert lm.post(f"/v1/tests/{again['id']}/stop").status == 200


@pytest.mark.parametrize(
    ("more", "field", "says"),
    [
        ({"userClasses": ["Buyer", "Nobody"]}, "userClasses", "it has Buyer, Seller"),
        ({"options": {"colour": "red"}}, "options", "it has page_size"),
        ({"tags": ["delete"]}, "tags", "it has read, write"),
    ],
)
def test_what_the_cluster_does_not_have_is_refused_with_what_it_has(lm, more, field, says):
    refused = create(lm, "checkout", **more)
    assert refused.status == 400 and says in refused.json["fields"][field], refused.body
    assert lm.get("/v1/tests").json == [], "nothing was started"


def test_stages_come_on_time_and_users_can_be_changed_by_hand_over_a_restart(lm):
    stages = [
        {"targetUsers": 2, "spawnRate": 10, "durationSeconds": 8},
        {"targetUsers": 6, "spawnRate": 10, "durationSeconds": 120},
    ]
    run = create(lm, "waves", stages=stages).json
    assert (run["targetUsers"], run["spawnRate"], run["durationSeconds"], run["stages"]) == (
        6,
        10,
        128,
        stages,
    )
    users = lambda: lm.locust.stats()["user_count"]  # noqa: E731
    eventually(lambda: users() == 2, 8, what="the users of the first stage")
    eventually(lambda: users() == 6, 30, what="the users of the second stage")
    assert time.time() - loadmanager.time_of(run, "startedAt") > 7, "the second stage came too early"

    changed = lm.post(f"/v1/tests/{run['id']}/users", {"targetUsers": 9, "spawnRate": 20})
    assert (changed.status, [one["targetUsers"] for one in changed.json["usersChanges"]]) == (200, [9])
    eventually(lambda: users() == 9, 20, what="the users of the change")
    lm.kill9()
    lm.restart()
    assert (
        lm.post(f"/v1/tests/{run['id']}/users", {"targetUsers": 4}).json["usersChanges"][-1]["spawnRate"]
        == 20
    )
    eventually(lambda: users() == 4, 20, what="the users of the second change")
    final = lm.run(run["id"])
    assert "users_changed" not in [warning["code"] for warning in final.get("warnings", ())], (
        "our own change was taken for one in Locust's page"
    )
    assert lm.post(f"/v1/tests/{run['id']}/stop").status == 200
    assert lm.post(f"/v1/tests/{run['id']}/users", {"targetUsers": 4}).status == 409


def test_a_stage_that_began_while_load_manager_was_away_is_applied_at_its_return(lm):
    stages = [
        {"targetUsers": 2, "spawnRate": 10, "durationSeconds": 3},
        {"targetUsers": 5, "spawnRate": 10, "durationSeconds": 60},
    ]
    run = create(lm, "waves", stages=stages).json
    eventually(lambda: lm.locust.stats()["user_count"] == 2, 8)
    lm.kill9()
    eventually(lambda: time.time() > loadmanager.time_of(run, "startedAt") + 3.5, 10)
    lm.restart()
    eventually(lambda: lm.locust.stats()["user_count"] == 5, 10, what="the stage that began meanwhile")
    assert lm.post(f"/v1/tests/{run['id']}/stop").status == 200


# ---- without a cluster -------------------------------------------------------


@pytest.fixture
def configured(load_manager, fake):
    return load_manager(cluster_config(fake.url), scenarios=SCENARIOS)


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ({"scenarioId": "nope"}, "scenarioId", "there are checkout, waves"),
        ({"scenarioId": "others"}, "scenarioId", "there are checkout, waves"),
        ({"scenarioId": "waves", "targetUsers": 5}, "spawnRate", "is missing"),
        (
            {
                "scenarioId": "waves",
                "stages": [{"targetUsers": 1, "spawnRate": 1, "durationSeconds": 1}],
                "targetUsers": 5,
            },
            "stages",
            "must be given without them",
        ),
        ({"scenarioId": "waves", "stages": []}, "stages", "1 to 100"),
        (
            {"scenarioId": "waves", "stages": [{"targetUsers": 0, "spawnRate": 1, "durationSeconds": 1}]},
            "stages",
            "from 1",
        ),
        ({"scenarioId": "waves", "host": "javascript:alert(1)"}, "host", "http(s)"),
        ({"scenarioId": "waves", "host": "http://a b"}, "host", "http(s)"),
        ({"scenarioId": "waves", "userClasses": "Buyer; rm -rf"}, "userClasses", "names"),
        ({"scenarioId": "waves", "options": {"run_id": "x"}}, "options", "custom"),
        ({"scenarioId": "waves", "options": {"a": [1]}}, "options", "custom"),
    ],
)
def test_a_create_that_no_scenario_completes_is_refused(configured, body, field, says):
    refused = configured.post("/v1/tests", {"tenantId": "acme", "envId": "dev", **body})
    assert refused.status == 400 and says in refused.json["fields"][field], refused.body


def test_without_scenarios_any_id_is_taken_and_the_numbers_are_needed(lm_without):
    assert lm_without.create(scenarioId="anything").status == 201
    missing = lm_without.post(
        "/v1/tests",
        {name: value for name, value in create_body().items() if name not in ("targetUsers", "spawnRate")},
    )
    assert set(missing.json["fields"]) == {"targetUsers", "spawnRate"}
    assert lm_without.get("/v1/scenarios").json == []


@pytest.fixture
def lm_without(load_manager, fake):
    return load_manager(cluster_config(fake.url))


def test_scenarios_are_listed_by_api_and_command_line(configured):
    listed = {one["id"]: one for one in configured.get("/v1/scenarios").json}
    assert set(listed) == {"checkout", "waves"}
    assert listed["checkout"] == {
        "id": "checkout", "description": "buyers only", "userClasses": ["Buyer"],
        "options": {"page_size": 25}, "targetUsers": 3, "spawnRate": 3,
        "durationSeconds": 3, "thresholds": ["errorRate < 50"], "tenants": ["acme"],
    }  # fmt: skip
    shown = subprocess.run(
        [
            sys.executable,
            str(ROOT / "loadmanager.py"),
            "scenarios",
            "--url",
            configured.url,
            "--token",
            API_TOKEN,
        ],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert "checkout" in shown.stdout and "buyers only" in shown.stdout, shown.stderr


@pytest.mark.parametrize(
    ("scenario", "problem"),
    [
        ({"id": "a", "thresholds": ["p95 ! 5"]}, "scenarios[0].thresholds: [0]"),
        ({"id": "a", "thresholds": "p95 < 5"}, "scenarios[0].thresholds: must be"),
        ({"id": "a", "locustfile": "nope.py"}, "scenarios[0].locustfile: nope.py is not a file"),
        ({"id": "a", "targetUsers": 0}, "scenarios[0].targetUsers: must be"),
        ({"id": "a", "stages": [{}]}, "scenarios[0].stages: must be"),
        ({"id": "a", "colour": 1}, "scenarios[0].colour: unknown key"),
        ({}, "scenarios[0].id: is missing"),
    ],
)
def test_a_wrong_scenario_is_a_refusal_to_start(tmp_path, scenario, problem):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({"security": {"apiToken": "a", "locustCallbackToken": "b"}, "scenarios": [scenario]})
    )
    checked = subprocess.run(
        [sys.executable, str(ROOT / "loadmanager.py"), "check", "-config", str(path)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert checked.returncode == 2 and problem in checked.stderr, checked.stderr
