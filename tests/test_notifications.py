"""Notifications: a real SMTP server with TLS and login, a real receiver that verifies signatures, and an
outbox that loses nothing."""

from __future__ import annotations

import base64
import json
import ssl
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from conftest import ROOT, base_config, cluster_config, create_body
from locust_process import find_free_port
from standardwebhooks.webhooks import Webhook
from target import Target
from test_lifecycle import LOCUSTFILE, RULES, descendants
from waiting import eventually, holds_for

import loadmanager

SECRET = "whsec_" + base64.b64encode(b"a key of 32 bytes, or some more.").decode()
PASSWORD = "p4ss-word-of-the-mail-server"


class Receiver:
    """A web server that keeps what is posted to it, and answers `status`."""

    def __init__(self, port=0):
        self.messages = []
        self.status = 200
        self.refuses = lambda body: False  # what is answered with 503 though `status` is 200
        self.headers = {}
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = 503 if receiver.refuses(body) else receiver.status
                if status == 200:
                    receiver.messages.append((self.path, dict(self.headers), body))
                self.send_response(status)
                for name, value in receiver.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/hook/T0/s3cret-path"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def bodies(self):
        return [json.loads(body) for _, _, body in self.messages]


@pytest.fixture
def receiver():
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Key and certificate of 127.0.0.1, trusted only where it is named."""
    folder = tmp_path_factory.mktemp("certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
         "-keyout", folder / "key.pem", "-out", folder / "cert.pem"], check=True, capture_output=True,
    )  # fmt: skip
    return folder


class Inbox:
    """What aiosmtpd hands over; knows one user."""

    def __init__(self):
        self.mails = []

    async def handle_DATA(self, server, session, envelope):
        self.mails.append((envelope.mail_from, envelope.rcpt_tos, envelope.content.decode()))
        return "250 taken"

    def authenticate(self, server, session, envelope, mechanism, data):
        return AuthResult(success=(data.login, data.password) == (b"robot", PASSWORD.encode()), handled=False)


@pytest.fixture
def mail(certificate):
    """A real SMTP server that wants STARTTLS and a login."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    inbox = Inbox()
    controller = Controller(
        inbox,
        hostname="127.0.0.1",
        port=find_free_port(),
        tls_context=context,
        require_starttls=True,
        auth_required=True,
        authenticator=inbox.authenticate,
    )
    controller.start()
    inbox.port = controller.port
    yield inbox
    controller.stop()


def email_to(mail, certificate, **more):
    smtp = {
        "host": "127.0.0.1",
        "port": mail.port,
        "username": "robot",
        "password": PASSWORD,
        "caFile": str(certificate / "cert.pem"),
    }
    return {
        "id": "team",
        "type": "email",
        "from": "Load Manager <lm@example.test>",
        "to": ["sre@example.test"],
        "smtp": {**smtp, **more.pop("smtp", {})},
        **more,
    }


def webhook(receiver, **more):
    return {
        "id": "hook",
        "type": "webhook",
        "url": receiver.url,
        "secret": SECRET,
        "allowPrivateAddresses": True,
        **more,
    }


def run_to_its_end(lm, **more):
    run = lm.create(**more).json
    metrics = {
        "totalRequests": 100,
        "totalFailures": 5,
        "totalRps": 12.5,
        "errorRate": 5.0,
        "p95ResponseMs": 340,
        "currentUsers": 5,
    }
    lm.callback("metrics", {"runId": run["id"], "metrics": metrics})
    lm.callback("test-stop", {"runId": run["id"], "finalMetrics": metrics, "complete": True})
    return lm.wait_for(run["id"], "Finished")


