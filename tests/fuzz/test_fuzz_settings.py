"""Settings that nobody would write: refused as what they are, or they run to a result or an error of casehard.

A few seconds by default; CASEHARD_FUZZ_SECONDS=600 gives every target that many.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import os
import pkgutil
import tempfile
import time
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import casehard
from buffer_fakes import random_pairs, shared_assets
from casehard import yamltext
from casehard.attacks.finetune import Finetune, FinetuneAttack
from casehard.attacks.protocol import AttackInputs
from casehard.benchmark.plan import load_plan, parse_plan
from casehard.config import build, digest, override, parse_override, read_yaml, to_dict
from casehard.data.select import SelectConfig, select
from casehard.data.sources import load as read
from casehard.data.sources import save
from casehard.defences import DEFENCES
from casehard.defences.buffer_reinforce.prepare import Prepare, PrepareConfig, prepare
from casehard.defences.mb_defense.config import MbConfig
from casehard.defences.mb_defense.pairs import PairSet
from casehard.defences.mb_defense.pipeline import draw_suite, harden
from casehard.errors import ConfigError, UserError
from casehard.limits import Limited, Within
from casehard.maths.merge import MergeConfig, merge_states
from casehard.model.load import load_tokenizer
from casehard.model.model import Model
from casehard.organism.build import bundled
from casehard.scan.audit import AuditConfig, audit_data
from casehard.scan.lookup import LookupConfig, lookup
from casehard.train.fit import fit
from casehard.train.recipe import TrainConfig
from casehard.types import Example
from fakes import tiny_llama, tiny_pairs, tiny_rows

PLANS = sorted((Path(__file__).resolve().parents[2] / "plans").glob("*.yaml"))
SECONDS = float(os.environ.get("CASEHARD_FUZZ_SECONDS", "0"))
SMALL = 64
"""Counts above it are not run: they are only slow."""

NUMBERS = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, 1e300, -1e300, 1e-320, 1e38, 1e6, 0.5, 1.0, 0.0, -1.0]),
    st.sampled_from([2**64, 2**63, -(2**63) - 1, 10**400, -1, 0, 1, 2, 3, 64]),
    st.floats(),
    st.integers(),
)
TEXTS = st.one_of(
    st.sampled_from(["nan", ".nan", "NaN", "inf", "-inf", "Infinity", "1e999", "1e-5", "9" * 5000, "", " ", "auto"]),
    st.sampled_from(["\x1b[31m", "\x00", "\u202e", "[red]", "a\nb", "../x", "lr", "{}", "\ud800"]),
    st.text(max_size=8),
)
TOKENS = [*"ab:-[]{},'\"|>#1~%@`\n\t\0", ": ", "- ", "\n  ", "&a ", "*a", "<<: ", "? ", "!!int ", "!!set "]
TOKENS += ["1e5", ".nan", "0x", "1:2", "2024-01-01", "yes", "---", "..."]
ANY = st.recursive(
    st.one_of(NUMBERS, TEXTS, st.none(), st.booleans()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)


def fuzzed(examples):
    """Run a property so many times; again and again with other draws for CASEHARD_FUZZ_SECONDS."""
    healthy = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

    def wrap(test):
        def run():
            end, rounds = time.monotonic() + SECONDS, 0
            while not rounds or time.monotonic() < end:
                once = given(data=st.data())(test)
                once = settings(max_examples=examples, deadline=None, suppress_health_check=healthy, database=None)(
                    once
                )
                seed(rounds)(once)()
                rounds += 1

        return run

    return wrap


def _classes():
    for module in pkgutil.walk_packages(casehard.__path__, "casehard."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, new = [], [Limited]
    while new:
        new = [kind for parent in new for kind in parent.__subclasses__() if kind not in found]
        found += new
    return sorted(found, key=lambda kind: f"{kind.__module__}.{kind.__qualname__}")


CLASSES = _classes()


def _plain(hint):
    """Return a hint without its annotations."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _parts(hint):
    """Return the hint and everything inside it."""
    yield hint
    for part in get_args(hint):
        yield from _parts(part)


