"""Single sign-on: signed tokens good and forged, keys that change, and a real OpenID provider for the
dashboard."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import jwt
import pytest
from conftest import API_TOKEN, ROOT, LoadManager, base_config, cluster_config, create_body
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from fake_locust import FakeLocust
from locust_process import find_free_port
from waiting import eventually

import loadmanager

SECRET = "a-shared-secret-of-at-least-32-bytes!"
ISSUER, AUDIENCE = "https://id.example", "loadmanager"
KEYS: dict[str, Any] = {
    "rsa-1": rsa.generate_private_key(65537, 2048), "rsa-2": rsa.generate_private_key(65537, 2048),
    "ec-1": ec.generate_private_key(ec.SECP256R1()), "ed-1": ed25519.Ed25519PrivateKey.generate(),
}  # fmt: skip
ALGORITHMS = {"rsa-1": "RS256", "rsa-2": "RS256", "ec-1": "ES256", "ed-1": "EdDSA"}


def jwk(kid: str) -> dict[str, Any]:
    algorithm = jwt.get_algorithm_by_name(ALGORITHMS[kid])
    return {**json.loads(algorithm.to_jwk(KEYS[kid].public_key())), "kid": kid, "use": "sig"}


def claims(**changes: Any) -> dict[str, Any]:
    now = time.time()
    found = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "alice",
        "exp": now + 300,
        "iat": now,
        "tenants": ["acme"],
        "role": "operator",
    }
    found.update(changes)
    return {name: value for name, value in found.items() if value is not ...}


def signed(
    kid: str = "rsa-1", algorithm: str | None = None, headers: dict[str, Any] | None = None, **changes: Any
) -> str:
    return jwt.encode(
        claims(**changes), KEYS[kid], algorithm or ALGORITHMS[kid], {"kid": kid, **(headers or {})}
    )


def part(value: Any) -> str:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def by_hand(header: Any, body: Any, secret: bytes | None = None) -> str:
    """A token made without any library that would refuse to."""
    text = f"{part(header)}.{part(body)}"
    signature = part(hmac.new(secret, text.encode(), hashlib.sha256).digest()) if secret is not None else ""
    return f"{text}.{signature}"


class JwksServer:
    """Serves keys and counts how often they are read."""

    def __init__(self, *kids: str):
        self.kids, self.reads, self.delay_s = list(kids), 0, 0.0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.reads += 1
                time.sleep(outer.delay_s)
                raw = json.dumps({"keys": [jwk(kid) for kid in outer.kids]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/jwks"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def jwks():
    server = JwksServer("rsa-1", "ec-1", "ed-1")
    yield server
    server.close()


@pytest.fixture(scope="module")
def file_lm(tmp_path_factory):
    """A Load Manager without network that knows the keys from a file."""
    folder = tmp_path_factory.mktemp("jwt")
    (folder / "keys.json").write_text(json.dumps({"keys": [jwk("rsa-1"), jwk("ec-1"), jwk("ed-1")]}))
    fake = FakeLocust().start()
    options = {"issuer": ISSUER, "audience": AUDIENCE, "jwksFile": "keys.json"}
    lm = LoadManager(folder, base_config(cluster_config(fake.url), security={"jwt": options})).start()
    yield lm
    assert "trace=" not in lm.log(), lm.log()[-3000:]
    lm.end()
    fake.close()


@pytest.mark.parametrize("kid", ["rsa-1", "ec-1", "ed-1"])
def test_signed_token_is_its_bearer(file_lm, kid):
    assert file_lm.get("/v1/tests", token=signed(kid)).status == 200
    assert file_lm.post("/v1/tests", create_body(tenantId="beta"), token=signed(kid)).status == 403
    assert file_lm.post("/v1/tests", create_body(), token=signed(kid, role="viewer")).status == 403
    assert file_lm.get("/v1/audit", token=signed(kid, role=["viewer", "admin"], tenants="*")).status == 200, (
        "of several roles the highest counts"
    )
    session = file_lm.post("/session", {"token": signed(kid)}, token=None)
    assert (session.status, session.json["name"], session.json["tenants"]) == (200, "sso:alice", ["acme"])


def public_pem() -> bytes:
    return (
        KEYS["rsa-1"]
        .public_key()
        .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


FORGED = {
    "no algorithm": lambda: by_hand({"alg": "none", "kid": "rsa-1"}, claims()),
    "None": lambda: by_hand({"alg": "None"}, claims()),
    "nOnE with a signature": lambda: by_hand({"alg": "nOnE", "kid": "rsa-1"}, claims(), b"x"),
    "the public key as a shared secret": lambda: by_hand(
        {"alg": "HS256", "kid": "rsa-1"}, claims(), public_pem()
    ),
    "the public key's JWK as a shared secret": lambda: by_hand(
        {"alg": "HS256", "kid": "rsa-1"}, claims(), json.dumps(jwk("rsa-1")).encode()
    ),
    "an empty shared secret": lambda: by_hand({"alg": "HS256"}, claims(), b""),
    "a key of its own in the header": lambda: signed("rsa-2", headers={"kid": "rsa-1", "jwk": jwk("rsa-2")}),
    "a link to keys of its own": lambda: signed(
        "rsa-2", headers={"kid": "rsa-1", "jku": "http://127.0.0.1:1/keys"}
    ),
    "another key": lambda: signed("rsa-2", headers={"kid": "rsa-1"}),
    "an EC token under the RSA key's id": lambda: signed("ec-1", headers={"kid": "rsa-1"}),
    "an algorithm that is not configured": lambda: signed("rsa-1", "RS512"),
    "PS256": lambda: signed("rsa-1", "PS256"),
    "critical extensions": lambda: signed(headers={"crit": ["exp"]}),
    "a key id that is a path": lambda: signed(headers={"kid": "../../etc/passwd"}),
    "a key id that is no text": lambda: by_hand({"alg": "RS256", "kid": {"a": 1}}, claims(), b"x"),
    "no signature": lambda: signed().rpartition(".")[0] + ".",
    "a changed claim": lambda: (lambda head, _, tail: f"{head}.{part(claims(role='admin'))}.{tail}")(
        *signed().split(".")
    ),
    "another issuer": lambda: signed(iss="https://evil.example"),
    "another audience": lambda: signed(aud="other"),
    "no audience": lambda: signed(aud=...),
    "a list of other audiences": lambda: signed(aud=["other", "loadmanager2"]),
    "expired": lambda: signed(exp=time.time() - 60),
    "no expiry": lambda: signed(exp=...),
    "an expiry that is true": lambda: by_hand({"alg": "RS256", "kid": "rsa-1"}, claims(exp=True), b"x"),
    "not valid yet": lambda: signed(nbf=time.time() + 60),
    "issued in the future": lambda: signed(iat=time.time() + 60),
    "no subject": lambda: signed(sub=...),
    "a subject with a line break": lambda: signed(sub="alice\nadmin"),
    "a list instead of claims": lambda: by_hand({"alg": "RS256", "kid": "rsa-1"}, [1], b"x"),
    "claims that are no JSON": lambda: f"{part({'alg': 'RS256'})}.{part(b'{')}.AA",
    "twice the same claim": lambda: ".".join(
        [part({"alg": "RS256", "kid": "rsa-1"}), part(b'{"iss":1,"iss":2}'), "AA"]
    ),
    "nothing but dots": lambda: "..",
    "padding": lambda: signed() + "==",
    "a huge token": lambda: signed(more="x" * 20_000),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_token_is_refused(file_lm, name):
    answer = file_lm.get("/v1/tests", token=FORGED[name]())
    assert answer.status in (401, 429), f"{name}: {answer.status} {answer.body[:300]!r}"
    assert file_lm.get("/v1/tests", token=signed()).status == 200, (
        "a good token was locked out by the bad ones"
    )


def test_clocks_may_differ_a_little(file_lm):
    for changes in ({"exp": time.time() - 10}, {"nbf": time.time() + 10}, {"iat": time.time() + 10}):
        assert file_lm.get("/v1/tests", token=signed(**changes)).status == 200, changes


def test_token_without_a_role_or_tenants_may_nothing(file_lm):
    answer = file_lm.get("/v1/tests", token=signed(role="janitor"))
    assert answer.status == 403 and "role" in answer.json["message"]
    assert file_lm.get("/v1/tests", token=signed(role=...)).status == 403
    file_lm.create()
    assert file_lm.get("/v1/tests").json
    assert file_lm.get("/v1/tests", token=signed(tenants=...)).json == [], "no tenants are not all tenants"
    assert file_lm.get("/v1/tests", token=signed(tenants=["acme "])).json == []
    assert len(file_lm.get("/v1/tests", token=signed(tenants="beta acme")).json) == 1


def test_shared_secret_needs_no_package(load_manager, fake, tmp_path):
    """HS256 with the standard library alone, the secret from a file, roles and tenants from claims of any
    name."""
    (tmp_path / "secret").write_text(SECRET + "\n")
    (tmp_path / "jwt.py").write_text("raise ImportError('PyJWT is not here')")
    options = {
        "issuer": ISSUER, "audience": AUDIENCE, "secretFile": str(tmp_path / "secret"),
        "roleClaim": "realm_access.roles",
        "roleMap": {"load-testers": "operator", "everybody": "viewer"}, "tenantsClaim": "groups",
    }  # fmt: skip
    lm = load_manager(
        cluster_config(fake.url), security={"jwt": options}, environment={"PYTHONPATH": str(tmp_path)}
    )
    body = claims(realm_access={"roles": ["everybody", "load-testers"]}, groups=["acme"], aud=["x", AUDIENCE])
    good = by_hand({"alg": "HS256", "typ": "JWT"}, body, SECRET.encode())
    assert lm.post("/v1/tests", create_body(), token=good).json["createdBy"] == "sso:alice"
    assert lm.get("/v1/tests", token=by_hand({"alg": "HS256"}, body, b"another")).status == 401
    assert (
        lm.get(
            "/v1/tests",
            token=by_hand({"alg": "HS256"}, {**body, "realm_access": {"roles": ["admin"]}}, SECRET.encode()),
        ).status
        == 403
    ), "a word that roleMap does not have is no role"
    assert lm.get("/v1/tests", token=by_hand({"alg": "none"}, body)).status == 401


def test_token_whose_times_no_calendar_has_is_refused(load_manager, fake, tmp_path):
    """1e400 reads as infinity, which is a token for ever; an integer of 400 digits once closed the
    connection."""
    (tmp_path / "secret").write_text(SECRET)
    options = {"issuer": ISSUER, "audience": AUDIENCE, "secretFile": str(tmp_path / "secret")}
    lm = load_manager(cluster_config(fake.url), security={"jwt": options})

    def token_with(name: str, number: str) -> str:
        body = json.dumps(claims(**{name: "number"})).replace('"number"', number).encode()
        return by_hand({"alg": "HS256"}, body, SECRET.encode())

    assert lm.get("/v1/tests", token=token_with("exp", "253402300799")).status == 200, "the year 9999 is one"
    for name, number in (
        ("exp", "1e400"), ("exp", "1" + "0" * 400), ("exp", "253402300800"), ("nbf", "-1e400"), ("iat", "-1"),
    ):  # fmt: skip
        answer = lm.get("/v1/tests", token=token_with(name, number))
        assert answer.status == 401, f"{name} {number[:10]}: {answer.status} {answer.body[:200]!r}"
        assert "from 1970 to 9999" in answer.json["message"]


def test_missing_package_is_named_at_the_start(tmp_path):
    (tmp_path / "jwt.py").write_text("raise ImportError('PyJWT is not here')")
    (tmp_path / "keys.json").write_text("{}")
    config = base_config(security={"jwt": {"issuer": ISSUER, "audience": AUDIENCE, "jwksFile": "keys.json"}})
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, str(ROOT / "loadmanager.py"), "-config", str(tmp_path / "config.json")],
        capture_output=True, text=True, timeout=30, cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin"},
    )  # fmt: skip
    assert (
        done.returncode == 1
        and "pip install 'PyJWT[crypto]'" in done.stderr
        and "Traceback" not in done.stderr
    ), done.stderr


def test_new_key_is_found_at_once_and_a_flood_of_unknown_ones_is_not_asked_for(load_manager, fake, jwks):
    options = {"issuer": ISSUER, "audience": AUDIENCE, "jwksUrl": jwks.url}
    lm = load_manager(cluster_config(fake.url), security={"jwt": options})
    assert lm.get("/v1/tests", token=signed()).status == 200
    reads = jwks.reads
    jwks.kids.append("rsa-2")
    assert lm.get("/v1/tests", token=signed("rsa-2")).status == 200, "the key that came new is not known"
    assert jwks.reads == reads + 1
    assert lm.post("/session", {"token": signed("rsa-2")}, token=None).status == 200
    with ThreadPoolExecutor(8) as pool:
        flood = list(
            pool.map(
                lambda number: lm.get("/v1/tests", token=signed(headers={"kid": f"unknown-{number}"})).status,
                range(40),
            )
        )
    assert set(flood) <= {401, 429}
    assert jwks.reads == reads + 1, (
        f"unknown key ids had the keys read {jwks.reads - reads} times within a minute"
    )
    assert lm.get("/v1/tests", token=signed("rsa-2")).status == 200


def test_sign_in_with_a_token_of_a_new_key_works_the_second_time(load_manager, fake, jwks):
    lm = load_manager(
        cluster_config(fake.url),
        security={"jwt": {"issuer": ISSUER, "audience": AUDIENCE, "jwksUrl": jwks.url}},
    )
    assert lm.get("/v1/tests", token=signed()).status == 200
    jwks.kids.append("rsa-2")
    first = lm.post("/session", {"token": signed("rsa-2")}, token=None)
    assert first.status == 503 and first.headers["retry-after"] == "1"
    assert eventually(lambda: lm.post("/session", {"token": signed("rsa-2")}, token=None).status == 200, 5)


def test_slow_provider_delays_only_who_needs_its_keys(load_manager, fake, jwks):
    jwks.delay_s = 6
    lm = load_manager(
        cluster_config(fake.url),
        security={"jwt": {"issuer": ISSUER, "audience": AUDIENCE, "jwksUrl": jwks.url}},
    )
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(lm.post, "/v1/tests", create_body(), token=signed()) for _ in range(2)]
        eventually(lambda: jwks.reads, 10, what="the provider is asked")
        for path in ("/health", "/v1/tests"):
            assert lm.get(path).status == 200
        assert not any(answer.done() for answer in waiting), "everybody waited for the identity provider"
        assert sorted(answer.result().status for answer in waiting) == [201, 409], (
            "the body of a request that waited for keys was lost"
        )


def test_new_key_in_the_file_is_found(load_manager, fake, tmp_path):
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": [jwk("rsa-1")]}))
    lm = load_manager(
        cluster_config(fake.url),
        security={"jwt": {"issuer": ISSUER, "audience": AUDIENCE, "jwksFile": str(keys)}},
    )
    assert lm.get("/v1/tests", token=signed()).status == 200
    keys.write_text(json.dumps({"keys": [jwk("rsa-2")]}))
    eventually(lambda: lm.get("/v1/tests", token=signed("rsa-2")).status == 200, 5)
    keys.write_text("not JSON")
    assert lm.get("/v1/tests", token=signed("rsa-2", sub="bob")).status == 200, (
        "a broken file took the keys that were known"
    )


@pytest.mark.parametrize(
    "options, words",
    [
        ({"jwksFile": "k", "secret": SECRET}, "must have one of jwksUrl, jwksFile and secretFile"),
        ({}, "must have one of jwksUrl, jwksFile and secretFile"),
        ({"jwksFile": "k", "algorithms": ["HS256"]}, "HS256 needs secretFile"),
        (
            {"secret": SECRET, "algorithms": ["HS256", "RS256"]},
            "RS256: HS256 needs secretFile, all others jwksUrl",
        ),
        ({"jwksFile": "k", "algorithms": ["none"]}, "algorithms: must be a list of HS256"),
        ({"secret": "short"}, "32 bytes or more"),
        ({"jwksUrl": "http://id.example/keys"}, "must be https"),
        ({"jwksFile": "k", "roleMap": {"a": "owner"}}, "roleMap: must be"),
    ],
)
def test_wrong_sign_on_is_a_problem_of_the_configuration(options, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(base_config(security={"jwt": {"issuer": ISSUER, "audience": AUDIENCE, **options}}))
    )
    with pytest.raises(loadmanager.ConfigError) as caught:
        loadmanager.load_config(str(path), {})
    assert words in str(caught.value) and SECRET not in str(caught.value), caught.value


# ---- the command line ------------------------------------------------------


def test_command_gets_its_token_from_a_command_and_again_when_it_is_refused(lm, tmp_path):
    (tmp_path / "count").write_text("0")
    script = tmp_path / "token.py"
    script.write_text(
        "import pathlib, sys\nassert sys.argv[1] == 'two words; $HOME'\n"
        f"count = pathlib.Path({str(tmp_path / 'count')!r})\nnumber = "
        "int(count.read_text())\ncount.write_text(str(number + 1))\n"
        f"print('expired-token' if number == 0 else {API_TOKEN!r})\n"
    )
    command = f"{sys.executable} {script} 'two words; $HOME'"
    done = subprocess.run(
        [sys.executable, str(ROOT / "loadmanager.py"), "list", "--url", lm.url], capture_output=True,
        text=True, timeout=30, cwd=tmp_path,
        env={"LOADMANAGER_TOKEN_COMMAND": command, "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "count").read_text() == "2", "the token was not asked for again"


@pytest.mark.parametrize("command, status, words", [
    ("/no/such/program", 2, "cannot be run"), ("false", 3, "no token"),
    ("echo two words", 3, "something else"), ("'", 2, "split into words"), (" ", 2, "split into words"),
])  # fmt: skip
def test_token_command_that_gives_none_is_one_line(command, status, words):
    done = subprocess.run(
        [sys.executable, str(ROOT / "loadmanager.py"), "list", "--url", "http://127.0.0.1:9"],
        capture_output=True, text=True, timeout=30,
        env={"LOADMANAGER_TOKEN_COMMAND": command, "PATH": "/usr/bin:/bin"}, cwd="/",
    )  # fmt: skip
    assert done.returncode == status and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


# ---- OpenID Connect --------------------------------------------------------


class Provider:
    """A real OpenID provider, which also checks PKCE (RFC 7636), as it does not do that itself."""

    def __init__(self) -> None:
        import flask
        import oidc_provider_mock
        from werkzeug.serving import make_server

        users = [
            oidc_provider_mock.User(
                sub="alice", claims={"name": "Alice", "tenants": ["acme"], "role": "operator"}
            ),
            oidc_provider_mock.User(sub="mallory", claims={"name": "Mallory"}),
        ]
        app = oidc_provider_mock.app(user_claims=users, require_nonce=True)
        self.challenges: list[str] = []
        self.token_requests: list[dict[str, str]] = []

        @app.before_request
        def check_pkce() -> Any:
            if flask.request.path.endswith("/oauth2/authorize"):
                assert flask.request.args["code_challenge_method"] == "S256"
                self.challenges.append(flask.request.args["code_challenge"])
            if flask.request.path.endswith("/oauth2/token"):
                form = flask.request.form.to_dict()
                self.token_requests.append(
                    {**form, "authorization": flask.request.headers.get("Authorization", "")}
                )
                if part(hashlib.sha256(form["code_verifier"].encode()).digest()) not in self.challenges:
                    return {"error": "invalid_grant"}, 400
            return None

        self._server = make_server("127.0.0.1", 0, app, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def sign_in(self, location: str, user: str, action: str = "authorize") -> str:
        """What a person does there; the URL they are sent back to."""
        parts = urlsplit(location)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
        form = urlencode({"sub": user} if action == "authorize" else {"action": "deny"})
        connection.request(
            "POST", f"{parts.path}?{parts.query}", form, {"Content-Type": "application/x-www-form-urlencoded"}
        )
        answer = connection.getresponse()
        assert answer.status == 302, answer.read()
        return answer.headers["Location"]

    def close(self) -> None:
        self._server.shutdown()


@pytest.fixture(scope="module")
def provider():
    provider = Provider()
    yield provider
    provider.close()


@pytest.fixture(scope="module")
def oidc_lm(tmp_path_factory, provider):
    folder, port = tmp_path_factory.mktemp("oidc"), find_free_port()
    (folder / "client-secret").write_text("the client's secret/+")
    oidc = {
        "issuer": provider.url,
        "clientId": "load manager",
        "clientSecretFile": "client-secret",
        "redirectUrl": f"http://127.0.0.1:{port}/session/oidc/callback",
    }
    fake = FakeLocust().start()
    lm = LoadManager(
        folder, base_config(cluster_config(fake.url), security={"oidc": oidc}, server={"port": port})
    ).start()
    yield lm
    assert "trace=" not in lm.log() and "secret" not in lm.log(), lm.log()[-3000:]
    lm.end()
    fake.close()


def leave(lm: LoadManager) -> tuple[str, str]:
    """The provider's address a browser is sent to, and the cookie it keeps."""
    away = lm.get("/session/oidc", token=None)
    assert away.status == 302, away.body
    assert re.search("HttpOnly; SameSite=Lax", away.headers["set-cookie"])
    return away.headers["location"], away.headers["set-cookie"].split(";")[0]


