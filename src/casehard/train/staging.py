"""Checkpoints of a ``transformers.Trainer`` that are complete or absent: written beside, renamed, then pruned.

Of several ranks number 0 opens and publishes the folder. Each adds its generator state and, where the model is sharded,
its own part (:mod:`casehard.train.shards`); whether accelerate sharded it or it was loaded in shards is all the same.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.utils import logging as hf_logging

from casehard.distributed.fsdp import is_sharded
from casehard.errors import ConfigError, Corrupt, Elsewhere, StorageError
from casehard.io.disk import storage_errors
from casehard.io.files import STAGING, TOGETHER, crash_point, staged
from casehard.io.locks import lock
from casehard.train import adapters, checkpoint, shards

R = TypeVar("R")

_SCHEDULER = "scheduler.pt"
# A mixin over any Trainer subclass; what it calls on ``super()`` and ``self`` belongs to that class.
_Base: Any = object


@contextlib.contextmanager
def _refused_pickles(folder: str | None) -> Iterator[None]:
    """Name the folder when torch, reading with ``weights_only=True``, finds more than tensors in a file."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise Corrupt(
            f"{folder}: a file holds more than tensors and was not loaded: {str(error).splitlines()[0]}",
            hint="it was not written by casehard; do not use this folder",
        ) from None


@contextlib.contextmanager
def _admitted(model: Any, arguments: Any) -> Iterator[bool | None]:
    """Let a Trainer be made for a model that was loaded in shards and keeps checkpoints; yield what to set again.

    transformers refuses the two together, unless only the model is saved, because it could not resume; here it can.
    """
    if arguments is None or not getattr(model, "is_distributed_loading_by_transformers", False):
        yield None
        return
    asked, arguments.save_only_model = arguments.save_only_model, True
    try:
        yield asked
    finally:
        arguments.save_only_model = asked