def test_webhooks_are_signed_as_the_standard_says_and_carry_numbers_verdict_and_link(
    load_manager, fake, receiver
):
    lm = load_manager(
        cluster_config(fake.url),
        notifications=[webhook(receiver, events=["started", "failed"])],
        server={"publicUrl": "https://lm.example.test"},
    )
    run = run_to_its_end(lm, thresholds=["p95 < 100"])
    eventually(lambda: len(receiver.messages) == 2, 10, what="both messages")
    verifier = Webhook(SECRET)
    for _, headers, body in receiver.messages:
        given = {name.lower(): value for name, value in headers.items()}
        verifier.verify(body, given)  # raises when the signature is wrong
    started, failed = receiver.bodies()
    assert (started["type"], failed["type"]) == ("run.started", "run.failed")
    assert failed["data"]["id"] == run["id"] and failed["data"]["verdict"] == "failed"
    assert failed["data"]["lastMetrics"]["p95ResponseMs"] == 340
    assert failed["data"]["link"] == f"https://lm.example.test/#/runs/{run['id']}"
    assert failed["data"]["details"] == ["p95ResponseMs < 100: was 340"]
    with pytest.raises(Exception, match="[Ss]ignature"):
        verifier.verify(
            receiver.messages[0][2] + b" ",
            {name.lower(): value for name, value in receiver.messages[0][1].items()},
        )


def test_mail_goes_over_tls_with_a_login_and_reads_well(load_manager, fake, mail, certificate):
    lm = load_manager(cluster_config(fake.url), notifications=[email_to(mail, certificate)])
    run = run_to_its_end(lm, thresholds=["p95 < 100"], scenarioId="checkout")
    [(sender, to, content)] = eventually(lambda: mail.mails, 10, what="the mail")
    assert (sender, to) == ("lm@example.test", ["sre@example.test"])
    assert "Subject: FAILED: checkout on acme/dev: p95 340 ms, errors 5 %, 12.5 req/s" in content
    assert "p95ResponseMs < 100: was 340" in content and f"/#/runs/{run['id']}" in content


def test_slack_gets_a_text(load_manager, fake, receiver):
    lm = load_manager(
        cluster_config(fake.url),
        notifications=[{"id": "slack", "type": "slack", "url": receiver.url, "allowPrivateAddresses": True}],
    )
    run_to_its_end(lm)
    [body] = eventually(lambda: receiver.bodies(), 10)
    assert set(body) == {"text"} and body["text"].startswith("finished: browse on acme/dev: p95 340 ms")


def test_only_what_is_wanted_of_whom_is_told(load_manager, fake, receiver):
    others = [
        webhook(receiver, id="a", tenants=["globex"]),
        webhook(receiver, id="b", environments=["prod"]),
        webhook(receiver, id="c", scenarios=["login"]),
        webhook(receiver, id="d", events=["lost"]),
    ]
    lm = load_manager(cluster_config(fake.url), notifications=[*others, webhook(receiver, id="e")])
    run_to_its_end(lm)
    eventually(lambda: receiver.messages, 10)
    holds_for(lambda: len(receiver.messages) == 1, 1.5)
    assert [one["channelId"] for one in lm.get("/v1/notifications").json["deliveries"]] == ["e"]


def test_a_receiver_that_was_down_gets_the_message_also_over_kill_9(load_manager, fake):
    port = find_free_port()
    config = {
        "id": "hook",
        "type": "webhook",
        "url": f"http://127.0.0.1:{port}/x",
        "secret": SECRET,
        "allowPrivateAddresses": True,
    }
    lm = load_manager(cluster_config(fake.url), notifications=[config])
    run = run_to_its_end(lm)
    waiting = eventually(
        lambda: [one for one in lm.get("/v1/notifications").json["deliveries"] if one.get("problem")], 10
    )
    assert (waiting[0]["outcome"], waiting[0]["event"]) == ("waiting", "finished") and "refused" in waiting[
        0
    ]["problem"]
    lm.kill9()
    receiver = Receiver(port)
    try:
        lm.restart()
        eventually(lambda: receiver.messages, 15, what="the message after the receiver is back")
        assert receiver.bodies()[0]["data"]["id"] == run["id"]
        eventually(
            lambda: (
                [one["outcome"] for one in lm.get("/v1/notifications").json["deliveries"]] == ["delivered"]
            ),
            5,
        )
        holds_for(lambda: len(receiver.messages) == 1, 2)
    finally:
        receiver.close()


