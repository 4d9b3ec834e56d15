"""`jaxdyn quickstart | sft | rl | evaluate | analyze | kernel | plan | report | export`.

Anything the user can mend ends in one line on standard error and exit code 2. A training run that
gets SIGTERM saves and ends with exit code 75; the same command goes on from there, as it does after
Ctrl-C (exit code 130), from the newest checkpoint.
"""

import contextlib
import dataclasses
import io
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from jaxdyn.errors import JaxdynError, Preempted

COMMANDS = {
    "quickstart": "make a small model, train it, run RL and classifier-first RL, write the report",
    "sft": "supervised training on a data set's completions",
    "rl": "an RL run: standard or classifier-first, watched at probe sites",
    "evaluate": "reward, pass@k and best-of-N of a run or a model on held-out prompts",
    "analyze": "what the updates of a finished run did, recomputed from its checkpoints",
    "kernel": "the empirical NTK of a model between your prompts, by component: a file, a picture",
    "plan": "memory, time and limits of a run on a TPU slice that need not be there",
    "report": "one HTML page of figures and tables about one or more runs",
    "export": "write a run's model as a Hugging Face directory",
}

ALONE = ("report", "plan")
"""What one process does of many that are given the command."""


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Make a small Pythia-like model, train it on anagrams until it is partly right, run standard
    and classifier-first RL from that checkpoint, and write the report. Needs no network.

    Attributes:
      output: where everything goes.
      seed: seed of the model, the data order and the sampling.
    """

    output: str = "runs/quickstart"
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Analyze:
    """Take again the update that follows each checkpoint of RUN, and measure what it did.

    Attributes:
      run: the run's directory.
      output: where to write; RUN/analysis when not given.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    output: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """Figures, tables and one self-contained HTML page about the runs.

    Attributes:
      runs: run directories.
      output: where to write; by default `report` in the run, or in the runs' common parent.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    output: str | None = None


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the model of RUN as a Hugging Face directory.

    Attributes:
      run: the run's directory.
      output: the directory to write.
      step: which checkpoint, or "best" (train.keep_best); the newest when not given.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    output: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    step: int | Literal["best"] | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script's entry point."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    keep_compiled_programs()
    with failing_at_once():
        run_or_fail(arguments)


def run_or_fail(arguments: list[str]) -> None:
    """Run a command; what went wrong becomes a line and an exit code."""
    try:
        run_command(arguments)
    except JaxdynError as error:
        fail(str(error), error.exit_code)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        fail(f"{error.strerror or error}{where}")
    except Preempted as stop:
        print(f"jaxdyn: {stop}; the same command goes on from there", file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        print("jaxdyn: interrupted; the same command goes on from there", file=sys.stderr)
        sys.exit(130)


def keep_compiled_programs() -> None:
    """Have JAX keep what it compiles, up to 4 GiB, so that the next start takes seconds.

    JAX reads these on import; what the environment says already stays.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxdyn" / "compiled"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(4 * 2**30))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    for program in cache.glob("*-cache"):  # a kill between the two files' writes disables the rest
        if not program.with_name(program.name.removesuffix("cache") + "atime").exists():
            program.unlink(missing_ok=True)


