"""The cluster does what the product's tests need, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.kubectl import Kubectl, KubectlError, Resource, has_condition
from cluster.machine import MachineCluster
from cluster.node import NODE_NAME, ended, wait_until
from cluster.workloads import claim, container, deployment, job, pod, pod_spec, service

# What the product's own tests need of a cluster, they show too.
pytestmark = pytest.mark.slow
MIB = 1 << 20
SLEEP = ("sleep", "infinity")
FILL = """
import os, json
written = 0
fd = os.open("/volume/fill", os.O_WRONLY | os.O_CREAT)
try:
    while True:
        written += os.write(fd, bytes(1 << 20))
except OSError as error:
    reason = error.strerror
at = os.statvfs("/volume")
print(json.dumps({"written": written, "reason": reason, "size": at.f_blocks * at.f_frsize}))
"""
SIZE = "import os; at = os.statvfs('/volume'); print(at.f_blocks * at.f_frsize)"


def running(found: Resource) -> bool:
    return bool(found["status"].get("phase") == "Running")


def succeeded(found: Resource) -> bool:
    phase = found["status"].get("phase")
    assert phase != "Failed", found["status"]
    return bool(phase == "Succeeded")


def test_the_node_is_ready_and_says_its_version(kubectl: Kubectl) -> None:
    node = kubectl.wait_for("node", NODE_NAME, has_condition("Ready"))
    assert node["status"]["nodeInfo"]["kubeletVersion"].startswith("v1.")
    assert "ok" in kubectl("get", "--raw", "/readyz")


def test_a_job_completes_and_its_log_is_read(namespace: Kubectl, python_image: str) -> None:
    namespace.apply(
        job(
            "hello",
            pod_spec(container(python_image, "python3", "-c", "print('hello from', __import__('os').getuid())")),
        )
    )
    namespace.wait_for("job", "hello", has_condition("Complete"))
    assert namespace("logs", "job/hello") == "hello from 65532\n"


def test_a_job_that_fails_says_its_exit_code(namespace: Kubectl, python_image: str) -> None:
    namespace.apply(
        job("refuse", pod_spec(container(python_image, "sh", "-c", "echo because >/dev/termination-log; exit 64")))
    )
    namespace.wait_for("job", "refuse", has_condition("Failed"))
    (failed,) = namespace.list("pods", "job-name=refuse")
    state = failed["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (state["exitCode"], state["message"]) == (64, "because\n")


def test_a_service_is_reached_by_name_from_a_pod_and_by_address_from_this_machine(
    namespace: Kubectl, python_image: str, run_in_cluster_network: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    web = container(
        python_image, "python3", "-m", "http.server", "8000", "--directory=/etc", ports=[{"containerPort": 8000}]
    )
    web["readinessProbe"] = {"httpGet": {"path": "/hostname", "port": 8000}, "periodSeconds": 1}
    namespace.apply(deployment("web", pod_spec(web), replicas=2), service("web", 8000))
    namespace.wait_for("deployment", "web", lambda found: found["status"].get("readyReplicas") == 2)
    read = "import urllib.request; print(urllib.request.urlopen('http://{}:8000/hostname', timeout=5).read().decode())"
    found = namespace.get("service", "web")
    assert found is not None
    address = found["spec"]["clusterIP"]
    # kube-proxy hears of ready pods a moment later, and each try may reach the other replica: wait for both.
    answers: set[str] = set()

    def both_answered() -> bool:
        done = run_in_cluster_network([sys.executable, "-c", read.format(address)])
        if done.returncode == 0:
            answers.add(done.stdout)
        return len(answers) == 2

    wait_until("both replicas answer", 30, both_answered)
    name = f"web.{namespace.namespace}.svc.cluster.local"
    namespace.apply(job("by-name", pod_spec(container(python_image, "python3", "-c", read.format(name)))))
    namespace.wait_for("job", "by-name", has_condition("Complete"))
    assert namespace("logs", "job/by-name").startswith("web-")
    with namespace.port_forward("service/web", 8000) as port:
        done = subprocess.run(
            [sys.executable, "-c", read.replace(":8000", f":{port}").format("127.0.0.1")],
            check=True,
            capture_output=True,
        )
    assert done.stdout.decode() in answers


def test_nothing_in_the_cluster_reaches_out(namespace: Kubectl, python_image: str) -> None:
    # An address of documentation (RFC 5737): with a route the try would time out, without one it fails at once.
    attempt = "import socket; print(socket.socket().connect_ex(('192.0.2.1', 80)))"
    namespace.apply(job("out", pod_spec(container(python_image, "python3", "-c", attempt))))
    namespace.wait_for("job", "out", has_condition("Complete"))
    assert namespace("logs", "job/out").strip() in {"101", "113"}  # ENETUNREACH, EHOSTUNREACH


def test_a_volume_has_the_size_asked_for_and_is_full_at_that_size(namespace: Kubectl, python_image: str) -> None:
    namespace.apply(
        claim("data", "64Mi"), job("fill", pod_spec(container(python_image, "python3", "-c", FILL), claim="data"))
    )
    namespace.wait_for("job", "fill", has_condition("Complete"))
    told = json.loads(namespace("logs", "job/fill"))
    assert told["reason"] == "No space left on device"
    assert 0.8 * 64 * MIB <= told["written"] <= told["size"] <= 64 * MIB


def test_a_volume_grows_while_a_pod_uses_it(namespace: Kubectl, python_image: str) -> None:
    namespace.apply(claim("data", "400Mi"), pod("user", pod_spec(container(python_image, *SLEEP), claim="data")))
    before = namespace.wait_for("pod", "user", running)
    small = int(namespace("exec", "user", "--", "python3", "-c", SIZE))
    namespace.patch("pvc", "data", {"spec": {"resources": {"requests": {"storage": "700Mi"}}}})
    namespace.wait_for("pvc", "data", lambda found: found["status"]["capacity"]["storage"] == "700Mi")
    large = int(namespace("exec", "user", "--", "python3", "-c", SIZE))
    assert small <= 400 * MIB < 600 * MIB < large <= 700 * MIB
    after = namespace.get("pod", "user")
    assert after is not None
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    volume = namespace.get("pv", json.loads(namespace("get", "pvc", "data", "--output=json"))["spec"]["volumeName"])
    assert volume is not None
    assert volume["spec"]["capacity"]["storage"] == "700Mi"


def test_the_class_fixed_refuses_to_grow(namespace: Kubectl, python_image: str) -> None:
    namespace.apply(
        claim("data", "64Mi", storage_class="fixed"),
        pod("user", pod_spec(container(python_image, *SLEEP), claim="data")),
    )
    namespace.wait_for("pvc", "data", lambda found: found["status"]["phase"] == "Bound")
    with pytest.raises(KubectlError, match="the storageclass that provisions the pvc must support resize"):
        namespace.patch("pvc", "data", {"spec": {"resources": {"requests": {"storage": "128Mi"}}}})


def test_a_volume_is_its_groups_with_fs_group_and_roots_without(namespace: Kubectl, python_image: str) -> None:
    write = "touch /volume/mine && cat /volume/mine && stat -c '%u %g %a' /volume"
    without = "stat -c '%u %g %a' /volume; touch /volume/mine 2>&1"  # two streams of a log have no order
    namespace.apply(claim("open", "64Mi"), claim("closed", "64Mi"))
    namespace.apply(
        pod("member", pod_spec(container(python_image, "sh", "-c", write), claim="open")),
        pod("stranger", pod_spec(container(python_image, "sh", "-c", without), claim="closed", fs_group=None)),
    )
    namespace.wait_for("pod", "member", succeeded)
    assert namespace("logs", "member") == "0 65532 2775\n"
    namespace.wait_for("pod", "stranger", lambda found: found["status"]["phase"] == "Failed")
    first, complaint = namespace("logs", "stranger").splitlines()
    assert first == "0 0 755"
    assert "Permission denied" in complaint


def test_a_deleted_claim_frees_its_volume(
    namespace: Kubectl, machine_cluster: MachineCluster, python_image: str
) -> None:
    namespace.apply(claim("data", "64Mi"), pod("user", pod_spec(container(python_image, *SLEEP), claim="data")))
    namespace.wait_for("pod", "user", running)
    volume = json.loads(namespace("get", "pvc", "data", "--output=json"))["spec"]["volumeName"]
    images = machine_cluster.node.state / "volumes"
    assert (images / f"{volume}.img").stat().st_size == 64 * MIB
    namespace.delete("pod", "user")
    namespace.delete("pvc", "data")
    wait_until("the volume is gone", 60, lambda: namespace.get("pv", volume) is None)
    assert not [path.name for path in images.iterdir() if path.name.startswith(volume)]


def test_the_scheduler_spreads_over_two_nodes_and_shared_volumes_follow(
    namespace: Kubectl, second_node: str, python_image: str
) -> None:
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"app": "both"}},
    }
    spec = pod_spec(container(python_image, *SLEEP), claim="shared", topologySpreadConstraints=[spread])
    namespace.apply(
        claim("shared", "64Mi", storage_class="shared", mode="ReadWriteMany"), deployment("both", spec, replicas=2)
    )

    def nodes() -> set[str]:
        return {
            found["spec"]["nodeName"] for found in namespace.list("pods", "app=both") if "nodeName" in found["spec"]
        }

    wait_until("both pods are on a node", 60, lambda: nodes() == {NODE_NAME, second_node})


def test_a_volume_of_one_node_keeps_its_pods_there(namespace: Kubectl, second_node: str, python_image: str) -> None:
    spec = pod_spec(container(python_image, *SLEEP), claim="own")
    namespace.apply(claim("own", "64Mi"), deployment("together", spec, replicas=3))
    namespace.wait_for("deployment", "together", lambda found: found["status"].get("readyReplicas") == 3)
    assert {found["spec"]["nodeName"] for found in namespace.list("pods", "app=together")} == {NODE_NAME}


def test_the_class_sized_refuses_read_write_many(namespace: Kubectl, python_image: str) -> None:
    namespace.apply(
        claim("data", "64Mi", mode="ReadWriteMany"),
        pod("user", pod_spec(container(python_image, *SLEEP), claim="data")),
    )
    wait_until(
        "an Event says why",
        60,
        lambda: any("ReadWriteOnce only" in event["message"] for event in namespace.list("events")),
    )


@pytest.mark.parametrize(
    "component", ["kube-apiserver", "kubelet", "containerd", "kube-controller-manager", "volume-provisioner"]
)
@pytest.mark.parametrize("end", ["stop", "kill"])
def test_pods_survive_a_restart_of(
    component: str, end: str, machine_cluster: MachineCluster, namespace: Kubectl, python_image: str
) -> None:
    namespace.apply(pod("survivor", pod_spec(container(python_image, *SLEEP))))
    before = namespace.wait_for("pod", "survivor", running)
    getattr(machine_cluster, f"{end}_component")(component)
    machine_cluster.start_component(component)
    namespace.apply(
        claim("data", "64Mi"), pod("later", pod_spec(container(python_image, "touch", "/volume/a"), claim="data"))
    )
    namespace.wait_for("pod", "later", succeeded, seconds=90)
    after = namespace.get("pod", "survivor")
    assert after is not None
    assert (
        after["status"]["containerStatuses"][0]["containerID"]
        == before["status"]["containerStatuses"][0]["containerID"]
    )
    assert namespace("exec", "survivor", "--", "echo", "here") == "here\n"


def test_a_frozen_api_server_answers_nobody_and_then_goes_on(
    machine_cluster: MachineCluster, namespace: Kubectl
) -> None:
    with machine_cluster.frozen("kube-apiserver"), pytest.raises(KubectlError):
        namespace("get", "pods", "--request-timeout=2s")
    assert namespace.list("pods") == []


STARTER = """
import os, sys
from cluster.machine import MachineCluster
cluster = MachineCluster(sys.argv[1])
read, write = os.pipe()
cluster.start(lifeline=read)
print("started", flush=True)
sys.stdin.read()
"""


def traces() -> dict[str, set[str]]:
    """What a cluster could leave on the machine; other programs that come and go meanwhile do not count."""
    cgroups = {str(path) for path in Path("/sys/fs/cgroup").glob("**/modelcache-*")}
    loops = subprocess.run(
        ["losetup", "--list", "--noheadings", "--output=NAME,BACK-FILE"], check=True, capture_output=True, text=True
    )
    processes = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            processes.add(f"{path.name} {(path / 'ns/net').readlink()} {(path / 'ns/pid').readlink()}")
        except OSError:
            continue
    own = f"{Path('/proc/self/ns/net').readlink()} {Path('/proc/self/ns/pid').readlink()}"
    return {
        "mounts": set(Path("/proc/self/mounts").read_text().splitlines()),
        "loops": {line for line in loops.stdout.splitlines() if "modelcache" in line},
        "links": {path.name for path in Path("/sys/class/net").glob("mcc*")},
        "cgroups": cgroups,
        "processes": {line for line in processes if not line.endswith(own)},
        "netns": {str(path) for path in Path("/run/netns").glob("*")},
        "state": {str(path) for path in Path("/var/lib").glob("*")} | {str(path) for path in Path("/run").glob("*")},
    }


@pytest.mark.parametrize("end", ["stopped", "starter killed"])
def test_nothing_is_left_of_a_second_cluster_beside_the_first(
    end: str, machine_cluster: MachineCluster, kubectl: Kubectl, tmp_path: Path
) -> None:
    before = traces()
    second = MachineCluster(f"second-{os.getpid()}")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", STARTER, second.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    ) as starter:
        try:
            assert starter.stdout is not None
            assert starter.stdout.readline() == "started\n"
            image = second.load_base()
            within = second.kubectl.within("default")
            within.apply(
                claim("data", "64Mi"),
                pod(
                    "user",
                    pod_spec(container(image, "python3", "-c", f"{FILL}\nimport time; time.sleep(9999)"), claim="data"),
                ),
            )
            within.wait_for("pod", "user", running)
            during = traces()
            assert all(during[kind] - before[kind] for kind in ("loops", "links", "cgroups", "processes"))
            if end == "starter killed":
                supervisor = second.node.pid()
                assert supervisor is not None
                starter.send_signal(signal.SIGKILL)
                wait_until("the node ends with its starter", 30, lambda: ended(supervisor))
        finally:
            second.stop()
            starter.kill()
    after = traces()
    assert {kind: after[kind] - before[kind] for kind in after} == {kind: set() for kind in after}
    assert not second.node.state.exists()
    assert "ok" in kubectl("get", "--raw", "/readyz")
