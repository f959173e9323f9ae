"""Whether an object in the cluster is as we wish it, although the API server and others add to it."""

from typing import Any

from modelcache_api.quantities import parse_quantity

_KEYED_BY = ("name", "containerPort", "port", "mountPath", "uid", "type", "key", "topologyKey", "action")
_QUANTITIES = {"limits", "requests"}


def covers(live: Any, wanted: Any) -> bool:
    """Whether everything that is wanted is there; what is there besides does not matter.

    Lists of named things are compared by name, other lists element by element, resource amounts by their value.
    """
    if live == wanted:
        return True
    # what comes from JSON is a dict or a list; asking for Mapping and Sequence would take twice as long
    if isinstance(wanted, dict):
        return isinstance(live, dict) and all(_field_covers(live, key, value) for key, value in wanted.items())
    if isinstance(wanted, list):
        return isinstance(live, list) and _list_covers(live, wanted)
    return False


def _field_covers(live: dict[str, Any], key: str, wanted: Any) -> bool:
    if key not in live:
        # the API server drops what is empty
        return wanted in ({}, [], "", None, False)
    if key in _QUANTITIES and isinstance(wanted, dict):
        return _amounts_equal(live[key], wanted)
    return covers(live[key], wanted)


def _list_covers(live: list[Any], wanted: list[Any]) -> bool:
    key = next((k for k in _KEYED_BY if wanted and all(isinstance(w, dict) and k in w for w in wanted)), None)
    if key is None or len({w[key] for w in wanted}) < len(wanted):
        return len(live) == len(wanted) and all(map(covers, live, wanted))
    by_key = {item[key]: item for item in live if isinstance(item, dict) and key in item}
    return all(w[key] in by_key and covers(by_key[w[key]], w) for w in wanted)


def _amounts_equal(live: Any, wanted: dict[str, Any]) -> bool:
    if not isinstance(live, dict) or live.keys() != wanted.keys():
        return False
    return all(
        live[name] == amount or parse_quantity(live[name]) == parse_quantity(amount) for name, amount in wanted.items()
    )
