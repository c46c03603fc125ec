"""A Hub on the loopback interface that speaks the real protocol: repos with commits, tags and large files, read and
written by huggingface_hub's own client.

Large files are LFS objects, served from another host than they are asked for at, as the real Hub does. Xet, the real
Hub's second way of storing them, is not spoken: clients must run with `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from huggingface_hub.utils.sha import git_hash

SUFFIXES = {".json", ".py", ".safetensors", ".jinja", ".md"}
"""Files of a folder that are served."""
MAX_REGULAR = 100_000
"""Larger files are LFS objects."""
TOKEN = "dummy"
"""The only token that may write, and only to repos of `OWNERS`."""
OWNERS = ("org", "me", "you")
ATTRIBUTES = ".gitattributes"
"""The file that the Hub puts into a repo when it is created."""

Tree = dict[str, bytes]


@dataclass
class Repo:
    """What one repo holds: the commits of `main`, oldest first, and tags."""

    commits: list[tuple[str, Tree]]
    tags: dict[str, str] = field(default_factory=dict)
    private: bool = False

    @property
    def head(self) -> str:
        """Id of the newest commit."""
        return self.commits[-1][0]

    def commit_of(self, revision: str) -> str | None:
        """Id of the commit that a branch, a tag or an id names."""
        named = {"main": self.head, **self.tags, **{commit: commit for commit, _ in self.commits}}
        return named.get(revision)

    def tree(self, revision: str = "main") -> Tree:
        """The files of a revision that exists."""
        return dict(self.commits)[self.commit_of(revision) or ""]


@dataclass
class LoopbackHub:
    """Repos, and what clients have asked for.

    Args:
        repos: by id.
        before: called with every request, as it stands in `requests`, before it is answered; where it raises
            `ConnectionAbortedError`, the connection is closed in place of an answer.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    before: Callable[[str], None] = lambda request: None
    endpoint: str = ""
    requests: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)

    def serve_folder(self, repo: str, folder: Path) -> None:
        """Add the files of a folder as a commit of a repo, made if there is none."""
        files = [path for path in sorted((*folder.glob("*"), *folder.glob("adapter/*"))) if path.suffix in SUFFIXES]
        self.commit(repo, {path.relative_to(folder).as_posix(): path.read_bytes() for path in files})

    def commit(self, repo: str, tree: Tree) -> str:
        """Let a repo hold these files and no others; returns the id of the commit."""
        known = self.repos.setdefault(repo, Repo([]))
        commit = commit_of(repo, len(known.commits))
        known.commits.append((commit, tree))
        self.objects |= {
            hashlib.sha256(content).hexdigest(): content for content in tree.values() if _is_large(content)
        }
        return commit


def commit_of(repo: str, number: int = 0) -> str:
    """The id of a repo's commit by its place in the history."""
    return hashlib.sha1(f"{repo}{number or ''}".encode()).hexdigest()


def _is_large(content: bytes) -> bool:
    return len(content) > MAX_REGULAR


def _etag(content: bytes) -> str:
    """What the Hub names a file by: the SHA-256 of an LFS object, git's own hash of other files."""
    return hashlib.sha256(content).hexdigest() if _is_large(content) else git_hash(content)


