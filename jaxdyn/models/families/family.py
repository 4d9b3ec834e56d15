"""What a family is, and what many of them share."""

import dataclasses
from collections.abc import Callable
from typing import Any

from jaxdyn.models.config import ModelConfig
from jaxdyn.models.hf_fields import REQUIRED, Field, activation, flag, layers, number
from jaxdyn.types import JaxdynError


@dataclasses.dataclass(frozen=True)
class Family:
    """All that tells a family of models apart.

    Attributes:
      model_type: its name, in `config.json` and as `ModelConfig.architecture`.
      causal_lm: its class in transformers.
      scores: its class there that scores sequences, where that is not named after `causal_lm`.
      gated: ArmoRM's class, which has a gate beside, of the family that it is of.
      fields: what varies in its `config.json`.
      constant: fields of `ModelConfig` that never do.
      modules: {path of our module: its name in a checkpoint, with {} for the layer}. Modules of
        one name are one fused matrix.
      transposed: whether checkpoints keep matrices [out, in], where we keep [in, out].
      fused_by_head: whether a fused matrix holds query, key and value head by head.
      rotary_fraction: the share of a head that is rotated where `config.json` is silent; 1 allows
        no other, 0 means learned positions.
      rotary_base: the rotary base where `config.json` is silent.
      rotary_names: how transformers up to 4 spells the rotary base and fraction.
      window_rotary: how it spells the base of layers with a window, and that of a silent
        `config.json`, where they have positions of their own.
      layers: what tells layers apart, fields of `ModelConfig`, by `config.json` and the number of
        layers.
      layers_to_hf: its inverse.
    """

    model_type: str
    causal_lm: str
    fields: tuple[Field, ...]
    constant: dict[str, Any]
    modules: dict[str, str]
    scores: str = ""
    gated: str = ""
    transposed: bool = True
    fused_by_head: bool = False
    rotary_fraction: float = 1.0
    rotary_base: float = 10000.0
    rotary_names: tuple[str, str] = ("rope_theta", "partial_rotary_factor")
    window_rotary: tuple[str, float] | None = None
    layers: Callable[[dict[str, Any], int], dict[str, Any]] = lambda data, count: {}
    layers_to_hf: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}

    def config(
        self,
        vocab_size: int,
        width: int,
        num_layers: int,
        num_heads: int,
        mlp_width: int | None = None,
        max_positions: int = 2048,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        **others: Any,
    ) -> ModelConfig:
        """A model of this family: the family's constructor.

        Args:
          mlp_width, num_kv_heads, head_dim: 4 width, num_heads and width / num_heads by default.
          others: further fields of `ModelConfig` by name; by default what a silent `config.json`
            means.

        Raises:
          JaxdynError: for sizes that do not fit together.
        """
        if head_dim is None:
            if num_heads < 1 or width % num_heads:
                raise JaxdynError(f"width ({width}) must be a multiple of num_heads ({num_heads})")
            head_dim = width // num_heads
        silent = {f.ours: f.default for f in self.fields if f.default not in (REQUIRED, None)}
        positions = {"rotary_fraction": self.rotary_fraction, "rotary_base": self.rotary_base}
        if self.window_rotary is not None:
            positions["window_rotary_base"] = self.window_rotary[1]
        rest: dict[str, Any] = {**positions, "rotary_scaling": None, "classifier_bias": False}
        rest |= self.constant | silent | self.layers({}, num_layers) | others
        sizes = (vocab_size, width, num_layers, num_heads, num_kv_heads or num_heads, head_dim)
        return ModelConfig(self.model_type, *sizes, mlp_width or 4 * width, max_positions, **rest)


# -- what many families share -------------------------------------------------------------------

SIZES = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "width"),
    Field("num_hidden_layers", "num_layers", layers),
    Field("num_attention_heads", "num_heads"),
    Field("intermediate_size", "mlp_width"),
    Field("max_position_embeddings", "max_positions"),
)
GATED_FIELDS = (
    *SIZES,
    Field("num_key_value_heads", "num_kv_heads", default=None),
    Field("head_dim", "head_dim", default=None),
    Field("rms_norm_eps", "norm_eps", number, 1e-6),
    Field("hidden_act", "activation", activation, "silu"),
    Field("tie_word_embeddings", "tied", flag, False),
)
GATED = {"norm": "rms", "gated_mlp": True, "parallel_residual": False}
GATED_MATRICES = {
    "backbone/embed": "model.embed_tokens",
    "backbone/layers/attention/query": "model.layers.{}.self_attn.q_proj",
    "backbone/layers/attention/key": "model.layers.{}.self_attn.k_proj",
    "backbone/layers/attention/value": "model.layers.{}.self_attn.v_proj",
    "backbone/layers/attention/out": "model.layers.{}.self_attn.o_proj",
    "backbone/layers/mlp/gate": "model.layers.{}.mlp.gate_proj",
    "backbone/layers/mlp/up": "model.layers.{}.mlp.up_proj",
    "backbone/layers/mlp/down": "model.layers.{}.mlp.down_proj",
    "backbone/norm": "model.norm",
    "classifier": "lm_head",
}
NORMS_BEFORE = {
    "backbone/layers/attention_norm": "model.layers.{}.input_layernorm",
    "backbone/layers/mlp_norm": "model.layers.{}.post_attention_layernorm",
}
NORMS_AFTER = {
    "backbone/layers/attention_post_norm": "model.layers.{}.post_attention_layernorm",
    "backbone/layers/mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
}
QUERY_KEY_NORMS = {
    "backbone/layers/attention/query_norm": "model.layers.{}.self_attn.q_norm",
    "backbone/layers/attention/key_norm": "model.layers.{}.self_attn.k_norm",
}
GATED_MODULES = GATED_MATRICES | NORMS_BEFORE
"""Grouped queries, RMS norms and a gated MLP, in the names that most families took over."""
ATTENTION_BIAS = (
    Field("attention_bias", "qkv_bias", flag, False),
    Field("attention_bias", "attention_out_bias", flag, False),
)


def but(fields: tuple[Field, ...], *others: Field) -> tuple[Field, ...]:
    """The fields, with others in the place of those that mean the same of ours."""
    meant = {field.ours for field in others}
    return (*(field for field in fields if field.ours not in meant), *others)
