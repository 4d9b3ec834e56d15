"""The user's own prompts: one JSON object a line."""

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxdyn.types import JaxdynError


@dataclasses.dataclass(frozen=True)
class JsonlFile:
    """A JSONL file, and which of its fields hold the prompt and the supervised completion."""

    path: str
    prompt_field: str = "prompt"
    completion_field: str | None = None


def read_jsonl(file: JsonlFile) -> Iterator[dict[str, Any]]:
    """Each row with all of its fields, and `prompt` and `completion` set from the named ones.

    Blank lines are skipped. Raises JaxdynError, with the path and the line's number from 1, for a
    missing, unreadable or empty file, a line that is not a JSON object in UTF-8, a missing field,
    and a prompt or completion that is not a non-empty text.
    """
    fields = {"prompt": file.prompt_field}
    if file.completion_field is not None:
        fields["completion"] = file.completion_field
    empty = True
    try:
        with Path(file.path).open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _row(line, fields, f"{file.path}, line {number}")
                    empty = False
    except OSError as error:
        raise JaxdynError(f"cannot read {file.path}: {error.strerror or error}") from error
    if empty:
        raise JaxdynError(f"{file.path} is empty: wanted one JSON object a line")


def read_rows(file: JsonlFile, limit: int) -> tuple[list[dict[str, Any]], bool]:
    """The first `limit` rows (0: all), and whether there are more; see `read_jsonl`."""
    rows = read_jsonl(file)
    return list(itertools.islice(rows, limit or None)), next(rows, None) is not None


def stored_rows(file: JsonlFile, split: str) -> Iterator[dict[str, str]]:
    """Each row whole as JSON, since a row may hold any fields; a file has one split."""
    return ({"json": json.dumps(row)} for row in read_jsonl(file))


def _row(line: bytes, fields: dict[str, str], where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise JaxdynError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise JaxdynError(f"{where} should hold a JSON object, not {type(row).__name__}")
    return require_texts(row, fields, where)


def require_texts(row: dict[str, Any], fields: dict[str, str], where: str) -> dict[str, Any]:
    """The row with each role's text from the field that holds it.

    Raises:
      JaxdynError: if a field is missing, or is not a non-empty text.
    """
    values = {}
    for role, field in fields.items():
        if field not in row:
            raise JaxdynError(
                f"{where} has no field {field!r} for the {role}; it has {', '.join(row) or 'none'}"
            )
        value = row[field]
        if not isinstance(value, str) or not value:
            raise JaxdynError(f"{where}: {field!r} should be a non-empty text, got {value!r:.60}")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise JaxdynError(f"{where}: {field!r} is not valid Unicode: {error}") from error
        values[role] = value
    return {**row, **values}
