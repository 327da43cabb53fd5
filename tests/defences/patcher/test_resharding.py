"""Rows that travel between processes which split the weights in different ways."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from casehard.defences.patcher.workers.resharding import join_rows, row_counts, rows_for
from casehard.distributed.ranks import RankInfo, span
from casehard.errors import Corrupt

COUNTS = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.integers(1, 11), min_size=1)


def part_of(weights: dict[str, torch.Tensor], place: RankInfo) -> dict[str, torch.Tensor]:
    """Split as FSDP2 does: ceil(rows / ranks) rows each, the last ones fewer or none."""
    return {name: t[slice(*span(len(t), place.world_size, place.rank))] for name, t in weights.items()}


@given(rows=COUNTS, ours=st.integers(1, 5), theirs=st.integers(1, 5))
def test_there_and_back_again_every_row_is_where_it_belongs(rows: dict[str, int], ours: int, theirs: int) -> None:
    weights = {name: torch.randn(n, 3) for name, n in rows.items()}
    mine = [part_of(weights, RankInfo(i, ours)) for i in range(ours)]
    arrived = []
    for q in range(theirs):
        pieces = [rows_for(mine[i], rows, RankInfo(i, ours), RankInfo(q, theirs)) for i in range(ours)]
        arrived.append(join_rows(pieces, part_of(weights, RankInfo(q, theirs)), "they"))
        assert not any(pieces)  # nothing travels that nobody needs
    for q, got in enumerate(arrived):
        for name, t in part_of(weights, RankInfo(q, theirs)).items():
            assert torch.equal(got[name], t)
    for i in range(ours):
        back = [rows_for(arrived[q], rows, RankInfo(q, theirs), RankInfo(i, ours)) for q in range(theirs)]
        for name, t in join_rows(back, mine[i], "they").items():
            assert torch.equal(t, mine[i][name])


def test_one_process_to_one_sends_the_tensors_themselves_scalars_too() -> None:
    weights = {"w": torch.randn(4, 2), "scale": torch.tensor(2.0)}
    pieces = rows_for(weights, {"w": 4, "scale": 1}, RankInfo(), RankInfo())
    assert pieces["w"] is weights["w"] and pieces["scale"].ndim == 0


def test_rows_are_counted_of_whole_weights_tied_ones_once() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Embedding(7, 3), "b": torch.nn.Linear(3, 7, bias=False)})
    model["b"].weight = model["a"].weight
    assert row_counts(model) == {"a.weight": 7}


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([{}], "nothing of 'w' arrived"),
        ([{"w": torch.zeros(2, 2)}], r"'w' has shape \(2, 2\), expected \(4, 2\)"),
        ([{"w": torch.zeros(2, 2)}, {"w": torch.zeros(2, 3)}], "parts of 'w' have shapes"),
        ([{"w": torch.zeros(4, 2), "x": torch.zeros(1)}], "1 tensors that were not asked for, first 'x'"),
    ],
)
def test_what_was_not_asked_for_is_refused(pieces: list[dict[str, torch.Tensor]], message: str) -> None:
    with pytest.raises(Corrupt, match=message):
        join_rows(pieces, {"w": torch.zeros(4, 2)}, "attacker 0")
