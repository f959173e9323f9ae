"""The pod's own cloud identity, service accounts, and credentials that end while a fetch runs."""

import json

import pytest

from modelcache_api.reasons import REASONS, Reason
from modelcache_fetcher import FetchError, run_fetch
from support.cli import make_folder
from support.cloud_identity import POD_TOKEN, AwsIdentity, GoogleIdentity, GoogleTokens, PrivateGcs, serve
from support.fake_buckets import S3Handler
from support.fetching import contents, options, run_program, safetensors_bytes, spec
from support.object_stores import models_bucket, moto_server
from support.proxies import ForwardProxy, TlsFront, private_certificate
from support.sendfile_server import Fault

FILES = {"config.json": b"{}", "model.safetensors": safetensors_bytes({"a": 5 * 2**20})}


@pytest.fixture(scope="module")
def moto():
    with moto_server() as url:
        yield url


@pytest.fixture
def private_bucket(moto):
    """A bucket whose objects refuse anonymous requests."""
    models_bucket(moto, FILES)
    return moto


@pytest.fixture
def folder(tmp_path):
    """What a fake bucket has."""
    return make_folder(tmp_path / "bucket", FILES)


def program(tmp_path, spec, **environment):
    target = ("--volume", tmp_path / "v", "--name", "model")
    return run_program("fetch", spec, *target, HOME=str(tmp_path), **environment)


def aws_program(tmp_path, url, **environment):
    return program(tmp_path, {"repoId": "s3://models/bert", "endpoint": url}, **environment)


def test_without_an_identity_the_private_bucket_is_refused(private_bucket, tmp_path):
    done = aws_program(tmp_path, private_bucket)
    assert done.returncode == REASONS[Reason.AUTH_FAILED].exit_code, done.stderr


def test_a_web_identity_reads_s3(private_bucket, tmp_path):
    (tmp_path / "token").write_text("ey.web.identity")
    done = aws_program(
        tmp_path,
        private_bucket,
        AWS_ROLE_ARN="arn:aws:iam::123456789012:role/model",
        AWS_WEB_IDENTITY_TOKEN_FILE=str(tmp_path / "token"),
        AWS_ENDPOINT_URL_STS=private_bucket,
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "v", "model") == FILES
    assert "ey.web.identity" not in done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["Container", "Instance"])
def test_container_and_instance_credentials_read_s3(folder, tmp_path, kind):
    (tmp_path / "token").write_text(POD_TOKEN)
    with serve(AwsIdentity) as (identity, _), serve(S3Handler, root=folder) as (s3, ledger):
        environment = {
            "Container": {
                "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{identity.url}/v1/credentials",
                "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": str(tmp_path / "token"),
            },
            "Instance": {"AWS_EC2_METADATA_SERVICE_ENDPOINT": identity.url},
        }[kind]
        done = program(tmp_path, {"repoId": "s3://models", "endpoint": s3.url}, **environment)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "v", "model") == FILES
    for seen in ledger.requests:
        signed = seen.headers.get("authorization", "") + seen.query
        token = seen.headers.get("x-amz-security-token", "") + seen.query
        assert f"ASIA{kind}" in signed
        assert f"session-of-{kind}" in token
    assert f"session-of-{kind}" not in done.stdout + done.stderr


def test_an_identity_service_that_refuses_is_auth_failed(folder, tmp_path):
    with serve(AwsIdentity) as (identity, _), serve(S3Handler, root=folder) as (s3, _):
        done = program(
            tmp_path,
            {"repoId": "s3://models", "endpoint": s3.url},
            AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{identity.url}/v1/credentials",
            AWS_CONTAINER_AUTHORIZATION_TOKEN="wrong-token-of-the-pod",
        )
    assert done.returncode == REASONS[Reason.AUTH_FAILED].exit_code, done.stderr
    assert "identity" in done.stderr
    assert "wrong-token-of-the-pod" not in done.stdout + done.stderr


