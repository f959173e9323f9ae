"""Small volumes for tests: files in, a published snapshot out, through the package's own public API."""

import os

from modelcache_volume import (
    ContentHasher,
    SafetensorsIndexer,
    build_manifest,
    is_index_file,
    source_folder,
    space_errors,
)
from modelcache_volume.v1 import manifest_pb2


def file_entry(path: str, content: bytes) -> manifest_pb2.File:
    hasher = ContentHasher(len(content))
    hasher.update(memoryview(content))
    digests = hasher.result()
    return manifest_pb2.File(path=path, size=len(content), sha256=digests.sha256, block_crc32c=digests.block_crc32c)


def manifest_of(files: dict[str, bytes], *, repo_id="org/name", requested="main", commit="a" * 40, left_out=()):
    weights, index_files = {}, {}
    for path, content in files.items():
        if path.endswith(".safetensors"):
            indexer = SafetensorsIndexer(path, len(content))
            indexer.update(memoryview(content))
            weights[path] = indexer.finish()
        elif is_index_file(path):
            index_files[path] = content
    return build_manifest(
        manifest_pb2.Source(repo_id=repo_id, requested=requested, commit=commit),
        [file_entry(path, content) for path, content in files.items()],
        weights=weights,
        index_files=index_files,
        left_out=left_out,
    )


def publish(writer, files: dict[str, bytes], **source):
    """Stores and publishes `files` (content by path) as a fetch does, skipping blobs that are there."""
    manifest = manifest_of(files, **source)
    folder = source_folder(manifest.source.repo_id)
    for number, entry in enumerate(manifest.files):
        sha256 = entry.sha256.hex()
        if not writer.blob_exists(folder, sha256, entry.size):
            part = writer.incoming(folder, f"part{number}")
            with space_errors(writer.volume.root, f"downloading {entry.path}", entry.size):
                part.write_bytes(files[entry.path])
            writer.adopt(folder, part, sha256)
    return writer.publish(folder, manifest)


def read(snapshot, path: str) -> bytes:
    descriptor = snapshot.open_blob(snapshot.file(path))
    with os.fdopen(descriptor, "rb") as file:
        return file.read()
