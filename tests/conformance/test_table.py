"""Every method in the catalogue has a row in the table, and its row tells the truth about it."""

from __future__ import annotations

import pytest

from casehard.defences import DEFENCES
from casehard.train.protocol import SEAMS, Method, has
from conformance.table import TABLE


def test_every_method_has_a_row():
    # Those that train the model themselves have a table of their own, in test_pipelines.py.
    assert {row.name for row in TABLE} == {name for name, spec in DEFENCES.items() if not spec.pipeline}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_row_makes_its_method(row):
    method, other = row.make(), row.make()
    assert isinstance(method, Method)
    assert method is not other
    assert method.name == row.name
    assert isinstance(method, DEFENCES[row.name].load()[0])
    assert method.config == other.config
    assert has(method, "state") == has(method, "restore"), "what is saved must be read back"
    assert any(has(method, seam) for seam in SEAMS) or row.name in ("plain", "ptst")