def come_back(lm: LoadManager, url: str, cookie: str | None) -> Any:
    parts = urlsplit(url)
    return lm.get(f"{parts.path}?{parts.query}", headers={"Cookie": cookie} if cookie else {}, token=None)


def test_person_signs_in_by_the_provider(oidc_lm, provider):
    assert oidc_lm.get("/session", token=None).json["singleSignOn"] is True
    location, cookie = leave(oidc_lm)
    asked = {name: values[0] for name, values in parse_qs(urlsplit(location).query).items()}
    assert (
        asked["response_type"] == "code"
        and asked["code_challenge_method"] == "S256"
        and len(asked["code_challenge"]) == 43
    )
    back = come_back(oidc_lm, provider.sign_in(location, "alice"), cookie)
    assert back.status == 302 and back.headers["location"] == "/", back.body
    assert "HttpOnly; SameSite=Strict" in back.headers["set-cookie"]
    session = {"Cookie": back.headers["set-cookie"].split(";")[0]}
    known = oidc_lm.get("/session", headers=session, token=None).json
    assert (known["name"], known["role"], known["tenants"]) == ("sso:alice", "operator", ["acme"])
    assert oidc_lm.get("/v1/tests", headers=session, token=None).status == 200
    basic = base64.b64decode(provider.token_requests[-1]["authorization"].split()[1]).decode()
    assert basic == "load%20manager:the%20client%27s%20secret%2F%2B"
    told = oidc_lm.get("/v1/audit").json[0]
    assert (told["who"], told["action"], told["outcome"]) == (
        "sso:alice",
        "GET /session/oidc/callback",
        "done",
    )


