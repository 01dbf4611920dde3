"""What a user would take instead, for `make bench`: the same two reads by Flask and FastAPI, and by nothing
but a socket, the most that Python gives.

    python tests/bench_servers.py flask|waitress|fastapi|bare FILE

FILE has the answers of the API as JSON: a list of runs, which the servers keep as they come. Prints its
address, and serves GET /v1/tests/{id} and GET /v1/tests?limit=50 until it is ended. Each knows one token."""

from __future__ import annotations

import json
import selectors
import socket
import sys
from pathlib import Path
from typing import Any

TOKEN = "measured-api"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"


def flask_app(runs: list[dict[str, Any]]) -> Any:
    from flask import Flask, abort, jsonify, request

    app, by_id = Flask("bench"), {run["id"]: run for run in runs}

    @app.before_request
    def only_with_token() -> None:
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            abort(401)

    @app.get("/v1/tests/<run_id>")
    def get_run(run_id: str) -> Any:
        return jsonify(by_id[run_id]) if run_id in by_id else abort(404)

    @app.get("/v1/tests")
    def get_runs() -> Any:
        return jsonify(runs[: request.args.get("limit", 50, int)])

    return app


def fastapi_app(runs: list[dict[str, Any]]) -> Any:
    from fastapi import Depends, FastAPI, Header, HTTPException
    from fastapi.responses import JSONResponse

    async def only_with_token(authorization: str = Header("")) -> None:
        if authorization != f"Bearer {TOKEN}":
            raise HTTPException(401)

    app = FastAPI(dependencies=[Depends(only_with_token)])
    by_id = {run["id"]: run for run in runs}

    @app.get("/v1/tests/{run_id}")
    async def get_run(run_id: str) -> JSONResponse:
        if run_id not in by_id:
            raise HTTPException(404)
        return JSONResponse(by_id[run_id])

    @app.get("/v1/tests")
    async def get_runs(limit: int = 50) -> JSONResponse:
        return JSONResponse(runs[:limit])

    return app


def serve_bare(listener: socket.socket, runs: list[dict[str, Any]]) -> None:
    """Answer anything with the one run, or with fifty, from bytes made before: no parsing, no token."""
    one, page = (HEAD % (len(raw), raw) for raw in (_dump(runs[0]), _dump(runs[:50])))
    selector = selectors.DefaultSelector()
    listener.setblocking(False)
    selector.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                connection, _ = listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(connection, selectors.EVENT_READ)
                continue
            try:
                received = key.fileobj.recv(65536)
                if received:
                    key.fileobj.sendall(page if b"?limit" in received[:40] else one)
                    continue
            except OSError:
                pass
            selector.unregister(key.fileobj)
            key.fileobj.close()


def _dump(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def main() -> None:
    kind, runs = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    if kind == "bare":
        serve_bare(listener, runs)
    elif kind == "waitress":
        import waitress

        waitress.serve(flask_app(runs), sockets=[listener], threads=8, connection_limit=1000)
    elif kind == "flask":
        from werkzeug.serving import WSGIRequestHandler, make_server

        WSGIRequestHandler.protocol_version = "HTTP/1.1"
        WSGIRequestHandler.log_request = lambda *_, **__: None
        make_server("127.0.0.1", 0, flask_app(runs), threaded=True, fd=listener.fileno()).serve_forever()
    elif kind == "fastapi":
        import uvicorn

        config = uvicorn.Config(fastapi_app(runs), log_level="error", access_log=False)
        uvicorn.Server(config).run(sockets=[listener])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
