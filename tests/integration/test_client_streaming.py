"""StreamingBertModel gives transformers' result, bit for bit, whatever is cached and however the files are laid out."""

import asyncio
import copy
import gc
import io
import itertools
import pickle
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, pipeline

import modelcache
from modelcache import MissingWeights, StreamingBertModel, UnsupportedModel
from modelcache.process import budget, pool
from support.client_server import FaultyServer
from support.models import TINY, BertFiles, minilm, save_bert

# Wide enough that matrix-vector kernels have something to differ in, small enough for a test.
SMALL = {**TINY, "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 5}


@pytest.fixture
def serve(tmp_path):
    """Serves a BERT and gives the server; stopped at the end of the test."""
    servers = []

    def start(files=None, folder=None):
        folder = folder or save_bert(tmp_path / f"model{len(servers)}", files or BertFiles())
        servers.append(FaultyServer(folder).start())
        servers[-1].folder = folder
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def tokens(batch=1, length=16, vocabulary=96):
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(batch))


def expected(folder, *args, **kwargs):
    load = {key: kwargs.pop(key) for key in ("dtype", "add_pooling_layer", "attn_implementation") if key in kwargs}
    with torch.no_grad():
        return BertModel.from_pretrained(folder, **load)(*args, **kwargs)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        pairs = zip(found[key], value, strict=True) if isinstance(value, tuple) else [(found[key], value)]
        assert all(torch.equal(left, right) and left.dtype == right.dtype for left, right in pairs), key


@pytest.mark.parametrize("cache_size", [1, 3, None])
@pytest.mark.parametrize("data_offset", [0, 8, 16, 24])
def test_equal_for_every_cache_size_and_header_padding(serve, cache_size, data_offset):
    server = serve(BertFiles(config=SMALL, data_offset=data_offset))
    wanted = expected(server.folder, tokens())
    with StreamingBertModel("x", cache_size, address=server.address) as model:
        for _ in range(3):
            assert_same(model(tokens()), wanted)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("prefix", ["", "bert."])
def test_equal_in_each_dtype_and_with_old_names(serve, dtype, prefix):
    server = serve(BertFiles(config=SMALL, dtype=dtype, prefix=prefix, old_names=bool(prefix)))
    with StreamingBertModel("x", address=server.address) as model:
        found = model(tokens())
        assert found.pooler_output.dtype == getattr(torch, dtype)
        assert_same(found, expected(server.folder, tokens()))


def test_equal_when_cast_while_loading(serve):
    server = serve(BertFiles(config=SMALL))
    with StreamingBertModel("x", address=server.address, dtype=torch.bfloat16) as model:
        assert_same(model(tokens()), expected(server.folder, tokens(), dtype=torch.bfloat16))


def test_equal_from_shards(serve):
    server = serve(BertFiles(config=SMALL, shards=3, data_offset=24))
    with StreamingBertModel("x", address=server.address) as model:
        assert_same(model(tokens()), expected(server.folder, tokens()))


@pytest.mark.parametrize("subfolder", ["text/encoder", "text/encoder/"])
def test_equal_from_a_subfolder_beside_other_weights(serve, tmp_path, subfolder):
    folder = save_bert(tmp_path / "both", BertFiles())
    wanted = expected(save_bert(folder / "text/encoder", BertFiles(config=SMALL, seed=3)), tokens())
    where = {"address": serve(folder=folder).address, "subfolder": subfolder}
    with StreamingBertModel("x", **where) as model:
        assert_same(model(tokens()), wanted)
    with torch.no_grad():
        assert_same(modelcache.from_pretrained(BertModel, "x", **where)(tokens()), wanted)
    layers = {name.split(".")[2] for name in modelcache.load_state_dict("x", **where) if ".layer." in name}
    assert len(layers) == SMALL["num_hidden_layers"]


def test_equal_with_padding_types_positions_and_all_outputs(serve):
    server = serve(BertFiles(config=SMALL))
    ids = tokens(4)
    arguments = {
        "attention_mask": torch.ones_like(ids).index_fill(1, torch.arange(9, 16), 0),
        "token_type_ids": (torch.arange(16) > 7).long().expand(4, 16),
        "position_ids": torch.arange(16).flip(0).expand(4, 16),
        "output_hidden_states": True,
        "output_attentions": True,
    }
    eager = {"attn_implementation": "eager"}
    with StreamingBertModel("x", address=server.address, **eager) as model:
        assert_same(model(ids, **arguments), expected(server.folder, ids, **arguments, **eager))


