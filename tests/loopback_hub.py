"""A Hub on the loopback interface: folders served as repos, and written to, over the real protocol."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

SUFFIXES = {".json", ".py", ".safetensors", ".jinja", ".md"}
MAX_REGULAR = 100_000
"""Larger files are to be uploaded as LFS objects."""


def commit_of(repo: str, number: int = 0) -> str:
    """The commit id under which a repo is served after so many uploads; it is the only revision, besides `main`."""
    return hashlib.sha1(f"{repo}{number or ''}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    repos: dict[str, Path]
    requests: list[str]
    uploads: Path | None
    objects: dict[str, bytes]  # LFS objects by their SHA-256
    commits: dict[str, int]  # uploads of each repo

    # ------------------------------------------------------------------ reading

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

    def commit(self, repo: str) -> str:
        return commit_of(repo, self.commits.get(repo, 0))

    def describe(self, repo: str, folder: Path, rest: str, body: bool) -> None:
        files = [path for path in sorted((*folder.glob("*"), *folder.glob("adapter/*"))) if path.suffix in SUFFIXES]
        names = [str(path.relative_to(folder)) for path in files]
        if rest.startswith("tree/"):
            entries = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": _etag(path)}
                for name, path in zip(names, files, strict=True)
            ]
            return self.send(200, json.dumps(entries).encode(), {}, body)
        info = {"id": repo, "sha": self.commit(repo), "siblings": [{"rfilename": name} for name in names], "tags": []}
        self.send(200, json.dumps(info).encode(), {}, body)

    def file(self, repo: str, path: Path, revision: str, body: bool) -> None:
        if revision not in ("main", self.commit(repo)):
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        headers = {"X-Repo-Commit": self.commit(repo)}
        if path.suffix not in SUFFIXES or not path.is_file():
            return self.send(404, b"", headers | {"X-Error-Code": "EntryNotFound"}, body)
        self.send(200, path.read_bytes(), headers | {"ETag": f'"{_etag(path)}"'}, body)

    # ------------------------------------------------------------------ writing

    def do_PUT(self) -> None:
        path = urlsplit(self.path).path.strip("/")
        self.requests.append(f"PUT {path}")
        content = self.received()
        self.objects[hashlib.sha256(content).hexdigest()] = content
        self.send(200, b"", {}, body=False)

    def do_POST(self) -> None:
        path = urlsplit(self.path).path.strip("/")
        self.requests.append(f"POST {path}")
        content = self.received()
        if path == "api/validate-yaml":
            return self.send_json({"warnings": [], "errors": []})
        if path == "api/repos/create":
            return self.create(json.loads(content))
        for repo, folder in self.repos.items():
            if path == f"api/models/{repo}/preupload/main":
                return self.send_json({"files": [self.upload_mode(one) for one in json.loads(content)["files"]]})
            if path == f"{repo}.git/info/lfs/objects/batch":
                return self.send_json({"transfer": "basic", "objects": self.batch(json.loads(content)["objects"])})
            if path == f"api/models/{repo}/commit/main":
                return self.write(repo, folder, [json.loads(line) for line in content.splitlines()])
        self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body=True)

    def create(self, wanted: dict[str, str]) -> None:
        repo = f"{wanted['organization']}/{wanted['name']}"
        known = repo in self.repos
        if not known:
            assert self.uploads is not None, "this Hub takes no uploads"
            self.repos[repo] = self.uploads / repo
            self.repos[repo].mkdir(parents=True)
        self.send_json({"url": f"{self.endpoint}/{repo}"}, 409 if known else 200)

    def upload_mode(self, file: dict[str, object]) -> dict[str, object]:
        large = int(str(file["size"])) > MAX_REGULAR
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def batch(self, objects: list[dict[str, object]]) -> list[dict[str, object]]:
        def actions(one: dict[str, object]) -> dict[str, object]:
            return {"upload": {"href": f"{self.endpoint}/lfs/{one['oid']}"}}

        return [one if one["oid"] in self.objects else one | {"actions": actions(one)} for one in objects]

    def write(self, repo: str, folder: Path, lines: list[dict[str, dict[str, str]]]) -> None:
        for line in lines:
            value = line["value"]
            if str(line["key"]) == "header":
                continue
            path = folder / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            is_object = str(line["key"]) == "lfsFile"
            path.write_bytes(self.objects[value["oid"]] if is_object else base64.b64decode(value["content"]))
        self.commits[repo] = self.commits.get(repo, 0) + 1
        address = f"{self.endpoint}/{repo}/commit/{self.commit(repo)}"
        self.send_json({"success": True, "commitUrl": address, "commitOid": self.commit(repo)})

    # ------------------------------------------------------------------ bytes

    @property
    def endpoint(self) -> str:
        return f"http://{self.headers['Host']}"

    def received(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while length := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send_json(self, content: dict[str, object], status: int = 200) -> None:
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json"}, body=True)

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
def loopback_hub(repos: Mapping[str, Path], uploads: Path | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as repos.

    Args:
        repos: folder of each repo id.
        uploads: folder for repos that are created, as `uploads/owner/name`; None = none can be.

    Yields:
        The endpoint, and the list of requested paths, which grows; those of writing requests begin with their method.
    """
    requests: list[str] = []
    state = {"repos": dict(repos), "requests": requests, "uploads": uploads, "objects": {}, "commits": {}}
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), state))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
