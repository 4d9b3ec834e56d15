"""Damaged files to every reader of files from outside: each is read, or refused in one line.

    PYTHONPATH=tests/report python tests/fuzz.py --seconds 60 --seed 0

prints how many files of each kind were read and refused. For one that ends otherwise (a traceback
from further in, a message of several lines, more than `SLOW` seconds) it prints the case, which
`--case N` repeats, and exits with 1.
"""

import argparse
import collections
import contextlib
import gzip
import io
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import damage
import numpy as np
import pyarrow
import tiny_runs
from pyarrow import parquet
from safetensors.numpy import save_file
from synthetic import write_run
from synthetic_ledger import saved_ledger
from test_influence_file import saved_one
from test_kernel_figure import saved_kernel

from jaxdyn.config import KINDS
from jaxdyn.data import JsonlFile, load_tokenizer
from jaxdyn.data.examples import as_json, example_of
from jaxdyn.data.files import rows_of
from jaxdyn.data.scored import read_scored
from jaxdyn.errors import JaxdynError
from jaxdyn.grammar import load_config, save_config
from jaxdyn.kernels import open_sketches, store_sketches
from jaxdyn.models import load_pretrained, pretrained_config
from jaxdyn.models.peft import add_peft
from jaxdyn.report.influence_file import load_influence
from jaxdyn.report.kernel_file import load_kernel
from jaxdyn.report.ledger_file import load_ledger, summarize_ledger
from jaxdyn.report.load import load_run
from jaxdyn.types import Sites

SLOW = 10.0
"""Seconds that no file may take."""


class Target(NamedTuple):
    """A kind of file: how it is read, whole files in a directory, which are damaged, and how."""

    read: Callable[[Path], Any]
    files: dict[str, bytes]
    damaged: tuple[str, ...]
    ways: tuple[Callable, ...]


def read_rows(path: Path) -> None:
    """Rows as a data set stores them."""
    file = JsonlFile(str(path), "prompt", "completion")
    for row, where in rows_of(path):
        as_json(example_of(row, file, where), where)


def sketches_of(loaded: tuple, path: Path) -> bytes:
    """A file of three sketches with their texts."""
    ids = np.arange(6, dtype=np.int32).reshape(3, 2)
    numbers = np.arange(3, dtype=np.int32)
    sites = Sites(ids, ids >= 0, numbers, 0 * numbers, ids[:, 1], numbers == 0)
    how = {"texts": {"context": ["a", "b", "c"]}, "replicates": 2, "side": 2}
    return store_sketches(path, *loaded, sites, (1, 2), **how).path.read_bytes()


def read_sketches(path: Path) -> None:
    """Open them, and read every row and text."""
    stored = open_sketches(path)
    np.asarray(stored.rows).sum()
    for row in range(len(stored)):
        stored.text("context", row)


def read_report(directory: Path) -> None:
    run = load_run(directory)
    for step in run.probe_files:
        run.probe(step)


