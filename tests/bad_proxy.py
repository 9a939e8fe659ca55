"""A proxy that misbehaves on purpose, in front of a real store on loopback."""

from __future__ import annotations

import http.client
import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit


class BadProxy(http.server.ThreadingHTTPServer):
    """Hands requests on to `target`.

    Attributes:
        faults: used up, one a request whose method and path begin with what `of` says: a status, `"reset"`, `"half"`
            (of the answer), `"lost"` (half of what is sent is read, none of it is handed on), `"unsaid"` (it is handed
            on, and the answer lost), or seconds to wait, as a float.
        of: such as "GET /bucket/train".
        seen: (method, path) of all requests.
    """

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(target).netloc
        self.faults: list[int | float | str] = []
        self.of = ""
        self.seen: list[tuple[str, str]] = []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is what is tried here."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: BadProxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def _hand_on(self) -> None:
        server = self.server
        server.seen.append((self.command, self.path))
        fault = server.faults.pop(0) if server.faults and f"{self.command} {self.path}".startswith(server.of) else None
        length = int(self.headers.get("Content-Length", 0))
        if fault == "lost":
            self.rfile.read(length // 2)
        if fault in ("lost", "reset"):
            self.close_connection = True
            self.connection.close()
            return
        content = self.rfile.read(length)
        if isinstance(fault, float):
            time.sleep(fault)
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        behind = http.client.HTTPConnection(server.target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name not in ("Expect", "Connection")}
        behind.request(self.command, self.path, content or None, headers)
        answer = behind.getresponse()
        body = answer.read()
        if fault == "unsaid":
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "server", "date"):
                self.send_header(name, value)
        size = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", size or "0")
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "half" else body)
        if fault == "half":
            self.close_connection = True
            self.connection.close()
        behind.close()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _hand_on


@contextmanager
def bad_proxy(target: str) -> Iterator[BadProxy]:
    """Such a proxy, running."""
    server = BadProxy(target)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
