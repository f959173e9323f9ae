"""Which snapshot the Hub's clients mean by a repo and a revision: only what is active here, or was and is kept."""

import re
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from modelcache_server.catalog import Announced, Catalog, ServedSnapshot
from modelcache_server.errors import Reason, RequestError
from modelcache_server.hub_listing import HubListing
from modelcache_volume.v1 import manifest_pb2

_ACTIVE_REFS = ("main", "HEAD")
"""Stand for what is active, whatever branch or tag was asked for: programs ask for `main` unless told otherwise."""
_NAMESPACE = "modelcache"
"""Stands before the names of buckets and folders for programs that know no names without a slash."""
_PAGES = frozenset({"resolve", "revision", "tree", "refs", "paths-info", "auth-check", "commits", "discussions"})
_SPECIAL_REF_PARTS = 3  # refs/pr/1

_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_LOOK_AGAIN_SECONDS = 10.0


@dataclass(frozen=True)
class HubRevision:
    """One revision of a repo, as it is served.

    Attributes:
        commit: 40 hex digits.
        pinned: it was asked for by its commit, so that the answer never changes.
        published_at: seconds since the Unix epoch; 0 where that is not known.
        listing: its files.
        digest: of its snapshot.
    """

    commit: str
    pinned: bool
    published_at: int
    listing: HubListing
    digest: str


@dataclass(frozen=True)
class HubRef:
    """A branch or the like, whose place in Git is `ref`."""

    name: str
    ref: str


@dataclass(frozen=True)
class _Active:
    """What is active by its names, made once for each activation: nearly every request asks for it.

    Attributes:
        announced: what this was made of.
        repos: the names of the repo.
        refs: what is listed as its refs.
        named: its revision by each name.
    """

    announced: Announced
    repos: tuple[str, ...]
    refs: tuple[HubRef, ...]
    named: dict[str, HubRevision]


@dataclass(frozen=True)
class _Kept:
    digest: str
    own: bool
    published_at: int

    @property
    def rank(self) -> tuple[bool, int]:
        """What this name had active goes before what another selection of the same commit holds."""
        return self.own, self.published_at


@dataclass(frozen=True)
class _Index:
    """Commits of each repo, as read at one moment."""

    announced: Announced
    read_at: float
    repos: dict[str, dict[str, _Kept]]


