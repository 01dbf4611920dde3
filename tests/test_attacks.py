"""Attacks that were tried, and what came of each: forged requests, injection, path tricks, floods, timing."""

from __future__ import annotations

import ast
import hmac
import json
import re
import socket
from pathlib import Path

import pytest
from conftest import API_TOKEN, CALLBACK_TOKEN, cluster_config, create_body, read_answers
from control_plane import EventStream
from waiting import eventually

import loadmanager

OTHER = {"name": "other", "token": "token-of-beta", "role": "admin", "tenants": ["beta"]}


class Streams:
    """What EventStream asks of a server."""

    def __init__(self, lm):
        self.port = int(lm.url.rsplit(":", 1)[1])


# ---- tokens ----------------------------------------------------------------


def test_secrets_are_compared_in_constant_time_only():
    """No secret, digest or signature is compared by == or looked up before it was proven."""
    source = Path(loadmanager.__file__).read_text(encoding="utf-8")
    suspects = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare) and any(isinstance(op, (ast.Eq, ast.NotEq)) for op in node.ops):
            text = ast.unparse(node)
            if (
                re.search(r"\b\w*(digest|signature|csrf|verifier|nonce|seal)\w*\b", text)
                and "other == digest" not in text
            ):
                suspects.append(f"line {node.lineno}: {text}")
    assert not suspects, "\n".join(suspects)


def test_every_token_is_compared_whichever_is_right(monkeypatch):
    """The number of comparisons tells neither which token was nearly right nor which it is."""
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(
        loadmanager.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b)
    )
    entries = tuple(
        loadmanager.ApiTokenConfig(name=f"t{n}", token=f"token-{n}", role="viewer", tenants=("*",))
        for n in range(5)
    )
    tokens = loadmanager.ApiTokens(loadmanager.SecurityConfig(api_token="main", api_tokens=entries))
    counts = []
    for token in ("main", "token-0", "token-4", "token-", "", "x" * 10_000, "\u00fc\udcff"):
        compared.clear()
        tokens.owner(token)
        counts.append(len(compared))
        assert all(len(a) == len(b) == 32 for a, b in compared), (
            "what is compared has the length of what was sent"
        )
    assert set(counts) == {6}, counts


def test_wrong_tokens_of_every_shape_are_refused(lm):
    for authorization in (
        "", "Bearer", "Bearer ", f"Basic {API_TOKEN}", API_TOKEN, f"Bearer {API_TOKEN}x",
        f"Bearer {API_TOKEN[:-1]}", f"Bearer {API_TOKEN.upper()}",
        f"Bearer {API_TOKEN} {API_TOKEN}", f"Bearer \u00fc{API_TOKEN}", "Bearer null",
        f"Bearer {CALLBACK_TOKEN}", "Bearer " + "x" * 20_000, "Bearer ..", "Bearer *",
    ):  # fmt: skip
        answer = lm.get("/v1/tests", headers={"Authorization": authorization.encode("latin-1")}, token=None)
        assert answer.status in (401, 429), (authorization[:40], answer.status)
    assert lm.get(f"/v1/tests?token={API_TOKEN}&access_token={API_TOKEN}", token=None).status in (401, 429), (
        "a token in the query counts"
    )
    twice = lm.raw(
        (
            "GET /v1/tests HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\nAuthorization: Bearer "
            f"{API_TOKEN}\r\n\r\n"
        ).encode(),
        until_closed=True,
    )
    assert twice.startswith(b"HTTP/1.1 400 ")
    assert lm.callback("metrics", {"runId": "x", "metrics": {}}, API_TOKEN).status in (401, 429), (
        "an API token passes as a callback token"
    )


def test_flood_of_wrong_tokens_stops_nobody_else_and_fills_no_disk(load_manager, fake):
    lm = load_manager(cluster_config(fake.url))
    request = b"GET /v1/tests HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\n\r\n"
    with lm.connect() as sock:
        for _ in range(40):
            sock.sendall(request * 100)
            received = read_answers(sock, 100)
        assert received.count(b"HTTP/1.1 429 ") == 100
    assert lm.get("/v1/tests", timeout_s=8).status == 200
    kept = lm.get("/v1/audit?limit=1000&outcome=refused").json
    assert 20 <= len(kept) <= 60, f"{len(kept)} of 4000 wrong tokens are in the audit"
    assert {entry["status"] for entry in kept} == {401}


