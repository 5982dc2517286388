"""A web server for a folder that heeds ranges and fails as it is told to."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

#: What may go wrong with one answer: a status, or one of these.
FAULTS = ("drop", "reset", "hang", "slow", "short", "flip", "ignore")
Plan = Callable[[str, int, int], str | int | None]


class FaultyServer(ThreadingHTTPServer):
    """`plan(name, first byte, how often that place was asked for before)` gives the fault of an answer.

    drop: half the body, then the connection ends. reset: the connection ends without an answer. hang: no
    answer for `hang_s`. slow: the body in ten pieces over `slow_s`. short: half the body, said to be all of
    it. flip: a bit of the body is another. ignore: the whole file, whatever part was asked for.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.plan: Plan = lambda name, start, before: None
        self.hang_s, self.slow_s = 30.0, 0.3
        self.lock = threading.Lock()
        self.forget()

    def forget(self) -> None:
        """Count from zero."""
        self.asked: Counter[tuple[str, int]] = Counter()
        self.sent: Counter[str] = Counter()  # bytes by name
        self.ranges: Counter[tuple[str, int, int]] = Counter()

    @property
    def url(self) -> str:
        """Address of the folder."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are expected."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: FaultyServer

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server, name = self.server, self.path.lstrip("/")
        path = server.root / name
        if not path.is_file():
            return self._plain(404)
        whole = path.read_bytes()
        start, end = 0, len(whole)
        stated = self.headers.get("Range")
        if stated:
            first, _, last = stated.removeprefix("bytes=").partition("-")
            start, end = int(first), min(len(whole), int(last) + 1 if last else len(whole))
        with server.lock:
            before = server.asked[name, start]
            server.asked[name, start] += 1
            server.ranges[name, start, end] += 1
        fault = server.plan(name, start, before)
        if isinstance(fault, int):
            return self._plain(fault)
        if fault == "hang":
            time.sleep(server.hang_s)
        if fault in ("hang", "reset"):
            self.close_connection = True
            return None
        if fault == "ignore":
            stated, start, end = None, 0, len(whole)
        if start >= len(whole):
            return self._plain(416, f"bytes */{len(whole)}")
        body = bytearray(whole[start:end])
        if fault == "flip":
            body[len(body) // 2] ^= 16
        if fault == "short":
            del body[len(body) // 2 :]
        self.send_response(206 if stated else 200)
        self.send_header("Content-Length", str(len(body)))
        if stated:
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(whole)}")
        self.end_headers()
        if fault == "drop":
            del body[len(body) // 2 :]
            self.close_connection = True
        for piece in self._pieces(bytes(body), 10 if fault == "slow" else 1):
            self.wfile.write(piece)
            self.wfile.flush()
        with server.lock:
            server.sent[name] += len(body)
        return None

    def _pieces(self, body: bytes, count: int) -> Iterator[bytes]:
        step = max(1, -(-len(body) // count))
        for at in range(0, len(body), step):
            if count > 1:
                time.sleep(self.server.slow_s / count)
            yield body[at : at + step]

    def _plain(self, status: int, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()


@contextmanager
def serving(root: Path) -> Iterator[FaultyServer]:
    """A running server."""
    server = FaultyServer(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
