"""Runs in a pod: the unit tests' fake hub behind addresses that the cluster can reach, with a way to make commits.

Commands come as JSON over port 8002: {"commit": {"repo", "branch", "seed", "megabytes"}} answers the commit and the
weights' SHA-256; {"fault": {…}} spoils requests; {"clear": true} ends all faults; {"downloads": true} answers how many
bytes of files were asked for.
"""

import contextlib
import hashlib
import json
import os
import random
import socket
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from support.fake_hub import FakeHub

CONTROL_PORT = 8002


def weights(seed, megabytes):
    """A safetensors file of random bytes."""
    size = megabytes * 2**20
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + random.Random(seed).randbytes(size)


def forward(port, target):
    """Pass every connection on to a port of loopback."""
    listener = socket.create_server(("", port))

    def pump(source, sink):
        try:
            while data := source.recv(1 << 20):
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def accept():
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", target))
            for pair in ((client, server), (server, client)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def main():
    hub = FakeHub(Path("/tmp/hub"))
    hub.cdn.url = f"http://{os.environ['HOST']}:8001"
    forward(8000, hub.api.port)
    forward(8001, hub.cdn.port)

    class Control(BaseHTTPRequestHandler):
        def do_POST(self):
            order = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = {}
            if (commit := order.get("commit")) is not None:
                content = weights(commit["seed"], commit.get("megabytes", 8))
                files = {"model.safetensors": content, "config.json": json.dumps({"seed": commit["seed"]}).encode()}
                sha = hub.commit(commit["repo"], files, branch=commit.get("branch", "main"), token=commit.get("token"))
                answer = {"commit": sha, "sha256": hashlib.sha256(content).hexdigest()}
            if (fault := order.get("fault")) is not None:
                hub.fault(**fault)
            if order.get("clear"):
                hub.ledger.clear_faults()
            if order.get("downloads"):
                answer["downloads"] = len(hub.file_requests())
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    sys.stdout.write("ready\n")
    ThreadingHTTPServer(("127.0.0.1", CONTROL_PORT), Control).serve_forever()


if __name__ == "__main__":
    main()
