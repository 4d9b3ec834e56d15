"""Claim: who of 10⁵ stored gradients is nearest to a query's is told in under a second.

    python experiments/benchmarks/sketch.py --rows 100000 --queries 1 8
    python experiments/benchmarks/sketch.py --rows 10000 20000 50000 100000    # cost against N

Prints, of a file with so many rows (R = 32, p = 8, 16 KiB a row, of random numbers: the cost does
not depend on them), the seconds and CPU seconds of `nearest_sketches`, medians of `--rounds`, the
first of which reads a file that the system may not hold; and the rows that a model's sketching
gives a second, with `--model DIRECTORY`, against a forward and backward pass of the same rows.
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxdyn import kernels
from jaxdyn.kernels import sketch_file
from jaxdyn.models import LanguageModel, gpt_neox, load_pretrained
from jaxdyn.types import Sites


@contextlib.contextmanager
def random_file(count: int, replicates: int, side: int) -> Iterator[tuple[LanguageModel, Path]]:
    """A file of `count` rows, drawn a few at a time."""
    model = LanguageModel(gpt_neox(64, width=16, num_layers=1, num_heads=2, max_positions=16))
    said = {
        "format": sketch_file.FORMAT,
        "key": [1, 2],
        "config": sketch_file.as_said(model.config),
        "preconditioned": False,
        "params": "",
        "about": {},
    }
    header = sketch_file._Header(said, (count, 2, replicates, side**2), {})
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.safetensors"
        with path.open("wb") as file:
            file.write(header.content)
            for start in range(0, count, 1000):
                shape = min(1000, count - start), *header.shape[1:]
                file.write(rng.standard_normal(shape, np.float32).tobytes())
        yield model, path


def query_seconds(model, path: Path, queries: int, rounds: int) -> dict[str, float]:
    """Seconds of a query, from the opening of the file."""
    rng = np.random.default_rng(1)
    wall, cpu = [], []
    for _ in range(rounds):
        before, began = time.process_time(), time.perf_counter()
        stored = kernels.open_sketches(path)
        shape = (2, queries, *stored.rows.shape[2:])
        drawn = jnp.asarray(rng.standard_normal(shape, np.float32))
        asked = kernels.Sketch(drawn[0], drawn[1], stored.key, model.config)
        kernels.nearest_sketches(stored, asked, 10)
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - before)
    later = slice(1, None) if rounds > 1 else slice(None)
    return {
        "rows": len(stored),
        "queries": queries,
        "first_s": wall[0],
        "s": statistics.median(wall[later]),
        "cpu_s": statistics.median(cpu[later]),
        "gb": path.stat().st_size / 1e9,
    }


def sketching(directory: str, slots: int, rows: int, rounds: int) -> dict[str, float]:
    """Rows a second of a model's sketches, and of a forward and backward pass of the same rows."""
    model, params = load_pretrained(directory)
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, model.config.vocab_size, (rows, slots))
    sites = Sites(
        tokens=jnp.asarray(tokens, jnp.int32),
        mask=jnp.ones((rows, slots), bool),
        rows=jnp.arange(rows, dtype=jnp.int32),
        positions=jnp.full(rows, slots - 2, jnp.int32),
        targets=jnp.asarray(tokens[:, -1], jnp.int32),
        is_prompt=jnp.zeros(rows, bool),
    )
    view = model.view(params)

    @jax.jit
    def passes(view):
        def loss(view):
            phi = model.features(view["backbone"], sites.tokens, sites.mask)
            logits = model.logits(view["classifier"], phi[:, slots - 2])
            logp = jax.nn.log_softmax(logits)
            return jnp.take_along_axis(logp, sites.targets[:, None], axis=1).sum()

        return jax.grad(loss)(view)

    def sketches():
        how = {"replicates": 32, "side": 8}
        return kernels.sketch_gradients(model, params, sites, jax.random.key(0), **how).body

    cpu: dict[str, list[float]] = {"sketch": [], "passes": []}
    for number in range(rounds + 1):
        for name, function in (("sketch", sketches), ("passes", lambda: passes(view))):
            began = time.process_time()
            jax.block_until_ready(function())
            if number:  # the first compiles
                cpu[name].append(time.process_time() - began)
    ratio = [a / b for a, b in zip(cpu["sketch"], cpu["passes"], strict=True)]
    return {
        "slots": slots,
        "rows_per_cpu_s": rows / statistics.median(cpu["sketch"]),
        "times_a_pass": statistics.median(ratio),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000])
    parser.add_argument("--queries", type=int, nargs="*", default=[1])
    parser.add_argument("--replicates", type=int, default=32)
    parser.add_argument("--side", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="also sketch random rows of this model")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    print(json.dumps({"cpus": os.cpu_count(), "load": os.getloadavg()[0]}))
    for count in options.rows:
        with random_file(count, options.replicates, options.side) as (model, path):
            for queries in options.queries:
                print(json.dumps(query_seconds(model, path, queries, options.rounds)), flush=True)
    if options.model:
        how = options.slots, options.batch, options.rounds
        print(json.dumps(sketching(options.model, *how)))


if __name__ == "__main__":
    main()