class StagedCheckpoints(_Base):  # type: ignore[misc]
    """Stage what the base class saves; subclasses add their own files in :meth:`_save_own`."""

    identity: dict[str, str]
    """What must be the same when a run goes on."""
    _staging: Path | None = None
    _saved_step = -1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _admitted(
            *(kwargs.get(name, (*args, None, None)[i]) for i, name in enumerate(("model", "args")))
        ) as asked:
            super().__init__(*args, **kwargs)
        if asked is not None:
            self.args.save_only_model = asked

    def _save_own(self, folder: Path) -> None:
        """Add further files to a checkpoint that is being staged, or to a rank's own part of it."""

    @property
    def _in_shards(self) -> bool:
        """Whether each rank writes its own shards, instead of rank 0 the whole model."""
        return not self.args.save_only_model and is_sharded(self.model)

    def _own(self, folder: Path) -> Path:
        """Return where this rank's own state is in a checkpoint: rank 0's at the top, which others share if alike."""
        alone = self._in_shards and self.args.process_index > 0
        return self._part(folder) if alone else folder

    def _part(self, folder: Path | str) -> Path:
        return shards.part(Path(folder), self.args.process_index, self.args.world_size)

    @property
    def _keeps(self) -> bool:
        """Whether this run writes checkpoints."""
        return str(getattr(self.args.save_strategy, "value", self.args.save_strategy)) != "no"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the output folder: two runs in one would sweep each other's files away."""
        with contextlib.ExitStack() as stack:
            if self._keeps:
                self._together(lambda: self._hold(stack))
            yield

    def _hold(self, stack: contextlib.ExitStack) -> None:
        if self.args.should_save:
            stack.enter_context(lock(Path(self.args.output_dir)))

    def _resolve(self, wanted: str | bool | None, last: int) -> tuple[Path | None, int]:
        """Return the verified checkpoint to start from and its step."""
        out = Path(self.args.output_dir)
        if not wanted:
            self._together(lambda: self._require_fresh(out))
            return None, 0
        # One rank reads every byte, and decides for all.
        found = self._together(lambda: self._verified(wanted, last) if self.args.should_save else 0)
        step = self._largest(found)
        return (out / f"{checkpoint.PREFIX}{step}" if wanted is True else Path(str(wanted))), step

    def _require_fresh(self, out: Path) -> None:
        if self._keeps and checkpoint.checkpoints(out):
            raise ConfigError(
                f"{out} already holds checkpoints", hint="pass resume_from_checkpoint=True or use a fresh folder"
            )

    def _verified(self, wanted: str | bool, last: int) -> int:
        out, ranks = Path(self.args.output_dir), self.args.world_size
        if wanted is not True:
            folder = Path(str(wanted))
            step = checkpoint.require_complete(folder, world_size=ranks)
        elif found := checkpoint.newest(out, last_step=last, world_size=ranks):
            folder, step = found, int(found.name.removeprefix(checkpoint.PREFIX))
        else:
            raise ConfigError(f"nothing to resume from in {out}", hint="start without resume_from_checkpoint")
        checkpoint.ShellState.read(folder).require_same(self.identity, folder)
        return step

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let the base class save into a staging folder, add our own files, publish, then prune."""
        step = self.state.global_step
        if self._saved_step == step:
            return
        out = Path(super()._get_output_dir(trial))
        final = out / f"{checkpoint.PREFIX}{step}"
        try:
            with contextlib.ExitStack() as stack:
                # Where one rank fails, all of them stop; the rest would wait for it without end.
                folder = self._together(lambda: self._open(stack, final))
                self._staging = folder.parent
                self._together(lambda: self._fill(folder, model, trial))
                self._agree_on_best(final)
                self._together(lambda: self._complete(folder, final))
                self._together(stack.close)
        finally:
            self._staging = None
        self._saved_step = step
        if self.args.save_total_limit:
            self._together(lambda: self._prune(out))

    def _prune(self, out: Path) -> None:
        if self.args.should_save:
            checkpoint.prune(out, keep=self.args.save_total_limit, protect=self.state.best_model_checkpoint)

    def _open(self, stack: contextlib.ExitStack, final: Path) -> Path:
        """Open the staging folder; closing the stack makes it ``final``, an error that unwinds it leaves nothing."""
        needs = checkpoint.bytes_needed(self.model)
        if self.args.should_save:
            return stack.enter_context(staged(final, needs=needs, tag=TOGETHER))
        # Every rank writes into the folder that rank 0 opened and will publish.
        stack.enter_context(storage_errors(final.parent, needs=needs))
        return final.parent / f"{STAGING}{final.name}-{TOGETHER}" / final.name

    def _fill(self, folder: Path, model: nn.Module, trial: Any) -> None:
        # Told of a best step, the base class waits for all ranks between weights and optimiser, without end for one
        # that failed, and looks for its checkpoint beside the staging folder: _agree_on_best does it instead.
        best, self.state.best_global_step = self.state.best_global_step, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.state.best_global_step = best
        if self._own(folder) != folder:
            self._save_own(self._own(folder))

    def _complete(self, folder: Path, final: Path) -> None:
        if not self.args.should_save:
            return
        if self.state.best_global_step:
            self.state.save_to_json(str(folder / checkpoint.TRAINER_STATE))  # the base class wrote it without
        self._save_own(folder)
        ranks = self.args.world_size
        if self._in_shards and (missing := checkpoint.missing_files(folder, ranks)):
            raise StorageError(
                f"{folder}: written by {ranks} processes, and it lacks {', '.join(missing)}",
                hint="the output folder must be on a disk that all of them share",
            )

    def _together(self, act: Callable[[], R]) -> R:
        """Do something on every rank; return when all have done it.

        Raises:
            Elsewhere: here it went well, on another rank it did not.
        """
        if self.args.world_size == 1:
            return act()
        failure: Exception | None = None
        try:
            done = act()
        except Exception as error:  # raised below, once the others know
            failure = error
        failed = self._largest(0 if failure is None else 1 + self.args.process_index)
        if failure is not None:
            raise failure
        if failed:
            raise Elsewhere(
                f"process {failed - 1} of {self.args.world_size} could not do its part of a checkpoint",
                hint="its own message says why; earlier checkpoints are intact",
            )
        return done

    def _largest(self, number: int) -> int:
        """Return the largest of the numbers that the ranks bring."""
        if self.args.world_size == 1:
            return number
        held = torch.tensor(number, device=self.args.device)
        torch.distributed.all_reduce(held, op=torch.distributed.ReduceOp.MAX)
        return int(held)

    def _agree_on_best(self, final: Path) -> None:
        """Give the best checkpoint its name on every rank: each will read its part of it. Rank 0 looks what is there.

        It is the one being written, or an older one; the best step may also have been evaluated and not saved.
        """
        step = self.state.best_global_step or 0
        there = final.with_name(f"{checkpoint.PREFIX}{step}")
        step = self._largest(step if self.args.should_save and (there == final or there.is_dir()) else 0)
        if step:
            self.state.best_model_checkpoint = str(final.with_name(f"{checkpoint.PREFIX}{step}"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the base class does; of a sharded model each rank writes its shards into a staged checkpoint."""
        if self._staging is None or output_dir is None or not self._in_shards:
            super().save_model(output_dir, _internal_call)
            return
        shards.save_weights(self.model, self._part(output_dir))
        if self.args.should_save:
            checkpoint.save_arguments(self.args, Path(output_dir))
        crash_point("save:after_weights")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # The base class pickles the arguments; the token must not be in them even for a moment.
        token, self.args.hub_token = self.args.hub_token, None
        bars = hf_logging.is_progress_bar_enabled()
        hf_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args.hub_token = token
            if bars:
                hf_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
        if self.args.should_save:
            checkpoint.save_arguments(self.args, Path(output_dir or self.args.output_dir))
        crash_point("save:after_weights")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._in_shards:
            shards.save_optimizer(self.model, self.optimizer, self._part(output_dir))
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
        crash_point("save:after_optimizer")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _refused_pickles(checkpoint):
            if checkpoint is None or not self._in_shards:
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            shards.load_optimizer(self.model, self.optimizer, self._part(checkpoint))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / _SCHEDULER, weights_only=True))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A tied weight is saved once, under its other name; the base class calls it missing.
        weights = dict(self.model.named_parameters(remove_duplicate=False))
        missing = set(load_result.missing_keys)
        loaded = {id(weight) for name, weight in weights.items() if name not in missing}
        load_result.missing_keys[:] = [
            name for name in load_result.missing_keys if name not in weights or id(weights[name]) not in loaded
        ]
        super()._issue_warnings_after_load(load_result)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _refused_pickles(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        folder = Path(resume_from_checkpoint)
        if bool(shards.saved_by(folder)) != is_sharded(target):
            kinds = ("a whole model", "a sharded one")
            saved, here = (kinds[x] for x in (bool(shards.saved_by(folder)), is_sharded(target)))
            raise ConfigError(
                f"{folder} is of {saved}, this run trains {here}", hint="go on as the run began, or in another folder"
            )
        if is_sharded(target):
            shards.load_weights(target, self._part(folder))
        elif adapters.is_peft(target) and not self.is_fsdp_enabled:
            adapters.load_adapters(target, folder)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._together(self._load_best)

    def _load_best(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        if not best.is_dir():
            # The base class would only warn, and a rank go on with its part of the last model.
            raise StorageError(
                f"{best}: the best checkpoint is not there",
                hint="the output folder must be on a disk that all processes share; the last model is in the newest",
            )
        if shards.saved_by(best):
            shards.load_weights(self.model, self._part(best))
        else:
            super()._load_best_model()
