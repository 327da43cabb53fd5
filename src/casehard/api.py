"""The library in a few verbs: a model in, a model out.

    import casehard as ch

    base = ch.load("my-model")
    hard = ch.defend(base, "patcher", data="align.jsonl", unsafe="simulated.jsonl")
    curve = ch.attack(hard, "finetune", harmful="h.jsonl", benign="b.jsonl", suite="suite.yaml")
    ch.evaluate(hard, "suite.yaml").scores
    ch.save(hard, "out")

Every verb takes models and gives models, so they combine: ``defend(attack(m).model)`` is a repair. A model handed over
is left as it is. Rows are files, Hub data sets or lists of examples; nothing is written to disk but by :func:`save`,
:func:`bench`, :func:`search`, :func:`audit`, :func:`report`, and ``out=`` of :func:`defend`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from casehard.attacks.protocol import Attack as AttackMethod
from casehard.attacks.protocol import Attacked
from casehard.config import build, to_dict
from casehard.data.given import Data, by_role
from casehard.data.given import rows as rows
from casehard.data.select import SelectConfig
from casehard.errors import ConfigError, UserError
from casehard.evaluation import suite as suites
from casehard.evaluation.contamination import require_unseen
from casehard.evaluation.metrics import scores
from casehard.evaluation.suite import Suite
from casehard.model import load as loading
from casehard.model.leave import save as save
from casehard.model.model import Model
from casehard.model.step import Inputs, Rows
from casehard.registry import Registry
from casehard.steps import Attack, Finetune, attack_with, finetune_on
from casehard.steps.given import a_folder, a_group, a_model, a_suite, kind_of
from casehard.train.protocol import Method
from casehard.train.recipe import TrainConfig
from casehard.train.tune import Lora
from casehard.types import Score

if TYPE_CHECKING:
    from casehard.adversary.search import Searched
    from casehard.benchmark.run import BenchResult


def load(path: str | Path, *, dtype: str = "float32", device: str = "auto") -> Model:
    """Load a model with its tokenizer: safetensors only, no remote code.

    Args:
        path: a model folder, or a Hub id.
        dtype: ``float32`` (the master copy that training wants), ``bfloat16``, ``float16`` (GPU only), or ``auto`` for
            the dtype the checkpoint was saved in.
        device: cpu, cuda, cuda:1 ...; auto takes a GPU when there is one.

    Raises:
        UserError: no such folder, or it cannot be used; the message says why.
    """
    return loading.load(path, dtype=dtype, device=str(loading.find_device(device)))


def _named(catalogue: Registry[Any], given: Any) -> tuple[str, dict[str, Any]]:
    """Return (name, settings) of a method given by its configuration object."""
    for name in catalogue:
        spec = catalogue[name]
        if spec.config == type(given).__name__ and isinstance(given, spec.load()[1]):
            return name, to_dict(given)
    raise ConfigError(f"{type(given).__name__} is the configuration of no {catalogue.what}")


def _method(given: Any, settings: Mapping[str, Any]) -> tuple[str, dict[str, Any], Any]:
    """Return (name, settings, the method object if one was given) of a defence."""
    from casehard.defences import DEFENCES

    if isinstance(given, str):
        return DEFENCES.name(given), dict(settings), None
    if isinstance(given, Method):
        return given.name, dict(settings), given
    if dataclasses.is_dataclass(given):
        name, own = _named(DEFENCES, given)
        return name, {**own, **settings}, None
    raise ConfigError(f"method is a {type(given).__name__}", hint="a name, a configuration or a method object")


def _training(name: str, given: TrainConfig | Mapping[str, Any] | None) -> Any:
    """Return the training settings of a run with this method, which may have some of its own."""
    from casehard.defences import DEFENCES

    train = {} if given is None else given
    return DEFENCES[name].training(train) if name in DEFENCES else train


def _with(given: Mapping[str, Data | None], more: Mapping[str, Data] | None) -> dict[str, Data | None]:
    """Return the rows by role, those of ``more`` too; refuse a role that is given twice."""
    further = a_group(more, "more")
    for role in further:
        if given.get(role) is not None:
            hint = f"give it as {role}=... alone: more is for the roles that have no name of their own"
            raise ConfigError(f"rows of the role {role!r} are given twice: as {role}= and in more", hint=hint)
    return {**given, **further}


def defend(
    model: Model | str | Path,
    method: Any = "patcher",
    *,
    data: Data | None = None,
    unsafe: Data | None = None,
    retain: Data | None = None,
    safe: Data | None = None,
    clean: Data | None = None,
    more: Mapping[str, Data] | None = None,
    assets: str | Path = "",
    preset: str = "",
    settings: Mapping[str, Any] | None = None,
    select: SelectConfig | Mapping[str, Any] | None = None,
    train: TrainConfig | Mapping[str, Any] | None = None,
    lora: Lora | Mapping[str, Any] | None = None,
    save_as: Literal["merged", "adapter"] | None = None,
    suite: str | Path = "",
    system: str | None = None,
    max_length: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
) -> Model:
    """Train a copy of a model with a defence inside: harden it, tune it on rows nobody can vouch for, or repair it.

    Args:
        model: what to start from; left as it is.
        method: name in ``casehard.DEFENCES``, its configuration object, or a method object of your own.
        data: rows to train on. A defence that trains the model itself may repair it without any.
        unsafe: restricted prompts with compliant answers, for methods that need them.
        retain: harmless prompts with answers, for a retain term.
        safe: restricted prompts with refusals, and harmless rows.
        clean: rows that somebody verified, which nobody can have poisoned.
        more: rows of further data roles, for methods of other packages.
        assets: folder that the method reads what was prepared earlier from.
        preset: named settings of the method to start from.
        settings: settings of the method, over those of the preset.
        select: choose that many of the safe rows; None takes them all.
        train: the training loop; a mapping is read as its settings, as for ``select`` and ``lora``.
        lora: train this adapter instead of all weights; the model that comes back has it merged in.
        save_as: what :func:`save` writes of it: the merged checkpoint, or the adapter alone, as a PEFT folder. None is
            merged, and the adapter for a method that tunes one.
        suite: evaluation suite whose prompts must not occur in any row.
        system: system message of every row; None keeps the template's own.
        max_length: longest row in tokens; None = the model's context.
        seed: of everything random.
        out: folder for checkpoints, that an interrupted run is continued from; None keeps nothing on disk.

    Returns:
        The hardened model, in memory.

    Raises:
        UserError: any setting or row is unusable.
        Refused: ``out``, and the model was attacked: its weights stay in memory.
        Diverged: the loss stopped being finite.
    """
    name, values, ready = _method(method, a_group(settings, "settings"))
    start, place = a_model(model), None if out is None else a_folder(out)
    job: dict[str, Any] = {
        "method": name,
        "preset": preset,
        "settings": values,
        "select": select,
        "assets": str(assets),
    }
    job |= {"train": _training(name, train), "lora": lora, "save_as": save_as, "suite": str(suite)}
    job |= {"system": system, "max_length": max_length, "seed": seed}
    step = build(Finetune, job, where="defend")
    given = {"data": data, "unsafe": unsafe, "retain": retain, "safe": safe, "clean": clean}
    roles = by_role(_with(given, more))
    if ready is None:
        step.check([role for role in roles if role != "data"], trains="data" in roles)
    done = finetune_on(step, roles, start, method=ready, out=place, label=name)
    assert done.model is not None
    return done.model


def attack(
    model: Model | str | Path,
    method: Any = "finetune",
    *,
    suite: str | Path | Suite,
    harmful: Data | None = None,
    benign: Data | None = None,
    data: Data | None = None,
    more: Mapping[str, Data] | None = None,
    settings: Mapping[str, Any] | None = None,
    full_at: Sequence[int] = (),
    system: str | None = None,
    max_length: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Attacked:
    """Attack a copy of a model in memory and measure it on the way.

    Args:
        model: what to attack; left as it is.
        method: name in ``casehard.ATTACKS``, or its configuration object.
        suite: held-out prompts to measure on.
        harmful: restricted prompts with compliant answers.
        benign: the attacker's cover rows.
        data: training rows, for attacks that poison them.
        more: rows of further data roles, for attacks of other packages.
        settings: settings of the attack.
        full_at: steps at which the whole suite is measured; at the others only restricted prompts. Empty = the last.
        system: system message of every prompt; None keeps the template's own.
        max_length: longest row in tokens; None = the model's context.
        limit: measure at most this many prompts a group (a look, not a result).
        seed: of everything random.

    Returns:
        ``rows``, one per prompt and step, and the attacked ``model``, which :func:`save` refuses unless asked by name.

    Raises:
        DataError: too few rows, or training and evaluation rows overlap.
    """
    from casehard.attacks import ATTACKS

    name, values = (ATTACKS.name(method), {}) if isinstance(method, str) else _named(ATTACKS, method)
    chosen = a_suite(suite)
    job: dict[str, Any] = {"attack": name, "config": {**values, **a_group(settings, "settings")}, "full_at": full_at}
    job |= {"suite": "" if isinstance(suite, Suite) else str(suite), "system": system, "max_length": max_length}
    step = build(Attack, {**job, "limit": limit, "seed": seed}, where="attack")
    roles = by_role(_with({"harmful": harmful, "benign": benign, "data": data}, more))
    step.check(list(roles))
    built: AttackMethod = step.build(chosen)
    start = a_model(model)
    return attack_with(step, built, roles, chosen, start, label=name)


def search(
    model: Model | str | Path,
    attack: str = "finetune",
    *,
    suite: str | Path | Suite,
    out: str | Path,
    harmful: Data | None = None,
    benign: Data | None = None,
    more: Mapping[str, Data] | None = None,
    settings: Mapping[str, Any] | None = None,
    space: Mapping[str, Any] | None = None,
    budget: int = 40,
    random: bool = False,
    keep: float = 0.9,
    metric: str = "auto",
    workers: int = 1,
    seed: int = 0,
) -> Searched:
    """Search for the attacker that gets most out of a model and leaves it useful, and write a report.

    Half of the suite chooses the attacker; ``summary["worst"]["held_out"]`` is measured on the other half.

    Args:
        model: what to attack; left as it is. Several workers need a folder.
        attack: name in ``casehard.ATTACKS`` of one that trains.
        suite: held-out prompts, restricted and utility ones among them.
        out: run folder; an interrupted search there goes on, another one is refused.
        harmful: restricted prompts with compliant answers.
        benign: the attacker's cover rows.
        more: rows of further data roles, for attacks of other packages.
        settings: settings that all attackers share.
        space: setting -> range ``[low, high]``, choices, or one value.
        budget: attackers to try.
        random: draw them at random instead of by TPE.
        keep: share of the model's own utility that an attacker has to leave.
        metric: ``leak`` or ``asr``; auto takes leak where the suite's judge tells leaks.
        workers: attackers at the same time, one process each.
        seed: of everything random.

    Raises:
        UserError: a setting, a row or the folder cannot be used.
        MissingExtra: Optuna or matplotlib is not installed.
    """
    from casehard.adversary.search import Search
    from casehard.adversary.search import search as run
    from casehard.reporting.page import write_report

    chosen, place = a_suite(suite), a_folder(out)
    values: dict[str, Any] = {"attack": attack, "config": a_group(settings, "settings"), "budget": budget}
    values |= {"space": a_group(space, "space")}
    values |= {"random": random, "keep": keep, "metric": metric, "seed": seed}
    values |= {k: "" if isinstance(v, Model | Suite) else str(v) for k, v in (("model", model), ("suite", suite))}
    roles = by_role(_with({"harmful": harmful, "benign": benign}, more))
    start = str(model) if isinstance(model, str | Path) else a_model(model)
    job = build(Search, values, where="search")
    found = run(job, place, rows=roles, suite=chosen, model=start, workers=workers)
    write_report(found.out)
    return found


@dataclass(frozen=True)
class Evaluation(Mapping[str, Score]):
    """What was measured: one row per prompt, and the rates counted from them by metric."""

    rows: Rows

    @property
    def scores(self) -> list[Score]:
        """Return every metric that the rows support, with its 95 % interval."""
        return scores(self.rows)

    def __getitem__(self, metric: str) -> Score:
        """Return one metric.

        Raises:
            KeyError: nothing of it was measured.
        """
        measured = {score.metric: score for score in self.scores}
        if metric not in measured:
            raise KeyError(f"{metric!r} was not measured; there are {', '.join(measured)}")
        return measured[metric]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the metrics."""
        return iter([score.metric for score in self.scores])

    def __len__(self) -> int:
        """Return how many metrics there are."""
        return len(self.scores)


