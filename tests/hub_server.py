"""A small Hub: enough of the Hugging Face Hub's HTTP protocol for the real client to create, upload and download."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


USER = "user"


class Hub:
    """
    What a Hub holds, in memory.

    Args:
        url (`str`): Its address.
    """

    def __init__(self, url: str):
        self.url = url
        self.objects: dict[str, bytes] = {}  # large files, by their SHA-256
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> commit -> path -> content
        self.created: dict[str, dict] = {}  # what was asked for, by repository
        self.read_only: set[str] = set()
        self.lock = threading.Lock()

    def head(self, repo: str) -> str:
        """The newest commit of a repository."""
        return list(self.commits[repo])[-1]

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repository at a commit or branch (there is only the main one), by their paths."""
        return self.commits[repo][self.head(repo) if revision == "main" else revision]

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        """Make a commit that adds or replaces files, the first one of a new repository too; returns its hash."""
        with self.lock:
            commits = self.commits.setdefault(repo, {})
            sha = hashlib.sha1(f"{repo} {len(commits)}".encode()).hexdigest()
            commits[sha] = {**(list(commits.values())[-1] if commits else {}), **files}
        return sha


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *args):
        pass

    def respond(self, body: bytes = b"", status: int = 200, **headers: str):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def respond_json(self, content, status: int = 200, **headers: str):
        self.respond(json.dumps(content).encode(), status, Content_Type="application/json", **headers)

    def respond_missing(self, code: str):
        self.respond_json({"error": code}, 404, X_Error_Code=code, X_Error_Message=code)

    def handle_request(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for method, pattern, endpoint in ENDPOINTS:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                groups = match.groupdict()
                repo = groups.get("repo")
                if repo is not None and repo not in self.hub.commits:
                    return self.respond_missing("RepoNotFound")
                if groups.get("revision") not in (None, "main", *self.hub.commits.get(repo, ())):
                    return self.respond_missing("RevisionNotFound")
                return endpoint(self, body, **groups)
        self.respond_json({"error": f"{self.command} {path} is not part of this Hub"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, body: bytes):
        request = json.loads(body)
        repo = f"{request.get('organization') or USER}/{request['name']}"
        exists = repo in self.hub.commits
        self.hub.created[repo] = request
        if not exists:
            self.hub.commit(repo, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
        self.respond_json({"url": f"{self.hub.url}/{repo}", "name": repo}, 409 if exists else 200)

    def check_writing(self, body: bytes, repo: str):
        allowed = repo not in self.hub.read_only
        self.respond_json({} if allowed else {"error": "read only"}, 200 if allowed else 403)

    def validate_yaml(self, body: bytes):
        text = json.loads(body)["content"]
        valid = re.match(r"---\n.*?\n---\n", text, re.DOTALL) is not None
        self.respond_json({"errors": [], "warnings": [] if valid else [{"message": "empty or missing yaml metadata"}]})

    def preupload(self, body: bytes, repo: str, revision: str):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".pth")) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.respond_json({"files": files})

    def lfs_batch(self, body: bytes, repo: str):
        request = json.loads(body)
        if request["operation"] != "upload" or "basic" not in request["transfers"]:
            return self.respond_json({"message": "unsupported"}, 422)
        objects = []
        for item in request["objects"]:
            missing = item["oid"] not in self.hub.objects
            actions = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}} if missing else {}
            objects.append({"oid": item["oid"], "size": item["size"], **actions})
        self.respond_json({"transfer": "basic", "objects": objects})

    def lfs_put(self, body: bytes, oid: str):
        if hashlib.sha256(body).hexdigest() != oid:
            return self.respond(status=400)
        self.hub.objects[oid] = body
        self.respond()

    def commit(self, body: bytes, repo: str, revision: str):
        files = {}
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        sha = self.hub.commit(repo, files)
        self.respond_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def info(self, body: bytes, repo: str, revision: str = "main"):
        files = self.hub.files(repo, revision)
        sha = self.hub.head(repo) if revision == "main" else revision
        siblings = [{"rfilename": path} for path in files]
        self.respond_json({"id": repo, "sha": sha, "private": False, "tags": [], "siblings": siblings})

    def tree(self, body: bytes, repo: str, revision: str):
        files = self.hub.files(repo, revision).items()
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files
        ]
        self.respond_json(entries)

    def resolve(self, body: bytes, repo: str, revision: str, path: str):
        content = self.hub.files(repo, revision).get(path)
        if content is None:
            return self.respond_missing("EntryNotFound")
        oid = hashlib.sha256(content).hexdigest()
        self.respond(
            content,
            ETag=f'"{oid}"',
            X_Linked_ETag=f'"{oid}"',
            X_Linked_Size=len(content),
            X_Repo_Commit=self.hub.head(repo) if revision == "main" else revision,
        )


REPO = r"(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
ENDPOINTS = [
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("POST", rf"/api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", Handler.lfs_put),
    ("POST", rf"/api/models/{REPO}/commit/{REVISION}", Handler.commit),
    ("GET", rf"/api/models/{REPO}", Handler.info),
    ("GET", rf"/api/models/{REPO}/auth-check/write", Handler.check_writing),
    ("GET", rf"/api/models/{REPO}/revision/{REVISION}", Handler.info),
    ("GET", rf"/api/models/{REPO}/tree/{REVISION}", Handler.tree),
    ("GET HEAD", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]


@contextmanager
def serve():
    """Run a [`Hub`] on a free port of this machine for the length of a `with` block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
