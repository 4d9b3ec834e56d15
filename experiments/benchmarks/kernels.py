"""What kernels cost: the Gram engine beside whole gradients and neural-tangents.

Claims (two CPU cores, float32, warm; medians; memory beyond a process that makes the problem only):
  small    log-prob kernel, 6 layers, d 512, V 8192, N 32 sites, T 32 tokens: at most 0.6 of the
           time of neural-tangents' fastest and half its memory.
  large    the same at N 512 with 8 GB for both (nt.batch for theirs): at least 8 times faster.
  trace    trace kernel, 2 layers, d 64, V 2048, N 4, T 16: at least 100 times faster than
           neural-tangents' fastest, under 300 MiB.
  pythia   6 layers, d 512, V 50304, N 32, T 64: log-prob and trace kernels within 8 GB, which
           neural-tangents cannot do at all for the trace.
  scaling  seconds against N, T, V and depth: fitted exponents beside those of the operations count.
Command:   python experiments/benchmarks/kernels.py SUITE ... (all of them without one)
Time:      about an hour on two CPU cores; small, trace and scaling take ten minutes together.
Expected:  tables on the screen, results/kernels_SUITE.json, results/kernels_scaling.png.

Peers run on the same parameters with their layers unrolled, which is faster for them than our
scanned form, and their rows mapped (`vmap_axes=0`): the fastest of the calls that were tried.
"""

import argparse
import dataclasses
import json
import sys

import harness
import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    """The problem's sizes."""

    layers: int = 6
    width: int = 512
    vocab: int = 8192
    sites: int = 32
    slots: int = 32


TINY_TRACE = Shape(layers=2, width=64, vocab=2048, sites=4, slots=16)
PYTHIA_70M = Shape(layers=6, width=512, vocab=50304, sites=32, slots=64)
BUDGET = 8 * 2**30
BATCH = 32  # rows of nt.batch: two Jacobians of 32 rows are what 8 GB hold


# -- the problem, and what is timed on it ------------------------------------------------------


def problem(shape: Shape):
    """A GPT-NeoX with random parameters, and one site at the end of each random sequence."""
    import jax
    import jax.numpy as jnp

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


def log_prob(method: str):
    def prepare(shape):
        from jaxdyn.kernels import log_prob_kernel

        model, params, sites = problem(shape)
        options = {"method": method, "memory_budget": BUDGET}
        return lambda: log_prob_kernel(model, params, sites, **options).total

    return prepare


def trace(num_probes: int | None = None):
    def prepare(shape):
        import jax

        from jaxdyn.kernels import trace_kernel

        model, params, sites = problem(shape)
        options = {"memory_budget": BUDGET, "mean": True}
        if num_probes:
            options |= {"num_probes": num_probes, "key": jax.random.key(0)}
        return lambda: trace_kernel(model, params, sites, **options).total

    return prepare


def unrolled(model, params):
    """The model as f(params, x) without a scan over layers, and its parameters layer by layer."""
    import jax
    import jax.numpy as jnp

    from jaxdyn.models.attention import rotary_tables
    from jaxdyn.models.decoder import Block, _norm
    from jaxdyn.models.model import positions_of

    c, dtype = model.config, model.dtype

    @jax.jit
    def split(params):
        layers = params["backbone"]["layers"]
        each = [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(c.num_layers)]
        return {**params["backbone"], "layers": each, "classifier": params["classifier"]}

    def logits(p, x):
        mask = x >= 0
        h = p["embed"]["embedding"][jnp.where(mask, x, 0)]
        tables = rotary_tables(c, positions_of(mask), h.dtype)
        for layer in p["layers"]:
            block = Block(c, dtype, False)
            carry, still = (h, None), (0, tables, model._visible(mask), 0)
            (h, _), _ = block.apply({"params": layer}, carry, *still)
        phi = _norm(c, dtype, "norm").apply({"params": p["norm"]}, h)
        return model.logits(p["classifier"], phi[:, -1])

    return logits, split(params)


