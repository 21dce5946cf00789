"""The base of all settings models, whose values come from a user or a file and are validated.

Each setting is declared once, as a field: its name, type, limits, default and description also
define its command-line option (`aae_batch.cli.options`). If the default is None, the description
ends with "Default: " and what None stands for.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from aae_batch.errors import SettingsError


class Settings(BaseModel):
    """Immutable settings.

    Raises:
        SettingsError: a value is unknown or out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    what: ClassVar[str] = "setting"
    """What error messages call the values."""
    group: ClassVar[str] = "Options"
    """The title of the options that a class declares, in a command's help."""

    def __init__(self, **values) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError(_in_a_sentence(error, self.what)) from None


def _in_a_sentence(error: ValidationError, what: str) -> str:
    parts = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"])
        parts.append(f"{name}: {problem['msg']} (got {problem['input']!r})")
    return f"Invalid {what}: {'; '.join(parts)}."
