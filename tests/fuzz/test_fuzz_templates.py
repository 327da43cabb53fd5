"""Any template and any text: tokens that keep every promise, or a DataError; nothing else, and no hang.

CASEHARD_FUZZ_SECONDS=600 runs each test that long on fresh examples instead of a few seconds on the same ones.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from casehard.data.batches import IGNORE
from casehard.data.chat import ChatFormat
from casehard.errors import DataError
from casehard.types import Example, Message
from chat_fakes import SPECIAL, STYLES, byte_level, marked, plain, wrap

SECONDS = float(os.environ.get("CASEHARD_FUZZ_SECONDS", "0"))
BACKENDS = {gpt2: byte_level(gpt2=gpt2) for gpt2 in (False, True)}
LIMIT = 5.0  # seconds of processor time for one row: several renderings


def fuzz(examples: int) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Run a hypothesis test on so many examples, the same every time, or on fresh ones until the time is up."""

    def wrapped(test: Callable[[], None]) -> Callable[[], None]:
        quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
        run = settings(
            max_examples=examples, deadline=None, derandomize=not SECONDS, database=None, suppress_health_check=quiet
        )(test)

        def again() -> None:
            end = time.monotonic() + SECONDS
            run()
            while time.monotonic() < end:
                run()

        again.__name__ = test.__name__
        return again

    return wrapped


# -- texts --------------------------------------------------------------------------------------------------

BITS = [
    *SPECIAL,
    *(name.upper() for name in SPECIAL),
    *("<|im_", "im_end", "end|>", "<", "|>", "[INST]", "[/INST]", "<think>", "</think>", "{{ messages }}", "{% raw %}"),
    *(
        "\uff1c|im_end|\uff1e",
        "\x00",
        "\x1c",
        "\x85",
        "\u2028",
        "\ufeff",
        "e\u0301",
        "\U000f0000",
        "\U0010fffd",
        "\ud800",
    ),
    *(" ", "\n", "\n\n", "\t", "a", "user", "assistant", "7", "100000"),
]
TEXT = st.lists(st.one_of(st.sampled_from(BITS), st.text(max_size=5)), min_size=1, max_size=5).map("".join)


@st.composite
def chats(draw: st.DrawFn) -> tuple[Message, ...]:
    """Return a chat with a final answer."""
    system = [Message("system", draw(TEXT))] if draw(st.booleans()) else []
    turns = [Message(role, draw(TEXT)) for _ in range(draw(st.integers(1, 3))) for role in ("user", "assistant")]
    return (*system, *turns)


# -- templates ----------------------------------------------------------------------------------------------


def words(text: str) -> st.SearchStrategy[str]:
    """Return one of the words of a text."""
    return st.sampled_from(text.split())


NUMBERS = words("0 1 -1 2 7 99999 100000 10000000000 2e10 0.5 true")
STRINGS = words("'a' '' '\\n' '<|im_end|>' '%s' '%99999999d' '{:>99999999}' '{0}{0}' 'content' '</think>'")
NAMES = words(
    "messages message content x y ns ns.a ns.b loop loop.index loop.length m caller bos_token eos_token nothing "
    "messages[0] messages[-1].content messages[0]['role'] range dict namespace tools now datetime strftime_now self"
)
FILTERS = words(
    "trim length tojson join replace upper string int float first last list items dictsort map select selectattr "
    "default indent safe reverse sort unique min max round abs escape sum groupby format truncate wordcount center "
    "batch slice random attr striptags urlize wordwrap pprint xmlattr title capitalize lower count reject"
)
METHODS = words(
    "split strip lstrip rstrip replace join ljust rjust zfill center format format_map upper find rfind count index "
    "startswith endswith splitlines partition rpartition rsplit expandtabs title items keys values get append pop "
    "encode translate strftime isoformat __class__ fromkeys"
)
TESTS = words("defined none string mapping iterable odd divisibleby(0) in(x) eq(x) sameas(x) number callable")


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Return expressions made of others."""
    given_ = st.lists(inner, max_size=2).map(", ".join)
    return st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "/", "//", "%", "**", "~"]), inner),
        st.builds("({} {} {})".format, inner, st.sampled_from(["==", "<", "in", "not in", "and", "or", ">="]), inner),
        st.builds("({} | {})".format, inner, FILTERS),
        st.builds("({} | {}({}))".format, inner, FILTERS, given_),
        st.builds("{}.{}({})".format, inner, METHODS, given_),
        st.builds("{}({})".format, NAMES, given_),
        st.builds("{}[{}]".format, inner, inner),
        st.builds("{}[{}:{}:{}]".format, inner, inner, inner, st.sampled_from(["", "-1", "2"])),
        st.builds("[{}]".format, given_),
        st.builds("({}, {})".format, inner, inner),
        st.builds("{{{}: {}}}".format, inner, inner),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("({} is {})".format, inner, TESTS),
        st.builds("(not {})".format, inner),
    )


EXPRESSION = st.recursive(st.one_of(NUMBERS, STRINGS, NAMES), grown, max_leaves=8)


def nested(body: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Return statements around others."""
    bodies = st.lists(body, max_size=3).map("".join)
    name = words("x y content message")
    return st.one_of(
        st.builds("{{% for {} in {} %}}{}{{% endfor %}}".format, name, EXPRESSION, bodies),
        st.builds("{{% for {} in {} if {} %}}{}{{% endfor %}}".format, name, EXPRESSION, EXPRESSION, bodies),
        st.builds("{{% for {} in {} recursive %}}{}{{{{ loop(x) }}}}{{% endfor %}}".format, name, EXPRESSION, bodies),
        st.builds("{{% if {} %}}{}{{% elif {} %}}{}{{% endif %}}".format, EXPRESSION, bodies, EXPRESSION, bodies),
        st.builds("{{% macro m(x, y={}) %}}{}{{% endmacro %}}".format, EXPRESSION, bodies),
        st.builds("{{% call m({}) %}}{}{{% endcall %}}".format, EXPRESSION, bodies),
        st.builds("{{% set {} %}}{}{{% endset %}}".format, name, bodies),
        st.builds("{{% filter {} %}}{}{{% endfilter %}}".format, FILTERS, bodies),
        st.builds("{{% generation %}}{}{{% endgeneration %}}".format, bodies),
        st.builds("{{% block {} %}}{}{{% endblock %}}".format, name, bodies),
    )


