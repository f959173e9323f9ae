"""Plan, fetch, verify, publish, activate: one run of a fetch, under the volume's writer lock."""

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from modelcache_api.quantities import format_bytes, parse_duration
from modelcache_api.reasons import Reason
from modelcache_api.resource import ModelCacheSpec
from modelcache_api.source import parse_repo_id
from modelcache_fetcher.download import Downloader
from modelcache_fetcher.errors import FetchError, SourceChangedError
from modelcache_fetcher.plan import Plan, PlannedFile, select
from modelcache_fetcher.progress import Progress
from modelcache_fetcher.requests import Requester
from modelcache_fetcher.retry import Limits, backoff_seconds
from modelcache_fetcher.reuse import identities, known_files, published_snapshot, read_again
from modelcache_fetcher.secrets import Secrets
from modelcache_fetcher.sources import Source, make_source
from modelcache_fetcher.transfer import Received
from modelcache_fetcher.transport import HttpTransport
from modelcache_fetcher.verification import manifest_file
from modelcache_volume import (
    BadManifest,
    BadWeights,
    ChecksumMismatch,
    CorruptBlob,
    IndexedFile,
    InvalidPath,
    NewerFormat,
    NoActiveRevision,
    NoSpace,
    NotAVolume,
    Snapshot,
    SnapshotNotFound,
    Volume,
    VolumeBusy,
    VolumeError,
    VolumeWriter,
    build_manifest,
    is_index_file,
    source_folder,
    space_errors,
)
from modelcache_volume.v1 import manifest_pb2

_LOG = logging.getLogger(__name__)

_SPARE_BYTES = 16 * 2**20
"""Room that a fetch leaves on the volume, for manifests, links and the file system itself."""
_MAX_INDEX_BYTES = 16 * 2**20  # some 150,000 tensors; parsed, it takes ten times as much memory
_REPLANS = 3
"""How often a source may change under a fetch before that is an error."""

_REASONS: tuple[tuple[type[VolumeError], Reason], ...] = (
    (NoSpace, Reason.NO_SPACE),
    (VolumeBusy, Reason.VOLUME_BUSY),
    (NewerFormat, Reason.NEWER_FORMAT),
    (NotAVolume, Reason.NOT_A_VOLUME),
    (BadWeights, Reason.BAD_WEIGHTS),
    (InvalidPath, Reason.INVALID_SOURCE),
    (ChecksumMismatch, Reason.CHECKSUM_MISMATCH),
    (CorruptBlob, Reason.CORRUPT_BLOB),
    (BadManifest, Reason.INTERNAL),
    (VolumeError, Reason.NOT_A_VOLUME),
)


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """What a fetch is told beside the spec.

    Attributes:
        secrets_dir: Folder with the credentials' files; None: none.
        lock_wait: Seconds to wait for another writer of the volume.
        limits: Retries and timeouts; None: from the spec.
        verify: Read what the volume has of the source again first; damaged files are fetched anew.
    """

    secrets_dir: Path | None = None
    lock_wait: float = 0.0
    limits: Limits | None = None
    verify: bool = False


@dataclass(frozen=True, slots=True)
class FetchResult:
    """What was published.

    Attributes:
        digest: Of the snapshot.
        commit: The revision's.
        files: How many it has.
        bytes: Their sizes' sum.
        downloaded_bytes: What came from the source in this run.
        generation: Of the active record.
        replaced: The other source that the name stood for until now; "": none.
    """

    digest: str
    commit: str
    files: int
    bytes: int
    downloaded_bytes: int
    generation: int
    replaced: str = ""


def make_plan(spec: ModelCacheSpec, options: FetchOptions | None = None) -> Plan:
    """Say what a fetch of this spec would bring now.

    Raises:
        FetchError: With the reason.
    """
    options = options or FetchOptions()
    with _as_fetch_errors():
        limits = _limits(spec, options)
        return _plan(spec, _source(spec, options, limits), limits, None)


