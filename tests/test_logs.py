"""The log: for people and as JSON lines, its levels, request ids and traces; its table is the program's
own."""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import re
import signal
from pathlib import Path

import pytest
from conftest import API_TOKEN, CALLBACK_TOKEN, ROOT, cluster_config, create_body
from locust_process import LocustCluster
from target import Target
from test_notifications import Receiver, run_to_its_end, webhook
from waiting import eventually

import loadmanager

TREE = ast.parse(Path(loadmanager.__file__).read_text(encoding="utf-8"))
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"
OURS = re.compile(rf"00-{TRACE_ID}-(?!b7ad6b7169203331)[0-9a-f]{{16}}-01")
LOCUSTFILE = """
import sys
sys.path.insert(0, {hooks!r})
import loadmanager_hooks
from locust import HttpUser, constant, task

class Visitor(HttpUser):
    host = {target!r}
    wait_time = constant(0.1)

    @task
    def look(self):
        self.client.get("/")
"""


def json_lines(lm):
    return [json.loads(line) for line in lm.log().splitlines()]


def events_named(lm, name):
    return [line for line in json_lines(lm) if line["event"] == name]


# ---- the table ----


def log_calls():
    """Of each call of log(): its events, the names of its facts, and whether there may be others."""
    for call in ast.walk(TREE):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "log":
            texts = [node.value for node in ast.walk(call.args[0]) if isinstance(node, ast.Constant)]
            names = {keyword.arg for keyword in call.keywords}
            facts = names - {None, "requestId"}  # any line may have that one
            yield call.lineno, [text for text in texts if isinstance(text, str)], facts, None in names
        elif isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "_record_failure":
            names = {keyword.arg for keyword in call.keywords} | {"error", "failures", "trace"}
            yield call.lineno, [call.args[0].value], names, False


def test_every_line_that_is_logged_is_declared_with_its_facts():
    logged: dict[str, set[str]] = {}
    for line, events, facts, has_more in log_calls():
        for event in events:
            declared = loadmanager.LOG_EVENTS.get(event)
            assert declared is not None, f"line {line}: {event!r} is not in LOG_EVENTS"
            missing = facts - set(declared.facts)
            assert not missing, f"line {line}: {event!r} has no facts {missing} in LOG_EVENTS"
            logged.setdefault(event, set()).update(facts if not has_more else declared.facts)
    never = set(loadmanager.LOG_EVENTS) - set(logged)
    assert not never, f"declared, and never logged: {never}"
    unused = {
        event: left
        for event, facts in logged.items()
        if (left := set(loadmanager.LOG_EVENTS[event].facts) - facts)
    }
    assert not unused, f"declared facts that are never logged: {unused}"


def test_no_fact_takes_the_name_of_a_key_that_each_json_line_has():
    taken = {"time", "level", "event", "tenant", "environment", "traceId"}
    assert not [event for event, one in loadmanager.LOG_EVENTS.items() if taken & set(one.facts)]
    assert {one.level for one in loadmanager.LOG_EVENTS.values()} == set(loadmanager.LOG_LEVELS)


# ---- lines ----


def test_json_lines_say_where_they_belong_and_which_request_they_serve(load_manager, fake):
    lm = load_manager(cluster_config(fake.url), logging={"format": "json"})
    answer = lm.post(
        "/v1/tests", create_body(), headers={"X-Request-Id": "ci/42", "traceparent": TRACEPARENT}
    )
    run_id = answer.json["id"]
    lm.post(f"/v1/tests/{run_id}/stop", headers={"X-Request-Id": "stop-1"})
    lm.wait_for(run_id, "Finished")
    eventually(lambda: events_named(lm, "run finished"), what="the end of the run is in the log")

    started, finished = events_named(lm, "run started")[0], events_named(lm, "run finished")[0]
    for line in (started, finished):
        assert line["run"] == run_id and line["cluster"] == "one", line
        assert (line["tenant"], line["environment"], line["traceId"]) == ("acme", "dev", TRACE_ID), line
    asked = events_named(lm, "stop asked for")[0]
    assert asked["requestId"] == "stop-1" and asked["level"] == "info"
    assert started["requestId"] == "ci/42", "the line of the start does not name its request"
    assert all(
        re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"]) for line in json_lines(lm)
    )