def test_user_without_a_role_is_told_so(oidc_lm, provider):
    location, cookie = leave(oidc_lm)
    back = come_back(oidc_lm, provider.sign_in(location, "mallory"), cookie)
    assert back.status == 403 and "role" in back.json["message"] and "set-cookie" not in back.headers
    assert oidc_lm.get("/v1/audit").json[0]["who"] == "sso:mallory"


def test_denied_sign_in_is_told(oidc_lm, provider):
    location, cookie = leave(oidc_lm)
    back = come_back(oidc_lm, provider.sign_in(location, "alice", "deny"), cookie)
    assert back.status in (400, 401) and "set-cookie" not in back.headers


def test_sign_in_of_another_browser_is_refused(oidc_lm, provider):
    """Somebody is made to come back with the code of an attacker, or without having left."""
    attackers_location, attackers_cookie = leave(oidc_lm)
    _, victims_cookie = leave(oidc_lm)
    url = provider.sign_in(attackers_location, "alice")
    for cookie in (
        None,
        victims_cookie,
        attackers_cookie + "x",
        attackers_cookie.rpartition(".")[0] + ".",
        "loadmanager_signon_1=..",
        attackers_cookie.split("=")[0] + "=",
    ):
        answer = come_back(oidc_lm, url, cookie)
        assert answer.status == 401 and "set-cookie" not in answer.headers, (cookie, answer.body)
    code = parse_qs(urlsplit(url).query)["code"][0]
    forged = f"/session/oidc/callback?{urlencode({'code': code, 'state': ''})}"
    assert come_back(oidc_lm, forged, attackers_cookie).status == 401
    tokens_before = len(provider.token_requests)
    assert (
        come_back(oidc_lm, url, victims_cookie).status == 401
        and len(provider.token_requests) == tokens_before
    ), "the code was used all the same"