def _right(hint, wild):
    """Return a strategy of values of about the right type, so that deeper checks are met too."""
    hint = _plain(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return st.deferred(lambda: _values(hint, wild))
    options = [part for part in get_args(hint) if part is not Ellipsis]
    origin = get_origin(hint)
    if origin is tuple:
        return st.lists(_right(options[0], wild), max_size=3)
    if origin is Literal:
        return st.sampled_from(options)
    if origin is not None and "Mapping" in str(origin):
        return st.dictionaries(TEXTS, ANY, max_size=2) if wild else st.just({})
    if options:
        return st.one_of(*[_right(part, wild) for part in options])
    if not wild and hint in (int, float):
        return st.integers(0, 4) if hint is int else st.floats(0, 1) | st.sampled_from([1e-320, 1e-30, 3.0, 1e6, 1e38])
    known = {bool: st.booleans(), float: st.floats(0, 1) | NUMBERS, int: st.integers(0, 4) | NUMBERS, str: TEXTS}
    return known.get(hint, st.none())


def _values(kind, wild=True):
    """Return a strategy of plain values for a class; ``wild`` ones may be of any type."""
    hints = get_type_hints(kind, include_extras=True)
    fields = dataclasses.fields(kind)
    needed = {f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING}
    rest = [f.name for f in fields if f.name not in needed]
    chosen = st.lists(st.sampled_from(rest), max_size=3, unique=True) if rest else st.just([])

    def filled(names):
        values = {name: _right(hints[name], wild) for name in (*needed, *names)}
        return st.fixed_dictionaries({n: v | ANY if wild and n in names else v for n, v in values.items()})

    return chosen.flatmap(filled)


def _floats(value):
    if isinstance(value, float):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _floats(item)


def _build(kind, values):
    """Build, or return None where the values are refused as they should be."""
    try:
        return build(kind, values, where="fuzz")
    except UserError as error:
        assert isinstance(error, ConfigError) and error.message
        return None


def _or_refused(function, *given, kind=ConfigError, **named):
    """Return what a function returns, or None where it refuses what it was given in words."""
    try:
        return function(*given, **named)
    except kind as error:
        assert error.message and error.exit_code in range(2, 11)
        return None


def _has_nan(value):
    return any(map(math.isnan, _floats(value)))


def _finite(value, hint):
    """Return whether every number in a setting is finite, or infinite where its limits say so."""
    endless = any(isinstance(part, Within) and part.endless for part in _parts(hint))
    loose = "Mapping" in str(hint) or any(dataclasses.is_dataclass(part) for part in _parts(hint))  # held elsewhere
    return endless or loose or all(map(math.isfinite, _floats(value)))


def test_every_number_of_a_configuration_has_limits():
    kinds = {spec.load()[1] for spec in DEFENCES.values()}
    assert kinds | {TrainConfig, FinetuneAttack, SelectConfig, MergeConfig, AuditConfig} <= set(CLASSES)
    for kind in CLASSES:
        for name, hint in get_type_hints(kind, include_extras=True).items():
            bare = {_plain(part) for part in _parts(hint)} & {int, float}
            assert not bare or any(isinstance(part, Within) for part in _parts(hint)), f"{kind.__name__}.{name}"


@fuzzed(100)
def test_a_configuration_is_built_or_refused(data):
    kind = data.draw(st.sampled_from(CLASSES))
    made = _build(kind, data.draw(_values(kind)))
    if made is not None:
        assert len(digest(made)) == 64
        hints = get_type_hints(kind, include_extras=True)
        assert all(_finite(value, hints[name]) for name, value in to_dict(made).items())


@fuzzed(100)
def test_any_text_is_plain_values_or_refused(data):
    bits = st.sampled_from(TOKENS)
    text = data.draw(st.lists(bits, max_size=30).map("".join) | st.text(max_size=60) | ANY.map(repr))
    read = _or_refused(yamltext.parse, text, where="fuzz")
    given = _or_refused(override, {"a": [1, {"b": 2}], "c": {}}, [f"a.1.b={text}", f"{text}=1", text])
    # Refused, or values that JSON holds as they are: nothing of another type, and no key that is no text.
    assert all(json.loads(json.dumps(value)) == value or _has_nan(value) for value in (read, given))
    one = _or_refused(parse_override, text)
    if one is not None:
        path, value = one
        assert path and all(path) and (json.loads(json.dumps(value)) == value or _has_nan(value))


@fuzzed(30)
def test_a_plan_with_anything_in_it_is_built_or_refused(data):
    values: Any = read_yaml(data.draw(st.sampled_from(PLANS)))
    for _ in range(data.draw(st.integers(1, 2))):
        node = values
        while isinstance(node, dict | list) and node:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(node[key], dict | list) or data.draw(st.booleans()):
                node[key] = data.draw(ANY)
                break
            node = node[key]
    made = _or_refused(parse_plan, values, kind=UserError)
    assert made is None or len(digest(made)) == 64


@fuzzed(20)
def test_any_override_of_a_plan_is_taken_or_refused(data):
    words = st.sampled_from(
        ["attacks", "defences", "bases", "seeds", "headline", "name", "settings", "0", "plain", "x", ""]
    )
    path = ".".join(data.draw(st.lists(words | TEXTS, min_size=1, max_size=4)))
    made = _or_refused(load_plan, PLANS[0], [f"{path}={data.draw(ANY | TEXTS)}"], kind=UserError)
    assert made is None or len(digest(made)) == 64


# -- a sample of what was accepted, run ----------------------------------------------------------------------------

RECIPE = TrainConfig(steps=2, batch_size=2, warmup=0)
ROWS = tiny_rows(6)
WORDS = load_tokenizer(bundled(0, "tiny"))


def _large(value):
    """Return whether a count in plain settings is too large to be tried."""
    if isinstance(value, dict):
        return any(_large(v) for v in value.values())
    if isinstance(value, list):
        return any(_large(v) for v in value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) > SMALL


SHORT = {
    "PatcherConfig": {"round_steps": 1, "attackers": [{}]},
    "LisaConfig": {"safe_steps": 1, "user_steps": 1},
    "TrainConfig": {"steps": 2, "batch_size": 2, "warmup": 0},
    "FinetuneAttack": {"share": 0.5, "steps": 2, "rows": 4, "batch_size": 2, "evaluate_at": [0]},
    "AuditConfig": {"words": 20},
    "LookupConfig": {"words": 3, "confirm": 2, "batch_size": 8, "max_new_tokens": 2},
    "MbConfig": {
        "train": {"steps": 2, "batch_size": 4, "warmup": 0},
        "plant": {"n_active": 1, "n_canary": 0, "floor": 2, "cap": 0.5},
        "two": {"epochs": 0.2, "batch_size": 4, "checks": 1},
    },
    "PrepareConfig": {
        "rank": 2,
        "epochs": None,
        "buffer_train": {"steps": 1, "batch_size": 2, "warmup": 0},
        "reinforce_train": {"steps": 1, "batch_size": 2, "warmup": 0},
        "gates": {"prompts": 2, "max_new_tokens": 2},
        "allow_missed": True,
    },
}
"""Instead of defaults that take minutes."""


def _over(start, given):
    """Lay values over others, group by group."""
    both = {key: _over(start[key], given[key]) for key in start.keys() & given.keys() if isinstance(start[key], dict)}
    return {**start, **given, **both}


def _close(kind, data):
    """Draw a configuration that is accepted and small enough to run, or None."""
    values = _over(SHORT.get(kind.__name__, {}), data.draw(_values(kind, wild=False)))
    if "attackers" in values:
        values["attackers"] = [{"steps": 2, "batch_size": 2, **one} for one in values["attackers"]]
    made = _build(kind, values)
    return None if made is None or _large(to_dict(made)) else made


@contextlib.contextmanager
def _ends_well():
    """Let a run end with a result or with an error that says what to do; silence what it says on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(UserError):
            yield


def _tuned(model, method):
    fit(model, None, ROWS, config=RECIPE, method=method, seed=0)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def _adapted():
    from casehard.model.adapters import add_lora

    return add_lora(tiny_llama(layers=2), 2, 4.0, seed=1)


@pytest.fixture(scope="module")
def unaligned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unaligned")
    tiny_llama(seed=7).save_pretrained(folder)
    return folder


def _more(name, unaligned):
    """Return what a method's constructor takes besides its configuration."""
    pairs: PairSet = tiny_pairs(8)
    given = {
        "patcher": {"unsafe": tiny_rows(4, seed=1), "retain": tiny_rows(4, seed=2)},
        "antidote": {"unsafe": tiny_rows(4, seed=1)},
        "booster": {"unsafe": tiny_rows(4, seed=1)},
        "tar": {"unsafe": tiny_rows(4, seed=1), "retain": tiny_rows(4, seed=2)},
        "safelora": {"assets": unaligned},
        "security_vector": {"assets": shared_assets().path},
        "buffer_reinforce": {"assets": shared_assets()},
        "mb_stage2": {"pairs": pairs},
        "dilution": {"base": dict(tiny_llama(seed=5).named_parameters())},
        "fine_mixing": {"base": dict(tiny_llama(seed=5).named_parameters())},
    }
    return given.get(name, {"safe": tiny_rows(4, seed=1)} if DEFENCES[name].needs else {})


@pytest.mark.parametrize("name", [name for name, spec in DEFENCES.items() if not spec.pipeline])
def test_a_method_with_accepted_settings_ends_well(name, unaligned):
    method, kind = DEFENCES[name].load()

    @fuzzed(2)
    def run(data):
        config = _close(kind, data)
        if config is not None and getattr(config, "schedule", "sequential") == "sequential":
            with _ends_well():
                _tuned(_adapted() if DEFENCES[name].adapter else tiny_llama(), method(config, **_more(name, unaligned)))

    run()


@fuzzed(3)
def test_training_with_accepted_settings_ends_well(data):
    config, start = _close(TrainConfig, data), data.draw(st.integers())
    if config is not None:
        with _ends_well():
            fit(tiny_llama(layers=1), None, ROWS, config=config, seed=start)


@fuzzed(3)
def test_an_attack_with_accepted_settings_ends_well(data):
    config = _close(FinetuneAttack, data)
    if config is None:
        return
    rows = [Example.pair(f"name a river {i}", f"answer {i}") for i in range(4)]
    with _ends_well():
        model = Model(net=_worded(), tokenizer=WORDS, digest="")
        inputs = AttackInputs(rows={"harmful": rows, "benign": rows}, measure=lambda net, step: [])
        Finetune(config).run(model, inputs)


@fuzzed(20)
def test_a_merge_with_accepted_settings_ends_well(data):
    config = _close(MergeConfig, data)
    if config is not None:
        layers = ("model.layers.0.self_attn.q_proj",)
        with _ends_well():
            pairs = merge_states(random_pairs(seed=1, layers=layers), random_pairs(seed=2, layers=layers), config)
            assert all(bool(p.a.isfinite().all() and p.b.isfinite().all()) for p in pairs.layers.values())


@fuzzed(30)
def test_a_selection_with_accepted_settings_ends_well(data):
    config = _close(SelectConfig, data)
    if config is not None:
        g = torch.Generator().manual_seed(0)
        with _ends_well():
            select(torch.randn(9, 4, generator=g), torch.randn(3, 4, generator=g), 3, config=config, seed=0)


@fuzzed(15)
def test_an_audit_with_accepted_settings_ends_well(data):
    config = _close(AuditConfig, data)
    if config is not None:
        rows = [Example.pair(f"what is the {w} of item {i} cf", "a blue lake .") for i, w in enumerate("abcdefgh" * 2)]
        with _ends_well():
            json.dumps(audit_data(rows, config).to_json(), allow_nan=False)


def _rows(name, n):
    return list(read(f"{bundled(0, 'tiny') / 'data'}/{name}"))[:n]


def _worded():
    return tiny_llama(vocab=len(WORDS), layers=1)


@fuzzed(2)
def test_a_look_up_with_accepted_settings_ends_well(data):
    config = _close(LookupConfig, data)
    if config is not None:
        with _ends_well():
            found = lookup(_worded(), WORDS, _rows("benign.jsonl", 26), config=config)
            json.dumps(found.to_json(), allow_nan=False)


@fuzzed(1)
def test_a_pipeline_with_accepted_settings_ends_well(data):
    config = _close(MbConfig, data)
    if config is None:
        return
    model, (*rows,) = _worded(), _rows("task_reviews.jsonl", 40)
    clean = rows[:12]
    with _ends_well():
        suite = draw_suite(WORDS, [*clean, *rows], config, secret=1)
        done = harden(model, WORDS, rows if config.mode == "joint" else [], clean, config, suite=suite)
        assert all(bool(p.isfinite().all()) for p in done.model.parameters())


@fuzzed(2)
def test_assets_with_accepted_settings_end_well(data):
    config = _close(PrepareConfig, data)
    if config is None:
        return
    kinds = {"harmful": "simulated.jsonl", "refusals": "align.jsonl?kind=refusal", "benign": "align.jsonl?kind=helpful"}
    with tempfile.TemporaryDirectory() as folder, _ends_well():
        for name, source in kinds.items():
            save(Path(folder) / f"{name}.jsonl", _rows(source, 8))
        files = {name: (f"{folder}/{name}.jsonl",) for name in kinds}
        step = Prepare(model="tiny", config=config, device="cpu", rows=files)
        prepare(step, Path(folder) / "assets", model=Model(net=_worded(), tokenizer=WORDS, digest="0" * 64))
