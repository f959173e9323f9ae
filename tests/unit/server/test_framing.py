from modelcache_volume.v1 import manifest_pb2
from modelcache_wire.framing import join_manifest, split_manifest


def big_manifest() -> manifest_pb2.Manifest:
    return manifest_pb2.Manifest(
        format_version=1,
        digest="d" * 64,
        source=manifest_pb2.Source(repo_id="org/name", commit="c" * 40),
        allow_patterns=["*.json"],
        revisions=[manifest_pb2.Revision(requested="main", commit="c" * 40)],
        files=[manifest_pb2.File(path=f"file{n}", size=n, sha256=b"s" * 32) for n in range(50)],
        weight_sets=[manifest_pb2.WeightSet(path="a", files=[1, 2])],
        tensors=[manifest_pb2.Tensor(name=f"t{n}", shape=[n], running_crc32c=[n] * 20) for n in range(500)],
    )


def test_a_manifest_in_parts_is_whole_again_when_joined():
    manifest = big_manifest()
    parts = list(split_manifest(manifest, 4096))
    assert len(parts) > 5
    assert all(part.ByteSize() <= 4096 for part in parts)
    assert join_manifest(parts) == manifest
    merged = manifest_pb2.Manifest()
    for part in parts:  # as a client in any language does it
        merged.MergeFromString(part.SerializeToString())
    assert merged == manifest


def test_an_element_larger_than_a_part_travels_alone_and_whole():
    manifest = big_manifest()
    assert join_manifest(split_manifest(manifest, 1)) == manifest


def test_an_empty_manifest_is_one_part():
    assert list(split_manifest(manifest_pb2.Manifest(), 1024)) == [manifest_pb2.Manifest()]
