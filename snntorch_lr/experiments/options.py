"""Options: a field of a dataclass is an option of the command line or a key of a plan, its help, and its check."""

from __future__ import annotations

import operator
import shlex
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Collection, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from dataclasses import field as dataclass_field
from difflib import get_close_matches
from functools import cached_property
from inspect import cleandoc
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import torch

T = TypeVar("T", bound="Options")
C = TypeVar("C", bound="Command")
_BOUNDS = {"least": (operator.ge, "at least"), "above": (operator.gt, "above"), "most": (operator.le, "at most")}


def option(
    default: Any = MISSING,
    help: str = "",
    *,
    choices: Collection[str] = (),
    flag: str | None = None,
    positional: bool = False,
    recorded: bool = True,
    offered: bool = True,
    **bounds: float,
) -> Any:
    """A field of ``Options``; without a default it is required.

    Args:
        default: the value if none is given.
        help: what it is, for ``--help``.
        choices: the names that are allowed, looked up when options are checked: a registry may grow.
        flag: name on the command line, if it is not that of the field; of a tuple, the name of one of its values.
        positional: on the command line the value stands alone.
        recorded: results depend on it, and it is saved with them.
        offered: it is an option of the command line, and not of plans alone.
        bounds: ``least``, ``above`` and ``most``, of the numbers that are allowed.
    """
    about = {"help": help, "choices": choices, "flag": flag, "bounds": bounds}
    return dataclass_field(
        default=default, metadata=about | {"positional": positional, "recorded": recorded, "offered": offered}
    )


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of dataclasses whose values are checked when they are made; lists become tuples, integers floats."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value = _typed(getattr(self, field.name), hints[field.name])
            if value is MISSING:
                raise ValueError(f"{field.name} must be of type {field.type}, got {getattr(self, field.name)!r}")
            object.__setattr__(self, field.name, value)
            for single in value if isinstance(value, tuple) else (value,):
                if single is not None:
                    _check(single, field)

    @classmethod
    def from_table(cls: type[T], table: Any) -> T:
        """The options of a table of a plan."""
        if not isinstance(table, dict):
            raise ValueError(f"expected a table, got {table!r}")
        known = {field.name: field.default for field in fields(cls)}
        for key in (key for key in table if key not in known):
            near = get_close_matches(key, known, 1)
            raise ValueError(f"unknown key {key!r}; use {near[0] if near else 'one of ' + ', '.join(known)}")
        for key, default in known.items():
            if default is MISSING and key not in table:
                raise ValueError(f"{key} is missing")
        return cls(**table)


def _typed(value: Any, hint: Any) -> Any:
    """The value as the type of a hint; MISSING if it is of another one."""
    for kind in get_args(hint) if isinstance(hint, UnionType) else (hint,):
        plain = get_origin(kind) or kind
        if plain is tuple and isinstance(value, list | tuple):
            values = tuple(_typed(item, get_args(kind)[0]) for item in value)
            return MISSING if MISSING in values else values
        if plain is float and type(value) is int:
            return float(value)
        if isinstance(value, plain) and isinstance(value, bool) == (plain is bool):
            return value
    return MISSING


def _check(value: Any, field: Field[Any]) -> None:
    """Refuses a value that is out of range or none of the choices."""
    choices, bounds = field.metadata["choices"], field.metadata["bounds"]
    if choices and value not in choices:
        raise ValueError(f"unknown {field.name.replace('_', ' ')} {value!r}; choose one of {', '.join(choices)}")
    if not all(_BOUNDS[name][0](value, bound) for name, bound in bounds.items()):
        wanted = " and ".join(f"{_BOUNDS[name][1]} {bound:g}" for name, bound in bounds.items())
        raise ValueError(f"{field.name} must be {wanted}, got {value}")


class Outcome(NamedTuple):
    """What a command prints: words under tables of titles, headers and lines; or ``results`` as JSON."""

    results: Any
    words: str
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = ()


class Progress:
    """A line for each piece of work, with the time left by the pace since the first line."""

    def __init__(self, title: str, in_percent: bool = False) -> None:
        self.title = title
        self.in_percent = in_percent
        self.first: tuple[float, float] | None = None

    def __call__(self, what: str, done: float, total: int) -> None:
        """Tells what is done next, or was done last, beside the number of pieces that are done."""
        self.first = self.first or (time.monotonic(), done)
        started, before = self.first
        left = ""
        if done > before:
            seconds = (time.monotonic() - started) * (total - done) / (done - before)
            left = f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"
        share = f"{100 * done / total:.0f} %" if self.in_percent else f"{done:.3g} of {total}"
        print(f"{self.title}: {share} done{left}: {what}", flush=True)


