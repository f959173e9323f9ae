import collections
import io
import json
import os
import pickle
import random
import struct
import warnings
import zipfile

import crc32c
import pytest
import torch

from modelcache_volume import BLOCK_BYTES, BadWeights, build_weight_sets, index_torch_checkpoint, is_torch_checkpoint
from modelcache_volume.torch_pickle import RefusedPickleError, read_pickle
from modelcache_volume.torch_zip import RefusedZipError, read_zip_directory
from modelcache_volume.v1 import manifest_pb2

TORCH = {
    "F32": torch.float32, "F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}  # fmt: skip


def saved(value, *, legacy=False, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy, **options)
    return buffer.getvalue()


def index(content, tmp_path, name="pytorch_model.bin"):
    path = tmp_path / "checkpoint"
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return index_torch_checkpoint(name, descriptor)
    finally:
        os.close(descriptor)


def tensors_of(content, tmp_path):
    """Rebuilds each tensor from the bytes that the index names, and checks the running checksums on the way."""
    found = {}
    for entry in index(content, tmp_path).tensors:
        data = content[entry.offset : entry.offset + entry.length]
        ends = [min(end, len(data)) for end in range(BLOCK_BYTES, len(data) + BLOCK_BYTES, BLOCK_BYTES)]
        assert entry.running_crc32c == tuple(crc32c.crc32c(data[:end]) for end in ends)
        dtype = TORCH[entry.dtype]
        flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
        if entry.strides:
            found[entry.name] = flat.as_strided(entry.shape, entry.strides)
        else:
            found[entry.name] = flat.reshape(entry.shape)
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        raw = [value.contiguous().reshape(-1).view(torch.uint8) for value in (found[name], tensor)]
        assert torch.equal(*raw), name


BASE = torch.arange(60, dtype=torch.float32).reshape(3, 4, 5)
VARIED = collections.OrderedDict(
    plain=BASE.clone(),
    transposed=torch.arange(12.0).reshape(3, 4).t(),
    permuted=BASE.permute(2, 0, 1),
    row=BASE[1],
    columns=BASE[:, 1:3],
    every_second=torch.arange(20)[::2],
    scalar=torch.tensor(3, dtype=torch.int32),
    empty=torch.empty(0, 3),
    parameter=torch.nn.Parameter(torch.ones(7)),
    position_ids=torch.arange(512).expand((1, -1)),
    large=torch.rand(3 * 2**20 // 2, generator=torch.Generator().manual_seed(1)),
)


@pytest.mark.parametrize("legacy", [False, True])
def test_every_tensor_of_a_real_checkpoint_is_found_with_its_bytes(tmp_path, legacy):
    content = saved(VARIED, legacy=legacy)
    with torch.no_grad():
        assert_same(tensors_of(content, tmp_path), VARIED)
    kind = manifest_pb2.WEIGHT_FORMAT_TORCH_LEGACY if legacy else manifest_pb2.WEIGHT_FORMAT_TORCH_ZIP
    assert index(content, tmp_path).format == kind


@pytest.mark.parametrize("dtype", sorted(TORCH))
def test_every_dtype_that_has_a_name_is_read(tmp_path, dtype):
    tensor = torch.arange(24, dtype=torch.uint8).reshape(-1).view(TORCH[dtype]) if dtype != "BOOL" else BASE > 20
    for legacy in (False, True):
        if legacy and dtype in {"U16", "U32", "U64"}:
            continue  # torch itself does not save these in the old format
        assert_same(tensors_of(saved({"x": tensor}, legacy=legacy), tmp_path), {"x": tensor})


@pytest.mark.parametrize("legacy", [False, True])
def test_the_state_dict_of_a_module_is_read_with_its_metadata_left_out(tmp_path, legacy):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    assert_same(tensors_of(saved(module.state_dict(), legacy=legacy), tmp_path), module.state_dict())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_newer_pickle_protocols_are_read(tmp_path, protocol):
    state = {"a": torch.ones(2), "b" * 300: torch.zeros(3)}
    assert_same(tensors_of(saved(state, pickle_protocol=protocol), tmp_path), state)


@pytest.mark.parametrize("legacy", [False, True])
def test_tied_tensors_name_the_same_bytes(tmp_path, legacy):
    weight = torch.rand(4, 3)
    entries = index(saved({"embed": weight, "head": weight, "view": weight[1:]}, legacy=legacy), tmp_path).tensors
    embed, head, view = entries
    assert (embed.offset, embed.length) == (head.offset, head.length)
    assert (view.offset, view.length) == (embed.offset + 12, embed.length - 12)
    assert embed.strides == head.strides == view.strides == ()


def test_contiguous_tensors_have_no_strides_and_others_do(tmp_path):
    strides = {entry.name: entry.strides for entry in index(saved(VARIED), tmp_path).tensors}
    assert strides["transposed"] == (1, 4)
    assert strides["columns"] == (20, 5, 1)
    assert {name for name, value in strides.items() if value} == {"transposed", "permuted", "columns", "every_second"}


@pytest.mark.parametrize("legacy", [False, True])
def test_a_training_checkpoint_is_read_when_only_one_dict_can_be_the_state_dict(tmp_path, legacy):
    state = {"a": torch.ones(2), "b": torch.zeros(3)}
    checkpoint = {
        "epoch": 3,
        "lr": 1e-3,
        "state_dict": state,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(5)}}, "param_groups": [{"params": [0]}]},
    }
    assert_same(tensors_of(saved(checkpoint, legacy=legacy), tmp_path), state)
    for ambiguous in ({"a": state, "b": state}, {"a": state, "x": torch.ones(1)}):
        with pytest.raises(BadWeights, match="nothing says which"):
            index(saved(ambiguous, legacy=legacy), tmp_path)


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "posix.system"), (eval, "builtin"), (getattr, "builtin"), (torch.load, "torch.serialization.load")],
)
def test_a_pickle_that_calls_a_function_is_refused_by_name_and_nothing_runs(
    tmp_path, monkeypatch, legacy, protocol, function, name
):
    monkeypatch.chdir(tmp_path)
    evil = {"x": torch.ones(1), "y": Evil(function, "touch pwned")}
    with pytest.raises(BadWeights, match=rf"pytorch_model\.bin.*asks for \S*{name}"):
        index(saved(evil, legacy=legacy, pickle_protocol=protocol), tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.ones(3), "not a state dict"),
        ([torch.ones(3)], "not a state dict"),
        ({"epoch": 3}, "no tensors"),
        ({3: torch.ones(1)}, "not plain text"),
        ({"a\nb": torch.ones(1)}, "not plain text"),
        ({"x": torch.ones(2, dtype=torch.complex128)}, "ComplexDoubleStorage"),
        ({"x": torch.ones(2).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"x": torch.tensor([1 + 2j]).conj()}, "conjugated or negated"),
        ({"x": torch.tensor([1 + 2j]).conj().imag}, "conjugated or negated"),
        ({"x": torch.ones(1).expand(2**21)}, "2097152 elements, of which only 1 are stored"),
        ({"x": {1, 2}}, "asks for"),
        ({(1, 2): 3}, "neither text nor a number"),
    ],
)
def test_what_no_model_can_load_is_refused_with_its_reason(tmp_path, legacy, value, reason):
    with pytest.raises(BadWeights, match=reason):
        index(saved(value, legacy=legacy), tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_cut_off_anywhere_is_refused(tmp_path, legacy):
    content = saved({"a": torch.ones(5), "b": torch.zeros(2, dtype=torch.int64)}, legacy=legacy)
    for size in range(0, len(content), 3):
        with pytest.raises(BadWeights):
            index(content[:size], tmp_path)
    with pytest.raises(BadWeights):
        index(content + b"\0", tmp_path)


@pytest.mark.parametrize("legacy", [False, True])
def test_damage_anywhere_is_refused_or_leaves_every_tensor_inside_the_file(tmp_path, legacy):
    content = saved({"a": torch.ones(2, 3).t(), "b": torch.nn.Parameter(torch.zeros(2))}, legacy=legacy)
    rng = random.Random(5)
    for _ in range(500):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            entries = index(bytes(damaged), tmp_path).tensors
        except BadWeights:
            continue
        for entry in entries:
            assert 0 <= entry.offset <= entry.offset + entry.length <= len(content)


def archive(**entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in entries.items():
            file.writestr(f"archive/{name.replace('__', '/')}", content)
    return buffer.getvalue()


def pickled(*parts):
    """A pickle of {"x": a tensor made of `parts`}: storage (class, key, count), offset, shape, strides."""
    (kind, key, count), offset, shape, strides = parts
    opcodes = [b"\x80\x02}", text("x"), b"ctorch._utils\n_rebuild_tensor_v2\n((", text("storage")]
    opcodes += [b"ctorch\n" + kind.encode() + b"\n", text(key), text("cpu"), number(count), b"tQ", number(offset)]
    opcodes += [b"(", *map(number, shape), b"t(", *map(number, strides), b"t", b"\x89}tRs."]
    return b"".join(opcodes)


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value):
    return pickle.dumps(value, 2)[2:-1]


SOUND = (("FloatStorage", "0", 4), 0, (2, 2), (2, 1))


def test_the_hand_made_archive_is_sound_before_it_is_broken(tmp_path):
    content = archive(**{"data.pkl": pickled(*SOUND), "data__0": bytes(16)})
    assert tensors_of(content, tmp_path)["x"].shape == (2, 2)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ((("FloatStorage", "0", 4), 1, (2, 2), (2, 1)), "outside its storage"),
        ((("FloatStorage", "0", 5), 0, (2, 2), (2, 1)), "outside its storage"),
        ((("FloatStorage", "0", 4), 0, (2, 2), (3, 1)), "outside its storage"),
        ((("FloatStorage", "0", 4), 0, (2**62, 2**62), (0, 0)), "elements, of which"),
        ((("FloatStorage", "0", 4), 0, (2**31, 2), (2**33, 1)), "outside its storage"),
        ((("FloatStorage", "1", 4), 0, (2, 2), (2, 1)), "missing"),
        ((("FloatStorage", "../0", 4), 0, (2, 2), (2, 1)), "missing"),
        ((("FloatStorage", "0", 4), 0, (2, 2), (1,)), "differ in length"),
        ((("FloatStorage", "0", 4), 0, (1,) * 65, (1,) * 65), "too many"),
        ((("FloatStorage", "0", -4), 0, (2, 2), (2, 1)), "non-negative"),
        ((("FloatStorage", "0", 4), -1, (2, 2), (2, 1)), "non-negative"),
        ((("FloatStorage", "0", 4), 0, (-2, 2), (2, 1)), "non-negative"),
        ((("FloatStorage", "0", 4), 0, (2, 2), (-2, 1)), "non-negative"),
        ((("FloatStorage", "0", 4), 0, (2, True), (2, 1)), "non-negative"),
        ((("FloatStorage", "0", 4), 0, (2, 2.0), (2, 1)), "non-negative"),
        ((("FloatStorage", "0", 2**80), 0, (2, 2), (2, 1)), "non-negative"),
    ],
)
def test_a_tensor_that_lies_about_itself_is_refused(tmp_path, parts, reason):
    content = archive(**{"data.pkl": pickled(*parts), "data__0": bytes(16)})
    with pytest.raises(BadWeights, match=reason):
        index(content, tmp_path)


