"""Flops of matrix products and convolutions, from a compiled program's text."""

import functools
import json
import math
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from jaxdyn.plan.text import Computation, Instruction, Number, numbers


def dot(computation: Computation, one: Instruction) -> Number:
    """2 x multiply-adds of a matrix product, in batches or not."""
    return product(computation, one, numbers(one, "lhs_contracting_dims"))


def custom_call(computation: Computation, one: Instruction) -> Number | None:
    """Those of a product of cuBLAS or an attention of cuDNN; what others do is not known."""
    if "__cudnn$fmha" in one.attributes:
        return attention(computation, one)
    found = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', one.attributes)
    return product(computation, one, map(int, json.loads(found[1]))) if found else None


def attention(computation: Computation, one: Instruction) -> Number:
    """2 x multiply-adds of cuDNN's attention, of all keys, as the kernel takes its mask as a bias.

    Two products with the weights [B, heads, T, S]; in the backward pass five, as it computes the
    weights again.
    """
    weights = re.search(
        r'"intermediate_tensor_shape":.*?"dimensions": ?\[([^\]]*)\]', one.attributes
    )
    dims = re.findall(r"\d+", weights[1])  # type: ignore[index]
    size = math.prod(map(int, dims))
    width = computation.instructions[one.operands[0]].arrays[0].dims[-1]
    return 2 * (5 if "Backward" in one.attributes else 2) * size * width


def product(computation: Computation, one: Instruction, contracted: Iterable[int]) -> Number:
    left = computation.instructions[one.operands[0]].arrays[0].dims
    return 2 * math.prod(one.arrays[0].dims) * math.prod(left[i] for i in contracted)


def convolution(computation: Computation, one: Instruction) -> Number:
    """2 x multiply-adds with an element of the input: none with padding or dilation's zeros.

    The compiler for TPUs writes matrix products so, with batch axes as spatial ones.
    """
    left, right = (computation.instructions[name].arrays[0].dims for name in one.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    inputs, kernel, outputs = labels.groups()  # type: ignore[union-attr]
    out = one.arrays[0].dims
    places = 1
    for axis in sorted(set(inputs) - {"b", "f"}):
        sides = left[inputs.index(axis)], right[kernel.index(axis)], out[outputs.index(axis)]
        places *= positions(*sides, window_of(one, int(axis)))
    groups = int((re.search(r"batch_group_count=(\d+)", one.attributes) or [0, 1])[1])
    rows = left[inputs.index("b")] // groups
    return 2 * rows * right[kernel.index("i")] * right[kernel.index("o")] * places


PRODUCTS: dict[str, Callable[[Computation, Instruction], Number | None]] = {
    "dot": dot,
    "convolution": convolution,
    "custom-call": custom_call,
}
"""Operations with flops to count, by their opcodes."""


class Window(NamedTuple):
    """How a convolution goes along one axis."""

    stride: int = 1
    before: int = 0
    dilation: int = 1
    spread: int = 1


def window_of(one: Instruction, axis: int) -> Window:
    """`window={size=3x3 stride=2x1 pad=0_1x0_0 lhs_dilate=1x2 rhs_dilate=1x1}` at an axis."""
    found = re.search(r"window=\{([^}]*)\}", one.attributes)
    fields = dict(field.split("=") for field in found[1].split()) if found else {}
    take = lambda name, default: fields[name].split("x")[axis] if name in fields else default
    return Window(
        int(take("stride", 1)),
        int(take("pad", "0_0").split("_")[0]),
        int(take("rhs_dilate", 1)),
        int(take("lhs_dilate", 1)),
    )


@functools.lru_cache
def positions(size: int, kernel: int, out: int, window: Window) -> int:
    """Pairs of an output place and a kernel place that meet an element of the input."""
    start = np.arange(out, dtype=np.int64) * window.stride - window.before
    total = 0
    for k in range(kernel):
        at = start + k * window.dilation
        inside = (at >= 0) & (at <= (size - 1) * window.spread)
        total += int(np.sum(inside & (at % window.spread == 0)))
    return total
