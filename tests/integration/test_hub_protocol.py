"""The Hugging Face Hub's API as the weight server speaks it, header by header."""

import contextlib
import hashlib
import http.client
import json
import os
import socket
import ssl
from urllib.parse import quote

import pytest

from modelcache_server import TlsSettings, TokenSettings, catalog
from modelcache_volume import Volume
from modelcache_wire.v1 import weights_pb2
from support.hub_world import NAME, REPO, git_oid, hub_files, hub_world
from support.server_security import AUDIENCE, ISSUER, Issuer, write_certificate
from support.server_volume import (
    HOST,
    Running,
    flip_bit,
    make_volume,
    random_bytes,
    running,
    wait_until,
)

OLD, NEW = hub_files(1), hub_files(2)
LFS = ("model.safetensors", "onnx/model.onnx")
API = f"/api/models/{REPO}"


def pointer(content: bytes) -> bytes:
    sha256 = hashlib.sha256(content).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()


def etag_of(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if path in LFS else git_oid(content)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with hub_world(tmp_path_factory.mktemp("protocol")) as world:
        world.old = world.commit(OLD)
        world.fetch()
        world.new = world.commit(NEW)
        world.fetch()
        yield world


@pytest.fixture(scope="module")
def server(world):
    with running(world.volume, name=NAME) as server:
        yield server


def resolve(server: Running, path: str, ref: str = "main", **options) -> object:
    return server.ask(f"/{REPO}/resolve/{quote(ref, safe='')}/{quote(path)}", **options)


def answer_json(server: Running, path: str, **options):
    answer = server.ask(path, **options)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json; charset=utf-8"), answer
    return json.loads(answer.body)


@pytest.mark.parametrize("path", NEW)
def test_a_file_arrives_with_upstreams_etag_and_commit(server, world, path):
    answer = resolve(server, path)
    assert (answer.status, answer.body == NEW[path]) == (200, True)
    assert answer.headers["etag"] == f'"{etag_of(path, NEW[path])}"'
    assert answer.headers["x-repo-commit"] == world.new
    assert answer.headers["accept-ranges"] == "bytes"
    head = resolve(server, path, method="HEAD")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(NEW[path])))
    for name in ("etag", "x-repo-commit", "content-type", "cache-control"):
        assert head.headers[name] == answer.headers[name]


def test_no_answer_speaks_of_xet_or_leads_elsewhere(server, world):
    paths = [f"/{REPO}/resolve/main/{quote(path)}" for path in NEW]
    for path in (*paths, API, f"{API}?blobs=true", f"{API}/tree/main?recursive=true&expand=true", f"{API}/refs"):
        answer = server.ask(path)
        assert answer.status == 200
        told = " ".join([*answer.headers, *answer.headers.values()]).lower()
        assert "xet" not in told
        assert not {"link", "location", "content-encoding"} & set(answer.headers)
        if path.startswith("/api"):
            assert b"xet" not in answer.body.lower()
    assert server.ask(f"{API}/xet-read-token/{world.new}").status == 404


@pytest.mark.parametrize("ref", ["main", "HEAD", "NEW", "NEW7", "NEW12"])
def test_what_is_active_has_these_names(server, world, ref):
    asked = world.new[: int(ref[3:] or 40)] if ref.startswith("NEW") else ref
    answer = resolve(server, "config.json", asked)
    assert (answer.body, answer.headers["x-repo-commit"]) == (NEW["config.json"], world.new)
    assert answer_json(server, f"{API}/revision/{asked}")["sha"] == world.new
    pinned = ref == "NEW"
    assert ("immutable" in answer.headers["cache-control"]) == pinned
    assert ("no-cache" in answer.headers["cache-control"]) != pinned


@pytest.mark.parametrize("digits", [40, 8, 7])
def test_a_kept_revision_is_served_by_its_commit(server, world, digits):
    asked = world.old[:digits]
    answer = resolve(server, "model.safetensors", asked)
    assert answer.headers["x-repo-commit"] == world.old
    assert answer.body == OLD["model.safetensors"]
    assert answer_json(server, f"{API}/revision/{asked}")["sha"] == world.old
    assert {entry["path"] for entry in answer_json(server, f"{API}/tree/{asked}")} >= {"config.json", "onnx"}


