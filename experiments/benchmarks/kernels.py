"""What the log-prob kernel costs: the Gram engine, whole gradients, and neural-tangents.

Claim:     the engine takes at most 0.6 of the time of neural-tangents' Jacobian contraction, and
           half its memory, on the log-prob kernel of 6 layers, d 512, V 8192, N 32 sites in
           contexts of T 32 tokens (float32, warm, two CPU cores).
Command:   python experiments/benchmarks/kernels.py --output kernels.json
Time:      about two minutes on two CPU cores.
Expected:  a table of median seconds and of each process's peak memory beyond that of a process that
           only makes the model and the sites; the kernels agree.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

METHODS = ("nothing", "gram", "plain", "neural_tangents")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The problem's sizes, under the names of the command line's options."""

    layers: int = 6
    width: int = 512
    vocab: int = 8192
    sites: int = 32
    slots: int = 32


def problem(shape: Shape):
    """A GPT-NeoX with random parameters, and one site at the end of each random sequence."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxdyn.models import LanguageModel, gpt_neox
    from jaxdyn.types import Sites

    heads = max(1, shape.width // 64)
    model = LanguageModel(gpt_neox(shape.vocab, shape.width, shape.layers, heads))
    rng = np.random.default_rng(0)
    draw = lambda *size: jnp.asarray(rng.integers(0, shape.vocab, size), jnp.int32)
    sites = Sites(
        tokens=draw(shape.sites, shape.slots),
        mask=jnp.ones((shape.sites, shape.slots), bool),
        rows=jnp.arange(shape.sites, dtype=jnp.int32),
        positions=jnp.full(shape.sites, shape.slots - 1, jnp.int32),
        targets=draw(shape.sites),
        is_prompt=jnp.ones(shape.sites, bool),
    )
    return model, jax.jit(model.init)(jax.random.key(0)), sites


def neural_tangents_kernel(model, params, sites):
    """The same kernel by neural-tangents: one output, log π of the target in x's last column."""
    import jax
    import jax.numpy as jnp

    from jaxdyn.kernels import neural_tangents as adapter

    nt = adapter.load()
    logits = adapter.ApplyFn(model)

    def log_prob(params, x):
        log_pi = jax.nn.log_softmax(logits(params, x[:, :-1]))
        return jnp.take_along_axis(log_pi, x[:, -1:], axis=1)

    x = jnp.concatenate([adapter.site_prefixes(sites), sites.targets[:, None]], axis=1)
    contraction = nt.NtkImplementation.JACOBIAN_CONTRACTION
    ntk = nt.empirical_ntk_fn(log_prob, trace_axes=(), vmap_axes=0, implementation=contraction)
    compiled = jax.jit(lambda params, x: ntk(x, None, params)[:, :, 0, 0])
    return lambda: compiled(params, x)


def measure(method: str, shape: Shape, repeats: int, memory_budget: int) -> dict:
    """Seconds (the first call compiles), this process's peak memory, and two sums as a check."""
    import jax
    import jax.numpy as jnp

    from jaxdyn.kernels import log_prob_kernel

    model, params, sites = problem(shape)
    if method == "nothing":
        run = lambda: jnp.zeros((1, 1))
    elif method == "neural_tangents":
        run = neural_tangents_kernel(model, params, sites)
    else:
        options = {"method": method, "memory_budget": memory_budget}
        run = lambda: log_prob_kernel(model, params, sites, **options).total
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        kernel = jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return {
        "first_seconds": seconds[0],
        "seconds": seconds[1:],
        "median_seconds": statistics.median(seconds[1:]),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "kernel_sum": float(jnp.sum(kernel)),
        "kernel_trace": float(jnp.trace(kernel)),
    }


def in_a_process(method: str, arguments: list[str]) -> dict:
    """`measure` in a process of its own, or what it died of."""
    command = [sys.executable, __file__, "--only", method, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict) -> str:
    """One line a method: median seconds, first call, memory beyond doing nothing."""
    idle = results["nothing"]["peak_bytes"]
    lines = [f"{'method':<16}{'median s':>10}{'first s':>10}{'MiB':>8}{'sum':>14}{'trace':>14}"]
    for method, found in results.items():
        if "error" in found:
            lines.append(f"{method:<16}{found['error']}")
        elif method != "nothing":
            lines.append(
                f"{method:<16}{found['median_seconds']:>10.3f}{found['first_seconds']:>10.2f}"
                f"{(found['peak_bytes'] - idle) / 2**20:>8.0f}"
                f"{found['kernel_sum']:>14.6g}{found['kernel_trace']:>14.6g}"
            )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-budget", type=int, default=8 * 2**30)
    parser.add_argument("--methods", nargs="+", choices=METHODS[1:], default=METHODS[1:])
    parser.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    shape = Shape(
        **{field.name: getattr(chosen, field.name) for field in dataclasses.fields(Shape)}
    )
    if chosen.only:
        print(json.dumps(measure(chosen.only, shape, chosen.repeats, chosen.memory_budget)))
        return
    sizes = dataclasses.asdict(shape)
    numbers = {**sizes, "repeats": chosen.repeats, "memory-budget": chosen.memory_budget}
    arguments = [f"--{name}={value}" for name, value in numbers.items()]
    results = {m: in_a_process(m, arguments) for m in ("nothing", *chosen.methods)}
    print(", ".join(f"{name} {value}" for name, value in sizes.items()))
    print(table(results))
    if chosen.output:
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps({"shape": sizes, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
