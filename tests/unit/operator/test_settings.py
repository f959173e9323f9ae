import pytest

from modelcache_operator.settings import Defaults, SettingsError, from_environment

IMAGE = {"MODELCACHE_IMAGE": "modelcache:1"}


def test_without_an_image_there_is_nothing_to_run():
    with pytest.raises(SettingsError, match="MODELCACHE_IMAGE"):
        from_environment({})


def test_namespaces_are_a_list_and_none_means_all():
    assert from_environment(IMAGE).namespaces == ()
    assert from_environment(IMAGE | {"MODELCACHE_NAMESPACES": "a, b,"}).namespaces == ("a", "b")


@pytest.mark.parametrize("value", ["many", "0", "-1"])
def test_numbers_have_to_be_positive(value):
    with pytest.raises(SettingsError, match="MODELCACHE_WORKERS"):
        from_environment(IMAGE | {"MODELCACHE_WORKERS": value})


def test_a_misspelt_default_is_refused_by_name(tmp_path):
    path = tmp_path / "defaults.yaml"
    path.write_text("storageClass: fast\n")
    with pytest.raises(SettingsError, match="storageClass"):
        from_environment(IMAGE | {"MODELCACHE_DEFAULTS": str(path)})


def test_an_empty_defaults_file_says_nothing(tmp_path):
    path = tmp_path / "defaults.yaml"
    path.write_text("")
    assert from_environment(IMAGE | {"MODELCACHE_DEFAULTS": str(path)}).defaults == Defaults()
