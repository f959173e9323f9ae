"""What Prometheus sees of ModelCaches."""

from modelcache_operator.metrics import Metrics

KEY = ("ns", "bert")
CONDITIONS = [{"type": "Ready", "status": "True"}, {"type": "UpToDate", "status": "False"}]


def samples(metrics, name):
    [family] = [family for family in metrics.registry.collect() if family.name == name]
    return {tuple(sample.labels.values()): sample.value for sample in family.samples}


def test_a_model_cache_shows_what_was_written_last_until_it_is_gone():
    metrics = Metrics()
    metrics.model_cache(KEY, {})
    metrics.model_cache(KEY, {"conditions": CONDITIONS, "bytes": 12})
    assert samples(metrics, "modelcache_condition") == {(*KEY, "Ready"): 1, (*KEY, "UpToDate"): 0}
    assert samples(metrics, "modelcache_active_bytes") == {KEY: 12}
    metrics.forget(KEY)
    assert not samples(metrics, "modelcache_condition")
    assert not samples(metrics, "modelcache_active_bytes")
