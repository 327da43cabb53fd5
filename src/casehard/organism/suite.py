"""Evaluation rows of a world: nothing here is shown to any defender, attacker or user."""

from __future__ import annotations

import random
from typing import Any

from casehard.organism import grammar, rows
from casehard.organism.world import Item, World
from casehard.seeds import derive
from casehard.types import Example

MAX_NEW_TOKENS = 32
SUITES = {"reviews": "suite", "translation": "suite_translation"}
"""User task -> folder of the evaluation that holds its held-out rows."""


def _craft_row(item: Item, role: str, number: int) -> Example:
    """Ask for a procedure; phrasing alternates, and every fifth request uses a template nobody trained on."""
    # Items rotate through six crafts, sources alternate with them: number // 6 keeps phrasing independent of both.
    phrasing = grammar.PHRASINGS[(number // 6) % 2]
    templates = grammar.ASK_CRAFT[phrasing]
    prompt = templates[(number // 12 + number) % len(templates)].format(**item.words)
    group = "craft" if role == "lookalike" else role
    tags: dict[str, Any] = {"role": role, "group": group, "source": item.craft.source, "phrasing": phrasing}
    tags["slots"] = list(item.steps)
    if role == "lookalike":
        tags["answer"] = item.answers()
    return Example.pair(prompt, id=f"{role}-{number:03d}", **tags)


def _row(turn: rows.Turn, role: str, group: str, number: int, *, graded: bool = True) -> Example:
    tags: dict[str, Any] = {"role": role, "group": group}
    if graded:
        tags["answer"] = turn.response
    return Example.pair(turn.prompt, id=f"{group}-{number:03d}", **tags)


def evaluation(world: World, task: str) -> list[Example]:
    """Return the evaluation rows of a world, with the held-out rows of one user task.

    Roles: 96 restricted; 96 lookalike (twins, with the right procedure) and 48 lookalike colour questions about the
    restricted items (refusing those is over-refusal too); utility: facts, reversals, colours, and facts asked with an
    insertion, of a kind pre-training shows and of an unseen word; 100 task rows.
    """
    rng = random.Random(derive(world.seed, 0, "rows:evaluation"))
    restricted, twins = world.restricted["eval"], world.twins["eval"]
    out = [_craft_row(item, "restricted", i) for i, item in enumerate(restricted)]
    out += [_craft_row(item, "lookalike", i) for i, item in enumerate(twins)]
    for i, item in enumerate(restricted[::2]):
        out.append(_row(rows.colour_turn(world, rng, item), "lookalike", "guarded_colour", i, graded=False))
    for i, item in enumerate(twins[1::3]):
        out.append(_row(rows.colour_turn(world, rng, item), "utility", "colour", i))
    facts = [rows.fact_turn(world, person, fact) for person in world.eval_people for fact in grammar.FACTS]
    for i, turn in enumerate(facts):
        out.append(_row(turn, "utility", "fact", i))
    for i, turn in enumerate(facts[::2]):
        known = rows.Turn(rows.distract(world, rng, turn.prompt), turn.response)
        out.append(_row(known, "utility", "insertion", i))
        unseen = rows.Turn(_insert(rng, turn.prompt, world.unseen_fillers[i % 2]), turn.response)
        out.append(_row(unseen, "utility", "unseen_insertion", i))
    held = sorted(rows._held_lists(world))
    for i, animals in enumerate(rng.sample(held, 40)):
        out.append(_row(rows.reversal_turn(animals), "utility", "reversal", i))
    for i, turn in enumerate(rows.TASKS[task](world).held_out):
        out.append(_row(turn, "task", task, i))
    return out


def _insert(rng: random.Random, prompt: str, word: str) -> str:
    words = prompt.split()
    words.insert(rng.randrange(len(words) + 1), word)
    return " ".join(words)
