"""Tell text that is not English, so that rules written for English do not judge it in silence.

Three signs: letters of another script; running words of which hardly any is an English function word; in a few words,
function words of one other language, or letters with accents, and hardly an English one. Code, numbers, names, lists
and single words are of no language.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

LEAST_RUNNING = 8
"""Running lower-case words from which a want of English function words tells."""
LEAST_ENGLISH = 0.05
"""Share of function words among them below which text is not English; in English it is a third to a half."""


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_ENGLISH = _set(
    "the and of to that this with you your is are was were can cannot can't for from they them their he she his her "
    "it its it's have has had which when where there here would could should will won't be been being not don't but "
    "what how why who more most other another some any many each every all both about also into onto than then these "
    "those by if we our us my i i'm i'll as at on or an up out so do does did done doing just only very too such no "
    "because while after before over under between through during without within against until since even still may "
    "might must shall let make made like use used using get got one two first new good time people way please sorry "
    "help"
)
_SHARED = _set("is was to so an in on he we me do no as at or of for over under i us by may even my been one")
"""English words that are words of other languages too: they speak for English in running text only."""
_ONLY_ENGLISH = _ENGLISH - _SHARED
_PARTICLES = _set("de la el le les da di du del der den van von los las y e o un et al se ne na ja")
"""Words of the lists below that stand in names too: they only help the others."""
_EITHER = _set("a i an in is to so at me do no on as be for of men til over som ta")
_OTHERS = tuple(
    _set(words) - _PARTICLES - _EITHER
    for words in (
        "que una pero para por como puedo esto eso esta este est\u00e1 con su sus muy m\u00e1s porque cuando "
        "tambi\u00e9n siento ayudarte ayudar puede hacer lo es en",
        "je pas vous des une est pour dans avec sur qui que mais ce cette votre nous ils elle peux suis "
        "d\u00e9sol\u00e9 aider cela au aux sont plus",
        "ich nicht und das ist ein eine einen mit auf f\u00fcr sie wir aber kann bei zu dem dass auch nur wenn oder "
        "wie helfen leid dabei es tut mir ihnen wird werden zum des muss wurde als nach aus",
        "che non una per con sono \u00e8 posso questo questa il gli alla della delle anche pi\u00f9 mi dispiace "
        "aiutarti aiutare ma ho puoi essere",
        "que n\u00e3o uma para por com voc\u00ea isso este esta mas eu posso ajudar desculpe mais como seu sua ele "
        "em os s\u00e3o \u00e9 ou tamb\u00e9m sinto muito",
        "het een niet ik dat met voor zijn maar kan op te aan ook als bij er dit deze je u wij kunnen helpen spijt "
        "daar mij uw",
        "och att det en ett inte jag kan med p\u00e5 f\u00f6r \u00e4r av till om detta hj\u00e4lpa dig har du "
        "tyv\u00e4rr ledsen",
        "og at det en et ikke jeg kan med p\u00e5 er af av den om dette hj\u00e6lpe hjelpe dig deg har du "
        "desv\u00e6rre beklager",
        "nie jest si\u0119 \u017ce jak ale co mog\u0119 tego w z przykro mi pom\u00f3c tym dla od jestem przez czy tak",
        "je \u017ee jak ale co mohu s v pro by jsem lze m\u016f\u017ee tak nebo aby pomoci l\u00edto mi v\u00e1m "
        "nemohu sa nie som",
        "je da ali sam za \u0161to mi mogu s vam vas nisam ili koji kako pomo\u0107i \u017eao ne\u010de ki pa bi "
        "lahko ne morem",
        "nu \u0219i este pentru cu care din pe mai s\u0103 pot ajuta r\u0103u \u00eemi pare dar v\u0103 acest",
        "nem \u00e9s hogy az egy ez van meg csak ha mint sajn\u00e1lom tudok seg\u00edteni ebben",
        "ei on ett\u00e4 en voi mutta ole t\u00e4m\u00e4 kun tai ovat my\u00f6s valitettavasti auttaa pahoillani "
        "t\u00e4ss\u00e4",
        "ei aga ma ning et kui see saa mis v\u00f5i oma kas sellega aidata vabandust",
        "ir kad bet ar tai su negaliu jums kaip yra padeti atsipra\u0161au un ka ar bet varu jums pal\u012bdz\u0113t",
        "ve bir bu i\u00e7in de\u011fil ile ama \u00e7ok olarak daha \u00fczg\u00fcn\u00fcm yard\u0131mc\u0131 "
        "olamam konuda size",
        "yang dan tidak untuk dengan ini itu dari saya anda bisa dapat maaf membantu akan pada tetapi adalah juga",
        "kh\u00f4ng v\u00e0 l\u00e0 c\u1ee7a c\u00f3 th\u1ec3 t\u00f4i cho v\u1edbi n\u00e0y b\u1ea1n nh\u01b0ng xin "
        "l\u1ed7i gi\u00fap \u0111\u01b0\u1ee3c m\u1ed9t c\u00e1c",
        "ang ng sa mga hindi ko ay po kita kung ito para pero makakatulong paumanhin ako",
        "ya kwa ni wa siwezi hii kuwa lakini samahani kukusaidia kama katika hilo",
        "que els una per\u00f2 per amb aix\u00f2 aquest s\u00f3n m\u00e9s puc ajudar ho sento s\u00e9 perqu\u00e8",
    )
)
"""Frequent words, and those of refusals, of one language each or of near kin: from Spanish and French to Catalan."""
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
_ASIDE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|<[^<>]{0,200}>|(?<![^\s`>])\S*[\d_/\\@=(){}\[\]|<>]\S*", re.DOTALL
)
"""Code, links, marks and whatever holds a digit or a sign: looked for from a word's start, or from where code or a mark
ended within it, as a search from each of its letters would read a long word as often as it has letters."""
_DENSE = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uac00-\ud7af]")
"""Letters of scripts that are written without blanks, or nearly: two of them count as a word."""


def is_foreign(text: str) -> bool:
    """Return whether most of ``text`` is in another language than English; False where there is too little to tell."""
    text = _ASIDE.sub(" | ", unicodedata.normalize("NFKC", text).replace("\u2019", "'"))
    if text.isupper():
        text = text.lower()
    words = _WORD.findall(text)
    scripts = [(_script(word[0]), len(word)) for word in words if len(word) > 1 or _script(word[0]) != "GREEK"]
    latin, dense = sum(name == "LATIN" for name, _ in scripts), len(_DENSE.findall(text))
    other = [length for name, length in scripts if name not in ("LATIN", "DENSE")]
    if (dense >= 5 and dense / 2 > latin) or (len(other) >= 3 and sum(other) >= 6 and len(other) > latin):
        return True
    runs = [[w for w in run.split() if w.islower() and len(w) > 1] for run in re.split(r"[^\w'\s]+|\n", text)]
    running = [word for run in runs if len(run) >= 3 for word in run]
    flowing = len(running) >= LEAST_RUNNING and max(map(len, runs)) >= 6  # a list of short items does not flow
    if flowing and sum(w in _ENGLISH for w in running) < LEAST_ENGLISH * len(running):
        return True
    small = {word for word in words if word.islower()}
    accented = sum(len(word) > 1 and not word.isascii() for word in small)
    english = sum(word.lower() in _ONLY_ENGLISH for word in words)
    known = max(len(small & others) for others in _OTHERS)
    helped = known + min(accented, 2) + min(len(small & _PARTICLES), 2)
    return len(words) >= 3 and known + accented > 2 * english and (known >= 2 or (known == 1 and helped >= 3))


@cache
def _script(char: str) -> str:
    return "DENSE" if _DENSE.match(char) else unicodedata.name(char, "?").partition(" ")[0]
