"""Another configuration without a restart: by SIGHUP, by the command, by the API; and the end of sign-ins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from conftest import API_TOKEN, CALLBACK_TOKEN, ROOT, cluster_config, create_body
from control_plane import EventStream
from waiting import eventually, holds_for

import loadmanager

CI_TOKEN, VIEWER_TOKEN = "token-of-ci", "token-of-a-viewer"


def tokens(*entries):
    return [{"role": "operator", "tenants": ["acme"], **entry} for entry in entries]


CI = {"name": "ci", "token": CI_TOKEN}
VIEWER = {"name": "viewer", "token": VIEWER_TOKEN, "role": "viewer"}


def write(lm, **sections):
    """Change the server's file; a section that is an object is merged."""
    for name, section in sections.items():
        lm.config[name] = {**lm.config.get(name, {}), **section} if isinstance(section, dict) else section
    (lm.folder / "config.json").write_text(json.dumps(lm.config))


def reload(lm, *options):
    """`python loadmanager.py reload` beside the server; it needs no token."""
    return subprocess.run(
        [sys.executable, str(ROOT / "loadmanager.py"), "reload", "-config", str(lm.folder / "config.json"),
            *options],
        capture_output=True, text=True, timeout=60, cwd=lm.folder,
    )  # fmt: skip


@pytest.fixture
def lm(load_manager, fake):
    lm = load_manager(cluster_config(fake.url), security={"apiTokens": tokens(CI, VIEWER)})
    return lm.restart()  # with the port in its file that it has


class StreamAt:
    def __init__(self, lm):
        self.port = int(lm.url.rsplit(":", 1)[1])


def ends(stream):
    """Whether the server ended the stream; what comes before its end is read."""
    stream.sock.settimeout(0.5)
    try:
        while stream.sock.recv(65536):
            pass
        return True
    except TimeoutError:
        return False
    except OSError:
        return True


def test_token_that_leaked_is_revoked_without_a_restart(lm):
    """Its requests, its sign-ins and its event streams end; others' go on."""
    assert lm.get("/v1/tests", token=CI_TOKEN).status == 200  # and is remembered
    signed_in = lm.post("/session", {"token": CI_TOKEN}, token=None)
    cookie = {"Cookie": signed_in.headers["set-cookie"].split(";")[0]}
    others = lm.post("/session", {"token": VIEWER_TOKEN}, token=None)
    others_cookie = {"Cookie": others.headers["set-cookie"].split(";")[0]}
    bearer = {"Authorization": f"Bearer {CI_TOKEN}"}
    with (
        EventStream(StreamAt(lm), "/v1/events", bearer, token=None) as by_token,
        EventStream(StreamAt(lm), "/v1/events", cookie, token=None) as by_cookie,
        EventStream(StreamAt(lm), "/v1/events", others_cookie, token=None) as of_another,
    ):
        for stream in (by_token, by_cookie, of_another):
            assert "200 OK" in stream.head() and stream.next("ready")
        write(lm, security={"apiTokens": tokens(VIEWER)})
        done = reload(lm)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert lm.get("/v1/tests", token=CI_TOKEN).status == 401
        assert lm.get("/v1/tests", token=None, headers=cookie).status == 401
        assert lm.get("/v1/tests", token=None, headers=others_cookie).status == 200
        assert eventually(lambda: ends(by_token), 10) and eventually(lambda: ends(by_cookie), 10)
        assert not ends(of_another)
    assert [one["name"] for one in lm.get("/v1/sessions").json] == ["viewer"]


def test_another_administrators_token_takes_over_and_the_old_one_ends(lm):
    """The command needs neither: it is the one that leaked, and the server does not know the new one yet."""
    write(lm, security={"apiToken": "a-new-token"})
    assert reload(lm).returncode == 0
    assert (lm.get("/v1/audit").status, lm.get("/v1/audit", token="a-new-token").status) == (401, 200)
    [told] = [one for one in lm.get("/v1/audit", token="a-new-token").json if one["action"] == "reload"]
    assert (told["who"], told["outcome"]) == ("SIGHUP", "done")


def test_token_with_another_role_ends_what_was_begun_with_the_old_one(lm):
    signed_in = lm.post("/session", {"token": CI_TOKEN}, token=None)
    cookie = {"Cookie": signed_in.headers["set-cookie"].split(";")[0]}
    write(lm, security={"apiTokens": tokens({**CI, "role": "viewer"}, VIEWER)})
    assert reload(lm).returncode == 0
    assert lm.get("/v1/tests", token=None, headers=cookie).status == 401
    assert lm.post("/v1/tests", create_body(), token=CI_TOKEN).status == 403