def test_lines_for_people_stay_as_they_are_and_name_the_request(load_manager, fake):
    lm = load_manager(cluster_config(fake.url))
    run_id = lm.create().json["id"]
    lm.post(f"/v1/tests/{run_id}/stop", headers={"X-Request-Id": "stop-1"})
    moment = r"(?m)^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z "
    assert re.search(moment + r"Load Manager [\d.]+ listening url=http://127\.0\.0\.1:\d+$", lm.log())
    assert re.search(moment + rf"stop asked for run={run_id} by=\S+ requestId=stop-1$", lm.log()), lm.log()
    assert "request answered" not in lm.log()


def change_logging(lm, **settings):
    """Have the running server read them, and wait until it has."""
    lm.config["logging"] = settings
    (lm.folder / "config.json").write_text(json.dumps(lm.config))
    seen = len(reloads(lm))
    lm.process.send_signal(signal.SIGHUP)
    eventually(lambda: len(reloads(lm)) > seen, 10, what="the reload is in the audit")


def reloads(lm):
    return lm.get("/v1/audit?action=reload").json


def test_each_request_is_logged_at_debug_and_a_reload_changes_level_and_format(load_manager, fake):
    lm = load_manager(cluster_config(fake.url)).restart()  # with its port in its file
    change_logging(lm, level="warning")
    run_to_its_end(lm)
    assert "run started" not in lm.log(), "the level warning shows what is info"
    before = lm.log()
    change_logging(lm, level="debug", format="json")
    eventually(lambda: '"configuration read again"' in lm.log(), 10)
    lm.get("/v1/tests", headers={"X-Request-Id": "who"})
    lm.get("/v1/tests", token="wrong", headers={"X-Request-Id": "no"})
    lm.raw(b"nonsense\r\n\r\n")

    def lines():
        # lines of before the reload are for people; the newest may be half written
        return [
            json.loads(line) for line in lm.log()[len(before) :].splitlines() if line[:1] + line[-1:] == "{}"
        ]

    eventually(lambda: sum(line["event"] == "request refused" for line in lines()) == 2, 5)
    answered = next(line for line in lines() if line.get("requestId") == "who")
    assert (answered["event"], answered["route"], answered["status"]) == (
        "request answered",
        "/v1/tests",
        200,
    )
    assert answered["level"] == "debug" and answered["ms"] >= 0
    assert next(line for line in lines() if line.get("requestId") == "no")["status"] == 401
    assert "wrong" not in lm.log().replace("missing or wrong", "")


@pytest.mark.parametrize(("key", "value"), [("format", "xml"), ("level", "loud"), ("colour", True)])
def test_a_wrong_setting_is_one_line_that_names_it(tmp_path, key, value):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"security": {"allowAnonymous": True}, "logging": {key: value}}))
    with pytest.raises(loadmanager.ConfigError) as caught:
        loadmanager.load_config(str(path))
    assert any(line.startswith(f"logging.{key}") for line in caught.value.problems), caught.value.problems


@pytest.fixture
def writer():
    """The log of this process, put back afterwards."""
    before = dict(vars(loadmanager.LOG))
    yield loadmanager.LOG
    vars(loadmanager.LOG).update(before)


@pytest.mark.parametrize("is_json", [False, True])
def test_secrets_control_characters_and_huge_texts_do_not_get_out(writer, capsys, is_json):
    writer.is_json, writer.secrets = is_json, ("s3cret-of-ours",)
    forged = 'x\r\n2026-01-01T00:00:00.000Z run finished\x1b[31m\x9b\u2028"\ud800'
    loadmanager.log("run failed", run="r", why=f"{forged} s3cret-of-ours {'long ' * 100_000}")
    loadmanager.log("configuration not read again", error="e", trace="first " + "t" * 100_000 + " last")
    text = capsys.readouterr().err
    assert text.count("\n") == 2 and text.isascii() and len(text) < 12_000
    assert not set(text) & set(map(chr, (*range(10), *range(11, 32), 127)))
    assert "s3cret" not in text and "more characters" in text
    assert "last" in text and "first" not in text, "of a trace the end is what matters"
    if is_json:
        assert [json.loads(line)["event"] for line in text.splitlines()][0] == "run failed"