def targets(root: Path) -> dict[str, Target]:
    """Every kind, with small files made for it."""
    model = Path(tiny_runs.make_model(root / "model"))
    config = tiny_runs.rl_config(root, "run")
    save_config(config, root / "config.json")
    for name, saved in (
        ("kernel", saved_kernel()),
        ("ledger", saved_ledger()),
        ("influence", saved_one()),
    ):
        saved.write(root / f"{name}.npz")
    write_run(root / "report")
    content = lambda *paths: {
        p.relative_to(base).as_posix(): p.read_bytes()
        for base in paths
        for p in sorted(base.rglob("*"))
        if p.is_file()
    }
    whole, report = content(model), content(root / "report")
    rows = (root / "prompts.jsonl").read_bytes()
    scored = rows.replace(b'"}', b'", "advantage": 1.5}')
    adapter = root / "adapter"
    adapter.mkdir()
    prefix = "base_model.model.gpt_neox.layers.0.attention.dense.lora_"
    factors = {
        f"{prefix}A.weight": np.ones((2, 16), "f4"),
        f"{prefix}B.weight": np.ones((16, 2), "f4"),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 6}')
    base = load_pretrained(model)
    table = io.BytesIO()
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["c", "d"]}), table)
    npz = (*damage.NPZ, *damage.NPZ, *damage.BYTES)
    one = lambda name: (root / name).read_bytes()
    in_json, in_lines = damage.JSON * 2 + damage.BYTES, damage.LINES + damage.BYTES
    tokens = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")
    logs = tuple(name for name in report if name.endswith(".jsonl"))
    arrays = tuple(name for name in report if name.endswith(".npz"))
    read_first = lambda read, name: lambda directory: read(directory / name)
    return {
        "run configuration": Target(
            lambda d: load_config(KINDS, d / "c.json"),
            {"c.json": one("config.json")},
            ("c.json",),
            in_json,
        ),
        "model configuration": Target(pretrained_config, whole, ("config.json",), in_json),
        "tokenizer": Target(load_tokenizer, whole, tokens, in_json),
        "weights": Target(
            load_pretrained, whole, ("model.safetensors",), damage.SAFETENSORS + damage.BYTES
        ),
        "adapter": Target(
            lambda d: add_peft(*base, d),
            content(adapter),
            ("adapter_model.safetensors",),
            damage.SAFETENSORS + damage.BYTES,
        ),
        "adapter configuration": Target(
            lambda d: add_peft(*base, d), content(adapter), ("adapter_config.json",), in_json
        ),
        "lines": Target(
            read_first(read_rows, "r.jsonl"), {"r.jsonl": rows}, ("r.jsonl",), in_lines
        ),
        "lines, packed": Target(
            read_first(read_rows, "r.jsonl.gz"),
            {"r.jsonl.gz": gzip.compress(rows)},
            ("r.jsonl.gz",),
            damage.BYTES + tuple(map(damage.gzipped, damage.LINES)),
        ),
        "scored lines": Target(
            lambda d: read_scored(str(d / "s.jsonl")), {"s.jsonl": scored}, ("s.jsonl",), in_lines
        ),
        "Parquet": Target(
            read_first(read_rows, "t.parquet"),
            {"t.parquet": table.getvalue()},
            ("t.parquet",),
            damage.BYTES,
        ),
        "kernel file": Target(
            read_first(load_kernel, "k.npz"), {"k.npz": one("kernel.npz")}, ("k.npz",), npz
        ),
        "ledger file": Target(
            lambda d: summarize_ledger(load_ledger(d / "l.npz")),
            {"l.npz": one("ledger.npz")},
            ("l.npz",),
            npz,
        ),
        "influence file": Target(
            read_first(load_influence, "i.npz"), {"i.npz": one("influence.npz")}, ("i.npz",), npz
        ),
        "sketches": Target(
            read_first(read_sketches, "s.safetensors"),
            {"s.safetensors": sketches_of(base, root / "s.safetensors")},
            ("s.safetensors",),
            damage.SAFETENSORS + damage.BYTES,
        ),
        "run's records": Target(read_report, report, logs, in_lines),
        "run's arrays": Target(read_report, report, arrays, npz),
    }


def try_case(target: Target, directory: Path, rng: np.random.Generator) -> tuple[str, str]:
    """Damage a file and read; what came of it ("read", "refused" or a fault), and how."""
    name, way = damage.one(rng, target.damaged), damage.one(rng, target.ways)
    what = f"{name} {way.__name__}"
    path = directory / name
    try:
        path.write_bytes(way(rng, target.files[name]))
    except ValueError:  # a way of JSON met what is none
        return "refused", what
    began = time.monotonic()
    try:
        target.read(directory)
        outcome = "read"
    except JaxdynError as error:
        outcome = "refused" if "\n" not in str(error) and len(str(error)) < 2000 else "long message"
    except Exception:
        outcome = "traceback"
        what += "\n" + traceback.format_exc()
    finally:
        path.write_bytes(target.files[name])
    return ("slow" if time.monotonic() - began > SLOW else outcome), what


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    counts: collections.Counter = collections.Counter()
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        every = targets(Path(name))
        kinds = list(every)
        directories = {}
        for kind, target in every.items():
            directories[kind] = Path(name) / f"damaged {kind}"
            for file, content in target.files.items():
                path = directories[kind] / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            target.read(directories[kind])  # whole, it is read
        began, case = time.monotonic(), options.case or 0
        while time.monotonic() - began < options.seconds:
            kind = kinds[case % len(kinds)]
            rng = np.random.default_rng([options.seed, case])
            with contextlib.redirect_stderr(io.StringIO()):
                outcome, what = try_case(every[kind], directories[kind], rng)
            counts[kind, outcome] += 1
            if outcome not in ("read", "refused"):
                faults += 1
                print(f"case {case}: {kind}: {outcome}: {what}")
            case += 1
            if options.case is not None:
                break
    for kind in kinds:
        told = ", ".join(
            f"{n} {outcome}" for (k, outcome), n in sorted(counts.items()) if k == kind
        )
        print(f"{kind}: {told}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{counts.total()} files, {faults} faults, at most {peak:.0f} MiB")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
