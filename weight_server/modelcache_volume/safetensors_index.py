"""Index of a safetensors file, read while it streams by.

The format: https://github.com/huggingface/safetensors#format. Checked as strictly as that page says, and as the
reference implementation does, because what comes from a repo is not trusted: nothing is allocated or read on the word
of a header that was not checked.
"""

from __future__ import annotations

import json
from typing import Any

from modelcache_volume.errors import BadWeights
from modelcache_volume.v1 import manifest_pb2
from modelcache_volume.weights import IndexedFile, IndexedTensor, RunningCrc

MAX_HEADER_BYTES = 32 * 2**20  # the format allows three times as much, which takes more memory than a fetch has
MAX_TENSORS = 250_000
# Separators per tensor of a header: bounds the memory that parsing takes before the header is known to be sane.
_SEPARATORS_PER_TENSOR = 16
_MAX_OFFSET = 2**63 - 1

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits per element of each dtype that safetensors 0.8 knows."""


class SafetensorsIndexer:
    """Reads a safetensors file's header and its tensors' running CRC-32C in one pass over its bytes.

    Memory is bounded by the header (at most 32 MiB, 250,000 tensors).

    Args:
        path: The file's path in its repo, for messages.
        size: The file's length in bytes.

    Raises:
        BadWeights: The file is too short to be one.
    """

    def __init__(self, path: str, size: int) -> None:
        self._path = path
        self._size = size
        self._seen = 0
        self._header = bytearray()
        self._header_end = 0
        self._metadata: dict[str, str] = {}
        self._pending: list[tuple[int, int, str, str, tuple[int, ...]]] = []
        self._next = 0
        self._crc = RunningCrc()
        self._tensors: list[IndexedTensor] = []
        if size < 8:
            raise self._bad(f"it has {size} bytes, less than a safetensors header")

    def update(self, data: memoryview) -> None:
        """Takes the next bytes of the file, from byte 0 on, in chunks of any size.

        Raises:
            BadWeights: What was seen so far cannot be a safetensors file of this size.
        """
        view = memoryview(data).cast("B")
        if self._seen + len(view) > self._size:
            raise self._bad(f"it is longer than the {self._size} bytes announced")
        if not self._header_end or self._seen < self._header_end:
            view = self._take_header(view)
        if len(view):
            self._take_tensors(view)

    def finish(self) -> IndexedFile:
        """The index, once all bytes were given.

        Raises:
            BadWeights: Bytes are missing.
        """
        if self._seen != self._size:
            raise self._bad(f"it is cut off after {self._seen} of {self._size} bytes")
        return IndexedFile(manifest_pb2.WEIGHT_FORMAT_SAFETENSORS, tuple(self._tensors), self._metadata)

    def _bad(self, problem: str) -> BadWeights:
        return BadWeights(
            f"{self._path[:200]} is not a sound safetensors file: {problem}. Upload it again at the source."
        )

    def _take_header(self, view: memoryview) -> memoryview:
        if not self._header_end:
            view = self._take_into_header(view, 8)
            if len(self._header) < 8:
                return view
            length = int.from_bytes(self._header, "little")
            if length > MAX_HEADER_BYTES or length > self._size - 8:
                raise self._bad(
                    f"its header claims {length} bytes (the file has {self._size}, at most 32 MiB are read)"
                )
            self._header_end = 8 + length
        view = self._take_into_header(view, self._header_end)
        if self._seen == self._header_end:
            self._parse_header(bytes(self._header[8:]))
            self._header = bytearray()
            self._finish_tensors()
        return view

    def _take_into_header(self, view: memoryview, end: int) -> memoryview:
        part = view[: end - self._seen]
        self._header += part
        self._seen += len(part)
        return view[len(part) :]

    def _take_tensors(self, view: memoryview) -> None:
        # The ranges were checked to follow each other without a gap up to the file's end.
        while len(view):
            end = self._pending[self._next][1]
            part = view[: end - self._seen]
            self._crc.update(part)
            self._seen += len(part)
            view = view[len(part) :]
            self._finish_tensors()

    def _finish_tensors(self) -> None:
        while self._next < len(self._pending) and self._pending[self._next][1] == self._seen:
            start, end, name, dtype, shape = self._pending[self._next]
            self._tensors.append(IndexedTensor(name, dtype, shape, start, end - start, self._crc.result()))
            self._crc = RunningCrc()
            self._next += 1

    def _parse_header(self, header: bytes) -> None:
        if not header.startswith(b"{"):
            raise self._bad("its header does not begin with '{'")
        separators = sum(header.count(mark) for mark in (b",", b"{", b"["))
        if separators > MAX_TENSORS * _SEPARATORS_PER_TENSOR:
            raise self._bad(f"its header has more than {MAX_TENSORS} tensors, or nonsense of that size")
        try:
            document = json.loads(header.decode(), object_pairs_hook=self._unique, parse_constant=self._no_constant)
        except (ValueError, RecursionError) as error:
            raise self._bad(f"its header is not JSON ({str(error)[:200]})") from error
        self._metadata = self._checked_metadata(document.pop("__metadata__", {}))
        if len(document) > MAX_TENSORS:
            raise self._bad(f"it has {len(document)} tensors, more than {MAX_TENSORS}")
        self._pending = sorted(self._checked_tensor(name, entry) for name, entry in document.items())
        position = self._header_end
        for start, end, name, _, _ in self._pending:
            if start != position:
                what = "overlaps the one before it" if start < position else "leaves a gap before it"
                raise self._bad(f"the tensor {name[:200]!r} {what}")
            position = end
        if position != self._size:
            raise self._bad(f"its header describes {position} bytes, but the file has {self._size}")

    def _unique(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise self._bad("its header has the same key twice")
        return result

    def _no_constant(self, constant: str) -> None:
        raise self._bad(f"its header contains {constant}")

    def _checked_metadata(self, metadata: Any) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise self._bad("its __metadata__ is not a map of strings")
        for text in (*metadata, *metadata.values()):
            self._checked_text(text)
        return metadata

    def _checked_text(self, text: str) -> str:
        # JSON can spell lone surrogates, which neither UTF-8 nor protobuf can carry.
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self._bad("its header contains text that is not Unicode") from error
        return text

    def _checked_tensor(self, name: str, entry: Any) -> tuple[int, int, str, str, tuple[int, ...]]:
        def bad(problem: str) -> BadWeights:
            return self._bad(f"the tensor {name[:200]!r} {problem}")

        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise bad("does not have exactly dtype, shape and data_offsets")
        self._checked_text(name)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise bad(f"has the unknown dtype {str(dtype)[:50]!r}")
        if not _is_sizes(shape):
            raise bad("has a shape that is not a list of non-negative integers")
        if not _is_sizes(offsets) or len(offsets) != 2:
            raise bad("has data_offsets that are not two non-negative integers")
        elements = 1
        for dimension in shape:
            elements *= dimension
            if elements > _MAX_OFFSET:
                raise bad("has more elements than any file can hold")
        begin, end = offsets
        if end < begin or end > self._size - self._header_end:
            raise bad(f"lies at bytes {begin} to {end}, outside the file")
        if (end - begin) * 8 != elements * DTYPE_BITS[dtype]:
            raise bad(f"has {end - begin} bytes, which does not fit {dtype} of shape {shape[:8]}")
        return self._header_end + begin, self._header_end + end, name, dtype, tuple(shape)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= _MAX_OFFSET for item in value)
