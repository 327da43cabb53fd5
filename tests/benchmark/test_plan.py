"""Plans are checked before anything runs, and nodes are named by what they depend on."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from bench_fakes import plan, plan_values

from casehard.benchmark.execute import Task, environment, step_of
from casehard.benchmark.graph import expand, load_plan, parse_plan
from casehard.errors import ConfigError
from casehard.evaluation.framing import Frame
from casehard.steps import Finetune
from casehard.train.tune import Lora

PLANS = Path(__file__).resolve().parents[2] / "plans"


def change(where: str, index: int, **values: Any) -> dict[str, Any]:
    """Return the plan with one item of a list changed."""
    out = plan_values()
    out[where][index] = {**out[where][index], **values}
    return out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (plan_values(sedes=[1]), "unknown key 'sedes'"),
        (change("attacks", 0, stepz=3), "unknown key 'stepz'"),
        (change("attacks", 0, evaluate_at=[0, 99]), "step 99 to evaluate at lies outside 0..40"),
        (change("attacks", 0, share=1.5), "share must be at most 1, got 1.5"),
        (change("attacks", 0, benign=[]), "no benign data"),
        (change("attacks", 0, mode="half"), "'half'"),
        (change("attacks", 0, attack="benign_outliers", share=0.3), "has no share: 0.3 would be ignored"),
        (change("attacks", 0, attack="orthogonal_rows"), "has no safe rows"),
        (change("attacks", 0, settings={"lr": 9}), "lr stands in its settings, where it would be ignored"),
        (change("attacks", 0, settings={"full_at": [5]}), "full_at stands in its settings"),
        (change("attacks", 0, lr=0), "must be positive"),
        (change("defences", 1, method=None), "role 'same_passes' without a method"),
        (change("defences", 2, data=[]), "has no data"),
        (change("defences", 0, data=["x"]), "would be ignored"),
        (change("defences", 0, safe=["x"]), "would be ignored"),
        (change("defences", 0, name="../up"), "not allowed"),
        (change("defences", 1, name="patcher"), "'patcher' appears twice"),
        (change("bases", 0, model="m"), "both of world_seed and model"),
        (change("bases", 0, world_seed=None), "neither of world_seed and model"),
        (plan_values(defences=plan_values()["defences"][1:]), "0 rows with role undefended"),
        (plan_values(reference="plane"), "no such name 'plane'"),
        (plan_values(reference="undefended"), "'undefended' has no method"),
        (plan_values(headline={"defence": "patcher", "step": 21}), "step 21 is not evaluated"),
        (plan_values(headline={"defence": "plain"}), "with itself"),
        (plan_values(headline={}), "defence"),
        (plan_values(seeds=[]), "seeds is empty"),
        (plan_values(seeds=["a"]), "'a'"),
        (plan_values(gates={"over_refusal": 3}), "gates.over_refusal must be at most 1, got 3"),
        (plan_values(attacks="full"), "must be a list"),
        ({"name": "x"}, "missing title, bases"),
    ],
)
def test_a_wrong_plan_is_refused_in_words(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_plan(values)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "bases",
    [
        [{"name": "world-0", "world_seed": 0}, {"name": "world-1", "world_seed": 0}],
        [{"name": "a", "model": "m"}, {"name": "b", "model": "copy"}],
    ],
)
def test_one_model_under_two_names_is_not_two_runs(bases: list[dict], tmp_path: Path) -> None:
    for name in ("m", "copy"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    found = parse_plan(plan_values(bases=bases))
    with pytest.raises(ConfigError, match="is the same model as"):
        expand(found, root=tmp_path)


def test_an_attack_without_a_share_needs_no_harmful_rows() -> None:
    made = parse_plan(change("attacks", 0, attack="benign_outliers", harmful=[]))
    assert made.attacks[0].config["steps"] == 40 and "share" not in made.attacks[0].config


def test_names_get_did_you_mean() -> None:
    with pytest.raises(ConfigError) as error:
        parse_plan(plan_values(reference="plane"))
    assert "did you mean 'plain'?" in error.value.hint


def test_defaults_fill_the_headline_and_the_last_step() -> None:
    found = plan(headline={"defence": "patcher"})
    assert found.headline.attack == "full_p10"
    assert found.headline.against == "plain"
    assert found.headline.step == 20
    assert found.attacks[0].evaluate_at == (5, 20, 40)
    assert found.attacks[0].full_at == (40,)
    assert found.defence("plain").rows["data"] == ("{base}/data/align.jsonl",)


def test_the_undefended_control_may_be_aligned_by_plain_training() -> None:
    values = change("defences", 0, method="plain", data=["{base}/data/align.jsonl"])
    found = parse_plan({**values, "reference": "undefended"})
    assert found.undefended.method == "plain"
    assert ("world-0", "undefended", 0) in expand(found, root=Path()).defend


def test_overrides_address_list_items_by_name(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan_values()))
    found = load_plan(path, ["attacks.full_p10.lr=2e-4", "defences.patcher.settings.round_steps=3", "seeds=[7]"])
    assert found.attacks[0].lr == 2e-4
    assert found.defence("patcher").settings["round_steps"] == 3
    assert found.seeds == (7,)
    with pytest.raises(ConfigError, match="no such name 'full_p1'"):
        load_plan(path, ["attacks.full_p1.lr=1"])


def digests(**changes: Any) -> dict[str, str]:
    """Return label+kind -> digest of the plan's nodes."""
    nodes = expand(plan(**changes), root=Path()).nodes.values()
    return {f"{n.kind} {n.label}": n.digest for n in nodes}


