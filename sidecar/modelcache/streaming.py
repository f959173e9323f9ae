"""Any transformers model whose layers arrive while it computes."""

from __future__ import annotations

import asyncio
import functools
import logging
import threading
import weakref
from typing import TYPE_CHECKING, Any, Self

import torch

from modelcache.arguments import check_layer, check_layers, check_limits, check_model_args
from modelcache.connection import connect
from modelcache.deadline import Deadline
from modelcache.errors import Cancelled, UnsupportedModel
from modelcache.hooks import refuse_copy
from modelcache.session import Session, Wanted, open_session

if TYPE_CHECKING:
    import os
    from collections.abc import Awaitable, Callable, Generator, Sequence
    from types import TracebackType

    from transformers import PreTrainedModel

    from modelcache.connection import PinnedSnapshot

__all__ = ["StreamingModel"]

logger = logging.getLogger("modelcache")


class StreamingModel:
    """A transformers model whose layers are read from a weight server when they are needed.

    The result is the one of transformers' ``from_pretrained`` of the same files, bit for bit, in eval mode. The model
    is pinned to the snapshot that was active when it was made; ``refresh()`` moves it to the one that is active now.

    Args:
        model_name: name of the ModelCache (``bert-base`` is served at ``bert-base-weights:9090``), or its repoId.
        auto_class: an Auto class or model class of transformers, or the name of one.
        cache_size: how many layers stay in memory; None: all.
        address: ``host:port``, several separated by commas; default: the environment's MODELCACHE_ADDRESS.
        token_file: with a bearer token, read anew for each request; default: the environment's MODELCACHE_TOKEN_FILE.
        ca_file: authorities to trust for TLS (PEM); default: MODELCACHE_CA_FILE, else public ones.
        device: where it computes: cpu, or a CUDA GPU.
        cache_bytes: how many bytes of layers stay in memory, instead of or beside cache_size.
        prefetch_count: how many layers are read ahead, on top of those that stay.
        wait_timeout: seconds to wait for a server that is not ready yet.
        timeout: seconds that reading one layer, or 64 MiB of a larger one, may take, whatever happens to servers.
        subfolder: of config and weights in the repo.
        variant: of the weights (``fp16``).
        model_args: as for ``from_pretrained``: dtype, attn_implementation, attributes of the config.

    Attributes:
        model: the transformers model; layers that are not loaded have their parameters on meta.
        config: its config.

    Raises:
        NotReady: there is no server until wait_timeout.
        MissingWeights: the class has weights that the snapshot lacks.
        UnsupportedModel: it cannot be streamed; the message says what works.
        TypeError, ValueError: a limit is no whole number, or too small; so it is when one is set later. An argument of
            ``from_pretrained`` would have no effect here.

    Example:
        >>> with StreamingModel("llama-3b", auto_class="AutoModelForCausalLM", cache_size=4) as model:
        ...     tokens = model.generate(**tokenizer("Once", return_tensors="pt"))
    """

    def __init__(
        self,
        model_name: str = "",
        auto_class: str | type = "AutoModel",
        *,
        cache_size: int | None = 3,
        address: str | None = None,
        token_file: str | os.PathLike[str] | None = None,
        ca_file: str | os.PathLike[str] | None = None,
        device: str | torch.device = "cpu",
        cache_bytes: int | None = None,
        prefetch_count: int = 2,
        wait_timeout: float = 600.0,
        timeout: float = 120.0,
        subfolder: str = "",
        variant: str | None = None,
        **model_args: Any,
    ) -> None:
        check_limits(cache_size, cache_bytes, prefetch_count)
        check_model_args(model_args, streamed=True)
        self.model_name = model_name
        self._wanted = Wanted(
            name=model_name,
            auto_class=auto_class,
            device=device,
            max_layers=cache_size,
            max_bytes=cache_bytes,
            ahead=prefetch_count,
            timeout=timeout,
            subfolder=subfolder,
            variant=variant or "",
            model_args=model_args,
        )
        self._seconds = 0.0
        self._inferences = 0
        self._bytes_per_token = 0.0
        self._warned = False
        self._statistics_lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._moving = threading.Lock()
        self._session = self._open(
            connect(model_name, address=address, token_file=token_file, ca_file=ca_file, wait_timeout=wait_timeout)
        )
        self._finalizer = weakref.finalize(self, self._session.close)

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model itself; what is resident of it is there."""
        if self._finalizer.alive:
            self._session.cache.wait_for_resident()
        return self._model

    @property
    def config(self) -> Any:
        """The model's config."""
        return self._model.config

    @property
    def digest(self) -> str:
        """Of the snapshot that the model is pinned to."""
        return self._session.snapshot.digest

    @property
    def active_digest(self) -> str:
        """Of the snapshot that was active when the server was last asked."""
        return self._session.keeper.active_digest

    @property
    def cache_size(self) -> int | None:
        """How many layers stay in memory; None: all. Can be set at any time."""
        return self._wanted.max_layers

    @cache_size.setter
    def cache_size(self, value: int | None) -> None:
        check_limits(value, self._wanted.max_bytes, self._wanted.ahead)
        self._wanted.max_layers = value
        self._session.cache.resize(max_layers=value, max_bytes=self._wanted.max_bytes)

    @property
    def cache_bytes(self) -> int | None:
        """How many bytes of layers stay in memory; None: no limit. Can be set at any time."""
        return self._wanted.max_bytes

    @cache_bytes.setter
    def cache_bytes(self, value: int | None) -> None:
        check_limits(self._wanted.max_layers, value, self._wanted.ahead)
        self._wanted.max_bytes = value
        self._session.cache.resize(max_layers=self._wanted.max_layers, max_bytes=value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model's forward pass; arguments and result are those of the transformers model."""
        return self._run(lambda model: model(*args, **kwargs))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same as calling the model."""
        return self(*args, **kwargs)

    async def forward_async(
        self, *args: Any, enable_prefetch: bool = True, prefetch_count: int | None = None, **kwargs: Any
    ) -> Any:
        """Runs the forward pass in a thread, so that the event loop goes on.

        Args:
            args: of the transformers model.
            enable_prefetch: whether layers are read ahead.
            prefetch_count: how many; None: as the model was made with.
            kwargs: of the transformers model.
        """
        count = self._wanted.ahead if prefetch_count is None else prefetch_count
        check_limits(None, None, count)
        return await asyncio.to_thread(self._call_reading_ahead, count if enable_prefetch else 0, args, kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates tokens as the transformers model does; each token runs, and so may stream, the whole model.

        ``get_inference_stats()["bytes_per_token"]`` says afterwards what a token costs.

        Raises:
            UnsupportedModel: the model's class cannot generate.
        """
        if not self._model.can_generate():
            raise UnsupportedModel(
                f"{type(self._model).__name__} cannot generate: use a class that can, such as "
                'auto_class="AutoModelForCausalLM".'
            )
        cache = self._session.cache
        if not self._warned and not cache.keeps_all():
            self._warned = True
            streamed = sum(component.nbytes for component in cache.blocks.values()) / 2**20
            logger.warning(
                "%s keeps %s of %d layers, so each token of generate() streams up to %.0f MiB of them again; "
                "cache_size=None keeps all.",
                self.model_name or "The model",
                "some" if self._wanted.max_layers is None else self._wanted.max_layers,
                len(cache.blocks),
                streamed,
            )
        before, calls = cache.wire_bytes(), self._inferences
        result = self._run(lambda model: model.generate(*args, **kwargs))  # type: ignore[operator]
        tokens = max(1, self._inferences - calls)
        self._bytes_per_token = (cache.wire_bytes() - before) / tokens
        return result

    async def warmup(self, layer_indices: Sequence[int] | None = None) -> None:
        """Loads layers ahead of the first pass.

        Args:
            layer_indices: which, counted from 0; None: as many as the cache keeps.

        Raises:
            IndexError: the model has no such layer; negative indices are refused too.
        """
        cache = self._session.cache
        names = list(cache.blocks)
        if layer_indices is not None:
            check_layers("layer_indices", layer_indices, len(names))
        chosen = (
            names[: self._wanted.max_layers] if layer_indices is None else [names[index] for index in layer_indices]
        )
        await asyncio.to_thread(self._load_ahead, chosen)

    async def prefetch_next_layers(self, current_layer: int, prefetch_count: int = 2) -> None:
        """Starts to read the layers after ``current_layer``; at most as many as fit beside those that stay."""
        names = list(self._session.cache.blocks)
        check_layer("current_layer", current_layer, len(names))
        check_limits(None, None, prefetch_count)
        following = [names[(current_layer + step) % len(names)] for step in range(1, prefetch_count + 1)]
        self._session.cache.prefetch_named(following)

    def get_inference_stats(self) -> dict[str, Any]:
        """Counts and times since the model was made.

        Returns:
            total_inferences, avg_inference_time (seconds), cache_hit_rate (hits by all uses of layers, 0 to 1),
            cache_hits, prefetch_hits, cache_misses, wait_time (seconds that passes waited for layers), bytes_received,
            bytes_per_token (of the last generate()), lane ("http", "grpc", "volume").
        """
        counts = self._session.cache.statistics
        uses = counts.hits + counts.prefetched + counts.misses
        with self._statistics_lock:
            inferences, seconds = self._inferences, self._seconds
        return {
            "total_inferences": inferences,
            "avg_inference_time": seconds / inferences if inferences else 0.0,
            "total_inference_time": seconds,
            "cache_hit_rate": counts.hits / uses if uses else 0.0,
            "cache_hits": counts.hits,
            "prefetch_hits": counts.prefetched,
            "cache_misses": counts.misses,
            "wait_time": counts.waited_seconds,
            "bytes_per_token": self._bytes_per_token,
            "bytes_received": self._session.cache.wire_bytes(),
            "lane": self._session.lane,
        }

    def get_cache_info(self) -> dict[str, Any]:
        """What is in memory now.

        Returns:
            cached_components, prefetched_components, resident_components (names), memory_usage_mb (MiB), cache_size
            (layers that are in it), max_cache_size (None: all), max_cache_bytes, access_order (names, oldest use
            first), digest.
        """
        cache = self._session.cache
        used, ahead = cache.contents()
        return {
            "cached_components": used,
            "prefetched_components": ahead,
            "resident_components": cache.resident_here(),
            "memory_usage_mb": cache.held_bytes() / 2**20,
            "cache_size": len(used),
            "max_cache_size": self._wanted.max_layers,
            "max_cache_bytes": self._wanted.max_bytes,
            "access_order": used,
            "digest": self.digest,
        }

    def clear_cache(self) -> None:
        """Drops every layer that no forward pass uses now."""
        self._session.cache.clear()

    def refresh(self, *, timeout: float = 60.0) -> bool:
        """Moves to the snapshot that is active now; passes that run finish on the old one.

        Args:
            timeout: seconds that asking for it may take, whatever happens to servers meanwhile.

        Returns:
            Whether it was another one. ``model`` is then another object.

        Raises:
            Cancelled: after ``cleanup()``.
            Unavailable: no server answered until ``timeout``.
        """
        with self._refreshing:
            return self._refresh(timeout)

    def _refresh(self, timeout: float) -> bool:
        if not self._finalizer.alive:
            raise Cancelled("The model was cleaned up and cannot be refreshed; create it anew.")
        connection = self._session.snapshot.connection
        response = connection.await_revision(self.digest, Deadline(timeout))
        if response.active.digest == self.digest:
            return False
        old = self._session
        new = self._open(old.snapshot.follow(response.active.digest, response.volume_path))
        with self._moving:
            if self._finalizer.detach() is not None:
                self._session = new
                self._finalizer = weakref.finalize(self, new.close)
        if self._session is old:
            new.close()
            raise Cancelled("The model was cleaned up while it was refreshed; create it anew.")
        old.close_when_idle()
        return True

    def cleanup(self) -> Awaitable[None]:
        """Ends all threads and gives the memory back; the model cannot be used afterwards.

        Returns:
            Nothing to wait for: it is there for programs that say ``await model.cleanup()``.
        """
        with self._moving:
            self._finalizer()
        return _Done()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cleanup()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.cleanup)

    def __getattr__(self, name: str) -> Any:
        """Everything else (generate, get_input_embeddings, …) is the transformers model's."""
        if name.startswith("__") or "_finalizer" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if hasattr(self._model, name):
            self._session.cache.wait_for_resident()  # Until then, `device` would be meta.
        attribute = getattr(self._model, name)
        if callable(attribute) and not isinstance(attribute, torch.nn.Module):
            return functools.partial(self._run_method, name)
        return attribute

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._model)})

    __reduce_ex__ = refuse_copy

    def __repr__(self) -> str:
        cache = self._session.cache
        used, _ = cache.contents()
        limit = "all" if self._wanted.max_layers is None else self._wanted.max_layers
        here = f"{len(used)} of {len(cache.blocks)} layers here (cache_size {limit}), "
        here += f"{cache.held_bytes() / 2**20:.0f} MiB"
        state = here if self._finalizer.alive else "cleaned up"
        return f"<{type(self).__name__} {self.model_name!r} {type(self._model).__name__} {self.digest[:12]}: {state}>"

    @property
    def _model(self) -> PreTrainedModel:
        return self._session.architecture.model

    def _call_reading_ahead(self, count: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._session.cache.reading_ahead(count):
            return self(*args, **kwargs)

    def _run_method(self, name: str, *args: Any, **kwargs: Any) -> Any:
        result = self._run(lambda model: getattr(model, name)(*args, **kwargs))
        # eval() and its like return the model; alone it would outlive the session that it reads from.
        return self if result is self._model else result

    def _run(self, call: Callable[[PreTrainedModel], Any]) -> Any:
        session = self._session
        while not session.enter():
            if session is self._session:
                raise Cancelled("The model was cleaned up; create it anew to go on.")
            session = self._session  # refresh() has closed the one before.
        try:
            session.cache.wait_for_resident()
            with torch.no_grad():
                return call(session.architecture.model)
        finally:
            session.leave()

    def _load_ahead(self, names: list[str]) -> None:
        self._session.cache.wait_for_resident()
        self._session.cache.load_ahead(names)

    def _note_inference(self, seconds: float) -> None:
        with self._statistics_lock:
            self._inferences += 1
            self._seconds += seconds

    def _open(self, snapshot: PinnedSnapshot) -> Session:
        return open_session(snapshot, self._wanted, weakref.WeakMethod(self._note_inference))


class _Done:
    """What has happened already, for those who await it."""

    def __await__(self) -> Generator[Any, None, None]:
        yield from ()

    def __repr__(self) -> str:
        return "<done>"  # What a notebook shows for a cell that ends with cleanup().
