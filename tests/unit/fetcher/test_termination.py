import json

from modelcache_api.reasons import Reason
from modelcache_fetcher import FetchError, FetchResult
from modelcache_fetcher.plan import Listing, Plan, SourceFile, select
from modelcache_fetcher.termination import MAX_BYTES, failure_message, plan_message, result_message


def plan(paths):
    files, skipped = select(Listing("main", "c" * 40, tuple(SourceFile(p, 2**40, "e") for p in paths)), [], ["*.bin"])
    return Plan("org/name", "", "models--org--name", "main", "c" * 40, (), ("*.bin",), files, skipped)


def test_a_plan_of_any_size_fits_four_kibibytes():
    paths = [f"{'ü' * 60}/{'é' * 60}-{number}.safetensors" for number in range(5000)]
    text = plan_message(plan([*paths, "x.bin"]))
    assert len(text) <= MAX_BYTES
    message = json.loads(text)
    assert (message["files"], message["bytes"], message["skippedFiles"]) == (5000, 5000 * 2**40, 1)
    assert message["commit"] == "c" * 40


def test_a_failure_says_reason_sentence_and_file():
    error = FetchError(Reason.RATE_LIMITED, "Wait.", path="a/b", retry_after=12.4)
    assert json.loads(failure_message(error)) == {
        "result": "failed",
        "reason": "RateLimited",
        "permanent": False,
        "message": "Wait.",
        "path": "a/b",
        "retryAfterSeconds": 12,
    }


def test_a_failure_with_endless_text_fits_four_kibibytes():
    text = failure_message(FetchError(Reason.INTERNAL, "\U0001f600" * 9000, path="ü" * 9000))
    assert len(text) <= MAX_BYTES
    assert json.loads(text)["reason"] == "Internal"


def test_a_result_names_what_was_published():
    text = result_message(FetchResult("d" * 64, "c" * 40, 3, 100, 40, 2))
    assert json.loads(text) == {
        "result": "fetched",
        "digest": "d" * 64,
        "commit": "c" * 40,
        "files": 3,
        "bytes": 100,
        "downloadedBytes": 40,
        "generation": 2,
        "replaced": "",
    }
