"""The one decoder's configuration: what tells one model's function from another's."""

import dataclasses
from typing import Literal

from jaxdyn.types import JaxdynError


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """Stretching of the rotary frequencies beyond the trained context.

    `linear` divides every frequency by `factor`. `llama3` leaves frequencies whose wavelength is
    below `original_max_positions / high_freq_factor` alone, divides those above
    `original_max_positions / low_freq_factor` by `factor`, and blends in between. `yarn` (Peng et
    al. 2023, arXiv 2309.00071) does so by component: those that turn more than `beta_fast` times in
    `original_max_positions` are left alone, those that turn less than `beta_slow` times divided;
    and it multiplies what was rotated by `amplitude`.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    amplitude: float = 1.0


@dataclasses.dataclass(frozen=True)
class Gating:
    """ArmoRM's gate: an MLP of so many hidden layers of a width, and a softmax's temperature."""

    width: int
    layers: int
    temperature: float


@dataclasses.dataclass(frozen=True)
class SequenceHead:
    """What scores a whole sequence, in the place of the next token's logits.

    `labels` rows in the place of the vocabulary's are read at the last token that is not `pad_id`,
    by ids (None: at the last token). With `gating` they are objectives that it weighs.
    """

    labels: int = 1
    pad_id: int | None = None
    gating: Gating | None = None

    @property
    def scores(self) -> int:
        """How many numbers a sequence gets."""
        return self.labels if self.gating is None else 1


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes the decoder. `rotary_fraction == 0` means learned positions.

    `architecture` names the family (`jaxdyn.models.families`), whose layout checkpoints have.
    `query_key_norm` normalises queries and keys before they are rotated, each head by itself or the
    whole projection; `norm_placement` says where in their residual branch attention and MLP are
    normalised: what they read, what they write, or both. A norm is x̂ s, or x̂ (1 + s) where it is
    "zero_centered_rms". `scaled_embedding` multiplies the tokens' embeddings by √width. Attention's
    scores are divided by the root of `attention_scalar`, by default head_dim.

    Layers differ in two ways, one flag each a layer. Those that are `windowed` (default none)
    attend to the last `window` tokens alone, their own included, and have the unscaled rotary base
    `window_rotary_base` if there is one; those that are not `rotated` (default all are) have no
    rotary positions.

    `lora_scale` is s of low-rank adapters, where the parameters hold some (`jaxdyn.models.lora`).
    With a `head` the classifier scores sequences: it has the head's rows, and is never tied.
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
    norm: Literal["layer", "rms", "zero_centered_rms"]
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
    scaled_embedding: bool = False
    attention_scalar: int | None = None
    window: int | None = None
    windowed: tuple[bool, ...] = ()
    window_rotary_base: float | None = None
    rotated: tuple[bool, ...] = ()
    lora_scale: float = 1.0
    head: SequenceHead | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):  # every whole number is a size
            value = getattr(self, field.name)
            if field.type in (int, int | None) and value is not None and value < 1:
                raise JaxdynError(f"{field.name} must be at least 1, got {value}")
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

        for name in ("windowed", "rotated"):
            if len(getattr(self, name)) not in (0, self.num_layers):
                raise JaxdynError(
                    f"{name} must have a flag for each of {self.num_layers} layers or none, got "
                    f"{len(getattr(self, name))}"
                )
        if any(self.windowed) != (self.window is not None):
            raise JaxdynError(
                f"window must be given if any layer is windowed, else None, got {self.window}"
            )
        if self.head is not None and self.tied:
            raise JaxdynError("a head that scores sequences is not tied, got tied = True")

    @property
    def gating(self) -> Gating | None:
        """The gate of its head, if it has one."""
        return None if self.head is None else self.head.gating

    @property
    def outputs(self) -> int:
        """How many rows the classifier has."""
        return self.vocab_size if self.head is None else self.head.labels

    @property
    def windowed_by_layer(self) -> tuple[bool, ...]:
        """Of every layer, whether it attends to the last `window` tokens alone."""
        return self.windowed or (False,) * self.num_layers

    @property
    def rotated_by_layer(self) -> tuple[bool, ...]:
        """Of every layer, whether its positions are rotary, if the model's are."""
        return self.rotated or (True,) * self.num_layers

    @property
    def rotary_dim(self) -> int:
        """How many of a head's components are rotated."""
        return int(self.head_dim * self.rotary_fraction)
