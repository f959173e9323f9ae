"""Which bytes go where: from the manifest's tensors to ranges of files and places in a slab. Pure functions.

A component (``encoder.layer.3``) is loaded at once into one slab. safetensors bytes land at an address that is their
file offset modulo 64, as in the mapped file that transformers reads: matrix-vector kernels give other bits when a
weight's address modulo 16 differs. Tensors that are neighbours in the file stay neighbours in the slab, so a component
is a few large ranges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from modelcache.errors import FileNotInSnapshot, UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from modelcache_volume.v1.manifest_pb2 import Manifest

__all__ = [
    "BLOCK_BYTES",
    "RUN_BYTES",
    "Fusion",
    "Layout",
    "Piece",
    "Run",
    "Stored",
    "coalesce",
    "guess_components",
    "lay_out",
    "select_tensors",
]

ALIGNMENT: Final = 64
# A running CRC is known at each of these steps from a tensor's start.
BLOCK_BYTES: Final = 4 * 2**20
# Each request costs a pause of the wire; what is larger, connections can share.
RUN_BYTES: Final = 64 * 2**20
# Reading over a small hole is cheaper than another request.
GAP_BYTES: Final = 64 * 2**10
_LEGACY: Final = 3
_EMBEDDINGS: Final = ("emb", "wte", "wpe", "shared")
_RANKS: Final = {
    "model.safetensors": 0,
    "model.safetensors.index.json": 1,
    "pytorch_model.bin": 2,
    "pytorch_model.bin.index.json": 3,
}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the snapshot, as the manifest describes it.

    Attributes:
        name: as in the checkpoint.
        dtype: as safetensors spells it (``F32``, ``BF16``).
        shape: sizes of its dimensions.
        strides: in elements; None: contiguous.
        path: its file in the snapshot.
        offset: of its first byte in the file.
        length: bytes.
        crc: running CRC-32C after each 4 MiB from its start, the last after all of it.
        mapped: transformers maps the file, so the address follows the file offset; else it is 0 modulo 64.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    path: str
    offset: int
    length: int
    crc: tuple[int, ...]
    mapped: bool = True

    @property
    def place(self) -> tuple[str, int, int]:
        """What tells its bytes from those of other tensors; tied tensors share it."""
        return self.path, self.offset, self.length

    @property
    def can_be_mapped(self) -> bool:
        """Whether its address in the mapped file is one that transformers would give it, modulo 64."""
        return self.mapped or self.offset % ALIGNMENT == 0


@dataclass(frozen=True, slots=True)
class Fusion:
    """Tensors that the model holds as one: they are received next to each other.

    Attributes:
        sources: in the order of their bytes in the fused tensor.
    """

    sources: tuple[Stored, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive bytes of one tensor, checked by its running CRC.

    Attributes:
        tensor: whose bytes these are.
        begin: first byte, from the tensor's start; a multiple of 4 MiB.
        end: one past the last byte, from the tensor's start; a multiple of 4 MiB or the tensor's length.
        destination: of the first byte, in the slab.
    """

    tensor: Stored
    begin: int
    end: int
    destination: int

    @property
    def offset(self) -> int:
        """Of the first byte, in the file."""
        return self.tensor.offset + self.begin


