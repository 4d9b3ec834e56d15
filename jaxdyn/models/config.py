"""The one decoder's configuration: what tells one model's function from another's."""

import dataclasses
from typing import Literal

from jaxdyn.types import JaxdynError


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

    `architecture` names the family (`jaxdyn.models.families`), whose layout checkpoints have.
    `query_key_norm` normalises queries and keys before they are rotated, each head by itself or the
    whole projection; `norm_placement` says where in their residual branch attention and MLP are
    normalised: what they read, what they write, or both. `lora_scale` is s of low-rank adapters,
    where the parameters hold some (`jaxdyn.models.lora`).
    """

    architecture: str
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
    query_key_norm: Literal["none", "head", "projection"] = "none"
    norm_placement: Literal["before", "after", "both"] = "before"
    lora_scale: float = 1.0

    def __post_init__(self):
        for field in dataclasses.fields(self):  # every whole number is a size
            if field.type is int and getattr(self, field.name) < 1:
                raise JaxdynError(f"{field.name} must be at least 1, got {vars(self)[field.name]}")
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
