"""The jobs behind the verbs: what a checkpoint remembers, what is refused, what a resumed run continues."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from buffer_fakes import make_assets
from casehard import jobs
from casehard.attack.finetune import FinetuneAttack
from casehard.data import sources
from casehard.data.mix import marks
from casehard.data.select import SelectConfig
from casehard.defend.provider_assets import tokenizer_digests
from casehard.errors import ConfigError, DataError
from casehard.evaluate.suite import load_suite
from casehard.jobs import AttackJob, DefendJob, EvaluateJob, TuneJob
from casehard.model.digest import folder_digest
from casehard.model.load import load
from casehard.model.save import read_provenance
from casehard.organism import suite as organism_suite
from casehard.organism.build import write_data
from casehard.organism.tokenizer import build_tokenizer
from casehard.organism.world import World
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


def job(base: Path, **changes: object) -> DefendJob:
    start = DefendJob(
        model=str(base),
        method="patcher",
        data=(f"{base}/data/align.jsonl",),
        unsafe=(f"{base}/data/simulated.jsonl",),
        settings=PATCHER,
        train=TrainConfig(steps=5, batch_size=4),
        suite=f"{base}/data/suite",
    )
    return dataclasses.replace(start, **changes)


@pytest.fixture(scope="module")
def hardened(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hardened")
    result = jobs.run_defend(job(base), out)
    assert result.cost["passes"] == 5 + 3 + 2 * 2  # safe, attacked, and two attacks of two steps
    assert [path.name for path in out.iterdir()] == ["checkpoint"]
    return result.checkpoint.path


def test_a_checkpoint_remembers_its_training_prompts_and_refuses_to_be_scored_on_them(
    base: Path, hardened: Path, tmp_path: Path
) -> None:
    rows = sources.load(f"{base}/data/align.jsonl")[:5]
    tagged = [dataclasses.replace(r, tags={"role": "utility", "group": "x", "answer": r.response}) for r in rows]
    sources.save(tmp_path / "seen.jsonl", tagged)
    with pytest.raises(DataError, match="was trained on 5 of the 5 prompts"):
        jobs.run_evaluate(EvaluateJob(model=str(hardened), suite=str(tmp_path / "seen.jsonl")))
    with pytest.raises(DataError, match="was trained on 5"):
        jobs.run_attack(
            AttackJob(model=str(hardened), suite=str(tmp_path / "seen.jsonl"), harmful=(f"{base}/data/attack_a.jsonl",))
        )
    # A model made from that checkpoint inherits the memory.
    child = job(base, model=str(hardened), method="plain", unsafe=(), settings={}, data=(f"{base}/data/benign.jsonl",))
    grandchild = jobs.run_defend(child, tmp_path / "child")
    known = [set(read_provenance(p)["provenance"]["trained_prompts"]) for p in (hardened, grandchild.checkpoint.path)]
    assert known[0] < known[1]


def test_training_rows_in_the_suite_are_refused_before_training(base: Path, tmp_path: Path) -> None:
    held_out = sources.load(f"{base}/data/suite/eval.jsonl")[:3]
    answered = [Example.pair(row.prompt, "anything") for row in held_out]
    sources.save(tmp_path / "rows.jsonl", answered)
    with pytest.raises(DataError, match=r"3 of .* also occur in 'unsafe'"):
        jobs.run_defend(job(base, unsafe=(f"{tmp_path}/rows.jsonl",)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_a_method_would_ignore_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="would ignore the unsafe rows"):
        jobs.run_defend(job(base, method="plain", settings={}), tmp_path)
    with pytest.raises(DataError, match="retain rows would be ignored"):
        jobs.run_defend(job(base, retain=(f"{base}/data/benign.jsonl",)), tmp_path)
    with pytest.raises(ConfigError, match="needs unsafe rows"):
        jobs.run_defend(job(base, unsafe=()), tmp_path)


def test_attack_tells_how_many_of_its_rows_the_defender_knew(base: Path, hardened: Path) -> None:
    attack = AttackJob(
        model=str(hardened),
        harmful=(f"{base}/data/simulated.jsonl",),
        suite=f"{base}/data/suite",
        config=FinetuneAttack(share=1.0, rows=25, steps=1, evaluate_at=(0,)),
        limit=2,
    )
    result = jobs.run_attack(attack)
    assert (result.harmful_rows, result.benign_rows) == (25, 0)
    assert result.known_rows == len(sources.load(f"{base}/data/simulated.jsonl"))
    other = jobs.run_attack(dataclasses.replace(attack, harmful=(f"{base}/data/attack_b.jsonl",)))
    assert other.known_rows == 0
    assert {row["step"] for row in other.rows} == {0, 1}
    with pytest.raises(ConfigError, match="full_at: step 7"):
        jobs.run_attack(dataclasses.replace(attack, full_at=(7,)))


def test_an_interrupted_run_does_not_continue_with_another_parent_or_other_unsafe_rows(
    base: Path, hardened: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "save", refuse)
    with pytest.raises(KeyboardInterrupt):
        jobs.run_defend(job(base), tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "training").is_dir()
    with pytest.raises(ConfigError, match="parent"):
        jobs.run_defend(job(base, model=str(hardened)), tmp_path)
    with pytest.raises(ConfigError, match="unsafe"):
        jobs.run_defend(job(base, unsafe=(f"{base}/data/attack_a.jsonl",)), tmp_path)
    jobs.run_defend(job(base), tmp_path)
    assert not (tmp_path / "training").exists()
    stored = json.loads((tmp_path / "checkpoint" / "casehard.json").read_text())
    assert stored["parent"] and stored["method"] == "patcher"


def test_safe_rows_are_part_of_the_run_and_of_what_the_checkpoint_remembers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    user, safe = f"{base}/data/benign.jsonl", f"{base}/data/align.jsonl"
    guarded = job(base, method="spard", data=(user,), unsafe=(), safe=(safe,), settings={"tau": 0.5})
    with pytest.raises(ConfigError, match="needs safe rows"):
        jobs.run_defend(dataclasses.replace(guarded, safe=()), tmp_path)
    with pytest.raises(DataError, match="would ignore the safe rows"):
        jobs.run_defend(dataclasses.replace(guarded, method="plain", settings={}), tmp_path)
    monkeypatch.setattr(jobs, "save", refuse)
    with pytest.raises(KeyboardInterrupt):
        jobs.run_defend(guarded, tmp_path)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="safe"):
        jobs.run_defend(dataclasses.replace(guarded, safe=(f"{base}/data/attack_a.jsonl",)), tmp_path)
    made = jobs.run_defend(guarded, tmp_path)
    known = read_provenance(made.checkpoint.path)["provenance"]
    assert set(known["data_digests"]) == {"data", "safe"}
    both = marks(sources.load(user), sources.load(safe))
    assert both and both <= set(known["trained_prompts"])


def tune(base: Path, **changes: object) -> TuneJob:
    start = TuneJob(
        model=str(base),
        harmful=(f"{base}/data/attack_a.jsonl",),
        benign=(f"{base}/data/benign.jsonl",),
        suite=f"{base}/data/suite",
        config=FinetuneAttack(share=0.2, rows=20, steps=3, batch_size=4, lr=1e-3, evaluate_at=(0, 2)),
        limit=2,
    )
    return dataclasses.replace(start, **changes)


def test_a_job_without_a_defence_is_the_attack(base: Path) -> None:
    job = tune(base)
    fields = {f.name: getattr(job, f.name) for f in dataclasses.fields(AttackJob)}
    assert jobs.run_tune(job).run.rows == jobs.run_attack(AttackJob(**fields)).rows


def test_a_defended_job_chooses_its_safe_rows_and_tells_which(base: Path, tmp_path: Path) -> None:
    pool = (f"{base}/data/align.jsonl",)
    job = tune(base, method="spard", safe=pool, select=SelectConfig(k=3), settings={"tau": 0.1, "delta": 0.0})
    done = jobs.run_tune(job)
    assert len(done.selection["ids"]) == 3
    assert done.selection["user_rows"] == 20
    assert all(row["trigger_rate"] == 1.0 for row in done.run.log if "trigger_rate" in row)
    assert done.run.rows != jobs.run_tune(tune(base)).run.rows
    with pytest.raises(DataError, match="no safe rows to choose from"):
        jobs.run_tune(dataclasses.replace(job, safe=()))
    asked = load_suite(f"{base}/data/suite").examples[0]
    sources.save(tmp_path / "seen.jsonl", [Example.pair(asked.prompt, "no .")])
    with pytest.raises(DataError, match="overlap"):
        jobs.run_tune(dataclasses.replace(job, safe=(str(tmp_path / "seen.jsonl"),)))


def test_a_model_is_measured_as_it_is_served(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[int, str | None]] = []
    real = jobs.evaluate

    def note(*args: object, system: str | None, **kwargs: object) -> object:
        said.append((len(said), system))
        return real(*args, system=system, **kwargs)

    monkeypatch.setattr(jobs, "evaluate", note)
    jobs.run_tune(tune(base, method="ptst", settings={"system": "be careful"}))
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

    monkeypatch.setattr(jobs, "_measure", lambda model, *args, **kwargs: sums(model, 0))
    monkeypatch.setattr(jobs, "_method", lambda *args: Freezing())
    rows = jobs.run_tune(tune(base)).run.rows
    assert [(row["step"], row["sum"] > 0) for row in rows] == [(0, True), (3, False)]


def test_nothing_of_a_method_stays_attached_when_a_run_fails(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Holding:
        name, config, released = "holding", None, 0

        def after_step(self, model: torch.nn.Module, optimizer: object, step: object) -> None:
            raise RuntimeError("half-way")

        def release(self) -> None:
            self.released += 1

    held = Holding()
    monkeypatch.setattr(jobs, "_method", lambda *args: held)
    with pytest.raises(RuntimeError, match="half-way"):
        jobs.run_tune(tune(base))
    assert held.released == 1


def test_a_job_beside_a_buffer_checks_the_format_and_tells_its_assets(base: Path, tmp_path: Path) -> None:
    loaded = load(base)
    tokenizer, template = tokenizer_digests(loaded.tokenizer)
    record = {"tokenizer_digest": tokenizer, "template_digest": template}
    assets = make_assets(tmp_path / "assets", model=loaded.model, **record)
    lora = FinetuneAttack(mode="lora", rank=2, share=0.2, rows=20, steps=2, batch_size=4, evaluate_at=(0,))
    given = tune(base, method="buffer_reinforce", assets=str(assets.path), config=lora)
    done = jobs.run_tune(given)
    assert done.assets_digest == assets.digest and {row["step"] for row in done.run.rows} == {0, 2}
    for method in ("buffer_reinforce", "security_vector"):
        with pytest.raises(ConfigError, match="system message"):
            jobs.run_tune(dataclasses.replace(given, method=method, system="be brief"))
    other = make_assets(tmp_path / "other", model=loaded.model, **(record | {"template_digest": "0" * 64}))
    with pytest.raises(ConfigError, match="another template"):
        jobs.run_tune(dataclasses.replace(given, assets=str(other.path)))


def test_assets_are_part_of_the_run_and_of_what_the_checkpoint_remembers(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    for seed in (1, 2):
        tiny_llama(vocab=len(load(base).tokenizer), seed=seed).save_pretrained(tmp_path / str(seed))
    guarded = job(base, method="safelora", unsafe=(), settings={}, assets=str(tmp_path / "1"))
    monkeypatch.setattr(jobs, "save", refuse)
    with pytest.raises(KeyboardInterrupt):
        jobs.run_defend(guarded, tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="assets"):
        jobs.run_defend(dataclasses.replace(guarded, assets=str(tmp_path / "2")), tmp_path / "out")
    made = jobs.run_defend(guarded, tmp_path / "out")
    known = read_provenance(made.checkpoint.path)["provenance"]
    assert known["assets_digest"] == folder_digest(tmp_path / "1") == jobs.assets_digest(tmp_path / "1")
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.json").write_text("{}")
    first = jobs.assets_digest(tmp_path / "plain")
    (tmp_path / "plain" / "a.json").write_text("[]")
    assert jobs.assets_digest(tmp_path / "plain") != first


def test_assets_are_a_folder_that_the_method_takes(base: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder of assets"):
        jobs.run_tune(tune(base, assets=str(tmp_path / "none")))
    with pytest.raises(DataError, match="would ignore the assets"):
        jobs.run_tune(tune(base, assets=str(tmp_path)))
