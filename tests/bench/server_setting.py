"""A large file of random bytes, served warm with tokens, access log and metrics on, and over TLS; and peers over it."""

import http.client
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.lanes import Target
from bench.registry import Run
from bench.worker import Worker
from support.processes import Child
from support.server_security import AUDIENCE, ISSUER, Issuer, write_certificate
from support.server_volume import HOST, MIB, make_volume, random_bytes, wait_until

NAME = "weights.bin"


@dataclass(frozen=True)
class Served:
    """The file, and servers over it."""

    run: Run
    root: Path
    file: Path
    size: int
    digest: str
    token_file: Path
    options: tuple[str, ...]

    @classmethod
    def make(cls, run: Run, mebibytes: int) -> "Served":
        """Write and publish the file, and a token for it."""
        # Random enough to be incompressible and different in each block; faster to make than fresh bytes throughout.
        seed = random_bytes(4 * MIB + 4096, 1)
        data = b"".join(seed[4 * n : 4 * n + MIB] for n in range(mebibytes))
        volume, snapshot = make_volume(run.folder / "volume", {NAME: data})
        issuer = Issuer()
        issuer.add_ec("bench")
        keys = issuer.publish(run.folder / "jwks.json")
        options = (
            "--token-key-set", str(keys), "--token-issuer", ISSUER, "--token-audience", AUDIENCE,
            "--allow", "default/reader", "--cache-size", f"{-(-mebibytes // 4) * 4 + 64}Mi",
        )  # fmt: skip
        token_file = run.folder / "token"
        token_file.write_text(issuer.token(seconds=3600))
        blob = snapshot.blob_path(snapshot.file(NAME))
        return cls(run, volume.root, blob, len(data), snapshot.digest, token_file, options)

    def serve(self, *options: str, module: str = "modelcache_server") -> tuple[Child, dict[str, int]]:
        """Start the program, warm; it and its ports (grpc, http, status)."""
        anywhere = ("--host", HOST, "--port", "0", "--http-port", "0", "--status-port", "0")
        command = (*anywhere, "--log-format", "text", *self.options, *options)
        server = self.run.closing.enter_context(Child.module(module, self.root, *command))
        found = server.wait_for(r"listening \S+ grpc=(\d+) http=(\d+) status=(\d+)")
        ports = dict(zip(("grpc", "http", "status"), map(int, found.groups()), strict=True))
        wait_until(lambda: _ready(ports["status"]), "the server does not become ready", 60)
        return server, ports

    def certificate(self) -> tuple[Path, Path]:
        """A certificate for this machine, and its key."""
        return write_certificate(self.run.folder)

    def target(self, lane: str, port: int, certificate: Path | str = "") -> Target:
        """Our file over one of our lanes."""
        return Target(lane, port, self.digest, NAME, str(self.token_file), str(certificate))

    def peer(self, name: str, *arguments: Path) -> tuple[int, int]:
        """Start `bench.peers.NAME` over the file: (port, process id)."""
        child = self.run.closing.enter_context(Child.module(f"bench.peers.{name}", self.file, *arguments))
        return int(child.wait_for(r"^port (\d+)$")[1]), child.pid

    def reader(
        self, target: Target, pid: int, *, range_mib: int, connections: int, measure: str = "rate", size: int = 0
    ) -> Worker:
        """A process that reads it."""
        task = {
            "target": asdict(target),
            "size": size or self.size,
            "range_bytes": range_mib * MIB,
            "connections": connections,
            "measure": measure,
            "server_pid": pid,
        }
        return self.run.closing.enter_context(Worker("read_ranges", json.dumps(task)))


def _ready(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    finally:
        connection.close()


def peak_resident_mib(pid: int) -> float:
    """The most memory that a process has had resident so far."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024