def test_a_run_whose_end_was_killed_away_is_told_with_its_transition(load_manager, fake, receiver):
    """What is in the database as final is in the outbox too: they are one commit."""
    receiver.status = 503
    lm = load_manager(cluster_config(fake.url), notifications=[webhook(receiver)])
    run = lm.create().json
    lm.post(f"/v1/tests/{run['id']}/stop")
    lm.wait_for(run["id"], "Finished")
    lm.kill9()
    receiver.status = 200
    lm.restart()
    eventually(lambda: [body["data"]["id"] for body in receiver.bodies()] == [run["id"]], 15)


def test_a_receiver_that_hangs_delays_neither_runs_nor_other_receivers(load_manager, fake, receiver):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as hanging:  # accepts, and never answers
        slow = {
            "id": "slow",
            "type": "webhook",
            "url": f"http://127.0.0.1:{hanging.getsockname()[1]}/",
            "allowPrivateAddresses": True,
        }
        lm = load_manager(cluster_config(fake.url), notifications=[slow, webhook(receiver)])
        began = time.monotonic()
        run_to_its_end(lm)
        assert time.monotonic() - began < loadmanager.DELIVERY_CALL_S - 1, "the run waited for a receiver"
        eventually(lambda: receiver.messages, 3, what="the message to the receiver that answers")


@pytest.fixture
def notifier(receiver, tmp_path):
    """notifier() -> a store and the notifier of its one channel, "hook", not started."""
    opened = []

    def make():
        config = loadmanager.Config(
            notifications=(loadmanager.NotificationConfig(id="hook", url=receiver.url, allow_private=True),)
        )
        store = loadmanager.Store(loadmanager.open_database("sqlite:///outbox.db", str(tmp_path)))
        opened.append((store, loadmanager.Notifier(config, store)))
        return opened[-1]

    yield make
    for store, notifier in opened:
        notifier.close()
        store.close()


def end_runs(store, count):
    ids = []
    for _ in range(count):
        request = loadmanager.RunRequest("acme", "dev", "browse", 5, 5.0, duration_s=60, metadata=None)
        run = store.add(loadmanager.replace(loadmanager._new_run(request, "me", "api"), cluster_id="one"))
        store.transition(run.id, loadmanager.RunStatus.FAILED, failure_reason="x", finished_at=time.time())
        ids.append(run.id)
    return ids


def test_a_receiver_that_refuses_some_gets_the_others_at_once_and_those_again(notifier, receiver, capfd):
    store, started = notifier()
    started.start()
    refused, tries = set(), {}

    def refuses(body):
        run_id = json.loads(body)["data"]["id"]
        tries[run_id] = tries.get(run_id, 0) + 1
        return run_id in refused and tries[run_id] < 3

    receiver.refuses = refuses
    tell = store.outbox.of_transition

    def every_tenth_is_refused(run, numbers):
        if len(tries) % 10 == 0 or len(refused) < 5:
            refused.add(run.id)
        return tell(run, numbers)

    store.outbox.of_transition = every_tenth_is_refused
    ids = set(end_runs(store, 100))

    def arrived():
        return {body["data"]["id"] for body in receiver.bodies()}

    eventually(lambda: arrived() >= ids - refused, 20, what="those that are not refused")
    assert refused and all(tries[run_id] >= 1 for run_id in refused)
    eventually(lambda: arrived() == ids, 40, what="the refused ones, at their third try")
    assert len(receiver.messages) == len(ids), "each once"
    told = capfd.readouterr().err
    assert told.count("notification not delivered") == len(refused) and "HTTP 503" in told
    assert "unforeseen error" not in told and "TypeError" not in told


