"""The kinds of parameter by which the gradient component is split."""


def kind_of(path: tuple[str, ...]) -> str:
    """A layer's kind, from its place in the body.

    "attention", "mlp" and "norms" inside the scanned layers; "embedding" (of tokens and learned
    positions) before them; "final_norm" after.
    """
    if path[0] == "layers":
        return "norms" if path[1].endswith("_norm") else path[1]
    return {"embed": "embedding", "position": "embedding", "norm": "final_norm"}[path[0]]
