"""Checkpoints of a ``transformers.Trainer`` that are complete or absent: written beside, renamed, then pruned."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as hf_logging

from casehard.errors import Corrupt
from casehard.files import STAGING, crash_point, staged
from casehard.locks import lock
from casehard.train import adapters, checkpoint

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


class StagedCheckpoints(_Base):  # type: ignore[misc]
    """Stage what the base class saves; subclasses add their own files in :meth:`_save_own`."""

    _staging: Path | None = None
    _saved_step = -1

    def _save_own(self, folder: Path) -> None:
        """Add further files to a checkpoint that is being staged."""

    @property
    def _keeps(self) -> bool:
        """Whether this run writes checkpoints."""
        return str(getattr(self.args.save_strategy, "value", self.args.save_strategy)) != "no"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the output folder: two runs in one would sweep each other's files away."""
        if self._keeps and self.args.should_save:
            with lock(Path(self.args.output_dir)):
                yield
        else:
            yield

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
            with self._staged(final) as folder:
                self._staging = folder.parent
                super()._save_checkpoint(model, trial)
                self._barrier()
                if self.args.should_save:
                    self._keep_best(folder, final)
                    self._save_own(folder)
        finally:
            self._staging = None
        self._barrier()
        self._saved_step = step
        if self.args.should_save and self.args.save_total_limit:
            checkpoint.prune(out, keep=self.args.save_total_limit, protect=self.state.best_model_checkpoint)

    @contextlib.contextmanager
    def _staged(self, final: Path) -> Iterator[Path]:
        # Every rank writes its generator state into the folder that rank 0 opened and will publish.
        if self.args.should_save:
            with staged(final, needs=checkpoint.bytes_needed(self.model), tag="run") as folder:
                self._barrier()
                yield folder
        else:
            self._barrier()
            yield final.parent / f"{STAGING}{final.name}-run" / final.name

    def _barrier(self) -> None:
        if self.args.world_size > 1:
            torch.distributed.barrier()

    def _keep_best(self, folder: Path, final: Path) -> None:
        if self.state.best_global_step:
            # The base class looked for it beside the staging folder.
            self.state.best_model_checkpoint = str(final.with_name(f"{checkpoint.PREFIX}{self.state.best_global_step}"))
            self.state.save_to_json(str(folder / checkpoint.TRAINER_STATE))

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
        super()._save_optimizer_and_scheduler(output_dir)
        crash_point("save:after_optimizer")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _refused_pickles(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

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
        if adapters.is_peft(target) and not self.is_fsdp_enabled:
            adapters.load_adapters(target, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