def neural_tangents(implementation: str, what: str, batch: int = 0):
    """The kernel of log π of the target, or the trace, by one of neural-tangents' ways."""

    def prepare(shape):
        import jax
        import jax.numpy as jnp

        from jaxdyn.kernels import neural_tangents as adapter

        nt = adapter.load()
        model, params, sites = problem(shape)
        logits, params = unrolled(model, params)

        def log_pi(params, x):
            found = jax.nn.log_softmax(logits(params, x[:, :-1]))
            return jnp.take_along_axis(found, x[:, -1:], axis=1)

        options = {"implementation": nt.NtkImplementation[implementation], "vmap_axes": 0}
        x = adapter.site_prefixes(sites)
        if what == "trace":
            kernel = nt.empirical_ntk_fn(logits, trace_axes=(-1,), **options)
        else:
            kernel = nt.empirical_ntk_fn(log_pi, trace_axes=(), **options)
            x = jnp.concatenate([x, sites.targets[:, None]], axis=1)
        squeezed = lambda k: k.reshape(k.shape[:2])
        if batch:
            batched = nt.batch(kernel, batch_size=batch, store_on_device=False)
            return lambda: squeezed(batched(x, None, params))
        compiled = jax.jit(lambda params, x: squeezed(kernel(x, None, params)))
        return lambda: compiled(params, x)

    return prepare


def nothing(shape):
    import jax.numpy as jnp

    problem(shape)
    return lambda: jnp.zeros((1, 1))


METHODS = {
    "nothing": nothing,
    "gram": log_prob("gram"),
    "plain": log_prob("plain"),
    "trace": trace(),
    "trace, 64 probes": trace(64),
    "nt contraction": neural_tangents("JACOBIAN_CONTRACTION", "log-prob"),
    "nt vector products": neural_tangents("NTK_VECTOR_PRODUCTS", "log-prob"),
    "nt structured": neural_tangents("STRUCTURED_DERIVATIVES", "log-prob"),
    "nt.batch contraction": neural_tangents("JACOBIAN_CONTRACTION", "log-prob", BATCH),
    "nt trace contraction": neural_tangents("JACOBIAN_CONTRACTION", "trace"),
    "nt trace vector products": neural_tangents("NTK_VECTOR_PRODUCTS", "trace"),
    "nt trace structured": neural_tangents("STRUCTURED_DERIVATIVES", "trace"),
}


def run_case(method: str, shape: Shape, repeats: int) -> dict:
    check = lambda k: [float(np.sum(np.asarray(k, np.float64))), float(np.trace(np.asarray(k)))]
    return harness.measure(METHODS[method](shape), repeats, check)


# -- the suites --------------------------------------------------------------------------------


def compare(name: str, shape: Shape, methods: list[str], repeats: int, timeout=1800.0) -> dict:
    """Every method in a process of its own, a table, and each one's ratios to the first."""
    cases = {m: case(m, shape, repeats, timeout) for m in ("nothing", *methods)}
    idle = cases["nothing"]["peak_bytes"]
    print(f"\n{name}: {json.dumps(dataclasses.asdict(shape))}")
    print(f"{'':<26}{'median s':>10}{'first s':>9}{'MiB':>8}{'GFLOP/s':>9}{'sum':>14}{'trace':>14}")
    for method in methods:
        found = cases[method]
        if "error" in found:
            print(f"{method:<26}{found['error']}")
            continue
        found["peak_bytes_beyond_nothing"] = found["peak_bytes"] - idle
        print(
            f"{method:<26}{found['median_seconds']:>10.3f}{found['first_seconds']:>9.1f}"
            f"{harness.mebibytes(found['peak_bytes_beyond_nothing']):>8}"
            f"{found['gflops_thermometer']:>9.0f}{found['check'][0]:>14.6g}"
            f"{found['check'][1]:>14.6g}"
        )
    return {"shape": dataclasses.asdict(shape), "cases": cases}


def case(method: str, shape: Shape, repeats: int, timeout: float = 1800.0) -> dict:
    described = json.dumps({"method": method, "repeats": repeats, **dataclasses.asdict(shape)})
    return harness.in_a_process(__file__, [described], timeout)


def small() -> dict:
    """Log-prob kernel, N 32."""
    methods = ["gram", "plain", "nt contraction", "nt vector products", "nt structured"]
    return compare("small", Shape(), methods, 5, 300)


