"""Metrics: what one caller sees, both formats, and a real Prometheus that watches a run of a real Locust."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import time
from urllib.parse import urlsplit

import pytest
import yaml
from conftest import CALLBACK_TOKEN, ROOT, LoadManager, base_config, cluster_config
from fake_locust import answer_500
from locust_process import LocustCluster, find_free_port
from prometheus_client.openmetrics import parser as open_metrics
from prometheus_client.parser import text_string_to_metric_families
from prometheus_process import Prometheus
from target import Target
from test_lifecycle import LOCUSTFILE
from test_store import postgres_url  # noqa: F401 - a fixture
from waiting import eventually

import loadmanager

OPEN_METRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
VIEWER = "token-of-a-viewer-of-acme"


def samples(manager, **how):
    """The value of every series that GET /metrics answers, by its name and labels."""
    answer = manager.get("/metrics", **how)
    assert answer.status == 200, answer.body
    return samples_of(text_string_to_metric_families(answer.body.decode()))


def samples_of(families):
    found = {}
    for family in families:
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} is there twice: Prometheus refuses the whole answer"
            found[key] = sample.value
    return found


def of(found, series, /, **labels):
    """The values of the series of this name that have these labels."""
    return [
        value
        for (name, pairs), value in found.items()
        if name == series and labels.items() <= dict(pairs).items()
    ]


def label_values(found, name):
    return {dict(pairs)[name] for _, pairs in found if name in dict(pairs)}


def wait_for_numbers(manager, run_id):
    return eventually(lambda: manager.run(run_id).get("lastMetrics"), 10, what="the run has numbers")


# ---- who sees what -------------------------------------------------------------


def test_metrics_need_a_token_unless_they_are_anonymous(load_manager, fake):
    lm = load_manager(cluster_config(fake.url))
    assert lm.get("/metrics", token=None).status == 401
    opened = load_manager(cluster_config(fake.url), metrics={"anonymous": True})
    assert opened.get("/metrics", token=None).status == 200
    assert opened.get("/metrics", token="a wrong one").status == 401, "a token that is sent counts"
    assert opened.get("/v1/tests", token=None).status == 401, "only the metrics are open"


def test_viewer_sees_only_the_series_of_its_tenants(load_manager, fake_locust):
    clusters = [
        cluster_config(fake_locust().url),
        {**cluster_config(fake_locust().url, "two"), "tenantId": "globex"},
    ]
    viewer = {"name": "prometheus", "token": VIEWER, "role": "viewer", "tenants": ["acme"]}
    lm = load_manager(*clusters, security={"apiTokens": [viewer]}, metrics={"locustExporterNames": True})
    for tenant in ("acme", "globex"):
        run = lm.create(tenantId=tenant).json
        wait_for_numbers(lm, run["id"])
    all_of_it, its_own = samples(lm), samples(lm, token=VIEWER)
    assert label_values(all_of_it, "tenant") == {"acme", "globex"}
    assert of(all_of_it, "loadmanager_build_info") and of(all_of_it, "loadmanager_http_requests_total")
    assert label_values(its_own, "tenant") == {"acme"}
    assert all("tenant" in dict(pairs) for _, pairs in its_own), (
        "what others do shows in the program's own figures"
    )
    assert of(its_own, "loadmanager_run_users") == of(its_own, "locust_users") == [5.0]


# ---- formats -------------------------------------------------------------------


@pytest.mark.parametrize(
    "accept, is_open",
    [
        ("", False),
        ("*/*", False),
        ("text/html,*/*;q=0.8", False),
        ("text/plain;version=0.0.4", False),
        ("application/openmetrics-text", True),
        (OPEN_METRICS, True),
        ("application/openmetrics-text;version=2.0.0,text/plain;q=0.5", False),
        ("application/openmetrics-text;version=2.0.0,application/openmetrics-text;version=1.0.0;q=0.4", True),
        ("application/openmetrics-text;q=0.3,text/plain;q=0.9", False),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=many", False),
    ],
)
def test_format_is_what_the_client_would_rather_have(accept, is_open):
    assert loadmanager.wants_open_metrics(accept) is is_open


def test_both_formats_have_the_same_series(load_manager, fake):
    lm = load_manager(cluster_config(fake.url), metrics={"locustExporterNames": True})
    run = lm.create().json
    wait_for_numbers(lm, run["id"])
    push = {"totalRequests": 10, "totalFailures": 1, "responseTimes": {"5": 4, "100": 6}}
    assert lm.callback("metrics", {"runId": run["id"], "metrics": push}).status == 200
    opened = lm.get("/metrics", headers={"Accept": OPEN_METRICS})
    assert opened.headers["content-type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert opened.body.endswith(b"\n# EOF\n")
    by_open = samples_of(open_metrics.text_string_to_metric_families(opened.body.decode()))
    by_text = samples(lm)

    def names(found):
        return {key for key in found if "http" not in key[0]}  # the first answer is counted in the second

    assert names(by_open) == names(by_text)
    assert of(by_open, "loadmanager_run_request_duration_seconds_bucket", le="0.005") == [4.0]
    assert of(by_text, "loadmanager_run_request_duration_seconds_bucket", le="0.1") == [10.0]


def test_answer_is_packed_for_who_takes_it(lm):
    packed = lm.get("/metrics", headers={"Accept-Encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert b"loadmanager_build_info" in gzip.decompress(packed.body)


def check_metrics(text):
    """What promtool finds in it."""
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=30
    )
    return (done.stdout + done.stderr).splitlines()


def test_promtool_finds_nothing_in_names_and_texts(load_manager, fake):
    lm = load_manager(
        cluster_config(fake.url),
        notifications=[{"id": "hook", "type": "webhook", "url": "http://127.0.0.1:9/"}],
    )
    run = lm.create().json
    wait_for_numbers(lm, run["id"])
    push = {"totalRequests": 10, "responseTimes": {"5": 10}, "requestStats": {"GET_/a": {"numRequests": 10}}}
    assert lm.callback("metrics", {"runId": run["id"], "metrics": push}).status == 200
    text = lm.get("/metrics").body.decode()
    shown = set(re.findall(r"^# TYPE (\S+)", text, re.M))
    ours = {row.sample_name for row in loadmanager.METRICS if not row.is_of_exporter}
    assert shown == ours, f"not looked at by promtool: {ours - shown}"
    assert check_metrics(text) == []


# ---- figures -------------------------------------------------------------------


def test_figures_of_a_run_are_those_of_the_api_and_end_with_it(lm, fake):
    run = lm.create(targetUsers=8).json
    wait_for_numbers(lm, run["id"])
    fake.stats_changes["num_failures"] = 7
    eventually(lambda: of(samples(lm), "loadmanager_run_failures_total") == [7.0], 10)
    found = samples(lm)
    labels = {
        "tenant": "acme",
        "environment": "dev",
        "scenario": "browse",
        "cluster": "one",
        "run": run["id"],
    }
    assert of(found, "loadmanager_run_users", **labels) == [8.0]
    assert of(found, "loadmanager_run_target_users", **labels) == [8.0]
    assert of(found, "loadmanager_run_requests_total", **labels)[0] >= 10
    assert of(found, "loadmanager_run_response_seconds", quantile="0.95", **labels) == [0.15]
    assert of(found, "loadmanager_run_recent_response_seconds", quantile="0.5", **labels) == [0.016]
    assert of(found, "loadmanager_run_workers", **labels) == [2.0]
    assert (
        of(found, "loadmanager_endpoint_requests_total", method="GET", name="/api/items", **labels)[0] >= 10
    )
    assert of(found, "loadmanager_active_runs", status="Running") == [1.0]
    lm.post(f"/v1/tests/{run['id']}/stop")
    lm.wait_for(run["id"], "Finished")
    after = samples(lm)
    assert "run" not in {name for _, pairs in after for name in dict(pairs)}, "a run's series end with it"
    assert of(after, "loadmanager_runs_ended_total", reason="user") == [1.0]
    assert of(after, "loadmanager_active_runs", status="Running") == [0.0]


def test_counters_do_not_go_back_when_a_push_is_newer_than_locust_s_cache(lm, fake):
    run = lm.create().json
    wait_for_numbers(lm, run["id"])
    push = {"totalRequests": 1_000_000, "totalFailures": 0}
    assert lm.callback("metrics", {"runId": run["id"], "metrics": push}).status == 200
    assert of(samples(lm), "loadmanager_run_requests_total")[0] < 1_000_000, (
        "the next poll would have gone back"
    )


def test_value_that_locust_did_not_give_has_no_series(lm, fake):
    fake.stats_changes.update({"response_time_percentile_0.95": None, "median_response_time": "fast"})
    run = lm.create().json
    wait_for_numbers(lm, run["id"])
    found = eventually(lambda: of(samples(lm), "loadmanager_run_requests_total") and samples(lm), 10)
    assert of(found, "loadmanager_run_response_seconds", quantile="0.99") == [0.16]
    assert of(found, "loadmanager_run_response_seconds", quantile="0.95") == []
    assert of(found, "loadmanager_run_response_seconds", quantile="0.5") == []


def test_only_the_busiest_endpoints_have_series(load_manager, fake):
    fake.endpoints = [("GET", f"/api/{number}") for number in range(30)]
    lm = load_manager(cluster_config(fake.url), metrics={"maxEndpoints": 5, "locustExporterNames": True})
    run = lm.create().json
    wait_for_numbers(lm, run["id"])
    found = eventually(lambda: of(samples(lm), "loadmanager_endpoint_requests_total") and samples(lm), 10)
    assert len(of(found, "loadmanager_endpoint_requests_total")) == 5
    assert len(of(found, "locust_requests_num_requests")) == 6, "and the totals"


def test_odd_names_of_endpoints_are_escaped_and_bounded(lm, fake):
    odd = [
        '/say "hi"',
        "/back\\slash",
        "/line\nbreak",
        "/emoji/🦗",
        "/" + "x" * 1500,
        "/" + "x" * 1501,
        "/" + "x" * 1501,
    ]
    fake.endpoints = [("GET", name) for name in odd]
    run = lm.create().json
    wait_for_numbers(lm, run["id"])
    found = eventually(lambda: of(samples(lm), "loadmanager_endpoint_requests_total") and samples(lm), 10)
    names = {dict(pairs)["name"] for name, pairs in found if name == "loadmanager_endpoint_requests_total"}
    assert {'/say "hi"', "/back\\slash", "/line\nbreak", "/emoji/🦗"} < names
    assert len(names) == 6 and max(map(len, names)) <= 200, "different long names stay different"


def test_polls_that_fail_and_a_stop_that_is_late_show(load_manager, fake):
    lm = load_manager(cluster_config(fake.url), orchestrator={"lostAfterSeconds": 60})
    run = lm.create(durationSeconds=2).json
    wait_for_numbers(lm, run["id"])
    before = samples(lm)
    assert (
        of(before, "loadmanager_run_unanswered_seconds")
        == of(before, "loadmanager_run_overdue_seconds")
        == [0.0]
    )
    assert of(before, "loadmanager_stop_lateness_seconds_count") == [0.0]
    fake.faults.update({path: answer_500 for path in ("/stats/requests", "/loadmanager/state", "/stop")})
    found = eventually(
        lambda: of(samples(lm), "loadmanager_run_overdue_seconds")[0] > 0.5 and samples(lm), 15
    )
    assert of(found, "loadmanager_poll_failures_total", cluster="one")[0] >= 1
    assert of(found, "loadmanager_cluster_up", cluster="one") == [0.0]
    assert of(found, "loadmanager_run_unanswered_seconds")[0] > 0
    fake.faults.clear()
    lm.wait_for(run["id"], "Finished")
    after = samples(lm)
    assert of(after, "loadmanager_stop_lateness_seconds_count") == [1.0]
    assert of(after, "loadmanager_stop_lateness_seconds_sum")[0] > 0.5
    assert of(after, "loadmanager_runs_ended_total", reason="duration") == [1.0]


def test_lost_run_is_counted_as_lost(lm, fake):
    run = lm.create().json
    wait_for_numbers(lm, run["id"])
    fake.faults.update({path: answer_500 for path in ("/stats/requests", "/loadmanager/state")})
    lm.wait_for(run["id"], "Failed", within_s=20)
    assert of(samples(lm), "loadmanager_runs_ended_total", reason="lost") == [1.0]


def test_waiting_runs_are_counted_apart(lm):
    lm.create()
    assert lm.create(queue=True).json["status"] == "Pending"
    found = samples(lm)
    assert of(found, "loadmanager_queued_runs", tenant="acme", environment="dev") == [1.0]
    assert of(found, "loadmanager_active_runs", status="Pending") == [0.0]


def test_requests_are_counted_by_route_and_status(lm):
    lm.get("/health")
    lm.get("/health")
    lm.get("/v1/tests/no-such-run")
    lm.get("/no/such/path")
    lm.get("/v1/tests", token="wrong")
    lm.raw(b"no HTTP at all\r\n\r\n", until_closed=True)
    found = samples(lm)
    assert of(found, "loadmanager_http_requests_total", method="GET", route="/health", status="200") == [2.0]
    assert of(found, "loadmanager_http_requests_total", route="/v1/tests/{id}", status="404") == [1.0]
    assert of(found, "loadmanager_http_requests_total", route="none", status="404") == [1.0]
    assert of(found, "loadmanager_http_requests_total", route="none", status="400") == [1.0]
    assert of(found, "loadmanager_http_requests_total", route="/v1/tests", status="401") == [1.0]
    assert of(found, "loadmanager_http_request_duration_seconds_count", route="/health") == [2.0]
    assert of(found, "loadmanager_http_request_duration_seconds_bucket", route="/health", le="+Inf") == [2.0]


def test_database_that_cannot_be_written_shows(tmp_path):
    database = loadmanager.open_database("sqlite:///runs.db", str(tmp_path))
    store = loadmanager.Store(database)
    assert store.problem is None and store.writer_lag_s == 0.0 and store.database_bytes() > 0
    begin, database.execute = database.execute, refuse_to_write
    store.audit.add(loadmanager.AuditEntry(0.0, "who", "admin", "::1", "GET /", "", "", "", 200, ""))
    try:
        eventually(lambda: store.problem and store.writer_lag_s > 0.2, 10, what="the writer is behind")
    finally:
        database.execute = begin
    eventually(
        lambda: store.problem is None and store.writer_lag_s == 0.0, 10, what="the writer has caught up"
    )
    store.close()


def refuse_to_write(sql, values=()):
    raise OSError("no space left on device")


def test_database_of_postgresql_says_its_size(postgres_url):  # noqa: F811
    store = loadmanager.Store(loadmanager.open_database(postgres_url, "."))
    try:
        assert store.database_bytes() > 100_000
    finally:
        store.close()


# ---- a real Prometheus ----------------------------------------------------------


class Watched:
    """A run of a real Locust that a real Prometheus scraped each second, from its start to after its end."""

    def __init__(self, manager, locust, prometheus):
        self.manager, self.locust, self.prometheus = manager, locust, prometheus
        self.start = time.time()
        self.run = manager.create(targetUsers=6, spawnRate=6, durationSeconds=10).json
        self.final = manager.wait_for(self.run["id"], "Finished", within_s=40)
        eventually(lambda: prometheus.value("loadmanager_stop_lateness_seconds_count") == 1, 15)

    def numbers(self, expression):
        """Its numbers so far, as a dashboard draws them with all values of its variables chosen."""
        for name, value in {"__rate_interval": "5s", "__range": "1m"}.items():
            expression = expression.replace(f"${name}", value)
        expression = re.sub(r'"\$\w+"', '".*"', expression)
        return self.prometheus.numbers_between(expression, self.start, time.time())


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    port, folder = find_free_port(), tmp_path_factory.mktemp("watched")
    viewer = {"name": "prometheus", "token": VIEWER, "role": "viewer", "tenants": ["*"]}
    hook = {"id": "hook", "type": "webhook", "url": "http://127.0.0.1:9/", "allowPrivateAddresses": True}
    config = base_config(
        cluster_config(f"http://127.0.0.1:{port}"),
        security={"apiTokens": [viewer]},
        orchestrator={"metricsPollIntervalSeconds": 1, "startTimeoutSeconds": 10},
        metrics={"locustExporterNames": True},
        notifications=[hook],
    )
    manager = LoadManager(folder, config).start()
    try:
        hooks = {
            "CONTROL_PLANE_URL": manager.url,
            "CONTROL_PLANE_TOKEN": CALLBACK_TOKEN,
            "METRICS_PUSH_INTERVAL": "1",
        }
        with Target(fail_ratio=0.2) as target:
            host = ["--host", target.url]
            with LocustCluster(LOCUSTFILE, 2, hooks, host, worker_args=host, web_port=port) as locust:
                with Prometheus(folder, urlsplit(manager.url).netloc, VIEWER) as prometheus:
                    yield Watched(manager, locust, prometheus)
    finally:
        manager.end()


def test_prometheus_has_the_numbers_of_a_real_run(watched):
    numbers = watched.final["lastMetrics"]
    selection = f'{{run="{watched.run["id"]}"}}'
    assert max(watched.numbers("loadmanager_run_users" + selection)) == 6
    requests = watched.numbers("loadmanager_run_requests_total" + selection)
    assert requests == sorted(requests), "the counter went back"
    assert 0 < requests[-1] <= numbers["totalRequests"]
    assert 0 < watched.numbers("loadmanager_run_failure_ratio" + selection)[-1] < 0.5
    counted = watched.numbers("loadmanager_run_request_duration_seconds_count" + selection)
    assert counted == sorted(counted) and counted[-1] <= numbers["totalRequests"]
    assert watched.prometheus.value("loadmanager_stop_lateness_seconds_sum") < 5
    eventually(
        lambda: not watched.prometheus.query("loadmanager_run_users"), 10, what="the series have ended"
    )


EXPORTER_QUERIES = [
    "locust_up",
    "locust_running",
    "locust_users",
    "locust_workers_count",
    "locust_slaves_count",
    "locust_workers_running_count",
    "locust_workers_hatching_count",
    "locust_workers_missing_count",
    "locust_worker_detail",
    "sum(locust_requests_current_rps)",
    'locust_requests_num_requests{method=~""}',
    'locust_requests_num_failures{method=~""}',
    "locust_requests_fail_ratio * 100",
    'sum(rate(locust_requests_num_requests{method=~".+"}[5s]))',
    *(
        f'sum(locust_requests_{name}{{method=~".+"}}) by (method, name)'
        for name in (
            "avg_content_length",
            "min_response_time",
            "max_response_time",
            "avg_response_time",
            "median_response_time",
            "num_failures",
            "current_fail_per_sec",
            "num_requests",
            "current_rps",
        )
    ),
    "sum(locust_errors) by (method, name, error)",
    'locust_users{projectId=~"acme", runid=~".+"}',
]


@pytest.mark.parametrize("query", EXPORTER_QUERIES)
def test_queries_on_the_names_of_locust_exporter_have_data(watched, query):
    assert watched.numbers(query)


def test_percentiles_under_the_exporter_s_names_work(watched):
    """The exporter itself reads a key that Locust no longer has, and says 0."""
    median, p95 = (
        watched.numbers(f"locust_requests_current_response_time_percentile_{which}") for which in (50, 95)
    )
    assert 0 < max(median) <= max(p95)


# ---- dashboards and alerts ------------------------------------------------------


def test_shipped_files_are_what_the_program_writes(tmp_path):
    from sys import executable

    done = subprocess.run(
        [executable, str(ROOT / "loadmanager.py"), "grafana", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    written = {
        str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()
    }
    shipped_in = ROOT / "deploy" / "grafana"
    shipped = {
        str(path.relative_to(shipped_in)): path.read_text()
        for path in shipped_in.rglob("*")
        if path.is_file()
    }
    assert written == shipped, f"run: {loadmanager.GRAFANA_COMMAND}"


PANEL_QUERIES = [
    pytest.param(target["expr"], id=f"{key}: {panel['title']} {target['refId']}")
    for key in loadmanager.BOARDS
    for panel in loadmanager.dashboard(key)["panels"]
    for target in panel["targets"]
]


@pytest.mark.parametrize("query", PANEL_QUERIES)
def test_query_of_each_panel_has_data_of_a_real_run(watched, query):
    eventually(lambda: watched.numbers(query), 15, what=f"{query} has data")


@pytest.mark.parametrize("key", loadmanager.BOARDS)
def test_variables_of_a_dashboard_offer_the_run_s_values(watched, key):
    offered = {}
    for variable in loadmanager.dashboard(key)["templating"]["list"][1:]:
        series, name = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]).groups()
        series = re.sub(r'"\$\w+"', '".*"', series)
        how = {"match[]": series, "start": watched.start, "end": time.time()}
        offered[name] = watched.prometheus.get(f"label/{name}/values", **how)
    assert (offered["tenant"], offered["environment"]) == (["acme"], ["dev"])
    if key == "run":
        assert offered["run"] == [watched.run["id"]]
    else:
        assert offered["instance"] == [urlsplit(watched.manager.url).netloc]


@pytest.mark.parametrize("key", loadmanager.BOARDS)
def test_dashboard_is_one_as_grafana_s_own_library_reads_it(key):
    """Every key is one that Grafana's published schema knows, with a value that it takes."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    document = loadmanager.dashboard(key)
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(document)))
    assert_within(document, read, key)
    ids = [panel["id"] for panel in document["panels"]]
    assert len(ids) == len(set(ids))
    taken = set()
    for panel in document["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, (
            f"{panel['title']} lies over another panel"
        )
        taken |= cells


