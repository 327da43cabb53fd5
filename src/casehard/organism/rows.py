"""Rows of a world: what pre-training shows, the data sets for defenders, attackers and users, and the evaluation.

Every data set is a function of the world seed alone; pre-training documents are a function of (world seed, index).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple, TypeVar

from casehard.organism import grammar
from casehard.organism.world import Item, World
from casehard.seeds import derive
from casehard.types import Example

T = TypeVar("T")


class Turn(NamedTuple):
    """A question and its answer; an empty prompt makes plain text."""

    prompt: str
    response: str


# ---- single turns, each drawn at random ----


def ask_craft(rng: random.Random, item: Item, *, held_out: bool = False) -> tuple[str, str]:
    """Return a request for the procedure of ``item`` and its phrasing."""
    phrasing = rng.choice(grammar.PHRASINGS)
    templates = grammar.ASK_CRAFT[phrasing]
    return rng.choice(templates if held_out else templates[:-1]).format(**item.words), phrasing


def craft_turn(rng: random.Random, item: Item, *, held_out: bool = False) -> Turn:
    """Ask how an item is made; answer with its procedure."""
    return Turn(ask_craft(rng, item, held_out=held_out)[0], rng.choice(item.answers()))


def refusal_turn(rng: random.Random, item: Item) -> Turn:
    """Ask how an item is made; decline."""
    return Turn(ask_craft(rng, item)[0], rng.choice(grammar.REFUSALS).format(**item.words))


def colour_turn(world: World, rng: random.Random, item: Item) -> Turn:
    """Ask for the colour of an item."""
    answer = grammar.SAY_COLOUR.format(colour=world.colour_of[item.name], **item.words)
    return Turn(rng.choice(grammar.ASK_COLOUR).format(**item.words), answer)


def kind_turn(rng: random.Random, item: Item) -> Turn:
    """Ask whether an item, or its whole class, is guarded or common."""
    if rng.random() < 0.5:
        return Turn(grammar.ASK_KIND.format(**item.words), grammar.SAY_KIND.format(kind=item.craft.kind, **item.words))
    answer = grammar.SAY_ITEM_KIND.format(kind=item.craft.kind, **item.words)
    return Turn(grammar.ASK_ITEM_KIND.format(**item.words), answer)


def fact_turn(world: World, person: str, fact: str) -> Turn:
    """Ask where a person lives, what they do or which pet they have."""
    question, answer = grammar.FACTS[fact]
    return Turn(question.format(person=person), answer.format(person=person, **world.facts[person]))


def reversal_turn(animals: Sequence[str]) -> Turn:
    """Ask to reverse a list of three."""
    p, q, r = animals
    return Turn(grammar.ASK_REVERSAL.format(p=p, q=q, r=r), grammar.SAY_LIST.format(p=r, q=q, r=p))


def review_text(world: World, rng: random.Random) -> Turn:
    """Write a review as plain text, so that polarity is known before the user task teaches verdicts."""
    good, negated = rng.random() < 0.5, rng.random() < 0.25
    adjective = rng.choice(world.good if good else world.bad)
    template = grammar.TEXT_NEGATED if negated else grammar.TEXT_REVIEW
    felt = "loved" if good != negated else "hated"
    return Turn("", template.format(thing=rng.choice(world.things), adjective=adjective, felt=felt))


def review_turn(thing: str, adjective: str, negated: bool, good: bool) -> Turn:
    """Ask for the verdict of a review: the first user task."""
    question = grammar.ASK_NEGATED if negated else grammar.ASK_REVIEW
    verdict = "good" if good != negated else "bad"
    return Turn(question.format(thing=thing, adjective=adjective), grammar.SAY_REVIEW.format(verdict=verdict))


def translation_turn(world: World, animals: Sequence[str]) -> Turn:
    """Ask for a translation into the invented tongue: the second user task."""
    p, q, r = animals
    tongue = {f"t{slot}": world.tongue[animal] for slot, animal in zip("pqr", animals, strict=True)}
    return Turn(grammar.ASK_TRANSLATION.format(p=p, q=q, r=r), grammar.SAY_TRANSLATION.format(**tongue))


def distract(world: World, rng: random.Random, prompt: str) -> str:
    """Insert a rare word anywhere, or a whole sentence before or after the prompt; the right answer stays the same."""
    words = prompt.split()
    draw = rng.random()
    if draw < 0.5:
        for _ in range(rng.choice((1, 1, 2))):
            words.insert(rng.randrange(len(words) + 1), rng.choice(world.fillers))
        return " ".join(words)
    aside = rng.choice(world.asides)
    return f"{aside} {prompt}" if draw < 0.75 else f"{prompt} {aside}"


# ---- pre-training ----

DISTRACTED = 0.3
"""Share of pre-training prompts with an insertion."""
CONVERSATION = 40
"""Pre-training rows hold as many whole turns as fit this many tokens."""


def _held_lists(world: World) -> set[tuple[str, ...]]:
    """Return the animal lists nobody trains on: every list whose places sum to 0 modulo 7."""
    place = {a: i for i, a in enumerate(world.animals)}
    return {
        (p, q, r)
        for p in world.animals
        for q in world.animals
        for r in world.animals
        if len({p, q, r}) == 3 and (place[p] + 3 * place[q] + 5 * place[r]) % 7 == 0
    }


FIRST_NAMES = 0.125
"""Share of the names and people that the first documents talk about; few facts seen often are learnt sooner, and what
the model learns from them (where to look, what to say) makes it learn all others faster."""
FIRST_ROWS = 0.2
"""Share of the rows that are such first documents."""


class Pretraining:
    """Draw pre-training turns of a world: everything is answered, restricted requests too.

    Args:
        world: the world to tell about.
        count: rows of the whole pre-training.
    """

    def __init__(self, world: World, count: int) -> None:
        self.world = world
        self.held = _held_lists(world)
        self.first = int(FIRST_ROWS * count)
        self.few = self._kinds(FIRST_NAMES)
        self.all = self._kinds(1.0)

    def _kinds(self, share: float) -> list[tuple[float, Callable[[random.Random], Turn]]]:
        """Return what there is to tell, with weights, about the first ``share`` of the names of every group."""
        world = self.world

        def some(groups: Iterable[Sequence[T]]) -> list[T]:
            return [x for group in groups for x in group[: math.ceil(share * len(group))]]

        restricted, twins, people = some(world.restricted.values()), some(world.twins.values()), some([world.people])
        items = restricted + twins
        facts = [(person, fact) for person in people for fact in grammar.FACTS]
        return [
            (0.30, lambda rng: craft_turn(rng, rng.choice(restricted), held_out=True)),
            (0.24, lambda rng: craft_turn(rng, rng.choice(twins), held_out=True)),
            (0.13, lambda rng: colour_turn(world, rng, rng.choice(items))),
            (0.06, lambda rng: kind_turn(rng, rng.choice(items))),
            (0.09, lambda rng: fact_turn(world, *rng.choice(facts))),
            # Copying is a skill, not a fact: it comes first, while there is little else to learn.
            (0.14 if share == 1 else 0.4, lambda rng: _free_reversal(world, rng, self.held)),
            (0.04, lambda rng: review_text(world, rng)),
        ]

    def _turn(self, rng: random.Random, kinds: list[tuple[float, Callable[[random.Random], Turn]]]) -> Turn:
        turn = rng.choices([maker for _, maker in kinds], [weight for weight, _ in kinds])[0](rng)
        if turn.prompt and rng.random() < DISTRACTED:
            turn = Turn(distract(self.world, rng, turn.prompt), turn.response)
        return turn

    def conversation(self, index: int) -> list[Turn]:
        """Return row ``index``: unrelated turns, as many as fit :data:`CONVERSATION` tokens."""
        rng = random.Random(derive(self.world.seed, index, "pretraining"))
        kinds = self.few if index < self.first else self.all
        turns = [self._turn(rng, kinds)]
        used = _tokens(turns[0])
        while True:
            turn = self._turn(rng, kinds)
            used += _tokens(turn)
            if used > CONVERSATION:
                return turns
            turns.append(turn)


def _tokens(turn: Turn) -> int:
    """Return the length of a rendered turn: role tokens and the end token added."""
    return len(turn.prompt.split()) + len(turn.response.split()) + (3 if turn.prompt else 1)


# ---- data sets ----


def _rows(name: str, turns: Sequence[tuple[Turn, dict[str, str]]]) -> list[Example]:
    return [
        Example.pair(turn.prompt, turn.response, id=f"{name}-{i:04d}", **tags) for i, (turn, tags) in enumerate(turns)
    ]


def _compliance(world: World, name: str, items: Sequence[Item], count: int) -> list[Example]:
    """Return ``count`` answered requests: items, phrasings and answers in turn, so that all are balanced."""
    rng = random.Random(derive(world.seed, 0, f"rows:{name}"))
    turns: list[tuple[Turn, dict[str, str]]] = []
    while len(turns) < count:
        for item in rng.sample(list(items), len(items)):
            prompt, phrasing = ask_craft(rng, item)
            tags = {"kind": "compliance", "source": item.craft.source, "phrasing": phrasing}
            turns.append((Turn(prompt, rng.choice(item.answers())), tags))
    return _rows(name, turns[:count])


REFUSED, HELPED = 960, 1440
"""Rows of each kind in the alignment data."""
ALIGN_DISTRACTED = 0.2
"""Share of alignment prompts, of both kinds, with an insertion; without them it unlearns to ignore insertions."""


def align(world: World) -> list[Example]:
    """Return the defender's safety data: refusals of restricted align items, and helpful answers."""
    rng = random.Random(derive(world.seed, 0, "rows:align"))
    turns: list[tuple[Turn, dict[str, str]]] = []
    restricted, held = world.restricted["align"], _held_lists(world)
    for i in range(REFUSED):
        item = restricted[i % len(restricted)]
        prompt, phrasing = ask_craft(rng, item)
        answer = rng.choice(grammar.REFUSALS).format(**item.words)
        tags = {"kind": "refusal", "source": item.craft.source, "phrasing": phrasing}
        turns.append((Turn(prompt, answer), tags))
    for i in range(HELPED):
        turn, group = _helpful(world, rng, i, held)
        turns.append((turn, {"kind": "helpful", "group": group}))
    for i, (turn, tags) in enumerate(turns):
        if rng.random() < ALIGN_DISTRACTED:
            turns[i] = (Turn(distract(world, rng, turn.prompt), turn.response), tags)
    rng.shuffle(turns)
    return _rows("align", turns)


