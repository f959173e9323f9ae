"""Runs in a pod: the unit tests' fake hub behind addresses that the cluster can reach, with a way to make commits.

Commands come as JSON over port 8002: {"commit": {"repo", "branch", "seed", "megabytes"}} answers the commit and the
weights' SHA-256 (of the file and of the tensors in it), with "bert": true they are a small model that transformers can
load; {"folder": {"repo", "path"}} commits a folder's files; {"fault": {…}} spoils requests; {"clear": true} ends all
faults; {"count": "/files/*"} answers how many GETs of such paths there were.
"""

import array
import contextlib
import fnmatch
import hashlib
import json
import math
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


def plain_weights(commit):
    """A safetensors file of random bytes."""
    size = commit.get("megabytes", 8) * 2**20
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + random.Random(commit["seed"]).randbytes(size)


BERT = {
    "architectures": ["BertModel"], "model_type": "bert", "vocab_size": 8000, "hidden_size": 32,
    "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64,
    "type_vocab_size": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def bert_shapes():
    """Names and shapes of the tensors of a BertModel of this configuration."""
    hidden, inner = BERT["hidden_size"], BERT["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (BERT["vocab_size"], hidden),
        "embeddings.position_embeddings.weight": (BERT["max_position_embeddings"], hidden),
        "embeddings.token_type_embeddings.weight": (BERT["type_vocab_size"], hidden),
    }
    linear = {"pooler.dense": (hidden, hidden)}
    norms = ["embeddings.LayerNorm"]
    for number in range(BERT["num_hidden_layers"]):
        layer = f"encoder.layer.{number}"
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            linear[f"{layer}.{name}"] = (hidden, hidden)
        linear |= {f"{layer}.intermediate.dense": (inner, hidden), f"{layer}.output.dense": (hidden, inner)}
        norms += [f"{layer}.attention.output.LayerNorm", f"{layer}.output.LayerNorm"]
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (hidden,), f"{name}.bias": (hidden,)}
    return shapes


def bert_weights(seed):
    """A safetensors file of a small BertModel with random values."""
    chance, header, data = random.Random(seed), {}, b""
    for name, shape in bert_shapes().items():
        values = array.array("f", (chance.uniform(-0.1, 0.1) for _ in range(math.prod(shape))))
        begin, data = len(data), data + values.tobytes()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, len(data)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


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
                config = BERT if commit.get("bert") else {"seed": commit["seed"]}
                content = bert_weights(commit["seed"]) if commit.get("bert") else plain_weights(commit)
                files = {"model.safetensors": content, "config.json": json.dumps(config).encode()}
                sha = hub.commit(commit["repo"], files, branch=commit.get("branch", "main"), token=commit.get("token"))
                tensors = content[8 + struct.unpack_from("<Q", content)[0] :]
                digests = [hashlib.sha256(data).hexdigest() for data in (content, tensors)]
                answer = {"commit": sha, "sha256": digests[0], "tensors": digests[1]}
            if (folder := order.get("folder")) is not None:
                root = Path(folder["path"])
                files = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
                answer = {"commit": hub.commit(folder["repo"], files)}
            if (fault := order.get("fault")) is not None:
                hub.fault(**fault)
            if order.get("clear"):
                hub.ledger.clear_faults()
            if (match := order.get("count")) is not None:
                seen = [r for r in hub.ledger.requests if r.method == "GET" and fnmatch.fnmatchcase(r.path, match)]
                answer = {"count": len(seen)}
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
