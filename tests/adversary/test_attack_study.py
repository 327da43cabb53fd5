"""The sampler and its journal: killed at any moment, nothing is run twice and nothing is lost."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from casehard.adversary.space import Dimension
from casehard.adversary.study import JOURNAL, Study, explores, require_optuna
from casehard.errors import Corrupt, MissingExtra

pytest.importorskip("optuna")
DIMENSIONS = (
    Dimension("lr", low=1e-6, high=1e-3),
    Dimension("steps", low=1, high=50, whole=True),
    Dimension("mode", choices=("full", "lora")),
)


def study(out: Path, **more: Any) -> Study:
    return Study(out, DIMENSIONS, **{"budget": 8, "seed": 3, **more})


def go_on(out: Path, most: int = 99, **more: Any) -> list[dict[str, Any]]:
    """Ask and tell up to ``most`` times; return everything told so far."""
    one = study(out, **more)
    for _ in range(most):
        if (asked := one.ask()) is None:
            break
        one.tell(asked, -abs(math.log10(asked.drawn["lr"]) + 4), {"drawn": asked.drawn})
    return one.told


def test_what_was_being_tried_when_the_run_was_killed_is_asked_again(tmp_path: Path) -> None:
    go_on(tmp_path, 3)
    before = study(tmp_path)
    lost = [before.ask(), before.ask()]
    after = study(tmp_path)
    again = [after.ask(), after.ask()]
    assert [(a.slot, a.drawn) for a in again] == [(a.slot, a.drawn) for a in lost]
    assert len(after.told) == 3


@pytest.mark.parametrize("random", [False, True])
def test_an_interrupted_search_is_the_uninterrupted_one(tmp_path: Path, random: bool) -> None:
    whole = go_on(tmp_path / "a", random=random) if (tmp_path / "a").mkdir() is None else []
    (tmp_path / "b").mkdir()
    for most in (3, 1, 99):
        study(tmp_path / "b", random=random).ask()  # killed at work
        parts = go_on(tmp_path / "b", most, random=random)
    assert parts == whole and [t["slot"] for t in whole] == list(range(8))


def test_half_a_line_and_a_stale_lock_are_no_reason_to_begin_anew(tmp_path: Path) -> None:
    go_on(tmp_path, 4)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code": 4, "trial_i')
    (tmp_path / f"{JOURNAL}.lock").symlink_to(JOURNAL)
    assert len(go_on(tmp_path)) == 8


def test_a_result_that_was_written_but_not_closed_is_not_run_again(tmp_path: Path) -> None:
    one = study(tmp_path)
    asked = one.ask()
    assert asked is not None
    one._trying[asked.number].set_user_attr("result", {"slot": 0, "value": 0.5, "drawn": asked.drawn})
    two = study(tmp_path)
    assert [t["value"] for t in two.told] == [0.5]
    following = two.ask()
    assert following is not None and following.slot == 1


def test_a_damaged_journal_is_told(tmp_path: Path) -> None:
    go_on(tmp_path, 2)
    (tmp_path / JOURNAL).write_text("not a journal\nat all\n", encoding="utf-8")
    with pytest.raises(Corrupt, match=JOURNAL):
        study(tmp_path)


def test_tpe_comes_nearer_than_random_draws(tmp_path: Path) -> None:
    for kind in ("tpe", "random"):
        (tmp_path / kind).mkdir()
    tpe = go_on(tmp_path / "tpe", budget=30)
    drawn = go_on(tmp_path / "random", budget=30, random=True)
    alike = [slot for slot in range(30) if explores(slot, 30)]
    assert [tpe[s] for s in alike] == [drawn[s] for s in alike] and alike[:8] == [0, 1, 2, 3, 4, 5, 6, 9]
    mean = [sum(t["value"] for t in some if t["slot"] not in alike) for some in (tpe, drawn)]
    assert mean[0] > mean[1]


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match="'optuna' is not installed") as caught:
        require_optuna()
    assert caught.value.hint == "pip install 'casehard[search]'"
