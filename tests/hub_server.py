"""
A Hub on loopback, as far as pushing and pulling models and data sets needs one.

    with HubServer() as hub:
        subprocess.run([...], env=os.environ | hub.environment(cache_dir))
    assert hub.commits[0].files.keys() == {...}

huggingface_hub reads its endpoint when it is imported, so what talks to this server runs in a process of its own.
Repositories live in memory. Models are uploaded as regular files; data sets as LFS objects, which
`datasets.push_to_hub` insists on.
"""

import base64
import dataclasses
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlparse


NAMESPACE = "tester"
_REPO = r"(?P<id>[\w.-]+/[\w.-]+)"
_API = rf"/api/(?P<kind>models|datasets)/{_REPO}"


@dataclasses.dataclass
class Commit:
    repo: str
    message: str
    files: dict[str, bytes]


class HubServer:
    """
    Use as a context manager.

    Attributes:
        repos: name ("models/tester/x" or "datasets/tester/x") -> path -> content.
        commits: every commit, in order, with the files that it brought.
        requests: "METHOD path" of every request, in order.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: list[Commit] = []
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, cache_dir: Path) -> dict[str, str]:
        """What a process needs to take this for the Hub, with its caches in a folder of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": "hf_loopback",
            "HF_HOME": str(cache_dir),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def revision(self, repo: str) -> str:
        """Identifier of a repository's state: 40 hex digits that change with its content."""
        digest = hashlib.sha1(repo.encode())
        for path, content in sorted(self.repos[repo].items()):
            digest.update(path.encode() + hashlib.sha1(content).digest())
        return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self._dispatch()

    def do_GET(self):
        self._dispatch()

    def do_POST(self):
        self._dispatch()

    def do_PUT(self):
        self._dispatch()

    def _dispatch(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, action in _ROUTES:
            if wanted == method and (match := re.fullmatch(pattern, path)):
                return action(self, body, **match.groupdict())
        return self._missing("RepoNotFound")

    # ------------------------------------------------------------------------------------------------- answers

    def _send(self, content: bytes, status: int = 200, content_type: str = "application/json", **headers):
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content, **options):
        self._send(json.dumps(content).encode(), **options)

    def _missing(self, code: str):
        self._send(b'{"error": "not found"}', status=404, X_Error_Code=code)

    # -------------------------------------------------------------------------------------------------- routes

    def whoami(self, body):
        self._json({"type": "user", "name": NAMESPACE, "auth": {"accessToken": {"role": "write"}}, "orgs": []})

    def create(self, body):
        wanted = json.loads(body)
        kind = wanted.get("type") or "model"
        name = f"{wanted.get('organization') or NAMESPACE}/{wanted['name']}"
        repo = f"{kind}s/{name}"
        status = 409 if repo in self.hub.repos else 200
        self.hub.repos.setdefault(repo, {})
        prefix = "datasets/" if kind == "dataset" else ""
        self._json({"url": f"{self.hub.url}/{prefix}{name}", "name": name, "id": name}, status=status)

    def validate(self, body):
        self._json({"errors": [], "warnings": []})

    def preupload(self, body, kind, id):
        mode = "lfs" if kind == "datasets" else "regular"
        files = [
            {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files, "commitOid": self.hub.revision(f"{kind}/{id}")})

    def lfs_batch(self, body, id):
        wanted = json.loads(body)["objects"]
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}}
            for item in wanted
            if item["oid"] not in self.hub.objects
        ]
        self._json({"transfer": "basic", "objects": objects}, content_type="application/vnd.git-lfs+json")

    def lfs_put(self, body, oid):
        self.hub.objects[oid] = body
        self._send(b"")

    def commit(self, body, kind, id):
        repo, commit = f"{kind}/{id}", Commit(f"{kind}/{id}", "", {})
        for line in body.decode().splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                commit.message = value["summary"]
            elif operation["key"] == "file":
                commit.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                commit.files[value["path"]] = self.hub.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                self.hub.repos[repo].pop(value["path"])
        self.hub.repos[repo].update(commit.files)
        self.hub.commits.append(commit)
        revision = self.hub.revision(repo)
        self._json({"success": True, "commitOid": revision, "commitUrl": f"{self.hub.url}/{id}/commit/{revision}"})

    def info(self, body, kind, id, revision):
        repo = f"{kind}/{id}"
        if repo not in self.hub.repos:
            return self._missing("RepoNotFound")
        siblings = [{"rfilename": path, "size": len(content)} for path, content in self.hub.repos[repo].items()]
        sha = self.hub.revision(repo)
        return self._json({"_id": sha[:24], "id": id, "sha": sha, "siblings": siblings, "tags": [], "private": False})

    def tree(self, body, kind, id, revision, path):
        repo, prefix = f"{kind}/{id}", f"{path[1:]}/" if path else ""
        if repo not in self.hub.repos:
            return self._missing("RepoNotFound")
        below = {name: len(content) for name, content in self.hub.repos[repo].items() if name.startswith(prefix)}
        folders = {str(parent) for name in below for parent in PurePosixPath(name).parents if parent.name}
        entries = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        entries += [{"type": "file", "path": name, "oid": "0" * 40, "size": size} for name, size in below.items()]
        entries = [entry for entry in entries if entry["path"].startswith(prefix)]
        if "recursive=true" not in urlparse(self.path).query.lower():
            entries = [entry for entry in entries if "/" not in entry["path"][len(prefix) :]]
        return self._json(entries) if entries or not prefix else self._missing("EntryNotFound")

    def paths_info(self, body, kind, id, revision):
        repo = f"{kind}/{id}"
        if repo not in self.hub.repos:
            return self._missing("RepoNotFound")
        is_json = self.headers.get("Content-Type", "").startswith("application/json")
        wanted = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
        entries = []
        for path in [wanted] if isinstance(wanted, str) else wanted:
            content = self.hub.repos[repo].get(path)
            if content is not None:
                entries.append({"type": "file", "path": path, "oid": "0" * 40, "size": len(content)})
            elif any(name.startswith(f"{path}/") for name in self.hub.repos[repo]):
                entries.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        return self._json(entries)

    def resolve(self, body, kind, id, revision, path):
        repo = f"{'datasets' if kind else 'models'}/{id}"
        if repo not in self.hub.repos:
            return self._missing("RepoNotFound")
        content = self.hub.repos[repo].get(path)
        if content is None:
            return self._missing("EntryNotFound")
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        headers = {"ETag": etag, "X_Repo_Commit": self.hub.revision(repo), "Accept_Ranges": "bytes"}
        return self._send(content, content_type="application/octet-stream", **headers)


_ROUTES = (
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"{_API}/preupload/[^/]+", _Handler.preupload),
    ("POST", rf"/(?:datasets/)?{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.lfs_put),
    ("POST", rf"{_API}/commit/[^/]+", _Handler.commit),
    ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(?P<path>/.*)?", _Handler.tree),
    ("GET", rf"{_API}(?:/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("GET", rf"/(?P<kind>datasets/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
)
