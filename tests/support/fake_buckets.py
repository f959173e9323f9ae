"""The least of S3's and GCS's read APIs over a folder, sent by sendfile: servers that cost next to nothing.

For benches only: whether sources speak the real APIs is tested with moto and fake-gcs-server. Run
``python -m support.fake_buckets s3|gcs FOLDER`` from the ``tests`` folder; any bucket's name means the folder.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import json
import time
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape

import crc32c

from support.sendfile_server import FileHandler, Ledger, Served

_MODIFIED = "Mon, 01 Jan 2024 00:00:00 GMT"


class _BucketHandler(FileHandler):
    root: ClassVar[Path]

    def files(self, prefix: str) -> list[tuple[str, Path]]:
        found = ((str(path.relative_to(self.root)), path) for path in sorted(self.root.rglob("*")) if path.is_file())
        return [(name, path) for name, path in found if name.startswith(prefix)]

    def object(self, name: str) -> Path | None:
        return dict(self.files(name)).get(name)


class S3Handler(_BucketHandler):
    """ListObjectsV2, HeadObject, GetObject; objects have the CRC-32C that S3 would state."""

    def route(self, path: str, query: str) -> None:
        _, _, key = path.lstrip("/").partition("/")
        if not key:
            prefix = parse_qs(query).get("prefix", [""])[0]
            items = "".join(
                f"<Contents><Key>{escape(name)}</Key><Size>{file.stat().st_size}</Size><ETag>&quot;{self.etag(file)}&quot;"
                "</ETag><LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>"
                for name, file in self.files(prefix)
            )
            self.send_text(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{items}</ListBucketResult>")
            return
        file = self.object(key)
        if file is None:
            self.send_text(404, "<Error><Code>NoSuchKey</Code></Error>")
            return
        etag = f'"{self.etag(file)}"'
        if self.headers.get("If-Match", etag) != etag:
            self.send_text(412, "<Error><Code>PreconditionFailed</Code></Error>")
            return
        headers = {"ETag": etag, "Last-Modified": _MODIFIED}
        if self.command == "HEAD":
            headers |= self.stated(file)
        self.send_file(file, headers)

    def etag(self, file: Path) -> str:
        """That of an object uploaded in parts; changes with the file."""
        return f"{file.stat().st_mtime_ns:032x}-2"

    def stated(self, file: Path) -> dict[str, str]:
        """What HeadObject states beside the ETag."""
        crc = _crc32c(file, file.stat().st_mtime_ns)
        return {"x-amz-checksum-crc32c": crc, "x-amz-checksum-type": "FULL_OBJECT"}


class GcsHandler(_BucketHandler):
    """objects.list, objects.get, and media downloads."""

    def route(self, path: str, query: str) -> None:
        asked = parse_qs(query)
        name = unquote(self.path.partition("?")[0].partition("/o/")[2])
        if not name:
            items = [self._metadata(*found) for found in self.files(asked.get("prefix", [""])[0])]
            self.send_text(200, json.dumps({"kind": "storage#objects", "items": items}), {"Content-Type": "json"})
            return
        file = self.object(name)
        if file is None:
            self.send_text(404, "no such object")
        elif asked.get("alt") == ["media"]:
            checksum = f"crc32c={_crc32c(file, file.stat().st_mtime_ns)}"
            self.send_file(file, {"ETag": '"1"', "x-goog-hash": checksum, "x-goog-generation": "1"})
        else:
            self.send_text(200, json.dumps(self._metadata(name, file)), {"Content-Type": "application/json"})

    def _metadata(self, name: str, file: Path) -> dict[str, str]:
        status = file.stat()
        crc = _crc32c(file, status.st_mtime_ns)
        return {"name": name, "bucket": "b", "size": str(status.st_size), "generation": "1", "crc32c": crc}


@functools.cache
def _crc32c(file: Path, mtime_ns: int) -> str:
    del mtime_ns
    value = 0
    with file.open("rb") as content:
        while chunk := content.read(2**22):
            value = crc32c.crc32c(chunk, value)
    return base64.b64encode(value.to_bytes(4, "big")).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a folder as a bucket.")
    parser.add_argument("kind", choices=["s3", "gcs"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    handler = S3Handler if arguments.kind == "s3" else GcsHandler
    served = Served(handler, Ledger(), root=arguments.folder)
    print(f"url {served.url}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
