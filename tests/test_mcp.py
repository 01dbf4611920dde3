"""Assistants: `python loadmanager.py mcp`, driven by the public client library and by hostile lines."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time

import pytest
from conftest import API_TOKEN, CALLBACK_TOKEN, ROOT, cluster_config
from fake_locust import hang
from locust_process import LocustCluster
from mcp import Client, StdioServerParameters
from target import Target
from waiting import eventually

import loadmanager

VIEWER, OPERATOR = "token-of-a-viewer", "token-of-an-operator"
TOKENS = [
    {"name": "reader", "token": VIEWER, "role": "viewer", "tenants": ["acme"]},
    {"name": "driver", "token": OPERATOR, "role": "operator", "tenants": ["acme"]},
]
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
RUN = {"tenantId": "acme", "envId": "dev", "scenarioId": "browse", "targetUsers": 3, "spawnRate": 3}
READS = {
    "list_runs",
    "show_run",
    "compare_runs",
    "report",
    "list_clusters",
    "list_scenarios",
    "show_failures",
}
WRITES = {"start_run", "stop_run", "delete_run", "change_users"}


def command(url, *options, token=VIEWER):
    """The program, its environment without what could name another server."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("LOADMANAGER_")}
    arguments = [str(ROOT / "loadmanager.py"), "mcp", "--url", url, *options]
    return StdioServerParameters(
        command=sys.executable, args=arguments, env={**env, "LOADMANAGER_TOKEN": token}
    )


def with_client(url, work, *options, **how):
    """What `work(client)` returns, within 60 s."""

    async def session():
        async with Client(command(url, *options, **how)) as client:
            return await work(client)

    return asyncio.run(asyncio.wait_for(session(), 60))


def text_of(result):
    return "\n".join(block.text for block in result.content)


@pytest.fixture
def lm(load_manager, fake):
    return load_manager(cluster_config(fake.url), security={"apiTokens": TOKENS})


# ---- the public client -----------------------------------------------------


@pytest.mark.parametrize(
    ("token", "options", "some", "none"),
    [
        (VIEWER, (), READS, WRITES | {"get_audit"}),
        (VIEWER, ("--allow-writes",), READS, WRITES | {"get_audit"}),
        (OPERATOR, (), READS, WRITES | {"get_audit"}),
        (OPERATOR, ("--allow-writes",), READS | WRITES, {"get_audit", "post_reload"}),
        (API_TOKEN, (), READS | {"get_audit"}, WRITES | {"post_reload"}),
        (API_TOKEN, ("--allow-writes",), READS | WRITES | {"get_audit", "post_reload"}, set()),
    ],
)
def test_tools_are_those_that_role_and_options_permit(lm, token, options, some, none):
    async def work(client):
        return (await client.list_tools()).tools, client.protocol_version

    tools, version = with_client(lm.url, work, *options, token=token)
    names = {tool.name for tool in tools}
    assert version == "2025-11-25"
    assert some <= names and not none & names, names
    for tool in tools:
        writes = loadmanager.tools()[tool.name].route.method != "GET"
        assert tool.annotations.read_only_hint is not writes, tool
        assert tool.description and tool.input_schema["type"] == "object"
    destructive = {tool.name for tool in tools if tool.annotations.destructive_hint}
    assert destructive & WRITES == names & {"stop_run", "delete_run", "change_users"}


def test_tools_are_the_routes_and_take_what_the_routes_take():
    tools = loadmanager.tools()
    assert len(tools) == len([route for route in loadmanager.ROUTES if loadmanager.is_tool(route)]), (
        "a name is twice"
    )
    document = loadmanager.openapi_document()
    for tool in tools.values():
        operation = document["paths"][tool.route.path][tool.route.method.lower()]
        schema = tool.to_json()["inputSchema"]
        given = {entry["name"] for entry in operation["parameters"] if entry["in"] != "header"}
        body = (
            operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
        )
        assert set(schema["properties"]) == given | set(body.get("properties", {})), tool.name
        assert "$ref" not in json.dumps(schema), f"{tool.name}: a reference that an assistant cannot follow"


