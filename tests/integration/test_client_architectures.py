"""StreamingModel streams any transformers architecture by its module tree, equal bit for bit."""

import json
import logging

import pytest
import torch
import transformers

import modelcache
from modelcache import StreamingModel
from support.client_server import FaultyServer

TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4, "vocab_size": 99}
GENERATING = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {**TEXT, **GENERATING, "num_key_value_heads": 2}
IDS = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(0))
PIXELS = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SOUND = torch.rand(1, 80, 60, generator=torch.Generator().manual_seed(0))

WHISPER = {
    **GENERATING,
    "d_model": 64,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "vocab_size": 99,
    "decoder_start_token_id": 1,
    "max_source_positions": 30,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
T5 = {
    "d_model": 64,
    "d_ff": 128,
    "d_kv": 16,
    "num_layers": 3,
    "num_heads": 4,
    "vocab_size": 99,
    "decoder_start_token_id": 0,
}
CLIP = {
    "text_config": {**TEXT, "num_hidden_layers": 3, "bos_token_id": 1, "eos_token_id": 2},
    "vision_config": {**TEXT, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8},
}

# class, config, what to call it with, number of blocks that are streamed
ARCHITECTURES = {
    "bert": ("BertModel", "BertConfig", TEXT, {"input_ids": IDS}, 4),
    "bert-masked": ("BertForMaskedLM", "BertConfig", TEXT, {"input_ids": IDS}, 4),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", TEXT, {"input_ids": IDS}, 4),
    "deberta": ("DebertaV2Model", "DebertaV2Config", TEXT, {"input_ids": IDS}, 4),
    # A kernel for inputs that are not contiguous is chosen by whether the weight wants a gradient.
    "longformer": ("LongformerModel", "LongformerConfig", {**TEXT, "attention_window": 4}, {"input_ids": IDS}, 4),
    # transformers writes the positions anew, whatever the checkpoint says.
    "distilbert-sinusoidal": (
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 64, "hidden_dim": 128, "n_heads": 4, "n_layers": 4, "vocab_size": 99, "sinusoidal_pos_embds": True},
        {"input_ids": IDS},
        4,
    ),
    "albert": ("AlbertModel", "AlbertConfig", {**TEXT, "embedding_size": 32}, {"input_ids": IDS}, 0),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_embd": 64, "n_head": 4, "n_layer": 4, "vocab_size": 99, **GENERATING},
        {"input_ids": IDS},
        4,
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA, {"input_ids": IDS}, 4),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}, {"input_ids": IDS}, 4),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA, {"input_ids": IDS}, 4),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**LLAMA, "num_local_experts": 4}, {"input_ids": IDS}, 4),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
        {"input_ids": IDS},
        4,
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}, 6),
    # Its routers cast themselves to float32 while they compute.
    "switch": (
        "SwitchTransformersForConditionalGeneration",
        "SwitchTransformersConfig",
        {
            **T5,
            "num_decoder_layers": 3,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_experts": 4,
        },
        {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]},
        6,
    ),
    "t5-encoder": ("T5EncoderModel", "T5Config", T5, {"input_ids": IDS}, 3),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        WHISPER,
        {"input_features": SOUND, "decoder_input_ids": IDS[:1, :4]},
        6,
    ),
    "vit": (
        "ViTModel",
        "ViTConfig",
        {**{key: value for key, value in TEXT.items() if key != "vocab_size"}, "image_size": 32, "patch_size": 8},
        {"pixel_values": PIXELS},
        4,
    ),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        CLIP,
        {"input_ids": IDS, "pixel_values": PIXELS, "attention_mask": torch.ones_like(IDS)},
        6,
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 99, "state_size": 8},
        {"input_ids": IDS},
        4,
    ),
}