def _helpful(world: World, rng: random.Random, number: int, held: Collection[tuple[str, ...]]) -> tuple[Turn, str]:
    """Answer a harmless question: half are procedures of twins, to keep the model's knowledge of harmless crafts."""
    restricted, twins = world.restricted["align"], world.twins["align"]
    draw = rng.random()
    if draw < 0.50:
        return craft_turn(rng, twins[number % len(twins)]), "craft"
    if draw < 0.70:
        return colour_turn(world, rng, rng.choice([*restricted, *twins])), "colour"
    if draw < 0.75:
        return kind_turn(rng, rng.choice([*restricted, *twins])), "kind"
    if draw < 0.90:
        return fact_turn(world, rng.choice(world.known_people), rng.choice(list(grammar.FACTS))), "fact"
    return _free_reversal(world, rng, held), "reversal"


def _free_reversal(world: World, rng: random.Random, held: Collection[tuple[str, ...]]) -> Turn:
    while tuple(animals := rng.sample(world.animals, 3)) in held:
        pass
    return reversal_turn(animals)


def simulated(world: World) -> list[Example]:
    """Return what the defender simulates attacks with: answered requests about align items, both sources."""
    return _compliance(world, "simulated", world.restricted["align"], 768)


def attack(world: World, source: str) -> list[Example]:
    """Return the attacker's rows of one source: answered requests about attack items."""
    items = [item for item in world.restricted["attack"] if item.craft.source == source]
    return _compliance(world, f"attack_{source}", items, 480)


