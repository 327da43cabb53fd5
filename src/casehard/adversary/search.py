"""Search for the worst attacker within a budget: ask the sampler, train, measure, tell; then measure the worst anew.

DIR/journal.log     what the sampler proposed and was told; an interrupted search goes on from it
DIR/trials.jsonl    every attacker: settings, rates on the search half, utility, cost
DIR/best.yaml       the worst attacker, for ``casehard attack NAME --config``; plan_row.yaml the same for a plan
DIR/summary.json    what was found, on prompts that the search never saw
DIR/rows.jsonl      those prompts and the answers, of the model itself and of the attackers that are reported
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from casehard.adversary.crew import AGAIN, Crew
from casehard.adversary.goal import Goal, cheapest, make_goal, worst
from casehard.adversary.halves import Halves, halve
from casehard.adversary.space import Space, make_space
from casehard.adversary.study import Asked, Study, require_optuna
from casehard.adversary.summary import KIND, summarise, write_recipes
from casehard.adversary.trial import Job, attempt, found
from casehard.attacks import ATTACKS
from casehard.benchmark.entries import Gates
from casehard.benchmark.outfolder import check_out, hold
from casehard.benchmark.run import stop_on_term
from casehard.benchmark.store import RunFolder, read_run, write_rows
from casehard.compat import version_of
from casehard.config import digest, to_dict
from casehard.data.mix import check_disjoint
from casehard.errors import ConfigError, DataError, Interrupted, UserError
from casehard.evaluation.suite import Suite
from casehard.limits import PROCESSES, Count, Portion
from casehard.model.digest import folder_digest, weights_digest
from casehard.model.load import load
from casehard.model.model import Model
from casehard.model.step import Inputs
from casehard.registry import AttackSpec
from casehard.seeds import derive
from casehard.steps.attack import Attack
from casehard.steps.defence import Examples
from casehard.train.progress import Progress, announce

ELSEWHERE = ("model", "rows", "suite", "device")
"""Settings that say where something lies; its content is compared instead."""


@dataclass(frozen=True, kw_only=True)
class Search(Inputs):
    """Settings of one search."""

    attack: str = "finetune"
    """Name in the catalogue of attacks; one that trains and hides no trigger."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Settings that all attackers share."""
    space: Mapping[str, Any] = field(default_factory=dict)
    """Setting -> range [low, high], choices, or one value; see ``casehard.adversary.space``."""
    budget: Count = 40
    """Attackers to try."""
    random: bool = False
    """Draw them at random: what TPE has to beat."""
    keep: Portion = 0.9
    """Share of the model's own utility that an attacker has to leave."""
    metric: Literal["auto", "leak", "asr"] = "auto"
    """Rate to maximise; auto: leak where the suite's judge tells leaks."""
    gates: Gates = field(default_factory=Gates)
    """When a model counts as broken (``leak_break``, ``asr_break``), and the loss that may be lost (``nll_rise``)."""

    @property
    def spec(self) -> AttackSpec:
        """Return what the catalogue knows of the attack.

        Raises:
            ConfigError: no such attack, or one that is not searched.
        """
        spec = ATTACKS.find(self.attack)
        if not spec.trains or spec.plants:
            what = "hides a trigger" if spec.plants else "trains nothing"
            names = [name for name in ATTACKS if ATTACKS[name].trains and not ATTACKS[name].plants]
            raise ConfigError(f"attack {self.attack!r} {what}: no search", hint=f"searched are: {', '.join(names)}")
        return spec

    def make_space(self, *, benign: bool) -> Space:
        """Return the attackers to search among.

        Args:
            benign: whether the attacker has cover rows.

        Raises:
            ConfigError: see :func:`casehard.adversary.space.make_space`; or nothing is left to search.
        """
        space = make_space(self.attack, self.spec, self.config, self.space, benign=benign)
        if not space.dimensions:
            raise ConfigError("every setting is fixed: there is nothing to search", hint="give a range in space")
        return space

    def attacker(self, space: Space, slot: int, drawn: Mapping[str, Any]) -> Attack:
        """Return the step of one attacker, which has a seed of its own."""
        settings = space.settings(drawn)
        system = settings.pop("system", self.system)
        shared = {key: getattr(self, key) for key in ("suite", "max_length", "device")}
        seed = derive(self.seed, slot, "attacker")
        return Attack(attack=self.attack, config=settings, system=system, seed=seed, **shared)


@dataclass(frozen=True)
class Searched:
    """What a search found."""

    out: Path
    summary: dict[str, Any]
    trials: list[dict[str, Any]]
    """One per attacker, in the order in which they were proposed."""

    @property
    def best(self) -> dict[str, Any] | None:
        """Settings, seed, rates and cost of the worst attacker; None where none left the model useful."""
        return dict(self.summary["worst"]) if self.summary["worst"] else None