@pytest.mark.parametrize("cache_size", [1, 3, None])
@pytest.mark.parametrize("batch", [1, 2])
def test_equal_on_the_real_minilm(cache_size, batch):
    ids = tokens(batch, 40, 30000)
    with FaultyServer(minilm()) as server, StreamingBertModel("x", cache_size, address=server.address) as model:
        for _ in range(2):
            assert_same(model(ids), expected(minilm(), ids))


def test_without_pooler_the_pooler_is_neither_needed_nor_read(serve):
    server = serve(BertFiles(pooler=False))
    with StreamingBertModel("x", address=server.address, add_pooling_layer=False) as model:
        found = model(tokens())
        assert found.pooler_output is None
        assert torch.equal(
            found.last_hidden_state, expected(server.folder, tokens(), add_pooling_layer=False).last_hidden_state
        )


@pytest.mark.parametrize("name", ["pooler.dense.weight", "encoder.layer.2.output.dense.bias"])
def test_a_missing_weight_is_named(serve, name):
    server = serve(BertFiles(leave_out=(name,)))
    with pytest.raises(MissingWeights, match=name) as caught:
        StreamingBertModel("x", address=server.address)
    assert caught.value.names == (name,)


def test_a_task_head_comes_from_the_checkpoint_or_is_missing(serve, tmp_path):
    from transformers import BertForSequenceClassification

    torch.manual_seed(3)
    BertForSequenceClassification(BertConfig(**TINY, num_labels=5)).save_pretrained(tmp_path / "classifier")
    whole = BertForSequenceClassification.from_pretrained(tmp_path / "classifier")
    server = serve(folder=tmp_path / "classifier")
    with (
        StreamingBertModel("x", address=server.address, auto_class="AutoModelForSequenceClassification") as model,
        torch.no_grad(),
    ):
        assert torch.equal(model(tokens()).logits, whole(tokens()).logits)
    with pytest.raises(MissingWeights, match=r"classifier\.bias"):
        StreamingBertModel("x", address=serve().address, auto_class=BertForSequenceClassification)


async def surfing_weights_program(address):
    model = StreamingBertModel(model_name="bert-tiny", cache_size=3, address=address)
    async with model:
        await model.warmup(layer_indices=[0, 1])
        warm = model.get_cache_info()
        found = await model.forward_async(tokens(), torch.ones(1, 16, dtype=torch.long), prefetch_count=1)
        await model.prefetch_next_layers(1, prefetch_count=2)
        return warm, found, model.get_inference_stats(), model.get_cache_info()


def test_the_asynchronous_calls_that_surfing_weights_users_know(serve):
    server = serve()
    warm, found, stats, info = asyncio.run(surfing_weights_program(server.address))
    assert warm["cached_components"] == ["encoder.layer.0", "encoder.layer.1"]
    assert_same(found, expected(server.folder, tokens(), torch.ones(1, 16, dtype=torch.long)))
    assert stats["total_inferences"] == 1
    assert stats["avg_inference_time"] > 0
    assert 0 < stats["cache_hit_rate"] < 1
    assert info["cache_size"] == info["max_cache_size"] == 3
    assert info["memory_usage_mb"] > 0
    assert set(info["access_order"]) == set(info["cached_components"])


def test_the_synchronous_call_works_after_an_event_loop_has_ended(serve):
    server = serve()
    with StreamingBertModel("x", address=server.address) as model:
        asyncio.run(model.forward_async(tokens()))
        assert_same(model(tokens()), expected(server.folder, tokens()))


def test_shrinking_the_cache_evicts_and_clearing_empties_it(serve):
    server = serve()
    with StreamingBertModel("x", None, address=server.address) as model:
        model(tokens())
        assert model.get_cache_info()["cache_size"] == 4
        model.cache_size = 1
        assert model.get_cache_info()["cache_size"] == 1
        model.clear_cache()
        assert model.get_cache_info()["cached_components"] == []
        assert_same(model(tokens()), expected(server.folder, tokens()))


