"""A small Hugging Face Hub: its HTTP API for reading, with repos that tests make and faults on demand.

As on the real one, files stored by LFS are redirected to another host (here: another port) with a signed, expiring URL,
small ones are answered directly; revisions are branches, tags, full and short commits; errors carry X-Error-Code.

Run it by hand with ``python -m support.fake_hub FOLDER [--repo org/name]`` from the ``tests`` folder.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, quote

from support.sendfile_server import Fault, FileHandler, Ledger, Seen, Served

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".model")


@dataclass(frozen=True)
class HubFile:
    """One file of a commit."""

    path: str
    stored: Path
    size: int
    sha256: str
    git_oid: str
    lfs: bool


@dataclass
class HubRepo:
    """A repo: commits (sha to files), and the branches and tags that name them."""

    repo_id: str
    commits: dict[str, dict[str, HubFile]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False
    members: set[str] = field(default_factory=set)

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, tag, full or short (7 digits or more) commit stands for."""
        named = self.branches.get(revision) or self.tags.get(revision)
        if named or revision in self.commits:
            return named or revision
        found = [sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)]
        return found[0] if len(found) == 1 else None


def _git_oid(content: Path, size: int) -> str:
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with content.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


class FakeHub:
    """The hub and the file host behind it, on two loopback ports, from construction until ``stop``.

    Args:
        folder: Where contents given as bytes are kept; contents given as paths are served from where they are.
        page_size: Entries on one page of a tree listing.
        url_lifetime: Seconds for which a redirect's signature is good.

    Attributes:
        misanswer: Changes what the API answers as JSON, for tests of clients that must not believe everything.
    """

    def __init__(self, folder: Path, *, page_size: int = 1000, url_lifetime: float = 3600) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.repos: dict[str, HubRepo] = {}
        self.page_size = page_size
        self.url_lifetime = url_lifetime
        self.ledger = Ledger()
        self.misanswer: Callable[[object], object] = lambda value: value
        self._contents: dict[str, Path] = {}
        self._hashed: dict[tuple[str, int, int], tuple[str, str]] = {}
        self.cdn = Served(_FileHost, self.ledger, hub=self)
        self.api = Served(_HubHandler, self.ledger, hub=self)
        self.url = self.api.url

    def stop(self) -> None:
        self.ledger.stop()
        self.api.stop()
        self.cdn.stop()

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path],
        *,
        branch: str = "main",
        lfs: Callable[[str], bool] = lambda path: path.endswith(LFS_SUFFIXES),
        token: str | None = None,
        gated: bool = False,
    ) -> str:
        """Make the files the branch's new state and return the commit (40 hex digits).

        Args:
            repo_id: The repo, made if it is not there.
            files: The whole content of the new state, by path.
            branch: The branch that moves.
            lfs: Whether a path is stored by LFS.
            token: Only this token may read the repo.
            gated: Anybody may list the repo, only ``HubRepo.members`` (tokens) may read its files.
        """
        repo = self.repos.setdefault(repo_id, HubRepo(repo_id))
        repo.token, repo.gated = token or repo.token, gated or repo.gated
        entries = {path: self._store(path, content, lfs(path)) for path, content in sorted(files.items())}
        parents = repo.branches.get(branch, "")
        listing = "\n".join(f"{file.git_oid} {path}" for path, file in entries.items())
        sha = hashlib.sha1(f"{repo_id}\n{parents}\n{listing}".encode("utf-8", "surrogateescape")).hexdigest()
        repo.commits[sha] = entries
        repo.branches[branch] = sha
        return sha

    def fault(self, match: str, **what: object) -> Fault:
        """Spoil requests whose URL path matches; see ``Fault`` for the kinds.

        LFS files are sent from ``/files/REPO/PATH`` on the file host, after ``/REPO/resolve/…`` redirected there.
        """
        return self.ledger.add_fault(Fault(match, **what))  # type: ignore[arg-type]

    def file_requests(self) -> list[Seen]:
        """The GETs that asked for files' bytes (not redirects)."""
        return [seen for seen in self.ledger.requests if seen.path.startswith("/files/") and seen.method == "GET"]

    def _store(self, path: str, content: bytes | Path, lfs: bool) -> HubFile:
        if isinstance(content, bytes):
            sha = hashlib.sha256(content).hexdigest()
            stored = self.folder / sha
            if not stored.exists():
                stored.write_bytes(content)
        else:
            stored = content
        stat = stored.stat()
        key = (str(stored), stat.st_size, stat.st_mtime_ns)
        if key not in self._hashed:
            with stored.open("rb") as file:
                sha = hashlib.file_digest(file, "sha256").hexdigest()
            self._hashed[key] = sha, _git_oid(stored, stat.st_size)
        sha, oid = self._hashed[key]
        self._contents[sha] = stored
        return HubFile(path, stored, stat.st_size, sha, oid, lfs)

    def sign(self, sha256: str) -> str:
        """The query of a file URL that is good for ``url_lifetime`` seconds."""
        until = time.time() + self.url_lifetime
        return f"Expires={until:.3f}&Signature={hashlib.sha256(f'{sha256}{until:.3f}'.encode()).hexdigest()}"

    def content(self, sha256: str) -> Path:
        return self._contents[sha256]


