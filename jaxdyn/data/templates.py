"""Templates that write messages as the text of a prompt: a checkpoint's own, and some by name.

A chat template is a Jinja program that comes with a checkpoint: other people's, so it runs in a
sandbox (`jaxdyn.data.sandbox`) on the messages and the special tokens' names alone.
"""

import datetime
from collections.abc import Mapping
from functools import cache
from typing import Any

from jaxdyn.data.messages import Messages
from jaxdyn.types import JaxdynError


class Rendered(str):
    """A text that a chat template wrote: the special tokens that it wants, it has already."""

    def __add__(self, other: str) -> "Rendered":
        return Rendered(str.__add__(self, other))


def render(
    template: str,
    messages: Messages,
    special_tokens: Mapping[str, Any],
    *,
    today: datetime.date,
    options: Mapping[str, Any] | None = None,
    tools: list[Any] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The messages as the template writes them, as transformers' apply_chat_template does.

    Args:
      special_tokens: by their names in tokenizer_config.json (`bos_token`, …).
      today: what the template's `strftime_now` tells.
      options: further variables of the template, such as `enable_thinking`.
      add_generation_prompt: end with what begins the assistant's answer.

    Raises:
      JaxdynError: in one line, for a template that does not compile, refuses the messages, fails,
        reaches outside its sandbox or does not end.
    """
    compiled = compile_template(template)
    compiled.environment.begin(today)
    told: dict[str, Any] = {"messages": messages, "tools": tools, "documents": None}
    told |= {**special_tokens, "add_generation_prompt": add_generation_prompt, **(options or {})}
    try:
        return compiled.render(**told)
    except Exception as error:  # whatever a program may raise
        raise JaxdynError(f"the chat template fails: {_line(error)}") from error


@cache
def compile_template(template: str) -> Any:
    """The template with a sandbox of its own; JaxdynError, with the line, if it is not Jinja."""
    from jaxdyn.data.sandbox import Sandbox

    try:
        return Sandbox().from_string(template)
    except Exception as error:  # it may also compute a constant
        where = f"line {error.lineno}: " if hasattr(error, "lineno") else ""
        raise JaxdynError(f"the chat template does not compile: {where}{_line(error)}") from error


def _line(error: Exception) -> str:
    text = getattr(error, "message", None) or str(error) or type(error).__name__
    return f"{' '.join(text.split()):.300}"


# -- for base models ------------------------------------------------------------------------------

PLAIN = "{{ messages | map(attribute='content') | join('\\n\\n') }}"
"""The contents alone, a blank line between two."""

HH = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{ '\\n\\nHuman: ' + message.content }}
{%- elif message.role == 'assistant' -%}
{{ '\\n\\nAssistant: ' + message.content }}
{%- else -%}
{{ message.content }}
{%- endif -%}
{%- endfor -%}
{{ '\\n\\nAssistant:' if add_generation_prompt else '' }}"""
"""Human and Assistant, as the HH-RLHF dialogues are written (Bai et al., arXiv 2204.05862)."""

ALPACA = """\
{%- for message in messages if message.role == 'system' -%}
{{ message.content + '\\n\\n' }}
{%- else -%}
{{ 'Below is an instruction that describes a task' }}
{{- ', paired with an input that provides further context' if messages[0].input else '' }}
{{- '. Write a response that appropriately completes the request.\\n\\n' }}
{%- endfor -%}
{%- for message in messages if message.role != 'system' -%}
{%- if message.role == 'user' and message.input -%}
{{ '### Instruction:\\n' + message.instruction + '\\n\\n### Input:\\n' + message.input + '\\n\\n' }}
{%- elif message.role == 'user' -%}
{{ '### Instruction:\\n' + message.content + '\\n\\n' }}
{%- else -%}
{{ '### Response:\\n' + message.content + '\\n\\n' }}
{%- endif -%}
{%- endfor -%}
{{ '### Response:\\n' if add_generation_prompt else '' }}"""
"""Instruction, input and response, as Alpaca's (Taori et al. 2023)."""

NAMED = {"plain": PLAIN, "hh": HH, "alpaca": ALPACA}
"""Templates for models without one of their own."""

LEADS = {"hh": " "}
"""What stands between such a template's prompt and an answer's text."""