def test_code_is_good_once(oidc_lm, provider):
    location, cookie = leave(oidc_lm)
    url = provider.sign_in(location, "alice")
    assert come_back(oidc_lm, url, cookie).status == 302
    assert come_back(oidc_lm, url, cookie).status == 502, "the provider took a code twice"


def test_answer_of_another_issuer_is_refused(oidc_lm, provider):
    location, cookie = leave(oidc_lm)
    url = provider.sign_in(location, "alice")
    assert come_back(oidc_lm, url + "&iss=https://evil.example", cookie).status == 401


def test_provider_that_is_away_is_a_502_and_nobody_waits(load_manager, fake):
    oidc = {
        "issuer": "http://127.0.0.1:1",
        "clientId": "x",
        "redirectUrl": "http://127.0.0.1:8080/session/oidc/callback",
    }
    lm = load_manager(cluster_config(fake.url), security={"oidc": oidc})
    answer = lm.get("/session/oidc", token=None)
    assert answer.status == 502 and "127.0.0.1:1" in answer.json["message"]
    assert lm.get("/v1/tests").status == 200


def test_person_signs_in_by_the_provider_in_a_browser(oidc_lm, provider):
    from chromium import Chromium
    from selenium.webdriver.common.by import By

    with Chromium() as browser:
        browser.driver.get(oidc_lm.url + "/")
        link = eventually(
            lambda: next(
                (one for one in browser.driver.find_elements(By.ID, "sign-on") if one.is_displayed()), None
            ),
            10,
        )
        link.click()
        button = eventually(
            lambda: next(
                (one for one in browser.driver.find_elements(By.TAG_NAME, "button") if "alice" in one.text),
                None,
            ),
            10,
        )
        button.click()
        who = eventually(lambda: browser.driver.find_elements(By.CSS_SELECTOR, "#top .who"), 10)[0]
        assert who.text == "sso:alice, operator"
        assert browser.driver.current_url.rstrip("#/") == oidc_lm.url
        assert browser.driver.find_element(By.ID, "stop-all").is_displayed()


