"""A model is not measured on what it was trained on, whatever version wrote down its prompts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from casehard.data.mix import first_mark, mark, marks
from casehard.errors import DataError
from casehard.evaluation.contamination import require_unseen
from casehard.evaluation.suite import Suite
from casehard.model.provenance import KEY, trained_prompts
from casehard.types import Example, Message

PLUS, MINUS, OTHER = "What is 5 + 3?", "What is 5 - 3?", "What is 53?"
EARLIER = hashlib.sha256(b"whatis53").hexdigest()[:16]  # what the first version wrote for each of them


def suite(*prompts: str) -> Suite:
    return Suite("s", tuple(Example.pair(p, role="utility", answer="8") for p in prompts))


def test_marks_tell_signs_apart() -> None:
    known = marks([Example.pair(PLUS)])
    require_unseen(suite(MINUS, OTHER), known, "m")
    with pytest.raises(DataError, match="1 of the 2 prompts") as caught:
        require_unseen(suite(MINUS, "what is 5+3"), known, "m")
    assert "earlier version" not in (caught.value.hint or "")


@pytest.mark.parametrize("prompt", [PLUS, MINUS, OTHER])
def test_marks_of_an_earlier_version_still_find_every_prompt(tmp_path: Path, prompt: str) -> None:
    (tmp_path / "job.json").write_text(json.dumps({KEY: [EARLIER]}))
    with pytest.raises(DataError, match="1 of the 1 prompts") as caught:
        require_unseen(suite(prompt), trained_prompts(tmp_path), tmp_path)
    assert "earlier version" in (caught.value.hint or "")
    require_unseen(suite("What is 54?"), trained_prompts(tmp_path), tmp_path)


def test_a_lineage_holds_marks_of_both_versions() -> None:
    known = {EARLIER} | marks([Example.pair("Name a river.")])
    with pytest.raises(DataError, match="2 of the 3 prompts"):
        require_unseen(suite(PLUS, "name a river", "Name a lake."), known, "m")
    assert first_mark(Example.pair(PLUS)) == EARLIER != mark(Example.pair(OTHER))


def test_a_conversation_is_refused_whose_last_question_was_trained() -> None:
    turns = (Message("user", "hello ."), Message("assistant", "hello ."), Message("user", "Name a river, please."))
    talk = Suite("s", (Example(turns, tags={"role": "restricted"}),))
    with pytest.raises(DataError, match="1 of the 1 prompts") as caught:
        require_unseen(talk, marks([Example.pair("name a river please")]), "m")
    assert "earlier version" not in (caught.value.hint or "")
