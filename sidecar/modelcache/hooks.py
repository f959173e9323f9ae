"""How a transformers model is made to load its weights: around each block's call, and where all of them are touched."""

from __future__ import annotations

import functools
import itertools
import time
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from modelcache.errors import UnsupportedModel

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable, Iterator

    from torch import nn
    from transformers import PreTrainedModel

    from modelcache.architecture import Component
    from modelcache.cache import ComponentCache

__all__ = ["guard", "refuse_copy", "stream_block", "time_calls"]


def stream_block(component: Component, cache: ComponentCache) -> None:
    """Has a block's weights loaded around each of its calls."""
    module, name = component.module, component.name
    if module is None:
        return
    original = module.forward

    # Gradients would hold the weights of each layer until the result is let go.
    @torch.no_grad()
    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        cache.acquire(name)
        try:
            return original(*args, **kwargs)
        finally:
            cache.release(name)

    module.forward = forward


def time_calls(
    model: PreTrainedModel, note: weakref.WeakMethod[Callable[[float], None]], cache: ComponentCache
) -> None:
    """Has the model wait for what is resident, and its calls counted.

    Args:
        model: whose forward is replaced.
        note: called with the seconds of each call, as long as its object lives.
        cache: of its components.
    """
    original = model.forward

    @torch.no_grad()
    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        cache.wait_for_resident()
        result = original(*args, **kwargs)
        method = note()
        if method is not None:
            method(time.perf_counter() - started)
        return result

    model.forward = forward


def guard(model: PreTrainedModel, cache: ComponentCache, device: str | torch.device) -> None:
    """Has what touches all parameters of the model, or of a module in it, load them, or refuse.

    Args:
        model: whose modules are changed; those without any tensor are left alone, since models may share them (XLM's
            activation is one for all models of the process).
        cache: of its components.
        device: on which it computes.
    """
    for name, module in model.named_modules():
        if not any(True for _ in _tensors(module)):
            continue
        parts = name.split(".")
        prefixes = (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        block = next((prefix for prefix in prefixes if prefix in cache.blocks), None)
        vars(module).update(
            state_dict=functools.partial(_state_dict, module, cache, block, is_block=block == name),
            train=functools.partial(_train, module),
            _apply=functools.partial(_cast, module, cache, block, device),
            load_state_dict=_refuse_weights,
            __reduce_ex__=refuse_copy,
            compile=_refuse_compile,
        )


def refuse_copy(*_: Any) -> NoReturn:
    """What ``copy``, ``pickle`` and all that use them find as ``__reduce_ex__``."""
    raise UnsupportedModel(
        "A streamed model cannot be copied or pickled, since its weights come and go: make it anew where it is needed, "
        "or load it whole with modelcache.from_pretrained(auto_class, name)."
    )


def _state_dict(
    module: nn.Module, cache: ComponentCache, block: str | None, *args: Any, is_block: bool, **kwargs: Any
) -> Any:
    plain = functools.partial(type(module).state_dict, module, *args, **kwargs)
    cache.wait_for_resident()
    # A module above a block asks the block; one in it was asked by the block if it is given where to write.
    if block is None or (kwargs.get("destination") is not None and not is_block):
        return plain()
    cache.acquire(block)
    try:
        return plain()
    finally:
        cache.release(block)


def _train(module: nn.Module, mode: bool = True) -> Any:  # noqa: FBT001, FBT002 - nn.Module's signature
    if mode:
        raise UnsupportedModel("A streamed model computes in eval mode only; train one from from_pretrained().")
    return type(module).train(module, mode)


def _cast(
    module: nn.Module,
    cache: ComponentCache,
    block: str | None,
    device: str | torch.device,
    function: Callable[[torch.Tensor], torch.Tensor],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What ``to``, ``float``, ``cpu`` and the like do, where it changes nothing; a block that computes may do all."""
    if block is not None and cache.in_use(block):
        return type(module)._apply(module, function, *args, **kwargs)  # type: ignore[no-untyped-call] # noqa: SLF001 - routers cast themselves
    # Four dimensions, so that another memory format shows too.
    probes = [torch.empty((1, 2, 2, 2), device=device).to(dtype) for dtype in {each.dtype for each in _tensors(module)}]
    if all(
        function(probe) is probe and not probe.is_shared()  # type: ignore[no-untyped-call]
        for probe in probes
    ):
        return module
    raise UnsupportedModel(
        "A streamed model cannot be moved or cast: give dtype= when it is made, or use from_pretrained()."
    )


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def _refuse_weights(*_: Any, **__: Any) -> Any:
    raise UnsupportedModel(
        "A streamed model's weights come from the server, and others would be lost when a layer is evicted: "
        "use from_pretrained()."
    )


def _refuse_compile(*_: Any, **__: Any) -> Any:
    raise UnsupportedModel("A streamed model cannot be compiled, since its weights come and go.")