# ---- how a provider is asked ---------------------------------------------------------------


@pytest.fixture
def one_answer():
    """Starts a server that has one connection: the URL of it, and what it was sent."""
    servers: list[socket.socket] = []

    def start(*answers: bytes, pause_s: float = 0.0) -> tuple[str, list[bytes]]:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)
        sent: list[bytes] = []

        def serve() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                for answer in answers:
                    sent.append(connection.recv(65536))
                    pieces = [answer[at : at + 1] for at in range(len(answer))] if pause_s else [answer]
                    for piece in pieces:
                        connection.sendall(piece)
                        time.sleep(pause_s)

        threading.Thread(target=serve, daemon=True).start()
        return f"127.0.0.1:{server.getsockname()[1]}", sent

    yield start
    for server in servers:
        server.close()


GOOD_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n" + b'{"keys": [1]}'


def test_provider_is_asked_through_the_proxy_of_the_environment(one_answer, monkeypatch):
    proxy, sent = one_answer(b"HTTP/1.1 200 Connection established\r\n\r\n", GOOD_ANSWER)
    monkeypatch.setenv("http_proxy", f"http://me:pass%20word@{proxy}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert loadmanager.fetch_json("http://id.example/keys?a=1") == {"keys": [1]}
    credentials = base64.b64encode(b"me:pass word").decode()
    assert sent[0].startswith(b"CONNECT id.example:80 HTTP/1.1\r\nHost: id.example:80\r\n")
    assert f"Proxy-Authorization: Basic {credentials}\r\n".encode() in sent[0]
    assert sent[1].startswith(b"GET /keys?a=1 HTTP/1.1\r\nHost: id.example\r\n")
    assert b"Proxy-Authorization" not in sent[1]


def test_proxy_that_refuses_is_named(one_answer, monkeypatch):
    proxy, _ = one_answer(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
    monkeypatch.setenv("http_proxy", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(loadmanager.ProviderFailed, match="the proxy answered .*407"):
        loadmanager.fetch_json("http://id.example/keys")


def test_provider_that_answers_byte_by_byte_is_given_up_after_its_time(one_answer, monkeypatch):
    monkeypatch.setattr(loadmanager, "PROVIDER_CALL_S", 1.0)
    url, _ = one_answer(GOOD_ANSWER, pause_s=0.2)
    began = time.monotonic()
    with pytest.raises(loadmanager.ProviderFailed, match="did not answer in time"):
        loadmanager.fetch_json(f"http://{url}/keys")
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("status", [302, 404])
def test_provider_s_redirect_or_error_is_no_answer(one_answer, status):
    url, _ = one_answer(f"HTTP/1.1 {status} No\r\nLocation: /b\r\nContent-Length: 2\r\n\r\n{{}}".encode())
    with pytest.raises(loadmanager.ProviderFailed, match=f"HTTP {status}"):
        loadmanager.fetch_json(f"http://{url}/keys")
