"""The standard library's HTTP server, answering HEAD with fixed headers: `python -m bench.peers.bare_http HEADERS`.

HEADERS is a JSON file: a list of names and values: the same answer that ours gives, with nothing looked up.
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

_HEADERS = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")) if __name__ == "__main__" else []


class Handler(BaseHTTPRequestHandler):
    """Keeps connections, as ours does."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self.send_response(200)
        for name, value in _HEADERS:
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing: the bare server has no access log."""


class Server(ThreadingHTTPServer):
    """With room for all who connect at once."""

    request_queue_size = 512


def main() -> None:
    """Serve until killed."""
    with Server(("127.0.0.1", 0), Handler) as server:
        print("port", server.server_address[1], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
