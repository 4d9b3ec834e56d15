"""The one decoder's configuration: what tells GPT-NeoX, Llama, Qwen2 and GPT-2 apart."""

import dataclasses
from typing import Literal

from jaxdyn.types import JaxdynError

Architecture = Literal["gpt_neox", "llama", "qwen2", "gpt2"]

_SIZES = (
    "vocab_size",
    "width",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "mlp_width",
    "max_positions",
)


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """Stretching of the rotary frequencies beyond the trained context.

    `linear` divides every frequency by `factor`. `llama3` leaves frequencies whose wavelength is
    below `original_max_positions / high_freq_factor` alone, divides those above
    `original_max_positions / low_freq_factor` by `factor`, and blends in between.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes the decoder. `rotary_fraction == 0` means learned positions.

    `lora_scale` is s of low-rank adapters, where the parameters hold some (`jaxdyn.models.lora`).
    """

    architecture: Architecture
    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    max_positions: int
    norm: Literal["layer", "rms"]
    norm_eps: float
    activation: Literal["gelu", "gelu_new", "silu", "relu"]
    gated_mlp: bool
    parallel_residual: bool
    rotary_fraction: float
    rotary_base: float
    rotary_scaling: RotaryScaling | None
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    classifier_bias: bool
    tied: bool
    lora_scale: float = 1.0

    def __post_init__(self):
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise JaxdynError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.rotary_fraction <= 1:
            raise JaxdynError(f"rotary_fraction must be from 0 to 1, got {self.rotary_fraction}")
        if self.num_heads % self.num_kv_heads:
            raise JaxdynError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads})"
            )
        if self.rotary_dim % 2:
            raise JaxdynError(
                f"head_dim * rotary_fraction must be even, got {self.head_dim} * "
                f"{self.rotary_fraction} = {self.rotary_dim}"
            )

    @property
    def rotary_dim(self) -> int:
        """How many of a head's components are rotated."""
        return int(self.head_dim * self.rotary_fraction)


def gpt_neox(
    vocab_size: int,
    width: int,
    num_layers: int,
    num_heads: int,
    mlp_width: int | None = None,
    max_positions: int = 2048,
    rotary_fraction: float = 0.25,
    tied: bool = False,
) -> ModelConfig:
    """The Pythia family: parallel residual, partial rotary positions, biases, untied."""
    if num_heads < 1 or width % num_heads:
        raise JaxdynError(f"width ({width}) must be a multiple of num_heads ({num_heads})")
    return ModelConfig(
        architecture="gpt_neox",
        vocab_size=vocab_size,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=width // num_heads,
        mlp_width=mlp_width or 4 * width,
        max_positions=max_positions,
        norm="layer",
        norm_eps=1e-5,
        activation="gelu",
        gated_mlp=False,
        parallel_residual=True,
        rotary_fraction=rotary_fraction,
        rotary_base=10000.0,
        rotary_scaling=None,
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        classifier_bias=False,
        tied=tied,
    )
