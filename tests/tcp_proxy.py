"""A TCP proxy that can stop forwarding without a word, as a network does that drops packets, or forward late,
as one does that is far away."""

from __future__ import annotations

import queue
import socket
import threading
import time


class TcpProxy:
    """with TcpProxy(port) as proxy: proxy.port is forwarded to 127.0.0.1:port; drop() and forward().
    target_port: where connections go that are made from now on.
    delay_s: how much later a byte arrives, in each direction; as many as you like are under way."""

    def __init__(self, target_port: int, delay_s: float = 0.0) -> None:
        self.target_port = target_port
        self.delay_s = delay_s
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

    def saw(self, received: bytes) -> None:
        """Called with all that comes, in both directions, before it is forwarded."""

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
            server = socket.create_connection(("127.0.0.1", self.target_port))
        except OSError:
            client.close()
            return
        self._sockets += [client, server]
        for source, sink in ((client, server), (server, client)):
            under_way: queue.Queue[tuple[float, bytes]] = queue.Queue()
            threading.Thread(target=self._receive, args=(source, under_way), daemon=True).start()
            threading.Thread(target=self._send, args=(sink, under_way), daemon=True).start()

    def _receive(self, source: socket.socket, under_way: queue.Queue) -> None:
        received = b"not yet"
        while received:
            try:
                received = source.recv(65536)
            except OSError:
                received = b""
            self.saw(received)
            under_way.put((time.monotonic() + self.delay_s, received))

    def _send(self, sink: socket.socket, under_way: queue.Queue) -> None:
        try:
            while True:
                due, received = under_way.get()
                time.sleep(max(0.0, due - time.monotonic()))
                self._forwards.wait()
                if not received:
                    break
                sink.sendall(received)
        except OSError:
            pass
        try:
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass
