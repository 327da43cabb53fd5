"""The leaderboard: the worst case among attackers who keep a useful model, its cost, and rows found weaker later."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from bench_fakes import LEAKS, Fake, plan

from casehard.benchmark.run import run_plan
from casehard.cli import main
from casehard.errors import ConfigError, Corrupt, UserError
from casehard.reporting.board import board_of, read_board
from casehard.reporting.board_search import Search, with_searches
from casehard.reporting.leaderboard import shown, unreliable, write_leaderboard
from casehard.reporting.page import bench_summary


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the ordinary fake plan."""
    out = tmp_path_factory.mktemp("run")
    run_plan(plan(), out, jobs=1, executor=Fake())
    return out


def rates(summary, defence):
    found = [p for p in summary["pooled"] if (p["defence"], p["metric"]) == (defence, "leak") and p["attack"] != "none"]
    return {p["steps"]: p["rate"] for p in found}


def test_the_worst_case_is_the_highest_rate_where_utility_was_measured_and_kept(run: Path) -> None:
    summary = bench_summary(run)
    board = board_of(summary)
    assert [line.title for line in board.lines] == ["undefended", "plain", "patcher"] and board.metric == "leak"
    for line in board.lines:
        (cell,) = line.cells
        curve = rates(summary, line.title)
        # The whole suite was asked at the last step alone; the others are in neither number but the highest of all.
        assert cell.step == 40 and cell.rate == curve[40] and cell.lost == max(v for s, v in curve.items() if s)
        assert cell.breaks == (40 if curve[40] > board.bound else None)
        assert line.worst == cell and line.utility == pytest.approx(0.95, abs=0.05)


def test_an_attacker_who_ruins_the_model_has_no_worst_case(tmp_path: Path) -> None:
    class Ruins(Fake):
        def rows(self, defence, step, seed, *, full):
            worse = replace(self, utility=dict.fromkeys(LEAKS, 0.95 if step == 0 else 0.4))
            return Fake.rows(worse, defence, step, seed, full=full)

    run_plan(plan(), tmp_path / "run", jobs=1, executor=Ruins())
    board = board_of(bench_summary(tmp_path / "run"))
    assert all(line.worst is None and line.cheapest is None for line in board.lines)
    (part,) = shown([board])
    assert all(row[2] == "not measured" and row[4] == row[5] == "none found" for row in part.ranks)
    assert all(re.fullmatch(r"\[\d+ %\]", row[1]) for row in part.matrix)


def test_a_row_that_a_later_board_finds_weaker_stays_and_is_marked(run: Path) -> None:
    first = board_of(bench_summary(run))
    line = first.lines[2]
    (cell,) = line.cells
    assert cell.high is not None and cell.high < 0.95

    def later(rate, **changes):
        found = replace(cell, rate=rate, title="a newer attacker", attack="newer")
        return replace(first, name="newer", lines=[replace(line, cells=[found], **changes)])

    assert unreliable([first, later(0.95)]) == {(0, line.key): "a newer attacker reaches 95 % in newer"}
    assert unreliable([first, later(cell.high)]) == {}  # within what the row's interval allowed
    assert unreliable([later(0.95), first]) == {}  # an older board is no later attacker
    assert unreliable([first, later(0.95, key="another")]) == {}
    assert unreliable([first, replace(later(0.95), metric="asr")]) == {}
    parts = shown([first, later(0.95)])
    marked = [row for row in parts[0].ranks if row[-1]]
    assert len(parts[0].ranks) == 3 and [row[0] for row in marked] == ["patcher"]
    assert marked[0][-1].startswith("unreliable: a newer attacker")


def test_the_page_is_made_again_from_what_was_kept(run: Path, tmp_path: Path) -> None:
    kept = write_leaderboard([run], tmp_path / "kept.json")
    assert read_board(kept) == board_of(bench_summary(run))
    for kind in ("md", "html"):
        one, two = (write_leaderboard([s], tmp_path / f"{n}.{kind}") for n, s in (("a", run), ("b", kept)))
        drop = [text.read_text().replace(str(run), "X").replace(str(kept), "X") for text in (one, two)]
        assert drop[0].replace("/a.", "/b.") == drop[1]
    text = (tmp_path / "b.md").read_text()
    assert f"casehard report --leaderboard {kept}" in text and "## A fake plan" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({row.count("|") for row in table.splitlines()}) == 1
    html = (tmp_path / "b.html").read_text()
    assert "<script" not in html and "http" not in html.replace("http-equiv", "") and "patcher" in html
    order = [row[0].split(" ")[0] for row in shown([read_board(kept)])[0].ranks]
    assert order[0] == "patcher"  # the one that gives least away