def test_s3_keys_rotated_during_the_fetch_are_read_again(folder, tmp_path):
    def write(key):
        (tmp_path / "new").write_text(json.dumps({"access_key_id": key, "secret_access_key": "s"}))
        (tmp_path / "new").rename(tmp_path / "s3_credentials.json")

    class Rotating(S3Handler):
        """Refuses the first key once a body was asked for with it."""

        def route(self, path, query):
            if "AKIAOLD" in query:
                write("AKIANEW")
                self.send_text(403, "<Error><Code>ExpiredToken</Code></Error>")
                return
            super().route(path, query)

    write("AKIAOLD")
    with serve(Rotating, root=folder) as (s3, ledger):
        given = spec("s3://models", endpoint=s3.url, secret_ref={"name": "s3"})
        run_fetch(given, tmp_path / "v", "model", options=options(secrets_dir=tmp_path))
    assert contents(tmp_path / "v", "model") == FILES
    assert {key for seen in ledger.requests for key in ("AKIAOLD", "AKIANEW") if key in seen.query} == {
        "AKIAOLD",
        "AKIANEW",
    }


@pytest.fixture
def google():
    return GoogleIdentity()


@pytest.fixture
def public_gcs(folder, google, tmp_path):
    """storage.googleapis.com, as the program meets it behind a proxy; yields (environment, ledger of the bucket)."""
    chain, authority = private_certificate(tmp_path, "storage.googleapis.com")
    with serve(PrivateGcs, root=folder, identity=google) as (bucket, ledger):
        front = TlsFront(bucket.port, chain)
        proxy = ForwardProxy({"storage.googleapis.com:443": ("127.0.0.1", front.port)})
        yield {"HTTPS_PROXY": proxy.url, "MODELCACHE_CA_BUNDLE": str(authority)}, ledger
        proxy.stop()
        front.stop()


def metadata(server):
    address = f"127.0.0.1:{server.port}"
    return {"GCE_METADATA_HOST": address, "GCE_METADATA_IP": address}


def test_workload_identity_reads_gcs(public_gcs, google, tmp_path):
    environment, ledger = public_gcs
    with serve(GoogleTokens, identity=google) as (server, _):
        done = program(tmp_path, {"repoId": "gs://models"}, **environment, **metadata(server))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "v", "model") == FILES
    assert google.given
    assert ledger.requests
    assert not any(token in done.stdout + done.stderr for token in google.given)


def test_without_workload_identity_the_private_bucket_is_refused(public_gcs, tmp_path):
    environment, _ = public_gcs
    done = program(tmp_path, {"repoId": "gs://models"}, **environment, NO_GCE_CHECK="true")
    assert done.returncode == REASONS[Reason.AUTH_FAILED].exit_code, done.stderr
    assert "service_account.json" in done.stderr


def test_the_pods_identity_is_not_shown_to_another_endpoint(folder, google, tmp_path):
    with (
        serve(GoogleTokens, identity=google) as (server, _),
        serve(PrivateGcs, root=folder, identity=google) as (bucket, ledger),
    ):
        done = program(tmp_path, {"repoId": "gs://models", "endpoint": bucket.url}, **metadata(server))
    assert done.returncode == REASONS[Reason.AUTH_FAILED].exit_code, done.stderr
    assert all("authorization" not in seen.headers for seen in ledger.requests)


def test_a_google_token_that_ends_during_the_fetch_is_renewed(folder, google, tmp_path):
    class Revoking(PrivateGcs):
        """Revokes the first token once a body was asked for with it."""

        def route(self, path, query):
            if "alt=media" in query:
                google.revoked.add("ya29.token-0")
            super().route(path, query)

    with (
        serve(GoogleTokens, identity=google) as (tokens, _),
        serve(Revoking, root=folder, identity=google) as (gcs, _),
    ):
        (tmp_path / "service_account.json").write_text(google.service_account(f"{tokens.url}/token"))
        given = spec("gs://models", endpoint=gcs.url, secret_ref={"name": "gcs"})
        run_fetch(given, tmp_path / "v", "model", options=options(secrets_dir=tmp_path))
    assert contents(tmp_path / "v", "model") == FILES
    assert len(google.given) > 1


def test_a_service_account_that_google_refuses_is_auth_failed(folder, google, tmp_path):
    with (
        serve(GoogleTokens, identity=google) as (tokens, ledger),
        serve(PrivateGcs, root=folder, identity=google) as (gcs, _),
    ):
        (tmp_path / "service_account.json").write_text(google.service_account(f"{tokens.url}/token"))
        ledger.add_fault(Fault("/token", times=-1, status=400))
        given = spec("gs://models", endpoint=gcs.url, secret_ref={"name": "gcs"})
        with pytest.raises(FetchError) as caught:
            run_fetch(given, tmp_path / "v", "model", options=options(secrets_dir=tmp_path))
    assert caught.value.reason is Reason.AUTH_FAILED
    assert "PRIVATE" not in str(caught.value)
