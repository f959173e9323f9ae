"""The clouds' identity services as a pod meets them: container credentials and instance metadata of AWS, Google's
metadata server and token endpoint. Each speaks its real protocol, as the clouds' libraries check it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
from collections.abc import Iterator
from typing import ClassVar
from urllib.parse import parse_qs

import google.auth.jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from support.fake_buckets import GcsHandler
from support.sendfile_server import FileHandler, Ledger, Served

POD_TOKEN = "pod-identity-token"
_ROLE = "modelcache-role"


class AwsIdentity(FileHandler):
    """EKS Pod Identity's agent (``/v1/credentials``) and IMDSv2 (``/latest/…``).

    See https://docs.aws.amazon.com/sdkref/latest/guide/feature-container-credentials.html and
    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html.
    """

    def route(self, path: str, query: str) -> None:
        roles = "/latest/meta-data/iam/security-credentials/"
        if path == "/v1/credentials" and self.headers["Authorization"] == POD_TOKEN:
            self.send_text(200, json.dumps(self._credentials("Container")))
        elif path == "/latest/api/token" and self.command == "PUT":
            self.send_text(200, "session")
        elif self.headers["x-aws-ec2-metadata-token"] != "session":
            self.send_text(401, "")
        elif path == roles:
            self.send_text(200, _ROLE)
        elif path == roles + _ROLE:
            self.send_text(200, json.dumps({"Code": "Success", **self._credentials("Instance")}))
        else:
            self.send_text(404, "")

    do_PUT = FileHandler.do_GET  # noqa: N815

    def _credentials(self, kind: str) -> dict[str, str]:
        until = dt.datetime.now(dt.UTC) + dt.timedelta(hours=1)
        return {
            "AccessKeyId": f"ASIA{kind}",
            "SecretAccessKey": "secret",
            "Token": f"session-of-{kind}",
            "Expiration": until.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }


class GoogleIdentity:
    """What Google knows of one service account: which tokens it gave, which still hold.

    Attributes:
        key: The account's private key; its public half checks what claims to come from it.
    """

    def __init__(self) -> None:
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.given: list[str] = []
        self.revoked: set[str] = set()

    def issue(self) -> str:
        """A new access token, in the JSON that both services answer."""
        self.given.append(f"ya29.token-{len(self.given)}")
        return json.dumps({"access_token": self.given[-1], "expires_in": 3600, "token_type": "Bearer"})

    def holds(self, header: str | None) -> bool:
        token = (header or "").removeprefix("Bearer ")
        return token in self.given and token not in self.revoked

    def service_account(self, token_uri: str) -> str:
        """The JSON of a key, as the console gives it to download."""
        key = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        fields = {"client_email": "model@test.iam.gserviceaccount.com", "token_uri": token_uri, "project_id": "test"}
        return json.dumps({"type": "service_account", "private_key": key.decode(), "private_key_id": "1", **fields})

    @property
    def public_key(self) -> bytes:
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return self.key.public_key().public_bytes(serialization.Encoding.PEM, form)


class GoogleTokens(FileHandler):
    """The metadata server of a node (https://cloud.google.com/compute/docs/metadata/overview) and, under ``/token``,
    the OAuth endpoint that takes a service account's signed assertion (RFC 7523).
    """

    identity: ClassVar[GoogleIdentity]

    def route(self, path: str, query: str) -> None:
        if path == "/token":
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            google.auth.jwt.decode(form["assertion"][0], self.identity.public_key, audience=None)
            self.send_text(200, self.identity.issue(), {"Content-Type": "application/json"})
            return
        if self.headers["Metadata-Flavor"] != "Google":
            self.send_text(403, "")
            return
        account = "/computeMetadata/v1/instance/service-accounts/default/"
        answers = {
            "/": "computeMetadata/",
            "/computeMetadata/v1/project/project-id": "test",
            "/computeMetadata/v1/universe/universe-domain": "googleapis.com",
            account: json.dumps({"email": "model@test.iam.gserviceaccount.com", "scopes": [], "aliases": ["default"]}),
        }
        text = self.identity.issue() if path == account + "token" else answers.get(path)
        kind = "application/json" if path.startswith(account) else "text/plain"
        headers = {"Metadata-Flavor": "Google", "Content-Type": kind}
        self.send_text(200 if text is not None else 404, text or "", headers)


class PrivateGcs(GcsHandler):
    """A bucket that only tokens of the identity may read."""

    identity: ClassVar[GoogleIdentity]

    def route(self, path: str, query: str) -> None:
        if self.identity.holds(self.headers["Authorization"]):
            super().route(path, query)
        else:
            self.send_text(401, json.dumps({"error": {"code": 401, "message": "Invalid Credentials"}}))


@contextlib.contextmanager
def serve(handler: type[FileHandler], **attributes: object) -> Iterator[tuple[Served, Ledger]]:
    """Serve a handler on a loopback port until the end of the block."""
    ledger = Ledger()
    served = Served(handler, ledger, **attributes)
    try:
        yield served, ledger
    finally:
        ledger.stop()
        served.stop()
