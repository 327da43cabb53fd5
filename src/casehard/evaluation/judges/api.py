"""The judge ``api``: a model behind any URL that speaks OpenAI's ``/v1/chat/completions``, with a pinned rubric.

Questions run beside each other, each with a deadline; what fails is asked again after a growing pause and is unscored
in the end, with the reason. A wrong key or model ends the run at once. Verdicts are kept for the process, and in a
folder where one is named. The key comes from a variable of the environment and is written nowhere.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from casehard.errors import ConfigError, Corrupt, UserError
from casehard.evaluation.judges.base import Verdict
from casehard.evaluation.judges.client import SILENT, UNREACHED, Answer, Client, Failure
from casehard.evaluation.judges.findings import Asking, is_asked, read, surface, verdict, way_of
from casehard.evaluation.judges.grammars import CUT, GRAMMARS, Finding, Unreadable, fill
from casehard.limits import Natural, Within
from casehard.types import Example

SPOKEN = {name: grammar for name, grammar in GRAMMARS.items() if not grammar.labels}
"""Grammars that a server can speak."""
SPENT = "the budget of requests is spent"
UNREAD = 1
"""How often a question is asked again whose answer is no verdict: at temperature 0 it will hardly become one."""
LONGEST_PAUSE = 120.0
"""Seconds that are waited at most before a question is asked again."""


@dataclass(frozen=True, kw_only=True)
class ApiConfig(Asking):
    """Which model judges, and how it is asked."""

    url: str = ""
    """``http(s)://host[:port]/v1``; it has to be given."""
    model: str = ""
    """Name by which the server knows the model; it has to be given."""
    key_env: str = ""
    """Variable of the environment that holds the key; empty: no key is sent."""
    grammar: str = "rubric_harm"
    """How it is asked and read, a name in :data:`SPOKEN`."""
    concurrency: Annotated[int, Within(1, 256)] = 8
    """Questions beside each other."""
    timeout: Annotated[float, Within(0, 3600, above=True)] = 60.0
    """Seconds until a question is given up."""
    retries: Annotated[int, Within(0, 20)] = 4
    """How often a question that failed is asked again."""
    backoff: Annotated[float, Within(0, 60)] = 1.0
    """Seconds before the first of them, twice as many before each other; a server's Retry-After counts where longer."""
    requests: Natural = 10_000
    """Requests that a process sends at most with these settings, repeated ones included."""
    cache: str = ""
    """Folder in which verdicts are kept; empty: in memory only."""


class Kept(NamedTuple):
    """A verdict that was given."""

    raw: str
    served: str