def test_a_compressed_entry_is_refused_so_that_there_are_no_bombs(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickled(*SOUND))
        file.writestr("archive/data/0", bytes(2**24))
    with pytest.raises(BadWeights, match="compressed"):
        index(buffer.getvalue(), tmp_path)


def test_an_archive_that_two_readers_could_read_differently_is_refused(tmp_path):
    sound = archive(**{"data.pkl": pickled(*SOUND), "data__0": bytes(16)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:
            for _ in range(2):
                file.writestr("archive/data.pkl", pickled(*SOUND))
    for content, reason in (
        (buffer.getvalue(), "occurs twice"),
        (sound[:4] + sound, "not where it says"),
        (archive(**{"data.pkl": b".", "x__data.pkl": b"."}), "malformed"),
        (archive(other=b""), "without one data.pkl"),
        (archive(**{"data.pkl": pickled(*SOUND), "byteorder": b"big"}), "big-endian"),
        (sound.replace(b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0"), "encrypted"),
    ):
        with pytest.raises(BadWeights, match=reason):
            index(content, tmp_path)


def test_overlapping_entries_are_refused():
    content = archive(**{"data.pkl": bytes(100), "data__0": bytes(100)})
    directory = content.index(b"PK\1\2")
    # The first entry claims the second one's bytes as well.
    overlapping = bytearray(content)
    for position in (directory + 20, directory + 24):
        struct.pack_into("<L", overlapping, position, 120)
    with pytest.raises(RefusedZipError, match="overlap"):
        read_zip_directory(lambda offset, length: bytes(overlapping[offset : offset + length]), len(overlapping))


def test_an_archive_above_four_gigabytes_is_read_by_its_zip64_fields():
    # A virtual file: 5 GiB of zeroes before the second entry, which exist only as arithmetic.
    gap = 5 * 2**30
    local = b"PK\3\4" + struct.pack("<5H3L2H", 45, 0, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, 8, 0) + b"a/data/0"
    tail = b"PK\3\4" + struct.pack("<5H3L2H", 45, 0, 0, 0, 0, 0, 3, 3, 8, 0) + b"a/data/1xyz"

    def entry(name, numbers, size, header):
        extra = struct.pack("<2H", 1, 8 * len(numbers)) + struct.pack(f"<{len(numbers)}Q", *numbers)
        fixed = struct.pack("<6H3L5H2L", 45, 45, 0, 0, 0, 0, 0, size, size, 8, len(extra), 0, 0, 0, 0, header)
        return b"PK\1\2" + fixed + name + extra

    start = len(local) + gap + len(tail)
    directory = entry(b"a/data/0", [gap, gap], 0xFFFFFFFF, 0)
    directory += entry(b"a/data/1", [len(local) + gap], 3, 0xFFFFFFFF)
    end = b"PK\6\6" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, 2, 2, len(directory), start)
    end += b"PK\6\7" + struct.pack("<LQL", 0, start + len(directory), 1)
    end += b"PK\5\6" + struct.pack("<4H2LH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    after = tail + directory + end

    def read(offset, length):
        if offset + length <= len(local):
            return local[offset : offset + length]
        begin = offset - len(local) - gap
        assert begin >= 0
        return after[begin : begin + length]

    entries = read_zip_directory(read, len(local) + gap + len(after))
    assert (entries["a/data/0"].offset, entries["a/data/0"].size) == (len(local), gap)
    second = entries["a/data/1"]
    assert read(second.offset, second.size) == b"xyz"


@pytest.mark.slow
def test_more_entries_than_sixteen_bits_count_are_read(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a/data.pkl", pickled(("FloatStorage", "65599", 1), 0, (1,), (1,)))
        for number_ in range(65_600):
            file.writestr(f"a/data/{number_}", struct.pack("<f", number_))
    assert tensors_of(buffer.getvalue(), tmp_path)["x"].item() == 65_599


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (b"", "malformed"),
        (b"}", "malformed|no end"),
        (b".", "malformed"),
        (b"\xff.", "0xff"),
        (b"}0.", "POP"),
        (b"}2.", "DUP"),
        (b"I1\n.", "INT"),
        (b"cos\nsystem\n.", r"os\.system"),
        (b"\x8c\x02os\x8c\x06system\x93.", r"os\.system"),
        (b"ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        (b"(itorch\nSize\n.", "INST"),
        (b"\x82\x01.", "EXT1"),
        (b"Pabc\n.", "PERSID"),
        (b"K\x01Q.", "malformed"),
        (b"ctorch\nFloatStorage\n)R.", r"calls torch\.FloatStorage"),
        (b"}K\x01)R.", "calls a int"),
        (b"h\x07.", "malformed"),
        (b"t.", "malformed"),
        (b"}(K\x01u.", "malformed"),
        (b"](K\x01u.", "malformed"),
        (b"X\xff\xff\xff\xff", "malformed"),
        (b"\x8b\xff\xff\xff\x7f1.", "LONG4"),
        (b"\x8d" + b"\xff" * 8 + b".", "malformed"),
        (b")" + b"\x85" * 300_000 + b"}(" + b"h\0K\1u.", "malformed"),
    ],
)
def test_any_other_pickle_program_is_refused(program, reason):
    with pytest.raises(RefusedPickleError, match=reason):
        read_pickle(program)


def test_a_program_that_is_too_long_is_refused(monkeypatch):
    monkeypatch.setattr("modelcache_volume.torch_pickle.MAX_OPCODES", 1000)
    assert read_pickle(b"N" * 999 + b".").value is None
    with pytest.raises(RefusedPickleError, match="more than 1000 opcodes"):
        read_pickle(b"N" * 1001 + b".")


def test_a_deeply_nested_key_does_not_overflow_the_stack():
    with pytest.raises(RefusedPickleError, match="neither text nor a number"):
        read_pickle(b"})" + b"\x85" * 300_000 + b"K\1s.")


def test_a_deeply_nested_name_does_not_overflow_the_stack():
    with pytest.raises(RefusedPickleError, match="no text"):
        read_pickle(b")" + b"\x85" * 300_000 + b"\x8c\x01x\x93.")


def test_python_never_imports_what_a_pickle_names(tmp_path):
    with pytest.raises(RefusedPickleError, match="antigravity"):
        read_pickle(b"cantigravity\nfly\n)R.")


def test_many_views_of_one_storage_are_not_read_over_and_over(tmp_path):
    base = torch.zeros(200_000)
    with pytest.raises(BadWeights, match="views of each other"):
        index(saved({str(n): base[n:] for n in range(40)}), tmp_path)


def test_shards_of_a_checkpoint_are_one_weight_set(tmp_path):
    shards = {
        "pytorch_model-00001-of-00002.bin": saved({"a": torch.ones(2)}),
        "pytorch_model-00002-of-00002.bin": saved({"b": BASE.permute(2, 0, 1)}),
    }
    names = dict(zip("ab", shards, strict=True))
    content = {"pytorch_model.bin.index.json": json.dumps({"weight_map": names}).encode()}
    weights = {path: index(data, tmp_path, path) for path, data in shards.items()}
    sets, tensors = build_weight_sets(weights, content, [*shards, *content])
    assert [(found.path, list(found.files)) for found in sets] == [("pytorch_model.bin.index.json", [0, 1])]
    assert sets[0].format == manifest_pb2.WEIGHT_FORMAT_TORCH_ZIP
    assert [(t.name, t.file, list(t.shape), list(t.strides)) for t in tensors] == [
        ("a", 0, [2], []),
        ("b", 1, [5, 3, 4], [1, 20, 5]),
    ]


@pytest.mark.parametrize(
    "path",
    ["pytorch_model.bin", "a/pytorch_model-00001-of-00002.bin", "unet/diffusion_pytorch_model.fp16.bin",
     "adapter_model.bin"],
)  # fmt: skip
def test_names_of_pytorch_weights_are_known(path):
    assert is_torch_checkpoint(path)


@pytest.mark.parametrize(
    "path", ["training_args.bin", "optimizer.bin", "model.bin", "x.safetensors", "pytorch_model.pt"]
)
def test_other_binary_files_are_no_weights(path):
    assert not is_torch_checkpoint(path)