def fail(message: str, code: int = 2) -> None:
    """One line on standard error, and the exit code."""
    print(f"jaxdyn: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def failing_at_once() -> Iterator[None]:
    """A process of many that fails must not wait at its end, as JAX would, for those that wait for
    it: it goes, and the others end because it is gone."""
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if not of_many() or code in (None, 0, Preempted.exit_code):
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def of_many() -> bool:
    """Whether this process has joined others."""
    if "jaxdyn.distributed.processes" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def join_others(command: str, arguments: list[str]) -> bool:
    """Start JAX on many processes if the environment says so; whether this one has work.

    Only the first prints. What needs no device it does alone.
    """
    if not os.environ.get("JAXDYN_DISTRIBUTED") or {"-h", "--help"} & set(arguments):
        return True
    from jaxdyn.distributed.processes import find_cluster, join

    cluster = find_cluster()
    if cluster is None or command in ALONE:
        return cluster is None or cluster.index == 0
    if command == "quickstart":
        raise JaxdynError(
            f"jaxdyn quickstart is for one process, got {cluster.processes}; of many, jaxdyn sft "
            "and jaxdyn rl make use"
        )
    join(cluster)
    if cluster.index > 0:
        sys.stdout = io.StringIO()
    return True


def run_command(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: jaxdyn COMMAND [options]\n\nWhat one RL update does to a language model.\n")
        for name, text in COMMANDS.items():
            print(f"  {name:<11} {text}")
        print("\n`jaxdyn COMMAND --help` lists a command's options.")
        return
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        from jaxdyn.grammar import nearest

        raise JaxdynError(f"unknown command {command!r}{nearest(command, COMMANDS)}")
    if not join_others(command, rest):
        return
    {
        "quickstart": quickstart_command,
        "sft": sft_command,
        "rl": rl_command,
        "evaluate": evaluate_command,
        "analyze": analyze_command,
        "kernel": kernel_command,
        "plan": plan_command,
        "report": report_command,
        "export": export_command,
    }[command](rest)


def quickstart_command(arguments: list[str]) -> None:
    chosen = parse(Quickstart, "jaxdyn quickstart", arguments)
    from jaxdyn.commands.quickstart import quickstart

    quickstart(Path(chosen.output), chosen.seed)


def sft_command(arguments: list[str]) -> None:
    from jaxdyn.config import SFTConfig
    from jaxdyn.presets import SFT

    config = configure(SFTConfig, SFT, "jaxdyn sft", arguments)
    from jaxdyn.train import run_sft

    print(f"model: {run_sft(config)}")


def rl_command(arguments: list[str]) -> None:
    from jaxdyn.config import RunConfig
    from jaxdyn.presets import RL

    config = configure(RunConfig, RL, "jaxdyn rl", arguments)
    from jaxdyn.train import run_rl

    run = run_rl(config)
    print(f"run: {run}   (jaxdyn report {run})")


def evaluate_command(arguments: list[str]) -> None:
    from jaxdyn.commands.evaluate import EvaluateOptions, run_evaluate

    run_evaluate(parse(EvaluateOptions, "jaxdyn evaluate", arguments))


def analyze_command(arguments: list[str]) -> None:
    chosen = parse(Analyze, "jaxdyn analyze", arguments)
    from jaxdyn.paths import open_path
    from jaxdyn.train import analyze

    run = open_path(chosen.run)
    print(f"analysis: {analyze(run, open_path(chosen.output or run / 'analysis'))}")


def kernel_command(arguments: list[str]) -> None:
    from jaxdyn.commands.kernel_options import KernelConfig

    config = parse(KernelConfig, "jaxdyn kernel", arguments)
    from jaxdyn.commands.kernel import run_kernel

    run_kernel(config)


def plan_command(arguments: list[str]) -> None:
    from jaxdyn.commands.plan import PlanConfig, run_plan

    run_plan(parse(PlanConfig, "jaxdyn plan", arguments))


def report_command(arguments: list[str]) -> None:
    chosen = parse(Report, "jaxdyn report", arguments)
    if not chosen.runs:
        raise JaxdynError("jaxdyn report needs at least one run directory")
    from jaxdyn.report import write_report

    print(f"report: {write_report(chosen.runs, chosen.output)}")


def export_command(arguments: list[str]) -> None:
    chosen = parse(Export, "jaxdyn export", arguments)
    from jaxdyn.paths import open_path
    from jaxdyn.train import export

    print(f"model: {export(open_path(chosen.run), open_path(chosen.output), chosen.step)}")


def configure(kind: type, presets: dict[str, Any], program: str, arguments: list[str]) -> Any:
    """A configuration from `--preset NAME` or `--config FILE`, then nested overrides."""
    from jaxdyn.grammar import load_config
    from jaxdyn.presets import preset

    name, arguments = take_option(arguments, "--preset")
    path, arguments = take_option(arguments, "--config")
    if name and path:
        raise JaxdynError("give --preset or --config, not both")
    default = preset(presets, name) if name else kind()
    if path:
        default = load_config(kind, Path(path))
    what = (kind.__doc__ or "").split("\n\n")[0]
    text = (
        f"{what}\n\n--preset NAME starts from a preset ({', '.join(presets)}), --config FILE "
        "from a run's config.json; the options below override either."
    )
    return parse(kind, program, arguments, default, text)


def take_option(arguments: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of `name VALUE` or `name=VALUE`, and the arguments without it."""
    for i, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            return argument.split("=", 1)[1], arguments[:i] + arguments[i + 1 :]
        if argument == name:
            if i + 1 == len(arguments):
                raise JaxdynError(f"{name} needs a value")
            return arguments[i + 1], arguments[:i] + arguments[i + 2 :]
    return None, arguments


def parse(
    kind: type,
    program: str,
    arguments: list[str],
    default: Any = tyro.MISSING_NONPROP,
    description: str | None = None,
) -> Any:
    """`tyro.cli`, with its boxed complaints turned into one line."""
    said = io.StringIO()
    columns = os.environ.get("COLUMNS")
    helping = any(a in ("-h", "--help") for a in arguments)
    os.environ["COLUMNS"] = columns or "100" if helping else "1000"
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind, prog=program, args=arguments, default=default, description=description
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise JaxdynError(one_line(said.getvalue())) from None
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns


def one_line(box: str) -> str:
    """What a boxed message says: its first paragraph, and the nearest option if it names some."""
    from jaxdyn.grammar import nearest

    rows = [row.strip("│╭╮╰╯ ").removeprefix("─ ") for row in box.splitlines()]
    rows = [row for row in rows if row.strip("─-")]  # rules are of dashes where a box is ASCII
    said = rows[1] if len(rows) > 1 else " ".join(rows)
    if said.endswith(":") and len(rows) > 2:
        said += f" {rows[2]}"
    options = [row.split()[0] for row in rows[2:] if row.startswith("--")]
    if "nrecognized" in said and options:
        unknown = next((word.strip(",") for word in said.split() if word.startswith("--")), "")
        said += nearest(unknown, options)
    return said


if __name__ == "__main__":
    main()