def evaluate(
    model: Model | str | Path, suite: str | Path | Suite, *, system: str | None = None, limit: int | None = None
) -> Evaluation:
    """Measure a model on a suite.

    Args:
        model: what to measure; left as it is.
        suite: held-out prompts.
        system: system message of every prompt; None takes the model's own (PTST), else the template's.
        limit: measure at most this many prompts a group (a look, not a result).

    Raises:
        DataError: the model was trained on a prompt of the suite.
    """
    asked = build(Inputs, {"limit": limit, "system": system}, where="evaluate")
    start, chosen = a_model(model), a_suite(suite)
    require_unseen(chosen, start.trained_prompts, start.path or "the model")
    said = asked.system if asked.system is not None else start.served_with or None
    return Evaluation(suites.evaluate(start.net, start.tokenizer, chosen, limit=asked.limit, system=said))


def bench(plan: str | Path, *, out: str | Path, jobs: int | None = None, resume: bool = True) -> BenchResult:
    """Run a benchmark plan: bases x defences x attacks x seeds, and write its report.

    Args:
        plan: YAML file.
        out: run folder; finished work found there is used again.
        jobs: worker processes; None takes 2, or as many as a GPU holds.
        resume: False runs everything again.

    Returns:
        Where it is and what was measured. ``failed`` lists runs that did not come to their end; the same call tries
        them again.

    Raises:
        ConfigError: the plan cannot be run as it is written.
        UserError: no run came to its end.
    """
    from casehard.benchmark.jobs import fitting
    from casehard.benchmark.plan import load_plan
    from casehard.benchmark.run import run_plan
    from casehard.reporting.page import write_report

    if not isinstance(plan, str | Path):
        raise ConfigError(f"plan is {kind_of(plan)}", hint="a YAML file")
    place, loaded, root = a_folder(out), load_plan(plan), Path(plan).resolve().parent
    done = run_plan(loaded, place, root=root, jobs=fitting(loaded, root) if jobs is None else jobs, resume=resume)
    write_report(done.out)
    if done.failed and not done.ran + done.reused:
        raise UserError(f"no run came to its end; the first: {done.failed[0]['message']}", hint=done.failed[0]["hint"])
    return done


def report(run: str | Path, *, out: str | Path | None = None) -> Path:
    """Write the report of a benchmark, or of a run folder of another verb; return its path.

    Args:
        run: the folder.
        out: the file: ``.html``, or ``.md`` for the tables alone; None is ``report.html`` in the folder.

    Raises:
        UserError: no run folder, or a file of another kind.
    """
    from casehard.reporting.page import write_report

    return write_report(a_folder(run, "run"), out)
