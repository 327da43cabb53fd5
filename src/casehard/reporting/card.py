"""Model cards: what a hardened checkpoint is, what was measured on it, and what it is not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casehard.benchmark.lookup import percent, percents
from casehard.benchmark.records import NO_ATTACK
from casehard.defences import DEFENCES
from casehard.errors import UserError
from casehard.evaluation.metrics import in_words
from casehard.io.files import staged, sweep
from casehard.io.manifest import MANIFEST, verify
from casehard.io.stored import read

CARD = "README.md"
RECORD = "casehard.json"
ADAPTER_RECORD = "job.json"
SHOWN = ("asr", "partial", "leak", "over_refusal", "twin_knowledge", "utility", "fine_tunability", "coherence")
LIMITS = (
    "Hardening delays harmful fine-tuning; it does not prevent it. More attack steps, another learning rate or an "
    "attacker who knows the defence can break this model.",
    "It is not a guard against prompts: jailbreaks without training are outside what it defends against.",
    "It is not more harmless than its parent in ordinary use; over-refusal and utility must be measured on your data.",
    "The numbers above hold for the attacks, data and seeds named here and for nothing else.",
)


_USE = [
    "## How to use it",
    "",
    "On the base with the digest below and no other, with PEFT or as a whole model:",
    "",
    "```",
    'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("BASE"), "ADAPTER")',
    "casehard model import ADAPTER --base BASE --out DIR",
    "```",
    "",
]
UNKNOWN = "What that method is for is not known here: it is in no catalogue of this installation."


def _purpose(method: str) -> tuple[str, bool]:
    """Return what a method is for, and whether its result may be called hardened."""
    spec = DEFENCES.get(method)
    return (spec.purpose, spec.hardens) if spec is not None else (UNKNOWN, False)


def _plain(text: Any) -> str:
    """Return text that Markdown and HTML take literally."""
    out = " ".join(str(text).split())
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "'"), ("[", "\\[")):
        out = out.replace(mark, safe)
    return out


def _lines(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return settings as one bullet per leaf."""
    out = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            out += _lines(value, f"{prefix}{key}.")
        else:
            out.append(f"- {_plain(prefix + str(key))}: {_plain(value)}")
    return out


