"""Model weights from the cluster: streamed layer by layer, loaded whole, or as files.

Importing this package is cheap; torch and transformers are imported when something of theirs is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from modelcache.errors import (
    AccessDenied,
    AddressError,
    Cancelled,
    FileNotInSnapshot,
    IntegrityError,
    MissingWeights,
    ModelCacheError,
    NotReady,
    RevisionGone,
    Unavailable,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from modelcache.bert import StreamingBertModel
    from modelcache.process import reserve_memory, set_memory_budget
    from modelcache.snapshot import snapshot
    from modelcache.streaming import StreamingModel
    from modelcache.whole import from_pretrained, load_state_dict

__all__ = [
    "AccessDenied",
    "AddressError",
    "Cancelled",
    "FileNotInSnapshot",
    "IntegrityError",
    "MissingWeights",
    "ModelCacheError",
    "NotReady",
    "RevisionGone",
    "StreamingBertModel",
    "StreamingModel",
    "Unavailable",
    "UnsupportedModel",
    "from_pretrained",
    "load_state_dict",
    "reserve_memory",
    "set_memory_budget",
    "snapshot",
]

_HOMES = {
    "StreamingBertModel": "modelcache.bert",
    "StreamingModel": "modelcache.streaming",
    "from_pretrained": "modelcache.whole",
    "load_state_dict": "modelcache.whole",
    "reserve_memory": "modelcache.process",
    "set_memory_budget": "modelcache.process",
    "snapshot": "modelcache.snapshot",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
