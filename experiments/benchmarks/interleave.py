"""Frameworks side by side: one process each, one piece of work at a time, round after round.

Machines are noisy for minutes on end, so that medians of separate runs compare moments and not
frameworks. Here every round has one piece of work of each framework and one reading of a
thermometer, and ratios are taken within rounds too.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import harness
from peers.protocol import Shape

HERE = Path(__file__).parent
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several share an accelerator
ARCHITECTURES = ("llama", "gpt_neox")
PEERS = ("tunix", "trl")
PATIENCE = 1800.0  # seconds for a line: a large shape's first step compiles


def add_peer_arguments(parser: argparse.ArgumentParser) -> None:
    for peer in PEERS:
        words = f"the Python that has {peer} (see peers/{peer}_worker.py)"
        parser.add_argument(f"--{peer}-python", help=words)
    words = "pieces of TRL's batch, where its whole batch needs too much memory (1)"
    parser.add_argument("--trl-microbatches", type=int, default=1, help=words)
    words = "peers to leave out, which the result then says"
    parser.add_argument("--without", nargs="+", choices=PEERS, default=[], help=words)
    parser.add_argument("--rounds", type=int, default=15, help="measured ones (15)")
    parser.add_argument("--warm-up", type=int, default=3, help="rounds before them (3)")


def frameworks(chosen: argparse.Namespace) -> dict[str, list[str]]:
    """The command of every framework; SystemExit where one's Python is not named."""
    for peer in PEERS:
        if peer not in chosen.without and not getattr(chosen, f"{peer}_python"):
            raise SystemExit(
                f"{peer}: no Python that has it; give --{peer}-python PATH (peers/{peer}_worker.py "
                f"says what it needs), or leave it out by --without {peer}"
            )
    if chosen.model and "tunix" not in chosen.without:
        raise SystemExit("tunix trains a random model here; with --model say --without tunix")
    architectures = (kind_of(Path(chosen.model)),) if chosen.model else ARCHITECTURES
    script = lambda name: str(HERE / "peers" / f"{name}.py")
    found = {
        f"jaxdyn {a}": [sys.executable, str(HERE / "jaxdyn_worker.py"), a] for a in architectures
    }
    if not chosen.model:  # it is a program of its own, without a checkpoint
        found["floor"] = [sys.executable, script("floor")]
    if "tunix" not in chosen.without:
        found["tunix llama"] = [chosen.tunix_python, script("tunix_worker")]
    if "trl" not in chosen.without:
        trl = chosen.trl_python, script("trl_worker")
        for a in architectures:
            found[f"trl {a}"] = [*trl, a, str(chosen.trl_microbatches)]
    return found


def kind_of(directory: Path) -> str:
    """The architecture of a model's directory; SystemExit where the peers do not train it."""
    config = directory / "config.json"
    if not config.is_file():
        raise SystemExit(f"{directory}: no config.json there; --model wants a model's directory")
    kind = json.loads(config.read_text()).get("model_type")
    if kind not in ARCHITECTURES:
        wanted = " or ".join(ARCHITECTURES)
        raise SystemExit(f"{config}: model_type is {kind!r}; the peers train {wanted}")
    return kind


class Worker:
    """A framework's process; see peers/protocol.py for what passes between us."""

    def __init__(self, name: str, command: list[str], shape: Shape, task: str, said: TextIO):
        self.name, self._said = name, said
        python, script, *rest = command
        described = json.dumps(dataclasses.asdict(shape))
        self._process = subprocess.Popen(
            [python, script, described, task, *rest],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        self.about = self._read()

    def work(self) -> dict[str, float]:
        """One piece of work: seconds by part."""
        self._process.stdin.write("again\n")
        self._process.stdin.flush()
        return self._read()

    def peak_mebibytes(self) -> int | None:
        """The most memory that its process has had, where the system tells, as Linux does."""
        status = Path(f"/proc/{self._process.pid}/status")
        if not status.exists():
            return None
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) // 1024

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.stdout.close()

    def _read(self) -> dict:
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            self._process.kill()
            raise SystemExit(f"{self.name}: stopped after {PATIENCE:.0f} s without an answer")
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._said.seek(0)
            raise SystemExit(f"{self.name}: {harness.last_line(self._said.read())}")
        return json.loads(line)