def test_file_with_mistakes_is_refused_as_a_whole_with_all_of_them(lm):
    write(lm, security={"apiTokens": tokens({**CI, "role": "boss"})}, tenants=[{"id": "acme", "maxUsers": 0}])
    done = reload(lm)
    assert done.returncode == 2 and "security.apiTokens[0].role:" in done.stderr
    assert "tenants[0].maxUsers:" in done.stderr and "in use is kept" in done.stderr
    by_api = lm.post("/v1/admin/reload")
    assert by_api.status == 400 and set(by_api.json["fields"]) == {
        "security.apiTokens[0].role",
        "tenants[0].maxUsers",
    }
    assert lm.get("/v1/tests", token=CI_TOKEN).status == 200 and "Traceback" not in lm.log()
    (lm.folder / "config.json").write_text("{")
    assert reload(lm).returncode == 2 and lm.post("/v1/admin/reload").status == 400
    assert lm.get("/v1/tests", token=VIEWER_TOKEN).status == 200


def test_what_needs_a_restart_is_named_and_stays(lm):
    port = lm.config["server"]["port"]
    write(
        lm,
        server={"port": 1, "maxConnections": 99},
        storage={"url": "sqlite:///other.db"},
        tenants=[{"id": "acme", "maxUsers": 7}],
    )
    done = reload(lm, "--json")
    assert json.loads(done.stdout) == {
        "problems": [],
        "needsRestart": ["server.port", "server.maxConnections", "storage.url"],
    }
    assert "server.port: has changed, and needs a restart" in done.stderr
    refused = lm.post("/v1/tests", create_body(targetUsers=8))
    assert refused.status == 403 and "7 users at most" in refused.json["message"], "the rest was not taken"
    write(lm, server={"port": port})
    assert lm.post("/v1/admin/reload").json == {
        "success": True,
        "needsRestart": ["server.maxConnections", "storage.url"],
    }


def test_hup_reads_tenants_environments_scenarios_schedules_and_notifications(lm):
    write(
        lm,
        environments=[{"tenantId": "acme", "id": "dev", "protected": True}],
        scenarios=[{"id": "browse", "targetUsers": 3, "spawnRate": 3}],
        schedules=[{"id": "nightly", "cron": "@daily", "test": {"tenantId": "acme", "envId": "dev",
            "scenarioId": "browse", "confirm": "dev"}}],
        notifications=[{"id": "hook", "type": "webhook", "url": "http://127.0.0.1:1/",
            "allowPrivateAddresses": True}],
    )  # fmt: skip
    assert lm.process is not None
    lm.process.send_signal(signal.SIGHUP)
    eventually(lambda: "configuration read again" in lm.log(), 10)
    assert [one["id"] for one in lm.get("/v1/scenarios").json] == ["browse"]
    assert [one["id"] for one in lm.get("/v1/schedules").json] == ["nightly"]
    assert [one["id"] for one in lm.get("/v1/notifications").json["channels"]] == ["hook"]
    body = {"tenantId": "acme", "envId": "dev", "scenarioId": "browse"}
    assert lm.post("/v1/tests", body).json["fields"].keys() == {"confirm"}
    run = lm.post("/v1/tests", {**body, "confirm": "dev"}).json
    assert run["targetUsers"] == 3
    lm.post(f"/v1/tests/{run['id']}/stop")
    told = eventually(
        lambda: lm.get("/v1/notifications").json["deliveries"], 10, what="the new channel is told"
    )
    assert told[0]["channelId"] == "hook"
    write(lm, schedules=[], notifications=[], scenarios=[], environments=[])
    assert reload(lm).returncode == 0
    assert (
        lm.get("/v1/schedules").json
        == lm.get("/v1/scenarios").json
        == lm.get("/v1/notifications").json["channels"]
        == []
    )


def test_changed_schedule_does_not_start_at_a_time_that_was_over(lm):
    """Its last run was long ago: a time of the new expression that has just passed is not a missed one."""
    test = create_body(durationSeconds=5)
    write(lm, schedules=[{"id": "s", "cron": "@yearly", "test": test}])
    assert reload(lm).returncode == 0
    eventually(lambda: loadmanager.time.gmtime().tm_sec < 40, 30)
    write(lm, schedules=[{"id": "s", "cron": "* * * * *", "test": test}])
    assert reload(lm).returncode == 0
    holds_for(lambda: not lm.get("/v1/tests").json, 3)


def test_clusters_come_and_go(lm, fake_locust, fake):
    other = fake_locust()
    beta = cluster_config(other.url, "two", tenantId="beta")
    body = create_body(tenantId="beta")
    assert lm.post("/v1/tests", body).status == 400
    write(lm, locustClusters=[cluster_config(fake.url), beta])
    assert reload(lm).returncode == 0
    run = lm.post("/v1/tests", body)
    assert run.status == 201 and other.users == 5
    write(lm, locustClusters=[cluster_config(fake.url), {**beta, "id": "other"}])
    assert reload(lm).returncode == 0
    assert [one["id"] for one in lm.get("/v1/clusters").json] == ["one", "other"]
    lm.post(f"/v1/tests/{run.json['id']}/stop")
    lm.wait_for(run.json["id"], "Finished")