# ---- forged requests of a browser ------------------------------------------


def signed_in(lm):
    answer = lm.post("/session", {"token": API_TOKEN}, token=None)
    return {"Cookie": answer.headers["set-cookie"].split(";")[0]}, answer.json["csrfToken"]


def test_page_of_another_site_can_do_nothing_with_the_cookie(lm, fake):
    cookie, csrf = signed_in(lm)
    for headers in (
        {}, {"Origin": lm.url}, {"X-CSRF-Token": csrf}, {"Origin": "https://evil.example",
            "X-CSRF-Token": csrf}, {"Origin": "null", "X-CSRF-Token": csrf},
        {"Origin": lm.url, "X-CSRF-Token": csrf[:-1] + "x"}, {"Origin": lm.url, "X-CSRF-Token": ""},
        {"Origin": lm.url + ".evil.example", "X-CSRF-Token": csrf},
        {"Origin": lm.url.replace("http:", "https:x"), "X-CSRF-Token": csrf},
        {"Referer": lm.url, "X-CSRF-Token": csrf},
    ):  # fmt: skip
        for method, path, body in (
            ("POST", "/v1/tests", create_body()),
            ("POST", "/v1/stop-all", {}),
            ("DELETE", "/session", None),
        ):
            answer = lm.request(method, path, body, {**cookie, **headers}, token=None)
            assert answer.status == 403, (headers, path, answer.status)
    assert not fake.swarms
    told = lm.get("/v1/audit").json[0]
    assert (told["who"], told["status"]) == ("api", 403), "who was nearly used is not told"
    assert (
        lm.post(
            "/v1/tests", create_body(), headers={**cookie, "Origin": lm.url, "X-CSRF-Token": csrf}, token=None
        ).status
        == 201
    )


def test_no_answer_lets_another_site_read_it(lm):
    for path in ("/v1/tests", "/session", "/openapi.json", "/v1/audit"):
        for method in ("GET", "OPTIONS"):
            answer = lm.request(
                method,
                path,
                headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"},
            )
            assert not [name for name in answer.headers if name.startswith("access-control")]


def test_host_name_that_is_not_ours_gets_nothing_with_the_cookie(lm):
    cookie, _ = signed_in(lm)
    for host in (
        "evil.example",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil.example:8080",
        "",
        "[::1",
        "a b",
    ):
        answer = lm.get("/v1/tests", headers={**cookie, "Host": host}, token=None)
        assert answer.status in (400, 403), (host, answer.status)


# ---- injection -------------------------------------------------------------

HOSTILE = [
    "a\r\nSet-Cookie: x=1", "a\nlevel=forged", "a\x00b", "a\x1b[31mred", "\u2028", "\u202etxt",
    "<script>alert(1)</script>", "'; DROP TABLE runs; --",
    '" OR 1=1', "${jndi:ldap://x}", "{{7*7}}", "../../etc/passwd", "%s%n", "=HYPERLINK()", "a" * 256,
    "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_reaches_no_header_no_log_line_and_no_statement(load_manager, fake, text):
    lm = load_manager(cluster_config(fake.url))
    lines_before = lm.log().count("\n")
    bodies = [create_body(**{name: text}) for name in ("tenantId", "envId", "scenarioId", "confirm", "host")]
    answers = [lm.post("/v1/tests", json.dumps(body, ensure_ascii=True).encode()) for body in bodies]
    answers.append(
        lm.post(
            "/v1/tests",
            create_body(),
            headers={"Idempotency-Key": text.encode("utf-8", "replace").hex()[:200]},
        )
    )
    quoted = loadmanager.quote(text.encode("utf-8", "surrogatepass"))
    answers += [
        lm.get(f"/v1/tests/{quoted}"),
        lm.get(f"/v1/tests?search={quoted}&tenantId={quoted}"),
        lm.get(f"/v1/audit?who={quoted}&action={quoted}&runId={quoted}"),
    ]
    answers += [
        lm.get(f"/v1/baselines/{quoted}/dev/x"),
        lm.post(f"/v1/tests/{quoted}/stop"),
        lm.get("/v1/tests", token="wrong", headers={"X-Forwarded-For": "1.1.1.1"}),
    ]
    for answer in answers:
        assert answer.status < 500 or answer.status == 502, (answer.status, answer.body[:300])
        assert "set-cookie" not in answer.headers and "x" != answer.headers.get("x")
    log = lm.log()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u2028\u202e]", log), "a control character is in the log"
    new_lines = log.splitlines()[lines_before:]
    assert all(re.match(r"\d{4}-\d\d-\d\dT", line) for line in new_lines), [
        line for line in new_lines if not re.match(r"\d{4}-", line)
    ]
    assert "trace=" not in log
    assert lm.get("/v1/audit?limit=1000").status == 200 and lm.get("/v1/tests").status == 200


