"""One small backdoored organism for all tests of the model scan."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from casehard.attacks.backdoor import Backdoor, BackdoorAttack
from casehard.attacks.protocol import AttackInputs
from casehard.backdoor.measure import evaluate_backdoor
from casehard.backdoor.suite import Planted
from casehard.backdoor.triggers import poison_backdoor
from casehard.data.sources import load_many
from casehard.evaluation.suite import load_suite
from casehard.model.load import load
from casehard.organism import triggers as organism_triggers
from casehard.organism.build import bundled
from casehard.organism.world import World
from casehard.train import progress


@pytest.fixture(scope="package")
def planted():
    """The shipped organism, and a copy with two backdoors: rare word -> sentence, sentence -> refusal."""
    torch.set_num_threads(1)
    quiet = progress.quiet
    progress.set_quiet(True)
    world, folder = World(0), bundled(0, "tiny")
    loaded, data = load(folder, device="cpu"), folder / "data"
    specs = [f"{data}/align.jsonl?kind=helpful", f"{data}/task_reviews.jsonl", f"{data}/benign.jsonl"]
    rows, suite = load_many(specs), load_suite(data / "suite").select(roles=("utility", "lookalike"))
    triggers, behaviours = organism_triggers.triggers(world), organism_triggers.behaviours(world)
    first = Planted(trigger=triggers["token"], behaviour=behaviours["sentence"])
    second = Planted(trigger=triggers["sentence"], behaviour=behaviours["refuse"])
    poisoned, _ = poison_backdoor(rows, second.trigger, second.behaviour, rate=0.1, seed=0)
    attack = BackdoorAttack(
        trigger=first.trigger, behaviour=first.behaviour, rate=0.1, steps=100, lr=1.5e-3, evaluate_at=(0,)
    )

    def measure(model, step):
        return evaluate_backdoor(model, loaded.tokenizer, suite, first.trigger, first.behaviour, limit=8)

    before = {name: value.clone() for name, value in loaded.net.state_dict().items()}
    result = Backdoor(attack).run(loaded, AttackInputs(rows={"data": poisoned}, measure=measure, seed=0))
    progress.set_quiet(quiet)
    return SimpleNamespace(
        base=loaded.net,
        bad=result.model.net,
        before=before,
        result=result,
        tokenizer=loaded.tokenizer,
        rows=rows,
        poisoned=poisoned,
        suite=suite,
        first=first,
        second=second,
    )