def test_an_error_nobody_foresaw_is_the_problem_of_one_delivery(notifier, receiver, monkeypatch, capfd):
    store, started = notifier()
    send, fails = loadmanager.Channel.send, []

    def odd(channel, delivery):
        if not fails:
            fails.append(delivery.run_id)
            raise AttributeError("odd")
        send(channel, delivery)

    monkeypatch.setattr(loadmanager.Channel, "send", odd)
    started.start()
    ids = end_runs(store, 5)
    eventually(lambda: sorted(body["data"]["id"] for body in receiver.bodies()) == sorted(ids), 15)
    assert "odd" in capfd.readouterr().err and fails


def test_a_delivery_to_a_channel_that_is_not_configured_any_more_is_ended(notifier, receiver):
    store, started = notifier()
    gone = loadmanager.Delivery("msg_1", "gone", "failed", "r", "acme", time.time(), "failed: x", {})
    store.outbox.keep(gone)
    started.start()
    [kept] = store.outbox.newest(9)
    assert kept.outcome == "given up" and "no notification gone in the configuration" in kept.problem
    assert store.outbox.waiting() == []


def test_a_retry_is_not_put_off_by_a_clock_that_is_set_back(notifier, receiver, monkeypatch):
    store, started = notifier()
    ahead = loadmanager.Delivery("msg_1", "hook", "failed", "r", "acme", time.time(), "failed: x", {})
    store.outbox.keep(ahead._replace(attempts=1, next_at=time.time() + 3600, problem="HTTP 503"))
    started.start()
    eventually(lambda: len(receiver.messages) == 1, 10)


def test_redirects_are_not_followed_and_private_addresses_not_called(load_manager, fake, receiver):
    elsewhere = Receiver()
    try:
        receiver.status, receiver.headers = 302, {"Location": elsewhere.url}
        closed = {"id": "closed", "type": "webhook", "url": elsewhere.url}
        named = {"id": "named", "type": "webhook", "url": f"http://localhost:{elsewhere.port}/"}
        lm = load_manager(cluster_config(fake.url), notifications=[webhook(receiver), closed, named])
        for name, says in (("hook", "HTTP 302"), ("closed", "private address"), ("named", "private address")):
            refused = lm.post("/v1/notifications/test", {"id": name})
            assert refused.status == 502 and says in refused.json["message"], refused.body
        assert elsewhere.messages == []
    finally:
        elsewhere.close()


def test_a_test_message_can_be_sent_to_each_channel(load_manager, fake, receiver, mail, certificate):
    lm = load_manager(
        cluster_config(fake.url),
        notifications=[
            webhook(receiver),
            email_to(mail, certificate),
            email_to(mail, certificate, id="wrong", smtp={"password": "no"}),
        ],
    )
    assert lm.post("/v1/notifications/test", {"id": "hook"}).status == 200 and len(receiver.messages) == 1
    assert lm.post("/v1/notifications/test", {"id": "team"}).status == 200 and len(mail.mails) == 1
    refused = lm.post("/v1/notifications/test", {"id": "wrong"})
    assert refused.status == 502 and "SMTP 535" in refused.json["message"]
    assert lm.post("/v1/notifications/test", {"id": "nobody"}).status == 400


def test_secrets_are_in_no_answer_and_no_log(load_manager, fake, receiver, mail, certificate):
    receiver.status = 500
    lm = load_manager(
        cluster_config(fake.url),
        notifications=[webhook(receiver), email_to(mail, certificate, smtp={"username": "other"})],
    )
    run_to_its_end(lm)
    eventually(
        lambda: sum(bool(one.get("problem")) for one in lm.get("/v1/notifications").json["deliveries"]) == 2,
        10,
    )
    told = lm.get("/v1/notifications").body.decode() + lm.get("/v1/audit").body.decode() + lm.log()
    for secret in (SECRET, SECRET.removeprefix("whsec_"), PASSWORD, "s3cret-path"):
        assert secret not in told


