"""Which snapshot the Hub's clients mean by a repo and a revision: only what is active here, or was and is kept."""

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from modelcache_server.catalog import Announced, Catalog, ServedSnapshot
from modelcache_server.errors import Reason, RequestError
from modelcache_server.hub_listing import HubListing
from modelcache_volume.v1 import manifest_pb2

ACTIVE_REFS = ("main", "HEAD")
"""Stand for what is active, whatever branch or tag was asked for: programs ask for `main` unless told otherwise."""

_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_FULL_COMMIT_LENGTH = 40
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
        self._active: tuple[Announced, dict[str, HubRevision]] | None = None
        self._listings: WeakKeyDictionary[ServedSnapshot, HubListing] = WeakKeyDictionary()

    def split(self, segments: list[str]) -> tuple[str, list[str]]:
        """The served repo that a path begins with, and the rest of the path.

        Raises:
            RequestError: NOT_READY, or UNKNOWN_REPO.
        """
        announced = self._catalog.active()
        active = active_repo_id(announced)
        if _begins_with(segments, active):
            return active, segments[active.count("/") + 1 :]
        for repo in self._read_index(announced).repos:
            if _begins_with(segments, repo):
                return repo, segments[repo.count("/") + 1 :]
        asked = "/".join(segments[:2])
        raise RequestError(
            Reason.UNKNOWN_REPO,
            f"This server has the model {active!a} only, not {asked[:200]!a}: it passes no request on to another hub.",
        )

    def active_ref(self, repo: str) -> tuple[str, str] | None:
        """(branch or tag that was asked for, commit) of what is active; None if the repo was active earlier only."""
        announced = self._catalog.active()
        if repo != active_repo_id(announced):
            return None
        return announced.active.requested, announced.active.commit

    def split_revision(self, repo: str, segments: list[str]) -> tuple[str, list[str]]:
        """A revision that a path begins with, and the rest; the slashes of the requested ref need not be escaped."""
        active = self.active_ref(repo)
        parts = active[0].split("/") if active else []
        if len(parts) > 1 and segments[: len(parts)] == parts:
            return "/".join(parts), segments[len(parts) :]
        return segments[0], segments[1:]

    def resolve(self, repo: str, ref: str) -> HubRevision:
        """The revision that a branch, tag, full or short (7 digits or more) commit stands for.

        Raises:
            RequestError: NOT_READY, or UNKNOWN_REF.
        """
        announced = self._catalog.active()
        if repo == active_repo_id(announced) and (named := self._active_names(announced).get(ref)) is not None:
            return named
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

    def _active_names(self, announced: Announced) -> dict[str, HubRevision]:
        """What is active by its names, made once for each activation: nearly every request asks for it."""
        known = self._active
        if known is None or known[0] is not announced:
            active, snapshot = announced.active, announced.snapshot
            published_at = _published_at(snapshot.manifest, active.commit) or active.activated_at
            moving = self._revision(snapshot, active.commit, published_at, pinned=False)
            names = dict.fromkeys((*ACTIVE_REFS, active.requested), moving)
            names[active.commit] = self._revision(snapshot, active.commit, published_at, pinned=True)
            known = self._active = (announced, names)
        return known[1]

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
            if len(ref) == _FULL_COMMIT_LENGTH:
                found = [ref] if ref in commits else []
            else:
                found = [commit for commit in commits if commit.startswith(ref)]
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
            commits = repos.setdefault(_repo_id(manifest, announced), {})
            for commit, published_at in _revisions(manifest):
                kept = _Kept(manifest.digest, own, published_at)
                if commit not in commits or commits[commit].rank < kept.rank:
                    commits[commit] = kept
        return repos


def _begins_with(segments: list[str], repo: str) -> bool:
    parts = repo.split("/")
    return segments[: len(parts)] == parts


def active_repo_id(announced: Announced) -> str:
    """What clients call the model that is active."""
    return _repo_id(announced.snapshot.manifest, announced)


def _repo_id(manifest: manifest_pb2.Manifest, announced: Announced) -> str:
    """What clients call a source: a repo as on the Hub, a bucket or folder by the ModelCache's name."""
    repo_id = manifest.source.repo_id
    return announced.active.name if "://" in repo_id else repo_id


def _revisions(manifest: manifest_pb2.Manifest) -> Iterator[tuple[str, int]]:
    """(commit, seconds since the Unix epoch)."""
    yield manifest.source.commit, 0
    for revision in manifest.revisions:
        yield revision.commit, revision.published_at


def _published_at(manifest: manifest_pb2.Manifest, commit: str) -> int:
    return max((moment for each, moment in _revisions(manifest) if each == commit), default=0)


def _unknown(repo: str, ref: str, why: str) -> RequestError:
    return RequestError(Reason.UNKNOWN_REF, f"{ref[:200]!a} is no revision of {repo} here: {why}.")
