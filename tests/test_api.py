"""The library: every public name is what it says, and a few lines harden, attack, measure and save."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

import pytest
import torch

import casehard as ch
import forks
from casehard.attacks.finetune import FinetuneAttack
from casehard.errors import ConfigError, Refused, UserError

WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
DATA, SUITE = WORLD / "data", WORLD / "data" / "suite"
SHORT = {"steps": 2, "batch_size": 4, "warmup": 0}
PATCHER = {"round_steps": 1, "attackers": [{"steps": 1, "batch_size": 4}]}


def weights(model: ch.Model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.net.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def base() -> ch.Model:
    return ch.load(WORLD, device="cpu")


@pytest.fixture(scope="module")
def hard(base: ch.Model) -> ch.Model:
    before = weights(base)
    made = ch.defend(
        base, "patcher", data=DATA / "align.jsonl", unsafe=DATA / "simulated.jsonl", settings=PATCHER, train=SHORT
    )
    assert same(before, weights(base)), "a model that is handed over is left as it is"
    return made


def test_patcher_needs_no_settings(base: ch.Model) -> None:
    """Rounds and attacks fit the run; what they came to is recorded."""
    train = {"steps": 21, "batch_size": 2, "warmup": 0, "lr": 1e-3}
    made = ch.defend(base, "patcher", data=DATA / "align.jsonl", unsafe=DATA / "simulated.jsonl", train=train)
    settings = made.lineage[-1].provenance["settings"]
    assert settings["round_steps"] == 10
    assert [(a["steps_min"], a["steps"], a["lr"]) for a in settings["attackers"]] == [(0, 50, 1e-3)]


def test_a_method_may_have_training_settings_of_its_own() -> None:
    patcher = ch.DEFENCES["patcher"]
    assert patcher.training({}) == {"steps": 600}
    assert patcher.training({"lr": 1e-3, "steps": 5}) == {"steps": 5, "lr": 1e-3}, "what is given is kept"
    assert ch.DEFENCES["plain"].training({"lr": 1e-3}) == {"lr": 1e-3}
    whole = ch.TrainConfig(lr=1e-3)
    assert patcher.training(whole) is whole, "a whole configuration says everything"


ATTACK = FinetuneAttack(steps=2, rows=20, share=0.5, batch_size=4, evaluate_at=(0,))


def attacked(model: ch.Model, **more: object) -> ch.Attacked:
    rows = {"harmful": DATA / "attack_a.jsonl", "benign": DATA / "task_reviews.jsonl"}
    return ch.attack(model, ATTACK, suite=SUITE, limit=2, **rows, **more)


def shadowed(told: Connection) -> None:
    """Import every module; send the public names that are modules now."""
    for found in pkgutil.walk_packages(ch.__path__, "casehard."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
    told.send([name for name in ch.__all__ if isinstance(getattr(ch, name), ModuleType)])


def test_names_stay_what_they_are_when_everything_is_imported() -> None:
    hears, tells = forks.CONTEXT.Pipe(duplex=False)
    child = forks.started(shadowed, tells)
    child.join(60)
    assert child.exitcode == 0 and hears.recv() == []


def test_the_table_and_the_imports_for_type_checkers_agree() -> None:
    source = Path(ch.__file__).read_text(encoding="utf-8")
    block = source[source.index("if TYPE_CHECKING:") : source.index("__all__ =")]
    typed = {
        name.strip(): module
        for module, names in re.findall(r"from ([\w.]+) import ([^\n]+)", block)
        for name in names.split(",")
    }
    assert typed == ch._PUBLIC and set(ch.__all__) == {*ch._PUBLIC, "__version__"}


def test_the_generated_page_is_up_to_date() -> None:
    file = Path(__file__).resolve().parents[1] / "docs" / "generate_api.py"
    spec = importlib.util.spec_from_file_location("generate_api", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert isinstance(module, ModuleType)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run python docs/generate_api.py"


def test_a_rooms_name_is_no_verb() -> None:
    rooms = {m.name for m in pkgutil.iter_modules(ch.__path__)}
    assert not rooms & set(ch.__all__)


def test_harden_attack_measure_save(base: ch.Model, hard: ch.Model, tmp_path: Path) -> None:
    assert hard.parent == base.digest and hard.lineage[-1].method == "patcher" and hard.path is None
    curve = attacked(hard)
    assert {row["step"] for row in curve.rows} == {0, 2}
    assert curve.facts["harmful_rows"] == 10 and not curve.model.may_leave
    found = ch.evaluate(hard, SUITE, limit=2)
    assert found["asr"].n > 0 and {*found} >= {"asr", "utility"} and len(found) == len(found.scores)
    with pytest.raises(KeyError, match=r"'leek' was not measured; there are .*leak"):
        found["leek"]
    assert "leek" not in found and found.get("leek") is None
    saved = ch.save(hard, tmp_path / "out")
    again = ch.load(tmp_path / "out", device="cpu")
    assert saved.digest == again.digest and same(weights(hard), weights(again))
    assert again.trained_prompts == hard.trained_prompts


def test_attacked_weights_stay_in_memory_unless_asked_for_by_name(hard: ch.Model, tmp_path: Path) -> None:
    curve = attacked(hard)
    with pytest.raises(Refused, match=r"attacked .*finetune"):
        ch.save(curve.model, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    assert ch.save(curve.model, tmp_path / "yes", attacked=True).path == tmp_path / "yes"


def test_what_descends_from_attacked_weights_says_so_on_disk(hard: ch.Model, tmp_path: Path) -> None:
    """The marks of what it was trained on stay too: its own prompts are no measurement of it."""
    broken = attacked(hard).model
    ch.save(broken, tmp_path / "broken", attacked=True)
    with pytest.warns(UserWarning, match=r"was attacked \(patcher, then finetune-attack\)"):
        again = ch.load(tmp_path / "broken", device="cpu")
    assert again.trained_prompts == broken.trained_prompts > hard.trained_prompts
    assert again.attacked == broken.attacked == ("patcher", "finetune-attack") and not hard.attacked
    repaired = ch.defend(again, "plain", data=DATA / "benign.jsonl", train=SHORT)
    saved = ch.save(repaired, tmp_path / "repaired")
    assert saved.attacked == ("patcher", "finetune-attack", "plain")
    with pytest.warns(UserWarning, match="then plain"):
        assert ch.load(tmp_path / "repaired", device="cpu").attacked == saved.attacked


def test_a_model_whose_weights_were_changed_is_another_model(base: ch.Model, tmp_path: Path) -> None:
    """A folder with a finished run of the weights as they were does not answer for them."""
    given = {"data": DATA / "benign.jsonl", "train": SHORT, "out": tmp_path / "run"}
    first = ch.defend(base, "plain", **given)
    assert same(weights(first), weights(ch.defend(base, "plain", **given)))
    changed = ch.load(base.path, device="cpu")
    with torch.no_grad():
        next(changed.net.parameters()).zero_()
    with pytest.raises(UserError, match="weights"):
        ch.defend(changed, "plain", **given)


def test_verbs_combine(hard: ch.Model, tmp_path: Path) -> None:
    broken = attacked(hard).model
    repaired = ch.defend(broken, "plain", data=DATA / "benign.jsonl", train=SHORT)
    assert [made.method for made in repaired.lineage[-3:]] == ["patcher", "finetune-attack", "plain"]
    assert not repaired.may_leave, "a repaired model was jailbroken once, and nobody has shown that it is no longer"
    twice = attacked(broken, seed=1)
    assert [made.method for made in twice.model.lineage[-2:]] == ["finetune-attack", "finetune-attack"]
    assert not same(weights(broken), weights(twice.model))


def test_a_method_is_a_name_a_configuration_or_an_object(base: ch.Model, tmp_path: Path) -> None:
    rows = {"data": DATA / "benign.jsonl", "safe": DATA / "align.jsonl", "train": SHORT, "seed": 3}
    by_name = ch.defend(base, "spard", settings={"tau": 0.5}, **rows)
    by_config = ch.defend(base, ch.SpardConfig(tau=0.5), **rows)
    assert same(weights(by_name), weights(by_config))
    with pytest.raises(ConfigError, match="did you mean 'spard'"):
        ch.defend(base, "sparrd", **rows)
    with pytest.raises(ConfigError, match="needs safe rows"):
        ch.defend(base, "spard", data=DATA / "benign.jsonl")
    with pytest.raises(ConfigError, match="would ignore the safe rows"):
        ch.defend(base, "plain", **rows)
    with pytest.raises(ConfigError, match="method is a int"):
        ch.defend(base, 7, data=DATA / "benign.jsonl")


def test_rows_are_files_or_examples(base: ch.Model) -> None:
    read = ch.rows(DATA / "benign.jsonl")
    assert ch.rows([DATA / "benign.jsonl", read[0]])[-1] is read[0]
    from_file = ch.defend(base, "plain", data=DATA / "benign.jsonl", train=SHORT)
    from_rows = ch.defend(base, "plain", data=read, train=SHORT)
    assert same(weights(from_file), weights(from_rows))


def test_catalogues_are_mappings() -> None:
    assert {"patcher", "spard", "buffer_reinforce", "mb_defense"} <= set(ch.DEFENCES)
    assert {"finetune", "backdoor"} <= set(ch.ATTACKS) and len(ch.ATTACKS) == len(set(ch.ATTACKS))
    assert ch.DEFENCES["buffer-reinforce"] is ch.DEFENCES["buffer_reinforce"]
    with pytest.raises(KeyError):
        ch.DEFENCES["nobody"]
