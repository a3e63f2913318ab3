"""Every leaf of tuning.yaml as an option of `sere tune`: its flag, what `--help` says of it, and its value read back.

`search.deviceHours` is `--search-device-hours`. Types, bounds and defaults are read from the spec's models, so that help
and file cannot come apart. Pydantic-settings makes flags of a model too, but its help says `default: None` where words are
needed, shows no bounds, names every flag twice and reads no file beside them, so the help is made here.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import groupby
from typing import Annotated, Any, Literal

import typer
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from sere_autotune.tuning.file import yaml_problem
from sere_autotune.tuning.spec import TuningSpec
from sere_ext.contract.errors import UsageError
from sere_ext.contract.record import Unset

REQUIRED = "required"
_SHOWN_UP_TO = 100_000  # bounds above this only keep out typing errors; help leaves them out


@dataclass(frozen=True)
class Leaf:
    """One option: its place in the file, and what its help says."""

    path: tuple[str, ...]
    type: str  # as help shows it: `<int>`, `random|tpe`
    description: str
    bounds: str  # `x>=1`, or nothing
    default: str  # words where the model has no value; REQUIRED where one must be given

    @property
    def flag(self) -> str:
        return "--" + "-".join("".join("-" + c.lower() if c.isupper() else c for c in part) for part in self.path)

    @property
    def name(self) -> str:
        """Name of the command's parameter."""
        return "_".join(self.path).lower()

    @property
    def notes(self) -> str:
        bounds = f"[{self.bounds}] " if self.bounds else ""
        return bounds + (f"[{REQUIRED}]" if self.default == REQUIRED else f"[default: {self.default}]")


def leaves() -> list[Leaf]:
    """Every option of the tuning file. Sections are split into their fields; a list is one option."""
    return list(_leaves(TuningSpec, (), "", None))


def _leaves(model: type[BaseModel], path: tuple[str, ...], section_text: str, defaults: BaseModel | None) -> Iterator[Leaf]:
    """The options of one section.

    Args:
        section_text: the description of the section itself; each option has its own default.
        defaults: the section's value where the file leaves it out; None: it has none.
    """
    for name, field in model.model_fields.items():
        here = (*path, field.alias or name)
        description = ", ".join(part for part in (section_text.partition(". Default:")[0], field.description) if part)
        default = getattr(defaults, name) if defaults is not None else None if field.is_required() else field.default
        options = typing.get_args(field.annotation) if _is_union(field.annotation) else (field.annotation,)
        section = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if section is not None:
            yield from _leaves(section, here, description, default)
        else:
            yield Leaf(here, _type(options), description, _bounds(field), _default(field, default))


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (types.UnionType, typing.Union)


def _type(options: tuple[Any, ...]) -> str:
    kind = next(o for o in options if o is not type(None))
    origin = typing.get_origin(kind)
    if origin is Literal:
        return "|".join(typing.get_args(kind))
    return "<list>" if origin is tuple else f"<{kind.__name__}>"


def _bounds(field: FieldInfo) -> str:
    """A field's bounds as typer writes them: `x>=1`, `0.5<x<1`."""
    low = high = ""
    for limit in field.metadata:
        for name, mark in (("ge", "<="), ("gt", "<"), ("le", "<="), ("lt", "<")):
            value = getattr(limit, name, None)
            if isinstance(value, int | float) and value <= _SHOWN_UP_TO:
                if name.startswith("g"):
                    low = f"{value:g}{mark}"
                else:
                    high = f"{mark}{value:g}"
    if low and not high:
        number, mark = low.rstrip("<="), ">=" if low.endswith("=") else ">"
        return f"x{mark}{number}"
    return f"{low}x{high}" if low or high else ""


def _default(field: FieldInfo, default: Any) -> str:
    unset = next((note.text for note in field.metadata if isinstance(note, Unset)), "")
    if default == ():
        return "none"
    if default in (None, ""):
        assert unset or field.is_required(), f"{field} needs an Unset that says what holds without it"
        return unset or REQUIRED
    return _shown(default)


def _shown(value: Any) -> str:
    """A value as one writes it after a flag, in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(_shown(one) for one in value) + "]"
    if isinstance(value, Enum):
        return str(value.value)
    return f"{value:g}" if isinstance(value, float) else str(value)


class LeavesCommand(TyperCommand):
    """A command whose help ends with the tuning file's options, a panel for each section.

    Typer's own panels give flag, type and help a third of the width each, and cut off long flags at 80 columns.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        console = Console()
        in_order = sorted(leaves(), key=lambda leaf: len(leaf.path) > 1)  # what stands in no section comes first
        for section, group in groupby(in_order, key=lambda leaf: leaf.path[0] if len(leaf.path) > 1 else ""):
            table = Table.grid(padding=(0, 2, 0, 0), expand=True)
            table.add_column(no_wrap=True)
            table.add_column(ratio=1)
            for leaf in group:
                option = Text.assemble((leaf.flag, "bold cyan"), " ", (leaf.type, "bold yellow"))
                table.add_row(option, Text.assemble(leaf.description, " ", (leaf.notes, "dim")))
            title = f"tuning.yaml: {section}" if section else "tuning.yaml"
            console.print(Panel(table, title=title, title_align="left", border_style="dim"))


def with_leaves(command: Callable[..., None]) -> Callable[..., None]:
    """A command with one option for each leaf of the tuning file in place of its `**options`; LeavesCommand shows their help."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    hints = typing.get_type_hints(command, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    shown = [p.replace(kind=kind, annotation=hints[p.name]) for p in own]
    for leaf in leaves():
        option = Annotated[str | None, typer.Option(leaf.flag, hidden=True)]
        shown.append(inspect.Parameter(leaf.name, kind, default=None, annotation=option))

    def wrapper(**values: Any) -> None:
        command(**values)

    wrapper.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in shown}
    wrapper.__name__ = command.__name__
    return wrapper


def overrides(options: dict[str, str | None]) -> dict[tuple[str, ...], Any]:
    """The values of the options that were given, by place in the file, read as YAML so that lists and numbers work.

    Raises:
        UsageError: a value is not YAML.
    """
    found: dict[tuple[str, ...], Any] = {}
    for leaf in leaves():
        text = options.get(leaf.name)
        if text is not None:
            try:
                found[leaf.path] = yaml.safe_load(text)
            except yaml.YAMLError as error:
                raise UsageError(
                    f"{leaf.flag} {text}: cannot be read as YAML ({yaml_problem(error)}); lists are [a, b], and quotes may help"
                ) from error
            if leaf.type == "<str>" and isinstance(found[leaf.path], int | float):
                found[leaf.path] = text  # a folder named 7, a revision of digits
    return found
