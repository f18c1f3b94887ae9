"""A stand-in for the Hub on loopback: enough of its HTTP API for the real client to create, upload, list and download.

It keeps repositories in memory. Clients run in processes of their own, as `with HubStandIn(home) as hub: subprocess.run(...,
env=hub.environment)`, or in this one, inside `hub.here(monkeypatch)`. What it is to do wrong stands in `hub.faults`.
"""

import base64
import hashlib
import json
import os
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
from huggingface_hub import constants

TOKEN = "hf_stand_in"


@dataclass
class Repository:
    private: bool = False
    commits: list[dict] = field(default_factory=list)  # each {"summary", "paths", "sha", "files"}, the oldest first
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})  # a branch's newest commit
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, bytes]:
        """What main holds."""
        return self.at("main")[1]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and the files of a branch, a tag or a commit; None if there is no such thing."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        files = {"0" * 40: {}, **{commit["sha"]: commit["files"] for commit in self.commits}}
        return (sha, files[sha]) if sha in files else None


@dataclass
class Fault:
    """What goes wrong with the next requests to some path.

    Args:
        path: a regular expression that the request's method and path match, such as "POST .*/commit/main".
        status: of the answer; None drops the connection.
        times: how many requests it happens to.
        headers: of the answer.
        late: drops the connection after the work is done, so that only the answer is lost; otherwise in the middle of the body,
            which for GET is the answer's.
    """

    path: str
    status: int | None = None
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    late: bool = False


