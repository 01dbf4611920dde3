"""A stand-in for the API, for answers that a real Load Manager gives only rarely or slowly."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

RUN_ID = "1b4e28ba-2fa1-41d2-883f-0016d3cca427"


def run_document(**changes: Any) -> dict[str, Any]:
    run = {
        "id": RUN_ID, "tenantId": "acme", "envId": "dev", "locustClusterId": "one", "scenarioId": "browse",
        "targetUsers": 5, "spawnRate": 5.0,
        "status": "Finished", "createdAt": "2026-11-23T12:00:00.000Z", "createdBy": "api", "source": "api",
        "durationSeconds": 60,
        "startedAt": "2026-11-23T12:00:01.000Z", "finishedAt": "2026-11-23T12:01:01.000Z",
        "stopReason": "duration",
    }  # fmt: skip
    return {**run, **changes}


class StandInApi:
    """`answers`: (method, path) -> (status, body), or a list of them, one for each call; a dict or list
    is sent as JSON. `asked` has what came.

    `delays`: seconds before the answer of (method, path)."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], Any] = {}
        self.delays: dict[tuple[str, str], float] = {}
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                asked = (self.command, urlsplit(self.path).path)
                api.asked.append((*asked, dict(self.headers), json.loads(body) if body else None))
                time.sleep(api.delays.get(asked, 0))
                found = api.answers.get(
                    asked, (404, {"error": "not found", "message": "there is no such path"})
                )
                status, document = found.pop(0) if isinstance(found, list) else found
                data = document if isinstance(document, bytes) else json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = answer

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def has_run(self, **changes: Any) -> None:
        """The one run there is; it is answered to a create too."""
        run = run_document(**changes)
        self.answers["GET", "/v1/tests"] = (200, [run])
        self.answers["GET", f"/v1/tests/{run['id']}"] = (200, run)
        self.answers["POST", "/v1/tests"] = (201, run)

    def __enter__(self) -> StandInApi:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.server.shutdown()
        self.server.server_close()
