"""The report as a Markdown page: every number of the tables, made from the summary alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from bench_fakes import Fake, plan

from casehard.benchmark.run import run_plan
from casehard.cli import main
from casehard.reporting.markdown import markdown
from casehard.reporting.page import bench_summary, write_report


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the ordinary fake plan."""
    out = tmp_path_factory.mktemp("run")
    run_plan(plan(title="a | b <i>"), out, jobs=1, executor=Fake())
    return out


def test_the_page_holds_the_verdict_and_the_numbers_of_the_summary(run: Path, tmp_path: Path) -> None:
    text = write_report(run, tmp_path / "evidence.md").read_text(encoding="utf-8")
    summary = bench_summary(run)
    assert text == markdown(summary, "casehard bench plans/fake.yaml")
    assert text.startswith("# a \\| b &lt;i>\n") and "3 runs each (3 seeds on 1 base)" in text
    assert f"> {summary['verdict']['sentence']}" in text
    assert all(f"- {line}" in text for line in summary["not_tested"])
    entry = next(p for p in summary["pooled"] if (p["defence"], p["steps"], p["metric"]) == ("patcher", 20, "leak"))
    row = next(line for line in text.splitlines() if line.startswith("| leak, step 20 "))
    assert f"{entry['k']}/{entry['n']}" in row and f"{entry['rate'] * 100:.0f} % (" in row
    assert "| plain | 1.00 | 1.00 | 1.00 |" in text and "| patcher | 1.00 | 1.00 | 3.10 |" in text
    # Every table is one: all its lines have as many cells as its head.
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.replace("\\|", "").count("|") for line in table.splitlines()}) == 1, table


def test_a_file_of_another_kind_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--out", str(tmp_path / "page")]) == 2
    assert "neither .html nor .md" in capsys.readouterr().err and not list(tmp_path.iterdir())
