"""A row of anybody's file as an example: a prompt, and answers to it where the row has some.

The columns are TRL's: `prompt` and `completion`, `messages`, `chosen` and `rejected`, each as texts
or as messages.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

from jaxdyn.data.files import Rows, line_rows, parquet_rows, rows_of
from jaxdyn.data.jsonl import JsonlFile, require_text, require_unicode
from jaxdyn.data.messages import Messages, reply, require_messages, require_prompt
from jaxdyn.types import JaxdynError

Example = dict[str, Any]
PAIR = ("chosen", "rejected")


def jsonl_examples(file: JsonlFile, split: str) -> Iterator[dict[str, str]]:
    """A file's rows as stored examples: whole as JSON, since a row may hold any fields."""
    return _stored(line_rows, file)


def parquet_examples(file: JsonlFile, split: str) -> Iterator[dict[str, str]]:
    """As `jsonl_examples`, of a Parquet file."""
    return _stored(parquet_rows, file)


def _stored(read: Callable[[str], Rows], file: JsonlFile) -> Iterator[dict[str, str]]:
    return ({"json": as_json(example_of(r, file, where), where)} for r, where in read(file.path))


def read_examples(file: JsonlFile, limit: int) -> tuple[list[Example], bool]:
    """The first `limit` examples of a file (0: all), Parquet or lines, and whether it has more."""
    examples = (example_of(row, file, where) for row, where in rows_of(file.path))
    return list(itertools.islice(examples, limit or None)), next(examples, None) is not None


def as_json(example: Example, where: str) -> str:
    """The example as JSON; JaxdynError for a value that JSON has not, such as a date."""
    try:
        return json.dumps(example)
    except (TypeError, ValueError) as error:
        raise JaxdynError(
            f"{where} holds a value that is neither text nor number: {error}"
        ) from error


def example_of(row: Example, file: JsonlFile, where: str) -> Example:
    """The row with `prompt`, a text or messages, and `completion` and a preference as texts.

    The prompt is the row's `prompt_field`. A row without a field `prompt` may have `messages`, of
    which the last is the completion if it is the assistant's, or two conversations, `chosen` and
    `rejected`, that differ in the last message.

    Raises:
      JaxdynError: naming `where`, for a field that is missing, empty or of another kind, messages
        out of order, or a preference between equals.
    """
    field = file.prompt_field
    if field == "prompt" and field not in row:
        field = next(
            (name for name in ("messages", "chosen") if isinstance(row.get(name), list)), field
        )
    place, prompt = f"{where}: {field!r}", row.get(field)
    if isinstance(prompt, list) and field == "prompt":
        changed: Example = {"prompt": require_prompt(prompt, place)}
    elif isinstance(prompt, list):
        changed = divided(require_messages(prompt, place), place)
    else:
        changed = {"prompt": require_text(row, field, "prompt", where)}
    if file.completion_field is not None and not isinstance(row.get(file.completion_field), list):
        changed["completion"] = require_text(row, file.completion_field, "completion", where)
    elif isinstance(answer := row.get(file.completion_field or "completion"), list):
        changed["completion"] = reply(answer, f"{where}: {file.completion_field or 'completion'!r}")
    if all(name in row for name in PAIR):
        changed |= preference_of(row, changed["prompt"], where)
    for text in texts_of(changed):
        require_unicode(text, where)
    return {**row, **changed}


def divided(messages: Messages, where: str) -> Example:
    """A conversation as the prompt and, if the assistant has the last word, the completion."""
    if messages[-1]["role"] != "assistant":
        return {"prompt": require_prompt(messages, where)}
    prompt = require_prompt(messages[:-1], where)
    return {"prompt": prompt, "completion": reply(messages[-1:], where)}


def preference_of(row: Example, prompt: str | Messages, where: str) -> Example:
    """Two answers to the prompt as texts, the `chosen` and the `rejected`.

    Raises:
      JaxdynError: if one is missing or they are equal, or a conversation begins otherwise.
    """
    found = {}
    for name in PAIR:
        value, place = row.get(name), f"{where}: {name!r}"
        if not isinstance(value, list):
            found[name] = require_text(row, name, name, where)
            continue
        messages = require_messages(value, place) if len(value) != 1 else value
        if messages[1:] and isinstance(prompt, list) and messages[:-1] != prompt:
            raise JaxdynError(f"{place} does not begin with the prompt's messages")
        found[name] = reply(messages[-1:], place)
    if found["chosen"] == found["rejected"]:
        raise JaxdynError(f"{where}: 'chosen' and 'rejected' are equal: {found['chosen']!r:.60}")
    return found


def texts_of(example: Example) -> Iterator[str]:
    """All texts of an example's prompt and answers."""
    for value in example.values():
        for part in value if isinstance(value, list) else [value]:
            text = part.get("content") if isinstance(part, dict) else part
            if isinstance(text, str):
                yield text
