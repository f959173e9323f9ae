"""A manifest file to a ModelCache, or to every problem in it with file, line, field and what was probably meant.

The API server prunes what it does not know; somebody who typed `repoID` on a laptop has to hear about it.
"""

import datetime as dt
import difflib
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from modelcache_api.document import MAXIMUM_BYTES, Document, UnreadableYaml, read_documents
from modelcache_api.document import Path as FieldPath
from modelcache_api.reasons import Reason
from modelcache_api.resource import API_VERSION, KIND, ModelCache, ModelCacheSpec

_IGNORED_METADATA = frozenset({"finalizers", "generateName", "managedFields", "ownerReferences", "selfLink"})
_UNCHECKED: frozenset[FieldPath] = frozenset({("status",), ("metadata", "labels"), ("metadata", "annotations")})
_RELATIVE_FOLDER = ("file://./", "file://../")
_TYPE_NAMES = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping of fields",
    "model_type": "a mapping of fields",
    "model_attributes_type": "a mapping of fields",
}
_SENTENCES = {
    "missing": "is missing and has no default",
    "literal_error": "must be {expected}, not {value}",
    "value_error": "{error}",
    "rule": "{sentence}",
    "greater_than_equal": "must be {ge} or more, not {value}",
    "less_than_equal": "must be {le} or less, not {value}",
    "string_too_long": "is too long; at most {max_length} characters are allowed",
    "string_too_short": "is too short; write at least {min_length} characters",
    "too_long": "has too many entries; at most {max_length} are allowed",
    "too_short": "has too few entries; write at least {min_length}",
}


@dataclass(frozen=True, slots=True, order=True)
class ManifestProblem:
    """One thing wrong in a manifest file.

    Attributes:
        line: Line in the file, from 1; 0 where the whole file is meant.
        field: Path of the field, such as "spec.server.replicas"; "" for the document.
        sentence: What is wrong and what to write instead.
    """

    line: int
    field: str
    sentence: str


class ManifestError(Exception):
    """A manifest file is refused.

    Attributes:
        file: Name of the file as the user gave it.
        problems: Everything wrong with it, in the order of lines.
    """

    reason = Reason.INVALID_SPEC

    def __init__(self, file: str, problems: list[ManifestProblem]) -> None:
        self.file = file
        self.problems = sorted(set(problems))
        super().__init__("\n".join(self._describe(problem) for problem in self.problems))

    def _describe(self, problem: ManifestProblem) -> str:
        place = f"{self.file}:{problem.line}" if problem.line else self.file
        return f"{place}: {problem.field}: {problem.sentence}" if problem.field else f"{place}: {problem.sentence}"


def load_manifest(path: Path | str) -> ModelCache:
    """Read the one ModelCache of a YAML (or JSON) file.

    A repoId such as `file://./model` or `file://../models/bert` is taken relative to the file's folder (local mode).

    Args:
        path: The file; "-" reads standard input.

    Raises:
        ManifestError: The file cannot be read, or is refused: its text lists all problems, one a line.
    """
    name = "<stdin>" if str(path) == "-" else str(path)
    folder = Path.cwd() if str(path) == "-" else Path(path).absolute().parent
    try:
        documents = read_documents(_read(path, name))
    except UnreadableYaml as error:
        raise ManifestError(name, [ManifestProblem(error.line, "", error.sentence)]) from None
    if not documents:
        raise ManifestError(name, [ManifestProblem(0, "", f"holds no {KIND}: the file is empty")])
    if len(documents) > 1:
        sentence = f"a second document begins here; give one {KIND} in one file"
        raise ManifestError(name, [ManifestProblem(documents[1].line, "", sentence)])
    return _model(documents[0], name, folder)


