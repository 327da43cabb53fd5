"""Run a plan: reuse what is whole, resume what was cut short, list what fails, and go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from casehard.benchmark.execute import Executor, Task, environment, execute, finished, step_of
from casehard.benchmark.graph import Matrix, Node, expand
from casehard.benchmark.plan import Plan
from casehard.benchmark.store import RunFolder
from casehard.benchmark.summary import summarise, table_rows
from casehard.benchmark.worker import DIED, Worker, attempt, unless_stopped
from casehard.config import digest, to_dict
from casehard.errors import ConfigError, Corrupt, Interrupted
from casehard.io.files import remove
from casehard.train.progress import Progress, announce

HEARTBEAT = 1.0
"""Seconds between two looks at how far the workers are."""
AGAIN = "run the same command again to go on"
RANK = {"base": 0, "defend": 1, "prepare": 2, "attack": 3, "evaluate": 4}


@dataclass(frozen=True)
class NodeEvent:
    """Told to the caller whenever a node ends."""

    label: str
    kind: str
    status: Literal["ok", "reused", "failed", "skipped"]
    done: int
    total: int
    message: str = ""


@dataclass(frozen=True)
class BenchResult:
    """What came out of a plan."""

    out: Path
    summary: dict[str, Any]
    failed: list[dict[str, Any]]
    reused: int
    ran: int

    @property
    def exit_code(self) -> int:
        """0, or 1 when any node failed."""
        return 1 if self.failed else 0


@contextmanager
def stop_on_term() -> Iterator[None]:
    """Turn SIGTERM into Interrupted, so that workers are told and the run folder says how it ended."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted("stopped by SIGTERM", hint=AGAIN, exit_code=143)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass
class _Run:
    matrix: Matrix
    out: Path
    cache: Path
    threads: int
    workers: int
    executor: Executor
    tell: Callable[[NodeEvent], None]
    busy: Callable[[int], None]
    """Called with the number of nodes that run, from time to time."""
    folder: RunFolder
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, dict[str, Any]] = field(default_factory=dict)
    reused: int = 0
    ran: int = 0
    told: dict[Any, Any] = field(default_factory=dict)
    """Registry of the warnings of workers."""

    def place(self, node: Node) -> Path:
        return self.out / "nodes" / node.folder

    def checkpoint(self, name: str) -> Path:
        return self.place(self.matrix.nodes[name]) / str(self.done[name]["path"])

    def task(self, node: Node) -> Task:
        parent = node.parent
        return Task(
            node=node,
            out=self.place(node),
            base=self.checkpoint(node.base) if parent else None,
            parent=self.checkpoint(parent) if parent else None,
            parent_digest=self.done[parent]["digest"] if parent else "",
            assets=self.checkpoint(node.needs) if node.needs else None,
            cache=self.cache,
            threads=self.threads,
            workers=self.workers,
        )

    def end(self, node: Node, status: Literal["ok", "reused", "failed", "skipped"], message: str = "") -> None:
        count = len(self.done) + len(self.failed)
        self.folder.event("node", {"label": node.label, "kind": node.kind, "status": status, "node": node.digest})
        self.tell(NodeEvent(node.label, node.kind, status, count, len(self.matrix.nodes), message))

    def finish(self, node: Node, result: dict[str, Any]) -> None:
        self.ran += 1
        if "summary" in result:
            self.folder.saw_peak(result["peak_bytes"])
            self.done[node.digest] = result["summary"]
            self.end(node, "ok")
        else:
            self.fail(node, result, "failed")

    def fail(self, node: Node, result: dict[str, Any], status: Literal["failed", "skipped"]) -> None:
        self.failed[node.digest] = {"label": node.label, "kind": node.kind, "status": status, **result}
        self.end(node, status, result["message"])

    def reuse(self, *, resume: bool) -> None:
        """Take over finished nodes; what cannot be trusted is removed and runs again."""
        for node in self.matrix.nodes.values():
            place = self.place(node)
            if not place.exists():
                continue
            if not resume:
                remove(place)
                continue
            try:
                summary = finished(node, place)
            except Corrupt as error:
                self.folder.event("corrupt", {"label": node.label, "message": error.message})
                self.tell(
                    NodeEvent(
                        node.label,
                        node.kind,
                        "failed",
                        len(self.done),
                        len(self.matrix.nodes),
                        f"runs again: {error.message}",
                    )
                )
                remove(place)
                continue
            if summary is not None:
                self.done[node.digest] = summary
                self.reused += 1
                self.end(node, "reused")

    def ready(self, waiting: list[Node]) -> list[Node]:
        """Return nodes whose parent is done; those whose parent failed are skipped here."""
        for node in list(waiting):
            cause = self.failed.get(node.parent) or self.failed.get(node.needs)
            if cause is not None:
                waiting.remove(node)
                root = cause.get("because", cause["label"])
                why = {"error": "Skipped", "message": f"needs {root}, which failed", "hint": "", "because": root}
                self.fail(node, why, "skipped")
        return [n for n in waiting if all(name in self.done for name in (n.parent, n.needs) if name)]


def _waiting(run: _Run) -> list[Node]:
    todo = [n for n in run.matrix.nodes.values() if n.digest not in run.done]
    return sorted(todo, key=lambda n: RANK[n.kind])


def _serial(run: _Run) -> None:
    waiting = _waiting(run)
    while ready := run.ready(waiting):
        node = ready[0]
        waiting.remove(node)
        run.busy(1)
        run.finish(node, attempt(run.task(node), run.executor))
    run.busy(0)


