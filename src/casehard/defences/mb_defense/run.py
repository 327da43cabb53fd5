"""MB-Defense from files to a checkpoint: what `casehard defend mb-defense` runs."""

from __future__ import annotations

import json
import secrets as entropy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from casehard.backdoor.behaviours import Behaviour
from casehard.backdoor.suite import Planted, TriggerSuite
from casehard.backdoor.triggers import Trigger
from casehard.config import digest, to_dict
from casehard.data.mix import check_disjoint, marks
from casehard.defences.mb_defense.config import MbConfig
from casehard.defences.mb_defense.pipeline import Rows, draw_suite, harden
from casehard.errors import ConfigError, Corrupt, DataError, Refused
from casehard.evaluation.suite import Suite, evaluate, load_suite
from casehard.io import secrets
from casehard.io.files import remove, write_text_atomic
from casehard.io.stored import apart, read
from casehard.limits import Seed
from casehard.model.load import load
from casehard.model.lora import read_lora
from casehard.model.model import Model
from casehard.model.save import rehearse, save
from casehard.model.source import ORIGIN, find_any
from casehard.model.step import Inputs
from casehard.train.checkpoint import bytes_needed
from casehard.types import Checkpoint, Example

REPORT, PRIVATE = "mb_defense.json", "private"
_ASKED = ("utility", "lookalike", "task")


@dataclass(frozen=True, kw_only=True)
class MbRun(Inputs):
    """One run of the whole defence.

    ``model`` is the base to train (joint), the checkpoint to repair (posthoc), or the trusted base of the adapter
    (adapter). Roles: ``clean``, verified rows, 128 to 512 of them; ``data``, the training set from anywhere (joint),
    else rows to install on, the clean rows when empty. The suite is measured after every stage.
    """

    adapter: str = ""
    """Folder or Hub id of the untrusted LoRA (mode adapter)."""
    config: MbConfig = field(default_factory=MbConfig)
    trigger: Trigger | None = None
    """A backdoor to report on, if one is known; it never decides how the defence runs."""
    behaviour: Behaviour | None = None
    secret: Seed | None = None
    """Seed of the trigger suite; None draws one from the system and keeps it in DIR/private."""
    export_failed: bool = False
    """Write the checkpoint even when the verdict is FAIL; it is marked as such."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.trigger is None) != (self.behaviour is None):
            raise ConfigError("a backdoor to report on needs both its trigger and its behaviour")
        if bool(self.adapter) != (self.config.mode == "adapter"):
            raise ConfigError(
                f"mode {self.config.mode} with adapter {self.adapter!r}", hint="--mode adapter and --adapter DIR"
            )
        if self.config.mode == "joint" and not self.rows.get("data"):
            raise ConfigError("joint mode trains on rows and none are given", hint="--data sft.jsonl")


@dataclass(frozen=True)
class MbResult:
    """What was written and found."""

    checkpoint: Checkpoint | None
    """None when a FAIL kept the model from being exported."""
    verdict: str
    report: dict[str, Any]
    rows: Rows


def run_mb(job: MbRun, out: str | Path) -> MbResult:
    """Run the defence and export its result under ``out``/checkpoint, unless the verdict forbids it.

    Writes ``out``/mb_defense.json (everything measured) and ``out``/private: the triggers, and the pairs of stage 2,
    which ``defend mb_defense --assets`` takes; keep both to yourself. An interrupted joint training resumes.

    Raises:
        Refused: the verdict is FAIL; the report is written, the model is not.
        UserError: settings, rows or files that cannot work.
    """
    out = Path(out)
    public = to_dict(replace(job, secret=None))
    secrets.refuse(public, where="mb-defense")
    data, clean, suite = _rows(job)
    loaded = load(job.model, device=job.device)
    whence: dict[str, Any] = {"parent": loaded.digest, "provenance": _provenance(job, public, loaded, [*data, *clean])}
    rehearse(loaded.net, loaded.tokenizer, out / "checkpoint", beside=bytes_needed(loaded.net), **whence)
    model = read_lora(loaded.net, find_any(job.adapter)) if job.adapter else loaded.net
    planted = _suite(job, loaded, [*data, *clean, *(suite.examples if suite else ())], out)
    described = [Planted(job.trigger, job.behaviour)] if job.trigger and job.behaviour else []

    def measure(current: nn.Module, stage: str) -> Rows:
        assert suite is not None
        roles = {role for role in suite.roles if role in _ASKED} or None
        return evaluate(current, loaded.tokenizer, suite, roles=roles, limit=job.limit, system=job.system)

    training = out / "training"
    done = harden(
        model,
        loaded.tokenizer,
        data,
        clean,
        job.config,
        suite=planted,
        seed=job.seed,
        described=described,
        measure=measure if suite else None,
        system=job.system,
        max_length=job.max_length,
        out=training,
    )
    report = done.report | {"parent": loaded.digest, "settings_digest": digest(public)}
    write_text_atomic(out / REPORT, json.dumps(apart(report)[0], indent=1) + "\n")
    if done.pairs is not None:
        done.pairs.write(out / PRIVATE)
    if done.verdict.word == "FAIL" and not job.export_failed:
        raise Refused(
            "the verdict is FAIL, so the model is not exported: " + "; ".join(g.says for g in done.verdict.missed),
            hint=f"see {out / REPORT}; export_failed=true writes it all the same",
        )
    whence["provenance"] |= {"verdict": done.verdict.word, "suite": done.suite.digest}
    checkpoint = save(done.model, loaded.tokenizer, out / "checkpoint", method="mb_defense", **whence)
    if training.exists():
        remove(training)
    return MbResult(checkpoint, done.verdict.word, report, done.rows)


def _provenance(job: MbRun, public: dict[str, Any], loaded: Model, rows: Sequence[Example]) -> dict[str, Any]:
    return {
        "job": public,
        "config_digest": digest(public),
        "seed": job.seed,
        **({ORIGIN: loaded.origin} if loaded.origin else {}),
        "trained_prompts": sorted(marks(rows) | loaded.trained_prompts),
    }


def _rows(job: MbRun) -> tuple[list[Example], list[Example], Suite | None]:
    rows = job.examples()
    clean = rows.get("clean", [])
    if not clean:
        raise DataError("the clean set is empty", hint="give some dozens of verified rows: --clean clean.jsonl")
    data = rows.get("data", [])
    suite = load_suite(job.suite) if job.suite else None
    if suite is not None:
        check_disjoint({"data": data, "clean": clean}, {job.suite: suite.examples})
    return data, clean, suite


@dataclass(frozen=True)
class _Kept:
    """What is read of the file that keeps a run's triggers."""

    suite: dict[str, Any]


def _suite(job: MbRun, loaded: Model, corpus: Sequence[Example], out: Path) -> TriggerSuite:
    """Return the run's suite: the one it began with when it is continued."""
    path = out / PRIVATE / "suite.json"
    if path.is_file():
        kept = read(path, _Kept)["suite"]
        try:
            return TriggerSuite.from_json(kept)
        except ConfigError as error:
            raise Corrupt(f"{path}: {error.message}", hint="begin anew in another folder") from None
    secret = entropy.randbits(62) if job.secret is None else job.secret
    suite = draw_suite(loaded.tokenizer, corpus, job.config, secret=secret)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_text_atomic(path, json.dumps({"suite": suite.to_json()}, indent=1) + "\n", private=True)
    return suite
