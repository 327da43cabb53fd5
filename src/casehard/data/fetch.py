"""Turn a public data set into rows of the house: from the Hub, or from a local copy in the same layout.

1. Read every row by the columns that the catalogue names; a row without a text to ask, or without its answer, is left
   out and counted.
2. Drop rows that ask (and answer) the same: equal in the normal form of :func:`casehard.data.mix.normalise`, or, for
   sets whose rows are no pairs, near-duplicates by :mod:`casehard.data.similar`: word pairs, Jaccard similarity. The
   first of a group stays; where the answer is a class, only rows of the same class are compared.
3. Write the rows, and before them a record beside them, ``NAME.source.json``.

Nothing that a row says is in a message: half of these sets are not for reading.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from casehard.data import hub, sources, tables
from casehard.data.catalogue import DATA_SETS, DataSet
from casehard.data.formats import parse_row
from casehard.data.mix import normalise
from casehard.data.rowfiles import known
from casehard.data.similar import near_duplicates, words_of
from casehard.errors import ConfigError, DataError
from casehard.io.files import write_text_atomic
from casehard.io.manifest import file_digest
from casehard.types import Example

SIMILAR = 0.7
"""Jaccard similarity of word pairs from which two rows are near-duplicates, as in the audit of training rows."""
RECORD = ".source.json"
_UNUSABLE = 0.1
"""Share of rows without a text from which the layout is not what the catalogue says."""
_SPLITS = {"train", "test", "validation", "valid", "dev", "val", "eval"}


@dataclass(frozen=True)
class Fetched:
    """What became of a data set."""

    name: str
    hub: str
    revision: str
    """Commit that was read, or empty for a local copy."""
    files: dict[str, str]
    """SHA-256 of the files of a local copy."""
    config: str
    split: str
    role: str
    licence: str
    gated: bool
    read: int
    unusable: int
    """Rows without a text to ask, or without an answer where the set has answers."""
    equal: int
    near: int
    rows: int
    similar: float
    sha256: str
    """Of the file of rows."""


class Raw(NamedTuple):
    """Rows as they came."""

    rows: list[dict[str, Any]]
    revision: str = ""
    files: Mapping[str, str] = {}


def find(name: str) -> DataSet:
    """Return the data set of that name.

    Raises:
        ConfigError: there is none.
    """
    import difflib

    if name not in DATA_SETS:
        near = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), DATA_SETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"no data set is known as {name!r}", hint=f"{hint}known: {', '.join(DATA_SETS)}")
    return DATA_SETS[name]


def fetch(
    name: str, out: Path, *, folder: Path | None = None, limit: int | None = None, similar: float = SIMILAR
) -> Fetched:
    """Write the rows of a known data set, and a record beside them.

    Args:
        name: one of :data:`casehard.data.catalogue.DATA_SETS`.
        out: the .jsonl file to write; it and its record appear whole or not at all.
        folder: a local copy to read instead of the Hub.
        limit: read at most this many rows.
        similar: Jaccard similarity of word pairs of near-duplicates, in (0, 1].

    Raises:
        ConfigError: an unknown name, a setting out of range, no access on the Hub.
        UserError: the Hub cannot be reached.
        DataError: it is not laid out as the catalogue says.
        MissingExtra: ``datasets`` or ``pyarrow`` is not installed.
        StorageError: the disk refused the write.
    """
    entry = find(name)
    if not 0 < similar <= 1:
        raise ConfigError(f"similar must lie in (0, 1], got {similar:g}", hint="1 drops equal word pairs only")
    raw = _local(folder, entry) if folder else _hub(entry)
    given = raw.rows[:limit]
    examples = list(_examples(name, entry, given))
    if not examples or len(given) - len(examples) > _UNUSABLE * len(given):
        raise DataError(
            f"{name}: {len(given) - len(examples):,} of {len(given):,} rows have no text where the catalogue says",
            hint=f"expected columns: {', '.join(_columns(entry))}",
        )
    once = _distinct(examples)
    kept = once if entry.pairs else _apart(once, entry, similar)
    text = sources.written(out, kept)
    done = Fetched(
        name=name,
        hub=entry.hub,
        revision=raw.revision,
        files=dict(raw.files),
        config=entry.config,
        split=entry.split,
        role=entry.role,
        licence=entry.licence,
        gated=entry.gated,
        read=len(given),
        unusable=len(given) - len(examples),
        equal=len(examples) - len(once),
        near=len(once) - len(kept),
        rows=len(kept),
        similar=1.0 if entry.pairs else similar,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
    )
    # The record first: rows without one would be rows of unknown origin.
    write_text_atomic(record_of(out), json.dumps(asdict(done), indent=1) + "\n")
    write_text_atomic(out, text)
    return done


def record_of(out: Path) -> Path:
    """Return where the record of a file of rows stands."""
    return out.with_name(out.stem + RECORD)


# -- reading ----------------------------------------------------------------------------------------------------------


def _hub(entry: DataSet) -> Raw:
    commit = hub.commit_of(entry.hub, entry.revision)
    rows = hub.whole(entry.hub, entry.config, entry.split, commit)
    return Raw(list(_headed(rows)) if entry.headless else rows, commit)


def _local(folder: Path, entry: DataSet) -> Raw:
    rows: list[dict[str, Any]] = []
    digests: dict[str, str] = {}
    for path in _files(folder, entry):
        found = [row.value for row in sources.walk(str(path))[0]]
        rows += _headed(found) if entry.headless else found
        digests[path.relative_to(folder).as_posix()] = file_digest(path)
    return Raw(rows, files=digests)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9]+", text.lower()))


def _files(folder: Path, entry: DataSet) -> list[Path]:
    """Return the files of a local copy that hold the configuration and the split, by the words in their paths.

    Raises:
        ConfigError: no such folder.
        DataError: none.
    """
    if not folder.is_dir():
        raise ConfigError(f"no such folder: {folder}", hint="--from takes the folder of a local copy")
    saved = [path.parent for path in sorted(folder.rglob(tables.STATE))]
    files = saved or [p for p in sorted(folder.rglob("*")) if p.is_file() and (p.suffix == ".parquet" or known(p))]
    files = [p for p in files if not p.name.endswith(RECORD) and p.name not in _BESIDE]
    paths = {path: _words(path.relative_to(folder).as_posix()) for path in files}
    for wanted in filter(None, (entry.config, entry.split)):
        named = [path for path in paths if _words(wanted) <= paths[path]]
        # A file that names no split at all may hold the one that is wanted; one that names another does not.
        unnamed = [path for path in paths if wanted != entry.split or not paths[path] & _SPLITS]
        paths = {path: paths[path] for path in named or unnamed}
    if not paths:
        seen = ", ".join(p.relative_to(folder).as_posix() for p in files[:5]) or "none"
        part = " ".join(filter(None, (entry.config, entry.split)))
        raise DataError(f"{folder}: no data file of {part!r}", hint=f"data files there: {seen}")
    return list(paths)


_BESIDE = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files about data in the folder of a data set."""