def run_fetch(
    spec: ModelCacheSpec,
    volume_root: Path,
    name: str,
    *,
    options: FetchOptions | None = None,
    progress: Progress | None = None,
) -> FetchResult:
    """Bring the spec's model onto the volume and make it active under ``name``.

    Can be killed anywhere and run again: what was received is not fetched twice, and what is published is whole.

    Args:
        spec: What to fetch.
        volume_root: The volume's top folder; made a volume if it is empty.
        name: The ModelCache's name.
        options: Credentials, waiting, limits.
        progress: Counters for whoever shows them.

    Raises:
        FetchError: With the reason; what was active before still is.
    """
    options, progress = options or FetchOptions(), progress or Progress()
    limits = _limits(spec, options)
    deadline = None if limits.deadline_seconds is None else time.monotonic() + limits.deadline_seconds
    with _as_fetch_errors():
        volume = Volume.create(volume_root)
        with volume.lock(wait=options.lock_wait) as writer:
            run = _Run(spec, name, writer, _source(spec, options, limits), limits, deadline, progress)
            if options.verify:
                run.discard_damaged()
            return run.until_unchanged()


@dataclass
class _Run:
    """One fetch, with the volume locked."""

    spec: ModelCacheSpec
    name: str
    writer: VolumeWriter
    source: Source
    limits: Limits
    deadline: float | None
    progress: Progress
    received: dict[str, Received] = field(default_factory=dict)
    entries: dict[str, manifest_pb2.File] = field(default_factory=dict)
    indexed: dict[str, IndexedFile] = field(default_factory=dict)

    def until_unchanged(self) -> FetchResult:
        """Plan and fetch, anew when a file of the source changes in between."""
        for _ in range(_REPLANS):
            try:
                return self._once()
            except SourceChangedError as change:
                _LOG.warning("%s The plan is made anew.", change)
                last = change
        raise FetchError(
            Reason.UNAVAILABLE,
            f"{last} The source changed {_REPLANS} times while it was fetched; fetch when it is at rest.",
            path=last.path,
        )

    def discard_damaged(self) -> None:
        """Take away what is not as it was published; a fetch then brings it again."""
        repo = parse_repo_id(self.spec.repo_id)
        folder = source_folder(repo.canonical, self.spec.endpoint or "")
        snapshots = self.writer.volume.snapshots(folder)
        total = sum({file.sha256: file.size for each in snapshots for file in each.manifest.files}.values())
        self.progress.begin("verifying", total_bytes=total)
        for snapshot in snapshots:
            for problem in snapshot.verify(self.progress.found):
                _LOG.warning("%s It is fetched again.", problem.what)
                self.writer.discard(folder, snapshot.file(problem.path).sha256.hex())

    def _once(self) -> FetchResult:
        self.entries.clear()
        self.indexed.clear()
        self.progress.begin("planning")
        plan = _plan(self.spec, self.source, self.limits, self.deadline)
        _log_plan(plan)
        self.progress.begin("fetching", total_bytes=plan.total_bytes, files=len(plan.files))
        snapshot = published_snapshot(self.writer.volume, plan)
        if snapshot is None or snapshot.manifest.source.commit != plan.commit:
            missing = self._take_what_is_there(plan)
            self._make_room(plan, missing)
            self._download(plan, missing)
            self.progress.begin("publishing")
            snapshot = self._publish(plan)
        else:
            self.progress.found(plan.total_bytes)
        replaced = self._former_source(plan)
        active = self.writer.activate(
            self.name, snapshot, requested=plan.requested, history_limit=self.spec.revision_history_limit
        )
        self.writer.prune(keep_incoming={plan.folder: ()})
        self.progress.begin("done")
        return FetchResult(
            digest=snapshot.digest,
            commit=plan.commit,
            files=len(snapshot.manifest.files),
            bytes=sum(file.size for file in snapshot.manifest.files),
            downloaded_bytes=self.progress.downloaded_bytes,
            generation=active.generation,
            replaced=replaced,
        )

    def _former_source(self, plan: Plan) -> str:
        """The other source that the name stands for until the plan's snapshot is active; empty: none."""
        volume = self.writer.volume
        try:
            active = volume.active(self.name)
            former: str = volume.snapshot(active.digest, active.folder).manifest.source.repo_id
        except (NoActiveRevision, SnapshotNotFound):
            return ""
        return former if former != plan.repo_id else ""

    def _take_what_is_there(self, plan: Plan) -> list[PlannedFile]:
        """Enter the files that the volume has; returns those it has not."""
        known = known_files(self.writer.volume, plan.folder)
        missing: list[PlannedFile] = []
        for planned in plan.files:
            found = next((known[identity] for identity in identities(planned.file) if identity in known), None)
            sha256 = found.entry.sha256.hex() if found is not None else planned.file.lfs_sha256
            if not sha256 or not self.writer.blob_exists(plan.folder, sha256, planned.size):
                missing.append(planned)
            elif found is not None:
                entry = manifest_pb2.File()
                entry.CopyFrom(found.entry)
                entry.path, entry.etag = planned.path, planned.file.etag
                self.entries[planned.path] = entry
                if found.indexed is not None:
                    self.indexed[planned.path] = found.indexed
                self._have(planned)
            elif (received := read_again(self.writer, plan.folder, planned.file, sha256)) is not None:
                self._enter(received)
                self._have(planned)
            else:
                missing.append(planned)
        return missing

    def _have(self, planned: PlannedFile) -> None:
        self.progress.found(planned.size)
        self.progress.file_done()

    def _make_room(self, plan: Plan, missing: list[PlannedFile]) -> None:
        """Refuse to begin what cannot end, before the first byte; what an interrupted run left counts as there."""
        root = self.writer.volume.root
        keys = [key for planned in missing for key in (planned.file.key, f"{planned.file.key}.log")]
        needed = _SPARE_BYTES
        for planned in missing:
            part = self.writer.incoming(plan.folder, planned.file.key)
            needed += planned.size - min(planned.size, part.stat().st_blocks * 512 if part.exists() else 0)
        if _free(root) >= needed:
            return
        pruned = self.writer.prune(keep_incoming={plan.folder: keys})
        free = _free(root)
        if free >= needed:
            _LOG.info("removed %d old snapshots (%s) to make room", len(pruned.digests), format_bytes(pruned.bytes))
            return
        text = (
            f"The volume {root} has {format_bytes(free)} free, and {plan.repo_id} needs {format_bytes(needed)}, "
            f"{format_bytes(_SPARE_BYTES)} of it to spare: {format_bytes(needed - free)} are lacking. Enlarge the "
            "volume (in a cluster: spec.storage.size) or select fewer files (spec.allowPatterns)."
        )
        held = self.writer.volume.leased() - {active.digest for active in self.writer.volume.actives()}
        if held:
            text += f" Readers still use {len(held)} older snapshots, which go when they are done."
        raise FetchError(Reason.SPACE_HELD_BY_READERS if held else Reason.NO_SPACE, text)

    def _download(self, plan: Plan, missing: list[PlannedFile]) -> None:
        if not missing:
            return
        transport = HttpTransport(
            connect_timeout=self.limits.connect_timeout,
            read_timeout=min(self.limits.read_timeout, self.limits.stall_timeout),
        )

        def complete(received: Received, part: Path) -> None:
            self.writer.adopt(plan.folder, part, received.digests.sha256.hex())
            self._enter(received)

        downloader = Downloader(
            Requester(self.source, transport, plan.commit),
            on_complete=complete,
            limits=self.limits,
            concurrency=self.spec.fetch.concurrency,
            progress=self.progress,
            deadline=self.deadline,
        )
        parts = [(planned.file, self.writer.incoming(plan.folder, planned.file.key)) for planned in missing]
        with space_errors(self.writer.volume.root, f"fetching {plan.repo_id}", sum(file.size for file, _ in parts)):
            downloader.run(parts)

    def _enter(self, received: Received) -> None:
        path = received.file.path
        self.entries[path] = manifest_file(received)
        if received.indexed is not None:
            self.indexed[path] = received.indexed

    def _publish(self, plan: Plan) -> Snapshot:
        layout = self.writer.volume.layout
        for path, entry in self.entries.items():
            if is_index_file(path) and entry.size > _MAX_INDEX_BYTES:
                text = (
                    f"{path} has {format_bytes(entry.size)}; of an index at most {format_bytes(_MAX_INDEX_BYTES)} are "
                    "read. Leave it out with ignorePatterns."
                )
                raise FetchError(Reason.BAD_WEIGHTS, text, path=path)
        index_files = {
            path: layout.blob(plan.folder, entry.sha256.hex()).read_bytes()
            for path, entry in self.entries.items()
            if is_index_file(path)
        }
        source = manifest_pb2.Source(
            repo_id=plan.repo_id, endpoint=plan.endpoint, requested=plan.requested, commit=plan.commit
        )
        manifest = build_manifest(
            source,
            self.entries.values(),
            weights=self.indexed,
            index_files=index_files,
            allow_patterns=plan.allow_patterns,
            ignore_patterns=plan.ignore_patterns,
            left_out={skipped.path for skipped in plan.skipped},
        )
        return self.writer.publish(plan.folder, manifest)


