"""Which sources a module runs: itself and all it imports, found in its syntax tree. No module is imported for it.

A node of a benchmark is named by what its result depends on. Its code is the closure of the imports of its step and of
the methods that the step names, so that nothing stale is used again, and work on one attack does not throw away what
another made.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from casehard import __version__

PACKAGE = Path(__file__).resolve().parents[1]
NO_RESULT = ("__init__.py", "errors.py", "io/secrets.py", "io/locks.py")
"""What decides no number: names, messages, the check for secrets, locks."""


def _place(module: str) -> Path | None:
    """Return the file of a module of this package, None for any other name."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file() and file.is_relative_to(PACKAGE):
            return file
    return None


def _is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _imports(node: ast.AST) -> Iterator[str]:
    """Yield the modules that a piece of code imports, inside functions too, but not for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if _is_typing(child):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module and not child.level:
            yield child.module
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from _imports(child)


@cache
def _direct(file: Path) -> frozenset[Path]:
    names = {name for name in _imports(ast.parse(file.read_text(encoding="utf-8"))) if name.startswith("casehard.")}
    return frozenset(place for name in names if (place := _place(name)) is not None)


def closure(modules: Iterable[str]) -> list[Path]:
    """Return the files of this package that the modules run, in the order of their names.

    Args:
        modules: dotted names; those of other packages are left out here, see :func:`code_of`.
    """
    todo = [place for module in modules if (place := _place(module)) is not None]
    found: set[Path] = set()
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo += _direct(file)
    return sorted(file for file in found if file.relative_to(PACKAGE).as_posix() not in NO_RESULT)


@cache
def code_of(modules: tuple[str, ...]) -> str:
    """Return the package version and a digest of all sources that the modules run; other packages count by file."""
    sha = hashlib.sha256()
    for file in closure(modules):
        sha.update(f"{file.relative_to(PACKAGE)}\0".encode() + file.read_bytes())
    for module in sorted(m for m in modules if not m.startswith("casehard.")):
        sha.update(module.encode() + _foreign(module))
    return f"{__version__}+{sha.hexdigest()[:12]}"


def _foreign(module: str) -> bytes:
    """Return the source of a module of another package."""
    from importlib.util import find_spec

    found = find_spec(module)
    place = Path(found.origin) if found and found.origin else None
    return place.read_bytes() if place and place.is_file() else b""
