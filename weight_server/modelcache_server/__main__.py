"""`modelcache-server`: what the weight server's pods run."""

import argparse
import sys

from modelcache_server import logs, options
from modelcache_server.errors import ServerError
from modelcache_server.run import serve_until_signalled
from modelcache_volume import VolumeError


def main(arguments: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0 after a stop that was asked for, 1 when it cannot serve."""
    parser = argparse.ArgumentParser(prog="modelcache-server", description="Serves model weights over gRPC and HTTP.")
    options.add_arguments(parser)
    args = parser.parse_args(arguments)
    logs.configure(args.log_level, args.log_format)
    try:
        serve_until_signalled(options.settings_from(args), args.grace)
    except (ServerError, VolumeError, ValueError, OSError) as error:
        print(f"modelcache-server: {error}", file=sys.stderr)  # noqa: T201 - a program's last words
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