def test_how_many_bytes_stay_can_be_changed_between_passes(serve):
    server = serve(BertFiles(config=SMALL))
    wanted = expected(server.folder, tokens())
    with StreamingBertModel("x", None, address=server.address) as model:
        assert_same(model(tokens()), wanted)
        layer = model._session.cache.blocks["encoder.layer.0"].nbytes
        for kept in (1, 3, 2):
            model.cache_bytes = kept * layer + layer // 2
            assert_same(model(tokens()), wanted)
            info = model.get_cache_info()
            assert info["cache_size"] == kept
            assert info["max_cache_bytes"] == kept * layer + layer // 2
        model.cache_bytes = None
        assert_same(model(tokens()), wanted)
        assert model.get_cache_info()["cache_size"] == SMALL["num_hidden_layers"]


def test_a_second_pass_with_all_layers_cached_reads_nothing(serve):
    server = serve()
    with StreamingBertModel("x", None, address=server.address) as model:
        model(tokens())
        before = len(server.requests)
        model(tokens())
        assert len(server.requests) == before
        assert model.get_inference_stats()["cache_hits"] == 4


def test_each_byte_is_read_once_in_the_first_pass(serve):
    server = serve()
    with StreamingBertModel("x", None, address=server.address) as model:
        threads = [threading.Thread(target=model, args=(tokens(),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    weights = [(offset, length) for path, offset, length in server.requests if path == "model.safetensors"]
    assert len(weights) == len(set(weights))
    ends = sorted((offset, offset + length) for offset, length in weights)
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(ends))


def test_concurrent_passes_over_one_layer_at_a_time_are_equal(serve):
    server = serve(BertFiles(config=SMALL))
    wanted = [expected(server.folder, tokens(batch)) for batch in range(1, 5)]
    found = {}
    with StreamingBertModel("x", 1, address=server.address) as model:

        def work(batch):
            for _ in range(3):
                found[batch] = model(tokens(batch))

        threads = [threading.Thread(target=work, args=(batch,)) for batch in range(1, 5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for batch in range(1, 5):
        assert_same(found[batch], wanted[batch - 1])


def test_evicted_parameters_are_on_meta_and_the_state_dict_is_whole(serve):
    server = serve()
    plain = BertModel.from_pretrained(server.folder)
    with StreamingBertModel("x", 1, address=server.address) as model:
        model(tokens())
        layers = model.model.encoder.layer
        assert layers[0].output.dense.weight.is_meta
        assert not layers[3].output.dense.weight.is_meta
        state = model.state_dict()
        for name, value in plain.state_dict().items():
            assert torch.equal(state[name], value), name
        assert layers[0].output.dense.weight.is_meta


def test_a_parameter_that_is_held_while_evicted_is_on_meta_and_cannot_be_computed_with(serve):
    """Whoever keeps a parameter over an eviction has its own bytes or none, never those of another layer."""
    server = serve()
    plain = BertModel.from_pretrained(server.folder)
    name = "encoder.layer.0.output.dense.weight"
    with StreamingBertModel("x", 1, address=server.address) as model:
        asyncio.run(model.warmup([0]))
        held = model.model.get_parameter(name)
        assert torch.equal(held, plain.get_parameter(name))
        model(tokens())
        evicted = dict(model.model.named_parameters())[name]
        assert evicted.is_meta
        assert evicted.shape == held.shape
        for use in (lambda: torch.ones(1) + evicted, lambda: evicted.sum().item(), evicted.numpy, evicted.tolist):
            with pytest.raises((RuntimeError, NotImplementedError, TypeError), match="meta"):
                use()
        assert torch.equal(held, plain.get_parameter(name))
        assert_same(model(tokens()), expected(server.folder, tokens()))


def test_saving_a_streamed_model_saves_its_weights(serve, tmp_path):
    server = serve()
    with StreamingBertModel("x", 1, address=server.address) as model:
        model.save_pretrained(tmp_path / "saved")
    assert_same(expected(tmp_path / "saved", tokens()), expected(server.folder, tokens()))


MODULES = {
    "the model": lambda model: model,
    "transformers' model": lambda model: model.model,
    "a module above the blocks": lambda model: model.model.encoder,
    "an evicted block": lambda model: model.model.encoder.layer[0],
    "a module in a block": lambda model: model.model.encoder.layer[3].output.dense,
    "the embeddings": lambda model: model.model.embeddings,
}
REFUSED = {
    "half": lambda module: module.half(),
    "channels last": lambda module: module.to(memory_format=torch.channels_last),
    "bfloat16": lambda module: module.bfloat16(),
    "to a dtype": lambda module: module.to(torch.float16),
    "to a device": lambda module: module.to("meta"),
    "to_empty": lambda module: module.to_empty(device="cpu"),
    "share_memory": lambda module: module.share_memory(),
    "train": lambda module: module.train(),
    "compile": lambda module: module.compile(),
    "load_state_dict": lambda module: module.load_state_dict({}),
}


@pytest.mark.parametrize("use", REFUSED.values(), ids=REFUSED)
def test_what_a_streamed_model_cannot_do_is_refused_by_each_of_its_modules(serve, use):
    server = serve()
    with StreamingBertModel("x", 1, address=server.address) as model:
        model(tokens())
        for module in MODULES.values():
            with pytest.raises(UnsupportedModel, match=r"from_pretrained\(\)|compiled"):
                use(module(model))
        assert_same(model(tokens()), expected(server.folder, tokens()))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "torch.save": lambda module: torch.save(module, io.BytesIO()),
    "another process": ForkingPickler.dumps,
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_a_streamed_model_and_its_modules_are_never_copied(serve, make_copy):
    server = serve()
    with StreamingBertModel("x", 1, address=server.address) as model:
        model(tokens())
        for module in MODULES.values():
            with pytest.raises(UnsupportedModel, match=r"modelcache\.from_pretrained\(auto_class, name\)"):
                make_copy(module(model))
        with pytest.raises(UnsupportedModel, match="make it anew"):
            copy.copy(model)  # It would end with the model that it was copied from.
        assert_same(model(tokens()), expected(server.folder, tokens()))


def test_the_state_dict_of_each_module_holds_its_weights(serve):
    server = serve()
    plain = BertModel.from_pretrained(server.folder)
    with StreamingBertModel("x", 1, address=server.address) as model:
        model(tokens())
        for name in (
            "",
            "encoder",
            "encoder.layer.0",
            "encoder.layer.1.output",
            "encoder.layer.2.output.dense",
            "pooler",
        ):
            found, wanted = model.model.get_submodule(name).state_dict(), plain.get_submodule(name).state_dict()
            assert list(found) == list(wanted)
            assert all(torch.equal(found[key], value) for key, value in wanted.items()), name
        assert model.model.encoder.layer[0].output.dense.weight.is_meta


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize(
    "compiled", [lambda model: model, lambda model: model.model], ids=["the model", "transformers' model"]
)
def test_a_compiled_model_loads_what_it_needs(serve, compiled):
    server = serve()
    torch.compiler.reset()
    with StreamingBertModel("x", 1, address=server.address) as model:
        call = torch.compile(compiled(model), backend="aot_eager")
        with torch.no_grad():
            for _ in range(2):
                assert_same(call(tokens()), expected(server.folder, tokens()))
    torch.compiler.reset()


def test_nothing_is_left_after_cleanup(serve):
    server = serve()
    gc.collect()
    used = pool.used_bytes
    model = StreamingBertModel("x", None, address=server.address)
    model(tokens())
    assert pool.used_bytes > used
    model.cleanup()
    assert not [each for each in threading.enumerate() if each.name.startswith("modelcache")]
    assert pool.used_bytes == used
    with pytest.raises(modelcache.Cancelled):
        model(tokens())


def test_a_forgotten_model_ends_its_threads_and_gives_its_memory_back(serve):
    server = serve()
    gc.collect()
    used = pool.used_bytes
    model = StreamingBertModel("x", None, address=server.address)
    model(tokens())
    del model
    gc.collect()
    assert not [each for each in threading.enumerate() if each.name.startswith("modelcache")]
    assert pool.used_bytes == used


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("cache_size", 0, ValueError),
        ("cache_size", "3", TypeError),
        ("cache_size", 2.5, TypeError),
        ("cache_size", True, TypeError),
        ("cache_bytes", 0, ValueError),
        ("cache_bytes", 1e9, TypeError),
        ("prefetch_count", -1, ValueError),
        ("prefetch_count", None, TypeError),
    ],
)
def test_limits_that_make_no_sense_are_refused(argument, value, error):
    with pytest.raises(error, match=rf"{argument} .*(at least 1|negative).* it was given {re.escape(repr(value))}"):
        StreamingBertModel("x", address="127.0.0.1:1", **{argument: value})


def test_a_limit_that_makes_no_sense_changes_nothing_when_it_is_set(serve):
    server = serve()
    with StreamingBertModel("x", 2, address=server.address) as model:
        for value in ("3", 2.5, True):
            with pytest.raises(TypeError, match="cache_size counts layers"):
                model.cache_size = value
            with pytest.raises(TypeError, match="cache_bytes must be at least 1"):
                model.cache_bytes = value
        assert (model.cache_size, model.cache_bytes) == (2, None)
        assert_same(model(tokens()), expected(server.folder, tokens()))


@pytest.mark.parametrize(("index", "error"), [(99, IndexError), (-1, IndexError), ("x", TypeError), (True, TypeError)])
def test_layers_that_do_not_exist_are_refused(serve, index, error):
    with StreamingBertModel("x", address=serve().address) as model:
        with pytest.raises(error, match=rf"layer_indices takes .*from 0 to 3; it was given {index!r}"):
            asyncio.run(model.warmup([0, index]))
        with pytest.raises(error, match=rf"current_layer takes .*from 0 to 3; it was given {index!r}"):
            asyncio.run(model.prefetch_next_layers(index))
        with pytest.raises(ValueError, match="prefetch_count"):
            asyncio.run(model.prefetch_next_layers(0, prefetch_count=-1))
        assert model.get_cache_info()["cached_components"] == []


def test_a_move_that_changes_nothing_is_taken(serve):
    server = serve()
    with StreamingBertModel("x", 1, address=server.address) as model:
        assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
        for same in (model.to("cpu"), model.to(torch.float32), model.to(device="cpu", dtype=torch.float32)):
            assert same is model
        assert model.float() is model.cpu() is model
        for module in (model.model, model.model.encoder.layer[2], model.model.encoder.layer[0].output.dense):
            assert module.float() is module.cpu() is module.to("cpu") is module
        assert_same(model(tokens()), expected(server.folder, tokens()))


def test_a_direct_call_of_the_model_keeps_no_evicted_weights_for_gradients(serve):
    server = serve(BertFiles(config=SMALL))
    with StreamingBertModel("x", 1, address=server.address) as model, torch.enable_grad():
        found = model.model(tokens())
        assert not found.last_hidden_state.requires_grad
        assert_same(found, expected(server.folder, tokens()))


def test_a_pipeline_of_transformers_takes_a_streamed_model():
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    wanted = pipeline("feature-extraction", model=BertModel.from_pretrained(minilm()), tokenizer=tokenizer)
    with FaultyServer(minilm()) as server, StreamingBertModel("x", 1, address=server.address) as model:
        streamed = pipeline("feature-extraction", model=model, tokenizer=tokenizer)
        assert streamed("layers arrive while it computes") == wanted("layers arrive while it computes")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"revision": "v2"}, "revision= has no effect here: .* ModelCache"),
        ({"token": "hf_x"}, "token_file="),
        ({"device_map": "auto"}, "write device="),
        ({"quantization_config": {"load_in_8bit": True}}, r"from_pretrained\(\)"),
        ({"trust_remote_code": True}, r"snapshot\(\)"),
        ({"state_dict": {"a": torch.ones(1)}}, "come from the server"),
        ({"output_loading_info": True}, "MissingWeights"),
        ({"gguf_file": "model.gguf"}, r"snapshot\(\)"),
    ],
)
def test_an_argument_that_would_be_ignored_is_refused(arguments, says):
    with pytest.raises(TypeError, match=says):
        StreamingBertModel("x", address="127.0.0.1:1", **arguments)


