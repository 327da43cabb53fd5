"""Templates of strangers: the text that transformers gives, on any day, and a refusal instead of a hang."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest

from casehard.data import sandbox
from casehard.data.chat import ChatFormat
from casehard.data.template import SOURCE, ChatTemplate
from casehard.errors import DataError
from casehard.types import Example, Message
from chat_fakes import STYLES, byte_level, marked, plain, wrap

ROW = Example.pair("what is <b>it</b>?", "It is 100% so, {{ 'yes' }}.")
MANY = (Message("system", " Be brief.\n"), Message("user", "a"), Message("assistant", "b"), Message("user", "c\n\n"))


SPECIAL = MappingProxyType({"bos_token": "<s>", "eos_token": "</s>"})


class Fake:
    """Just enough of a tokenizer for a template."""

    def __init__(self, template: str, special: Mapping[str, str] = SPECIAL) -> None:
        self.chat_template, self.special_tokens_map = template, {**special, "extra": ["<x>"]}

    def get_chat_template(self) -> str:
        return self.chat_template


def render(template: str, turns: tuple[Message, ...] = ROW.messages, *, prompt: bool = False) -> str:
    return ChatTemplate(Fake(template)).render(turns, prompt=prompt).text


GROWS = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = NEXT %}{% endfor %}{{ ns.x USE }}"


def grows(start: str, following: str, use: str = "") -> str:
    return GROWS.replace("START", start).replace("NEXT", following).replace("USE", use)


HOSTILE = {
    "loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "loops that leave out": "{% for a in range(100000) %}{% for b in range(100000) if false %}{% endfor %}{% endfor %}",
    "text in loops": "{% for a in range(90000) %}" + "words " * 900 + "{% endfor %}",
    "text in blocks": "{% for a in range(90000) %}{% set x %}" + "words " * 900 + "{% endset %}{% endfor %}",
    "times": "{{ 'a' * 20000000000 }}",
    "times a float": "{{ 'a' * 2e10 }}",
    "a list": "{{ [0] * 20000000000 }}",
    "zero": "{{ 1 / 0 }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent by name": "{{ '%(a(b)c)1000000000d' % {'a(b)c': 1} }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent filter": "{{ '%1000000000d' | format(1) }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "format in format": "{{ '{:{w}}'.format(1, w=9999999999) }}",
    "format map": "{{ '{a:>9999999999}'.format_map({'a': 1}) }}",
    "ranges": "{{ range(10**9) | list }}",
    "keys that collide": "{{ dict.fromkeys(range(0, 230584300921369395100000, 2305843009213693951)) }}",
    "macros": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive loops": "{% for x in messages recursive %}{{ loop(messages) }}{{ loop(messages) }}{% endfor %}",
    "blocks": "{% block a %}{{ self.a() }}{% endblock %}",
    "nested": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "nested ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "nested loops": "{% for a in messages %}" * 30 + "{% endfor %}" * 30,
    "nots": "{{ " + "not " * 20000 + "1 }}",
    "elifs": "{% if 0 %}" + "{% elif 0 %}" * 8000 + "{% endif %}",
    "source": "a" * (SOURCE + 1),
    "joined": grows("'a'", "ns.x ~ ns.x"),
    "added": grows("'a'", "ns.x + ns.x"),
    "replaced": grows("'aa'", "ns.x.replace('a', 'aa')"),
    "filtered": grows("'aa'", "ns.x | replace('a', 'aa')"),
    "joined by itself": grows("'aa'", "ns.x.join(ns.x)"),
    "shared parts printed": grows("[1]", "[ns.x, ns.x]"),
    "shared parts compared": grows("[1]", "[ns.x, ns.x]", "== ns.x[0]"),
    "shared parts as a key": grows("(1,)", "(ns.x, ns.x)", "in {1: 2}"),
    "shared parts as JSON": grows("[1]", "[ns.x, ns.x]", "| tojson"),
    "a thing in itself": "{% set ns = namespace() %}{% set ns.me = ns %}{{ ns }}",
    "lazy filters": "{% set ns = namespace(x=[1]) %}{% for i in range(99999) %}{% set ns.x = ns.x | map('string') %}"
    "{% for j in range(9) %}{% endfor %}{% endfor %}",
    "widths": "{{ 'x'.ljust(10000000000) }}",
    "zeros": "{{ 'x'.zfill(10000000000) }}",
    "tabs": "{{ '\t'.expandtabs(10000000000) }}",
    "indents": "{{ 'a\nb' | indent(1000000000) }}",
    "indented JSON": "{{ messages | tojson(indent=100000000) }}",
    "bytes": "{{ (5).to_bytes(1000000000, 'big') }}",
    "powers": "{{ 10 ** 10 ** 10 }}",
    "digits": "{{ 1.5 | round(1000000000, 'ceil') }}",
    "sums": "{{ [[1]] | sum(start=[]) }}",
    "slow search": "{{ ('a' * 1000000).rfind('b' + 'a' * 500000) }}",
    "slow strip": "{{ ('a' * 1000000).strip('b' * 1000000 + 'a') }}",
    "dates": "{{ now().strftime('%1000000000Y') }}",
    "escape": "{{ ''.__class__.__mro__ }}",
    "attributes": "{{ messages | attr('__class__') }}",
    "another file": "{% include 'secret' %}",
    "an address": "{{ range }}",
    "nothing": "{{ nothing.at_all }}",
    "unfinished": "{{ 'a",
    "refusal": "{{ raise_exception('no') }}",
    "a message without end": "{{ raise_exception('no' * 100000) }}",
    "a message for the terminal": "{{ raise_exception('\x1b[2J\\ud800') }}",
    "break": "{% break %}",
    "half a character": "{{ '\\ud800' }}{% for m in messages %}{{ m.content }}{% endfor %}",
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_is_refused_and_not_run(template: str) -> None:
    started = time.thread_time()
    chat = ChatFormat(wrap(byte_level(), template))
    for call in (chat.encode, chat.prompt_ids):
        with pytest.raises(DataError) as told:
            call(ROW)
        assert len(told.value.message) < 600 and told.value.message.isprintable()
    assert time.thread_time() - started < 20


def test_a_template_that_never_fits_is_not_tried_for_every_row() -> None:
    chat = ChatFormat(wrap(byte_level(), HOSTILE["loops"] + "{# once #}"))
    started = time.thread_time()
    for i in range(2000):
        with pytest.raises(DataError, match="too many steps"):
            chat.prompt_ids(Example.pair(f"row {i}"))
    assert time.thread_time() - started < 20


def test_a_row_that_a_template_loops_over_is_refused_alone() -> None:
    turn = "{% for m in messages %}"
    loop = "{% for a in range(m['content'] | int) %}"
    loops = turn + 2 * loop + 2 * "{% endfor %}"
    chat = ChatFormat(wrap(byte_level(), plain("chatml").replace(turn, loops)))
    rows = [Example.pair("10", "a"), Example.pair("90000", "b")]
    assert chat.encode(rows[0])
    with pytest.raises(DataError, match="too many steps"):
        chat.encode(rows[1])
    assert chat.encode(rows[0])


def test_long_rows_and_long_chats_have_room() -> None:
    for style in STYLES:
        chat = ChatTemplate(Fake(plain(style)))
        text = "a\u4e2d " * 300_000
        assert text.strip() in chat.render((Message("user", text), Message("assistant", text)), prompt=False).text
        turns = tuple(Message("user" if i % 2 == 0 else "assistant", f"turn {i}") for i in range(2000))
        assert "turn 1999" in chat.render(turns, prompt=False).text
    again = (
        "{% for m in messages %}{% for n in messages[loop.index0:] %}{% if n.role == m.role %}{% endif %}{% endfor %}"
    )
    turns = tuple(Message("user" if i % 2 == 0 else "assistant", "word " * 100) for i in range(200))
    assert render(again + "{% endfor %}{{ messages | length }}", turns) == "200"


USES = (
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') | trim }}",
    "{{ messages | rejectattr('role', 'in', ['user']) | list | length }}{{ messages | last | tojson }}",
    "{{ messages | tojson(indent=2) }}{{ messages[0] | dictsort | first | first | upper }}",
    "{% for k, v in messages[0] | items %}{{ k }}={{ v | string | title }};{% endfor %}",
    "{{ messages[0].content.split('\n')[0].strip(' .').replace('b', 'B').startswith('x') }}{{ 7 // 2 }}{{ 2 ** 3 }}",
    "{{ '%s-%03d' % ('a', 3) }}{{ '{0!r:>5} {1[role]}'.format('a', messages[0]) }}{{ 'a' ~ 1 ~ none }}{{ 7 % 4 }}",
    "{% for m in messages[::-1] if m.role != 'system' %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{% endfor %}",
    "{% macro say(m, end='!') %}{{ m.role ~ end }}{{ caller() if caller }}{% endmacro %}{{ say(messages[0]) }}"
    "{% call say(messages[1], end='?') %}in{% endcall %}",
    "{% set ns = namespace(n=0, seen=[]) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.seen = ns.seen + [m.role] %}{% if ns.n == 2 %}{% continue %}{% endif %}{{ ns.seen }}{% endfor %}",
    "{% for m in messages recursive %}{{ m.role if m.role is defined else m }}{% endfor %}{{ range(3) | list }}",
    "{% filter upper %}{{ messages[0].role }}{% endfilter %}{% set x %}{{ bos_token }}y{% endset %}{{ x }}{{ extra }}",
    "{{ cycler('a', 'b').next() }}{{ dict(a=1).items() | list }}{{ {'a': [1, 2.5, true]}['a'] }}{{ tools is none }}",
    "{{ (messages | map(attribute='role') | unique | sort | reverse | list)[0] }}{{ [3, 1] | sum }}{{ 'x' in 'xy' }}",
    "{% block head %}{{ messages | length }}{% endblock %}{{ messages[0].content | default('none') | indent(2) }}",
    "{{- messages[0]['content'] | e -}} {# gone #} {{ messages[1:] | groupby('role') | map('first') | list }}",
)
REAL = tuple(t for style in STYLES for t in (plain(style), marked(style)))


@pytest.mark.parametrize("template", [*USES, *REAL])
def test_the_text_is_that_of_transformers(template: str) -> None:
    tokenizer = wrap(byte_level(), template)
    chat = ChatTemplate(Fake(template, tokenizer.special_tokens_map))
    for turns in (ROW.messages, ROW.messages[:1], MANY):
        given = [{"role": m.role, "content": m.content} for m in turns]
        for prompt in (False, True):
            try:
                theirs = tokenizer.apply_chat_template(
                    given, tokenize=False, add_generation_prompt=prompt, extra=["<x>"]
                )
            except Exception as error:
                with pytest.raises(DataError, match=str(error)[:20]):
                    chat.render(turns, prompt=prompt)
                continue
            assert chat.render(turns, prompt=prompt).text == theirs


CLOCKS = {
    "strftime_now": "{{ strftime_now('%d %b %Y %H:%M:%S') }}",
    "date_string": "{{ date_string }}",
    "llama": "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ date_string }}",
    "now": "{{ now().strftime('%Y-%m-%d %H:%M:%S.%f') }}{{ now() }}",
    "datetime": "{{ datetime.now().isoformat() }}{{ datetime.today().year }}{{ '{:%j}'.format(datetime.utcnow()) }}",
    "guarded": "{% if strftime_now is defined %}{{ strftime_now('%A') }}{% else %}some day{% endif %}",
}


@pytest.mark.parametrize("clock", CLOCKS.values(), ids=CLOCKS)
@pytest.mark.parametrize("style", ["chatml", "llama3"])
def test_a_row_has_the_same_tokens_on_any_day(clock: str, style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens() -> list[Any]:
        chat = ChatFormat(wrap(byte_level(), clock + plain(style)))
        return [chat.encode_all([ROW]).digest, chat.prompt_ids(ROW), chat.tokenizer.decode(chat.prompt_ids(ROW))]

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return datetime.datetime(2031, 2, 3, 4, 5, 6)

    today = tokens()
    from transformers.utils import chat_template_utils

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    monkeypatch.setattr(datetime, "datetime", Tomorrow)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    chat_template_utils._compile_jinja_template.cache_clear()
    assert tokens() == today
    assert any(said in today[2] for said in ("2024", "Friday", "208"))


def test_the_date_is_one_for_all() -> None:
    assert render("{{ strftime_now('%d %b %Y') }}|{{ date_string }}|{{ now().strftime('%d %b %Y') }}") == (
        "26 Jul 2024|26 Jul 2024|26 Jul 2024"
    )
    assert datetime.datetime(2024, 7, 26) == sandbox.CLOCK


def test_rows_are_rendered_in_any_thread() -> None:
    chat = ChatFormat(wrap(byte_level(), marked("llama3")))
    loops = ChatFormat(wrap(byte_level(), HOSTILE["macros"]))
    rows = [Example.pair(f"what is {i}? <|eot_id|>", f"it is {i}") for i in range(30)]
    expected = [chat.encode(row) for row in rows]
    seen: list[Any] = []

    def work() -> None:
        try:
            seen.append([chat.encode(row) for row in rows] == expected)
            with pytest.raises(DataError, match="calls itself"):
                loops.encode(rows[0])
        except BaseException as error:
            seen.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == [True] * 4