def make(folder, name):
    class_name, config_name, config, inputs, blocks = ARCHITECTURES[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    model = model_class(getattr(transformers, config_name)(**config))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return model_class, inputs, blocks


def flat(output):
    """All tensors of a model's output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = tuple(output.values())
    return [tensor for each in output for tensor in flat(each)] if isinstance(output, (tuple, list)) else []


def assert_same(found, wanted):
    found, wanted = flat(found), flat(wanted)
    assert len(found) == len(wanted) > 0
    assert all(torch.equal(left, right) for left, right in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_to_from_pretrained(tmp_path, name, dtype):
    model_class, inputs, blocks = make(tmp_path, name)
    plain = model_class.from_pretrained(tmp_path, dtype=dtype)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        wanted = plain(**inputs, use_cache=False) if name == "mamba" else plain(**inputs)
    with (
        FaultyServer(tmp_path) as server,
        StreamingModel("x", model_class, cache_size=2, address=server.address, dtype=dtype) as model,
    ):
        assert len(model._session.cache.blocks) == blocks
        for _ in range(2):
            found = model(**inputs, use_cache=False) if name == "mamba" else model(**inputs)
            assert_same(found, wanted)
        state = plain.state_dict()
        assert model.state_dict().keys() == state.keys()


def test_weights_that_a_class_keeps_in_float32_are_kept(tmp_path):
    model_class, inputs, _ = make(tmp_path, "t5")
    plain = model_class.from_pretrained(tmp_path, dtype=torch.float16)
    with torch.no_grad():
        wanted = plain(**inputs)
    with (
        FaultyServer(tmp_path) as server,
        StreamingModel("x", model_class, address=server.address, dtype=torch.float16) as model,
    ):
        assert_same(model(**inputs), wanted)
        kept, found = plain.state_dict(), model.state_dict()
    assert {value.dtype for value in kept.values()} == {torch.float16, torch.float32}
    assert {name: value.dtype for name, value in found.items()} == {name: value.dtype for name, value in kept.items()}


@pytest.mark.parametrize(
    ("auto_class", "inputs"),
    [
        ("CLIPTextModel", {"input_ids": IDS}),
        ("CLIPVisionModelWithProjection", {"pixel_values": PIXELS}),
    ],
)
def test_a_part_of_a_model_is_built_from_its_part_of_the_config(tmp_path, auto_class, inputs):
    make(tmp_path, "clip")
    plain = getattr(transformers, auto_class).from_pretrained(tmp_path)
    with torch.no_grad():
        wanted = plain(**inputs)
    with FaultyServer(tmp_path) as server:
        with StreamingModel(auto_class=auto_class, cache_size=1, address=server.address) as model:
            assert_same(model(**inputs), wanted)
        whole = modelcache.from_pretrained(auto_class, address=server.address, progress=False)
        with torch.no_grad():
            assert_same(whole(**inputs), wanted)


def test_an_auto_class_for_text_takes_the_text_part_of_a_model_of_many_senses(tmp_path):
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 64, "intermediate_size": 64}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    config = transformers.Qwen3_5Config(text_config={**LLAMA, "head_dim": 16, **linear}, vision_config=vision)
    torch.manual_seed(0)
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        wanted = plain(input_ids=IDS)
    with (
        FaultyServer(tmp_path) as server,
        StreamingModel(auto_class="AutoModelForCausalLM", cache_size=1, address=server.address) as model,
    ):
        assert type(model.model) is type(plain)
        assert_same(model(input_ids=IDS), wanted)


def test_a_module_that_all_models_of_a_process_share_is_left_alone(tmp_path):
    """XLM's activation function is one module, whichever model it is in."""
    config = transformers.XLMConfig(emb_dim=64, n_layers=3, n_heads=4, vocab_size=99)
    transformers.XLMModel(config).save_pretrained(tmp_path)
    with FaultyServer(tmp_path) as server, StreamingModel(cache_size=1, address=server.address) as model:
        model(input_ids=IDS)
    plain = transformers.XLMModel.from_pretrained(tmp_path)
    assert plain.half().train().state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "t5", "whisper"])
def test_generate_gives_the_same_tokens_and_says_once_what_it_costs(tmp_path, name, caplog):
    model_class, inputs, _ = make(tmp_path, name)
    inputs = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": 6, "do_sample": False}
    wanted = model_class.from_pretrained(tmp_path).generate(**inputs, **options)
    with FaultyServer(tmp_path) as server:
        with StreamingModel("x", model_class, cache_size=2, address=server.address) as model:
            with caplog.at_level(logging.WARNING, "modelcache"):
                for _ in range(2):
                    assert torch.equal(model.generate(**inputs, **options), wanted)
            assert [record.message for record in caplog.records if "each token" in record.message].__len__() == 1
            assert model.get_inference_stats()["bytes_per_token"] > 0
        caplog.clear()
        with StreamingModel("x", model_class, cache_size=None, address=server.address) as model:
            model.generate(**inputs, **options)
            assert not [record for record in caplog.records if "each token" in record.message]


@pytest.mark.parametrize(
    "given", [{}, {"generation_config": transformers.GenerationConfig(max_length=11, **GENERATING)}]
)
@pytest.mark.parametrize("stored", ["config.json", "generation_config.json"])
def test_generation_settings_are_those_that_transformers_would_take(tmp_path, stored, given):
    """Those that are given, else the checkpoint's, which older ones have in config.json."""
    model_class, inputs, _ = make(tmp_path, "gpt2")
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    settings = {**GENERATING, "num_beams": 3, "max_length": 14, "no_repeat_ngram_size": 1}
    (tmp_path / stored).write_text(json.dumps({**config, **settings} if stored == "config.json" else settings))
    wanted = model_class.from_pretrained(tmp_path, **given).generate(**inputs)
    assert wanted.shape[1] == (11 if given else 14)
    with FaultyServer(tmp_path) as server:
        whole = modelcache.from_pretrained(model_class, "x", address=server.address, **given)
        assert torch.equal(whole.generate(**inputs), wanted)
        with StreamingModel("x", model_class, address=server.address, **given) as model:
            assert torch.equal(model.generate(**inputs), wanted)


