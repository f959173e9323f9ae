"""Fetching 1 GiB and many small files against the sources' own libraries and against the disk."""

from contextlib import ExitStack
from pathlib import Path

from bench.measure import Pair, interleaved
from bench.registry import Row, Run, benchmark
from bench.worker import Worker
from support.fetching import safetensors_bytes
from support.processes import Child


def _large_row(name: str, goal: float, or_else: str) -> Row:
    """Faster than the source's own library, or as fast as the disk: the issue asks for either."""
    return Row(name, unit="MB/s", better="higher", goal=goal, issue=2, or_else=or_else)


HUB = _large_row("fetch.hub", 2.0, or_else="fetch.hub.of_disk")
S3 = _large_row("fetch.s3", 1.5, or_else="fetch.s3.of_disk")
GCS = _large_row("fetch.gcs", 1.5, or_else="fetch.gcs.of_disk")
HUB_DISK = _large_row("fetch.hub.of_disk", 0.85, or_else="fetch.hub")
S3_DISK = _large_row("fetch.s3.of_disk", 0.85, or_else="fetch.s3")
GCS_DISK = _large_row("fetch.gcs.of_disk", 0.85, or_else="fetch.gcs")
SMALL = Row("fetch.small_files", unit="MB/s", better="higher", goal=3.0, issue=2)

GIB = 2**30


@benchmark(HUB, HUB_DISK)
def hub(run: Run) -> dict[str, Pair]:
    """huggingface_hub's snapshot_download, then fsync."""
    return _large(run, "hub", "support.fake_hub", ("{}", "--repo", "org/name"), r"HF_ENDPOINT=(\S+)", HUB, HUB_DISK)


@benchmark(S3, S3_DISK)
def s3(run: Run) -> dict[str, Pair]:
    """boto3's transfer manager (download_file), then fsync."""
    return _large(run, "s3", "support.fake_buckets", ("s3", "{}"), r"url (\S+)", S3, S3_DISK)


@benchmark(GCS, GCS_DISK)
def gcs(run: Run) -> dict[str, Pair]:
    """google-cloud-storage's transfer manager (eight threads), then fsync."""
    return _large(run, "gcs", "support.fake_buckets", ("gcs", "{}"), r"url (\S+)", GCS, GCS_DISK)


@benchmark(SMALL)
def small_files(run: Run) -> dict[str, Pair]:
    """1,000 files of 10 KB, by eight receivers and by one."""
    source = run.folder / "small"
    source.mkdir()
    for number in range(1000):
        (source / f"{number}.json").write_bytes(b"%04d" % number * 2500)
    url = _serve(run, "support.fake_hub", (str(source), "--repo", "org/name"), r"HF_ENDPOINT=(\S+)")
    with ExitStack() as stack:
        sides = {
            side: stack.enter_context(Worker("fetch_small", side, url, run.folder)) for side in ("ours", "sequential")
        }
        values = interleaved({name: worker.measure for name, worker in sides.items()}, rounds=run.rounds(5))
    return {SMALL.name: Pair(values["ours"], values["sequential"])}


def _large(
    run: Run, what: str, server: str, arguments: tuple[str, ...], pattern: str, row: Row, disk_row: Row
) -> dict[str, Pair]:
    source = run.folder / "source"
    source.mkdir()
    size = GIB // 4 if run.quick else GIB
    (source / "model.safetensors").write_bytes(safetensors_bytes({"w": size}, fill=bytes(range(251))))
    url = _serve(run, server, tuple(argument.format(source) for argument in arguments), pattern)
    with ExitStack() as stack:

        def worker(kind: str, side: str, where: str | Path) -> Worker:
            return stack.enter_context(Worker("fetch", kind, side, where, run.folder, str(size)))

        sides = {"ours": worker(what, "ours", url), "peer": worker(what, "peer", url)}
        sides["disk"] = worker("disk", "peer", source)
        values = interleaved({name: side.measure for name, side in sides.items()}, rounds=run.rounds(7))
    return {row.name: Pair(values["ours"], values["peer"]), disk_row.name: Pair(values["ours"], values["disk"])}


def _serve(run: Run, module: str, arguments: tuple[str, ...], pattern: str) -> str:
    server = run.closing.enter_context(Child.module(module, *arguments))
    return str(server.wait_for(pattern, 60)[1])
