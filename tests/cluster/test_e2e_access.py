"""Attacks: what the product's accounts and pods may do in the cluster, and who gets at a model behind Token."""

import json
import time

import jwt
import pytest

from cluster.kubectl import KubectlError
from cluster.product import AUDIENCE, SYSTEM, as_account, log_of_ended, printed_by_all, reader

# Tries both lanes with the token of a file, or that of the first argument after the host.
TRIES = """
import json, sys, urllib.error, urllib.request, grpc
from modelcache_wire.v1 import weights_pb2, weights_pb2_grpc
host, digest, *given = sys.argv[1:]
said = {}
for name, token in [("own", open("/var/run/modelcache/token").read()), *zip(given[::2], given[1::2])]:
    bearer = f"Bearer {token}"
    request = urllib.request.Request(
        f"http://{host}:8080/v1/snapshots/{digest}/config.json", headers={"Authorization": bearer} if token else {}
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            http = answer.status if answer.read() else "empty"
    except urllib.error.HTTPError as error:
        http = error.code
    lane = grpc.insecure_channel(f"{host}:9090")
    stub, metadata = weights_pb2_grpc.WeightsStub(lane), [("authorization", bearer)] if token else []
    codes = []
    asked = weights_pb2.ReadRequest(digest=digest, ranges=[weights_pb2.Range(path="config.json", length=4)])
    for call in (
        lambda: stub.GetRevision(weights_pb2.GetRevisionRequest(), metadata=metadata, timeout=20),
        lambda: list(stub.GetManifest(weights_pb2.GetManifestRequest(digest=digest), metadata=metadata, timeout=20)),
        lambda: list(stub.Read(asked, metadata=metadata, timeout=20)),
    ):
        try:
            call()
            codes.append("OK")
        except grpc.RpcError as error:
            codes.append(error.code().name)
    lane.close()
    said[name] = [http, *codes]
print(json.dumps(said))
"""

LETS_IN = [200, "OK", "OK", "OK"]
UNKNOWN = [401, "UNAUTHENTICATED", "UNAUTHENTICATED", "UNAUTHENTICATED"]
FORBIDDEN = [403, "PERMISSION_DENIED", "PERMISSION_DENIED", "PERMISSION_DENIED"]


def test_the_operators_account_reads_no_secret_and_no_log(installed, kubectl):
    operator = kubectl.impersonating(f"system:serviceaccount:{SYSTEM}:modelcache")
    assert operator("auth", "can-i", "list", "jobs", "--all-namespaces").strip() == "yes"
    for right in ("get secrets", "list secrets", "get pods/log", "create pods/exec", "create pods"):
        with pytest.raises(KubectlError) as refusal:  # it says "no" and ends with 1
            operator("auth", "can-i", *right.split(), "--all-namespaces")
        assert not refusal.value.stderr.strip()


def attacker(image, account, host, digest, **tokens):
    """A pod of an account, with its own token for the right audience, that tries other tokens too."""
    tried = (part for pair in tokens.items() for part in pair)
    return as_account(reader(image, f"tries-{account}", TRIES, host, digest, *tried), account)


def test_only_the_accounts_named_with_the_right_token_read_on_either_lane(installed, guarded, kubectl, machine_cluster):
    namespace, digest = guarded.kubectl, guarded.get()["status"]["digest"]
    host = f"guarded-weights.{namespace.namespace}.svc"
    elsewhere = kubectl.within(f"{namespace.namespace}-b")
    kubectl("create", "namespace", elsewhere.namespace)
    try:
        elsewhere("create", "serviceaccount", "friend")
        other = namespace("create", "token", "friend", "--audience=https://kubernetes.default.svc").strip()
        right = namespace("create", "token", "friend", f"--audience={AUDIENCE}").strip()
        claims = jwt.decode(right, options={"verify_signature": False})
        key = (machine_cluster.node.state / "pki/service-accounts.key").read_text()
        headers = {"kid": jwt.get_unverified_header(right)["kid"]}
        now = int(time.time())

        def signed(with_key, **changes):
            return jwt.encode({**claims, **changes}, with_key, "RS256", headers=headers)

        fresh = {"iat": now - 700, "nbf": now - 700}
        expired = signed(key, exp=now - 100, **fresh)
        # what proves that only the time is wrong with the expired one
        renewed = signed(key, exp=now + 500, **fresh)
        friend = attacker(
            installed, "friend", host, digest,
            none="", audience=other, expired=expired, renewed=renewed, tampered=right[:-8] + "AAAAAAAA",
        )  # fmt: skip
        elsewhere.apply(attacker(installed, "friend", host, digest))
        said, of_stranger = printed_by_all(namespace, friend, attacker(installed, "stranger", host, digest))
        assert json.loads(said) == {
            "own": LETS_IN, "none": UNKNOWN, "audience": UNKNOWN, "expired": UNKNOWN, "renewed": LETS_IN,
            "tampered": UNKNOWN,
        }  # fmt: skip
        assert json.loads(of_stranger) == {"own": FORBIDDEN}
        assert json.loads(log_of_ended(elsewhere, "tries-friend")) == {"own": FORBIDDEN}

        for part in namespace.list("pods", "modelcache.io/name=guarded"):
            assert part["spec"]["automountServiceAccountToken"] is False
            assert not any("serviceAccountToken" in str(volume) for volume in part["spec"]["volumes"])
        running = namespace.list("pods", "modelcache.io/component=server")[0]["metadata"]["name"]
        look = "import os; print(os.path.exists('/var/run/secrets/kubernetes.io'))"
        assert namespace("exec", running, "--", "python3", "-c", look) == "False\n"
    finally:
        kubectl.delete("namespace", elsewhere.namespace, wait=False)
