"""The kinds of parameter by which the gradient component is split, and one that has no form."""

from flax.traverse_util import flatten_dict

from jaxdyn.types import JaxdynError, Params


def has_adapters(params: Params) -> bool:
    """Whether the parameters hold low-rank adapters."""
    return any(path[-1] == "lora_a" for path in flatten_dict(params))


def require_merged(params: Params) -> None:
    """Refuse low-rank adapters, whose gradients are in none of the engine's layers."""
    if has_adapters(params):
        raise JaxdynError(
            "the parameters hold low-rank adapters, which only method 'plain', apply_kernel and "
            "top_eigenpairs follow; merge_adapters gives the same function without them"
        )


def kind_of(path: tuple[str, ...]) -> str:
    """A layer's kind, from its place in the body.

    "attention", "mlp" and "norms" inside the scanned layers; "embedding" (of tokens and learned
    positions) before them; "final_norm" after.
    """
    if path[0] == "layers":
        return "norms" if any(name.endswith("_norm") for name in path) else path[1]
    return {"embed": "embedding", "position": "embedding", "norm": "final_norm"}[path[0]]
