"""Plays kubelet and volume provisioner against a real API server: pods end or become ready as a test says."""

import json
import threading
from collections import Counter
from time import sleep, time

from modelcache_operator.clock import format_time
from support.api_server import Refused

COMMITS = {"main": "a" * 40, "v2": "b" * 40, "v3": "c" * 40}
MIB = 2**20


class FakeNode:
    """Watches pods and claims by polling and writes their status, as kubelet and provisioner do.

    Attributes:
        ran: How many pods ended, by (component, revision).
        failures: (reason, exit code) with which pods of a (component, revision) end.
        hold: Components whose pods are left alone.
        stuck: By component, (image, status): pods with this image get this status and stay so.
    """

    def __init__(self, server, *, pause=0.1):
        self.server = server
        self.pause = pause
        self.ran = Counter()
        self.failures = {}
        self.hold = set()
        self.stuck = {}
        self._done = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _run(self):
        while not self._stop.wait(self.pause):
            try:
                for claim in self.server.get("/api/v1/persistentvolumeclaims")["items"]:
                    self._bind(claim)
                for pod in self.server.get("/api/v1/pods")["items"]:
                    self._advance(pod)
            except (Refused, OSError):
                sleep(0.2)  # the server is being restarted, or the object changed: look again

    def _bind(self, claim):
        asked = claim["spec"]["resources"]["requests"]["storage"]
        if (claim.get("status", {}).get("capacity") or {}).get("storage") == asked:
            return
        path = f"/api/v1/namespaces/{claim['metadata']['namespace']}/persistentvolumeclaims/{claim['metadata']['name']}"
        if not claim["spec"].get("volumeName"):
            self.server.merge(path, {"spec": {"volumeName": f"pv-{claim['metadata']['uid']}"}})
        status = {"phase": "Bound", "capacity": {"storage": asked}, "accessModes": claim["spec"]["accessModes"]}
        self.server.merge(f"{path}/status", {"status": status})

    def _advance(self, pod):
        metadata = pod["metadata"]
        component = metadata.get("labels", {}).get("modelcache.io/component")
        if metadata["uid"] in self._done or metadata.get("deletionTimestamp"):
            return
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/status"
        if component in self.stuck and pod["spec"]["containers"][0]["image"] == self.stuck[component][0]:
            if "podIP" not in pod["status"] and not pod["status"].get("containerStatuses"):
                self.server.merge(path, {"status": self.stuck[component][1]})
            return
        if component in self.hold:
            return
        self.server.merge(path, {"status": self._status(pod, component)})
        self._done.add(metadata["uid"])

    def _status(self, pod, component):
        now = format_time(time())
        if component == "server":
            ready = {"type": "Ready", "status": "True", "lastTransitionTime": now}
            # an address of its own: a weight server that this machine runs beside the tests must not answer for it
            return {"phase": "Running", "podIP": "127.9.0.1", "conditions": [ready]}
        [container] = pod["spec"]["containers"]
        spec = json.loads(container["env"][0]["value"])
        commit = COMMITS[spec.get("revision", "main")]
        failure = self.failures.get((component, spec.get("revision", "main")))
        self.ran[component, spec.get("revision", "main")] += 1
        if failure:
            reason, code = failure
            message = {"result": "failed", "reason": reason, "permanent": True, "message": f"{reason} happened."}
        elif component == "plan":
            code, message = 0, {"result": "planned", "commit": commit, "files": 3, "bytes": 100 * MIB}
        else:
            code, message = 0, {
                "result": "fetched", "digest": commit[0] * 64, "commit": commit, "files": 3, "bytes": 100 * MIB,
                "downloadedBytes": 100 * MIB, "generation": 1,
            }  # fmt: skip
        terminated = {"exitCode": code, "message": json.dumps(message), "startedAt": now, "finishedAt": now}
        status = {
            "name": container["name"], "image": container["image"], "imageID": "", "ready": False, "restartCount": 0,
            "state": {"terminated": terminated},
        }  # fmt: skip
        return {"phase": "Failed" if code else "Succeeded", "containerStatuses": [status]}
