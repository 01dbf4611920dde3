"""Event streams and browser sign-in of the real program, read over plain sockets."""

from __future__ import annotations

import socket
import time

import pytest
from conftest import API_TOKEN
from control_plane import ControlPlane, EventStream
from waiting import eventually

HEARTBEAT_S = 15.0


@pytest.fixture(scope="module")
def plane(tmp_path_factory):
    cluster = {"id": "one", "baseUrl": "http://127.0.0.1:9", "tenantId": "t", "envId": "e"}
    other = {"id": "two", "baseUrl": "http://127.0.0.1:9", "tenantId": "t2", "envId": "e"}
    third = {"id": "three", "baseUrl": "http://127.0.0.1:9", "tenantId": "t3", "envId": "e"}
    folder = tmp_path_factory.mktemp("plane")
    with ControlPlane(
        folder,
        [cluster, other, third],
        orchestrator={"lostAfterSeconds": 86400, "metricsPollIntervalSeconds": 3600},
    ) as plane:
        yield plane


@pytest.fixture(scope="module")
def run_id(plane):
    return plane.external_run()


# ---- events ----


def test_stream_begins_with_ready_and_tells_of_a_push_within_a_second(plane, run_id):
    with EventStream(plane, "/v1/events") as stream:
        head = stream.head()
        assert (
            head.startswith("HTTP/1.1 200")
            and "text/event-stream" in head
            and "content-length" not in head.lower()
        )
        assert stream.next()["event"] == "ready"
        pushed_at = time.time()
        assert plane.push(run_id, 100) == 200
        event = stream.next("run")
        assert event["at"] - pushed_at < 1.0
        assert event["data"]["id"] == run_id and event["data"]["lastMetrics"]["totalRequests"] == 100


def test_stream_of_one_run_gives_its_state_then_samples_with_endpoints(plane, run_id):
    row = {"GET_/x": {"method": "GET", "name": "/x", "numRequests": 7, "numFailures": 0}}
    with (
        EventStream(plane, f"/v1/tests/{run_id}/events") as stream,
        EventStream(plane, "/v1/events") as everything,
    ):
        assert "200" in stream.head() and "200" in everything.head()
        assert stream.next()["event"] == "ready"
        assert stream.next()["data"]["id"] == run_id
        assert everything.next()["event"] == "ready"
        plane.push(run_id, 200, requestStats=row)
        sample = stream.next("sample")
        assert sample["data"]["totalRequests"] == 200 and sample["data"]["timestamp"].endswith("Z")
        assert stream.next("run")["data"]["lastMetrics"]["requestStats"]["GET_/x"]["numRequests"] == 7
        assert "requestStats" not in everything.next("run")["data"]["lastMetrics"]


def test_many_changes_become_few_events_and_the_last_state_arrives(plane, run_id):
    with EventStream(plane, f"/v1/tests/{run_id}/events") as stream:
        stream.head()
        stream.next("run")
        began = time.monotonic()
        for number in range(60):
            plane.push(run_id, 1000 + number)
        lasted = time.monotonic() - began
        seen = []
        while not seen or seen[-1] < 1059:
            seen.append(stream.next("run")["data"]["lastMetrics"]["totalRequests"])
        assert len(seen) <= lasted / 0.25 + 3
        assert seen == sorted(seen)


def test_last_event_id_resumes_with_what_was_missed_and_nothing_else(plane, run_id):
    with EventStream(plane, "/v1/events") as stream:
        stream.head()
        stream.next("ready")
        plane.push(run_id, 3000)
        last = stream.next("run")["id"]
    other = plane.external_run("t2")
    eventually(lambda: plane.call("GET", f"/v1/tests/{other}")[0] == 200)
    with EventStream(plane, "/v1/events", {"Last-Event-ID": last}) as stream:
        stream.head()
        event = stream.next()
        assert (event["event"], event["data"]["id"]) == ("run", other)
        last = event["id"]
    with EventStream(plane, "/v1/events", {"Last-Event-ID": last}) as stream:
        stream.head()
        plane.push(run_id, 3001)
        assert stream.next()["data"]["lastMetrics"]["totalRequests"] == 3001, (
            "nothing was missed, so nothing is repeated"
        )