@contextlib.contextmanager
def started(commands: dict[str, list[str]], shape: Shape, task: str) -> Iterator[list[Worker]]:
    """Every framework's worker, ready."""
    with contextlib.ExitStack() as stack:
        workers = []
        for name, command in commands.items():
            said = stack.enter_context(tempfile.TemporaryFile("w+"))
            workers.append(Worker(name, command, shape, task, said))
            stack.callback(workers[-1].close)
        yield workers


def interleaved(shape: Shape, task: str, chosen: argparse.Namespace) -> dict:
    """Rounds of every framework's `task` after a warm-up, and what they summarise to."""
    print(f"\n{task}: {json.dumps(dataclasses.asdict(shape))}")
    measured, gflops = [], []
    with started(frameworks(chosen), shape, task) as workers:
        about = {worker.name: worker.about for worker in workers}
        first = {worker.name: worker.work()[task] for worker in workers}
        for number in range(1 - chosen.warm_up, chosen.rounds + 1):
            heat = harness.thermometer()
            answers = {worker.name: worker.work() for worker in workers}
            said = "  ".join(f"{name} {parts[task]:.3f}" for name, parts in answers.items())
            print(f"{number:>4}  {heat:5.0f} GFLOP/s  {said}", flush=True)
            if number > 0:
                measured.append(answers)
                gflops.append(heat)
        peaks = {worker.name: worker.peak_mebibytes() for worker in workers}
    return {
        "shape": {**dataclasses.asdict(shape), "model": Path(shape.model).name},
        "without": chosen.without,
        "trl_microbatches": chosen.trl_microbatches,
        "about": about,
        "first_seconds": first,
        "peak_mebibytes": peaks,
        "gflops": gflops,
        "rounds": measured,
        "medians": medians(measured),
        "ratios": ratios(measured),
    }


def medians(rounds: list[dict]) -> dict[str, dict[str, float]]:
    """Median seconds by framework and part."""
    return {
        name: {part: statistics.median(r[name][part] for r in rounds) for part in parts}
        for name, parts in rounds[0].items()
    }


def ratios(rounds: list[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Every other framework's time over ours of its architecture, above 1 where we are faster.

    For each part: of the medians, and the median of the rounds' own ratios.
    """
    middle = medians(rounds)
    found = {}
    for name, parts in middle.items():
        ours = f"jaxdyn {name.partition(' ')[2] or 'llama'}"
        if name == ours:
            continue
        found[name] = {
            part: {
                "of_medians": middle[name][part] / middle[ours][part],
                "by_round": statistics.median(r[name][part] / r[ours][part] for r in rounds),
            }
            for part in parts
        }
    return found


def report(found: dict, parts: list[str]) -> None:
    """The medians and the ratios as a table."""
    heat = statistics.median(found["gflops"])
    print(f"\nmedian seconds of {len(found['rounds'])} rounds, at {heat:.0f} GFLOP/s;")
    print("in brackets theirs / ours: of the medians, and the rounds' median")
    print(f"{'':<18}" + "".join(f"{part:>24}" for part in parts) + f"{'peak MiB':>10}")
    for name, seconds in found["medians"].items():
        cells = []
        for part in parts:
            ratio = found["ratios"].get(name, {}).get(part)
            bracket = f" ({ratio['of_medians']:.2f}, {ratio['by_round']:.2f})" if ratio else ""
            cells.append(f"{seconds[part]:.4f}{bracket}")
        cells = "".join(f"{cell:>24}" for cell in cells)
        print(f"{name:<18}{cells}{found['peak_mebibytes'][name] or '–':>10}")
