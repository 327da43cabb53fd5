"""The sampler that proposes attackers, and the journal that remembers them: the one place that imports Optuna.

Ask and tell: a proposal belongs to a slot (0 to budget - 1), and its draws are a function of (seed, slot) and of what
was told before. So one worker makes the same search whether or not it was interrupted. What a killed run was at work
on is proposed again first; what was told is never run twice. The journal is written by one process.

Source: TPE, Bergstra et al. 2011 and Watanabe 2304.11127, as Optuna implements it, with a third of random draws as in
BOHB, Falkner et al. 1807.01774.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casehard.adversary.space import Dimension
from casehard.errors import Corrupt, MissingExtra
from casehard.io.disk import storage_errors
from casehard.seeds import derive

JOURNAL = "journal.log"


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise MissingExtra("optuna", "search", purpose="the search for attackers") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def require_optuna() -> None:
    """Raise MissingExtra where Optuna is not installed; asked before anything long starts."""
    _optuna()


@dataclass(frozen=True)
class Asked:
    """A proposal to try."""

    slot: int
    drawn: dict[str, Any]
    """A value of every dimension."""
    number: int
    """Its number in the journal."""


class Study:
    """Propose attackers and remember how they did.

    Args:
        out: folder of the journal.
        dimensions: what is searched; not empty.
        budget: proposals altogether.
        seed: of every draw.
        random: draw uniformly instead of by TPE.

    Raises:
        MissingExtra: Optuna is not installed.
        Corrupt: the journal is damaged.
    """

    def __init__(
        self, out: Path, dimensions: Sequence[Dimension], *, budget: int, seed: int, random: bool = False
    ) -> None:
        self._optuna = _optuna()
        self.budget, self.seed, self.random = budget, seed, random
        self._folder = out
        self._trying: dict[int, Any] = {}
        self._space = {d.name: self._distribution(d) for d in dimensions}
        path = out / JOURNAL
        _mend(path)
        storages, journal = self._optuna.storages, self._optuna.storages.journal
        try:
            with storage_errors(out), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                storage = storages.JournalStorage(journal.JournalFileBackend(str(path)))
                self._study: Any = self._optuna.create_study(
                    storage=storage, study_name="search", direction="maximize", load_if_exists=True
                )
                self._again()
        except (ValueError, KeyError, AssertionError, TypeError) as error:
            raise Corrupt(f"{path} is damaged: {error}", hint="remove the folder and search again") from None

    def _distribution(self, dimension: Dimension) -> Any:
        kinds = self._optuna.distributions
        if dimension.choices:
            return kinds.CategoricalDistribution(dimension.choices)
        kind = kinds.IntDistribution if dimension.whole else kinds.FloatDistribution
        return kind(dimension.low, dimension.high, log=dimension.log)

    def _of(self, *states: str) -> list[Any]:
        wanted = tuple(getattr(self._optuna.trial.TrialState, state) for state in states)
        return list(self._study.get_trials(deepcopy=False, states=wanted))

    def _again(self) -> None:
        """Put back what was being tried when the run was killed."""
        for trial in self._of("RUNNING"):
            if "result" in trial.user_attrs:  # killed between the two lines of tell
                self._study.tell(trial.number, trial.user_attrs["result"]["value"])
                continue
            self._study.tell(trial.number, state=self._optuna.trial.TrialState.FAIL)
            # One whose proposal was not written whole is simply drawn anew.
            if "slot" in trial.user_attrs and trial.params.keys() == self._space.keys():
                self._study.enqueue_trial(trial.params, user_attrs={"slot": trial.user_attrs["slot"]})

    @property
    def told(self) -> list[dict[str, Any]]:
        """What was told of every finished proposal, by slot."""
        return sorted((t.user_attrs["result"] for t in self._of("COMPLETE")), key=lambda result: int(result["slot"]))

    def _free(self) -> list[int]:
        taken = {t.user_attrs.get("slot") for t in self._of("COMPLETE", "RUNNING", "WAITING")}
        return [slot for slot in range(self.budget) if slot not in taken]

    def ask(self) -> Asked | None:
        """Return the next proposal; None when the budget is spent or everything left is being tried."""
        free = self._free()
        if not free and not self._of("WAITING"):
            return None
        with storage_errors(self._folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # multivariate and constant_liar are experimental in Optuna 4
            self._study.sampler = self._sampler(free[0] if free else 0)
            trial = self._study.ask(self._space)
            slot = trial.user_attrs.get("slot")
            if slot is None:
                trial.set_user_attr("slot", slot := free[0])
        self._trying[trial.number] = trial
        return Asked(int(slot), {name: trial.params[name] for name in self._space}, trial.number)

    def _sampler(self, slot: int) -> Any:
        samplers, seed = self._optuna.samplers, derive(self.seed, slot, "attack-search") % 2**32
        if self.random or explores(slot, self.budget):
            return samplers.RandomSampler(seed=seed)
        return samplers.TPESampler(
            seed=seed, n_startup_trials=startup(self.budget), multivariate=True, constant_liar=True
        )

    def tell(self, asked: Asked, value: float, result: dict[str, Any]) -> None:
        """Remember how a proposal did.

        Args:
            value: what is maximised; finite.
            result: JSON values, given back by :attr:`told`.
        """
        with storage_errors(self._folder):
            kept = {**result, "slot": asked.slot, "value": value}
            self._trying.pop(asked.number).set_user_attr("result", kept)
            self._study.tell(asked.number, value)


def startup(budget: int) -> int:
    """Return how many proposals TPE draws at random before it models anything: a quarter of the budget, 10 at most."""
    return max(1, min(10, budget // 4))


def explores(slot: int, budget: int) -> bool:
    """Return whether a slot of a TPE search is drawn at random: the first ones, and every third after them.

    TPE alone may settle on the first choice that did well (``mode: full``) and never try another again. A constant
    share of random draws keeps it from that; a third is BOHB's.

    Source: Falkner et al., arXiv 1807.01774, section 3.1.
    """
    first = startup(budget)
    return slot < first or (slot - first) % 3 == 2


def _mend(path: Path) -> None:
    """Drop what a killed process left: half a line, and the lock of a journal that the run folder's lock now guards."""
    with contextlib.suppress(FileNotFoundError):
        path.with_name(f"{path.name}.lock").unlink()
    if path.is_file():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
