"""One decoder, configured into GPT-NeoX, Llama, Qwen2 and GPT-2, as two pure functions."""

from jaxdyn.models.config import ModelConfig, RotaryScaling, gpt_neox
from jaxdyn.models.hf_config import config_from_hf, config_to_hf
from jaxdyn.models.huggingface import load_pretrained, local_directory, save_pretrained
from jaxdyn.models.model import LanguageModel, positions_of

__all__ = [
    "LanguageModel",
    "ModelConfig",
    "RotaryScaling",
    "config_from_hf",
    "config_to_hf",
    "gpt_neox",
    "load_pretrained",
    "local_directory",
    "positions_of",
    "save_pretrained",
]
