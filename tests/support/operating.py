"""The operator as a process, and ModelCaches on a real API server, as tests of its logic use them."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from time import monotonic, sleep

from support.api_server import free_port

MODELS = "/apis/modelcache.io/v1alpha1/namespaces/{}/modelcaches"


class Operator:
    """The operator's process."""

    def __init__(self, server, log, **environment):
        self.port = free_port()
        self.log = log
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "modelcache_operator"],
                env={
                    **os.environ,
                    "KUBECONFIG": str(server.kubeconfig),
                    "MODELCACHE_IMAGE": "modelcache:test",
                    "MODELCACHE_METRICS_PORT": str(self.port),
                    "PYTHONWARNINGS": "ignore",
                    **environment,
                },
                stderr=errors,
            )

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)

    def metric(self, name):
        """Samples by name and labels; none while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics?name[]={name}", timeout=5) as response:
                lines = response.read().decode().splitlines()
        except OSError:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            return {}
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)}


@contextmanager
def operator(server, tmp_path, **environment):
    running = Operator(server, tmp_path / "operator.log", **environment)
    try:
        yield running
    except BaseException:
        print(running.log.read_text()[-6000:])
        raise
    finally:
        if running.process.poll() is None:
            running.stop()  # gives the Lease back: the next one leads at once
    for line in running.log.read_text().splitlines():
        assert {"time", "level", "logger", "message"} <= json.loads(line).keys(), "logs are JSON, one object a line"


def wait_until(ask, seconds=90):
    deadline = monotonic() + seconds
    while True:
        found = ask()
        if found:
            return found
        if monotonic() > deadline:
            raise TimeoutError("not within the time")
        sleep(0.1)


class ModelCache:
    def __init__(self, server, namespace, name="bert", /, **spec):
        self.server = server
        self.collection = MODELS.format(namespace)
        self.path = f"{self.collection}/{name}"
        self.namespace = namespace
        body = {"repoId": "org/name", **spec}
        server.create(
            self.collection,
            {"apiVersion": "modelcache.io/v1alpha1", "kind": "ModelCache", "metadata": {"name": name}, "spec": body},
        )

    def get(self):
        return self.server.get(self.path)

    def change(self, **spec):
        return self.server.merge(self.path, {"spec": spec})

    def conditions(self):
        cr = self.get()
        generation = cr["metadata"]["generation"]
        return {
            c["type"]: (c["status"], c["reason"])
            for c in cr.get("status", {}).get("conditions", [])
            if c["observedGeneration"] == generation
        }

    def wait_for(self, seconds=90, **conditions):
        def holds():
            now = self.conditions()
            return all(value in now.get(type_, ()) for type_, value in conditions.items())

        try:
            wait_until(holds, seconds)
        except TimeoutError:
            raise AssertionError(json.dumps(self.get().get("status"), indent=1)) from None
        return self.get()

    def children(self):
        kinds = {
            "jobs": "/apis/batch/v1", "deployments": "/apis/apps/v1", "services": "/api/v1", "pods": "/api/v1",
            "persistentvolumeclaims": "/api/v1",
        }  # fmt: skip
        return {
            (plural, item["metadata"]["name"]): item
            for plural, root in kinds.items()
            for item in self.server.get(f"{root}/namespaces/{self.namespace}/{plural}")["items"]
        }
