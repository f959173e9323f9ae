import pytest

from modelcache_fetcher.plan import Listing, SourceFile, select
from modelcache_fetcher.weights_choice import left_out

SAFE_SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
BIN_SHARDS = [
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model-00002-of-00002.bin",
    "pytorch_model.bin.index.json",
]
SMALL = ["README.md", "config.json", "tokenizer.json", "tokenizer.model", "vocab.txt"]


def taken(*paths):
    out = left_out(paths)
    assert all(out.values())
    return [path for path in paths if path not in out and path not in SMALL]


def test_small_files_always_stay():
    assert not set(left_out([*SMALL, "model.safetensors", "pytorch_model.bin"])) & set(SMALL)


@pytest.mark.parametrize(
    ("repo", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"], ["model.safetensors"]),
        (["pytorch_model.bin", "tf_model.h5", "rust_model.ot"], ["pytorch_model.bin"]),
        ([*SAFE_SHARDS, *BIN_SHARDS], SAFE_SHARDS),
        ([SAFE_SHARDS[0], SAFE_SHARDS[2], *BIN_SHARDS], BIN_SHARDS),
        (["model.safetensors", "model.fp16.safetensors"], ["model.safetensors"]),
        (["model.fp16.safetensors", "pytorch_model.fp16.bin"], ["model.fp16.safetensors"]),
        ([*SAFE_SHARDS, "consolidated.safetensors", "consolidated.00.pth"], SAFE_SHARDS),
        ([*SAFE_SHARDS, "original/consolidated.00.pth", "original/params.json"], SAFE_SHARDS),
        (["model.safetensors", "onnx/model.onnx", "onnx/model.onnx_data"], ["model.safetensors"]),
        (["model.safetensors", "openvino/openvino_model.bin", "openvino_model.xml"], ["model.safetensors"]),
        (["model.safetensors", "training_args.bin", "optimizer.pt", "rng_state_0.pth"], ["model.safetensors"]),
        (["model.safetensors", "checkpoint-500/model.safetensors"], ["model.safetensors"]),
        (["model.safetensors", "model.Q4_K_M.gguf"], ["model.safetensors"]),
        (["a.Q2_K.gguf", "a.Q4_K_M.gguf", "a.Q8_0.gguf"], ["a.Q4_K_M.gguf"]),
        (["a-Q8_0.gguf", "mmproj-f16.gguf", "a-f16.gguf"], ["a-Q8_0.gguf", "mmproj-f16.gguf"]),
        (["a-IQ1_S.gguf"], ["a-IQ1_S.gguf"]),
        (
            ["b-Q8_0-00001-of-00002.gguf", "b-Q8_0-00002-of-00002.gguf", "b-F16-00001-of-00002.gguf"],
            ["b-Q8_0-00001-of-00002.gguf", "b-Q8_0-00002-of-00002.gguf"],
        ),
        (["model.onnx", "model_quantized.onnx"], ["model.onnx", "model_quantized.onnx"]),
        (["weights.pth"], ["weights.pth"]),
        (["pytorch_model.bin", "adapter_model.safetensors"], ["pytorch_model.bin", "adapter_model.safetensors"]),
        (["pytorch_model.bin", "model.fp16.safetensors"], ["pytorch_model.bin"]),
        ([*SAFE_SHARDS, "model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        ([*SAFE_SHARDS[:1], "model.safetensors"], ["model.safetensors"]),
        (["model.safetensors", "vocab.bin"], ["model.safetensors", "vocab.bin"]),
        (["model.safetensors", "adapter_model.safetensors"], ["model.safetensors", "adapter_model.safetensors"]),
        (
            ["1_Dense/model.safetensors", "1_Dense/pytorch_model.bin", "pytorch_model.bin"],
            ["1_Dense/model.safetensors", "pytorch_model.bin"],
        ),
        (
            [
                "model_index.json",
                "v1-5-pruned.safetensors",
                "unet/diffusion_pytorch_model.safetensors",
                "unet/diffusion_pytorch_model.fp16.safetensors",
                "unet/diffusion_pytorch_model.bin",
                "vae/diffusion_pytorch_model.bin",
            ],
            ["model_index.json", "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin"],
        ),
        (
            ["model.safetensors.index.fp16.json", "model-00001-of-00001.fp16.safetensors", "model.safetensors"],
            ["model.safetensors"],
        ),
    ],
    ids=lambda value: value[0],
)
def test_one_set_of_weights_is_chosen(repo, chosen):
    assert sorted(taken(*repo)) == sorted(chosen)


def listing(*paths):
    return Listing("main", "0" * 40, tuple(SourceFile(path, 10, "etag") for path in paths))


def test_patterns_switch_the_choice_off_and_ignore_patterns_guide_it():
    repo = listing("config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5")
    files, _ = select(repo, ["*"], [])
    assert len(files) == 4
    files, skipped = select(repo, [], ["*.safetensors"])
    assert [file.path for file in files] == ["config.json", "pytorch_model.bin"]
    assert {each.path: each.why for each in skipped} == {
        "model.safetensors": "matches ignorePatterns '*.safetensors'",
        "tf_model.h5": "weights of another framework",
    }
