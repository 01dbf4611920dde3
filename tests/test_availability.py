"""Who may make everybody wait: floods, slow readers, big bodies, few descriptors and few threads."""

from __future__ import annotations

import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import requests
import sseclient
from conftest import API_TOKEN, CALLBACK_TOKEN, cluster_config, read_answers
from waiting import eventually

import loadmanager

BEARER = f"Authorization: Bearer {API_TOKEN}\r\n"


class StubApi:
    """An API of three routes whose handlers the test gives: /now, /wait and /stop; and its server."""

    def __init__(self) -> None:
        self.handlers: dict[str, Callable[[loadmanager.Request], loadmanager.Response]] = {}
        self.routes = {
            "/now": loadmanager.Route("POST", "/now", print, "anyone", "", waits=False),
            "/wait": loadmanager.Route("POST", "/wait", print, "anyone", ""),
            "/stop": loadmanager.Route("POST", "/stop", print, "anyone", "", reserved=True),
        }
        self.workers = loadmanager.Workers()
        self.loop = loadmanager.ConnectionLoop(self, 100, None, self.workers)
        self.server = loadmanager.ApiServer("127.0.0.1", 0, self.loop)

    def start(self) -> None:
        self.workers.start()
        self.loop.start()
        loadmanager.start_thread("accept", self.server.accept)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.loop.close()

    def admit(self, head: loadmanager.RequestHead, address: str) -> loadmanager.Request:
        principal = loadmanager.Principal(head.headers.get("x-who", ""), "admin")
        return loadmanager.Request(head, self.routes[head.path], {}, principal, address)

    def respond(self, request: loadmanager.Request) -> loadmanager.Response:
        handler = self.handlers.get(request.route.path)
        return handler(request) if handler else loadmanager.Response(b"{}")

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(10)
        sock.connect(("127.0.0.1", self.server.server_port))
        return sock

    def ask(self, path: str, body: bytes = b"", who: str = "") -> bytes:
        with self.connect() as sock:
            sock.sendall(request_bytes(path, body, who))
            return read_answers(sock)


def request_bytes(path: str, body: bytes = b"", who: str = "") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nX-Who: {who}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


@pytest.fixture
def api() -> Iterator[StubApi]:
    stub = StubApi()
    yield stub
    stub.close()


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """What the edges of threads counted in this test."""
    monkeypatch.setattr(loadmanager, "UNFORESEEN", {})
    return loadmanager.UNFORESEEN


# ---- what comes in -----------------------------------------------------------


