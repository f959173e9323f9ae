"""A real Kubernetes API server (with etcd, without nodes) on loopback: what schema, CEL and server-side apply do."""

import json
import shutil
import socket
import ssl
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

import yaml

from cluster.programs import kubernetes_programs

TOKEN = "admin-of-a-throw-away-server"
START_SECONDS = 90


class Refused(Exception):
    """The API server answered with an error; the message is the Status object's."""

    def __init__(self, status, message):
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


@dataclass
class ApiServer:
    """Where it listens, and how to ask it."""

    url: str
    folder: Path
    command: list[str]
    context: ssl.SSLContext = field(default_factory=ssl._create_unverified_context)
    process: subprocess.Popen[bytes] | None = None

    @property
    def kubeconfig(self) -> Path:
        path = self.folder / "kubeconfig"
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "c", "cluster": {"server": self.url, "insecure-skip-tls-verify": True}}],
                    "users": [{"name": "u", "user": {"token": TOKEN}}],
                    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
                    "current-context": "x",
                }
            )
        )
        return path

    @property
    def headers(self) -> dict[str, str]:
        """What makes a request the administrator's."""
        return {"Authorization": f"Bearer {TOKEN}"}

    def request(self, method, path, body=None, content_type="application/json"):
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={**self.headers, "Content-Type": content_type},
        )
        try:
            with urllib.request.urlopen(request, context=self.context, timeout=30) as response:
                return json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            raw = error.read()
            try:
                message = json.loads(raw)["message"]
            except (ValueError, KeyError, TypeError):
                message = raw.decode(errors="replace")
            raise Refused(error.code, message) from None

    def create(self, path, body):
        return self.request("POST", path, body)

    def get(self, path):
        return self.request("GET", path)

    def apply(self, path, body, manager="test"):
        return self.request("PATCH", f"{path}?fieldManager={manager}&force=true", body, "application/apply-patch+yaml")

    def merge(self, path, body):
        return self.request("PATCH", path, body, "application/merge-patch+json")

    def delete(self, path):
        return self.request("DELETE", path)

    def start(self):
        """Start it and wait until it answers."""
        log = self.folder / "kube-apiserver.log"
        with log.open("a") as output:
            self.process = subprocess.Popen(self.command, stdout=output, stderr=output, cwd=self.folder)

        def ready():
            if self.process.poll() is not None:
                raise RuntimeError(f"kube-apiserver ended with {self.process.returncode}: {log.read_text()[-2000:]}")
            return self.get("/apis/apps/v1")

        _wait_until(ready, "the API server did not come up")
        _wait_until(lambda: self.get("/api/v1/namespaces/default"), "no default namespace")

    def kill(self):
        """End it at once, as a machine that fails does; etcd goes on."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def install_crd(self, definition):
        """Create the CRD and wait until it is served."""
        self.apply(
            f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{definition['metadata']['name']}", definition
        )
        spec = definition["spec"]
        collection = f"/apis/{spec['group']}/{spec['versions'][0]['name']}/{spec['names']['plural']}"
        _wait_until(lambda: self.get(collection), "the CRD is not served")


def _wait_until(ask, complaint, seconds=START_SECONDS):
    deadline = monotonic() + seconds
    while True:
        try:
            return ask()
        except (OSError, Refused) as error:
            if monotonic() > deadline:
                raise TimeoutError(f"{complaint} within {seconds} s: {error}") from error
        sleep(0.1)


def free_port():
    """A port of loopback that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def _process(folder, name, *arguments):
    with (folder / f"{name}.log").open("w") as log:
        process = subprocess.Popen(arguments, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def api_server() -> Iterator[ApiServer]:
    """Start etcd and kube-apiserver on free ports of loopback; stop them at the end and leave nothing."""
    programs = kubernetes_programs()
    etcd = shutil.which("etcd") or "/usr/bin/etcd"
    folder = Path(tempfile.mkdtemp(prefix="modelcache-apiserver-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        client, peer, port = (free_port() for _ in range(3))
        (folder / "tokens.csv").write_text(f"{TOKEN},admin,admin,system:masters\n")
        subprocess.run(["openssl", "genrsa", "-out", str(folder / "sa.key"), "2048"], check=True, capture_output=True)
        stack.enter_context(
            _process(
                folder,
                "etcd",
                etcd,
                "--data-dir",
                str(folder / "etcd"),
                "--unsafe-no-fsync",
                f"--listen-client-urls=http://127.0.0.1:{client}",
                f"--advertise-client-urls=http://127.0.0.1:{client}",
                f"--listen-peer-urls=http://127.0.0.1:{peer}",
            )
        )
        command = [
            str(programs / "kube-apiserver"),
            f"--etcd-servers=http://127.0.0.1:{client}",
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            f"--cert-dir={folder / 'certs'}",
            f"--token-auth-file={folder / 'tokens.csv'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--endpoint-reconciler-type=none",
            f"--service-account-key-file={folder / 'sa.key'}",
            f"--service-account-signing-key-file={folder / 'sa.key'}",
            "--service-cluster-ip-range=10.96.0.0/16",
            "--authorization-mode=RBAC",
            "--disable-admission-plugins=ServiceAccount",
        ]
        running = ApiServer(f"https://127.0.0.1:{port}", folder, command)
        stack.callback(running.kill)
        running.start()
        yield running


CONTROLLERS = (
    "job-controller",
    "deployment-controller",
    "replicaset-controller",
    "garbage-collector-controller",
    "namespace-controller",
    "persistentvolumeclaim-protection-controller",
    "resourcequota-controller",
)


@contextmanager
def controllers(server: ApiServer) -> Iterator[None]:
    """Run the real controllers that make pods of Jobs and Deployments and collect garbage."""
    programs = kubernetes_programs()
    with _process(
        server.folder,
        "kube-controller-manager",
        str(programs / "kube-controller-manager"),
        f"--kubeconfig={server.kubeconfig}",
        f"--controllers={','.join(CONTROLLERS)}",
        "--leader-elect=false",
        f"--secure-port={free_port()}",
        f"--cert-dir={server.folder / 'kcm-certs'}",
    ):
        yield
