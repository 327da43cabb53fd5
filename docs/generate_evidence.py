"""Write what is generated of the pages in docs/evidence: python docs/generate_evidence.py

A page holds what is made from docs/evidence/data/NAME.json between ``<!-- generated from data/NAME.json -->`` and
``<!-- end -->``; above the page's first heading it is the whole page. A leaderboard names several files.

    python docs/generate_evidence.py --store RUN NAME    keep what a page needs of the run folder of a benchmark
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from casehard.errors import ConfigError, DataError, UserError
from casehard.io.files import read_json, write_text_atomic
from casehard.reporting import leaderboard
from casehard.reporting.kept import kept, kept_text
from casehard.reporting.markdown import bench_command, markdown
from casehard.reporting.page import bench_summary

PAGES = Path(__file__).with_name("evidence")
PART = re.compile(r"^<!-- generated from ([^\n]*) -->\n(.*?)^<!-- end -->$", re.M | re.S)
MARK = re.compile(r"<!-- generated from|<!-- end")


def part(files: list[Path], below: int) -> str:
    """Return what is made from stored files, under a heading of a level (0: a whole page)."""
    values = read_json(files[0])
    if "pooled" in values:
        return markdown(values, bench_command(values["plan"]), below=below)
    return leaderboard.markdown([leaderboard.read_board(file) for file in files], "python docs/generate_evidence.py")


def page(path: Path) -> tuple[str, set[Path]]:
    """Return a page as it has to be, and the stored files it is made from.

    Raises:
        DataError: a comment is alone, or names a file that is not there.
    """
    used: set[Path] = set()
    text = path.read_text(encoding="utf-8")

    def made(found: re.Match[str]) -> str:
        files = [path.parent / name for name in found[1].split()]
        for file in files:
            if not file.is_file():
                hint = "python docs/generate_evidence.py --store RUN NAME"
                raise DataError(f"{path} is generated from {file}, which does not exist", hint=hint)
        used.update(files)
        above = re.sub(r"```.*?```", "", PART.sub("", text[: found.start()]), flags=re.S)
        level = max([0, *(len(marks) for marks in re.findall(r"^(#+) ", above, re.M)[-1:])])
        return f"<!-- generated from {found[1]} -->\n\n{part(files, level).strip()}\n\n<!-- end -->"

    out = PART.sub(made, text)
    if len(MARK.findall(text)) != 2 * len(PART.findall(text)):
        hint = (
            "a part begins with <!-- generated from data/NAME.json --> and ends with <!-- end -->, each on its own line"
        )
        raise DataError(f"{path}: a comment about generated parts stands alone or within another part", hint=hint)
    return out, used


def pages(folder: Path = PAGES) -> dict[Path, str]:
    """Return every page that has generated parts, as it has to be.

    Raises:
        DataError: a page cannot be made, or a stored file is on none.
    """
    every = {path: page(path) for path in sorted(folder.glob("*.md"))}
    used = {file for _, files in every.values() for file in files}
    if left := sorted(set((folder / "data").glob("*.json")) - used):
        hint = f"write <!-- generated from data/{left[0].name} --> and <!-- end --> into a page, or delete the file"
        raise DataError(f"{left[0]} is on no page", hint=hint)
    return {path: text for path, (text, files) in every.items() if files}


def store(run: Path, name: str, folder: Path = PAGES) -> Path:
    """Keep what a page needs of a benchmark's run folder, and return the file.

    Raises:
        ConfigError: not a name.
        UserError, Corrupt: the run is not a finished benchmark, or was changed.
        DataError: what is kept would tell where the run was made, or is too little.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(f"{name!r} is no name for a stored summary", hint="lower-case letters, digits and _")
    summary = bench_summary(run)
    values = kept(summary)
    if markdown(values) != markdown(summary):
        raise DataError(
            f"{run}: what is kept of it makes another page", hint="casehard.reporting.kept leaves out too much"
        )
    path = folder / "data" / f"{name}.json"
    write_text_atomic(path, kept_text(values))
    return path


def main(arguments: list[str]) -> int:
    """Write the pages or, with ``--store``, a stored summary; return an exit code."""
    try:
        if arguments[:1] == ["--store"] and len(arguments) == 3:
            print(store(Path(arguments[1]), arguments[2]))
        elif arguments:
            raise ConfigError(f"no such arguments: {' '.join(arguments)}", hint="none, or --store RUN NAME")
        else:
            for path, text in pages().items():
                write_text_atomic(path, text)
                print(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
