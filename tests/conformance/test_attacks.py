"""Every attack in the catalogue has a row, and keeps every promise."""

from __future__ import annotations

import pytest

from casehard.attacks import ATTACKS
from conformance.attacks import PROMISES, TABLE


def test_every_attack_has_a_row():
    assert {row.name for row in TABLE} == set(ATTACKS)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_an_attack_keeps_its_promises(row, promise):
    promise(row)
