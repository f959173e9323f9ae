"""MB/s of fetching everything once, until it is on the disk: WHAT SIDE URL FOLDER BYTES.

WHAT is hub, s3, gcs or disk. SIDE is ours (run_fetch into a new volume: hashed, verified, published) or peer
(huggingface_hub's snapshot_download, boto3's and google-cloud-storage's transfer managers, then fsync; dd).
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.worker import answer

os.environ.update(
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    AWS_ACCESS_KEY_ID="key",
    AWS_SECRET_ACCESS_KEY="secret",
    AWS_EC2_METADATA_DISABLED="true",
)


def ours(what: str, url: str, target: Path) -> None:
    from modelcache_fetcher import run_fetch
    from support.fetching import spec

    repo = {"hub": "org/name", "s3": "s3://bucket", "gcs": "gs://bucket"}[what]
    run_fetch(spec(repo, endpoint=url, allow_patterns=["*"]), target, "bench")


def hub(url: str, target: Path) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download("org/name", endpoint=url, cache_dir=target)


def s3(url: str, target: Path) -> None:
    import boto3
    from botocore.config import Config

    options = Config(s3={"addressing_style": "path"})
    client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", config=options)
    target.mkdir()
    for item in client.list_objects_v2(Bucket="bucket")["Contents"]:
        client.download_file("bucket", item["Key"], str(target / item["Key"]))


def gcs(url: str, target: Path) -> None:
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.storage import Client, transfer_manager

    client = Client(project="p", credentials=AnonymousCredentials(), client_options={"api_endpoint": url})
    target.mkdir()
    for blob in client.list_blobs("bucket"):
        transfer_manager.download_chunks_concurrently(
            blob, str(target / blob.name), worker_type=transfer_manager.THREAD, max_workers=8
        )


def disk(url: str, target: Path) -> None:
    (source,) = Path(url).glob("*.safetensors")
    command = ["dd", f"if={source}", f"of={target}", "bs=1M", "conv=fsync"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def synced(target: Path) -> None:
    files = [target] if target.is_file() else [path for path in target.rglob("*") if path.is_file()]
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def measure(fetch: Callable[[Path], None], target: Path, size: int) -> float:
    os.sync()
    start = time.perf_counter()
    fetch(target)
    synced(target)
    seconds = time.perf_counter() - start
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    return size / seconds / 1e6


def main() -> None:
    what, side, url, folder, size = sys.argv[1:]
    peers = {"hub": hub, "s3": s3, "gcs": gcs, "disk": disk}
    target = Path(folder) / f"{what}-{side}"

    def fetch(into: Path) -> None:
        ours(what, url, into) if side == "ours" else peers[what](url, into)

    answer(lambda: measure(fetch, target, int(size)))


if __name__ == "__main__":
    main()