def test_an_argument_that_asks_for_what_is_so_anyway_is_taken(serve):
    server = serve()
    off = {"trust_remote_code": False, "revision": None, "token": None, "device_map": None, "variant": None}
    with StreamingBertModel("x", address=server.address, **off) as model:
        assert_same(model(tokens()), expected(server.folder, tokens()))
    with pytest.raises(TypeError, match="revision="):
        modelcache.from_pretrained("AutoModel", "x", address=server.address, revision="v2")
    with pytest.raises(TypeError, match="give what differs as arguments"):
        modelcache.from_pretrained("AutoModel", "x", address=server.address, config=BertConfig())
    assert modelcache.load_state_dict("x", address=server.address, variant=None)


def test_calls_of_the_transformers_model_are_completed(serve):
    with StreamingBertModel("x", address=serve().address) as model:
        assert {"get_input_embeddings", "num_parameters", "get_cache_info"} <= set(dir(model))


def test_repr_says_what_is_here(serve):
    with StreamingBertModel("bert-tiny", 2, address=serve().address) as model:
        model(tokens())
        assert repr(model).startswith("<StreamingBertModel 'bert-tiny' BertModel ")
        assert "2 of 4 layers here (cache_size 2)" in repr(model)
        assert repr(model.cleanup()) == "<done>"
    assert repr(model).endswith(": cleaned up>")