def _parallel(run: _Run, jobs: int) -> None:
    waiting = _waiting(run)
    idle = [Worker(run.threads) for _ in range(jobs)]
    workers = list(idle)
    busy: dict[Future[dict[str, Any]], tuple[Worker, Node]] = {}
    try:
        while True:
            for node in run.ready(waiting)[: len(idle)]:
                worker = idle.pop()
                waiting.remove(node)
                busy[worker.submit(attempt, run.task(node), run.executor)] = (worker, node)
            run.busy(len(busy))
            if not busy:
                break
            for future in wait(busy, HEARTBEAT, return_when=FIRST_COMPLETED).done:
                worker, node = busy.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    result = {**DIED, "hint": "try jobs=1"}
                run.finish(node, unless_stopped(result, run.told, hint=AGAIN))
                idle.append(worker)
    except BaseException:
        # Training notices SIGTERM, saves at the next boundary and leaves; everything else just ends.
        for worker in workers:
            worker.terminate()
        raise
    finally:
        for worker in workers:
            worker.close()


def _check_jobs(run: _Run) -> None:
    """Build every job once before anything runs: a wrong setting, or too few rows, costs seconds and not an hour."""
    read: set[str] = set()
    for node in run.matrix.nodes.values():
        if node.kind != "base" and node.digest not in run.done:
            assets = Path("assets") if node.needs else None
            there = Task(node=node, out=run.place(node), cache=run.cache, base=Path("base"), parent=Path("parent"))
            step = step_of(replace(there, assets=assets))
            if node.kind == "attack" and _readable(attack := step if isinstance(step.attack, str) else step.attack):
                drawn = digest([attack.attack, attack.config, attack.rows, attack.suite, attack.seed])
                if drawn not in read:
                    attack.check_rows()
                read.add(drawn)


def _readable(attack: Any) -> bool:
    """Return whether its rows and suite are there: not those of an organism that is built first, nor of the Hub."""
    specs = [spec for some in attack.rows.values() for spec in some]
    files = [str(spec).partition("?")[0] for spec in specs]
    return Path(attack.suite).exists() and all(Path(file).is_file() for file in files)


def run_plan(
    plan: Plan,
    out: str | Path,
    *,
    root: str | Path = ".",
    jobs: int = 2,
    resume: bool = True,
    progress: Callable[[NodeEvent], None] | None = None,
    executor: Executor = execute,
    cache: str | Path | None = None,
) -> BenchResult:
    """Run every node of a plan that is not there yet and write rows, summary and provenance.

    Args:
        out: run folder; node folders lie in ``out``/nodes, named by digest.
        root: folder that relative paths in the plan start from (that of the plan file).
        jobs: worker processes, one torch thread each; 1 runs everything in this process with torch's own threads.
        resume: reuse finished nodes; False runs everything again.
        progress: called whenever a node ends.
        executor: what does a node's work; must be picklable when ``jobs`` > 1.
        cache: where built organisms are kept; default ``out``/bases.

    Raises:
        ConfigError: the plan names something that does not exist, or a setting no job accepts.
        Interrupted: SIGINT or SIGTERM; finished nodes are kept, the rest resumes.
        StorageError: the disk is full, or nobody may write there; the same holds.
    """
    if jobs < 1:
        raise ConfigError(f"jobs is {jobs}", hint="at least 1")
    threads = 1 if jobs > 1 else 0
    setting = environment(threads) if executor is execute else {}
    out, matrix = Path(out), expand(plan, root=Path(root), setting=setting)
    folder = RunFolder(out, "bench", to_dict(plan), seeds=plan.seeds, data=_data(matrix))
    with folder, stop_on_term():
        try:
            with Progress(plan.name, len(matrix.nodes)) as bar:

                def tell(event: NodeEvent) -> None:
                    bar.advance(1, note=f"{event.label} {event.status}")
                    if progress is not None:
                        progress(event)

                place = Path(cache) if cache else out / "bases"
                run = _Run(matrix, out, place, threads, jobs, executor, tell, bar.busy, folder)
                run.reuse(resume=resume)
                if executor is execute:
                    announce("checking the settings ...")
                    _check_jobs(run)
                _serial(run) if jobs == 1 else _parallel(run, jobs)
            return _conclude(plan, run)
        except KeyboardInterrupt:
            raise Interrupted("stopped by Ctrl-C", hint=AGAIN) from None


def _data(matrix: Matrix) -> dict[str, str]:
    return {name: value for node in matrix.nodes.values() for name, value in node.data.items()}


def _conclude(plan: Plan, run: _Run) -> BenchResult:
    announce(f"summarising {len(run.done)} runs ...")
    failed = [run.failed[name] for name in run.matrix.nodes if name in run.failed]  # not in the order of their failing
    places = {name: run.place(run.matrix.nodes[name]) for name in run.done}
    run.folder.rows(table_rows(plan, run.matrix, places))
    summary = summarise(plan, run.matrix, places, run.done, failed, run.folder.info)
    run.folder.summary(summary)
    if failed:
        names = ", ".join(f["label"] for f in failed[:5])
        run.folder.fail(f"{len(failed)} of {len(run.matrix.nodes)} nodes did not finish: {names}")
    run.folder.record({"nodes": {"ran": run.ran, "reused": run.reused, "failed": len(failed)}})
    return BenchResult(run.out, summary, failed, run.reused, run.ran)
