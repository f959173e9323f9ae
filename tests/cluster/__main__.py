"""`PYTHONPATH=tests python -m cluster up|down|list|images|component`: the test cluster by hand."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from cluster.components import ORDER
from cluster.images import base_image, pause_image, product_image
from cluster.machine import MachineCluster
from cluster.node import ClusterError, state_root
from cluster.programs import helm, kubernetes_programs


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="cluster", description="A real single-node Kubernetes on this machine, for the tests."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser(
        "up", help="start a cluster, in place of one of the same name, and load the product's images"
    )
    up.add_argument("--bare", action="store_true", help="load none of the product's images")
    down = commands.add_parser("down", help="stop a cluster and remove all of it")
    for command in (up, down):
        command.add_argument("name", nargs="?", default="test")
    commands.add_parser("list", help="list the clusters of this machine")
    build = commands.add_parser("build", help="build the programs and images that a cluster needs, or helm alone")
    build.add_argument("what", nargs="?", choices=["all", "helm"], default="all")
    component = commands.add_parser("component", help="stop, kill, start or restart one component of a running cluster")
    component.add_argument("action", choices=["stop", "kill", "start", "restart"])
    component.add_argument("component", choices=ORDER)
    component.add_argument("name", nargs="?", default="test")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except (ClusterError, subprocess.CalledProcessError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def run(arguments: argparse.Namespace) -> None:
    match arguments.command:
        case "up":
            start(MachineCluster(arguments.name), bare=arguments.bare)
        case "down":
            MachineCluster(arguments.name).stop()
        case "list":
            for folder in sorted(state_root().glob("*/number")):
                cluster = MachineCluster(folder.parent.name)
                print(f"{cluster.name}\t{'running' if cluster.running() else 'dead'}\tKUBECONFIG={cluster.kubeconfig}")
        case "build" if arguments.what == "helm":
            print(helm())
        case "build":
            print(kubernetes_programs(), helm().parent)
            for image in (pause_image(), base_image(), product_image("runtime"), product_image("client")):
                print(image.name, image.archive)
        case "component":
            getattr(MachineCluster(arguments.name), f"{arguments.action}_component")(arguments.component)


def start(cluster: MachineCluster, *, bare: bool) -> None:
    images = [] if bare else [product_image("runtime"), product_image("client")]
    began = time.monotonic()
    cluster.start()
    print(f"ready after {time.monotonic() - began:.1f} s; logs are in {cluster.logs}")
    for image in images:
        cluster.load(image)
        print(f"loaded {image.name}")
    print(f"export KUBECONFIG={cluster.kubeconfig}")


if __name__ == "__main__":
    sys.exit(main())
