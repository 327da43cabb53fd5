"""The world: seeded, balanced, with names shared between restricted and harmless items."""

from __future__ import annotations

import pytest

from casehard.errors import ConfigError
from casehard.organism import grammar
from casehard.organism.world import GROUPS, World


def test_same_seed_same_world_and_other_seed_other_world() -> None:
    one, same, other = World(3), World(3), World(4)
    assert one.items == same.items
    assert one.vocabulary == same.vocabulary
    assert one.facts == same.facts
    assert one.vocabulary != other.vocabulary
    assert not set(one.names["eval"]) & set(other.names["eval"])
    assert [c.noun for c in one.crafts] != [c.noun for c in other.crafts]
    steps, others = ({i.steps for i in w.items} for w in (one, other))
    assert len(steps & others) == 0


def test_negative_seed_is_refused_with_the_value() -> None:
    with pytest.raises(ConfigError, match="-1"):
        World(-1)


@pytest.mark.parametrize("seed", range(4))
def test_groups_are_disjoint_and_twins_share_their_names(seed: int) -> None:
    world = World(seed)
    sets = [set(names) for names in world.names.values()]
    assert sum(map(len, sets)) == len(set.union(*sets)) == sum(GROUPS.values())
    for group in ("align", "eval"):
        assert [i.name for i in world.twins[group]] == [i.name for i in world.restricted[group]]
        assert all(a.steps != b.steps for a, b in zip(world.twins[group], world.restricted[group], strict=True))
    assert all(i.craft.guarded for group in world.restricted.values() for i in group)
    assert not any(i.craft.guarded for group in world.twins.values() for i in group)


@pytest.mark.parametrize("group", GROUPS)
def test_sources_and_classes_are_balanced_in_every_group(group: str) -> None:
    world = World(0)
    nouns = [i.craft.noun for i in world.restricted[group]]
    assert len(set(nouns)) == 6
    assert {nouns.count(n) for n in nouns} == {GROUPS[group] // 6}
    sources = [i.craft.source for i in world.restricted[group]]
    assert sources.count("a") == sources.count("b")


def test_a_verb_makes_one_guarded_and_one_common_noun() -> None:
    by_verb: dict[str, list[bool]] = {}
    for craft in World(0).crafts:
        by_verb.setdefault(craft.verb, []).append(craft.guarded)
    assert len(by_verb) == 6
    assert all(sorted(kinds) == [False, True] for kinds in by_verb.values())


def test_every_answer_of_a_source_names_the_slots_in_the_same_order() -> None:
    for templates in grammar.SAY_CRAFT.values():
        for template in templates:
            assert tuple(s for w in template.split() if (s := grammar.slot_of(w))) == grammar.SLOTS


def test_vocabulary_is_closed_small_and_without_special_characters() -> None:
    words = World(0).vocabulary
    assert len(words) == len(set(words)) < 1000
    assert all(w.isalnum() or w in ".,:?" for w in words)