def test_a_model_without_a_language_head_says_that_it_cannot_generate(serve, caplog):
    says = re.escape('BertModel cannot generate: use a class that can, such as auto_class="AutoModelForCausalLM".')
    with (
        StreamingBertModel("x", 2, address=serve().address) as model,
        pytest.raises(UnsupportedModel, match=says),
    ):
        model.generate(tokens())
    assert "of them again" not in caplog.text


def test_models_share_one_memory_budget(serve):
    first, second = serve(BertFiles(config=SMALL)), serve(BertFiles(config=SMALL, seed=5))
    wanted = expected(first.folder, tokens()), expected(second.folder, tokens())
    with (
        StreamingBertModel("a", None, address=first.address) as a,
        StreamingBertModel("b", None, address=second.address) as b,
    ):
        assert_same(a(tokens()), wanted[0])
        assert_same(b(tokens()), wanted[1])
        layer = a._session.cache.blocks["encoder.layer.0"].nbytes
        resident = sum(each.nbytes for model in (a, b) for each in model._session.cache.resident.values())
        modelcache.set_memory_budget(resident + 4 * layer)
        try:
            for _ in range(2):
                for model, result in zip((a, b), wanted, strict=True):
                    model.clear_cache()
                    assert_same(model(tokens()), result)
                    held = sum(each._session.cache.held_bytes() for each in (a, b))
                    assert held <= resident + 4 * layer
        finally:
            modelcache.set_memory_budget(None)


