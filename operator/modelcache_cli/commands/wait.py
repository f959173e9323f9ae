"""`modelcache wait`: until a server has a model."""

import argparse
import contextlib
import os
import re
import time
from typing import TYPE_CHECKING

from modelcache.address import Endpoint, parse_endpoint
from modelcache.errors import AccessDenied, AddressError
from modelcache.security import CA_VARIABLE, TOKEN_VARIABLE, Security
from modelcache_api.reasons import Reason
from modelcache_cli.command import Command
from modelcache_cli.failures import CommandError, UsageError
from modelcache_cli.options import ADDRESS_VARIABLE, DEFAULT_GRPC_PORT, default_address, digest_prefix, duration
from modelcache_cli.output import emit, say

if TYPE_CHECKING:
    from modelcache.grpc_lane import GrpcLane
    from modelcache_volume.v1.manifest_pb2 import Active

_SAY_SECONDS = 10.0
_POLL_SECONDS = 0.5
_CALL_SECONDS = 5.0
_LEAST_CALL_SECONDS = 1.0  # a busy server is no silent one, even to whoever does not want to wait
_COMMIT_PREFIX = re.compile(r"[0-9a-f]{7,40}")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help=f"gRPC address of the server; without a port: {DEFAULT_GRPC_PORT} (default: ${ADDRESS_VARIABLE})",
    )
    parser.add_argument(
        "--revision",
        metavar="REVISION",
        help="wait until this branch, tag or commit (7 or more digits) is the active one (default: any)",
    )
    parser.add_argument(
        "--digest",
        type=digest_prefix,
        metavar="DIGEST",
        help="wait until this digest, or one that begins with these 8 or more digits, is the active one (default: any)",
    )
    parser.add_argument(
        "--timeout",
        type=duration,
        default=600.0,
        metavar="TIME",
        help="how long to wait, such as 90s; 0s asks once (default: 10m)",
    )


def _run(arguments: argparse.Namespace) -> int:
    from modelcache.grpc_lane import GrpcLane

    endpoint = _endpoint(arguments.address or default_address())
    target = str(endpoint)
    deadline = time.monotonic() + arguments.timeout
    try:
        with contextlib.closing(GrpcLane(endpoint, Security.of(None, None, os.environ))) as lane:
            active = _wait(lane, target, arguments, deadline)
    except (AccessDenied, AddressError) as error:  # the files with the token and the authorities
        raise UsageError(str(error)) from error
    say(f"{target} serves {active.name}: {active.requested or active.commit}")
    emit(active.digest)
    return 0


def _endpoint(address: str | None) -> Endpoint:
    if not address:
        raise UsageError(f"no server is named; write --address HOST:PORT, or set {ADDRESS_VARIABLE}")
    try:
        return parse_endpoint(address)
    except AddressError as error:
        raise UsageError(f"--address: {error}") from None


def _wait(lane: "GrpcLane", target: str, arguments: argparse.Namespace, deadline: float) -> "Active":
    """Ask until what is active is what is wanted; says each 10 s why not.

    Raises:
        CommandError: The deadline passed; the message says what was missing.
    """
    next_word = time.monotonic() + _SAY_SECONDS
    while True:
        answer = _ask(lane, target, max(deadline - time.monotonic(), _LEAST_CALL_SECONDS))
        lack = answer if isinstance(answer, str) else _lack(answer, arguments, target)
        if not isinstance(answer, str) and lack is None:
            return answer
        now = time.monotonic()
        if now >= deadline:
            raise CommandError(Reason.NOT_READY, f"waited {arguments.timeout:g} s in vain: {lack}")
        if now >= next_word:
            say(f"modelcache: waiting: {lack}")
            next_word = now + _SAY_SECONDS
        time.sleep(min(_POLL_SECONDS, max(deadline - now, 0)))


def _ask(lane: "GrpcLane", target: str, remaining: float) -> "Active | str":
    """What is active now, or why that cannot be said."""
    import grpc

    from modelcache.grpc_lane import connection_advice

    try:
        answer = lane.ask_revision("", min(_CALL_SECONDS, remaining))
    except grpc.RpcError as error:
        details = str(error.details() or "")[:300]
        match error.code():
            case grpc.StatusCode.NOT_FOUND:
                return f"{target} answers, but has no model yet: {details or 'nothing is active'}"
            case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED:
                why = f"{target} does not answer: {details or error.code().name}"
                advice = connection_advice(details)
                return f"{why}. {advice}" if advice else why
            case grpc.StatusCode.UNIMPLEMENTED:
                raise CommandError(Reason.UNAVAILABLE, f"{target} is no ModelCache server: {details}") from None
            case grpc.StatusCode.UNAUTHENTICATED | grpc.StatusCode.PERMISSION_DENIED:
                raise CommandError(Reason.AUTH_FAILED, f"{target} refuses this caller: {details}") from None
            case code:
                return f"{target} answers {code.name}: {details}"
    return answer.active if answer.active.digest else f"{target} answers, but has no model yet"


def _lack(active: "Active", arguments: argparse.Namespace, target: str) -> str | None:
    """What is active instead of what is wanted; None when it is."""
    wanted: str | None = arguments.revision
    if wanted is not None and active.requested != wanted:
        by_commit = _COMMIT_PREFIX.fullmatch(wanted) and active.commit.startswith(wanted)
        if not by_commit:
            branch = f"{active.requested} = " if active.requested else ""
            return f"{target} still serves the revision {branch}{active.commit[:12]}, not {wanted}"
    if arguments.digest is not None and not active.digest.startswith(arguments.digest):
        return f"{target} still serves the digest {active.digest[:12]}, not {arguments.digest[:12]}"
    return None


COMMAND = Command(
    name="wait",
    summary="wait until a server has a model, or a certain revision of it",
    description=(
        "Asks a weight server until it has an active snapshot (or the one asked for), prints that snapshot's digest "
        "and ends; meant for init containers and scripts. Says each 10 seconds on standard error why it still "
        "waits. Needs no extra beside the base installation."
    ),
    examples=(
        ("modelcache wait --address bert-base-weights:9090", "until the ModelCache bert-base is served"),
        (
            "modelcache wait --address localhost:9090 --revision v2 --timeout 5m",
            "until v2 is active, 5 minutes at most",
        ),
    ),
    add_options=_add_options,
    run=_run,
    reasons=(Reason.AUTH_FAILED, Reason.UNAVAILABLE, Reason.NOT_READY),
    environment=(
        (ADDRESS_VARIABLE, "address of the server, where --address is absent; https://HOST:PORT asks over TLS"),
        (TOKEN_VARIABLE, "file with a bearer token, for a server that wants one"),
        (CA_VARIABLE, "authorities to trust for TLS (PEM); default: public ones"),
    ),
)
