import json

import numpy as np
import pytest
from safetensors.numpy import save

from modelcache_volume import BadWeights, is_index_file
from modelcache_volume.weight_names import WeightName, parse_index_name, parse_weight_name
from support.volumes import manifest_of


def shard(*names):
    return save({name: np.full(3, number, dtype=np.float32) for number, name in enumerate(names)})


def weight_index(**weight_map):
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()


def sets_of(files):
    manifest = manifest_of(files)
    paths = [file.path for file in manifest.files]
    return {
        weight_set.path: (
            [paths[number] for number in weight_set.files],
            {t.name: paths[t.file] for t in manifest.tensors if t.weight_set == number},
        )
        for number, weight_set in enumerate(manifest.weight_sets)
    }


def test_shards_belong_to_their_index_and_other_files_stand_alone():
    found = sets_of(
        {
            "config.json": b"{}",
            "model-00001-of-00002.safetensors": shard("a", "b"),
            "model-00002-of-00002.safetensors": shard("c"),
            "model.safetensors.index.json": weight_index(
                a="model-00001-of-00002.safetensors",
                b="model-00001-of-00002.safetensors",
                c="model-00002-of-00002.safetensors",
            ),
            "adapter_model.safetensors": shard("a"),
        }
    )
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    assert found == {
        "adapter_model.safetensors": (["adapter_model.safetensors"], {"a": "adapter_model.safetensors"}),
        "model.safetensors.index.json": ([first, second], {"a": first, "b": first, "c": second}),
    }


def test_an_index_in_a_folder_names_shards_in_that_folder():
    found = sets_of(
        {
            "unet/m-1.safetensors": shard("a"),
            "m-1.safetensors": shard("z"),
            "unet/m.safetensors.index.json": weight_index(a="m-1.safetensors"),
        }
    )
    assert found["unet/m.safetensors.index.json"] == (["unet/m-1.safetensors"], {"a": "unet/m-1.safetensors"})
    assert found["m-1.safetensors"][1] == {"z": "m-1.safetensors"}


def test_one_file_may_belong_to_two_indexes():
    index = weight_index(a="m-1.safetensors")
    found = sets_of(
        {
            "m-1.safetensors": shard("a"),
            "model.safetensors.index.json": index,
            "model.safetensors.index.fp16.json": index,
        }
    )
    assert sorted(found) == ["model.safetensors.index.fp16.json", "model.safetensors.index.json"]


def test_an_index_whose_shards_were_not_selected_is_just_a_file():
    index = {"pytorch_model.bin.index.json": weight_index(a="pytorch_model-1.bin")}
    assert manifest_of(index, left_out=["pytorch_model-1.bin"]).weight_sets == []


def test_an_index_whose_shards_are_nowhere_is_refused_if_there_is_nothing_else_to_load():
    index = {"pytorch_model.bin.index.json": weight_index(a="pytorch_model-1.bin")}
    with pytest.raises(BadWeights, match=r"pytorch_model-1\.bin, which the source does not have"):
        manifest_of(index)
    assert list(sets_of({**index, "model.safetensors": shard("a")})) == ["model.safetensors"]


def test_tensors_that_the_index_forgot_are_still_there():
    found = sets_of({"m-1.safetensors": shard("a", "b"), "m.safetensors.index.json": weight_index(a="m-1.safetensors")})
    assert set(found["m.safetensors.index.json"][1]) == {"a", "b"}


def test_the_index_says_which_shard_a_repeated_tensor_is_read_from():
    files = {
        "m-1.safetensors": shard("a", "b"),
        "m-2.safetensors": shard("b", "c"),
        "m.safetensors.index.json": weight_index(a="m-1.safetensors", b="m-2.safetensors", c="m-2.safetensors"),
    }
    assert sets_of(files)["m.safetensors.index.json"][1]["b"] == "m-2.safetensors"
    files["m.safetensors.index.json"] = weight_index(a="m-1.safetensors", c="m-2.safetensors")
    with pytest.raises(BadWeights, match="'b' is both in"):
        manifest_of(files)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "no weight_map"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": {"a": 1}}', "not a file name"),
        (b'{"weight_map": {"a": "m-1.safetensors", "a": "m-1.safetensors"}}', "same key twice"),
        (weight_index(a="../m-1.safetensors"), "outside its folder"),
        (weight_index(a="/m-1.safetensors"), "outside its folder"),
        (weight_index(a="m-1.safetensors", b="m-2.safetensors"), "not there"),
        (weight_index(a="m-1.safetensors", b="m-1.safetensors"), "'b', but it does not"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused_by_name(index, reason):
    with pytest.raises(BadWeights, match=rf"m\.safetensors\.index\.json.*{reason}"):
        manifest_of({"m-1.safetensors": shard("a"), "m.safetensors.index.json": index})


@pytest.mark.parametrize(
    ("path", "subfolder", "variant"),
    [
        ("model.safetensors", "", ""),
        ("model.fp16.safetensors", "", "fp16"),
        ("model.8bit.safetensors", "", "8bit"),
        ("unet/diffusion_pytorch_model.fp16.safetensors", "unet", "fp16"),
        ("a/b/model.fp16-00001-of-00002.safetensors", "a/b", "fp16"),
        ("pytorch_model.bin", "", ""),
        ("v1-5-pruned.ema.safetensors", "", "ema"),
        ("sd_xl_base_1.0.safetensors", "", ""),
        ("consolidated.00.safetensors", "", ""),
    ],
)
def test_names_of_weight_files_tell_subfolder_and_variant(path, subfolder, variant):
    assert parse_weight_name(path) == WeightName(subfolder, variant)


@pytest.mark.parametrize(
    ("path", "subfolder", "variant"),
    [
        ("model.safetensors.index.json", "", ""),
        ("model.safetensors.index.fp16.json", "", "fp16"),
        ("t/diffusion_pytorch_model.fp16.safetensors.index.json", "t", "fp16"),
        ("pytorch_model.bin.index.json", "", ""),
    ],
)
def test_names_of_index_files_tell_subfolder_and_variant(path, subfolder, variant):
    assert is_index_file(path)
    assert parse_index_name(path) == WeightName(subfolder, variant)


@pytest.mark.parametrize("path", ["config.json", "index.json", "model.safetensors", "a.index.json", "bin.index.json"])
def test_other_files_are_no_index(path):
    assert not is_index_file(path)
