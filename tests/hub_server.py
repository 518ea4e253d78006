"""A Hugging Face Hub in memory: the part of its HTTP API that push and pull use, served on loopback.

The real `huggingface_hub` client uses it if HF_ENDPOINT is `HubServer.url`. Every push is a commit; a revision is
`main`, a commit id or a tag. All files are regular ones, without git-lfs and Xet.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

USER = "reader"
TOKEN = "hf_" + "loopback" * 4


class HubError(Exception):
    """A response that is not 2xx; `code` becomes X-Error-Code, which selects the client's exception."""

    def __init__(self, status, code, message):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}


def git_blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    files: dict[str, bytes]
    message: str
    parent: "Commit | None"
    oid: str


class Repository:
    """A model repository: its commits by id, and `main`, the last one."""

    def __init__(self):
        self.commits, self.main = {}, None
        self.append({}, "initial commit")

    def append(self, files, message):
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid] = self.main = Commit(files, message, self.main, oid)
        return self.main

    def at(self, revision):
        if revision != "main" and revision not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.main if revision == "main" else self.commits[revision]


class HubApi:
    """Endpoints: each method takes the body and the path's variables and returns JSON, or bytes and headers."""

    def __init__(self):
        self.repositories, self.cards, self.url = {}, [], None

    def repository(self, repo):
        if repo not in self.repositories:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return self.repositories[repo]

    def create_repo(self, body):
        request = json.loads(body)
        repo = f"{request.get('organization') or USER}/{request['name']}"
        self.repositories.setdefault(repo, Repository())
        return {"url": f"{self.url}/{repo}", "name": repo}

    def validate_yaml(self, body):
        self.cards.append(json.loads(body)["content"])
        return {"errors": [], "warnings": []}

    def model_info(self, body, repo, revision="main"):
        commit = self.repository(repo).at(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return {"id": repo, "sha": commit.oid, "private": False, "tags": [], "siblings": siblings}

    def tree(self, body, repo, revision, path=""):
        if path:  # no repository here has folders
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        files = sorted(self.repository(repo).at(revision).files.items())
        return [{"type": "file", "path": path, "size": len(it), "oid": git_blob_id(it)} for path, it in files]

    def preupload(self, body, repo, revision):
        files = json.loads(body)["files"]
        return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}

    def commit(self, body, repo, revision):
        """`body` is ndjson: one header line, then one line per changed file."""
        repository = self.repository(repo)
        header, *changes = (json.loads(line) for line in body.splitlines())
        assert header["key"] == "header" and {change["key"] for change in changes} <= {"file"}
        changed = {change["value"]["path"]: base64.b64decode(change["value"]["content"]) for change in changes}
        commit = repository.append(repository.main.files | changed, header["value"]["summary"])
        return {"commitOid": commit.oid, "commitUrl": f"{self.url}/{repo}/commit/{commit.oid}"}

    def create_tag(self, body, repo, revision):
        repository = self.repository(repo)
        repository.commits[json.loads(body)["tag"]] = repository.at(revision)
        return {}

    def resolve(self, body, repo, revision, path):
        commit = self.repository(repo).at(revision)
        if path not in commit.files:
            raise HubError(404, "EntryNotFound", "Entry not found")
        return commit.files[path], {"X-Repo-Commit": commit.oid, "ETag": f'"{git_blob_id(commit.files[path])}"'}


REPO, REVISION, PATH = "(?P<repo>[^/]+/[^/]+?)", "(?P<revision>[^/]+)", "(?P<path>.+)"
ROUTES = [
    ("POST", "/api/repos/create", HubApi.create_repo),
    ("POST", "/api/validate-yaml", HubApi.validate_yaml),
    ("GET", f"/api/models/{REPO}", HubApi.model_info),
    ("GET", f"/api/models/{REPO}/revision/{REVISION}", HubApi.model_info),
    ("GET", f"/api/models/{REPO}/tree/{REVISION}(/{PATH})?", HubApi.tree),
    ("POST", f"/api/models/{REPO}/preupload/{REVISION}", HubApi.preupload),
    ("POST", f"/api/models/{REPO}/commit/{REVISION}", HubApi.commit),
    ("POST", f"/api/models/{REPO}/tag/{REVISION}", HubApi.create_tag),
    ("GET", f"/{REPO}/resolve/{REVISION}/{PATH}", HubApi.resolve),
]


class HubRequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30

    def answer(self):
        body, status, headers = self.rfile.read(int(self.headers.get("Content-Length", 0))), 200, {}
        try:
            content = self.respond(body)
            if isinstance(content, tuple):
                content, headers = content
        except HubError as error:
            content, status, headers = {"error": str(error)}, error.status, error.headers
        content, is_cut = content if isinstance(content, bytes) else json.dumps(content).encode(), False
        for fault in [fault for repo, fault in self.server.hub.faults.items() if repo in self.path]:
            status = fault if isinstance(fault, int) else status
            if isinstance(fault, str) and self.command == "GET" and self.path.endswith(".safetensors"):
                is_cut, content = fault == "cut", content.replace(b"F32", b"F00") if fault == "damaged" else content
        self.close_connection = self.close_connection or is_cut
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if is_cut else content)

    do_HEAD = do_GET = do_POST = answer

    def respond(self, body):
        method, path = self.command.replace("HEAD", "GET"), urlsplit(self.path).path
        for route_method, pattern, endpoint in ROUTES:
            if method == route_method and (match := re.fullmatch(pattern, path)):
                named = {name: unquote(value) for name, value in match.groupdict().items() if value}
                with self.server.hub.lock:
                    return endpoint(self.server.hub.api, body, **named)
        raise HubError(404, "", f"This Hub doesn't support {self.command} {path}")

    def log_message(self, format, *args):
        pass


class HubServer:
    """`with HubServer() as hub:` serves an empty Hub at `hub.url` until the block ends."""

    def __enter__(self):
        self.api, self.lock = HubApi(), threading.Lock()
        self.faults = {}  # part of a path → HTTP status of each answer, or what happens to weights: "cut", "damaged"
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), HubRequestHandler)
        self.http.daemon_threads = True
        self.http.hub = self
        self.url = self.api.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def commits(self, repo):
        """Yields the commits of a repository, newest first, without the initial empty one."""
        commit = self.api.repositories[repo].main
        while commit.parent is not None:
            yield commit
            commit = commit.parent

    def client_environment(self):
        """Returns environment variables that make a process use this Hub instead of huggingface.co."""
        hosts = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1", "localhost"]))
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": hosts}