def test_empty_lines_before_a_request_are_skipped_up_to_a_bound(lm):
    few = lm.raw(b"\r\n" * 3 + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert few.startswith(b"HTTP/1.1 200 ")
    many = lm.raw(b"\r\n" * 20 + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", until_closed=True)
    assert many.startswith(b"HTTP/1.1 400 ") and b"empty lines" in many and many.count(b"HTTP/1.1") == 1


def test_empty_lines_that_come_one_by_one_are_counted_together(lm):
    with lm.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for _ in range(40):
                sock.sendall(b"\r\n")
                time.sleep(0.005)
        except OSError:
            pass  # it was answered and closed meanwhile
        assert read_answers(sock, until_closed=True).startswith(b"HTTP/1.1 400 ")


def test_head_that_drips_is_looked_at_once(monkeypatch):
    """Each byte of a head is searched for its end once, and the request line is checked once."""
    looked = []

    class Searched(bytes):
        def find(self, what, start=0, *end):
            if what == b"\r\n\r\n":
                looked.append(len(self) - start)
            return super().find(what, start, *end)

        def __add__(self, other):
            return Searched(bytes(self) + other)

    connection = loadmanager.Connection(None, None, "")  # type: ignore[arg-type]
    connection.deadline = 0.0
    raw = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 90
    connection.buffer = Searched(b"")
    for index in range(len(raw)):
        connection.buffer = connection.buffer + raw[index : index + 1]
        assert connection._begin_request() is False
    assert sum(looked) < 10 * len(raw), f"{sum(looked)} bytes were searched for a head of {len(raw)}"


def test_connection_that_pipelines_gives_others_a_turn(api):
    order: list[str] = []
    api.handlers["/now"] = lambda request: (
        order.append(request.head.headers["x-who"]) or loadmanager.Response(b"{}")
    )
    with api.connect() as flood, api.connect() as other:
        flood.sendall(request_bytes("/now", who="flood") * 400)
        other.sendall(request_bytes("/now", who="other"))
        api.start()
        read_answers(flood, 400), read_answers(other)
    assert order.count("flood") == 400
    assert order.index("other") < 400, "a connection with many requests was served to its end first"


def test_big_body_is_parsed_by_a_thread_of_its_own_and_a_small_one_in_the_loop(api):
    threads = []
    api.handlers["/now"] = lambda request: (
        threads.append(threading.current_thread().name)
        or loadmanager.Response(json.dumps(len(request.body)).encode())
    )
    api.start()
    assert api.ask("/now", b"x" * 1000).endswith(b"1000")
    assert api.ask("/now", b"x" * 1_000_000).endswith(b"1000000")
    assert threads[0] == "connections" and threads[1].startswith("big body "), threads
    assert api.loop.big_bodies == {False: 0, True: 0}


def test_bodies_on_their_way_are_bounded_in_all(api):
    api.start()
    size = loadmanager.MAX_BIG_CALLBACKS // 4
    halves = []
    for _ in range(4):
        sock = api.connect()
        sock.sendall(f"POST /now HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode())
        halves.append(sock)
    eventually(lambda: api.loop.big_bodies[False] == 4 * size)
    refused = api.ask("/now", b"x" * 100_000)
    assert refused.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1\r\n" in refused
    assert api.ask("/now", b"x").startswith(b"HTTP/1.1 200 ")
    for sock in halves:
        sock.close()
    eventually(lambda: api.loop.big_bodies[False] == 0, what="bodies that never came are given back")


def test_content_length_beyond_all_numbers_is_told_as_too_large(lm):
    raw = lm.raw(f"POST /v1/tests HTTP/1.1\r\nHost: x\r\n{BEARER}Content-Length: {'9' * 19}\r\n\r\n".encode())
    assert raw.startswith(b"HTTP/1.1 413 ") and b"larger than any body" in raw
    raw = lm.raw(f"POST /v1/tests HTTP/1.1\r\nHost: x\r\n{BEARER}Content-Length: 1e3\r\n\r\n".encode())
    assert raw.startswith(b"HTTP/1.1 400 ") and b"digits only" in raw


# ---- what is not read --------------------------------------------------------


MIB = 1024 * 1024


def big_answer(request: loadmanager.Request) -> loadmanager.Response:
    return loadmanager.Response([b"["] + [SHARED] * 20 + [b"]"])


SHARED = b"x" * MIB


def test_answers_that_nobody_reads_are_bounded_and_not_copied(api, monkeypatch):
    monkeypatch.setattr(loadmanager, "MAX_UNSENT_OF_CALLER", 50 * MIB)
    api.handlers["/wait"] = big_answer
    api.start()
    unread = []
    for count in range(1, 4):
        sock = api.connect(receive_buffer=4096)
        sock.sendall(request_bytes("/wait", who="slow"))
        unread.append(sock)
        eventually(
            lambda count=count: api.loop._unsent > count * 12 * MIB, what=f"{count} answers are under way"
        )
    waiting = [item for item in api.loop._connections if item.out]
    assert all(piece is SHARED for item in waiting for piece in list(item.out)[1:-1]), (
        "a copy for each answer"
    )
    refused = api.ask("/wait", who="slow")
    assert (
        refused.startswith(b"HTTP/1.1 429 ") and b"Retry-After: 1\r\n" in refused and b"not read" in refused
    )
    assert api.ask("/now", who="slow").startswith(b"HTTP/1.1 200 "), "a small answer is refused, too"
    with api.connect() as sock:
        sock.sendall(request_bytes("/wait", who="another"))
        assert read_some(sock, 20 * MIB)
    for sock in unread:
        sock.close()
    eventually(lambda: api.loop._unsent == 0 and not api.loop._unsent_of, what="nothing is counted any more")


def read_some(sock: socket.socket, size: int) -> bool:
    """Whether so many bytes come."""
    while size > 0 and (received := sock.recv(MIB)):
        size -= len(received)
    return size <= 0


def test_slowest_reader_goes_first_when_all_is_too_much(api, monkeypatch):
    monkeypatch.setattr(loadmanager, "MAX_UNSENT_IN_ALL", 25 * MIB)
    api.handlers["/wait"] = big_answer
    api.start()
    with api.connect(4096) as first, api.connect() as second:
        first.sendall(request_bytes("/wait", who="one"))
        eventually(lambda: api.loop._unsent > 12 * MIB)
        second.sendall(request_bytes("/wait", who="two"))
        assert read_some(second, 20 * MIB)
        eventually(
            lambda: not [item for item in api.loop._connections if item.out], what="the first is let go"
        )


def test_reader_below_the_least_speed_is_let_go(api, monkeypatch):
    monkeypatch.setattr(loadmanager, "WRITE_WINDOW_S", 1.0)
    api.handlers["/wait"] = big_answer
    api.start()
    with api.connect(4096) as slow:
        slow.sendall(request_bytes("/wait"))
        eventually(lambda: api.loop._unsent > 12 * MIB)

        def is_let_go() -> bool:
            slow.recv(500)
            return not api.loop._unsent

        eventually(is_let_go, 15, what="who reads 5 kB/s holds 20 MB no longer")


def test_streams_of_one_run_share_the_bytes_of_an_event(lm_service, monkeypatch):
    service, call = lm_service
    run_id = call(
        "register-external", {"tenantId": "acme", "envId": "dev", "targetUsers": 1, "spawnRate": 1}
    )["runId"]
    streams = []
    for _ in range(3):
        sock = socket.create_connection(("127.0.0.1", service._server.server_port), 10)
        sock.sendall(f"GET /v1/tests/{run_id}/events HTTP/1.1\r\nHost: x\r\n{BEARER}\r\n".encode())
        streams.append(sock)
    pushed: dict[int, list[bytes]] = {}

    def push(connection, raw):
        pushed.setdefault(id(connection), []).append(raw)

    eventually(lambda: sum(item.streams for item in service._loop._connections) == 3)
    monkeypatch.setattr(loadmanager.Connection, "push", push)
    call("metrics", {"runId": run_id, "metrics": {"totalRequests": 5, "totalFailures": 0}})
    eventually(lambda: len(pushed) == 3 and all(len(each) >= 2 for each in pushed.values()))
    events = [next(raw for raw in each if b"event: run" in raw) for each in pushed.values()]
    assert events[0] is events[1] is events[2]
    for sock in streams:
        sock.close()


# ---- few descriptors, few threads --------------------------------------------


def test_idle_connections_leave_descriptors_for_health_and_stop(load_manager, fake):
    lm = load_manager(
        cluster_config(fake.url), preexec=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    )
    run_id = lm.create().json["id"]
    idle = [lm.connect() for _ in range(100)]
    assert lm.get("/health").status == 200
    assert lm.post(f"/v1/tests/{run_id}/stop").status == 200
    assert lm.wait_for(run_id, "Finished")
    assert lm.create().status == 201, "no descriptor is left for Locust and the database"
    for sock in idle:
        sock.close()


def test_accepting_survives_a_lack_of_descriptors(api, monkeypatch):
    """Also when even the spare one is lost meanwhile."""
    fails = iter([True] * 5)
    real_open = loadmanager.os.open

    def no_more(path, *how):
        if path == loadmanager.os.devnull and next(fails, False):
            raise OSError(24, "Too many open files")
        return real_open(path, *how)

    real_accept = socket.socket.accept
    refuse = iter([True] * 4)

    def accept(sock):
        if sock is api.server.socket and next(refuse, False):
            raise OSError(24, "Too many open files")
        return real_accept(sock)

    monkeypatch.setattr(loadmanager.os, "open", no_more)
    monkeypatch.setattr(socket.socket, "accept", accept)
    api.start()
    assert api.ask("/now").startswith(b"HTTP/1.1 200 ")


def test_stop_is_answered_when_no_thread_can_be_had(api, monkeypatch):
    release = threading.Event()
    api.handlers["/wait"] = lambda request: release.wait(20) and loadmanager.Response(b"{}")
    api.start()

    def no_thread(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_thread)
    held = []
    try:
        for _ in range(12):  # more than the threads that are ready
            sock = api.connect()
            sock.sendall(request_bytes("/wait"))
            held.append(sock)
        refused = read_answers(held[-1])
        assert refused.startswith(b"HTTP/1.1 503 ") and b"Retry-After: 1\r\n" in refused
        for _ in range(20):
            assert api.ask("/stop").startswith(b"HTTP/1.1 200 ")
    finally:
        release.set()
    assert read_answers(held[0]).startswith(b"HTTP/1.1 200 ")
    for sock in held:
        sock.close()


def test_threads_that_came_for_a_burst_end_and_those_that_are_kept_stay(monkeypatch):
    monkeypatch.setattr(loadmanager.WorkerPool, "IDLE_S", 0.05)
    pool = loadmanager.WorkerPool("burst", 2, 20)
    pool.start()
    release = threading.Event()
    assert all(pool.submit(lambda: release.wait(10)) for _ in range(20))
    assert not pool.submit(print), "more than the most"
    release.set()
    eventually(lambda: pool._threads == 2)
    done = threading.Event()
    assert pool.submit(done.set) and done.wait(10)


# ---- exceptions that nobody foresaw ------------------------------------------


@pytest.fixture
def lm_service(tmp_path) -> Iterator[tuple[loadmanager.Service, Callable[..., dict]]]:
    """The whole program in this process, and callbacks to it."""
    cluster = cluster_config("http://127.0.0.1:9")
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "server": {"port": 0},
                "security": {"apiToken": API_TOKEN, "locustCallbackToken": CALLBACK_TOKEN},
                "storage": {"url": "memory:"},
                "orchestrator": {"lostAfterSeconds": 86400, "metricsPollIntervalSeconds": 3600},
                "locustClusters": [cluster],
            }
        )
    )
    service = loadmanager.Service(loadmanager.checked_config(str(config)), str(config))
    service.start()

    def call(name: str, body: dict) -> dict:
        answer = requests.post(
            f"{service.url}/v1/internal/locust/{name}",
            json=body,
            headers={"X-Locust-Token": CALLBACK_TOKEN},
            timeout=20,
        )
        assert answer.status_code == 200, answer.text
        return answer.json()

    yield service, call
    service._server.shutdown()
    service._server.server_close()
    service._loop.close()
    service._timer.close()
    service._store.close()


