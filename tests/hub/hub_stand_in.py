"""A stand-in for the Hub on loopback: enough of its HTTP API for the real client to create, upload, list and download.

It keeps repositories in memory. huggingface_hub reads its environment when it is imported, so clients run in processes
of their own: `with HubStandIn(home) as hub: subprocess.run(..., env=hub.environment)`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    commits: list[dict] = field(default_factory=list)  # each {"summary", "paths", "sha"}, the oldest first

    @property
    def sha(self) -> str:
        return self.commits[-1]["sha"] if self.commits else "0" * 40


class HubStandIn:
    """The server's state: `repositories` by name, `lfs` objects by sha256, `url`, and the clients' `environment`."""

    def __init__(self, home: os.PathLike):
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        dropped = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_MODULES_CACHE", "PYTHONPATH")
        self.environment = {name: value for name, value in os.environ.items() if name not in dropped}
        self.environment |= {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",  # otherwise an "lfs" answer sends the client to another protocol
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }

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

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path_of_request()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.fail(401)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self.lfs_batch(json.loads(body))
        if match := re.fullmatch(r"/api/models/(.+)/(preupload|commit)/[^/]+", path):
            repository = self.hub.repositories.get(match[1])
            if repository is None:
                return self.fail(404, "RepoNotFound")
            return self.preupload(json.loads(body)) if match[2] == "preupload" else self.commit(match[1], body)
        return self.fail(404)

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.lfs[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_GET(self):
        path = self.path_of_request()
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path):
            repository = self.hub.repositories.get(match[1])
            if repository is None:
                return self.fail(404, "RepoNotFound")
            if (match[2] or "").startswith("/tree"):
                return self.answer([_tree_entry(repository, name) for name in sorted(repository.files)])
            siblings = [{"rfilename": name} for name in sorted(repository.files)]
            return self.answer({"id": match[1], "sha": repository.sha, "siblings": siblings})
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            repository = self.hub.repositories.get(match[1])
            if repository is None:
                return self.fail(404, "RepoNotFound")
            if match[2] not in repository.files:
                return self.fail(404, "EntryNotFound")
            content = repository.files[match[2]]
            etag = hashlib.sha256(content).hexdigest() if match[2] in repository.lfs else _git_oid(content)
            return self.send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": repository.sha})
        return self.fail(404)

    do_HEAD = do_GET  # noqa: N815 - http.server dispatches on this name

    def create(self, request: dict):
        name = f"{request.get('organization') or 'user'}/{request['name']}"
        status = 409 if name in self.hub.repositories else 200
        self.hub.repositories.setdefault(name, Repository())
        self.answer({"url": f"{self.hub.url}/{name}", "name": name}, status)

    def preupload(self, request: dict):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                "shouldIgnore": False,
            }
            for file in request["files"]
        ]
        self.answer({"files": files})

    def lfs_batch(self, request: dict):
        objects = request["objects"]
        for item in objects:
            item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def commit(self, name: str, body: bytes):
        repository, summary, paths = self.hub.repositories[name], "", []
        for line in body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                summary = value["summary"]
                continue
            path = value["path"]
            paths.append(path)
            repository.lfs.discard(path)
            if key == "file":
                repository.files[path] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                repository.files[path] = self.hub.lfs[value["oid"]]
                repository.lfs.add(path)
            elif key == "deletedFile":
                del repository.files[path]
        sha = hashlib.sha1(repository.sha.encode() + body).hexdigest()
        repository.commits.append({"summary": summary, "paths": sorted(paths), "sha": sha})
        self.answer({"commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def path_of_request(self) -> str:
        return unquote(urlsplit(self.path).path)

    def answer(self, value, status: int = 200):
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def fail(self, status: int, code: str = ""):
        self.send(status, b"{}", {"X-Error-Code": code} if code else {})

    def send(self, status: int, content: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree_entry(repository: Repository, name: str) -> dict:
    content = repository.files[name]
    entry = {"type": "file", "path": name, "size": len(content), "oid": _git_oid(content)}
    if name in repository.lfs:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry
