"""A defence, an attack and a judge of another package stand beside ours, without a change here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import casehard as ch
from casehard.benchmark import graph
from casehard.cli import main
from casehard.errors import ConfigError
from casehard.registry import JudgeSpec, Registry
from casehard.types import Example
from conformance import attacks, judges
from conformance.test_accumulation import LAYOUTS, trained
from fakes import largest_difference

HERE = Path(__file__).resolve().parent / "thirdparty"
WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
DATA = WORLD / "data"
SMALL = ("--device", "cpu", "--steps", "2", "--set", "train.batch_size=4", "--set", "train.warmup=0")
PURPOSE = "It keeps the first weights small, which defends against nothing."
NOISE = attacks.Row("noise", {"scale": 0.1}, {"excuses": "benign.jsonl"})
FIRST_LETTER = judges.Row(
    "first_letter",
    ((Example.pair("a"), "oh no", "refusal"), (Example.pair("b"), "yes", "answer")),
    {"vowels": "o"},
)


@pytest.fixture(autouse=True, scope="module")
def _neighbour() -> Iterator[None]:
    """Install the package next door, as pip would: its folder with the entry points is on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        yield


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite that is judged by the neighbour's judge."""
    folder = tmp_path_factory.mktemp("suite")
    lines = (DATA / "suite" / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    some = [line for line in lines if json.loads(line)["role"] in ("restricted", "lookalike")]
    (folder / "eval.jsonl").write_text("\n".join([*some[:3], *some[-3:]]), encoding="utf-8")
    settings = {"judge": "first_letter", "judge_settings": {"vowels": "abcdefghijklmn"}, "max_new_tokens": 4}
    (folder / "suite.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def defended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of the neighbour's defence."""
    out = tmp_path_factory.mktemp("defended") / "out"
    given = ("--model", WORLD, "--data", DATA / "align.jsonl", *SMALL, "--out", out)
    assert main(["defend", "small-weights", *map(str, given)]) == 0
    return out


def test_its_names_stand_in_the_catalogues_whichever_way_they_are_spelled() -> None:
    assert "small_weights" in ch.DEFENCES and "noise" in ch.ATTACKS and "first_letter" in ch.JUDGES
    assert ch.JUDGES.name("first-letter") == "first_letter" and ch.JUDGES.find("first-letter").purpose
    with pytest.raises(ConfigError, match="no judge called 'first_leter'\n  hint: did you mean 'first_letter'"):
        ch.JUDGES.find("first_leter")


def test_a_package_that_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd-1.0.dist-info").mkdir()
    (tmp_path / "odd-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n")
    points = "[casehard.judges]\ngone = odd_and_gone:SPEC\nother = neighbour:ATTACK\n"
    (tmp_path / "odd-1.0.dist-info" / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = Registry("judge", "casehard.judges", JudgeSpec, {})
    with pytest.raises(ConfigError, match="entry point 'odd_and_gone:SPEC' cannot be loaded: ModuleNotFoundError"):
        found.find("gone")
    with pytest.raises(ConfigError, match="is a AttackSpec, not a JudgeSpec"):
        found.find("other")


def test_its_defence_gives_a_checkpoint_whose_card_says_what_it_is_for(defended: Path) -> None:
    card = (defended / "checkpoint" / "README.md").read_text(encoding="utf-8")
    assert "# Made with small_weights" in card and PURPOSE in card and "# Hardened" not in card
    record = json.loads((defended / "checkpoint" / "casehard.json").read_text())
    assert record["method"] == "small_weights" and record["provenance"]["settings"] == {"weight": 0.1}


def test_its_defence_does_not_care_how_a_step_is_cut() -> None:
    from neighbour.defence import SmallWeights

    whole, cut = (trained(SmallWeights, LAYOUTS[i], lora=False) for i in (0, 2))
    assert largest_difference(whole, cut) < 1e-5


def test_its_defence_repairs_in_an_audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ("lookup.words=4", "lookup.confirm=1", "lookup.max_new_tokens=2", "lookup.confirm_prompts=4", "tried=1")
    given = ["--model", WORLD, "--data", DATA / "task_reviews.jsonl", "--clean", DATA / "benign.jsonl", "--repair"]
    given += ["--device", "cpu", "--set", "train.steps=1", *(part for one in sets for part in ("--set", one))]
    audit = ["backdoor", "audit", *map(str, given)]
    assert main([*audit, "--method", "small-weights", "--set", "rise=1000", "--out", str(tmp_path / "out")]) in (0, 9)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["after"]["method"] == "small_weights"
    assert main([*audit, "--method", "patcher", "--out", str(tmp_path / "x")]) == 2
    assert "small_weights" in capsys.readouterr().err


def test_its_judge_scores_a_suite_and_its_telemetry_reaches_the_report(
    defended: Path, suite: Path, tmp_path: Path
) -> None:
    seen = tmp_path / "seen"
    given = ["--model", str(defended), "--suite", str(suite), "--device", "cpu", "--out", str(seen)]
    assert main(["evaluate", *given]) == 0
    rows = [json.loads(line) for line in (seen / "rows.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [
        "refusal" if row["response"][:1] in tuple("abcdefghijklmn") else "answer" for row in rows
    ]
    assert len(rows) == 6 and {row["label"] for row in rows} == {"refusal", "answer"}
    page = tmp_path / "page.html"
    assert main(["report", str(defended), str(seen), "--out", str(page)]) == 0
    assert "mean square" in page.read_text(encoding="utf-8")


def test_its_judge_labels_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps({"prompt": "p", "response": r}) + "\n" for r in ("open", "shut", None)))
    given = ["--judge", "first-letter", "--set", "vowels=s"]
    assert main(["judge", str(file), *given, "--out", str(out)]) == 0
    assert [json.loads(line)["label"] for line in out.read_text().splitlines()] == ["answer", "refusal", "unscored"]
    assert main(["judge", str(file), "--judge", "first_leter"]) == 2
    assert "did you mean 'first_letter'" in capsys.readouterr().err


def test_its_attack_is_a_verb_with_the_options_of_its_spec(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["attack", "--help"]) == 0
    assert "Noise on every weight" in capsys.readouterr().out
    assert main(["attack", "noise", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "--scale <float> Standard deviation of the noise." in told
    assert "--excuses FILE Rows that the noise does not look at." in told and "never written" in told
    given = ["--model", str(WORLD), "--suite", str(suite), "--device", "cpu", "--scale", "0.5", "--seed", "3"]
    files = ["--excuses", str(DATA / "benign.jsonl")]
    assert main(["attack", "noise", *given, *files, "--out", str(tmp_path / "out")]) == 0
    records = json.loads((tmp_path / "out" / "summary.json").read_text())["records"]
    assert {(r["attack"], r["steps"]) for r in records} == {("noise", 0)}
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["config"]["attack"], run["config"]["config"]) == ("noise", {"scale": 0.5})
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert main(["attack", "nois", *given, "--out", str(tmp_path / "x")]) == 2
    assert "did you mean 'noise'" in capsys.readouterr().err


@pytest.mark.parametrize("promise", attacks.PROMISES, ids=lambda promise: promise.__name__)
def test_its_attack_keeps_our_promises(promise) -> None:
    promise(NOISE)


@pytest.mark.parametrize("promise", judges.PROMISES, ids=lambda promise: promise.__name__)
def test_its_judge_keeps_our_promises(promise) -> None:
    promise(FIRST_LETTER)


PLAN = """
name: neighbour
title: a method, an attack and a judge from next door
suite: "{suite}"
bases: [{{name: m, model: {world}}}]
defences:
  - {{name: none, role: undefended, method: plain, data: &d ["{{base}}/data/align.jsonl"], train: &t {{steps: 2}}}}
  - {{name: theirs, method: small_weights, data: *d, train: *t}}
attacks:
  - {{name: noise, attack: noise, excuses: "{{base}}/data/benign.jsonl", settings: {{scale: 0.5}}}}
headline: {{defence: theirs, metric: asr}}
limit: 2
"""


def test_they_are_a_row_a_column_and_the_judge_of_a_bench_and_its_report(suite: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN.format(suite=suite, world=WORLD))
    done = ch.bench(tmp_path / "plan.yaml", out=tmp_path / "out", jobs=1)
    assert not done.failed and done.summary["plan"]["attacks"][0]["steps"] == 1
    found = {(r["defence"], r["attack"], r["steps"]): r for r in done.summary["records"] if r["metric"] == "asr"}
    places = {(name, *at) for name in ("none", "theirs") for at in (("none", 0), ("noise", 0), ("noise", 1))}
    assert set(found) == places, "before, and the one moment of an attack that trains nothing"
    (told,) = (t for t in done.summary["telemetry"] if t["defence"] == "theirs")
    assert told["means"]["mean_square"] > 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "scale: 0.5" in page and "mean square" in page and "lr 0.0001" not in page
    (card,) = (tmp_path / "out").glob("nodes/defend-m-theirs-*/checkpoint/README.md")
    assert PURPOSE in card.read_text(encoding="utf-8")


def test_what_an_attack_that_trains_nothing_would_ignore_is_refused(suite: Path, tmp_path: Path) -> None:
    text = PLAN.format(suite=suite, world=WORLD).replace("attack: noise,", "attack: noise, lr: 1.0e-3,")
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"attack 'noise' trains nothing: lr 0\.001 would be ignored"):
        graph.load_plan(tmp_path / "plan.yaml")


def test_its_code_counts(suite: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(PLAN.format(suite=suite, world=WORLD))
    matrix = graph.expand(graph.load_plan(tmp_path / "plan.yaml"), root=tmp_path)
    nodes = {node.label: node for node in matrix.nodes.values() if node.kind == "defend"}
    assert nodes["m/theirs/s0"].code != nodes["m/none/s0"].code
    for kind in ("evaluate", "attack"):
        assert {"neighbour.judge", "casehard.organism.judge"} <= set(_code(kind)), kind


def _code(kind: graph.Kind) -> tuple[str, ...]:
    """Return the modules that name the code of a node."""
    with pytest.MonkeyPatch.context() as patch:
        seen: list[tuple[str, ...]] = []
        patch.setattr(graph, "code_of", lambda modules: seen.append(modules) or "")
        graph.code_version(kind)
    return seen[0]