def large() -> dict:
    """Log-prob kernel, N 512; theirs is measured on fewer tiles and multiplied by their number."""
    ours = compare("large", Shape(sites=512), ["gram"], 1)
    theirs = {n: case("nt.batch contraction", Shape(sites=n), 1) for n in (2 * BATCH, 3 * BATCH)}
    tiles = lambda n: (n // BATCH) ** 2
    seconds = {n: found.get("median_seconds") for n, found in theirs.items()}
    print(f"nt.batch, tiles of {BATCH}: seconds {seconds}; tiles {[tiles(n) for n in theirs]}")
    content = {**ours, "nt_batch": theirs, "batch": BATCH}
    if all(seconds.values()):
        each = seconds[3 * BATCH] / tiles(3 * BATCH)
        content["nt_batch_seconds_at_512_by_tiles"] = each * tiles(512)
        ratio = each * tiles(512) / ours["cases"]["gram"]["median_seconds"]
        print(f"at N 512: {each * tiles(512):.0f} s by {each:.2f} s a tile; ratio {ratio:.1f}")
    return content


def trace_suite() -> dict:
    """Trace kernel at a vocabulary that neural-tangents can still hold."""
    methods = ["trace", "trace, 64 probes", "nt trace vector products"]
    methods += ["nt trace contraction", "nt trace structured"]
    return compare("trace", TINY_TRACE, methods, 3, 400)


def pythia() -> dict:
    """The shape of Pythia-70m."""
    methods = ["gram", "trace, 64 probes", "trace"]
    return compare("pythia", PYTHIA_70M, methods, 0, 3600)  # once: of minutes, seconds compile


BASE = Shape(layers=2, width=256, vocab=2048, sites=32, slots=32)
AXES = {
    "sites": [32, 64, 128, 256, 512],
    "slots": [16, 32, 64, 128, 256],
    "vocab": [2048, 8192, 32768, 131072],
    "layers": [2, 4, 8, 16],
}


def operations(shape: Shape) -> float:
    """Multiply-adds of the Gram engine's log-prob kernel, times 2."""
    n, t, d, v = shape.sites, shape.slots, shape.width, shape.vocab
    matrices = 12 * d * d * shape.layers
    passes = 3 * n * t * matrices  # forward, backward, and forming every gradient once
    attention = 6 * n * t * t * d * shape.layers
    pairs = 0.6 * n * n * matrices
    embedding, head = min(n * n * t * t, 0.6 * n * n * v) * d, n * n * (d + v) + 2 * n * d * v
    return 2 * (passes + attention + pairs + embedding + head)


def scaling() -> dict:
    """One size at a time; exponents of a power law through the points, measured and counted."""
    fit = lambda x, y: float(np.polyfit(np.log(x), np.log(y), 1)[0])
    axes = {}
    for axis, values in AXES.items():
        shapes = [dataclasses.replace(BASE, **{axis: value}) for value in values]
        found = [case("gram", shape, 5) for shape in shapes]
        seconds = [x["median_seconds"] for x in found]
        counted = [operations(shape) for shape in shapes]
        axes[axis] = {
            "values": values,
            "seconds": seconds,
            "peak_bytes": [x["peak_bytes"] for x in found],
            "operations": counted,
            "exponent": fit(values, seconds),
            "expected_exponent": fit(values, counted),
        }
        print(
            f"{axis:<8}{values}  s {[round(s, 3) for s in seconds]}  exponent "
            f"{axes[axis]['exponent']:.2f}, counted {axes[axis]['expected_exponent']:.2f}"
        )
    draw(axes)
    return {"base": dataclasses.asdict(BASE), "axes": axes}


def draw(axes: dict) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.1), layout="constrained")
    for panel, (axis, found) in zip(
        figure.subplots(1, len(axes), sharey=True), axes.items(), strict=True
    ):
        x, y = np.array(found["values"]), np.array(found["seconds"])
        counted = np.array(found["operations"])
        scale = np.exp(np.mean(np.log(y / counted)))
        label = f"measured, exponent {found['exponent']:.2f}"
        panel.loglog(x, y, "o-", color="#0072B2", label=label)
        label = f"operations, exponent {found['expected_exponent']:.2f}"
        panel.loglog(x, scale * counted, "--", color="#777777", label=label)
        panel.set_xlabel(axis)
        panel.set_xticks(x, [str(v) for v in x], minor=False)
        panel.minorticks_off()
        panel.legend(fontsize=7.5, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("seconds")
    harness.RESULTS.mkdir(exist_ok=True)
    figure.savefig(harness.RESULTS / "kernels_scaling.png", dpi=150)


SUITES = {
    "small": small,
    "trace": trace_suite,
    "scaling": scaling,
    "large": large,
    "pythia": pythia,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("suites", nargs="*", help=", ".join(SUITES))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.case:
        described = json.loads(chosen.case)
        method, repeats = described.pop("method"), described.pop("repeats")
        print(json.dumps(run_case(method, Shape(**described), repeats)))
        return
    if unknown := set(chosen.suites) - set(SUITES):
        sys.exit(f"unknown suite {min(unknown)!r}; there are {', '.join(SUITES)}")
    for name in chosen.suites or SUITES:
        print(f"-> {harness.write(f'kernels_{name}', SUITES[name]())}")


if __name__ == "__main__":
    main()
