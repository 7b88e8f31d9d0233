"""Arrow batches as records of Python values, one bad value at a time.

`records` gives for each row a dict, or the `RecordError` that says what of it cannot be read. Times, dates and
durations beyond Python's range become text such as ``4611686018427387904 duration[s]``. Knows nothing of files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from compress.data.plain import RecordError, shown

UNREADABLE = (ValueError, OverflowError, TypeError, ArithmeticError, LookupError, pa.ArrowException)


def doubled(schema: pa.Schema) -> str | None:
    """A column name that stands twice, of which a dict would hold one; None when there is none."""
    return next((name for name, count in Counter(schema.names).items() if count > 1), None)


def records(batch: pa.RecordBatch | pa.Table) -> Iterator[dict[str, Any] | RecordError]:
    """The rows of ``batch``, whose column names differ; a row with a value that cannot be read is its error."""
    columns = [_column(batch.column(at)) for at in range(batch.num_columns)]
    for row in range(batch.num_rows):
        found: dict[str, Any] = {}
        for name, values in zip(batch.schema.names, columns, strict=True):
            value = values[row]
            if isinstance(value, RecordError):
                yield RecordError(f"{shown(name)}: {value.got}", value.allowed, value.do)
                break
            found[name] = value
        else:
            yield found


def _column(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Values of a column; where one cannot be read, each by itself."""
    try:
        values: list[Any] = column.to_pylist()
    except UNREADABLE:
        return [_value_or_error(scalar) for scalar in column]
    return values


def _value_or_error(scalar: pa.Scalar) -> Any:
    try:
        return _value(scalar)
    except RecordError as error:
        return error
    except UNREADABLE as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        return RecordError(f"a value of type {scalar.type} cannot be read ({shown(first, 100)})")


def _value(scalar: pa.Scalar) -> Any:
    """The Python value of ``scalar``; inside lists and structs value by value."""
    try:
        return scalar.as_py()
    except UNREADABLE as error:
        if isinstance(error, UnicodeDecodeError):
            raise RecordError("text that is not valid UTF-8", "UTF-8 text", "Write the file anew") from None
        if isinstance(scalar, pa.StructScalar):
            pairs = list(scalar.items())  # unlike a dict it keeps two fields of one name
            fields = {name: _value(item) for name, item in pairs}
            if len(fields) < len(pairs):
                raise RecordError("two fields of a struct have one name", "different names") from None
            return fields
        if isinstance(scalar, (pa.ListScalar, pa.MapScalar)):
            return [_value(item) for item in scalar.values]
        if isinstance(scalar, pa.DictionaryScalar):
            return _value(scalar.value)
        if pa.types.is_temporal(scalar.type):
            return f"{scalar.value} {scalar.type}"
        raise
