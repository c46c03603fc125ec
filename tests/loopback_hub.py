"""The reading side of a Hub on the loopback interface: folders served as repos over the real protocol."""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

SUFFIXES = {".json", ".py", ".safetensors", ".jinja"}


def commit_of(repo: str) -> str:
    """The commit id under which a repo is served; it is the only revision, besides `main`."""
    return hashlib.sha1(repo.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    repos: Mapping[str, Path] = {}
    requests: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = urlsplit(self.path).path.strip("/")
        self.requests.append(path)
        for repo, folder in self.repos.items():
            if path.startswith(f"api/models/{repo}"):
                return self.describe(repo, folder, path.removeprefix(f"api/models/{repo}").strip("/"), body)
            if path.startswith(f"{repo}/resolve/"):
                revision, _, name = path.removeprefix(f"{repo}/resolve/").partition("/")
                return self.file(repo, folder / name, revision, body)
        self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def describe(self, repo: str, folder: Path, rest: str, body: bool) -> None:
        files = [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES]
        if rest.startswith("tree/"):
            entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)} for f in files]
            return self.send(200, json.dumps(entries).encode(), {}, body)
        info = {"id": repo, "sha": commit_of(repo), "siblings": [{"rfilename": f.name} for f in files], "tags": []}
        self.send(200, json.dumps(info).encode(), {}, body)

    def file(self, repo: str, path: Path, revision: str, body: bool) -> None:
        if revision not in ("main", commit_of(repo)):
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        headers = {"X-Repo-Commit": commit_of(repo)}
        if path.suffix not in SUFFIXES or not path.is_file():
            return self.send(404, b"", headers | {"X-Error-Code": "EntryNotFound"}, body)
        self.send(200, path.read_bytes(), headers | {"ETag": f'"{_etag(path)}"'}, body)

    def send(self, status: int, content: bytes, headers: Mapping[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def loopback_hub(repos: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as repos.

    Args:
        repos: folder of each repo id.

    Yields:
        The endpoint, and the list of requested paths, which grows.
    """
    requests: list[str] = []
    handler = type("Handler", (_Handler,), {"repos": repos, "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