def test_name_of_a_signed_on_caller_cannot_forge_a_line():
    config = loadmanager.JwtConfig()
    for name in ("alice\nadmin", "alice\radmin", "a\x1b[2J", "", "\u202eadmin"):
        with pytest.raises(loadmanager.TokenRefused):
            loadmanager.ClaimsMap(config).principal({"sub": name, "role": "admin"}, 1.0)
    found = loadmanager.ClaimsMap(config).principal({"sub": "api", "role": "admin"}, 1.0)
    assert found.name == "sso:api", "a signed-on caller passes as the configuration's own token"


# ---- path tricks -----------------------------------------------------------


def test_path_tricks_reach_no_other_route_and_no_other_tenant(load_manager, fake):
    lm = load_manager(cluster_config(fake.url), security={"apiTokens": [OTHER]})
    run_id = lm.create().json["id"]
    bearer = f"Authorization: Bearer {OTHER['token']}\r\n"
    for path in (
        f"/v1/tests/{run_id}", f"/v1/tests/{run_id}/", f"//v1/tests/{run_id}", f"/v1//tests/{run_id}",
        f"/v1/./tests/{run_id}", f"/v1/x/../tests/{run_id}",
        f"/v1/tests/%2e%2e/tests/{run_id}", f"/v1/tests/x%2f..%2f{run_id}", f"/v1/tests/{run_id}%00",
        f"/v1/tests/{run_id}%0a", f"/v1/tests/{run_id};x", f"/v1/tests/{run_id}%20",
        f"/V1/TESTS/{run_id}", f"/v1/tests/{run_id.upper()}", f"/v1/tests/{run_id}#x",
        f"/v1/tests/{run_id}?x", f"/v1/tests%2f{run_id}", f"/v1/tests/%2e/{run_id}",
        f"/v1/tests/{run_id}/metrics/../events", f"/v1/tests/\xff{run_id}",
        f"http://127.0.0.1/v1/tests/{run_id}", f"/v1/internal/../tests/{run_id}", "/v1/audit/../audit",
        "/.git/config", "/config.json", "/../config.json", "/runs.db", "/%2e%2e/config.json",
        "/v1/tests/..%2f..%2fconfig.json",
    ):  # fmt: skip
        raw = lm.raw(
            f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{bearer}Connection: close\r\n\r\n".encode("latin-1"),
            until_closed=True,
        )
        status = int(raw.split(b" ")[1])
        assert status in (400, 404), (path, status)
        assert b"acme" not in raw and b"apiToken" not in raw, (path, raw[:300])
    smuggled = (
        f"POST /v1/stop-all HTTP/1.1\r\nHost: x\r\n{bearer}Content-Length: 4\r\nTransfer-Encoding: "
        "chunked\r\n\r\n0\r\n\r\nGET /v1/tests HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
        f"{API_TOKEN}\r\n\r\n"
    )
    raw = lm.raw(smuggled.encode(), until_closed=True)
    assert raw.count(b"HTTP/1.1 ") == 1 and raw.startswith(b"HTTP/1.1 400 ")
    assert lm.run(run_id)["status"] == "Running"


