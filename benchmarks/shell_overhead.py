"""Compare plain SFT through the shell with the stock Trainer: time per step, and the bits of the weights.

Both sides train the same model in the same process, one step of each in turn, so that a busy machine slows both. The
figure is the median ratio of neighbouring steps, and over blocks of those. The last line is one JSON object.

    python benchmarks/shell_overhead.py [--steps 200] [--hidden 128] [--layers 4] [--blocks 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback

from casehard.data.batches import Encoded, EncodedSet
from casehard.defences.plain import Plain
from casehard.train.recipe import TrainConfig, training_arguments
from casehard.train.trainer import HardenedTrainer


class Turns(TrainerCallback):
    """Lets two training threads run one step each in turn and times each step from start to start."""

    def __init__(self, baton: threading.Semaphore, other: threading.Semaphore) -> None:
        self.baton, self.other, self.times, self.started = baton, other, [], 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.started:
            self.times.append(time.perf_counter() - self.started)
            self.other.release()
        self.baton.acquire()
        self.started = time.perf_counter()


def model(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """Return a random Llama with dropout, the same one every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        attention_dropout=0.1,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def rows(count: int = 512, length: int = 32) -> EncodedSet:
    """Return random rows."""
    generator = torch.Generator().manual_seed(0)
    made = torch.randint(3, 512, (count, length), generator=generator).tolist()
    return EncodedSet(tuple(Encoded(ids, ids) for ids in made), 0)


def trainer(cls: type[Trainer], config: TrainConfig, data: EncodedSet, net: LlamaForCausalLM, **more: Any) -> Trainer:
    """Build one side; both get the same arguments and print nothing."""
    made = cls(
        model=net,
        args=training_arguments(config, out=None, seed=0, device=torch.device("cpu")),
        train_dataset=data,
        data_collator=data.collate,
        **more,
    )
    made.remove_callback(PrinterCallback)
    return made


def identical(config: TrainConfig, data: EncodedSet, arguments: argparse.Namespace) -> bool:
    """Train each side alone and compare every weight."""
    nets = [model(arguments), model(arguments)]
    trainer(Trainer, config, data, nets[0]).train()
    trainer(HardenedTrainer, config, data, nets[1], method=Plain()).train()
    pairs = zip(nets[0].parameters(), nets[1].parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def timed(config: TrainConfig, data: EncodedSet, arguments: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Train both sides in turn and return the time of each step, stock and ours."""
    batons = [threading.Semaphore(1), threading.Semaphore(0)]
    sides = [Turns(batons[0], batons[1]), Turns(batons[1], batons[0])]
    stock = trainer(Trainer, config, data, model(arguments), callbacks=[sides[0]])
    ours = trainer(HardenedTrainer, config, data, model(arguments), callbacks=[sides[1]], method=Plain())

    def run(index: int, side: Trainer) -> None:
        torch.set_num_threads(1)
        side.train()
        # Whoever is last must not wait for a side that has finished.
        for _ in range(2):
            batons[1 - index].release()

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate((stock, ours))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sides[0].times, sides[1].times


def main() -> None:
    """Run both comparisons and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("steps", 120), ("hidden", 128), ("layers", 4), ("batch", 16), ("blocks", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    data = rows()
    config = TrainConfig(steps=arguments.steps, batch_size=arguments.batch, precision="fp32", warmup=2)
    same = identical(TrainConfig(steps=20, batch_size=arguments.batch, precision="fp32", warmup=2), data, arguments)
    ratios, steps = [], []
    for block in range(arguments.blocks):
        stock, ours = timed(config, data, arguments)
        # Neighbouring steps share the machine's mood, so each pair is compared before the median is taken.
        ratios.append(statistics.median(b / a for a, b in list(zip(stock, ours, strict=False))[10:]))
        steps.append(statistics.median(stock[10:]))
        print(f"block {block}: stock {steps[-1] * 1e3:.2f} ms, ratio {ratios[-1]:.4f}", flush=True)
    result = {
        "ratio_step": round(statistics.median(ratios), 4),
        "ratio_step_low": round(min(ratios), 4),
        "ratio_step_high": round(max(ratios), 4),
        "stock_step_ms": round(statistics.median(steps) * 1e3, 3),
        "bit_identical": same,
        "steps": arguments.steps * arguments.blocks,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
