"""The table of methods: one row for each, crossed with every promise by the tests in this folder and tests/train.

Adding a method means adding a row here. A row's factory returns a fresh object, small enough for a 12-step run on the
tiny model of ``tests/fakes.py`` (vocabulary 64, rows of at most 12 tokens).
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buffer_fakes import shared_assets
from casehard.defences.anchor import Anchor
from casehard.defences.anomaly import Anomaly
from casehard.defences.antidote import Antidote, AntidoteConfig
from casehard.defences.booster import Booster, BoosterConfig
from casehard.defences.bottleneck import Bottleneck, BottleneckConfig
from casehard.defences.buffer_reinforce.method import BufferReinforce
from casehard.defences.buffer_reinforce.security_vector import SecurityVector
from casehard.defences.crow import Crow
from casehard.defences.dilution import Dilution
from casehard.defences.fine_mixing import FineMixing
from casehard.defences.lisa import Lisa, LisaConfig
from casehard.defences.mb_defense.method import MbStage2, MbStage2Config
from casehard.defences.one_shot_repair import OneShotRepair, OneShotRepairConfig
from casehard.defences.patcher import Patcher, PatcherConfig
from casehard.defences.plain import Plain
from casehard.defences.ptst import Ptst
from casehard.defences.safe_mixing import SafeMixing
from casehard.defences.safegrad import SafeGrad
from casehard.defences.safelora import SafeLora, SafeLoraConfig
from casehard.defences.shrink import Shrink
from casehard.defences.spard import Spard, SpardConfig
from casehard.defences.tar import Tar, TarConfig
from casehard.defences.token_constrained import TokenConstrained
from casehard.defences.vaccine import Vaccine, VaccineConfig
from casehard.maths.bilevel import Attacker
from fakes import tiny_llama, tiny_pairs, tiny_rows

SETTINGS = ("dropout", "accumulation", "two_adapters")


@dataclass(frozen=True)
class Row:
    """One method as the shared tests see it."""

    name: str
    make: Callable[[], Any]
    settings: tuple[str, ...] = SETTINGS
    """Model set-ups of ``tests/train/test_resume.py`` that the method supports."""
    adapter: bool = False
    """Whether it wants one adapter called "default" and nothing else that trains."""
    cut: str = ""
    """Why it matters by its very definition how a step is cut into micro-batches; empty where it does not."""


def _patcher() -> Patcher:
    attacker = Attacker(steps=3, lr=1e-2, batch_size=2)
    return Patcher(PatcherConfig(round_steps=4, attackers=(attacker,)), unsafe=tiny_rows(6, seed=1))


def _tar() -> Tar:
    attackers = tuple(Attacker(steps=3, lr=lr, batch_size=2) for lr in (1e-2, 2e-2))
    config = TarConfig(attackers=attackers, every=2, tamper_batch_size=3, retain_batch_size=3)
    return Tar(config, unsafe=tiny_rows(6, seed=1), retain=tiny_rows(6, seed=2))


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []  # removed when the interpreter ends


@functools.cache
def _unaligned() -> Path:
    """Return the folder of a model with other weights than the one that is tuned, for SafeLoRA."""
    _FOLDERS.append(tempfile.TemporaryDirectory())
    tiny_llama(seed=7).save_pretrained(_FOLDERS[-1].name)
    return Path(_FOLDERS[-1].name)


def _dilution() -> Dilution:
    return Dilution(base=dict(tiny_llama(layers=2, seed=5).named_parameters()))


def _fine_mixing() -> FineMixing:
    return FineMixing(base=dict(tiny_llama(layers=1, seed=5).named_parameters()))


def _repair() -> OneShotRepair:
    # A small rate: Adam turns the rounding of a gradient near 0 into a step of full size, on a GPU another one.
    return OneShotRepair(OneShotRepairConfig(steps=3, lr=1e-5, stop=0.0), safe=tiny_rows(6, seed=1))


TABLE = (
    Row("plain", Plain),
    Row("patcher", _patcher, ("dropout", "accumulation")),  # full-parameter: no adapters
    Row("vaccine", lambda: Vaccine(VaccineConfig(rho=0.5))),
    Row("booster", lambda: Booster(BoosterConfig(weight=1.0, batch_size=3), unsafe=tiny_rows(6, seed=1))),
    Row("tar", _tar, ("dropout", "accumulation")),  # its attack changes all weights: no adapters
    Row("spard", lambda: Spard(SpardConfig(tau_scale=0.9, delta=0.0), safe=tiny_rows(6, seed=1))),
    Row("safe_mixing", lambda: SafeMixing(safe=tiny_rows(6, seed=1))),
    Row("lisa", lambda: Lisa(LisaConfig(safe_steps=2, user_steps=3), safe=tiny_rows(6, seed=1))),
    Row("safegrad", lambda: SafeGrad(safe=tiny_rows(6, seed=1))),
    Row("anchor", lambda: Anchor(safe=tiny_rows(6, seed=1))),
    Row("token_constrained", TokenConstrained),
    Row("bottleneck", lambda: Bottleneck(BottleneckConfig(prompts=2), safe=tiny_rows(6, seed=1))),
    Row("one_shot_repair", _repair),
    Row("ptst", Ptst),
    Row("shrink", Shrink),
    Row("safelora", lambda: SafeLora(SafeLoraConfig(layers=2), assets=_unaligned())),
    # tests/defences/test_buffer_baselines.py kills and resumes it.
    Row("security_vector", lambda: SecurityVector(assets=shared_assets().path), (), adapter=True),
    Row("antidote", lambda: Antidote(AntidoteConfig(mask_ratio=0.2), unsafe=tiny_rows(6, seed=1))),
    # tests/defences/test_buffer_reinforce.py resumes it.
    Row("buffer_reinforce", lambda: BufferReinforce(assets=shared_assets()), (), adapter=True),
    # Its pairs are made of the very rows that the shared tests train on.
    Row("mb_stage2", lambda: MbStage2(MbStage2Config(top_k=8), pairs=tiny_pairs())),
    Row("fine_mixing", _fine_mixing, ("dropout", "accumulation")),  # mixes whole models: no adapters
    Row("dilution", _dilution),
    Row("crow", Crow),
    Row("anomaly", Anomaly, cut="what it inserts comes from what the prompts of a micro-batch share and hold"),
)
