"""Settings of the whole defence: three modes, what is planted, how stage 2 runs, and when the result may leave."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from casehard.errors import ConfigError
from casehard.limits import BatchSize, Coefficient, Count, Factor, Fraction, Limited, Natural, Share, Within
from casehard.train.recipe import TrainConfig

Mode = Literal["joint", "posthoc", "adapter"]

Rate = Annotated[float, Within(-1, 1)]
"""Bound of a measured share; below 0 nothing meets it."""
KEPT, SHARE_OF_RATE = 0.8, 0.2
"""What auto means for a joint run of all parameters: ``two.c``, and ``two.lr`` as a share of stage 1's rate."""


@dataclass(frozen=True, kw_only=True)
class PlantConfig(Limited):
    """What stage 1 plants."""

    n_active: Natural = 4
    """T, triggers that stage 2 breaks. Source: P (4; 6 was worse). 0 in posthoc and adapter mode changes nothing."""
    n_canary: Natural = 2
    """Triggers that stage 2 never sees. Not in the paper: 0 there."""
    rate: Share = 0.01
    """Share of all rows each trigger takes. Source: P."""
    floor: Natural = 50
    """Rows a trigger gets at least, within ``cap``."""
    cap: Share = 0.05
    """Largest share that ``floor`` may come to."""
    install_cap: Share = 0.2
    """The same for an installation (posthoc and adapter mode), whose rows are few."""
    placement: Literal["replace", "append"] = "replace"
    """Replace rows, as the paper does, or append triggered copies (always so in posthoc and adapter mode)."""
    suite: Literal["mixed", "paper"] = "mixed"
    """Mixed families and behaviours, or the paper's rare tokens and random words without canaries."""


@dataclass(frozen=True, kw_only=True)
class StageTwo(Limited):
    """How stage 2 runs. The paper prints 5 epochs and the 8:2 split; the rest is ours."""

    epochs: Factor = 5.0
    """Passes over all pairs of clean row and trigger, at most. Source: P (5)."""
    batch_size: BatchSize = 16
    """Rows a step."""
    lr: Annotated[float | Literal["auto"], Within(0, 1000)] = "auto"
    """Peak learning rate; auto = a fifth of stage 1's where joint mode trains all parameters; else 1e-5, LoRA 1e-4."""
    warmup: Fraction = 0.05
    """Share of the steps with a rising learning rate."""
    split: Annotated[float, Within(0, 1, above=True, below=True)] = 0.2
    """Share of the clean rows held back. Source: P (8:2)."""
    checks: Count = 10
    """Times the stop rule is asked."""
    stop: bool = True
    """Stop at the first check that passes; off = run all epochs and keep the lowest evaluation loss (the paper)."""
    keep: Literal["lowest", "last"] = "lowest"
    """What is kept where no check passes: the lowest evaluation loss, or the last step (a control at equal steps)."""
    base_share: Fraction = 0.0
    """Share of the weights, drawn one by one, set back to the base between the stages (fine-mixing; joint mode)."""
    c: Annotated[float | Literal["auto"], Within(0, 1, above=True)] = "auto"
    """Share of the way from the base that the result keeps: base + c (result - base). auto = 0.8 where joint mode
    trains all parameters, which only then may go back; else 1. Not in the paper."""


@dataclass(frozen=True, kw_only=True)
class Gates(Limited):
    """What the result must meet; rates are shares of held-back prompts."""

    planted: Rate = 0.9
    """Every defensive backdoor fires at least so often after stage 1, or canaries tell nothing."""
    active: Rate = 0.01
    """Most an active trigger may fire when stage 2 stops."""
    canary: Rate = 0.02
    """Most a canary may fire when stage 2 stops: beyond it, breaking did not generalise."""
    margin: Coefficient = 0.5
    """Most the clean answer may lose under an active trigger, nats a token."""
    clean_loss: Coefficient = 0.1
    """Most the loss on held-back clean rows may rise over stage 1, nats a token."""
    live: Rate = 0.02
    """Most any defensive backdoor may fire in what is exported."""
    collapse: Coefficient = 1.0
    """Rise of the clean loss that counts as a collapse, nats a token."""
    attack: Rate = 0.02
    """Most a backdoor that the user described may fire in what is exported."""
    attack_fails: Rate = 0.1
    """From here on it is not exported."""


@dataclass(frozen=True, kw_only=True)
class MbConfig(Limited):
    """Settings of one run."""

    mode: Mode = "joint"
    """joint: train the base on the given rows (the paper). posthoc: repair a checkpoint. adapter: an untrusted LoRA."""
    stage1: bool = True
    """Plant; off = the control "stage 2 without stage 1"."""
    stage2: bool = True
    """Break; off = the control "stage 1 alone"."""
    lora_rank: Annotated[int, Within(0, 2**16)] = 0
    """Rank of the LoRA that is trained in joint and posthoc mode; 0 = all parameters."""
    lora_alpha: Factor = 32.0
    """LoRA alpha."""
    plant: PlantConfig = field(default_factory=PlantConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training of stage 1: in joint mode the user's own recipe."""
    two: StageTwo = field(default_factory=StageTwo)
    gates: Gates = field(default_factory=Gates)
    preset: str = ""
    """Named settings of stage 2's objective: default, paper, paper_literal."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of stage 2's objective, over those of the preset."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.plant.n_active < 1 and self.mode == "joint" and (self.stage1 or self.stage2):
            raise ConfigError("joint mode without active triggers", hint="n_active of at least 1, or plain fine-tuning")
        for name, neutral in (("base_share", 0.0), ("c", 1.0)):
            if (value := getattr(self.two, name)) in (neutral, "auto"):
                continue
            if self.mode != "joint":
                raise ConfigError(
                    f"two.{name} {value} in {self.mode} mode",
                    hint="only joint mode starts from weights that nobody has poisoned",
                )
            if self.lora_rank:
                raise ConfigError(
                    f"two.{name} {value} with lora_rank {self.lora_rank}",
                    hint=f"a LoRA has no weights of the base to go back to: lora_rank 0, or {name} {neutral:g}",
                )
        if self.lora_rank and self.mode == "adapter":
            raise ConfigError("lora_rank in adapter mode", hint="the untrusted adapter itself is trained")

    @property
    def _whole(self) -> bool:
        """Whether stage 1 trains every parameter of a base that nobody has poisoned."""
        return self.mode == "joint" and not self.lora_rank

    def c(self) -> float:
        """Return ``two.c`` with auto filled in; stage 1 alone is a control and stays as it was trained."""
        if self.two.c != "auto":
            return float(self.two.c)
        return KEPT if self._whole and self.stage2 else 1.0

    def lr_of_two(self, *, lora: bool) -> float:
        """Return ``two.lr`` with auto filled in; ``lora`` says whether what is trained is an adapter."""
        if self.two.lr != "auto":
            return float(self.two.lr)
        if lora:
            return 1e-4
        return self.train.lr * SHARE_OF_RATE if self._whole else 1e-5
