"""The exit codes are an interface."""

import subprocess
import sys

from modelcache_api.reasons import INTERRUPTED, REASONS, TERMINATED, USAGE, Reason


def test_every_reason_has_its_own_code_in_the_range_that_says_whether_to_try_again():
    assert set(REASONS) == set(Reason)
    codes = [info.exit_code for info in REASONS.values()]
    assert len(set(codes)) == len(codes)
    for info in REASONS.values():
        assert info.exit_code in (range(64, 80) if info.permanent else range(80, 96))
    assert not {USAGE, INTERRUPTED, TERMINATED, 0, 1} & set(codes)


def test_codes_never_change_their_meaning():
    assert {reason.value: info.exit_code for reason, info in REASONS.items()} == {
        "InvalidSpec": 64, "InvalidSource": 65, "AuthFailed": 66, "SecretMissing": 67, "NotFound": 68, "BadWeights": 69,
        "NoSpace": 70, "NotAVolume": 71, "NewerFormat": 72, "SnapshotNotFound": 73, "CorruptBlob": 74, "PortInUse": 75,
        "NotInstalled": 76, "RateLimited": 80, "Unavailable": 81, "Stalled": 82, "ChecksumMismatch": 83,
        "VolumeBusy": 84, "SpaceHeldByReaders": 85, "NotReady": 86, "Internal": 95,
    }  # fmt: skip


def test_reasons_and_sources_need_no_pydantic():
    code = "import sys, modelcache_api.reasons, modelcache_api.source; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