def _headed(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a list whose first line was taken for the name of its column, that line among them."""
    seen: set[str] = set()
    for row in rows:
        for name, value in row.items():
            if name not in seen and name.strip().casefold() not in ("prompt", "text", "instruction"):
                yield {"prompt": name}
            seen.add(name)
            if value is not None:
                yield {"prompt": value}


# -- rows -------------------------------------------------------------------------------------------------------------


def _columns(entry: DataSet) -> list[str]:
    return [name for name in (entry.ask, entry.answer, entry.context) if name]


def _examples(name: str, entry: DataSet, rows: Sequence[Any]) -> Iterator[Example]:
    """Yield what can be used of the rows; each has the number that it had in its source.

    Raises:
        DataError: a row without the columns; names them unless they may be a row themselves.
    """
    for number, row in enumerate(rows, start=1):
        where = f"{name}, row {number}"
        if not isinstance(row, Mapping):
            raise DataError(f"{where}: a {type(row).__name__}, not a row", hint="is it this data set?")
        lacking = [column for column in (entry.ask, entry.answer) if column and column not in row]
        if lacking:
            there = "" if entry.headless else f"; columns: {', '.join(str(key)[:30] for key in list(row)[:8])}"
            raise DataError(f"{where}: no column {lacking[0]!r}{there}", hint="is it this data set, and its layout?")
        made = _row(entry, row)
        if made is None:
            continue
        tags = {key: row[key] for key in entry.keep if row.get(key) is not None}
        try:
            found = parse_row({"id": f"{name}-{number}", **made, **tags}, where)
        except DataError:  # half a character, a value that JSON does not have: its message would show the text
            continue
        yield found


def _row(entry: DataSet, row: Mapping[str, Any]) -> dict[str, str] | None:
    """Return prompt and response of a row, None where one of them is missing."""
    asked, answer, context = row[entry.ask], row.get(entry.answer), row.get(entry.context)
    if isinstance(context, Mapping):
        options = dict(zip(context.get("label") or (), context.get("text") or (), strict=False))
        answer = f"{answer}. {options[answer]}" if answer in options else None
        context = "\n".join(f"{label}. {text}" for label, text in options.items())
    if entry.classes:
        at = int(str(answer)) if str(answer).isdigit() else -1
        answer = entry.classes[at] if 0 <= at < len(entry.classes) else None
    if isinstance(context, str) and context.strip():
        asked = f"{asked}\n\n{context}" if isinstance(asked, str) else None
    texts = [asked, answer] if entry.answer else [asked]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return None
    return {"prompt": str(asked), **({"response": str(answer)} if entry.answer else {})}


def _distinct(examples: Iterable[Example]) -> list[Example]:
    kept: dict[str, Example] = {}
    for example in examples:
        kept.setdefault("\0".join(normalise(turn.content) for turn in example.messages), example)
    return list(kept.values())


def _apart(examples: Sequence[Example], entry: DataSet, similar: float) -> list[Example]:
    """Return the rows without all but the first of each group of near-duplicates."""
    groups: dict[str, dict[int, list[str]]] = defaultdict(dict)
    for i, example in enumerate(examples):
        said = [turn.content for turn in example.messages]
        # A class is one word among many: it decides with what a row is compared, and not how alike the two are.
        group, text = (said[-1], said[0]) if entry.classes else ("", "\n".join(said))
        groups[group][i] = words_of(text)
    dropped = {i for texts in groups.values() for group in near_duplicates(texts, similar) for i in group[1:]}
    return [example for i, example in enumerate(examples) if i not in dropped]
