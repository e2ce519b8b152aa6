"""MLflow's scoring protocol: the bodies that `POST /invocations` takes, as texts, and the answers it gives.

The same forms as `mlflow models serve` (https://mlflow.org/docs/latest/ml/deployment/deploy-model-locally/), which
answers a body it cannot read with a traceback; here every such body is a `Refused` with one sentence.
"""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson

JSON, CSV = "application/json", "text/csv"
ENCODINGS = ("", "charset=utf-8", 'charset="utf-8"')
"""Parameters of a content type that are understood."""
TEXT = "text"
"""The column that is read where there are several."""


class Refused(Exception):
    """A request that cannot be answered: the HTTP status and MLflow's error code of what is wrong with it."""

    def __init__(self, message: str, status: int = 400, code: str = "BAD_REQUEST") -> None:
        super().__init__(message)
        self.status, self.code = status, code


def texts_of(body: bytes, content_type: str) -> list[str]:
    """The texts of a request. Raises Refused, 415 for a content type and 400 for a body that cannot be read."""
    kind, *parameters = (part.strip().lower() for part in content_type.split(";"))
    if kind not in (JSON, CSV) or any(parameter not in ENCODINGS for parameter in parameters):
        raise Refused(f"Content-Type {content_type!r}: send {JSON} or {CSV}, in UTF-8", 415, "UNSUPPORTED_MEDIA_TYPE")
    return _json_texts(body) if kind == JSON else _csv_texts(body)


def _json_texts(body: bytes) -> list[str]:
    try:
        record = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Refused(f"not valid JSON: {error}") from error
    given = [name for name in FORMS if isinstance(record, dict) and name in record]
    if len(given) != 1:
        raise Refused(f"a JSON object with exactly one of {', '.join(FORMS)} is needed: {EXAMPLE}")
    [form] = given
    return FORMS[form](record[form], form)


def _list(value: Any, form: str) -> list[str]:
    """Texts, or records with a text in them; or columns of them."""
    if isinstance(value, dict):
        return _checked(value[_column(list(value), form)], form)
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return _records(value, form)
    return _checked(value, form)


def _records(value: Any, form: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        raise Refused(f'{form}: a list of objects is needed, such as [{{"{TEXT}": "a text"}}]')
    column = _column(list({name: None for record in value for name in record}), form) if value else TEXT
    return _checked([record.get(column) for record in value], form)


def _split(value: Any, form: str) -> list[str]:
    table = value if isinstance(value, dict) else {}
    rows, columns = table.get("data"), table.get("columns", [TEXT])
    if not isinstance(rows, list) or not isinstance(columns, list) or not all(_fits(row, columns) for row in rows):
        raise Refused(f"{form}: columns and, row by row, data are needed: {SPLIT_EXAMPLE}")
    place = columns.index(_column(columns, form))
    return _checked([row[place] for row in rows], form)


def _fits(row: Any, columns: Sequence[Any]) -> bool:
    return isinstance(row, list) and len(row) == len(columns)


def _csv_texts(body: bytes) -> list[str]:
    """A table with a header, as `DataFrame.to_csv` writes one, with or without its nameless index."""
    csv.field_size_limit(len(body) + 1)
    try:
        rows = list(csv.reader(io.StringIO(body.decode("utf-8"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise Refused(f"not valid CSV in UTF-8: {error}") from error
    rows = [row for row in rows if row]
    if not rows:
        raise Refused(f"CSV: a header is needed, such as {TEXT}")
    place = rows[0].index(_column(rows[0], "CSV"))
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(rows[0]):
            raise Refused(f"CSV: record {number} has {len(row)} fields, the header {len(rows[0])}")
    return [row[place] for row in rows[1:]]


def _column(columns: Sequence[Any], form: str) -> Any:
    """The one called `text`, or else the only one that has a name."""
    named = [TEXT] if TEXT in columns else [name for name in columns if name != ""]
    if len(named) != 1:
        raise Refused(f"{form}: a column {TEXT!r}, or a single column, is needed; there are {list(columns)!r:.200}")
    return named[0]


def _checked(texts: Any, form: str) -> list[str]:
    if not isinstance(texts, list):
        raise Refused(f"{form}: a list of texts is needed: {EXAMPLE}")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise Refused(f"{form}: number {number} is {text!r:.60}, not a text")
    return texts


FORMS: Mapping[str, Callable[[Any, str], list[str]]] = {
    "inputs": _list,
    "instances": _list,
    "dataframe_records": _records,
    "dataframe_split": _split,
}
EXAMPLE = '{"inputs": ["a text", "another"]}'
SPLIT_EXAMPLE = '{"columns": ["text"], "data": [["a text"]]}'
