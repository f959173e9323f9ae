"""Plan and fetch Jobs: what runs `modelcache-fetch`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from modelcache_api.reasons import REASONS, USAGE
from modelcache_api.resource import ModelCacheSpec
from modelcache_api.source import parse_repo_id
from modelcache_operator.resources import names, pod
from modelcache_operator.resources.names import Object
from modelcache_operator.settings import Settings

PROGRESS_PORT = 9091
CA_BUNDLE = "MODELCACHE_CA_BUNDLE"
"""Read by `modelcache-fetch`: authorities beside the system's. (SSL_CERT_FILE would replace them.)"""
PLAN_DEADLINE_SECONDS = 900
"""The longest that a look at a source may take."""
_SPEC_FIELDS = {
    "repo_id",
    "revision",
    "allow_patterns",
    "ignore_patterns",
    "secret_ref",
    "endpoint",
    "revision_history_limit",
}
_FETCH_FIELDS = {"active_deadline_seconds", "stall_timeout", "concurrency"}
_PUBLIC_HOSTS = {"hf": "huggingface.co", "s3": "amazonaws.com", "gs": "storage.googleapis.com"}


@dataclass(frozen=True)
class JobId:
    """Which of many Jobs this one is.

    Attributes:
        component: `names.PLAN` or `names.FETCH`.
        key: Hash of what is planned or fetched.
        round: Grows with each success, so that an old result is never taken for a new one.
        nonce: What else asks for a new Job: the reconcile-at annotation, the claim's uid.
        attempt: From 1.
    """

    component: str
    key: str
    round: int
    nonce: str
    attempt: int

    @property
    def family(self) -> str:
        """What all attempts at the same thing share."""
        return names.job_hash(self.component, self.key, str(self.round), self.nonce)

    def name(self, model_cache: str) -> str:
        """The Job's name."""
        return f"{model_cache}-{self.component}-{self.family}-{self.attempt}"


def source_host(spec: ModelCacheSpec) -> str:
    """The host that a fetch loads, for the budget."""
    if spec.endpoint:
        return urlsplit(spec.endpoint).netloc
    return _PUBLIC_HOSTS.get(parse_repo_id(spec.repo_id).scheme, "")


def plan_job(cr: Object, spec: ModelCacheSpec, settings: Settings, job: JobId) -> Object:
    """The Job that looks at the source; it mounts no volume."""
    command = ["modelcache-fetch", "plan"]
    deadline = min(spec.fetch.active_deadline_seconds or PLAN_DEADLINE_SECONDS, PLAN_DEADLINE_SECONDS)
    many_nodes = spec.storage.many_nodes
    placement = pod.Placement(
        spec.fetch.node_selector if many_nodes else spec.server.node_selector,
        [pod.dump(t) for t in (spec.fetch.tolerations if many_nodes else spec.server.tolerations)],
        spec.fetch.affinity if many_nodes else spec.server.affinity,
    )
    return _job(cr, spec, settings, job, command, [], [], placement, deadline=deadline)


def fetch_job(
    cr: Object, spec: ModelCacheSpec, settings: Settings, job: JobId, *, claim: str, many_nodes: bool
) -> Object:
    """The Job that brings the snapshot onto the volume and activates it."""
    command = [
        "modelcache-fetch",
        "fetch",
        f"--volume={pod.VOLUME_PATH}",
        f"--name={cr['metadata']['name']}",
        f"--progress-port={PROGRESS_PORT}",
    ]
    volume = {"name": "volume", "persistentVolumeClaim": {"claimName": claim}}
    mount = {"name": "volume", "mountPath": pod.VOLUME_PATH}
    placement = pod.fetch_placement(spec, claim, many_nodes=many_nodes)
    deadline = spec.fetch.active_deadline_seconds
    labels = {names.CLAIM_LABEL: names.claim_label(claim)}
    return _job(cr, spec, settings, job, command, [volume], [mount], placement, deadline=deadline, labels=labels)