@pytest.mark.parametrize("last", ["0", "abc-1", "-", "00000000-5", "x" * 300, "\u00e9"])
def test_last_event_id_that_is_not_ours_gives_reset(plane, run_id, last):
    with EventStream(plane, f"/v1/tests/{run_id}/events", {"Last-Event-ID": last}) as stream:
        assert "200" in stream.head()
        assert stream.next()["event"] == "reset"
        assert stream.next()["data"]["id"] == run_id


def test_deleted_run_is_told(plane):
    doomed = plane.external_run("t3")
    assert plane.callback("test-stop", {"runId": doomed}).status == 200
    eventually(
        lambda: plane.call("GET", f"/v1/tests/{doomed}")[1]["status"] in ("Finished", "Failed"), within_s=30
    )
    with (
        EventStream(plane, f"/v1/tests/{doomed}/events") as one,
        EventStream(plane, "/v1/events") as everything,
    ):
        one.head(), everything.head()
        one.next("run"), everything.next("ready")
        assert plane.call("DELETE", f"/v1/tests/{doomed}")[0] == 204
        assert one.next("deleted")["data"] == {"id": doomed}
        assert everything.next("deleted")["data"] == {"id": doomed}


def test_stream_of_unknown_run_is_404_and_without_token_401(plane):
    for path, token, expected in (("/v1/tests/none/events", API_TOKEN, "404"), ("/v1/events", None, "401")):
        with EventStream(plane, path, token=token) as stream:
            assert expected in stream.head().split("\r\n")[0]


def test_head_request_of_a_stream_ends(plane):
    status, body, headers = plane.call("HEAD", "/v1/events")
    assert (status, body, headers["content-type"]) == (200, b"", "text/event-stream")


def test_bytes_sent_into_a_stream_are_ignored(plane, run_id):
    with EventStream(plane, "/v1/events") as stream:
        stream.head()
        stream.next("ready")
        stream.sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
        plane.push(run_id, 4000)
        assert stream.next()["event"] == "run"


def test_heartbeat_comes_while_nothing_happens(plane):
    with EventStream(plane, "/v1/events") as stream:
        stream.head()
        stream.next("ready")
        stream.sock.settimeout(HEARTBEAT_S + 5)
        stream.next("comment")
        assert stream.comments == [": heartbeat"]


def test_reader_that_does_not_read_is_dropped_and_others_are_served(plane, run_id):
    rows = {
        f"GET_/{number}": {"method": "GET", "name": f"/{number}" + "x" * 150, "numRequests": 1}
        for number in range(2000)
    }
    path = f"/v1/tests/{run_id}/events"
    with EventStream(plane, path, receive_buffer=4096) as slow, EventStream(plane, path) as reader:
        slow.head(), reader.head()
        reader.next("run")
        requests = iter(range(5000, 9000))

        def dropped() -> bool:
            wanted = next(requests)
            assert plane.push(run_id, wanted, requestStats=rows) == 200
            while reader.next("run")["data"]["lastMetrics"]["totalRequests"] < wanted:
                pass
            return "slow reader let go" in plane.log()

        eventually(dropped, within_s=30)
        slow.sock.settimeout(10)
        with pytest.raises((AssertionError, ConnectionError)):  # what was under way, then the end
            while True:
                slow.next()
    plane.push(run_id, 9999, requestStats={})


def test_many_streams_get_every_event(plane, run_id):
    streams = [EventStream(plane, "/v1/events") for _ in range(300)]
    try:
        for stream in streams:
            stream.head()
            stream.next("ready")
        plane.push(run_id, 10_000)
        for stream in streams:
            while stream.next("run")["data"]["lastMetrics"]["totalRequests"] != 10_000:
                pass  # the end of the test before
    finally:
        for stream in streams:
            stream.__exit__()


# ---- sign-in ----


