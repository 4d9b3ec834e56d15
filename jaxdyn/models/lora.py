r"""Low-rank adapters: the same two functions, and few parameters that move them.

    W_eff = W + s A B,      s = α / r,      A [in, r] ~ N(0, 1/in),   B [r, out] = 0 at the start

(Hu et al. 2021, arXiv 2106.09685, section 4.1). The adapter's leaves `lora_a` and `lora_b` lie in
the parameter tree beside the weight they adapt, stacked over layers as it is; the classifier, whose
weight is [V, D], has them as a [r, D] and b [V, r]. Neither A B nor W_eff is ever formed: a layer
adds s (x A) B to its output.

s is the product's, not the leaves': scaling B instead would leave the function alone but not its
training, since Adam's steps do not scale with the gradient. It is static, a field of the model's
configuration, which every layer receives; a model without adapters has s = 1.
"""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PRNGKeyArray

from jaxdyn.grammar import above, at_least
from jaxdyn.models.model import LanguageModel
from jaxdyn.types import JaxdynError, Params

Target = Literal["query", "key", "value", "out", "up", "gate", "down"]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The adapters' size and place.

    Attributes:
      rank: r; the effective change of a weight has at most this rank.
      alpha: α of the scale s = α / r of the adapters' product.
      targets: dense layers of the body that get adapters, of those the architecture has.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[Target, ...] = get_args(Target)

    def __post_init__(self):
        at_least(1, self, "lora", "rank", most=2**16)
        above(0, self, "lora", "alpha")
        unknown = [name for name in self.targets if name not in get_args(Target)]
        if unknown or not self.targets:
            raise JaxdynError(
                f"lora.targets must name layers among {', '.join(get_args(Target))}, "
                f"got {self.targets}"
            )

    @property
    def scale(self) -> float:
        """s = α / r."""
        return self.alpha / self.rank


def has_adapters(params: Params) -> bool:
    """Whether any weight has an adapter beside it."""
    return any(path[-1] == "lora_a" for path in flatten_dict(params))


def add_adapters(
    model: LanguageModel,
    params: Params,
    config: LoraConfig,
    key: PRNGKeyArray,
    *,
    backbone: bool,
    classifier: bool,
) -> tuple[LanguageModel, Params]:
    """The same function with adapters in the backbone, the classifier or both.

    Args:
      key: of the draws of A; a layer's draw does not depend on which others have adapters.

    Raises:
      JaxdynError: if the parameters have adapters already, or the body none of the targets.
    """
    if has_adapters(params):
        raise JaxdynError("the parameters have adapters already; merge them first (merge_adapters)")
    leaves = flatten_dict(params, keep_empty_nodes=True)
    kernels = sorted(path for path in leaves if path[-1] == "kernel")
    if backbone and not any(path[-2] in config.targets for path in kernels):
        raise JaxdynError(
            f"the model has none of the layers of lora.targets, {', '.join(config.targets)}"
        )
    draw = lambda number, shape, fan_in: (
        fan_in**-0.5 * jax.random.normal(jax.random.fold_in(key, number), shape, jnp.float32)
    )
    r, (vocab, width) = config.rank, (model.config.vocab_size, model.config.width)
    added = {}
    if backbone:
        for number, path in enumerate(kernels, 1):
            if path[-2] in config.targets:
                *layers, fan_in, fan_out = leaves[path].shape
                added[(*path[:-1], "lora_a")] = draw(number, (*layers, fan_in, r), fan_in)
                added[(*path[:-1], "lora_b")] = jnp.zeros((*layers, r, fan_out), jnp.float32)
    if classifier:
        leaves.pop(("classifier",), None)  # a tied model's is an empty node
        added[("classifier", "lora_a")] = draw(0, (r, width), width)
        added[("classifier", "lora_b")] = jnp.zeros((vocab, r), jnp.float32)
    return _with_scale(model, config.scale), unflatten_dict({**leaves, **added})


def merge_adapters(model: LanguageModel, params: Params) -> tuple[LanguageModel, Params]:
    """The same function without adapters, W + s A B in float32 or better in place of W.

    A tied model whose classifier has adapters is untied: its two matrices are no longer one.
    """
    if model.config.tied and "lora_a" in params["classifier"]:
        model, params = model.untie(params)
    leaves = flatten_dict(params, keep_empty_nodes=True)
    merged = {path: leaf for path, leaf in leaves.items() if path[-1] not in ("lora_a", "lora_b")}
    for path, a in leaves.items():
        if path[-1] == "lora_a":
            b = leaves[(*path[:-1], "lora_b")]
            name, product = ("weight", b @ a) if path[0] == "classifier" else ("kernel", a @ b)
            place = (*path[:-1], name)
            merged[place] = merged[place] + model.config.lora_scale * product
    return _with_scale(model, 1.0), unflatten_dict(merged)


def _with_scale(model: LanguageModel, scale: float) -> LanguageModel:
    config = dataclasses.replace(model.config, lora_scale=scale)
    return dataclasses.replace(model, config=config)
