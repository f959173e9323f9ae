"""The cluster's certificates and the kubeconfigs that hold them, made anew for each with the openssl command."""

from __future__ import annotations

import base64
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from cluster.node import NODE_NAME, Addresses


@dataclass(frozen=True)
class Identity:
    """Who a certificate says its holder is, in Kubernetes' terms."""

    file: str
    user: str
    group: str = ""
    names: tuple[str, ...] = ()

    @property
    def subject(self) -> str:
        return (f"/O={self.group}" if self.group else "") + f"/CN={self.user}"


def identities(addresses: Addresses) -> list[Identity]:
    """Every certificate of the cluster."""
    api_names = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "localhost",
    ]
    api_addresses = [addresses.node, addresses.api_service, "127.0.0.1"]
    return [
        Identity("kube-apiserver", "kube-apiserver", "", (*dns(*api_names), *ip(*api_addresses))),
        Identity("kubelet-client", "kube-apiserver-kubelet-client", "system:masters"),
        Identity("admin", "admin", "system:masters"),
        Identity("kube-controller-manager", "system:kube-controller-manager"),
        Identity("kube-scheduler", "system:kube-scheduler"),
        Identity("kube-proxy", "system:kube-proxy"),
        Identity("kubelet", f"system:node:{NODE_NAME}", "system:nodes", (*dns(NODE_NAME), *ip(addresses.node))),
    ]


def dns(*names: str) -> tuple[str, ...]:
    return tuple(f"DNS:{name}" for name in names)


def ip(*addresses: str) -> tuple[str, ...]:
    return tuple(f"IP:{address}" for address in addresses)


def make_pki(folder: Path, addresses: Addresses) -> None:
    """Writes NAME.crt and NAME.key of every identity, NAME.conf to call the API as it, and the tokens' key."""
    folder.mkdir(parents=True)
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-days", "30"]
    openssl(folder, "req", "-x509", *new_key, "-subj", "/CN=test-cluster", "-out", "ca.crt", "-keyout", "ca.key")
    # Tokens are signed with RSA, as clusters do that kubeadm or a cloud set up: who verifies them must know RS256.
    openssl(folder, "genrsa", "-out", "service-accounts.key", "2048")
    for identity in identities(addresses):
        names = ",".join(identity.names or dns(identity.file))
        openssl(
            folder,
            *("req", "-x509", "-CA", "ca.crt", "-CAkey", "ca.key", *new_key, "-subj", identity.subject),
            *("-addext", f"subjectAltName={names}", "-addext", "extendedKeyUsage=serverAuth,clientAuth"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
            *("-out", f"{identity.file}.crt", "-keyout", f"{identity.file}.key"),
        )
        kubeconfig = folder / f"{identity.file}.conf"
        kubeconfig.touch(mode=0o600)
        kubeconfig.write_text(json.dumps(kubeconfig_of(folder, identity, f"https://{addresses.node}:6443"), indent=2))


def kubeconfig_of(folder: Path, identity: Identity, server: str) -> dict[str, object]:
    """A kubeconfig without references to other files (JSON is YAML)."""

    def content(name: str) -> str:
        return base64.b64encode((folder / name).read_bytes()).decode()

    user = {
        "client-certificate-data": content(f"{identity.file}.crt"),
        "client-key-data": content(f"{identity.file}.key"),
    }
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": {"server": server, "certificate-authority-data": content("ca.crt")}}],
        "users": [{"name": identity.file, "user": user}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": identity.file}}],
        "current-context": "test",
    }


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)
