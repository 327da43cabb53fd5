"""Run folders of single verbs are compared where they measured the same, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import Fake

from casehard.benchmark.store import RunFolder
from casehard.errors import UserError
from casehard.reporting.from_run_folders import summary_of_runs
from casehard.reporting.page import write_report

DATA = {"h": "a" * 64, "b": "b" * 64, "s": "c" * 64}
STEPS = (0, 5, 20, 40)


def attack(
    out: Path,
    model: str,
    defence: str,
    *,
    seed: int = 0,
    data: dict[str, str] | None = None,
    full: tuple[int, ...] = (0, 40),
    fake: Fake | None = None,
    code: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write what ``casehard attack finetune`` leaves behind, with the digests of what it read."""
    config: dict[str, Any] = {"mode": "full", "share": 0.1, "steps": 40, "lr": 1e-4, "evaluate_at": list(STEPS)}
    job: dict[str, Any] = {"model": model, "harmful": ["h"], "benign": ["b"], "suite": "s", "config": config}
    job |= {"seed": seed, "system": None, "limit": None, "max_length": None, **changes}
    rows = [r for s in STEPS for r in (fake or Fake()).rows(_name(defence), s, seed, full=s in full)]
    with RunFolder(out, "attack", job, seeds=[seed], parents={"model": model}, data={**DATA, **(data or {})}) as run:
        run.record({"code": {**run.info["code"], "dirty": False, **(code or {})}})
        run.rows(rows)
        run.summary({"records": [{"defence": defence}]})
    return out


def evaluation(
    out: Path, model: str, defence: str, *, suite: str = DATA["s"], seed: int = 0, fake: Fake | None = None, **ask: Any
) -> Path:
    """Write what ``casehard evaluate`` leaves behind."""
    job = {"model": model, "suite": "s", "system": None, "limit": None, **ask}
    rows = (fake or Fake()).rows(_name(defence), 0, 0, full=True)
    with RunFolder(out, "evaluate", job, seeds=[seed], parents={"model": model}, data={"s": suite}) as run:
        run.rows([{k: v for k, v in row.items() if k != "step"} for row in rows])
        run.summary({"records": [{"defence": defence}]})
    return out


class Judged(Fake):
    """Rows that name their judge."""

    judge = "rule"

    def rows(self, *args: Any, **how: Any) -> list[dict[str, Any]]:
        return [{**row, "judge": self.judge} for row in super().rows(*args, **how)]


@pytest.mark.parametrize(("judge", "claims"), [("rule", False), ("classifier", True), ("organism", True)])
def test_a_judge_of_refusals_makes_no_claim_about_harm(tmp_path: Path, judge: str, claims: bool) -> None:
    fake = Judged()
    fake.judge = judge
    runs = [attack(tmp_path / name, name, name, fake=fake) for name in ("none", "patcher")]
    found = summary_of_runs(runs)
    verdict = found["verdict"]
    assert verdict["status"] == "delays" and verdict["sentence"].startswith("patcher delays the break")
    told = [line for line in found["not_tested"] if line.startswith(f"Harm: the judge {judge} tells whether")]
    assert verdict["sentence"].endswith("Refusals are counted, harm is not.") is not claims
    assert (told == verdict["details"][:1]) is not claims and bool(told) is not claims
    if not claims:
        text = write_report(runs, tmp_path / "both.html").read_text()
        assert "Refusals are counted, harm is not." in text and text.count("tells whether an answer declines") == 2


def _name(defence: str) -> str:
    return {"none": "undefended"}.get(defence, defence)


def pair(root: Path, **changes: Any) -> list[Path]:
    """Return the same attack on an undefended and on a hardened checkpoint; ``changes`` are made to the second."""
    return [attack(root / "soft", "bbb", "none"), attack(root / "hard", "aaa", "patcher", **changes)]


