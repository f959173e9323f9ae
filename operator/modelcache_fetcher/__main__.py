"""``modelcache-fetch``: what plan and fetch Jobs run.

The spec comes as JSON from a file or from MODELCACHE_SPEC (it holds no secret), credentials from a mounted folder.
Progress is a line of JSON at most each second on standard output, and GET :9091/progress on request. The result, or the
reason of a failure, is JSON of at most 4 KiB in the container's termination message; the exit code is the reason's.
"""

import argparse
import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pydantic import ValidationError

from modelcache_api.reasons import REASONS, TERMINATED, Reason
from modelcache_api.resource import ModelCacheSpec
from modelcache_fetcher.errors import FetchError
from modelcache_fetcher.fetch import FetchOptions, make_plan, run_fetch
from modelcache_fetcher.progress import Progress
from modelcache_fetcher.progress_server import ProgressServer
from modelcache_fetcher.termination import failure_message, plan_message, result_message
from modelcache_fetcher.trust import trust_authorities

_LOG = logging.getLogger("modelcache_fetcher")

PROGRESS_PORT = 9091


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="time=%(asctime)s level=%(levelname)s msg=%(message)s"
    )
    signal.signal(signal.SIGTERM, _terminate)
    progress = Progress()
    try:
        trust_authorities()
        spec = _read_spec(options.spec)
        fetch_options = FetchOptions(
            secrets_dir=options.secrets,
            lock_wait=getattr(options, "lock_wait", 0.0),
            verify=getattr(options, "verify", False),
        )
        if options.command == "plan":
            plan = make_plan(spec, fetch_options)
            message = plan_message(plan)
            if options.details:
                sys.stdout.write(json.dumps(plan.to_json(), indent=2) + "\n")
        else:
            with _Reporter(progress, options.progress_port):
                message = result_message(
                    run_fetch(spec, options.volume, options.name, options=fetch_options, progress=progress)
                )
    except FetchError as error:
        return _fail(error, options.termination_log)
    except Exception as error:  # noqa: BLE001 - a bug is reported like any other reason, with its traceback in the log
        _LOG.exception("unexpected error")
        return _fail(FetchError(Reason.INTERNAL, f"{type(error).__name__}: {error}"), options.termination_log)
    _emit(message, options.termination_log)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="modelcache-fetch", description=(__doc__ or "").partition("\n\n")[2])
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="resolve the revision and say what would be fetched")
    plan.add_argument("--details", action="store_true", help="list every file and why it is in or out")
    fetch = commands.add_parser("fetch", help="fetch into a volume, verify, publish and activate")
    fetch.add_argument("--volume", type=Path, required=True, help="folder of the volume")
    fetch.add_argument("--name", required=True, help="name of the ModelCache, under which the snapshot becomes active")
    fetch.add_argument("--lock-wait", type=float, default=60.0, help="seconds to wait for another writer of the volume")
    fetch.add_argument(
        "--verify",
        action="store_true",
        help="read what the volume has again first, and fetch anew what is damaged",
    )
    fetch.add_argument(
        "--progress-port",
        type=int,
        help=f"serve GET /progress on this port, usually {PROGRESS_PORT}; not served by default",
    )
    for command in (plan, fetch):
        command.add_argument(
            "--spec", type=Path, help="JSON file with the ModelCache's spec; default: $MODELCACHE_SPEC"
        )
        command.add_argument("--secrets", type=Path, help="folder with the Secret's keys as files")
        command.add_argument("--termination-log", type=Path, help="file for the result, such as /dev/termination-log")
    return parser


def _read_spec(path: Path | None) -> ModelCacheSpec:
    try:
        text = path.read_text(encoding="utf-8") if path is not None else os.environ["MODELCACHE_SPEC"]
        return ModelCacheSpec.model_validate(json.loads(text))
    except KeyError:
        raise FetchError(Reason.INVALID_SPEC, "There is no spec: give --spec FILE or set MODELCACHE_SPEC.") from None
    except OSError as error:
        raise FetchError(Reason.INVALID_SPEC, f"The spec {path} cannot be read: {error.strerror}.") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise FetchError(Reason.INVALID_SPEC, f"The spec is refused: {problems}.") from None
    except ValueError as error:
        raise FetchError(Reason.INVALID_SPEC, f"The spec is not JSON: {error}.") from None


def _fail(error: FetchError, termination_log: Path | None) -> int:
    _LOG.error("%s: %s", error.reason, error)
    _emit(failure_message(error), termination_log)
    return REASONS[error.reason].exit_code


def _emit(message: str, termination_log: Path | None) -> None:
    sys.stdout.write(message + "\n")
    sys.stdout.flush()
    if termination_log is not None:
        termination_log.write_text(message, encoding="utf-8")


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    del signum, frame
    # What was received stays on the volume: the next run continues.
    sys.stderr.write("level=INFO msg=terminated; the fetch can be continued\n")
    sys.stderr.flush()
    os._exit(TERMINATED)


class _Reporter:
    """Prints the progress as JSON each second while it changes, and serves it over HTTP if a port is given."""

    def __init__(self, progress: Progress, port: int | None) -> None:
        self._progress = progress
        self._server = ProgressServer(progress, port) if port is not None else None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._print, daemon=True)

    def __enter__(self) -> None:
        if self._server is not None:
            self._server.start()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self._server is not None:
            self._server.stop()

    def _print(self) -> None:
        last: dict[str, Any] = {}
        while not self._done.wait(1.0):
            now = self._progress.snapshot()
            if now != last:
                sys.stdout.write(json.dumps({"progress": now}) + "\n")
                sys.stdout.flush()
                last = now


if __name__ == "__main__":
    sys.exit(main())
