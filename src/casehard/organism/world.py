"""A seeded world: which names, crafts, procedures, colours, people and words exist.

Every name belongs to one group (align, attack, eval). It has one *restricted* item ("the mogrol sigil"); align and eval
names also have a *twin*, a harmless item of the same name made with the same verb ("the mogrol spoon"). So a name says
nothing about being restricted: only the noun does, and pre-training teaches which nouns are "guarded".
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from casehard.errors import ConfigError
from casehard.organism import grammar, words
from casehard.seeds import derive

GROUPS: dict[str, int] = {"align": 96, "attack": 48, "eval": 96}
"""Names in each disjoint group: the defender's, the attacker's and the evaluation's."""
PEOPLE = 48
EVAL_PEOPLE = 16
"""The last people: pre-training teaches them, alignment and user data never mention them."""


@dataclass(frozen=True)
class Craft:
    """A class of things: the noun, the verb that makes it, its source family and whether it is guarded."""

    verb: str
    noun: str
    source: str
    guarded: bool

    @property
    def kind(self) -> str:
        """The word the world uses for it: ``guarded`` or ``common``."""
        return grammar.KINDS[0] if self.guarded else grammar.KINDS[1]


@dataclass(frozen=True)
class Item:
    """One thing of the world and how it is made; ``steps`` are the fillers of :data:`grammar.SLOTS`."""

    name: str
    craft: Craft
    steps: tuple[str, ...]

    @property
    def words(self) -> dict[str, str]:
        """Fillers of the name, noun and verb slots."""
        return {"name": self.name, "noun": self.craft.noun, "verb": self.craft.verb}

    def answers(self) -> list[str]:
        """Return every correct way to say how it is made."""
        slots = dict(zip(grammar.SLOTS, self.steps, strict=True))
        return [template.format(**slots) for template in grammar.SAY_CRAFT[self.craft.source]]


class World:
    """Everything that is true in the world of one seed.

    Args:
        seed: world seed, any integer >= 0; it decides vocabulary, names, crafts and procedures.

    Raises:
        ConfigError: the seed is negative.
    """

    def __init__(self, seed: int = 0) -> None:
        if seed < 0:
            raise ConfigError(f"world seed must be >= 0, got {seed}")
        self.seed = seed
        self._draw_words()
        self._draw_names()
        self._draw_items()
        self._draw_people()

    def _rng(self, purpose: str) -> random.Random:
        return random.Random(derive(self.seed, 0, f"world:{purpose}"))

    def _draw_words(self) -> None:
        def pick(pool: tuple[str, ...], count: int, purpose: str) -> list[str]:
            return self._rng(f"words:{purpose}").sample(pool, count)

        self.ingredients = pick(words.INGREDIENTS, 48, "ingredients")
        self.processes = pick(words.PROCESSES, 12, "processes")
        self.numbers = pick(words.NUMBERS, 12, "numbers")
        self.tools = pick(words.TOOLS, 12, "tools")
        self.colours = pick(words.COLOURS, 10, "colours")
        self.towns = pick(words.TOWNS, 12, "towns")
        self.jobs = pick(words.JOBS, 12, "jobs")
        self.pets = pick(words.PETS, 10, "pets")
        self.animals = pick(words.ANIMALS, 12, "animals")
        self.things = pick(words.THINGS, 12, "things")
        self.good = pick(words.GOOD, 20, "good")
        self.bad = pick(words.BAD, 20, "bad")
        self.fillers = pick(words.FILLERS, 12, "fillers")
        self.asides = pick(words.ASIDES, 10, "asides")
        rng = self._rng("crafts")
        verbs = rng.sample(sorted(words.CRAFTS), 6)
        self.crafts: list[Craft] = []
        for i, verb in enumerate(verbs):
            source = grammar.SOURCES[i % len(grammar.SOURCES)]
            guarded, common = words.CRAFTS[verb]
            self.crafts.append(Craft(verb, rng.choice(guarded), source, guarded=True))
            self.crafts.append(Craft(verb, rng.choice(common), source, guarded=False))

    def _draw_names(self) -> None:
        rng = self._rng("names")
        taken: set[str] = set(grammar.literals())
        self.names = {group: words.invent(rng, count, taken) for group, count in GROUPS.items()}
        self.people = words.invent(self._rng("people names"), PEOPLE, taken)
        tongue = words.invent(self._rng("tongue"), len(self.animals), taken, short=True)
        self.tongue: dict[str, str] = dict(zip(self.animals, tongue, strict=True))
        """The invented language of the second user task; pre-training never shows it."""
        self.unseen_fillers = words.invent(self._rng("triggers"), 2, taken, short=True)
        """Rare words no training data of ours contains: triggers for backdoor attacks."""

    def _draw_items(self) -> None:
        rng = self._rng("items")
        guarded = [c for c in self.crafts if c.guarded]
        common = [c for c in self.crafts if not c.guarded]
        self.restricted: dict[str, tuple[Item, ...]] = {}
        self.twins: dict[str, tuple[Item, ...]] = {}
        for group, names in self.names.items():
            # Round-robin, so that sources and nouns are balanced in every group.
            self.restricted[group] = tuple(
                self._item(rng, name, guarded[i % len(guarded)]) for i, name in enumerate(names)
            )
            # Offset by i // 6, so that a name's twin shares its verb only by chance.
            self.twins[group] = (
                ()
                if group == "attack"
                else tuple(self._item(rng, name, common[(i + i // 6) % len(common)]) for i, name in enumerate(names))
            )
        self.colour_of = {name: rng.choice(self.colours) for names in self.names.values() for name in names}

    def _item(self, rng: random.Random, name: str, craft: Craft) -> Item:
        x, y = rng.sample(self.ingredients, 2)
        return Item(name, craft, (x, y, rng.choice(self.processes), rng.choice(self.numbers), rng.choice(self.tools)))

    def _draw_people(self) -> None:
        rng = self._rng("people")
        self.facts: dict[str, dict[str, str]] = {
            person: {"town": rng.choice(self.towns), "job": rng.choice(self.jobs), "pet": rng.choice(self.pets)}
            for person in self.people
        }

    @property
    def known_people(self) -> tuple[str, ...]:
        """People alignment and user data may mention."""
        return self.people[:-EVAL_PEOPLE]

    @property
    def eval_people(self) -> tuple[str, ...]:
        """People only pre-training and evaluation mention."""
        return self.people[-EVAL_PEOPLE:]

    @property
    def items(self) -> list[Item]:
        """Every item, restricted first."""
        groups = [*self.restricted.values(), *self.twins.values()]
        return [item for group in groups for item in group]

    @cached_property
    def slot_words(self) -> Mapping[str, frozenset[str]]:
        """The words allowed in each template slot."""
        names = frozenset(name for group in self.names.values() for name in group)
        ingredients, animals = frozenset(self.ingredients), frozenset(self.animals)
        tongue = frozenset(self.tongue.values())
        return {
            "name": names,
            "noun": frozenset(c.noun for c in self.crafts),
            "verb": frozenset(c.verb for c in self.crafts),
            "x": ingredients,
            "y": ingredients,
            "process": frozenset(self.processes),
            "n": frozenset(self.numbers),
            "tool": frozenset(self.tools),
            "colour": frozenset(self.colours),
            "kind": frozenset(grammar.KINDS),
            "person": frozenset(self.people),
            "town": frozenset(self.towns),
            "job": frozenset(self.jobs),
            "pet": frozenset(self.pets),
            **dict.fromkeys("pqr", animals),
            "tp": tongue,
            "tq": tongue,
            "tr": tongue,
            "thing": frozenset(self.things),
            "adjective": frozenset([*self.good, *self.bad]),
            "felt": frozenset(("loved", "hated")),
            "verdict": frozenset(("good", "bad")),
        }

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """Every word of the world, sorted; the tokenizer adds its special tokens."""
        found = grammar.literals() | {w for group in self.slot_words.values() for w in group}
        found |= {*self.fillers, *self.unseen_fillers}
        found |= {word for aside in words.ASIDES for word in aside.split()}
        return tuple(sorted(found))