@pytest.mark.parametrize(
    ("changes", "differ"),
    [
        ({"data": {"h": "d" * 64}}, "harmful"),
        ({"data": {"b": "d" * 64}}, "benign"),
        ({"data": {"s": "d" * 64}}, "suite"),
        ({"system": "Be safe."}, "system"),
        ({"limit": 8}, "limit"),
        ({"max_length": 64}, "max_length"),
        ({"data": {"h?text=prompt": "a" * 64}, "harmful": ["h?text=prompt"]}, "harmful"),
    ],
)
def test_attacks_that_read_something_else_are_not_compared(
    tmp_path: Path, changes: dict[str, Any], differ: str
) -> None:
    assert summary_of_runs(pair(tmp_path / "same"))["verdict"]["status"] == "delays"
    for runs in (pair(tmp_path / "other", **changes), pair(tmp_path / "turned", **changes)[::-1]):
        found = summary_of_runs(runs)
        assert found["verdict"]["status"] == "not_measured"
        # The models before any attack are compared only where they were asked the same.
        compared = {d["attack"] for d in found["differences"]}
        assert compared == (set() if differ in ("suite", "system", "limit") else {"none"})
        first, last = (run.name for run in runs)
        said = f"attack-1 ({first}) and attack-2 ({last}) differ in: {differ}."
        assert any(said in line for line in found["verdict"]["details"])
        assert len({a["title"] for a in found["plan"]["attacks"]}) == 2


def test_the_content_of_files_counts_and_not_where_they_lie(tmp_path: Path) -> None:
    moved = {"harmful": ["copy/h"], "suite": "copy/s", "data": {"copy/h": DATA["h"], "copy/s": DATA["s"]}}
    found = summary_of_runs(pair(tmp_path, **moved))
    assert found["verdict"]["status"] == "delays"
    assert len(found["plan"]["attacks"]) == 1


def test_runs_of_one_model_on_an_edited_suite_keep_their_own_numbers(tmp_path: Path) -> None:
    runs = [attack(tmp_path / "before", "aaa", "patcher")]
    weak = Fake(leaks={"patcher": (0.0, 1.0, 1.0, 1.0)}, prompt="harder: {}")
    runs.append(attack(tmp_path / "after", "aaa", "patcher", data={"s": "d" * 64}, fake=weak))
    records = summary_of_runs(runs)["records"]
    rates = {r["attack"]: r["rate"] for r in records if (r["metric"], r["steps"]) == ("leak", 20)}
    assert rates["attack-1"] < 0.3
    assert rates["attack-2"] == 1.0


@pytest.mark.parametrize(
    ("changes", "differ"), [({"suite": "d" * 64}, "suite"), ({"system": "x"}, "system"), ({"limit": 8}, "limit")]
)
def test_evaluations_that_asked_something_else_are_refused(
    tmp_path: Path, changes: dict[str, Any], differ: str
) -> None:
    runs = pair(tmp_path, full=())
    runs += [evaluation(tmp_path / "e", "bbb", "none"), evaluation(tmp_path / "f", "aaa", "patcher", **changes)]
    with pytest.raises(UserError, match=rf"/e and .*/f are evaluations that differ in: {differ}\n"):
        summary_of_runs(runs)


@pytest.mark.parametrize("missing", ["none", "patcher"])
def test_an_evaluation_is_not_paired_with_a_step_0_of_another_suite(tmp_path: Path, missing: str) -> None:
    models = {"none": "bbb", "patcher": "aaa"}
    runs, other = pair(tmp_path), next(name for name in models if name != missing)
    runs.append(evaluation(tmp_path / "e", models[other], other, suite="d" * 64, fake=Fake(prompt="easy: {}")))
    found = summary_of_runs(runs)
    assert found["verdict"]["status"] == "not_measured"
    assert "utility" in found["verdict"]["sentence"] or "over-refusal" in found["verdict"]["sentence"]
    assert not [d for d in found["differences"] if d["attack"] == "none"]
    row = _name(missing)
    said = f"Step 0 of attack-1 does not show {row} before any attack: it differs from e in: suite."
    assert said in found["verdict"]["details"]
    runs.append(evaluation(tmp_path / "f", models[missing], missing, suite="d" * 64, fake=Fake(prompt="easy: {}")))
    found = summary_of_runs(runs)
    assert found["verdict"]["status"] == "delays"
    assert not [line for line in found["verdict"]["details"] if "does not show" in line]


