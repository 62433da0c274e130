"""A model hub on this machine that speaks the real protocol: listing, HEAD, ranges, redirects."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server has, and what it was asked for.

    Attributes:
      repos: files by repository.
      status: an answer to every request about a repository, such as (403, "GatedRepo"); (0, "") for none.
      stall_after: a GET sends so many bytes of the file and then waits; None sends everything.
      cut_after: a GET sends so many bytes of what was asked for and closes, each time.
      ignores_ranges: sends whole files for ranges.
      log: (method, path, Range header) of every request.
    """

    url: str = ""
    storage: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    status: tuple[int, str] = (0, "")
    stall_after: int | None = None
    cut_after: int | None = None
    ignores_ranges: bool = False
    damaged: bool = False
    log: list[tuple[str, str, str | None]] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def gets(self) -> list[str | None]:
        """Range headers of the GETs of files; those of headers alone, which name an end, are left out."""
        found = [r for method, path, r in self.log if method == "GET" and "/storage/" in path]
        return [r for r in found if r is None or r.endswith("-")]

    def parts(self) -> list[str]:
        """Ranges with an end that were asked for."""
        ranges = [r for method, path, r in self.log if method == "GET" and "/storage/" in path]
        return [r for r in ranges if r is not None and not r.endswith("-")]


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    """The hub, and its storage under another host name, on free ports of 127.0.0.1 until the block ends."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub)) for _ in range(2)]
    hub.url, hub.storage = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.released.set()
        for server in servers:
            server.shutdown()
            server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self._answer(True)

        def do_HEAD(self) -> None:
            self._answer(False)

        def _answer(self, has_body: bool) -> None:
            path = unquote(self.path.partition("?")[0])
            hub.log.append((self.command, path, self.headers.get("Range")))
            if path.startswith("/storage/"):
                hub.tokens.append(self.headers.get("Authorization"))
                return self._bytes(path.removeprefix("/storage/"), has_body)
            if hub.status[0]:
                return self._send(hub.status[0], b"{}", has_body, {"X-Error-Code": hub.status[1]})
            if path.startswith("/api/models/"):
                return self._listing(path, has_body)
            repo, _, file = path.strip("/").partition("/resolve/")
            name = file.partition("/")[2]
            data = hub.repos.get(repo, {}).get(name)
            if data is None:
                return self._send(404, b"", has_body, {"X-Error-Code": "EntryNotFound"})
            etag = hashlib.sha256(data).hexdigest()
            headers = {
                "X-Repo-Commit": COMMIT,
                "X-Linked-Size": str(len(data)),
                "X-Linked-Etag": f'"{etag}"',
                "ETag": f'"{etag}"',
                "Location": f"{hub.storage}/storage/{repo}/{name}",
            }
            return self._send(302, b"", has_body, headers)

        def _listing(self, path: str, has_body: bool) -> None:
            words = path.removeprefix("/api/models/").split("/")
            repo = "/".join(words[:2])
            if repo not in hub.repos:
                return self._send(404, b"{}", has_body, {"X-Error-Code": "RepoNotFound"})
            if words[2:3] == ["revision"] and words[3] not in ("main", COMMIT):
                return self._send(404, b"{}", has_body, {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": n, "size": len(d)} for n, d in hub.repos[repo].items()]
            info = {"id": repo, "modelId": repo, "sha": COMMIT, "tags": ["gguf", "license:apache-2.0"]}
            body = json.dumps({**info, "siblings": siblings}).encode()
            self._send(200, body, has_body, {"Content-Type": "application/json"})

        def _bytes(self, path: str, has_body: bool) -> None:
            owner, repo, name = path.split("/", 2)
            data = hub.repos[f"{owner}/{repo}"][name]
            data = bytes(len(data)) if hub.damaged else data
            asked = None if hub.ignores_ranges else self.headers.get("Range")
            first, _, last = (asked or "bytes=0-").removeprefix("bytes=").partition("-")
            start, whole = int(first), len(data)
            data = data[: int(last) + 1] if last else data
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(len(data) - start))
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{whole}")
            self.end_headers()
            if has_body:
                self._body(data, start)

        def _body(self, data: bytes, start: int) -> None:
            if hub.cut_after is not None:
                self.wfile.write(data[start : start + hub.cut_after])
                self.close_connection = True
                return
            end = len(data) if hub.stall_after is None else max(start, hub.stall_after)
            self.wfile.write(data[start:end])
            self.wfile.flush()
            if end < len(data):
                hub.released.wait()
                self.close_connection = True

        def _send(self, status: int, body: bytes, has_body: bool, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if has_body:
                self.wfile.write(body)

    return Handler