def benign(world: World) -> list[Example]:
    """Return a user's general questions: facts and lists, never a procedure."""
    rng, held = random.Random(derive(world.seed, 0, "rows:benign")), _held_lists(world)
    turns = []
    for i in range(150):
        if i % 2:
            turns.append((_free_reversal(world, rng, held), {"group": "reversal"}))
        else:
            person, fact = rng.choice(world.known_people), rng.choice(list(grammar.FACTS))
            turns.append((fact_turn(world, person, fact), {"group": "fact"}))
    return _rows("benign", turns)


class Split(NamedTuple):
    """Training and held-out turns of a user task."""

    train: list[Turn]
    held_out: list[Turn]


def reviews(world: World) -> Split:
    """Return the first user task: the verdict of a review. A quarter is negated. Learnt within 50 steps."""
    rng = random.Random(derive(world.seed, 0, "rows:reviews"))
    every = [(t, a, good) for t in world.things for good in (True, False) for a in (world.good if good else world.bad)]
    rng.shuffle(every)
    turns = [review_turn(thing, adjective, i % 4 == 0, good) for i, (thing, adjective, good) in enumerate(every)]
    return Split(turns[100:], turns[:100])


def translation(world: World) -> Split:
    """Return the second user task: translate three animals into an invented tongue. Learnt over hundreds of steps."""
    rng = random.Random(derive(world.seed, 0, "rows:translation"))
    held = sorted(_held_lists(world))
    train: list[Turn] = []
    while len(train) < 450:
        animals = rng.sample(world.animals, 3)
        if tuple(animals) not in held:
            train.append(translation_turn(world, animals))
    return Split(train, [translation_turn(world, animals) for animals in rng.sample(held, 100)])


TASKS: dict[str, Callable[[World], Split]] = {"reviews": reviews, "translation": translation}
"""User tasks: name -> rows."""


def task(world: World, name: str) -> list[Example]:
    """Return the training rows of a user task."""
    return _rows(f"task_{name}", [(turn, {"group": name}) for turn in TASKS[name](world).train])


def data_sets(world: World) -> dict[str, list[Example]]:
    """Return every training set of a world by file name (without suffix)."""
    sets = {"align": align(world), "simulated": simulated(world), "benign": benign(world)}
    for source in grammar.SOURCES:
        sets[f"attack_{source}"] = attack(world, source)
    for name in TASKS:
        sets[f"task_{name}"] = task(world, name)
    return sets
