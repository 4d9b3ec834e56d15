r"""The gauge of a language model: features and classifier scaled against each other.

    φ → c φ,   W → W / c      leaves f = Wφ, and with it the policy, as it is.

The final normalisation's scale (and bias) carry the c. What a step does is not left as it is. Of a
plain gradient step the representation component grows by c², of Adam's by c (of which a gradient's
scale is no business), and the final normalisation's part of the gradient component shrinks by c²,
or by c. So a classifier in gauge c moves as if its learning rate were c² times the body's, or c
times: "how much of an update is representation" is a question about the scale of W.
"""

from typing import Any

from jaxdyn.models.model import LanguageModel
from jaxdyn.types import JaxdynError, Params


def regauge(model: LanguageModel, params: Params, scale: float) -> tuple[LanguageModel, Params]:
    """The same policy with features c φ and classifier W / c.

    A tied model is untied: one matrix cannot have two scales. A classifier's bias stays; of its
    adapter B is divided.

    Raises:
      JaxdynError: if c is not above 0, or the parameters hold more than a body and a classifier.
    """
    if not 0 < scale < float("inf"):
        raise JaxdynError(f"a gauge's scale must be a number above 0, got {scale}")
    if others := sorted(set(params) - {"backbone", "classifier"}):
        raise JaxdynError(f"a gauge is of a body and a classifier, got {', '.join(others)} too")
    if model.config.tied:
        model, params = model.untie(params)
    norm = dict(params["backbone"]["norm"])
    if model.config.norm == "zero_centered_rms":
        norm["scale"] = scale * (1 + norm["scale"]) - 1
    else:
        norm["scale"] = scale * norm["scale"]
    if "bias" in norm:
        norm["bias"] = scale * norm["bias"]
    divided: dict[str, Any] = {
        name: x / scale if name in ("weight", "lora_b") else x
        for name, x in params["classifier"].items()
    }
    backbone = {**params["backbone"], "norm": norm}
    return model, {**params, "backbone": backbone, "classifier": divided}
