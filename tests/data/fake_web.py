"""Runs a local HTTP server that misbehaves as asked, for the tests of downloads."""

from __future__ import annotations

import hashlib
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from s2a_cli.data.download import RemoteFile

CONTENT = bytes(range(256)) * 3000  # more than two chunks


@dataclass
class Served:
    """One path of the server: its bytes, and how they are sent."""

    content: bytes = b""
    status: int = 200
    ranges: bool = True  # understands Range
    breaks_after: int | None = None  # closes the connection after so many bytes of an answer
    times: int = 10**6  # how often it does so
    stalls: bool = False  # accepts, then sends nothing
    chunked: bool = False  # states no length
    requests: list[str | None] = field(default_factory=list)  # the Range header of each request


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        served = self.server.paths.get(self.path, Served(status=404))
        asked = self.headers.get("Range")
        served.requests.append(asked)
        if served.stalls:
            self.server.released.wait(10)
            self.close_connection = True
            return
        start, status = 0, served.status
        if status == 200 and asked and served.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            status = 206 if start < len(served.content) else 416
        body = served.content[start:] if status in (200, 206) else b"an error page"
        self.send_response(status)
        if served.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        else:
            self.send_header("Content-Length", str(len(body)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(served.content) - 1}/{len(served.content)}")
        self.end_headers()
        if served.breaks_after is not None and served.times > 0:
            served.times -= 1
            body = body[: served.breaks_after]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serve():
    """Yields the server's URL, without a slash at the end, and a dictionary of path -> Served to fill."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.paths, server.released = {}, threading.Event()
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", server.paths
        finally:
            server.released.set()
            server.shutdown()


def remote(url: str, *paths: str, content: bytes = CONTENT, name: str = "data.bin") -> RemoteFile:
    return RemoteFile(name, len(content), hashlib.sha256(content).hexdigest(), tuple(url + path for path in paths))
