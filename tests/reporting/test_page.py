"""The report is one safe file: escaped, self-contained, the same bytes each time, and it says what it cannot say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import Fake, plan, plan_values

from casehard.benchmark.execute import Outcome, Task
from casehard.benchmark.plan import parse_plan
from casehard.benchmark.run import run_plan
from casehard.benchmark.store import RunFolder, read_json, read_rows
from casehard.errors import Interrupted, MissingExtra, UserError
from casehard.reporting import figures
from casehard.reporting.from_run_folders import summary_of_runs
from casehard.reporting.page import bench_summary, render, write_report

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }} ]]> $x_1$ {}"
LORA = {**plan_values()["attacks"][0], "name": "lora", "mode": "lora", "lr": 1e-3, "title": "LoRA tuning"}


class Tags(HTMLParser):
    """Collects elements and attributes as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished benchmark whose titles, prompts and failures are hostile."""
    out = tmp_path_factory.mktemp("evil")
    values = plan_values(title=f"Evil {EVIL}", not_tested=[EVIL], attacks=[*plan_values()["attacks"], LORA])
    values["defences"][2]["title"] = f"patcher {EVIL}"
    values["attacks"][0]["title"] = f"tuning {EVIL}"
    run_plan(parse_plan(values), out, jobs=1, executor=Fake(prompt=EVIL, fail=("world-0/plain/s2/full_p10",)))
    write_report(out)
    return out


@pytest.fixture(scope="module")
def page(run: Path) -> Tags:
    """Return the page as a browser reads it."""
    return Tags((run / "report.html").read_text())


def test_nothing_untrusted_becomes_markup(run: Path, page: Tags) -> None:
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7*7 }}" in page.text
    (prompt,) = {row["prompt"] for row in read_rows(run / "rows.jsonl") if row["id"] == "restricted-6"}
    assert "<script>" in prompt


def test_nothing_is_fetched(page: Tags) -> None:
    assert not {"link", "iframe", "object", "embed"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#"), (name, value)
        assert "url(http" not in value


def test_the_same_summary_gives_the_same_bytes(run: Path) -> None:
    before = (run / "report.html").read_bytes()
    code = f"from casehard.reporting.page import write_report; write_report({str(run)!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (run / "report.html").read_bytes() == before
    assert not re.search(rb"20\d\d-\d\d-\d\dT", before)


def test_figures_are_inline_and_described(page: Tags) -> None:
    labels = [value for name, value in page.attributes if name == "aria-label"]
    # Two attacks x (leak, ASR), two strips, four quantities before, the plane, two cost charts.
    assert len(labels) == page.tags.count("svg") == 13
    assert any("ends at" in label for label in labels)
    assert "metadata" not in page.tags


def test_ids_of_different_figures_do_not_collide(run: Path) -> None:
    text = (run / "report.html").read_text()
    svgs = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    clips = [set(re.findall(r'<clipPath id="([^"]+)"', svg)) for svg in svgs]
    assert sum(map(len, clips)) == len(set().union(*clips))


def test_the_page_says_what_matters(run: Path, page: Tags) -> None:
    text = " ".join(page.text.replace("\u00a0", " ").split())
    summary = read_json(run / "summary.json")
    assert " ".join(summary["verdict"]["sentence"].split()) in text
    for words in (
        "What was not tested",
        "Benign fine-tuning (harmful share 0)",
        "world-0/plain/s2/full_p10 cannot work",
        "Control: raises ASR by",
        "made no difference",
        summary["provenance"]["config_digest"],
        summary["nodes"][0]["node"][:12],
        "world_seed: 0",
        "/120",
    ):
        assert words in text, words


def test_transcripts_are_shown_for_organisms_only(run: Path) -> None:
    summary = read_json(run / "summary.json")
    rows = list(read_rows(run / "rows.jsonl"))
    assert "What it looks like" in render(summary, rows)
    summary["plan"]["bases"][0]["world_seed"] = None
    assert "What it looks like" not in render(summary, rows)


def test_a_dirty_tree_is_called_a_draft(run: Path) -> None:
    summary = read_json(run / "summary.json")
    for dirty in (True, False):
        summary["provenance"]["code"]["dirty"] = dirty
        assert ("a draft, not evidence" in render(summary)) is dirty


def test_a_plan_that_asked_few_prompts_says_so_beside_the_verdict(tmp_path: Path) -> None:
    run_plan(plan(seeds=[0], limit=4), tmp_path, jobs=1, executor=Fake())
    summary = read_json(tmp_path / "summary.json")
    assert summary["verdict"]["details"][0].startswith("The whole suite: at most 4 prompts a group were asked")
    assert summary["verdict"]["details"][0] in summary["not_tested"]


def test_a_plan_with_one_seed_is_labelled(tmp_path: Path) -> None:
    run_plan(plan(seeds=[0]), tmp_path, jobs=1, executor=Fake())
    text = write_report(tmp_path).read_text()
    assert "single seed" in text


def test_two_families_get_a_verdict_each(tmp_path: Path) -> None:
    bases = [{"name": n, "world_seed": i, "size": s} for i, (n, s) in enumerate([("a", "tiny"), ("b", "small")])]
    run_plan(plan(bases=bases, seeds=[0]), tmp_path, jobs=1, executor=Fake())
    assert len(read_json(tmp_path / "summary.json")["verdicts"]) == 2
    assert write_report(tmp_path).read_text().count('class="sentence"') == 2


def test_without_matplotlib_the_extra_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra) as error:
        render(read_json(run / "summary.json"))
    assert "casehard[report]" in error.value.hint


def attack_run(
    out: Path, model: str, defence: str, *, seed: int = 0, full: tuple[int, ...] = (0, 40), limit: int | None = None
) -> Path:
    """Write what ``casehard attack finetune`` leaves behind."""
    config: dict[str, Any] = {"mode": "full", "share": 0.1, "steps": 40, "lr": 1e-4, "evaluate_at": [0, 5, 20, 40]}
    job = {
        "model": model,
        "harmful": ["h"],
        "benign": ["b"],
        "suite": "s",
        "config": config,
        "seed": seed,
        "limit": limit,
    }
    name = {"none": "undefended"}.get(defence, defence)
    with RunFolder(out, "attack", job, seeds=[seed], parents={"model": model}) as folder:
        folder.rows([row for step in (0, 5, 20, 40) for row in Fake().rows(name, step, seed, full=step in full)])
        folder.summary({"records": [{"defence": defence, "attack": "finetune-full"}]})
    return out


def test_runs_of_single_verbs_make_a_comparison_only_with_a_control(tmp_path: Path) -> None:
    hard = attack_run(tmp_path / "hard", "aaa", "patcher")
    alone = write_report(hard)
    assert alone == hard / "report.html"
    assert "No claim: a single run without the same attack on an undefended checkpoint" in alone.read_text()
    assert alone.read_text().count("<svg") >= 2
    soft = attack_run(tmp_path / "soft", "bbb", "none")
    both = write_report([soft, hard], tmp_path / "both.html").read_text()
    assert "patcher delays the break" in both
    assert "patcher against undefended" in both


def test_a_look_at_few_prompts_is_called_one(tmp_path: Path) -> None:
    runs = [attack_run(tmp_path / name, name, name, limit=8) for name in ("none", "patcher")]
    found = summary_of_runs(runs)
    assert any(
        "at most so many prompts a group were asked (a look, not a result): 8 in none" in d for d in found["not_tested"]
    )
    assert found["not_tested"][-1] in found["verdict"]["details"]
    text = write_report(runs, tmp_path / "both.html").read_text()
    assert "a look, not a result" in text
    assert "fixed in the plan before the runs" not in text


def defend_run(out: Path, made: str, passes: int) -> Path:
    """Write what ``casehard defend`` leaves behind."""
    cost = {"seconds": passes / 10, "passes": passes, "tokens": 1000, "peak_bytes": 10**9, "steps": 30}
    with RunFolder(out, "defend", {"method": "spard", "made": made}, seeds=[0], parents={"model": "base"}) as folder:
        folder.rows([])
        folder.summary({"cost": cost, "checkpoint": {"digest": made, "path": "checkpoint"}})
    return out


def test_plain_training_is_the_control_of_an_alignment_method(tmp_path: Path) -> None:
    runs = [attack_run(tmp_path / "hard", "aaa", "patcher"), attack_run(tmp_path / "soft", "bbb", "plain")]
    runs += [defend_run(tmp_path / "a", "aaa", 300), defend_run(tmp_path / "b", "bbb", 100)]
    runs.append(defend_run(tmp_path / "c", "not measured", 7))
    found = summary_of_runs(runs)
    assert found["verdict"]["status"] == "delays"
    assert "The undefended control is plain: the model aligned by plain training." in found["verdict"]["details"]
    assert {c["defence"]: c["passes_ratio"] for c in found["costs"]} == {"patcher": 3.0, "plain": 1.0}
    text = write_report(runs, tmp_path / "both.html").read_text()
    assert "patcher against plain" in text
    assert "What it costs" in text
    with_base = summary_of_runs([*runs, attack_run(tmp_path / "base", "ccc", "none")])
    assert with_base["plan"]["headline"]["against"] == "undefended"


def test_what_a_method_logged_is_shown_for_single_runs_too(tmp_path: Path) -> None:
    assert "What the methods did" not in write_report(attack_run(tmp_path / "none", "ccc", "none")).read_text()
    runs = [attack_run(tmp_path / "hard", "aaa", "patcher"), defend_run(tmp_path / "a", "aaa", 300)]
    runs += [defend_run(tmp_path / "alone", "never measured", 7), defend_run(tmp_path / "silent", "ddd", 7)]
    logged = {"a": ({"trigger_rate": 0.5, "loss": 9.0}, {"trigger_rate": 0.75, "violation": 0.2})}
    logged["alone"] = ({"trigger_rate": 0.125},)
    for name, rows in logged.items():
        with (tmp_path / name / "events.jsonl").open("a", encoding="utf-8") as events:
            events.writelines(json.dumps({"event": "log", **row}) + "\n" for row in rows)
            events.write(json.dumps({"event": "other", "trigger_rate": 7.0}) + "\n")
    found = summary_of_runs(runs)
    assert found["telemetry"] == [
        {"defence": "patcher", "means": {"trigger_rate": 0.625, "violation": 0.2}},
        {"defence": "alone", "means": {"trigger_rate": 0.125}},
    ]
    text = write_report(runs, tmp_path / "both.html").read_text()
    assert "What the methods did" in text and "trigger rate" in text and "<td>0.625</td>" in text
    assert "<th>alone</th><td>0.125</td><td>-</td>" in text and "silent</th>" not in text


def test_times_taken_side_by_side_are_called_rough(run: Path) -> None:
    assert "seconds" not in read_json(run / "summary.json")["costs"][0]
    summary = bench_summary(run)
    assert "runs at a time" not in render(summary)
    summary["costs"][0]["workers"] = 2
    assert "Taken with 2 runs at a time on one machine: a rough ratio, compare passes." in render(summary)


def test_safety_without_utility_is_no_claim(tmp_path: Path) -> None:
    runs = [attack_run(tmp_path / d, m, d, full=(40,)) for m, d in (("aaa", "patcher"), ("bbb", "none"))]
    text = write_report(runs).read_text()
    assert "No claim: utility and over-refusal could not be measured" in text
    assert "Add the run folders of `casehard evaluate` for both checkpoints" in text.replace("&#96;", "`")


def test_an_evaluation_alone_is_shown(tmp_path: Path) -> None:
    with RunFolder(tmp_path, "evaluate", {"model": "m"}, seeds=[0], parents={"model": "aaa"}) as folder:
        folder.rows([{k: v for k, v in r.items() if k != "step"} for r in Fake().rows("patcher", 0, 0, full=True)])
        folder.summary({"records": [{"defence": "patcher"}]})
    text = write_report(tmp_path).read_text()
    assert "No claim" in text
    assert "Before any attack" in text


def test_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file.*run\.json"):
        write_report(tmp_path)
    RunFolder(tmp_path, "attack", {}).finish("interrupted")
    with pytest.raises(UserError, match="'interrupted', not finished"):
        write_report(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"kind": "judge"}))
    with pytest.raises(UserError, match="'judge'"):
        write_report(tmp_path)


def _stop(task: Task) -> Outcome:
    raise KeyboardInterrupt


def _break(task: Task) -> Outcome:
    raise SystemExit(9)


@pytest.mark.parametrize("changes", [{}, {"seeds": [7, 8]}])
@pytest.mark.parametrize(
    ("executor", "error", "status"), [(_stop, Interrupted, "interrupted"), (_break, SystemExit, "failed")]
)
def test_a_bench_that_did_not_come_to_its_end_has_no_report(
    tmp_path: Path, changes: dict[str, Any], executor: Callable[[Task], Outcome], error: type[Exception], status: str
) -> None:
    run_plan(plan(seeds=[0]), tmp_path, jobs=1, executor=Fake())
    old = write_report(tmp_path).read_bytes()
    with pytest.raises(error):
        run_plan(plan(**{"seeds": [0], **changes}), tmp_path, jobs=1, resume=False, executor=executor)
    assert read_json(tmp_path / "run.json")["status"] == status
    assert (tmp_path / "summary.json").is_file()
    with pytest.raises(UserError, match=f"'{status}', it did not come to its end") as told:
        write_report(tmp_path)
    assert "run the same bench command again" in told.value.hint
    assert (tmp_path / "report.html").read_bytes() == old
    again = run_plan(plan(**{"seeds": [0], **changes}), tmp_path, jobs=1, executor=Fake())
    assert again.exit_code == 0
    assert again.summary["verdict"]["sentence"] in write_report(tmp_path).read_text().replace("\u00a0", " ")


def test_a_bench_that_was_killed_has_no_report(tmp_path: Path) -> None:
    run_plan(plan(seeds=[0]), tmp_path, jobs=1, executor=Fake())
    values = {**read_json(tmp_path / "run.json"), "status": "running"}
    (tmp_path / "run.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="'running', it did not come to its end"):
        write_report(tmp_path)


def test_a_summary_of_another_plan_is_not_reported(tmp_path: Path) -> None:
    run_plan(plan(seeds=[0]), tmp_path / "a", jobs=1, executor=Fake())
    run_plan(plan(seeds=[1]), tmp_path / "b", jobs=1, executor=Fake())
    (tmp_path / "a" / "summary.json").write_bytes((tmp_path / "b" / "summary.json").read_bytes())
    with pytest.raises(UserError, match=r"summary\.json is of the plan \w{12}, and the last bench ran the plan \w{12}"):
        write_report(tmp_path / "a")


def test_failed_nodes_and_a_resumed_bench_have_a_report(tmp_path: Path) -> None:
    label = "world-0/plain/s0/full_p10"
    assert run_plan(plan(seeds=[0]), tmp_path, jobs=1, executor=Fake(fail=(label,))).exit_code == 1
    assert read_json(tmp_path / "run.json")["status"] == "failed"
    assert f"{label} cannot work" in write_report(tmp_path).read_text()
    assert run_plan(plan(seeds=[0]), tmp_path, jobs=1, executor=Fake()).ran == 1
    assert f"{label} cannot work" not in write_report(tmp_path).read_text()


def test_labels_are_moved_apart_and_stay_inside() -> None:
    moved = figures.spread([0.5, 0.5, 0.51, 0.0], 0.1, 0.0, 1.0)
    ordered = sorted(moved)
    assert all(b - a > 0.0999 for a, b in pairwise(ordered))
    assert min(moved) >= 0.0
    assert figures.wrap("plain SFT (same passes)", 14) == "plain SFT\n(same passes)"


def test_every_defence_has_its_own_look() -> None:
    rows = [{"name": str(i), "title": str(i), "role": "defence"} for i in range(3)]
    rows += [{"name": r, "title": r, "role": r} for r in ("undefended", "same_passes", "ablation")]
    found = figures.looks(rows).values()
    assert len({look.colour for look in found}) == 6
    assert len({look.marker for look in found}) == 4
