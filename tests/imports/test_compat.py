"""Private members of other packages: each that we touch is listed, and each that is listed is still there."""

from __future__ import annotations

import ast
import importlib
import inspect
from importlib.metadata import version
from pathlib import Path

import pytest

from casehard import compat

PACKAGE = Path(compat.__file__).parent
FIELDS = {"_asdict", "_replace"}  # of named tuples, public in spite of the name
OF_PYTHON = {"_exit"}  # os._exit is documented


def _trees() -> dict[Path, ast.Module]:
    return {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(PACKAGE.rglob("*.py"))}


def _private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _ours(trees: dict[Path, ast.Module]) -> set[str]:
    """Return the private names that the package itself defines."""
    out = set()
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            out.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            out.add(node.id if isinstance(node, ast.Name) else node.attr)
    return out


def test_every_private_member_that_is_used_is_listed():
    trees = _trees()
    listed = {member.rpartition(":")[2].rpartition(".")[2] for member in compat.PRIVATE}
    ours = _ours(trees)
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _private(node.attr) and node.attr not in ours:
                known = listed | FIELDS | OF_PYTHON
                assert node.attr in known, f"{file.name}:{node.lineno}: {node.attr} is private to another package"


def test_every_override_of_a_private_method_is_listed():
    from transformers import Trainer

    from casehard.train.fit import _FitTrainer
    from casehard.train.trainer import HardenedTrainer

    ours = {
        name
        for cls in (_FitTrainer, HardenedTrainer)
        for c in cls.__mro__
        for name in vars(c)
        if c.__module__.startswith("casehard") and _private(name) and hasattr(Trainer, name)
    }
    assert {f"transformers.trainer:Trainer.{name}" for name in ours} <= set(compat.PRIVATE)


@pytest.mark.parametrize("member", compat.PRIVATE)
def test_a_private_member_is_still_there(member):
    module, _, path = member.partition(":")
    found = importlib.import_module(module)
    owner, name = found, path
    if "." in path:
        cls, _, name = path.partition(".")
        owner = getattr(found, cls)
    # Attributes that only instances have are named in the source of their class.
    try:
        there = hasattr(owner, name) or name in inspect.getsource(owner)
    except (TypeError, OSError):
        there = False
    seen = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "accelerate", "peft"))
    assert there, f"{member} is gone ({compat.PRIVATE[member]}); seen {seen}"
