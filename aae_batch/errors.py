"""All errors that this package raises on purpose. Each message is one sentence that says how to
fix it."""

from __future__ import annotations


class AaeBatchError(Exception):
    """The base class of all errors of this package."""


class SettingsError(AaeBatchError):
    """A setting is unknown, out of range, or does not fit the model."""


class ModelError(AaeBatchError):
    """A model cannot be found, loaded or guided."""


class ManifestError(AaeBatchError):
    """A manifest cannot be read at all. One bad row is a `RowError` instead."""


class OutputError(AaeBatchError):
    """An output root cannot be used: it belongs to another run, or cannot be written."""


class JobError(AaeBatchError):
    """A job stopped before it was complete. The same command resumes it."""


class RowError(AaeBatchError):
    """One row cannot be generated; other rows are not affected.

    Args:
        row: the row's id.
        reason: what is wrong, and how to fix it.
    """

    def __init__(self, row: str, reason: str) -> None:
        super().__init__(row, reason)  # both, so that the error survives pickling
        self.row = row
        self.reason = reason

    def __str__(self) -> str:
        return f"row {self.row}: {self.reason}"


class RequestError(RowError):
    """A value of the row is missing, of the wrong type, or out of range."""


class PromptError(RowError):
    """The prompt is empty, or there is nothing in it to guide."""


class SubjectError(RowError):
    """A subject or token index does not point at a word of the prompt."""


class OccupiedError(RowError):
    """A file that no run wrote has the name of the row's image."""


class NonFiniteError(RowError):
    """Sampling produced NaN or infinity for this row."""


class GivenUpError(RowError):
    """After the guided steps, the attention said that a subject would be missing."""


class NotAcceptedError(RowError):
    """No try of the row was accepted by the run's judges."""


class DroppedError(NotAcceptedError):
    """As `NotAcceptedError`, in a run that drops such rows."""


def counted(count: int, thing: str) -> str:
    """Return `1 row` or `1,234 rows`."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def shown(value: object) -> str:
    """Return a value's `repr` for a message, with the middle left out if it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:120]}...{text[-40:]}"