def _signature_holds(sha256: str, query: str) -> bool:
    given = {name: values[0] for name, values in parse_qs(query).items()}
    until = given.get("Expires", "0")
    right = hashlib.sha256(f"{sha256}{until}".encode()).hexdigest()
    return given.get("Signature") == right and float(until) > time.time()


class _FileHost(FileHandler):
    """Where LFS redirects lead: needs a signature, and refuses requests that also carry a token, as S3 does."""

    hub: ClassVar[FakeHub]

    def route(self, path: str, query: str) -> None:
        sha = parse_qs(query).get("sha256", [""])[0]
        if self.headers.get("Authorization"):
            self.send_text(400, "Only one auth mechanism allowed")
        elif not _signature_holds(sha, query.partition("&")[2]):
            self.send_text(403, "Request has expired")
        else:
            self.send_file(self.hub.content(sha), {"ETag": f'"{sha[:32]}-host"'})


class _HubHandler(FileHandler):
    hub: ClassVar[FakeHub]

    def route(self, path: str, query: str) -> None:
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._api("/".join(parts[2:4]), parts[4:], query)
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), self._raw_parts()[3], "/".join(parts[4:]))
        else:
            self._error(404, "EntryNotFound", "no such page")

    def _raw_parts(self) -> list[str]:
        from urllib.parse import unquote

        return [unquote(part) for part in self.path.partition("?")[0].strip("/").split("/")]

    def _error(self, status: int, code: str, message: str) -> None:
        self.send_text(status, json.dumps({"error": message}), {"X-Error-Code": code, "X-Error-Message": message})

    def _bearer(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _repo(self, repo_id: str) -> HubRepo | None:
        repo = self.hub.repos.get(repo_id)
        known = {repo.token for repo in self.hub.repos.values() if repo.token} | {
            member for repo in self.hub.repos.values() for member in repo.members
        }
        if self._bearer() and self._bearer() not in known:
            self.send_text(
                401,
                '{"error":"Invalid credentials in Authorization header"}',
                {"X-Error-Message": "Invalid credentials in Authorization header"},
            )
            return None
        if repo is None or (repo.token and repo.token != self._bearer()):
            # The real hub answers the same for what is missing and for what one may not see.
            self._error(404 if self._bearer() else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def _api(self, repo_id: str, rest: list[str], query: str) -> None:
        raw = self._raw_parts()
        repo = self._repo(repo_id)
        if repo is None:
            return
        match rest:
            case []:
                self._info(repo, "main")
            case ["revision", *_]:
                self._info(repo, raw[5])
            case ["tree", _, *folder]:
                self._tree(repo, raw[5], "/".join(folder), query)
            case ["refs"]:
                named = lambda refs, kind: [  # noqa: E731
                    {"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in refs.items()
                ]
                answer = {"branches": named(repo.branches, "heads"), "tags": named(repo.tags, "tags"), "converts": []}
                self._json(answer)
            case _:
                self._error(404, "EntryNotFound", "no such page")

    def _json(self, value: object, headers: dict[str, str] | None = None) -> None:
        self.send_text(
            200, json.dumps(self.hub.misanswer(value)), {"Content-Type": "application/json", **(headers or {})}
        )

    def _info(self, repo: HubRepo, revision: str) -> None:
        sha = repo.resolve(revision)
        if sha is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        gated = "manual" if repo.gated else False
        self._json(
            {"_id": "0", "id": repo.repo_id, "modelId": repo.repo_id, "sha": sha, "siblings": siblings, "gated": gated}
            | {"private": repo.token is not None, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        )

    def _tree(self, repo: HubRepo, revision: str, folder: str, query: str) -> None:
        sha = repo.resolve(revision)
        if sha is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        entries: list[dict[str, object]] = []
        for path, file in repo.commits[sha].items():
            if folder and not path.startswith(f"{folder}/"):
                continue
            entry: dict[str, object] = {"type": "file", "path": path, "size": file.size, "oid": file.git_oid}
            if file.lfs:
                entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
            entries.append(entry)
        start = int(parse_qs(query).get("cursor", ["0"])[0])
        headers = {}
        if start + self.hub.page_size < len(entries):
            more = f"{self.hub.url}/api/models/{repo.repo_id}/tree/{quote(revision, safe='')}"
            headers["Link"] = f'<{more}?recursive=true&cursor={start + self.hub.page_size}>; rel="next"'
        self._json(entries[start : start + self.hub.page_size], headers)

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(repo_id)
        if repo is None:
            return
        sha = repo.resolve(revision)
        file = repo.commits[sha].get(path) if sha else None
        if sha is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        elif repo.gated and self._bearer() not in repo.members:
            self._error(403, "GatedRepo", "Access to this model is restricted: ask for access on its page.")
        elif file is None:
            self._error(404, "EntryNotFound", "Entry not found")
        elif file.lfs:
            target = f"{self.hub.cdn.url}/files/{repo_id}/{quote(path, errors='surrogateescape')}"
            linked = {"X-Linked-Size": str(file.size), "X-Linked-ETag": f'"{file.sha256}"', "X-Repo-Commit": sha}
            location = f"{target}?sha256={file.sha256}&{self.hub.sign(file.sha256)}"
            self.send_text(302, "", {"Location": location, **linked})
        else:
            self.send_file(file.stored, {"ETag": f'"{file.git_oid}"', "X-Repo-Commit": sha})


@contextlib.contextmanager
def fake_hub(folder: Path | None = None, **options: object):
    """A FakeHub that is stopped, and whose own folder is removed, at the end of the block."""
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fake-hub-")))
        hub = FakeHub(folder, **options)  # type: ignore[arg-type]
        stack.callback(hub.stop)
        yield hub


def main() -> None:
    """Serve the files of a folder as one repo until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the files of the repo")
    parser.add_argument("--repo", default="test/model", help="its id (default: %(default)s)")
    parser.add_argument("--ignore", default=".git/*", help="paths to leave out")
    arguments = parser.parse_args()
    with fake_hub() as hub:
        root: Path = arguments.folder
        found = {str(p.relative_to(root)): p for p in sorted(root.rglob("*")) if p.is_file()}
        sha = hub.commit(arguments.repo, {k: v for k, v in found.items() if not fnmatch.fnmatch(k, arguments.ignore)})
        print(f"export HF_ENDPOINT={hub.url}   # {arguments.repo} at {sha}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            hub.ledger.wait(10**9)


if __name__ == "__main__":
    main()
