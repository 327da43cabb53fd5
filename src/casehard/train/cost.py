"""What a run costs, and the telemetry methods report between two log rows. Both survive a resume."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from casehard.data.batches import IGNORE
from casehard.train.guards import require_finite
from casehard.train.protocol import Whole
from casehard.types import Budget

if TYPE_CHECKING:
    from transformers import TrainingArguments

COSTS = ("passes", "tokens")
"""Telemetry keys that are added to the budget instead of being averaged into the log."""


class CostTracker:
    """Count passes, tokens and seconds; average telemetry over the steps of one log row.

    A pass is one call of ``step.backward`` (or one stock step), plus what is logged under ``passes``. A method with an
    attribute ``passes`` counts by itself: one per micro-batch is assumed, and the attribute holds those beyond.
    """

    def __init__(self) -> None:
        self.passes = 0
        self.micros = 0
        self.extra = 0
        self._tokens: torch.Tensor | int = 0
        self._seconds = 0.0
        self._started = time.perf_counter()
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self.step = 0

    def start(self) -> None:
        """Start the clock of this process."""
        self._started = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def batch(self, batch: Mapping[str, Any]) -> None:
        """Count the tokens of a batch, padding excluded where there is a mask; never waits for the device."""
        tokens = batch.get("attention_mask")
        if tokens is not None:
            self._tokens = self._tokens + tokens.sum()
        elif "input_ids" in batch:
            self._tokens = self._tokens + batch["input_ids"].numel()

    def log(self, values: Mapping[str, float]) -> None:
        """Record telemetry of the current step; ``passes`` and ``tokens`` are added to the budget.

        Args:
            values: numbers, or tensors of one element that are read only when the row is written.

        Raises:
            Diverged: a number is NaN or infinite. Leave out what is undefined.
        """
        for key, value in values.items():
            if key == "passes":
                self.passes += int(value)
            elif key == "tokens":
                self._tokens = self._tokens + int(value)
            else:
                if isinstance(value, torch.Tensor):
                    value = value.detach()
                else:
                    require_finite(value, f"telemetry {key!r}", step=self.step)
                self._sums[key] = self._sums.get(key, 0.0) + value
                self._counts[key] = self._counts.get(key, 0) + 1

    def drain(self) -> dict[str, float]:
        """Return the averages since the last call and forget them."""
        row = {key: float(total) / self._counts[key] for key, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return row

    @property
    def tokens(self) -> int:
        """Tokens seen by this process."""
        return int(self._tokens)

    @property
    def seconds(self) -> float:
        """Wall time, that of earlier processes of the same run included."""
        return self._seconds + time.perf_counter() - self._started

    def state(self) -> dict[str, Any]:
        """Return everything as JSON values; Python floats survive JSON exactly."""
        return {
            "passes": self.passes,
            "micros": self.micros,
            "extra": self.extra,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "sums": {key: float(total) for key, total in self._sums.items()},
            "counts": dict(self._counts),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state`."""
        self.passes, self.micros, self.extra = state["passes"], state["micros"], state["extra"]
        self._tokens, self._seconds = state["tokens"], state["seconds"]
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])

    def count_extra(self, method: Any) -> None:
        """Take over the method's own count; right after a resume the method may not have caught up with it yet."""
        self.extra = max(self.extra, int(getattr(method, "passes", 0)))

    def budget(self, steps: int, method: Any = None) -> Budget:
        """Return what the run spent so far."""
        self.count_extra(method)
        return Budget(
            steps=steps,
            passes=self.micros + self.extra if hasattr(method, "passes") else self.passes,
            tokens=self.tokens,
            seconds=self.seconds,
            peak_bytes=peak_bytes(),
        )


def counted(samples: Sequence[Mapping[str, Any]], args: TrainingArguments) -> Whole | None:
    """Return what the micro-batches of a step hold together, on all ranks; None unless they are labelled tokens."""
    if not all("labels" in batch and "input_ids" in batch for batch in samples):
        return None
    rows = sum(len(batch["input_ids"]) for batch in samples)
    trained: Any = sum((batch["labels"][..., 1:] != IGNORE).sum() for batch in samples)
    inputs: Any = sum(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum() for batch in samples)
    if args.world_size > 1:
        both = torch.stack([inputs, trained]).to(args.device)
        torch.distributed.all_reduce(both)
        inputs, trained = both.unbind()
    return Whole(rows * args.world_size, inputs, trained)


def training_flops(net: nn.Module, tokens: int) -> int:
    """Estimate the floating-point operations of training on so many tokens.

    Per token 4 N + 2 T, where N counts the weights of all matrices that activations pass through and T those of them
    that are trained: the forward pass and the gradient of the activations take 2 N each, that of the weights 2 T. So it
    is 6 N where all are trained. Attention scores, norms and the optimiser are left out, as are embedding tables, which
    are looked up. Every expert of a mixture counts, whether or not it is asked.

    Args:
        net: as it was trained: what is frozen says ``requires_grad`` is False.
        tokens: input tokens, padding excluded.

    Source: Kaplan et al., arXiv 2001.08361, section 2.1.
    """
    passed, trained = 0, 0
    for module in net.modules():
        if isinstance(module, nn.Embedding):
            continue
        for weight in module.parameters(recurse=False):
            if weight.ndim >= 2:
                passed += weight.numel()
                trained += weight.numel() if weight.requires_grad else 0
    return tokens * (4 * passed + 2 * trained)


def peak_bytes() -> int:
    """Return the peak allocated on the GPU when one is in use, else the peak resident memory since the last reset."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    # On Linux getrusage also reports the peak of the process that started this one, and knows no reset.
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        # Not a Unix; 0 is told apart from a measurement.
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, everybody else KiB.
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> bool:
    """Start the peaks that :func:`peak_bytes` reports anew; False where the resident one cannot be reset."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        # 5: the peak resident size; see proc(5).
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
