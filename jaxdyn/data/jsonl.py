"""The user's own prompts as texts: one JSON object a line."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from jaxdyn.data.files import line_rows
from jaxdyn.types import JaxdynError


@dataclasses.dataclass(frozen=True)
class JsonlFile:
    """A file of rows, and which of their fields hold the prompt and the supervised completion."""

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
    return (require_texts(row, fields, where) for row, where in line_rows(file.path))


def read_rows(file: JsonlFile, limit: int) -> tuple[list[dict[str, Any]], bool]:
    """The first `limit` rows (0: all), and whether there are more; see `read_jsonl`."""
    rows = read_jsonl(file)
    return list(itertools.islice(rows, limit or None)), next(rows, None) is not None


def require_texts(row: dict[str, Any], fields: dict[str, str], where: str) -> dict[str, Any]:
    """The row with each role's text from the field that holds it.

    Raises:
      JaxdynError: if a field is missing, or is not a non-empty text.
    """
    return {**row, **{role: require_text(row, name, role, where) for role, name in fields.items()}}


def require_text(row: dict[str, Any], field: str, role: str, where: str) -> str:
    """The non-empty text of a field that has a role; JaxdynError if it holds none."""
    if field not in row:
        raise JaxdynError(
            f"{where} has no field {field!r} for the {role}; it has {', '.join(row) or 'none'}"
        )
    value = row[field]
    if not isinstance(value, str) or not value:
        raise JaxdynError(f"{where}: {field!r} should be a non-empty text, got {value!r:.60}")
    return require_unicode(value, f"{where}: {field!r}")


def require_unicode(value: str, where: str) -> str:
    """The text; JaxdynError for one that holds half a character."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise JaxdynError(f"{where} is not valid Unicode: {error}") from error
    return value
