"""Conversations: a list of messages, each an object with a `role` and a `content`."""

from typing import Any

from jaxdyn.types import JaxdynError

Messages = list[dict[str, Any]]

OPENING = ("system", "developer")
FOLLOWS = {
    "user": (*OPENING, "assistant", "tool", None),
    "assistant": ("user", "tool", *OPENING, None),
    "tool": ("assistant", "tool"),
}
"""What may come before a role's message; None is the start."""
ROLES = (*OPENING, *FOLLOWS)


def require_messages(value: Any, where: str) -> Messages:
    """`value`, if it is a conversation: at most one opening instruction, then turn and turn about.

    A message of the assistant that calls tools needs no text.

    Raises:
      JaxdynError: naming `where` and the message, if it has no role or text, or is out of order.
    """
    if not isinstance(value, list) or not value:
        raise JaxdynError(f"{where} should be a list of messages, got {value!r:.60}")
    before = None
    for number, message in enumerate(value, start=1):
        place = f"{where}, message {number}"
        if not isinstance(message, dict):
            raise JaxdynError(
                f"{place} should be an object with role and content, not {message!r:.60}"
            )
        role = message.get("role")
        if role not in ROLES:
            known = ", ".join(ROLES)
            raise JaxdynError(f"{place}: role should be one of {known}, got {role!r:.60}")
        if not (isinstance(message.get("content"), str) or message.get("tool_calls")):
            raise JaxdynError(
                f"{place}: content should be a text, got {message.get('content')!r:.60}"
            )
        if role in OPENING and before is not None:
            raise JaxdynError(f"{place} is out of order: {role} belongs to the beginning")
        if role in FOLLOWS and before not in FOLLOWS[role]:
            after = "the beginning" if before is None else before
            raise JaxdynError(f"{place} is out of order: {role} after {after}")
        before = role
    return value


def require_prompt(value: Any, where: str) -> Messages:
    """`value`, if it is a conversation that the assistant is to go on with.

    Raises:
      JaxdynError: as `require_messages`, and if the last message is not the user's or a tool's.
    """
    messages = require_messages(value, where)
    last = messages[-1]["role"]
    if last not in ("user", "tool"):
        raise JaxdynError(f"{where}: the last message should be the user's, got {last}'s")
    return messages


def reply(value: Any, where: str) -> str:
    """The text of an answer, given as a text or as a conversation's one last message.

    Raises:
      JaxdynError: if it is neither.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        role, content = value[0].get("role"), value[0].get("content")
        if role == "assistant" and isinstance(content, str):
            return content
    raise JaxdynError(
        f"{where} should be a text, or a list of one message of the assistant's, got {value!r:.60}"
    )
