"""The families that the one decoder is configured into: a file each, and a row of this table."""

from jaxdyn.models.families.family import Family
from jaxdyn.models.families.gemma3_text import GEMMA3_TEXT, gemma3_text
from jaxdyn.models.families.gpt2 import GPT2, gpt2
from jaxdyn.models.families.gpt_neox import GPT_NEOX, gpt_neox
from jaxdyn.models.families.llama import LLAMA, llama
from jaxdyn.models.families.olmo2 import OLMO2, olmo2
from jaxdyn.models.families.olmo3 import OLMO3, olmo3
from jaxdyn.models.families.qwen2 import QWEN2, qwen2
from jaxdyn.models.families.qwen3 import QWEN3, qwen3
from jaxdyn.models.families.smollm3 import SMOLLM3, smollm3
from jaxdyn.types import JaxdynError

# What `jaxdyn.models` takes over.
__all__ = [
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "olmo2",
    "olmo3",
    "qwen2",
    "qwen3",
    "smollm3",
]

_ROWS = (GPT_NEOX, LLAMA, SMOLLM3, QWEN2, QWEN3, OLMO2, OLMO3, GEMMA3_TEXT, GPT2)
FAMILIES = {family.model_type: family for family in _ROWS}

REFUSED = {
    "gemma2": "its logits are capped, f = cap tanh(Wφ / cap), and no linear function of φ",
    "gemma3": "it reads images too; its language model alone is supported",
}
"""Why families that come close are none of these."""


def family_of(architecture: str) -> Family:
    """The family of that name; JaxdynError for a name that the table does not have."""
    if architecture not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise JaxdynError(f"architecture must be one of {known}, got {architecture!r}")
    return FAMILIES[architecture]
