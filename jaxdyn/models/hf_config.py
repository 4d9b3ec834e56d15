"""`config.json` to and from `ModelConfig`, by the one table of a family for both directions."""

from collections.abc import Sequence
from typing import Any

from jaxdyn.models.config import ModelConfig
from jaxdyn.models.families import FAMILIES, REFUSED, family_of
from jaxdyn.models.hf_fields import REQUIRED, one_of, refuse
from jaxdyn.models.hf_head import head_from_hf, head_to_hf
from jaxdyn.models.hf_rotary import rotary_from_hf, rotary_to_hf
from jaxdyn.types import JaxdynError

# Fields that change the function in ways the decoder does not follow, and their one good value.
_FIXED = {
    "quantization_config": None,
    "num_experts": None,
    "num_local_experts": None,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "clip_qkv": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}


def config_from_hf(data: dict[str, Any]) -> ModelConfig:
    """The decoder's configuration from the contents of a `config.json`.

    Raises JaxdynError naming the field, its value and what is supported, where the config asks for
    something the decoder does not compute.
    """
    if isinstance(name := data.get("model_type"), str) and name in REFUSED:
        refuse("model_type", name, f"{', '.join(FAMILIES)}; {REFUSED[name]}")
    family = FAMILIES[one_of(data, "model_type", REQUIRED, FAMILIES)]
    for name, good in _FIXED.items():
        if data.get(name) not in (None, good):
            refuse(name, data[name], "none" if good is None else str(good).lower())
    ours = {f.ours: f.read(data, f.theirs, f.default) for f in family.fields}
    if family.rotary_fraction:
        ours |= rotary_from_hf(data, family)
    ours |= family.layers(data, ours["num_layers"])
    if (head := head_from_hf(data, family)) is not None:
        ours |= {"head": head, "tied": False, "classifier_bias": False}
    return family.config(**ours)


def config_to_hf(
    config: ModelConfig, *, bos_token_id: int | None = None, stop_ids: Sequence[int] = ()
) -> dict[str, Any]:
    """The contents of a `config.json` with which transformers builds the same function.

    Raises JaxdynError for a configuration that the family's `config.json` cannot express.
    """
    family = family_of(config.architecture)
    data = {
        "model_type": config.architecture,
        "architectures": [family.causal_lm],
        "dtype": "float32",
        **token_ids(bos_token_id, stop_ids),
        "pad_token_id": None,  # not the family's, which may be beyond the vocabulary
        **{f.theirs: f.write(getattr(config, f.ours)) for f in family.fields},
        **family.layers_to_hf(config),
        **(rotary_to_hf(config, family) if family.rotary_fraction else {}),
        **head_to_hf(config, family),
    }
    again = config_from_hf(data)
    for name, value in vars(config).items():
        if getattr(again, name) != value:
            raise JaxdynError(
                f"a {config.architecture} config.json cannot express {name} = {value!r}; it would "
                f"be read back as {getattr(again, name)!r}"
            )
    return data


def token_ids(bos_token_id: int | None, stop_ids: Sequence[int]) -> dict[str, Any]:
    """How a sequence begins and ends, as `config.json` and `generation_config.json` say it."""
    stops = [int(i) for i in stop_ids]
    return {"bos_token_id": bos_token_id, "eos_token_id": stops if stops[1:] else (*stops, None)[0]}
