"""Numbers that callers give, refused in a sentence when they make no sense, by Python's own errors."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["check_connections", "check_layer", "check_layers", "check_limits", "check_model_args"]

_SERVED = "the server has the files, of the revision that its ModelCache names; no hub is asked"
# Arguments of from_pretrained that would be without effect, and what to do instead.
_WITHOUT_EFFECT = {
    "revision": _SERVED,
    "token": f"{_SERVED}. token_file= is for the weight server",
    "use_auth_token": f"{_SERVED}. token_file= is for the weight server",
    "cache_dir": _SERVED,
    "force_download": _SERVED,
    "local_files_only": _SERVED,
    "proxies": _SERVED,
    "config": "it is the snapshot's; give what differs as arguments (num_labels=3)",
    "state_dict": "weights come from the server",
    "gguf_file": "snapshot() gives the file, for transformers' own from_pretrained()",
    "output_loading_info": "missing weights are MissingWeights where the model is streamed, else in transformers' log",
    "trust_remote_code": "code from a repo is never run here; check it, and load the folder that snapshot() gives",
}
_WITHOUT_EFFECT_STREAMED = {
    "device_map": "a streamed model computes on one device; write device=",
    "max_memory": "write cache_size= or cache_bytes=",
    "offload_folder": "layers are read from the server again, and need no folder",
    "quantization_config": "weights are streamed as they are stored; use from_pretrained()",
}


def check_limits(cache_size: Any, cache_bytes: Any, prefetch_count: Any) -> None:
    """Refuses limits of a layer cache that are no counts.

    Raises:
        TypeError: one is no whole number; True and 3.0 are none either.
        ValueError: one is too small.
    """
    if cache_size is not None:
        _check_count("cache_size", cache_size, "counts layers and must be at least 1, or None for all", least=1)
    if cache_bytes is not None:
        _check_count("cache_bytes", cache_bytes, "must be at least 1, or None for no limit", least=1)
    _check_count("prefetch_count", prefetch_count, "counts layers and cannot be negative", least=0)


def check_connections(connections: Any) -> None:
    """Refuses a number of connections that is no count, or none.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is less than 1.
    """
    _check_count("connections", connections, "must be at least 1", least=1)


def check_model_args(model_args: dict[str, Any], *, streamed: bool) -> None:
    """Refuses arguments of transformers' ``from_pretrained`` that would be ignored; those that are off are taken out.

    Raises:
        TypeError: one of them is given.
    """
    refused = {**_WITHOUT_EFFECT, **_WITHOUT_EFFECT_STREAMED} if streamed else _WITHOUT_EFFECT
    for name in refused.keys() & model_args.keys():
        if model_args.pop(name):
            raise TypeError(f"{name}= has no effect here: {refused[name]}.")


def check_layers(argument: str, indices: Iterable[Any], count: int) -> None:
    """Refuses indices of layers that a model of ``count`` layers has not; negative ones too.

    Raises:
        TypeError: one is no whole number.
        IndexError: there is no such layer.
    """
    for index in indices:
        check_layer(argument, index, count)


def check_layer(argument: str, index: Any, count: int) -> None:
    """As ``check_layers``, for one."""
    rule = f"takes indices of layers, from 0 to {count - 1}"
    if not _is_whole(index):
        raise TypeError(f"{argument} {rule}; it was given {index!r}.")
    if not 0 <= index < count:
        raise IndexError(f"{argument} {rule}; it was given {index!r}.")


def _check_count(argument: str, value: Any, rule: str, *, least: int) -> None:
    if not _is_whole(value):
        raise TypeError(f"{argument} {rule}; it was given {value!r}, which is no whole number.")
    if value < least:
        raise ValueError(f"{argument} {rule}; it was given {value!r}.")


def _is_whole(value: Any) -> bool:
    """Whether it is an int, or of a type that stands for one (numpy's), and no bool."""
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True
