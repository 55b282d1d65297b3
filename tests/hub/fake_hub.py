"""A Hub on this machine, with enough of its HTTP API to create, upload, commit, list and download.

It accepts regular files in commits and large files over LFS, and like the real Hub it rejects a wrong token, invalid
card metadata, and a file that was not uploaded. It has no xet, no pull requests, no datasets and no paging.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_fake"
USER = "tiny-user"
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".model")


@dataclass
class Repo:
    """A model repository: branches, snapshots and commits."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    snapshots: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)
    """(branch, message, paths) in order."""

    def commit(self, branch: str, message: str, files: dict[str, bytes], added: tuple[str, ...]):
        sha = hashlib.sha1(repr((branch, message, len(self.commits))).encode()).hexdigest()
        self.snapshots[sha] = files
        self.branches[branch] = sha
        self.commits.append((branch, message, added))
        return sha

    def sha(self, revision: str) -> str | None:
        found = self.branches.get(revision, revision)
        return found if found in self.snapshots else None

    def files(self, revision: str = "main") -> dict[str, bytes]:
        sha = self.sha(revision)
        return {} if sha is None else self.snapshots[sha]


class FakeHub:
    """The server, its repositories and its requests. Use it as a context manager."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def card_errors(data: object) -> list[str]:
    """Return the errors that the real Hub finds in the metadata of a card."""
    if not isinstance(data, dict):
        return ["metadata must be a mapping"]
    errors = [
        f'"{key}" must be a string' for key in ("library_name", "pipeline_tag", "license")
        if key in data and not isinstance(data[key], str)
    ]  # fmt: skip
    for key in ("tags", "datasets", "metrics", "language"):
        value = data.get(key, [])
        if not all(isinstance(item, str) for item in (value if isinstance(value, list) else [value])):
            errors.append(f'"{key}" must be a string or a list of strings')
    for model in data.get("model-index", []):
        if not model.get("name"):
            errors.append('"model-index[0].name" is required')
        for result in model.get("results", []):
            for part, needed in (("task", ["type"]), ("dataset", ["type", "name"])):
                errors += [
                    f'"model-index results {part}.{key}" is required'
                    for key in needed
                    if not result.get(part, {}).get(key)
                ]
            errors += ["a metric needs type and value" for m in result["metrics"] if len(m) < 2]
    return errors


class Refused(Exception):
    """An error response: status, the Hub's error code, a message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Answers:
    """The handlers of the routes; each request has its own object."""

    def __init__(self, hub: FakeHub) -> None:
        self.hub = hub

    def repo(self, name: str) -> Repo:
        if name not in self.hub.repos:
            raise Refused(404, "RepoNotFound", f"no repository {name}")
        return self.hub.repos[name]

    def who(self, body: bytes) -> dict:
        return {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}}

    def create(self, body: bytes) -> dict:
        request = json.loads(body)
        name = f"{request.get('organization') or USER}/{request['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            raise Refused(409, "", json.dumps({"error": "exists", "url": url}))
        repo = self.hub.repos[name] = Repo(private=request.get("visibility") == "private")
        repo.commit("main", "initial commit", {}, ())
        return {"url": url, "name": name}

    def validate_yaml(self, body: bytes) -> dict:
        content = json.loads(body)["content"]
        block = re.match(r"^---\n(.*?)\n---\n", content, re.DOTALL)
        errors = []
        if block is not None:
            try:
                errors = card_errors(yaml.safe_load(block.group(1)))
            except yaml.YAMLError as error:
                errors = [str(error)]
        if errors:
            raise Refused(400, "", json.dumps({"errors": [{"message": e} for e in errors]}))
        return {"errors": [], "warnings": []}

    def branch(self, body: bytes, name: str, branch: str) -> dict:
        repo = self.repo(name)
        repo.branches[branch] = repo.branches["main"]
        return {}

    def preupload(self, body: bytes, name: str, revision: str) -> dict:
        files = []
        for request in json.loads(body)["files"]:
            mode = "lfs" if request["path"].endswith(LARGE) else "regular"
            files.append({"path": request["path"], "uploadMode": mode, "shouldIgnore": False})
        self.repo(name)
        return {"files": files}

    def lfs_batch(self, body: bytes, name: str) -> dict:
        objects = []
        for request in json.loads(body)["objects"]:
            item = {"oid": request["oid"], "size": request["size"]}
            if request["oid"] not in self.hub.large:
                item["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{request['oid']}"},
                    "verify": {"href": f"{self.hub.url}/lfs-verify"},
                }
            objects.append(item)
        return {"transfer": "basic", "objects": objects}

    def lfs_put(self, body: bytes, oid: str) -> dict:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(422, "", "the content differs from its checksum")
        self.hub.large[oid] = body
        return {}

    def lfs_verify(self, body: bytes) -> dict:
        request = json.loads(body)
        if len(self.hub.large.get(request["oid"], b"")) != request["size"]:
            raise Refused(404, "", "not there")
        return {}

    def commit(self, body: bytes, name: str, revision: str) -> dict:
        repo = self.repo(name)
        if revision not in repo.branches:
            raise Refused(404, "RevisionNotFound", f"no branch {revision}")
        files, added, message = dict(repo.files(revision)), [], ""
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                added.append(value["path"])
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Refused(400, "", f"{value['path']} was never sent")
                files[value["path"]] = self.hub.large[value["oid"]]
                added.append(value["path"])
            elif entry["key"] == "deletedFile":
                files.pop(value["path"])
            else:
                raise Refused(400, "", f"this Hub does not know {entry['key']}")
        sha = repo.commit(revision, message, files, tuple(sorted(added)))
        return {
            "success": True,
            "commitOid": sha,
            "commitUrl": f"{self.hub.url}/{name}/commit/{sha}",
        }

    def info(self, body: bytes, name: str, revision: str = "main") -> dict:
        repo = self.repo(name)
        siblings = [{"rfilename": path} for path in sorted(repo.files(revision))]
        base = {"_id": "0" * 24, "id": name, "modelId": name, "private": repo.private}
        return {**base, "sha": repo.sha(revision), "siblings": siblings, "tags": []}

    def tree(self, body: bytes, name: str, revision: str, folder: str = "") -> list[dict]:
        prefix = f"{folder}/" if folder else ""
        found = []
        for path, content in sorted(self.repo(name).files(revision).items()):
            if path.startswith(prefix):
                oid = hashlib.sha1(content).hexdigest()
                found.append({"type": "file", "oid": oid, "size": len(content), "path": path})
        if folder and not found:
            raise Refused(404, "EntryNotFound", f"no folder {folder}")
        return found


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Answers.who),
    ("POST", r"/api/repos/create", Answers.create),
    ("POST", r"/api/validate-yaml", Answers.validate_yaml),
    ("POST", rf"/api/models/{_NAME}/branch/(.+)", Answers.branch),
    ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)", Answers.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", Answers.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", Answers.lfs_put),
    ("POST", r"/lfs-verify", Answers.lfs_verify),
    ("POST", rf"/api/models/{_NAME}/commit/([^/]+)", Answers.commit),
    ("GET", rf"/api/models/{_NAME}/tree/([^/]+)/?(.*)", Answers.tree),
    ("GET", rf"/api/models/{_NAME}/revision/([^/]+)", Answers.info),
    ("GET", rf"/api/models/{_NAME}", Answers.info),
]
FILE = re.compile(rf"/{_NAME}/resolve/([^/]+)/(.+)")


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Closes the connection after each request (HTTP/1.0)."""

        def log_message(self, *parts: object) -> None:
            pass

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            body = self._body()
            with hub.lock:
                hub.requests.append(f"{self.command} {path}")
                try:
                    self._route(path, body)
                except Refused as error:
                    self._send(error.status, str(error).encode(), X_Error_Code=error.code)

        do_GET = do_HEAD = do_POST = do_PUT = _answer

        def _route(self, path: str, body: bytes) -> None:
            if self.command in ("GET", "HEAD") and (match := FILE.fullmatch(path)):
                return self._file(*match.groups())
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == self.command:
                    self._check_token(path)
                    reply = json.dumps(answer(Answers(hub), body, *match.groups())).encode()
                    return self._send(200, reply, Content_Type="application/json")
            raise Refused(404, "", f"this Hub has no {self.command} {path}")

        def _check_token(self, path: str) -> None:
            writes = self.command != "GET" and not path.startswith(("/lfs", "/api/validate-yaml"))
            if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                raise Refused(401, "", "the token is missing or wrong")

        def _file(self, name: str, revision: str, path: str) -> None:
            repo = Answers(hub).repo(name)
            sha = repo.sha(revision)
            if sha is None:
                raise Refused(404, "RevisionNotFound", f"no revision {revision}")
            content = repo.files(revision).get(path)
            if content is None:
                raise Refused(404, "EntryNotFound", f"no file {path}")
            etag = hashlib.sha256(content).hexdigest()
            self._send(200, content, ETag=f'"{etag}"', X_Repo_Commit=sha,
                       X_Linked_Size=str(len(content)), X_Linked_ETag=f'"{etag}"')  # fmt: skip

    return Handler
