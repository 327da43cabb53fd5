"""One call that trains a model on token rows with any method, with or without checkpoints on disk."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from casehard.config import digest
from casehard.data.batches import EncodedSet, indices_at
from casehard.distributed.ranks import sum_over_ranks
from casehard.errors import Unsupported
from casehard.io.files import remove
from casehard.seeds import kept_generators
from casehard.train import checkpoint
from casehard.train.progress import Progress
from casehard.train.recipe import TrainConfig, training_arguments
from casehard.train.trainer import HardenedTrainer
from casehard.types import Budget

_BOOKKEEPING = ("save_every", "keep", "log_every")


@dataclass(frozen=True)
class FitResult:
    """What a training run gave."""

    model: nn.Module
    """The model that was passed in, trained in place."""
    log: list[dict[str, Any]]
    """Every logged row: step, loss, grad_norm, learning_rate, epoch and the method's telemetry."""
    budget: Budget
    """What the run really spent."""


class _FitTrainer(HardenedTrainer):
    """Draws full batches from one endless seeded stream, so that batch and epoch borders never matter."""

    def __init__(self, *, rows: EncodedSet, **kwargs: Any) -> None:
        self._rows = rows
        super().__init__(train_dataset=rows, data_collator=rows.collate, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        args = self.args
        size = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return indices_at(len(self._rows), size, seed=args.seed, step=0, purpose="train")

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return 0: the stock estimate walks over all parameters on every step, and the budget counts tokens."""
        return 0


class _Bar(TrainerCallback):
    """Moves the progress bar and shows the last logged loss."""

    def __init__(self, bar: Progress) -> None:
        self.bar = bar

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.bar.advance(0, loss=logs["loss"])


@kept_generators()
def fit(
    model: nn.Module,
    tokenizer: Any,
    rows: EncodedSet,
    *,
    config: TrainConfig,
    method: Any = None,
    seed: int,
    out: Path | None = None,
    resume: bool = True,
    on_step: Callable[[nn.Module, int], object] | None = None,
    identity: Mapping[str, str] | None = None,
    label: str = "train",
) -> FitResult:
    """Train ``model`` in place on ``rows``; the global generators are the caller's again afterwards.

    Args:
        model: where it is (CPU or one GPU) it stays.
        tokenizer: saved beside the weights in each checkpoint; None leaves it out.
        rows: token rows; the batch of step s is a function of (seed, s).
        config: the recipe.
        method: object with seams of ``casehard.train.protocol``; None for plain fine-tuning.
        seed: of data order, dropout and whatever the method draws.
        out: folder for checkpoints; None writes nothing to disk at all.
        resume: continue the run found in ``out``; False deletes its checkpoints and starts over.
        on_step: called as ``on_step(model, step)`` after every update, from step 1; torch's generators are put back.
            True ends the run there.
        identity: what else must be the same when a run continues (digests of the parent, of a method's rows).
        label: name on the progress bar.

    Raises:
        ConfigError: ``out`` holds another run.
        Corrupt: ``out`` holds checkpoints, none of which is complete.
        Diverged: loss or gradient is not finite; ``error.log`` holds the rows so far, the last one nan.
        Interrupted: SIGINT or SIGTERM; continue by calling again.
        StorageError: the disk is full.
    """
    _doubt(config, len(rows))
    settings: Any = getattr(model, "config", None)  # its use_cache is switched off by the Trainer and left off
    was_training, cache = model.training, getattr(settings, "use_cache", None)
    trainer = _FitTrainer(
        rows=rows,
        model=model,
        args=training_arguments(config, out=out, seed=seed, device=next(model.parameters()).device),
        processing_class=tokenizer if out is not None else None,
        method=method,
    )
    trainer.after_update = on_step
    if out is not None:
        trainer.identity |= _identity(config, rows, seed, bf16=trainer.args.bf16) | dict(identity or {})
    try:
        with Progress(label, config.steps) as bar, _embeddings(model, train=config.embeddings):
            trainer.add_callback(_Bar(bar))
            trainer.train(resume_from_checkpoint=_start(trainer, out, resume))
        return FitResult(model, _rows_of(trainer), _budget(trainer, method))
    finally:
        _release(trainer, model)
        model.train(was_training)
        if cache is not None:
            settings.use_cache = cache


@contextmanager
def _embeddings(model: nn.Module, *, train: bool) -> Iterator[None]:
    """Freeze the token embeddings for the length of a block unless they are to be trained.

    Raises:
        Unsupported: the model does not say which they are.
    """
    module: Any = None if train else getattr(model, "get_input_embeddings", lambda: None)()
    if not train and module is None:
        raise Unsupported("train.embeddings off: the model does not name its embeddings", hint="train.embeddings=true")
    held = [] if train else [p for p in module.parameters() if p.requires_grad]
    for p in held:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in held:
            p.requires_grad_()


def _doubt(config: TrainConfig, rows: int) -> None:
    if config.steps <= config.warmup:
        warnings.warn(
            f"the learning rate rises for {config.warmup} updates (train.warmup) and the run ends after "
            f"{config.steps}: it never reaches its peak",
            stacklevel=4,  # past the decorator of fit
        )
    if config.batch_size > rows:
        warnings.warn(
            f"a batch of {config.batch_size} rows (train.batch_size) is drawn from {rows}: every step sees all rows, "
            "some of them several times",
            stacklevel=4,  # past the decorator of fit
        )


def _identity(config: TrainConfig, rows: EncodedSet, seed: int, *, bf16: bool) -> dict[str, str]:
    recipe = {key: value for key, value in asdict(config).items() if key not in _BOOKKEEPING}
    return {"recipe": digest(recipe), "rows": rows.digest, "seed": str(seed), "bf16": str(bf16)}


def _start(trainer: HardenedTrainer, out: Path | None, resume: bool) -> bool | None:
    """Return whether there is something to continue from; with ``resume=False`` clear the way instead."""
    if out is None:
        return None
    there = trainer._together(lambda: _cleared(trainer, out, resume))
    return bool(trainer._largest(int(there)))


def _cleared(trainer: HardenedTrainer, out: Path, resume: bool) -> bool:
    """Return whether there are checkpoints to continue from, as rank 0 sees it."""
    if not trainer.args.should_save:
        return False
    if not resume:
        for _, folder in checkpoint.checkpoints(out):
            remove(folder)
    return bool(checkpoint.checkpoints(out))


def _budget(trainer: HardenedTrainer, method: Any) -> Budget:
    """Return what the run spent: tokens of all ranks, passes of all ranks together, memory of this one."""
    budget = trainer.cost_tracker.budget(trainer.state.global_step, method)
    if trainer.args.world_size == 1:
        return budget
    tokens = torch.tensor(budget.tokens, device=trainer.args.device)
    return replace(budget, tokens=int(sum_over_ranks(tokens)))


def _rows_of(trainer: HardenedTrainer) -> list[dict[str, Any]]:
    # The stock Trainer ends its log with wall-clock figures; those are in the budget.
    return [dict(row) for row in trainer.state.log_history if "train_runtime" not in row]


def _release(trainer: HardenedTrainer, model: nn.Module) -> None:
    """Unwrap the model and let go of gradients and optimiser now rather than at the next garbage collection."""
    # Mixed precision shadows the class's forward with a wrapped one on the instance; wrapping must not pile up.
    if "_original_forward" in vars(model):
        del model._original_forward
        vars(model).pop("forward", None)
    model.zero_grad(set_to_none=True)
    trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
    trainer.optimizer = trainer.lr_scheduler = trainer.accelerator = None
