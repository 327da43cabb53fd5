"""Public utility benchmarks by the program lm-evaluation-harness, read into the table of a suite.

The program (EleutherAI, ``lm_eval`` 0.4) runs as a process of its own, in whatever environment it is installed in, on a
model folder, and fetches its data sets itself. Of what it writes, ``results_*.json`` in a folder named after the model,
the metrics of the tasks that were asked for become scores named ``TASK METRIC,FILTER``; all of it stays as it is. A
score's interval is +- 1.96 of the standard errors that the program gives; where it gives none, that of a share of as
many questions (Wilson).
"""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from casehard.errors import ConfigError, DataError
from casehard.io.programs import require_allowed, run_program
from casehard.io.stored import read
from casehard.limits import Limited, Within
from casehard.maths.stats import rate_interval
from casehard.types import Score

PROGRAM = "lm_eval"
_TASK = re.compile(r"[A-Za-z0-9][\w.+-]*")
_MISSING = (
    "install lm-evaluation-harness in an environment of its own (pip install lm-eval) and put its bin folder on PATH, "
    "or --set lm_eval.program=/path/to/lm_eval"
)


@dataclass(frozen=True, kw_only=True)
class LmEval(Limited):
    """Which benchmarks are run, and how."""

    tasks: tuple[str, ...]
    """Names of the program's tasks: mmlu, gsm8k, ifeval ..."""
    program: str = PROGRAM
    """The executable: a name on PATH, or a path. Any but the default has to be allowed by CASEHARD_EXTERNAL=1."""
    minutes: Annotated[float, Within(0, 10_000, above=True)] = 240.0
    """After so long it is killed, and the evaluation fails."""
    chat: bool = True
    """Ask through the model's chat template, where it has one."""
    batch_size: str = "auto"
    """As the program takes it: auto, auto:N or a number."""

    def __post_init__(self) -> None:
        """Raise ConfigError for no task, or what cannot be the name of one."""
        super().__post_init__()
        if not self.tasks:
            raise ConfigError("lm_eval: no tasks", hint="--lm-eval mmlu,gsm8k,ifeval")
        if odd := [task for task in self.tasks if not _TASK.fullmatch(task)]:
            raise ConfigError(f"lm_eval: {odd[0]!r} is no name of a task", hint="--lm-eval mmlu,gsm8k,ifeval")
        if not re.fullmatch(r"auto(:\d+)?|\d+", self.batch_size):
            raise ConfigError(f"lm_eval: batch_size {self.batch_size!r}", hint="auto, auto:4 or a number")


@dataclass(frozen=True)
class _Counts:
    effective: int


@dataclass(frozen=True)
class _Results:
    """What is read of results_*.json."""

    results: dict[str, dict[str, Any]]
    counts: Annotated[dict[str, _Counts], Field(alias="n-samples")] = field(default_factory=dict)


def arguments(
    config: LmEval, model: Path, *, device: str, limit: int | None, seed: int, system: str | None
) -> list[str]:
    """Return the arguments of the program, without it.

    Args:
        device: cpu, cuda or cuda:N, as torch calls it.
        limit: questions a task, None for all.

    Raises:
        ConfigError: a path that the program would read as further settings.
    """
    folder = str(model.resolve())
    if "," in folder or "=" in folder:
        raise ConfigError(
            f"lm_eval reads {folder!r} as settings", hint="a model folder without a comma or = in its path"
        )
    out = ["--model", "hf", "--model_args", f"pretrained={folder}", "--tasks", ",".join(config.tasks)]
    out += ["--device", device, "--batch_size", config.batch_size, "--seed", str(seed)]
    out += ["--apply_chat_template"] if config.chat else []
    out += ["--system_instruction", system] if system else []
    out += ["--limit", str(limit)] if limit is not None else []
    return [*out, "--output_path", "out"]


def require_program(config: LmEval) -> None:
    """Check that the program is there and may be run, before anything takes long.

    Raises:
        Refused: another program than the default, and the environment does not allow it.
        ConfigError: no such program.
    """
    if config.program != PROGRAM:
        require_allowed(config.program)
    if shutil.which(config.program) is None:
        raise ConfigError(f"no program {config.program!r}", hint=_MISSING)


def run_lm_eval(
    config: LmEval,
    model: Path,
    place: Path,
    *,
    device: str,
    limit: int | None = None,
    seed: int = 0,
    system: str | None = None,
) -> list[Score]:
    """Run the program on a model folder and read what it measured.

    Args:
        model: folder of a checkpoint.
        place: empty folder that keeps what the program writes, under ``out``, and says, in ``stderr``.

    Raises:
        Refused: another program than the default, and the environment does not allow it.
        ConfigError: no such program.
        UserError: it failed or did not end in time.
        DataError, Corrupt: it left no results, or not those of every task.
    """
    require_program(config)
    asked = arguments(config, model, device=device, limit=limit, seed=seed, system=system)
    run_program(
        [str(shutil.which(config.program)), *asked],
        place,
        seconds=60 * config.minutes,
        more_time="--set lm_eval.minutes=MORE, or a --limit",
    )
    found = sorted((place / "out").rglob("results_*.json"))
    if len(found) != 1:
        what = "no results_*.json" if not found else f"{len(found)} files results_*.json"
        raise DataError(f"{config.program} ended and left {what} under {place / 'out'}", hint="its version is 0.4?")
    return read_results(found[0], config.tasks)


def read_results(path: Path, tasks: tuple[str, ...]) -> list[Score]:
    """Return the scores of some tasks; of a group the group's own.

    Raises:
        Corrupt: not JSON, or of another shape.
        DataError: a task is missing or has no number.
    """
    read_in = read(path, _Results)
    out = []
    for task in tasks:
        if task not in read_in["results"]:
            raise DataError(f"{path}: no results of {task!r}", hint=f"it has {', '.join(sorted(read_in['results']))}")
        values = read_in["results"][task]
        names = [
            name for name in values if "," in name and "_stderr," not in name and _number(values[name]) is not None
        ]
        if not names:
            raise DataError(f"{path}: no number for {task!r}", hint="did the program skip it?")
        n = int(read_in.get("n-samples", {}).get(task, {}).get("effective", 0))
        for name in names:
            rate, (metric, filtered) = float(values[name]), name.split(",", 1)
            error = _number(values.get(f"{metric}_stderr,{filtered}"))
            low, high = _interval(rate, error, n)
            plain = metric if filtered == "none" else f"{metric},{filtered}"
            out.append(Score(metric=f"{task} {plain}", n=n, rate=rate, low=low, high=high))
    return out


def _interval(rate: float, error: float | None, n: int) -> tuple[float, float]:
    share = 0.0 <= rate <= 1.0
    if error is None:
        if not share:
            return rate, rate
        found = rate_interval(round(rate * n), n) if n else (0.0, 1.0)
        return min(found[0], rate), max(found[1], rate)
    low, high = rate - 1.96 * error, rate + 1.96 * error
    return (max(0.0, low), min(1.0, high)) if share else (low, high)


def _number(value: Any) -> float | None:
    """Return a finite number, None for anything else: the program writes N/A where it has none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
