"""How a transformers model is made to load its weights: around each block's call, and where all of them are touched."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

from modelcache.errors import UnsupportedModel

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from modelcache.architecture import Component
    from modelcache.cache import ComponentCache

__all__ = ["guard", "stream_block", "time_calls"]


def stream_block(component: Component, cache: ComponentCache) -> None:
    """Has a block's weights loaded around each of its calls."""
    module, name = component.module, component.name
    if module is None:
        return
    original = module.forward

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


def guard(model: PreTrainedModel, cache: ComponentCache) -> None:
    """Has what touches all parameters load them, or refuse."""
    plain_state_dict, plain_train = model.state_dict, model.train

    @functools.wraps(plain_state_dict)
    def state_dict(*args: Any, **kwargs: Any) -> Any:
        cache.wait_for_resident()
        state = plain_state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", "")
        for name, component in cache.blocks.items():
            if component.module is None:
                continue
            cache.acquire(name)
            try:
                state.update(component.module.state_dict(prefix=f"{prefix}{name}."))
            finally:
                cache.release(name)
        return state

    @functools.wraps(plain_train)
    def train(mode: bool = True) -> Any:  # noqa: FBT001, FBT002 - nn.Module's signature
        if mode:
            raise UnsupportedModel("A streamed model computes in eval mode only; train one from from_pretrained().")
        return plain_train(mode)

    def apply(*_: Any, **__: Any) -> Any:
        raise UnsupportedModel(
            "A streamed model cannot be moved or cast: give dtype= when it is made, or use from_pretrained()."
        )

    def compiled(*_: Any, **__: Any) -> Any:
        raise UnsupportedModel("A streamed model cannot be compiled, since its weights come and go.")

    vars(model).update(state_dict=state_dict, train=train, _apply=apply, compile=compiled)
