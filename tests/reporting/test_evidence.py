"""Pages of evidence are what docs/generate_evidence.py makes of the stored summaries; nobody edits their tables."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from bench_fakes import Fake, plan

from casehard.benchmark.run import run_plan
from casehard.benchmark.store import read_json
from casehard.errors import ConfigError, DataError, UserError
from casehard.reporting.markdown import markdown
from casehard.reporting.page import bench_summary

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "generate_evidence.py"
TYPED = "# A page\n\nTyped above.\n\n### A part\n\n{}\n\nTyped below.\n"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_evidence", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


evidence = load()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    run_plan(plan(seeds=[0]), out, jobs=1, executor=Fake())
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path


def marks(*names: str, between: str = "") -> str:
    return f"<!-- generated from {' '.join(f'data/{name}.json' for name in names)} -->\n{between}<!-- end -->"


def test_every_page_is_what_its_stored_summaries_make_without_torch() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'matplotlib', 'jinja2', 'requests')));"
        "sys.path.insert(0, sys.argv[1]); import generate_evidence as g;"
        "print([p.name for p, text in g.pages().items() if p.read_text(encoding='utf-8') != text])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(SCRIPT.parent)], capture_output=True, text=True, env={**os.environ}
    )
    assert done.stdout == "[]\n", f"run python docs/generate_evidence.py: {done.stdout or done.stderr}"


def test_a_stored_run_fills_its_part_and_leaves_what_was_typed(run: Path, folder: Path) -> None:
    path = evidence.store(run, "fake", folder)
    page = folder / "page.md"
    page.write_text(TYPED.format(marks("fake", between="| edited | by | hand |\n")), encoding="utf-8")
    ((made, text),) = evidence.pages(folder).items()
    assert made == page and read_json(path)["provenance"]["code"] == bench_summary(run)["provenance"]["code"]
    command = "casehard bench plans/fake.yaml --out runs/fake"
    whole = markdown(bench_summary(run), command, below=3).strip()
    assert text == TYPED.format(marks("fake", between=f"\n{whole}\n\n")) and "#### What was not tested" in text
    page.write_text(text, encoding="utf-8")
    assert evidence.pages(folder) == {page: text}
    # Above the first heading the part is the whole page; a comment in a block of shell is no heading.
    page.write_text(f"```sh\n# a comment\n```\n{marks('fake')}\n", encoding="utf-8")
    assert "\n# A fake plan\n" in evidence.pages(folder)[page]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nothing", r"fake\.json is on no page"),
        (marks("fake", "gone"), r"page\.md is generated from .*gone\.json, which does not exist"),
        (marks("fake") + "\n<!-- end -->", r"page\.md: a comment about generated parts stands alone"),
        ("<!-- generated from data/fake.json -->", r"page\.md: a comment about generated parts stands alone"),
        (marks("fake", between=marks("fake") + "\n"), r"page\.md: a comment about generated parts stands alone"),
        ("see " + marks("fake"), r"page\.md: a comment about generated parts stands alone"),
    ],
)
def test_a_page_that_cannot_be_made_is_refused(
    run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    evidence.store(run, "fake", folder)
    first = folder / "a.md"
    first.write_text(marks("fake") if "nothing" not in text else "typed", encoding="utf-8")
    before = first.read_text(encoding="utf-8")
    (folder / "page.md").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=says):
        evidence.pages(folder)
    monkeypatch.setattr(evidence.pages, "__defaults__", (folder,))
    assert evidence.main([]) == DataError.exit_code and "hint: " in capsys.readouterr().err
    assert first.read_text(encoding="utf-8") == before


def test_only_a_finished_benchmark_under_a_plain_name_is_stored(run: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match="no name for a stored summary"):
        evidence.store(run, "../fake", folder)
    with pytest.raises(UserError):
        evidence.store(folder, "fake", folder)
    assert evidence.main(["--store", str(run)]) == ConfigError.exit_code
    assert not list((folder / "data").iterdir())
