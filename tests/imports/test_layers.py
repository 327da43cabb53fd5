"""Hold the import map: data flows one way, methods stay pure, nothing heavy is imported where a user waits."""

from __future__ import annotations

import ast
import functools
import sys
from pathlib import Path

import pytest

from casehard.defences import DEFENCES

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "casehard"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Each room and the rooms it may import from. A name that is missing here fails the test: place it first.
PLAIN = {"errors", "types", "limits", "yamltext", "config", "seeds", "compat", "registry", "io"}
BOTTOM = {"__init__", *PLAIN, "maths", "distributed"}
TRAINED = BOTTOM | {"data", "model", "train"}
MEASURED = TRAINED | {"evaluation", "organism", "backdoor"}
STEPS = MEASURED | {"attacks", "defences", "steps"}
ROOMS: dict[str, set[str]] = {
    # The public names, for type checkers; at run time they are imported when they are asked for.
    "__init__": STEPS | {"api", "advice", "scan"},
    "errors": set(),
    "types": {"errors"},
    "limits": {"errors"},
    "yamltext": {"errors"},
    "config": {"errors", "yamltext"},
    "seeds": {"errors"},
    "compat": {"errors"},
    "registry": {"errors", "config"},
    "advice": {"errors"},
    "io": {"errors"},
    "maths": {"errors", "limits", "seeds"},
    "distributed": {"errors", "seeds", "maths", "limits"},
    "data": BOTTOM,
    "model": BOTTOM | {"data"},
    "train": BOTTOM | {"data", "model"},
    "evaluation": BOTTOM | {"data", "model"},
    "organism": TRAINED | {"evaluation", "backdoor"},
    "backdoor": BOTTOM | {"data", "evaluation", "organism"},
    "attacks": TRAINED | {"backdoor", "defences"},
    "defences": MEASURED,
    "steps": MEASURED | {"attacks", "defences"},
    "benchmark": STEPS,
    "reporting": BOTTOM | {"benchmark", "attacks", "defences", "evaluation"},
    "scan": STEPS | {"benchmark", "reporting"},
    "adversary": STEPS | {"benchmark"},
    "api": STEPS | {"benchmark", "reporting", "adversary"},
    "cli": STEPS | {"advice", "api", "benchmark", "reporting", "scan", "adversary"},
}
# Narrower than the room: only these modules of the other room.
ONLY: dict[tuple[str, str], set[str]] = {
    ("organism", "evaluation"): {"casehard.evaluation.judges.base"},
    ("backdoor", "organism"): {"casehard.organism.world", "casehard.organism.triggers"},
    ("organism", "backdoor"): {"casehard.backdoor.triggers", "casehard.backdoor.behaviours"},
    # An attacker who knows the defence reads its mathematics.
    ("attacks", "defences"): {
        f"casehard.defences.buffer_reinforce.{part}" for part in ("assets", "frozen_lora", "method", "saturation")
    },
    ("evaluation", "train"): {"casehard.train.progress"},
    ("reporting", "evaluation"): {"casehard.evaluation.metrics"},
    ("scan", "benchmark"): {"casehard.benchmark.outfolder", "casehard.benchmark.store"},
    ("scan", "reporting"): {"casehard.reporting.backdoor_page", "casehard.reporting.card"},
}
# An invented world has triggers of its own, which a room below it looks up.
BOTH_WAYS = [{"organism", "backdoor"}]
METHOD_IMPORTS = {
    "casehard.maths",
    "casehard.distributed",
    "casehard.data.batches",
    "casehard.seeds",
    "casehard.errors",
    "casehard.types",
    "casehard.limits",
    "casehard.config",
    "casehard.defences",
    "casehard.train.protocol",
    "casehard.train.passes",
    "casehard.io.files",
    "casehard.model.lora_files",
    "casehard.model.shard",
}
# A pipeline trains the model itself, so it also knows what a model is and how rows become tokens.
PIPELINE_IMPORTS = METHOD_IMPORTS | {
    "casehard.backdoor",
    "casehard.data.mix",
    "casehard.model.model",
    "casehard.train.recipe",
    "casehard.train.tune",
}
# The pieces of the organism that describe its world know nothing of training.
PURE_WORLD = {"world", "tokenizer", "judge", "grammar", "words", "rows", "suite"}
HEAVY = {"torch", "transformers", "peft", "accelerate", "trl", "datasets", "matplotlib", "numpy", "pandas", "pyarrow"}
LIGHT = [
    "__init__",
    "errors",
    "types",
    "limits",
    "config",
    "yamltext",
    "advice",
    "io/secrets.py",
    "io/disk.py",
    "io/files.py",
    "io/locks.py",
    "io/leash.py",
    "io/stored.py",
    "cli",
    "benchmark/plan.py",
    "benchmark/entries.py",
    "benchmark/inputs.py",
    "benchmark/graph.py",
    "model/source.py",
    "benchmark/store.py",
    "benchmark/worker.py",
]
EXTRAS = {
    "trl": set(),
    "openai": set(),
    "ray": set(),
    "fastapi": set(),
    "datasets": {"data/hub.py"},
    "matplotlib": {"reporting/figures.py"},
    "pyarrow": {"data/tables.py"},
    "gguf": {"model/gguf_file.py"},
    "optuna": {"adversary/study.py"},
}


