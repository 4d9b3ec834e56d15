"""What the benchmarks share: processes, medians, peak memory, a thermometer of the machine.

A case runs in a process of its own, so that its peak memory is its own; one that only prepares the
problem is run beside them, and peak memory is reported beyond its. A case that fails ends the
benchmark, unless it is declared that it cannot be done.
"""

import argparse
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def thermometer() -> float:
    """GFLOP/s of a float32 matrix product of 2048², the best of five: the machine's speed now."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((2048, 2048), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    seconds = [timed(lambda: product(x))[0] for _ in range(6)][1:]
    return 2 * 2048**3 / min(seconds) / 1e9


def matrix_rate(dtype: str) -> float:
    """Flop/s of a large matrix product in `dtype`, the best of five: what an update could reach."""
    import jax
    import jax.numpy as jnp

    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    return 2 * size**3 / min(timed(lambda: product(x))[0] for _ in range(6))


def copy_rate() -> float:
    """Bytes a second that x + 1 reads and writes, for an x of 256 MiB, the best of five."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones(2**26, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / min(timed(lambda: add(x))[0] for _ in range(6))


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the function's arrays are there, and the arrays."""
    import jax

    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - start, result


CLOCKS = {"wall": time.perf_counter, "cores": time.process_time}


def clocks(function: Callable[[], Any]) -> dict[str, float]:
    """Seconds of the wall, and of all cores, to which others add less."""
    import jax

    began = {name: clock() for name, clock in CLOCKS.items()}
    jax.block_until_ready(function())
    return {name: clock() - began[name] for name, clock in CLOCKS.items()}


def typical(found: Iterable[dict[str, float]]) -> dict[str, float]:
    """The median by clock."""
    found = list(found)
    return {clock: statistics.median(one[clock] for one in found) for clock in CLOCKS}


def ratio(over: dict[str, float], under: dict[str, float]) -> dict[str, float]:
    return {clock: over[clock] / under[clock] for clock in CLOCKS}


def measure(function: Callable[[], Any], repeats: int, check: Callable[[Any], Any]) -> dict:
    """Seconds (the first call compiles), this process's peak memory, and a check of the result."""
    first, result = timed(function)
    seconds = [timed(function)[0] for _ in range(repeats)] or [first]
    return {
        "first_seconds": first,
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "gflops_thermometer": thermometer(),
        "check": check(result),
    }


def in_a_process(
    name: str,
    command: list[str],
    timeout: float = 1800.0,
    cannot: str = "",
    environ: Mapping[str, str] = os.environ,
) -> dict:
    """The JSON that `python *command` prints last.

    `cannot` declares why it may run out of memory or of time: what then became of it is "error" in
    the result. Every other failure ends the benchmark, with the last line that was said.
    """
    command = [sys.executable, *command]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=dict(environ)
        )
    except subprocess.TimeoutExpired:
        too_much, why = True, f"stopped after {timeout:.0f} s"
    else:
        if not done.returncode:
            return json.loads(done.stdout.splitlines()[-1])
        killed = done.returncode == -signal.SIGKILL
        too_much = killed or "RESOURCE_EXHAUSTED" in done.stderr
        why = "killed (out of memory?)" if killed else last_line(done.stderr)
    if cannot and too_much:
        return {"error": f"{why} ({cannot})"}
    raise SystemExit(f"{name}: {why}")


def last_line(said: str) -> str:
    """What a process said last, at most 300 characters of it."""
    return (said.strip().splitlines() or ["ended without a word"])[-1][:300]


def machine() -> dict:
    """The device, the processor and the versions that a result belongs to."""
    import jax

    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def known(chosen: list[str], names: Iterable[str]) -> list[str]:
    """What was chosen of the names, all of them without a choice; SystemExit for another."""
    if unknown := set(chosen) - set(names):
        raise SystemExit(f"unknown {min(unknown)!r}; there are {', '.join(names)}")
    return chosen or list(names)


def add_output(parser: argparse.ArgumentParser) -> None:
    words = "directory of the results (results/ beside the script)"
    parser.add_argument("--output", type=Path, default=RESULTS, help=words)


def write(directory: Path, name: str, content: dict) -> Path:
    """Write NAME.json."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")
    return path


def mebibytes(count: float) -> str:
    return f"{count / 2**20:.0f}"
