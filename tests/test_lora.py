"""LoRA in every method that tunes a customer's rows: what trains, what comes out, what is saved, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import casehard as ch
from casehard.data.batches import EncodedSet
from casehard.defences import DEFENCES
from casehard.errors import ConfigError, Corrupt, Unsupported, UserError
from casehard.maths.lora import LoraPair
from casehard.model.adapters import add_lora, merged
from casehard.model.imports import Wanted, import_model
from casehard.model.lora_files import live_pairs, read_marker
from casehard.model.provenance import served_with, trained_prompts
from casehard.train.fit import fit
from casehard.train.recipe import TrainConfig
from casehard.train.tune import Lora, tune
from fakes import tiny_llama, tiny_rows

WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
DATA = WORLD / "data"
ROWS = {role: ch.rows(DATA / file)[:16] for role, file in (("safe", "align.jsonl"), ("unsafe", "simulated.jsonl"))}
SHORT = {"steps": 2, "batch_size": 4, "warmup": 0, "lr": 1e-2}
RANK = 2
TUNING = ("plain", "spard", "safe_mixing", "lisa", "safegrad", "ptst", "shrink", "safelora", "antidote")
CLEANING = ("crow", "anomaly")
QV = Lora(rank=RANK, target=("q_proj", "v_proj"))
SETTINGS: dict[str, dict[str, Any]] = {
    "spard": {"tau": 0.5, "delta": 0.0},  # violated at every step
    "lisa": {"safe_steps": 1, "user_steps": 1},
}


@pytest.fixture(scope="module")
def base() -> ch.Model:
    return ch.load(WORLD, device="cpu")


@pytest.fixture(scope="module")
def unaligned(base: ch.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with other weights than the model's, as SafeLoRA reads them."""
    folder = tmp_path_factory.mktemp("unaligned") / "model"
    ch.save(ch.defend(base, "plain", data=DATA / "benign.jsonl", train=SHORT), folder)
    return folder


@pytest.fixture
def tuned(base: ch.Model, unaligned: Path) -> Any:
    def run(name: str, **changes: Any) -> ch.Model:
        needs = DEFENCES[name].needs
        given: dict[str, Any] = {role: ROWS[role] for role in needs if role in ROWS}
        given |= {"assets": unaligned} if "assets" in needs else {}
        given |= {"train": SHORT, "lora": QV, "settings": SETTINGS.get(name, {}), **changes}
        return ch.defend(base, name, data=DATA / "task_reviews.jsonl", **given)

    return run


def logits(net: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = net.eval()(input_ids=torch.arange(5, 40)[None]).logits
    return found


@pytest.mark.parametrize("name", [*TUNING, *CLEANING])
def test_only_the_adapter_trains_and_what_comes_out_is_a_plain_model_that_is_what_is_saved(
    name: str, base: ch.Model, tuned: Any, tmp_path: Path
) -> None:
    hard = tuned(name)
    assert not hasattr(hard.net, "peft_config")
    before, after = dict(base.net.named_parameters()), dict(hard.net.named_parameters())
    assert before.keys() == after.keys() and all(p.requires_grad for p in after.values())
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved and all(n.endswith(("q_proj.weight", "v_proj.weight")) for n in moved), moved
    if name != "antidote":  # whose update, with coordinates taken out, is no product of thin factors
        for n in moved:
            values = torch.linalg.svdvals((after[n] - before[n]).double())
            assert values[RANK] < 1e-5 * values[0], n
    ch.save(hard, tmp_path / "out")
    back = ch.load(tmp_path / "out", device="cpu")
    assert all(torch.equal(p, after[n]) for n, p in back.net.named_parameters())


def test_methods_that_act_differ_from_plain_tuning_under_lora(tuned: Any) -> None:
    plain = logits(tuned("plain").net)
    for name in ("spard", "lisa", "safegrad"):
        assert (logits(tuned(name).net) - plain).abs().max() > 1e-3, name


def test_shrink_halves_the_merged_update(base: ch.Model, tuned: Any) -> None:
    start, whole, half = (dict(m.net.named_parameters()) for m in (base, tuned("plain"), tuned("shrink")))
    for name, p in start.items():
        assert torch.allclose(half[name] - p, 0.5 * (whole[name] - p), atol=1e-6), name


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_whoever_goes_on_trains_the_weights_and_no_adapter_left_behind(mode: str, tuned: Any) -> None:
    hard = tuned("plain")
    settings = {"mode": mode, "steps": 1, "rows": 20, "batch_size": 4, "lr": 1e-2, "evaluate_at": [1]}
    rows = {"harmful": DATA / "attack_a.jsonl", "benign": DATA / "task_reviews.jsonl"}
    done = ch.attack(hard, "finetune", suite=DATA / "suite", settings=settings, limit=1, **rows)
    before, after = dict(hard.net.named_parameters()), dict(done.model.net.named_parameters())
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    linear = {n for n in before if "_proj" in n}
    assert moved == (set(before) if mode == "full" else linear)
    repaired = ch.defend(done.model, "plain", data=DATA / "benign.jsonl", train={**SHORT, "steps": 1})
    assert not torch.equal(repaired.net.get_input_embeddings().weight, done.model.net.get_input_embeddings().weight)


def test_an_adapter_leaves_as_a_peft_folder_that_is_the_model(base: ch.Model, tuned: Any, tmp_path: Path) -> None:
    hard = tuned("ptst", save_as="adapter")
    adapter = ch.save(hard, tmp_path / "adapter").path
    marker = read_marker(adapter)
    assert marker is not None and (marker["role"], marker["base_digest"]) == ("user", base.digest)
    assert trained_prompts(adapter) >= hard.trained_prompts and served_with(adapter) == hard.served_with != ""
    alone = PeftModel.from_pretrained(ch.load(WORLD, device="cpu").net, str(adapter))
    assert torch.allclose(logits(alone), logits(hard.net), atol=1e-4)
    made = import_model(adapter, tmp_path / "merged", Wanted(base=str(WORLD)))
    again = ch.load(made.checkpoint.path, device="cpu")
    assert torch.allclose(logits(again.net), logits(hard.net), atol=1e-4) and again.served_with == hard.served_with
    with pytest.raises(ConfigError, match="already exists"):
        ch.save(hard, tmp_path)
    with pytest.raises(ConfigError, match="of another job"):
        ch.save(tuned("ptst", save_as="adapter", seed=1), adapter)


def test_an_attacked_model_never_leaves_as_the_adapter_it_once_was(tuned: Any) -> None:
    hard = tuned("plain", save_as="adapter")
    assert hard.writer is not None
    assert hard.after(hard.net, hard.lineage[-1]).writer is None


class Nudge:
    """A method that moves the base, and does not say so."""

    name = "nudge"
    config = QV

    def finish(self, model: torch.nn.Module) -> None:
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if n.endswith("norm.weight")).add_(1.0)


def test_an_adapter_of_a_base_that_moved_is_not_handed_back(base: ch.Model) -> None:
    with pytest.raises(Corrupt, match="base tensors changed"):
        ch.defend(base, Nudge(), data=DATA / "benign.jsonl", train=SHORT, lora=QV, save_as="adapter")


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        ("patcher", {}, "acts on all weights"),
        ("fine_mixing", {}, "acts on all weights"),
        ("plain", {"lora": None, "save_as": "adapter"}, "all weights are trained"),
        ("antidote", {"save_as": "adapter"}, "changes the base too"),
        ("plain", {"lora": Lora(target=("lm_head",))}, "table of the embeddings"),
        ("plain", {"lora": Lora(target=("embed_tokens",))}, "table of the embeddings"),
        ("plain", {"lora": Lora(target=("q_prj",))}, "q_prj"),
    ],
)
def test_what_cannot_be_done_with_an_adapter_is_told(name: str, changes: dict[str, Any], text: str, tuned: Any) -> None:
    with pytest.raises(ConfigError, match=text):
        tuned(name, **changes)