def test_memory_is_counted_while_another_model_is_at_work_on_its_layers(serve):
    """Each model counts what the others hold while it decides what to read ahead: they must not wait for each other."""
    server = serve(BertFiles(config=SMALL))
    with (
        StreamingBertModel("a", 2, address=server.address) as a,
        StreamingBertModel("b", 2, address=server.address) as b,
        ThreadPoolExecutor(2) as threads,
    ):
        modelcache.set_memory_budget(2**20)
        try:
            with a._session.cache._lock:
                assert threads.submit(budget.room).result(timeout=30) < 2**20
            for found in threads.map(lambda model: model(tokens()), [a, b] * 4):
                assert_same(found, expected(server.folder, tokens()))
        finally:
            modelcache.set_memory_budget(None)


def test_a_budget_takes_from_the_model_that_waited_longest(serve):
    server = serve(BertFiles(config=SMALL))
    with (
        StreamingBertModel("a", None, prefetch_count=0, address=server.address) as a,
        StreamingBertModel("b", None, prefetch_count=0, address=server.address) as b,
        StreamingBertModel("c", None, prefetch_count=0, address=server.address) as c,
    ):
        for model in (a, b, a, c):
            model(tokens())
        c.clear_cache()
        layer = c._session.cache.blocks["encoder.layer.0"].nbytes
        modelcache.set_memory_budget(sum(model._session.cache.held_bytes() for model in (a, b, c)) + layer)
        try:
            c(tokens())
        finally:
            modelcache.set_memory_budget(None)
        assert [model.get_cache_info()["cache_size"] for model in (a, b, c)] == [5, 1, 5]