def test_secrets_of_the_configuration_are_those_that_are_hidden(tmp_path, writer):
    path = tmp_path / "config.json"
    config = {
        "security": {"apiToken": API_TOKEN, "locustCallbackToken": CALLBACK_TOKEN},
        "storage": {"url": "postgresql://lm:pa55word-of-ours@127.0.0.1/lm"},
    }
    path.write_text(json.dumps(config))
    loadmanager.configure_log(loadmanager.load_config(str(path)))
    assert {API_TOKEN, CALLBACK_TOKEN, "pa55word-of-ours"} <= set(writer.secrets)


# ---- request ids ----


def test_an_id_of_the_caller_comes_back_and_another_is_made_where_it_is_not_good(lm):
    for given in ("a", "0123-abc.DEF_~"[:-1], "x" * 128, "trace:1/2+3=@"):
        assert lm.get("/health", headers={"X-Request-Id": given}).headers["x-request-id"] == given
    made = [
        lm.get("/health", headers={"X-Request-Id": given}).headers["x-request-id"]
        for given in ("", "x" * 129, "with space", "<script>", "caf\u00e9", "a,b", "'")
    ]
    made += [lm.get("/v1/tests").headers["x-request-id"] for _ in range(3)]
    assert len(set(made)) == len(made) and all(re.fullmatch(r"[0-9a-f]{12}-\d+", one) for one in made), made


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /v1/tests HTTP/1.1\r\nHost: x\r\nX-Request-Id: mine\r\n\r\n", b"401"),
        (b"GET /nowhere HTTP/1.1\r\nHost: x\r\nX-Request-Id: mine\r\n\r\n", b"404"),
        (b"PUT /health HTTP/1.1\r\nHost: x\r\nX-Request-Id: mine\r\n\r\n", b"405"),
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET / HTTP/3.0\r\nHost: x\r\n\r\n", b"505"),
        (b"GET /health HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nLong: " + b"x" * 40_000 + b"\r\n\r\n", b"431"),
    ],
)
def test_answers_to_refused_requests_have_an_id(lm, sent, status):
    head = lm.raw(sent, until_closed=b"mine" not in sent).partition(b"\r\n\r\n")[0]
    assert head.split(b" ")[1] == status
    wanted = (
        rb"(?m)^X-Request-Id: mine\r?$" if b"mine" in sent else rb"(?m)^X-Request-Id: [0-9a-f]{12}-\d+\r?$"
    )
    assert re.search(wanted, head), head


def test_event_streams_have_an_id(lm):
    with lm.connect() as sock:
        sock.sendall(
            b"GET /v1/events HTTP/1.1\r\nHost: x\r\nX-Request-Id: live\r\n"
            + f"Authorization: Bearer {API_TOKEN}\r\n\r\n".encode()
        )
        received = b""
        while b"\r\n\r\n" not in received:
            received += sock.recv(4096)
    assert b"HTTP/1.1 200" in received and b"\r\nX-Request-Id: live\r\n" in received


# ---- traces ----


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (TRACEPARENT, "01"),
        (f"00-{TRACE_ID}-b7ad6b7169203331-00", "00"),
        (f"00-{TRACE_ID}-b7ad6b7169203331-ff", "01"),  # unknown flags are not passed on
        (f"01-{TRACE_ID}-b7ad6b7169203331-01", "01"),
        (f"cc-{TRACE_ID}-b7ad6b7169203331-01-what-comes-later", "01"),
    ],
)
def test_a_valid_traceparent_is_gone_on_with(text, flags):
    passed_on = loadmanager.next_traceparent(text)
    assert re.fullmatch(rf"00-{TRACE_ID}-[0-9a-f]{{16}}-{flags}", passed_on)
    assert "b7ad6b7169203331" not in passed_on, "the caller's span is not ours"