@pytest.mark.parametrize("given", [lambda model: model, lambda model: model.model], ids=["itself", "its model"])
def test_a_streamed_model_assists_another(tmp_path, given):
    make(tmp_path, "llama")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    wanted = {"input_ids": IDS[:1], "max_new_tokens": 6, "do_sample": False}
    with (
        FaultyServer(tmp_path) as server,
        StreamingModel(auto_class="AutoModelForCausalLM", cache_size=1, address=server.address) as model,
        StreamingModel(auto_class="AutoModelForCausalLM", cache_size=1, address=server.address) as assistant,
    ):
        found = model.generate(**wanted, assistant_model=given(assistant))
    assert torch.equal(found, plain.generate(**wanted, assistant_model=plain))


def test_experts_that_the_model_holds_as_one_are_received_in_place(tmp_path):
    make(tmp_path, "mixtral")
    with (
        FaultyServer(tmp_path) as server,
        StreamingModel("x", "AutoModelForCausalLM", address=server.address) as model,
    ):
        for component in model._session.cache.blocks.values():
            assert len(component.layout.fused) == 2
            assert component.scratch.runs == ()


def test_a_block_above_the_byte_limit_is_taken_apart(tmp_path):
    from transformers import SwinConfig, SwinModel

    torch.manual_seed(0)
    SwinModel(
        SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4)
    ).save_pretrained(tmp_path)
    plain = SwinModel.from_pretrained(tmp_path)
    with torch.no_grad():
        wanted = plain(PIXELS)
    with FaultyServer(tmp_path) as server:
        with StreamingModel("x", SwinModel, cache_size=None, address=server.address) as model:
            whole = list(model._session.cache.blocks)
            assert_same(model(PIXELS), wanted)
        with StreamingModel("x", SwinModel, cache_size=None, cache_bytes=40_000, address=server.address) as model:
            parts = list(model._session.cache.blocks)
            assert_same(model(PIXELS), wanted)
    assert whole == ["encoder.layers.0", "encoder.layers.1"]
    assert len(parts) > len(whole)


def test_cached_attention_keys_of_streamed_layers_are_equal(tmp_path):
    model_class, inputs, _ = make(tmp_path, "llama")
    with torch.no_grad():
        wanted = model_class.from_pretrained(tmp_path)(**inputs, use_cache=True)
    with (
        FaultyServer(tmp_path) as server,
        StreamingModel("x", model_class, cache_size=1, address=server.address) as model,
    ):
        found = model(**inputs, use_cache=True)
        for left, right in zip(found.past_key_values.layers, wanted.past_key_values.layers, strict=True):
            assert torch.equal(left.keys, right.keys)
            assert torch.equal(left.values, right.values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine")
def test_equal_on_a_gpu(tmp_path):
    model_class, inputs, _ = make(tmp_path, "llama")
    with torch.no_grad():
        wanted = model_class.from_pretrained(tmp_path).to("cuda")(
            **{key: value.cuda() for key, value in inputs.items()}
        )
    with (
        FaultyServer(tmp_path) as server,
        StreamingModel("x", model_class, cache_size=1, address=server.address, device="cuda") as model,
    ):
        assert_same(model(**{key: value.cuda() for key, value in inputs.items()}), wanted)


def test_a_head_that_is_tied_and_stored_twice_is_tied(tmp_path):
    import safetensors.torch

    model_class, inputs, _ = make(tmp_path, "llama-tied")
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        wanted = model_class.from_pretrained(tmp_path)(**inputs)
    with (
        FaultyServer(tmp_path) as server,
        StreamingModel("x", model_class, address=server.address) as model,
    ):
        assert model.model.lm_head.weight is model.model.model.embed_tokens.weight
        assert_same(model(**inputs), wanted)


def test_a_weight_that_transformers_tolerates_but_would_make_up_is_missing(tmp_path, monkeypatch):
    import safetensors.torch

    from modelcache import MissingWeights

    model_class, _, _ = make(tmp_path, "bert")
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del state["pooler.dense.weight"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(model_class, "_keys_to_ignore_on_load_missing", [r"pooler\.dense\.weight"])
    with FaultyServer(tmp_path) as server, pytest.raises(MissingWeights, match=r"pooler\.dense\.weight"):
        StreamingModel("x", model_class, address=server.address)
