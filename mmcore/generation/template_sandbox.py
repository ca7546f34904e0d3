"""jinja's sandbox with bounds on what a template from a checkpoint may compute, for jinja alone bounds only `range`."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MOST_TEXT = 1 << 20
"""Characters of a text, items of a list or bits of a product or power that a template may make, beside eight times what
was said. All that it makes together may be _TIMES as much, where each call, filter and round of a loop counts as _STEP.
What a short template could make much of is estimated before it is made. This keeps the usual traps off; it is no promise
about seconds or bytes."""
_TIMES, _STEP = 256, 1024
_LEFT_OUT = ("urlize", "wordwrap")
"""Filters that no chat template needs, and that repeat an argument as often as they like."""
_SIZED = ("batch", "center", "round", "slice", "tojson", "truncate")
"""Filters of which an integer argument says how much they make."""
_LISTS = (
    "attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list", "map",
    "max", "min", "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "tojson", "unique",
)  # fmt: skip
"""Filters that do not write lists out as text, tojson apart, which stops in time."""
_REFUSED = ("encode", "to_bytes", "translate")


class Sandbox(ImmutableSandboxedEnvironment):
    """Refuses what is too large before it is computed; as operators are intercepted, the compiler does not compute them
    either. `begin` is called before a rendering."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.begin(MOST_TEXT)
        del self.globals["lipsum"]
        self.filters["tojson"] = _to_json
        self.filters = {
            name: self._bounded(name, function) for name, function in self.filters.items() if name not in _LEFT_OUT
        }
        self.finalize = self._finalize
        self.concat = self._concat

    def begin(self, most: int) -> None:
        self.most, self._left = most, _TIMES * most

    def spend(self, size: int) -> None:
        """Raises TemplateError where so much at once, or together with all before, is too much."""
        if size > self.most:
            raise jinja2.TemplateError("it makes something too large")
        self._left -= size
        if self._left < 0:
            raise jinja2.TemplateError("it computes too much")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        size = 0
        if operator == "%":
            size = self._formatted(left, "%", right) if isinstance(left, str) else 0
        elif operator == "**":
            size = left.bit_length() * right if isinstance(left, int) and isinstance(right, int) else 0
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            size = left.bit_length() + right.bit_length()
        elif operator == "*":
            pair = (left, right) if hasattr(left, "__len__") else (right, left)
            size = len(pair[0]) * pair[1] if hasattr(pair[0], "__len__") and isinstance(pair[1], int) else 0
        elif hasattr(left, "__len__") and hasattr(right, "__len__"):
            size = len(left) + len(right)
        self.spend(max(0, size))
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return super().is_safe_attribute(obj, attr, value) and not (attr in _REFUSED and isinstance(obj, str | int))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (as jinja has it)
        __self.spend(_STEP)
        method = getattr(__obj, "__wrapped__", __obj)  # jinja wraps str.format
        text = getattr(method, "__self__", None)
        if isinstance(text, str):
            name = method.__name__
            if name == "join" and args:
                args = (list(args[0]),)
                __self.spend(__self.size(args[0]) + len(text) * len(args[0]))
            else:
                __self.spend(__self._grown(name, text, args, kwargs))
        result = super().call(__context, __obj, *args, **kwargs)
        __self.spend(_length(result))
        return result

    def step(self) -> bool:
        """Called in each round of a loop, which is all that it is for."""
        return True

    def joined(self, *parts: Any) -> str:
        """What ~ makes of them."""
        self.spend(sum(map(self.size, parts)))
        return "".join(map(str, parts))

    def size(self, value: Any) -> int:
        """About how many characters a value is long once it is written. Raises TemplateError where those are too many."""
        if isinstance(value, str):
            return len(value)
        return sum(map(len, up_to(self.most, _texts(value))))

    def _concat(self, pieces: Iterable[str]) -> str:
        pieces = list(up_to(self.most, pieces))
        self.spend(sum(map(len, pieces)))
        return "".join(pieces)

    def _finalize(self, value: Any) -> Any:
        self.size(value)
        return value

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter, with its arguments and its result bounded."""
        first = int(hasattr(function, "jinja_pass_arg"))

        @functools.wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            before, value, given = args[:first], args[first], args[first + 1 :]
            if name == "join":
                value = list(value)
            self.spend(_STEP)
            if name not in _LISTS:
                self.spend(sum(map(self.size, (value, *given, *kwargs.values()))))
            if name == "join":
                self.spend(len(value) * _longest([*given, *kwargs.values()]))
            elif name in ("replace", "indent", "format"):
                self.spend(self._grown(name, str(value), given, kwargs, "%"))
            elif name in _SIZED:
                self.spend(_largest([*given, *kwargs.values()]))
            result = function(*before, value, *given, **kwargs)
            self.spend(_length(result))
            return result

        return bounded

    def _grown(self, name: str, text: str, given: Any, named: dict[str, Any], mark: str = "{") -> int:
        """At most how many characters a filter or method of str with this name makes."""
        values = [*given, *named.values()]
        if name == "replace":
            times = text.count(str(given[0])) if len(given) > 1 else len(text) + 1
            return len(text) + times * _longest(values)
        if name in ("indent", "expandtabs"):
            lines = len(text.splitlines()) + text.count("\t") + 1
            return len(text) + lines * max(8, _longest(values), _largest(values))
        if name in ("format", "format_map"):
            return self._formatted(text, mark, tuple(values))
        return _largest(values)

    def _formatted(self, text: str, mark: str, values: Any) -> int:
        """At most how many characters `text` has with `values` in the fields that begin with `mark`."""
        listed = values if isinstance(values, tuple) else (values,)
        if mark == "%":
            specs = re.findall(r"%(?:\([^)]*\))?[-+ #0]*[\d.*]*", text)
        else:
            plain = text.replace("{{", "").replace("}}", "")
            specs = re.findall(r"\{[^{}]*:[^{}]*", plain)
            if re.search(r"\{[^{}]*:[^{}]*\{", plain):
                raise jinja2.TemplateError("it formats with a width that is not written out")
        widths = sum(int(number) for spec in specs for number in re.findall(r"\d+", spec))
        if any("*" in spec for spec in specs) and mark == "%":
            widths += len(specs) * _largest(listed)
        return len(text) + widths + text.count(mark) * max(map(self.size, listed), default=0)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Counted().visit(source).set_environment(self), *args, **kwargs)


class _Counted(NodeTransformer):
    """Makes calls of what jinja lets nobody intercept: ~ and the rounds of loops."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", node.nodes).set_lineno(node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("step", [])).set_lineno(node.lineno))
        if node.test is not None:
            node.test = nodes.And(_call("step", []), node.test).set_lineno(node.lineno)
        return node


def _call(name: str, arguments: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


@jinja2.pass_environment
def _to_json(
    environment: Sandbox, value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    """jinja's own filter would write < and > as \\u003c and \\u003e."""
    if max(_longest([indent]), _largest([indent])) > 1000:
        raise jinja2.TemplateError("it makes something too large")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return "".join(up_to(environment.most, encoder.iterencode(value)))


def up_to(most: int, pieces: Iterable[str]) -> Iterator[str]:
    """The pieces. Raises TemplateError where they are longer than `most` characters together."""
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > most:
            raise jinja2.TemplateError(f"it writes more than {most:,} characters")
        yield piece


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value, and something short for all else in it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Namespace):
        yield from _texts(value._Namespace__attrs)
    elif isinstance(value, Collection) and not isinstance(value, range | jinja2.Undefined):
        for item in value.items() if isinstance(value, dict) else value:
            yield ", "
            yield from _texts(item)
    else:
        yield "-"


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | dict) else 0


def _longest(values: Iterable[Any]) -> int:
    return max((len(value) for value in values if isinstance(value, str)), default=0)


def _largest(values: Iterable[Any]) -> int:
    return max((abs(value) for value in values if isinstance(value, int)), default=0)
