"""The command line: the real program, asked by the real program, in pipes and in a real pseudo-terminal."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pexpect
import pyte
import pytest
from conftest import API_TOKEN, ROOT, LoadManager, base_config, cluster_config
from locust_process import LocustCluster, find_free_port
from stand_in_api import RUN_ID, StandInApi, run_document
from target import Target
from waiting import eventually

import loadmanager

PROGRAM = str(ROOT / "loadmanager.py")
LOCUSTFILE = """
import sys
sys.path.insert(0, {hooks!r})
import loadmanager_hooks
from locust import HttpUser, constant, task

class Visitor(HttpUser):
    wait_time = constant(0.2)

    @task
    def home(self):
        self.client.get("/")

    @task
    def odd(self):
        name = "/\\u5546\\u54c1/\\U0001f680\\x1b[31mred\\x1b]0;owned\\x07\\u202egnp"
        self.client.get("/api/items/1", name=name)
"""
CREATE = ("--tenant", "acme", "--env", "dev", "--scenario", "browse \U0001f4a5 \u5b57", "-u", "5", "-r", "5")


@pytest.fixture(scope="module")
def target():
    with Target() as target:
        yield target


@pytest.fixture(scope="module")
def locust(target):
    with LocustCluster(
        LOCUSTFILE.format(hooks=str(ROOT / "locust")), workers=1, extra_args=["--host", target.url]
    ) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def server(locust, tmp_path_factory):
    """Load Manager with one real cluster, and one that nobody listens on (environment `dead`)."""
    dead = {**cluster_config(f"http://127.0.0.1:{find_free_port()}", "dead"), "envId": "dead"}
    config = base_config(cluster_config(locust.base_url), dead, orchestrator={"lostAfterSeconds": 30})
    manager = LoadManager(tmp_path_factory.mktemp("server"), config).start()
    yield manager
    manager.end()


@pytest.fixture(scope="module")
def finished_run(server):
    """A run of 1 s that is over."""
    assert cli(server.url, "run", *CREATE, "-d", "1s", "-q", "--meta", "first=yes").returncode == 0
    return newest(server)


@pytest.fixture(autouse=True)
def no_run_is_left(request):
    """Each test begins with an idle cluster."""
    yield
    if "server" not in request.fixturenames:
        return
    manager = request.getfixturevalue("server")
    for run in manager.get("/v1/tests?status=Pending,Running").json:
        manager.post(f"/v1/tests/{run['id']}/stop")
    eventually(
        lambda: not manager.get("/v1/tests?status=Pending,Running,Stopping").json,
        30,
        what="all runs are over",
    )


@pytest.fixture
def api():
    with StandInApi() as api:
        yield api


def heed_ctrl_c() -> None:
    """In a child: tests that run in a shell's background have inherited an ignored SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def environment(**changes: str) -> dict[str, str]:
    known = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("LOADMANAGER_") and name not in ("NO_COLOR", "COLUMNS", "LINES")
    }
    return {**known, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **changes}


def towards(url: str, token: str = API_TOKEN) -> dict[str, str]:
    return environment(LOADMANAGER_URL=url, LOADMANAGER_TOKEN=token)


def cli(
    url: str,
    *arguments: str,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
    timeout_s: float = 40,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PROGRAM, *arguments], env=env or towards(url), cwd=cwd or "/", capture_output=True,
        text=True, timeout=timeout_s,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def background(url: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, PROGRAM, *arguments], env=towards(url), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd="/",
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip


def newest(server: LoadManager) -> dict:
    runs = server.get("/v1/tests?limit=1").json
    return runs[0] if runs else {}


class Terminal:
    """The program in a pseudo-terminal, and what its screen shows."""

    def __init__(self, url: str, *arguments: str, columns: int = 100, rows: int = 30, **variables: str):
        self.child = pexpect.spawn(
            sys.executable, [PROGRAM, *arguments], dimensions=(rows, columns),
            env={**towards(url), **variables}, cwd="/", timeout=1,
            preexec_fn=heed_ctrl_c,
        )  # fmt: skip
        self._screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self._screen)
        self.received = b""

    def text(self) -> str:
        """What the screen shows now."""
        try:
            while True:
                data = self.child.read_nonblocking(65536, 0.05)
                self.received += data
                self._stream.feed(data)
        except (pexpect.TIMEOUT, pexpect.EOF, ValueError):
            pass  # nothing more for now, the end, or closed
        return "\n".join(line.rstrip() for line in self._screen.display)

    def wait_for(self, pattern: str, within_s: float = 20) -> str:
        def shown() -> str:
            text = self.text()
            return text if re.search(pattern, text) else ""

        try:
            return eventually(shown, within_s, what=pattern)
        except AssertionError:
            raise AssertionError(f"the screen never showed {pattern!r}:\n{self.text()}") from None

    def resize(self, columns: int, rows: int) -> None:
        self.text()
        self.child.setwinsize(rows, columns)
        self._screen.resize(rows, columns)

    def interrupt(self) -> None:
        self.child.sendintr()

    def exit_status(self, within_s: float = 30) -> int:
        eventually(lambda: (self.text(), not self.child.isalive())[1], within_s, what="the program ends")
        self.child.close()
        return self.child.exitstatus


# ---- help and usage --------------------------------------------------------


@pytest.mark.parametrize("command", loadmanager.COMMANDS, ids=lambda command: command.name)
def test_help_of_every_command_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as ended:
        loadmanager.main([command.name, "--help"])
    assert ended.value.code == 0
    shown = re.search(r"example:\n  python loadmanager.py (.+)", capsys.readouterr().out).group(1)
    words = shlex.split(shown.partition(" > ")[0])
    options = loadmanager.command_parser(words).parse_args(words)
    assert options.function is command.function


