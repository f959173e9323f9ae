from modelcache_operator.conditions import FETCHED, ORDER, READY, Condition, changes, merge

OLD = "2026-01-01T00:00:00Z"
NOW = "2026-02-02T00:00:00Z"


def conditions(**overrides):
    return [Condition(t, *overrides.get(t, ("True", "Fine", "all is well"))) for t in reversed(ORDER)]


def test_conditions_always_come_in_one_order():
    merged = merge(conditions(), [], generation=3, now=NOW)
    assert [c["type"] for c in merged] == list(ORDER)
    assert {c["observedGeneration"] for c in merged} == {3}


def test_the_transition_time_moves_with_the_status_only():
    old = merge(conditions(), [], generation=1, now=OLD)
    new = merge(conditions(Fetched=("True", "Other", "m"), Ready=("False", "Broken", "m")), old, generation=2, now=NOW)
    times = {c["type"]: c["lastTransitionTime"] for c in new}
    assert times[FETCHED] == OLD
    assert times[READY] == NOW


def test_a_change_of_status_or_reason_is_a_change_and_one_of_the_message_is_not():
    old = merge(conditions(), [], generation=1, now=OLD)
    new = merge(
        conditions(Fetched=("True", "Other", "m"), Ready=("True", "Fine", "another message")),
        old,
        generation=2,
        now=NOW,
    )
    assert [c["type"] for c in changes(new, old)] == [FETCHED]
    assert len(changes(old, [])) == len(ORDER)


def test_a_message_never_outgrows_what_the_crd_takes():
    merged = merge(conditions(Ready=("False", "Broken", "x" * 100_000)), [], generation=1, now=NOW)
    assert len(merged[-1]["message"]) == 4096