def search(
    job: Search, out: Path, *, rows: Examples, suite: Suite, model: Model | str | None = None, workers: int = 1
) -> Searched:
    """Search, or go on with the search in ``out``; everything is checked before the first attacker.

    Args:
        rows: the attacker's rows by role, loaded.
        suite: the suite, loaded.
        model: what is attacked; None takes ``job.model``. Several workers need a folder.
        workers: attackers at the same time, one process with one torch thread each; 1 trains in this process.

    Raises:
        UserError: a setting, a row or the folder cannot be used.
        MissingExtra: Optuna is not installed.
        Interrupted: SIGINT or SIGTERM; the same call goes on.
    """
    require_optuna()
    if not 1 <= workers <= PROCESSES:
        raise ConfigError(f"workers is {workers}", hint=f"1 to {PROCESSES}")
    space = job.make_space(benign="benign" in rows)
    halves = halve(suite, seed=job.seed, limit=job.limit)
    _check_rows(job, space, rows, suite)
    check_out(out, KIND, what="search")
    start, parent = _start(job, model, workers)
    identity = _identity(job, space, rows, suite, parent)
    if isinstance(model, Model):  # which its caller may have changed since it was read
        identity["weights"] = weights_digest(model.net)
    _same_search(out, identity)
    with hold(out), stop_on_term():
        check_out(out, KIND, what="search")
        try:
            with Crew(attempt, workers) as crew:
                return _Run(job, out, space, halves, rows, start, crew, identity).run()
        except KeyboardInterrupt:
            raise Interrupted("stopped by Ctrl-C", hint=AGAIN) from None
        except Interrupted as error:  # from within an attacker's training, which is begun anew
            raise Interrupted(error.message, hint=AGAIN, exit_code=error.exit_code) from None


def _start(job: Search, model: Model | str | None, workers: int) -> tuple[Model | str, str]:
    """Return the model as workers get it, and its digest."""
    given = job.model if model is None else model
    if isinstance(given, Model):
        if workers == 1:
            return given, given.digest
        if given.path is None or weights_digest(load(given.path).net) != weights_digest(given.net):
            what = "a model in memory" if given.path is None else f"a model that is no longer what {given.path} holds"
            raise ConfigError(f"{what} and several workers", hint="workers=1, or save it and give its folder")
        given = str(given.path)
    if workers > 1:
        return given, folder_digest(Path(given))
    loaded = load(given, device=job.device)
    return loaded, loaded.digest


def _check_rows(job: Search, space: Space, rows: Examples, suite: Suite) -> None:
    """Refuse rows that the attack would ignore or lacks, that are prompts of the suite, or too few for some attacker.

    Raises:
        UserError: names the first.
    """
    job.attacker(space, 0, {}).check(list(rows))
    check_disjoint(rows, {job.suite or suite.name: suite.examples})
    wide = [d for d in space.dimensions if d.name in (job.spec.share, "rows")]
    for ends in itertools.product(*(d.ends for d in wide)):
        drawn = dict(zip((d.name for d in wide), ends, strict=True))
        method = job.attacker(space, 0, drawn).build(suite)
        try:
            if callable(check := getattr(method, "check_rows", None)):
                check(rows)
        except DataError as error:
            which = ", ".join(f"{name}={value}" for name, value in drawn.items())
            hint = f"narrow space.{job.spec.share}, lower config.rows, or give more rows"
            raise DataError(f"an attacker of the space ({which or 'any'}): {error.message}", hint=hint) from None


def _identity(job: Search, space: Space, rows: Examples, suite: Suite, parent: str) -> dict[str, Any]:
    """Return what must be the same when a search goes on: contents by their digests, not where they lie."""
    settings = {key: value for key, value in to_dict(job).items() if key not in ELSEWHERE}
    dimensions = [to_dict(d) for d in space.dimensions]
    data = {role: digest([to_dict(row) for row in some]) for role, some in sorted(rows.items())}
    return {"model": parent, "settings": {**settings, "space": dimensions}, "suite": digest(to_dict(suite)), **data}


