"""YAML text to plain values that remember their lines.

Only what `yaml.safe_load` reads, and less: bounded in size, depth and number of values (aliases expand, so a small file
could mean billions), no merge keys, no key twice in a mapping.
"""

from dataclasses import dataclass, field
from typing import Any

import yaml

MAXIMUM_BYTES = 2**20
MAXIMUM_DEPTH = 64
MAXIMUM_VALUES = 20_000

_COLLECTIONS = frozenset({"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"})

Path = tuple[str | int, ...]


class UnreadableYaml(Exception):
    """The text is no YAML that this program reads.

    Attributes:
        line: Line in the file, from 1.
        sentence: What is wrong.
    """

    def __init__(self, line: int, sentence: str) -> None:
        super().__init__(f"line {line}: {sentence}")
        self.line = line
        self.sentence = sentence


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML document.

    Attributes:
        value: What `yaml.safe_load` makes of it.
        line: Where it begins, from 1.
        lines: Line of each value: for a mapping's entries the line of the key.
        repeated: Paths of keys that stand twice in their mapping, with the line of the second.
    """

    value: Any
    line: int
    lines: dict[Path, int] = field(default_factory=dict)
    repeated: list[tuple[Path, int]] = field(default_factory=list)


def read_documents(text: str) -> list[Document]:
    """All documents of a YAML text that are not empty.

    Raises:
        UnreadableYaml: Bad syntax, or one of this module's limits is exceeded.
    """
    if len(text) > MAXIMUM_BYTES:
        raise UnreadableYaml(1, f"the file is larger than {MAXIMUM_BYTES // 1024} KiB; no manifest is")
    try:
        _refuse_depth(text)
        loader = yaml.SafeLoader(text)
        try:
            documents = []
            while loader.check_node():
                node = loader.get_node()
                if node is not None and not _is_empty(node):
                    documents.append(_Builder(loader).document(node))
            return documents
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise UnreadableYaml(mark.line + 1 if mark else 1, f"is no valid YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise UnreadableYaml(1, f"is no valid YAML: {' '.join(str(error).split())}") from None


def _refuse_depth(text: str) -> None:
    """Composing recurses; events do not, so depth is bounded before."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAXIMUM_DEPTH:
                mark = event.start_mark
                raise UnreadableYaml(mark.line + 1 if mark else 1, f"is nested deeper than {MAXIMUM_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


class _Builder:
    """Builds one document's values, counting them."""

    def __init__(self, loader: yaml.SafeLoader) -> None:
        self._loader = loader
        self._values = 0

    def document(self, node: yaml.Node) -> Document:
        document = Document(None, node.start_mark.line + 1)
        value = self._build(node, (), document)
        return Document(value, document.line, document.lines, document.repeated)

    def _build(self, node: yaml.Node, path: Path, document: Document) -> Any:
        line = node.start_mark.line + 1
        self._values += 1
        if self._values > MAXIMUM_VALUES or len(path) > MAXIMUM_DEPTH:
            raise UnreadableYaml(line, "has too many values; aliases (*name) that repeat each other are refused")
        document.lines.setdefault(path, line)
        if isinstance(node, yaml.CollectionNode) and node.tag not in _COLLECTIONS:
            raise UnreadableYaml(line, f"the tag {node.tag!r} is not read; take it away")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, document)
        if isinstance(node, yaml.SequenceNode):
            return [self._build(item, (*path, index), document) for index, item in enumerate(node.value)]
        try:
            return self._loader.construct_object(node)
        except ValueError as error:  # a timestamp such as 2024-13-01
            raise UnreadableYaml(line, f"{node.value!r} is no valid value: {error}; put it in quotes") from None

    def _mapping(self, node: yaml.MappingNode, path: Path, document: Document) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise UnreadableYaml(line, "merge keys (<<) are not read; write the fields out")
            if not isinstance(key_node, yaml.ScalarNode):
                raise UnreadableYaml(line, "a field's name must be a word, not a list or mapping")
            key = str(key_node.value)
            here = (*path, key)
            if key in result:
                document.repeated.append((here, line))
                continue
            document.lines[here] = line
            result[key] = self._build(value_node, here, document)
        return result
