import time
from pathlib import Path

import pytest

from modelcache.errors import AccessDenied
from modelcache.security import Security


def test_a_token_is_the_one_in_its_file_now(tmp_path):
    """Written anew in place, replaced, and behind Kubernetes' links; equally long, within the clock's tick."""
    file = tmp_path / "token"
    security = Security(str(file))
    for number in range(200):
        file.write_text(f"in-place-{number:04}\n")
        assert security.token() == f"in-place-{number:04}"
    for number in range(200):
        fresh = tmp_path / "fresh"
        fresh.write_text(f"replaced-{number:04}\n")
        fresh.rename(file)
        assert security.token() == f"replaced-{number:04}"


def test_a_token_behind_the_links_of_a_projected_volume_is_followed(tmp_path):
    def publish(number: int) -> None:
        folder = tmp_path / f"..{number}"
        folder.mkdir()
        (folder / "token").write_text(f"projected-{number:04}")
        fresh = tmp_path / "..data_tmp"
        fresh.symlink_to(folder.name)
        fresh.rename(tmp_path / "..data")

    publish(0)
    (tmp_path / "token").symlink_to("..data/token")
    security = Security(str(tmp_path / "token"))
    for number in range(1, 100):
        publish(number)
        assert security.token() == f"projected-{number:04}"


def test_a_settled_token_is_not_read_again_and_a_lost_one_is_said(tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text("settled")
    security = Security(str(file))
    later = time.time_ns() + 10**10
    monkeypatch.setattr(time, "time_ns", lambda: later)
    assert security.token() == "settled"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("it was read again"))
    assert security.token() == "settled"
    file.unlink()
    with pytest.raises(AccessDenied, match="cannot be read"):
        security.token()
