"""A weight server in the foreground: what `serve` and `up` share."""

import argparse
import errno
import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from modelcache_api.reasons import Reason
from modelcache_cli.failures import CommandError, UsageError
from modelcache_cli.output import say

if TYPE_CHECKING:
    from modelcache_server import Addresses, Server, ServerSettings

SERVE_REASONS = (
    Reason.NOT_A_VOLUME,
    Reason.NEWER_FORMAT,
    Reason.SNAPSHOT_NOT_FOUND,
    Reason.CORRUPT_BLOB,
    Reason.PORT_IN_USE,
    Reason.NOT_INSTALLED,
)
"""How serving can fail."""

_SAY_SECONDS = 10.0
_PORT_OPTIONS = ("grpc_port", "http_port", "metrics_port")


def refuse_what_cannot_serve(arguments: argparse.Namespace) -> None:
    """Find out before an hour's download that the server could not start after it.

    Raises:
        CommandError: A port is taken or may not be used, or there is no such address.
        UsageError: The ready file cannot be written where it is to be.
    """
    ready: Path | None = arguments.ready_file
    if ready is not None and not (ready.parent.is_dir() and os.access(ready.parent, os.W_OK)):
        raise UsageError(f"--ready-file {ready}: {ready.parent} is no folder that can be written to")
    for option in _PORT_OPTIONS:
        port: int = getattr(arguments, option)
        name = f"--{option.replace('_', '-')}"
        family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As servers do: a port whose last connections are still in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((arguments.host, port))
            except OSError as error:
                if port and error.errno != errno.EADDRNOTAVAIL:
                    message = f"port {port} of {arguments.host} cannot be used ({error.strerror}); write {name} with "
                    raise CommandError(Reason.PORT_IN_USE, f"{message}another port, or 0 for any free one") from None
                raise CommandError(
                    Reason.PORT_IN_USE, f"--host {arguments.host}: no address of this machine ({error.strerror})"
                ) from None


def serve_until_stopped(arguments: argparse.Namespace, settings: "ServerSettings", name: str) -> int:
    """Serve until Ctrl-C or SIGTERM, then let running reads finish within --grace.

    Args:
        arguments: With the options of `options.add_serving`.
        settings: Of the server.
        name: What is served, as a client asks for it.

    Returns:
        0 after SIGTERM: a server that is told to stop has done its work.

    Raises:
        CommandError: A port is in use.
        UsageError: Settings make no sense, or there is no memory for the cache.
        KeyboardInterrupt: After Ctrl-C, when everything is stopped.
    """
    from modelcache_server import Server, ServerError

    try:
        server = Server(settings)
    except ServerError as error:  # certificates, a key set, a Redis URL or a cache size without sense
        raise UsageError(str(error)) from error
    try:
        addresses = server.start()
    except ServerError as error:
        raise CommandError(Reason.PORT_IN_USE, str(error)) from error
    try:
        _wait_until_ready(server)
        reached = _reached_at(arguments.host, addresses, tls=settings.tls is not None)
        with _ready_file(arguments.ready_file, {"name": name, "volume": str(settings.root), **reached}):
            _announce(name, reached, server.hub_repo_id)
            received = _wait_for_signal()
    finally:
        server.stop(arguments.grace)
    if received == signal.SIGINT:
        raise KeyboardInterrupt
    return 0


def _wait_until_ready(server: "Server") -> None:
    """Wait for the warm-up, and say each 10 s why it takes so long."""
    while not server.wait_ready(_SAY_SECONDS):
        say(f"waiting: {server.problem}")


def _wait_for_signal() -> int:
    """Sleep until SIGINT or SIGTERM arrives; another one after it kills the process.

    A pipe that the interpreter's own C handler writes to: unlike pause() it loses no signal that comes just before, and
    does not mind which thread the kernel gives it to.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer)
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        while (received := os.read(reader, 1)[0]) not in {signal.SIGINT, signal.SIGTERM}:
            pass
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)
    return received


def _reached_at(host: str, addresses: "Addresses", *, tls: bool) -> dict[str, str]:
    """The addresses as a client on this machine writes them."""
    client_host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound
    place = f"[{client_host}]" if ":" in client_host else client_host
    return {
        "grpc": f"{'grpcs://' if tls else ''}{place}:{addresses.grpc}",
        "http": f"{'https' if tls else 'http'}://{place}:{addresses.http}",
        "metrics": f"http://{place}:{addresses.status}",
    }


@contextmanager
def _ready_file(path: Path | None, content: dict[str, str]) -> Iterator[None]:
    """The file is there, whole, exactly while the server is ready."""
    if path is None:
        yield
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.rename(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _announce(name: str, reached: dict[str, str], hub_repo_id: str) -> None:
    say(f"serving {name} at {reached['grpc']} (gRPC), {reached['http']} (bytes), {reached['metrics']}/metrics")
    say("")
    say("  from modelcache import StreamingBertModel")
    say(f'  model = StreamingBertModel("{name}", address="{reached["grpc"]}")')
    say("")
    say(f'  export HF_ENDPOINT={reached["http"]}   # unchanged programs: from_pretrained("{hub_repo_id}")')
    say("")
    say("Ctrl-C stops it.")
