"""Heads that score sequences, as Hugging Face checkpoints have them: `config.json` and names.

Two layouts: transformers' `…ForSequenceClassification`, with `score.weight` [labels, width], and
ArmoRM's, with a regression layer and a gate.
"""

from typing import Any

from jaxdyn.models.config import Gating, ModelConfig, SequenceHead
from jaxdyn.models.families.family import Family
from jaxdyn.models.hf_fields import get, number, refuse, size

CLASSIFIES = "ForSequenceClassification"


def class_of(family: Family) -> str:
    """The family's class in transformers that scores sequences."""
    return family.scores or family.causal_lm.removesuffix("ForCausalLM") + CLASSIFIES


def head_from_hf(data: dict[str, Any], family: Family) -> SequenceHead | None:
    """The head that `architectures` speaks of; None for a language model's.

    Raises:
      JaxdynError: for a class that scores sequences in a way that is not known, naming the field.
    """
    names = data.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str):
        return None
    if name == family.gated:
        if (quantiles := data.get("num_quantiles")) is not None:
            refuse("num_quantiles", quantiles, "none: rewards as quantiles are not supported")
        gating = Gating(
            width=size(data, "gating_hidden_dim", 1024),
            layers=size(data, "gating_n_hidden", 3),
            temperature=number(data, "gating_temperature", 10.0),
        )
        return SequenceHead(size(data, "num_objectives", 19), pad_id_of(data), gating)
    if name == class_of(family):
        return SequenceHead(labels_of(data), pad_id_of(data))
    if CLASSIFIES in name or "Reward" in name:
        supported = [class_of(family), *filter(None, [family.gated])]
        refuse("architectures", names, " or ".join(supported))
    return None


def head_to_hf(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The inverse, of a model that has a head."""
    head = config.head
    if head is None:
        return {}
    about: dict[str, Any] = {"pad_token_id": head.pad_id}
    if head.gating is not None:
        return about | {
            "architectures": [family.gated],
            "num_objectives": head.labels,
            "gating_hidden_dim": head.gating.width,
            "gating_n_hidden": head.gating.layers,
            "gating_temperature": head.gating.temperature,
        }
    names = {str(i): f"LABEL_{i}" for i in range(head.labels)}
    ids = {name: int(i) for i, name in names.items()}
    return about | {"architectures": [class_of(family)], "id2label": names, "label2id": ids}


def labels_of(data: dict[str, Any]) -> int:
    """How many labels: as many as `id2label` names, else `num_labels`; two where neither is."""
    named = get(data, "id2label", None)
    if named is None:
        return size(data, "num_labels", 2)
    if not isinstance(named, dict) or not named:
        refuse("id2label", named, "an object with a name for each label")
    return len(named)


def pad_id_of(data: dict[str, Any]) -> int | None:
    """`pad_token_id`, which may be null; some files write -1 for none."""
    value = data.get("pad_token_id")
    if value is None or value == -1:
        return None
    if type(value) is not int or value < 0:
        refuse("pad_token_id", value, "a token's id, or null")
    return value


def modules_of(config: ModelConfig, family: Family) -> dict[str, str]:
    """{path of our module: its name in a checkpoint}, with the head's that the model has."""
    if config.head is None:
        return family.modules
    if config.head.gating is None:
        return {**family.modules, "classifier": "score"}
    layers = range(config.head.gating.layers + 1)
    gate = {f"gating/layer_{i}": f"gating.layers.{i}" for i in layers}
    return {**family.modules, **gate, "classifier": "regression_layer"}


NAMED = {
    "gating/logit_scale": "gating.logit_scale",
    "gating/transform": "reward_transform_matrix",
}
"""{path of our parameter: its tensor's name}, where that does not say "weight" or "bias"."""
