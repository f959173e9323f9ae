"""The server from Python, as Surfing Weights' users call it."""

import asyncio
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from modelcache_server.server import Addresses, Server
from modelcache_server.settings import MAX_PORT, RedisSettings, ServerSettings, cache_bytes_of

_READY_SECONDS = 600.0
_MAX_CACHE_MIB = 1 << 24


class WeightServer:
    """Serves a volume, or a plain folder of safetensors files.

    Args:
        model_path: the folder.
        chunks_dir: another name for it.
        cache_size_mb: memory for blocks in MiB; rounded up to 4 MiB, at least 64.
        port: gRPC; 0 takes a free one.
        http_port: bytes over HTTP.
        status_port: /healthz, /readyz, /metrics.
        host: address to listen on.
        name: whose active revision of a volume is served; empty: the only one.
        redis_url: a second tier that replicas share; empty: none.

    Raises:
        ValueError: not exactly one folder was named, or a number is out of its range.
        VolumeError: it cannot be served.
    """

    def __init__(
        self,
        model_path: str | Path | None = None,
        chunks_dir: str | Path | None = None,
        cache_size_mb: int = 1024,
        port: int = 9090,
        *,
        http_port: int = 8080,
        status_port: int = 9091,
        host: str = "0.0.0.0",  # noqa: S104 - as in a pod
        name: str = "",
        redis_url: str = "",
    ) -> None:
        _check("cache_size_mb", cache_size_mb, 1, _MAX_CACHE_MIB)
        for argument, value in (("port", port), ("http_port", http_port), ("status_port", status_port)):
            _check(argument, value, 0, MAX_PORT)
        self._server = Server(
            ServerSettings(
                root=_one_folder(model_path, chunks_dir),
                name=name,
                host=host,
                grpc_port=port,
                http_port=http_port,
                status_port=status_port,
                cache_bytes=cache_bytes_of(cache_size_mb),
                redis=RedisSettings(redis_url) if redis_url else None,
            )
        )
        self._addresses: Addresses | None = None

    @property
    def addresses(self) -> Addresses:
        """The ports of a started server."""
        if self._addresses is None:
            raise RuntimeError("The server was not started: call start() first.")
        return self._addresses

    def start(self) -> Addresses:
        """Listen, warm up, and return when ready.

        Raises:
            ServerError: a port is in use.
            TimeoutError: nothing became active.
        """
        self._addresses = self._server.start()
        if not self._server.wait_ready(_READY_SECONDS):
            problem = self._server.problem
            self._server.stop(grace=0)
            raise TimeoutError(f"The server did not become ready: {problem}")
        return self._addresses

    def stop(self, grace: float = 10.0) -> None:
        """Finish what runs within `grace` seconds and stop."""
        self._server.stop(grace)

    async def start_server(self) -> None:
        """Serve until the task is cancelled."""
        await asyncio.to_thread(self.start)
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await asyncio.to_thread(self.stop)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class AdvancedWeightServer(WeightServer):
    """A WeightServer whose blocks are shared with other replicas through Redis.

    Args:
        chunks_dir: a volume, or a plain folder of safetensors files.
        redis_url: redis://, rediss:// or unix:// URL.
        cache_size_mb: memory for blocks in MiB.
        options: as for WeightServer.
    """

    def __init__(
        self, chunks_dir: str | Path, redis_url: str, cache_size_mb: int = 1024, port: int = 9090, **options: Any
    ) -> None:
        super().__init__(chunks_dir=chunks_dir, redis_url=redis_url, cache_size_mb=cache_size_mb, port=port, **options)


def _one_folder(model_path: str | Path | None, chunks_dir: str | Path | None) -> Path:
    if (model_path is None) == (chunks_dir is None):
        raise ValueError("Name one folder: model_path=… or chunks_dir=….")
    return Path(model_path if model_path is not None else str(chunks_dir))


def _check(argument: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{argument} must be a whole number from {least} to {most}, not {value!r}.")