def _measured(records: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> list[str]:
    rows = ["| when | metric | rate | 95 % interval | k/n |", "|---|---|---|---|---|"]
    for record in records:
        if record["metric"] not in SHOWN or record["k"] is None:
            continue
        if record["metric"] == "partial" and record["k"] == 0:
            continue
        if record["attack"] == NO_ATTACK:
            when = "before any attack"
        elif record["steps"] == 0:
            continue
        else:
            when = f"{titles.get(record['attack'], record['attack'])}, step {record['steps']}"
        span = percents(record["low"], record["high"])
        count = f"{record['k']}/{record['n']}"
        rate = percent(record["rate"])
        if why := record.get("unreliable"):
            rate += f" (unreliable: {_plain(why)})"
        rows.append(f"| {_plain(when)} | {in_words(record['metric'])} | {rate} | {span} | {count} |")
    return rows if len(rows) > 2 else ["Nothing was measured on this checkpoint yet."]


def model_card(
    record: Mapping[str, Any], measured: Sequence[Mapping[str, Any]] = (), *, titles: Mapping[str, str] | None = None
) -> str:
    """Return the Markdown text of a checkpoint's card.

    Args:
        record: what ``casehard.json`` of the checkpoint holds: digest, parent, method, provenance, versions. Of an
            adapter: ``base_digest`` instead of the first two.
        measured: records of this very checkpoint, as in summary.json; one seed.
        titles: attack name -> title.
    """
    made = record.get("provenance") or {}
    job = made.get("job") or {}
    settings = made.get("settings") or job.get("settings") or {}
    method = _plain(record.get("method") or "unknown")
    purpose, hardened = _purpose(str(record.get("method")))
    base = record.get("base_digest")
    if base:
        what = f"This LoRA adapter was made by casehard with the method **{method}**. It holds an update, not a model. "
        digests = [f"- base digest: `{_plain(base)}`"]
    else:
        what = f"This checkpoint was made by casehard with the method **{method}** from a parent checkpoint. "
        digests = [
            f"- digest: `{_plain(record.get('digest', 'unknown'))}`",
            f"- parent digest: `{_plain(record.get('parent') or 'none')}`",
        ]
    parts = [
        f"# {'Hardened' if hardened else 'Made'} with {method}",
        "",
        what + purpose,
        "",
        *(_USE if base else []),
        "## What it is",
        "",
        f"- method: {method}",
        *digests,
        *([f"- descends from `{_plain(made['origin'])}` of the Hugging Face Hub"] if made.get("origin") else []),
        *([f"- was attacked on its way: {_plain(', then '.join(made['attacked']))}"] if made.get("attacked") else []),
        f"- seed: {_plain(made.get('seed', 'unknown'))} (single seed)",
        *[f"- data, {_plain(name)}: `{_plain(value)}`" for name, value in (made.get("data_digests") or {}).items()],
        *[f"- {_plain(name)} {_plain(value)}" for name, value in (record.get("versions") or {}).items()],
        "",
        "## Settings",
        "",
        *(_lines(settings) or ["- defaults"]),
        *_lines(job.get("train") or {}, "train."),
        *_lines(job.get("lora") or {}, "lora."),
        "",
        "## Measured",
        "",
        *_measured(measured, titles or {}),
        "",
        "## Limits, and what it is not",
        "",
        *[f"- {line}" for line in LIMITS],
        "",
    ]
    return "\n".join(parts)


@dataclass(frozen=True)
class _Tuned:
    """What a card tells of an adapter's record."""

    base_digest: str
    job: dict[str, Any]
    casehard: str
    seed: int | None = None
    settings: dict[str, Any] | None = None
    data_digests: dict[str, str] | None = None


def _record(folder: Path) -> dict[str, Any]:
    """Return what a card tells of a checkpoint, or of an adapter that a job left."""
    if (folder / RECORD).is_file():
        return read(folder / RECORD, _Record)
    if (folder / ADAPTER_RECORD).is_file():
        made = read(folder / ADAPTER_RECORD, _Tuned)
        told = {"method": made["job"].get("method"), "versions": {"casehard": made["casehard"]}, "provenance": made}
        return {"base_digest": made["base_digest"], **told}
    raise UserError(
        f"{folder} has no {RECORD} and no {ADAPTER_RECORD}",
        hint="give the checkpoint or adapter folder that `casehard defend` made",
    )


@dataclass(frozen=True)
class _Job:
    settings: dict[str, Any] | None = None
    train: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Made:
    job: _Job | None = None
    settings: dict[str, Any] | None = None
    data_digests: dict[str, str] | None = None


@dataclass(frozen=True)
class _Record:
    """What a card tells of a checkpoint's own record."""

    digest: str
    parent: str
    method: str
    versions: dict[str, str] | None = None
    provenance: _Made | None = None


def write_card(checkpoint: str | Path, text: str = "") -> Path:
    """Put a model card into a checkpoint or adapter folder, whose manifest then covers it, and return its path.

    The folder is made anew beside itself, from hard links where the disk has them, and exchanged with the old one in
    one step where the system can, so that there is a checkpoint that verifies at every moment.

    Args:
        text: the card; default: one without measurements, from the folder's own record.

    Raises:
        UserError: neither a checkpoint nor an adapter of casehard.
        Corrupt: the folder does not match its manifest.
    """
    folder = Path(checkpoint)
    record = _record(folder)
    card = folder / CARD
    sweep(folder.parent, of=folder.name)  # of a card that was in place when its writer was killed
    verify(folder)
    text = text or model_card(record)
    if card.is_file() and card.read_text(encoding="utf-8") == text:
        return card
    with staged(folder) as fresh:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            if path not in (card, folder / MANIFEST):
                _place(path, fresh / path.relative_to(folder))
        (fresh / CARD).write_text(text, encoding="utf-8")
    return card


def _place(path: Path, target: Path) -> None:
    """Link a file, or copy it where the disk has no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, target)
    except OSError:
        shutil.copy2(path, target)


def write_cards(run: str | Path, summary: Mapping[str, Any]) -> list[Path]:
    """Write the card of every hardened checkpoint of a benchmark, with the numbers measured on it."""
    titles = {a["name"]: a["title"] for a in summary["plan"]["attacks"]}
    out = []
    for node in summary["nodes"]:
        folder = Path(run) / "nodes" / node.get("folder", "") / "checkpoint"
        if node["kind"] != "defend" or not (folder / RECORD).is_file():
            continue
        base, defence, seed = node["label"].split("/")
        mine = [r for r in summary["records"] if (r["base"], r["defence"], f"s{r['seed']}") == (base, defence, seed)]
        out.append(write_card(folder, model_card(read(folder / RECORD, _Record), mine, titles=titles)))
    return out
