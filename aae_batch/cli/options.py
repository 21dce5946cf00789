"""Options made from settings: a model's field says what its option is called, takes and means."""

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
"""The default of sampling settings, since a model may bring other values than `GuidanceConfig` has."""


def job_settings() -> type[Settings]:
    from aae_batch.generate.settings import JobSettings

    return JobSettings


class SettingsCommand:
    """A command some of whose options are fields of settings, in the form that typer takes.

    A parameter of `run` without an `Annotated` of its own is the field of its name. `**settings` are
    all the other fields; in place of a field that holds settings itself, there are its own fields, None
    where they are not given. The model is imported when typer asks for the signature, not before.

    Args:
        run: is called with all values by name, and returns the exit code.
        model: returns the class of the settings.
        arguments: fields that are arguments, not options.
        without: fields that `**settings` leaves out.
        defaults: in place of the model's.
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
        self._run, self._model = run, model
        self._arguments, self._without, self._defaults = arguments, without, defaults or {}

    def __call__(self, **given: Any) -> None:
        with errors_in_a_sentence():
            raise typer.Exit(self._run(**given) or COMPLETE)

    def with_options_only(self, **defaults: Any) -> SettingsCommand:
        """The same with an option in place of each argument, and with other defaults."""
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
                yield self._parameter(name, field, own)

    def _parameter(self, name: str, field: FieldInfo, own: str) -> inspect.Parameter:
        text, _, unset = (field.description or "").partition(" Default: ")
        unset = unset.rstrip(".") or own
        default = inspect.Parameter.empty if field.is_required() else field.default
        default = self._defaults.get(name, None if unset else default)
        kind, option = _kind(field.annotation), typer.Option(help=text)
        if name in self._arguments:
            option = typer.Argument(help=text)
        elif default is False:
            option = typer.Option(f"--{name.replace('_', '-')}", help=text)
        elif default is None:
            kind, option = kind | None, typer.Option(help=text, show_default=unset or True)
        annotation = Annotated[kind, option]  # type: ignore[valid-type]
        return inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )


def _kind(annotation: Any) -> Any:
    """What typer is to make of the text: a number, a flag, or text still, which the model reads."""
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    given = [kind for kind in get_args(annotation) or (annotation,) if kind is not NoneType]
    return given[0] if len(given) == 1 and given[0] in (bool, int, float) else str


def settings_command(*models: Callable[[], type[Settings]], **how: Any) -> Any:
    """Decorates a function, as `SettingsCommand` takes it."""
    return lambda run: SettingsCommand(run, *models, **how)


def add_commands(app: typer.Typer, *commands: Callable[..., None]) -> None:
    """Add commands that get their options when they are called: a list of them needs no settings."""
    for command in commands:

        def listed() -> None: ...

        listed.__name__, listed.__doc__ = command.__name__, command.__doc__
        listed.command = command  # type: ignore[attr-defined]
        app.command(cls=_Listed)(listed)


class _Listed(TyperCommand):
    """A command as a list of commands shows it."""

    def make_context(self, info_name: Any, args: Any, parent: Any = None, **extra: Any) -> Any:
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(self.name)(self.callback.command)  # type: ignore[union-attr]
        return typer.main.get_command(app).make_context(info_name, args, parent, **extra)
