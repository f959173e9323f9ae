"""Certificates and tokens for the server's tests, made anew each time."""

import datetime as dt
import ipaddress
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

ISSUER = "https://kubernetes.default.svc"
AUDIENCE = "modelcache"


def write_certificate(folder: Path, name: str = "localhost") -> tuple[Path, Path]:
    """(certificate, key) for 127.0.0.1, replaced if they are there already."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    chain, private = folder / "tls.crt", folder / "tls.key"
    for path, content in (
        (chain, certificate.public_bytes(serialization.Encoding.PEM)),
        (
            private,
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
        ),
    ):
        fresh = path.with_suffix(".new")
        fresh.write_bytes(content)
        fresh.rename(path)
    return chain, private


@dataclass
class Issuer:
    """Signs tokens as a cluster does, and publishes its keys."""

    keys: dict[str, Any] = field(default_factory=dict)

    def add_rsa(self, kid: str) -> None:
        self.keys[kid] = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def add_ec(self, kid: str) -> None:
        self.keys[kid] = ec.generate_private_key(ec.SECP256R1())

    def publish(self, path: Path, *extra: dict[str, Any]) -> Path:
        """Write the key set."""
        entries = []
        for kid, key in self.keys.items():
            algorithm = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
            entries.append({**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig"})
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({"keys": [*extra, *entries]}))
        fresh.rename(path)
        return path

    def token(
        self, account: str = "default/reader", *, kid: str | None = None, seconds: float = 600, **claims: Any
    ) -> str:
        """A ServiceAccount's token; a claim of None is left out."""
        kid = kid or next(iter(self.keys))
        key = self.keys[kid]
        namespace, _, name = account.partition("/")
        payload = {
            "iss": ISSUER,
            "aud": [AUDIENCE],
            "sub": f"system:serviceaccount:{namespace}:{name}",
            "exp": int(time.time() + seconds),
            **claims,
        }
        payload = {claim: value for claim, value in payload.items() if value is not None}
        algorithm = "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256"
        return jwt.encode(payload, key, algorithm=algorithm, headers={"kid": kid})
