"""A real HTTP server that misbehaves by script, for test_pool.py and test_endpoints.py."""

import json
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HANG_SECONDS = 60


class NotFound(Exception):
    """Raised by `answer` where there is nothing at the path."""


class ScriptedServer:
    """Answers POST with `answer(path, body)`; each word of `script` spoils one POST, `for_ever` all others.

    Words: a status ("500"), a status and its Retry-After ("429:1"), garbage, empty, truncated, reset, hang.
    """

    def __init__(self, answer: Callable[[str, Any], Any], port: int = 0) -> None:
        self.answer = answer
        self.script: deque[str] = deque()
        self.for_ever = ""
        self.health = ""  # "" or a word
        self.models: Any = {"data": [{"id": "m", "max_model_len": 128}]}
        self.posts: list[tuple[float, Any]] = []
        self.gets: list[str] = []
        self.authorization: set[str | None] = set()
        self.most_at_once = 0
        self._now = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.gets.append(self.path)
                server._spoilt_or(self, server.health, lambda: server.models if self.path == "/v1/models" else None)

            def do_POST(self) -> None:
                server._post(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 64
            daemon_threads = True
            allow_reuse_address = True

            def handle_error(self, *_: Any) -> None:
                pass  # the client has gone

        self._http = Server(("127.0.0.1", port), Handler)
        self.port = self._http.server_port
        self.address = f"http://127.0.0.1:{self.port}"
        self._open: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def _post(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        with self._lock:
            self.posts.append((time.monotonic(), body))
            self.authorization.add(handler.headers.get("Authorization"))
            word = self.script.popleft() if self.script else self.for_ever
            self._open.add(handler.connection)
        self._spoilt_or(handler, word, lambda: self._counted(handler.path, body))

    def _counted(self, path: str, body: Any) -> Any:
        """The answer. Counted until it is sent: a client may ask again before the call that sends it has returned."""
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            return self.answer(path, body)
        finally:
            with self._lock:
                self._now -= 1

    def _spoilt_or(self, handler: BaseHTTPRequestHandler, word: str, answer: Callable[[], Any]) -> None:
        match word.split(":"):
            case [""]:
                try:
                    self._send(handler, 200, json.dumps(answer()).encode())
                except NotFound:
                    self._send(handler, 404, b"not found")
            case ["garbage"]:
                self._send(handler, 200, b"<html>busy</html>")
            case ["empty"]:
                self._send(handler, 200, b"")
            case ["truncated"]:
                content = json.dumps(answer()).encode()
                self._send(handler, 200, content[: len(content) // 2], length=len(content))
                handler.close_connection = True
            case ["reset"]:
                reset(handler.connection)
                handler.close_connection = True
            case ["hang"]:
                self._over.wait(HANG_SECONDS)
                handler.close_connection = True
            case [status, *retry_after]:
                headers = {"Retry-After": retry_after[0]} if retry_after else {}
                if status == "302":
                    headers["Location"] = "/elsewhere"
                self._send(handler, int(status), b'{"error": "busy"}', **headers)

    @staticmethod
    def _send(
        handler: BaseHTTPRequestHandler, status: int, content: bytes, length: int | None = None, **headers: str
    ) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content) if length is None else length))
        handler.end_headers()
        handler.wfile.write(content)

    def die(self) -> None:
        """As by SIGKILL: nobody listens any more, and what is under way is reset."""
        self._http.shutdown()
        self._http.server_close()
        self._over.set()
        with self._lock:
            for connection in self._open:
                reset(connection)

    close = die


def reset(connection: socket.socket) -> None:
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    except OSError:
        pass  # closed already