def test_nodes_are_shared_and_parents_come_first() -> None:
    found = expand(plan(), root=Path())
    kinds = [n.kind for n in found.nodes.values()]
    # 1 base; 2 defences x 3 seeds; evaluations of 6 hardened models and once of the untouched one; 9 attacks.
    assert [kinds.count(k) for k in ("base", "defend", "evaluate", "attack")] == [1, 6, 7, 9]
    assert len(found.cells) == 18
    seen: set[str] = set()
    for name, node in found.nodes.items():
        assert not node.parent or node.parent in seen
        seen.add(name)


def test_digests_are_stable_and_change_with_what_they_depend_on() -> None:
    before = digests()
    assert digests() == before
    assert digests(title="another title", transcripts=9) == before
    attacks = change("attacks", 0, lr=2e-4)["attacks"]
    after = digests(attacks=attacks)
    assert {k for k in before if before[k] != after[k]} == {k for k in before if k.startswith("attack ")}
    defences = change("defences", 2, settings={"round_steps": 11})["defences"]
    after = digests(defences=defences)
    assert {k.split("/")[1] for k in before if before[k] != after[k]} == {"patcher"}
    other = digests(bases=[{"name": "world-0", "world_seed": 1, "size": "tiny"}])
    assert set(other.values()).isdisjoint(before.values())


def test_what_results_depend_on_names_nodes() -> None:
    def names(**setting: Any) -> set[str]:
        return set(expand(plan(), root=Path(), setting=setting).nodes)

    assert names(threads=1) == names(threads=1)
    assert names(threads=1).isdisjoint(names(threads=2))
    found = environment(1)
    assert found["threads"] == 1
    assert found["torch"].startswith("2.")
    assert found["auto_precision"] in ("fp32", "bf16")
    assert environment(3) == {**found, "threads": 3}


def test_a_file_counts_by_content_not_by_place(tmp_path: Path) -> None:
    def at(folder: str, text: str) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "rows.jsonl").write_text(text)
        defences = change("defences", 2, unsafe=["rows.jsonl?kind=a"])["defences"]
        nodes = expand(plan(defences=defences), root=tmp_path / folder).nodes.values()
        return next(n.digest for n in nodes if n.label == "world-0/patcher/s0" and n.kind == "defend")

    assert at("a", "one") == at("b", "one") != at("c", "two")


def spard_plan(**row: Any) -> dict[str, Any]:
    """Return the plan with a fourth row, SPARD."""
    start = {"name": "spard", "method": "spard", "data": "{base}/data/benign.jsonl", "safe": "{base}/data/align.jsonl"}
    return plan_values(defences=[*plan_values()["defences"], {**start, **row}])


def spard_job(values: dict[str, Any]) -> Finetune:
    nodes = expand(parse_plan(values), root=Path()).nodes.values()
    node = next(n for n in nodes if n.kind == "defend" and n.label == "world-0/spard/s0")
    return step_of(
        Task(node=node, out=Path("out"), base=Path("organism"), parent=Path("organism"), cache=Path("cache"))
    )


def test_safe_rows_reach_the_job_and_name_the_node(tmp_path: Path) -> None:
    found = spard_job(spard_plan())
    assert found.rows["safe"] == ("organism/data/align.jsonl",)
    assert found.rows["data"] == ("organism/data/benign.jsonl",)

    def name(text: str) -> str:
        (tmp_path / "safe.jsonl").write_text(text)
        nodes = expand(parse_plan(spard_plan(safe="safe.jsonl")), root=tmp_path).nodes.values()
        return next(n.digest for n in nodes if n.label == "world-0/spard/s0" and n.kind == "defend")

    assert name("one") != name("two")


def test_an_adapter_of_a_row_or_a_step_reaches_the_job_and_names_the_node() -> None:
    wanted = {"rank": 4, "alpha": 8.0, "target": ["q_proj", "v_proj"]}
    assert spard_job(spard_plan()).lora is None
    assert spard_job(spard_plan(lora=wanted)).lora == Lora(rank=4, alpha=8.0, target=("q_proj", "v_proj"))
    assert spard_job(spard_plan(lora={})).lora == Lora()

    def names(row: Any, step: Any) -> dict[str, str]:
        align = {"name": "align", "data": "{base}/data/align.jsonl", "lora": step}
        values = {**spard_plan(lora=row), "steps": [align], "chain": ["align", "defence", "attack"]}
        return {f"{n.kind} {n.label}": n.digest for n in expand(parse_plan(values), root=Path()).nodes.values()}

    before = names(None, None)
    row, step = names(wanted, None), names(None, wanted)
    assert {k.split("/")[1] for k in before if before[k] != row[k]} == {"spard"}
    assert step["defend world-0/align/s0"] != before["defend world-0/align/s0"]
    assert names({**wanted, "alpha": 9.0}, None) != row


