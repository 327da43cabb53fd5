"""Every judge in the catalogue has a row, and keeps every promise."""

from __future__ import annotations

import pytest

from casehard.evaluation.judges import JUDGES
from conformance.judges import PROMISES, TABLE, staged


def test_every_judge_has_a_row():
    assert {row.name for row in TABLE} == set(JUDGES)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_judge_keeps_its_promises(row, promise):
    with staged(row) as ready:
        promise(ready)