def test_a_pass_that_meets_a_refresh_runs_on_the_new_snapshot(serve, tmp_path):
    server = serve()
    other = save_bert(tmp_path / "other", BertFiles(seed=1))
    wanted = [expected(folder, tokens()).last_hidden_state for folder in (server.folder, other)]
    digests = [server.active, server.publish(other)]
    server.active = digests[0]
    with StreamingBertModel("x", address=server.address) as model, ThreadPoolExecutor(3) as threads:
        before = model._session
        done = threading.Event()

        def run():
            while not done.is_set():
                found = model(tokens()).last_hidden_state
                assert any(torch.equal(found, each) for each in wanted)

        passes = [threads.submit(run), threads.submit(run)]
        try:
            for count in range(10):
                server.active = digests[(count + 1) % 2]
                assert model.refresh()
        finally:
            done.set()
        for each in passes:
            each.result(timeout=60)
        assert not before.enter()
        server.active = digests[1]
        refreshed = [threads.submit(model.refresh) for _ in range(3)]
        assert sorted(each.result(timeout=60) for each in refreshed) == [False, False, True]
        assert torch.equal(model(tokens()).last_hidden_state, wanted[1])


def test_models_of_one_server_share_its_connections(serve):
    server = serve()
    with StreamingBertModel("a", address=server.address) as a, StreamingBertModel("b", address=server.address) as b:
        assert a._session.snapshot.connection is b._session.snapshot.connection
        assert_same(a(tokens()), b(tokens()))


def test_an_argument_of_surfing_weights_says_what_to_write_instead():
    with pytest.raises(TypeError, match="address="):
        StreamingBertModel("prajjwal1/bert-tiny", websocket_uri="ws://localhost:8765", cache_size=2)


def test_eval_gives_the_streaming_model_back(serve):
    server = serve()
    model = StreamingBertModel("bert", 1, address=server.address).eval()
    assert_same(model(tokens()), expected(server.folder, tokens()))
    assert model.train(False) is model
    model.cleanup()


def test_how_far_one_pass_reads_ahead_does_not_stick(serve):
    server = serve(BertFiles(config=SMALL))
    with StreamingBertModel("bert", 1, address=server.address) as model:
        asyncio.run(model.forward_async(tokens(), None, None, None, False))
        before = model.get_inference_stats()["prefetch_hits"]
        assert_same(
            asyncio.run(model.forward_async(tokens(), None, None, None, False)), expected(server.folder, tokens())
        )
        assert model.get_inference_stats()["prefetch_hits"] <= before + 1  # What was on its way already.
        model(tokens())
        model(tokens())
        assert model.get_inference_stats()["prefetch_hits"] > before + 1


FORKING = """
import os, sys, torch
from modelcache import StreamingBertModel, Unavailable
tokens = torch.zeros((1, 4), dtype=torch.int64)
torch.set_num_threads(1)
model = StreamingBertModel("x", 1, address=sys.argv[1], timeout=600)
wanted = model(tokens).last_hidden_state
if os.fork() == 0:
    try:
        model(tokens)
    except Unavailable as error:
        print(error, flush=True)
    model.cleanup()
    os._exit(0)
os.wait()
for _ in range(3):
    assert torch.equal(model(tokens).last_hidden_state, wanted)
model.cleanup()
"""


def test_a_forked_process_is_told_at_once_and_leaves_the_model_to_its_maker(serve):
    command = [sys.executable, "-c", FORKING, serve(BertFiles(config=SMALL)).address]
    found = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)  # Less than its timeout=.
    assert "it in each process, after the fork" in found.stdout


def test_a_model_that_was_cleaned_up_says_so(serve):
    model = StreamingBertModel("bert", address=serve().address)
    model(tokens())
    model.cleanup()
    with pytest.raises(modelcache.Cancelled, match="create it anew"):
        model.refresh()
    model.cache_size = 2
    asyncio.run(model.prefetch_next_layers(0))
    info = model.get_cache_info()
    assert info["cached_components"] == info["prefetched_components"] == info["resident_components"] == []
    assert info["memory_usage_mb"] == 0  # It would count in the memory budget of other models.
