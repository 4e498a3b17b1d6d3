"""A web server and a small hub that hold adapters and misbehave as told: cut, stall, lie and change their minds."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socketserver
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

COMMIT = "c" * 40


class AdapterHost:
    """`files`: by path, with a leading slash. What goes wrong is set by path and counted down where it is a number."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.statuses: dict[str, list[int]] = {}  # answered first, in order
        self.cut_after: dict[str, list[int]] = {}  # bytes of the body, per answer in order; then whole
        self.lengths: dict[str, int] = {}  # what is claimed
        self.stalled: set[str] = set()  # nothing more after half of the file
        self.go_on = threading.Event()  # ends stalling
        self.etags: dict[str, str] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.takes_ranges = True
        self.change_after_cut: dict[str, bytes] = {}  # the file becomes this after its first cut
        self.asked: list[tuple[str, str | None]] = []  # path with query, Range
        self.received: list[dict[str, str]] = []
        self.sent_bytes: Counter[str] = Counter()
        self.hub_sha256: dict[str, str] = {}  # said instead of the true ones
        self.url = ""
        self.lock = threading.Lock()

    def put(self, prefix: str, directory: Path) -> None:
        for path in directory.iterdir():
            self.files[f"{prefix}/{path.name}"] = path.read_bytes()

    def count(self, path: str) -> int:
        return sum(asked.partition("?")[0] == path for asked, _ in self.asked)

    def etag(self, path: str) -> str:
        return self.etags.get(path) or f'"{hashlib.md5(self.files[path]).hexdigest()}"'

    def listing(self, repo: str) -> dict[str, Any]:
        prefix = f"/{repo}/resolve/{COMMIT}/"
        siblings = []
        for path, content in self.files.items():
            if path.startswith(prefix):
                sha256 = self.hub_sha256.get(path) or hashlib.sha256(content).hexdigest()
                git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
                entry: dict[str, Any] = {"rfilename": path[len(prefix) :], "size": len(content), "blobId": git}
                if path.endswith(".safetensors"):
                    entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
                siblings.append(entry)
        return {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}

    def bucket(self, path: str, prefix: str) -> bytes:
        """What S3 answers when it is asked what it has."""
        found = []
        for name, content in self.files.items():
            key = name.removeprefix(f"{path.rstrip('/')}/")
            if key != name and key.startswith(prefix):
                found.append(
                    f"<Contents><Key>{key}</Key><ETag>{self.etag(name)}</ETag><Size>{len(content)}</Size>"
                    "<LastModified>2026-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
                )
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><IsTruncated>false</IsTruncated>'
            f"<KeyCount>{len(found)}</KeyCount>{''.join(found)}</ListBucketResult>"
        ).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    host: AdapterHost

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        host = self.host
        path = self.path.partition("?")[0]
        wanted = self.headers.get("range")
        with host.lock:
            host.asked.append((self.path, wanted))
            host.received.append({key.lower(): value for key, value in self.headers.items()})
            status = host.statuses[path].pop(0) if host.statuses.get(path) else None
        if status is not None:
            return self._plain(status, {"content-length": "0"})
        if path in host.redirects:
            return self._plain(302, {"location": host.redirects[path], "content-length": "0"})
        if path.startswith("/api/models/"):
            repo = "/".join(path.split("/")[3:5])
            return self._send(path, 200, json.dumps(host.listing(repo)).encode(), {"content-type": "application/json"})
        query = parse_qs(self.path.partition("?")[2])
        if "list-type" in query:
            return self._send(path, 200, host.bucket(path, query["prefix"][0]), {"content-type": "application/xml"})
        if path not in host.files:
            return self._plain(404, {"content-length": "0"})
        content, etag = host.files[path], host.etag(path)
        headers = {"etag": etag} | host.headers.get(path, {})
        if wanted and host.takes_ranges and self.headers.get("if-range", etag) == etag:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first), int(last) + 1 if last else len(content)
            headers["content-range"] = f"bytes {begin}-{end - 1}/{len(content)}"
            return self._send(path, 206, content[begin:end], headers)
        return self._send(path, 200, content, headers)

    def _plain(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, path: str, status: int, body: bytes, headers: dict[str, str]) -> None:
        host = self.host
        if "content-length" not in headers and "transfer-encoding" not in headers:
            headers = headers | {"content-length": str(host.lengths.get(path, len(body)))}
        self._plain(status, {name: value for name, value in headers.items() if value})
        if self.command == "HEAD":
            return
        with host.lock:
            cut = host.cut_after[path].pop(0) if host.cut_after.get(path) else None
        stalls = path in host.stalled
        sent = body[: cut if cut is not None else len(body) // 2 if stalls else None]
        with contextlib.suppress(OSError):
            self.wfile.write(sent)
            self.wfile.flush()
            with host.lock:
                host.sent_bytes[path] += len(sent)
            if stalls:
                host.go_on.wait(30)
                self.wfile.write(body[len(sent) :])
        if cut is not None:
            if path in host.change_after_cut:
                host.files[path] = host.change_after_cut.pop(path)
            self.close_connection = True
        elif headers.get("content-length") != str(len(body)):
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:  # who hangs up is part of the tests
        pass


@contextlib.contextmanager
def adapter_host(context: ssl.SSLContext | None = None) -> Iterator[AdapterHost]:
    host = AdapterHost()
    handler = type("Handler", (_Handler,), {"host": host})
    server: socketserver.BaseServer = _Server(("127.0.0.1", 0), handler)
    assert isinstance(server, ThreadingHTTPServer)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    host.url = f"{'https' if context else 'http'}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield host
    finally:
        host.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()
