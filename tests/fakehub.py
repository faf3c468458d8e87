"""A hub with the API of Hugging Face's, as far as `huggingface_hub.snapshot_download` needs it (test_hub.py has it try), that
can be told to do it all wrong."""

import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 2000
"""Files of so many bytes lie elsewhere, as with git LFS."""


@dataclass
class Repo:
    """`token`: who has it may read the files, if there is one. `revisions`: branches and tags of its only commit."""

    files: dict[str, bytes]
    token: str | None = None
    revisions: tuple[str, ...] = ("main",)

    @property
    def commit(self) -> str:
        told = "".join(f"{name} {hashlib.sha1(body).hexdigest()}\n" for name, body in sorted(self.files.items()))
        return hashlib.sha1(told.encode()).hexdigest()

    def tree(self) -> list[dict]:
        found = []
        for name, body in self.files.items():
            git = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
            entry = {"type": "file", "oid": git, "size": len(body), "path": name}
            if len(body) >= LARGE:
                sha256 = hashlib.sha256(body).hexdigest()
                entry |= {"lfs": {"oid": sha256, "size": len(body), "pointerSize": 134}, "xetHash": "0" * 64}
            found.append(entry)
        return found


@dataclass
class Hub:
    """`does` has functions of a handler that answer in the place of what there is, by how a path begins; `asked` has every path
    that was asked for, with what its client showed."""

    repos: dict[str, Repo] = field(default_factory=dict)
    does: dict[str, Callable] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    page: int = 4
    url: str = ""

    def paths(self, part: str = "") -> list[str]:
        return [path for path, _ in self.asked if part in path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def do_GET(self):
        path = urlsplit(self.path).path
        self.hub.asked.append((self.path, self.headers["authorization"]))
        for beginning, do in self.hub.does.items():
            if path.startswith(beginning):
                return do(self)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path):
            return self.api(found[1], found[2], unquote(found[3]))
        if found := re.fullmatch(r"/(?:api/resolve-cache/models/)?([^/]+/[^/]+)/(?:resolve/)?([0-9a-f]{40})/(.+)", path):
            return self.file(found[1], found[2], unquote(found[3]), "resolve-cache" in path)
        if found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            return self.large(found[1])
        return self.refuse(404, "EntryNotFound")

    do_HEAD = do_GET

    def api(self, name: str, kind: str, revision: str):
        repo = self.hub.repos.get(name)
        if repo is None:  # as the real one does, who does not say whether it is there
            return self.refuse(401, "RepoNotFound")
        if revision not in (*repo.revisions, repo.commit):
            return self.refuse(404, "RevisionNotFound")
        if kind == "revision":
            siblings = [{"rfilename": file} for file in repo.files]
            info = {"_id": "0", "id": name, "modelId": name, "sha": repo.commit, "private": False, "siblings": siblings}
            return self.json(info)
        first = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        entries, end = repo.tree(), first + self.hub.page
        following = f'<{self.hub.url}{urlsplit(self.path).path}?cursor={end}&limit={self.hub.page}>; rel="next"'
        return self.json(entries[first:end], **({"Link": following} if end < len(entries) else {}))

    def file(self, name: str, commit: str, path: str, cached: bool):
        repo = self.hub.repos.get(name)
        if repo is None or commit != repo.commit or path not in repo.files:
            return self.refuse(404, "EntryNotFound")
        if repo.token and self.headers["authorization"] != f"Bearer {repo.token}":
            return self.refuse(403 if self.headers["authorization"] else 401, "GatedRepo")
        body = repo.files[path]
        entry = next(entry for entry in repo.tree() if entry["path"] == path)
        told = {"X-Repo-Commit": commit, "ETag": f'"{entry["oid"]}"'}
        if "lfs" in entry:
            told |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(len(body))}
            return self.redirect(f"{self.hub.url}/lfs/{entry['lfs']['oid']}", 302, **told)
        if not cached:
            return self.redirect(f"/api/resolve-cache/models/{name}/{commit}/{path}", 307, **told)
        return self.send(200, body, **told)

    def large(self, sha256: str):
        for repo in self.hub.repos.values():
            for body in repo.files.values():
                if hashlib.sha256(body).hexdigest() == sha256:
                    # On a host of its own nobody would ask here for a commit.
                    return self.send(200, body, **{"ETag": f'"{sha256}"', "X-Repo-Commit": repo.commit})
        return self.refuse(404, "EntryNotFound")

    def json(self, value, status: int = 200, **headers: str):
        self.send(status, json.dumps(value).encode(), **{"Content-Type": "application/json; charset=utf-8", **headers})

    def redirect(self, place: str, status: int = 302, **headers: str):
        self.send(status, b"", Location=place, **headers)

    def refuse(self, status: int, code: str):
        self.json({"error": "Access to this is restricted."}, status, **{"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, body: bytes, **headers: str):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def stream(self, chunks):
        """What has no length, until the client has enough of it or there is no more."""
        self.close_connection = True
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for chunk in chunks:
                self.wfile.write(chunk)
        except ConnectionError:
            pass

    def log_message(self, *_):
        pass


@contextmanager
def serving():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = Hub(url=f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
