"""Numbers in settings: inside their limits in any spelling, or a ConfigError that names the setting."""

from __future__ import annotations

import importlib
import math
import pkgutil
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Literal, get_type_hints

import numpy
import pytest

import casehard
from casehard.attacks import ATTACKS
from casehard.attacks.finetune import FinetuneAttack
from casehard.config import build, digest
from casehard.data.select import SelectConfig
from casehard.defences.mb_defense.config import MbConfig
from casehard.defences.patcher import PatcherConfig
from casehard.defences.spard import SpardConfig
from casehard.errors import ConfigError
from casehard.limits import Count, Limited, Share, Within, _allowed
from casehard.maths.bilevel import Attacker
from casehard.maths.merge import MergeConfig
from casehard.maths.pareto import coefficient_grid
from casehard.train.recipe import TrainConfig

NOT_FINITE = [math.nan, math.inf, -math.inf, "nan", "NaN", "inf", "-Infinity", "1e999", "1e300", 1e300, -1e300, 10**400]


@dataclass(frozen=True, kw_only=True)
class Small(Limited):
    """Every shape of hint that limits are written in."""

    count: Count = 1
    maybe: Share | None = None
    several: tuple[Count, ...] = ()
    pair: tuple[Share, Share] = (0.0, 1.0)
    none: tuple[Count, Count] | None = None
    either: Annotated[float | Literal["auto"], Within(0, 10, endless=True)] = "auto"
    open: Annotated[float, Within(0, 1, above=True, below=True)] = 0.5


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (TrainConfig, "lr"),
        (TrainConfig, "weight_decay"),
        (FinetuneAttack, "alpha"),
        (MergeConfig, "c_user"),
        (SpardConfig, "tau"),
        (MbConfig, "two.lr"),
        (MbConfig, "train.clip"),
    ],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_what_is_not_finite_is_refused_in_any_spelling(kind, path, value):
    *groups, last = path.split(".")
    values = {last: value}
    for group in groups:
        values = {group: values}
    with pytest.raises(ConfigError, match=rf"x\.{path}\b"):
        build(kind, values, where="x")


@pytest.mark.parametrize("value", [2**63, 2**64, 10**400, "9" * 30, 1e300])
@pytest.mark.parametrize("name", ["steps", "batch_size", "accumulation", "warmup", "save_every", "keep"])
def test_a_count_that_nobody_means_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"x.{name}"):
        build(TrainConfig, {name: value}, where="x")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"count": 2**64}, "count must be at most 1,000,000,000, got 18,446,744,073,709,551,616"),
        ({"maybe": 1.5}, "maybe must be at most 1, got 1.5"),
        ({"maybe": math.nan}, "maybe is nan"),
        ({"several": (1, 2, 0)}, "must be at least 1, got 0"),
        ({"pair": (0.0, -0.5)}, "must be at least 0, got -0.5"),
        ({"none": (1, 0)}, "must be at least 1, got 0"),
        ({"either": 11.0}, "either must be at most 10, got 11"),
        ({"either": -math.inf}, "either must be at least 0, got -inf"),
        ({"open": 0.0}, "open must be above 0, got 0"),
        ({"open": 1.0}, "open must be below 1, got 1"),
    ],
)
def test_code_and_files_meet_the_same_limits(values, said):
    for make in (lambda: Small(**values), lambda: build(Small, values, where="x")):
        with pytest.raises(ConfigError) as caught:
            make()
        assert said in caught.value.message


def test_what_means_something_is_kept():
    values = {"count": 1, "maybe": None, "several": [1, 2], "pair": [0, 1], "either": "auto", "open": 0.25}
    made = build(Small, values)
    assert made == Small(several=(1, 2), open=0.25)
    assert build(Small, {"either": math.inf}).either == math.inf
    assert SelectConfig(beta=math.inf).beta == SpardConfig(eta_safe=math.inf).eta_safe == math.inf


