"""kubectl for tests: answers as parsed JSON, waits for conditions, errors that say what kubectl said."""

from __future__ import annotations

import json
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.node import ClusterError, wait_until

Resource = dict[str, Any]


class KubectlError(ClusterError):
    """kubectl ended with an error; `stderr` is what it said."""

    def __init__(self, argv: list[str], stderr: str) -> None:
        super().__init__(f"kubectl {' '.join(argv)}: {stderr.strip()}")
        self.stderr = stderr


@dataclass(frozen=True)
class Kubectl:
    """Calls kubectl with one kubeconfig, and in `namespace` when there is one."""

    program: Path
    kubeconfig: Path
    namespace: str | None = None
    as_user: str | None = None

    def within(self, namespace: str) -> Kubectl:
        return replace(self, namespace=namespace)

    def new_namespace(self, readable: str) -> Kubectl:
        """Creates a namespace whose name begins so; returns kubectl within it, once pods can be made there."""
        name = f"{readable}-{uuid.uuid4().hex[:6]}"
        self("create", "namespace", name)
        within = self.within(name)
        within.wait_for("serviceaccount", "default", lambda _: True)
        return within

    def impersonating(self, user: str) -> Kubectl:
        """The same as another user, such as system:serviceaccount:NAMESPACE:NAME."""
        return replace(self, as_user=user)

    def argv(self, *arguments: str) -> list[str]:
        namespace = [f"--namespace={self.namespace}"] if self.namespace else []
        user = [f"--as={self.as_user}"] if self.as_user else []
        return [str(self.program), f"--kubeconfig={self.kubeconfig}", *namespace, *user, *arguments]

    def __call__(self, *arguments: str, stdin: str | None = None, timeout: float = 60) -> str:
        """What kubectl printed; KubectlError when it failed or took longer than `timeout` seconds."""
        try:
            done = subprocess.run(
                self.argv(*arguments), input=stdin, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired as late:
            raise KubectlError(list(arguments), f"no answer within {timeout:g} s") from late
        if done.returncode:
            raise KubectlError(list(arguments), done.stderr)
        return done.stdout

    def json(self, *arguments: str) -> Resource:
        """The parsed output of a command that knows `--output=json`."""
        answer: Resource = json.loads(self(*arguments, "--output=json"))
        return answer

    def get(self, kind: str, name: str) -> Resource | None:
        """The object, or None when there is none."""
        printed = self("get", kind, name, "--output=json", "--ignore-not-found")
        return json.loads(printed) if printed.strip() else None

    def list(self, kind: str, selector: str = "") -> list[Resource]:
        """All objects of a kind in the namespace, or of those that the label selector takes."""
        items: list[Resource] = self.json("get", kind, f"--selector={selector}")["items"]
        return items

    def apply(self, *objects: Mapping[str, Any], server_side: bool = False) -> None:
        """Creates or updates the objects."""
        documents = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
        self(
            "apply",
            *(["--server-side", "--force-conflicts"] if server_side else []),
            "--filename=-",
            stdin=json.dumps(documents),
        )

    def patch(self, kind: str, name: str, change: Mapping[str, Any], *, subresource: str = "") -> None:
        """Applies a JSON merge patch."""
        subresources = [f"--subresource={subresource}"] if subresource else []
        self("patch", kind, name, "--type=merge", f"--patch={json.dumps(change)}", *subresources)

    def delete(self, kind: str, name: str, *, wait: bool = True) -> None:
        """Deletes an object if it is there, and waits until it is gone unless told not to."""
        self("delete", kind, name, "--ignore-not-found", f"--wait={str(wait).lower()}", timeout=120)

    def wait_for(self, kind: str, name: str, condition: Callable[[Resource], Any], *, seconds: float = 60) -> Resource:
        """The object as soon as `condition` holds of it; ClusterError with its status after `seconds`."""
        seen: Resource | None = None

        def holds() -> Resource | None:
            nonlocal seen
            seen = self.get(kind, name)
            return seen if seen is not None and condition(seen) else None

        try:
            found: Resource = wait_until(f"{kind}/{name}", seconds, holds, pause=0.2)
        except ClusterError as late:
            status = json.dumps(seen.get("status"), indent=2) if seen else "there is none"
            raise ClusterError(f"{late}; its status is {status}") from late
        return found

    @contextmanager
    def port_forward(self, target: str, port: int) -> Iterator[int]:
        """A port of 127.0.0.1 that leads to a port of a pod or Service (`pod/NAME`, `service/NAME`)."""
        with subprocess.Popen(
            self.argv("port-forward", "--address=127.0.0.1", target, f":{port}"), stdout=subprocess.PIPE, text=True
        ) as forward:
            try:
                assert forward.stdout is not None
                line = forward.stdout.readline()  # Forwarding from 127.0.0.1:40000 -> 8080
                if "->" not in line:
                    raise ClusterError(f"kubectl port-forward {target} {port} did not start")
                yield int(line.split("->")[0].rpartition(":")[2])
            finally:
                forward.terminate()


def condition(resource: Resource, kind: str) -> Resource:
    """The condition of that type in the status, {} when there is none."""
    conditions: list[Resource] = resource.get("status", {}).get("conditions", [])
    return next((c for c in conditions if c["type"] == kind), {})


def has_condition(kind: str, status: str = "True") -> Callable[[Resource], bool]:
    """A predicate for Kubectl.wait_for."""
    return lambda resource: condition(resource, kind).get("status") == status
