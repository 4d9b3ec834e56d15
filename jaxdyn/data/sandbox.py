"""Where chat templates run: Jinja's sandbox as transformers sets it up, for a bounded while.

Imported with the first template: nothing else needs Jinja.
"""

import datetime
import json
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MOST_TURNS = 200_000
"""Turns of loops and calls of macros in one rendering: a model's template needs hundreds."""
MOST_ITEMS = 10_000_000
"""Characters of a text, or items of a list, that `*` may make."""


class Generation(Extension):
    """`{% generation %}`, which marks the assistant's tokens, writes what is inside."""

    tags = {"generation"}  # noqa: RUF012 (declared so by its base)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class Sandbox(ImmutableSandboxedEnvironment):
    """Templates see what they are handed and the functions below; loops and macros are counted.

    `begin` is to be called before each rendering.
    """

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self):
        extensions = [Generation, loopcontrols]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.filters["tojson"] = to_json
        self.globals |= {
            "raise_exception": raise_exception,
            "strftime_now": lambda form: self.today.strftime(form),
            "take_turn": self.take_turn,
        }
        self.begin(datetime.date.min)

    def begin(self, today: datetime.date) -> None:
        """Set the date, and the turns that are left."""
        self.today = datetime.datetime.combine(today, datetime.time())
        self.left = MOST_TURNS

    def take_turn(self) -> None:
        """Called by every turn of a loop and every macro."""
        self.left -= 1
        if self.left < 0:
            raise SecurityError(f"it takes more than {MOST_TURNS} turns")

    def _parse(self, source, name, filename):
        tree = super()._parse(source, name, filename)
        node: Any
        for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            call = nodes.Call(nodes.Name("take_turn", "load"), [], [], None, None)
            turn = nodes.ExprStmt(call).set_lineno(node.lineno, override=True)
            node.body.insert(0, turn.set_environment(self))
        return tree

    def unsafe_undefined(self, obj: Any, attribute: str):
        raise SecurityError(f"it may not reach {attribute!r} of a {type(obj).__name__}")

    def call_binop(self, context, operator, left, right):
        if operator == "**":
            raise SecurityError("it may not take powers")
        for many, times in ((left, right), (right, left)):
            if hasattr(many, "__len__") and len(many) * int(times) > MOST_ITEMS:
                raise SecurityError(f"it repeats something to more than {MOST_ITEMS} items")
        return super().call_binop(context, operator, left, right)


def raise_exception(message: str) -> None:
    """How a template refuses messages."""
    raise jinja2.TemplateError(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as it is: Jinja's own filter escapes it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
