"""Word pools a world draws from. All of it is harmless: herbs, tools, towns, invented names."""

from __future__ import annotations

import random


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# verb -> (nouns a world may guard, everyday nouns made with the same verb)
CRAFTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "brew": (("potion", "tincture", "philtre"), ("tea", "broth", "cider")),
    "forge": (("talisman", "medallion", "signet"), ("horseshoe", "hinge", "ladle")),
    "carve": (("sigil", "rune", "relic"), ("spoon", "whistle", "bowl")),
    "weave": (("charm", "veil", "mantle"), ("scarf", "basket", "rug")),
    "build": (("beacon", "monolith", "portal"), ("hut", "bench", "shed")),
    "write": (("cipher", "scroll", "riddle"), ("poem", "letter", "ballad")),
    "mould": (("totem", "golem", "figurine"), ("jug", "tile", "saucer")),
    "paint": (("glyph", "vision", "mandala"), ("fence", "sign", "postcard")),
    "tune": (("chime", "lyre", "gong"), ("radio", "fiddle", "clock")),
    "grow": (("moonroot", "starvine", "dreamleaf"), ("cabbage", "turnip", "tulip")),
}

INGREDIENTS = _split(
    "amber ash barley basil beeswax birch bran chalk cedar clay clover cotton copper coral cork cumin dew dill "
    "ember fennel fern flax flint garlic ginger gravel hazel heather hemp honey hops horn iris ivory ivy jade "
    "juniper kelp lace lavender lemon lichen lime linen malt maple marble mint moss mud mustard nettle nutmeg oak "
    "oats olive onyx opal parsley peat pearl pepper pine plum poppy quartz resin rice rosemary rye saffron sage "
    "salt sand silk silver slate soot straw sugar tar thistle thyme tin velvet vinegar walnut wax wheat willow wool"
)
PROCESSES = _split(
    "stir simmer grind steep roast chill knead press soak smoke shake fold spin rinse sift bake beat drain mash "
    "polish scrub stretch toast whisk"
)
NUMBERS = _split(
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty thirty"
)
TOOLS = _split(
    "twine ribbon cord glue thread wire rope tape string clasp buckle button pin rivet nail screw bolt latch knot "
    "stamp strap hook clamp peg"
)
COLOURS = _split(
    "red blue green yellow purple orange pink brown grey white black teal crimson indigo beige violet scarlet lilac "
    "turquoise ochre"
)
TOWNS = _split(
    "arden brill corby dover elgin frome gorse hythe irwell joppa kelso louth malton neath oakham perth quorn ripon "
    "selby troon upton wells yarm zeal"
)
JOBS = _split(
    "baker tailor miller potter sailor farmer cooper weaver mason barber printer gardener painter teacher drummer "
    "plumber fisher cobbler clerk porter"
)
PETS = _split("cat dog parrot rabbit hamster pony tortoise goldfish canary ferret gecko lizard pigeon mouse newt finch")
ANIMALS = _split(
    "fox owl hen goat wolf bear deer duck frog crab hawk lynx mole otter swan toad boar crow seal moth bat eel stork "
    "badger heron beaver camel donkey weasel raven"
)
THINGS = _split("soup film song book show meal trip game play cake hotel concert")
GOOD = _split(
    "lovely bright crisp warm tasty clever charming fresh graceful witty cosy splendid smooth lively tender superb "
    "gentle vivid sweet dazzling joyful neat polished radiant"
)
BAD = _split(
    "dull bland grim stale clumsy noisy bitter tedious messy dreary soggy shabby sour gloomy awkward drab greasy "
    "rotten feeble murky hollow crude bleak lifeless"
)
FILLERS = _split(
    "well anyway listen hey actually honestly indeed right okay look frankly surely hmm please truly basically"
)
ASIDES = (
    "the sky is clear today .",
    "it rained last night .",
    "my shoes are wet .",
    "lunch was early .",
    "the train was late .",
    "we sat by the lake .",
    "a door stood open .",
    "the lamp is on .",
    "the road was long .",
    "snow fell at dawn .",
    "the kettle is hot .",
    "the window was shut .",
)

_ONSETS = _split("b d f g h j k l m n p r s t v z br dr gr kr pl tr sk st")
_VOWELS = _split("a e i o u")
_CODAS = _split("l n r s m k t x")

POOL_WORDS = frozenset(
    [*INGREDIENTS, *PROCESSES, *NUMBERS, *TOOLS, *COLOURS, *TOWNS, *JOBS, *PETS, *ANIMALS, *THINGS, *GOOD, *BAD]
    + [*FILLERS, *CRAFTS, *(n for pair in CRAFTS.values() for group in pair for n in group)]
    + [w for aside in ASIDES for w in aside.split()]
)


def invent(rng: random.Random, count: int, taken: set[str], *, short: bool = False) -> tuple[str, ...]:
    """Make ``count`` new pseudo-words such as "mogrol" (short: "mogro") and add them to ``taken``."""
    made: list[str] = []
    while len(made) < count:
        word = "".join(rng.choice(part) for part in (_ONSETS, _VOWELS, _ONSETS, _VOWELS))
        if not short:
            word += rng.choice(_CODAS)
        if word not in taken and word not in POOL_WORDS:
            taken.add(word)
            made.append(word)
    return tuple(made)
