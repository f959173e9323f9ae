"""What a streamed model stands on while it is pinned to one snapshot: built at once, closed when no pass runs on it."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelcache.architecture import Architecture, build
from modelcache.cache import ComponentCache
from modelcache.device import copier
from modelcache.hooks import guard, stream_block, time_calls
from modelcache.layers import LayerPolicy
from modelcache.lease import LeaseKeeper
from modelcache.loader import Load, Loader, default_workers
from modelcache.plan import guess_components, lay_out, select_tensors
from modelcache.pretrained import load_pretrained
from modelcache.process import budget, pool
from modelcache.volume_lane import VolumeSource, local_volume

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable

    import torch

    from modelcache.connection import PinnedSnapshot
    from modelcache.plan import Stored
    from modelcache.reader import Source

__all__ = ["Session", "Wanted", "open_session"]


@dataclass
class Wanted:
    """What the user asked for, which holds for every snapshot that the model moves to.

    Attributes:
        name: of the ModelCache, or its repoId.
        auto_class: an Auto class or model class of transformers, or the name of one.
        device: where it computes.
        max_layers: how many layers stay; None: all.
        max_bytes: how many bytes of layers stay; None: no limit.
        ahead: how many layers are read ahead.
        timeout: seconds that one component, or 64 MiB of a larger one, may take.
        subfolder: of config and weights in the repo.
        variant: of the weights.
        model_args: as for ``from_pretrained``.
    """

    name: str
    auto_class: str | type
    device: str | torch.device
    max_layers: int | None
    max_bytes: int | None
    ahead: int
    timeout: float
    subfolder: str
    variant: str
    model_args: dict[str, Any]


class Session:
    """One snapshot of a model: its modules, its layer cache, its lease.

    Args:
        snapshot: what it is pinned to.
        source: where its bytes come from.
        architecture: the transformers model and its parts.
        cache: loads and evicts them.
    """

    def __init__(
        self, snapshot: PinnedSnapshot, source: Source, architecture: Architecture, cache: ComponentCache
    ) -> None:
        self.snapshot = snapshot
        self.source = source
        self.architecture = architecture
        self.cache = cache
        self.keeper = LeaseKeeper(snapshot)
        self._lock = threading.Lock()
        self._calls = 0
        self._closing = False

    @property
    def lane(self) -> str:
        """Where weights come from: "volume", "http" or "grpc"; "none" before the first was read."""
        return "volume" if isinstance(self.source, VolumeSource) else self.snapshot.connection.lane

    def enter(self) -> bool:
        """Notes that a forward pass begins: until ``leave`` nothing is closed. False: it is closed, or will be."""
        with self._lock:
            if self._closing:
                return False
            self._calls += 1
            return True

    def leave(self) -> None:
        """Notes that a forward pass has ended."""
        with self._lock:
            self._calls -= 1
            last = self._closing and self._calls == 0
        if last:
            self._release()

    def close_when_idle(self) -> None:
        """Closes it as soon as no forward pass runs on it."""
        with self._lock:
            self._closing = True
            idle = self._calls == 0
        if idle:
            self._release()

    def close(self) -> None:
        """Breaks off what is being read, and closes it; a forward pass that runs ends with Cancelled."""
        self.cache.cancel()
        self.close_when_idle()

    def _release(self) -> None:
        self.cache.close()
        self.keeper.close()
        self.snapshot.close()


def open_session(
    snapshot: PinnedSnapshot, wanted: Wanted, note_seconds: weakref.WeakMethod[Callable[[float], None]]
) -> Session:
    """Builds the model of a snapshot and starts to load it; closes the snapshot if that fails.

    Args:
        snapshot: pinned; the session closes it.
        wanted: by the user.
        note_seconds: called after each forward pass.
    """
    try:
        source = local_volume(snapshot, os.environ) or snapshot
        tensors = select_tensors(snapshot.manifest, subfolder=wanted.subfolder, variant=wanted.variant)
        loader = Loader(pool, workers=default_workers(), name=f"modelcache-{wanted.name}", move=copier(wanted.device))
    except BaseException:
        snapshot.close()
        raise
    try:
        begun = _read_ahead(source, tensors, loader, wanted)
        architecture = _build(snapshot, tensors, wanted)
        policy = LayerPolicy(
            {component.name: component.nbytes for component in architecture.blocks},
            max_layers=wanted.max_layers,
            max_bytes=wanted.max_bytes,
            ahead=wanted.ahead,
        )
        cache = ComponentCache(architecture.blocks, architecture.resident, policy, loader, source, wanted.timeout)
        for component in architecture.blocks:
            stream_block(component, cache)
        time_calls(architecture.model, note_seconds, cache)
        guard(architecture.model, cache, wanted.device)
        cache.start(begun)
        return Session(snapshot, source, architecture, cache)
    except BaseException:
        loader.close()
        snapshot.close()
        raise


def _read_ahead(source: Source, tensors: list[Stored], loader: Loader, wanted: Wanted) -> list[Load]:
    """Starts to read what is probably needed first, while transformers still builds the model."""
    if wanted.max_bytes is not None or budget.nbytes is not None:
        return []
    slots = len(tensors) if wanted.max_layers is None else wanted.max_layers + wanted.ahead
    loads = []
    for name, members in guess_components(tensors).items():
        is_block = name.rpartition(".")[2].isdigit()
        slots -= is_block
        if slots < 0:
            break
        loads.append(Load(name, (lay_out(members), lay_out(())), source, wanted.timeout))
        loader.submit(loads[-1])
    return loads


def _build(snapshot: PinnedSnapshot, tensors: list[Stored], wanted: Wanted) -> Architecture:
    pretrained = load_pretrained(
        snapshot, wanted.auto_class, wanted.model_args, subfolder=wanted.subfolder, timeout=wanted.timeout
    )
    architecture = build(
        pretrained.model_class,
        pretrained.config,
        tensors,
        model_args=pretrained.model_args,
        block_limit=wanted.max_bytes,
    )
    model = architecture.model
    if pretrained.generation_config is not None:
        model.generation_config = pretrained.generation_config
    for place, buffer in architecture.buffers:
        place.put(buffer.to(wanted.device))
    return architecture
