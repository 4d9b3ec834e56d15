"""What a program takes beside what it asks for, at the rates that this device was seen to have.

Three floors of a program's time, each at a measured rate:

    compute     flops of its matrix products / those of one large product in the same dtype
    bandwidth   bytes its instructions read and write / those of x + 1 on 256 MiB
    launches    kernels it starts / those of a loop of the smallest one

The largest is its limit. Where all three together leave more than half of the time unexplained the
limit is "overhead": products too small to reach the rate, waits for the host, the host's own work.
Flops are counted in the jaxpr, bytes and kernels in the compiled program's text, loops as often as
they run. Of a call to a library (cuBLAS, cuDNN) the text has operands and results.
"""

import dataclasses
import functools
import json
import statistics
from collections import Counter
from typing import Any

import engine
import harness
import jax
import jax.numpy as jnp

from jaxdyn.plan.hlo import Cost, Walk

FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "async", "after-all", "partition-id", "replica-id", "opt-barrier", "add-dependency"),
}
"""Instructions that start no kernel of their own."""
KERNEL = "a kernel"


class Kernels(Walk):
    """The walk through a program that also counts its kernels: instructions outside fusions."""

    def of_one(self, scope, one, met, fused):
        cost = super().of_one(scope, one, met, fused)
        started = not fused and one.opcode not in FREE
        return cost + Cost(uncounted=Counter({KERNEL: 1} if started else {}))


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device was seen to do in a second, in a dtype."""

    dtype: str
    flops: float
    bytes: float
    kernels: float

    def limits(self, flops: float = 0, nbytes: float = 0, kernels: float = 0) -> dict[str, float]:
        """The floors, in seconds."""
        return {
            "compute": flops / self.flops,
            "bandwidth": nbytes / self.bytes,
            "launches": kernels / self.kernels,
        }


@functools.cache
def rates_of(dtype: str) -> Rates:
    """The rates of this process's device."""
    found = Rates(dtype, harness.matrix_rate(dtype), harness.copy_rate(), kernel_rate())
    print(
        f"{jax.devices()[0].device_kind}: {found.flops / 1e12:.3g} Tflop/s of a {dtype} product, "
        f"{found.bytes / 1e9:.4g} GB/s, {1e6 / found.kernels:.3g} µs a kernel",
        flush=True,
    )
    return found


def kernel_rate() -> float:
    """Kernels a second, started one after another by a loop of 1000 turns: a sort, which nothing
    fuses with, and what the loop itself needs."""
    turn = lambda i, x: jnp.sort(x + i.astype(x.dtype))
    traced = jax.jit(lambda x: jax.lax.fori_loop(0, 1000, turn, x)).trace(jnp.ones(8))
    compiled = traced.lower().compile()
    seconds = [harness.timed(lambda: compiled(jnp.ones(8)))[0] for _ in range(6)]
    return count(compiled).uncounted[KERNEL] / min(seconds)


def count(compiled: Any, trips: int = 1) -> Cost:
    """A compiled program's flops, bytes and kernels, its longer branches."""
    return Kernels(str(compiled.as_text()), trips, max, hosts=1).cost()


# -- a program --------------------------------------------------------------------------------


def program(
    name: str,
    function: Any,
    arguments: tuple,
    static: dict[str, Any] | None = None,
    *,
    rates: Rates,
    rounds: int,
    carried: bool = False,
    trips: int = 1,
    flops: float = 0,
) -> dict[str, Any]:
    """A jitted function's median seconds, floors and peak memory.

    Args:
      carried: it gives (state, ...) for the state that is its first argument, which it donates.
      trips: how often a loop runs whose turns are not known.
      flops: those it needs, where it does more (rematerialisation).
    """
    static = static or {}
    traced = function.trace(*arguments, **static)
    compiled = traced.lower().compile()
    cost, memory = count(compiled, trips), compiled.memory_analysis()
    done = max(engine.products(traced.jaxpr), cost.flops)
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    beside = memory.temp_size_in_bytes + kept
    before = allocated()

    def once():
        nonlocal arguments
        result = compiled(*arguments)
        if carried:
            arguments = (result[0], *arguments[1:])
        return result

    first = harness.timed(once)[0]
    after = allocated()
    seconds = [harness.timed(once)[0] for _ in range(rounds)]
    peak = {"own_bytes": memory.argument_size_in_bytes + beside, "beside_bytes": beside}
    if before and after:
        peak["predicted_peak"] = before["bytes_in_use"] + beside
        # A peak below that of earlier work in the process is not seen.
        if after["peak_bytes_in_use"] > before["peak_bytes_in_use"]:
            peak["measured_peak"] = after["peak_bytes_in_use"]
    asked = {"flops": flops or done, "nbytes": cost.bytes, "kernels": cost.uncounted.pop(KERNEL, 0)}
    return {
        **row(name, seconds, rates, **asked),
        "first_seconds": first,
        "flops_done": done,
        "library_calls": dict(cost.uncounted),
        **peak,
    }


def row(name: str, seconds: list[float], rates: Rates, **asked: float) -> dict[str, Any]:
    """Seconds beside the floors of what was asked: `flops`, `nbytes`, `kernels`."""
    middle, limits = statistics.median(seconds), rates.limits(**asked)
    limit = max(limits, key=lambda name: limits[name])
    if sum(limits.values()) < middle / 2:
        limit = "overhead"
    shares = {name: floor / middle for name, floor in limits.items()}
    return {
        "name": name,
        "seconds": seconds,
        "median_seconds": middle,
        **asked,
        "shares": shares,
        "limit": limit,
    }


def allocated() -> dict[str, int]:
    """Bytes in use and their peak, by the device's allocator; nothing where it keeps no account."""
    return jax.devices()[0].memory_stats() or {}


# -- tables -----------------------------------------------------------------------------------


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Every program with its time, its floors' shares of it, its limit and its peak memory."""
    print(f"\n{title}")
    print(
        f"{'':<24}{'seconds':>10}{'Tflop':>9}{'GB':>9}{'kernels':>9}{'compute':>9}{'bandw.':>8}"
        f"{'launch':>8}  {'limit':<10}{'GiB: own':>9}{'peak':>8}{'planned':>9}"
    )
    gib = lambda found, key: f"{found[key] / 2**30:.2f}" if key in found else "-"
    for found in rows:
        shares = found["shares"]
        print(
            f"{found['name']:<24}{found['median_seconds']:>10.4g}"
            f"{found.get('flops', 0) / 1e12:>9.3g}{found.get('nbytes', 0) / 1e9:>9.3g}"
            f"{found.get('kernels', 0):>9.0f}{shares['compute']:>9.1%}{shares['bandwidth']:>8.1%}"
            f"{shares['launches']:>8.1%}  {found['limit']:<10}{gib(found, 'own_bytes'):>9}"
            f"{gib(found, 'measured_peak'):>8}{gib(found, 'predicted_peak'):>9}"
        )
    for found in rows:
        if found.get("library_calls"):
            print(f"{found['name']}: of libraries {json.dumps(found['library_calls'])}")
