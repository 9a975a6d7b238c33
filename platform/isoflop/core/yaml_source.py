"""YAML read safely, with the line of every key, so that messages can point at the place.

Differences from plain ``yaml.safe_load``: duplicate keys are errors, ``1e9`` is a number, and only ``true``/``false``
are booleans (YAML 1.1 would also take ``on`` and ``no``, read ``010`` as 8 and ``1:30`` as 90). Values are those of JSON;
any other tag, such as one that would build a Python object, is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from isoflop.core.errors import UserError

KeyPath = tuple[str | int, ...]
MAX_NODES = 200_000  # aliases can make a small file expand without end
_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null"))


@dataclass(frozen=True)
class Source:
    """Parsed data together with where each part of it stands.

    Attributes:
        data: plain dicts, lists, strings, numbers, booleans and None.
        name: file name for messages.
        lines: key path -> 1-based line.
        text: the text as read.
        folder: where modules beside the file lie; None when there is no such place.
    """

    data: Any
    name: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    text: str = ""
    folder: Path | None = None

    def where(self, path: KeyPath) -> str:
        """``file:line: key.path`` of the closest part of ``path`` whose line is known."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return f"{self.name}:{self.lines[path[:end]]}" + (f": {dotted(path)}" if path else "")
        return self.name + (f": {dotted(path)}" if path else "")


def dotted(path: KeyPath) -> str:
    """``("methods", 0, "quecc", "k")`` as ``methods[0].quecc.k``."""
    out = ""
    for part in path:
        out += f"[{part}]" if isinstance(part, int) else (f".{part}" if out else str(part))
    return out


class _Loader(yaml.SafeLoader):
    """SafeLoader with JSON-like scalars."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, regexp) for tag, regexp in resolvers if tag == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))


def _whole_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)).replace("_", ""))


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)|[-+]?[0-9][0-9_]*\.[0-9_]*|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def load_yaml(path: str | Path) -> Source:
    """Read a YAML file. Raises UserError when it is missing, unreadable or not YAML."""
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file" + _similar_file(file)) from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a NUL in the name
        raise UserError(f"{path!r}: not a file name: {error}") from None
    return replace(parse_yaml(text, str(path)), folder=file.resolve().parent)


def parse_yaml(text: str, name: str = "<text>") -> Source:
    """Parse YAML text. Raises UserError naming file and line."""
    lines: dict[KeyPath, int] = {}
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # a character that YAML forbids
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    try:
        node = loader.get_single_node()
        data = _construct(loader, node, (), lines, name) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{name}{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{name}: nested too deeply") from None
    finally:
        loader.dispose()
    return Source(data, name, lines, text)


def _construct(loader: _Loader, node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], name: str) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if len(lines) > MAX_NODES:
        raise UserError(f"{name}: expands to more than {MAX_NODES:,} values")
    _check_tag(node, name)
    if isinstance(node, yaml.MappingNode):
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise UserError(f"{name}:{key_node.start_mark.line + 1}: a key must be text or a number")
            key = _scalar(loader, key_node, path, name)
            if key in result:
                raise UserError(
                    f"{name}:{key_node.start_mark.line + 1}: {dotted((*path, str(key)))}: the key stands twice in one block"
                )
            lines[(*path, key)] = key_node.start_mark.line + 1
            result[key] = _construct(loader, value_node, (*path, key), lines, name)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, child, (*path, i), lines, name) for i, child in enumerate(node.value)]
    return _scalar(loader, node, path, name)


def _scalar(loader: _Loader, node: yaml.Node, path: KeyPath, name: str) -> Any:
    _check_tag(node, name)
    try:
        value = loader.construct_object(node, deep=True)
        # JSON writes characters beyond 16 bits as two escapes; YAML's escapes stand for one character each
        return value.encode("utf-16", "surrogatepass").decode("utf-16") if isinstance(value, str) else value
    except (ValueError, TypeError, LookupError, AttributeError):  # what PyYAML raises for "!!int many" and the like
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        place = f"{name}:{node.start_mark.line + 1}" + (f": {dotted(path)}" if path else "")
        raise UserError(f"{place}: {str(node.value)[:40]!r} is not a value of the kind {kind}") from None


def _check_tag(node: yaml.Node, name: str) -> None:
    if node.tag not in _TAGS:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise UserError(f"{name}:{node.start_mark.line + 1}: the tag {tag} is not allowed; use plain values")


def _similar_file(file: Path) -> str:
    from isoflop.core.errors import nearest

    folder = file.parent if file.parent.is_dir() else None
    if folder is None:
        return f" (and no such folder: {file.parent})"
    hint = nearest(file.name, [p.name for p in folder.glob("*.y*ml")])
    return f" (did you mean {str(folder / hint)!r}?)" if hint else ""
