"""What a response says to its reader: reasoning blocks and wrappings taken off, unseen characters gone.

A reasoning model thinks in a block before it speaks. What stands in the block is no answer and no refusal, but it can
leak. Blocks are known by their marks: ``<think>`` and its kin, ``[THINK]``, ``<|channel|>analysis``, or a heading
"Reasoning:" that an "Answer:" follows. The opening mark may be missing, as some templates put it into the prompt.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from typing import NamedTuple

_NAMES = (
    "think|thinking|thought|thoughts|reason|reasoning|reflection|analysis|scratchpad|internal|deliberation|cot|"
    "chain_of_thought|inner_?monologue|inner_?thoughts?|seed:think"
)
_OPEN = (
    rf"<(?:{_NAMES})(?:\s[^<>\n]{{0,80}})?>|\[(?:THINK|THINKING|REASONING)\]|\u25c1think\u25b7"
    r"|<\|(?:begin_of_)?(?:think|thinking|thought|reasoning)\|>|<\|START_THINKING\|>"
    r"|<\|?channel\|?>\s*(?:analysis|commentary|thought)\b(?:\s*<\|message\|>)?"
    r"|\A\s*analysis(?-i:(?=[A-Z\"']))"  # what is left of the channels when special tokens are skipped
)
_CLOSE = (
    rf"</(?:{_NAMES})\s*>|\[/(?:THINK|THINKING|REASONING)\]|\u25c1/think\u25b7"
    r"|<\|(?:end_of_|/)(?:think|thinking|thought|reasoning)\|>|<\|END_THINKING\|>"
    r"|<\|?channel\|?>\s*final\b(?:\s*<\|message\|>)?|<channel\|>|assistantfinal"
)
_MARK = re.compile(rf"(?<![`\"'\\])(?:(?P<open>{_OPEN})|(?P<close>{_CLOSE}))(?!`)", re.IGNORECASE)
_OPENED = re.compile(rf"(?:{_OPEN})\s*\Z", re.IGNORECASE)
_HEADED = re.compile(
    r"\A[\s#*>]*(?:thinking|thoughts?|reasoning|thought process|chain of thought)\W{0,4}?[:\n](?P<thought>.*?)"
    r"^(?:[^\S\n]|[#*>])*(?:final |my )?(?:answer|response|reply|output)\W{0,4}?[:\n]",
    re.IGNORECASE | re.DOTALL | re.MULTILINE,
)
MENTION_WORDS = 3
"""Words between two marks within a line below which the text speaks of marks instead of thinking."""


class Parts(NamedTuple):
    """A response taken apart."""

    thought: str
    said: str
    unfinished: bool
    """The text ends inside a block."""


def take_apart(response: str) -> Parts:
    """Part what a response says from what stands in its reasoning blocks.

    Text before a closing mark without an opening one was thought; so was text between two closing marks.
    """
    said: list[str] = []
    thought: list[str] = []
    inside, place = False, 0
    for mark in _block_marks(response):
        (thought if inside else said).append(response[place : mark.start()])
        if mark["close"] and not inside:
            thought.append(said.pop())
        inside, place = mark["open"] is not None, mark.end()
    (thought if inside else said).append(response[place:])
    if not thought and (headed := _HEADED.match(response)):
        return Parts(headed["thought"].strip(), response[headed.end() :].strip(), unfinished=False)
    return Parts("\n".join(thought).strip(), "\n".join(said).strip(), unfinished=inside)


def _block_marks(text: str) -> list[re.Match[str]]:
    """Return the marks of blocks: not those that a sentence only mentions, "wrap it in <think> and </think>"."""
    marks = list(_MARK.finditer(text))
    out: list[re.Match[str]] = []
    mentioned = False  # the mark before was mentioned, and this one closes it
    for number, mark in enumerate(marks):
        after = marks[number + 1] if number + 1 < len(marks) else None
        closes = after is not None and after["close"] is not None
        follows = out and out[-1].end() == mark.start()
        before = text[marks[number - 1].start() if number else 0 : mark.start()]
        if mentioned:
            mentioned = False
        elif mark["open"] and not follows and before.rpartition("\n")[2].strip(" \t>|"):
            few = after is None or len(text[mark.end() : after.start()].split()) < MENTION_WORDS
            mentioned = closes and few
            if closes and not few:
                out.append(mark)
        else:
            out.append(mark)
    return out


def is_mark(text: str) -> bool:
    """Return whether ``text`` is the mark of a reasoning block and nothing else."""
    return _MARK.fullmatch(text.strip()) is not None


def opened_by(prompt: str) -> str:
    """Return the opening mark with which a rendered prompt ends, so that the response begins inside a block; or ""."""
    found = _OPENED.search(prompt[-200:])
    return found.group().strip() if found else ""


_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180e\u2800\u3164\ufe00-\ufe0f\uffa0]")
_APOSTROPHES = re.compile(
    "(?<=[^\\W\\d_])[`\u00b4\u2018\u2019\u201b\u02b9\u02bb\u02bc\u02bd\u2032\u2035\ua78c](?=[^\\W\\d_])"
)
_ALIKE = str.maketrans(
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0425\u0406"
    "\u03bf\u03b1\u03bd\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7",
    "aeopcyxijsABEKMHOPCTXIoavABEZHIKMNOPTYX",
)


def visible(text: str) -> str:
    """Return ``text`` in one Unicode form, apostrophes straight, without characters that cannot be seen."""
    text = _APOSTROPHES.sub("'", text)
    if text.isascii():
        return text  # nothing below changes it
    text = unicodedata.normalize("NFKC", _UNSEEN.sub("", text))
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    if text.isascii() or 2 * len(re.findall("[A-Za-z]", text)) < sum(map(str.isalpha, text)):
        return text
    return text.translate(_ALIKE)  # look-alikes from other alphabets in text of this one


_FENCE = re.compile(r"\A(`{3,}|~{3,})[\w+-]*[ \t]*\n")
_TAG = re.compile(r"<!--.*?(?:-->|\Z)|</?[A-Za-z][\w:-]*(?:\s[^<>]{0,300})?/?>", re.DOTALL)
_KEY = re.compile(r"\A[\s{\[(]*[\"']?[A-Za-z_][\w -]{0,24}[\"']\s*[:=]\s*+(?:\[\s*+)?[\"']")
_CALL = re.compile(r"\A(?:(?:print|echo|say|return|alert|console\.log)\b[\s(]*[\"']|\\(?:text|emph)\w*\{)")
_LABEL = re.compile(
    r"\A(?:here(?:'s| is) |this is )?(?:\w+(?:'s)? ){0,2}?(?:answer|response|reply|output|result|message|text|"
    r"verdict|refusal|"
    r"assistant|a\.?i|bot|chatbot|model|system|a|r|note|warning|disclaimer|safety notice|"
    r"chatgpt|gpt[-\w.]*|claude|gemini|llama[-\w.]*)"
    r"[ \t]*+(?:\([^)\n]{0,30}\)[ \t]*+)?(?::(?!\S*//)\s*|\n\s*)",
    re.IGNORECASE,
)
_LEAD_IN = re.compile(r"\A[^\n{}\[\]`~\"]{1,80}:[ \t]*\n+(?=[{\[\"`~])")
"""A line that announces a wrapped text: "Here is the JSON you asked for:"."""
_ACTION = re.compile(r"\A(?:\*{1,3}([^*\n]{1,60})\*{1,3}|[\[(]([^\])\n]{1,40})[\])])[:.]?(?=\s+[A-Z\"'])\s*")


def unwrap(text: str) -> str:
    """Return the sentences inside code fences, JSON, markup, list and quotation marks and labels ("Response: ...").

    Lines stay; the text of an answer loses its decoration alone, which no rule needs.
    """
    text = visible(text).strip()
    for _ in range(6):
        before = text
        if (lead := _LEAD_IN.match(text)) and _wraps(text[lead.end() :].strip()):
            text = text[lead.end() :].strip()
        if (fenced := _fenced(text)) is not None:
            text = fenced
        text = _strings(text)
        text = _CALL.sub("", text)
        text = _unescaped(re.sub(r"<br\s*/?>|</p>", "\n", text))
        text = _TAG.sub("", text).strip()
        if action := _ACTION.match(text):
            text = f"{(action[1] or '').rstrip('.:')}\n{text[action.end() :]}"
        text = _bare(text)
        text = _LABEL.sub("", text)
        if text == before:
            break
    return text


def _fenced(text: str) -> str | None:
    """Return what stands in the code fence that a text begins with, closed at its end or not at all."""
    opened = _FENCE.match(text)
    return opened and text[opened.end() :].rstrip().removesuffix(opened[1]).rstrip()


def _wraps(text: str) -> bool:
    """Return whether the whole of a text is one fence or one JSON value."""
    if _fenced(text) is not None:
        return True
    try:
        return isinstance(json.loads(text), dict | list | str)
    except (ValueError, RecursionError):
        return False


def _unescaped(text: str) -> str:
    """Return ``text`` with the characters that HTML names; a number beyond any character is none, as for browsers."""
    return html.unescape(re.sub("&#[0-9]{1000,};?", "\ufffd", text))


def bare(text: str) -> str:
    """Return ``text`` without markup, emphasis and unseen characters, so that what it spells can be found in it."""
    return re.sub(r"[*_`~]+", "", _unescaped(_TAG.sub("", visible(text))))


def _bare(text: str) -> str:
    """Take the marks of lists, quotations, headings and emphasis off, and whatever else precedes the first word."""
    text = re.sub(r"~~[^~\n]{1,200}~~", " ", text).strip()
    text = re.sub(r"(?<![\w*])[*_]{1,3}(?=[^\s*])|(?<=[^\s*])[*_]{1,3}(?![\w*])", "", text)
    text = re.sub(
        r"^[ \t]*>[ \t]?|^[ \t]*\|[ \t:|-]*(?:\n|\Z)|^[ \t]*\|[ \t]*|(?:(?<![ \t])[ \t]+)?\|[ \t]*$",
        "",
        text,
        flags=re.MULTILINE,
    )
    if not re.search(r"^[^\S\n]*\(?(?:2|b|ii)[.)]\s", text, re.MULTILINE):
        text = re.sub(r"\A\s*\(?(?:1|a|i)[.)]\s+", "", text)
    return re.sub(r"\A[^\w\"'(\[{<`~]+(?=\S)", "", text).strip()


_THOUGHT = re.compile(_NAMES, re.IGNORECASE)


def _strings(text: str) -> str:
    """Return the texts that a JSON value holds, of several words where there are such; JSON cut short counts too."""
    if text[:1] not in ("{", "[", '"'):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        bare = _KEY.sub("", text)
        return text if bare == text else bare.replace("\\n", "\n").replace('\\"', '"')
    found: list[str] = []
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, list):
            waiting += reversed(item)
        elif isinstance(item, dict):
            waiting += reversed([of for key, of in item.items() if not _THOUGHT.fullmatch(key)])
    sentences = [item for item in found if " " in item.strip()] or found
    return "\n".join(sentences) or text