def test_run_of_a_cluster_that_is_removed_is_controlled_until_it_is_over(lm, fake):
    run_id = lm.create(durationSeconds=4).json["id"]
    write(lm, locustClusters=[])
    assert reload(lm).returncode == 0
    assert lm.get("/v1/clusters").json == []
    assert lm.create().status == 400, "no new run starts there"
    assert lm.callback("metrics", {"runId": run_id, "metrics": {"totalRequests": 7}}).status == 200
    run = lm.wait_for(run_id, "Finished")
    assert (run["stopReason"], fake.users) == ("duration", 0)
    eventually(lambda: "cluster gone" in lm.log(), 10)


def test_stop_reaches_a_cluster_that_is_removed_and_one_that_moved(lm, fake, fake_locust):
    run_id = lm.create().json["id"]
    elsewhere = fake_locust()
    write(lm, locustClusters=[cluster_config(elsewhere.url)])
    assert reload(lm).returncode == 0
    assert lm.create().status == 409, "its address changes when its run is over"
    assert lm.post(f"/v1/tests/{run_id}/stop").status == 200 and fake.users == 0
    assert lm.create().status == 201 and (elsewhere.users, fake.users) == (5, 0)


def test_run_that_waits_for_a_cluster_that_is_gone_fails(lm):
    lm.create()
    waiting = lm.create(queue=True).json["id"]
    write(lm, locustClusters=[])
    assert reload(lm).returncode == 0
    assert "gone from the configuration" in lm.wait_for(waiting, "Failed")["failureReason"]


def test_callback_token_that_leaked_is_revoked(lm):
    run_id = lm.create().json["id"]
    write(lm, security={"locustCallbackToken": "another"})
    assert reload(lm).returncode == 0
    body = {"runId": run_id, "metrics": {"totalRequests": 1}}
    assert (lm.callback("metrics", body).status, lm.callback("metrics", body, "another").status) == (401, 200)


def test_command_finds_no_server_that_was_killed(lm):
    lm.kill9()
    mark = json.loads((lm.folder / "config.json.pid").read_text())
    ours = json.dumps({**mark, "pid": os.getpid()})  # the number is ours now
    (lm.folder / "config.json.pid").write_text(ours)
    done = reload(lm)
    assert done.returncode == 3 and "is Load Manager running there?" in done.stderr, done.stderr
    lm.start()
    assert reload(lm).returncode == 0
    lm.terminate()
    assert not (lm.folder / "config.json.pid").exists()


def test_command_reaches_a_server_elsewhere_by_its_api(lm, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "loadmanager.py"), "reload", "--url", lm.url, "--token", API_TOKEN],
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "configuration read again" in lm.log()


def test_sign_ins_are_listed_and_ended(lm, tmp_path):
    signed_in = lm.post("/session", {"token": CI_TOKEN}, token=None)
    cookie = {"Cookie": signed_in.headers["set-cookie"].split(";")[0]}
    lm.post("/session", {"token": VIEWER_TOKEN}, token=None)
    listed = lm.get("/v1/sessions")
    assert [(one["name"], one["role"], one["tenants"]) for one in listed.json] == [
        ("viewer", "viewer", ["acme"]), ("ci", "operator", ["acme"]),
    ]  # fmt: skip
    for secret in (cookie["Cookie"].partition("=")[2], signed_in.json["csrfToken"], CI_TOKEN):
        assert secret.encode() not in listed.body
    assert lm.get("/v1/sessions", token=CI_TOKEN).status == 403
    with EventStream(StreamAt(lm), "/v1/events", cookie, token=None) as stream:
        assert "200 OK" in stream.head() and stream.next("ready")
        assert lm.request("DELETE", f"/v1/sessions/{listed.json[1]['id']}").status == 204
        assert ends(stream)
    assert lm.get("/v1/tests", token=None, headers=cookie).status == 401
    assert lm.request("DELETE", f"/v1/sessions/{listed.json[1]['id']}").status == 404

    def cli(*words):
        return subprocess.run(
            [sys.executable, str(ROOT / "loadmanager.py"), "sessions", *words, "--url", lm.url, "--token",
                API_TOKEN],
            capture_output=True, text=True, timeout=60, cwd=tmp_path,
        )  # fmt: skip

    assert "viewer" in cli().stdout
    assert cli("end").returncode == 2 and cli("end", "nobody").returncode == 2
    assert "1 sign-in(s) ended" in cli("end", "viewer").stdout
    assert lm.get("/v1/sessions").json == []


def test_common_callback_token_still_serves_all_clusters_of_one_tenant(lm):
    run_id = lm.create().json["id"]
    again = lm.callback("register-external", {"tenantId": "acme", "envId": "dev"}, CALLBACK_TOKEN)
    assert (again.status, again.json["runId"]) == (200, run_id)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signal_that_another_thread_gets_is_not_lost(name):
    """Nor one that comes just before the main thread waits: neither interrupts what that does."""
    code = f"""
import signal, threading, time, loadmanager
signals = loadmanager._Signals()
def send():
    time.sleep(0.5)
    signal.pthread_kill(threading.get_ident(), signal.{name})
threading.Thread(target=send).start()
signals.wait(lambda: signal.raise_signal(signal.SIGTERM))
print(signals.ending)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, cwd=ROOT)
    assert done.stdout == "SIGTERM\n", done.stderr