@dataclass(frozen=True, slots=True)
class Run:
    """One range request: pieces of one file in the order of their bytes, with at most small holes between them."""

    path: str
    pieces: tuple[Piece, ...]

    @property
    def offset(self) -> int:
        """Of the first byte, in the file."""
        return self.pieces[0].offset

    @property
    def length(self) -> int:
        """Bytes on the wire, holes included."""
        last = self.pieces[-1]
        return last.tensor.offset + last.end - self.offset


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of one component lies in its slab.

    Attributes:
        nbytes: the slab's size.
        runs: what to read.
        offsets: from ``Stored.place`` to the tensor's first byte in the slab.
        fused: the first byte of each fusion, in their order.
    """

    nbytes: int
    runs: tuple[Run, ...]
    offsets: dict[tuple[str, int, int], int] = field(default_factory=dict)
    fused: tuple[int, ...] = ()

    @property
    def wire_bytes(self) -> int:
        """Bytes that are requested for it."""
        return sum(run.length for run in self.runs)


def lay_out(tensors: Iterable[Stored], fusions: Sequence[Fusion] = (), *, run_bytes: int = RUN_BYTES) -> Layout:
    """Places tensors and fusions in one slab and says what to read.

    Args:
        tensors: each gets a place of its own, at its file offset modulo 64.
        fusions: each gets one place at 0 modulo 64, as torch allocates the result of a concatenation.
        run_bytes: requests are split at about this size.
    """
    unique = {tensor.place: tensor for tensor in tensors if tensor.length}
    pieces: list[Piece] = []
    offsets: dict[tuple[str, int, int], int] = {}
    end = 0
    previous: Stored | None = None
    for tensor in sorted(unique.values(), key=lambda each: each.place):
        if previous is not None and tensor.mapped and _neighbours(previous, tensor):
            start = offsets[previous.place] + tensor.offset - previous.offset
        else:
            start = _next_place(end, tensor.offset if tensor.mapped else 0)
        offsets[tensor.place] = start
        pieces.append(Piece(tensor, 0, tensor.length, start))
        end = max(end, start + tensor.length)
        previous = tensor
    starts = []
    for fusion in fusions:
        end = _next_place(end, 0)
        starts.append(end)
        for tensor in fusion.sources:
            pieces.append(Piece(tensor, 0, tensor.length, end))
            end += tensor.length
    return Layout(max(end, 1), coalesce(pieces, run_bytes=run_bytes), offsets, tuple(starts))


def coalesce(pieces: Iterable[Piece], *, run_bytes: int = RUN_BYTES) -> tuple[Run, ...]:
    """Joins neighbouring pieces into requests of about ``run_bytes``, splitting large tensors at 4 MiB steps."""
    runs: list[list[Piece]] = []
    length = 0
    parts = [part for piece in pieces for part in _split(piece, run_bytes)]
    for piece in sorted(parts, key=lambda each: (each.tensor.path, each.offset)):
        last = runs[-1][-1] if runs else None
        gap = piece.offset - (last.tensor.offset + last.end) if last else 0
        size = piece.end - piece.begin
        if (
            last
            and last.tensor.path == piece.tensor.path
            and 0 <= gap <= GAP_BYTES
            and length + gap + size <= run_bytes
        ):
            runs[-1].append(piece)
            length += gap + size
        else:
            runs.append([piece])
            length = size
    return tuple(Run(pieces[0].tensor.path, tuple(pieces)) for pieces in runs)


def guess_components(tensors: Iterable[Stored]) -> dict[str, list[Stored]]:
    """Groups a checkpoint's tensors as a model of blocks would, by their names alone.

    ``encoder.layer.3.output.dense.weight`` belongs to ``encoder.layer.3``; ``embeddings.word_embeddings.weight`` to
    ``embeddings``, the outermost part of its name that leads to no block. It is a guess, to start reading before the
    model is built; what it gets wrong is read again.

    Returns:
        Embeddings first, then blocks in their order; other groups are left out, since a model may not want them.
    """
    tensors = list(tensors)
    paths = {tensor.name: tensor.name.split(".") for tensor in tensors}
    blocks = {name: _block(path) for name, path in paths.items()}
    ancestors = {block[:end] for block in blocks.values() if block for end in range(len(block))}
    groups: dict[tuple[str, ...], list[Stored]] = {}
    for tensor in tensors:
        path = tuple(paths[tensor.name])
        home = blocks[tensor.name] or next(
            (path[:end] for end in range(1, len(path)) if path[:end] not in ancestors), ()
        )
        if home and (blocks[tensor.name] or any(word in home[-1] for word in _EMBEDDINGS)):
            groups.setdefault(home, []).append(tensor)
    order = sorted(groups, key=lambda home: (home[-1].isdigit(), home[:-1], int(home[-1]) if home[-1].isdigit() else 0))
    return {".".join(home): groups[home] for home in order}


def _block(path: list[str]) -> tuple[str, ...]:
    end = next((index for index, part in enumerate(path) if part.isdigit()), -1)
    return tuple(path[: end + 1])


def select_tensors(manifest: Manifest, *, subfolder: str = "", variant: str = "") -> list[Stored]:
    """Picks the weights that transformers would load: safetensors before torch files, one file before shards.

    Raises:
        FileNotInSnapshot: there are none of this subfolder and variant; the message names what there is.
        UnsupportedModel: the only weights have a name that transformers does not load by itself.
    """
    sets = [
        (_preference(each.path, variant), index)
        for index, each in enumerate(manifest.weight_sets)
        if each.subfolder == subfolder.rstrip("/") and each.variant == variant
    ]
    known = sorted((rank, index) for rank, index in sets if rank is not None)
    if not known:
        there = ", ".join(each.path for each in manifest.weight_sets) or "no weights at all"
        wanted = f" in {subfolder!r}" if subfolder else ""
        wanted += f" of variant {variant!r}" if variant else ""
        kind = UnsupportedModel if sets else FileNotInSnapshot
        raise kind(f"The snapshot {manifest.digest[:12]} has no model.safetensors{wanted}; it has {there}.")
    chosen = known[0][1]
    weight_set = manifest.weight_sets[chosen]
    mapped = weight_set.format != _LEGACY
    paths = [each.path for each in manifest.files]
    return [
        Stored(
            name=each.name,
            dtype=each.dtype,
            shape=tuple(each.shape),
            strides=tuple(each.strides) or None,
            path=paths[each.file],
            offset=each.offset,
            length=each.length,
            crc=tuple(each.running_crc32c),
            mapped=mapped,
        )
        for each in manifest.tensors
        if each.weight_set == chosen
    ]


def _preference(path: str, variant: str) -> int | None:
    """Rank of a weight file among those that transformers looks for, lowest first; None: it would not look for it."""
    name = path.rpartition("/")[2]
    if variant:
        name = name.replace(f".{variant}", "", 1)
    return _RANKS.get(name)


def _neighbours(left: Stored, right: Stored) -> bool:
    gap = right.offset - (left.offset + left.length)
    return left.mapped and left.path == right.path and gap <= GAP_BYTES


def _next_place(end: int, offset: int) -> int:
    return end + (offset - end) % ALIGNMENT


def _split(piece: Piece, run_bytes: int) -> list[Piece]:
    """Parts of at most ``run_bytes``, cut where the running CRC is known."""
    step = max(BLOCK_BYTES, run_bytes // BLOCK_BYTES * BLOCK_BYTES)
    cuts = [*range(piece.begin, piece.end, step), piece.end]
    return [Piece(piece.tensor, begin, end, piece.destination + begin - piece.begin) for begin, end in pairwise(cuts)]