class HubStandIn:
    """The server's state: `repositories` by name, `lfs` objects by sha256, `faults`, `url`, and the clients' `environment`."""

    def __init__(self, home: os.PathLike):
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.home = str(home)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        dropped = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_MODULES_CACHE", "PYTHONPATH")
        self.environment = {name: value for name, value in os.environ.items() if name not in dropped}
        self.environment |= {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": self.home,
            "HF_HUB_DISABLE_XET": "1",  # otherwise an "lfs" answer sends the client to another protocol
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }

    def here(self, monkeypatch):
        """Turns the client of this process, which has read its environment when it was imported, to the stand-in."""
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        cache = os.path.join(self.home, "hub")
        settings = {"ENDPOINT": self.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": cache}
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", self.url)

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"
    lost = torn = False  # whether the answer gets lost, or its second half

    def serve(self):
        """Answers a request, or does to it what a fault says."""
        path, length = self.path_of_request(), int(self.headers.get("Content-Length", 0))
        fault = next((f for f in self.hub.faults if f.times and re.fullmatch(f.path, f"{self.command} {path}")), None)
        if fault is not None:
            fault.times -= 1
            if fault.status is None and not fault.late and self.command != "GET":
                self.rfile.read(length // 2)
                return self.drop()
        body = self.rfile.read(length)
        if fault is not None and fault.status is not None:
            return self.send(fault.status, b"{}", fault.headers)
        self.lost, self.torn = fault is not None and fault.late, fault is not None and not fault.late
        return self.write(path, body) if self.command in ("POST", "PUT") else self.read(path)

    do_GET = do_HEAD = do_POST = do_PUT = serve  # noqa: N815 - http.server dispatches on these names

    def write(self, path: str, body: bytes):
        if self.command == "PUT":
            self.hub.lfs[hashlib.sha256(body).hexdigest()] = body
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.fail(401)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self.lfs_batch(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch|tag)/([^/]+)", path):
            name, what, revision = match.groups()
            repository = self.hub.repositories.get(name)
            if repository is None:
                return self.fail(404, "RepoNotFound")
            if what == "branch":
                return self.create_branch(repository, revision)
            if (found := repository.at(revision)) is None:
                return self.fail(404, "RevisionNotFound")
            if what == "tag":
                return self.create_tag(repository, found[0], json.loads(body)["tag"])
            if what == "preupload":
                return self.preupload(found[1], json.loads(body))
            return self.commit(name, repository, revision, body)
        return self.fail(404)

    def read(self, path: str):
        if path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            return self.answer({"name": "user"}) if known else self.fail(401)
        pattern = r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|refs)(?:/([^/]+)(/.+)?)?)?"
        file = r"(?:/datasets)?/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)"
        if match := re.fullmatch(pattern, path) or re.fullmatch(file, path):
            name, what, revision = match[1], match[2], match[3] or "main"
            repository = self.hub.repositories.get(name)
            if repository is None:
                return self.fail(404, "RepoNotFound")
            if what == "refs":
                kinds = {"branches": repository.branches, "tags": repository.tags}
                return self.answer({kind: _refs(kind, refs) for kind, refs in kinds.items()} | {"converts": []})
            if (found := repository.at(revision)) is None:
                return self.fail(404, "RevisionNotFound")
            sha, files = found
            if what == "resolve":
                return self.file(sha, files, match[4])
            if what == "tree" and match[4]:
                return self.fail(404, "EntryNotFound")  # no test needs folders
            if what == "tree":
                return self.answer([_tree_entry(name, files[name]) for name in sorted(files)])
            siblings = [{"rfilename": name} for name in sorted(files)]
            return self.answer({"id": name, "sha": sha, "private": repository.private, "siblings": siblings})
        return self.fail(404)

    def create(self, request: dict):
        name = f"{request.get('organization') or 'user'}/{request['name']}"
        status = 409 if name in self.hub.repositories else 200
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.hub.repositories.setdefault(name, Repository(private))
        self.answer({"url": f"{self.hub.url}/{name}", "name": name}, status)

    def create_branch(self, repository: Repository, branch: str):
        status = 409 if branch in repository.branches else 200
        repository.branches.setdefault(branch, repository.branches["main"])
        self.answer({}, status)

    def create_tag(self, repository: Repository, sha: str, tag: str):
        status = 409 if tag in repository.tags else 200
        repository.tags.setdefault(tag, sha)
        self.answer({}, status)

    def preupload(self, files: dict[str, bytes], request: dict):
        answers = []
        for path in (file["path"] for file in request["files"]):
            mode = "lfs" if _is_lfs(path) else "regular"
            oid = {"oid": _oid(path, files[path])} if path in files else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        self.answer({"files": answers})

    def lfs_batch(self, request: dict):
        objects = request["objects"]
        for item in objects:
            if item["oid"] in self.hub.lfs:  # it is not sent again
                continue
            item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def commit(self, name: str, repository: Repository, branch: str, body: bytes):
        summary, paths, files = "", [], dict(repository.at(branch)[1])
        for line in body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                summary = value["summary"]
                continue
            path = value["path"]
            paths.append(path)
            if key == "file":
                files[path] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[path] = self.hub.lfs[value["oid"]]
            elif key == "deletedFile":
                del files[path]
        sha = hashlib.sha1(repository.branches[branch].encode() + body).hexdigest()
        repository.commits.append({"summary": summary, "paths": sorted(paths), "sha": sha, "files": files})
        repository.branches[branch] = sha
        self.answer({"commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def file(self, sha: str, files: dict[str, bytes], path: str):
        if path not in files:
            return self.fail(404, "EntryNotFound")
        content, start = files[path], int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        status = 206 if start else 200
        return self.send(status, content[start:], {"ETag": f'"{_oid(path, content)}"', "X-Repo-Commit": sha})

    def path_of_request(self) -> str:
        return unquote(urlsplit(self.path).path)

    def answer(self, value, status: int = 200):
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def fail(self, status: int, code: str = ""):
        self.send(status, b"{}", {"X-Error-Code": code} if code else {})

    def drop(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def send(self, status: int, content: bytes, headers: dict[str, str]):
        if self.lost:
            return self.drop()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self.torn else content)
        if self.torn:
            self.drop()

    def log_message(self, *arguments):
        pass


def _is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


def _oid(path: str, content: bytes) -> str:
    """The name of a file's content: git's, or that of a large file."""
    return hashlib.sha256(content).hexdigest() if _is_lfs(path) else _git_oid(content)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _refs(kind: str, refs: dict[str, str]) -> list[dict]:
    folder = "heads" if kind == "branches" else kind
    return [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": sha} for name, sha in refs.items()]


def _tree_entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
    if _is_lfs(path):
        entry["lfs"] = {"oid": _oid(path, content), "size": len(content), "pointerSize": 134}
    return entry
