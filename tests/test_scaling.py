"""Clusters that wake, grow, shrink and sleep: real Locust processes, and commands of the user."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import sys

import pytest
import yaml
from conftest import CALLBACK_TOKEN, ROOT, cluster_config
from locust_process import LocustCluster, find_free_port
from target import Target
from test_lifecycle import LOCUSTFILE, RULES, descendants, is_running, start_run
from waiting import eventually, holds_for

import loadmanager


@pytest.fixture
def target():
    with Target() as target:
        yield target


@pytest.fixture
def sleeping(load_manager, target, tmp_path):
    """A launched cluster that runs only while it is needed, one worker for two users."""
    other = tmp_path / "other.py"
    other.write_text(
        "import loadmanager_hooks\nfrom locust import HttpUser, task, constant\nclass "
        "Other(HttpUser):\n    wait_time = constant(0.1)\n    @task\n    def t(self):\n        "
        "self.client.get('/other')\n"
    )
    (tmp_path / "loadmanager_hooks.py").write_text((ROOT / "locust" / "loadmanager_hooks.py").read_text())
    launcher = {
        "type": "process",
        "locustfile": str(LOCUSTFILE),
        "workers": 1,
        "host": target.url,
        "usersPerWorker": 2,
        "maxWorkers": 3,
        "idleSeconds": 2,
    }
    scenarios = [{"id": "browse"}, {"id": "other", "locustfile": str(other)}]
    return load_manager(
        {"id": "local", "tenantId": "acme", "envId": "dev", "launcher": launcher},
        orchestrator=RULES,
        scenarios=scenarios,
    )


def cluster(lm):
    return lm.get("/v1/clusters").json[0]


def test_a_sleeping_cluster_wakes_for_a_run_with_the_workers_it_needs_and_sleeps_again(sleeping, target):
    assert cluster(sleeping)["state"] == "asleep" and not descendants(sleeping.process.pid), (
        "nothing runs before it is needed"
    )
    run = start_run(sleeping, targetUsers=5, durationSeconds=3)
    processes = descendants(sleeping.process.pid)
    assert len(cluster(sleeping)["workers"]) == 3, "5 users at 2 for each worker"
    assert sleeping.wait_for(run["id"], "Finished")["trust"] == "ok"
    assert target.total > 0
    logs = {
        one["process"]: one["lines"] for one in sleeping.get("/v1/clusters/local/logs?lines=50").json["logs"]
    }
    assert set(logs) == {"master", "worker-1", "worker-2", "worker-3"} and any(
        "Starting Locust" in line for line in logs["worker-1"]
    )
    eventually(lambda: cluster(sleeping)["state"] == "asleep", 10, what="the cluster sleeps")
    assert not [pid for pid in processes if is_running(pid)], "processes of the sleeping cluster were left"

    again = start_run(sleeping, scenarioId="other", targetUsers=1, durationSeconds=2)
    final = sleeping.wait_for(again["id"], "Finished")
    assert [row["name"] for row in final["lastMetrics"]["requestStats"].values()] == ["/other"], (
        "the scenario's locustfile was not the one that ran"
    )
    back = start_run(sleeping, scenarioId="browse", targetUsers=1, durationSeconds=1)
    assert "/other" not in [
        row["name"]
        for row in sleeping.wait_for(back["id"], "Finished")["lastMetrics"]["requestStats"].values()
    ]


def test_kill_9_in_the_middle_leaves_no_process_and_the_next_start_goes_on(sleeping):
    run = start_run(sleeping, targetUsers=4)
    processes = descendants(sleeping.process.pid)
    assert len(processes) >= 4
    sleeping.kill9()
    eventually(
        lambda: not [pid for pid in processes if is_running(pid)],
        10,
        what="all processes of the cluster are gone",
    )
    sleeping.restart()
    ended = sleeping.wait_for(run["id"], "Failed")
    assert "its cluster ended with the Load Manager" in ended["failureReason"]
    again = start_run(sleeping, targetUsers=1, durationSeconds=1)
    sleeping.wait_for(again["id"], "Finished")


def test_workers_are_changed_by_hand_under_a_running_load(sleeping):
    run = start_run(sleeping, targetUsers=2, spawnRate=10)
    scaled = sleeping.post("/v1/clusters/local/scale", {"workers": 2})
    assert (scaled.status, scaled.json["workersWanted"]) == (200, 2)

    def shares():
        return sorted(
            worker["userCount"] for worker in cluster(sleeping)["workers"] if worker["state"] == "running"
        )

    eventually(lambda: shares() == [1, 1], 20, what="the users are spread over both workers")
    assert sleeping.post("/v1/clusters/local/scale", {"workers": 1}).status == 200
    eventually(lambda: shares() == [2], 20, what="the users are on the one worker that is left")
    assert "workers_lost" not in [
        warning["code"] for warning in sleeping.run(run["id"]).get("warnings", ())
    ], "a worker sent away is not lost"
    assert sleeping.post(f"/v1/tests/{run['id']}/stop").status == 200
    for wrong in ({"workers": 0}, {"workers": 4}, {"workers": "2"}, {}, {"workers": 1, "more": 1}):
        assert "workers" in str(sleeping.post("/v1/clusters/local/scale", wrong).json["fields"]), wrong
    assert sleeping.post("/v1/clusters/nope/scale", {"workers": 1}).status == 404


# ---- commands of the user -----------------------------------------------------

WORKERS_SCRIPT = '''#!{python}
"""Keeps N Locust workers of one master running: scale.py N; without N it prints how many there are."""
import os, pathlib, signal, subprocess, sys
folder = pathlib.Path(__file__).parent
def alive(pid):
    try:
        return pathlib.Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
pids = [int(path.stem) for path in folder.glob("*.pid")]
for pid in pids:
    if not alive(pid):
        (folder / f"{{pid}}.pid").unlink()
pids = [pid for pid in pids if alive(pid)]
if len(sys.argv) == 1:
    print(len(pids))
    sys.exit()
wanted = int(sys.argv[1])
with (folder / "calls").open("a") as calls:
    calls.write(sys.argv[1] + "\\n")
for pid in pids[wanted:]:
    os.kill(pid, signal.SIGTERM)
for _ in range(wanted - len(pids)):
    command = [sys.executable, "-m", "locust", "-f", {locustfile!r}, "--worker", "--master-port", "{port}"]
    none = subprocess.DEVNULL
    worker = subprocess.Popen(command, stdout=none, stderr=none, stdin=none, start_new_session=True)
    (folder / f"{{worker.pid}}.pid").touch()
'''


@pytest.fixture
def commanded(load_manager, target, tmp_path):
    """A real master without workers, and a command that starts and ends real ones."""
    port = find_free_port()
    lm = load_manager()
    master = LocustCluster(
        LOCUSTFILE,
        1,
        {"CONTROL_PLANE_URL": lm.url, "CONTROL_PLANE_TOKEN": CALLBACK_TOKEN, "METRICS_PUSH_INTERVAL": "1"},
        ["--host", target.url],
        web_port=port,
    )
    master._worker_count = 1
    master._start_master()
    script = tmp_path / "scale.py"
    script.write_text(
        WORKERS_SCRIPT.format(python=sys.executable, locustfile=str(LOCUSTFILE), port=master._bind_port)
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    launcher = {
        "type": "command",
        "usersPerWorker": 2,
        "maxWorkers": 2,
        "idleSeconds": 2,
        "replaceLostWorkers": True,
        "scaleTimeoutSeconds": 25,
        "scale": [str(script), "{workers}"],
        "status": [str(script)],
    }
    lm.config["locustClusters"] = [cluster_config(f"http://127.0.0.1:{port}", launcher=launcher)]
    lm.config["orchestrator"].update(RULES)
    master.wait_ready(0)
    lm.restart()
    lm.calls = lambda: (tmp_path / "calls").read_text().split() if (tmp_path / "calls").exists() else []
    lm.worker_pids = lambda: [int(path.stem) for path in tmp_path.glob("*.pid")]
    yield lm
    lm.end()
    for pid in lm.worker_pids():
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    master.stop()


def test_workers_come_by_a_command_are_replaced_when_lost_and_go_when_idle(commanded):
    run = start_run(commanded, targetUsers=3, spawnRate=10)
    assert commanded.calls() == ["2"] and len(cluster(commanded)["workers"]) == 2
    eventually(lambda: (commanded.run(run["id"]).get("lastMetrics") or {}).get("currentUsers") == 3, 15)
    lost = commanded.worker_pids()[0]
    os.kill(lost, signal.SIGKILL)
    eventually(lambda: commanded.calls() == ["2", "2"], 60, what="the lost worker is replaced")
    eventually(
        lambda: sum(worker["state"] == "running" for worker in cluster(commanded)["workers"]) == 2,
        25,
        what="the new worker has users",
    )
    assert [warning["code"] for warning in commanded.run(run["id"])["warnings"]] == ["workers_lost"]
    assert commanded.post(f"/v1/tests/{run['id']}/stop").status == 200
    eventually(lambda: commanded.calls()[-1] == "0", 15, what="the workers go when idle")
    holds_for(lambda: commanded.calls() == ["2", "2", "0"], 2.5)


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (["/bin/false", "{workers}"], "ended with status 1"),
        (["/does/not/exist", "{workers}"], "cannot be started: No such file"),
        (["/bin/sleep", "9{workers}"], "did not end within 1 s"),
        (["/bin/sh", "-c", "echo no room for {workers} >&2; exit 7"], "ended with status 7: no room for 1"),
        (["/bin/true", "{workers}"], "has no worker connected; the status command counts 2"),
    ],
)
def test_a_command_that_does_not_bring_workers_fails_the_run_with_what_it_said(
    load_manager, fake_locust, scale, says
):
    fake = fake_locust(hooks=True, workers=0)
    launcher = {
        "type": "command",
        "usersPerWorker": 5,
        "scaleTimeoutSeconds": 1,
        "scale": scale,
        "status": ["/bin/echo", "-e", "one\ntwo"],
    }
    lm = load_manager(cluster_config(fake.url, launcher=launcher))
    refused = lm.create()
    assert refused.status == 502 and says in refused.json["message"], refused.body
    assert lm.run(refused.json["runId"])["status"] == "Failed"


README_LAUNCHERS = [
    yaml.safe_load(block)["launcher"]
    for block in re.findall(r"```yaml\n(launcher:.*?)```", (ROOT / "README.md").read_text(), re.S)
]


@pytest.mark.parametrize("launcher", README_LAUNCHERS, ids=lambda launcher: launcher["scale"][0])
def test_the_readme_s_templates_call_exactly_what_they_say(tmp_path, monkeypatch, launcher):
    """A stand-in on PATH writes down its arguments; nothing of {workers} is read by a shell."""
    for kind in ("scale", "status"):
        stand_in = tmp_path / launcher[kind][0]
        stand_in.write_text(
            f"#!{sys.executable}\nimport json, sys\nopen({str(tmp_path / 'seen')!r}, "
            "'w').write(json.dumps(sys.argv[1:]))\nprint(3)\n"
        )
        stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    config = {
        "security": {"apiToken": "a", "locustCallbackToken": "b"},
        "locustClusters": [cluster_config("http://127.0.0.1:9", launcher=launcher)],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = loadmanager.load_config(str(tmp_path / "config.json")).clusters[0]
    cluster_ = loadmanager.Cluster(read, None, None, loadmanager.Timer())
    cluster_.scale(7)
    assert json.loads((tmp_path / "seen").read_text()) == [
        word.replace("{workers}", "7") for word in launcher["scale"][1:]
    ]
    assert cluster_.count_workers() == "; the status command counts 3"
    assert json.loads((tmp_path / "seen").read_text()) == launcher["status"][1:]


@pytest.mark.parametrize(
    ("launcher", "problem"),
    [
        ({"type": "process"}, "launcher.locustfile: is missing"),
        ({"type": "command"}, "launcher.scale: is missing"),
        ({"type": "command", "scale": ["docker"]}, "does not say {workers}"),
        ({"type": "command", "scale": "docker compose up"}, "must be a list of program and arguments"),
        ({"type": "process", "locustfile": "l.py", "workers": 40}, "more than maxWorkers"),
        ({"type": "nomad"}, "launcher.type: must be process or command"),
    ],
)
def test_a_wrong_launcher_is_a_refusal_to_start(tmp_path, launcher, problem):
    base_url = "http://127.0.0.1:9" if launcher["type"] == "command" else None
    config = {
        "security": {"apiToken": "a", "locustCallbackToken": "b"},
        "locustClusters": [
            {
                "id": "a",
                "tenantId": "t",
                "envId": "e",
                "launcher": launcher,
                **({"baseUrl": base_url} if base_url else {}),
            }
        ],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(loadmanager.ConfigError) as refused:
        loadmanager.load_config(str(tmp_path / "config.json"))
    assert problem in "\n".join(refused.value.problems)
