"""`modelcache`, also as `python -m modelcache_cli`: what must be settled before the first import that takes long."""

try:
    import os
    import signal
    import sys
except KeyboardInterrupt:
    raise SystemExit(130) from None

INTERRUPTED = 130
"""As in modelcache_api.reasons, which is not imported yet."""


def run() -> int:
    """The program: `main`, and before that is there a quiet end by Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # An exception in the middle of an import would be shown with a traceback, or taken for a missing package.
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    from modelcache_cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
