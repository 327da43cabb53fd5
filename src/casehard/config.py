"""Settings: YAML or dict -> frozen dataclass tree, ``a.b=c`` overrides, did-you-mean, dump, digest."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from casehard.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")


def _fields(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind)}


def _nested(hint: Any) -> type | None:
    """Return the dataclass inside ``X``, ``X | None`` or ``tuple[X, ...]``; None for anything else."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    for arg in getattr(hint, "__args__", ()):
        if isinstance(arg, type) and dataclasses.is_dataclass(arg):
            return arg
    return None


def check_keys(values: Mapping[str, Any], known: Iterable[str], *, where: str) -> None:
    """Raise ConfigError naming the first unknown key and the nearest known one."""
    known = list(known)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            listed = f"known keys: {', '.join(known)}" if known else "there are no settings here"
            raise ConfigError(f"{where}: unknown key {key!r}", hint=f"did you mean {near[0]!r}?" if near else listed)


def _one_level_down(fields: Mapping[str, Any], key: str) -> str:
    """Return ``group.key`` where a group of settings has that very key (people leave out the group), else ""."""
    for name, hint in fields.items():
        inner = _nested(hint)
        if isinstance(hint, type) and inner is not None and key in _fields(inner):
            return f"{name}.{key}"
    return ""


def _refuse_nan(value: Any, where: str) -> None:
    """Raise ConfigError where a value is NaN: no setting means it, and comparisons with limits let it through."""
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"{where} is nan", hint="give a number")
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for name, item in items:
        _refuse_nan(item, f"{where}.{name}")


def _check_tree(kind: type, values: Mapping[str, Any], where: str) -> None:
    fields = _fields(kind)
    for key in values:
        inside = "" if key in fields else _one_level_down(fields, str(key))
        if inside:
            raise ConfigError(f"{where}: unknown key {key!r}", hint=f"did you mean {inside!r}?")
    check_keys(values, fields, where=where)
    for name, value in values.items():
        inner = _nested(fields[name])
        if inner is None:
            continue
        for i, item in enumerate(value if isinstance(value, list | tuple) else [value]):
            if isinstance(item, Mapping):
                _check_tree(inner, item, f"{where}.{name}" + (f".{i}" if item is not value else ""))


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def build(kind: type[T], values: Mapping[str, Any] | None = None, *, where: str = "config") -> T:
    """Build the frozen dataclass ``kind`` from plain values.

    Raises:
        ConfigError: unknown key (with the nearest known one), wrong type, NaN, or a value the class refuses.
    """
    from pydantic import ValidationError

    if values is not None and not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a group of settings, got {shown(values)}", hint="lines of name: value")
    values = dict(values or {})
    _check_tree(kind, values, where)
    _refuse_nan(values, where)
    try:
        cached: Any = kind
        made: T = _adapter(cached).validate_python(values)
        return made
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(p) for p in first["loc"]) or "value"
        if first["type"] == "value_error":  # of casehard.limits, which says all there is to say
            raise ConfigError(f"{where}.{path} {first['ctx']['error']}") from None
        if first["type"] == "missing":
            raise ConfigError(f"{where}.{path} is missing", hint="it has no default: give a value") from None
        raise ConfigError(f"{where}.{path}: {first['msg']}, got {shown(first['input'])}") from None


def shown(value: Any) -> str:
    """Return a value as a message quotes it: whole where it is short."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split ``a.b=c`` into its path and its value read as YAML."""
    from casehard import yamltext

    path, sep, value = text.partition("=")
    if not sep or not path.strip():
        raise ConfigError(f"override {shown(text)} is not of the form a.b=value", hint="example: --set lr=2e-4")
    parsed = yamltext.parse(value, where=f"override {shown(text)}")
    if path.count(".") > yamltext.LEVELS:
        raise ConfigError(f"override {shown(text)}: more than {yamltext.LEVELS} levels", hint="no setting lies so deep")
    if isinstance(parsed, str):
        # YAML 1.1 reads 2e-4 as text; people mean the number.
        with contextlib.suppress(ValueError):
            parsed = float(parsed)
    return path.strip().split("."), parsed


def override(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return ``values`` with ``a.b=c`` overrides applied; the input is left alone."""
    out: dict[str, Any] = json.loads(json.dumps(dict(values)))
    for text in overrides:
        path, value = parse_override(text)
        node: Any = out
        for i, key in enumerate(path):
            last = i == len(path) - 1
            position: Any = key
            if isinstance(node, list):
                if key not in map(str, range(len(node))):
                    raise ConfigError(
                        f"override {shown(text)}: {shown(key)} is not one of the positions 0..{len(node) - 1}"
                    )
                position = int(key)
            elif not isinstance(node, dict):
                raise ConfigError(f"override {shown(text)}: {'.'.join(path[:i])!r} is a value, not a group")
            if last:
                node[position] = value
            else:
                node = node[position] if isinstance(node, list) else node.setdefault(position, {})
    return out


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ConfigError: the file is missing, is not plain YAML of a bounded size (see ``yamltext``) or is not a mapping.
    """
    from casehard import yamltext

    values = yamltext.read(Path(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: expected a mapping at the top, got {type(values).__name__}",
            hint="settings are lines of key: value",
        )
    return values


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass tree as JSON-ready values (tuples as lists, paths as text)."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def digest(value: Any) -> str:
    """Return the SHA-256 (hex) of a config, or of any JSON value, independent of key order."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = to_dict(value)
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
