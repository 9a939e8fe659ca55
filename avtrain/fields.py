"""Fields of settings. What a field may hold stands beside it, in its type: `Count`, `Annotated[float, Range(above=0)]`,
`Literal["early", "late"]`. Errors give the name, the value, and what is wanted; or the nearest name that is right."""

from __future__ import annotations

import dataclasses
import difflib
import operator
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from avtrain.errors import AvtrainError

_HOLDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "under": operator.lt}
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Range:
    """Limits of a number."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    under: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a value is within all limits."""
        return all(_HOLDS[name](value, limit) for name, limit in self._limits().items())

    def __str__(self) -> str:
        return " and ".join(f"{name.replace('_', ' ')} {limit}" for name, limit in self._limits().items())

    def _limits(self) -> dict[str, float]:
        return {name: limit for name, limit in vars(self).items() if limit is not None}


Count = Annotated[int, Range(at_least=1)]
Whole = Annotated[int, Range(at_least=0)]
Amount = Annotated[float, Range(at_least=0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(at_least=0, at_most=1)]
Probability = Annotated[float, Range(at_least=0, under=1)]


def kinds_of(section: type[Any]) -> dict[str, Any]:
    """Name and type of each field of a dataclass of settings."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


def check_fields(settings: Any, section: str) -> None:
    """Raise AvtrainError where a field holds what its type does not allow; called on construction."""
    for name, kind in kinds_of(type(settings)).items():
        _right(f"{section}.{name}", kind, getattr(settings, name))


def section_values(section: str, kind: type[Any], values: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Values of a section, as TOML or JSON has them, in the types of the fields of its dataclass `kind`.

    Args:
        section, kind, values: which section, and what is to stand in it.
        place: as for `check_known`.

    Raises:
        AvtrainError: an unknown name, or a value of the wrong type or out of range.
    """
    kinds = kinds_of(kind)
    for name in values:
        check_known(name, kinds, f"{section}.", place)
    return {name: _right(f"{section}.{name}", kinds[name], value) for name, value in values.items()}


def check_known(name: str, known: Iterable[str], prefix: str = "", place: str = "") -> None:
    """Raise AvtrainError where there is no such setting.

    Args:
        name: that is asked for.
        known: all that there are.
        prefix: of all of them, for the error.
        place: where there are only these, such as "here": then they are all listed, for the name may be right
            elsewhere.
    """
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        here = (f" {place}", f" There are {', '.join(names)}") if place else ("", "")
        raise AvtrainError(f"{prefix}{name}: no such setting{here[0]}; did you mean {prefix}{near}?{here[1]}")


def check(right: bool, name: str, value: object, wanted: object) -> None:
    """Raise AvtrainError where a value is not right."""
    if not right:
        raise AvtrainError(f"{name} = {value!r}: {wanted} is wanted")


def _right(name: str, kind: Any, value: Any) -> Any:
    """`value` in the type that a field has, if it is one of those that it may hold; TOML writes none as "none"."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):  # with None
        return None if value in (None, "none") else _right(name, inner[0], value)
    if origin is Annotated:
        found = _right(name, inner[0], value)
        for limits in inner[1:]:
            check(limits.holds(found), name, found, limits)
        return found
    if origin is Literal:
        check(any(type(value) is type(choice) and value == choice for choice in inner), name, value,
              f"one of {', '.join(map(str, inner))}")
        return value
    if origin is tuple:
        check(isinstance(value, list | tuple), name, value, "a list, like [3, 4, 6, 3],")
        return tuple(_right(name, inner[0], item) for item in value)
    check(type(value) is kind or (kind is float and type(value) is int), name, value, _WORDS[kind])
    return kind(value)