class _Refused(Exception):
    """A request that is answered by an error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub

    def do_HEAD(self) -> None:
        self.answer("")

    def do_GET(self) -> None:
        self.answer("")

    def do_PUT(self) -> None:
        self.answer("PUT ")

    def do_POST(self) -> None:
        self.answer("POST ")

    def answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        content = self.received()
        self.hub.requests.append(method + path)
        try:
            self.hub.before(method + path)
            if method and self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("lfs/"):
                raise _Refused(401, "Invalid credentials in Authorization header")
            (self.write if method else self.read)(path, content)
        except ConnectionAbortedError:
            self.close_connection = True
        except _Refused as refused:
            self.send(refused.status, json.dumps({"error": str(refused)}).encode(), refused.headers)

    def repo(self, path: str, prefix: str) -> tuple[str, Repo, Sequence[str]]:
        """Id and repo that a path names behind a prefix, and the parts of the path behind it."""
        parts = path.removeprefix(prefix).split("/")
        name = "/".join(parts[:2]).removesuffix(".git")
        if not path.startswith(prefix) or name not in self.hub.repos:
            raise _Refused(404, "Repository not found", "RepoNotFound")
        return name, self.hub.repos[name], parts[2:]

    def revision(self, repo: Repo, revision: str) -> tuple[str, Tree]:
        commit = repo.commit_of(revision)
        if commit is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repo.tree(commit)

    # ------------------------------------------------------------------ reading

    def read(self, path: str, content: bytes) -> None:
        if path.startswith("lfs/"):
            return self.send(200, self.hub.objects[path.removeprefix("lfs/")], {})
        if "/resolve/" in path:
            _, repo, rest = self.repo(path, "")
            return self.file(repo, rest[1], "/".join(rest[2:]))
        name, repo, rest = self.repo(path, "api/models/")
        if rest[:1] == ["refs"]:
            tags = [_ref("tags", tag, commit) for tag, commit in repo.tags.items()]
            return self.send_json({"branches": [_ref("heads", "main", repo.head)], "converts": [], "tags": tags})
        if rest[:1] == ["tree"]:
            return self.tree(repo, rest[1], "/".join(rest[2:]))
        commit, files = self.revision(repo, rest[1] if rest[:1] == ["revision"] else "main")
        siblings = [{"rfilename": file} for file in files]
        self.send_json({"id": name, "sha": commit, "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, repo: Repo, revision: str, folder: str) -> None:
        files = {name: content for name, content in self.revision(repo, revision)[1].items() if _inside(name, folder)}
        if folder and not files:
            raise _Refused(404, f"{folder} does not exist", "EntryNotFound")
        entries: list[dict[str, Any]] = []
        for name, content in files.items():
            entries.append({"type": "file", "path": name, "size": len(content), "oid": git_hash(content)})
            if _is_large(content):
                entries[-1]["lfs"] = {"oid": _etag(content), "size": len(content), "pointerSize": 130}
        self.send_json(entries)

    def file(self, repo: Repo, revision: str, name: str) -> None:
        commit, tree = self.revision(repo, revision)
        headers = {"X-Repo-Commit": commit}
        if name not in tree:
            refused = _Refused(404, f"{name} does not exist", "EntryNotFound")
            return self.send(404, b"", refused.headers | headers)
        etag = _etag(tree[name])
        if not _is_large(tree[name]):
            return self.send(200, tree[name], headers | {"ETag": f'"{etag}"'})
        # Of another host, as the real Hub's are: a client follows what stays on the Hub, and misses our headers there.
        elsewhere = self.hub.endpoint.replace("127.0.0.1", "localhost")
        place = {"Location": f"{elsewhere}/lfs/{etag}", "X-Linked-Size": str(len(tree[name]))}
        self.send(302, b"", headers | place | {"X-Linked-ETag": f'"{etag}"'})

    # ------------------------------------------------------------------ writing

    def write(self, path: str, content: bytes) -> None:
        if path.startswith("lfs/"):
            self.hub.objects[hashlib.sha256(content).hexdigest()] = content
            return self.send(200, b"", {})
        if path == "api/validate-yaml":
            return self.send_json({"warnings": [], "errors": []})
        if path == "api/repos/create":
            return self.create(json.loads(content))
        if path.endswith(".git/info/lfs/objects/batch"):
            self.repo(path, "")
            return self.send_json(
                {"transfer": "basic", "objects": list(map(self.place, json.loads(content)["objects"]))}
            )
        name, repo, (what, revision, *_) = self.repo(path, "api/models/")
        if name.partition("/")[0] not in OWNERS:
            raise _Refused(403, f"You have no write access to {name}")
        if what == "tag":
            return self.tag(repo, revision, json.loads(content)["tag"])
        _, tree = self.revision(repo, revision)
        if what == "preupload":
            files = [_upload_mode(file, tree) for file in json.loads(content)["files"]]
            return self.send_json({"files": files})
        assert (what, revision) == ("commit", "main")
        header, *lines = (json.loads(line) for line in content.splitlines())
        if header["value"].get("parentCommit") not in (None, repo.head):
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        commit = self.hub.commit(name, self.changed(tree, lines))
        address = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self.send_json({"success": True, "commitUrl": address, "commitOid": commit})

    def create(self, wanted: dict[str, str]) -> None:
        repo = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        if repo.partition("/")[0] not in OWNERS:
            raise _Refused(403, f"You don't have the rights to create a model under {repo.partition('/')[0]!r}")
        known = repo in self.hub.repos
        if not known:
            self.hub.commit(repo, {ATTRIBUTES: b"*.safetensors filter=lfs\n"})
            self.hub.repos[repo].private = wanted.get("visibility") == "private"
        self.send_json({"url": f"{self.hub.endpoint}/{repo}"}, 409 if known else 200)

    def tag(self, repo: Repo, revision: str, tag: str) -> None:
        if tag in repo.tags:
            raise _Refused(409, f"Tag {tag} exists already")
        repo.tags[tag], _ = self.revision(repo, revision)
        self.send_json({})

    def place(self, one: dict[str, Any]) -> dict[str, Any]:
        """Where an object is to be uploaded to; nowhere if it is known."""
        actions = {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}
        return one if one["oid"] in self.hub.objects else one | {"actions": actions}

    def changed(self, tree: Tree, lines: Sequence[dict[str, Any]]) -> Tree:
        tree = dict(tree)
        for line in lines:
            key, path = line["key"], line["value"]["path"]
            if key == "deletedFile":
                del tree[path]
            elif key == "lfsFile":
                tree[path] = self.hub.objects[line["value"]["oid"]]
            else:
                assert key == "file", f"operation {key} is unknown here"
                tree[path] = base64.b64decode(line["value"]["content"])
        return tree

    # ------------------------------------------------------------------ bytes

    def received(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while length := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send_json(self, content: Any, status: int = 200) -> None:
        self.send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


def _ref(kind: str, name: str, commit: str) -> dict[str, str]:
    return {"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit}


def _inside(name: str, folder: str) -> bool:
    return not folder or name.startswith(f"{folder}/")


def _upload_mode(file: Mapping[str, Any], tree: Tree) -> dict[str, Any]:
    """How a file is to be uploaded, and the id of the one that is there."""
    mode = "lfs" if int(file["size"]) > MAX_REGULAR else "regular"
    there = {"oid": _etag(tree[file["path"]])} if file["path"] in tree else {}
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **there}


@contextmanager
def serving(hub: LoopbackHub) -> Iterator[str]:
    """Serve a Hub; yields its endpoint."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub.endpoint
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def loopback_hub(repos: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve folders as repos.

    Args:
        repos: folder of each repo id.

    Yields:
        The endpoint, and the list of requested paths, which grows; those of writing requests begin with their method.
    """
    hub = LoopbackHub()
    for repo, folder in repos.items():
        hub.serve_folder(repo, folder)
    with serving(hub) as endpoint:
        yield endpoint, hub.requests