def test_limits_are_no_part_of_a_digest():
    """Digests name the nodes of benchmarks: they are those of the plain values."""
    plain = {"count": 1, "maybe": 0.5, "several": [], "pair": [0.0, 1.0], "none": None, "either": "auto", "open": 0.5}
    assert digest(Small(maybe=0.5)) == digest(build(Small, {"maybe": "0.5"})) == digest(plain)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300])
def test_a_grid_of_coefficients_is_held_too(value):
    with pytest.raises(ConfigError, match="coefficient"):
        coefficient_grid(c_user=(0.5, value))
    with pytest.raises(ConfigError, match="coefficient"):
        coefficient_grid(c_reinforce=(value,))


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("name", ["count", "maybe", "several", "pair", "either"])
def test_true_and_false_are_no_numbers(name, value):
    listed = {"several": [1, value], "pair": [0.5, value]}
    given = listed.get(name, value)
    with pytest.raises(ConfigError, match=rf"{name}\b.* is {str(value).lower()}, not a number"):
        build(Small, {name: given}, where="x")
    with pytest.raises(ConfigError, match=rf"{name} is {str(value).lower()}, not a number"):
        Small(**{name: tuple(given) if name in listed else given})


def test_a_setting_without_a_default_that_is_not_given_is_called_missing():
    with pytest.raises(ConfigError, match=r"weight_difference\.before is missing"):
        ATTACKS["weight_difference"].configure("weight_difference")


def every_setting():
    """Name every setting of every class of settings with one plain type or choice."""
    for module in pkgutil.walk_packages(casehard.__path__, "casehard."):
        if not module.name.rsplit(".", 1)[-1].startswith("__"):
            importlib.import_module(module.name)
    kinds = [Limited]
    for kind in kinds:
        kinds += kind.__subclasses__()
    for kind in kinds:
        if not kind.__module__.startswith("casehard.") or not is_dataclass(kind):
            continue
        given = {f.name: None for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
        for name, hint in get_type_hints(kind, include_extras=True).items():
            if not given and _allowed(hint)[2]:
                yield kind, name


def test_no_setting_takes_a_word_that_means_nothing():
    """A mistyped choice used to be taken in Python, and to mean whatever the other branch does."""
    found = list(every_setting())
    assert len(found) > 300
    for kind, name in found:
        with pytest.raises(ConfigError, match=rf"^{name} is 'no such word', not "):
            kind(**{name: "no such word"})


def test_code_is_held_to_the_types_that_files_are():
    for values, said in (
        ({"steps": None}, "steps is None, not a whole number"),
        ({"steps": 10.5}, "steps is 10.5, not a whole number"),
        ({"lr": "1e-4"}, "lr is '1e-4', not a number"),
        ({"betas": ("a", 0.9)}, "betas is 'a', not a number"),
        ({"betas": (0.9,)}, "betas has length 1, not 2"),
        ({"embeddings": "no"}, "embeddings is 'no', not true or false"),
        ({"schedule": "cosin"}, "schedule is 'cosin', not one of constant, cosine, linear"),
        ({"schedule": True}, "schedule is True, not one of constant, cosine, linear"),
    ):
        with pytest.raises(ConfigError) as caught:
            TrainConfig(**values)
        assert caught.value.message == said
    assert TrainConfig(steps=numpy.int64(3), lr=1).steps == 3


def test_groups_of_settings_are_objects_and_lists_will_do():
    for values, said in (
        ({"attackers": [{"steps": 3}]}, "attackers is {'steps': 3}, not Attacker(...)"),
        ({"attackers": Attacker()}, "not a tuple"),
    ):
        with pytest.raises(ConfigError) as caught:
            PatcherConfig(**values)
        assert said in caught.value.message
    assert PatcherConfig(attackers=[Attacker(steps=3)]) == PatcherConfig(attackers=(Attacker(steps=3),))
    with pytest.raises(ConfigError, match=r"two is \{'lr': 0.0001\}, not StageTwo\(\.\.\.\)"):
        MbConfig(two={"lr": 1e-4})