class Parser(ArgumentParser):
    """A parser of command lines whose errors are a ``ValueError``."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog=prog, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raises it."""
        raise ValueError(f"{message}; see {self.prog} --help")


@dataclass(frozen=True, kw_only=True)
class Command(Options):
    """A command and its options. Its name is that of the class, its help the docstring; ``run`` does it.

    Attributes:
        place: folder for the results if none is given; names in braces stand for options.
        kept: said after Ctrl-C: the results that are left.
    """

    place: ClassVar[str]
    kept: ClassVar[str] = "nothing was written"
    json: bool = option(False, "print the results as JSON, and all else to standard error", recorded=False)
    out: Path | None = option(None, "folder for the results; by default PLACE", recorded=False)

    def run(self) -> Outcome:
        """Does it, in its ``folder``, which no other process uses."""
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """What the names in ``place`` stand for."""
        return vars(self)

    @cached_property
    def folder(self) -> Path:
        """Folder for the results."""
        return self.out or Path(self.place.format(**self.about()))

    def recorded(self) -> dict[str, Any]:
        """The options that results depend on, to be saved with them."""
        values = {field.name: getattr(self, field.name) for field in _offered(self) if field.metadata["recorded"]}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def command_line(self) -> str:
        """The command that gives the same results again, wherever it computes and writes."""
        alone, words = [], []
        for field in (field for field in _offered(self) if field.metadata["recorded"]):
            chosen = getattr(self, field.name)
            for value in chosen if isinstance(chosen, tuple) else (chosen,):
                if field.metadata["positional"]:
                    alone.append(shlex.quote(str(value)))
                elif value is not None and value is not False:
                    words.append(_flag(field) + ("" if value is True else f" {shlex.quote(str(value))}"))
        return " ".join(["snntorch-lr", type(self).__name__.lower(), *alone, *words])

    @classmethod
    def parse(cls: type[C], words: Sequence[str]) -> C:
        """The options of a command line, from the words that follow the name of the command."""
        parser = Parser(f"snntorch-lr {cls.__name__.lower()}", description=cleandoc(cls.__doc__ or ""))
        hints = get_type_hints(cls)
        for field in _offered(cls):
            about, hint = field.metadata, hints[field.name]
            hint = get_args(hint)[0] if isinstance(hint, UnionType) else hint
            several = get_origin(hint) is tuple
            kind = get_args(hint)[0] if several else hint
            choices = f": {', '.join(about['choices'])}" if about["choices"] else ""
            again = "; may be given again" if several and not about["positional"] else ""
            defaults = field.default if isinstance(field.default, tuple) else (field.default,)
            shown = ", ".join(str(value) for value in defaults if value not in (MISSING, None, False))
            help = f"{about['help']}{choices}{again}{f' [{shown}]' if shown else ''}".replace("PLACE", cls.place)
            # A percent sign is an instruction to argparse.
            how: dict[str, Any] = {"help": help.replace("%", "%%")}
            if kind is bool:
                parser.add_argument(_flag(field), dest=field.name, action="store_true", **how)
            elif about["positional"]:
                how |= {"nargs": "+"} if several else {}
                parser.add_argument(field.name, type=kind, metavar=field.name.upper(), **how)
            else:
                how |= {"action": "append"} if several else {}
                parser.add_argument(_flag(field), dest=field.name, type=kind, metavar=kind.__name__.upper(), **how)
        values = vars(parser.parse_intermixed_args(words))
        return cls(**{name: value for name, value in values.items() if value is not None})


def _offered(options: Any) -> list[Field[Any]]:
    return [field for field in fields(options) if field.metadata["offered"]]


def _flag(field: Field[Any]) -> str:
    return field.metadata["flag"] or f"--{field.name.replace('_', '-')}"


@dataclass(frozen=True, kw_only=True)
class WithDevice(Command):
    """A command that needs data, and computes on a device."""

    data_root: Path | None = option(
        None, "where the data set is, and is downloaded to if absent; of folder and file the path", recorded=False
    )
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
