"""The families that the one decoder is configured into: a file each, and a row of this table."""

from jaxdyn.models.families.family import Family
from jaxdyn.models.families.gpt2 import GPT2, gpt2
from jaxdyn.models.families.gpt_neox import GPT_NEOX, gpt_neox
from jaxdyn.models.families.llama import LLAMA, llama
from jaxdyn.models.families.qwen2 import QWEN2, qwen2
from jaxdyn.models.families.qwen3 import QWEN3, qwen3
from jaxdyn.types import JaxdynError

__all__ = ["gpt2", "gpt_neox", "llama", "qwen2", "qwen3"]  # what `jaxdyn.models` takes over

FAMILIES = {family.model_type: family for family in (GPT_NEOX, LLAMA, QWEN2, QWEN3, GPT2)}

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
