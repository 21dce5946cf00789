"""What every model of settings shares: its values come from a person or a file, and are checked.

A setting is said once, as a field: its name, type, limits, default and description are also those of
its option on the command line (`aae_batch.cli.options`). What a default of None stands for is said at
the end of the description, after "Default: ".
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

    model_config = ConfigDict(frozen=True, extra="forbid")
    what: ClassVar[str] = "setting"
    """What the values are, in an error."""

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
