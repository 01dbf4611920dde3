"""What tenants, clusters and other users of the machine keep from each other."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import API_TOKEN, CALLBACK_TOKEN, ROOT, base_config, cluster_config
from target import Target
from test_lifecycle import RULES, descendants
from waiting import eventually

import loadmanager

PLAIN_LOCUSTFILE = """
from locust import HttpUser, constant, events, task

class Plain(HttpUser):
    wait_time = constant(0.1)
    @task
    def get(self):
        self.client.get("/plain")

@events.init.add_listener
def own_route(environment, **kwargs):
    if environment.web_ui:
        environment.web_ui.app.add_url_rule("/own", "own", lambda: "a page of the locustfile's own")
"""


# ---- callback tokens ----


def check(folder, config):
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return subprocess.run(
        [sys.executable, str(ROOT / "loadmanager.py"), "check", "-config", str(path)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_token_that_several_tenants_share_is_warned_of(load_manager, fake, tmp_path):
    acme = cluster_config(fake.url)
    beta = cluster_config("http://127.0.0.1:9", "two", tenantId="beta")
    words = "security.locustCallbackToken: is shared by the tenants acme, beta"
    shared = check(tmp_path, base_config(acme, beta))
    assert shared.returncode == 0 and words in shared.stdout
    assert words in load_manager(acme, beta).log()
    for one in (base_config(acme), base_config(acme, {**beta, "callbackToken": "its own"})):
        done = check(tmp_path, one)
        assert done.returncode == 0 and "shared" not in done.stdout


def test_active_run_is_not_told_to_a_token_that_several_tenants_share(load_manager, fake_locust):
    lm = load_manager(
        cluster_config(fake_locust().url),
        cluster_config(fake_locust().url, "two", tenantId="beta"),
        cluster_config(fake_locust().url, "three", tenantId="gamma", callbackToken="of-gamma"),
    )
    runs = {name: lm.create(tenantId=name).json["id"] for name in ("acme", "beta", "gamma")}
    for name in ("acme", "beta"):
        told = lm.callback("register-external", {"tenantId": name, "envId": "dev"})
        assert told.status == 409 and runs[name].encode() not in told.body
    place = {"tenantId": "gamma", "envId": "dev"}
    assert lm.callback("register-external", place).status == 403
    assert lm.callback("register-external", place, "of-gamma").json["runId"] == runs["gamma"]


@pytest.fixture
def target():
    with Target() as target:
        yield target


@pytest.fixture
def launched(load_manager, target, tmp_path):
    """A launched cluster whose locustfile knows nothing of Load Manager, under a loose umask, with
    secrets in our environment."""
    (tmp_path / "plain.py").write_text(PLAIN_LOCUSTFILE)
    launcher = {
        "locustfile": str(tmp_path / "plain.py"),
        "workers": 1,
        "host": target.url,
        "environment": ["TEAM_*"],
    }
    secrets = {
        "DATABASE_PASSWORD": "hunter2",
        "LOADMANAGER_LIMITS_EVENT_STREAMS": "9",
        "TEAM_COLOUR": "green",
        "AWS_SECRET": "x",
    }
    lm = load_manager(
        {"id": "local", "tenantId": "acme", "envId": "dev", "launcher": launcher},
        orchestrator=RULES, environment=secrets, preexec=lambda: os.umask(0o022),
    )  # fmt: skip
    eventually(lambda: cluster(lm)["state"] in ("ready", "stopped") and len(cluster(lm)["workers"]) == 1, 30)
    return lm


def cluster(lm):
    return lm.get("/v1/clusters").json[0]


def locusts_of(lm):
    """The environments of the master and the worker, by pid."""
    found = {}
    for pid in descendants(lm.process.pid):
        if b"locust.main" in Path(f"/proc/{pid}/cmdline").read_bytes():
            raw = Path(f"/proc/{pid}/environ").read_text()
            found[pid] = dict(line.partition("=")[::2] for line in raw.split("\0") if line)
    return found


def fetch(url, headers=None, data=None):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers or {}), timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_common_callback_token_does_not_reach_a_launched_cluster(launched, target):
    """It has a random token of its own, with which what its Locust calls back is taken."""
    lm = launched
    run_id = lm.create(targetUsers=1, spawnRate=1).json["id"]
    for name in ("test-stop", "metrics", "test-start"):
        assert lm.callback(name, {"runId": run_id, "metrics": {}}, CALLBACK_TOKEN).status == 404
    place = {"tenantId": "acme", "envId": "dev"}
    assert lm.callback("register-external", place, CALLBACK_TOKEN).status == 403
    assert lm.run(run_id)["status"] == "Running"
    [token] = {environment["CONTROL_PLANE_TOKEN"] for environment in locusts_of(lm).values()}
    assert token not in ("", CALLBACK_TOKEN)
    assert lm.callback("metrics", {"runId": run_id, "metrics": {"totalRequests": 1}}, token).status == 200
    eventually(lambda: target.total > 0, 20, what="the load that Load Manager started")
    lm.post(f"/v1/tests/{run_id}/stop")
    assert lm.wait_for(run_id, "Finished")["stopReason"] == "user"


def test_launched_locust_gets_only_the_named_variables(launched):
    environments = locusts_of(launched)
    assert len(environments) == 2
    for environment in environments.values():
        assert environment["TEAM_COLOUR"] == "green" and environment["PATH"] == os.environ["PATH"]
        assert not {"DATABASE_PASSWORD", "AWS_SECRET", "LOADMANAGER_LIMITS_EVENT_STREAMS"} & set(environment)
        assert API_TOKEN not in environment.values()


def test_web_page_of_a_launched_locust_asks_who_one_is(launched):
    """Also the routes of a locustfile that knows nothing of us, with which Load Manager works as ever."""
    url = cluster(launched)["baseUrl"]
    for path in ("/", "/stats/requests", "/own", "/logs", "/exceptions"):
        status, body = fetch(url + path)
        assert (status, b"Load Manager" in body) == (401, True), path
    assert fetch(url + "/swarm", data=b"user_count=1&spawn_rate=1")[0] == 401
    assert fetch(url + "/", {"Authorization": "Bearer wrong"})[0] == 401
    assert cluster(launched)["state"] in ("ready", "stopped"), "who is not signed in started a test"


def test_who_knows_the_configured_password_uses_the_page_of_a_launched_locust(load_manager, tmp_path):
    (tmp_path / "plain.py").write_text(PLAIN_LOCUSTFILE)
    launcher = {"locustfile": str(tmp_path / "plain.py"), "workers": 1}
    lm = load_manager(
        {"id": "local", "tenantId": "acme", "envId": "dev", "launcher": launcher, "authToken": "a password"},
        orchestrator=RULES,
    )  # fmt: skip
    eventually(lambda: cluster(lm)["state"] in ("ready", "stopped"), 30)
    basic = {"Authorization": "Basic " + base64.b64encode(b"locust:a password").decode()}
    url = cluster(lm)["baseUrl"]
    assert fetch(url + "/own", basic) == (200, b"a page of the locustfile's own")
    assert fetch(url + "/own")[0] == 401


def test_files_are_for_us_alone_whatever_the_umask(launched, tmp_path):
    lm = launched
    run_id = lm.create(targetUsers=1, spawnRate=1, durationSeconds=1).json["id"]
    lm.wait_for(run_id, "Finished")
    written = [path for path in lm.folder.rglob("*") if path.name not in ("config.json", "loadmanager.log")]
    assert {path.name for path in written} >= {
        "runs.db",
        "loadmanager-logs",
        "local-master.log",
        "local-worker-1.log",
    }
    open_ones = {
        str(path): oct(stat.S_IMODE(path.stat().st_mode)) for path in written if path.stat().st_mode & 0o077
    }
    assert not open_ones
    assert "UMask=0077" in (ROOT / "deploy" / "loadmanager.service").read_text()


def test_log_folder_of_an_earlier_version_is_closed(load_manager, tmp_path, monkeypatch):
    (tmp_path / "plain.py").write_text(PLAIN_LOCUSTFILE)
    launcher = loadmanager.LauncherConfig(locustfile=str(tmp_path / "plain.py"))
    config = loadmanager.ClusterConfig(id="local", tenant_id="acme", env_id="dev", launcher=launcher)
    (tmp_path / "loadmanager-logs").mkdir(mode=0o755)
    launched = loadmanager.LaunchedCluster(config, str(tmp_path), "token")
    launched.start("http://127.0.0.1:9")
    launched.stop()
    assert stat.S_IMODE((tmp_path / "loadmanager-logs").stat().st_mode) == 0o700


def test_original_client_s_common_token_serves_the_clusters_of_one_tenant(load_manager, fake_locust):
    lm = load_manager(
        cluster_config(fake_locust().url), cluster_config(fake_locust().url, "two", envId="prod")
    )
    for env in ("dev", "prod"):
        run_id = lm.create(envId=env).json["id"]
        place = {"tenantId": "acme", "envId": env}
        assert lm.callback("register-external", place).json["runId"] == run_id
        for name in ("test-start", "metrics"):
            assert lm.callback(name, {"runId": run_id, "metrics": {"totalRequests": 1}}).status == 200
        assert lm.run(run_id)["lastMetrics"]["totalRequests"] == 1
