"""https: of our own with certificates that openssl made, and towards Locust masters with certificates that
are not good."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import API_TOKEN, CALLBACK_TOKEN, ROOT, base_config, cluster_config
from waiting import eventually

import loadmanager


class Authority:
    """A certificate authority of openssl in a folder."""

    def __init__(self, folder: Path, name: str = "ca"):
        self.folder, self.name = folder, name
        self._openssl(
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.pem",
            "-days",
            "2",
            "-subj",
            f"/CN={name}",
        )

    @property
    def pem(self) -> str:
        return str(self.folder / f"{self.name}.pem")

    def issue(self, name: str, names: str = "IP:127.0.0.1,DNS:localhost", days: int = 2) -> tuple[str, str]:
        """Certificate and key files; days below 0: one that has expired."""
        self._openssl(
            "req",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.csr",
            "-subj",
            f"/CN={name}",
        )
        (self.folder / f"{name}.ext").write_text(f"subjectAltName={names}\n")
        moments = [
            time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + day * 86400))
            for day in (min(0, days) - 2, days)
        ]
        (self.folder / f"{name}.cnf").write_text(
            f"[ca]\ndefault_ca=x\n[x]\ndatabase=index-{name}\nserial=serial-{name}\nnew_certs_dir=.\n"
            "default_md=sha256\npolicy=p\nunique_subject=no\n[p]\ncommonName=supplied\n"
        )
        (self.folder / f"index-{name}").write_text("")
        (self.folder / f"serial-{name}").write_text(f"{int.from_bytes(os.urandom(7), 'big'):016x}\n")
        self._openssl(
            "ca", "-batch", "-config", f"{name}.cnf", "-cert", f"{self.name}.pem", "-keyfile",
            f"{self.name}.key", "-in", f"{name}.csr", "-out", f"{name}.pem",
            "-extfile", f"{name}.ext", "-startdate", moments[0], "-enddate", moments[1], "-notext",
        )  # fmt: skip
        return str(self.folder / f"{name}.pem"), str(self.folder / f"{name}.key")

    def trust(self, certificate: tuple[str, str] | None = None) -> ssl.SSLContext:
        """A client that trusts this authority, and shows a certificate of its own."""
        context = ssl.create_default_context(cafile=self.pem)
        if certificate:
            context.load_cert_chain(*certificate)
        return context

    def _openssl(self, *arguments: str) -> None:
        done = subprocess.run(
            ["openssl", *arguments], cwd=self.folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def good(authority):
    return authority.issue("good")


@pytest.fixture
def https_lm(load_manager, fake, authority, good):
    """A Load Manager that serves https with a good certificate."""

    def start(**tls):
        lm = load_manager(
            cluster_config(fake.url), server={"tls": {"certFile": good[0], "keyFile": good[1], **tls}}
        )
        lm.tls = authority.trust()
        return lm

    return start


def handshake(lm, context: ssl.SSLContext, host: str = "127.0.0.1") -> ssl.SSLSocket:
    return context.wrap_socket(lm.connect(), server_hostname=host)


def test_everything_works_over_https(https_lm, fake):
    lm = https_lm()
    assert lm.url.startswith("https://")
    run = lm.create(metadata={"text": "x" * 60_000})
    assert run.status == 201, "a body of several TLS records was not read"
    run_id = run.json["id"]
    pushed = {
        "metrics": {
            "totalRequests": 3,
            "requestStats": {
                f"GET_/{n}": {"method": "GET", "name": f"/{n}", "numRequests": 1} for n in range(3000)
            },
        }
    }
    assert lm.callback("metrics", {"runId": run_id, **pushed}).status == 200
    whole = lm.get(f"/v1/tests/{run_id}")
    assert len(whole.body) > 500_000 and len(whole.json["lastMetrics"]["requestStats"]) == 3000, (
        "a long answer was cut"
    )
    signed_in = lm.post("/session", {"token": API_TOKEN}, token=None)
    assert signed_in.headers["set-cookie"].endswith("; Secure")
    lm.post("/v1/stop-all", {})


def test_event_stream_over_https(https_lm):
    lm = https_lm()
    with handshake(lm, lm.tls) as sock:
        sock.sendall(
            f"GET /v1/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_TOKEN}\r\n\r\n".encode()
        )
        received = b""
        lm.create()
        while b"event: run" not in received:
            received += sock.recv(65536)
    assert b"200 OK" in received


def test_only_tls_1_2_and_newer(https_lm):
    lm = https_lm()
    for version, fits in (
        (ssl.TLSVersion.TLSv1_1, False),
        (ssl.TLSVersion.TLSv1_2, True),
        (ssl.TLSVersion.TLSv1_3, True),
    ):
        context = ssl._create_unverified_context()
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = version
        context.set_ciphers("ALL:@SECLEVEL=0")
        if fits:
            handshake(lm, context).close()
        else:
            with pytest.raises((ssl.SSLError, OSError)):
                handshake(lm, context)


def test_handshake_that_hangs_delays_nobody_and_is_ended(https_lm):
    lm = https_lm()
    hanging = [lm.connect() for _ in range(60)]
    for sock in hanging[20:]:
        sock.sendall(b"\x16\x03\x01\x02\x00\x01\x00")  # the beginning of a hello
    for _ in range(3):
        assert lm.get("/health", timeout_s=loadmanager.HANDSHAKE_DEADLINE_S - 2).status == 200
    hanging[0].settimeout(loadmanager.HANDSHAKE_DEADLINE_S + 5)
    assert hanging[0].recv(1) == b"", "a handshake that hangs is kept for ever"
    for sock in hanging:
        sock.close()


def test_plain_http_on_the_https_port_is_told_so(https_lm):
    lm = https_lm()
    answer = lm.raw(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", until_closed=True)
    assert answer.startswith(b"HTTP/1.1 400 ") and b"https" in answer
    for rubbish in (b"\x16\x03\x01\xff\xff" + b"\0" * 100, b"\x80\x2e\x01\x00\x02", os.urandom(500), b""):
        with lm.connect() as sock:
            sock.sendall(rubbish)
    assert lm.get("/health").status == 200


def test_client_certificates(https_lm, authority, tmp_path):
    lm = https_lm(clientCaFile=authority.pem)
    lm.tls = authority.trust(authority.issue("client", "DNS:client"))
    assert lm.get("/v1/tests").status == 200
    assert lm.get("/v1/tests", token="wrong").status == 401, "a client certificate is no token"
    own = tmp_path / "client-with-key.pem"
    own.write_text("".join(Path(file).read_text() for file in authority.issue("cli", "DNS:cli")))
    command = [
        sys.executable,
        str(ROOT / "loadmanager.py"),
        "list",
        "--token",
        API_TOKEN,
        "--url",
        lm.url,
        "--ca-file",
        authority.pem,
    ]
    for environment, status in (
        ({"LOADMANAGER_CLIENT_CERT": str(own)}, 0),
        ({}, 3),
        ({"LOADMANAGER_CLIENT_CERT": authority.pem}, 2),
    ):
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=20
        )
        assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    stranger = Authority(tmp_path, "stranger")
    for name, certificate in {
        "none": None,
        "a stranger's": stranger.issue("client", "DNS:client"),
        "an expired one": authority.issue("old-client", "DNS:client", days=-1),
    }.items():
        lm.tls = authority.trust(certificate)
        with pytest.raises((ssl.SSLError, OSError, http.client.HTTPException)):
            lm.get("/health", timeout_s=5)
            pytest.fail(f"served with {name}")


def test_new_certificate_is_used_without_dropping_connections(load_manager, fake, authority, good, tmp_path):
    files = [str(tmp_path / name) for name in ("cert.pem", "key.pem")]
    for source, target in zip(good, files, strict=True):
        shutil.copy(source, target)
    lm = load_manager(cluster_config(fake.url), server={"tls": {"certFile": files[0], "keyFile": files[1]}})
    lm.tls = authority.trust()

    def serial() -> str:
        with handshake(lm, lm.tls) as sock:
            return sock.getpeercert()["serialNumber"]

    kept = http.client.HTTPSConnection("127.0.0.1", int(lm.url.rsplit(":", 1)[1]), context=lm.tls, timeout=10)
    kept.request("GET", "/health")
    assert kept.getresponse().read()
    first, sock_before = serial(), kept.sock
    Path(files[0]).write_text("-----BEGIN CERTIFICATE-----\nhalf a file")
    eventually(lambda: "certificate not read again" in lm.log(), 5)
    assert serial() == first, "half a certificate took the good one's place"
    for source, target in zip(authority.issue("next"), files, strict=True):
        shutil.copy(source, target)
    eventually(lambda: serial() != first, 5, what="the new certificate is used")
    kept.request("GET", "/health")
    assert kept.getresponse().read() and kept.sock is sock_before, "the open connection was dropped"


def test_wrong_files_are_told_at_the_start_and_by_check(authority, good, tmp_path):
    (tmp_path / "text.pem").write_text("no certificate")
    other = authority.issue("other")
    locked = str(tmp_path / "locked.key")
    subprocess.run(
        ["openssl", "rsa", "-aes256", "-passout", "pass:x", "-in", good[1], "-out", locked],
        check=True,
        capture_output=True,
    )
    for tls, words in (
        ({"certFile": "no.pem", "keyFile": good[1]}, "server.tls.certFile: no.pem is not a file"),
        ({"certFile": "text.pem", "keyFile": good[1]}, "server.tls.certFile"),
        ({"certFile": good[0], "keyFile": other[1]}, "KEY_VALUES_MISMATCH"),
        ({"certFile": good[0], "keyFile": locked}, "cannot be used"),
        ({"certFile": good[0], "keyFile": good[1], "clientCaFile": "text.pem"}, "server.tls.clientCaFile"),
        ({"certFile": good[0]}, "server.tls.keyFile: is missing"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(base_config(server={"tls": tls})))
        for command in (["check"], []):
            done = subprocess.run(
                [sys.executable, str(ROOT / "loadmanager.py"), *command, "-config", "config.json"],
                cwd=tmp_path, capture_output=True, text=True, timeout=20,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
            assert done.returncode in (1, 2) and words in done.stderr and "Traceback" not in done.stderr, (
                tls,
                done.stderr,
            )


def test_command_line_over_https(https_lm, authority):
    lm = https_lm()

    def cli(*options):
        return subprocess.run(
            [sys.executable, str(ROOT / "loadmanager.py"), "list", "--token", API_TOKEN, *options],
            cwd=lm.folder,
            capture_output=True,
            text=True,
            timeout=20,
        )

    assert cli("--url", lm.url, "--ca-file", authority.pem).returncode == 0
    untrusted = cli("--url", lm.url)
    assert untrusted.returncode == 3 and "certificate is not trusted" in untrusted.stderr
    (lm.folder / "config.json").write_text(json.dumps(lm.config))
    assert cli("-config", "config.json", "--ca-file", authority.pem).returncode == 0, (
        "the configuration's https address is not used"
    )


def test_launched_cluster_calls_back_though_we_serve_https(load_manager, authority, good, tmp_path):
    (tmp_path / "locustfile.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'locust')!r})\nimport loadmanager_hooks\nfrom "
        "locust import User, task, constant\n"
        "class Nobody(User):\n    wait_time = constant(1)\n    @task\n    def nothing(self):\n        pass\n"
    )
    launcher = {"locustfile": str(tmp_path / "locustfile.py"), "workers": 1}
    cluster = {"id": "here", "tenantId": "acme", "envId": "dev", "launcher": launcher}
    lm = load_manager(
        cluster,
        server={"tls": {"certFile": good[0], "keyFile": good[1]}},
        orchestrator={"startTimeoutSeconds": 15, "metricsPollIntervalSeconds": 60},
    )
    lm.tls = authority.trust()
    run = lm.create(targetUsers=1, durationSeconds=600)
    assert run.status == 201, run.body
    lm.post(f"/v1/tests/{run.json['id']}/stop")
    ended = lm.wait_for(run.json["id"], "Finished")
    assert "final_numbers_missing" not in [warning["code"] for warning in ended.get("warnings", ())]
    environment = eventually(lambda: callback_url_of_locust(lm.process.pid), 5)
    assert environment.startswith("http://127.0.0.1:")
    port = int(environment.rsplit(":", 1)[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/v1/tests", headers={"Authorization": f"Bearer {API_TOKEN}"})
    assert connection.getresponse().status == 404, "the loopback port of callbacks serves the whole API"


def callback_url_of_locust(parent: int) -> str:
    """CONTROL_PLANE_URL of the Locust that a Load Manager has launched."""
    import psutil

    for child in psutil.Process(parent).children(recursive=True):
        found = child.environ().get("CONTROL_PLANE_URL") if "locust" in " ".join(child.cmdline()) else None
        if found:
            return found
    return ""


def test_real_locust_calls_back_over_https_with_a_certificate_of_its_own(
    load_manager, authority, good, tmp_path
):
    from locust_process import LocustCluster, find_free_port

    own = tmp_path / "locust.pem"
    own.write_text("".join(Path(file).read_text() for file in authority.issue("locust", "DNS:locust")))
    port = find_free_port()
    lm = load_manager(
        cluster_config(f"http://127.0.0.1:{port}"), server={"tls": {"certFile": good[0], "keyFile": good[1],
            "clientCaFile": authority.pem}},
        orchestrator={"metricsPollIntervalSeconds": 60, "startTimeoutSeconds": 15},
    )  # fmt: skip
    lm.tls = authority.trust((str(own), str(own)))
    environment = {
        "CONTROL_PLANE_URL": lm.url, "CONTROL_PLANE_TOKEN": CALLBACK_TOKEN, "METRICS_PUSH_INTERVAL": "0.5",
        "CONTROL_PLANE_CA_FILE": authority.pem, "CONTROL_PLANE_CLIENT_CERT": str(own),
    }  # fmt: skip
    (tmp_path / "locustfile.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'locust')!r})\nimport loadmanager_hooks\nfrom "
        "locust import User, task, constant\n"
        "class Nobody(User):\n    wait_time = constant(1)\n    @task\n    def nothing(self):\n        pass\n"
    )
    with LocustCluster(tmp_path / "locustfile.py", 0, environment, web_port=port):
        run_id = lm.create(targetUsers=1).json["id"]
        eventually(lambda: lm.run(run_id).get("lastMetrics"), 15, what="numbers are pushed over https")
        lm.post(f"/v1/tests/{run_id}/stop")
        lm.wait_for(run_id, "Finished")


# ---- towards Locust --------------------------------------------------------


@pytest.mark.parametrize(
    "name, names, days, words",
    [
        ("fine", "IP:127.0.0.1", 2, None),
        ("expired", "IP:127.0.0.1", -1, "certificate has expired"),
        ("elsewhere", "DNS:locust.example", 2, "IP address mismatch"),
    ],
)
def test_certificate_of_a_locust_master_is_judged(
    load_manager, fake_locust, authority, name, names, days, words
):
    fake = fake_locust()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue(name, names, days))
    fake._server.socket = context.wrap_socket(fake._server.socket, server_side=True)
    url = fake.url.replace("http:", "https:")
    lm = load_manager(
        cluster_config(url, tls={"caFile": authority.pem}),
        cluster_config(url, "blind", envId="blind", tls={"insecureSkipVerify": True}),
    )
    answer = lm.create()
    if words is None:
        assert answer.status == 201, answer.body
        return
    assert (
        answer.status == 502
        and "certificate is not trusted" in answer.json["message"]
        and words in answer.json["message"]
    ), answer.body
    assert not fake.calls, "something was sent to a master whose certificate is not good"
    assert lm.create(envId="blind").status == 201, "insecureSkipVerify does not skip"


# ---- proxies ---------------------------------------------------------------


@pytest.mark.parametrize(
    "forwarded, address",
    [
        (None, "127.0.0.1"),
        ("203.0.113.9", "203.0.113.9"),
        ("1.2.3.4, 203.0.113.9", "203.0.113.9"),
        ("203.0.113.9, 10.0.0.7", "203.0.113.9"),
        ("1.2.3.4, nonsense", "127.0.0.1"),
        ("1.2.3.4, nonsense, 10.0.0.7", "10.0.0.7"),
        ("2001:db8::1", "2001:db8::1"),
        ("10.0.0.7", "10.0.0.7"),
        ("", "127.0.0.1"),
    ],
)
def test_address_behind_proxies(forwarded, address):
    import ipaddress

    proxies = tuple(map(ipaddress.ip_network, ("127.0.0.0/8", "10.0.0.0/8")))
    assert loadmanager.client_address("127.0.0.1", forwarded, proxies) == address
    assert loadmanager.client_address("198.51.100.1", forwarded, proxies) == "198.51.100.1", (
        "a stranger's header is believed"
    )


def test_proxy_is_believed_only_if_it_is_trusted(load_manager, fake):
    for trusted, told in (([], "127.0.0.1"), (["127.0.0.1"], "203.0.113.9")):
        lm = load_manager(cluster_config(fake.url), server={"trustedProxies": trusted})
        lm.get("/v1/tests", token="wrong", headers={"X-Forwarded-For": "1.1.1.1, 203.0.113.9"})
        assert lm.get("/v1/audit").json[0]["address"] == told