@pytest.mark.parametrize("ref", ["v9", "refs/pr/1", "0" * 40, "0" * 7, "NEW6", "NEW41", "NEWUPPER", "..", "a" * 1000])
def test_other_revisions_are_not_found(server, world, ref):
    known = {"NEW6": world.new[:6], "NEW41": f"{world.new}0", "NEWUPPER": "F" * 40}
    ref = known.get(ref, ref)
    for answer in (
        resolve(server, "config.json", ref),
        server.ask(f"{API}/revision/{quote(ref, safe='')}"),
        server.ask(f"{API}/tree/{quote(ref, safe='')}?recursive=true"),
        server.ask(f"{API}/paths-info/{quote(ref, safe='')}", method="POST", Content_Length="0"),
    ):
        assert (answer.status, answer.headers["x-error-code"]) == (404, "RevisionNotFound")
        assert "no revision" in answer.headers["x-error-message"]


@pytest.mark.parametrize(
    "path", ["nope.json", "onnx", "onnx/", "..%2fFORMAT", "../../../FORMAT", "%2e%2e/%2e%2e/FORMAT", "/etc/passwd", "-"]
)
def test_a_missing_file_is_told_with_the_commit(server, world, path):
    answer = server.ask(f"/{REPO}/resolve/main/{path}")
    assert (answer.status, answer.headers["x-error-code"]) == (404, "EntryNotFound")
    assert answer.headers["x-repo-commit"] == world.new
    assert "has no" in answer.headers["x-error-message"]


def test_who_only_knows_the_address_is_told_the_name(server):
    for path in ("/", f"/{REPO}", f"/{REPO}/tree/main"):
        answer = server.ask(path)
        assert (answer.status, answer.body) == (404, f"Files are at /{REPO}/resolve/REVISION/PATH.\n".encode())


@pytest.mark.parametrize(
    "path",
    [
        "/api/models/acme/other",
        "/api/models/other",
        "/api/models/acme/other/tree/main",
        "/acme/other/resolve/main/config.json",
        "/tiny/resolve/main/config.json",
        "/acme/resolve/main/config.json",
        "/acme%2ftiny/resolve/main/config.json",
        f"/api/datasets/{REPO}",
        f"/datasets/{REPO}/resolve/main/config.json",
        f"/spaces/{REPO}/resolve/main/config.json",
        f"/api/spaces/{REPO}",
    ],
)
def test_other_repos_are_not_found_and_nothing_is_passed_on(server, world, path):
    before = len(world.hub.ledger.requests)
    answer = server.ask(path)
    assert (answer.status, answer.headers["x-error-code"]) == (404, "RepoNotFound")
    assert len(world.hub.ledger.requests) == before


@pytest.mark.parametrize(
    "path",
    [
        f"{API}/discussions", f"{API}/commits/main", f"{API}/xet-read-token/main", "/api/telemetry", "/api/whoami-v2",
        "/api/agent-harnesses", "/api/models", "/api", f"{API}/revision", f"{API}/refs/more", f"{API}/paths-info/main",
    ],
)  # fmt: skip
def test_pages_that_are_not_there_say_nothing_about_repos(server, path):
    answer = server.ask(path)
    assert answer.status == 404
    assert "x-error-code" not in answer.headers


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "POST"])
@pytest.mark.parametrize(
    "path", [f"/{REPO}/resolve/main/config.json", f"{API}/commit/main", "/api/repos/create", API, "/api/models"]
)
@pytest.mark.parametrize("body", [b"", b"{}"])
def test_writing_is_not_allowed(server, method, path, body):
    connection = http.client.HTTPConnection(HOST, server.addresses.http, timeout=30)
    connection.request(method, path, body=body)
    response = connection.getresponse()
    assert (response.status, response.headers["Allow"]) == (405, "GET, HEAD")
    connection.close()


@pytest.mark.parametrize("path", [f"/{REPO}/resolve/main/config.json", f"{API}/commit/main", "/api/repos/create"])
@pytest.mark.parametrize("method", ["PUT", "POST"])
@pytest.mark.parametrize("length", ["Content-Length: 3000000", "Transfer-Encoding: chunked"])
def test_writing_much_is_not_allowed_either(server, method, path, length):
    with socket.create_connection((HOST, server.addresses.http), timeout=30) as connection:
        connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: h\r\n{length}\r\n\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 405 ")


