"""A real weight server over a really fetched volume, as a program of its own."""

from pathlib import Path
from typing import Self

from modelcache_api.resource import ModelCacheSpec
from modelcache_fetcher import FetchResult, run_fetch
from support.processes import Child


def fetch_folder(folder: Path, volume_root: Path, name: str) -> FetchResult:
    """Bring a local folder's files onto a volume, as `modelcache fetch` does, and make them active under `name`."""
    return run_fetch(ModelCacheSpec.model_validate({"repoId": f"file://{folder.resolve()}"}), volume_root, name)


class ServerProcess(Child):
    """`modelcache-server` on free ports of this machine; in the context it is warm and ready.

    Attributes:
        grpc_port: what clients are told as their address.
        http_port: the bytes' lane.
        status_port: health and metrics.
    """

    @classmethod
    def over(cls, volume_root: Path, *options: str) -> Self:
        """Start it over a volume, with further options of its command line."""
        ports = ("--host", "127.0.0.1", "--port", "0", "--http-port", "0", "--status-port", "0")
        return cls.module("modelcache_server", volume_root, *ports, *options)

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            found = self.wait_for(r"listening .*grpc=(\d+) http=(\d+) status=(\d+)")
            self.grpc_port, self.http_port, self.status_port = map(int, found.groups())
            self.wait_for(r"serving name=")
        except BaseException:
            self.kill()
            raise
        return self

    @property
    def address(self) -> str:
        """What a client takes as address=."""
        return f"127.0.0.1:{self.grpc_port}"