def _plan(spec: ModelCacheSpec, source: Source, limits: Limits, deadline: float | None) -> Plan:
    repo = parse_repo_id(spec.repo_id)
    revision = spec.requested_revision or None
    attempt = 0
    while True:
        try:
            listing = source.list_files(revision)
            break
        except SourceChangedError as change:
            failure = FetchError(Reason.UNAVAILABLE, str(change), path=change.path)
        except FetchError as error:
            if error.reason not in {Reason.UNAVAILABLE, Reason.RATE_LIMITED}:
                raise
            failure = error
        attempt += 1
        wait = failure.retry_after if failure.retry_after is not None else backoff_seconds(limits, attempt)
        late = deadline is not None and time.monotonic() + wait > deadline
        if attempt >= limits.plan_attempts or late or wait > limits.rate_limit_wait:
            raise failure
        time.sleep(wait)
        source.renew()
    files, skipped = select(listing, spec.allow_patterns, spec.ignore_patterns)
    endpoint = spec.endpoint or ""
    return Plan(
        repo_id=repo.canonical,
        endpoint=endpoint,
        folder=source_folder(repo.canonical, endpoint),
        requested=listing.requested,
        commit=listing.commit,
        allow_patterns=tuple(spec.allow_patterns),
        ignore_patterns=tuple(spec.ignore_patterns),
        files=files,
        skipped=skipped,
    )