def test_an_adapter_is_refused_where_it_would_be_ignored_or_cannot_be() -> None:
    with pytest.raises(ConfigError, match="unknown key 'rnak'"):
        spard_job(spard_plan(lora={"rnak": 4}))
    with pytest.raises(ConfigError, match="its data and settings would be ignored"):
        parse_plan(change("defences", 0, lora={"rank": 4}))
    with pytest.raises(ConfigError, match="patcher acts on all weights"):
        patcher = parse_plan(change("defences", 2, lora={"rank": 4}))
        node = next(n for n in expand(patcher, root=Path()).nodes.values() if n.label == "world-0/patcher/s0")
        step_of(Task(node=node, out=Path("out"), base=Path("o"), parent=Path("o"), cache=Path("c")))
    with pytest.raises(ConfigError, match="without data, train or lora of its own"):
        align = {"name": "align", "data": "{base}/data/align.jsonl"}
        inside = spard_plan(data=[], lora={"rank": 4}, chain=["align", "attack with defence"])
        parse_plan({**inside, "steps": [align]})


def test_safe_rows_are_demanded_and_never_ignored() -> None:
    with pytest.raises(ConfigError, match="needs safe rows and got none"):
        spard_job(spard_plan(safe=[]))
    with pytest.raises(ConfigError, match="would ignore the safe rows"):
        spard_job(spard_plan(method="plain"))
    with pytest.raises(ConfigError, match="would ignore the unsafe rows"):
        spard_job(spard_plan(unsafe=["{base}/data/simulated.jsonl"]))
    with pytest.raises(ConfigError, match="spard"):
        spard_job(spard_plan(settings={"taux": 1}))


def test_missing_data_is_found_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such data"):
        expand(plan(defences=change("defences", 2, unsafe=["gone.jsonl"])["defences"]), root=tmp_path)
    with pytest.raises(ConfigError, match="no such model folder"):
        expand(plan(bases=[{"name": "mine", "model": "gone"}]), root=tmp_path)


def test_a_suite_counts_with_the_data_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "suite.yaml").write_text("parts: [{data: rows.jsonl, role: utility}]")

    def name() -> str:
        nodes = expand(plan(suite="suite.yaml"), root=tmp_path).nodes.values()
        return next(n.digest for n in nodes if n.kind == "evaluate")

    before = name()
    (tmp_path / "rows.jsonl").write_text("{} ")
    assert name() != before


def test_an_attack_with_its_own_suite_measures_step_0_itself() -> None:
    values = change("attacks", 0, suite="{base}/data/suite_translation")
    found = [n for n in expand(parse_plan(values), root=Path()).nodes.values() if n.kind == "attack"]
    assert found[0].config["config"]["evaluate_at"] == [0, 5, 20, 40]
    assert found[0].config["full_at"] == [0, 40]


def test_a_plan_asks_in_the_format_of_its_jobs() -> None:
    def step(asked: Any) -> Any:
        nodes = expand(parse_plan(plan_values(in_format=asked)), root=Path()).nodes.values()
        node = next(n for n in nodes if n.kind == "attack")
        return step_of(
            Task(node=node, out=Path("out"), base=Path("organism"), parent=Path("organism"), cache=Path("cache"))
        )

    assert step("rows").in_format == "rows" and step(None).in_format is None
    assert step({"before": "rate : "}).in_format == Frame(before="rate : ")
    before, after = digests(), digests(in_format="rows")
    assert {k for k in before if before[k] != after[k]} == {k for k in before if k.startswith("attack ")}
    for wrong in ({"befor": "x"}, {}):
        with pytest.raises(ConfigError, match="in_format"):
            step(wrong)
    with pytest.raises(ConfigError, match="in_format"):
        parse_plan(plan_values(in_format="row"))


def test_parsing_needs_no_torch() -> None:
    code = "import sys, casehard.benchmark.graph; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout)
    assert "torch" not in loaded
    assert "transformers" not in loaded


def test_a_row_without_training_settings_has_those_of_its_method() -> None:
    nodes = expand(load_plan(PLANS / "patcher_default.yaml"), root=Path()).nodes.values()
    trained = {n.label.split("/")[1]: n.config["train"] for n in nodes if n.kind == "defend"}
    assert trained["patcher"] == {"steps": 600} and trained["sft"] == {}


def test_every_plan_file_of_the_project_is_valid() -> None:
    found = sorted(PLANS.glob("*.yaml"))
    assert found
    for path in found:
        values = load_plan(path)
        assert dataclasses.is_dataclass(values)