def _read(path: Path | str, name: str) -> str:
    """The text of a file, never more than the limit of one character too many."""
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(MAXIMUM_BYTES + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(MAXIMUM_BYTES + 1)
        return data.decode("utf-8-sig")
    except FileNotFoundError:
        sentence = "there is no such file"
    except IsADirectoryError:
        sentence = "is a folder; name a file"
    except UnicodeDecodeError as error:
        sentence = f"is no UTF-8 text (byte {error.start}); save it as UTF-8"
    except OSError as error:
        sentence = f"cannot be read: {error.strerror}"
    raise ManifestError(name, [ManifestProblem(0, "", sentence)])


def _model(document: Document, name: str, folder: Path) -> ModelCache:
    problems = list(_wrong_kind(document))
    if problems:
        raise ManifestError(name, problems)
    problems += [
        ManifestProblem(line, _spell(path), f"stands twice; the first is in line {document.lines[path]}")
        for path, line in document.repeated
    ]
    problems += _unknown_fields(document, document.value, ModelCache, ())
    value = {key: item for key, item in document.value.items() if key != "status"}
    spec = value.get("spec")
    if isinstance(spec, dict) and str(spec.get("repoId", "")).startswith(_RELATIVE_FOLDER):
        target = (folder / spec["repoId"].removeprefix("file://")).resolve()
        value["spec"] = {**spec, "repoId": f"file://{target}"}
    try:
        model = ModelCache.model_validate(value)
    except ValidationError as error:
        problems += [_translate(document, dict(item)) for item in error.errors(include_url=False)]
    if problems:
        raise ManifestError(name, problems)
    return model


def _wrong_kind(document: Document) -> Iterator[ManifestProblem]:
    value = document.value
    if not isinstance(value, dict):
        yield ManifestProblem(document.line, "", f"holds {_name_value(value)}, not a {KIND}")
        return
    kind, version = value.get("kind"), value.get("apiVersion")
    if kind != KIND:
        sentence = f"is missing; write {KIND}" if kind is None else f"is {kind}; this command reads a {KIND}"
        yield ManifestProblem(_line(document, ("kind",)), "kind", sentence)
    elif version != API_VERSION:
        sentence = f"is missing; write {API_VERSION}" if version is None else f"is {version!r}; write {API_VERSION}"
        yield ManifestProblem(_line(document, ("apiVersion",)), "apiVersion", sentence)


def _unknown_fields(
    document: Document, value: Any, model: type[BaseModel], path: FieldPath
) -> Iterator[ManifestProblem]:
    """Walk values and models side by side; wrong types are left to validation."""
    if not isinstance(value, dict):
        return
    fields = _fields(model)
    for key, item in value.items():
        here = (*path, key)
        if here in _UNCHECKED or (path == ("metadata",) and key in _IGNORED_METADATA):
            continue
        if key not in fields:
            yield ManifestProblem(
                document.lines[here], _spell(here), f"unknown field; {_suggestion(key, list(fields), path)}"
            )
        elif (child := fields[key]) is not None:
            if isinstance(item, list):
                for index, element in enumerate(item):
                    yield from _unknown_fields(document, element, child, (*here, index))
            else:
                yield from _unknown_fields(document, item, child, here)


def _fields(model: type[BaseModel]) -> dict[str, type[BaseModel] | None]:
    """A model's fields as YAML spells them, with the model of the value or of its list's items."""
    return {info.alias or name: _submodel(info.annotation) for name, info in model.model_fields.items()}


def _submodel(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    if get_origin(annotation) in {Union, types.UnionType, list}:
        return next((found for item in get_args(annotation) if (found := _submodel(item)) is not None), None)
    return None


def _suggestion(key: str, known: list[str], path: FieldPath) -> str:
    """What was probably meant: another case, a near name here, the same name elsewhere, or else what there is."""
    plain = {_plain(name): name for name in reversed(known)}
    close = plain.get(_plain(key)) or next(iter(difflib.get_close_matches(key, known, n=1)), None)
    if close is None:
        near = difflib.get_close_matches(_plain(key), list(plain), n=1)
        close = plain[near[0]] if near else None
    if close is not None:
        return f"did you mean {close}?"
    elsewhere = [_spell(place) for place in _places(ModelCacheSpec, ("spec",)) if _plain(str(place[-1])) == _plain(key)]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"{_spell(path) or 'a manifest'} takes {', '.join(known)}"


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _places(model: type[BaseModel], path: FieldPath) -> Iterator[FieldPath]:
    for name, child in _fields(model).items():
        yield (*path, name)
        if child is not None:
            yield from _places(child, (*path, name))


def _translate(document: Document, error: dict[str, Any]) -> ManifestProblem:
    """A pydantic error as a sentence at its line."""
    path: FieldPath = tuple(part for part in error["loc"] if part != "[key]")
    return ManifestProblem(_line(document, path), _spell(path), _sentence(error))


def _sentence(error: dict[str, Any]) -> str:
    kind, value, context = error["type"], error.get("input"), error.get("ctx", {})
    if kind in _TYPE_NAMES:
        quotable = isinstance(value, bool | int | float | dt.date)
        hint = "; put it in quotes" if kind == "string_type" and quotable else ""
        return f"must be {_TYPE_NAMES[kind]}, not {_name_value(value)}{hint}"
    if kind == "missing" and error["loc"][-1] == "repoId":
        return "is missing; write where the model is, such as google-bert/bert-base-uncased"
    if kind in _SENTENCES:
        return _SENTENCES[kind].format(value=_name_value(value), **context)
    return str(error["msg"])


def _name_value(value: Any) -> str:
    """A value as a reader of YAML sees it, shortened."""
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 60 else f'"{value[:57]}…"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    return {"NoneType": "nothing", "dict": "a mapping", "list": "a list"}.get(type(value).__name__, str(value))


def _line(document: Document, path: FieldPath) -> int:
    """The line of a field, or of the nearest field around it that stands in the file."""
    while path not in document.lines:
        path = path[:-1]
    return document.lines[path]


def _spell(path: FieldPath) -> str:
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text
