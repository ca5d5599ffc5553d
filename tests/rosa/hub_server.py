"""A stand-in of the hub: the part of its HTTP interface that huggingface_hub uses to push models and to fetch them."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

TOKEN = "hf_good"


class Hub:
    """Keeps repositories as {name: {"private": bool, "branches": {branch: {path: bytes}}, "commits": [...]}}."""

    def __init__(self):
        self.repositories, self.objects, self.port = {}, {}, 0
        self.start()

    def start(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), _Handler)
        self.server.hub, self.port = self, self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    @property
    def hub(self):
        return self.server.hub

    def _serve(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        url = urlparse(self.path)
        self.query = parse_qs(url.query)
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, url.path)
            if match and self.command in method.split():
                if "api" not in url.path or self._is_known():
                    answer(self, *map(unquote, match.groups()))
                return
        self._json({"error": f"no route {self.command} {url.path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = _serve

    def _is_known(self):
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._json({"error": "Invalid username or password."}, 401)
        return False

    def _send(self, body, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value, status=200, **headers):
        self._send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def _files(self, name, revision):
        """The files of a revision, or None after an answer that says what is missing."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif revision not in repository["branches"]:
            self._json({"error": "Revision not found"}, 404, X_Error_Code="RevisionNotFound")
        else:
            return repository["branches"][revision]

    def create(self):
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] == "somebody-else":
            return self._json({"error": "You don't have the rights to create a model under this namespace"}, 403)
        known = name in self.hub.repositories
        if not known:
            private = wanted.get("visibility") == "private" or wanted.get("private", False)
            self.hub.repositories[name] = {"private": private, "branches": {"main": {}}, "commits": []}
        self._json({"url": f"{self.hub.url}/{name}", "name": name}, 409 if known else 200)

    def validate_yaml(self):
        self._json({"errors": [], "warnings": []})

    def branch(self, name, branch):
        branches = self.hub.repositories[name]["branches"]
        known = branch in branches
        branches.setdefault(branch, dict(branches["main"]))
        self._json({}, 409 if known else 200)

    def preupload(self, name, revision):
        if self._files(name, revision) is not None:
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            self._json({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})

    def lfs_batch(self, name):
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            wanted["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.objects[oid] = self.body
        self._json({})

    def commit(self, name, revision):
        repository, (header, *changes) = self.hub.repositories[name], map(json.loads, self.body.splitlines())
        proposal = "create_pr" in self.query
        if proposal:
            revision = f"refs/pr/{len(repository['commits'])}"
            repository["branches"][revision] = dict(repository["branches"]["main"])
        files = repository["branches"][revision]
        for change in changes:
            value = change["value"]
            if change["key"] == "deletedFile":
                del files[value["path"]]
                continue
            lfs = change["key"] == "lfsFile"
            files[value["path"]] = self.hub.objects[value["oid"]] if lfs else base64.b64decode(value["content"])
        repository["commits"].append((revision, header["value"]["summary"]))
        oid = f"{len(repository['commits']):040x}"
        self._json({
            "commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid,
            "pullRequestUrl": f"{self.hub.url}/{name}/discussions/1" if proposal else None,
        })  # fmt: skip

    def info(self, name, revision="main"):
        files = self._files(name, revision)
        if files is not None:
            sha = _sha(files)
            siblings = [{"rfilename": path} for path in files]
            self.hub.repositories[name]["branches"][sha] = dict(files)  # before the answer: what follows it asks by sha
            self._json({"id": name, "modelId": name, "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def tree(self, name, revision):
        files = self._files(name, revision)
        if files is not None:
            self._json([{"type": "file", "path": p, "size": len(b), "oid": _etag(b)} for p, b in files.items()])

    def resolve(self, name, revision, path):
        files = self._files(name, revision)
        if files is None:
            return
        if path not in files:
            return self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        self._send(files[path], ETag=f'"{_etag(files[path])}"', X_Repo_Commit=_sha(files))


def _sha(files):
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def _etag(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_NAME = r"([^/]+/[^/]+)"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", f"/api/models/{_NAME}/branch/([^/]+)", _Handler.branch),
    ("POST", f"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    ("POST", f"/api/models/{_NAME}/commit/([^/]+)", _Handler.commit),
    ("GET", f"/api/models/{_NAME}/revision/([^/]+)", _Handler.info),
    ("GET", f"/api/models/{_NAME}/tree/([^/]+)", _Handler.tree),
    ("GET", f"/api/models/{_NAME}", _Handler.info),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]{64})", _Handler.lfs_upload),
    ("GET HEAD", f"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
