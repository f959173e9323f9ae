"""Which names from a repo or bucket may become paths. Pure: nothing here touches a disk."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

from modelcache_volume.errors import InvalidPath

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_COMPONENT_BYTES = 255
MAX_PATH_BYTES = 1024

_DIRECTIONS = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
"""Bidirectional classes (Unicode Standard Annex 9) of characters that make a name look like another one."""
_DRIVE = re.compile(r"[A-Za-z]:")


def validate_path(path: str) -> str:
    """Checks that a path from a repo or bucket stays inside its folder and can be stored anywhere.

    Args:
        path: Relative and "/"-separated, as the source spells it.

    Returns:
        The same path.

    Raises:
        InvalidPath: It is empty or absolute; has an empty, "." or ".." component, a backslash, a control character, one
            that ends a line or changes the direction of text, or a drive letter; is not UTF-8; or is longer than 1024
            bytes (a component: 255).
    """
    problem = _problem(path)
    if problem:
        raise InvalidPath(
            f"{path[:200]!a} cannot be stored: {problem}. Rename it at the source, or leave it out with ignorePatterns."
        )
    return path


def refuse_clashes(paths: Iterable[str]) -> None:
    """Checks that all paths can exist side by side.

    Args:
        paths: Valid paths of one snapshot.

    Raises:
        InvalidPath: A path occurs twice, or one is a file while another needs it to be a folder ("a" and "a/b").
    """
    seen: set[str] = set()
    folders: dict[str, str] = {}
    for path in paths:
        if path in seen:
            raise InvalidPath(f"{path!r} occurs twice; every file of a snapshot needs a path of its own.")
        seen.add(path)
        end = path.rfind("/")
        while end > 0 and path[:end] not in folders:
            folders[path[:end]] = path
            end = path.rfind("/", 0, end)
    for path in seen & folders.keys():
        raise InvalidPath(
            f"{path!r} is a file, but {folders[path]!r} needs a folder of that name; "
            "leave one of them out with ignorePatterns."
        )


def _problem(path: str) -> str:
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return "its name is not valid UTF-8"
    whole = {
        "its name is empty": not path,
        f"its name has more than {MAX_PATH_BYTES} bytes": len(encoded) > MAX_PATH_BYTES,
        "it contains a backslash": "\\" in path,
        "it contains a control character": any(
            unicodedata.category(character) in {"Cc", "Zl", "Zp"} or unicodedata.bidirectional(character) in _DIRECTIONS
            for character in path
        ),
        "it is an absolute path": path.startswith("/"),
        "it starts with a drive letter": bool(_DRIVE.match(path)),
    }
    for problem, applies in whole.items():
        if applies:
            return problem
    for component in path.split("/"):
        if component in {"", ".", ".."}:
            return f"it has the component {component!r}"
        if len(component.encode()) > MAX_COMPONENT_BYTES:
            return f"a component has more than {MAX_COMPONENT_BYTES} bytes"
    return ""
