"""GET /progress: the counters of a running fetch as JSON, for the operator."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from modelcache_fetcher.progress import Progress


class ProgressServer:
    """Serves one fetch's progress until stopped.

    Args:
        progress: What is shown.
        port: TCP port on all interfaces; 0: any free one.

    Raises:
        OSError: The port is taken.
    """

    def __init__(self, progress: Progress, port: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                found = self.path.partition("?")[0] == "/progress"
                body = json.dumps(progress.snapshot()).encode() if found else b"see /progress\n"
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", "application/json" if found else "text/plain")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the parent's name
                """Keep the log for the fetch."""

        self._server = ThreadingHTTPServer(("", port), Handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Stop answering and free the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
