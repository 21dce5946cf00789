"""`--where`: a SQL condition on one row, evaluated by DuckDB."""

from __future__ import annotations

from functools import cache

import numpy as np
import pyarrow as pa

from aae_batch.errors import SettingsError, shown

_PLACE = "the row's place"


class Condition:
    """A SQL expression over the columns of a row, e.g. `final_loss < 0.5 AND neglected IS NOT TRUE`.

    Two parses ensure that it is a single complete expression. It cannot access files, settings or
    other tables.

    Raises:
        SettingsError: the text is not an expression, or DuckDB is not installed.
    """

    def __init__(self, text: str) -> None:
        try:
            import duckdb
        except ImportError:
            raise SettingsError("--where needs DuckDB: pip install duckdb.") from None
        self.text = text
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

    def admits(self, rows: pa.Table) -> np.ndarray:
        """Return which rows satisfy the condition: bool [rows].

        Raises:
            SettingsError: the condition does not fit the columns.
        """
        places = pa.array(np.arange(rows.num_rows))
        known = rows.select([column.name for column in rows.schema if self._knows(column.type)])
        table = self._connection.from_arrow(known.append_column(_PLACE, places))
        try:
            found = table.filter(self._expression).project(f'"{_PLACE}"').fetchall()
        except self._error as error:
            raise self._refused(error) from None
        return np.isin(np.arange(rows.num_rows), found)

    def _has_type(self, kind: pa.DataType) -> bool:
        """Return whether DuckDB supports a type; a manifest's extra columns may have any."""
        try:
            self._connection.from_arrow(pa.schema([("column", kind)]).empty_table())
        except self._error:
            return False
        return True

    def _refused(self, error: Exception) -> SettingsError:
        reason = str(error).split("\n\nLINE")[0].replace("\n", " ")
        return SettingsError(
            f"--where {shown(self.text)} is not a condition on a row's columns, such as \"final_loss < "
            f'0.5 AND neglected IS NOT TRUE": {reason}'
        )
