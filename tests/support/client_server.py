"""A small weight server that misbehaves on demand, for tests of the client; the real one is used wherever it can be.

It serves folders from memory maps, without any cache, over gRPC and HTTP, and breaks, delays or damages what it sends
as its attributes say.
"""

import contextlib
import mmap
import os
import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Self
from urllib.parse import unquote

import grpc
from crc32c import crc32c

from modelcache_volume import ContentHasher, SafetensorsIndexer, build_manifest, is_index_file
from modelcache_volume.v1 import manifest_pb2
from modelcache_wire.framing import CHECKSUM_KEY
from modelcache_wire.v1 import weights_pb2, weights_pb2_grpc

STEP = 4 * 2**20


def folder_manifest(folder: Path, *, repo_id: str = "org/name", commit: str = "a" * 40) -> manifest_pb2.Manifest:
    """The manifest of a folder's files, as a fetch would publish it."""
    entries, weights, index_files = [], {}, {}
    for path in sorted(each for each in folder.rglob("*") if each.is_file() and "__pycache__" not in each.parts):
        name = path.relative_to(folder).as_posix()
        content = memoryview(path.read_bytes())
        hasher = ContentHasher(len(content))
        indexer = SafetensorsIndexer(name, len(content)) if name.endswith(".safetensors") else None
        for start in range(0, len(content), STEP):
            hasher.update(content[start : start + STEP])
            if indexer:
                indexer.update(content[start : start + STEP])
        if indexer:
            weights[name] = indexer.finish()
        if is_index_file(name):
            index_files[name] = bytes(content)
        digests = hasher.result()
        entries.append(
            manifest_pb2.File(path=name, size=len(content), sha256=digests.sha256, block_crc32c=digests.block_crc32c)
        )
    source = manifest_pb2.Source(repo_id=repo_id, requested="main", commit=commit)
    return build_manifest(source, entries, weights=weights, index_files=index_files)


