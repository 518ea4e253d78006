"""A Hugging Face Hub in one process: the part of its HTTP API that a push and a pull use, on loopback, in memory.

The real `huggingface_hub` client talks to it when HF_ENDPOINT is `HubServer.url`. Every push is a commit; a revision
is `main` or a commit id. Files of LFS type go through the git-lfs "basic" transfer and are served, as by the
real Hub, through a redirect to another host. Xet, its successor, is switched off in `client_environment`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

USER = "reader"
TOKEN = "hf_" + "loopback" * 4
SOCKET_TIMEOUT_SECONDS = 30
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
LFS_MIN_BYTES = 10 * 2**20  # the Hub refuses larger files outside LFS


class HubError(Exception):
    """An answer that is not 2xx; `code` becomes X-Error-Code, from which the client chooses its exception."""

    def __init__(self, status, code, message, headers=None):
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


@dataclass
class Response:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def json_response(value, status=200, **headers):
    return Response(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})


def git_blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class StoredFile:
    content: bytes
    is_lfs: bool

    @cached_property
    def etag(self):
        """sha256 of an LFS file, git blob id of any other, as on the Hub."""
        return hashlib.sha256(self.content).hexdigest() if self.is_lfs else git_blob_id(self.content)

    def describe(self, path):
        """The entry of a repository tree, as the client's RepoFile reads it."""
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": git_blob_id(self.content)}
        if self.is_lfs:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.etag}\nsize {len(self.content)}\n"
            entry["oid"] = git_blob_id(pointer.encode())
            entry["lfs"] = {"oid": self.etag, "size": len(self.content), "pointerSize": len(pointer)}
        return entry


@dataclass(frozen=True)
class Commit:
    files: dict[str, StoredFile]
    message: str
    parent: str | None

    @cached_property
    def oid(self):
        tree = sorted((path, file.etag) for path, file in self.files.items())
        return hashlib.sha1(json.dumps([self.parent, self.message, tree]).encode()).hexdigest()


class Repository:
    """Commits of one model repository, the last of which is `main`."""

    def __init__(self):
        self.commits = {}
        self.append({}, "initial commit", None)

    def append(self, files, message, parent):
        commit = Commit(files, message, parent)
        self.commits[commit.oid] = commit
        self.main = commit.oid
        return commit

    def at(self, revision="main"):
        oid = self.main if revision == "main" else revision
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]