def test_help_tells_exit_statuses_and_variables():
    text = cli("", "--help").stdout
    for number in (0, 1, 2, 3, 99, 130):
        assert re.search(rf"^  {number}\s", text, re.M), f"{number} is not in --help"
    for name, about in loadmanager.VARIABLES.items():
        assert re.search(rf"^  {name}  +{re.escape(about)}$", text, re.M), f"{name} and its text run together"
    assert "LOADMANAGER_URL" in text and "LOADMANAGER_TOKEN" in text and "NO_COLOR" in text


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["lst"], "there is no command lst; did you mean list?"),
        (["rnu", "--tenant", "x"], "there is no command rnu; did you mean run?"),
        (["zzz"], "there is no command zzz; commands are serve, check,"),
        (["run", "--tennant", "x"], "run has no option --tennant; did you mean --tenant?"),
        (["run"], "the following arguments are required: --tenant"),
        (
            ["run", *CREATE, "--users", "many"],
            "must be a whole number such as 1000, 1_000 or 1k, got 'many'",
        ),
        (["run", *CREATE, "-u", "1.5"], "must be a whole number"),
        (["run", *CREATE, "-d", "5 minutes"], "must be a duration such as 90s, 5m or 1h30m"),
        (["run", *CREATE, "-r", "fast"], "must be users per second"),
        (["run", *CREATE, "--meta", "novalue"], "must be name=value"),
        (["run", *CREATE, "--meta", "a=1", "--meta", "a=2"], "is a duplicate"),
        (["run", *CREATE, "--compare-with", "tomorrow"], "invalid choice"),
        (["run", *CREATE, "--junit", "/no/such/folder/junit.xml"], "cannot be written"),
        (
            ["run", *CREATE, "--detach", "--summary", "summary.md"],
            "give --junit, --summary and --require-trusted to `wait`",
        ),
        (["run", *CREATE, "--idempotency-key", "two\nlines"], "1 to 255 printable ASCII characters"),
        (["list", "--search", "\udcff"], "not UTF-8 text"),
        (["show", "\udcff" * 40], "not UTF-8 text"),
        (["run", *CREATE, "--unknown"], "run has no option --unknown"),
        (["show"], "required: RUN"),
        (["show", "1b4e"], "at least its first 6 characters"),
        (["compare", "latest"], "required: CANDIDATE"),
        (["report", "latest", "--format", "pdf"], "invalid choice: 'pdf'"),
        (["completion", "fish"], "invalid choice: 'fish'"),
        (["list", "--url", "ftp://somewhere"], "--url: must be http(s)://host[:port][/path]"),
        (["list", "--token-file", "/no/such/file"], "cannot be read"),
        (["list", "--url", "http://127.0.0.1:1", "--token", "two\nlines"], "printable ASCII"),
        (["list", "-config", "/no/such/config.yaml"], "cannot be read"),
        (["check", "-config", "/no/such/config.yaml"], "cannot be read"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(arguments, words):
    variables = environment() if "-config" in arguments else environment(LOADMANAGER_URL="http://127.0.0.1:9")
    done = cli("", *arguments, env=variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "text, seconds", [("90", 90), ("90s", 90), ("5m", 300), ("1h30m", 5400), ("2d", 172800), ("1h0m5s", 3605)]
)
def test_durations_as_people_write_them(text, seconds):
    assert loadmanager.duration_value(text) == seconds


@pytest.mark.parametrize("text", ["", "5 m", "m", "30m1h", "-5s", "1.5h", "5M", "٥s", "1e3"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError):
        loadmanager.duration_value(text)


@pytest.mark.parametrize(
    "text, count",
    [("1000", 1000), ("1_000", 1000), ("1,000", 1000), ("1k", 1000), ("1.5k", 1500), ("2M", 2_000_000)],
)
def test_counts_as_people_write_them(text, count):
    assert loadmanager.count_value(text) == count


@pytest.mark.parametrize("text", ["", "k", "1_00", "1.5", "0.0001k", "1e3", "-1", "1 000", "٣"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(ValueError):
        loadmanager.count_value(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["-config", "c.json"],
        ["--config", "c.json"],
        ["-c", "c.json"],
        ["serve", "-config", "c.json"],
        ["-config", "c.json", "serve"],
    ],
)
def test_serving_starts_as_ever_and_a_plain_start_loads_no_parser(arguments):
    code = (
        "import sys, loadmanager; loadmanager.serve = lambda path: print(path, 'argparse' in sys.modules);"
        f"loadmanager.main({arguments!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert done.stdout.split()[0] == "c.json", done.stderr
    if arguments[-1] != "serve":
        assert done.stdout.split()[1] == "False"


def test_check_tells_problems_before_and_after_its_option(tmp_path):
    (tmp_path / "bad.json").write_text('{"server": {"prt": 1}}')
    for arguments in (["check", "-config", "bad.json"], ["-config", "bad.json", "check"]):
        done = cli("", *arguments, cwd=tmp_path, env=environment())
        assert done.returncode == 2 and "server.prt: unknown key; did you mean port?" in done.stderr


# ---- where the server is ---------------------------------------------------


def test_url_and_token_come_from_the_configuration_beside(server, tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps(server.config))
    done = cli("", "list", cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    named = cli("", "-config", str(tmp_path / "config.yaml"), "list", env=environment())
    assert named.returncode == 0, named.stderr


def test_only_address_and_token_of_the_configuration_are_judged(server, tmp_path):
    config = {
        **server.config,
        "locustClusters": [{"id": "x", "authToken": "${NOT_SET_HERE}"}],
        "storage": {"url": "nonsense"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli("", "list", "-config", "config.json", cwd=tmp_path, env=environment()).returncode == 0
    config["security"] = {"apiToken": "${NOT_SET_HERE}"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = cli("", "list", "-config", "config.json", cwd=tmp_path, env=environment())
    assert (
        done.returncode == 2
        and "security.apiToken: environment variable NOT_SET_HERE is not set" in done.stderr
    )


def test_token_of_a_configuration_found_by_chance_is_not_sent_to_any_address():
    assert loadmanager._is_near("http://127.0.0.1:9999", "http://10.0.0.1:8080")
    assert loadmanager._is_near("http://10.0.0.1:8080", "http://10.0.0.1:8080")
    assert not loadmanager._is_near("http://elsewhere.example:8080", "http://127.0.0.1:8080")


def test_token_file_and_its_precedence(server, tmp_path):
    (tmp_path / "token").write_text(API_TOKEN + "\n")
    variables = environment(LOADMANAGER_URL=server.url, LOADMANAGER_TOKEN="wrong")
    assert cli("", "list", "--token-file", str(tmp_path / "token"), env=variables).returncode == 0
    assert cli("", "list", "--token", API_TOKEN, env=variables).returncode == 0


def test_wrong_or_missing_token_is_exit_3_and_never_printed(server):
    wrong = cli("", "list", env=towards(server.url, "secret-but-wrong"))
    assert (
        wrong.returncode == 3
        and "the token was refused" in wrong.stderr
        and "secret-but-wrong" not in wrong.stderr + wrong.stdout
    )
    none = cli("", "list", env=environment(LOADMANAGER_URL=server.url), cwd=Path("/"))
    assert none.returncode == 3


def test_server_that_is_down_is_exit_3_in_one_line():
    url = f"http://127.0.0.1:{find_free_port()}"
    for arguments in (["list"], ["run", *CREATE], ["stop", "latest"]):
        done = cli(url, *arguments)
        assert (done.returncode, done.stdout) == (3, "")
        assert (
            "refused the connection: is Load Manager running there?" in done.stderr
            and done.stderr.count("\n") == 1
        )


def test_something_else_at_the_address_is_exit_3(api):
    for answer in (b"<html>hello</html>", b"{}", b'"text"', b"[1]"):
        api.answers["GET", "/v1/tests"] = (200, answer)
        done = cli(api.url, "list")
        assert done.returncode == 3 and "is not Load Manager" in done.stderr, done.stderr
    api.answers["GET", "/v1/tests"] = (404, b"<html>no</html>")
    assert "not as Load Manager does" in cli(api.url, "list").stderr


def test_https_server_is_trusted_by_its_certificate(api, tmp_path):
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem",
            "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1"], cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    api.server.socket = context.wrap_socket(api.server.socket, server_side=True)
    api.has_run()
    url = api.url.replace("http:", "https:")
    refused = cli(url, "list")
    assert refused.returncode == 3 and "certificate is not trusted" in refused.stderr
    assert cli(url, "list", "--ca-file", str(tmp_path / "cert.pem")).returncode == 0


# ---- runs, in a pipe -------------------------------------------------------


def test_run_in_a_pipe_tells_lines_and_a_summary_and_exits_0(server):
    done = cli(server.url, "run", *CREATE, "-d", "3s", "--every", "1s", "--meta", "ticket=PERF-1")
    assert done.returncode == 0, done.stderr
    run = newest(server)
    assert done.stdout.startswith(f"run {run['id']} started on one\n")
    lines = re.findall(r"^\S+Z Running 0:0\d of 0:03", done.stdout, re.M)
    assert 2 <= len(lines) <= 8, done.stdout
    assert re.search(r"^status +Finished \(duration\)", done.stdout, re.M) and "ticket=PERF-1" in done.stdout
    requests = run["lastMetrics"]["totalRequests"]
    assert requests > 0 and f"requests {requests}" in done.stdout
    assert "\x1b" not in done.stdout and "商品/🚀\\x1b[31mred\\x1b]0;owned\\x07\\u202egnp" in done.stdout
    assert run["metadata"] == {"ticket": "PERF-1"} and run["durationSeconds"] == 3 and run["targetUsers"] == 5


def test_json_of_run_is_the_api_s_json_and_nothing_else(server):
    done = cli(server.url, "run", *CREATE, "-d", "1s", "--json")
    assert done.returncode == 0
    assert done.stdout.encode().rstrip(b"\n") == server.get(f"/v1/tests/{newest(server)['id']}").body
    assert "started on one" in done.stderr


def test_json_of_each_command_is_the_api_s_json(server):
    created = cli(server.url, "run", *CREATE, "--detach", "--json")
    assert (
        created.returncode == 0 and json.loads(created.stdout)["status"] == "Running" and created.stderr == ""
    )
    run_id = json.loads(created.stdout)["id"]
    assert (
        cli(server.url, "stop", "latest", "--json").stdout
        == '{"success":true,"message":"Test stopped successfully"}\n'
    )
    assert (
        cli(server.url, "wait", run_id, "--json").stdout.encode()
        == server.get(f"/v1/tests/{run_id}").body + b"\n"
    )
    same = {
        ("show", run_id): f"/v1/tests/{run_id}",
        ("list", "--limit", "2", "--tenant", "acme"): "/v1/tests?limit=2&tenantId=acme",
        ("metrics", run_id, "--max-points", "7"): f"/v1/tests/{run_id}/metrics?maxPoints=7",
    }
    for arguments, path in same.items():
        assert cli(server.url, *arguments, "--json").stdout.encode() == server.get(path).body + b"\n", (
            arguments
        )
    clusters = json.loads(cli(server.url, "clusters", "--json").stdout)
    assert [cluster["id"] for cluster in clusters] == ["one", "dead"]
    deleted = cli(server.url, "delete", run_id, "--json")
    assert (deleted.returncode, deleted.stdout) == (0, "")
    assert server.get(f"/v1/tests/{run_id}").status == 404


def test_detached_run_is_found_by_latest_and_by_the_beginning_of_its_id(server):
    started = cli(server.url, "run", *CREATE, "--detach")
    run_id = re.fullmatch(r"run (\S+) started on one\n", started.stdout).group(1)
    for name in ("latest", run_id, run_id[:6], run_id[:13].upper()):
        done = cli(server.url, "show", name)
        assert done.returncode == 0 and run_id in done.stdout, (name, done.stderr)
    listed = cli(server.url, "list", "--status", "Running")
    assert run_id[:8] in listed.stdout and "browse \U0001f4a5 \u5b57" in listed.stdout
    busy = cli(server.url, "run", *CREATE, "-d", "1s")
    assert (
        busy.returncode == 1
        and "--queue" in busy.stderr
        and f"stop {run_id}" in busy.stderr
        and busy.stderr.count("\n") == 1
    )
    stopped = cli(server.url, "stop", run_id[:8])
    assert (stopped.returncode, stopped.stdout) == (0, f"run {run_id} is stopped\n")
    server.wait_for(run_id, "Finished")
    again = cli(server.url, "stop", run_id)
    assert again.returncode == 1 and "only a Running run can be stopped" in again.stderr


def test_rerun_follows_the_same_again(server, finished_run):
    done = cli(server.url, "rerun", finished_run["id"], "-q")
    again = newest(server)
    assert done.returncode == 0 and done.stdout == f"run {again['id']} is Finished (duration)\n"
    assert (
        again["id"] != finished_run["id"]
        and again["metadata"] == {"first": "yes"}
        and again["durationSeconds"] == 1
    )


def test_same_idempotency_key_answers_the_same_run(server):
    ids = [
        json.loads(
            cli(server.url, "run", *CREATE, "--idempotency-key", "job-17", "--json", "--detach").stdout
        )["id"]
        for _ in range(2)
    ]
    assert ids[0] == ids[1]


def test_queued_run_waits_and_is_taken_out_by_ctrl_c(server):
    cli(server.url, "run", *CREATE, "--detach")
    waiting = background(server.url, "run", *CREATE, "--queue", "--every", "1s")
    queued = eventually(lambda: server.get("/v1/tests?status=Pending").json, 10)[0]
    eventually(lambda: "queue, position 1" in waiting.stdout.readline(), 10)
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(20) == 130
    assert server.run(queued["id"])["status"] == "Failed"


def test_unknown_and_ambiguous_runs_are_exit_2(server, api):
    done = cli(server.url, "show", "ffffff")
    assert done.returncode == 2 and "no run whose id begins with ffffff" in done.stderr
    assert cli(server.url, "show", "00000000-0000-4000-8000-000000000000").returncode == 2
    other = RUN_ID[:9] + "ffff" + RUN_ID[13:]
    api.answers["GET", "/v1/tests"] = (200, [run_document(), run_document(id=other)])
    done = cli(api.url, "show", RUN_ID[:8])
    assert done.returncode == 2 and "begins 2 ids" in done.stderr and other in done.stderr
    api.answers["GET", "/v1/tests"] = (200, [])
    assert "there is no run yet" in cli(api.url, "stop", "latest").stderr


def test_run_that_cannot_start_is_exit_1_with_the_reason(server):
    done = cli(server.url, "run", *CREATE, "--env", "dead", "-d", "1s")
    assert done.returncode == 1 and done.stdout == "" and "kept as failed run" in done.stderr
    failed = newest(server)
    assert failed["status"] == "Failed"
    waited = cli(server.url, "wait", failed["id"])
    assert waited.returncode == 1 and "the run failed: " in waited.stderr


def test_server_refuses_values_with_exit_2(server):
    done = cli(server.url, "run", *CREATE, "--tenant", "nobody", "-d", "1s")
    assert done.returncode == 2 and "no cluster serves tenant 'nobody'" in done.stderr


def test_reader_that_goes_away_does_not_end_the_following(server):
    command = (
        f"{shlex.quote(sys.executable)} {shlex.quote(PROGRAM)} run {shlex.join(CREATE)} -d 2s --every "
        f"1s | head -1; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(
        ["bash", "-c", command], env=towards(server.url), capture_output=True, text=True, timeout=40
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert newest(server)["stopReason"] == "duration"


def test_metrics_and_clusters_as_tables(server, finished_run):
    table = cli(server.url, "metrics", finished_run["id"]).stdout.splitlines()
    assert table[0].split()[:3] == ["TIME", "USERS", "REQ/S"] and len(table) >= 2
    clusters = cli(server.url, "clusters").stdout.splitlines()
    assert clusters[1].split()[:3] == ["one", "acme/dev", "idle"] and "unreachable" in clusters[2]


# ---- Ctrl-C and the terminal -----------------------------------------------


def test_live_table_is_redrawn_in_place_and_ctrl_c_stops_the_run(server):
    terminal = Terminal(server.url, "run", *CREATE, "-d", "60s")
    text = terminal.wait_for(r"(?s)[█░]+  0:0\d of 1:00.*users 5/5.*REQUESTS.*GET")
    assert "browse \U0001f4a5" in text.replace(" ", " ")
    before = re.search(r"0:(\d\d) of", text).group(1)
    terminal.wait_for(rf"0:(?!{before})\d\d of 1:00")
    assert terminal.text().count(" of 1:00") == 1, f"the view was not drawn in place:\n{terminal.text()}"
    assert b"\x1b[32m" in terminal.received
    terminal.interrupt()
    terminal.wait_for("stopping run .*Ctrl-C again leaves at once")
    assert terminal.exit_status() == 130
    assert "Finished (user)" in terminal.text()
    run = newest(server)
    assert run["status"] == "Finished" and run["stopReason"] == "user"
    sequences = set(re.findall(rb"\x1b(?:\[[0-9;]*.|.)", terminal.received))
    allowed = rb"\x1b\[(?:[0-9;]*m|[0-9]+A|J)"
    assert all(re.fullmatch(allowed, sequence) for sequence in sequences), sequences
    assert b"\x07" not in terminal.received


def test_second_ctrl_c_leaves_at_once_and_says_what_is_still_running(server, locust):
    terminal = Terminal(server.url, "run", *CREATE, "-d", "60s")
    terminal.wait_for("users 5/5")
    locust.master.send_signal(signal.SIGSTOP)  # holds the stop up
    try:
        terminal.interrupt()
        terminal.wait_for("stopping run")
        terminal.interrupt()
        assert terminal.exit_status(within_s=10) == 130, "it waited for the stop, which is held up"
        run_id = newest(server)["id"]
        text = terminal.text().replace("\n", "")
        assert (
            f"left; run {run_id} is still " in text and f"stop it with: loadmanager.py stop {run_id}" in text
        )
        assert server.run(run_id)["status"] == "Stopping"
    finally:
        locust.master.send_signal(signal.SIGCONT)


def test_narrow_terminal_and_resize_keep_one_view(server):
    terminal = Terminal(server.url, "run", *CREATE, "-d", "60s", columns=110)
    terminal.wait_for(r"(?s)REQUESTS.*GET")
    terminal.resize(44, 16)
    shown = terminal.wait_for(r"(?s)NAME +REQUESTS.*…")
    assert shown.count(" of 1:00") == 1, shown
    terminal.resize(110, 30)
    terminal.wait_for("MAX MS")
    terminal.child.kill(signal.SIGTERM)  # as Ctrl-C: a CI job that is cancelled
    assert terminal.exit_status() == 130
    assert newest(server)["stopReason"] == "user"


def test_no_color_and_dumb_terminals_are_respected(api):
    api.has_run(status="Running", finishedAt=None, lastMetrics={"totalRequests": 7, "totalFailures": 1})
    plain = Terminal(api.url, "watch", "latest", NO_COLOR="1")
    plain.wait_for("requests 7")
    dumb = Terminal(api.url, "watch", "latest", TERM="dumb")
    dumb.wait_for("Z Running .* requests 7")
    api.has_run()
    assert plain.exit_status() == 0 and dumb.exit_status() == 0
    assert b"\x1b[J" in plain.received and not re.search(rb"\x1b\[[0-9;]*m", plain.received), (
        "colours in spite of NO_COLOR"
    )
    assert b"\x1b" not in dumb.received


def test_ctrl_c_of_watch_leaves_the_run_running(server):
    cli(server.url, "run", *CREATE, "--detach")
    terminal = Terminal(server.url, "watch", "latest")
    terminal.wait_for("users 5/5")
    terminal.interrupt()
    assert terminal.exit_status() == 130
    assert "is still Running" in terminal.text().replace("\n", "")
    assert newest(server)["status"] == "Running"


def test_ctrl_c_while_a_run_is_starting_stops_it_once_it_has_started(api):
    api.has_run(status="Running", finishedAt=None)
    api.delays["POST", "/v1/tests"] = 1.5
    api.answers["POST", f"/v1/tests/{RUN_ID}/stop"] = (200, {"success": True})
    starting = background(api.url, "run", *CREATE)
    eventually(lambda: api.asked)
    starting.send_signal(signal.SIGINT)
    eventually(
        lambda: ("POST", f"/v1/tests/{RUN_ID}/stop") in [asked[:2] for asked in api.asked],
        what="the stop is asked for",
    )
    api.has_run(stopReason="user")
    assert starting.wait(10) == 130
    assert "is stopped as soon as it has started" in starting.stderr.read()


# ---- a server that goes away -----------------------------------------------


def test_killed_server_that_comes_back_is_followed_again(server):
    running = background(server.url, "run", *CREATE, "-d", "4s", "--every", "1s")
    assert "started on" in running.stdout.readline()  # the answer is there, not only the run
    server.kill9()
    assert "the run is still running; trying again for 5:00" in running.stderr.readline()
    server.start()
    assert "answers again" in running.stderr.readline()
    assert running.wait(30) == 0
    assert "Finished (duration)" in running.stdout.read()


def test_server_that_stays_away_is_exit_3_and_says_what_is_still_running(server):
    running = background(server.url, "run", *CREATE, "-d", "60s", "--patience", "2s")
    run_id = eventually(lambda: newest(server) if newest(server).get("status") == "Running" else None)["id"]
    running.stdout.readline(), running.stdout.readline()  # started, and the first line
    server.kill9()
    try:
        assert running.wait(15) == 3
        assert (
            f"run {run_id} is still Running; stop it with: loadmanager.py stop {run_id}"
            in running.stderr.read()
        )
    finally:
        server.start()


def test_answer_of_a_create_that_is_lost_is_asked_for_again_with_the_same_key(api):
    api.has_run()
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    starting = background(f"http://127.0.0.1:{port}", "run", *CREATE, "-q")
    sock, _ = listener.accept()
    lost = sock.recv(65536)
    sock.close()
    listener.settimeout(10)
    sock, _ = listener.accept()
    again = sock.recv(65536)
    keys = [re.search(rb"(?i)idempotency-key: (\S+)", request).group(1) for request in (lost, again)]
    assert keys[0] == keys[1]
    sock.close()
    listener.close()
    assert starting.wait(15) == 3
    assert "may have been started" in starting.stderr.read()


# ---- verdicts, reports, comparisons ----------------------------------------


def test_failed_thresholds_are_exit_99(api):
    failed = {"expr": "p95ResponseMs < 500", "value": 612.5, "result": "failed"}
    api.has_run(
        verdict="failed", thresholds=[failed, {"expr": "errorRate < 1", "value": 0.0, "result": "passed"}]
    )
    done = cli(api.url, "run", *CREATE, "--threshold", "p95ResponseMs < 500", "--threshold", "errorRate < 1")
    assert (
        done.returncode == 99
        and done.stderr == "loadmanager: thresholds failed: p95ResponseMs < 500, is 612.5\n"
    )
    assert (
        "threshold failed: p95ResponseMs < 500, is 612.5" in done.stdout
        and "threshold passed: errorRate < 1, is 0" in done.stdout
    )
    body = next(asked[3] for asked in api.asked if asked[0] == "POST")
    assert body["thresholds"] == ["p95ResponseMs < 500", "errorRate < 1"]
    assert cli(api.url, "wait", "latest").returncode == 99
    assert cli(api.url, "show", "latest").returncode == 0, "show tells, it does not judge"


def test_failed_run_is_exit_1_though_its_thresholds_failed_too(api):
    api.has_run(status="Failed", verdict="failed", failureReason="the cluster\x1b[2Jwas lost")
    done = cli(api.url, "wait", "latest")
    assert done.returncode == 1 and "the cluster\\x1b[2Jwas lost" in done.stderr


def test_doubtful_numbers_are_exit_99_where_trust_is_required(api):
    warnings = [{"code": "cpu_high", "at": "2026-11-23T12:00:30.000Z", "message": "worker w-1 used 97% CPU"}]
    api.has_run(verdict="passed", trust="doubtful", warnings=warnings)
    assert cli(api.url, "run", *CREATE).returncode == 0
    done = cli(api.url, "run", *CREATE, "--require-trusted")
    assert done.returncode == 99 and "cannot be trusted: worker w-1 used 97% CPU" in done.stderr
    api.has_run(verdict="passed", trust="ok")
    assert cli(api.url, "run", *CREATE, "--require-trusted").returncode == 0


def test_fail_on_regression_asks_for_the_comparison_with_the_baseline(api):
    api.has_run(verdict="failed")
    done = cli(api.url, "run", *CREATE, "--fail-on-regression")
    assert done.returncode == 99
    assert next(asked[3] for asked in api.asked if asked[0] == "POST")["compareWith"] == "baseline"


def test_files_for_ci_are_written_when_the_run_is_over(api, tmp_path):
    api.has_run(verdict="passed")
    api.answers["GET", f"/v1/tests/{RUN_ID}/junit.xml"] = (200, b"<testsuites/>")
    api.answers["GET", f"/v1/tests/{RUN_ID}/summary.md"] = (200, b"# passed\n")
    done = cli(api.url, "run", *CREATE, "--junit", "junit.xml", "--summary", "summary.md", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "junit.xml").read_text() == "<testsuites/>" and (
        tmp_path / "summary.md"
    ).read_text() == "# passed\n"
    del api.answers["GET", f"/v1/tests/{RUN_ID}/junit.xml"]
    done = cli(api.url, "wait", "latest", "--junit", "junit.xml", cwd=tmp_path)
    assert done.returncode == 2 and "the server does not offer this" in done.stderr


def test_reports_go_to_a_file_or_to_stdout(server, finished_run, api, tmp_path):
    run = finished_run["id"]
    done = cli(server.url, "report", run, "--format", "html", "-o", "report.html", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "") and "report.html written" in done.stderr
    assert (tmp_path / "report.html").read_bytes().lower().startswith(b"<!doctype html>")
    for arguments, path in (
        (["report", run], "report.md"),
        (["report", run, "--format", "csv"], "requests.csv"),
        (["metrics", run, "--csv"], "metrics.csv"),
    ):
        printed = subprocess.run(
            [sys.executable, PROGRAM, *arguments], env=towards(server.url), capture_output=True, timeout=20
        ).stdout
        assert printed.rstrip(b"\n") == server.get(f"/v1/tests/{run}/{path}").body.rstrip(b"\n") != b""
    on_terminal = Terminal(server.url, "report", run, "--format", "html")
    assert on_terminal.exit_status() == 2 and "-o report.html" in on_terminal.text()
    unclear = cli(server.url, "metrics", run, "--csv", "--step", "10s")
    assert unclear.returncode == 2 and "--csv has all points" in unclear.stderr
    api.has_run()
    missing = cli(api.url, "report", "latest")
    assert missing.returncode == 2 and "the server does not offer this" in missing.stderr


def test_compare_tells_regressions_and_fails_where_asked(api):
    api.has_run()
    figure = {
        "endpoint": "GET /items", "metric": "p95ResponseMs", "baseline": 100.0, "candidate": 140.0,
        "change": 40.0, "changePercent": 40.0,
        "equalRuns": [95.0, 106.0], "judgement": "regression", "reason": "beyond 95 to 106",
    }  # fmt: skip
    document = {
        "baseline": RUN_ID, "runs": [RUN_ID], "candidate": RUN_ID, "figures": [figure],
        "judgement": "regression", "message": "1 of 1 got worse",
        "differences": ["the candidate had 10 users, the baseline 5"],
        "regressions": [{"message": "GET /items: p95ResponseMs +40%"}],
    }  # fmt: skip
    errors = {
        **figure,
        "metric": "errorRate",
        "baseline": 80.0,
        "candidate": 92.0,
        "change": 12.0,
        "changePercent": 15.0,
    }
    document["figures"].append(errors)
    api.answers["GET", "/v1/tests/compare"] = (200, document)
    done = cli(api.url, "compare", "latest", RUN_ID)
    assert "+12.00 pp" in done.stdout and "+15" not in done.stdout, (
        "an error rate changes in percentage points"
    )
    assert (
        done.returncode == 0
        and "regression: GET /items: p95ResponseMs +40%" in done.stdout
        and "+40.0%" in done.stdout
        and "95.00 to 106.00  regression" in done.stdout
    )
    assert cli(api.url, "compare", "latest", RUN_ID, "--fail-on-regression").returncode == 99
    assert json.loads(cli(api.url, "compare", "latest", RUN_ID, "--json").stdout) == document
    api.answers["GET", "/v1/tests/compare"] = (200, {**document, "regressions": []})
    assert cli(api.url, "compare", "latest", RUN_ID, "--fail-on-regression").returncode == 0
    api.answers["GET", "/v1/tests/compare"] = (
        404,
        {"error": "not found", "message": "there is no run compare"},
    )
    old = cli(api.url, "compare", "latest", RUN_ID)
    assert old.returncode == 2 and "the server does not offer comparisons" in old.stderr


# ---- text ------------------------------------------------------------------


def test_table_columns_stay_in_line_whatever_the_names():
    columns = (loadmanager.Column("NAME"), loadmanager.Column("N", right=True))
    names = [
        "plain",
        "\u5b57" * 9,
        "\U0001f680\U0001f525",
        "e\u0301" * 4,
        "\u0915\u094d\u0937",
        "\x1b[31mred",
        "long" * 40,
    ]
    for width in (None, 60, 24, 8):
        lines = loadmanager.table(columns, [[loadmanager.printable(name), "1"] for name in names], width)
        assert len({loadmanager.columns_of(line) for line in lines[1:]}) == 1, lines
        assert width is None or loadmanager.columns_of(lines[1]) <= width
        assert all(line.endswith(" 1") for line in lines[1:]) and not any("\x1b" in line for line in lines)


def test_few_failures_are_not_shown_as_none():
    assert [loadmanager.percent_text(value) for value in (None, 0.0, 0.0025, 0.5, 100.0)] == [
        "-%",
        "0.00%",
        "<0.01%",
        "0.50%",
        "100.00%",
    ]
    assert (
        loadmanager.threshold_words({"expr": "errorRate < 0.001", "value": 0.0025})
        == "errorRate < 0.001, is 0.0025"
    )


def test_clipped_colour_is_closed_and_combining_marks_are_bounded():
    assert loadmanager.clip("\x1b[31m" + "x" * 50 + "\x1b[0m", 10) == "\x1b[31m" + "x" * 9 + "…\x1b[0m"
    assert len(loadmanager.clip("a" + "\u0301" * 10_000, 20)) < 200


def test_control_characters_of_json_are_escaped_on_a_terminal_only(api):
    hostile = "a\x9b31mb\x7f\u202ec"
    api.answers["GET", "/v1/tests"] = (
        200,
        json.dumps([run_document(scenarioId=hostile)], ensure_ascii=False).encode(),
    )
    assert hostile in cli(api.url, "list", "--json").stdout
    terminal = Terminal(api.url, "list", "--json", columns=200)
    assert terminal.exit_status() == 0
    assert (
        "\x9b" not in terminal.received.decode() and json.loads(terminal.received)[0]["scenarioId"] == hostile
    )


def test_terminal_without_unicode_still_gets_everything(api):
    api.has_run(scenarioId="\u5b57\U0001f680")
    done = cli("", "show", "latest", env={**towards(api.url), "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "\\u5b57\\U0001f680" in done.stdout


# ---- completion ------------------------------------------------------------


def bash_offers(tmp_path: Path, *words: str) -> list[str]:
    """What a real bash offers for the last of the words."""
    (tmp_path / "completion").write_text(cli("", "completion", "bash").stdout)
    script = (
        'source completion; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _loadmanager 2>/dev/null; printf '
        '"%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-euc", script, "bash", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_bash_completes_commands_options_and_values(tmp_path):
    assert bash_offers(tmp_path, "loadmanager", "re") == ["restore", "reload", "rerun", "report", "reference"]
    assert set(bash_offers(tmp_path, "loadmanager", "")) >= {command.name for command in loadmanager.COMMANDS}
    assert bash_offers(tmp_path, "loadmanager", "run", "--sp") == ["--spawn-rate"]
    assert bash_offers(tmp_path, "loadmanager", "-config", "config.json", "show", "l") == ["latest"]
    assert bash_offers(tmp_path, "loadmanager", "report", "latest", "--format", "h") == ["html"]
    assert bash_offers(tmp_path, "loadmanager", "run", "--tenant", "") == []
    (tmp_path / "my config.json").write_text("{}")
    assert " ".join(bash_offers(tmp_path, "loadmanager", "list", "-config", "my")) == "my config.json"


@pytest.mark.parametrize("shell, start", [("bash", ["--norc", "--noprofile", "-i"]), ("zsh", ["-f", "-i"])])
def test_tab_completes_in_a_real_shell(shell, start, tmp_path):
    (tmp_path / "completion").write_text(cli("", "completion", shell).stdout)
    child = pexpect.spawn(
        shell,
        start,
        cwd=str(tmp_path),
        env={**environment(), "PS1": "$ ", "HOME": str(tmp_path)},
        timeout=15,
        encoding="utf-8",
    )
    if shell == "zsh":
        child.sendline("PS1='$ '; autoload -Uz compinit; compinit -u -d dump")
    child.sendline("source ./completion; echo rea''dy")
    child.expect("ready")
    child.send("loadmanager rer\t")
    child.expect("rerun")
    child.send("--req\t")
    child.expect("--require-trusted")
    child.sendcontrol("c")
    child.sendline("exit")
    child.close(force=True)


def test_failures_of_a_load_are_shown_at_its_end_and_by_show(server, target):
    target.fail_ratio = 1.0
    try:
        done = cli(server.url, "run", *CREATE, "-d", "3s")
    finally:
        target.fail_ratio = 0.0
    shown = cli(server.url, "show", "latest")
    for told in (done.stdout, shown.stdout):
        assert re.search(r"\nfailures\n(.*\n)? +[\d,]+  GET /: HTTPError\('500 Server Error", told), told
        assert "owned\x07" not in told and "\x1b[31mred" not in told, (
            "control characters of a name are escaped"
        )


def test_only_the_most_frequent_failures_are_shown():
    failures = [{"method": "GET", "name": f"/{n}", "error": "x" * 900, "occurrences": n} for n in range(7)]
    lines = loadmanager.failure_lines(
        {"failures": failures}, loadmanager.Screen(sys.stdout, {"NO_COLOR": "1"})
    )
    assert lines[:2] == ["", "failures"] and len(lines) == 2 + loadmanager.MAX_FAILURES + 1
    assert lines[-1].strip() == "and 2 more"
    assert max(map(len, lines)) < 250


def test_run_that_ended_by_its_duration_is_shown_with_no_more_time_than_that(api):
    api.has_run(durationSeconds=20, finishedAt="2026-11-23T12:00:22.400Z")
    shown = cli(api.url, "show", "latest")
    assert "0:20 of 0:20" in shown.stdout and "0:21" not in shown.stdout, shown.stdout + shown.stderr
    assert json.loads(cli(api.url, "show", "latest", "--json").stdout)["finishedAt"].endswith("22.400Z")


def test_run_that_ended_otherwise_is_shown_with_the_time_it_took(api):
    api.has_run(durationSeconds=20, finishedAt="2026-11-23T12:00:22.400Z", stopReason="lost")
    assert "0:21 of 0:20" in cli(api.url, "show", "latest").stdout
    api.has_run(durationSeconds=20, finishedAt="2026-11-23T12:00:13.400Z", stopReason="user")
    assert "0:12 of 0:20" in cli(api.url, "show", "latest").stdout


def test_compare_measures_by_the_history_as_the_api_does(server):
    place = ("--tenant", "acme", "--env", "dev", "--scenario", "compared with history", "-u", "5", "-r", "5")
    ids = []
    for _ in range(2):
        assert cli(server.url, "run", *place, "-d", "2s", "-q").returncode == 0
        ids.append(newest(server)["id"])
        if len(ids) == 1:
            alone = cli(server.url, "compare", "history", "latest")
            assert alone.returncode == 2 and "no comparable run before" in alone.stderr, alone.stderr
            assert "Traceback" not in alone.stderr and alone.stderr.count("\n") == 1
    told = cli(server.url, "compare", "history", "latest")
    assert told.returncode == 0 and f"compared with {ids[0]}: {ids[1]}" in told.stdout, told
    document = json.loads(cli(server.url, "compare", "history", ids[1][:8], "--json").stdout)
    assert (document["runs"], document["candidate"]) == ([ids[0]], ids[1])
    swapped = cli(server.url, "compare", "latest", "history")
    assert swapped.returncode == 2 and "no run whose id begins with history" in swapped.stderr


@pytest.mark.parametrize(
    "answer",
    [
        (500, {"error": "internal", "message": "broken"}),
        (404, {"error": "not found", "message": "there is no such path"}),
        (200, b"no JSON"),
        (200, {"failures": None}),
        (200, {"failures": [1]}),
        (200, {"failures": [{"method": "GET"}]}),
        (200, {"failures": [{"method": 1, "name": None, "error": [], "occurrences": "many"}]}),
    ],
)
def test_failures_that_cannot_be_read_change_no_exit_status(api, answer):
    api.has_run(lastMetrics={"totalRequests": 9, "totalFailures": 9})
    api.answers["GET", f"/v1/tests/{RUN_ID}/failures"] = answer
    for command in ("show", "watch"):
        told = cli(api.url, command, RUN_ID)
        assert told.returncode == 0 and "Traceback" not in told.stderr, told.stderr
        assert "Finished" in told.stdout and "\nfailures\n" not in told.stdout