class Browser:
    """What a browser keeps after a sign-in: cookie and CSRF token."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        status, self.session, headers = plane.call("POST", "/session", {"token": API_TOKEN}, token=None)
        assert status == 200
        self.set_cookie = headers["set-cookie"]
        self.cookie = self.set_cookie.split(";")[0]

    def call(self, method, path, body=None, origin="same", csrf="same", **headers):
        sent = {"Cookie": self.cookie, **headers}
        if origin:
            sent["Origin"] = self.plane.url if origin == "same" else origin
        if csrf:
            sent["X-CSRF-Token"] = self.session["csrfToken"] if csrf == "same" else csrf
        return self.plane.call(method, path, body, token=None, headers=sent)[:2]


@pytest.fixture
def browser(plane):
    return Browser(plane)


def test_sign_in_sets_a_cookie_that_scripts_and_other_sites_do_not_get(browser):
    parts = {part.strip() for part in browser.set_cookie.split(";")[1:]}
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= parts
    assert API_TOKEN not in browser.set_cookie and len(browser.cookie.split("=")[1]) >= 40
    assert browser.call("GET", "/session", csrf=None)[1] == {
        **browser.session,
        "anonymous": False,
        "expiresInSeconds": pytest.approx(43199, abs=5),
    }


def test_sign_in_with_a_form(plane):
    body, content_type = f"token={API_TOKEN}".encode(), {"Content-Type": "application/x-www-form-urlencoded"}
    status, answer, headers = plane.call("POST", "/session", body, token=None, headers=content_type)
    assert status == 200 and answer["role"] == "admin" and "HttpOnly" in headers["set-cookie"]


@pytest.mark.parametrize("body", [{"token": "wrong"}, {"token": API_TOKEN + "x"}])
def test_wrong_token_is_refused_without_a_cookie(plane, body):
    status, answer, headers = plane.call("POST", "/session", body, token=None)
    assert status == 401 and "set-cookie" not in headers and API_TOKEN not in str(answer)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"token":5}', b'{"token":null}', b'{"token":"a","more":1}', b'"x"']
)
def test_malformed_sign_in_is_a_400(plane, body):
    assert (
        plane.call("POST", "/session", body, token=None, headers={"Content-Type": "application/json"})[0]
        == 400
    )


def test_cookie_reads_and_with_csrf_token_and_origin_writes(plane, browser):
    assert browser.call("GET", "/v1/tests", csrf=None, origin=None)[0] == 200
    status, answer = browser.call("POST", "/v1/tests", {})
    assert status == 400 and "tenantId" in answer["fields"], (
        "past the door, so it is the body that is refused"
    )


@pytest.mark.parametrize(
    "proof",
    [
        {"csrf": None},
        {"csrf": "wrong"},
        {"csrf": "\u00e9"},
        {"origin": None},
        {"origin": "null"},
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "http://["},
        {"origin": "file://"},
        {"origin": ""},
    ],
)
@pytest.mark.parametrize(
    "method, path",
    [("POST", "/v1/tests"), ("DELETE", "/v1/tests/x"), ("DELETE", "/session"), ("POST", "/session/end")],
)
def test_write_by_cookie_without_full_proof_is_forbidden(browser, method, path, proof):
    assert browser.call(method, path, {} if path == "/v1/tests" else None, **proof)[0] == 403
    assert browser.call("GET", "/v1/tests", csrf=None)[0] == 200, "and the session lives on"


@pytest.mark.parametrize(
    "host, expected",
    [
        ("localhost:{port}", 200),
        ("127.0.0.1:{port}", 200),
        ("[::1]:{port}", 200),
        ("10.1.2.3", 200),
        ("dash.localhost", 200),
        ("rebound.example:{port}", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("", 403),
        ("[", 403),
    ],
)
def test_cookie_counts_only_under_our_own_host_names(plane, browser, host, expected):
    host = host.format(port=plane.port)
    assert browser.call("GET", "/v1/tests", csrf=None, origin=None, Host=host)[0] == expected
    assert plane.call("GET", "/v1/tests", headers={"Host": host})[0] == 200, "a Bearer token does not need it"


def test_sign_in_from_another_sites_page_is_forbidden(plane):
    status, _, headers = plane.call(
        "POST", "/session", {"token": API_TOKEN}, token=None, headers={"Origin": "http://evil.example"}
    )
    assert status == 403 and "set-cookie" not in headers


def test_host_names_of_the_configuration_are_ours(tmp_path):
    server = {"publicUrl": "https://load.example/", "allowedHosts": ["jump.example"]}
    with ControlPlane(tmp_path, server=server) as plane:
        browser = Browser(plane)
        assert "Secure" in browser.set_cookie
        for host, expected in (("load.example", 200), ("jump.example:8443", 200), ("other.example", 403)):
            assert browser.call("GET", "/v1/tests", csrf=None, origin=None, Host=host)[0] == expected
        # A proxy that passes its own Host on: the Origin is the public address.
        assert browser.call("POST", "/v1/tests", {}, origin="https://load.example")[0] == 400
        assert browser.call("POST", "/v1/tests", {}, origin="http://load.example")[0] == 403


def test_sign_out_ends_the_session_and_its_streams(plane, browser):
    with EventStream(plane, "/v1/events", {"Cookie": browser.cookie}, token=None) as stream:
        assert "200" in stream.head()
        stream.next("ready")
        assert browser.call("DELETE", "/session")[0] == 204
        assert [event for event in stream.events() if event["event"] != "comment"] == []
    assert browser.call("GET", "/v1/tests", csrf=None)[0] == 401
    assert browser.call("GET", "/session", csrf=None)[1] == {
        "signedIn": False,
        "anonymous": False,
        "singleSignOn": False,
    }


def test_token_in_the_request_goes_before_the_cookie(plane, browser):
    status, _, _ = plane.call("GET", "/v1/tests", token="wrong", headers={"Cookie": browser.cookie})
    assert status in (401, 429)


@pytest.mark.parametrize("secret", ["", "forged", "\u00e9\u00ff", "x" * 5000])
def test_forged_cookie_is_refused(plane, browser, secret):
    name = browser.cookie.split("=")[0]
    assert plane.call("GET", "/v1/tests", token=None, headers={"Cookie": f"a=b; {name}={secret}"})[0] == 401
    assert plane.call("GET", "/v1/tests", token=None, headers={"Cookie": f"a=b; {browser.cookie}"})[0] == 200


def test_without_tokens_everybody_is_signed_in_but_no_other_sites_page_writes(tmp_path):
    security = {"apiToken": "", "locustCallbackToken": "", "allowAnonymous": True}
    with ControlPlane(tmp_path, security=security) as plane:
        assert plane.call("GET", "/session", token=None)[1] == {
            "signedIn": True,
            "anonymous": True,
            "name": "anonymous",
            "role": "admin",
        }
        for origin, expected in ((None, 400), (plane.url, 400), ("http://evil.example", 403), ("null", 403)):
            headers = {"Origin": origin} if origin else {}
            assert plane.call("POST", "/v1/tests", {}, token=None, headers=headers)[0] == expected
        rebound = {"Origin": f"http://evil.example:{plane.port}", "Host": f"evil.example:{plane.port}"}
        assert plane.call("POST", "/v1/tests", {}, token=None, headers=rebound)[0] == 403
        with EventStream(plane, "/v1/events", token=None) as stream:
            assert "200" in stream.head()


def test_many_wrong_tokens_are_slowed_down_and_the_right_one_is_served(tmp_path):
    with ControlPlane(tmp_path) as plane:
        answers = [plane.call("POST", "/session", {"token": "wrong"}, token=None) for _ in range(35)]
        assert answers[0][0] == 401 and answers[-1][0] == 429 and int(answers[-1][2]["retry-after"]) > 0
        assert plane.call("POST", "/session", {"token": API_TOKEN}, token=None)[0] == 200


def test_sessions_are_bounded_in_number_and_in_time(monkeypatch):
    import loadmanager as lm

    sessions, now = lm.Sessions(), [1000.0]
    monkeypatch.setattr(lm, "monotonic_s", lambda: now[0])
    secrets = [sessions.begin(lm.Principal("api", "admin"))[1] for _ in range(lm.Sessions.MAX_PER_USER + 1)]
    assert sessions.find(secrets[0]) is None and sessions.find(secrets[1]) and sessions.find(secrets[-1])
    now[0] += 12 * 3600 - 1
    assert sessions.find(secrets[-1])
    now[0] += 1
    assert sessions.find(secrets[-1]) is None


# ---- the page ----


def test_page_allows_nothing_but_its_own_script_and_style(plane):
    import base64
    import gzip
    import hashlib
    import re

    status, page, headers = plane.call("GET", "/", token=None)
    policy = headers["content-security-policy"]
    assert (
        status == 200 and "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    )
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.S)
        assert base64.b64encode(hashlib.sha256(content).digest()).decode() in policy
    assert not re.search(rb"innerHTML|insertAdjacentHTML|document\.write|\beval\(|srcdoc|outerHTML", page)
    assert not re.search(rb"<[^>]+ (on\w+|style)=", page.split(b"<script>")[0])
    assert headers["x-content-type-options"] == "nosniff"
    packed = plane.call("GET", "/", token=None, headers={"Accept-Encoding": "gzip, br"})
    assert gzip.decompress(packed[1]) == page and packed[2]["content-encoding"] == "gzip"


def test_every_path_the_page_asks_for_is_a_route(plane):
    import re

    import loadmanager as lm

    paths = {route.path for route in lm.ROUTES}
    asked = set(re.findall(r'"(/(?:v1|session)[a-z0-9/.-]*)', lm.PAGE_JS))
    rests = {f"/v1/tests/{{id}}{rest}" for rest in re.findall(r'runPath\([a-z.]+, "([^"?]*)', lm.PAGE_JS)}
    assert asked - {"/v1/tests/", "/v1/schedules/"} <= paths  # an id follows
    assert {
        path for path in rests if not path.endswith(("/failures", "/annotations", "/report.html"))
    } <= paths


# ---- the list as the page asks for it ----


def test_list_takes_several_states_a_search_and_brief(plane, run_id):
    plane.push(run_id, 11_000, requestStats={"GET_/x": {"method": "GET", "name": "/x", "numRequests": 7}})
    status, runs, _ = plane.call("GET", "/v1/tests?status=Running,Pending&brief=true")
    assert status == 200 and run_id in [run["id"] for run in runs]
    assert all("requestStats" not in run.get("lastMetrics", {}) for run in runs)
    assert [run["id"] for run in plane.call("GET", f"/v1/tests?search={run_id[:13].upper()}")[1]] == [run_id]
    assert plane.call("GET", "/v1/tests?search=no-such-word")[1] == []
    assert plane.call("GET", "/v1/tests?status=Running,Bogus")[0] == 400


def test_connection_of_a_stream_is_not_closed_as_idle_to_make_room(tmp_path):
    with ControlPlane(tmp_path, server={"maxConnections": 16}) as plane:
        with EventStream(plane, "/v1/events") as stream:
            stream.head()
            stream.next("ready")
            idle = [socket.create_connection(("127.0.0.1", plane.port)) for _ in range(40)]
            status, _, _ = plane.call("GET", "/health", token=None)
            assert status == 200
            stream.sock.settimeout(0.5)
            with pytest.raises(TimeoutError):  # silent, but open
                stream.sock.recv(1)
            for sock in idle:
                sock.close()


def test_more_streams_than_allowed_are_refused_with_503(tmp_path):
    with ControlPlane(tmp_path, server={"maxConnections": 16}) as plane:
        streams = [EventStream(plane, "/v1/events") for _ in range(8)]
        assert all("200" in stream.head() for stream in streams)
        with EventStream(plane, "/v1/events") as one_more:
            assert "503" in one_more.head()
        streams.pop().__exit__()
        eventually(lambda: "200" in EventStream(plane, "/v1/events").head(), within_s=5)
        for stream in streams:
            stream.__exit__()
