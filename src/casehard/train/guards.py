"""What stops a run: a number that is not finite, a signal, another process that is gone."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import torch

from casehard.distributed.ranks import why
from casehard.errors import Diverged, Lost

_HINT = "lower the learning rate, check the data for empty or damaged rows, or use fp32"


def require_finite(value: torch.Tensor | float, what: str, *, step: int) -> None:
    """Stop the run if a number, or any element of a tensor, is NaN or infinite.

    Args:
        value: a number or a tensor of any shape.
        what: its name in the message, e.g. ``"inner attack loss"``.
        step: optimiser updates applied so far.

    Raises:
        Diverged: names the value and the step.
    """
    fine = bool(torch.isfinite(value).all()) if isinstance(value, torch.Tensor) else math.isfinite(value)
    if not fine:
        raise Diverged(f"{what} is not finite at step {step + 1}; stopped before the update", hint=_HINT)


@contextlib.contextmanager
def told_of_peers() -> Iterator[None]:
    """Turn what torch says in a block when another process of the job has died into a message for users.

    Raises:
        Lost: a collective failed, over gloo or NCCL.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo raises a plain RuntimeError that names its source file.
        if not isinstance(error, getattr(torch.distributed, "DistError", ())) and "gloo/transport" not in str(error):
            raise
        raise Lost(
            f"another process of this job is gone: {why(error)}",
            hint="its own message, or the launcher's, says why; start again to go on from the last checkpoint",
        ) from error


class FiniteGuard:
    """Check a step's losses and its gradient norm together: one device synchronisation per update."""

    def __init__(self) -> None:
        self._loss: torch.Tensor | None = None
        self._norm: Any = None

    def saw_loss(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's loss; NaN and infinity survive the sum."""
        self._loss = loss if self._loss is None else self._loss + loss

    def saw_norm(self, norm: Any) -> None:
        """Remember the global norm of the gradients before clipping."""
        self._norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def check(self, step: int) -> None:
        """Raise unless loss and gradient norm of the step are finite, then forget them.

        Raises:
            Diverged: with both values.
        """
        loss, norm = self._loss, self._norm
        self._loss = self._norm = None
        total = sum((value for value in (loss, norm) if value is not None), start=0.0)
        if not math.isfinite(float(total)):
            shown = [f"{name} {float(v):g}" for name, v in (("loss", loss), ("gradient norm", norm)) if v is not None]
            raise Diverged(f"step {step + 1} is not finite ({', '.join(shown)}); stopped before the update", hint=_HINT)


class Interrupts:
    """Note SIGINT and SIGTERM while the block runs instead of dying mid-step; a second one changes nothing."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM."""
        assert self.received is not None
        return 128 + self.received

    def __enter__(self) -> Interrupts:
        # Python allows handlers in the main thread only; elsewhere the signal belongs to whoever started us.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
