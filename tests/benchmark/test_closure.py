"""A node's digest covers the sources its result depends on: nothing stale is reused after a change."""

from __future__ import annotations

from pathlib import Path

import pytest

from casehard.benchmark import graph as matrix
from casehard.benchmark.closure import PACKAGE, closure, code_of
from casehard.defences import DEFENCES


def names(*modules: str) -> set[str]:
    return {file.relative_to(PACKAGE).as_posix() for file in closure(modules)}


def test_imports_inside_functions_count_and_those_for_type_checkers_do_not() -> None:
    found = names("casehard.evaluation.suite")
    assert "evaluation/generate.py" in found, "evaluate() imports it when it is called"
    assert "defences/buffer_reinforce/assets.py" not in names("casehard.model.model"), "imported for type checkers only"


def test_a_change_reaches_the_nodes_that_run_it_and_no_others() -> None:
    patcher = names(*matrix.STEPS["defend"], DEFENCES["patcher"].module)
    spard = names(*matrix.STEPS["defend"], DEFENCES["spard"].module)
    assert "maths/bilevel.py" in patcher and "defences/spard.py" in spard - patcher
    for kind in matrix.STEPS:
        found = names(*matrix.STEPS[kind])
        assert {"config.py", "io/files.py", "seeds.py", "types.py"} <= found, kind
        assert not {f for f in found if f.split("/")[0] in ("report", "cli")}, kind
        assert not {f for f in found if f.startswith("bench/")} - {"benchmark/arms.py"}, kind
    assert not {f for f in names(*matrix.STEPS["defend"]) if f.startswith("attack/")}, "hardened models outlive attacks"


def test_code_of_a_method_of_another_package_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "foreign_method.py"
    module.write_text("a = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    first = code_of(("casehard.steps.finetune", "foreign_method"))
    module.write_text("a = 2\n")
    code_of.cache_clear()
    assert code_of(("casehard.steps.finetune", "foreign_method")) != first != code_of(("casehard.steps.finetune",))
