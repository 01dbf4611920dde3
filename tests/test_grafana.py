"""Notifications of type grafana: one annotation for each run, whatever is tried again. Grafana is played
from its documentation of the annotations API, as no package of it can be had."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import cluster_config
from waiting import eventually, holds_for

import loadmanager

TOKEN = "glsa_the-token-of-a-service-account"


class Grafana:
    """GET, POST and PATCH of /api/annotations as its documentation has them. `refuses`: what it does not
    answer well; `forgets`: it takes what is posted and its answer is lost, so many times."""

    def __init__(self):
        self.annotations = []
        self.refuses = False
        self.forgets = 0
        self.asked = []
        grafana = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, document, status=200):
                body = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def body(self):
                return json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"null")

            def is_refused(self):
                grafana.asked.append((self.command, self.path))
                if self.headers["Authorization"] != f"Bearer {TOKEN}":
                    self.answer({"message": "Unauthorized"}, 401)
                elif grafana.refuses:
                    self.answer({"message": "Internal server error"}, 500)
                else:
                    return False
                return True

            def do_GET(self):
                if not self.is_refused():
                    tags = set(parse_qs(urlsplit(self.path).query)["tags"])
                    self.answer([one for one in grafana.annotations if tags <= set(one["tags"])])

            def do_POST(self):
                sent = self.body()
                if not self.is_refused():
                    added = {"id": len(grafana.annotations) + 1, **sent}
                    added.setdefault("timeEnd", added["time"])
                    grafana.annotations.append(added)
                    if grafana.forgets:
                        grafana.forgets -= 1
                        self.close_connection = True
                        return
                    self.answer({"message": "Annotation added", "id": added["id"]})

            def do_PATCH(self):
                sent = self.body()
                if not self.is_refused():
                    number = int(self.path.rpartition("/")[2])
                    grafana.annotations[number - 1].update(sent)
                    self.answer({"message": "Annotation patched"})

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def regions(self):
        return [one for one in self.annotations if one["timeEnd"] > one["time"]]


@pytest.fixture
def grafana():
    grafana = Grafana()
    yield grafana
    grafana.close()


def channel(grafana, **more):
    fixed = {"id": "dashboards", "type": "grafana", "url": grafana.url, "token": TOKEN}
    return {**fixed, "allowPrivateAddresses": True, **more}


def milliseconds(text):
    return int(loadmanager.parse_utc(text) * 1000)


def test_run_is_a_point_while_it_loads_and_then_a_region_from_its_start_to_its_end(
    load_manager, fake, grafana
):
    lm = load_manager(cluster_config(fake.url), notifications=[channel(grafana)])
    run = lm.create(thresholds=["errorRate < 1"]).json
    (point,) = eventually(lambda: grafana.annotations, 10, what="the annotation of the start")
    assert point["time"] == point["timeEnd"] == milliseconds(run["startedAt"])
    lm.post(f"/v1/tests/{run['id']}/stop")
    final = lm.wait_for(run["id"], "Finished")
    (region,) = eventually(grafana.regions, 10, what="the region")
    start, end = milliseconds(final["startedAt"]), milliseconds(final["finishedAt"])
    assert (region["time"], region["timeEnd"]) == (start, max(end, start + 1000))
    tags = {
        "loadmanager",
        f"run:{run['id']}",
        "tenant:acme",
        "environment:dev",
        "scenario:browse",
        f"verdict:{final['verdict']}",
    }
    assert set(region["tags"]) == tags
    assert "browse on acme/dev" in region["text"] and f"/#/runs/{run['id']}" in region["text"]
    assert len(grafana.annotations) == 1


def test_lost_answer_of_grafana_leaves_one_annotation(load_manager, fake, grafana):
    grafana.forgets = 1
    lm = load_manager(cluster_config(fake.url), notifications=[channel(grafana)])
    run = lm.create().json
    eventually(lambda: grafana.annotations, 10)
    lm.post(f"/v1/tests/{run['id']}/stop")
    eventually(grafana.regions, 20, what="the region")
    holds_for(lambda: len(grafana.annotations) == 1, 2, what="one annotation")


def test_region_is_made_when_grafana_is_back(load_manager, fake, grafana):
    grafana.refuses = True
    lm = load_manager(cluster_config(fake.url), notifications=[channel(grafana)])
    run = lm.create().json
    lm.post(f"/v1/tests/{run['id']}/stop")
    lm.wait_for(run["id"], "Finished")
    eventually(lambda: grafana.asked, 10, what="Grafana was asked")
    grafana.refuses = False
    eventually(grafana.regions, 30, what="the region")
    holds_for(lambda: len(grafana.annotations) == 1, 2, what="one annotation")


def test_run_that_never_loaded_is_not_annotated(load_manager, fake, fake_locust, grafana):
    lm = load_manager(cluster_config("http://127.0.0.1:9"), notifications=[channel(grafana)])
    assert lm.create().status == 502

    def delivered():
        (one,) = lm.get("/v1/notifications").json["deliveries"]
        return one["outcome"] == "delivered"

    eventually(delivered, 10)
    assert grafana.asked == []


def test_wrong_token_is_said_without_naming_it(load_manager, fake, grafana):
    lm = load_manager(cluster_config(fake.url), notifications=[channel(grafana, token="wrong-token-of-ours")])
    answer = lm.post("/v1/notifications/test", {"id": "dashboards"})
    assert answer.status == 502 and "HTTP 401" in answer.json["message"]
    assert "wrong-token-of-ours" not in lm.log() + answer.body.decode()


def test_test_message_is_an_annotation_of_now(load_manager, fake, grafana):
    lm = load_manager(cluster_config(fake.url), notifications=[channel(grafana)])
    assert lm.post("/v1/notifications/test", {"id": "dashboards"}).status == 200
    (annotation,) = grafana.annotations
    assert annotation["tags"] == ["loadmanager"] and "can reach dashboards" in annotation["text"]
