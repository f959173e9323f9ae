"""What programs do with huggingface_hub, as one program that runs with any version of it from 0.34 on.

    python hub_checks.py WORLD.json     prints one JSON object a line: {"check", "failure"}

HF_ENDPOINT leads to the weight server and HF_HOME to an empty folder. It imports nothing of this repository.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
from huggingface_hub import (
    HfApi,
    HfFileSystem,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    scan_cache_dir,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

MAJOR = int(huggingface_hub.__version__.partition(".")[0])
CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


def raises(kind, call, *arguments, **options):
    """Call what has to fail, exactly so; the error."""
    caught = None
    try:
        call(*arguments, **options)
    except kind as error:
        caught = error
    assert caught is not None, f"no {kind.__name__}"
    # A masked error says that the file is not in the local cache, whatever the server said.
    assert not isinstance(caught, LocalEntryNotFoundError), repr(caught)
    return caught


def same(path, w, name, files=None):
    found = Path(path).read_bytes()
    assert hashlib.sha256(found).hexdigest() == (files or w.files)[name]["sha256"], name


def fresh(w):
    return tempfile.mkdtemp(dir=w.folder)


# --- info


@check
def model_info_of_main(w):
    info = w.api.model_info(w.repo)
    assert (info.id, info.sha) == (w.repo, w.active)
    assert sorted(s.rfilename for s in info.siblings) == sorted(w.files)
    assert (info.private, info.gated, info.disabled) == (False, False, False)


@check
def model_info_with_blobs(w):
    info = w.api.model_info(w.repo, files_metadata=True)
    for sibling in info.siblings:
        known = w.files[sibling.rfilename]
        assert sibling.size == known["size"]
        assert (sibling.lfs.sha256 if sibling.lfs else sibling.blob_id) == known["etag"]


@check
def model_info_expanded(w):
    assert w.api.model_info(w.repo, expand=["sha", "siblings"]).sha == w.active


@check
def model_info_by_every_name(w):
    for name in w.names:
        assert w.api.model_info(w.repo, revision=name).sha == w.active, name
    for name in (w.previous, w.previous[:7]):
        assert w.api.model_info(w.repo, revision=name).sha == w.previous, name


@check
def repo_info_and_exists(w):
    assert w.api.repo_info(w.repo).sha == w.active
    assert w.api.repo_exists(w.repo)
    assert not w.api.repo_exists("acme/none")
    assert w.api.revision_exists(w.repo, w.previous)
    assert not w.api.revision_exists(w.repo, "nope")
    assert w.api.file_exists(w.repo, "config.json")
    assert not w.api.file_exists(w.repo, "nope.json")


@check
def a_repo_is_no_dataset(w):
    raises(RepositoryNotFoundError, w.api.dataset_info, w.repo)
    raises(RepositoryNotFoundError, w.api.space_info, w.repo)


# --- lists


@check
def list_repo_files(w):
    assert sorted(w.api.list_repo_files(w.repo)) == sorted(w.files)
    assert sorted(w.api.list_repo_files(w.repo, revision=w.previous)) == sorted(w.old_files)


@check
def list_repo_tree_top(w):
    entries = {entry.path: entry for entry in w.api.list_repo_tree(w.repo)}
    assert set(entries) == {path.split("/")[0] for path in w.files}
    assert type(entries["onnx"]).__name__ == "RepoFolder"


@check
def list_repo_tree_recursive(w):
    entries = {entry.path: entry for entry in w.api.list_repo_tree(w.repo, recursive=True, expand=True)}
    for path, known in w.files.items():
        assert entries[path].size == known["size"]
        assert (entries[path].lfs.sha256 if entries[path].lfs else entries[path].blob_id) == known["etag"]


@check
def list_repo_tree_of_a_folder(w):
    (entry,) = w.api.list_repo_tree(w.repo, "tokenizer/deep", revision=w.active)
    assert entry.path == "tokenizer/deep/vocab.txt"


@check
def get_paths_info(w):
    found = w.api.get_paths_info(w.repo, ["config.json", "onnx", "nope", "tokenizer/names ü+%.json"])
    assert [info.path for info in found] == ["config.json", "onnx", "tokenizer/names ü+%.json"]
    assert w.api.get_paths_info(w.repo, "model.safetensors", expand=True)[0].lfs.sha256


@check
def get_paths_info_of_as_many_as_the_hub_takes(w):
    paths = [f"{'a' * 80}/ü{number}" for number in range(999)]
    assert [info.path for info in w.api.get_paths_info(w.repo, [*paths, "config.json"])] == ["config.json"]


@check
def list_repo_refs(w):
    refs = w.api.list_repo_refs(w.repo)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": w.active, w.tag: w.active}
    for ref in refs.branches:
        assert w.api.model_info(w.repo, revision=ref.ref).sha == w.active


# --- one file


@check
def file_metadata(w):
    for path, known in w.files.items():
        metadata = get_hf_file_metadata(hf_hub_url(w.repo, path))
        assert (metadata.commit_hash, metadata.etag, metadata.size) == (w.active, known["etag"], known["size"]), path
        assert metadata.location.startswith(w.endpoint)
        assert getattr(metadata, "xet_file_data", None) is None


@check
def download_each_file(w):
    for path in w.files:
        same(hf_hub_download(w.repo, path, cache_dir=w.cache), w, path)


@check
def download_by_every_name(w):
    for name in w.names:
        place = hf_hub_download(w.repo, "onnx/model.onnx", revision=name, cache_dir=fresh(w))
        same(place, w, "onnx/model.onnx")
        assert f"/snapshots/{w.active}/" in place, place


@check
def download_of_an_older_revision(w):
    for name in (w.previous, w.previous[:7]):
        place = hf_hub_download(w.repo, "model.safetensors", revision=name, cache_dir=w.cache)
        same(place, w, "model.safetensors", w.old_files)
        assert f"/snapshots/{w.previous}/" in place


@check
def download_with_subfolder(w):
    same(
        hf_hub_download(w.repo, "vocab.txt", subfolder="tokenizer/deep", cache_dir=w.cache),
        w,
        "tokenizer/deep/vocab.txt",
    )


@check
def download_to_a_folder(w):
    folder = fresh(w)
    same(hf_hub_download(w.repo, "onnx/model.onnx", local_dir=folder), w, "onnx/model.onnx")
    assert (Path(folder) / "onnx/model.onnx").is_file()


@check
def download_by_force(w):
    same(hf_hub_download(w.repo, "config.json", cache_dir=w.cache, force_download=True), w, "config.json")


@check
def what_was_downloaded_is_there_offline(w):
    cache = fresh(w)
    place = hf_hub_download(w.repo, "config.json", cache_dir=cache)
    assert hf_hub_download(w.repo, "config.json", cache_dir=cache, local_files_only=True) == place
    assert try_to_load_from_cache(w.repo, "config.json", cache_dir=cache) == place


@check
def a_missing_file_is_remembered(w):
    cache = fresh(w)
    raises(EntryNotFoundError, hf_hub_download, w.repo, "nope.json", cache_dir=cache)
    known = try_to_load_from_cache(w.repo, "nope.json", cache_dir=cache, revision=w.active)
    assert known is huggingface_hub.file_download._CACHED_NO_EXIST


@check
def a_cache_that_upstream_filled_is_not_downloaded_again(w):
    cache = fresh(w)
    place = Path(snapshot_download(w.repo, cache_dir=cache, endpoint=w.upstream))
    before = {blob.name: blob.stat().st_ino for blob in (place.parents[1] / "blobs").iterdir()}
    assert Path(snapshot_download(w.repo, cache_dir=cache)) == place
    assert {blob.name: blob.stat().st_ino for blob in (place.parents[1] / "blobs").iterdir()} == before


# --- snapshots


@check
def snapshot_of_everything(w):
    place = Path(snapshot_download(w.repo, cache_dir=fresh(w)))
    assert place.name == w.active
    assert {str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()} == set(w.files)
    for path in w.files:
        same(place / path, w, path)


@check
def snapshot_by_every_name(w):
    for name in w.names:
        assert Path(snapshot_download(w.repo, revision=name, cache_dir=w.cache)).name == w.active, name
    for name in (w.previous, w.previous[:7]):
        place = Path(snapshot_download(w.repo, revision=name, cache_dir=w.cache))
        assert place.name == w.previous
        same(place / "model.safetensors", w, "model.safetensors", w.old_files)


@check
def snapshot_with_patterns(w):
    place = Path(
        snapshot_download(w.repo, allow_patterns=["*.json", "onnx/*"], ignore_patterns="config*", cache_dir=fresh(w))
    )
    found = {str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()}
    assert found == {"onnx/model.onnx", "tokenizer/names ü+%.json"}, found


@check
def snapshot_to_a_folder(w):
    folder = Path(fresh(w)) / "model"
    snapshot_download(w.repo, local_dir=folder, max_workers=2)
    for path in w.files:
        same(folder / path, w, path)


@check
def the_cache_is_sound(w):
    cache = fresh(w)
    snapshot_download(w.repo, cache_dir=cache)
    report = scan_cache_dir(cache)
    assert not report.warnings
    (repo,) = report.repos
    assert (repo.repo_id, [revision.commit_hash for revision in repo.revisions]) == (w.repo, [w.active])


# --- the file system


@check
def fs_ls(w):
    names = {entry["name"] for entry in w.fs.ls(w.repo)}
    assert names == {f"{w.repo}/{path.split('/')[0]}" for path in w.files}


@check
def fs_info(w):
    info = w.fs.info(f"{w.repo}/model.safetensors")
    assert (info["type"], info["size"]) == ("file", w.files["model.safetensors"]["size"])
    assert w.fs.info(f"{w.repo}/onnx")["type"] == "directory"


@check
def fs_find_and_glob(w):
    assert sorted(w.fs.find(w.repo)) == sorted(f"{w.repo}/{path}" for path in w.files)
    assert w.fs.glob(f"{w.repo}/**/*.onnx") == [f"{w.repo}/onnx/model.onnx"]


@check
def fs_exists(w):
    assert w.fs.exists(f"{w.repo}/config.json")
    assert not w.fs.exists(f"{w.repo}/nope")
    assert w.fs.isdir(f"{w.repo}/tokenizer")


@check
def fs_reads_whole(w):
    for path, known in w.files.items():
        assert hashlib.sha256(w.fs.cat_file(f"{w.repo}/{path}")).hexdigest() == known["sha256"], path


@check
def fs_reads_ranges(w):
    content = Path(hf_hub_download(w.repo, "model.safetensors", cache_dir=w.cache)).read_bytes()
    with w.fs.open(f"{w.repo}/model.safetensors", "rb", block_size=100_000) as file:
        for offset, length in ((0, 8), (4_194_300, 20), (len(content) - 5, 5), (1, 300_000), (8_000_000, 1)):
            file.seek(offset)
            assert file.read(length) == content[offset : offset + length], offset
    assert w.fs.cat_file(f"{w.repo}/model.safetensors", start=100, end=200) == content[100:200]


@check
def fs_by_revision(w):
    for name in (w.previous, w.previous[:7]):
        found = w.fs.read_bytes(f"{w.repo}@{name}/config.json")
        assert hashlib.sha256(found).hexdigest() == w.old_files["config.json"]["sha256"]
    raises(FileNotFoundError, w.fs.read_bytes, f"{w.repo}@nope/config.json")


@check
def fs_wrong_names(w):
    for path in (f"{w.repo}/nope", "acme/none/config.json", f"{w.repo}@{'0' * 40}/config.json"):
        raises(FileNotFoundError, w.fs.info, path)


@check
def fs_download(w):
    target = Path(fresh(w)) / "weights"
    w.fs.get(f"{w.repo}/model.safetensors", str(target))
    same(target, w, "model.safetensors")


# --- a bucket, which has a name of our own


@check
def a_bucket_under_the_name_that_works_everywhere(w):
    api, fs = HfApi(endpoint=w.bucket), HfFileSystem(endpoint=w.bucket, skip_instance_cache=True)
    name = "modelcache/bert"
    assert api.model_info(name).id == name
    assert sorted(api.list_repo_files(name)) == sorted(w.bucket_files)
    for path in w.bucket_files:
        same(api.hf_hub_download(name, path, cache_dir=w.cache), w, path, w.bucket_files)
    assert Path(api.snapshot_download(name, cache_dir=w.cache)).name == "b" * 40
    assert sorted(fs.find(name)) == sorted(f"{name}/{path}" for path in w.bucket_files)
    content = Path(api.hf_hub_download(name, "onnx/model.onnx", cache_dir=w.cache)).read_bytes()
    assert fs.cat_file(f"{name}/onnx/model.onnx", start=100, end=300) == content[100:300]
    assert set(api.get_safetensors_metadata(name).files_metadata["model.safetensors"].tensors) == {"a", "b"}


@check
def a_bucket_under_its_short_name(w):
    api = HfApi(endpoint=w.bucket)
    same(api.hf_hub_download("bert", "onnx/model.onnx", cache_dir=w.cache), w, "onnx/model.onnx", w.bucket_files)
    error = raises(RepositoryNotFoundError, api.model_info, "models")
    assert "modelcache/bert or bert" in str(error), error


# --- safetensors


@check
def safetensors_metadata(w):
    metadata = w.api.get_safetensors_metadata(w.repo)
    assert set(metadata.files_metadata["model.safetensors"].tensors) == {"a", "b"}
    assert metadata.parameter_count == {"U8": w.parameters}


@check
def safetensors_file_metadata(w):
    metadata = w.api.parse_safetensors_file_metadata(w.repo, "model.safetensors", revision=w.previous)
    assert metadata.tensors["b"].shape == [64]


# --- what is wrong is told as what it is


@check
def wrong_repo(w):
    for call in (w.api.model_info, w.api.list_repo_files, w.api.list_repo_refs):
        raises(RepositoryNotFoundError, call, "acme/none")
    raises(RepositoryNotFoundError, hf_hub_download, "acme/none", "config.json", cache_dir=fresh(w))
    raises(RepositoryNotFoundError, snapshot_download, "acme/none", cache_dir=fresh(w))
    raises(RepositoryNotFoundError, hf_hub_download, "none", "config.json", cache_dir=fresh(w))


@check
def wrong_revision(w):
    for name in ("nope", "0" * 40, "refs/pr/3"):
        raises(RevisionNotFoundError, w.api.model_info, w.repo, revision=name)
        raises(RevisionNotFoundError, hf_hub_download, w.repo, "config.json", revision=name, cache_dir=fresh(w))
        raises(RevisionNotFoundError, snapshot_download, w.repo, revision=name, cache_dir=fresh(w))
        raises(RevisionNotFoundError, lambda n=name: list(w.api.list_repo_tree(w.repo, revision=n)))


@check
def wrong_file(w):
    error = raises(EntryNotFoundError, hf_hub_download, w.repo, "onnx/nope.bin", cache_dir=fresh(w))
    assert "patterns leave it out" in str(error), error
    raises(EntryNotFoundError, get_hf_file_metadata, hf_hub_url(w.repo, "nope"))
    raises(EntryNotFoundError, lambda: list(w.api.list_repo_tree(w.repo, "nope")))


@check
def the_message_names_what_is_served(w):
    error = raises(RepositoryNotFoundError, w.api.model_info, "acme/none")
    assert w.repo in str(error), error


@check
def writing(w):
    for call in (
        lambda: w.api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id=w.repo, token="hf_x"),
        lambda: w.api.create_repo("acme/new", token="hf_x"),
        lambda: w.api.delete_repo(w.repo, token="hf_x"),
        lambda: w.api.create_branch(w.repo, branch="b", token="hf_x"),
    ):
        error = raises(HfHubHTTPError, call)
        assert error.response.status_code == 405, error


@check
def discussions_are_not_there(w):
    error = raises(HfHubHTTPError, lambda: list(w.api.get_repo_discussions(w.repo)))
    assert error.response.status_code == 404


# --- tokens


@check
def no_token_or_a_wrong_one(w):
    for token in (False, "hf_wrong", w.expired):
        for call in (w.guarded.model_info, w.guarded.list_repo_files):
            error = raises(HfHubHTTPError, call, w.repo, token=token)
            assert error.response.status_code == 401
            assert not isinstance(error, RepositoryNotFoundError), error
            assert "Not authenticated" in str(error), error
        error = raises(
            HfHubHTTPError,
            get_hf_file_metadata,
            hf_hub_url(w.repo, "config.json", endpoint=w.guarded.endpoint),
            token=token,
        )
        assert error.response.status_code == 401
        assert "Not authenticated" in str(error), error


@check
def a_token_that_is_not_allowed(w):
    error = raises(GatedRepoError, w.guarded.model_info, w.repo, token=w.denied)
    assert "spec.server.access.serviceAccounts" in str(error), error
    options = {"cache_dir": fresh(w), "token": w.denied}
    raises(GatedRepoError, w.guarded.hf_hub_download, w.repo, "config.json", **options)
    raises(GatedRepoError, w.guarded.snapshot_download, w.repo, **options)


@check
def a_token_that_is_allowed(w):
    place = w.guarded.snapshot_download(w.repo, cache_dir=fresh(w), token=w.allowed)
    same(Path(place) / "model.safetensors", w, "model.safetensors")
    fs = HfFileSystem(endpoint=w.guarded.endpoint, token=w.allowed, skip_instance_cache=True)
    assert fs.cat_file(f"{w.repo}/model.safetensors", start=0, end=8)


@check
def auth_check(w):
    assert w.guarded.auth_check(w.repo, token=w.allowed) is None
    raises(GatedRepoError, w.guarded.auth_check, w.repo, token=w.denied)
    raises(RepositoryNotFoundError, w.guarded.auth_check, "acme/none", token=w.allowed)


@check
def a_token_file_is_read_again_when_it_was_rotated(w):
    script = (
        "import sys, pathlib, huggingface_hub as h\n"
        "file, repo, *tokens = sys.argv[1:]\n"
        "for token in tokens:\n"
        "    pathlib.Path(file).write_text(token)\n"
        "    try: print(h.HfApi().model_info(repo).sha)\n"
        "    except h.errors.GatedRepoError: print('gated')\n"
    )
    file = Path(fresh(w)) / "token"
    arguments = [sys.executable, "-c", script, file, w.repo, w.allowed, w.denied, w.allowed]
    environment = {**os.environ, "HF_ENDPOINT": w.guarded.endpoint, "HF_TOKEN_PATH": str(file)}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == [w.active, "gated", w.active], done.stdout + done.stderr


# --- faults


@check
def a_cut_download_goes_on(w):
    cache, attempts, place = fresh(w), 0, ""
    options = {"endpoint": w.cutting, "cache_dir": cache, "revision": w.active}
    while not place:
        attempts += 1
        assert attempts <= 3
        try:
            place = hf_hub_download(w.repo, "model.safetensors", **options)
        except Exception:
            if MAJOR >= 1:  # the older ones leave it to the caller to try again
                raise
    same(place, w, "model.safetensors")


@check
def a_corrupt_file_is_not_taken(w):
    cache = fresh(w)
    error = None
    try:
        hf_hub_download(w.repo, "model.safetensors", endpoint=w.corrupt, cache_dir=cache)
    except Exception as failure:  # noqa: BLE001 - versions differ in the class of the error
        error = failure
    assert error is not None
    assert not list(Path(cache).rglob("snapshots/*/model.safetensors"))
    same(hf_hub_download(w.repo, "config.json", endpoint=w.corrupt, cache_dir=cache), w, "config.json")


# --- the command


def hf(w, *arguments):
    script = "import sys; from huggingface_hub.cli.hf import main; sys.exit(main())"
    environment = {**os.environ, "HF_HUB_CACHE": w.command_cache}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@check
def hf_download(w):
    printed = hf(w, "download", w.repo)
    assert w.active in printed, printed
    folder = Path(fresh(w))
    hf(
        w,
        "download",
        w.repo,
        "config.json",
        "onnx/model.onnx",
        "--revision",
        w.previous[:7],
        "--local-dir",
        str(folder),
    )
    same(folder / "onnx/model.onnx", w, "onnx/model.onnx", w.old_files)


@check
def hf_models_info(w):
    if MAJOR >= 1:
        assert (
            json.loads(hf(w, "models", "info", w.repo, *(["--format", "json"] if MAJOR >= 2 else [])))["sha"]
            == w.active
        )


@check
def hf_cache_verify(w):
    if MAJOR >= 1:  # the command came with 1.0
        hf(w, "download", w.repo)
        hf(w, "cache", "verify", w.repo, "--fail-on-missing-files", "--fail-on-extra-files")
        hf(w, "cache", "verify", w.repo, "--revision", w.active)


@check
def xet_was_not_used(w):
    assert importlib.util.find_spec("hf_xet") is not None, "it is installed, and still"
    assert "hf_xet" not in sys.modules


def main():
    with tempfile.TemporaryDirectory() as folder:
        w = SimpleNamespace(
            **json.loads(Path(sys.argv[1]).read_text()), folder=folder, endpoint=os.environ["HF_ENDPOINT"]
        )
        w.api, w.fs = HfApi(), HfFileSystem(skip_instance_cache=True)
        w.guarded = HfApi(endpoint=w.guarded)
        w.cache, w.command_cache = fresh(w), fresh(w)
        for function in CHECKS:
            failure = ""
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    function(w)
            except Exception:  # noqa: BLE001 - one check's failure must not hide the others
                failure = traceback.format_exc()
            print(json.dumps({"check": function.__name__, "failure": failure}), flush=True)
    print(json.dumps({"version": huggingface_hub.__version__}), flush=True)


if __name__ == "__main__":
    main()