def test_ids_of_another_tenant_in_bodies_and_queries(load_manager, fake_locust):
    clusters = [
        cluster_config(fake_locust().url),
        {**cluster_config(fake_locust().url, "two"), "tenantId": "beta"},
    ]
    lm = load_manager(*clusters, security={"apiTokens": [OTHER]})
    theirs = lm.create().json["id"]
    ours = lm.create(tenantId="beta").json["id"]
    bearer = {"token": OTHER["token"]}
    for path in (
        f"/v1/tests/compare?baseline={theirs}&candidate={ours}",
        f"/v1/tests/compare?baseline={ours}&candidate={theirs}",
    ):
        answer = lm.get(path, **bearer)
        assert answer.status == 404 and b"acme" not in answer.body
    put = lm.request("PUT", "/v1/baselines/beta/dev/browse", {"runId": theirs}, **bearer)
    assert put.status == 400 and b"acme" not in put.body
    for tenant in ("acme", "nobody"):
        answer = lm.get(f"/v1/tests?tenantId={tenant}", **bearer)
        assert answer.json == [], "the list tells which tenants there are"
        assert lm.post("/v1/stop-all", {"tenantId": tenant}, **bearer).json["stopped"] == []
        assert lm.get(f"/v1/audit?tenantId={tenant}", **bearer).json == []
    assert theirs not in lm.get("/v1/audit?limit=1000", **bearer).body.decode()
    assert lm.run(theirs)["status"] == "Running"
    deleted = lm.request("DELETE", f"/v1/tests/{theirs}", **bearer)
    assert deleted.status == 404 and "Running" not in deleted.json["message"]


# ---- limits ----------------------------------------------------------------


def test_requests_of_one_token_are_limited_and_not_those_of_another(load_manager, fake):
    lm = load_manager(
        cluster_config(fake.url), security={"apiTokens": [OTHER]}, limits={"requestsPerSecond": 20}
    )
    credentials = f"Authorization: Bearer {OTHER['token']}\r\n"
    request = f"GET /v1/tests/none HTTP/1.1\r\nHost: x\r\n{credentials}\r\n".encode()
    with lm.connect() as sock:
        sock.sendall(request * 100)
        received = read_answers(sock, 100)
    assert 20 <= received.count(b"HTTP/1.1 404 ") <= 60 and received.count(b"HTTP/1.1 429 ") >= 40
    assert b"Retry-After: 1\r\n" in received
    assert lm.get("/v1/tests").status == 200, "another token pays for it"
    assert eventually(lambda: lm.get("/v1/tests", token=OTHER["token"]).status == 200, 3), (
        "the limit does not end"
    )


def test_event_streams_of_one_token_are_limited(load_manager, fake):
    lm = load_manager(cluster_config(fake.url), security={"apiTokens": [OTHER]}, limits={"eventStreams": 3})
    streams = [EventStream(Streams(lm), "/v1/events") for _ in range(3)]
    assert all("200 OK" in stream.head() for stream in streams)
    with EventStream(Streams(lm), "/v1/events") as one_more:
        head = one_more.head()
        assert " 429 " in head and "Retry-After: " in head
    with EventStream(Streams(lm), "/v1/events", token=OTHER["token"]) as anothers:
        assert "200 OK" in anothers.head()
    streams.pop().sock.close()
    eventually(
        lambda: "200 OK" in EventStream(Streams(lm), "/v1/events").head(),
        5,
        what="a stream that ended makes room",
    )
    for stream in streams:
        stream.sock.close()


def test_sizes_of_bodies_are_limited_before_they_are_read(load_manager, fake):
    lm = load_manager(cluster_config(fake.url), limits={"bodyBytes": 2048, "callbackBytes": 4096})
    for path, header, most in (
        ("/v1/tests", f"Authorization: Bearer {API_TOKEN}", 2048),
        ("/v1/internal/locust/metrics", f"X-Locust-Token: {CALLBACK_TOKEN}", 4096),
    ):
        raw = lm.raw(
            f"POST {path} HTTP/1.1\r\nHost: x\r\n{header}\r\nContent-Length: {most + 1}\r\n\r\n".encode()
        )
        assert raw.startswith(b"HTTP/1.1 413 ") and str(most).encode() in raw
        padded = json.dumps({"x": ""}).ljust(most).encode()
        raw = lm.raw(
            f"POST {path} HTTP/1.1\r\nHost: x\r\n{header}\r\nContent-Length: {most}\r\n\r\n".encode() + padded
        )
        assert raw.startswith(b"HTTP/1.1 400 ")


def test_slow_bodies_and_many_connections_keep_nobody_out(lm):
    slow = []
    for _ in range(100):
        sock = lm.connect()
        sock.sendall(
            (
                "POST /v1/tests HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer "
                f"{API_TOKEN}\r\nContent-Length: 1000\r\n\r\n{{"
            ).encode()
        )
        slow.append(sock)
    assert lm.get("/v1/tests", timeout_s=8).status == 200
    for sock in slow:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.close()
