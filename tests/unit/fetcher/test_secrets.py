import pytest

from modelcache_api.reasons import Reason
from modelcache_fetcher import FetchError
from modelcache_fetcher.secrets import HF_TOKEN, Secrets


def test_keys_are_files_read_anew_each_time(tmp_path):
    secrets = Secrets(tmp_path, "hf-token")
    (tmp_path / HF_TOKEN).write_text("first\n")
    assert secrets.read(HF_TOKEN) == "first"
    (tmp_path / HF_TOKEN).write_text("second")
    assert secrets.read(HF_TOKEN) == "second"


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_a_missing_or_empty_key_names_secret_and_key(tmp_path, content):
    if content is not None:
        (tmp_path / HF_TOKEN).write_text(content)
    with pytest.raises(FetchError, match=r"'hf-token' has no key 'hf_access_token'") as caught:
        Secrets(tmp_path, "hf-token").read(HF_TOKEN)
    assert caught.value.reason is Reason.SECRET_MISSING


def test_without_a_secret_nothing_is_missing(tmp_path):
    assert Secrets().read(HF_TOKEN) is None
    assert Secrets(tmp_path).read(HF_TOKEN) is None
