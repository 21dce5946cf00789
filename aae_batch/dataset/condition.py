"""SQL expressions over the columns of a row, evaluated by DuckDB."""

from __future__ import annotations

import re
from functools import cache
from typing import ClassVar

import numpy as np
import pyarrow as pa

from aae_batch.errors import SettingsError, shown

_PLACE = "the row's place"
_VALUE = "its value"


class Expression:
    """A SQL expression, which cannot access files, settings or other tables.

    Two parses ensure that it is single and complete.

    Args:
        option: the option that gave it, for messages.

    Raises:
        SettingsError: the text is not an expression, or DuckDB is not installed.
    """

    what: ClassVar[str] = "an expression over a row's columns"

    def __init__(self, text: str, option: str = "--where") -> None:
        try:
            import duckdb
        except ImportError:
            raise SettingsError(f"{option} needs DuckDB: pip install duckdb.") from None
        self.text, self.option = text, option
        self._connection = duckdb.connect(
            ":memory:",
            config={
                "enable_external_access": "false",
                "python_enable_replacements": "false",
                "lock_configuration": "true",
            },
        )
        self._error = duckdb.Error
        self._knows = cache(self._has_type)
        try:
            duckdb.SQLExpression(text)
            # The brackets have their own lines, so that a trailing comment cannot hide the closing one.
            self._expression = duckdb.SQLExpression(f"(\n{text}\n)")
        except duckdb.Error as error:
            raise self._refused(error) from None

    def _table(self, rows: pa.Table):
        """Return the columns that DuckDB knows, with the rows' places."""
        places = pa.array(np.arange(rows.num_rows))
        known = rows.select([column.name for column in rows.schema if self._knows(column.type)])
        return self._connection.from_arrow(known.append_column(_PLACE, places))

    def _has_type(self, kind: pa.DataType) -> bool:
        """Return whether DuckDB supports a type; a manifest's extra columns may have any."""
        try:
            self._connection.from_arrow(pa.schema([("column", kind)]).empty_table())
        except self._error:
            return False
        return True

    def _refused(self, error: Exception) -> SettingsError:
        reason = str(error).split("\n\nLINE")[0].replace("\n", " ")
        return SettingsError(f"{self.option} {shown(self.text)} is not {self.what}: {reason}")


class Condition(Expression):
    """A condition on a row, e.g. `final_loss < 0.5 AND neglected IS NOT TRUE`."""

    what = 'a condition on a row\'s columns, such as "final_loss < 0.5 AND neglected IS NOT TRUE"'

    def admits(self, rows: pa.Table) -> np.ndarray:
        """Return which rows satisfy the condition: bool [rows].

        Raises:
            SettingsError: the condition does not fit the columns.
        """
        try:
            found = self._table(rows).filter(self._expression).project(f'"{_PLACE}"').fetchall()
        except self._error as error:
            raise self._refused(error) from None
        return np.isin(np.arange(rows.num_rows), found)


class Value(Expression):
    """A number or a truth of a row, e.g. `clip.min_subject >= 0.25`."""

    what = "a number or a condition over a row's scores, such as clip.min_subject >= 0.25"
    kinds: ClassVar[str] = r"BOOLEAN|\w*INT(EGER)?|FLOAT|DOUBLE|DECIMAL\(.*\)"

    def of(self, rows: pa.Table) -> np.ndarray:
        """Return the value of every row, 1 for true, NaN for null: float64 [rows].

        Raises:
            SettingsError: the expression does not fit the columns, or has another type.
        """
        import duckdb

        place = duckdb.ColumnExpression(_PLACE)
        try:
            found = self._table(rows).select(place, self._expression.alias(_VALUE))
            kind = str(found.types[1]) if len(found.types) == 2 else "a list of columns"
            if not re.fullmatch(self.kinds, kind):
                raise self._refused(TypeError(f"it is {kind}"))
            read = found.fetchall()
        except self._error as error:
            raise self._refused(error) from None
        values = np.full(rows.num_rows, np.nan)
        for place, value in read:
            values[place] = np.nan if value is None else float(value)
        return values


class Truth(Value):
    """A condition that may be unknown, e.g. `detector.all_found`."""

    what = 'a condition on a row\'s scores, such as "detector.all_found"'
    kinds = "BOOLEAN"
