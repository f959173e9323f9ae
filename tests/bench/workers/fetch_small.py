"""MB/s of fetching a repo of small files until it is on the disk: SIDE URL FOLDER.

SIDE is ours (eight receivers) or sequential (a loop over hf_hub_download, with fsync after each file).
"""

import os
import shutil
import sys
import time
from pathlib import Path

from bench.worker import answer

os.environ.update(HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_TELEMETRY="1")


def ours(url: str, target: Path) -> None:
    from modelcache_fetcher import run_fetch
    from support.fetching import spec

    run_fetch(spec("org/name", endpoint=url), target, "bench")


def sequential(url: str, target: Path) -> None:
    from huggingface_hub import HfApi, hf_hub_download

    for name in HfApi(endpoint=url, token=False).list_repo_files("org/name"):
        path = hf_hub_download("org/name", name, endpoint=url, cache_dir=target)
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def main() -> None:
    side, url, folder = sys.argv[1:]
    target = Path(folder) / f"small-{side}"

    def measure() -> float:
        os.sync()
        start = time.perf_counter()
        {"ours": ours, "sequential": sequential}[side](url, target)
        seconds = time.perf_counter() - start
        shutil.rmtree(target)
        return 10.0 / seconds

    answer(measure)


if __name__ == "__main__":
    main()
