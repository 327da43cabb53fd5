"""Jinja for templates of strangers: every operation pays, before it runs, for what it reads and makes.

Jinja's own sandbox keeps a template from files and code, not from a loop that never ends or a string of gigabytes. Here
a rendering has an account (:mod:`casehard.data.account`) and is refused when that is empty. One C call that nothing
could interrupt is thus never begun, and no thread, timer or child process is needed. What stays outside: filters and
methods that no chat needs and whose cost is hard to foresee.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple

from jinja2 import TemplateError, Undefined, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from casehard.data.account import (
    DEPTH,
    SIZED,
    STEP,
    Account,
    Refused,
    pay_for_filter,
    pay_for_method,
    pay_for_percent,
)

_TICK, _PAID, _COUNTED = "tick ", "paid ", "counted "  # filters that no template can name

CLOCK = datetime.datetime(2024, 7, 26)
"""What a template is told when it asks for the time: strftime_now, and now() and datetime where it expects those."""


class _Clock(datetime.datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> _Clock:
        return cls(CLOCK.year, CLOCK.month, CLOCK.day)

    today = utcnow = now

    def strftime(self, format: str) -> str:
        if len(format) > 1000 or re.search(r"%[^a-zA-Z]*\d", format):
            raise Refused(f"a date in the format {format[:40]!r}")
        return super().strftime(format)

    def __format__(self, spec: str) -> str:
        return self.strftime(spec) if spec else str(self)


class PaidContext(Context):
    """A context that carries the account of its rendering."""

    account: Account

    def derived(self, locals: dict[str, Any] | None = None) -> Context:
        context = super().derived(locals)
        assert isinstance(context, PaidContext)
        context.account = self.account
        return context


class _Fields(SandboxedFormatter):
    """``str.format`` that pays for each field before it is written."""

    def __init__(self, environment: Sandbox, account: Account) -> None:
        super().__init__(environment)
        self.account = account

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        value, key = super().get_field(field_name, args, kwargs)
        self.account.walk(value)
        return value, key

    def format_field(self, value: Any, format_spec: str) -> Any:
        if re.search(r"\d{4}", format_spec):
            raise Refused(f"a field in the format {format_spec[:40]!r}")
        self.account.pay(1000)
        return super().format_field(value, format_spec)


class _Format(NamedTuple):
    """The method ``format`` or ``format_map`` of a text, to be called with an account."""

    text: str
    mapping: bool


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What may be asked of a value by name; everything else of these types costs too much or tells too much.
_METHODS: dict[type, frozenset[str]] = {
    str: _words(
        "capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha isascii "
        "isdecimal isdigit isidentifier islower isnumeric isspace istitle isupper join ljust lower lstrip partition "
        "removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines startswith "
        "strip swapcase title upper zfill"
    ),
    int: frozenset(),
    float: frozenset({"is_integer"}),
    list: frozenset({"count", "index", "copy"}),
    tuple: frozenset({"count", "index", "grouper", "list"}),
    dict: frozenset({"get", "items", "keys", "values", "copy", "fromkeys"}),
    type: frozenset({"fromkeys", "now", "today", "utcnow"}),
    datetime.datetime: _words("date day hour isoformat isoweekday minute month second strftime time weekday year"),
}


class Sandbox(ImmutableSandboxedEnvironment):
    context_class = PaidContext
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        return next((attr in allowed for kind, allowed in _METHODS.items() if isinstance(obj, kind)), True)

    def wrap_str_format(self, value: Any) -> Any:
        owner = getattr(value, "__self__", None)
        name = getattr(value, "__name__", "")
        return _Format(owner, name == "format_map") if isinstance(owner, str) and name[:6] == "format" else None

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        account: Account = context.account  # type: ignore[attr-defined]
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, SIZED) and isinstance(times, int):
                    account.pay((1 if isinstance(many, str) else 8) * len(many) * max(times, 0))
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > 64:
                raise Refused("it computes with numbers of more than 60 bits")
        elif operator == "%" and isinstance(left, str):
            pay_for_percent(account, left, right)
        result = self.binop_table[operator](left, right)
        account.pay(STEP)
        account.made(result)
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        account: Account = __context.account  # type: ignore[attr-defined]
        account.pay(STEP)
        if account.depth == DEPTH:
            raise Refused(f"it calls itself more than {DEPTH} deep")
        account.depth += 1
        try:
            if isinstance(__obj, (Macro, LoopContext, BlockReference)):
                return super().call(__context, __obj, *args, **kwargs)
            given = (*args, *kwargs.values())
            for value in given:
                account.walk(value)
            if isinstance(__obj, _Format):
                account.pay(len(__obj.text))
                named = args[0] if __obj.mapping else kwargs
                return _Fields(__self, account).vformat(__obj.text, () if __obj.mapping else args, named)
            owner = getattr(__obj, "__self__", None)
            if isinstance(owner, str):
                pay_for_method(account, owner, __obj.__name__, given)
            elif isinstance(owner, (list, tuple)):
                account.walk(owner)
            result = super().call(__context, __obj, *args, **kwargs)
            account.made(result)
            return result
        finally:
            account.depth -= 1


class Payer(NodeTransformer):
    """Let the operations that no method of the environment sees pay too: loops, comparisons, slices, ``~``, keys."""

    def paid(self, node: Any, how: str = _PAID) -> Any:
        """Wrap an expression: its value is walked through, or its parts counted, before it is used."""
        if isinstance(node, (nodes.Const, nodes.TemplateData)):
            return node
        return nodes.Filter(node, how, [], [], None, None, lineno=node.lineno)

    def _body(self, node: Any) -> Any:
        """Let every run of a body pay for itself and for the text that stands in it."""
        weight = STEP + sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        tick = nodes.Filter(nodes.Const(weight), _TICK, [], [], None, None, lineno=node.lineno)
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = visit_Block = _body  # noqa: N815

    def visit_For(self, node: nodes.For) -> Any:  # noqa: N802
        self._body(node)
        # Rows that a condition leaves out never reach the body.
        node.iter = self.paid(node.iter, _COUNTED)
        return node

    def visit_Compare(self, node: nodes.Compare) -> Any:  # noqa: N802
        self.generic_visit(node)
        node.expr = self.paid(node.expr)
        for operand in node.ops:
            operand.expr = self.paid(operand.expr)
        return node

    def visit_Concat(self, node: nodes.Concat) -> Any:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [self.paid(part) for part in node.nodes]
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> Any:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = self.paid(node.node, _COUNTED)
        else:
            node.arg = self.paid(node.arg)
        return node

    def visit_Pair(self, node: nodes.Pair) -> Any:  # noqa: N802
        self.generic_visit(node)
        node.key = self.paid(node.key)
        return node

    def _absent(self, node: Any) -> Any:
        raise Refused("it asks for another file")

    visit_Include = visit_Import = visit_FromImport = visit_Extends = _absent  # noqa: N815


@pass_context
def _tick(context: PaidContext, weight: int) -> bool:
    context.account.pay(weight)
    return True


@pass_context
def _paid(context: PaidContext, value: Any) -> Any:
    context.account.walk(value)
    return value


@pass_context
def _counted(context: PaidContext, value: Any) -> Any:
    context.account.made(value)
    return value


_WRITABLE: tuple[type, ...] = (*SIZED, int, float, NoneType, Undefined, Namespace, datetime.date, datetime.time)


@pass_context
def _write(context: PaidContext, value: Any) -> Any:
    """Pay for a value that is written; one that prints its address in memory has no text of its own."""
    if type(value) is str:
        context.account.pay(len(value) + 1)
    elif isinstance(value, _WRITABLE):
        context.account.walk(value)
    else:
        raise Refused(f"it writes a {type(value).__name__}")
    return value


class _Generation(Extension):
    """``{% generation %}``: notes which characters are the assistant's, as transformers does."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("note"), [], [], body).set_lineno(line)

    @pass_context
    def note(self, context: PaidContext, caller: Callable[[], str]) -> str:
        """Write the body and remember where it stands."""
        text, at = caller(), context.account.written
        context.account.spans.append((at, at + len(text)))
        return text


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: object) -> None:
    raise TemplateError(str(message))