def test_a_model_starts_watches_compares_and_reports_real_runs(load_manager):
    with Target() as target:
        locustfile = LOCUSTFILE.format(hooks=str(ROOT / "locust"), target=target.url)
        lm = load_manager(security={"apiTokens": TOKENS}).restart()
        env = {
            "CONTROL_PLANE_URL": lm.url,
            "CONTROL_PLANE_TOKEN": CALLBACK_TOKEN,
            "TENANT_ID": "acme",
            "ENV_ID": "dev",
        }
        with LocustCluster(locustfile, workers=1, env=env) as cluster:
            lm.config["locustClusters"] = [cluster_config(cluster.base_url)]
            lm.restart()
            with_client(lm.url, drive_two_runs, "--allow-writes", token=OPERATOR)


async def drive_two_runs(client):
    ids = []
    for _ in range(2):
        started = await client.call_tool("start_run", {**RUN, "thresholds": ["errorRate < 1"]})
        assert not started.is_error, text_of(started)
        ids.append(started.structured_content["id"])
        for _ in range(100):
            shown = await client.call_tool("show_run", {"id": ids[-1]})
            if (shown.structured_content.get("lastMetrics") or {}).get("totalRequests", 0) > 20:
                break
            await asyncio.sleep(0.2)
        else:
            raise AssertionError(f"no numbers: {text_of(shown)}")
        assert "status: Running" in text_of(shown) and "lastMetrics:" in text_of(shown)
        stopped = await client.call_tool("stop_run", {"id": ids[-1]})
        assert not stopped.is_error, text_of(stopped)
    listed = await client.call_tool("list_runs", {"limit": 1})
    assert [run["id"] for run in listed.structured_content["items"]] == [ids[1]]
    more = await client.call_tool(
        "list_runs", {"limit": 1, "cursor": listed.structured_content["nextCursor"]}
    )
    assert [run["id"] for run in more.structured_content["items"]] == [ids[0]]
    compared = await client.call_tool("compare_runs", {"baseline": ids[0], "candidate": ids[1]})
    assert not compared.is_error and compared.structured_content["baseline"], text_of(compared)
    report = await client.call_tool("report", {"id": ids[0]})
    assert "browse" in text_of(report) and "errorRate" in text_of(report), text_of(report)


def test_what_the_server_refuses_is_a_result_with_its_message(lm):
    async def work(client):
        return [
            await client.call_tool("show_run", {"id": "nothing"}),
            await client.call_tool("start_run", {**RUN, "targetUsers": 0}),
            await client.call_tool("start_run", {**RUN, "tenantId": "beta"}),
            await client.call_tool("get_audit", {}),
            await client.call_tool("show_run", {}),
            await client.call_tool("show_run", {"id": "x", "colour": 1}),
            await client.call_tool("show_run", {"id": "../health"}),
        ]

    results = with_client(lm.url, work, "--allow-writes", token=OPERATOR)
    assert all(result.is_error for result in results)
    words = [text_of(result) for result in results]
    expected = [
        "there is no run",
        "targetUsers",
        "acme",
        "role admin",
        "id: is missing",
        "colour: is unknown",
        "there is no",
    ]
    assert all(word in text for word, text in zip(expected, words, strict=True)), words
    assert results[1].structured_content["fields"]["targetUsers"]


def test_a_write_is_refused_where_only_reads_are_allowed(lm, fake):
    async def work(client):
        return await client.call_tool("start_run", RUN)

    result = with_client(lm.url, work, token=API_TOKEN)
    assert result.is_error and "--allow-writes" in text_of(result)
    assert not [call for call in fake.calls if call.path == "/swarm"] and lm.get("/v1/tests").json == []


def test_long_lists_come_in_pages_and_long_results_are_cut_with_a_word(lm, fake):
    fake.endpoints = [("GET", f"/{'long' * 30}/{number}") for number in range(400)]
    run_id = lm.create().json["id"]
    eventually(lambda: len(lm.run(run_id)["lastMetrics"].get("requestStats", {})) > 300, 20)

    async def work(client):
        return [await client.call_tool(name, {"id": run_id}) for name in ("show_run", "report")]

    shown, report = with_client(lm.url, work)
    assert "cut: lists have" in shown.structured_content["cut"] and "cut: lists have" in text_of(shown)
    assert shown.structured_content["id"] == run_id
    assert len(json.dumps(shown.structured_content)) < 60_000 and len(text_of(report)) < 60_000


