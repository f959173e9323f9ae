"""Which events wake the queue: what was read already does not."""

from modelcache_operator.news import News

KEY = ("ns", "bert")


def obj(uid, version, kind="Job"):
    return {"kind": kind, "metadata": {"uid": uid, "resourceVersion": version}}


def test_before_anything_was_read_all_is_news():
    assert News().is_news(KEY, "Job", "j", "1", deleted=False)


def test_what_was_read_in_this_version_is_no_news_and_another_version_is():
    news = News()
    news.read(KEY, [obj("cr", "7", "ModelCache"), obj("j", "1")], with_pods=True)
    assert not news.is_news(KEY, "ModelCache", "cr", "7", deleted=False)
    assert not news.is_news(KEY, "Job", "j", "1", deleted=False)
    assert news.is_news(KEY, "Job", "j", "2", deleted=False)
    assert news.is_news(KEY, "Service", "new", "1", deleted=False)
    assert news.is_news(KEY, "Job", "j", "1", deleted=True)
    assert news.is_news(("ns", "other"), "Job", "j", "1", deleted=False)


def test_pods_are_news_only_to_who_looked_at_them():
    news = News()
    news.read(KEY, [obj("d", "1", "Deployment")], with_pods=False)
    assert not news.is_news(KEY, "Pod", "p", "1", deleted=False)
    assert not news.is_news(KEY, "Pod", "p", "1", deleted=True)
    news.read(KEY, [obj("d", "1", "Deployment")], with_pods=True)
    assert news.is_news(KEY, "Pod", "p", "1", deleted=False)


def test_what_is_forgotten_is_news_again():
    news = News()
    news.read(KEY, [obj("cr", "7", "ModelCache")], with_pods=False)
    news.forget(KEY)
    assert news.is_news(KEY, "ModelCache", "cr", "7", deleted=False)


def test_who_missed_events_learns_what_came_went_and_changed():
    news = News()
    for name in ("same", "changed", "gone", "more", "elsewhere"):
        where = "other" if name == "elsewhere" else "ns"
        news.read((where, name), [obj(name, "1"), obj("d", "1", "Deployment")], with_pods=False)
    found = {
        ("ns", "same"): {"same": "1"},
        ("ns", "changed"): {"changed": "2"},
        ("ns", "more"): {"more": "1", "new": "1"},
        ("ns", "stranger"): {"s": "1"},
    }
    assert list(news.changed("Job", "ns", found)) == [("ns", "changed"), ("ns", "gone"), ("ns", "more")]
    assert ("other", "elsewhere") in news.changed("Job", None, found)
    assert not list(news.changed("Service", None, {})), "none were read, none are there"


def test_missed_pods_matter_only_to_who_looked_at_them():
    news = News()
    news.read(KEY, [], with_pods=False)
    assert not list(news.changed("Pod", None, {KEY: {"p": "1"}}))
    news.read(KEY, [obj("p", "1", "Pod")], with_pods=True)
    assert list(news.changed("Pod", None, {KEY: {"p": "2"}})) == [KEY]