def _log_plan(plan: Plan) -> None:
    total = format_bytes(plan.total_bytes)
    _LOG.info("%s at %s: %d files, %s", plan.repo_id, plan.commit[:12], len(plan.files), total)
    if not plan.allow_patterns and plan.skipped:
        reasons = Counter(skipped.why for skipped in plan.skipped)
        size = format_bytes(sum(skipped.size for skipped in plan.skipped))
        shown = "; ".join(f"{count} x {why}" for why, count in reasons.most_common(5))
        _LOG.warning('left out %d files, %s (allowPatterns: ["*"] takes all): %s', len(plan.skipped), size, shown)


def _source(spec: ModelCacheSpec, options: FetchOptions, limits: Limits) -> Source:
    secrets = Secrets(options.secrets_dir, spec.secret_ref.name if spec.secret_ref else None)
    timeout = min(limits.api_timeout, limits.stall_timeout, limits.deadline_seconds or math.inf)
    return make_source(parse_repo_id(spec.repo_id), spec.endpoint or "", secrets, timeout)


def _limits(spec: ModelCacheSpec, options: FetchOptions) -> Limits:
    if options.limits is not None:
        return options.limits
    return Limits(
        stall_timeout=parse_duration(spec.fetch.stall_timeout), deadline_seconds=spec.fetch.active_deadline_seconds
    )


def _free(root: Path) -> int:
    status = os.statvfs(root)
    return status.f_bavail * status.f_frsize


@contextmanager
def _as_fetch_errors() -> Iterator[None]:
    try:
        yield
    except VolumeError as error:
        reason = next(reason for kind, reason in _REASONS if isinstance(error, kind))
        raise FetchError(reason, str(error)) from error