@pytest.mark.parametrize("length", ["Content-Length: 3000000", "Content-Length: 5", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize(
    ("path", "status"),
    [(f"{API}/paths-info/nope", 404), ("/api/models/acme/no/paths-info/main", 404), (f"{API}/commit/main", 405)],
)
def test_a_body_that_is_not_needed_is_not_waited_for(server, path, status, length):
    with socket.create_connection((HOST, server.addresses.http), timeout=30) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\nHost: h\r\n{length}\r\nExpect: 100-continue\r\n\r\n".encode())
        connection.sendall(b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        answer = b""
        while data := connection.recv(4096):
            answer += data
        assert answer.startswith(f"HTTP/1.1 {status} ".encode())
        assert b"Connection: close" in answer
        assert answer.count(b"HTTP/1.1 ") == 1, "the body was taken for the next request"


def test_who_asks_first_is_told_to_send_the_body(server):
    body = b"paths=config.json"
    head = f"POST {API}/paths-info/main HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\nExpect: 100-continue\r\n"
    with socket.create_connection((HOST, server.addresses.http), timeout=30) as connection:
        for _ in range(2):
            connection.sendall(f"{head}\r\n".encode())
            assert connection.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(body)
            assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")
        connection.sendall(f"{head}\r\n".encode() + body)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 "), "who sent it already needs no such word"


@pytest.mark.parametrize("length", ["Content-Length: 262145", "Transfer-Encoding: chunked"])
def test_a_body_that_is_too_long_is_refused_before_it_is_sent(server, length):
    with socket.create_connection((HOST, server.addresses.http), timeout=30) as connection:
        connection.sendall(f"POST {API}/paths-info/main HTTP/1.1\r\nHost: h\r\n{length}\r\n\r\n".encode())
        assert connection.recv(4096).startswith((b"HTTP/1.1 413 ", b"HTTP/1.1 411 "))


def test_the_model_info_tells_files_and_no_more_than_is_known(server, world):
    info = answer_json(server, API)
    assert (info["id"], info["sha"]) == (REPO, world.new)
    assert sorted(sibling["rfilename"] for sibling in info["siblings"]) == sorted(NEW)
    assert all(set(sibling) == {"rfilename"} for sibling in info["siblings"])
    assert (info["private"], info["gated"], info["disabled"], info["tags"]) == (False, False, False, [])
    assert info["lastModified"].endswith("Z")
    siblings = {each["rfilename"]: each for each in answer_json(server, f"{API}?blobs=True")["siblings"]}
    for path, content in NEW.items():
        sibling = siblings[path]
        assert sibling["size"] == len(content)
        if path in LFS:
            sha256 = hashlib.sha256(content).hexdigest()
            assert sibling["lfs"] == {"sha256": sha256, "size": len(content), "pointerSize": len(pointer(content))}
        else:
            assert sibling["blobId"] == git_oid(content)
            assert "lfs" not in sibling


def test_the_tree_lists_files_and_folders(server, world):
    everything = {entry["path"]: entry for entry in answer_json(server, f"{API}/tree/main?recursive=True&expand=False")}
    assert set(everything) == {*NEW, "onnx", "tokenizer", "tokenizer/deep"}
    for path, content in NEW.items():
        assert (everything[path]["type"], everything[path]["size"]) == ("file", len(content))
        assert everything[path].get("lfs", {"oid": everything[path]["oid"]})["oid"] == etag_of(path, content)
    top = answer_json(server, f"{API}/tree/{world.new}")
    assert {entry["path"] for entry in top} == {path.split("/")[0] for path in NEW}
    assert answer_json(server, f"{API}/tree/main/tokenizer/deep") == [everything["tokenizer/deep/vocab.txt"]]
    assert len(answer_json(server, f"{API}/tree/main/tokenizer?recursive=true")) == 3
    for missing in ("nope", "config.json", "onnx/model.onnx/x"):
        answer = server.ask(f"{API}/tree/main/{missing}")
        assert (answer.status, answer.headers["x-error-code"]) == (404, "EntryNotFound")
        assert answer.headers["x-repo-commit"] == world.new


def test_a_folders_id_is_that_of_its_git_tree(server):
    folders = {entry["path"]: entry["oid"] for entry in answer_json(server, f"{API}/tree/main?recursive=1")}
    content = b"100644 vocab.txt\0" + bytes.fromhex(git_oid(NEW["tokenizer/deep/vocab.txt"]))
    deep = hashlib.sha1(b"tree %d\0" % len(content) + content).digest()
    assert folders["tokenizer/deep"] == deep.hex()
    name = "names ü+%.json".encode()
    content = b"40000 deep\0" + deep + b"100644 " + name + b"\0" + bytes.fromhex(git_oid(b"{}"))
    assert folders["tokenizer"] == hashlib.sha1(b"tree %d\0" % len(content) + content).hexdigest()


def post(server: Running, path: str, body: str, kind: str = "application/x-www-form-urlencoded"):
    connection = http.client.HTTPConnection(HOST, server.addresses.http, timeout=30)
    connection.request("POST", path, body=body.encode(), headers={"Content-Type": kind})
    response = connection.getresponse()
    found = response.status, response.read()
    connection.close()
    return found


def test_paths_info_tells_of_those_that_are_there(server):
    asked = ["config.json", "onnx", "nope", "tokenizer/names ü+%.json", "config.json", "../FORMAT"]
    form = "&".join(f"paths={quote(path, safe='')}" for path in asked) + "&expand=False"
    kinds = ("application/json", "Application/JSON; charset=UTF-8")
    found = [post(server, f"{API}/paths-info/main", json.dumps({"paths": asked}), kind) for kind in kinds]
    for status, body in [*found, post(server, f"{API}/paths-info/main", form)]:
        assert status == 200
        kinds = [(entry["path"], entry["type"]) for entry in json.loads(body)]
        assert kinds == [("config.json", "file"), ("onnx", "directory"), ("tokenizer/names ü+%.json", "file")]
    assert json.loads(post(server, f"{API}/paths-info/main", "")[1]) == []
    for nonsense in ("[", '{"paths": 5}', '{"paths": [5]}', "[" * 60_000):
        assert post(server, f"{API}/paths-info/main", nonsense, "application/json")[0] == 400


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (
            "multipart/form-data; boundary=b",
            '--b\r\nContent-Disposition: form-data; name="paths"\r\n\r\nonnx\r\n--b--\r\n',
        ),
        ("application/x-www-form-urlencoded", '{"paths": ["config.json"]}'),
        ("text/plain", "paths=config.json"),
    ],
)
def test_a_body_that_is_no_list_of_paths_is_no_empty_answer(server, kind, body):
    status, said = post(server, f"{API}/paths-info/main", body, kind)
    assert (status, b"application/x-www-form-urlencoded" in said) == (400, True)


def test_paths_info_takes_as_many_paths_as_the_hub_does(server):
    asked = [f"{'ü' * 30}/{number}" for number in range(999)] + ["config.json"]
    form = "&".join(f"paths={quote(path, safe='')}" for path in asked)
    assert len(form) > 180_000
    status, body = post(server, f"{API}/paths-info/main", form)
    assert (status, [entry["path"] for entry in json.loads(body)]) == (200, ["config.json"])


def test_access_can_be_checked(server):
    assert answer_json(server, f"{API}/auth-check") == {}
    writing = server.ask(f"{API}/auth-check/write")
    assert (writing.status, writing.headers["x-error-message"]) == (403, "Nobody may write: this server is read-only.")
    assert server.ask("/api/models/acme/other/auth-check").headers["x-error-code"] == "RepoNotFound"


def test_an_escaped_slash_in_a_repos_name_is_told(server):
    for path in ("/api/models/acme%2ftiny", "/acme%2Ftiny/resolve/main/config.json"):
        assert server.ask(path).headers["x-error-message"] == "Write the slash of acme/tiny as it is, not as %2F."


def test_a_target_may_be_a_whole_url(server):
    answer = server.ask(f"http://proxied{API}?blobs=true")
    assert (answer.status, json.loads(answer.body)["id"]) == (200, REPO)


def test_refs_name_what_is_active(server, world):
    refs = answer_json(server, f"{API}/refs")
    assert refs["branches"] == [{"name": "main", "ref": "refs/heads/main", "targetCommit": world.new}]
    assert (refs["tags"], refs["converts"], refs["pullRequests"]) == ([], [], [])
    for ref in ("refs/heads/main", "refs%2Fheads%2Fmain"):
        answer = server.ask(f"/{REPO}/resolve/{ref}/onnx/model.onnx")
        assert (answer.body, answer.headers["x-repo-commit"]) == (NEW["onnx/model.onnx"], world.new)


@pytest.mark.parametrize("ref", ["refs/convert/parquet", "refs/pr/3", "refs/heads/nope", "refs", "refs/heads"])
def test_other_refs_are_not_found_under_their_whole_name(server, ref):
    for path in (f"/{REPO}/resolve/{ref}/config.json", f"{API}/tree/{ref}", f"{API}/revision/{ref}"):
        answer = server.ask(path)
        assert (answer.status, answer.headers["x-error-code"]) == (404, "RevisionNotFound")
        assert f"'{ref}" in answer.headers["x-error-message"]


@pytest.mark.parametrize(
    ("wanted", "first", "last"),
    [
        ("bytes=0-", 0, None),
        ("bytes=0-0", 0, 0),
        ("bytes=4194303-4194304", 4194303, 4194304),
        ("bytes=8000000-99999999", 8000000, None),
        ("bytes=-100", -100, None),
        (f"bytes=8000000-{'9' * 5000}", 8000000, None),
        (f"bytes=-{'9' * 5000}", 0, None),
    ],
)
def test_single_ranges(server, wanted, first, last):
    content = NEW["model.safetensors"]
    answer = resolve(server, "model.safetensors", Range=wanted)
    start = first % len(content)
    end = len(content) - 1 if last is None else last
    assert (answer.status, answer.body == content[start : end + 1]) == (206, True)
    assert answer.headers["content-range"] == f"bytes {start}-{end}/{len(content)}"


def test_other_ranges(server, world):
    size = len(NEW["model.safetensors"])
    for first in (size, "9" * 20, "9" * 5000):
        beyond = resolve(server, "model.safetensors", Range=f"bytes={first}-")
        assert (beyond.status, beyond.headers["content-range"]) == (416, f"bytes */{size}")
        assert beyond.headers["x-repo-commit"] == world.new
    head = resolve(server, "model.safetensors", method="HEAD", Range="bytes=0-1")
    assert (head.status, head.headers["content-length"]) == (200, str(size)), "only GET has ranges"
    several = resolve(server, "config.json", Range="bytes=0-1,3-4")
    assert (several.status, several.body) == (200, NEW["config.json"])
    empty = resolve(server, "empty.txt", Range="bytes=0-0")
    assert (empty.status, empty.body, empty.headers["content-range"]) == (200, b"", "bytes */0")


def test_conditions(server):
    etag = resolve(server, "model.safetensors", method="HEAD").headers["etag"]
    for known in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        assert resolve(server, "model.safetensors", If_None_Match=known).status == 304
    assert resolve(server, "model.safetensors", If_None_Match='"x"').status == 200
    assert resolve(server, "model.safetensors", Range="bytes=0-1", If_Range=etag).status == 206
    for other in ('"x"', f"W/{etag}", "*", f'"x", {etag}', "Sun, 29 Nov 2026 00:00:00 GMT"):
        answer = resolve(server, "model.safetensors", Range="bytes=0-1", If_Range=other)
        assert (answer.status, answer.body == NEW["model.safetensors"]) == (200, True)
    for meant in (etag, f'"x", {etag}', "*"):
        assert resolve(server, "model.safetensors", Range="bytes=0-1", If_Match=meant).status == 206
        assert resolve(server, "model.safetensors", method="HEAD", If_Match=meant, If_None_Match=etag).status == 304
    for other in ('"x"', f"W/{etag}"):
        answer = resolve(server, "model.safetensors", Range="bytes=0-1", If_Match=other, If_None_Match=etag)
        assert (answer.status, answer.headers["x-error-code"]) == (412, "PreconditionFailed")
        assert etag in answer.headers["x-error-message"]


def test_an_endpoint_with_a_slash_at_its_end_works(server):
    assert server.ask(f"//{REPO}/resolve/main/config.json").body == NEW["config.json"]
    assert answer_json(server, f"/{API}")["id"] == REPO


def test_a_requested_tag_a_name_with_slashes_and_main_are_the_same(tmp_path):
    with hub_world(tmp_path) as world:
        sha = world.commit(OLD)
        world.hub.repos[REPO].tags["v1.0"] = sha
        world.hub.repos[REPO].branches["refs/pr/7"] = sha
        world.commit(NEW)
        for ref in ("v1.0", "refs/pr/7"):
            world.fetch(ref)
            with running(world.volume) as server:
                for asked in (ref, "main", "HEAD", sha):
                    assert resolve(server, "config.json", asked).headers["x-repo-commit"] == sha
                assert server.ask(f"/{REPO}/resolve/{ref}/onnx/model.onnx").body == OLD["onnx/model.onnx"]
                assert len(answer_json(server, f"{API}/tree/{ref}/onnx")) == 1
                assert answer_json(server, f"{API}/revision/{ref}")["sha"] == sha
                refs = answer_json(server, f"{API}/refs")
                own = {"name": ref, "ref": ref if ref == "refs/pr/7" else f"refs/heads/{ref}", "targetCommit": sha}
                assert own in refs["pullRequests" if ref == "refs/pr/7" else "branches"]
                assert [each["name"] for each in refs["branches"]] == ["main", *({ref} - {"refs/pr/7"})]
                other = {"v1.0": "refs/pr/7", "refs/pr/7": "v1.0"}[ref]
                assert resolve(server, "config.json", other).status == 404


def test_a_requested_short_commit_is_no_branch(tmp_path):
    with hub_world(tmp_path) as world:
        sha = world.commit(OLD)
        world.fetch(sha[:8])
        with running(world.volume) as server:
            assert [each["name"] for each in answer_json(server, f"{API}/refs")["branches"]] == ["main"]
            assert resolve(server, "config.json", sha[:8]).status == 200


def test_a_short_commit_that_fits_two_is_refused(tmp_path):
    for last in "12":
        make_volume(tmp_path / "volume", {"config.json": last.encode()}, commit="abcdef0" * 5 + f"0000{last}")
    with running(tmp_path / "volume") as server:
        answer = server.ask("/org/name/resolve/abcdef0/config.json")
        assert (answer.status, answer.headers["x-error-code"]) == (404, "RevisionNotFound")
        assert "2 commits begin so" in answer.headers["x-error-message"]
        assert server.ask("/org/name/resolve/" + "abcdef0" * 5 + "00001/config.json").body == b"1"


def test_two_commits_with_the_same_files_are_both_served_under_their_own_name(tmp_path):
    for commit in "ab":
        make_volume(tmp_path / "volume", {"config.json": b"{}"}, commit=commit * 40)
    with running(tmp_path / "volume") as server:
        for ref, commit in (("a" * 40, "a"), ("b" * 40, "b"), ("main", "b")):
            assert server.ask(f"/org/name/resolve/{ref}/config.json").headers["x-repo-commit"] == commit * 40


@pytest.mark.parametrize("source", ["s3://bucket/models/x", "gs://bucket", "file:///models/x"])
def test_buckets_and_folders_are_called_by_the_models_name(tmp_path, source):
    content = random_bytes(300_000, 5)
    files = {"model.bin": content, "config.json": b"{}"}
    commit = hashlib.sha256(source.encode()).hexdigest()[:40]
    make_volume(tmp_path / "volume", files, name="bert", repo_id=source, requested="", commit=commit)
    with running(tmp_path / "volume") as server:
        for name in ("bert", "modelcache/bert"):
            for path, data in files.items():
                answer = server.ask(f"/{name}/resolve/main/{path}")
                assert (answer.body == data, answer.headers["x-repo-commit"]) == (True, commit)
                assert answer.headers["etag"] == f'"{hashlib.sha256(data).hexdigest()}"'
            info = answer_json(server, f"/api/models/{name}")
            assert (info["id"], info["sha"]) == (name, commit)
            for entry in answer_json(server, f"/api/models/{name}/tree/{commit[:8]}"):
                assert entry["oid"] == git_oid(pointer(files[entry["path"]])), "the id that an LFS pointer has in Git"
                assert entry["lfs"]["oid"] == hashlib.sha256(files[entry["path"]]).hexdigest()
            assert [each["name"] for each in answer_json(server, f"/api/models/{name}/refs")["branches"]] == ["main"]
        for name in ("bucket", "modelcache/other", "modelcache", "org/bert", "bert/other"):
            for path in (f"/{name}/resolve/main/config.json", f"/api/models/{name}", f"/api/models/{name}/tree/main"):
                answer = server.ask(path)
                assert answer.headers["x-error-code"] == "RepoNotFound"
            assert "modelcache/bert or bert" in answer.headers["x-error-message"]


def test_a_bucket_may_be_called_as_the_namespace_is(tmp_path):
    make_volume(tmp_path / "volume", {"a": b"1"}, name="modelcache", repo_id="s3://bucket", requested="")
    with running(tmp_path / "volume") as server:
        for name in ("modelcache", "modelcache/modelcache"):
            assert server.ask(f"/{name}/resolve/main/a").body == b"1"
            assert answer_json(server, f"/api/models/{name}")["id"] == name


def test_a_plain_folder_is_called_by_its_name_and_has_a_stable_commit(tmp_path):
    folder = tmp_path / "minilm"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(OLD["model.safetensors"])
    commits = []
    for _ in range(2):
        with running(folder) as server:
            answer = server.ask("/minilm/resolve/main/model.safetensors")
            assert answer.body == OLD["model.safetensors"]
            commits.append(answer.headers["x-repo-commit"])
            assert "lastModified" not in answer_json(server, "/api/models/minilm")
    assert commits[0] == commits[1]
    assert len(bytes.fromhex(commits[0])) == 20


def test_after_a_switch_main_is_new_and_the_old_commit_stays_until_it_is_pruned(tmp_path):
    with hub_world(tmp_path) as world:
        old = world.commit(OLD)
        world.fetch()
        with running(world.volume) as server:
            assert resolve(server, "config.json").headers["x-repo-commit"] == old
            new = world.commit(NEW)
            world.fetch()
            wait_until(lambda: resolve(server, "config.json").headers["x-repo-commit"] == new, "main does not move")
            assert resolve(server, "model.safetensors", old).body == OLD["model.safetensors"]
            volume = Volume.open(world.volume)
            for lease in volume.layout.leases.iterdir():
                lease.unlink()
            third = world.commit(hub_files(3))
            world.fetch()
            world.fetch(history=0)
            for lease in volume.layout.leases.iterdir():
                lease.unlink()
            with volume.lock(wait=10) as writer:
                writer.prune()
            wait_until(lambda: resolve(server, "config.json").headers["x-repo-commit"] == third, "main does not move")
            wait_until(lambda: resolve(server, "config.json", old).status == 404, "the pruned one is still there")
            assert resolve(server, "config.json", old).headers["x-error-code"] == "RevisionNotFound"


def test_a_model_that_was_renamed_keeps_its_old_commits_under_the_old_name(tmp_path):
    make_volume(tmp_path / "volume", {"a": b"old"}, repo_id="org/old", commit="a" * 40)
    make_volume(tmp_path / "volume", {"a": b"stranger"}, repo_id="org/other", commit="c" * 40, name="other")
    make_volume(tmp_path / "volume", {"a": b"new"}, repo_id="org/new", commit="b" * 40)
    with running(tmp_path / "volume", name="m") as server:
        assert server.ask("/org/new/resolve/main/a").body == b"new"
        assert server.ask(f"/org/old/resolve/{'a' * 40}/a").body == b"old"
        assert server.ask("/org/old/resolve/main/a").headers["x-error-code"] == "RevisionNotFound"
        assert answer_json(server, "/api/models/org/old/refs")["branches"] == []
        for path in ("/org/other/resolve/main/a", f"/org/other/resolve/{'c' * 40}/a"):
            assert server.ask(path).headers["x-error-code"] == "RepoNotFound"


@pytest.mark.parametrize(
    "path", ["/org/name/resolve/main/config.json", "/api/models/org/name", "/api/models/org/name/tree/main"]
)
def test_reading_and_asking_renew_the_lease_of_what_will_be_read(tmp_path, path):
    volume, snapshot = make_volume(tmp_path / "volume", {"config.json": b"{}"})
    with running(volume.root) as server:
        assert volume.leased() == set()
        server.ask(path)
        assert volume.leased() == {snapshot.digest}


@pytest.mark.parametrize("lane", ["hub", "snapshots", "grpc"])
def test_a_body_that_takes_long_keeps_its_revision(tmp_path, monkeypatch, lane):
    monkeypatch.setattr(catalog, "_LEASE_RENEWAL_SECONDS", 0.0)
    content = random_bytes(32 << 20)
    volume, snapshot = make_volume(tmp_path / "volume", {"model.bin": content})
    urls = {"hub": "/org/name/resolve/main/model.bin", "snapshots": f"/v1/snapshots/{snapshot.digest}/model.bin"}
    with running(volume.root) as server, contextlib.ExitStack() as closing:
        if lane == "grpc":
            request = weights_pb2.ReadRequest(
                digest=snapshot.digest, ranges=[weights_pb2.Range(path="model.bin", length=len(content))]
            )
            replies = closing.enter_context(server.stub()).Read(request, timeout=60)
            pieces = (reply.data for reply in replies)
        else:
            connection = http.client.HTTPConnection(HOST, server.addresses.http, timeout=60)
            closing.callback(connection.close)
            connection.request("GET", urls[lane])
            response = connection.getresponse()
            pieces = iter(lambda: response.read(1 << 20), b"")
        received = [next(pieces)]
        lapsed = volume.layout.lease(snapshot.digest, "test")
        os.utime(lapsed, (0, 0))
        while snapshot.digest not in volume.leased():
            received.append(next(pieces))
        assert b"".join([*received, *pieces]) == content


def test_before_anything_is_active_clients_are_told_to_come_again(tmp_path):
    Volume.create(tmp_path / "volume")
    with running(tmp_path / "volume", ready=False) as server:
        for path in (API, f"/{REPO}/resolve/main/config.json"):
            answer = server.ask(path)
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")


def test_a_corrupt_blob_cuts_the_download_before_a_wrong_byte(tmp_path):
    with hub_world(tmp_path) as world:
        world.commit(NEW)
        world.fetch()
        volume = Volume.open(world.volume)
        (snapshot,) = volume.snapshots()
        content = NEW["model.safetensors"]
        flip_bit(snapshot.blob_path(snapshot.file("model.safetensors")), 4194304 + 100)
        flip_bit(snapshot.blob_path(snapshot.file("config.json")), 3)
        with running(world.volume, warmup_bytes=0) as server:
            connection = http.client.HTTPConnection(HOST, server.addresses.http)
            connection.request("GET", f"/{REPO}/resolve/main/model.safetensors")
            with pytest.raises(http.client.IncompleteRead) as cut:
                connection.getresponse().read()
            assert cut.value.partial == content[:4194304]
            connection.close()
            for answer in (
                resolve(server, "model.safetensors", Range="bytes=4194304-"),
                resolve(server, "config.json"),
            ):
                assert (answer.status, answer.headers["x-error-code"]) == (500, "CorruptBlob")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    issuer = Issuer()
    issuer.add_ec("key")
    tokens = TokenSettings(issuer.publish(folder / "jwks.json"), ISSUER, AUDIENCE, ("default/reader",))
    make_volume(folder / "volume", {"config.json": b"{}"})
    with running(folder / "volume", tokens=tokens) as server:
        yield server, issuer


PAGES = ("/org/name/resolve/main/config.json", "/api/models/org/name", "/api/models/no/such", "/api/nothing", "/")


@pytest.mark.parametrize("path", PAGES)
def test_without_a_valid_token_nothing_is_told(guarded, path):
    server, issuer = guarded
    for headers in ({}, *({"Authorization": f"Bearer {bad}"} for bad in ("hf_abc", issuer.token(seconds=-60)))):
        for method in ("GET", "HEAD"):
            answer = server.ask(path, method=method, **headers)
            assert answer.status == 401
            assert answer.headers["x-error-message"].startswith("Not authenticated: "), "also where there is no body"
        answer = server.ask(path, X_Forwarded_Proto="https", **headers)
        assert answer.headers["x-error-message"] == "Invalid credentials in Authorization header"
        assert b"Not authenticated: " in answer.body


def test_over_tls_a_401_has_the_words_that_clients_know(guarded, tmp_path):
    certificate, key = write_certificate(tmp_path)
    settings = guarded[0].server.settings
    with running(settings.root, tokens=settings.tokens, tls=TlsSettings(certificate, key)) as server:
        context = ssl.create_default_context(cafile=str(certificate))
        connection = http.client.HTTPSConnection(HOST, server.addresses.http, timeout=30, context=context)
        connection.request("HEAD", PAGES[0])
        answer = connection.getresponse()
        assert (answer.status, answer.headers["X-Error-Message"]) == (
            401,
            "Invalid credentials in Authorization header",
        )
        connection.close()


@pytest.mark.parametrize("path", PAGES)
def test_who_is_not_allowed_is_told_how_to_be(guarded, path):
    server, issuer = guarded
    answer = server.ask(path, Authorization=f"Bearer {issuer.token('batch/job')}")
    assert (answer.status, answer.headers["x-error-code"]) == (403, "GatedRepo")
    for part in ("batch/job", "spec.server.access.serviceAccounts"):
        assert part in answer.headers["x-error-message"]


def test_who_is_allowed_reads_and_no_proxy_keeps_it(guarded):
    server, issuer = guarded
    token = {"Authorization": f"Bearer {issuer.token()}"}
    for path in PAGES[:2]:
        answer = server.ask(path, **token)
        assert answer.status == 200
        assert answer.headers["cache-control"].startswith("private")


def test_authorization_is_never_logged_nor_answered(guarded, caplog):
    server, issuer = guarded
    caplog.set_level("DEBUG")
    user_token = "hf_" + "S" * 34
    tokens = (issuer.token(), issuer.token("batch/job"), user_token)
    for token in tokens:
        for path in (*PAGES, f"/org/name/resolve/main/config.json?token={user_token}"):
            answer = server.ask(path, Authorization=f"Bearer {token}")
            assert token not in str(answer.headers)
            assert token.encode() not in answer.body
    told = caplog.text + str([vars(record) for record in caplog.records])
    assert "/org/name/resolve/main/config.json" in told
    for token in tokens:
        assert token not in told
        assert token.rpartition(".")[2] not in told