def test_pipelines_and_methods_of_adapters_say_what_they_take(base: ch.Model) -> None:
    clean = {"clean": DATA / "benign.jsonl", "data": DATA / "task_reviews.jsonl"}
    with pytest.raises(ConfigError, match="trains the model itself") as told:
        ch.defend(base, "mb_defense", lora=QV, **clean)
    assert "lora_rank" in str(told.value.hint)
    with pytest.raises(ConfigError, match="trains the model itself"):
        ch.defend(base, "onion", lora=QV, **clean)
    with pytest.raises(ConfigError, match="hands back an adapter"):
        ch.defend(base, "buffer_reinforce", data=DATA / "benign.jsonl", assets="x", save_as="merged")


def test_antidote_of_the_factors_may_leave_as_an_adapter(tuned: Any, tmp_path: Path) -> None:
    hard = tuned("antidote", save_as="adapter", settings={"prune": "factors"})
    adapter = ch.save(hard, tmp_path / "adapter").path
    alone = PeftModel.from_pretrained(ch.load(WORLD, device="cpu").net, str(adapter))
    assert torch.allclose(logits(alone), logits(hard.net), atol=1e-4)


def test_a_run_does_not_continue_with_another_adapter(base: ch.Model, tmp_path: Path) -> None:
    rows: EncodedSet = tiny_rows(8, length=8)
    train = TrainConfig(steps=2, batch_size=2, warmup=0)

    def run(alpha: float) -> Any:
        return tune(base, rows, train=train, seed=0, purpose="x", lora=Lora(rank=2, alpha=alpha), out=tmp_path)

    first = live_pairs(run(4.0).net)
    again = live_pairs(run(4.0).net)
    assert all(torch.equal(first[n].b, again[n].b) for n in first)
    with pytest.raises(UserError, match=r"another run|lora"):
        run(8.0)


def test_merging_adds_the_update_by_its_definition_and_frees_the_weights() -> None:
    wrapped = add_lora(tiny_llama(), 2, 6.0, dropout=0.5)
    fit(wrapped, None, tiny_rows(8), config=TrainConfig(steps=1, batch_size=2, warmup=0, lr=1e-2), seed=0)
    pairs: dict[str, LoraPair] = live_pairs(wrapped)
    bare = merged(wrapped)
    start = dict(tiny_llama().named_parameters())
    for name, p in bare.named_parameters():
        pair = pairs.get(name.removesuffix(".weight"))
        update = 0 if pair is None else pair.scale * pair.b @ pair.a
        assert torch.allclose(p, start[name] + update, atol=1e-6) and p.requires_grad, name
    assert merged(bare) is bare


def test_a_run_folder_with_an_adapter_says_how_it_becomes_a_model(tuned: Any, tmp_path: Path) -> None:
    ch.save(tuned("plain", save_as="adapter"), tmp_path / "adapter")
    with pytest.raises(Unsupported, match="without its base model") as told:
        ch.load(tmp_path)
    assert f"model import {tmp_path / 'adapter'} --base" in str(told.value.hint)


def test_a_customers_job_trains_the_adapter_that_the_attack_names(base: ch.Model) -> None:
    adapter = {"mode": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.1, "target": ["o_proj"]}
    settings = {**adapter, "steps": 1, "rows": 20, "batch_size": 4, "lr": 1e-2, "evaluate_at": [1]}
    rows = {"harmful": DATA / "attack_a.jsonl", "benign": DATA / "task_reviews.jsonl"}
    done = ch.attack(base, "finetune", suite=DATA / "suite", settings=settings, limit=1, **rows)
    before, after = dict(base.net.named_parameters()), dict(done.model.net.named_parameters())
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {n for n in before if n.endswith("o_proj.weight")}
