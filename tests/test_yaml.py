"""Settings from text: what a file or ``--set`` may hold, and what is refused with its line before it costs anything."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

import casehard
from casehard.benchmark.plan import load_plan
from casehard.config import override, parse_override, read_yaml
from casehard.errors import ConfigError

PACKAGE = Path(casehard.__file__).parent
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
REFUSED = {
    "billion laughs": (LAUGHS, "values"),
    "billion merges": (MERGES, "values"),
    "itself in a list": ("steps: 1\nseed: &a [*a]\n", "line 2: the anchor 'a' holds itself"),
    "itself in a mapping": ("a: &a\n  b: *a\n", "line 2: the anchor 'a' holds itself"),
    "unknown anchor": ("a: *b\n", "line 1"),
    "key twice": ("steps: 1\nlr: 2\nsteps: 3\n", "line 3: the key 'steps' stands there twice, first in line 1"),
    "key twice below": ("train:\n  steps: 1\n  steps: 1\n", "line 3: the key 'steps'"),
    "key twice in JSON": ('{"a": 1,\n "a": 2}', "line 2: the key 'a'"),
    "date key": ("a: 1\n2024-01-01: 3\n", "line 2: the key 2024-01-01 is read as a date"),
    "whole number key": ("5: 3\n", "line 1: the key 5 is read as a whole number"),
    "yes key": ("yes: 3\n", "line 1: the key yes is read as true or false"),
    "empty key": ("? \n: 3\n", "is read as nothing"),
    "list key": ("? [a]\n: 3\n", "line 1: a key is a list"),
    "deep lists": ("a: " + "[" * 5000 + "]" * 5000, "levels"),
    "deep mappings": ("a: " + "{a: " * 5000 + "1" + "}" * 5000, "levels"),
    "deep blocks": ("".join(" " * i + "a:\n" for i in range(900)), "levels"),
    "long text": ("a: " + "x" * 10_000_000, "bytes"),
    "long number": ("a: " + "9" * 5000, "line 1: a number of 5000 characters"),
    "long clock": ("a: " + "1:" * 2000 + "1", "line 1: a number of"),
    "a time of day": ("a: 1\nb: 1:30\n", "line 2: YAML reads 1:30 in base sixty"),
    "minutes with a fraction": ("a: [1:30.5]\n", "line 1: YAML reads 1:30.5 in base sixty"),
    "many values": (f"a: &a [{'1,' * 2000}]\nb: [{'*a,' * 60}]\n", "line 2: more than 100,000 values"),
    "no number": ("a: 0x_\n", "line 1"),
    "tagged text as number": ("a: !!int many\n", "line 1"),
    "bytes": ("a: !!binary aGVsbG8=\n", "line 1: the tag"),
    "a set": ("a: !!set {x}\n", "line 1: the tag"),
    "an object": ("a: !!python/object/apply:os.getcwd []\n", "line 1: the tag"),
    "two documents": ("a: 1\n---\nb: 2\n", "line 2"),
    "open bracket": ("a: 1\nb: [1,\n", "line 3"),
    "NUL": ('a: 1\nb: "x\\0y"\n', "line 2: a text with NUL"),
    "half a character": ('a: "\\ud800"\n', "line 1: a text with NUL or half"),
    "control character": ("a: 1\nb: \x07\n", "line 2"),
    "a list at the top": ("- 1\n", "expected a mapping at the top"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_no_plain_settings_is_refused_at_its_line(tmp_path, case):
    text, said = REFUSED[case]
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert time.process_time() - began < 10  # billions of values would take for ever; a slow machine does not
    assert str(path) in caught.value.message and said in caught.value.message
    assert len(caught.value.message) < 1000 and caught.value.hint


@pytest.mark.parametrize("case", [name for name in REFUSED if name not in ("long text", "a list at the top")])
def test_a_value_of_set_is_held_to_the_same(case):
    text, _ = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        parse_override(f"seed={text}")
    assert "override 'seed=" in caught.value.message and len(caught.value.message) < 1000


@pytest.mark.parametrize("text", ["seed=&a [*a]", "a.b=&x {y: *x}", "a=[" * 200])
def test_a_value_of_set_that_holds_itself_is_refused(text):
    with pytest.raises(ConfigError, match="override"):
        override({}, [text])


@pytest.mark.parametrize("key", ["\N{SUPERSCRIPT TWO}", "9" * 5000, "-1"])
def test_a_position_that_is_none_is_refused(key):
    with pytest.raises(ConfigError, match="positions"):
        override({"a": [1, 2]}, [f"a.{key}=3"])


def test_a_path_deeper_than_any_setting_is_refused():
    with pytest.raises(ConfigError, match="levels"):
        override({}, ["a" + ".a" * 3000 + "=1"])


def test_only_a_regular_file_is_read(tmp_path):
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)  # opening it would wait for ever
    for path in (pipe, "/dev/zero", "/dev/null", tmp_path):
        with pytest.raises(ConfigError, match="not a regular file") as caught:
            read_yaml(path)
        assert str(path) in caught.value.message and caught.value.hint
    with pytest.raises(ConfigError, match="no such config file"):
        read_yaml(tmp_path / "gone.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(ConfigError, match="not readable"):
        read_yaml(tmp_path / "bytes.yaml")
    with pytest.raises(ConfigError):
        read_yaml("a\0b")


def test_there_is_one_reader():
    users = {p.name for p in PACKAGE.rglob("*.py") if re.search(r"yaml\.(safe_|full_|unsafe_)?load", p.read_text())}
    assert users <= {"yamltext.py"}


def test_what_plans_use_is_still_read(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        "base: &base {steps: 3, lr: 3.0e-4, when: 2024-05-06}\n"
        "one: {<<: *base, steps: 4}\n"
        "two: [*base, {a: ~, b: yes, c: 0x10, d: 1e-5, e: .5, f: 'yes'}]\n"
        '"5": quoted\n'
    )
    base = {"steps": 3, "lr": 3e-4, "when": "2024-05-06"}
    assert read_yaml(path) == {
        "base": base,
        "one": {**base, "steps": 4},
        "two": [base, {"a": None, "b": True, "c": 16, "d": "1e-5", "e": 0.5, "f": "yes"}],
        "5": "quoted",
    }
    path.write_text("")
    assert read_yaml(path) == {}
    assert parse_override("a.b=[1, {c: 2}]") == (["a", "b"], [1, {"c": 2}])
    assert parse_override("lr=2e-4") == (["lr"], 2e-4)


@pytest.mark.parametrize("text", ["chain: [attack]\nname: 3\n", "settings: 5\n", "bases: 5\n", "name: {a: 1}\n"])
def test_a_plan_of_other_types_is_a_config_error(tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_plan(path)


@pytest.mark.parametrize(
    "text", ["attacks: 5\n", "attacks: [1, 2]\n", "attacks: [{name: a}, {name: a}]\n", "stage: [1]\n"]
)
def test_overrides_of_a_plan_of_other_types_are_config_errors(tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_plan(path, ["attacks.a.steps=3", "seeds=[1]"])
    with pytest.raises(ConfigError):
        load_plan(path, ["attacks=5"])