_FILTERS = _words(
    "abs capitalize count d default dictsort e escape first float format groupby indent int items join last length "
    "list lower map max min reject rejectattr replace reverse round safe select selectattr sort string sum title "
    "tojson trim truncate unique upper wordcount"
)
# These look at how many things there are, not into them.
_SKIMS = _words("count d default first items last length list map reject rejectattr reverse select selectattr")
_COMPARES = _words("eq equalto ne lt lessthan gt greaterthan le ge in == != < <= > >=")


def _metered(name: str, inner: Callable[..., Any], deep: bool) -> Callable[..., Any]:
    """Return a filter or test that pays before it runs, and gives a list where the original gives an iterator."""
    wants = getattr(getattr(inner, "jinja_pass_arg", None), "name", "")

    @pass_context
    def run(context: PaidContext, value: Any, *args: Any, **kwargs: Any) -> Any:
        account = context.account
        account.pay(STEP)
        account.walk(value) if deep else account.skim(value)
        given = (*args, *kwargs.values())
        if given:
            for x in given:
                account.walk(x)
            pay_for_filter(account, name, value, given)
        if wants:
            lead = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}[wants]
            result = inner(lead, value, *args, **kwargs)
        else:
            result = inner(value, *args, **kwargs)
        if hasattr(result, "__next__"):
            result = list(result)
        account.made(result)
        return result

    return run


def _environment() -> Sandbox:
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_write)
    own: dict[str, Any] = {**environment.filters, "tojson": _tojson}
    environment.filters = {name: _metered(name, own[name], name not in _SKIMS) for name in _FILTERS}
    environment.filters |= {_TICK: _tick, _PAID: _paid, _COUNTED: _counted}
    tests: dict[str, Any] = environment.tests
    environment.tests = {name: _metered(name, test, name in _COMPARES) for name, test in tests.items()}
    del environment.globals["lipsum"]  # random
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": _Clock.now().strftime,
        "now": _Clock.now,
        "datetime": _Clock,
    }
    return environment


ENVIRONMENT = _environment()
