"""A method inside a customer's job: a base is aligned once, every job runs under every defence, its end is judged."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import LEAKS, Fake, plan, plan_values

from casehard.benchmark.ends import beside, end_rows
from casehard.benchmark.execute import Task, step_of
from casehard.benchmark.graph import expand
from casehard.benchmark.plan import Plan
from casehard.benchmark.run import run_plan
from casehard.benchmark.verdict import judged_at
from casehard.config import to_dict
from casehard.errors import ConfigError, UserError
from casehard.reporting.ends import _difference
from casehard.reporting.kept import kept
from casehard.reporting.markdown import markdown
from casehard.reporting.page import render

DATA = "{base}/data/"


def tuning(**changes: Any) -> dict[str, Any]:
    """Return a plan of two jobs and three defences as plain values."""
    job = {"share": 0.1, "steps": 40, "lr": 1e-4, "harmful": f"{DATA}attack_a.jsonl"}
    values = plan_values(
        chain=["aligned", "attack with defence"],
        steps=[{"name": "aligned", "data": f"{DATA}align.jsonl", "train": {"steps": 3}}],
        headline={"defence": "patcher", "against": "undefended", "attack": "reviews", "metric": "asr"},
        reference="undefended",
        defences=[
            {"name": "undefended", "role": "undefended", "method": "plain"},
            {"name": "plain", "role": "baseline", "method": "safe_mixing", "safe": f"{DATA}align.jsonl"},
            {
                "name": "patcher",
                "method": "spard",
                "safe": f"{DATA}align.jsonl",
                "select": {"k": 4},
                "settings": {"tau": 0.5},
            },
        ],
        attacks=[
            {"name": "reviews", "benign": f"{DATA}task_reviews.jsonl", **job},
            {"name": "harmless", "benign": f"{DATA}task_reviews.jsonl", **job, "share": 0.0},
        ],
    )
    return {**values, **changes}


def made(**changes: Any) -> Plan:
    return plan(**tuning(**changes))


def test_a_base_is_aligned_once_a_seed_and_every_job_starts_from_it() -> None:
    matrix = expand(made(), root=Path())
    nodes = list(matrix.nodes.values())
    aligned = [n for n in nodes if n.kind == "defend"]
    assert [n.seed for n in aligned] == [0, 1, 2]
    jobs = [n for n in nodes if n.kind == "attack"]
    assert len(jobs) == 3 * 3 * 2
    assert {n.parent for n in jobs} == {n.digest for n in aligned}
    assert len([n for n in nodes if n.kind == "evaluate"]) == 3
    # What a defence costs is what it costs in the headline's job.
    spent = [matrix.nodes[d].config for d in matrix.defend.values()]
    assert {config["rows"]["benign"][0] for config in spent} == {f"{DATA}task_reviews.jsonl"}
    assert all(config["config"]["share"] == 0.1 for config in spent)


def test_the_selection_is_part_of_what_names_a_job() -> None:
    defences = tuning()["defences"]
    other = [*defences[:2], {**defences[2], "select": {"k": 5}}]
    before, after = (set(expand(p, root=Path()).nodes) for p in (made(), made(defences=other)))
    assert len(before - after) == len(after - before) == 6


def test_prepared_assets_come_before_the_jobs_that_need_them() -> None:
    changes = {
        "prepare": [{"name": "asset", "harmful": f"{DATA}simulated.jsonl"}],
        "defences": [*tuning()["defences"], {"name": "buffered", "method": "safelora", "assets": "prepared:asset"}],
    }
    matrix = expand(made(**changes), root=Path())
    prepared = {n.digest: n for n in matrix.nodes.values() if n.kind == "prepare"}
    assert len(prepared) == 3
    needy = [n for n in matrix.nodes.values() if n.needs]
    assert len(needy) == 6
    assert all(prepared[n.needs].parent == n.parent for n in needy)
    with pytest.raises(ConfigError, match="no such name 'other'"):
        made(
            **{
                **changes,
                "prepare": [{"name": "other2"}],
                "defences": [
                    *tuning()["defences"],
                    {"name": "buffered", "method": "plain", "assets": "prepared:other"},
                ],
            }
        )


def test_a_provider_may_begin_with_a_model_that_is_aligned_already(tmp_path: Path) -> None:
    (tmp_path / "served" / "data" / "suite").mkdir(parents=True)
    (tmp_path / "served" / "config.json").write_text("{}")
    for name in ("suite/suite.json", "attack_a.jsonl", "align.jsonl", "task_reviews.jsonl"):
        (tmp_path / "served" / "data" / name).write_text("{}")
    served = {"chain": ["attack with defence"], "bases": [{"name": "m", "model": "served"}]}
    nodes = list(expand(made(**served), root=tmp_path).nodes.values())
    (before,) = {n.digest for n in nodes if n.kind == "evaluate"}
    assert not [n for n in nodes if n.kind == "defend"] and len([n for n in nodes if n.kind == "attack"]) == 18
    assert {n.parent for n in nodes if n.digest == before} == {n.digest for n in nodes if n.kind == "base"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"defences": [*tuning()["defences"], {"name": "filter", "method": "onion"}]},
            "trains the model itself, and a finetune attack gives it no rows",
        ),
        ({"chain": ["attack with defence"]}, "knows no refusal"),
        ({"chain": ["defence", "attack"]}, "has no data"),
        ({"chain": ["alined", "attack with defence"]}, "no such name 'alined'"),
        ({"chain": ["aligned", "attack", "attack with defence"]}, "chain"),
        ({"chain": ["aligned", "defence"]}, "no attack in its chain"),
        ({"stage": "tuning"}, "plans are chains of steps now"),
        ({"defences": [{"name": "undefended", "role": "undefended"}, *tuning()["defences"][1:]]}, "without data"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        made(**change)


def test_a_step_of_the_library_is_built_from_a_node() -> None:
    matrix = expand(made(), root=Path())
    node = next(n for n in matrix.nodes.values() if n.label == "world-0/patcher/s1/reviews")
    task = Task(node=node, out=Path("o"), base=Path("b"), parent=Path("p"), cache=Path("c"))
    job = step_of(task)
    assert (job.defence.method, job.seed, job.config["share"], job.defence.select.k) == ("spard", 1, 0.1, 4)
    assert job.rows["safe"] == ("b/data/align.jsonl",)
    assert job.model == "p"
    wrong = dataclasses.replace(node, config={**node.config, "inside": {**node.config["inside"], "method": "plain"}})
    with pytest.raises(ConfigError, match="would ignore the safe rows"):
        step_of(dataclasses.replace(task, node=wrong))


def test_the_table_of_jobs_pairs_runs_and_leaves_benign_jobs_out_of_the_mean() -> None:
    def record(defence: str, job: str, seed: int, rate: float) -> dict[str, Any]:
        place = {"family": "f", "base": "w", "defence": defence, "attack": job, "seed": seed, "steps": 40}
        return {**place, "metric": "asr", "rate": rate, "n": 40}

    records = [
        *(record("undefended", "reviews", s, r) for s, r in enumerate((0.8, 0.9, 1.0))),
        *(record("patcher", "reviews", s, r) for s, r in enumerate((0.1, 0.3, 0.2))),
        *(record(d, "harmless", s, 0.5) for d in ("undefended", "patcher") for s in range(3)),
        {**record("patcher", "reviews", 0, 0.7), "steps": 20},
    ]
    by = {r["defence"]: r for r in end_rows(made(), records, "f")}
    assert by["patcher"]["mean"] == pytest.approx(0.2)
    assert by["patcher"]["attacks"] == pytest.approx({"reviews": 0.2, "harmless": 0.5})
    assert by["patcher"]["difference"] == pytest.approx(-0.7)
    # t = 4.303 on two degrees of freedom, sd of (-.7, -.6, -.8) is .1.
    assert by["patcher"]["difference_low"] == pytest.approx(-0.7 - 4.303 * 0.1 / 3**0.5, abs=1e-3)
    assert "difference" not in by["undefended"]
    # Over runs: t = 4.303, sd .1; over 40 prompts of one base the Wilson interval of 8/40 is narrower.
    assert by["patcher"]["high"] == pytest.approx(0.2 + 4.303 * 0.1 / 3**0.5, abs=1e-3)
    (alone,) = [r for r in end_rows(made(), [records[3]], "f") if r["defence"] == "patcher"]
    assert (alone["low"], alone["high"]) == pytest.approx((0.040, 0.231), abs=1e-3)  # 4/40, Wilson


def test_a_difference_over_one_shared_run_is_called_that() -> None:
    place = {"family": "organism-tiny", "base": "w", "attack": "reviews", "steps": 40, "metric": "asr", "n": 40}
    rates = {("undefended", 1): 0.9, ("undefended", 2): 0.5, ("patcher", 0): 0.5, ("patcher", 1): 0.6}
    records = [{**place, "defence": d, "seed": s, "rate": r} for (d, s), r in rates.items()]
    rows = end_rows(made(), records, "organism-tiny")
    entry = next(r for r in rows if r["defence"] == "patcher")
    assert (entry["compared"], len(entry["runs"])) == (1, 2)
    assert _difference(entry) == "-30.0 (single run, 1 of 2 runs compared)"
    assert ", 2 of 3 planned runs)" in beside(made(), rows, "organism-tiny")


def test_a_job_that_failed_leaves_its_defence_without_a_mean() -> None:
    place = {"family": "f", "base": "w", "seed": 0, "steps": 40, "metric": "asr", "n": 40}
    jobs = [
        *tuning()["attacks"],
        {**tuning()["attacks"][0], "name": "second"},
        {**tuning()["attacks"][0], "name": "all", "share": 1.0, "benign": []},
    ]
    many = made(attacks=jobs)
    records = [{**place, "defence": "undefended", "attack": j, "rate": 0.9} for j in ("reviews", "second", "all")]
    records += [{**place, "defence": "patcher", "attack": j, "rate": 0.1} for j in ("reviews", "all")]
    assert [r["defence"] for r in end_rows(many, records, "f")] == ["undefended"]
    # Harmful rows alone teach no task: that job is no part of the task's mean.
    taught = [{**r, "metric": "fine_tunability"} for r in records if r["attack"] != "second"]
    taught = [{**r, "rate": 0.0 if r["attack"] == "all" else 0.8} for r in taught]
    assert {r["defence"]: r["mean"] for r in end_rows(many, taught, "f")} == {"undefended": 0.8, "patcher": 0.8}


def test_a_collapsed_row_is_never_the_lowest(tmp_path: Path) -> None:
    broken = Fake(
        leaks={**FAKE.leaks, "plain": (0.0,) * 4, "patcher": (0.0, 0.0, 0.0, 0.2)}, over_refusal={"plain": 0.9}
    )
    assert "the lowest of the rows that stay useful." in run(tmp_path, broken)["verdict"]["details"][0]


def test_what_a_method_lacks_is_found_before_anything_runs() -> None:
    matrix = expand(made(), root=Path())
    node = next(n for n in matrix.nodes.values() if n.label == "world-0/undefended/s0/reviews")
    task = Task(node=node, out=Path("o"), base=Path("b"), parent=Path("p"), cache=Path("c"))
    for change, says in (
        ({"method": "safelora"}, "needs a folder of assets"),
        ({"assets": "some/folder"}, "would ignore the assets"),
        ({"select": {"k": 3}}, "no safe rows to choose from"),
    ):
        config = {**node.config, "inside": {**node.config["inside"], **change}}
        with pytest.raises(UserError, match=says):
            step_of(dataclasses.replace(task, node=dataclasses.replace(node, config=config)))
    with pytest.raises(ConfigError, match="the end of the job"):
        made(headline={**tuning()["headline"], "step": 20}, attacks=[{**tuning()["attacks"][0], "evaluate_at": [20]}])


def run(tmp_path: Path, fake: Fake, **changes: Any) -> dict[str, Any]:
    return run_plan(made(**changes), tmp_path / "run", root=tmp_path, jobs=1, executor=fake).summary


FAKE = Fake(leaks={**LEAKS, "aligned": (0.0, 0.0, 0.0, 0.0), "patcher": (0.0, 0.0, 0.0, 0.05)})


def test_usefulness_is_judged_after_the_job(tmp_path: Path) -> None:
    assert judged_at(made()) == ("reviews", 40)
    summary = run(tmp_path, FAKE)
    assert summary["verdict"]["status"] == "holds"
    assert summary["verdict"]["sentence"].startswith("patcher is not broken by the job: after the job 'reviews'")
    assert "the lowest of the rows that stay useful." in summary["verdict"]["details"][0]
    assert {r["defence"] for r in summary["ends"]} == {"undefended", "plain", "patcher"}
    better = Fake(leaks={**FAKE.leaks, "plain": (0.0, 0.0, 0.0, 0.0), "patcher": (0.0, 0.0, 0.0, 0.2)})
    assert (
        "the lowest of the rows that stay useful is plain with 0 %"
        in run(tmp_path / "c", better)["verdict"]["details"][0]
    )
    useless = run(tmp_path / "b", dataclasses.replace(FAKE, over_refusal={"patcher": 0.6}))
    assert useless["verdict"]["status"] == "collapsed"


def test_the_page_shows_all_jobs_in_one_table(tmp_path: Path) -> None:
    summary = run(tmp_path, FAKE)
    page = render(summary)
    assert "After the customers" in page
    assert "ASR, one by one" in page
    assert "Steps to break" not in page
    assert markdown(kept(summary)) == markdown(summary)
    assert to_dict(made())["chain"] == ["aligned", "attack with defence"]
