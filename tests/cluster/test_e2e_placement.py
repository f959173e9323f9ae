"""Where servers go: together with a volume of one node, spread with one of many. A second Node shows the decisions."""

from __future__ import annotations

import pytest

from cluster.kubectl import Kubectl
from cluster.node import NODE_NAME, wait_until
from cluster.product import Hub, Model
from cluster.second_node import second_node

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("installed")]


def server_nodes(namespace: Kubectl) -> list[str]:
    pods = namespace.list("pods", "modelcache.io/name=bert,modelcache.io/component=server")
    return sorted(pod["spec"].get("nodeName", "") for pod in pods)


def test_servers_of_a_read_write_once_volume_share_its_node(hub: Hub, namespace: Kubectl, kubectl: Kubectl) -> None:
    hub.commit(1)
    Model(namespace, hub).wait()
    with second_node(kubectl) as other:
        namespace("scale", "mc/bert", "--replicas=3")
        wait_until("all three are on a node", 60, lambda: len([node for node in server_nodes(namespace) if node]) == 3)
        assert server_nodes(namespace) == [NODE_NAME] * 3
        assert other != NODE_NAME


def test_servers_of_a_read_write_many_volume_spread_over_nodes(hub: Hub, namespace: Kubectl, kubectl: Kubectl) -> None:
    hub.commit(1)
    storage = {"storageClassName": "shared", "accessModes": ["ReadWriteMany"]}
    Model(namespace, hub, storage=storage).wait()
    with second_node(kubectl) as other:
        namespace("scale", "mc/bert", "--replicas=2")
        wait_until("one is on each node", 60, lambda: server_nodes(namespace) == sorted([NODE_NAME, other]))
