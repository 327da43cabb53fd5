"""The report as a Markdown page: every number of the tables, made from the summary alone."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

import pytest
from bench_fakes import Fake, plan

from casehard.benchmark.lookup import percent
from casehard.benchmark.run import run_plan
from casehard.cli import main
from casehard.errors import DataError
from casehard.reporting.kept import kept, kept_text
from casehard.reporting.markdown import markdown
from casehard.reporting.page import bench_summary, write_report


def lines(text: str, title: str) -> list[list[str]]:
    """Return the cells of the table under a title, without its head."""
    table = re.search(r"((?:^\|.*\n)+)", text[text.index(f"**{title}**") :], re.M)
    assert table is not None
    return [row.strip("| ").split(" | ") for row in table[1].splitlines()[2:]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the ordinary fake plan."""
    out = tmp_path_factory.mktemp("run")
    run_plan(plan(title="a | b <i>"), out, jobs=1, executor=Fake())
    return out


def test_the_page_holds_the_verdict_and_the_numbers_of_the_summary(run: Path, tmp_path: Path) -> None:
    text = write_report(run, tmp_path / "evidence.md").read_text(encoding="utf-8")
    summary = bench_summary(run)
    assert text == markdown(summary, "casehard bench plans/fake.yaml --out runs/fake")
    assert text.startswith("# a \\| b &lt;i>\n") and "3 runs each: seeds 0, 1, 2 on world-0." in text
    assert f"> {summary['verdict']['sentence']}" in text
    assert all(f"- {line}" in text for line in summary["not_tested"])
    entry = next(p for p in summary["pooled"] if (p["defence"], p["steps"], p["metric"]) == ("patcher", 20, "leak"))
    assert "|  |  | before | step 5 | step 20 | step 40 |" in text
    curves = {(row[0], row[1]): row[2:] for row in lines(text, "Under full-parameter tuning, 10 % harmful")}
    cell = curves["leak, of 40 to 120", "patcher"][2]  # undefended and not attacked it is one model
    low, high = (percent(value).removesuffix(" %") for value in (entry["low"], entry["high"]))
    runs = f"{percent(min(entry['rates'])).removesuffix(' %')} to {percent(max(entry['rates'])).removesuffix(' %')}"
    assert cell == f"{percent(entry['rate']).removesuffix(' %')} [{low}, {high}] ({runs})"
    assert "| plain | 1.00 | 1.00 | 1.00 |" in text and "| patcher | 1.00 | 1.00 | 3.10 |" in text
    # Every table is one: all its lines have as many cells as its head.
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1, table


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the summary of two bases and three seeds."""
    bases = [{"name": f"world-{n}", "world_seed": n, "size": "tiny"} for n in (3, 4)]
    out = tmp_path_factory.mktemp("wide")
    run_plan(plan(bases=bases), out, jobs=1, executor=Fake(fail=("world-4/patcher/s2/full_p10",)))
    return bench_summary(out)


def test_several_bases_are_pooled_and_shown_one_by_one(wide: dict[str, Any]) -> None:
    text = markdown(wide)
    assert "6 runs each: seeds 0, 1, 2 on world-3, world-4." in text
    broke = {(row[1], row[2]): row[3:] for row in lines(text, "Steps to break, run by run")}
    assert broke["leak > 25 %", "world-3"][2] == "40, 40, 40"
    assert broke["leak > 25 %", "world-4"][2] == "40, 40, ?"  # the third failed
    for entry in wide["breaks"]:
        (cells,) = (row[2:] for row in lines(text, "Steps to break") if f"{row[1][:3]}".lower() == entry["metric"][:3])
        steps = [run["step"] for run in entry["runs"]]
        more = f", median {entry['median']}" if len(set(steps)) > 1 else ""
        assert cells[["undefended", "plain", "patcher"].index(entry["defence"])] == f"{entry['text']}{more}"
    shown = {(row[0], row[1]): row[2:] for row in lines(text, "Base by base")}
    for base in ("world-3", "world-4"):
        at = {"metric": "leak", "attack": "full_p10", "steps": 20, "defence": "plain", "base": base}
        rates = [r["rate"] for r in wide["records"] if at.items() <= r.items()]
        each = ", ".join(percent(rate).removesuffix(" %") for rate in rates)
        cells = shown["leak, step 20 of full-parameter tuning, 10 % harmful", base]
        assert len(rates) == 3 and cells[1] == f"{percent(sum(rates) / 3)} ({each})"
    assert ("utility, before any attack", "world-4") in shown
    headline = "patcher, the headline: leak, step 20 of full-parameter tuning, 10 % harmful"
    assert [row[0] for row in lines(text, headline)] == ["undefended", "plain"]


def test_a_part_of_a_page_has_no_title_and_its_headings_are_lower(wide: dict[str, Any]) -> None:
    text = markdown(wide, "casehard bench plans/fake.yaml --out runs/fake", below=3)
    assert text.startswith("```sh\n") and re.findall(r"^#+ .*", text, re.M) == [
        "#### What was not tested",
        "#### What did not finish",
    ]


def test_what_is_kept_makes_the_same_page_and_is_small(run: Path, wide: dict[str, Any]) -> None:
    for summary in (bench_summary(run), wide):
        stored = kept(summary)
        assert json.loads(kept_text(stored)) == stored
        for below in (0, 2):
            assert markdown(stored, "run it", below=below) == markdown(summary, "run it", below=below)
        assert len(kept_text(stored)) < len(json.dumps(summary)) / 3
        assert not {"nodes", "telemetry", "controls"} & set(stored) and ".jsonl" not in kept_text(stored)


PLACES = ("/" + "home/somebody/rows.jsonl", "see C:" + "\\rows", f"ran on {platform.node() or 'localhost'}")


@pytest.mark.parametrize("text", PLACES)
def test_what_tells_where_a_run_was_made_is_not_kept(run: Path, text: str) -> None:
    summary = bench_summary(run)
    with pytest.raises(DataError, match="stands in the summary"):
        kept({**summary, "not_tested": [text]})
    kept({**summary, "not_tested": ["and/or, 25 / 25, https://example.org/page, data/rows.jsonl"]})


def test_a_file_of_another_kind_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--out", str(tmp_path / "page")]) == 2
    assert "neither .html nor .md" in capsys.readouterr().err and not list(tmp_path.iterdir())
