r"""Reads method specifications as they are typed: ``cagrad(c=0.2)``, ``smoothed(mgda,decay=0.9)``.

The whole grammar::

    list     = method , { "," , method } ;
    method   = name , [ "(" , [ argument , { "," , argument } ] , ")" ] ;
    argument = method | name , "=" , value ;
    value    = number | "true" | "false" | "none" | word | string | "[" , [ value , { "," , value } ] , "]" ;

A name alone is a registered method. An argument without ``=`` is the method that a wrapper wears; it comes first.
A word is a string without quotes (``scale=rmse``); quotes serve everything else. Nothing is evaluated.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mogb.aggregators import get, registered
from mogb.base import Aggregator, option_names
from mogb.wrappers import WRAPPERS

Value = float | int | bool | str | None | list["Value"]

_TOKEN = re.compile(
    r"\s*(?:(?P<number>[+-]?(?:\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)(?![\w.]))"
    r"|(?P<word>[A-Za-z_][A-Za-z0-9_+]*)"
    r"|(?P<string>'[^']*'|\"[^\"]*\")"
    r"|(?P<sign>[(),=\[\]]))"
)
_KINDS = {bool: "true or false", int: "a whole number", float: "a number"}
_CONSTANTS: dict[str, Value] = {
    "true": True, "True": True, "false": False, "False": False, "none": None, "None": None, "inf": float("inf"),
}  # fmt: skip


class SpecError(ValueError):
    """A method specification that cannot be read, or that names something unknown."""


@dataclass(frozen=True)
class Spec:
    """One method as it was asked for.

    Attributes:
        name: Of a registered method or of a wrapper.
        options: What was given in parentheses, in that order.
        inner: The method that a wrapper wears.
    """

    name: str
    options: tuple[tuple[str, Value], ...] = ()
    inner: "Spec | None" = None

    def __str__(self) -> str:
        """The specification in its one normal form: no spaces, options sorted by name."""
        parts = [] if self.inner is None else [str(self.inner)]
        parts += [f"{name}={_text(value)}" for name, value in sorted(self.options)]
        return f"{self.name}({','.join(parts)})" if parts else self.name

    @property
    def methods(self) -> tuple[str, ...]:
        """The registered method inside, and the wrappers around it, outermost first."""
        return (self.name,) if self.inner is None else (self.name, *self.inner.methods)

    def build(self, seed: int | None = None) -> Aggregator:
        """A fresh aggregator.

        Args:
            seed: For methods that draw random numbers and were given no ``seed`` of their own.

        Raises:
            SpecError: An unknown name or option, a value that the method refuses; the message lists what exists.
        """
        options: dict[str, Any] = dict(self.options)
        wrapper = WRAPPERS.get(self.name)
        if wrapper is None and self.name not in registered():
            raise SpecError(
                f"unknown method {self.name!r}. Methods: {', '.join(registered())}. "
                f"Wrappers: {', '.join(sorted(WRAPPERS))}."
            )
        if wrapper is None and self.inner is not None:
            raise SpecError(
                f"{self.name!r} wears no other method, but got {str(self.inner)!r} as an argument without '='. "
                f"Write options as name=value; wrappers are {', '.join(sorted(WRAPPERS))}."
            )
        cls: type[Aggregator] = wrapper or get(self.name)
        known = tuple(name for name in option_names(cls) if name != "inner")
        if unknown := [name for name in options if name not in known]:
            raise SpecError(
                f"{self.name!r} has no option {', '.join(map(repr, unknown))}. "
                f"Its options: {', '.join(known) or 'none'}."
            )
        if seed is not None and "seed" in known:
            options.setdefault("seed", seed)
        if wrapper is not None:
            if self.inner is None:
                raise SpecError(f"{self.name!r} is a wrapper and needs a method first, such as {self.name}(mgda).")
            options["inner"] = self.inner.build(seed)
        options |= _numbers(self, cls)
        try:
            return cls(**options)
        except (TypeError, ValueError, ImportError) as error:
            raise SpecError(f"{self}: {error}") from error


def parse_specs(text: str) -> tuple[Spec, ...]:
    """The methods of a list such as ``mgda,cagrad(c=0.2),smoothed(mgda,decay=0.9)``.

    Raises:
        SpecError: The list is empty, cannot be read, or names a method twice. :meth:`Spec.build` looks names up.
    """
    reader = _Reader(text)
    specs = [reader.method()]
    while not reader.at_end():
        reader.expect(",")
        specs.append(reader.method())
    seen: set[str] = set()
    for spec in specs:
        if str(spec) in seen:
            raise SpecError(f"{str(spec)!r} is named twice. Name every method once.")
        seen.add(str(spec))
    return tuple(specs)


def parse_spec(text: str) -> Spec:
    """The one method of a text such as ``cagrad(c=0.2)``.

    Raises:
        SpecError: It cannot be read, or holds more than one method.
    """
    specs = parse_specs(text)
    if len(specs) != 1:
        raise SpecError(f"{text!r} names {len(specs)} methods, but one is needed.")
    return specs[0]


def _numbers(spec: Spec, cls: type[Aggregator]) -> dict[str, float]:
    """The options that are numbers, with 1 as 1.0 where that is meant; refuses words in their place."""
    parameters = inspect.signature(cls.__init__).parameters
    numbers = {}
    for name, value in spec.options:
        wanted = parameters[name].annotation
        kind = type(value)
        fits = {bool: kind is bool, int: kind is int, float: kind in (int, float)}
        if not fits.get(wanted, True):
            raise SpecError(f"{spec}: {name} must be {_KINDS[wanted]}, but got {_text(value)}.")
        if wanted is float:
            numbers[name] = float(value)  # type: ignore[arg-type]
    return numbers


class _Reader:
    """A recursive-descent reader over the tokens of one text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(_tokens(text))
        self.position = 0

    def at_end(self) -> bool:
        return self.position == len(self.tokens)

    def peek(self, offset: int = 0) -> tuple[str, str]:
        index = self.position + offset
        return self.tokens[index] if index < len(self.tokens) else ("end", "")

    def take(self) -> tuple[str, str]:
        token = self.peek()
        self.position += 1
        return token

    def expect(self, sign: str) -> None:
        kind, text = self.take()
        if kind != "sign" or text != sign:
            raise self.error(f"{sign!r}", kind, text)

    def error(self, wanted: str, kind: str, found: str) -> SpecError:
        where = "the text ends" if kind == "end" else f"{found!r} stands there"
        return SpecError(
            f"cannot read {self.text!r}: expected {wanted}, but {where}. "
            "Write methods as name, name(option=value) or wrapper(name,option=value), with commas between."
        )

    def method(self) -> Spec:
        kind, name = self.take()
        if kind != "word":
            raise self.error("the name of a method", kind, name)
        if self.peek() != ("sign", "("):
            return Spec(name)
        self.take()
        inner, options = None, {}
        while self.peek() != ("sign", ")"):
            if self.peek(1) == ("sign", "="):
                option, value = self.option()
                if option in options:
                    raise SpecError(f"cannot read {self.text!r}: the option {option!r} is given twice.")
                options[option] = value
            elif inner is None and not options:
                inner = self.method()
            else:
                raise self.error("option=value", *self.peek())
            if self.peek() != ("sign", ")"):
                self.expect(",")
        self.take()
        return Spec(name, tuple(options.items()), inner)

    def option(self) -> tuple[str, Value]:
        kind, name = self.take()
        if kind != "word":
            raise self.error("the name of an option", kind, name)
        self.expect("=")
        return name, self.value()

    def value(self) -> Value:
        kind, text = self.take()
        if kind == "number":
            return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
        if kind == "string":
            return text[1:-1]
        if kind == "word":
            return _CONSTANTS.get(text, text)
        if (kind, text) == ("sign", "["):
            values: list[Value] = []
            while self.peek() != ("sign", "]"):
                values.append(self.value())
                if self.peek() != ("sign", "]"):
                    self.expect(",")
            self.take()
            return values
        raise self.error("a value", kind, text)


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    position, end = 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            raise SpecError(
                f"cannot read {text!r} at {text[position:].strip()!r}. "
                "Write methods as name, name(option=value) or wrapper(name,option=value), with commas between."
            )
        kind = match.lastgroup
        assert kind is not None
        yield kind, match[kind]
        position = match.end()


def _text(value: Value) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_+]*", value) and value not in _CONSTANTS
        return value if plain else f"'{value}'" if "'" not in value else f'"{value}"'
    return repr(value)
