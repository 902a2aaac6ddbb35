"""A stand-in of a model hub on this machine: keeps what is uploaded, serves it again, and fails as it is told.

It speaks the part of the hub's protocol that `huggingface_hub` uses to make a repository, upload with git LFS, commit,
branch, tag and download. It knows no storage by chunks (xet), which the client has to be told to leave.
"""

import base64
import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import RLock, Thread
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ012345"
ATTRIBUTES = b"*.safetensors filter=lfs\n"


def oid(*parts: object) -> str:
    return hashlib.sha1(repr(parts).encode(), usedforsecurity=False).hexdigest()


@dataclass
class Repo:
    """Commits are whole trees: path -> (bytes, whether it is large)."""

    private: bool
    trees: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or self.tags.get(revision) or (revision if revision in self.trees else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        tree = self.trees[self.resolve(revision) or ""]
        return {name: data for name, (data, _) in tree.items() if name != ".gitattributes"}


class Hub:
    """The stand-in; ``failures`` are rows (pattern of "METHOD /path", status or "drop", how many times)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.failures: list[list] = []
        self.seen: list[str] = []
        self.spoil: str | None = None  # name of a file that is stored with a flipped bit
        self.lock = RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def put_data_set(self, name: str, files: dict[str, bytes]) -> str:
        """Hold a data set at a new commit, which is what its main branch is then; returns the commit."""
        repo = self.repos.setdefault(f"datasets/{name}", Repo(private=False))
        commit = oid(name, len(repo.trees), sorted(files.items()))
        repo.trees[commit], repo.branches["main"] = {path: (data, False) for path, data in files.items()}, commit
        return commit

    def fail(self, pattern: str, how: int | str, times: int = 1) -> None:
        self.failures.append([pattern, how, times])

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.seen)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def answer(self, body: object = None, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str = "") -> None:
        text = f"refused {self.headers.get('Authorization', '')}"  # a server that repeats what it should not
        self.answer({"error": text}, status, **({"X_Error_Code": code} if code else {}), X_Error_Message=text)

    def read_body(self, most: int | None = None) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        size = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(size if most is None else min(size, most))

    def handle_any(self) -> None:
        place = urlsplit(self.path)
        line = f"{self.command} {unquote(place.path)}"
        with self.hub.lock:
            self.hub.seen.append(line)
            failure = next((row for row in self.hub.failures if row[2] and re.search(row[0], line)), None)
            if failure:
                failure[2] -= 1
        if failure and failure[1] == "drop":
            self.read_body(most=1000)  # dies in the middle of what is sent
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(2)
            return
        body = self.read_body()
        if failure:
            return self.refuse(failure[1])
        with self.hub.lock:
            self.route(unquote(place.path), parse_qs(place.query), body)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_any

    def route(self, path: str, query: dict, body: bytes) -> None:
        hub, raw = self.hub, urlsplit(self.path).path
        if path.startswith("/store/"):
            hub.objects[path.rpartition("/")[2]] = body
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body))
        if match := re.fullmatch(r"/((?:datasets/)?[\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", raw):
            return self.resolve(match[1], unquote(match[2]), unquote(match[3]))
        if match := re.fullmatch(r"/api/(datasets/[\w.-]+/[\w.-]+)(?:/([\w-]+)(?:/([^/]+)(?:/(.+))?)?)?", raw):
            return self.read_data_set(*(unquote(part or "") for part in match.groups()), body)
        match = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(\w+)(?:/([^/]+))?)?.*", raw)
        repo = hub.repos.get(match[1]) if match else None
        if match is None or repo is None:
            return self.refuse(404, "RepoNotFound")
        verb, name = match[2] or "revision", unquote(match[3] or "main")
        if verb == "refs":
            branches, tags = (
                [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in refs.items()]
                for kind, refs in (("heads", repo.branches), ("tags", repo.tags))
            )
            return self.answer({"branches": branches, "tags": tags, "converts": []})
        if verb in ("branch", "tag"):
            return self.point(repo, verb, name, json.loads(body))
        if (commit := repo.resolve(name)) is None:
            return self.refuse(404, "RevisionNotFound")
        if verb == "revision":
            siblings = [{"rfilename": path} for path in repo.trees[commit]]
            return self.answer(
                {"id": match[1], "sha": commit, "private": repo.private, "siblings": siblings, "tags": []}
            )
        if verb == "tree":
            return self.answer([describe(path, *held) for path, held in sorted(repo.trees[commit].items())])
        if verb == "preupload":
            return self.preupload(repo, commit, json.loads(body))
        if verb == "commit":
            return self.commit(match[1], repo, name, body)
        return self.refuse(400)

    def read_data_set(self, name: str, verb: str, revision: str, under: str, body: bytes) -> None:
        """Of data sets only what reading one takes."""
        repo = self.hub.repos.get(name)
        commit = repo.resolve(revision or "main") if repo else None
        if repo is None or commit is None:
            return self.refuse(404, "RepoNotFound" if repo is None else "RevisionNotFound")
        tree = repo.trees[commit]
        folders = sorted({path.rpartition("/")[0] for path in tree} - {""})
        listed = [describe(path, *held) for path, held in sorted(tree.items())]
        listed += [{"type": "directory", "path": path, "oid": oid(path), "size": 0} for path in folders]
        if verb == "tree":
            return self.answer([row for row in listed if not under or row["path"].startswith(f"{under}/")])
        if verb == "paths-info":
            asked = parse_qs(body.decode()).get("paths", []) if body[:1] != b"{" else json.loads(body)["paths"]
            return self.answer([row for row in listed if row["path"] in asked])
        siblings = [{"rfilename": path} for path in tree]
        facts = {"sha": commit, "private": False, "siblings": siblings, "tags": [], "cardData": None}
        self.answer({"id": name.removeprefix("datasets/"), **facts})

    def create(self, asked: dict) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.hub.address}/{name}", "id": name}
        if name in self.hub.repos:
            return self.answer({"error": "You already created this model repo", **url}, 409)
        repo = self.hub.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.branches["main"] = oid(name)
        repo.trees[oid(name)] = {".gitattributes": (ATTRIBUTES, False)}
        self.answer(url)

    def batch(self, asked: dict) -> None:
        objects = [{"oid": o["oid"], "size": o["size"]} for o in asked["objects"]]
        for entry in objects:
            if entry["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.address}/store/{entry['oid']}"}}
        self.answer({"transfer": "basic", "objects": objects})

    def preupload(self, repo: Repo, commit: str, asked: dict) -> None:
        tree, files = repo.trees[commit], []
        for file in asked["files"]:
            large = file["path"].endswith((".safetensors", ".model"))
            row = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in tree:
                row["oid"] = describe(file["path"], *tree[file["path"]])["oid"]
            files.append(row)
        self.answer({"files": files})

    def commit(self, name: str, repo: Repo, branch: str, body: bytes) -> None:
        rows = [json.loads(line) for line in body.splitlines() if line]
        header = next(row["value"] for row in rows if row["key"] == "header")
        if branch not in repo.branches:
            return self.refuse(404, "RevisionNotFound")
        if header.get("parentCommit") not in (None, repo.branches[branch]):
            return self.refuse(412)
        tree = dict(repo.trees[repo.branches[branch]])
        for row in rows:
            value = row["value"]
            if row["key"] == "deletedFile":
                del tree[value["path"]]
            elif row["key"] in ("file", "lfsFile"):
                large = row["key"] == "lfsFile"
                if large and value["oid"] not in self.hub.objects:
                    return self.refuse(400)
                data = self.hub.objects[value["oid"]] if large else base64.b64decode(value["content"])
                if value["path"] == self.hub.spoil:
                    data = data[:-1] + bytes([data[-1] ^ 1])
                tree[value["path"]] = (data, large)
        made = oid(name, branch, len(repo.trees), sorted(tree))
        repo.trees[made], repo.branches[branch] = tree, made
        repo.messages.append(header["summary"])
        self.answer({"success": True, "commitOid": made, "commitUrl": f"{self.hub.address}/{name}/commit/{made}"})

    def point(self, repo: Repo, kind: str, name: str, asked: dict) -> None:
        refs, new = (repo.branches, name) if kind == "branch" else (repo.tags, asked.get("tag"))
        start = repo.resolve(asked.get("startingPoint", "main") if kind == "branch" else name)
        if new in refs:
            return self.refuse(409)
        if start is None:
            return self.refuse(404, "RevisionNotFound")
        refs[new] = start
        self.answer({})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.hub.repos.get(name)
        commit = repo.resolve(revision) if repo else None
        if repo is None or commit is None:
            return self.refuse(404, "RepoNotFound")
        if path not in repo.trees[commit]:
            return self.refuse(404, "EntryNotFound")
        data, large = repo.trees[commit][path]
        entry = describe(path, data, large)
        etag = entry["lfs"]["oid"] if large else entry["oid"]
        self.answer(data, ETag=f'"{etag}"', X_Repo_Commit=commit)


def describe(path: str, data: bytes, large: bool) -> dict:
    """How a tree lists a file; of a large one the git object is a pointer."""
    found = {"type": "file", "path": path, "size": len(data)}
    if not large:
        found["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        return found
    digest = hashlib.sha256(data).hexdigest()
    return found | {"oid": oid(digest), "lfs": {"oid": digest, "size": len(data), "pointerSize": 130}}