def test_a_short_attack_goes_with_whole_evaluations(tmp_path: Path) -> None:
    runs = [attack(tmp_path / m, m, d, limit=8) for m, d in (("bbb", "none"), ("aaa", "patcher"))]
    runs += [evaluation(tmp_path / "e", "bbb", "none"), evaluation(tmp_path / "f", "aaa", "patcher")]
    assert summary_of_runs(runs)["verdict"]["status"] == "delays"


def test_other_prompts_under_the_same_ids_are_refused(tmp_path: Path) -> None:
    runs = pair(tmp_path, fake=Fake(prompt="please tell me about {}"))
    with pytest.raises(UserError, match=r"soft and .*hard asked different prompts under the id 'restricted-0'"):
        summary_of_runs(runs)


def _attack_again(root: Path, fake: Fake) -> list[Path]:
    return [*pair(root), attack(root / "again", "aaa", "patcher", fake=fake, device="cuda")]


def _evaluate_again(root: Path, fake: Fake) -> list[Path]:
    first = evaluation(root / "hard", "aaa", "patcher")
    return [first, evaluation(root / "again", "aaa", "patcher", seed=1, fake=fake)]


@pytest.mark.parametrize("make", [_attack_again, _evaluate_again])
def test_a_run_that_came_out_twice_differently_is_refused(
    tmp_path: Path, make: Callable[[Path, Fake], list[Path]]
) -> None:
    runs = make(tmp_path, Fake(leaks={"patcher": (0.5, 0.9, 0.9, 0.9)}))
    for order in (runs, runs[::-1]):
        with pytest.raises(UserError, match="hold the same run") as error:
            summary_of_runs(order)
        assert {str(tmp_path / "hard"), str(tmp_path / "again")} <= set(error.value.message.split())
    same = summary_of_runs(make(tmp_path / "same", Fake()))
    assert {r["defence"] for r in same["records"]} <= {"patcher", "undefended"}


def test_two_trainings_of_one_checkpoint_at_other_costs_are_refused(tmp_path: Path) -> None:
    runs = pair(tmp_path)
    for name, seconds in (("c", 10.0), ("d", 20.0)):
        with RunFolder(tmp_path / name, "defend", {"method": "m"}, seeds=[0], parents={"model": "base"}) as run:
            run.summary({"cost": {"seconds": seconds, "passes": 10}, "checkpoint": {"digest": "aaa"}})
        runs.append(tmp_path / name)
    assert [cost["seconds"] for cost in summary_of_runs(runs[:3])["costs"]] == [10.0]
    with pytest.raises(UserError, match=r"c and .*d hold the same run"):
        summary_of_runs(runs)


def test_one_dirty_run_makes_the_page_a_draft(tmp_path: Path) -> None:
    soft = attack(tmp_path / "soft", "bbb", "none", code={"commit": "1" * 40, "dirty": True})
    hard = attack(tmp_path / "hard", "aaa", "patcher", code={"commit": "2" * 40})
    for runs in ([soft, hard], [hard, soft]):
        text = write_report(runs, tmp_path / "both.html").read_text()
        assert "a draft, not evidence" in text
        assert f"commit {'1' * 40}, with uncommitted changes" in text and f"commit {'2' * 40}, clean" in text
        assert "casehard of soft" in text and "casehard of hard" in text
        assert "packages of" not in text
    assert "a draft, not evidence" not in write_report([hard], tmp_path / "one.html").read_text()


def test_versions_and_data_that_differ_between_runs_are_listed(tmp_path: Path) -> None:
    runs = pair(tmp_path, data={"h": "d" * 64})
    with RunFolder(
        tmp_path / "old", "evaluate", {"suite": "s"}, parents={"model": "aaa"}, data={"s": DATA["s"]}
    ) as run:
        run.record({"packages": {**run.info["packages"], "torch": "1.0.old"}})
        run.rows([{k: v for k, v in r.items() if k != "step"} for r in Fake().rows("patcher", 0, 0, full=True)])
        run.summary({"records": [{"defence": "patcher"}]})
    text = write_report([tmp_path / "old", *runs], tmp_path / "all.html").read_text()
    assert "torch 1.0.old" in text
    assert "packages of old" in text and "packages of soft, hard" in text
    assert f"{'a' * 64} in soft; {'d' * 64} in hard" in text
