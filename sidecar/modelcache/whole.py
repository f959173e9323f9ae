"""Weights in one go: a state dict, or a transformers model, at the speed of the wire."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from tqdm.auto import tqdm

from modelcache.architecture import Binding, Component
from modelcache.arguments import check_connections, check_model_args
from modelcache.connection import connect
from modelcache.loader import Load, Loader, tensor_at
from modelcache.plan import lay_out, select_tensors
from modelcache.pretrained import check_class, for_its_architecture, load_pretrained, without_progress_bar
from modelcache.process import pool
from modelcache.reader import SMALL_STEP_BYTES
from modelcache.sketch import Leaf
from modelcache.volume_lane import local_volume

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from transformers import PreTrainedModel

    from modelcache.connection import PinnedSnapshot
    from modelcache.plan import Stored
    from modelcache.volume_lane import VolumeSource

__all__ = ["from_pretrained", "load_state_dict"]

# Memory is given back in pieces of about this size, once no tensor of a piece is left.
_CHUNK_BYTES = 64 * 2**20
# Nothing computes meanwhile, so the cores are free for more than one.
_CONNECTIONS = 2
# Comparing checksums is bound by memory from a few cores on.
_CHECKERS = 4
# What would stand in modules while a tensor is not loaded: a whole load has no modules.
_NOWHERE = torch.empty(0, device="meta")


def load_state_dict(
    name: str = "",
    *,
    address: str | None = None,
    token_file: str | os.PathLike[str] | None = None,
    ca_file: str | os.PathLike[str] | None = None,
    subfolder: str = "",
    variant: str | None = None,
    progress: bool | None = None,
    connections: int = _CONNECTIONS,
    verify: bool = True,
    wait_timeout: float = 600.0,
    timeout: float = 120.0,
) -> dict[str, torch.Tensor]:
    """Loads all tensors of what is active now, with their checksums checked on the way.

    Args:
        name: of the ModelCache, or its repoId.
        address: ``host:port``; default: MODELCACHE_ADDRESS, else ``NAME-weights:9090``.
        token_file: with a bearer token, read anew for each request; default: MODELCACHE_TOKEN_FILE.
        ca_file: authorities to trust for TLS (PEM); default: MODELCACHE_CA_FILE, else public ones.
        subfolder: of the weights in the repo.
        variant: of the weights (``fp16``).
        progress: whether to show a progress bar; None: only on a terminal.
        connections: how many read at once; each keeps a core busy with receiving and checking.
        verify: False: a volume of this machine that is mapped is trusted, and read only as far as tensors are used.
            What comes over the wire is checked in any case.
        wait_timeout: seconds to wait for a server that is not ready yet.
        timeout: seconds that 64 MiB may take, whatever happens to servers meanwhile.

    Returns:
        Tensors by their names in the checkpoint, in its dtypes, in private memory.

    Raises:
        FileNotInSnapshot: there are no weights.
        IntegrityError: a tensor differs from what was published.
        Unavailable: no server delivered in time.
        TypeError, ValueError: ``connections`` is no whole number, or less than 1.
    """
    check_connections(connections)
    with connect(name, address=address, token_file=token_file, ca_file=ca_file, wait_timeout=wait_timeout) as pinned:
        where = {"subfolder": subfolder, "variant": variant or ""}
        bar = _bar(name, progress)
        return _load(pinned, where, name, bar, connections=connections, verify=verify, timeout=timeout)


def from_pretrained(
    auto_class: str | type,
    name: str = "",
    *,
    address: str | None = None,
    token_file: str | os.PathLike[str] | None = None,
    ca_file: str | os.PathLike[str] | None = None,
    subfolder: str = "",
    variant: str | None = None,
    progress: bool | None = None,
    wait_timeout: float = 600.0,
    timeout: float = 120.0,
    **model_args: Any,
) -> PreTrainedModel:
    """Loads a whole transformers model, as its ``from_pretrained`` would from the same files.

    Weights that the checkpoint lacks are initialised, and reported, by transformers as usual.

    Args:
        auto_class: an Auto class or model class of transformers, or the name of one.
        name: of the ModelCache, or its repoId.
        address: ``host:port``; default: MODELCACHE_ADDRESS, else ``NAME-weights:9090``.
        token_file: with a bearer token, read anew for each request; default: MODELCACHE_TOKEN_FILE.
        ca_file: authorities to trust for TLS (PEM); default: MODELCACHE_CA_FILE, else public ones.
        subfolder: of config and weights in the repo.
        variant: of the weights (``fp16``).
        progress: whether to show a progress bar; None: only on a terminal.
        wait_timeout: seconds to wait for a server that is not ready yet.
        timeout: seconds that 64 MiB may take, whatever happens to servers meanwhile.
        model_args: as for ``from_pretrained``: dtype, attn_implementation, attributes of the config.

    Example:
        >>> model = modelcache.from_pretrained(AutoModelForCausalLM, "llama-3b")

    Raises:
        TypeError: an argument of ``from_pretrained`` would have no effect here.
    """
    check_model_args(model_args, streamed=False)
    check_class(auto_class)
    with connect(name, address=address, token_file=token_file, ca_file=ca_file, wait_timeout=wait_timeout) as pinned:
        pretrained = load_pretrained(pinned, auto_class, model_args, subfolder=subfolder, timeout=timeout)
        where = {"subfolder": subfolder, "variant": variant or ""}
        state = _load(pinned, where, name, _bar(name, progress), timeout=timeout)
    with without_progress_bar(), for_its_architecture(pretrained.model_class, pretrained.config):
        model: PreTrainedModel = pretrained.model_class.from_pretrained(
            None, config=pretrained.config, state_dict=state, **pretrained.model_args
        )
    if pretrained.generation_config is not None:
        model.generation_config = pretrained.generation_config
    return model


def _bar(name: str, progress: bool | None) -> tqdm[NoReturn]:  # noqa: FBT001 - tqdm's own: None is "on a terminal"
    hidden = None if progress is None else not progress
    return tqdm(desc=name or "weights", unit="B", unit_scale=True, disable=hidden)


def _load(
    pinned: PinnedSnapshot,
    where: dict[str, str],
    name: str,
    bar: tqdm[NoReturn],
    *,
    connections: int = _CONNECTIONS,
    verify: bool = True,
    timeout: float,
) -> dict[str, torch.Tensor]:
    volume = local_volume(pinned, os.environ)
    tensors = select_tensors(pinned.manifest, **where)
    if volume is not None and all(tensor.can_be_mapped for tensor in tensors):
        return _map(volume, tensors, bar, verify=verify)
    source = volume or pinned
    loader = Loader(pool, workers=connections, name=f"modelcache-load-{name}", step_bytes=SMALL_STEP_BYTES)
    begun: list[tuple[Component, Load]] = []
    found: dict[str, torch.Tensor] = {}
    try:
        for index, chunk in enumerate(_chunks(tensors)):
            component = _component(index, chunk)
            load = Load(component.name, (component.layout, component.scratch), source, timeout, component)
            loader.submit(load)
            begun.append((component, load))
        with bar:
            bar.reset(total=sum(component.layout.wire_bytes for component, _ in begun))
            for component, load in begun:
                load.done.wait()
                if load.error is not None:
                    raise load.error
                bar.update(component.layout.wire_bytes)
                found.update(zip((each.name for each in component.bindings), load.tensors, strict=True))
                load.tensors = []
    finally:
        loader.close()
    return {tensor.name: found[tensor.name] for tensor in tensors}


def _map(volume: VolumeSource, tensors: list[Stored], bar: tqdm[NoReturn], *, verify: bool) -> dict[str, torch.Tensor]:
    """Tensors over the mapped files, checked first by all cores."""
    with bar:
        if verify:
            unique = {tensor.place: tensor for tensor in tensors}.values()
            bar.reset(total=sum(tensor.length for tensor in unique))
            with ThreadPoolExecutor(min(_CHECKERS, len(os.sched_getaffinity(0))), "modelcache-check") as threads:
                for nbytes in threads.map(volume.check_run, volume.runs(unique)):
                    bar.update(nbytes)
    return {tensor.name: tensor_at(tensor, volume.map(tensor.path), tensor.offset) for tensor in tensors}


def _chunks(tensors: Iterable[Stored]) -> Iterator[list[Stored]]:
    """Neighbours in the files, together about as large as a chunk; tensors over the same bytes stay together."""
    chunk: list[Stored] = []
    size = end = 0
    path = ""
    for tensor in sorted(tensors, key=lambda each: each.place):
        overlaps = tensor.path == path and tensor.offset < end
        if chunk and not overlaps and size + tensor.length > _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(tensor)
        size += tensor.length
        end = tensor.offset + tensor.length if tensor.path != path else max(end, tensor.offset + tensor.length)
        path = tensor.path
    if chunk:
        yield chunk


def _component(index: int, tensors: list[Stored]) -> Component:
    # A request for each chunk: both connections have chunks of their own, so smaller ranges only cost requests.
    layout = lay_out(tensors, run_bytes=_CHUNK_BYTES)
    bindings = tuple(Binding(each.name, (), Leaf(each), None, _NOWHERE) for each in tensors)
    return Component(f"weights.{index}", None, bindings, layout, lay_out(()), layout.nbytes)
