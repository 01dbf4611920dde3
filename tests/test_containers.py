"""Container, Compose and Kubernetes files: valid by their schemas, and what they start works."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from locust_process import LocustCluster, find_free_port
from target import Target
from test_lifecycle import start_run
from test_scaling import cluster
from waiting import eventually

DEPLOY = ROOT / "deploy"
TOKENS = {"api-token": "api-token-of-a-test", "callback-token": "callback-token-of-a-test"}
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
TOOLS = Path(sys.executable).parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
COMPOSE_VARIABLES = {
    "API_TOKEN": "a",
    "CALLBACK_TOKEN": "b",
    "POSTGRES_PASSWORD": "c",
    "GRAFANA_PASSWORD": "d",
}


def manifest(kind: str, name: str) -> dict:
    documents = [one for path in MANIFESTS for one in yaml.safe_load_all(path.read_text())]
    [found] = [one for one in documents if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def container_of(deployment: str) -> dict:
    [container] = manifest("Deployment", deployment)["spec"]["template"]["spec"]["containers"]
    return container


# ---- Dockerfiles -------------------------------------------------------------


def dockerfile(stage: str) -> list[tuple[str, str]]:
    """The instructions of one stage of deploy/Dockerfile, with their arguments."""
    text = re.sub(r"\\\n\s*", "", (DEPLOY / "Dockerfile").read_text())
    lines = [line.partition(" ")[::2] for line in text.splitlines() if line and not line.startswith("#")]
    start = next(
        number
        for number, (word, rest) in enumerate(lines)
        if word == "FROM" and rest.endswith(f" AS {stage}")
    )
    end = next((number for number in range(start + 1, len(lines)) if lines[number][0] == "FROM"), len(lines))
    return [(word, rest.strip()) for word, rest in lines[start + 1 : end]]


@pytest.mark.parametrize("name", ["deploy/Dockerfile", "locust/Dockerfile"])
def test_dockerfile_has_nothing_that_hadolint_finds(name):
    command = [TOOLS / "hadolint", "--no-color", "--failure-threshold", "warning", ROOT / name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_image_copies_is_all_that_the_build_sees():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")}
    copied = {rest.split()[0] for word, rest in dockerfile("base") if word == "COPY"}
    assert copied == allowed and all((ROOT / name).is_file() for name in copied)


def test_commands_of_the_image_serve_and_its_health_check_tells_the_truth(tmp_path):
    """No daemon builds it here: the same files and commands in a folder that cannot be written."""
    image, data, port = tmp_path / "image", tmp_path / "data", find_free_port()
    image.mkdir()
    data.mkdir()
    said = dict(dockerfile("base"))  # the last of each word: COPY and RUN are read one by one
    for word, rest in dockerfile("base"):
        if word == "COPY":
            shutil.copy(ROOT / rest.split()[0], image)
    runs = [rest for word, rest in dockerfile("base") if word == "RUN"]
    compiling = next(rest.partition(" && ")[0] for rest in runs if "compileall" in rest)
    subprocess.run(["sh", "-c", compiling.replace("python", sys.executable, 1)], cwd=image, check=True)
    [bytecode] = image.glob("__pycache__/*.pyc")
    assert bytecode.read_bytes()[4] == 1, "bytecode is checked by the file's time, which a layer may change"
    config = {
        "server": {"host": "127.0.0.1", "port": port},
        "security": {"apiToken": "a", "locustCallbackToken": "b"},
        "locustClusters": [],
        "storage": {"url": f"sqlite:///{data}/loadmanager.db"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = json.loads(said["ENTRYPOINT"]) + json.loads(said["CMD"])
    command = [sys.executable, *command[1:-1], str(tmp_path / "config.json")]
    health = json.loads(said["HEALTHCHECK"].partition("CMD ")[2])
    health = [sys.executable, *(word.replace("8080", str(port)) for word in health[1:])]
    before = sorted(path.name for path in image.rglob("*"))
    image.chmod(0o555)
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=image, stderr=log, env=ENVIRONMENT)
    try:
        eventually(lambda: subprocess.run(health, stderr=subprocess.DEVNULL).returncode == 0, 20)
    finally:
        server.terminate()
        assert server.wait(10) == 0, (tmp_path / "log").read_text()
    assert subprocess.run(health, stderr=subprocess.DEVNULL).returncode != 0, "healthy without a server"
    assert sorted(path.name for path in image.rglob("*")) == before, "it writes beside the program"
    assert said["USER"] == "10001:10001" and said["VOLUME"] == "/data"


# ---- Compose -----------------------------------------------------------------


def compose(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = ["docker-compose", "--file", str(DEPLOY / "compose.yaml"), *arguments]
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **variables}
    return subprocess.run(command, cwd=DEPLOY, capture_output=True, text=True, env=environment)


def test_compose_file_is_valid_and_asks_for_each_secret():
    done = compose("config", **COMPOSE_VARIABLES)
    assert done.returncode == 0, done.stderr
    assert {"loadmanager", "postgres", "locust-master", "locust-worker", "prometheus", "grafana"} == set(
        yaml.safe_load(done.stdout)["services"]
    )
    for name in COMPOSE_VARIABLES:
        without = {**COMPOSE_VARIABLES, name: ""}
        refused = compose("config", "-q", **without)
        assert refused.returncode != 0 and name in refused.stderr + refused.stdout, name


def test_files_that_compose_mounts_and_builds_are_there():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    mounted = [one.split(":")[0] for service in services.values() for one in service.get("volumes", ())]
    for name in (one for one in mounted if one.startswith(".")):
        assert (DEPLOY / name).exists(), name
    assert (DEPLOY / services["locust-master"]["build"] / "Dockerfile").is_file()


def test_configuration_of_compose_is_good_and_its_services_are_reached_by_name(tmp_path):
    checked = subprocess.run(
        [sys.executable, ROOT / "loadmanager.py", "check", "-config", DEPLOY / "compose/loadmanager.yaml"],
        capture_output=True,
        text=True,
        env={**ENVIRONMENT, "API_TOKEN": "one of mine", "CALLBACK_TOKEN": "another"},
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr
    config = yaml.safe_load((DEPLOY / "compose/loadmanager.yaml").read_text())
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert (
        config["locustClusters"][0]["baseUrl"] == "http://locust-master:8089" and "locust-master" in services
    )
    hooks = services["locust-master"]["environment"]
    assert hooks["CLUSTER_ID"] == config["locustClusters"][0]["id"]
    assert hooks["CONTROL_PLANE_URL"] == f"http://loadmanager:{config['server']['port']}"


def test_prometheus_configuration_of_compose_passes_promtool(tmp_path):
    shutil.copy(DEPLOY / "compose/prometheus.yml", tmp_path)
    shutil.copy(DEPLOY / "grafana/prometheus/loadmanager.rules.yml", tmp_path)
    command = ["promtool", "check", "config", tmp_path / "prometheus.yml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- Kubernetes --------------------------------------------------------------


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifest_is_valid_by_the_schemas_of_kubernetes(path):
    command = [TOOLS / "kubernetes-validate", "--strict", "-k", "1.32", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def mounted_config(folder: Path) -> Path:
    """The ConfigMap and the Secret as the container sees them, below a folder."""
    secrets = folder / "secrets"
    secrets.mkdir()
    assert set(manifest("Secret", "loadmanager")["stringData"]) == set(TOKENS)
    for name, token in TOKENS.items():
        (secrets / name).write_text(token)
    places = {one["name"]: one["mountPath"] for one in container_of("loadmanager")["volumeMounts"]}
    text = manifest("ConfigMap", "loadmanager")["data"]["config.yaml"]
    text = text.replace(places["secrets"], str(secrets)).replace(places["data"], str(folder))
    (folder / "config.yaml").write_text(text)
    return folder / "config.yaml"


def check(config: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "loadmanager.py", "check", "-config", config]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)


def test_configuration_in_the_config_map_is_good_and_the_example_tokens_are_refused(tmp_path):
    config = mounted_config(tmp_path)
    checked = check(config)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    for name, token in manifest("Secret", "loadmanager")["stringData"].items():
        (tmp_path / "secrets" / name).write_text(token)
    refused = check(config)
    assert refused.returncode == 2 and "is the shipped example's" in refused.stdout + refused.stderr


def merged(whole: object, patch: object) -> object:
    """A strategic merge patch of Kubernetes applied: lists of things with a name are merged by it."""
    if isinstance(whole, dict) and isinstance(patch, dict):
        kept = {name: merged(whole[name], value) if name in whole else value for name, value in patch.items()}
        return {name: value for name, value in {**whole, **kept}.items() if value is not None}
    if isinstance(whole, list) and isinstance(patch, list) and all("name" in one for one in [*whole, *patch]):
        names = {one["name"]: one for one in whole}
        return [
            *{**names, **{one["name"]: merged(names.get(one["name"], {}), one) for one in patch}}.values()
        ]
    return patch


def test_patch_for_a_standby_makes_a_valid_deployment_whose_configuration_is_good(tmp_path):
    patch = yaml.safe_load((DEPLOY / "kubernetes" / "standby" / "patch.yaml").read_text())
    deployment = merged(manifest("Deployment", "loadmanager"), patch)
    (tmp_path / "deployment.yaml").write_text(yaml.safe_dump(deployment))
    command = [TOOLS / "kubernetes-validate", "--strict", "-k", "1.32", tmp_path / "deployment.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pod = deployment["spec"]["template"]["spec"]
    [data] = [one for one in pod["volumes"] if one["name"] == "data"]
    assert data == {"name": "data", "emptyDir": {}}, "two pods cannot share the claim"
    values = {"status.podIP": "10.1.2.3", "database-url": "postgresql://lm:x@127.0.0.1/lm"}
    environment = {}
    for one in pod["containers"][0]["env"]:
        source = one.get("valueFrom", {})
        key = source.get("fieldRef", {}).get("fieldPath") or source.get("secretKeyRef", {}).get("key")
        environment[one["name"]] = one.get("value") or values[key]
    for name, value in environment.items():
        environment[name] = re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], value)
    assert environment["LOADMANAGER_STANDBY_ADVERTISEDURL"] == "http://10.1.2.3:8080"
    command = [sys.executable, ROOT / "loadmanager.py", "check", "-config", mounted_config(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    # The variables are read: one that is missing is missed.
    del environment["LOADMANAGER_STANDBY_ADVERTISEDURL"]
    done = subprocess.run(command, capture_output=True, text=True, env={**ENVIRONMENT, **environment})
    assert done.returncode == 2 and "standby.advertisedUrl" in done.stdout + done.stderr


def test_probes_ask_for_routes_that_answer_without_a_token(load_manager):
    lm = load_manager()
    container = container_of("loadmanager")
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        path = container[probe]["httpGet"]["path"]
        assert urllib.request.urlopen(lm.url + path, timeout=5).status == 200, f"{probe}: {path}"
    pod = manifest("Deployment", "loadmanager")["spec"]["template"]["spec"]
    assert pod["enableServiceLinks"] is False, "a Service's variables would override the configuration"


def test_role_allows_what_the_launcher_s_commands_need_and_names_the_same_deployment():
    rules = manifest("Role", "loadmanager")["rules"]
    launcher = yaml.safe_load(manifest("ConfigMap", "loadmanager")["data"]["config.yaml"])["locustClusters"][
        0
    ]["launcher"]
    deployment = next(word for word in launcher["scale"] if word.startswith("deployment/")).partition("/")[2]
    assert manifest("Deployment", deployment)["spec"]["replicas"] == 0
    allowed = {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}
    assert allowed == {
        ("deployments", "get"),
        ("deployments/scale", "get"),
        ("deployments/scale", "update"),
        ("deployments/scale", "patch"),
    }
    assert all(rule["resourceNames"] == [deployment] for rule in rules)
    for command in (launcher["scale"], launcher["status"]):
        assert (
            command[command.index("--namespace") + 1]
            == manifest("Role", "loadmanager")["metadata"]["namespace"]
        )


KUBECTL = '''#!{python}
"""A kubectl with one deployment: its replicas are real Locust workers, as their container starts them."""
import os, pathlib, signal, subprocess, sys
folder = pathlib.Path(__file__).parent
with (folder / "calls").open("a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
namespace, name, *words = sys.argv[1:]
assert (namespace, name) == ("--namespace", "load"), sys.argv
pids = [int(path.stem) for path in folder.glob("*.pid")]
if words == ["get", "deployment/locust-worker", "--output", "jsonpath={{.status.readyReplicas}}"]:
    print(len(pids) or "", end="")
    sys.exit()
assert words[:2] == ["scale", "deployment/locust-worker"] and words[2].startswith("--replicas="), words
wanted = int(words[2].partition("=")[2])
for pid in pids[wanted:]:
    os.kill(pid, signal.SIGTERM)
    (folder / f"{{pid}}.pid").unlink()
for _ in range(wanted - len(pids)):
    worker = subprocess.Popen({worker!r}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                              stdin=subprocess.DEVNULL, start_new_session=True)
    (folder / f"{{worker.pid}}.pid").touch()
print("deployment.apps/locust-worker scaled")
'''


@pytest.fixture
def in_kubernetes(load_manager, tmp_path):
    """Load Manager with the ConfigMap's cluster, a real master, and a kubectl that starts real workers."""
    folder = tmp_path / "kubectl"
    folder.mkdir()
    with Target() as target:
        lm, port = load_manager(), find_free_port()
        hooks = {"CONTROL_PLANE_URL": lm.url, "CONTROL_PLANE_TOKEN": TOKENS["callback-token"]}
        locustfile = ROOT / "locust/locustfile.py"
        master = LocustCluster(locustfile, 1, hooks, ["--host", target.url], web_port=port)
        master._worker_count = 1
        master._start_master()
        arguments = [
            "127.0.0.1" if word == "locust-master" else word for word in container_of("locust-worker")["args"]
        ]
        worker = [sys.executable, "-m", "locust", "-f", str(locustfile), *arguments]
        worker += ["--master-port", str(master._bind_port)]
        kubectl = folder / "kubectl"
        kubectl.write_text(KUBECTL.format(python=sys.executable, worker=worker))
        kubectl.chmod(0o755)
        # a kubectl of this machine must never be asked
        lm.environment["PATH"] = f"{folder}:{os.environ['PATH']}"
        [shipped] = yaml.safe_load(mounted_config(tmp_path).read_text())["locustClusters"]
        assert shipped["launcher"]["usersPerWorker"] == 500 and shipped["launcher"]["idleSeconds"] == 600
        shipped["launcher"] |= {"usersPerWorker": 2, "idleSeconds": 2}  # so that it scales within a test
        lm.config["locustClusters"] = [{**shipped, "baseUrl": f"http://127.0.0.1:{port}"}]
        lm.config["security"]["locustCallbackToken"] = TOKENS["callback-token"]
        master.wait_ready(0)
        lm.restart()
        lm.calls = lambda: (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
        yield lm
        lm.end()
        for path in folder.glob("*.pid"):
            try:
                os.kill(int(path.stem), 9)
            except OSError:
                pass
        master.stop()


def test_run_scales_the_deployment_by_kubectl_and_the_workers_carry_its_load(in_kubernetes):
    lm = in_kubernetes
    run = start_run(lm, tenantId="tenant-1", envId="staging", targetUsers=5, spawnRate=10, durationSeconds=4)
    scaled = "--namespace load scale deployment/locust-worker --replicas="
    assert [line for line in lm.calls() if " scale " in line] == [scaled + "3"], (
        "5 users at 2 for each worker"
    )
    assert len(cluster(lm)["workers"]) == 3
    final = lm.wait_for(run["id"], "Finished")
    assert final["lastMetrics"]["totalRequests"] > 0
    eventually(lambda: lm.calls()[-1] == scaled + "0", 20, what="the workers go when no run needs them")
    eventually(lambda: not cluster(lm)["workers"], 20, what="the workers have left the master")
