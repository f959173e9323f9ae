"""A cluster in memory for the operator's pure core: carries decisions out, ends Jobs when a test says so."""

import copy
import itertools
import json

from modelcache_api.resource import ModelCacheSpec
from modelcache_operator.clock import format_time
from modelcache_operator.observed import Observed
from modelcache_operator.reconcile import reconcile
from modelcache_operator.resources.effective import effective
from modelcache_operator.settings import Settings

COMMITS = {"main": "a" * 40, "v2": "b" * 40, "bad": "c" * 40}
START = 1_700_000_000.0
SLOTS = {"plan": True, "fetch": True, "rollout": True}


class World:
    """One ModelCache and its children."""

    def __init__(self, *, settings=None, name="bert", **spec):
        self.weights = f"{name}-weights"
        self.settings = settings or Settings(image="modelcache:test")
        self.now = START
        self.ids = itertools.count(1)
        self.objects = {}
        self.slots = dict(SLOTS)
        self.refusals = {}
        self.keys = None
        self.announced = None
        self.warnings = {}
        self.events = []
        self.writes = 0
        self.downloads = []
        self.cr = {
            "apiVersion": "modelcache.io/v1alpha1",
            "kind": "ModelCache",
            "metadata": {"name": name, "namespace": "ns", "uid": "cr-1", "generation": 1},
            "spec": {"repoId": "org/name", **spec},
        }

    # --- what a user does
    def change(self, **fields):
        self.cr["spec"] |= fields
        self.cr["metadata"]["generation"] += 1

    def annotate(self, value):
        self.cr["metadata"].setdefault("annotations", {})["modelcache.io/reconcile-at"] = value

    def add(self, obj):
        obj = copy.deepcopy(obj)
        obj["metadata"].setdefault("uid", f"uid-{next(self.ids)}")
        obj["metadata"].setdefault("creationTimestamp", format_time(self.now))
        self.objects[obj["kind"], obj["metadata"]["name"]] = obj
        return obj

    # --- what the operator does
    def observe(self, **overrides):
        def of(kind):
            return [copy.deepcopy(o) for (k, _), o in self.objects.items() if k == kind]

        spec = effective(ModelCacheSpec.model_validate(self.cr["spec"]), self.settings.defaults)
        claim = spec.storage.existing_claim or self.weights
        values = {
            "cr": copy.deepcopy(self.cr),
            "spec": spec,
            "now": self.now,
            "claim": copy.deepcopy(self.objects.get(("PersistentVolumeClaim", claim))),
            "deployment": copy.deepcopy(self.objects.get(("Deployment", self.weights))),
            "services": {o["metadata"]["name"]: o for o in of("Service")},
            "key_set": copy.deepcopy(self.objects.get(("ConfigMap", f"{self.weights}-keys"))),
            "jobs": of("Job"),
            "pods": of("Pod"),
            "warnings": self.warnings,
            "slots": self.slots,
            "refusals": self.refusals,
            "keys": self.keys,
            "announced": self.announced,
        }
        return Observed(**(values | overrides))

    def decide(self, **overrides):
        return reconcile(self.observe(**overrides), self.settings)

    def step(self):
        """One reconcile, carried out."""
        decision = self.decide()
        for job in decision.creates:
            assert ("Job", job["metadata"]["name"]) not in self.objects
            self.add(job)
        for wanted in decision.applies:
            self._apply(wanted)
        for gone in decision.deletes:
            self.objects.pop((gone["kind"], gone["metadata"]["name"]))
        self.writes += len(decision.creates) + len(decision.applies) + len(decision.deletes)
        if decision.status != self.cr.get("status"):
            self.writes += 1
            self.cr["status"] = json.loads(json.dumps(decision.status))
        self.events += [note.reason for note in decision.notes]
        return decision

    def settle(self, limit=10):
        """Reconcile until nothing is written any more."""
        for _ in range(limit):
            before = self.writes
            decision = self.step()
            if self.writes == before:
                return decision
        raise AssertionError(f"still writing after {limit} reconciles: {self.conditions}")

    def _apply(self, wanted):
        key = wanted["kind"], wanted["metadata"]["name"]
        if key in self.refusals:
            return
        live = self.objects.get(key)
        new = self.add(wanted) if live is None else {**live, **copy.deepcopy(wanted)}
        if live is not None:
            new["metadata"] = {**copy.deepcopy(wanted["metadata"])}
            for name in ("uid", "creationTimestamp"):
                new["metadata"][name] = live["metadata"][name]
            new["status"] = live.get("status", {})
        if new["kind"] == "PersistentVolumeClaim":
            size = new["spec"]["resources"]["requests"]["storage"]
            new["status"] = {"phase": "Bound", "capacity": {"storage": size}}
        self.objects[key] = new

    # --- what the cluster does
    def running(self, component):
        return [
            job
            for (kind, _), job in self.objects.items()
            if kind == "Job"
            and job["metadata"]["labels"]["modelcache.io/component"] == component
            and not job.get("status", {}).get("conditions")
        ]

    def finish(self, component, *, reason=None, permanent=True, seconds=3.0, **result):
        """End the running Job of a component, with a result or a failure."""
        [job] = self.running(component)
        self.now += seconds
        spec = json.loads(job["spec"]["template"]["spec"]["containers"][0]["env"][0]["value"])
        commit = COMMITS[spec.get("revision", "main")]
        if reason:
            message = {"result": "failed", "reason": reason, "permanent": permanent, "message": f"{reason} happened."}
        elif component == "plan":
            message = {"result": "planned", "commit": commit, "files": 3, "bytes": 100 * 2**20} | result
        else:
            self.downloads.append(commit)
            message = {
                "result": "fetched", "digest": f"digest-{commit[0]}", "commit": commit, "files": 3,
                "bytes": 100 * 2**20, "downloadedBytes": 0, "generation": 1,
            } | result  # fmt: skip
        condition = {
            "type": "Failed" if reason else "Complete", "status": "True", "lastTransitionTime": format_time(self.now)
        }  # fmt: skip
        job["status"] = {"conditions": [condition]}
        self.pod_of(job, phase="Failed" if reason else "Succeeded", exit_code=66 if reason else 0, message=message)
        return job

    def run(self, component, **result):
        """Reconcile up to a Job, `finish` it, and reconcile again."""
        self.settle()
        self.finish(component, **result)
        self.settle()

    def pod_of(self, job, *, phase, exit_code=0, message=None, **status):
        terminated = {"exitCode": exit_code, "message": json.dumps(message)}
        containers = [{"name": "main", "state": {"terminated": terminated}}] if message else []
        return self.add(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {
                    "name": f"{job['metadata']['name']}-{next(self.ids)}",
                    "labels": dict(job["spec"]["template"]["metadata"]["labels"]),
                    "ownerReferences": [
                        {"kind": "Job", "name": job["metadata"]["name"], "uid": job["metadata"]["uid"]}
                    ],
                },
                "status": {"phase": phase, "containerStatuses": containers} | status,
            }
        )

    def servers_are_up(self):
        deployment = self.objects["Deployment", self.weights]
        replicas = deployment["spec"]["replicas"]
        counts = ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas")
        deployment["status"] = dict.fromkeys(counts, replicas) | {"observedGeneration": 1}

    def to_ready(self):
        """The whole way, as it goes when nothing goes wrong."""
        self.run("plan")
        self.run("fetch")
        if ("Deployment", self.weights) in self.objects:
            self.servers_are_up()
        self.settle()
        return self

    # --- what a test looks at
    @property
    def conditions(self):
        return {c["type"]: (c["status"], c["reason"]) for c in self.cr["status"]["conditions"]}

    def message(self, type_):
        return next(c["message"] for c in self.cr["status"]["conditions"] if c["type"] == type_)

    def names(self, kind):
        return sorted(name for k, name in self.objects if k == kind)

    def claim(self):
        return self.objects["PersistentVolumeClaim", self.weights]

    def deployment(self):
        return self.objects["Deployment", self.weights]
