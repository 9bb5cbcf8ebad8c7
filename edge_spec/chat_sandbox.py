"""The jinja2 environment in which chat templates run. Imports jinja2: import this module where it is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import do_indent
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edge_spec.errors import UsageError

MAX_RANGE = 100_000
"""Steps that all `range` loops of one rendering may take together."""
MAX_REPEATED = 1 << 20
"""Items that a repetition such as `"-" * n` may make."""
MAX_BITS = 256
"""Bits of a product."""

_PADDING_METHODS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(?:\d{4}|\*)")
_WIDE_FIELD = re.compile(r"\{[^}]*:[^}]*(?:\d{4}|\{)")
MAX_INDENT = 100
"""Characters of indentation."""


class _Generation(Extension):
    """`{% generation %}`, by which training marks what the assistant said; here it only groups."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body, as it stands."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatSandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with the settings and functions that `transformers` gives to chat templates, and with bounds."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
        self.filters["tojson"] = _to_json
        self.filters["indent"] = _indent
        for name in ("center", "format"):
            del self.filters[name]
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = _strftime_now

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Also refuse the string methods that pad to any width."""
        return not (isinstance(obj, str) and attr in _PADDING_METHODS) and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Refuse `str.format` with a field of any width."""
        text = getattr(value, "__self__", None)
        if isinstance(text, str) and value.__name__.startswith("format") and _WIDE_FIELD.search(text):
            raise SecurityError("a format is too wide")
        wrapped: Callable[..., str] | None = super().wrap_str_format(value)
        return wrapped

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Check a product, power or `%` before it is worked out."""
        if operator == "%":
            if isinstance(left, str) and _WIDE_FORMAT.search(left):
                raise SecurityError("a format is too wide")
        elif isinstance(left, int | float) and isinstance(right, int | float):
            bits = int(left).bit_length() * int(right) if operator == "**" else _bits(left) + _bits(right)
            if bits > MAX_BITS:
                raise SecurityError("a number is too large")
        elif _repeated(left, right) > MAX_REPEATED:
            raise SecurityError("a repetition is too long")
        return super().call_binop(context, operator, left, right)


def bounded_range() -> Callable[..., range]:
    """A `range` for one rendering, whose loops together take MAX_RANGE steps at most."""
    left = MAX_RANGE

    def make(*bounds: int) -> range:
        nonlocal left
        steps = range(*bounds)
        left -= min(len(steps[: MAX_RANGE + 1]), MAX_RANGE + 1)
        if left < 0:
            raise SecurityError(f"loops over more than {MAX_RANGE} steps")
        return steps

    return make


def _bits(number: float) -> int:
    return int(number).bit_length()


def _repeated(left: Any, right: Any) -> int:
    sized, times = (left, right) if isinstance(right, int) else (right, left)
    return len(sized) * times if isinstance(times, int) and hasattr(sized, "__len__") else 0


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    _check_indent(width)
    return do_indent(text, width, first, blank)


def _check_indent(width: object) -> None:
    if (width if isinstance(width, int) else len(str(width))) > MAX_INDENT:
        raise SecurityError("an indentation is too wide")


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    _check_indent(indent)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(reason: str) -> NoReturn:
    raise UsageError(f"the model's chat template refuses these messages: {reason}")


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form[:100])
