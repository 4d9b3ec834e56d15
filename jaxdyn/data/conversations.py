"""A prompt with an answer to it as one text, and as the tokens that a reward model reads.

A checkpoint's own template writes the whole conversation, the answer's end included. Where a
template for base models writes the prompt, or the prompt is a text, the answer follows it and a
stop token follows that.
"""

from collections.abc import Sequence

from jaxdyn.data.messages import Messages
from jaxdyn.data.prompts import write, written
from jaxdyn.data.source import DataConfig
from jaxdyn.data.templates import Rendered
from jaxdyn.data.tokenizer import Tokenizer


def conversation(
    prompt: str | Messages, answer: str, config: DataConfig, tokenizer: Tokenizer
) -> str:
    """The text of a prompt, a text or messages, and its answer.

    Raises:
      JaxdynError: as `written`.
    """
    example = written({"prompt": prompt, "completion": answer}, config, tokenizer)
    if not isinstance(example["prompt"], Rendered):
        return example["prompt"] + example["completion"]
    whole = [*example["messages"], {"role": "assistant", "content": answer}]
    return write(whole, config, tokenizer, add_generation_prompt=False)


def conversation_lengths(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """How many tokens `conversation_ids` gives each of many, on all cores."""
    counts = zip(tokenizer.lengths(texts), texts, strict=True)
    return [count + (not isinstance(text, Rendered)) for count, text in counts]


def conversation_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a conversation, with a stop token at the end of what no template wrote."""
    ids = tokenizer.encode(text)
    return ids if isinstance(text, Rendered) else [*ids, tokenizer.stop_ids[0]]
