"""R19 and R20: importing is light, and the core works without the optional packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "casehard"
EXTRAS = ("trl", "datasets", "matplotlib", "openai", "ray", "fastapi", "pyarrow", "duckdb")
MODULES = sorted(
    ".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for p in PACKAGE.rglob("*.py")
    if p.name != "__main__.py"
)


def run(code: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh process."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )


def test_import_is_light():
    code = """
        import json, sys, time
        began = time.process_time()
        import casehard
        print(json.dumps([time.process_time() - began, "torch" in sys.modules, "pydantic" in sys.modules]))
    """
    seen = [json.loads(run(code).stdout) for _ in range(5)]
    assert not any(torch or pydantic for _, torch, pydantic in seen)
    assert min(seconds for seconds, _, _ in seen) < 0.15


@pytest.mark.parametrize("arguments", [["--help"], ["defend", "--help"], ["data", "audit", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments):
    code = """
        import contextlib, io, json, sys
        from casehard.cli import main
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            code = main(sys.argv[1:])
        heavy = {"torch", "transformers", "numpy", "yaml", "jinja2"} & set(sys.modules)
        print(json.dumps([code, len(text.getvalue()), sorted(heavy)]))
    """
    code, length, heavy = json.loads(run(code, *arguments).stdout)
    assert code == 0 and length > 8 and heavy == []


def test_help_is_quick():
    # Processor time of the whole process, interpreter included: other work on the machine does not count.
    code = """
        import sys, time
        from casehard.cli import main
        main(["--help"])
        print(time.process_time(), file=sys.stderr)
    """
    assert min(float(run(code).stderr) for _ in range(5)) < 0.4


BLOCK = """
    import importlib.abc, importlib.util, json, sys

    class Blocked(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in BLOCKED:
                raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

    BLOCKED = set(sys.argv[1].split(","))
    find_spec = importlib.util.find_spec
    # Libraries ask this first; a package that is not there is None, not an error.
    importlib.util.find_spec = lambda name, *rest: None if name in BLOCKED else find_spec(name, *rest)
    sys.meta_path.insert(0, Blocked())
"""


def test_every_module_imports_without_the_extras():
    code = (
        textwrap.dedent(BLOCK)
        + "import importlib\nfor name in sys.argv[2].split(','):\n    importlib.import_module(name)\n"
    )
    done = run(code, ",".join(EXTRAS), ",".join(MODULES), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr


def test_using_a_missing_extra_says_how_to_install_it(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    code = textwrap.dedent(BLOCK) + textwrap.dedent(
        """
        from casehard.data import sources
        from casehard.errors import MissingExtra

        told = []
        for spec in (sys.argv[2], "hub:org/name:train"):
            try:
                sources.load(spec)
            except MissingExtra as error:
                told.append([error.message, error.hint, error.exit_code])
        print(json.dumps(told))
        """
    )
    done = run(code, ",".join(EXTRAS), str(tmp_path / "rows.parquet"))
    told = json.loads(done.stdout)
    assert [(hint, code) for _, hint, code in told] == [("pip install 'casehard[data]'", 8)] * 2
    assert "pyarrow" in told[0][0] and "datasets" in told[1][0]


def test_the_command_line_reports_a_missing_extra(tmp_path):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    code = (
        textwrap.dedent(BLOCK)
        + "from casehard.cli import main\n"
        + "sys.exit(main(['data', 'surrogate', sys.argv[2], '--out', sys.argv[3]]))\n"
    )
    out = tmp_path / "out.jsonl"
    done = run(code, "pyarrow,datasets", str(tmp_path / "rows.parquet"), str(out))
    assert done.returncode == 8
    assert "error: the package 'pyarrow' is not installed" in done.stderr
    assert "hint: pip install 'casehard[data]'" in done.stderr
    assert "Traceback" not in done.stderr and not out.exists()


HIDE = """
    import importlib.metadata, sys
    from pathlib import Path

    HIDDEN = set(sys.argv[1].split(","))
    from_name = importlib.metadata.Distribution.from_name

    def lookup(name):
        if name in HIDDEN:
            raise importlib.metadata.PackageNotFoundError(name)
        return from_name(name)

    importlib.metadata.Distribution.from_name = lookup
"""


def test_doctor_works_in_a_source_tree_that_was_never_installed():
    import casehard

    code = textwrap.dedent(HIDE) + "from casehard.cli import main\nsys.exit(main(['doctor']))\n"
    done = run(code, "casehard", OMP_NUM_THREADS="1", COLUMNS="80")
    assert done.returncode == 0, done.stderr
    assert f"check this installation of casehard {casehard.__version__}" in done.stdout
    said = "what casehard requires cannot be read: it runs from a source tree that is not installed"
    assert f"warning: {said}" in " ".join(done.stderr.split())
    # What is there is shown all the same, and held against the versions that the code itself knows.
    torch = next(line for line in done.stdout.splitlines() if "torch " in line)
    assert __import__("torch").__version__ in torch and "ok" in torch
    assert "the core is complete" not in done.stdout and "internal error" not in done.stderr
