"""A file of the user's own: which of its fields are read, and that they hold texts."""

import dataclasses
from typing import Any

from jaxdyn.storage.reading import shown
from jaxdyn.types import JaxdynError

LONGEST_TEXT = 2**20
"""The most characters of a text: to tokenize one takes some hundred bytes each."""


@dataclasses.dataclass(frozen=True)
class JsonlFile:
    """A file of rows, and which of their fields hold the prompt and the supervised completion."""

    path: str
    prompt_field: str = "prompt"
    completion_field: str | None = None


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
            f"{where} has no field {field!r} for the {role}; it has {', '.join(row) or 'none':.200}"
        )
    value = row[field]
    if not isinstance(value, str) or not value:
        raise JaxdynError(f"{where}: {field!r} should be a non-empty text, got {shown(value)}")
    return require_unicode(value, f"{where}: {field!r}")


def require_unicode(value: str, where: str) -> str:
    """The text; JaxdynError for one that holds half a character, or is longer than any prompt."""
    if len(value) > LONGEST_TEXT:
        raise JaxdynError(f"{where} has {len(value)} characters; a text has at most {LONGEST_TEXT}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise JaxdynError(f"{where} is not valid Unicode: {error}") from error
    return value
