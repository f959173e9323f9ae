"""What runs on the node and how: pure functions from paths and addresses to commands and configuration files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from cluster.node import NODE_NAME, Addresses

PAUSE_IMAGE = "localhost/pause:1"
# In the node's own /run and /var: see supervisor.arrange_mounts.
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
PROVISIONER = "volumes.modelcache.test"
# Started in this order, each when the one before answers.
ORDER = (
    "etcd",
    "kube-apiserver",
    "containerd",
    "kube-controller-manager",
    "kube-scheduler",
    "kubelet",
    "kube-proxy",
    "coredns",
    "volume-provisioner",
)


@dataclass(frozen=True)
class Paths:
    """Where a cluster keeps what its components read."""

    state: Path
    programs: Path

    @property
    def pki(self) -> Path:
        return self.state / "pki"

    @property
    def config(self) -> Path:
        return self.state / "config"

    @property
    def volumes(self) -> Path:
        return self.state / "volumes"


def commands(paths: Paths, addresses: Addresses) -> dict[str, list[str]]:
    """The command of every component by name."""
    pki, config = paths.pki, paths.config

    def program(name: str, *flags: str) -> list[str]:
        return [str(paths.programs / name), *flags]

    def as_itself(name: str) -> list[str]:
        return [f"--kubeconfig={pki}/{name}.conf"]

    def delegating(name: str) -> list[str]:
        return [
            f"--{use}={pki}/{name}.conf"
            for use in ("kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig")
        ]

    etcd_url, etcd_peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
    return {
        "etcd": [
            *(
                "etcd",
                "--data-dir=/var/lib/etcd",
                f"--listen-client-urls={etcd_url}",
                f"--advertise-client-urls={etcd_url}",
            ),
            *(
                f"--listen-peer-urls={etcd_peer}",
                f"--initial-advertise-peer-urls={etcd_peer}",
                f"--initial-cluster=default={etcd_peer}",
            ),
            "--unsafe-no-fsync",  # a cluster that loses power is made anew
        ],
        "kube-apiserver": program("kube-apiserver", *api_server_flags(pki, addresses, etcd_url)),
        "containerd": ["containerd", f"--config={config}/containerd.toml"],
        "kube-controller-manager": program(
            "kube-controller-manager",
            *delegating("kube-controller-manager"),
            f"--root-ca-file={pki}/ca.crt",
            f"--service-account-private-key-file={pki}/service-accounts.key",
            f"--cluster-signing-cert-file={pki}/ca.crt",
            f"--cluster-signing-key-file={pki}/ca.key",
            "--use-service-account-credentials",
            "--leader-elect=false",
        ),
        "kube-scheduler": program("kube-scheduler", *delegating("kube-scheduler"), "--leader-elect=false"),
        "kubelet": program(
            "kubelet",
            *as_itself("kubelet"),
            f"--config={config}/kubelet.json",
            f"--hostname-override={NODE_NAME}",
            f"--node-ip={addresses.node}",
        ),
        "kube-proxy": program(
            "kube-proxy",
            *as_itself("kube-proxy"),
            f"--hostname-override={NODE_NAME}",
            f"--cluster-cidr={addresses.pods}",
            f"--healthz-bind-address={addresses.node}:10256",
            "--proxy-mode=nftables",
            "--conntrack-max-per-core=0",  # the machine's setting is not the node's to change
        ),
        "coredns": program("coredns", "-conf", f"{config}/Corefile"),
        "volume-provisioner": program(
            "volume-provisioner", *as_itself("admin"), f"--root={paths.volumes}", f"--node={NODE_NAME}"
        ),
    }


def api_server_flags(pki: Path, addresses: Addresses, etcd_url: str) -> list[str]:
    return [
        f"--etcd-servers={etcd_url}",
        f"--advertise-address={addresses.node}",
        "--secure-port=6443",
        f"--tls-cert-file={pki}/kube-apiserver.crt",
        f"--tls-private-key-file={pki}/kube-apiserver.key",
        f"--client-ca-file={pki}/ca.crt",
        # Nobody has a front proxy's certificate; controllers complain without the setting.
        f"--requestheader-client-ca-file={pki}/ca.crt",
        "--requestheader-allowed-names=front-proxy",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={pki}/service-accounts.key",
        f"--service-account-signing-key-file={pki}/service-accounts.key",
        f"--service-cluster-ip-range={addresses.services}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        f"--kubelet-client-certificate={pki}/kubelet-client.crt",
        f"--kubelet-client-key={pki}/kubelet-client.key",
        "--kubelet-preferred-address-types=InternalIP",  # the node's name is in no DNS
        "--allow-privileged=true",
    ]


def files(paths: Paths, addresses: Addresses, cgroup: str) -> dict[str, str]:
    """The text of every configuration file by name."""
    return {
        "kubelet.json": json.dumps(kubelet(paths, addresses, cgroup), indent=2),
        "containerd.toml": containerd(paths),
        "cni/10-pods.conflist": json.dumps(pod_network(addresses), indent=2),
        "Corefile": corefile(paths, addresses),
    }


def kubelet(paths: Paths, addresses: Addresses, cgroup: str) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{paths.pki}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "address": addresses.node,
        "healthzBindAddress": addresses.node,
        "tlsCertFile": f"{paths.pki}/kubelet.crt",
        "tlsPrivateKeyFile": f"{paths.pki}/kubelet.key",
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{cgroup}",
        "enforceNodeAllocatable": [],
        "oomScoreAdj": 0,  # a lower one needs a capability that containers and sandboxes lack
        "failSwapOn": False,
        "clusterDNS": [addresses.node],
        "clusterDomain": "cluster.local",
        "resolvConf": "",  # pods ask the cluster's DNS only: no name of the world resolves
        "podCIDR": addresses.pods,
        "syncFrequency": "5s",
        # The machine's disk is not the cluster's: nothing is evicted, and no image removed, because others filled it.
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
        "evictionHard": {"nodefs.available": "0%", "imagefs.available": "0%", "memory.available": "100Mi"},
    }


def containerd(paths: Paths) -> str:
    return f"""\
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
address = "{CONTAINERD_SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE_IMAGE}"
restrict_oom_score_adj = true  # else no pod starts without CAP_SYS_RESOURCE
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{paths.config}/cni"
"""


def pod_network(addresses: Addresses) -> dict[str, object]:
    """A bridge on the node. There is no masquerading: pods talk to each other and to the node."""
    ipam = {
        "type": "host-local",
        "ranges": [[{"subnet": addresses.pods}]],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": "/var/lib/cni/networks",
    }
    bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": False, "hairpinMode": True, "ipam": ipam}
    return {
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}],
    }


def corefile(paths: Paths, addresses: Addresses) -> str:
    return f"""\
.:53 {{
  bind {addresses.node}
  errors
  cache 5
  kubernetes cluster.local in-addr.arpa ip6.arpa {{
    kubeconfig {paths.pki}/admin.conf
    ttl 5
  }}
}}
"""


def storage_classes() -> list[dict[str, object]]:
    """`sized`, the default, grows; `fixed` does not; `shared` offers ReadWriteMany on every node."""
    here = [{"matchLabelExpressions": [{"key": "kubernetes.io/hostname", "values": [NODE_NAME]}]}]

    def storage_class(name: str, *, default: bool = False, **fields: object) -> dict[str, object]:
        return {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {
                "name": name,
                "annotations": {"storageclass.kubernetes.io/is-default-class": str(default).lower()},
            },
            "provisioner": PROVISIONER,
            "reclaimPolicy": "Delete",
            "volumeBindingMode": "WaitForFirstConsumer",
            **fields,
        }

    return [
        storage_class("sized", default=True, allowVolumeExpansion=True, allowedTopologies=here),
        storage_class("fixed", allowVolumeExpansion=False, allowedTopologies=here),
        storage_class("shared", allowVolumeExpansion=True, parameters={"shared": "true"}),
    ]
