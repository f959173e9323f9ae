"""allowPatterns and ignorePatterns: Unix shell wildcards with the semantics of huggingface_hub, and no I/O.

As in ``huggingface_hub.utils.filter_repo_objects``: matching is ``fnmatch.fnmatchcase`` (case-sensitive, ``*`` also
crosses ``/``), a pattern that ends in ``/`` means everything below that folder, and a backslash is a separator.
Patterns apply to the path inside the repo or below the bucket's prefix.
"""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def first_match(path: str, patterns: Iterable[str]) -> str | None:
    """The first pattern, as the user wrote it, that matches the path."""
    for pattern in patterns:
        wanted = pattern.replace("\\", "/")
        if fnmatchcase(path, wanted + "*" if wanted.endswith("/") else wanted):
            return pattern
    return None


def nearest_names(paths: Sequence[str], patterns: Sequence[str], count: int = 5) -> list[str]:
    """Up to ``count`` of the paths that look most like the patterns, for a message saying that nothing matched."""
    folded = {path.casefold(): path for path in reversed(paths)}
    found: dict[str, None] = {}
    for pattern in patterns:
        bare = pattern.casefold().replace("*", "").replace("?", "")
        endings = [path for path in paths if bare and path.casefold().endswith(bare)]
        close = [folded[name] for name in difflib.get_close_matches(pattern.casefold(), folded, n=count, cutoff=0.4)]
        found.update(dict.fromkeys(endings + close))
    found.update(dict.fromkeys(sorted(paths, key=lambda path: (path.count("/"), path))))
    return list(found)[:count]