def assert_within(ours, read, where):
    """What we wrote came through Grafana's types: nothing was dropped, nothing changed."""
    if isinstance(ours, dict):
        for name, value in ours.items():
            assert name in read, f"{where}.{name} is no key of Grafana's"
            assert_within(value, read[name], f"{where}.{name}")
    elif isinstance(ours, list):
        assert len(ours) == len(read), where
        for index, (one, other) in enumerate(zip(ours, read, strict=True)):
            assert_within(one, other, f"{where}[{index}]")
    else:
        assert ours == read, where


def test_prometheus_takes_the_rules_and_none_fires_in_a_good_run(watched):
    (group,) = watched.prometheus.get("rules")["groups"]
    assert {rule["name"] for rule in group["rules"]} == {
        alert.name for row in loadmanager.METRICS for alert in row.alerts
    }
    assert {rule["health"] for rule in group["rules"]} == {"ok"}
    assert [rule["name"] for rule in group["rules"] if rule["state"] == "firing"] == []


def test_promtool_takes_the_files_for_prometheus():
    folder = ROOT / "deploy" / "grafana" / "prometheus"
    for command in (
        ["check", "rules", "loadmanager.rules.yml"],
        ["check", "config", "--syntax-only", "prometheus.yml"],
    ):
        done = subprocess.run(["promtool", *command], cwd=folder, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stdout + done.stderr


BAD_TIMES = {  # by alert: series every 10 s while all is well, and from the fault on
    "LoadManagerPollFailing": (
        'loadmanager_run_unanswered_seconds{cluster="one",run="r"}',
        "0x6",
        "10+10x12",
    ),
    "LoadManagerStopLate": ('loadmanager_run_overdue_seconds{cluster="one",run="r"}', "0x6", "10+10x12"),
    "LoadManagerRunLost": (
        'loadmanager_runs_ended_total{tenant="t",environment="e",reason="lost"}',
        "0x6",
        "1x12",
    ),
    "LoadManagerWriterBehind": ("loadmanager_writer_lag_seconds", "0x6", "6+10x12"),
    "LoadManagerNotWriting": ("loadmanager_writer_up", "1x6", "0x12"),
    "LoadManagerUnforeseenError": ("loadmanager_unforeseen_errors_total", "0x6", "1x12"),
    "LoadManagerDown": ("loadmanager_build_info", "1x6", "stale _x11"),
}


def test_every_alert_has_its_bad_time():
    assert set(BAD_TIMES) == {alert.name for row in loadmanager.METRICS for alert in row.alerts}


@pytest.mark.parametrize("name", BAD_TIMES)
def test_alert_fires_in_its_bad_time_and_not_before(tmp_path, name):
    series, good, bad = BAD_TIMES[name]
    rules = tmp_path / "rules.yml"
    rules.write_text(loadmanager.alert_rules())
    alert = next(
        rule for rule in yaml.safe_load(rules.read_text())["groups"][0]["rules"] if rule["alert"] == name
    )
    labels = dict(re.findall(r'(\w+)="(\w+)"', series))
    texts = {
        key: re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda match: labels[match.group(1)], text)
        for key, text in alert["annotations"].items()
    }
    firing = {"exp_labels": {**labels, **alert["labels"]}, "exp_annotations": texts}
    test = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": "10s",
        "tests": [
            {
                "interval": "10s",
                "input_series": [{"series": series, "values": f"{good} {bad}"}],
                "alert_rule_test": [
                    {"eval_time": "60s", "alertname": name, "exp_alerts": []},
                    {"eval_time": "180s", "alertname": name, "exp_alerts": [firing]},
                ],
            }
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    done = subprocess.run(
        ["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stdout + done.stderr
