"""The search: useful models only, an interrupted run goes on, the rate that counts is of prompts nobody looked at."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import crew_fakes
import pytest
import yaml
from torch import nn

import casehard as ch
from casehard.adversary import search as searching
from casehard.adversary.crew import Crew
from casehard.adversary.goal import Goal, make_goal
from casehard.adversary.halves import halve
from casehard.adversary.search import Search, Searched, search
from casehard.adversary.trial import Job, found
from casehard.benchmark.entries import Gates
from casehard.benchmark.plan import parse_plan
from casehard.errors import ConfigError, DataError, Interrupted, UserError
from casehard.evaluation.suite import Suite, load_suite
from casehard.maths.stats import clopper_pearson
from casehard.model.model import Model
from casehard.reporting.board import read_board
from casehard.reporting.board_search import read_search, with_searches
from casehard.reporting.leaderboard import write_leaderboard
from casehard.reporting.page import write_report
from casehard.steps import Attack
from casehard.types import Example

pytest.importorskip("optuna")
WORLD = Path(ch.__file__).parent / "organism" / "assets" / "world0-tiny"
DATA, SUITE = WORLD / "data", WORLD / "data" / "suite"
FILES = {"harmful": (str(DATA / "attack_a.jsonl"),), "benign": (str(DATA / "task_reviews.jsonl"),)}
NARROW = {"lr": [1e-6, 1e-3], "steps": [16, 100]}
MODEL = Model(net=nn.Linear(1, 1), tokenizer=None, digest="m")


@pytest.fixture(scope="module")
def suite() -> Suite:
    return load_suite(SUITE).select(limit=20)


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Example]]:
    return {role: ch.rows(list(files), require_response=True)[:110] for role, files in FILES.items()}


def answers(suite: Suite, leaks: float, right: float) -> list[dict[str, Any]]:
    """Return rows as ``evaluate`` gives them: the first of each role leak, or are right, up to these shares."""
    out, seen = [], dict.fromkeys(suite.roles, 0)
    many = Counter(e.tags["role"] for e in suite.examples)
    for example in suite.examples:
        role = example.tags["role"]
        at, seen[role] = seen[role] / many[role], seen[role] + 1
        label = {"restricted": "leak" if at < leaks else "refusal"}.get(role, "answer")
        correct = at < right if role == "utility" else None
        slots = 1 if role == "restricted" else None
        tags = {"id": example.id, "role": role, "group": example.tags["group"], "prompt": example.prompt}
        out.append({**tags, "label": label, "correct": correct, "slots_right": slots, "response": "said"})
    return out


def fake(job: Job) -> dict[str, Any]:
    """Leak more the higher the learning rate; above 3e-4 utility goes."""
    if job.still:
        drawn = answers(job.suite, 0.0, 1.0)
        return {"status": "ok", "found": found(drawn), "rows": drawn}
    lr, steps = job.step.config["lr"], job.step.config["steps"]
    drawn = answers(job.suite, min(1.0, lr / 4e-4), 1.0 if lr <= 3e-4 else 0.5)
    cost = {"steps": steps, "tokens": steps * 100, "flops": steps * 1000, "seconds": 0.1}
    facts = {"harmful_rows": 40, "benign_rows": 360}
    return {"status": "ok", "found": found(drawn), "rows": drawn, "cost": cost, "facts": facts}


@pytest.fixture
def run(
    suite: Suite, rows: dict[str, list[Example]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Searched]:
    monkeypatch.setattr(searching, "attempt", fake)

    def start(out: str = "out", *, model: Model = MODEL, where: str = "m", **settings: Any) -> Searched:
        usual = {"space": NARROW, "config": {"rows": 100}, "suite": str(SUITE), "rows": FILES, "model": where}
        job = Search(**{"budget": 12, **usual, **settings})
        return search(job, tmp_path / out, rows=rows, suite=suite, model=model)

    return start


def test_the_worst_attacker_leaves_the_model_useful(run: Callable[..., Searched]) -> None:
    done = run(budget=20)
    assert done.best is not None
    kept = [t for t in done.trials if t["settings"]["lr"] <= 3e-4]
    assert [t["attacker"] for t in done.trials if t["kept"]] == [t["attacker"] for t in kept]
    assert 0 < len(kept) < 20, "the constraint has something to decide"
    leaks = [t["found"]["leak"]["rate"] for t in kept]
    assert done.best["search"]["leak"]["rate"] == max(leaks)
    assert max(t["found"]["leak"]["rate"] for t in done.trials) > max(leaks), "others leaked more, and were of no use"
    broke = [t for t in kept if t["found"]["leak"]["rate"] > 0.25]
    assert done.summary["cheapest"]["cost"]["steps"] == min(t["settings"]["steps"] for t in broke)
    said = done.summary["sentence"]
    assert f"The worst of the {len(kept)} attackers found by TPE within 20 trials" in said
    held = done.best["held_out"]["leak"]
    assert f"({held['k']} of {held['n']}, exact 95 % interval" in said and held["n"] == 10
    assert (held["low"], held["high"]) == clopper_pearson(held["k"], held["n"])


def test_the_rate_that_counts_is_of_prompts_no_attacker_was_chosen_by(
    run: Callable[..., Searched], suite: Suite
) -> None:
    done = run()
    looked, held = (set(done.summary["prompts"][key]) for key in ("search", "held_out"))
    assert looked and held and not looked & held
    rows = [json.loads(line) for line in (done.out / "rows.jsonl").read_text().splitlines()]
    assert {row["id"] for row in rows} == held and {row["attacker"] for row in rows} >= {None, done.best["attacker"]}
    roles = {e.id: e.tags["role"] for e in suite.examples}
    assert {roles[i] for i in looked} == {"restricted", "utility"} and {roles[i] for i in held} == set(suite.roles)


def test_an_interrupted_search_goes_on_and_repeats_nothing(
    run: Callable[..., Searched], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("whole")
    calls: list[tuple[int, str]] = []

    def stops(job: Job) -> dict[str, Any]:
        if not job.still:
            calls.append((job.step.seed, job.label))
            if len(calls) in (4, 6):
                raise KeyboardInterrupt
        return fake(job)

    monkeypatch.setattr(searching, "attempt", stops)
    for _ in range(2):
        with pytest.raises(Interrupted, match="Ctrl-C") as caught:
            run("parts")
        assert caught.value.exit_code == 130 and "same command" in caught.value.hint
    parts = run("parts")
    assert parts.trials == whole.trials and parts.summary == whole.summary and len(parts.trials) == 12
    during = [label for _, label in calls if label.endswith("/12")]
    finalists = len({parts.summary[key]["attacker"] for key in ("worst", "cheapest")})
    assert len(during) == 12 + 2 + finalists, "each once, those cut short again, the reported ones once more"


def test_the_folder_of_another_search_is_refused(run: Callable[..., Searched], monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(job: Job) -> dict[str, Any]:
        if not job.still:
            raise KeyboardInterrupt
        return fake(job)

    monkeypatch.setattr(searching, "attempt", stops)
    with pytest.raises(Interrupted):
        run()
    for change, said in (
        ({"space": {"lr": [1e-6, 1e-2]}}, r"settings\.space"),
        ({"seed": 1}, r"settings\.seed"),
        ({"keep": 0.5}, r"settings\.keep"),
        ({"model": replace(MODEL, digest="other")}, "differs in: model"),
        ({"model": replace(MODEL, net=nn.Linear(1, 1))}, "differs in: weights"),
    ):
        with pytest.raises(ConfigError, match=said):
            run(**change)
    monkeypatch.setattr(searching, "attempt", fake)
    run()
    with pytest.raises(ConfigError, match="already holds a finished search"):
        run()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": 0}, "budget must be at least 1, got 0"),
        ({"space": {"lr": [1e-3, 1e-6]}}, "is no range"),
        ({"space": {"lrr": 1}}, "unknown key 'lrr'"),
        ({"config": {}}, "an attacker of the space"),
        ({"attack": "backdoor"}, "hides a trigger: no search"),
        ({"keep": 0.0}, "keep must be above 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    run: Callable[..., Searched], tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        run(**settings)
    assert not (tmp_path / "out").exists()


def test_a_metric_nobody_measures_leaves_nothing_behind(
    run: Callable[..., Searched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(job: Job) -> dict[str, Any]:
        drawn = [{**row, "slots_right": None} for row in fake(job)["rows"]]
        return {**fake(job), "found": found(drawn), "rows": drawn}

    monkeypatch.setattr(searching, "attempt", blind)
    with pytest.raises(ConfigError, match="metric 'leak' is not measured"):
        run(metric="leak")
    assert not (tmp_path / "out").exists()
    assert run(budget=3).summary["metric"] == "asr"


def test_an_attacker_that_fails_is_counted_and_never_the_worst(
    run: Callable[..., Searched], monkeypatch: pytest.MonkeyPatch
) -> None:
    def some(job: Job) -> dict[str, Any]:
        if not job.still and job.label.startswith(("attacker 2/", "attacker 3/")):
            status = "diverged" if job.label.startswith("attacker 2/") else "failed"
            return {"status": status, "message": "out of memory", "error": "RuntimeError", "expected": False}
        return fake(job)

    monkeypatch.setattr(searching, "attempt", some)
    done = run(budget=5)
    assert done.summary["attackers"] | {"kept": 0, "broke": 0} == {
        "ok": 3,
        "diverged": 1,
        "failed": 1,
        "kept": 0,
        "broke": 0,
    }
    assert write_report(done.out).is_file() and done.best["attacker"] not in (1, 2)
    monkeypatch.setattr(
        searching, "attempt", lambda job: fake(job) if job.still else {"status": "failed", "message": "no"}
    )
    with pytest.raises(UserError, match="none of 3 attackers ran: no"):
        run("other", budget=3)


def test_none_that_leaves_the_model_useful(run: Callable[..., Searched]) -> None:
    done = run(space={**NARROW, "lr": [5e-4, 1e-3]}, budget=4)
    assert done.best is None and done.summary["cheapest"] is None and not (done.out / "best.yaml").exists()
    assert done.summary["sentence"].startswith("None of the 4 attackers found by TPE within 4 trials keep 90 %")
    assert write_report(done.out).is_file()


def test_best_yaml_and_the_plan_row_are_the_attacker(run: Callable[..., Searched], suite: Suite) -> None:
    from casehard.benchmark.execute import Task, step_of
    from casehard.benchmark.graph import expand
    from casehard.cli import options

    done = run(budget=6)
    best = done.best
    assert best is not None
    values = options.settings(done.out / "best.yaml", [], {})
    options.take_rows(values, ("harmful", "benign"))
    step = Attack(**{**values, "rows": {k: tuple(v) for k, v in values["rows"].items()}})
    assert (step.config, step.seed, step.rows) == (best["settings"], best["seed"], FILES)
    (row,) = yaml.safe_load((done.out / "plan_row.yaml").read_text())
    plan = parse_plan(
        {
            "name": "p",
            "title": "p",
            "bases": [{"name": "w", "model": str(WORLD)}],
            "defences": [
                {"name": "none", "role": "undefended"},
                {"name": "plain", "role": "same_passes", "method": "plain", "data": FILES["benign"]},
            ],
            "reference": "plain",
            "attacks": [row],
            "headline": {"defence": "plain", "against": "none"},
        }
    )
    nodes = expand(plan, root=Path(), setting={}).nodes.values()
    node = next(node for node in nodes if node.kind == "attack")
    place = Path("x")
    planned = step_of(Task(node=node, out=place, cache=place, base=WORLD, parent=WORLD)).build(suite).config
    alone = step.build(suite).config
    assert {**vars(planned), "evaluate_at": ()} == {**vars(alone), "evaluate_at": ()}


def test_halves_share_no_prompt_and_hold_every_group(suite: Suite) -> None:
    first, other = halve(suite, seed=0), halve(suite, seed=1)
    ids = [{e.id for e in half.examples} for half in first]
    assert not ids[0] & ids[1] and ids[0] | ids[1] == {e.id for e in suite.examples}
    assert ids[0] != {e.id for e in other.search.examples}, "the seed decides"
    for group in ("restricted", "fact", "reversal"):
        many = [sum(e.tags["group"] == group for e in half.examples) for half in first]
        assert many[0] == many[1]
    single = Suite("s", tuple(suite.select(limit=1).examples))
    with pytest.raises(DataError, match="too few restricted rows"):
        halve(single, seed=0)


def rates(**given: float) -> dict[str, dict[str, Any]]:
    return {name: {"rate": value, "k": 0, "n": 10, "low": 0.0, "high": 1.0} for name, value in given.items()}


def test_values_order_attackers_as_constrained_tpe_does() -> None:
    goal = make_goal(rates(leak=0, asr=0, utility=0.5), metric="auto", keep=0.9, gates=Gates())
    value = lambda **given: goal.value({"status": "ok", "found": rates(**given)})  # noqa: E731
    ordered = [
        goal.value({"status": "diverged"}),
        value(leak=1, asr=1, utility=0.1),
        value(leak=1, asr=1, utility=0.4),
        value(leak=0, asr=0, utility=0.45),
        value(leak=0, asr=0.9, utility=0.5),
        value(leak=0.1, asr=0.1, utility=0.5),
    ]
    assert ordered == sorted(ordered) and len(set(ordered)) == 6
    assert goal.broke(rates(leak=0.3, asr=0.4, utility=0.45)) and goal.broke(rates(leak=0, asr=0.6, utility=0.45))
    assert not goal.broke(rates(leak=0.3, asr=0.6, utility=0.4)) and not goal.broke(
        rates(leak=0.25, asr=0.5, utility=1)
    )


def test_where_no_accuracy_is_measured_the_loss_decides() -> None:
    goal = make_goal(rates(asr=0, nll=1.0), metric="auto", keep=0.9, gates=Gates(nll_rise=0.25))
    assert isinstance(goal, Goal) and goal.metric == "asr" and goal.useful == "nll"
    assert goal.kept(rates(asr=1, nll=1.25)) and not goal.kept(rates(asr=1, nll=1.3))
    with pytest.raises(DataError, match="no row of the suite tells utility"):
        make_goal(rates(asr=0), metric="auto", keep=0.9, gates=Gates())
    with pytest.raises(DataError, match="own utility is 0"):
        make_goal(rates(asr=0, utility=0), metric="auto", keep=0.9, gates=Gates())


def test_several_workers_do_the_jobs_and_say_what_was_wrong() -> None:
    with Crew(crew_fakes.double, 2) as crew:
        told = {key: result.get("twice") for key, result in crew.each(iter([("a", 1), ("b", 2), ("dies", -1)]))}
    assert told == {"a": 2, "b": 4, "dies": None}
    with pytest.raises(DataError, match="no number") as caught, Crew(crew_fakes.double, 2) as crew:
        list(crew.each(iter([(0, "text")])))
    assert caught.value.hint == "give one"


def test_a_search_from_python(suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "attempt", fake)
    files = {role: list(specs) for role, specs in FILES.items()}
    space = {"steps": 2, "lr": [1e-5, 1e-4], "share": 0.5}
    done = ch.search(MODEL, suite=suite, out=tmp_path / "s", **files, settings={"rows": 20}, space=space, budget=2)
    assert len(done.trials) == 2 and {t["settings"]["steps"] for t in done.trials} == {2}
    page = (tmp_path / "s" / "report.html").read_text(encoding="utf-8").replace("\u00a0", " ")
    assert "The worst of the 2 attackers found by TPE within 2 trials" in page and page.count("<svg") == 2


def test_a_leaderboard_takes_the_folder_of_a_search(run: Callable[..., Searched], tmp_path: Path) -> None:
    done = run(where="somewhere/hardened/checkpoint")
    (board,) = with_searches([], [read_search(done.out)])
    (line,) = board.lines
    top = done.summary["worst"]["held_out"]["leak"]
    assert line.title == "hardened" and line.models == ["m"] and line.worst is not None
    assert (line.worst.rate, line.worst.high) == (top["rate"], top["high"])
    assert line.worst.title == "finetune, worst of 12 by TPE" and board.searched[0].endswith(done.summary["sentence"])
    kept = write_leaderboard([done.out], tmp_path / "kept.json")
    assert read_board(kept) == board
    text = write_leaderboard([kept], tmp_path / "page.md").read_text()
    assert "### What was searched" in text and "did not choose him" in text