def test_unforeseen_exception_ends_no_thread_of_the_server(lm_service, counted, monkeypatch):
    service, call = lm_service
    headers = {"Authorization": f"Bearer {API_TOKEN}"}

    def health() -> dict:
        answer = requests.get(service.url + "/health", timeout=10)
        assert answer.status_code == 200
        return answer.json()

    def fail(*how: object) -> None:
        raise ZeroDivisionError("injected")

    assert health() == {"status": "healthy"}
    service._loop.call(fail)  # a call in the loop's thread
    eventually(lambda: health().get("unforeseenErrors") == 1)
    with monkeypatch.context() as patch:  # the loop itself
        patch.setattr(service._loop, "_sweep", fail)
        eventually(lambda: sum(counted.values()) >= 2)
    seen = sum(counted.values())
    with monkeypatch.context() as patch:  # before the body is read
        patch.setattr(service._loop.api.authentication, "caller_of", fail)
        assert requests.get(service.url + "/v1/tests", headers=headers, timeout=10).status_code == 500
    assert health()["unforeseenErrors"] > seen
    with monkeypatch.context() as patch:  # a handler in a thread
        patch.setattr(service._store, "list_json", fail)
        assert requests.get(service.url + "/v1/tests", headers=headers, timeout=10).status_code == 500
    assert requests.get(service.url + "/v1/tests", headers=headers, timeout=10).status_code == 200