def _job(
    cr: Object,
    spec: ModelCacheSpec,
    settings: Settings,
    job: JobId,
    command: list[str],
    volumes: list[Object],
    mounts: list[Object],
    placement: pod.Placement,
    *,
    deadline: int | None,
    labels: Mapping[str, str] | None = None,
) -> Object:
    arguments = [*command, "--termination-log=/dev/termination-log"]
    environment = [
        {"name": "MODELCACHE_SPEC", "value": _spec_json(spec)},
        *(pod.dump(variable) for variable in spec.fetch.env),
    ]
    tmp, tmp_mount = pod.scratch()
    volumes, mounts = [*volumes, tmp], [*mounts, tmp_mount]
    if spec.secret_ref is not None:
        arguments.append(f"--secrets={pod.SECRETS_PATH}")
        volumes.append({"name": "secrets", "secret": {"secretName": spec.secret_ref.name, "optional": True}})
        mounts.append({"name": "secrets", "mountPath": pod.SECRETS_PATH, "readOnly": True})
    if (bundle := spec.fetch.ca_bundle) is not None:
        items = [{"key": bundle.key, "path": "ca.crt"}]
        volumes.append({"name": "ca", "configMap": {"name": bundle.config_map, "items": items}})
        mounts.append({"name": "ca", "mountPath": pod.CA_PATH, "readOnly": True})
        environment.append({"name": CA_BUNDLE, "value": f"{pod.CA_PATH}/ca.crt"})
    more: dict[str, Any] = {"ports": [{"name": "progress", "containerPort": PROGRESS_PORT, "protocol": "TCP"}]}
    requests = {"cpu": "100m", "memory": "128Mi"} if job.component == names.PLAN else {"cpu": "500m", "memory": "256Mi"}
    resources = pod.resources_of(spec.fetch.resources) or {"requests": requests, "limits": {"memory": "512Mi"}}
    main = pod.container(
        settings, job.component, arguments, env=environment, volumeMounts=mounts, resources=resources, **more
    )
    template: Object = {
        "metadata": {"labels": names.labels(cr["metadata"]["name"], job.component) | dict(labels or {})},
        "spec": pod.pod_spec(spec, settings, [main], volumes, placement, restartPolicy="Never"),
    }
    if spec.fetch.service_account_name:
        template["spec"]["serviceAccountName"] = spec.fetch.service_account_name
    annotations = {
        names.HOST_ANNOTATION: source_host(spec),
        names.GENERATION_ANNOTATION: str(cr["metadata"].get("generation") or 0),
        names.TEMPLATE_ANNOTATION: names.content_hash(template),
    }
    metadata = names.metadata(cr, job.name(cr["metadata"]["name"]), job.component, annotations=annotations)
    metadata["labels"] |= {
        names.KEY_LABEL: job.family,
        names.ROUND_LABEL: str(job.round),
        names.ATTEMPT_LABEL: str(job.attempt),
    }
    job_spec: Object = {
        "backoffLimit": spec.fetch.backoff_limit,
        "podFailurePolicy": {"rules": _failure_rules(job.component)},
        "template": template,
    }
    if deadline is not None:
        job_spec["activeDeadlineSeconds"] = deadline
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job_spec}


def _failure_rules(container: str) -> list[Object]:
    """Permanent failures end the Job at once; evictions are not counted as attempts."""
    permanent = sorted({USAGE, *(info.exit_code for info in REASONS.values() if info.permanent)})
    return [
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": container, "operator": "In", "values": permanent},
        },
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]


def _spec_json(spec: ModelCacheSpec) -> str:
    """What `modelcache-fetch` reads: the fields that decide what it does, in one fixed order."""
    fields = spec.model_dump(
        by_alias=True, exclude_none=True, include={**dict.fromkeys(_SPEC_FIELDS, True), "fetch": _FETCH_FIELDS}
    )
    return json.dumps(fields, sort_keys=True)