class HubRevisions:
    """Looks repos and revisions up in a catalog. Thread safe."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._lock = threading.Lock()
        self._index: _Index | None = None
        self._active: _Active | None = None
        self._listings: WeakKeyDictionary[ServedSnapshot, HubListing] = WeakKeyDictionary()

    def split(self, segments: list[str]) -> tuple[str, list[str]]:
        """The served repo that a path begins with, as it is called there, and the rest of the path.

        Raises:
            RequestError: NOT_READY, or UNKNOWN_REPO.
        """
        active = self._now()
        found = _named_by(segments, active.repos) or _named_by(segments, self._read_index(active.announced).repos)
        if found is not None:
            return found
        if "/" in segments[0] and segments[0] in active.repos:
            raise RequestError(Reason.UNKNOWN_REPO, f"Write the slash of {segments[0]} as it is, not as %2F.")
        names = " or ".join(active.repos)
        raise RequestError(
            Reason.UNKNOWN_REPO,
            f"This server has the model {names} and no other: it passes no request on to another hub.",
        )

    def refs(self, repo: str) -> tuple[tuple[HubRef, ...], str]:
        """The names that stand for what is active, and its commit; no names if the repo was active earlier only."""
        active = self._now()
        return active.refs if repo in active.repos else (), active.announced.active.commit

    def split_revision(self, repo: str, segments: list[str]) -> tuple[str, list[str]]:
        """A revision that a path begins with, and the rest; slashes of known refs need not be escaped."""
        active = self._now()
        for ref in active.refs if repo in active.repos else ():
            for name in (ref.ref, ref.name):
                if (rest := _after(segments, name)) is not None:
                    return name, rest
        length = _SPECIAL_REF_PARTS if segments[0] == "refs" else 1
        return "/".join(segments[:length]), segments[length:]

    def resolve(self, repo: str, ref: str) -> HubRevision:
        """The revision that a branch, tag, full or short (7 digits or more) commit stands for.

        Raises:
            RequestError: NOT_READY, or UNKNOWN_REF.
        """
        now = self._now()
        if repo in now.repos and (named := now.named.get(ref)) is not None:
            return named
        announced = now.announced
        active = announced.active
        commit, kept = self._find(announced, repo, ref)
        if kept.digest == active.digest or commit == active.commit:
            return self._revision(announced.snapshot, commit, kept.published_at, pinned=ref == commit)
        try:
            snapshot = self._catalog.get(kept.digest)
        except RequestError as error:
            if error.reason is not Reason.REVISION_GONE:
                raise
            raise _unknown(repo, ref, "it was pruned") from None
        return self._revision(snapshot, commit, kept.published_at, pinned=ref == commit)

    def _now(self) -> _Active:
        """What is active; raises NOT_READY."""
        announced = self._catalog.active()
        known = self._active
        if known is None or known.announced is not announced:
            known = self._active = self._name(announced)
        return known

    def _name(self, announced: Announced) -> _Active:
        active, snapshot = announced.active, announced.snapshot
        published_at = _published_at(snapshot.manifest, active.commit) or active.activated_at
        moving = self._revision(snapshot, active.commit, published_at, pinned=False)
        refs = [_ref(_ACTIVE_REFS[0])]
        # A commit is no ref, also when it is named by its beginning.
        if active.requested and not _is_commit(active.requested, active.commit):
            refs.append(_ref(active.requested))
        names = [*_ACTIVE_REFS, active.requested, *(ref.ref for ref in refs), *(ref.name for ref in refs)]
        named = dict.fromkeys(names, moving)
        named[active.commit] = self._revision(snapshot, active.commit, published_at, pinned=True)
        return _Active(announced, hub_repo_ids(announced), tuple(dict.fromkeys(refs)), named)

    def _revision(self, snapshot: ServedSnapshot, commit: str, published_at: int, *, pinned: bool) -> HubRevision:
        listing = self._listings.get(snapshot)
        if listing is None:
            listing = self._listings[snapshot] = HubListing(snapshot)
        return HubRevision(commit, pinned, published_at, listing, snapshot.digest)

    def _find(self, announced: Announced, repo: str, ref: str) -> tuple[str, _Kept]:
        if not _COMMIT.fullmatch(ref):
            raise _unknown(repo, ref, "served are main, what the ModelCache asks for, and kept commits")
        for stale in (True, False):
            commits = self._read_index(announced, stale=stale).repos.get(repo, {})
            found = [commit for commit in commits if _is_commit(ref, commit)]
            if len(found) > 1:
                raise _unknown(repo, ref, f"{len(found)} commits begin so: write more digits")
            if found:
                return found[0], commits[found[0]]
        raise _unknown(repo, ref, "it is not on the volume, or belongs to another source")

    def _read_index(self, announced: Announced, *, stale: bool = True) -> _Index:
        """The commits on the volume.

        `stale` accepts what was read since the last activation; else it is looked again, though not at each request:
        reading manifests is work that anybody could ask for.
        """
        with self._lock:
            index = self._index
            current = index is not None and index.announced is announced
            if index is not None and current and (stale or time.monotonic() - index.read_at < _LOOK_AGAIN_SECONDS):
                return index
            self._index = _Index(announced, time.monotonic(), self._read_repos(announced))
            return self._index

    def _read_repos(self, announced: Announced) -> dict[str, dict[str, _Kept]]:
        repos: dict[str, dict[str, _Kept]] = {}
        for manifest, own in self._catalog.kept():
            for repo in _repo_ids(manifest, announced):
                commits = repos.setdefault(repo, {})
                for commit, published_at in _revisions(manifest):
                    kept = _Kept(manifest.digest, own, published_at)
                    if commit not in commits or commits[commit].rank < kept.rank:
                        commits[commit] = kept
        return repos


def _named_by(segments: list[str], repos: Iterable[str]) -> tuple[str, list[str]] | None:
    """The repo that a path begins with, and the rest of the path."""
    for repo in repos:
        rest = _after(segments, repo)
        # A bare name may be the namespace of another repo.
        if rest is not None and ("/" in repo or not rest or rest[0] in _PAGES):
            return repo, rest
    return None


def _after(segments: list[str], name: str) -> list[str] | None:
    """What follows a name in a path; None if it does not begin the path."""
    parts = name.split("/")
    return segments[len(parts) :] if segments[: len(parts)] == parts else None


def hub_repo_ids(announced: Announced) -> tuple[str, ...]:
    """What clients call the model that is active; the first of the names works in every program."""
    return _repo_ids(announced.snapshot.manifest, announced)


def _repo_ids(manifest: manifest_pb2.Manifest, announced: Announced) -> tuple[str, ...]:
    """What clients call a source: a repo as on the Hub; a bucket or folder by the ModelCache's name, bare too."""
    repo_id, name = manifest.source.repo_id, announced.active.name
    return (f"{_NAMESPACE}/{name}", name) if "://" in repo_id else (repo_id,)


def _ref(name: str) -> HubRef:
    """A ref by its name. A tag is taken for a branch: which of the two it is was not kept, and programs look there."""
    for prefix in ("refs/heads/", "refs/tags/"):
        if name.startswith(prefix):
            return HubRef(name.removeprefix(prefix), name)
    return HubRef(name, name if name.startswith("refs/") else f"refs/heads/{name}")


def _is_commit(name: str, commit: str) -> bool:
    """Whether a name is that commit's, or its beginning."""
    return bool(_COMMIT.fullmatch(name)) and commit.startswith(name)


def _revisions(manifest: manifest_pb2.Manifest) -> Iterator[tuple[str, int]]:
    """(commit, seconds since the Unix epoch)."""
    yield manifest.source.commit, 0
    for revision in manifest.revisions:
        yield revision.commit, revision.published_at


def _published_at(manifest: manifest_pb2.Manifest, commit: str) -> int:
    return max((moment for each, moment in _revisions(manifest) if each == commit), default=0)


def _unknown(repo: str, ref: str, why: str) -> RequestError:
    return RequestError(Reason.UNKNOWN_REF, f"{ref[:200]!a} is no revision of {repo} here: {why}.")
