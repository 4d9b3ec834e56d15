"""Prompts as the model reads them: messages written as one text.

A template is named (`data.prompt_template`), or it is the checkpoint's own: then the prompt is a
`Rendered` text, to which the tokenizer adds nothing.
"""

import datetime
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdyn.data.messages import Messages, reply
from jaxdyn.data.source import DataConfig, Example, Source
from jaxdyn.data.templates import LEADS, NAMED, Rendered, render
from jaxdyn.data.tokenizer import Tokenizer
from jaxdyn.types import JaxdynError


class Prompts(Sequence):
    """A source's examples, or those at `places`, with `prompt` and `completion` as texts.

    An example whose prompt was messages keeps them under `messages`.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig,
        tokenizer: Tokenizer,
        places: np.ndarray | None = None,
    ):
        self.source, self.config, self.tokenizer = source, config, tokenizer
        self.places = np.arange(len(source)) if places is None else places

    @property
    def left_out(self) -> dict[str, int]:
        """As `Source.left_out`."""
        return self.source.left_out

    def at(self, places: np.ndarray) -> "Prompts":
        """Those of them at some places."""
        return type(self)(self.source, self.config, self.tokenizer, self.places[places])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = int(self.places[index])
        try:
            return self._written(self.source[place])
        except JaxdynError as error:
            raise JaxdynError(f"data.name {self.config.name}, example {place}: {error}") from error

    def _written(self, example: Example) -> Example:
        return written(example, self.config, self.tokenizer)


def written(example: Example, config: DataConfig, tokenizer: Tokenizer) -> Example:
    """The example with its prompt as the model reads it.

    Raises:
      JaxdynError: if messages have no template, or it fails.
    """
    prompt, name = example["prompt"], config.prompt_template
    text = isinstance(prompt, str)
    if text and name in ("auto", "none"):
        return example
    if name == "none":
        raise JaxdynError("the prompt is a list of messages, and prompt_template is none")
    messages = [{"role": "user", "content": prompt}] if text else prompt
    asked = write(messages, config, tokenizer, tools=example.get("tools"))
    changed: Example = {"prompt": asked, "messages": messages}
    if example.get("completion") is not None:
        answer = reply(example["completion"], "completion")
        lead = "" if answer[:1].isspace() else LEADS.get(name, "")
        changed["completion"] = lead + answer
    return {**example, **changed}


def write(messages: Messages, config: DataConfig, tokenizer: Tokenizer, **options: Any) -> str:
    """Messages as the configured template writes them; `Rendered` if it is the checkpoint's own.

    Raises:
      JaxdynError: if there is none, or it fails.
    """
    name = config.prompt_template
    own = name in ("auto", "chat")
    template = tokenizer.chat_template if own else NAMED[name]
    if template is None:
        raise JaxdynError(
            f"the prompt is a list of messages, and the checkpoint has no chat template: "
            f"prompt_template must be one of {', '.join(NAMED)}, got {name}"
        )
    text = render(
        template,
        messages,
        tokenizer.special_tokens,
        today=datetime.date.fromisoformat(config.template_date),
        options=json.loads(config.chat_template_kwargs),
        **options,
    )
    return Rendered(text) if own else text
