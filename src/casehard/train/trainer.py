"""The seams of a method on any ``transformers.Trainer``, and checkpoints that are complete or absent.

It knows nothing about any one method. Without a ``loss`` or ``backward`` seam the stock ``training_step`` runs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from casehard import compat
from casehard.config import digest
from casehard.errors import ConfigError, Diverged, Interrupted, Lost, Unsupported
from casehard.io.files import sweep
from casehard.train import checkpoint
from casehard.train.cost import CostTracker, counted
from casehard.train.guards import FiniteGuard, Interrupts, told_of_peers
from casehard.train.protocol import Setup, Step, Stopped, Whole, has
from casehard.train.staging import StagedCheckpoints


class _Hooks(TrainerCallback):
    """Passes the loop's events to the trainer."""

    def __init__(self, trainer: HardeningMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._begin()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._labels.clear()
        self.trainer.cost_tracker.step = state.global_step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._guard.check(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._after_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._boundary(control)


class HardeningMixin(StagedCheckpoints):
    """Give a Trainer subclass the seams of a method: ``class MyTrainer(HardeningMixin, SFTTrainer)``.

    Takes the base class's arguments and one more, ``method``: an object with any of the seams of
    :mod:`casehard.train.protocol`, or None. ``remove_unused_columns`` and ``logging_nan_inf_filter`` are switched off.

    Raises:
        ConfigError: ``save_total_limit=1``.
        Unsupported: ``push_to_hub`` during training, or a combination of method and parallelism the seams cannot serve.
    """

    def __init__(self, *args: Any, method: Any = None, **kwargs: Any) -> None:
        compat.require_supported()
        super().__init__(*args, **kwargs)
        self.method = method
        self.cost_tracker = CostTracker()
        self.identity: dict[str, str] = {"method": _identity(method)}
        self.after_update: Callable[[nn.Module, int], object] | None = None
        self._guard = FiniteGuard()
        self._interrupts = Interrupts()
        self._labels: list[Any] = []
        self._whole: Whole | None = None
        self._resumed: Path | None = None
        self._replaces_step = has(method, "loss") or has(method, "backward")
        self._hooks_step = has(method, "after_step")
        self.args.remove_unused_columns = False
        self.args.logging_nan_inf_filter = False
        self._check_arguments()
        self.add_callback(_Hooks(self))

    def _check_arguments(self) -> None:
        if self.args.save_total_limit == 1:
            raise ConfigError("save_total_limit is 1", hint="one bad write would lose everything: keep at least 2")
        if self._replaces_step and (self.args.n_gpu > 1 or self.is_deepspeed_enabled):
            raise Unsupported(
                f"method {_identity(self.method)} with DataParallel or DeepSpeed",
                hint="use one process per GPU (torchrun) with DDP or FSDP2",
            )
        asked = bool(self.args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if asked and not (self.is_fsdp_enabled or self.is_fsdp_xla_enabled or self._loaded_in_shards):
            raise Unsupported(
                f"FSDP was asked for and accelerate left it off: it shards on accelerators only, not on "
                f"{self.args.device.type}; the run would be DDP, with whole weights on every rank",
                hint="no fsdp; load with distributed_config=DistributedConfig(fsdp_size=N), which shards anywhere",
            )

    @property
    def _loaded_in_shards(self) -> bool:
        return bool(getattr(self.model, "is_distributed_loading_by_transformers", False))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Refuse to upload while training; without ``push_to_hub`` in the arguments, as the base class."""
        if self.args.push_to_hub:
            raise Unsupported("push_to_hub during training", hint="push the finished folder after checking it")
        super().init_hf_repo(token, private)

    @property
    def _scratch(self) -> Path | None:
        if not self._keeps:
            return None
        # Each rank's own: one must not replace or drop what another still reads.
        rank = self.args.process_index
        return Path(self.args.output_dir) / "scratch" / (f"rank-{rank}" if rank else "")

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, or continue a run exactly where it stopped.

        Args:
            resume_from_checkpoint: a checkpoint folder; True for the newest complete one; None to start afresh.
            trial: as in ``transformers.Trainer``.
            ignore_keys_for_eval: as in ``transformers.Trainer``.

        Raises:
            ConfigError: a fresh start on top of older checkpoints, a checkpoint of a different run, or a folder in use.
            Corrupt: the checkpoint asked for, or every one there is, fails verification.
            Diverged: loss or gradient is not finite; raised before that step's update.
            Interrupted: SIGINT or SIGTERM; a checkpoint was written if the run keeps any.
            Lost: a process the method needs is gone; a checkpoint was written if the run keeps any. Where it is another
                rank, the last one stands.
            StorageError: the disk is full; earlier checkpoints are intact.
        """
        with told_of_peers(), self._alone():
            return self._train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _train(self, resume_from_checkpoint: Any, trial: Any, ignore_keys_for_eval: Any) -> TrainOutput:
        last = self._last_step()
        self._resumed, done = self._resolve(resume_from_checkpoint, last)
        with Interrupts() as self._interrupts:
            try:
                self._prepare_method(last)
                if self._resumed is not None and done >= last:
                    output = self._load_finished(done)
                else:
                    folder = str(self._resumed) if self._resumed else None
                    output = super().train(folder, trial, ignore_keys_for_eval)
            except Diverged as error:
                self._log_divergence(error)
                raise
            except (Stopped, Lost) as error:
                # The method gave up before the step under way touched anything. Right after a resume the checkpoint of
                # this step is there, and whole, while the method may not have caught up with it yet.
                there = Path(self.args.output_dir) / f"{checkpoint.PREFIX}{self.state.global_step}"
                if self._keeps and self.state.global_step > 0 and not there.exists():
                    self._save_checkpoint(self.model, trial)
                if isinstance(error, Lost):
                    raise
                raise self._interrupted() from None
            # It may have reached one rank only, while the last checkpoint was written.
            if self._asked_to_stop():
                raise self._interrupted()
        if has(self.method, "finish"):
            self.method.finish(self.model)
            if left := self.cost_tracker.drain():
                self.log(left)
        self._largest(0)  # rank 0 clears for all: not before the last one is done
        self._clear_scratch()
        return output

    def _last_step(self) -> int:
        if self.args.max_steps > 0:
            return int(self.args.max_steps)
        # Building a data loader may draw from the global generator; the run must not notice.
        with torch.random.fork_rng(devices=[]):
            return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def _tidy(self) -> None:
        if self._keeps and self.args.should_save:
            out = Path(self.args.output_dir)
            out.mkdir(parents=True, exist_ok=True)
            sweep(out)
            self._clear_scratch()

    def _prepare_method(self, last: int) -> None:
        self._together(self._tidy)
        if has(self.method, "prepare"):
            setup = Setup(
                model=self.model,
                seed=self.args.seed,
                max_steps=last,
                micros=self.args.gradient_accumulation_steps,
                lr=float(self.args.learning_rate),
                scratch=self._together(self._own_scratch),
                log=self.cost_tracker.log,
                stop=self._asked_to_stop,
            )
            self.method.prepare(setup)

    def _own_scratch(self) -> Path | None:
        if self._scratch is not None:
            self._scratch.mkdir(parents=True, exist_ok=True)
        return self._scratch

    def _clear_scratch(self) -> None:
        if self._scratch is not None and self.args.should_save:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _begin(self) -> None:
        """Called when model, optimiser and scheduler stand and a checkpoint's values are in them."""
        self.cost_tracker.start()
        if self._resumed is None:
            return
        own = self._own(self._resumed)
        shell = checkpoint.ShellState.read(own)
        self.cost_tracker.restore(shell.meter)
        self._tr_loss = torch.tensor(shell.loss_sum, device=self.args.device)
        self._globalstep_last_logged = shell.logged_step
        if has(self.method, "restore"):
            self.method.restore(checkpoint.load_method(own, self._scratch))

    def _load_finished(self, step: int) -> TrainOutput:
        """Take over a run that was stopped after its last step; the stock loop would add one more."""
        assert self._resumed is not None
        if self.is_fsdp_enabled:
            # accelerate shards the model on its way into training only.
            self._prepare_for_training(step, self.get_train_dataloader(), None)
        self._load_from_checkpoint(str(self._resumed))
        self.state = TrainerState.load_from_json(str(self._resumed / checkpoint.TRAINER_STATE))
        self._begin()
        return TrainOutput(step, 0.0, {})

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Return the micro-batches of a step, and remember what they hold together."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        self._whole = counted(samples, self.args) if self._replaces_step else None
        return samples, items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one micro-batch: the stock step, or the method's ``loss`` or ``backward``."""
        loss: torch.Tensor
        self.cost_tracker.micros += 1
        if self._replaces_step:
            loss = self._method_step(model, inputs, num_items_in_batch)
        else:
            self.cost_tracker.passes += 1
            self.cost_tracker.batch(inputs)
            self._labels.append(None)
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._guard.saw_loss(loss)
        return loss

    def _method_step(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> torch.Tensor:
        # TRL offloads activations around its own training_step, which does not run here.
        with getattr(self, "maybe_activation_offload_context", None) or contextlib.nullcontext():
            model.train()
            if callable(getattr(self.optimizer, "train", None)):
                self.optimizer.train()
            batch = self._prepare_inputs(inputs)
            self._labels.append(batch.get("labels"))
            step = self._step(num_items)
            if has(self.method, "backward"):
                loss: torch.Tensor = self.method.backward(model, batch, step)
            else:
                loss = self.method.loss(model, batch, step)
                self._backward(loss)
        return loss.detach()

    def _step(self, num_items: Any) -> Step:
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}
        return Step(
            index=self.state.global_step,
            micro=len(self._labels) - 1,
            micros=self.current_gradient_accumulation_steps,
            loss=functools.partial(self._plain_loss, num_items=num_items),
            backward=self._backward,
            log=self.cost_tracker.log,
            compute_dtype=precision.get(self.accelerator.mixed_precision),
            whole=self._whole,
        )

    def _plain_loss(self, model: nn.Module, batch: Mapping[str, Any], *, num_items: Any = None) -> torch.Tensor:
        """Return the loss of a batch, scaled so that the micro-batches of a step add up.

        The user's batches share the token count of the whole step, now or held back until its last micro-batch; a batch
        with other labels is averaged over its own tokens.
        """
        own = any(batch.get("labels") is labels for labels in self._labels)
        items = num_items if own else None
        self.cost_tracker.batch(batch)
        with self.compute_loss_context_manager():
            loss: torch.Tensor = self.compute_loss(model, dict(batch), num_items_in_batch=items)
        if not (own and compat.loss_is_scaled(self, items)):
            loss = loss / self.current_gradient_accumulation_steps
        return loss

    def _backward(self, loss: torch.Tensor) -> None:
        self.cost_tracker.passes += 1
        self.accelerator.backward(loss)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._guard.saw_norm(norm)
        return norm

    def _after_step(self) -> None:
        if self._hooks_step and not self.accelerator.optimizer_step_was_skipped:
            self.method.after_step(self.model, self.optimizer, self._step(None))

    def _boundary(self, control: Any) -> None:
        """Between two steps: the caller's hook, and stopping when a signal came."""
        if self.state.global_step >= self.state.max_steps:
            control.should_log = True
        if self.after_update is not None:
            # What the caller does here (evaluation, say) must not change the dropout masks of later steps.
            with torch.random.fork_rng():
                enough = self.after_update(self.model, self.state.global_step)
            self.model.train()
            if enough is True:
                control.should_training_stop = control.should_log = True
        if self._asked_to_stop():
            control.should_training_stop = True
            control.should_save = self._keeps

    def _asked_to_stop(self) -> bool:
        asked = self._interrupts.received is not None
        if self.args.world_size > 1:
            # A signal reaches the ranks at different steps; all must stop at the same one.
            flag = torch.tensor(float(self._interrupts.received or 0), device=self.args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            asked = bool(flag)
            if asked and self._interrupts.received is None:
                self._interrupts.received = int(flag)
        return asked

    def _interrupted(self) -> Interrupted:
        step = self.state.global_step
        kept = self._keeps
        return Interrupted(
            f"stopped by a signal after step {step} of {self.state.max_steps}",
            hint=f"resume from {self.args.output_dir}" if kept else "the run kept no checkpoints",
            exit_code=self._interrupts.exit_code,
        )

    def _log_divergence(self, error: Diverged) -> None:
        """Leave a row that says nan: a log that ends in good numbers would tell another story."""
        self.state.global_step += 1
        self.log({"loss": float("nan"), "grad_norm": float("nan")})
        self.state.global_step -= 1
        error.log = list(self.state.log_history)  # type: ignore[attr-defined]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the method's telemetry, averaged since the last row, to rows of training losses."""
        if "loss" in logs:
            logs.update(self.cost_tracker.drain())
        super().log(logs, start_time)

    def _save_own(self, folder: Path) -> None:
        if has(self.method, "state"):
            checkpoint.save_method(self.method.state(), folder)
        self.cost_tracker.count_extra(self.method)
        checkpoint.ShellState(
            meter=self.cost_tracker.state(),
            loss_sum=float(self._tr_loss),
            logged_step=self._globalstep_last_logged,
            identity=self.identity,
        ).write(folder)


class HardenedTrainer(HardeningMixin, Trainer):
    """The stock Trainer with the seams; prints nothing by itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)


def _identity(method: Any) -> str:
    if method is None:
        return "none"
    return f"{getattr(method, 'name', type(method).__name__)}:{digest(getattr(method, 'config', None))[:16]}"