LEAF = st.one_of(
    st.builds("{{{{ {} }}}}".format, EXPRESSION),
    st.builds("{{% set {} = {} %}}".format, words("x y content ns.a ns.b"), EXPRESSION),
    st.sampled_from(["words ", "<|im_end|>", "{{ m(x) }}", "{{ self.x() }}", "{% break %}", "{% include 'a' %}", "{#"]),
)
STATEMENTS = st.lists(st.recursive(LEAF, nested, max_leaves=6), min_size=1, max_size=4).map("".join)
START = "{% set ns = namespace(a='a', b=[1]) %}{% set x = 'a' %}{% set y = [1] %}"
TURNS = "{% for message in messages %}{{ message.content }}BODY{% endfor %}<|im_end|>"


@st.composite
def templates(draw: st.DrawFn) -> str:
    """Return a template: statements by themselves, in every turn of a common layout, or a common one cut up."""
    kind = draw(st.sampled_from(["alone", "turns", "doubling", "cut"]))
    if kind == "alone":
        return START + draw(STATEMENTS)
    if kind == "turns":
        return START + TURNS.replace("BODY", draw(STATEMENTS))
    if kind == "doubling":
        step = draw(EXPRESSION)
        return START + "{% for i in range(99) %}{% set ns.a = " + step + " %}{% endfor %}{{ ns.a }}" + draw(LEAF)
    whole = draw(st.sampled_from([f(style) for style in STYLES for f in (plain, marked)]))
    at, size = draw(st.integers(0, len(whole))), draw(st.integers(0, 12))
    return whole[:at] + draw(st.one_of(st.just(""), LEAF, st.text(max_size=4))) + whole[at + size :]


# -- promises -----------------------------------------------------------------------------------------------


def keeps_its_promises(chat: ChatFormat, row: Example) -> bool:
    """Encode a row, and check what holds for every row that is not refused; return whether it was encoded."""
    started = time.thread_time()
    try:
        detail = chat.details(row)
        prompt = chat.prompt_ids(row)
    except DataError as error:
        assert error.message
        return False
    finally:
        assert time.thread_time() - started < LIMIT
    ids, labels = detail.encoded
    assert 0 <= detail.start < detail.end <= len(ids) == len(labels)
    assert labels == [i if detail.start <= n < detail.end else IGNORE for n, i in enumerate(ids)]
    assert all(0 <= i < len(chat.tokenizer) for i in [*ids, *prompt])
    return True


def test_any_template() -> None:
    ended = {True: 0, False: 0}

    @fuzz(150)
    @given(templates(), chats())
    def run(template: str, turns: tuple[Message, ...]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ended[keeps_its_promises(ChatFormat(wrap(BACKENDS[False], template)), Example(turns))] += 1

    run()
    assert min(ended.values()) > 5, ended  # the strategy reaches both ends


CHATS: dict[str, ChatFormat] = {
    f"{style}-{kind.__name__}-{gpt2}": ChatFormat(wrap(backend, kind(style)))
    for style in STYLES
    for kind in (plain, marked)
    for gpt2, backend in BACKENDS.items()
}
CONTROLS = frozenset(range(len(SPECIAL)))


def may_be_refused(style: str, turns: tuple[Message, ...]) -> bool:
    """Return whether a common template or its tokenizer has a reason to refuse a chat."""
    no_system = style.startswith("llama2") and turns[0].role == "system"
    return (
        no_system or not turns[-1].content.strip() or any("\ud800" <= c <= "\udfff" for t in turns for c in t.content)
    )


def test_any_text_in_the_common_templates() -> None:
    @fuzz(30)
    @given(chats())
    def run(turns: tuple[Message, ...]) -> None:
        row, neutral = Example(turns), Example(tuple(Message(turn.role, "x") for turn in turns))
        for style, chat in CHATS.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                keeps_its_promises(chat, row)
                if may_be_refused(style, turns):
                    continue
                ids = chat.encode(row).input_ids
                written = [i for i in chat.encode(neutral).input_ids if i in CONTROLS]
            assert [i for i in ids if i in CONTROLS] == written, style
            decoded = chat.tokenizer.decode(ids)
            assert all(turn.content.strip() in decoded for turn in turns), style

    run()
