"""HEAD of every file by 100 clients at once, in ms: `python -m bench.workers.head_load PORT PERCENTILE PATHS`."""

import json
import sys
from pathlib import Path

from bench.worker import answer
from support.hub_load import ask_at_once

CLIENTS = 100


def main() -> None:
    """Measure when asked."""
    port, percentile = int(sys.argv[1]), int(sys.argv[2])
    requests = [("HEAD", path) for path in json.loads(Path(sys.argv[3]).read_text(encoding="utf-8"))]

    def measure() -> float:
        load = ask_at_once(port, requests, clients=CLIENTS)
        if load.statuses != {200: CLIENTS * len(requests)}:
            raise ConnectionError(f"answers other than 200: {load.statuses}")
        seconds = sorted(load.seconds)
        return seconds[min(len(seconds) - 1, len(seconds) * percentile // 100)] * 1000

    answer(measure)


if __name__ == "__main__":
    main()