@pytest.mark.parametrize(
    "text",
    [
        None, "", "00", TRACEPARENT + "-more", TRACEPARENT + "-", "ff" + TRACEPARENT[2:], TRACEPARENT.upper(),
        TRACEPARENT[:-1],
        f"00-{'0' * 32}-b7ad6b7169203331-01", f"00-{TRACE_ID}-{'0' * 16}-01",
        f"0x-{TRACE_ID}-b7ad6b7169203331-01",
        f"cc-{TRACE_ID}-b7ad6b7169203331-01x", f"{TRACEPARENT}, {TRACEPARENT}", TRACEPARENT.replace("a", "g"),
        "\u0661" + TRACEPARENT[1:],
    ],
)  # fmt: skip
def test_a_new_trace_begins_where_there_is_no_valid_one(text):
    made = [loadmanager.next_traceparent(text) for _ in range(2)]
    assert all(re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", one) for one in made)
    assert made[0][3:35] != made[1][3:35] and TRACE_ID not in made[0]


def test_trace_of_a_create_goes_to_locust_and_to_receivers_and_survives_a_restart(load_manager, fake):
    with contextlib.closing(Receiver()) as receiver:
        lm = load_manager(
            cluster_config(fake.url), notifications=[webhook(receiver, events=["started", "finished"])]
        )
        run_id = lm.post("/v1/tests", create_body(), headers={"traceparent": TRACEPARENT}).json["id"]
        form = next(call.form for call in fake.calls if call.path == "/swarm")
        assert OURS.fullmatch(form["lm_traceparent"]), form
        lm.restart()
        lm.wait_for(run_id, "Running")
        lm.post(f"/v1/tests/{run_id}/stop")
        lm.wait_for(run_id, "Finished")
        eventually(lambda: len(receiver.messages) == 2, 10, what="both messages")
        for _, headers, body in receiver.messages:
            sent = {name.lower(): value for name, value in headers.items()}["traceparent"]
            assert sent == form["lm_traceparent"]
            assert json.loads(body)["data"]["traceId"] == TRACE_ID
        assert "traceparent" not in lm.run(run_id), "the run's answer is as it was"


def test_reruns_repeats_and_schedules_have_traces(load_manager, fake):
    at = {"id": "now", "cron": "@yearly", "test": {"tenantId": "acme", "envId": "dev", "scenarioId": "browse",
        "targetUsers": 1, "spawnRate": 1}}  # fmt: skip
    lm = load_manager(cluster_config(fake.url), schedules=[at])
    traces = functools.partial(
        lambda: [call.form["lm_traceparent"][3:35] for call in fake.calls if call.path == "/swarm"]
    )
    first = run_to_its_end(lm)
    again = lm.post(f"/v1/tests/{first['id']}/rerun", headers={"traceparent": TRACEPARENT}).json
    lm.post(f"/v1/tests/{again['id']}/stop")
    lm.wait_for(again["id"], "Finished")
    scheduled = lm.post("/v1/schedules/now/run", headers={"traceparent": TRACEPARENT}).json
    lm.post(f"/v1/tests/{scheduled['id']}/stop")
    lm.wait_for(scheduled["id"], "Finished")
    assert len(traces()) == 3 and traces()[0] != TRACE_ID and traces()[1:] == [TRACE_ID] * 2


def test_calls_of_a_real_locust_carry_the_trace_back(load_manager):
    with Target() as target:
        locustfile = LOCUSTFILE.format(hooks=str(ROOT / "locust"), target=target.url)
        lm = load_manager(logging={"format": "json", "level": "debug"})
        env = {
            "CONTROL_PLANE_URL": lm.url,
            "CONTROL_PLANE_TOKEN": CALLBACK_TOKEN,
            "TENANT_ID": "acme",
            "ENV_ID": "dev",
        }
        with LocustCluster(locustfile, workers=1, env=env) as cluster:
            lm.config["locustClusters"] = [cluster_config(cluster.base_url)]
            lm.restart()
            run_id = lm.post("/v1/tests", create_body(), headers={"traceparent": TRACEPARENT}).json["id"]

            def carried_back():
                routes = {
                    line["route"].rpartition("/")[2]: line.get("traceId")
                    for line in events_named(lm, "request answered")
                    if "/internal/locust/" in line["route"]
                }
                return routes if {"test-start", "metrics"} <= set(routes) else None

            eventually(carried_back, 20, what=f"calls of Locust; log:\n{lm.log()[-2000:]}")
            lm.post(f"/v1/tests/{run_id}/stop")
            lm.wait_for(run_id, "Finished")
            routes = eventually(
                lambda: "test-stop" in carried_back() and carried_back(),
                10,
                what=f"its end is told\n{lm.log()}",
            )
    assert set(routes.values()) == {TRACE_ID}, routes