class HubApi:
    """One method per endpoint. Each gets the request body and the variables of its path, and returns a Response."""

    def __init__(self):
        self.repositories, self.lfs_objects = {}, {}
        self.url = self.lfs_url = None  # known when the server has its port

    def repository(self, repo):
        if repo not in self.repositories:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return self.repositories[repo]

    def create_repo(self, body):
        request = json.loads(body)
        repo = f"{request.get('organization') or USER}/{request['name']}"
        answer = {"url": f"{self.url}/{repo}", "name": repo}
        if repo in self.repositories:
            return json_response({**answer, "error": "You already created this model repo"}, status=409)
        self.repositories[repo] = Repository()
        return json_response(answer)

    def validate_yaml(self, body):
        return json_response({"errors": [], "warnings": []})

    def model_info(self, body, repo, revision="main"):
        commit = self.repository(repo).at(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return json_response({"id": repo, "sha": commit.oid, "private": False, "tags": [], "siblings": siblings})

    def tree(self, body, repo, revision, path=""):
        if path:  # no repository here has folders
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}")
        files = self.repository(repo).at(revision).files
        return json_response([files[name].describe(name) for name in sorted(files)])

    def preupload(self, body, repo, revision):
        """Says which files go through LFS, and the etags that the client compares with to skip unchanged ones."""
        known = self.repository(repo).at(revision).files
        modes = []
        for file in json.loads(body)["files"]:
            is_lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_MIN_BYTES
            etag = known[file["path"]].etag if file["path"] in known else None
            mode = "lfs" if is_lfs else "regular"
            modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": etag})
        return json_response({"files": modes})

    def lfs_batch(self, body, repo):
        self.repository(repo)
        objects = []
        for wanted in json.loads(body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.lfs_objects:
                answer["actions"] = {"upload": {"href": f"{self.lfs_url}/lfs/{wanted['oid']}"}}
            objects.append(answer)
        return json_response({"transfer": "basic", "objects": objects})

    def lfs_upload(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, "", f"The upload's content does not hash to {oid}")
        self.lfs_objects[oid] = body
        return Response()

    def lfs_download(self, body, oid):
        if oid not in self.lfs_objects:
            raise HubError(404, "", f"No LFS object {oid}")
        return Response(self.lfs_objects[oid], headers={"ETag": f'"{oid}"'})

    def commit(self, body, repo, revision):
        """`body` is ndjson: one header line, then one line per changed file."""
        repository = self.repository(repo)
        parent = repository.at("main")
        files, message = dict(parent.files), ""
        for line in body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = StoredFile(base64.b64decode(value["content"]), is_lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.lfs_objects:
                    raise HubError(400, "", f"{value['path']} was committed before its LFS object was uploaded")
                files[value["path"]] = StoredFile(self.lfs_objects[value["oid"]], is_lfs=True)
            else:
                raise HubError(400, "", f"Unknown commit operation: {key}")
        commit = repository.append(files, message, parent.oid)
        return json_response({"commitOid": commit.oid, "commitUrl": f"{self.url}/{repo}/commit/{commit.oid}"})

    def resolve(self, body, repo, revision, path):
        commit = self.repository(repo).at(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            raise HubError(404, "EntryNotFound", "Entry not found", headers)
        file = commit.files[path]
        headers["ETag"] = f'"{file.etag}"'
        if not file.is_lfs:
            return Response(file.content, headers=headers)
        headers |= {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        return Response(status=302, headers={**headers, "Location": f"{self.lfs_url}/lfs/{file.etag}"})


ROUTES = [
    ("POST", "/api/repos/create", HubApi.create_repo),
    ("POST", "/api/validate-yaml", HubApi.validate_yaml),
    ("GET", "/api/models/{repo}", HubApi.model_info),
    ("GET", "/api/models/{repo}/revision/{revision}", HubApi.model_info),
    ("GET", "/api/models/{repo}/tree/{revision}", HubApi.tree),
    ("GET", "/api/models/{repo}/tree/{revision}/{path}", HubApi.tree),
    ("POST", "/api/models/{repo}/preupload/{revision}", HubApi.preupload),
    ("POST", "/api/models/{repo}/commit/{revision}", HubApi.commit),
    ("POST", "/{repo}.git/info/lfs/objects/batch", HubApi.lfs_batch),
    ("PUT", "/lfs/{oid}", HubApi.lfs_upload),
    ("GET", "/lfs/{oid}", HubApi.lfs_download),
    ("GET", "/{repo}/resolve/{revision}/{path}", HubApi.resolve),
]
PATH_VARIABLES = {"repo": "[^/]+/[^/]+?", "revision": "[^/]+", "path": ".+", "oid": "[0-9a-f]{64}"}
PUBLIC_WRITES = (HubApi.validate_yaml, HubApi.lfs_upload)  # an LFS upload has no token: the link itself is the right


def compile_route(pattern):
    escaped = pattern.replace(".", r"\.")
    return re.compile(re.sub(r"\{(\w+)\}", lambda m: f"(?P<{m[1]}>{PATH_VARIABLES[m[1]]})", escaped))


COMPILED_ROUTES = [(method, compile_route(pattern), endpoint) for method, pattern, endpoint in ROUTES]


class HubRequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = SOCKET_TIMEOUT_SECONDS

    def answer(self):
        self.server.hub.requests.append(f"{self.command} {self.path}")
        try:
            response = self.respond(self.read_body())
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message, **error.headers}
            response = json_response({"error": error.message}, error.status, **headers)
        self.send(response)

    do_HEAD = do_GET = do_POST = do_PUT = answer

    def read_body(self):
        """Always read, also when the answer is an error: the rest would be taken for the connection's next request."""
        if "Transfer-Encoding" in self.headers:
            self.close_connection = True
            raise HubError(411, "", "Send a Content-Length")
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def respond(self, body):
        hub, method, path = self.server.hub, self.command.replace("HEAD", "GET"), urlsplit(self.path).path
        for route_method, pattern, endpoint in COMPILED_ROUTES:
            match = pattern.fullmatch(path)
            if match and method == route_method:
                if method != "GET" and endpoint not in PUBLIC_WRITES and not self.is_authorized():
                    raise HubError(401, "", "Invalid credentials in Authorization header")
                with hub.lock:
                    return endpoint(hub.api, body, **{key: unquote(value) for key, value in match.groupdict().items()})
        raise HubError(404, "", f"This small Hub has no {self.command} {path}")

    def is_authorized(self):
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def send(self, response):
        self.send_response(response.status)
        for name, value in {"Content-Length": str(len(response.body)), **response.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    def log_message(self, format, *args):
        pass


class HubServer:
    """`with HubServer() as hub:` serves an empty Hub at `hub.url` until the block ends."""

    def __enter__(self):
        self.api, self.lock, self.requests = HubApi(), threading.Lock(), []
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), HubRequestHandler)
        self.http.daemon_threads = True
        self.http.hub = self
        port = self.http.server_address[1]
        self.url = self.api.url = f"http://127.0.0.1:{port}"
        # Another host name, as on the Hub: the client follows a redirect within one host before it reads its headers.
        self.api.lfs_url = f"http://localhost:{port}"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def commits(self, repo):
        """Its commits, newest first, without the empty one that every repository starts with."""
        repository = self.api.repositories[repo]
        commit = repository.at()
        while commit.parent is not None:
            yield commit
            commit = repository.commits[commit.parent]

    def client_environment(self):
        """Environment variables with which a process talks to this Hub instead of huggingface.co."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1", "localhost"])),
        }
