"""A cluster that somebody else runs: the same tests, without those that stop the cluster's own components."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from cluster.images import TARGETS, Image, base_image
from cluster.kubectl import Kubectl
from cluster.node import ClusterError


class GivenCluster:
    """The cluster of a kubeconfig.

    A kind cluster gets the images that are built here. For any other one the environment names images that it can pull:
    MODELCACHE_IMAGE, MODELCACHE_CLIENT_IMAGE and MODELCACHE_BASE_IMAGE (Python with a shell).
    """

    def __init__(self, kubeconfig: Path) -> None:
        program = shutil.which("kubectl")
        if program is None:
            raise ClusterError("KUBECONFIG is set, but there is no kubectl on PATH")
        self.kubeconfig = kubeconfig
        self.kubectl = Kubectl(Path(program), kubeconfig)
        self.name = self.kubectl("config", "current-context").strip()

    def load(self, image: Image) -> None:
        """Gives every node an image, on kind."""
        if not self.name.startswith("kind-"):
            raise ClusterError(
                f"cannot load images into {self.name}: push them yourself and name them in MODELCACHE_…IMAGE"
            )
        subprocess.run(
            ["kind", "load", "image-archive", str(image.archive), f"--name={self.name.removeprefix('kind-')}"],
            check=True,
        )

    def load_base(self) -> str:
        """The name of an image with Python and a shell."""
        if named := os.environ.get("MODELCACHE_BASE_IMAGE"):
            return named
        image = base_image()
        self.load(image)
        return image.name

    def in_network(self, argv: Sequence[str]) -> list[str]:
        """Not possible: its network is elsewhere. Use Kubectl.port_forward, which works everywhere."""
        raise ClusterError(f"{argv[0]} cannot run in the network of {self.name}")


def named_image(target: str) -> str | None:
    """The product's image that the environment names for a given cluster."""
    return (
        os.environ.get({"runtime": "MODELCACHE_IMAGE", "client": "MODELCACHE_CLIENT_IMAGE"}[target])
        if target in TARGETS
        else None
    )