class FaultyServer:
    """Serves folders; use it as a context manager.

    Attributes:
        http: whether the HTTP lane answers.
        ready: whether there is an active revision.
        cut_after: bytes after which each HTTP response breaks off, as often as `cuts` says.
        cuts: how many responses still break off.
        flips: file offsets of which a byte is damaged in HTTP responses, and how often still.
        seconds_per_mib: what sending a MiB takes, on both lanes.
        damaged_manifests: how many manifests still arrive damaged.
        damage: what happens to their first tensor.
        manifest_checksums: whether manifests come with their checksum.
        hold: while clear, HTTP responses stop after their head.
        requests: (path, offset, length) of each HTTP request.
        renewed: digests whose lease was renewed.
    """

    def __init__(self, folder: Path | None = None, **manifest: str) -> None:
        self.http = self.ready = True
        self.cut_after = self.cuts = 0
        self.flips: dict[int, int] = {}
        self.seconds_per_mib = 0.0
        self.damaged_manifests = 0
        self.damage: Callable[[manifest_pb2.Tensor], None] = lambda _: None
        self.manifest_checksums = True
        self._ended = threading.Event()
        self.hold = threading.Event()
        self.hold.set()
        self.requests: list[tuple[str, int, int]] = []
        self._asked = threading.Condition()
        self.renewed: list[str] = []
        self.volume_path = ""
        self.active = ""
        self.manifests: dict[str, manifest_pb2.Manifest] = {}
        self.folders: dict[str, Path] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self._sockets: set[socket.socket] = set()
        if folder is not None:
            self.publish(folder, **manifest)

    def publish(self, folder: Path, **manifest: str) -> str:
        """Makes a folder's files the active snapshot and returns its digest."""
        made = folder_manifest(folder, **manifest)
        self.manifests[made.digest] = made
        self.folders[made.digest] = folder
        self.active = made.digest
        return made.digest

    def remove(self, digest: str) -> None:
        """Prunes a snapshot."""
        del self.manifests[digest], self.folders[digest]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self, port: int = 0, *, host: str = "127.0.0.1", http_port: int = 0) -> Self:
        outer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                outer._sockets.add(self.request)
                with contextlib.suppress(OSError):
                    outer._serve(self.request)
                outer._sockets.discard(self.request)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            request_queue_size = 64

        self._http = Server((host, http_port), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self._grpc = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        weights_pb2_grpc.add_WeightsServicer_to_server(_Service(self), self._grpc)
        self.port = self._grpc.add_insecure_port(f"{host}:{port}")
        self._grpc.start()
        return self

    def stop(self) -> None:
        """Breaks every connection off at once."""
        self.hold.set()
        self._ended.set()
        self._grpc.stop(None).wait()
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def __enter__(self) -> Self:
        return self if hasattr(self, "port") else self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_for_request(self, count: int) -> None:
        """Returns once there were more than `count` requests."""
        with self._asked:
            assert self._asked.wait_for(lambda: len(self.requests) > count, 30)

    def content(self, digest: str, path: str) -> mmap.mmap | bytes:
        file = self.folders[digest] / path
        if file.stat().st_size == 0:
            return b""
        if file not in self._maps:
            with file.open("rb") as opened:
                self._maps[file] = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
        return self._maps[file]

    def _serve(self, connection: socket.socket) -> None:
        received = b""
        while True:
            while b"\r\n\r\n" not in received:
                chunk = connection.recv(4096)
                if not chunk:
                    return
                received += chunk
            head, _, received = received.partition(b"\r\n\r\n")
            if not self.http:
                return
            lines = head.decode().split("\r\n")
            digest, _, path = lines[0].split(" ")[1].removeprefix("/v1/snapshots/").partition("/")
            path = unquote(path)
            fields = dict(line.split(": ", 1) for line in lines[1:])
            if digest not in self.manifests or not (self.folders[digest] / path).is_file():
                code = "EntryNotFound" if digest in self.manifests else "RevisionGone"
                connection.sendall(
                    f"HTTP/1.1 404 Not Found\r\nX-Error-Code: {code}\r\nContent-Length: 0\r\n\r\n".encode()
                )
                continue
            first, last = (int(each) for each in fields["Range"].removeprefix("bytes=").split("-"))
            with self._asked:
                self.requests.append((path, first, last + 1 - first))
                self._asked.notify_all()
            if not self._send(connection, self.content(digest, path), first, last + 1):
                return

    def _send(self, connection: socket.socket, content: mmap.mmap | bytes, first: int, end: int) -> bool:
        length = end - first
        connection.sendall(f"HTTP/1.1 206 Partial Content\r\nContent-Length: {length}\r\n\r\n".encode())
        self.hold.wait()
        stop = end
        if self.cuts and length > self.cut_after:
            self.cuts -= 1
            stop = first + self.cut_after
        flips = [each for each, count in self.flips.items() if count and first <= each < stop]
        with memoryview(content) as view:
            step = 2**20 if self.seconds_per_mib else STEP
            for start in range(first, stop, step):
                self._ended.wait(self.seconds_per_mib)
                part: memoryview | bytearray = view[start : min(start + step, stop)]
                for each in flips:
                    if start <= each < start + len(part):
                        part = bytearray(part)
                        part[each - start] ^= 0x10
                        self.flips[each] -= 1
                connection.sendall(part)
        return stop == end


class _Service(weights_pb2_grpc.WeightsServicer):
    def __init__(self, server: FaultyServer) -> None:
        self.server = server

    def GetRevision(self, request, context):  # noqa: N802
        if request.known_digest:
            self.server.renewed.append(request.known_digest)
        if not self.server.ready:
            _abort(context, grpc.StatusCode.NOT_FOUND, "NOT_READY", "still fetching")
        manifest = self.server.manifests[self.server.active]
        return weights_pb2.GetRevisionResponse(
            active=manifest_pb2.Active(name="test", digest=manifest.digest, generation=1),
            source=manifest.source,
            known_digest_available=request.known_digest in self.server.manifests,
            http_port=self.server._http.server_address[1],
            lease_seconds=600,
            volume_path=self.server.volume_path,
        )

    def GetManifest(self, request, context):  # noqa: N802
        manifest = self.server.manifests.get(request.digest or self.server.active)
        if manifest is None:
            _abort(context, grpc.StatusCode.NOT_FOUND, "REVISION_GONE", "pruned")
        response = weights_pb2.GetManifestResponse(part=manifest)
        if self.server.manifest_checksums:
            context.set_trailing_metadata(((CHECKSUM_KEY, f"{crc32c(response.SerializeToString()):08x}"),))
        if self.server.damaged_manifests:
            self.server.damaged_manifests -= 1
            damaged = weights_pb2.GetManifestResponse()
            damaged.CopyFrom(response)
            self.server.damage(damaged.part.tensors[0])
            response = damaged
        yield response

    def Read(self, request, context):  # noqa: N802
        if request.digest not in self.server.manifests:
            _abort(context, grpc.StatusCode.NOT_FOUND, "REVISION_GONE", "pruned")
        for wanted in request.ranges:
            content = self.server.content(request.digest, wanted.path)
            end = wanted.offset + wanted.length
            for start in range(wanted.offset, end, 2**20):
                self.server._ended.wait(self.server.seconds_per_mib)
                yield weights_pb2.ReadResponse(data=content[start : min(start + 2**20, end)])


def _abort(context, code: grpc.StatusCode, reason: str, message: str) -> None:
    context.set_trailing_metadata((("modelcache-reason", reason),))
    context.abort(code, message)


def main() -> None:
    """Serve a folder until stdin closes: `python -m support.client_server FOLDER`."""
    with FaultyServer(Path(sys.argv[1])) as server:
        print(f"READY {server.address}", flush=True)
        sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