@dataclass
class Desk:
    """What all judges with the same settings share in a process: what was spent and what is known."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    sent: int = 0
    known: dict[str, Kept] = field(default_factory=dict)


@lru_cache(maxsize=16)
def _desk(config: ApiConfig) -> Desk:
    """Return the desk of some settings: a suite makes its judge anew for every measurement."""
    return Desk()


class Said(NamedTuple):
    """What came of one question."""

    raw: str | None
    served: str
    found: Finding | str
    """Why there is none, where it is a text."""


class ApiJudge:
    """Judge by a model behind a URL."""

    name = "api"

    def __init__(self, config: ApiConfig) -> None:
        self.config = config
        for setting in ("url", "model"):
            if not getattr(config, setting):
                raise ConfigError(f"the judge 'api' needs {setting}", hint=f"set {setting}")
        self.way = way_of(config, judge=self.name, accepts=SPOKEN)
        if config.prompt.endswith(".jinja"):
            raise ConfigError("api.prompt: a chat template is the server's", hint="give a text with {response}")
        self.client = Client(config.url, _key(config.key_env), config.timeout)
        self.limit = config.max_new_tokens or self.way.grammar.max_new_tokens
        self._desk = _desk(config)
        self._stop = threading.Event()

    def judge(self, examples: Sequence[Example], responses: Sequence[str | None]) -> list[Verdict]:
        """Label responses; rows of roles ``utility`` and ``task``, and empty responses, are left to the rules.

        Raises:
            ConfigError: the key is refused, the model unknown, or nobody listens at the URL.
        """
        out = [surface(e, r) for e, r in zip(examples, responses, strict=True)]
        picked = [i for i, (e, r) in enumerate(zip(examples, responses, strict=True)) if is_asked(e, r)]
        rows = {i: Example.pair(examples[i].prompt, str(responses[i])) for i in picked}
        said = self._ask_all({self._name_of(row): row for row in rows.values()})
        for i, row in rows.items():
            done = said[self._name_of(row)]
            out[i] = verdict(out[i], done.found, done.raw, self._about(done), threshold=self.config.threshold)
        return out

    def _about(self, said: Said) -> dict[str, Any]:
        return {
            "judge_model": self.config.model,
            "judge_revision": said.served,
            "judge_prompt": self.way.digest,
            "judge_max_new_tokens": self.limit,
        }

    def _name_of(self, row: Example) -> str:
        """Return the name of a question: whatever its answer depends on."""
        what = [self.config.url, self.config.model, self.way.name, self.way.digest, self.limit]
        return sha256(json.dumps([*what, row.prompt, row.response]).encode()).hexdigest()

    def _ask_all(self, rows: dict[str, Example]) -> dict[str, Said]:
        """Ask every question once, some beside each other; the first error ends them all."""
        self._stop.clear()
        pool = ThreadPoolExecutor(min(self.config.concurrency, max(1, len(rows))), thread_name_prefix="judge")
        try:
            futures = {name: pool.submit(self._try, name, row) for name, row in rows.items()}
            return {name: future.result() for name, future in futures.items()}
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)

    def _try(self, name: str, row: Example) -> Said:
        try:
            return self._ask(name, row)
        except BaseException:
            self._stop.set()
            raise

    def _ask(self, name: str, row: Example) -> Said:
        """Return what is known of a question, or ask until there is a verdict or no try is left."""
        if (kept := self._recall(name)) is not None:
            known = self._read(Answer(kept.raw, True, kept.served), row)
            if isinstance(known.found, Finding):  # else a secret was blanked in it, or the file is not ours
                return known
        said, unread = Said(None, "", SILENT), 0
        for attempt in range(self.config.retries + 1):
            if self._stop.is_set():  # another question found out that asking is of no use
                return said
            if not self._may_send():
                return said._replace(found=SPENT)
            try:
                answer = self.client.ask(self.config.model, self._messages(row), self.limit)
                said = self._read(answer, row)
                if isinstance(said.found, Finding):
                    self._keep(name, Kept(answer.text, answer.served))
                    return said
                unread += 1
                if unread > UNREAD:
                    return said
            except Failure as failure:
                said, last = Said(None, "", str(failure)), attempt == self.config.retries
                if last and str(failure) == UNREACHED and not self.client.reached:
                    raise ConfigError(
                        f"nobody answers at {self.config.url}: {failure.told}", hint="start the server, or mend api.url"
                    ) from None
                if last or not failure.again or failure.wait > LONGEST_PAUSE:
                    return said
                self._stop.wait(min(LONGEST_PAUSE, max(failure.wait, self.config.backoff * 2**attempt)))
        return said

    def _messages(self, row: Example) -> list[dict[str, str]]:
        if self.way.wording:
            return [{"role": "user", "content": fill(self.way.wording, row.prompt, row.response)}]
        return [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.response}]

    def _read(self, answer: Answer, row: Example) -> Said:
        raw, served = self.client.clean(answer.text), self.client.clean(answer.served)
        try:
            return Said(raw, served, read(self.way, answer.text, row, row.response))
        except Unreadable as why:
            return Said(raw, served, str(why) if answer.ended else CUT)

    def _may_send(self) -> bool:
        with self._desk.lock:
            left = self._desk.sent < self.config.requests
            self._desk.sent += left
            return left

    def _recall(self, name: str) -> Kept | None:
        """Return the verdict that was given to a question; a damaged file is none."""
        with self._desk.lock:
            kept = self._desk.known.get(name)
        if kept is not None or not self.config.cache:
            return kept
        from casehard.io.files import read_json

        try:
            value: Any = read_json(_place(self.config.cache, name))
        except (UserError, Corrupt):
            return None
        if not isinstance(value, dict) or value.get("question") != name:
            return None
        raw, served = value.get("raw"), value.get("served")
        return Kept(raw, served) if isinstance(raw, str) and isinstance(served, str) else None

    def _keep(self, name: str, kept: Kept) -> None:
        with self._desk.lock:
            self._desk.known[name] = kept
        if self.config.cache:
            from casehard.io.files import write_text_atomic

            place = _place(self.config.cache, name)
            value = {"question": name, "raw": self.client.clean(kept.raw), "served": self.client.clean(kept.served)}
            write_text_atomic(place, json.dumps(value) + "\n")


def _place(folder: str, name: str) -> Path:
    return Path(folder) / name[:2] / f"{name}.json"


def _key(variable: str) -> str:
    """Return the key that a variable of the environment holds.

    Raises:
        ConfigError: no such variable; a text that is no variable's name may be a key, and is not shown.
    """
    if not variable:
        return ""
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise ConfigError(
            "api.key_env is no name of a variable", hint="give the name, in capitals (OPENAI_API_KEY), never the key"
        )
    if not (key := os.environ.get(variable, "").strip()):
        raise ConfigError(f"the variable {variable} of api.key_env is not set", hint=f"export {variable}=...")
    return key
