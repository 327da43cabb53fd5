"""The steps behind the verbs: what a checkpoint remembers, what is refused, what a resumed run continues."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from buffer_fakes import make_assets
from casehard.data import sources
from casehard.data.mix import marks
from casehard.data.select import SelectConfig
from casehard.errors import ConfigError, DataError
from casehard.evaluation.framing import Frame
from casehard.evaluation.suite import evaluate, load_suite
from casehard.model.digest import folder_digest, tokenizer_digests
from casehard.model.load import load
from casehard.model.save import read_provenance
from casehard.organism import suite as organism_suite
from casehard.organism.build import write_data
from casehard.organism.tokenizer import build_tokenizer
from casehard.organism.world import World
from casehard.steps import Attack, Defence, Evaluate, Finetune, assets_digest, harden
from casehard.train.recipe import TrainConfig
from casehard.types import Example
from fakes import tiny_llama

PATCHER = {"round_steps": 2, "attackers": [{"steps": 2, "lr": 1e-3, "batch_size": 4}]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained organism: the folder layout and data of the real one, random weights."""
    folder = tmp_path_factory.mktemp("organism") / "base"
    world = World(0)
    tokenizer = build_tokenizer(world)
    tiny_llama(vocab=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_data(world, folder / "data")
    assert organism_suite.SUITES
    return folder


def job(base: Path, *, rows: dict[str, tuple[str, ...]] | None = None, **changes: object) -> Finetune:
    """A short run of Patcher; ``rows`` are laid over its own, and those of an empty role are left out."""
    own = {"data": (f"{base}/data/align.jsonl",), "unsafe": (f"{base}/data/simulated.jsonl",)} | (rows or {})
    start = Finetune(
        model=str(base),
        method="patcher",
        rows={role: specs for role, specs in own.items() if specs},
        settings=PATCHER,
        train=TrainConfig(steps=5, batch_size=4),
        suite=f"{base}/data/suite",
    )
    return dataclasses.replace(start, **changes)


@pytest.fixture(scope="module")
def hardened(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hardened")
    result, made = harden(job(base), out)
    assert result.cost["passes"] == 5 + 3 + 2 * 2  # safe, attacked, and two attacks of two steps
    assert [path.name for path in out.iterdir()] == ["checkpoint"]
    assert made is not None and made.path is not None
    return made.path


def test_a_checkpoint_remembers_its_training_prompts_and_refuses_to_be_scored_on_them(
    base: Path, hardened: Path, tmp_path: Path
) -> None:
    rows = sources.load(f"{base}/data/align.jsonl")[:5]
    tagged = [dataclasses.replace(r, tags={"role": "utility", "group": "x", "answer": r.response}) for r in rows]
    sources.save(tmp_path / "seen.jsonl", tagged)
    with pytest.raises(DataError, match="was trained on 5 of the 5 prompts"):
        Evaluate(model=str(hardened), suite=str(tmp_path / "seen.jsonl")).run()
    with pytest.raises(DataError, match="was trained on 5"):
        rows = {"harmful": (f"{base}/data/attack_a.jsonl",)}
        Attack(model=str(hardened), suite=str(tmp_path / "seen.jsonl"), rows=rows).run()
    # A model made from that checkpoint inherits the memory.
    other = {"unsafe": (), "data": (f"{base}/data/benign.jsonl",)}
    child = job(base, model=str(hardened), method="plain", settings={}, rows=other)
    _, grandchild = harden(child, tmp_path / "child")
    assert grandchild is not None and grandchild.path is not None
    known = [set(read_provenance(p)["provenance"]["trained_prompts"]) for p in (hardened, grandchild.path)]
    assert known[0] < known[1]


def test_training_rows_in_the_suite_are_refused_before_training(base: Path, tmp_path: Path) -> None:
    held_out = sources.load(f"{base}/data/suite/eval.jsonl")[:3]
    answered = [Example.pair(row.prompt, "anything") for row in held_out]
    sources.save(tmp_path / "rows.jsonl", answered)
    with pytest.raises(DataError, match=r"3 of .* also occur in 'unsafe'"):
        harden(job(base, rows={"unsafe": (f"{tmp_path}/rows.jsonl",)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_a_method_would_ignore_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="would ignore the unsafe rows"):
        harden(job(base, method="plain", settings={}), tmp_path)
    with pytest.raises(DataError, match="retain rows would be ignored"):
        rows = {"retain": (f"{base}/data/benign.jsonl",)}
        harden(job(base, rows=rows, settings={"retain": "none"}), tmp_path)
    with pytest.raises(ConfigError, match="needs unsafe rows"):
        harden(job(base, rows={"unsafe": ()}), tmp_path)


def test_attack_tells_how_many_of_its_rows_the_defender_knew(base: Path, hardened: Path) -> None:
    attack = Attack(
        model=str(hardened),
        rows={"harmful": (f"{base}/data/simulated.jsonl",)},
        suite=f"{base}/data/suite",
        config={"share": 1.0, "rows": 25, "steps": 1, "evaluate_at": [0]},
        limit=2,
    )
    result = attack.run()
    assert (result.facts["harmful_rows"], result.facts["benign_rows"]) == (25, 0)
    assert result.facts["rows_seen_in_training"] == len(sources.load(f"{base}/data/simulated.jsonl"))
    other = dataclasses.replace(attack, rows={"harmful": (f"{base}/data/attack_b.jsonl",)}).run()
    assert other.facts["rows_seen_in_training"] == 0
    assert {row["step"] for row in other.rows} == {0, 1}
    with pytest.raises(ConfigError, match="full_at: step 7"):
        dataclasses.replace(attack, full_at=(7,)).run()


def test_an_interrupted_run_does_not_continue_with_another_parent_or_other_unsafe_rows(
    base: Path, hardened: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("casehard.steps.finetune.save_model", refuse)
    with pytest.raises(KeyboardInterrupt):
        harden(job(base), tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "training").is_dir()
    with pytest.raises(ConfigError, match="parent"):
        harden(job(base, model=str(hardened)), tmp_path)
    with pytest.raises(ConfigError, match="unsafe"):
        harden(job(base, rows={"unsafe": (f"{base}/data/attack_a.jsonl",)}), tmp_path)
    harden(job(base), tmp_path)
    assert not (tmp_path / "training").exists()
    stored = json.loads((tmp_path / "checkpoint" / "casehard.json").read_text())
    assert stored["parent"] and stored["method"] == "patcher"


def test_safe_rows_are_part_of_the_run_and_of_what_the_checkpoint_remembers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    user, safe = f"{base}/data/benign.jsonl", f"{base}/data/align.jsonl"
    rows = {"data": (user,), "unsafe": (), "safe": (safe,)}
    guarded = job(base, method="spard", rows=rows, settings={"tau": 0.5})
    with pytest.raises(ConfigError, match="needs safe rows"):
        harden(dataclasses.replace(guarded, rows={"data": (user,)}), tmp_path)
    with pytest.raises(ConfigError, match="would ignore the safe rows"):
        harden(dataclasses.replace(guarded, method="plain", settings={}), tmp_path)
    monkeypatch.setattr("casehard.steps.finetune.save_model", refuse)
    with pytest.raises(KeyboardInterrupt):
        harden(guarded, tmp_path)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="safe"):
        others = {"data": (user,), "safe": (f"{base}/data/attack_a.jsonl",)}
        harden(dataclasses.replace(guarded, rows=others), tmp_path)
    _, made = harden(guarded, tmp_path)
    assert made is not None and made.path is not None
    known = read_provenance(made.path)["provenance"]
    assert set(known["data_digests"]) == {"data", "safe"}
    both = marks(sources.load(user), sources.load(safe))
    assert both and both <= set(known["trained_prompts"])


SHORT = {"share": 0.2, "rows": 20, "steps": 3, "batch_size": 4, "lr": 1e-3, "evaluate_at": [0, 2]}


def tune(base: Path, *, method: str = "plain", safe: tuple[str, ...] = (), **changes: object) -> Attack:
    """A customer's job with a method inside; ``changes`` go to the method, and ``system`` and ``config`` to the job."""
    rows = {"harmful": (f"{base}/data/attack_a.jsonl",), "benign": (f"{base}/data/benign.jsonl",)}
    own = {key: changes.pop(key) for key in ("system", "config") if key in changes}
    start = Attack(
        model=str(base),
        rows={**rows, "safe": safe} if safe else rows,
        suite=f"{base}/data/suite",
        config=SHORT,
        limit=2,
        defence=Defence(method=method, **changes),
    )
    return dataclasses.replace(start, **own)


def test_a_job_without_a_defence_is_the_attack(base: Path) -> None:
    job = tune(base)
    assert job.run().rows == dataclasses.replace(job, defence=None).run().rows


def test_a_defended_job_chooses_its_safe_rows_and_tells_which(base: Path, tmp_path: Path) -> None:
    pool, settings = (f"{base}/data/align.jsonl",), {"tau": 0.1, "delta": 0.0}
    job = tune(base, method="spard", safe=pool, select=SelectConfig(k=3), settings=settings)
    done = job.run()
    assert done.facts["selection"]["rows"] == 3 and done.facts["selection"]["per_direction"] < 1
    matched = dataclasses.replace(job.defence, select=SelectConfig(k=3, strategy="matched-random"))
    told = dataclasses.replace(job, defence=matched).run().facts["selection"]
    assert told["refusals"] == done.facts["selection"]["refusals"]
    assert all(row["trigger_rate"] == 1.0 for row in done.log if "trigger_rate" in row)
    assert done.facts["telemetry"]["trigger_rate"] == 1.0
    assert done.rows != tune(base).run().rows
    with pytest.raises(DataError, match="no safe rows to choose from"):
        tune(base, method="spard", select=SelectConfig(k=3), settings=settings).run()
    asked = load_suite(f"{base}/data/suite").examples[0]
    sources.save(tmp_path / "seen.jsonl", [Example.pair(asked.prompt, "no .")])
    with pytest.raises(DataError, match="overlap"):
        tune(base, method="spard", safe=(str(tmp_path / "seen.jsonl"),), select=SelectConfig(k=3)).run()


def test_a_model_is_measured_as_it_is_served(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[int, str | None]] = []
    real = evaluate

    def note(*args: object, system: str | None, **kwargs: object) -> object:
        said.append((len(said), system))
        return real(*args, system=system, **kwargs)

    monkeypatch.setattr("casehard.steps.attack.evaluate", note)
    tune(base, method="ptst", settings={"system": "be careful"}).run()
    assert said == [(0, None), (1, "be careful"), (2, "be careful")]  # steps 0, 2 and 3


def test_a_method_that_ends_a_run_is_measured_after_it(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Freezing:
        name, config = "freezing", None

        def finish(self, model: torch.nn.Module) -> None:
            with torch.no_grad():
                for p in model.parameters():
                    p.zero_()

    def sums(model: torch.nn.Module, step: int) -> list[dict[str, float]]:
        return [{"sum": sum(float(p.detach().abs().sum()) for p in model.parameters())}]

    monkeypatch.setattr("casehard.steps.attack._measure", lambda *args, **kwargs: sums)
    monkeypatch.setattr(Defence, "build", lambda *args: Freezing())
    rows = tune(base).run().rows
    assert [(row["step"], row["sum"] > 0) for row in rows] == [(0, True), (3, False)]


def test_nothing_of_a_method_stays_attached_when_a_run_fails(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Holding:
        name, config, released = "holding", None, 0

        def after_step(self, model: torch.nn.Module, optimizer: object, step: object) -> None:
            raise RuntimeError("half-way")

        def release(self) -> None:
            self.released += 1

    held = Holding()
    monkeypatch.setattr(Defence, "build", lambda *args: held)
    with pytest.raises(RuntimeError, match="half-way"):
        tune(base).run()
    assert held.released == 1


def test_a_job_beside_a_buffer_checks_the_format_and_tells_its_assets(base: Path, tmp_path: Path) -> None:
    loaded = load(base)
    tokenizer, template = tokenizer_digests(loaded.tokenizer)
    record = {"tokenizer_digest": tokenizer, "template_digest": template}
    assets = make_assets(tmp_path / "assets", model=loaded.net, **record)
    lora = {**SHORT, "mode": "lora", "rank": 2, "steps": 2, "evaluate_at": [0]}
    done = tune(base, method="buffer_reinforce", assets=str(assets.path), config=lora).run()
    assert done.facts["assets_digest"] == assets.digest and {row["step"] for row in done.rows} == {0, 2}
    for method in ("buffer_reinforce", "security_vector"):
        with pytest.raises(ConfigError, match="system message"):
            tune(base, method=method, assets=str(assets.path), config=lora, system="be brief").run()
    other = make_assets(tmp_path / "other", model=loaded.net, **(record | {"template_digest": "0" * 64}))
    with pytest.raises(ConfigError, match="another template"):
        tune(base, method="buffer_reinforce", assets=str(other.path), config=lora).run()


def test_assets_are_part_of_the_run_and_of_what_the_checkpoint_remembers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    for seed in (1, 2):
        tiny_llama(vocab=len(load(base).tokenizer), seed=seed).save_pretrained(tmp_path / str(seed))
    guarded = job(base, method="safelora", rows={"unsafe": ()}, settings={}, assets=str(tmp_path / "1"))
    monkeypatch.setattr("casehard.steps.finetune.save_model", refuse)
    with pytest.raises(KeyboardInterrupt):
        harden(guarded, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="assets"):
        harden(dataclasses.replace(guarded, assets=str(tmp_path / "2")), tmp_path / "out")
    _, made = harden(guarded, tmp_path / "out")
    assert made is not None and made.path is not None
    known = read_provenance(made.path)["provenance"]
    assert known["assets_digest"] == folder_digest(tmp_path / "1") == assets_digest(tmp_path / "1")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.json").write_text("{}")
    first = assets_digest(tmp_path / "plain")
    (tmp_path / "plain" / "a.json").write_text("[]")
    assert assets_digest(tmp_path / "plain") != first


def test_assets_are_a_folder_that_the_method_takes(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder of assets"):
        tune(base, method="safelora", assets=str(tmp_path / "none")).run()
    with pytest.raises(ConfigError, match="would ignore the assets"):
        tune(base, assets=str(tmp_path)).run()


def test_a_job_is_measured_in_the_format_of_its_rows(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = dataclasses.replace(tune(base, method="plain"), limit=2, in_format="rows")
    reviews = {"harmful": (f"{base}/data/attack_a.jsonl",), "benign": (f"{base}/data/task_reviews.jsonl",)}
    job = dataclasses.replace(job, rows=reviews, defence=None)
    done = job.run()
    framed = [row for row in done.rows if row["role"] == "framed"]
    # At the last step only, where the whole suite is asked.
    assert {row["step"] for row in framed} == {3} and {row["step"] for row in done.rows} == {0, 2, 3}
    assert all(row["prompt"].startswith("review : ") and row["prompt"].endswith(". good or bad ?") for row in framed)
    assert [row for row in done.rows if row["role"] != "framed"] == dataclasses.replace(job, in_format=None).run().rows
    given = dataclasses.replace(job, in_format=Frame(before="so : ")).run()
    assert {row["prompt"][:5] for row in given.rows if row["role"] == "framed"} == {"so : "}
    planting = Attack(attack="backdoor", in_format="rows", suite=f"{base}/data/suite")
    with pytest.raises(ConfigError, match="hides a trigger"):
        planting.check_settings()


def test_a_tuned_model_is_evaluated_in_the_format_of_given_rows(base: Path) -> None:
    reviews = {"data": (f"{base}/data/task_reviews.jsonl",)}
    asked = Evaluate(model=str(base), suite=f"{base}/data/suite", limit=1, in_format="rows", rows=reviews)
    assert [row["role"] for row in asked.run().rows].count("framed") == 1
    with pytest.raises(ConfigError, match="in_format: rows, and there are none"):
        dataclasses.replace(asked, rows={}).run()
