"""Options made from settings: each field defines the name, type and help text of its option."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, update_wrapper
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import typer
import typer.main
from typer.core import TyperCommand

from aae_batch.cli.common import COMPLETE, errors_in_a_sentence

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from aae_batch.settings import Settings

OWN = "the model's own"
"""Shown as the default of sampling settings, since a model may bring values other than
`GuidanceConfig`'s."""


def job_settings() -> type[Settings]:
    from aae_batch.generate.settings import JobSettings

    return JobSettings


class SettingsCommand:
    """A command that takes some of its options from the fields of a settings model.

    A parameter of `run` without its own `Annotated` stands for the field of the same name, and
    `**settings` stands for all other fields. A nested settings field is replaced by its own fields,
    which are None when not given. The model is imported only when typer asks for the signature.

    What follows "Examples:" in the docstring of `run` is shown as it stands at the end of the help.

    Args:
        run: called with all values by name; returns the exit code.
        model: returns the settings class.
        arguments: fields that are arguments instead of options.
        without: fields that `**settings` omits.
        defaults: replace the model's defaults.
    """

    def __init__(
        self,
        run: Callable[..., int | None],
        model: Callable[[], type[Settings]] = job_settings,
        *,
        arguments: Sequence[str] = (),
        without: Sequence[str] = (),
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        update_wrapper(self, run)
        text, _, examples = inspect.cleandoc(run.__doc__ or "").partition("\n\nExamples:\n")
        self.__doc__, self.examples = text, inspect.cleandoc(examples)
        self._run, self._model = run, model
        self._arguments, self._without, self._defaults = arguments, without, defaults or {}

    def __call__(self, **given: Any) -> None:
        with errors_in_a_sentence():
            raise typer.Exit(self._run(**given) or COMPLETE)

    def with_options_only(self, **defaults: Any) -> SettingsCommand:
        """Return the same command with options in place of arguments, and with other defaults."""
        return SettingsCommand(self._run, self._model, without=self._without, defaults=defaults)

    @cached_property
    def __signature__(self) -> inspect.Signature:
        fields = {parameter.name: parameter for parameter in self._fields(self._model())}
        own = inspect.signature(self._run, eval_str=True).parameters
        parameters: list[inspect.Parameter] = []
        for name, parameter in own.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                left_out = {*own, *self._without}
                parameters += (field for name, field in fields.items() if name not in left_out)
            elif name in fields and get_origin(parameter.annotation) is not Annotated:
                get_args(fields[name].annotation)[1].rich_help_panel = None  # one alone is no group
                parameters.append(fields[name])
            else:
                parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY))
        return inspect.Signature(parameters)

    def _fields(self, model: type[Settings], own: str = "") -> Iterator[inspect.Parameter]:
        inherited = getattr(model.__base__, "model_fields", {})
        for name in sorted(model.model_fields, key=lambda name: name in inherited):
            field = model.model_fields[name]
            if (field.json_schema_extra or {}).get("option") is False:  # type: ignore[union-attr]
                continue
            if hasattr(field.annotation, "model_fields"):
                yield from self._fields(field.annotation, OWN)  # type: ignore[arg-type]
            else:
                yield self._parameter(name, field, own, _group(model, name))

    def _parameter(self, name: str, field: FieldInfo, own: str, group: str) -> inspect.Parameter:
        text, _, unset = (field.description or "").partition(" Default: ")
        unset = unset.rstrip(".") or own
        default = inspect.Parameter.empty if field.is_required() else field.default
        default = self._defaults.get(name, None if unset else default)
        kind = _kind(field.annotation)
        how: dict[str, Any] = {"help": text, "rich_help_panel": group}
        option = typer.Option(**how)
        if (field.json_schema_extra or {}).get("repeatable"):  # type: ignore[union-attr]
            kind = list[kind]  # type: ignore[valid-type]
        if name in self._arguments:
            option = typer.Argument(help=text)
        elif default is False:
            option = typer.Option(f"--{name.replace('_', '-')}", **how)
        elif default is None:
            kind, option = kind | None, typer.Option(**how, show_default=unset or True)
        annotation = Annotated[kind, option]  # type: ignore[valid-type]
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )


def _group(model: type[Settings], name: str) -> str:
    """Return the title under which a field's option is listed: that of the class that declares it."""
    declaring = (kind for kind in model.__mro__ if name in vars(kind).get("__annotations__", {}))
    return next(declaring).group  # type: ignore[attr-defined]


def _kind(annotation: Any) -> Any:
    """Return the type that typer parses: bool, int, float, or str, which the model then parses."""
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    given = [kind for kind in get_args(annotation) or (annotation,) if kind is not NoneType]
    return given[0] if len(given) == 1 and given[0] in (bool, int, float) else str


def settings_command(*models: Callable[[], type[Settings]], **how: Any) -> Any:
    """Decorate a function as a `SettingsCommand`."""
    return lambda run: SettingsCommand(run, *models, **how)


def add_commands(app: typer.Typer, *commands: Callable[..., None]) -> None:
    """Add commands that resolve their options when called, so that listing them imports no settings."""
    for command in commands:

        def listed() -> None: ...

        listed.__name__, listed.__doc__ = command.__name__, command.__doc__
        listed.command = command  # type: ignore[attr-defined]
        app.command(cls=_Listed)(listed)


class _Listed(TyperCommand):
    """The entry of a command in a list of commands."""

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        command = self.callback.command  # type: ignore[union-attr]
        app.command(self.name, cls=_Grouped, epilog=command.examples)(command)
        return typer.main.get_command(app).make_context(info_name, args, parent, **extra)


class _Grouped(TyperCommand):
    """A command whose help lists options by their settings class, and ends with examples as written."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            title = getattr(parameter, "rich_help_panel", None) or "Options"
            if parameter.param_type_name == "argument":
                title = "Arguments"
            if record is not None:
                groups.setdefault(title, []).append(record)
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.splitlines():
                    formatter.write(f"  {line}".rstrip() + "\n")
