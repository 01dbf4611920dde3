"""A TCP proxy that can stop forwarding without a word, as a network does that drops packets."""

from __future__ import annotations

import socket
import threading


class TcpProxy:
    """with TcpProxy(port) as proxy: proxy.port is forwarded to 127.0.0.1:port; drop() and forward()."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._forwards = threading.Event()
        self._forwards.set()
        self._closed = False
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(self, *exc_info) -> None:
        self._closed = True
        self.cut()
        self._listener.close()
        self._forwards.set()

    def drop(self) -> None:
        """Take what is sent, and forward nothing."""
        self._forwards.clear()

    def forward(self) -> None:
        self._forwards.set()

    def cut(self) -> None:
        """End all connections."""
        for one in self._sockets:
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self._sockets = []

    def _accept(self) -> None:
        while not self._closed:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        self._forwards.wait()
        try:
            server = socket.create_connection(("127.0.0.1", self._target_port))
        except OSError:
            client.close()
            return
        self._sockets += [client, server]
        for source, sink in ((client, server), (server, client)):
            threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        try:
            while received := source.recv(65536):
                self._forwards.wait()
                sink.sendall(received)
        except OSError:
            pass
        self._forwards.wait()
        try:
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass
