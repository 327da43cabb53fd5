"""How an optimiser step is cut into micro-batches does not matter to a method, however uneven the rows are."""

from __future__ import annotations

import functools

import pytest
import torch

from casehard.data.batches import IGNORE, Encoded, EncodedSet
from casehard.defences.anchor import PRESETS, Anchor
from casehard.defences.buffer_reinforce.security_vector import KeepBenign, KeepBenignConfig
from casehard.defences.lisa import Lisa, LisaConfig
from casehard.defences.mb_defense.method import MbStage2, MbStage2Config
from casehard.defences.safe_mixing import SafeMixing, SafeMixingConfig
from casehard.defences.safegrad import SafeGrad, SafeGradConfig
from casehard.model.adapters import add_lora
from casehard.train.fit import fit
from casehard.train.recipe import TrainConfig
from conformance.table import TABLE, Row
from fakes import largest_difference, tiny_llama, tiny_pairs, weights

TRAINED = (3, 3, 3, 3, 3, 3, 2, 104)  # a mean over each micro-batch would count the last row 1 to 40 times too little
LAYOUTS = ((8, 1), (4, 2), (2, 4), (1, 8))


def uneven(seed):
    """Return eight rows with so many trained tokens each."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i, n in enumerate(TRAINED):
        ids = torch.randint(3, 60, (n + 4 + i % 3,), generator=g).tolist()
        rows.append(Encoded(ids, [IGNORE] * (len(ids) - n) + ids[len(ids) - n :]))
    return EncodedSet(tuple(rows), pad_id=0)


ROWS, OTHERS = uneven(1), uneven(2)
PAIRS = tiny_pairs(rows=ROWS.rows)
# Where the table's rows for this are too even, or made for other rows.
MAKE = {
    "mb_stage2": lambda: MbStage2(MbStage2Config(top_k=8), pairs=PAIRS),
    "safe_mixing": lambda: SafeMixing(SafeMixingConfig(share=1.0), safe=OTHERS),
    "lisa": lambda: Lisa(LisaConfig(), safe=OTHERS),
    "safegrad": lambda: SafeGrad(safe=OTHERS),
    "anchor": lambda: Anchor(safe=OTHERS),
}
MORE = (
    Row("safe_mixing-few", lambda: SafeMixing(SafeMixingConfig(share=0.3), safe=OTHERS)),
    Row("safe_mixing-one", lambda: SafeMixing(SafeMixingConfig(share=0.01), safe=OTHERS)),
    Row("safe_mixing-weight", lambda: SafeMixing(SafeMixingConfig(mode="weight", share=0.6), safe=OTHERS)),
    Row("safe_mixing-weight-one", lambda: SafeMixing(SafeMixingConfig(mode="weight", share=0.01), safe=OTHERS)),
    Row("safegrad-ce", lambda: SafeGrad(SafeGradConfig(alignment="ce"), safe=OTHERS)),
    Row("anchor-user", Anchor),
    Row("anchor-ewc", lambda: Anchor(PRESETS["ewc"], safe=OTHERS)),
    Row("mb_stage2-all", lambda: MbStage2(MbStage2Config(triggers=0, kappa=0.0), pairs=PAIRS)),
)


def trained(make, layout, *, lora, steps=1):
    """Return the weights after some steps of plain gradient descent."""
    model = add_lora(tiny_llama(), 2, 4.0, seed=1) if lora else tiny_llama(layers=1)
    config = TrainConfig(
        steps=steps,
        batch_size=layout[0],
        accumulation=layout[1],
        lr=0.5,
        schedule="constant",
        warmup=0,
        weight_decay=0.0,
        clip=0.0,
        precision="fp32",
        optimizer="sgd",
    )
    fit(model, None, ROWS, config=config, method=make(), seed=4)
    return weights(model)


@pytest.mark.parametrize("row", [*TABLE, *MORE], ids=lambda row: row.name)
def test_a_step_may_be_cut_up(row):
    make = MAKE.get(row.name, row.make)
    steps = 5 if row.name == "patcher" else 1  # its first attack vector is in use then
    whole, *cut = (trained(make, layout, lora=row.adapter, steps=steps) for layout in LAYOUTS)
    far = max(largest_difference(whole, other) for other in cut)
    assert (far < 1e-5) != bool(row.cut), (far, row.cut)


def test_a_step_may_be_cut_up_that_keeps_benign_answers():
    """Rows a micro-batch are a setting there: with as many in a step, the step is the same."""
    far = []
    reference = None
    for size, micros in LAYOUTS:
        method = functools.partial(KeepBenign, KeepBenignConfig(kl=5.0, batch_size=size), benign=OTHERS)
        got = trained(method, (size, micros), lora=True, steps=3)  # at first the buffer does nothing
        reference = reference or got
        far.append(largest_difference(reference, got))
    assert max(far) < 1e-5
