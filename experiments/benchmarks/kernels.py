"""What kernels cost: the Gram engine beside whole gradients and neural-tangents.

Claims (two CPU cores, float32, warm; medians; memory beyond a process that makes the problem only):
  small    log-prob kernel, 6 layers, d 512, V 8192, N 32 sites, T 32 tokens: at most 0.6 of the
           time of neural-tangents' fastest and half its memory.
  large    the same at N 512 with 8 GB for both (nt.batch for theirs): at least 8 times faster.
  trace    trace kernel, 2 layers, d 64, V 2048, N 4, T 16: at least 100 times faster than
           neural-tangents' fastest, under 300 MiB.
  pythia   6 layers, d 512, V 50304, N 32, T 64: log-prob and trace kernels within 8 GB, which
           neural-tangents cannot do at all for the trace.
  chat     30 layers, d 576, V 49152, N 32, T 64, as a chat model of 135 M parameters has: the
           log-prob kernel within 4 GB in 1.5 times the floor, and by part as well.
  scaling  seconds against N, T, V and depth: fitted exponents beside those of the operations count.
The floor of a log-prob kernel is one forward and backward pass of the batch, and the products of
its Gram matrices at the machine's matrix rate, as measured beside; the table says how many times
the floor a method takes.
Command:   python experiments/benchmarks/kernels.py SUITE ... (all of them without one)
Time:      about an hour on two CPU cores; small, trace and scaling take ten minutes together.
Expected:  tables on the screen, results/kernels_SUITE.json, results/kernels_scaling.png.
           A peer that fails, or whose numbers are not ours, ends the benchmark.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import harness
import kernel_cases
import numpy as np
from kernel_cases import METHODS, Shape

TOY = Shape(layers=1, width=16, vocab=24, sites=6, slots=6, batch=2)
ROUNDING = 1e-5  # of a sum or a trace: the largest difference between two methods in float32


def case(method: str, shape: Shape, repeats: int, timeout: float = 1800.0) -> dict:
    """The method in a process of its own."""
    described = json.dumps({"method": method, "repeats": repeats, **dataclasses.asdict(shape)})
    command = [kernel_cases.__file__, described]
    return harness.in_a_process(method, command, timeout, METHODS[method].cannot)


def compare(name: str, shape: Shape, methods: list[str], repeats: int, timeout=1800.0) -> dict:
    """Every method beside the others, in a table; they must agree."""
    cases = {m: case(m, shape, repeats, timeout) for m in ("nothing", "one pass", *methods)}
    idle = cases["nothing"]["peak_bytes"]
    print(f"\n{name}: {json.dumps(dataclasses.asdict(shape))}")
    columns = f"{'':<26}{'median s':>10}{'× floor':>9}{'first s':>9}{'MiB':>8}{'GFLOP/s':>9}"
    print(f"{columns}{'sum':>14}{'trace':>14}")
    for method in methods:
        found = cases[method]
        if "error" in found:
            print(f"{method:<26}{found['error']}")
            continue
        found["peak_bytes_beyond_nothing"] = found["peak_bytes"] - idle
        of_floor = ""
        if METHODS[method].quantity == "log-prob":
            found["floor_seconds"] = floor_seconds(shape, cases["one pass"])
            of_floor = f"{found['median_seconds'] / found['floor_seconds']:.2f}"
        print(
            f"{method:<26}{found['median_seconds']:>10.3f}{of_floor:>9}{found['first_seconds']:>9.1f}"
            f"{harness.mebibytes(found['peak_bytes_beyond_nothing']):>8}"
            f"{found['gflops_thermometer']:>9.0f}{found['check'][0]:>14.6g}"
            f"{found['check'][1]:>14.6g}"
        )
    agree({method: cases[method]["check"] for method in methods if "check" in cases[method]})
    return {"shape": dataclasses.asdict(shape), "cases": cases}


def floor_seconds(shape: Shape, one_pass: dict) -> float:
    """A pass, and the Gram products at the rate that was measured beside it."""
    return (
        one_pass["median_seconds"] + gram_operations(shape) / one_pass["gflops_thermometer"] / 1e9
    )


def gram_operations(shape: Shape) -> float:
    """Multiply-adds times 2 of half the pairs' inner products, each matrix by its cheaper way:

    between slots, N²T²(I + O)/2, or with every gradient formed, N T I O + N² I O/2; a row's tokens
    of the embedding meet only where they are the same, and the classifier has one slot a row.
    """
    n, t, d, v = shape.sites, shape.slots, shape.width, shape.vocab
    matrices = 4 * [(d, d)] + [(d, 4 * d), (4 * d, d)]
    cheaper = lambda i, o: min(n * n * t * t * (i + o) / 2, n * t * i * o + n * n * i * o / 2)
    return 2 * (shape.layers * sum(cheaper(*m) for m in matrices) + n * n * (d + v) / 2)


def agree(checks: dict[str, list[float]]) -> None:
    """SystemExit where two methods of one quantity differ by more than float32 rounds."""
    firsts: dict[str, str] = {}
    for method, found in checks.items():
        first = firsts.setdefault(METHODS[method].quantity, method)
        gap = np.abs(np.subtract(found, checks[first]))
        if not np.all(gap <= ROUNDING * np.max(np.abs(checks[first]))):
            raise SystemExit(f"{method}: sum and trace {found}, by {first} {checks[first]}")


def small(shape: Shape) -> dict:
    """Log-prob kernel, N 32."""
    methods = [
        "gram",
        "gram by part",
        "plain",
        "nt contraction",
        "nt vector products",
        "nt structured",
    ]
    return compare("small", shape, methods, 5, 300)


def large(shape: Shape) -> dict:
    """Log-prob kernel, N 512; theirs is measured on fewer tiles and multiplied by their number."""
    content = compare("large", shape, ["gram"], 1)
    counts = [2 * shape.batch, 3 * shape.batch]
    parts = [dataclasses.replace(shape, sites=n) for n in counts]
    both = [compare("part of it", part, ["gram", "nt.batch contraction"], 1) for part in parts]
    theirs = [one["cases"]["nt.batch contraction"] for one in both]
    tiles = lambda n: (n / shape.batch) ** 2
    each = theirs[-1]["median_seconds"] / tiles(counts[-1])
    whole = each * tiles(shape.sites)
    ratio = whole / content["cases"]["gram"]["median_seconds"]
    print(f"at N {shape.sites}: {whole:.0f} s by {each:.2f} s a tile; ratio {ratio:.1f}")
    content |= {"nt_batch": dict(zip(counts, theirs, strict=True)), "batch": shape.batch}
    return content | {f"nt_batch_seconds_at_{shape.sites}_by_tiles": whole}


def trace_suite(shape: Shape) -> dict:
    """Trace kernel at a vocabulary that neural-tangents can still hold."""
    methods = ["trace", "trace, 64 probes", "nt trace vector products"]
    methods += ["nt trace contraction", "nt trace structured"]
    return compare("trace", shape, methods, 3, 400)


def pythia(shape: Shape) -> dict:
    """The shape of Pythia-70m, ours alone."""
    methods = ["gram", "trace, 64 probes", "trace"]
    content = compare("pythia", shape, methods, 0, 3600)  # once: of minutes, seconds compile
    numbers = shape.sites * shape.vocab * 12 * shape.layers * shape.width**2
    without = f"its Jacobian of the logits has {numbers:.0e} numbers and more"
    print(f"neural-tangents left out: {without}")
    return content | {"without": {"neural-tangents": without}}


def chat(shape: Shape) -> dict:
    """The size of a chat model of 135 M parameters, ours alone."""
    return compare("chat", shape, ["gram", "gram by part"], 3, 3600)


AXES = {  # multiples of the base shape's sizes
    "sites": [1, 2, 4, 8, 16],
    "slots": [0.5, 1, 2, 4, 8],
    "vocab": [1, 4, 16, 64],
    "layers": [1, 2, 4, 8],
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


def scaling(base: Shape) -> dict:
    """One size at a time; exponents of a power law through the points, measured and counted."""
    fit = lambda x, y: float(np.polyfit(np.log(x), np.log(y), 1)[0])
    axes = {}
    for axis, multiples in AXES.items():
        values = [int(x * getattr(base, axis)) for x in multiples]
        shapes = [dataclasses.replace(base, **{axis: value}) for value in values]
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
    return {"base": dataclasses.asdict(base), "axes": axes}


def draw(axes: dict, path: Path) -> None:
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
    figure.savefig(path, dpi=150)


SUITES = {
    "small": (small, Shape()),
    "trace": (trace_suite, Shape(layers=2, width=64, vocab=2048, sites=4, slots=16)),
    "scaling": (scaling, Shape(layers=2, width=256, vocab=2048)),
    "large": (large, Shape(sites=512)),
    "chat": (chat, Shape(layers=30, width=576, vocab=49152, slots=64, budget=4)),
    "pythia": (pythia, Shape(vocab=50304, slots=64)),
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("suites", nargs="*", help=", ".join(SUITES))
    words = "every suite at a toy shape, to see in seconds that it runs"
    parser.add_argument("--toy", action="store_true", help=words)
    harness.add_output(parser)
    chosen = parser.parse_args()
    for name in harness.known(chosen.suites, SUITES):
        suite, shape = SUITES[name]
        found = suite(TOY if chosen.toy else shape)
        path = harness.write(chosen.output, f"kernels_{name}" + "_toy" * chosen.toy, found)
        if name == "scaling":
            draw(found["axes"], path.with_suffix(".png"))
        print(f"-> {path}")


if __name__ == "__main__":
    main()