def test_a_server_that_is_away_is_an_error_and_no_end(lm):
    async def work(client):
        before = await client.call_tool("list_runs", {})
        lm.kill9()
        away = await client.call_tool("list_runs", {})
        await client.send_ping()
        await asyncio.to_thread(lm.start)
        return before, away, await client.call_tool("list_runs", {})

    before, away, again = with_client(lm.url, work)
    assert not before.is_error and not again.is_error
    assert away.is_error and "refused the connection" in text_of(away)


# ---- lines -----------------------------------------------------------------

HELLO = {
    "jsonrpc": "2.0", "id": 0, "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {},
        "clientInfo": {"name": "t", "version": "1"}},
}  # fmt: skip


class Lines:
    """The program with its stdin and stdout in our hands."""

    def __init__(self, url, *options, token=VIEWER, hello=True):
        how = command(url, *options, token=token)
        self.process = subprocess.Popen(
            [how.command, *how.args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=how.env,
        )
        if hello:
            assert self.ask(HELLO)["result"]["serverInfo"]["name"] == "loadmanager"
            self.send({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.process.kill()
        self.process.communicate()

    def send(self, message):
        line = message if isinstance(message, bytes) else json.dumps(message).encode()
        self.process.stdin.write(line + b"\n")
        self.process.stdin.flush()

    def next(self):
        """The next line of stdout as JSON; nothing else may be there."""
        killer = threading.Timer(30, self.process.kill)
        killer.start()
        line = self.process.stdout.readline()
        killer.cancel()
        assert line, f"no answer within 30 s: {self.process.stderr.read()}"
        answer = json.loads(line)
        assert answer["jsonrpc"] == "2.0", answer
        return answer

    def ask(self, message):
        self.send(message)
        return self.next()

    def end(self):
        """Exit status, the rest of stdout, and stderr after the end of stdin."""
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err


@pytest.mark.parametrize(
    ("asked", "agreed"),
    [(version, version) for version in ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")]
    + [("1999-01-01", "2025-11-25"), ("2026-07-28", "2025-11-25")],
)
def test_the_version_is_negotiated(lm, asked, agreed):
    with Lines(lm.url, hello=False) as lines:
        result = lines.ask({**HELLO, "params": {**HELLO["params"], "protocolVersion": asked}})["result"]
    assert result["protocolVersion"] == agreed and "tools" in result["capabilities"]


HOSTILE = [
    (b"{", -32700, None),
    (b"\xff\xfe", -32700, None),
    (b'{"jsonrpc": "2.0", "id": 1, "method": "ping", "params": {"x": NaN}}', -32700, None),
    (b"[" * 100_000, -32700, None),
    (b'{"id": ' + b"1" * 10_000 + b"}", -32700, None),
    ([{"jsonrpc": "2.0", "id": 1, "method": "ping"}], -32600, None),
    ([], -32600, None),
    ("text", -32600, None),
    (None, -32600, None),
    ({"jsonrpc": "1.0", "id": 1, "method": "ping"}, -32600, 1),
    ({"id": 1, "method": "ping"}, -32600, 1),
    ({"jsonrpc": "2.0", "id": 1}, -32600, 1),
    ({"jsonrpc": "2.0", "id": None, "method": "ping"}, -32600, None),
    ({"jsonrpc": "2.0", "id": True, "method": "ping"}, -32600, None),
    ({"jsonrpc": "2.0", "id": {}, "method": "ping"}, -32600, None),
    ({"jsonrpc": "2.0", "id": 1.5, "method": "ping"}, -32600, None),
    ({"jsonrpc": "2.0", "id": 1, "method": 5}, -32600, 1),
    ({"jsonrpc": "2.0", "id": 1, "method": "ping", "params": [1]}, -32602, 1),
    ({"jsonrpc": "2.0", "id": 1, "method": "resources/list"}, -32601, 1),
    ({"jsonrpc": "2.0", "id": 1, "method": "server/discover"}, -32601, 1),
    ({"jsonrpc": "2.0", "id": "a", "method": "initialize", "params": {"protocolVersion": 1}}, -32602, "a"),
    ({"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {"cursor": "x"}}, -32602, 1),
    ({"jsonrpc": "2.0", "id": 1, "method": "tools/call"}, -32602, 1),
    ({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": ["x"]}}, -32602, 1),
    ({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "\ud800\u001b[31m"}}, -32602, 1),
    (
        {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "list_runs", "arguments": 5}},
        -32602,
        1,
    ),
    (
        b'{"jsonrpc": "2.0", "id": 1, "method": "ping", "params": {"x": "' + b"x" * 5_000_000 + b'"}}',
        -32600,
        None,
    ),
]


def test_hostile_lines_get_errors_and_the_next_line_is_answered(lm):
    with Lines(lm.url) as lines:
        for message, code, message_id in HOSTILE:
            answer = lines.ask(message)
            shown = repr(message)[:120]
            assert (answer.get("error", {}).get("code"), answer["id"]) == (code, message_id), (shown, answer)
            assert lines.ask({"jsonrpc": "2.0", "id": "p", "method": "ping"}) == {
                "jsonrpc": "2.0",
                "id": "p",
                "result": {},
            }, shown
        for silent in ({"jsonrpc": "2.0", "method": "notifications/odd", "params": {}},
            {"jsonrpc": "2.0", "id": 9, "result": {}},
                       {"jsonrpc": "2.0", "method": "notifications/cancelled",
                           "params": {"requestId": {"a": []}}}, b"", b"  "):  # fmt: skip
            lines.send(silent)
        odd = {"id": "\ud800", "limit": [1, {}], "brief": "maybe"}
        for name in ("show_run", "list_runs", "compare_runs"):
            call = {
                "jsonrpc": "2.0",
                "id": name,
                "method": "tools/call",
                "params": {"name": name, "arguments": odd},
            }
            answer = lines.ask(call)
            assert answer["id"] == name and answer["result"]["isError"], answer
        status, out, err = lines.end()
    assert (status, out, err) == (0, b"", b""), err.decode()


def test_tools_wait_for_initialize(lm):
    with Lines(lm.url, hello=False) as lines:
        assert lines.ask({"jsonrpc": "2.0", "id": 1, "method": "ping"})["result"] == {}
        assert lines.ask({"jsonrpc": "2.0", "id": 2, "method": "tools/list"})["error"]["code"] == -32600


def test_a_ping_is_answered_while_a_call_waits_and_a_cancelled_call_gets_no_answer(lm, fake):
    fake.faults["/swarm"] = hang
    with Lines(lm.url, "--allow-writes", token=OPERATOR) as lines:
        call = {"name": "start_run", "arguments": RUN}
        lines.send({"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": call})
        assert lines.ask({"jsonrpc": "2.0", "id": "ping", "method": "ping"})["result"] == {}
        twice = lines.ask({"jsonrpc": "2.0", "id": 7, "method": "tools/list"})
        assert "not in use" in twice["error"]["message"], twice
        lines.send({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 7}})
        status, out, err = lines.end()  # which waits for the call
    assert (status, out, err) == (0, b"", b"")
    assert [call.path for call in fake.calls].count("/swarm") == 1


def test_answers_of_calls_in_hand_come_before_the_end(lm):
    with Lines(lm.url) as lines:
        for number in range(5):
            call = {"name": "list_runs", "arguments": {}}
            lines.send({"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": call})
        status, out, err = lines.end()
    assert status == 0 and not err
    assert sorted(json.loads(line)["id"] for line in out.splitlines()) == list(range(5))


def test_too_many_calls_at_once_are_refused(lm, fake):
    fake.faults["/swarm"] = hang
    with Lines(lm.url, "--allow-writes", token=OPERATOR) as lines:
        began = time.monotonic()
        params = {"name": "start_run", "arguments": {**RUN, "queue": True}}
        calls = [
            {"jsonrpc": "2.0", "id": number, "method": "tools/call", "params": params}
            for number in range(4 * loadmanager.MAX_MCP_CALLS)
        ]
        # At once: those that are only queued are answered soon, and make place for others.
        lines.send(b"\n".join(json.dumps(call).encode() for call in calls))
        answers = [lines.next()]
        while "error" not in answers[-1] and time.monotonic() < began + 30:
            answers.append(lines.next())
    assert "calls are in hand" in answers[-1].get("error", {}).get("message", ""), answers


def test_a_wrong_address_is_one_line_and_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "loadmanager.py"), "mcp", "--url", "ftp://x"],
        input=b"", capture_output=True, timeout=30, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, b"") and done.stderr.count(b"\n") == 1, done.stderr