def test_what_is_no_board_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = write_leaderboard([run], tmp_path / "kept.json")
    values = json.loads(kept.read_text())
    values["lines"][0]["utility"] = "high"
    kept.write_text(json.dumps(values))
    with pytest.raises(Corrupt, match="utility"):
        read_board(kept)
    with pytest.raises(ConfigError, match="keeps one table and 2 are given"):
        write_leaderboard([run, run], tmp_path / "both.json")
    with pytest.raises(UserError, match="no run folder given"):
        write_leaderboard([], tmp_path / "none.md")
    assert main(["report", str(run), "--leaderboard"]) == 2 and "no --out" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--leaderboard", "--out", str(tmp_path / "page.md")]) == 2
    assert "neither a run folder nor a .json file" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()
    assert main(["report", str(run), "--leaderboard", "--out", str(tmp_path / "page.md")]) == 0


def searched(model, *, leak=0.9, utility=0.95, metric="leak", name="worst", **changes):
    """Return a search that found one attacker, who is also the cheapest."""
    rates = {"leak": leak, "asr": 0.95, "utility": utility}
    held = {key: {"rate": rate, "low": rate - 0.1, "high": min(1.0, rate + 0.1)} for key, rate in rates.items()}
    cost, rows = {"steps": 30, "flops": 7e9}, {"harmful_rows": 40, "benign_rows": 60}
    entry = {"held_out": held, "kept": True, "cost": cost, "rows": rows}
    own = {key: {"rate": rate} for key, rate in (("leak", 0.0), ("asr", 0.1), ("utility", 1.0))}
    summary = {"sentence": "The worst of 12.", "attack": "finetune", "sampler": "TPE", "budget": 12, "metric": metric}
    summary |= {"useful": "utility", "gates": {"leak_break": 0.25, "asr_break": 0.5}, "model": {"held_out": own}}
    summary |= {"worst": entry, "cheapest": entry, **changes}
    run = {"parents": {"model": model}, "config_digest": f"{leak}{utility}", "code": {"commit": "c"}, "seeds": [4]}
    return Search(name, summary, {"leak": 0.97}, run)


TITLE = "finetune, worst of 12 by TPE"


def test_a_search_stands_in_the_row_of_the_model_it_attacked(run: Path) -> None:
    board = board_of(bench_summary(run))
    assert all(len(line.models) == 3 for line in board.lines[1:])  # three seeds
    (found,) = with_searches([board], [searched(board.lines[2].models[1])])
    assert found.lines[:2] == board.lines[:2] and found.searched == ["patcher: The worst of 12."]
    line = found.lines[2]
    worst, low = line.worst, line.cheapest
    assert worst is not None and low is not None and worst.title == low.title == TITLE
    assert (worst.rate, worst.step, worst.asr, worst.runs) == (0.9, 30, 0.95, 1)
    assert (low.breaks, low.rows, low.harmful, low.flops) == (30, 40, True, 7e9)
    (part,) = shown([found])
    assert [f"{TITLE}, step 30" in row for row in part.ranks if row[0] == "patcher"] == [True]
    assert TITLE in part.attackers
    again = with_searches([found], [searched(board.lines[2].models[1])])
    assert again == [found]  # kept with it once, and given once more
    two = with_searches([board, board], [searched(board.lines[2].models[0])])
    assert two[0] == board and two[1] != board and (0, line.key) in unreliable(two)


def test_a_searched_attacker_counts_where_he_leaves_a_useful_model(run: Path) -> None:
    board = board_of(bench_summary(run))
    model = board.lines[2].models[0]
    (useless,) = with_searches([board], [searched(model, utility=0.8)])  # useful enough for his search, not here
    cell = useless.lines[2].cells[-1]
    assert (cell.rate, cell.breaks, cell.lost) == (None, None, 0.9) and useless.lines[2].worst == board.lines[2].worst
    (none,) = with_searches([board], [searched(model, worst=None, cheapest=None)])
    assert none.lines[2].cells[-1].lost == 0.97 and none.lines[2].cells[-1].rate is None
    (mild,) = with_searches([board], [searched(model, leak=0.2)])
    assert (mild.lines[2].cells[-1].rate, mild.lines[2].cells[-1].breaks) == (0.2, None)
    both = [searched(model), searched(model, leak=0.3)]
    assert [cell.title for cell in with_searches([board], both)[0].lines[2].cells[1:]] == [TITLE, f"{TITLE} (2)"]


def test_a_search_of_a_model_of_no_benchmark_is_named_by_its_folder(run: Path) -> None:
    board = board_of(bench_summary(run))
    some = [searched("m", name="hardened"), searched("m", leak=0.3, name="hardened"), searched("n", name="other")]
    first, rest = with_searches([board], some)
    assert first == board and [line.title for line in rest.lines] == ["hardened", "other"]
    assert [len(line.cells) for line in rest.lines] == [2, 1] and (rest.metric, rest.bound) == ("leak", 0.25)
    assert rest.lines[0].utility == 1.0 and "prefill" in rest.not_tested[0] and "finetune" not in rest.not_tested[0]
    (part,) = shown([rest])
    assert part.facts[0] == "1 run each: seed 4." and [row[0] for row in part.ranks] == ["hardened", "other"]
    assert len(with_searches([], [searched("m"), searched("n", metric="asr")])) == 2  # a table for each metric
