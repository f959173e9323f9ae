import json
import random
import struct

import crc32c
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save

from modelcache_volume import BLOCK_BYTES, DTYPE_BITS, BadWeights, SafetensorsIndexer


def index(content, chunk=None, size=None):
    indexer = SafetensorsIndexer("model.safetensors", len(content) if size is None else size)
    for start in range(0, len(content), chunk or max(1, len(content))):
        indexer.update(memoryview(content)[start : start + (chunk or len(content))])
    return indexer.finish()


def build(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


ARRAYS = {
    "embeddings": np.arange(3 * 2**20 + 7, dtype=np.float32),
    "scalar": np.array(3.5),
    "empty": np.zeros((3, 0), dtype=np.int16),
    "bits": np.array([True, False]),
    "ünï": np.ones((5, 2), dtype=np.float16),
}


@pytest.mark.parametrize("chunk", [None, 1 << 20, 4_194_303, 8, 777_777])
def test_every_tensor_is_found_with_its_bytes_and_running_checksums_whatever_the_chunks(chunk):
    content = save(ARRAYS, {"format": "np"})
    if chunk == 8:
        content = save({name: array for name, array in ARRAYS.items() if name != "embeddings"}, {"format": "np"})
    found = index(content, chunk)
    assert found.metadata == {"format": "np"}
    for tensor in found.tensors:
        expected = ARRAYS[tensor.name]
        data = content[tensor.offset : tensor.offset + tensor.length]
        assert data == expected.tobytes()
        assert tensor.shape == expected.shape
        assert tensor.strides == ()
        ends = [min(end, len(data)) for end in range(BLOCK_BYTES, len(data) + BLOCK_BYTES, BLOCK_BYTES)]
        assert tensor.running_crc32c == tuple(crc32c.crc32c(data[:end]) for end in ends)
    assert {t.name: t.dtype for t in found.tensors if chunk != 8 or t.name != "embeddings"}.items() <= {
        "embeddings": "F32",
        "scalar": "F64",
        "empty": "I16",
        "bits": "BOOL",
        "ünï": "F16",
    }.items()


def test_a_file_without_tensors_is_sound():
    assert index(build({})).tensors == ()


@pytest.mark.parametrize("dtype", sorted(DTYPE_BITS))
def test_every_dtype_of_the_reference_implementation_is_read_with_its_size(dtype, tmp_path):
    length = DTYPE_BITS[dtype]
    content = build({"x": entry(dtype, (2, 4), (0, length))}, bytes(length))
    assert index(content).tensors[0].length == length
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with safetensors.safe_open(path, "numpy") as reference:
        assert list(reference.keys()) == ["x"]


HOSTILE = {
    "no header": b"\1\0\0",
    "a header longer than the file": build(b"{}", length=3),
    "a header of 2^63 bytes": build(b"{}", length=2**63),
    "a header of 2^64-1 bytes": build(b"{}", length=2**64 - 1),
    "a header above 32 MiB": build(b"{}", bytes(64), length=2**25 + 1),
    "an empty header": build(b""),
    "a header that is no JSON": build(b"{nope}"),
    "a header that is no object": build(b"[1]"),
    "a header that starts with a blank": build(b" {}"),
    "a header that is not UTF-8": build(b'{"\xff":1}'),
    "text after the header's object": build(b"{}{}"),
    "a header nested too deep": build(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
    "NaN in the header": build(b'{"x":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
    "a number of 5000 digits": build(
        b'{"x":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,4]}}', bytes(4)
    ),
    "one tensor twice": build(b'{"x":%s,"x":%s}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)),
    "one key of a tensor twice": build(b'{"x":{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}', bytes(4)),
    "a tensor that is a list": build({"x": [1]}),
    "a missing key": build({"x": {"dtype": "U8", "shape": [4]}}, bytes(4)),
    "an unknown key": build({"x": {**entry(), "more": 1}}, bytes(4)),
    "an unknown dtype": build({"x": entry("F7")}, bytes(4)),
    "a dtype that is a list": build({"x": {**entry(), "dtype": ["U8"]}}, bytes(4)),
    "a negative dimension": build({"x": entry(shape=(-2, -2))}, bytes(4)),
    "a dimension that is a truth value": build({"x": entry(shape=(True, 4))}, bytes(4)),
    "a dimension that is a float": build({"x": entry(shape=(4.0,))}, bytes(4)),
    "a dimension that is text": build({"x": entry(shape=("4",))}, bytes(4)),
    "a shape that wraps around 2^64": build({"x": entry(shape=(2**62, 4, 4), offsets=(0, 0))}),
    "a zero that hides a huge shape": build({"x": entry(shape=(2**62, 2**62, 0), offsets=(0, 0))}),
    "a shape that is not a list": build({"x": {**entry(), "shape": 4}}, bytes(4)),
    "three offsets": build({"x": entry(offsets=(0, 4, 4))}, bytes(4)),
    "offsets backwards": build({"x": entry(offsets=(4, 0))}, bytes(4)),
    "offsets outside the file": build({"x": entry(shape=(5,), offsets=(0, 5))}, bytes(4)),
    "huge offsets": build({"x": entry(offsets=(2**63, 2**63 + 4))}, bytes(4)),
    "another length than shape and dtype have": build({"x": entry("F32")}, bytes(4)),
    "half a byte": build({"x": entry("F4", (3,), (0, 1))}, bytes(1)),
    "a gap at the start": build({"x": entry(offsets=(1, 5))}, bytes(5)),
    "a gap between": build({"x": entry(), "y": entry(offsets=(5, 9))}, bytes(9)),
    "an overlap": build({"x": entry(), "y": entry(offsets=(2, 6))}, bytes(6)),
    "one range for two tensors": build({"x": entry(), "y": entry()}, bytes(4)),
    "bytes left over": build({"x": entry()}, bytes(5)),
    "bytes without tensors": build({}, bytes(1)),
    "metadata that is no map": build({"__metadata__": ["a"]}),
    "metadata that is not text": build({"__metadata__": {"a": 1}}),
    "a name that is not Unicode": build(b'{"\\ud800":%s}' % json.dumps(entry()).encode(), bytes(4)),
    "millions of separators": build(b'{"x":[' + b"1," * 5_000_000 + b"1]}"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_malformed_file_is_refused_with_its_name(what):
    with pytest.raises(BadWeights, match=r"model\.safetensors is not a sound"):
        index(HOSTILE[what])


def test_a_file_cut_off_anywhere_is_refused():
    content = save({"a": np.arange(6, dtype=np.float32), "b": np.ones(3)})
    for size in range(len(content)):
        with pytest.raises(BadWeights):
            index(content[:size])
        with pytest.raises(BadWeights):
            index(content[:size], size=len(content))
    with pytest.raises(BadWeights):
        index(content + b"\0", size=len(content))


def test_a_header_is_refused_before_the_data_arrives():
    indexer = SafetensorsIndexer("m", 10**12)
    with pytest.raises(BadWeights, match="32 MiB"):
        indexer.update(memoryview(struct.pack("<Q", 10**11)))


def test_it_accepts_only_what_the_reference_implementation_accepts(tmp_path):
    # Where they differ, ours is the stricter one: 3,000 mutations of a sound header, each shown to both.
    rng = random.Random(20)
    sound = build({"__metadata__": {"k": "v"}, "x": entry(), "y": entry("F16", (2, 3), (4, 16))}, bytes(16))
    path = tmp_path / "x.safetensors"
    accepted = 0
    for _ in range(3000):
        content = bytearray(sound)
        for _ in range(rng.randint(1, 2)):
            content[rng.randrange(len(content) - 16)] = rng.choice(b'0123456789,:[]{}"\\ -.eEUF\xff\0')
        try:
            tensors = index(bytes(content)).tensors
        except BadWeights:
            continue
        accepted += 1
        path.write_bytes(content)
        with safetensors.safe_open(path, "numpy") as reference:
            assert {tensor.name for tensor in tensors} == set(reference.keys())
            for tensor in tensors:
                view = reference.get_slice(tensor.name)
                assert (view.get_dtype(), tuple(view.get_shape())) == (tensor.dtype, tensor.shape)
    assert accepted > 50
