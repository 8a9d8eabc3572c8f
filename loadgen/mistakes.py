"""A mistake in a scenario, in the file's own words: where it stands, what was given, what is allowed. Pure."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from fanmark.loadgen.errors import ScenarioError
from fanmark.loadgen.lengths import Dist
from fanmark.loadgen.redaction import REDACTED, is_secret_name
from fanmark.loadgen.scenario import ClientCert, FromEnv

T = TypeVar("T")

_TABLES = (inspect.StructType, inspect.DataclassType)
_LONGEST_VALUE = 80  # characters of a wrong value that are shown


def convert(
    raw: Mapping[str, Any], kind: type[T], where: str, path: Sequence[str] = (), shown: Mapping[str, Any] | None = None
) -> T:
    """`raw` as `kind`. Raises ScenarioError, which names the table by `where` (the file, or the file and the arm) and `path`, and the value
    as it stands in `shown` (left out: in `raw`)."""
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as e:
        raise _explained(str(e), raw if shown is None else shown, kind, where, path) from None


def nearest(key: str, allowed: Sequence[str]) -> str:
    """The mend of an unknown key: the one that was meant, else all that there are."""
    close = difflib.get_close_matches(key, allowed, 1)
    return f": did you mean {close[0]!r}?" if close else f": allowed are {', '.join(sorted(allowed))}"


def show(value: Any) -> str:
    """A value as TOML writes it, cut where it is long."""
    text = _toml(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        shown = [
            f"{k} = {REDACTED if isinstance(v, str) and is_secret_name(k) else _toml(v)}" for k, v in value.items()
        ]
        return f"{{ {', '.join(shown)} }}" if shown else "{}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str | bool):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def _explained(text: str, raw: Any, kind: type[Any], where: str, path: Sequence[str]) -> ScenarioError:
    """msgspec's message "what - at `$.a.b[0]`" as one line. It names types of its own; what is allowed is told from `kind`."""
    said, _, at = text.partition(" - at ")
    names, value, found = list(path), raw, inspect.type_info(kind)
    inside: inspect.Type | None = None
    for name, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", at):
        if name:
            names.append(name)
            value, found = value.get(name) if isinstance(value, dict) else None, _fields(found)[name]
            continue
        if index == "...":
            inside = _value(found)
        item = _item(found)
        if not isinstance(item, _TABLES) or index == "...":
            break  # an item of a plain list or table: the whole is shown
        names[-1] += f"[{index}]"
        value, found = value[int(index)], item
    key = re.search(r"(unknown|missing required) field `(\w+)`", said)
    if key and inside is not None:
        found = inside
    if key and key[1] == "unknown":
        return ScenarioError(f"{_table(where, names)}: unknown key {key[2]!r}{nearest(key[2], list(_fields(found)))}")
    if key:
        wanted = _allowed(_fields(found)[key[2]], ".".join([*names, key[2]]))
        return ScenarioError(f"{_table(where, names)}: {key[2]} is missing: it must be {wanted}")
    own = not said.startswith(("Expected", "Invalid"))  # a check of ours, which says what is allowed
    rule = said if own else f"must be {_allowed(found, '.'.join(names))}"
    if not names:
        return ScenarioError(f"{where}: {rule}")
    return ScenarioError(f"{_table(where, names[:-1])}{' ' if names[:-1] else ': '}{names[-1]} = {show(value)}: {rule}")


def _table(where: str, names: Sequence[str]) -> str:
    path = ".".join(names)
    listed = re.fullmatch(r"(.*)\[(\d+)\]", path)
    if listed:
        return f"{where}: [[{listed[1]}]] number {int(listed[2]) + 1}"
    return f"{where}: [{path}]" if names else where


def _options(found: inspect.Type) -> list[inspect.Type]:
    types = found.types if isinstance(found, inspect.UnionType) else (found,)
    return [option for option in types if not isinstance(option, inspect.NoneType)]


def _fields(found: inspect.Type) -> dict[str, inspect.Type]:
    table = next((option for option in _options(found) if isinstance(option, _TABLES)), None)
    return {field.encode_name: field.type for field in table.fields} if table is not None else {}


def _item(found: inspect.Type) -> inspect.Type | None:
    return next((option.item_type for option in _options(found) if isinstance(option, inspect.ListType)), None)


def _value(found: inspect.Type) -> inspect.Type | None:
    return next((option.value_type for option in _options(found) if isinstance(option, inspect.DictType)), None)


def _allowed(found: inspect.Type, key: str) -> str:
    """What `key`, of this type, may hold."""
    return " or ".join(_one_allowed(option) for option in _options(found)).replace("[[...]]", f"[[{key}]]")


def _one_allowed(found: inspect.Type) -> str:
    match found:
        case inspect.LiteralType():
            values = [_toml(value) for value in found.values]
            return f"one of {', '.join(values)}" if len(values) > 1 else values[0]
        case inspect.IntType():
            return f"a whole number{_bounds(found)}"
        case inspect.FloatType():
            return f"a number{_bounds(found)}"
        case inspect.BoolType():
            return "true or false"
        case inspect.StrType():
            return "a text in quotes" if not found.min_length else "a text in quotes, not an empty one"
        case inspect.ListType() if isinstance(found.item_type, inspect.StrType):
            return "a list of texts, as [...]"
        case inspect.ListType():
            return "a list of tables, as [[...]]"
        case inspect.DictType() if isinstance(found.value_type, inspect.StrType):
            return "a table of texts"
        case inspect.DictType() if isinstance(found.value_type, inspect.UnionType):
            return 'a table of texts, or of { env = "NAME" }'
        case inspect.DictType() if isinstance(found.value_type, inspect.StructType):
            return "a table of tables"
        case inspect.StructType() if found.cls is FromEnv:
            return '{ env = "NAME" }'
        case inspect.StructType() if found.cls is ClientCert:
            return '{ cert = "FILE", key = "FILE" }'
        case inspect.StructType() if found.cls is Dist:
            return 'a distribution, as { dist = "lognormal", mean = 400, cv = 0.5 }'
    return "a table"


def _bounds(found: inspect.IntType | inspect.FloatType) -> str:
    limits = (("above", found.gt), ("of at least", found.ge), ("below", found.lt), ("of at most", found.le))
    words = [f"{word} {limit:g}" for word, limit in limits if limit is not None]
    return " " + " and ".join(words) if words else ""