def name_of(path: Path) -> str:
    """Return the dotted module name of a source file."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def room_of(module: str) -> str:
    """Return the first part below the package: ``casehard.data.mix`` -> ``data``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _from(node: ast.ImportFrom, module: str, path: Path) -> list[str]:
    if node.level:
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        base = ".".join(package[: len(package) - node.level + 1] + ([node.module] if node.module else []))
    else:
        base = node.module or ""
    # ``from casehard.data import sources`` imports a module, ``from casehard.types import Score`` a name.
    return [f"{base}.{a.name}" if _is_module(f"{base}.{a.name}") else base for a in node.names]


def _is_module(name: str) -> bool:
    path = PACKAGE.parent / Path(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


@functools.cache
def imports(path: Path, *, top_only: bool = False) -> frozenset[str]:
    """Return the modules a file imports; ``top_only`` leaves out those inside functions or TYPE_CHECKING."""
    found: set[str] = set()

    def visit(node: ast.AST, nested: bool) -> None:
        if top_only and (nested or _is_typing(node)):
            return
        if isinstance(node, ast.Import):
            found.update(a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(_from(node, name_of(path), path))
        inside = nested or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return frozenset(found)


def ours(path: Path) -> set[str]:
    """Return the modules of this package that a file imports."""
    return {m for m in imports(path) if m == "casehard" or m.startswith("casehard.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_map(path):
    here = room_of(name_of(path))
    assert here in ROOMS, f"{path}: no room {here!r} in the map"
    for module in ours(path):
        there = room_of(module)
        if there == here:
            continue
        assert there in ROOMS[here], f"{path}: {here} must not import {module}"
        allowed = ONLY.get((here, there))
        assert allowed is None or module in allowed, f"{path}: of {there}, only {sorted(allowed)} may be imported"


def test_the_map_is_a_direction():
    for room, allowed in ROOMS.items():
        for other in allowed:
            both = room in ROOMS.get(other, set())
            assert not both or {room, other} in BOTH_WAYS or "__init__" in (room, other), (
                f"{room} and {other}: a circle"
            )


def _method_files() -> list[tuple[Path, set[str]]]:
    """Return the file of every method, and what it may import."""
    found = {
        PACKAGE.parent / Path(*s.module.split(".")).with_suffix(".py"): PIPELINE_IMPORTS
        if s.pipeline
        else METHOD_IMPORTS
        for s in DEFENCES.values()
    }
    return sorted(found.items())


@pytest.mark.parametrize(("path", "allowed"), _method_files(), ids=lambda p: getattr(p, "name", ""))
def test_method_files_are_pure(path, allowed):
    for module in imports(path):
        top = module.partition(".")[0]
        if top == "casehard":
            assert any(module == m or module.startswith(m + ".") for m in allowed), f"{path}: {module}"
        else:
            assert top == "torch" or top in sys.stdlib_module_names, f"{path}: {module} is not torch or stdlib"


@pytest.mark.parametrize("path", sorted((PACKAGE / "maths").glob("*.py")), ids=lambda p: p.name)
def test_maths_is_pure(path):
    assert "torch.distributed" not in path.read_text(encoding="utf-8"), f"{path}: belongs to distributed/"
    for module in imports(path):
        top = module.partition(".")[0]
        assert top in {"torch", "casehard"} or top in sys.stdlib_module_names, f"{path}: {module}"


def test_the_world_knows_nothing_of_training():
    for path in (PACKAGE / "organism").glob("*.py"):
        if path.stem in PURE_WORLD:
            outside = {m for m in imports(path) if m.partition(".")[0] in {"torch", "transformers", "peft"}}
            outside |= {m for m in ours(path) if room_of(m) in {"train", "model", "attacks", "steps", "benchmark"}}
            # The tokenizer class of transformers is what the folder is saved with.
            allowed = {"transformers"} if path.stem == "tokenizer" else set()
            assert outside <= allowed, f"{path}: {outside}"


def _light_files() -> list[Path]:
    out: list[Path] = []
    for name in LIGHT:
        place = PACKAGE / name
        out += sorted(place.rglob("*.py")) if place.is_dir() else [place if place.suffix else place.with_suffix(".py")]
    return out


@pytest.mark.parametrize("path", _light_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_light_modules_import_nothing_heavy_at_the_top(path):
    heavy = {m for m in imports(path, top_only=True) if m.partition(".")[0] in HEAVY}
    assert not heavy, f"{path}: {heavy}"


@pytest.mark.parametrize("extra", EXTRAS)
def test_optional_packages_have_one_door(extra):
    users = {p.relative_to(PACKAGE).as_posix() for p in MODULES if extra in {m.partition(".")[0] for m in imports(p)}}
    assert users <= EXTRAS[extra], f"{extra} is imported in {sorted(users - EXTRAS[extra])}"
    for user in users:
        tops = {m.partition(".")[0] for m in imports(PACKAGE / user, top_only=True)}
        assert extra not in tops, f"{user} imports {extra} at the top: the module must load without it"
