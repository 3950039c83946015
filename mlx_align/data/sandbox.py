"""Jinja for chat templates, as Hugging Face sets it up, within bounds.

A template comes with a model from anyone. It sees nothing of Python but plain values, and its loops,
calls, texts and numbers are counted and measured, so it always ends, and in little memory.
"""

import datetime
import functools
import json
import re

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Far above what any conversation needs: characters of a template; turns of loops and calls in one
# rendering; characters of a text and entries of a list; a width to fill; bits of a number.
MOST_SOURCE = 2**18
MOST_STEPS = 2**18
MOST_CHARACTERS = 2**24
MOST_WIDTH = 2**20
MOST_BITS = 2**12


class OutOfBounds(SecurityError):
    """A template would run for too long, or make too much."""


class _Generation(Extension):
    """`{% generation %}` only marks text; what it marks is found by rendering here."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """Where chat templates are compiled and rendered; `day` is what they take for today."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, day: datetime.datetime):
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        self._steps = 0
        filters = {**self.filters, "tojson": _tojson}
        self.filters = {name: self._bounded(filter_) for name, filter_ in filters.items()}
        self.filters |= {"_count": self._count, "_measure": _measure}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = day.strftime
        del self.globals["lipsum"]

    def compile_template(self, source: str) -> Template:
        """A template whose loops and joined texts are counted and measured."""
        if len(source) > MOST_SOURCE:
            raise OutOfBounds(f"has {len(source)} characters, which no template needs")
        tree = self.parse(source)

        def through(name, node):
            return nodes.Filter(node, name, [], [], None, None, environment=self)

        for loop in tree.find_all(nodes.For):
            loop.iter = through("_count", loop.iter)
        for joined in list(tree.find_all(nodes.Concat)):
            joined.nodes = [through("_measure", nodes.Concat(joined.nodes, environment=self))]
        for block in tree.find_all(nodes.AssignBlock):
            block.filter = block.filter or through("_measure", None)
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def render(self, template: Template, **variables) -> str:
        """The text that a template makes. Raises `OutOfBounds`, and whatever the template raises."""
        self._steps = 0
        pieces, size = [], 0
        try:
            for piece in template.generate(**variables):
                size += len(piece)
                if size > MOST_CHARACTERS:
                    raise OutOfBounds("makes a text without end")
                pieces.append(piece)
        except (RecursionError, MemoryError):
            raise OutOfBounds("calls itself without end, or makes too much") from None
        return "".join(pieces)

    def call(self, context, made, /, *args, **kwargs):
        """Call something as a template asks for it."""
        self._step()
        if isinstance(getattr(made, "__self__", None), str):
            _check_widths(args)
        return _measure(super().call(context, made, *args, **kwargs))

    def call_binop(self, context, operator, left, right):
        """Compute with two values, unless the result would be too large."""
        if operator == "%" and isinstance(left, str):
            _check_format(left)
            _check_widths(right if isinstance(right, tuple) else ())
        if operator == "*" and isinstance(left, _SIZED) and isinstance(right, int):
            _check(len(left) * right <= MOST_CHARACTERS)
        if operator == "*" and isinstance(right, _SIZED) and isinstance(left, int):
            _check(len(right) * left <= MOST_CHARACTERS)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check(left.bit_length() * right <= MOST_BITS)
        return _measure(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value):
        """A text's own way of filling in values, unless it asks for wide fields."""
        made = super().wrap_str_format(value)
        if made is not None:
            _check_format(value.__self__)
        return made

    def _bounded(self, filter_):
        # The value comes first, behind what Jinja itself passes.
        first = 1 + hasattr(filter_, "jinja_pass_arg")

        @functools.wraps(filter_)
        def call(*args, **kwargs):
            self._step()
            _check_widths((*args[first:], *kwargs.values()))
            return _measure(filter_(*args, **kwargs))

        return call

    def _count(self, values):
        for value in values:
            self._step()
            yield value

    def _step(self):
        self._steps += 1
        if self._steps > MOST_STEPS:
            raise OutOfBounds("runs without end")


_SIZED = (str, list, tuple)


def _check(small: bool) -> None:
    if not small:
        raise OutOfBounds("makes a value that is too large")


def _check_widths(values) -> None:
    _check(all(value <= MOST_WIDTH for value in values if isinstance(value, int)))


def _check_format(text: str) -> None:
    _check(all(int(width) <= MOST_WIDTH for width in re.findall(r"[0-9]{7,4000}", text)))


def _measure(value):
    if isinstance(value, _SIZED):
        _check(len(value) <= MOST_CHARACTERS)
    elif isinstance(value, int):
        _check(value.bit_length() <= MOST_BITS)
    return value


def _raise_exception(message):
    raise TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
