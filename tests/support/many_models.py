"""Many Ready ModelCaches with all their children on a real API server, as an operator would have left them."""

import asyncio
import itertools
from time import time

from kubernetes.aio import config
from kubernetes.aio.client import Configuration

from modelcache_operator.clock import format_time
from modelcache_operator.kube import CLAIMS, Kube
from modelcache_operator.settings import Settings
from support.operator_world import World

AT_ONCE = 32
EACH = 20


async def make_ready(kube, namespace, name, settings):
    """Create one ModelCache, its Jobs, claim, Deployment, Services and server pod, all with the status of Ready."""
    cr = await kube.create(
        {
            "apiVersion": "modelcache.io/v1alpha1", "kind": "ModelCache", "spec": {"repoId": "org/name"},
            "metadata": {"namespace": namespace, "name": name},
        }
    )  # fmt: skip
    world = World(settings=settings, name=name)
    world.now, world.cr = time(), cr
    world.to_ready()
    made = [await _create(kube, obj) for (kind, _), obj in world.objects.items() if kind != "Pod"]
    [claim] = [obj for obj in made if obj["kind"] == CLAIMS.kind]
    [deployment] = [obj for obj in made if obj["kind"] == "Deployment"]
    await _create(kube, _server_pod(deployment))
    status = world.cr["status"]
    status["fetch"]["claimUid"] = claim["metadata"]["uid"]
    identity = {"apiVersion": cr["apiVersion"], "kind": cr["kind"], "metadata": {"namespace": namespace, "name": name}}
    await kube.apply({**identity, "status": status}, subresource="status")


async def _create(kube, obj):
    metadata = {k: v for k, v in obj["metadata"].items() if k not in {"uid", "creationTimestamp"}}
    status = obj.get("status")
    made = await kube.create({k: v for k, v in obj.items() if k != "status"} | {"metadata": metadata})
    if status:
        if obj["kind"] == "Job":
            done = format_time(time())
            success = {"type": "SuccessCriteriaMet", "status": "True", "lastTransitionTime": done}
            times = {"startTime": done, "completionTime": done}
            status = {"conditions": [success, *status["conditions"]], "succeeded": 1, **times}
        identity = {key: made[key] for key in ("apiVersion", "kind")}
        identity["metadata"] = {key: metadata[key] for key in ("namespace", "name")}
        made = await kube.apply({**identity, "status": status}, subresource="status")
    return made


def _server_pod(deployment):
    template = deployment["spec"]["template"]
    metadata = {"namespace": deployment["metadata"]["namespace"], "name": f"{deployment['metadata']['name']}-pod"}
    metadata["labels"] = template["metadata"]["labels"]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def make_many(server, count, *, image="modelcache:test"):
    """Create `count` of them, in namespaces of twenty."""
    settings = Settings(image=image)
    for number in range(-(-count // EACH)):
        server.create("/api/v1/namespaces", {"metadata": {"name": f"many-{number}"}})

    async def run():
        numbers = itertools.count()

        async def work(kube):
            while (number := next(numbers)) < count:
                await make_ready(kube, f"many-{number // EACH}", f"m{number}", settings)

        configuration = Configuration()
        await config.load_kube_config(str(server.kubeconfig), client_configuration=configuration)
        async with Kube(configuration, connections=AT_ONCE) as kube, asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(work(kube))

    asyncio.run(run())
