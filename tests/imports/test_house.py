"""House rules that a test can hold: sizes, docs for every method, plain files, one version, a README that is true."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import casehard
from casehard.attacks import ATTACKS
from casehard.defences import DEFENCES
from casehard.evaluation.judges import JUDGES
from command_lines import commands, faults, shell_lines

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "casehard"
SOURCES = sorted(PACKAGE.rglob("*.py"))
CATALOGUES = {"methods": DEFENCES, "attacks": ATTACKS, "judges": JUDGES}
MODULE_LINES, FUNCTION_LINES, METHOD_LINES, METHOD_WORDS = 400, 60, 350, 900

# "path" or "path::function" -> why it may be longer. Empty is best.
EXCEPTIONS: dict[str, str] = {
    "api.py::defend": "the public call: its 20 parameters take two lines each, one to declare and one to explain",
}


def tracked() -> list[Path]:
    """Return every file of the project: what git knows or would add, or the whole tree without git."""
    try:
        listing = subprocess.run(
            ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True, check=True
        ).stdout.decode()
        paths = [ROOT / line for line in listing.splitlines()]
    except (OSError, subprocess.CalledProcessError):
        skip = {".venv", ".git", "runs", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".hypothesis"}
        paths = [p for p in ROOT.rglob("*") if not skip & set(p.relative_to(ROOT).parts)]
    return [p for p in paths if p.is_file() and not p.is_symlink()]


def text_files() -> list[Path]:
    """Return the files that people read or write by hand."""
    kinds = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".j2", ".cfg", ".sh", ""}
    return [p for p in tracked() if p.suffix in kinds or p.name in ("Makefile", "run")]


def lines(path: Path) -> int:
    """Count lines."""
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sizes(path):
    name = path.relative_to(PACKAGE).as_posix()
    if name not in EXCEPTIONS:
        assert lines(path) <= MODULE_LINES, f"{name}: {lines(path)} lines, at most {MODULE_LINES}"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and f"{name}::{node.name}" not in EXCEPTIONS:
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            assert size <= FUNCTION_LINES, f"{name}::{node.name}: {size} lines, at most {FUNCTION_LINES}"


def test_exceptions_are_needed_and_explained():
    for name, reason in EXCEPTIONS.items():
        assert (PACKAGE / name.partition("::")[0]).is_file() and len(reason) > 20, name


PAGES = [(folder, name) for folder, found in CATALOGUES.items() for name in found]


@pytest.mark.parametrize(("folder", "name"), PAGES, ids=[f"{folder}-{name}" for folder, name in PAGES])
def test_every_method_attack_and_judge_is_small_documented_and_in_a_conformance_table(folder, name):
    spec = CATALOGUES[folder][name]
    path = PACKAGE.parent / Path(*spec.module.split(".")).with_suffix(".py")
    assert lines(path) <= METHOD_LINES, f"{path.name}: {lines(path)} lines, at most {METHOD_LINES}"
    page = ROOT / "docs" / folder / f"{name}.md"
    assert page.is_file(), f"write docs/{folder}/{name}.md"
    assert len(page.read_text(encoding="utf-8")) > 500, f"{page.name} says next to nothing"
    words = len(page.read_text(encoding="utf-8").split())
    assert words <= METHOD_WORDS, f"{page.name}: {words} words, at most {METHOD_WORDS}; evidence goes to docs/evidence"
    table = ROOT / "tests" / "conformance"
    rows = "\n".join(p.read_text(encoding="utf-8") for p in table.glob("*.py"))
    assert re.search(rf"\bRow\(\s*\"{re.escape(name)}\"", rows), f"no row for {name!r} in tests/conformance"


def test_every_plan_and_recipe_is_accepted():
    from accelerate.commands.config.config_args import load_config_from_file

    from casehard.benchmark.plan import load_plan
    from casehard.cli.buffer import prepare_step
    from casehard.config import build, read_yaml
    from casehard.defences.mb_defense.pipeline import objective
    from casehard.defences.mb_defense.run import MbRun
    from casehard.evaluation.suite import SuiteSettings
    from casehard.steps import Finetune

    for path in (ROOT / "plans").glob("*.yaml"):
        assert load_plan(path).undefended.role == "undefended", path.name
    for path in (ROOT / "plans" / "suites").glob("*.yaml"):
        assert build(SuiteSettings, read_yaml(path), where=path.name).parts
    for path in (ROOT / "recipes").rglob("*.yaml"):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.parent.name == "launch":  # for accelerate, not for us
            launch = load_config_from_file(str(path))
            assert launch.fsdp_config["fsdp_version"] == 2 and launch.num_processes >= 2, path.name
            continue
        if path.stem.startswith("buffer_prepare_"):
            assert prepare_step(
                {**values, "model": "m", "rows": {"harmful": ["h"], "refusals": ["r"], "benign": ["b"]}}
            )
            continue
        if path.stem.startswith("mb_defense_"):  # a pipeline with a run of its own
            files = {"model": "m", "rows": {"data": ["d.jsonl"], "clean": ["c.jsonl"]}}
            assert objective(build(MbRun, {**files, **values}, where=path.name).config)
            continue
        given = {"method": path.stem.partition("_")[0], "model": "m", "rows": {"data": ["d.jsonl"]}}
        step = build(Finetune, {**given, **values}, where=path.name)
        assert step.spec.configure(step.method, step.preset, step.settings)


def test_files_are_ascii():
    for path in text_files():
        data = path.read_bytes()
        bad = next((i for i, byte in enumerate(data) if byte > 127), None)
        assert bad is None, f"{path.relative_to(ROOT)}, line {data[:bad].count(10) + 1}: not ASCII"


def test_no_machine_paths_and_nothing_unfinished():
    # Spelled in pieces so that this file does not find itself.
    machine = re.compile("|".join(["/" + r"work/", "/" + r"root/", r"(?<![\w.])/" + r"home/\w", "C:" + r"\\\\Users"]))
    unfinished = re.compile(
        r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X", "NotImplemented" + "Error"]) + r")\b"
    )
    for path in text_files():
        text = path.read_text(encoding="utf-8")
        for pattern in (machine, unfinished):
            found = pattern.search(text)
            assert not found, f"{path.relative_to(ROOT)}: {found.group(0)!r}"


def test_no_pickles_in_the_tree():
    for path in tracked():
        assert path.suffix not in {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"}, path
        if path.suffix == ".safetensors":
            assert path.stat().st_size < 4_000_000, f"{path.name} is larger than what may be shipped"


def test_the_version_stands_in_one_place():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in pyproject
    written = [p for p in SOURCES if casehard.__version__ in re.findall(r'"(\d+\.\d+\.\d+)"', p.read_text())]
    assert written == [PACKAGE / "__init__.py"]
    assert f"## {casehard.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_shared_material_is_named_in_tests_only():
    # Spelled in pieces so that this file does not find itself.
    outside = ".." + "/shared"
    for path in text_files():
        if "tests" not in path.relative_to(ROOT).parts:
            assert outside not in path.read_text(encoding="utf-8"), path


DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_readme_leads_with_the_three_commands():
    first = shell_lines((ROOT / "README.md").read_text(encoding="utf-8"))[:3]
    assert [line.text for line in first] == ["make demo", "make real", "make test"]


@pytest.mark.parametrize("page", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_in_the_docs_can_be_typed(page):
    text = page.read_text(encoding="utf-8")
    wrong = {line.text: found for line in commands(text) if (found := faults(line))}
    assert not wrong, f"{page.relative_to(ROOT)}: {wrong}"
    for file in re.findall(r"casehard [^`\n]*?--config (\S+\.yaml)", text):  # made somewhere: here, or it is ours
        elsewhere = text.count(Path(file).name) - len(re.findall(rf"--config {re.escape(file)}", text))
        assert (ROOT / file).is_file() or elsewhere, f"{page.relative_to(ROOT)}: where does {file} come from?"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in shell_lines(text):
        words = line.text.split()
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.M), f"{page.name}: no target {words[1]!r}"


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("casehard scan model OUT --data ROWS --out DIR", "unexpected argument 'OUT'"),
        ("casehard scan model --model OUT --data ROWS --out DIR", "--suite is missing"),
        ("casehard bench plans/demo.yaml", "out is missing"),
        ("casehard bench plans/demo.yaml --set seed=[0] --out DIR", "unknown key 'seed'"),
        ("casehard defend", "method is missing"),
        ("casehard defend plain --model M --out DIR", "--data is missing"),
        ("casehard defend patcher --config recipes/patcher_small.yaml --model M --data D --out DIR", "--unsafe is"),
        ("casehard defend plain --model M --data D --lora 8 --out DIR", "--lora"),
        ("casehard defend mb_stage2 --model M --data D --assets A --set lam=1 --out DIR", "unknown key 'lam'"),
        ("casehard defend lisa --model M --data D --safe S --set settings.mu=1 --out DIR", "unknown key 'mu'"),
        ("casehard defend mb-defense --model M --clean C --retain R --out DIR", "--retain"),
        ("casehard judge check a.jsonl --world 3", "--world"),
        ("casehard judge a.jsonl --judge organism --set seed=0", "unknown key 'seed'"),
        ("casehard attack finetune --model M --suite S --harmful H --benign B --set steps=3 --out D", "unknown key"),
        ("casehard attack nothing --out D", "nothing"),
        ("casehard mend", "no verb"),
        ("torchrun --nproc-per-node 2 -m casehard.cli defend patcher --attacker 1 ...", "--attacker"),
        ("casehard evaluate --model M --suite S --out D extra > log", "unexpected argument 'extra'"),
    ],
)
def test_a_command_that_cannot_be_typed_is_found(command, fault):
    (line,) = commands(f"Text.\n\n    {command}   # a comment\n")
    assert any(fault in found for found in faults(line)), faults(line)


def test_a_command_of_which_something_was_left_out_is_held_to_what_is_written():
    block = "casehard defend plain ...\ncasehard bench \\\n  plans/demo.yaml --out DIR \\\n"
    page = f"```sh\n{block}```\nor `casehard report --x`\n"
    assert [line.text for line in commands(page)] == [
        "casehard defend plain ...",
        "casehard bench plans/demo.yaml --out DIR",
        "casehard report --x",
    ]
    assert [bool(faults(line)) for line in commands(page)] == [False, False, True]


def _anchors(text: str) -> set[str]:
    """Return what links to a page may end in: its headings as GitHub writes them, and names given by hand."""
    seen: dict[str, int] = {}
    found = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    for heading in re.findall(
        r"^ {0,3}#{1,6} +(.+?)(?: +#+)? *$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M
    ):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if slug in seen else slug)
        seen[slug] = seen.get(slug, 0) + 1
    return found


def test_headings_become_anchors():
    page = "# A `b_c`, d - e\n```sh\n# no heading\n```\n## [Same](x.md)!\n### Same\n"
    assert _anchors(page) == {"a-b_c-d---e", "same", "same-1"}


@pytest.mark.parametrize("page", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_pictures_in_the_docs_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), f"{page.relative_to(ROOT)}: {target} does not exist"
        if anchor and there.suffix == ".md":
            known = _anchors(there.read_text(encoding="utf-8"))
            assert anchor in known, f"{page.relative_to(ROOT)}: {target}: no such heading"


def _yaml_of(page: str) -> dict:
    text = (ROOT / "docs" / "how-to" / page).read_text(encoding="utf-8")
    return yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.S)[0])


def test_settings_files_in_the_docs_are_accepted():
    from casehard.benchmark.plan import parse_plan
    from casehard.config import build
    from casehard.evaluation.suite import SuiteSettings

    assert parse_plan(_yaml_of("benchmark-plan.md")).headline.step == 25
    assert build(SuiteSettings, _yaml_of("real-checkpoint.md")).parts[0].role == "restricted"


def test_the_readmes_file_tree_is_true():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = next(block for block in re.findall(r"```text\n(.*?)```", text, re.S) if "src/casehard/" in block)
    here, named = ROOT, set()
    for line in tree.splitlines():
        entry = line.split()[0] if line.strip() else ""
        if not entry:
            continue
        if not line.startswith(" "):
            here = ROOT / entry if entry == "src/casehard/" else ROOT
            path = ROOT / entry
        else:
            path = here / entry
        assert path.exists(), f"README: {entry} does not exist"
        named.add(path.resolve())
    missing = {p for p in PACKAGE.iterdir() if (p.is_dir() and (p / "__init__.py").is_file())} - named
    assert not missing, f"README: the file tree lacks {sorted(p.name for p in missing)}"


def test_the_readmes_method_table_is_the_catalogue():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index("## What is here") : text.index("## Use it")]
    assert set(re.findall(r"\[`(\w+)`\]\(docs/methods/", table)) == set(DEFENCES)


def test_the_readmes_extras_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = text[text.index("Extras:") :].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", listed)) == set(project["optional-dependencies"])


def test_cheap_commands_of_the_readme_run():
    done = subprocess.run([sys.executable, "-m", "casehard.cli", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"casehard {casehard.__version__}\n")
    listed = subprocess.run(["make", "-s", "-C", str(ROOT), "help"], capture_output=True, text=True)
    assert listed.returncode == 0
    for target in ("demo", "test", "lint"):
        assert f"make {target}" in listed.stdout


def test_scripts_of_evidence_use_names_that_exist():
    """No test runs them, so that a name that moved would be missed until somebody wants a table again."""
    missing = []
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("casehard"):
                module = importlib.import_module(str(node.module))
                names = [a.name for a in node.names if not hasattr(module, a.name)]
                there = {m.name for m in pkgutil.iter_modules(getattr(module, "__path__", []))}
                missing += [f"{path.name}: {node.module}.{name}" for name in names if name not in there]
    assert not missing


WRITTEN = re.compile(r"`+((?:tests|src|benchmarks|plans|recipes|docs)/[\w/.-]+|[a-z_]+(?:/[a-z_0-9]+)+\.py)`")
"""Files that a text names; of sources, from the package or from a folder of it."""
DOTTED = re.compile(r"`+(casehard(?:\.[A-Za-z_]\w*)+)`")
GROUPS = ("casehard.methods", "casehard.attacks", "casehard.judges", "casehard.json")
"""Entry point groups, and the file of a checkpoint's provenance."""


def resolves(dotted: str) -> bool:
    """Return whether a dotted name is a module, or something in one."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        return all((found := getattr(found, part, None)) is not None for part in parts[n:])
    return False


@pytest.mark.parametrize("path", [*sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("*.md"))], ids=lambda p: p.stem)
def test_what_a_page_names_exists(path):
    text = path.read_text(encoding="utf-8")
    if path.name == "CHANGELOG.md":
        return  # it tells of names that are gone
    missing = [
        name
        for name in set(WRITTEN.findall(text))
        if not (ROOT / name.rstrip("./")).exists() and not (name.endswith(".py") and [*PACKAGE.glob(f"**/{name}")])
    ]
    missing += [name for name in set(DOTTED.findall(text)) if name not in GROUPS and not resolves(name)]
    for code in re.findall(r"```python\n(.*?)```", text, re.S) if path.name != "api.md" else ():
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("casehard"):
                missing += [f"{node.module}.{a.name}" for a in node.names if not resolves(f"{node.module}.{a.name}")]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ch":
                missing += [] if hasattr(casehard, node.attr) else [f"ch.{node.attr}"]
    assert not missing
