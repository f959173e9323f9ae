"""Tensors of the manifest become places in memory and ranges of files."""

import pytest

from modelcache.errors import FileNotInSnapshot
from modelcache.plan import BLOCK_BYTES, Fusion, Piece, Stored, coalesce, lay_out, select_tensors
from modelcache_volume.v1 import manifest_pb2

MIB = 2**20


def tensor(name, offset, length, *, path="model.safetensors", mapped=True, strides=None):
    crc = tuple(range(1, -(-length // BLOCK_BYTES) + 1))
    return Stored(name, "U8", (length,), strides, path, offset, length, crc, mapped)


def covered(layout):
    """(path, file offset) of each byte of the slab that is filled, by position."""
    return {
        piece.destination + index: (run.path, piece.offset + index)
        for run in layout.runs
        for piece in run.pieces
        for index in range(piece.end - piece.begin)
    }


@pytest.mark.parametrize("start", [0, 8, 16, 24, 40, 63])
def test_a_tensor_lies_at_its_file_offset_modulo_64(start):
    tensors = [tensor("a", 1000 * 64 + start, 300), tensor("b", 3000 * 64 + start + 8, 5)]
    layout = lay_out(tensors)
    assert [layout.offsets[each.place] % 64 for each in tensors] == [each.offset % 64 for each in tensors]


def test_neighbours_in_the_file_are_one_request_and_neighbours_in_memory():
    tensors = [tensor("a", 8, 100), tensor("b", 108, 50), tensor("c", 158, 7)]
    layout = lay_out(reversed(tensors))
    assert [(run.offset, run.length) for run in layout.runs] == [(8, 157)]
    assert layout.offsets[tensors[1].place] - layout.offsets[tensors[0].place] == 100


def test_a_small_hole_is_read_over_and_a_large_one_is_not():
    near = lay_out([tensor("a", 0, 10), tensor("b", 1000, 10)])
    far = lay_out([tensor("a", 0, 10), tensor("b", 10 * MIB, 10)])
    assert [run.length for run in near.runs] == [1010]
    assert [run.length for run in far.runs] == [10, 10]


def test_every_byte_of_every_tensor_is_read_to_one_place():
    tensors = [tensor("a", 5, 70), tensor("b", 75, 9), tensor("c", 400_000, 33), tensor("d", 3, 20, path="other")]
    layout = lay_out(tensors)
    filled = covered(layout)
    for each in tensors:
        start = layout.offsets[each.place]
        assert [filled[start + i] for i in range(each.length)] == [
            (each.path, each.offset + i) for i in range(each.length)
        ]
    assert max(filled) < layout.nbytes


def test_tied_tensors_share_one_place():
    layout = lay_out([tensor("a", 64, 100), tensor("b", 64, 100)])
    assert layout.wire_bytes == 100
    assert len(layout.offsets) == 1


def test_a_tensor_without_bytes_needs_nothing():
    assert lay_out([tensor("a", 64, 0)]).runs == ()


def test_what_torch_would_copy_lies_at_0_modulo_64():
    layout = lay_out([tensor("a", 13, 100, mapped=False), tensor("b", 113, 100, mapped=False)])
    assert all(start % 64 == 0 for start in layout.offsets.values())


def test_fused_tensors_follow_each_other_from_0_modulo_64():
    sources = (tensor("w3", 5000, 40), tensor("w1", 96, 24))
    layout = lay_out([tensor("x", 8, 17)], [Fusion(sources)])
    (start,) = layout.fused
    filled = covered(layout)
    assert start % 64 == 0
    expected = [("model.safetensors", 5000 + i) for i in range(40)] + [("model.safetensors", 96 + i) for i in range(24)]
    assert [filled[start + i] for i in range(64)] == expected


def test_large_tensors_are_split_where_their_checksum_is_known():
    runs = coalesce([Piece(tensor("a", 8, 50 * MIB), 0, 50 * MIB, 0)], run_bytes=16 * MIB)
    assert [(run.offset - 8, run.length) for run in runs] == [
        (0, 16 * MIB),
        (16 * MIB, 16 * MIB),
        (32 * MIB, 16 * MIB),
        (48 * MIB, 2 * MIB),
    ]


def manifest(*paths, tensors=(), variant="", subfolder=""):
    made = manifest_pb2.Manifest(digest="d" * 64)
    made.files.extend(manifest_pb2.File(path=path) for path in paths)
    made.weight_sets.extend(
        manifest_pb2.WeightSet(path=path, format=1, variant=variant, subfolder=subfolder, files=[index])
        for index, path in enumerate(paths)
    )
    made.tensors.extend(tensors)
    return made


def test_safetensors_come_before_torch_files():
    both = manifest("pytorch_model.bin", "model.safetensors")
    both.tensors.add(name="bin", weight_set=0, file=0, dtype="F32", length=4, shape=[1], running_crc32c=[1])
    both.tensors.add(name="safe", weight_set=1, file=1, dtype="F32", length=4, shape=[1], running_crc32c=[2])
    assert [each.name for each in select_tensors(both)] == ["safe"]


@pytest.mark.parametrize("path", ["model.fp16.safetensors", "model.safetensors.index.fp16.json"])
def test_a_variant_is_found_in_the_names_that_transformers_writes(path):
    made = manifest(path, variant="fp16")
    made.tensors.add(name="x", weight_set=0, file=0, dtype="F16", length=2, shape=[1], running_crc32c=[1])
    assert [each.name for each in select_tensors(made, variant="fp16")] == ["x"]


def test_no_weights_is_an_error_that_names_what_there_is():
    with pytest.raises(FileNotInSnapshot, match=r"it has model\.safetensors"):
        select_tensors(manifest("model.safetensors"), subfolder="encoder")
