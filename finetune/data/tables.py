"""CSV and Parquet into rows."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from finetune.data.encoding import decode_file
from finetune.data.records import BadRow, Location, Row
from finetune.errors import UserError

FIELD_LIMIT = 2**31 - 1  # the csv module's own limit, 131,072 characters, is below a long document
DELIMITERS = ",\t;"


def read_csv(path: Path, name: str) -> Iterator[Row | BadRow]:
    """Rows of a CSV file with a header line; the delimiter (comma, tab or semicolon) is the header's.

    Quoted fields may span lines; a row's number is the line on which it begins.

    Raises:
        UserError: no usable header, or bytes that are not UTF-8.
    """
    csv.field_size_limit(FIELD_LIMIT)
    text = decode_file(path.read_bytes(), name)
    header_line = next((line for line in io.StringIO(text) if line.strip()), "")
    delimiter = max(DELIMITERS, key=header_line.count)
    # strict: a quote that is never closed is an error instead of swallowing the rest of the file.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        location = Location(name, reader.line_num + 1)
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRow(location, _csv_reason(str(error)))
            continue
        if not any(field.strip() for field in fields):
            continue
        if header is None:
            header = _check_header(fields, name)
        elif len(fields) != len(header):
            yield BadRow(location, f"{len(fields)} fields, the header has {len(header)}")
        else:
            yield Row(dict(zip(header, fields)), location)


def _csv_reason(message: str) -> str:
    if message == "unexpected end of data":
        return "not CSV: a quoted field begins here and is never closed"
    return f"not CSV: {message}"


def _check_header(fields: list[str], name: str) -> list[str]:
    header = [field.strip() for field in fields]
    if "" in header:
        raise UserError(f"{name}: column {header.index('') + 1} of the header has no name")
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise UserError(f"{name}: the header names {', '.join(map(repr, repeated))} twice")
    return header


def read_parquet(path: Path, name: str) -> Iterator[Row | BadRow]:
    """Rows of a Parquet file, a batch at a time.

    Raises:
        UserError: the file is not Parquet or is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
            for columns in batch.to_pylist():
                number += 1
                yield Row(columns, Location(name, number, "row"))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{name}: not a readable Parquet file (after row {number}): {str(error).splitlines()[0]}"
        ) from error