def test_unforeseen_exception_in_one_run_s_event_keeps_no_other_s_back(lm_service, counted, monkeypatch):
    service, call = lm_service
    run_id = call(
        "register-external", {"tenantId": "acme", "envId": "dev", "targetUsers": 1, "spawnRate": 1}
    )["runId"]
    stream = requests.get(
        service.url + "/v1/events", headers={"Authorization": f"Bearer {API_TOKEN}"}, stream=True, timeout=20
    )
    events = sseclient.SSEClient(stream).events()
    assert next(events).event == "ready"
    real, broken = service._store.brief, [True]

    def brief(of: str) -> bytes:
        if broken:
            raise ZeroDivisionError("injected")
        return real(of)

    monkeypatch.setattr(service._store, "brief", brief)
    call("metrics", {"runId": run_id, "metrics": {"totalRequests": 5, "totalFailures": 0}})
    eventually(lambda: counted.get("events"))
    broken.clear()
    call("metrics", {"runId": run_id, "metrics": {"totalRequests": 6, "totalFailures": 0}})
    assert json.loads(next(events).data)["lastMetrics"]["totalRequests"] == 6


# ---- event streams for the libraries that people use -------------------------


def test_sseclient_and_requests_get_the_last_event_at_once(lm_service):
    service, call = lm_service
    run_id = call(
        "register-external", {"tenantId": "acme", "envId": "dev", "targetUsers": 1, "spawnRate": 1}
    )["runId"]
    headers = {"Authorization": f"Bearer {API_TOKEN}"}
    stream = requests.get(f"{service.url}/v1/tests/{run_id}/events", headers=headers, stream=True, timeout=10)
    assert stream.headers["transfer-encoding"] == "chunked"
    events = sseclient.SSEClient(stream).events()
    assert [next(events).event for _ in range(2)] == ["ready", "run"]
    for requests_so_far in (7, 8):  # nothing comes after an event that would push it out of a buffer
        call("metrics", {"runId": run_id, "metrics": {"totalRequests": requests_so_far, "totalFailures": 0}})
        event = next(event for event in events if event.event == "run")
        assert json.loads(event.data)["lastMetrics"]["totalRequests"] == requests_so_far
    stream.close()


def test_plain_client_of_http_1_0_gets_a_stream_without_chunks(lm_service):
    service, _ = lm_service
    with socket.create_connection(("127.0.0.1", service._server.server_port), 10) as sock:
        sock.sendall(f"GET /v1/events HTTP/1.0\r\n{BEARER}\r\n".encode())
        received = b""
        while b"event: ready" not in received:
            received += sock.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"chunked" not in head and body.startswith(b"retry: 1000\n\n")


def test_stream_ends_with_its_last_chunk_when_the_server_ends(load_manager, fake):
    lm = load_manager(cluster_config(fake.url))
    headers = {"Authorization": f"Bearer {API_TOKEN}"}
    stream = requests.get(lm.url + "/v1/events", headers=headers, stream=True, timeout=20)
    pieces = stream.iter_content(None)
    assert b"event: ready" in next(pieces)
    lm.terminate()
    for _ in pieces:  # ChunkedEncodingError when the last chunk is missing
        pass
