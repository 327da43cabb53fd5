"""How a model is trained: one frozen configuration and its translation into ``TrainingArguments``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from casehard.limits import BatchSize, Count, Fraction, Large, LearningRate, Limited, Natural, Within

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

_OPTIMIZERS = {"adamw": "adamw_torch_fused", "sgd": "sgd"}


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Limited):
    """Settings of one training run."""

    steps: Count = 300
    """Optimiser updates."""
    batch_size: BatchSize = 32
    """Rows per micro-batch and process."""
    accumulation: Count = 1
    """Micro-batches per optimiser update."""
    lr: LearningRate = 3e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "constant", "linear"] = "cosine"
    """Learning rate after the warm-up."""
    warmup: Natural = 10
    """Updates of linear warm-up."""
    weight_decay: Large = 0.01
    """Decoupled weight decay; norms and biases are exempt."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW moment decay."""
    clip: Large = 1.0
    """Global gradient norm is clipped to this; 0 switches clipping off."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 means autocast over fp32 master weights; auto takes it on GPUs that have it and fp32 on CPUs."""
    save_every: Natural = 0
    """Updates between checkpoints; 0 keeps only the one at the end (or at an interrupt)."""
    keep: Annotated[int, Within(2, 10**6)] = 2
    """Complete checkpoints kept; at least 2, as a single one is lost with one bad write."""
    log_every: Count = 10
    """Updates between log rows."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Update rule."""
    embeddings: bool = True
    """Train the token embeddings, and an output head tied to them; off leaves them as they are."""


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Return whether training on ``device`` runs under bf16 autocast.

    CPUs compute in fp32 unless told otherwise: with AVX512-BF16 but no matrix unit, autocast took 1.7 times as long.
    """
    import torch

    if precision != "auto":
        return precision == "bf16"
    return device.type == "cuda" and bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _schedule(config: TrainConfig) -> str:
    return "constant_with_warmup" if config.schedule == "constant" and config.warmup else config.schedule


def training_arguments(
    config: TrainConfig, *, out: Path | None, seed: int, device: torch.device | None = None
) -> TrainingArguments:
    """Translate a config into ``TrainingArguments`` with everything slow or chatty switched off.

    Args:
        config: the recipe.
        out: folder for checkpoints; None means that nothing is written.
        seed: of shuffling, dropout and initialisation.
        device: where the model is; None takes the first accelerator when there is one.
    """
    import torch
    from transformers import TrainingArguments

    from casehard.compat import require_supported

    require_supported()
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    values: dict[str, Any] = {
        # The Trainer creates its output folder even when it never saves; "." exists already.
        "output_dir": str(out) if out is not None else ".",
        "save_strategy": "no" if out is None else "steps",
        # Beyond the last step: only the checkpoint at the end of the run is left.
        "save_steps": config.save_every or config.steps + 1,
        "save_total_limit": config.keep,
        "max_steps": config.steps,
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "learning_rate": config.lr,
        "lr_scheduler_type": _schedule(config),
        "warmup_steps": config.warmup,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.betas[0],
        "adam_beta2": config.betas[1],
        "max_grad_norm": config.clip,
        "optim": _OPTIMIZERS[config.optimizer],
        "bf16": uses_bf16(config.precision, device),
        "logging_steps": config.log_every,
        "logging_nan_inf_filter": False,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": device.type == "cuda",
        "dataloader_num_workers": 0,
        "use_cpu": device.type == "cpu",
        "seed": seed % 2**32,
    }
    arguments = TrainingArguments(**values)
    if arguments.n_gpu > 1:
        # Otherwise the Trainer replicates the model over all visible GPUs behind the method's back.
        arguments._n_gpu = 1
    return arguments
