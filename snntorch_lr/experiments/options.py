"""Options: a field of a dataclass is an option of the command line, its help, its check, and its place in results."""

from __future__ import annotations

import operator
import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import torch

T = TypeVar("T")
_BOUNDS = {"least": (operator.ge, "at least"), "above": (operator.gt, "above"), "most": (operator.le, "at most")}


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    choices: Collection[str] = (),
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    flag: str | None = None,
    positional: bool = False,
    recorded: bool = True,
) -> Any:
    """A field of a dataclass of options; without a default it is required.

    Args:
        default: the value if none is given.
        help: for ``--help``, and in place of a line in the docstring of the class.
        choices: the names that are allowed, looked up when options are checked: a registry may grow.
        least, above, most: bounds of the numbers that are allowed.
        flag: name on the command line, if it is not that of the field; of a tuple, the name of one of its values.
        positional: on the command line the value stands alone.
        recorded: results depend on it, and it is saved with them.
    """
    about = {"help": help, "choices": choices, "flag": flag, "positional": positional, "recorded": recorded}
    return field(default=default, metadata=about | {"least": least, "above": above, "most": most})


def flag_of(each: Field[Any]) -> str:
    """Name of a field on the command line."""
    return each.metadata["flag"] or f"--{each.name.replace('_', '-')}"


def check(options: Any, flags: bool = True) -> None:
    """Refuses values that are out of range or none of the choices."""
    for each in fields(options):
        given, about = getattr(options, each.name), each.metadata
        bounds = [(*_BOUNDS[name], about[name]) for name in _BOUNDS if about.get(name) is not None]
        for value in given if isinstance(given, tuple) else (given,):
            if value is not None and about.get("choices") and value not in about["choices"]:
                name = each.name.replace("_", " ")
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(about['choices'])}")
            if value is not None and not all(holds(value, bound) for holds, _, bound in bounds):
                said = " and ".join(f"{words} {bound:g}" for _, words, bound in bounds)
                raise ValueError(f"{flag_of(each) if flags else each.name} must be {said}, got {value}")


def add_options(parser: ArgumentParser, kind: type) -> None:
    """Gives a parser the options of a dataclass."""
    hints = get_type_hints(kind)
    for each in fields(kind):
        about, (hint, *_) = each.metadata, _kinds(hints[each.name])
        several = get_origin(hint) is tuple
        choices = f": {', '.join(about['choices'])}" if about["choices"] else ""
        again = "; may be given again" if several and not about["positional"] else ""
        # A percent sign is an instruction to argparse.
        text = f"{about['help']}{choices}{again}{_default(each)}".replace("%", "%%")
        words: dict[str, Any] = {"help": text}
        if hint is bool:
            words |= {"action": "store_true"}
        else:
            words |= {"type": get_args(hint)[0] if several else hint}
            words |= {"metavar": each.name.upper() if about["positional"] else words["type"].__name__.upper()}
        if several:
            words |= {"nargs": "+"} if about["positional"] else {"action": "append"}
        if about["positional"]:
            parser.add_argument(each.name, **words)
        else:
            parser.add_argument(flag_of(each), dest=each.name, **words)


def _default(each: Field[Any]) -> str:
    values = each.default if isinstance(each.default, tuple) else (each.default,)
    shown = [str(value) for value in values if value not in (MISSING, None, False)]
    return f" [{', '.join(shown)}]" if shown else ""


def from_arguments(kind: Callable[..., T], given: Namespace) -> T:
    """The options that a parser found."""
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(given).items()}
    return kind(**{name: value for name, value in found.items() if value is not None})


def from_table(kind: type, table: Any) -> dict[str, Any]:
    """Values of fields from a table of a TOML file, lists as tuples."""
    if not isinstance(table, dict):
        raise ValueError(f"expected a table, got {table!r}")
    hints, found = get_type_hints(kind), {}
    for key, value in table.items():
        if key not in hints:
            near = get_close_matches(key, hints, 1)
            raise ValueError(f"unknown key {key!r}; use {near[0] if near else 'one of ' + ', '.join(hints)}")
        try:
            found[key] = _typed(value, hints[key])
        except TypeError as error:
            raise ValueError(f"{key} must be {error}, got {value!r}") from None
    return found


def made(kind: Callable[..., T], values: Mapping[str, Any]) -> T:
    """A checked instance of a dataclass of options."""
    missing = [each.name for each in fields(cast("Any", kind)) if each.default is MISSING and each.name not in values]
    if missing:
        raise ValueError(f"{missing[0]} is missing")
    options = kind(**values)
    check(options, flags=False)
    return options


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types that a value may have, but for None."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    return tuple(kind for kind in kinds if kind is not type(None))


def _typed(value: Any, hint: Any) -> Any:
    for kind in _kinds(hint):
        plain = get_origin(kind) or kind
        if plain is tuple and isinstance(value, list):
            return tuple(_typed(each, get_args(kind)[0]) for each in value)
        if type(value) is plain or (plain is float and type(value) is int):
            return plain(value)
    raise TypeError(" or ".join(map(_words, _kinds(hint))))


def _words(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list, each {_words(get_args(kind)[0])}"
    return {str: "a string", int: "an integer", float: "a number", bool: "true or false"}.get(kind, "a table")


def recorded(options: Any) -> dict[str, Any]:
    """The options that results depend on, to be saved with them."""
    values = {each.name: asdict(options)[each.name] for each in fields(options) if each.metadata["recorded"]}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def command_line(name: str, options: Any) -> str:
    """The command that gives the same results again, wherever it computes and writes."""
    alone, words = [], []
    for each in (each for each in fields(options) if each.metadata["recorded"]):
        given = getattr(options, each.name)
        for value in given if isinstance(given, tuple) else (given,):
            if each.metadata["positional"]:
                alone.append(shlex.quote(str(value)))
            elif value is not None and value is not False:
                words.append(flag_of(each) + ("" if value is True else f" {shlex.quote(str(value))}"))
    return " ".join(["snntorch-lr", name, *alone, *words])


@dataclass(frozen=True, kw_only=True)
class Printed:
    """What a command prints."""

    json: bool = option(False, "print the results as JSON, and all else to standard error", recorded=False)


@dataclass(frozen=True, kw_only=True)
class DataPlace(Printed):
    """The place of the data."""

    data_root: Path | None = option(
        None, "torchvision root of MNIST and Fashion-MNIST; downloaded there if absent", recorded=False
    )


@dataclass(frozen=True, kw_only=True)
class Place(DataPlace):
    """The place of the data, and of the computation."""

    device: str = option("cpu", "cpu, cuda, cuda:1, ...", recorded=False)

    def torch_device(self) -> torch.device:
        """The device."""
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"unknown device {self.device!r}; use cpu or cuda") from error
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"--device {self.device} is not supported; use cpu or cuda")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"no CUDA device {device.index or 0} was found; use --device cpu")
        return device