def test_names_of_others_cannot_make_mail_headers(load_manager, fake, mail, certificate):
    lm = load_manager(cluster_config(fake.url), notifications=[email_to(mail, certificate)])
    run_to_its_end(lm, scenarioId="x Bcc: all@example.test emoji \U0001f600")
    [(_, to, content)] = eventually(lambda: mail.mails, 10)
    assert to == ["sre@example.test"] and "\nBcc:" not in content


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"type": "webhook"}, ".url: is missing"),
        ({"type": "webhook", "url": "ftp://x/"}, ".url: must be an http(s) URL"),
        (
            {"type": "webhook", "url": "https://x.test/", "secret": "not base64!"},
            ".secret: must be whsec_",
        ),
        ({"type": "email"}, ".smtp.host: is missing"),
        (
            {
                "type": "email",
                "smtp": {"host": "m", "username": "u", "security": "none"},
                "from": "a@b.c",
                "to": ["a@b.c"],
            },
            "not sent in plain text",
        ),
        (
            {"type": "email", "smtp": {"host": "m"}, "from": "a@b.c\nBcc: x@y.z", "to": ["a@b.c"]},
            ".from: must be a mail address",
        ),
        ({"type": "pager"}, ".type: must be slack or webhook or email"),
        (
            {"type": "slack", "url": "https://x.test/", "events": ["exploded"]},
            ".events: must be a list of started",
        ),
    ],
)
def test_a_wrong_notification_is_a_refusal_to_start(tmp_path, entry, problem):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "security": {"apiToken": "a", "locustCallbackToken": "b"},
                "notifications": [{"id": "n", **entry}],
            }
        )
    )
    with pytest.raises(loadmanager.ConfigError) as refused:
        loadmanager.checked_config(str(tmp_path / "config.json"))
    assert f"notifications[0]{problem}" in "\n".join(refused.value.problems) or problem in "\n".join(
        refused.value.problems
    )


def test_a_schedule_runs_real_locust_on_workers_that_were_not_there_and_tells_by_mail_and_webhook(
    load_manager, receiver, mail, certificate
):
    with Target() as target:
        launcher = {
            "type": "process",
            "locustfile": str(LOCUSTFILE),
            "workers": 1,
            "usersPerWorker": 2,
            "host": target.url,
            "idleSeconds": 2,
        }
        test = create_body(targetUsers=4, spawnRate=4, durationSeconds=3, thresholds=["errorRate < 50"])
        lm = load_manager(
            {"id": "local", "tenantId": "acme", "envId": "dev", "launcher": launcher}, orchestrator=RULES,
            notifications=[email_to(mail, certificate), webhook(receiver)],
        )  # fmt: skip
        assert not descendants(lm.process.pid), "nothing of Locust runs before it is needed"
        soon = {"runAt": loadmanager.utc_text(time.time() + 2), "test": test}
        assert lm.post("/v1/schedules", soon).status == 201
        [body] = eventually(
            lambda: receiver.bodies(), 60, what="the webhook of the run that started by itself"
        )
        assert (body["type"], body["data"]["source"], body["data"]["verdict"]) == (
            "run.passed",
            "schedule",
            "passed",
        )
        [(_, _, content)] = eventually(lambda: mail.mails, 10)
        assert "Subject: PASSED: browse on acme/dev" in content
        assert target.total >= body["data"]["lastMetrics"]["totalRequests"] > 0
        eventually(lambda: not descendants(lm.process.pid), 15, what="no process of Locust is left")


@pytest.mark.parametrize(
    ("url", "allowed", "is_warned"),
    [
        ("http://127.0.0.1:9/hook", False, True),
        ("http://localhost:9/hook", False, True),
        ("http://[fd00::1]/hook", False, True),
        ("http://127.0.0.1:9/hook", True, False),
        ("https://hooks.example.com/hook", False, False),
    ],
)
def test_check_warns_of_a_webhook_that_will_never_be_called(tmp_path, url, allowed, is_warned):
    hook = {"id": "hook", "type": "webhook", "url": url, "allowPrivateAddresses": allowed}
    config = base_config(cluster_config("http://127.0.0.1:9"), notifications=[hook])
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [
        sys.executable,
        str(ROOT / "loadmanager.py"),
        "check",
        "-config",
        str(tmp_path / "config.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert ("notifications[0].url" in done.stdout + done.stderr) == is_warned, done.stdout + done.stderr
