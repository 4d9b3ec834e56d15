"""One decoder, configured into GPT-NeoX, Llama, Qwen2 and GPT-2, as two pure functions."""

from jaxdyn.models.config import ModelConfig, RotaryScaling, gpt_neox
from jaxdyn.models.model import LanguageModel, positions_of

__all__ = ["LanguageModel", "ModelConfig", "RotaryScaling", "gpt_neox", "positions_of"]