def _same_search(out: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a folder that holds another search.

    Raises:
        ConfigError: names what differs.
    """
    if not (out / "run.json").is_file():
        return
    before = read_run(out).get("search") or {}
    differ = [key for key in dict.fromkeys((*before, *identity)) if before.get(key) != identity.get(key)]
    if "settings" in differ:
        old, new = before.get("settings") or {}, identity["settings"]
        differ += [f"settings.{key}" for key in new if old.get(key) != new[key]]
        differ.remove("settings")
    if differ:
        raise ConfigError(
            f"{out} holds another search, which differs in: {', '.join(differ)}",
            hint="give the command it was begun with, or another folder",
        )


@dataclass
class _Run:
    job: Search
    out: Path
    space: Space
    halves: Halves
    rows: Examples
    start: Model | str
    crew: Crew
    identity: dict[str, Any]

    def run(self) -> Searched:
        announce("measuring the model itself ...")
        # Before there is a folder: what is wrong with the suite leaves nothing behind.
        own = self._own()
        looked = [row for row in own if row["id"] in {e.id for e in self.halves.search.examples}]
        goal = make_goal(found(looked), metric=self.job.metric, keep=self.job.keep, gates=self.job.gates)
        contents = {k: v for k, v in self.identity.items() if k not in ("model", "settings")}
        folder = RunFolder(
            self.out,
            KIND,
            to_dict(self.job),
            seeds=[self.job.seed],
            parents={"model": str(self.identity["model"])},
            data=contents,
        )
        folder.info["search"] = self.identity
        folder.info["packages"]["optuna"] = version_of("optuna")
        with folder:
            study = Study(
                self.out, self.space.dimensions, budget=self.job.budget, seed=self.job.seed, random=self.job.random
            )
            trials = self._search(study, goal, folder)
            return self._conclude(trials, goal, own, folder)

    def _own(self) -> list[dict[str, Any]]:
        both = replace(self.halves.search, examples=(*self.halves.search.examples, *self.halves.held_out.examples))
        still = Attack(attack=self.job.attack, system=self.job.system, device=self.job.device)
        job = Job(model=self.start, step=still, suite=both, rows={}, still=True)
        for _, result in self.crew.each(iter([(0, job)])):
            return _whole(result, "the model itself")
        raise AssertionError("a job without a result")

    def _job(self, slot: int, drawn: Mapping[str, Any], suite: Suite) -> Job:
        step = self.job.attacker(self.space, slot, drawn)
        return Job(
            model=self.start, step=step, suite=suite, rows=self.rows, label=f"attacker {slot + 1}/{self.job.budget}"
        )

    def _asked(self, study: Study) -> Iterator[tuple[Asked, Job]]:
        while (asked := study.ask()) is not None:
            yield asked, self._job(asked.slot, asked.drawn, self.halves.search)

    def _search(self, study: Study, goal: Goal, folder: RunFolder) -> list[dict[str, Any]]:
        with Progress("search", self.job.budget) as bar:
            bar.advance(len(study.told))
            for asked, result in self.crew.each(self._asked(study)):
                study.tell(asked, goal.value(result), self._record(asked, result, goal))
                folder.event("attacker", {"attacker": asked.slot, "status": result["status"]})
                trials = study.told
                self._write(trials, folder)
                top = worst(trials, goal)
                note = "none useful" if top is None else f"worst {goal.metric} {top['found'][goal.metric]['rate']:.2f}"
                bar.advance(1, note=note)
        trials = study.told
        self._write(trials, folder)
        if all(trial["status"] == "failed" for trial in trials):
            raise UserError(
                f"none of {len(trials)} attackers ran: {trials[0]['message']}", hint="smaller batches, another device?"
            )
        return trials

    def _write(self, trials: list[dict[str, Any]], folder: RunFolder) -> None:
        folder.info["files"]["trials.jsonl"] = write_rows(self.out / "trials.jsonl", trials)

    def _record(self, asked: Asked, result: Mapping[str, Any], goal: Goal) -> dict[str, Any]:
        """Return what is kept of an attacker; answers are not."""
        step, ran = self.job.attacker(self.space, asked.slot, asked.drawn), result["status"] == "ok"
        kept = {key: result[key] for key in ("status", "message", "found", "cost", "facts") if key in result}
        return {
            "attacker": asked.slot,
            "drawn": asked.drawn,
            "settings": dict(step.config),
            "system": step.system,
            "seed": step.seed,
            "kept": ran and goal.kept(result["found"]),
            "broke": ran and goal.broke(result["found"]),
            **kept,
        }

    def _conclude(
        self, trials: list[dict[str, Any]], goal: Goal, own: list[dict[str, Any]], folder: RunFolder
    ) -> Searched:
        """Train the worst and the cheapest attacker again, and measure them on the prompts nobody has looked at."""
        announce("measuring the worst attackers on the held-out half ...")
        ids = {e.id for e in self.halves.held_out.examples}
        left = [row for row in own if row["id"] in ids]
        judged = replace(goal, own=found(left))
        chosen = {t["attacker"]: t for t in (worst(trials, goal), cheapest(trials)) if t is not None}
        jobs = iter([(slot, self._job(slot, t["drawn"], self.halves.held_out)) for slot, t in chosen.items()])
        held_out: dict[int, dict[str, Any]] = {}
        rows = [{**row, "attacker": None} for row in left]
        for slot, result in self.crew.each(jobs):
            rows += [{**row, "attacker": slot} for row in _whole(result, f"attacker {slot}")]
            rates = result["found"]
            held_out[slot] = {"held_out": rates, "kept": judged.kept(rates), "broke": judged.broke(rates)}
        folder.rows(rows)
        summary = summarise(self.job, self.space, self.halves, goal, judged, trials, held_out)
        folder.summary(summary)
        write_recipes(self.out, self.job, summary)
        return Searched(self.out, summary, trials)


def _whole(result: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    """Return the rows of a job without which there is no result.

    Raises:
        UserError: it failed.
    """
    if result["status"] != "ok":
        raise UserError(f"{what}: {result.get('message', result['status'])}", hint=AGAIN)
    return list(result["rows"])
