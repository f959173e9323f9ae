"""Which events wake the queue: what was read already does not."""

from modelcache_operator.news import News

KEY = ("ns", "bert")


def obj(uid, version):
    return {"metadata": {"uid": uid, "resourceVersion": version}}


def test_before_anything_was_read_all_is_news():
    assert News().is_news(KEY, "jobs", "j", "1", deleted=False)


def test_what_was_read_in_this_version_is_no_news_and_another_version_is():
    news = News()
    news.read(KEY, [obj("cr", "7"), obj("j", "1")], with_pods=True)
    assert not news.is_news(KEY, "modelcaches", "cr", "7", deleted=False)
    assert not news.is_news(KEY, "jobs", "j", "1", deleted=False)
    assert news.is_news(KEY, "jobs", "j", "2", deleted=False)
    assert news.is_news(KEY, "services", "new", "1", deleted=False)
    assert news.is_news(KEY, "jobs", "j", "1", deleted=True)
    assert news.is_news(("ns", "other"), "jobs", "j", "1", deleted=False)


def test_pods_are_news_only_to_who_looked_at_them():
    news = News()
    news.read(KEY, [obj("d", "1")], with_pods=False)
    assert not news.is_news(KEY, "pods", "p", "1", deleted=False)
    assert not news.is_news(KEY, "pods", "p", "1", deleted=True)
    news.read(KEY, [obj("d", "1")], with_pods=True)
    assert news.is_news(KEY, "pods", "p", "1", deleted=False)


def test_what_is_forgotten_is_news_again():
    news = News()
    news.read(KEY, [obj("cr", "7")], with_pods=False)
    news.forget(KEY)
    assert news.is_news(KEY, "modelcaches", "cr", "7", deleted=False)
