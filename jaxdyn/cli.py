"""`jaxdyn quickstart | sft | rl | reward | evaluate | analyze | kernel | sketch | ledger | …`.

Anything the user can mend ends in one line on standard error and exit code 2. A training run that
gets SIGTERM saves and ends with exit code 75; the same command goes on from there, as it does after
Ctrl-C (exit code 130), from the newest checkpoint.
"""

import contextlib
import importlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxdyn.commands.arguments import parse
from jaxdyn.errors import JaxdynError, Preempted
from jaxdyn.grammar import nearest
from jaxdyn.storage.paths import one_line, require_name


class Command(NamedTuple):
    """What it does, in a line, and where the rest of it is; that is imported when it is given.

    Attributes:
      text: the line.
      options: the dataclass of its options; it imports no JAX, but that of a run.
      function: what is called with them, or with their fields by name where they have few.
      result: the line to print of what that returns.
      presets: options with a name, to start from by `--preset NAME` (or `--config FILE`).
      done_by: of the processes that are given the command all, or the first, which needs no
        others; or it must be given to one.
    """

    text: str
    options: str
    function: str
    result: str = ""
    presets: str = ""
    done_by: Literal["all", "first", "one"] = "all"


FEW = "commands.options:"
"""Where the options of commands with few of them are."""

COMMANDS = {
    "quickstart": Command(
        "make a small model, train it, run RL and classifier-first RL, write the report",
        "commands.options:QuickstartOptions",
        "commands.quickstart:quickstart",
        "report: {}",
        done_by="one",
    ),
    "sft": Command(
        "supervised training on a data set's completions",
        "config:SFTConfig",
        "train:run_sft",
        "model: {}",
        presets="presets:SFT",
    ),
    "rl": Command(
        "an RL run: standard or classifier-first, watched at probe sites",
        "config:RunConfig",
        "train:run_rl",
        "run: {0}   (jaxdyn report {0})",
        presets="presets:RL",
    ),
    "reward": Command(
        "train a reward model on preferences; `reward score` scores a file with one",
        "config:RewardModelConfig",
        "train:run_reward",
        "model: {}",
        presets="presets:REWARD",
    ),
    "reward score": Command(
        "scores of a file's completions or pairs by a reward model",
        "commands.reward_options:ScoreOptions",
        "commands.reward:run",
        "scores: {}",
        done_by="first",
    ),
    "evaluate": Command(
        "reward, pass@k and best-of-N of a run or a model on held-out prompts",
        "commands.evaluate_options:EvaluateOptions",
        "commands.evaluate:run",
        "evaluation: {}",
    ),
    "analyze": Command(
        "what the updates of a finished run did, recomputed from its checkpoints",
        "commands.options:AnalyzeOptions",
        "train:analyze",
        "analysis: {}",
    ),
    "kernel": Command(
        "the empirical NTK of a model between your prompts, by component: a file, a picture",
        "commands.kernel_options:KernelOptions",
        "commands.kernel:run",
        "kernel: {}",
    ),
    "sketch": Command(
        "sketches of the gradients at your texts, a file to look influences up in",
        "commands.sketch_options:SketchOptions",
        "commands.sketch:run",
        "sketches: {}",
    ),
    "ledger": Command(
        "what the training between two or more checkpoints did, exactly, part by part",
        "commands.ledger_options:LedgerOptions",
        "commands.ledger:run",
        "ledger: {}",
        done_by="one",
    ),
    "influence": Command(
        "which completions of a training step moved the policy where, and all else it did",
        "commands.influence_options:InfluenceOptions",
        "commands.influence:run",
        "influence: {}",
    ),
    "presets": Command(
        "pipelines to start from: models, memory by stage, and the hardware they need",
        "commands.options:PresetsOptions",
        "commands.presets:presets",
        done_by="first",
    ),
    "plan": Command(
        "memory, time and limits of a run on TPUs or GPUs that need not be there",
        "commands.plan_options:PlanOptions",
        "commands.plan:run",
        done_by="first",
    ),
    "report": Command(
        "one HTML page of figures and tables about one or more runs",
        "commands.options:ReportOptions",
        "report:write_report",
        "report: {}",
        done_by="first",
    ),
    "check": Command(
        "whether a run's directory is whole: its logs, its arrays, its checkpoints by checksum",
        "commands.options:CheckOptions",
        "commands.check:check",
        "whole: {}",
        done_by="first",
    ),
    "export": Command(
        "write a run's model as a Hugging Face directory",
        "commands.options:ExportOptions",
        "train:export",
        "model: {}",
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script's entry point."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    keep_compiled_programs()
    with failing_at_once(), hearing_interrupts(), quiet_threads():
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
    except MemoryError as error:
        fail(f"not enough memory: {one_line(error, kind=False)}")
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
    """One line on standard error, and the exit code; of what a long one quotes, its beginning."""
    print(f"jaxdyn: {' '.join(message.split()):.1000}", file=sys.stderr)
    sys.exit(code)


@contextlib.contextmanager
def hearing_interrupts() -> Iterator[None]:
    """Ctrl-C is heard wherever it comes: inside JAX's callback at a garbage collection Python
    cannot raise it, and would go on; so it comes again a moment later."""
    before = sys.unraisablehook

    def hook(lost: Any) -> None:
        if not issubclass(lost.exc_type, KeyboardInterrupt):
            return before(lost)
        told = (threading.main_thread().ident, signal.SIGINT)  # a signal, which also ends a wait
        again = threading.Timer(0.05, signal.pthread_kill, told)
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def quiet_threads() -> Iterator[None]:
    """What goes wrong in the thread of a save is told by who waits for it, in a line; its
    traceback is left out."""
    before = sys.excepthook, sys.unraisablehook, threading.excepthook
    is_main = lambda: threading.current_thread() is threading.main_thread()
    sys.excepthook = lambda *error: before[0](*error) if is_main() else None
    sys.unraisablehook = lambda lost: before[1](lost) if is_main() else None
    threading.excepthook = lambda _: None
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook, threading.excepthook = before


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


def has_work(command: str, arguments: list[str]) -> bool:
    """Start JAX on many processes if the environment says so; whether this one has work.

    Only the first prints. What needs no device it does alone.
    """
    if not os.environ.get("JAXDYN_DISTRIBUTED") or {"-h", "--help"} & set(arguments):
        return True
    from jaxdyn.distributed.processes import find_cluster, join

    cluster, done_by = find_cluster(), COMMANDS[command].done_by
    if cluster is None or done_by == "first":
        return cluster is None or cluster.index == 0
    if done_by == "one":
        raise JaxdynError(
            f"jaxdyn {command} is for one process, got {cluster.processes}; of many, jaxdyn sft "
            "and jaxdyn rl make use"
        )
    join(cluster)
    if cluster.index > 0:
        sys.stdout = io.StringIO()
    return True


def run_command(arguments: list[str]) -> None:
    """Do what the first word says, with the options that the others do."""
    for argument in arguments:
        require_name(argument, "an argument")
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: jaxdyn COMMAND [options]\n\nWhat one RL update does to a language model.\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<13} {command.text}")
        print("\n`jaxdyn COMMAND --help` lists a command's options.")
        return
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if name not in COMMANDS:
        raise JaxdynError(f"unknown command {name!r}{nearest(name, COMMANDS)}")
    if has_work(name, rest):
        command = COMMANDS[name]
        options = parse(f"jaxdyn {name}", rest, found(command.options), found(command.presets))
        few, function = command.options.startswith(FEW), found(command.function)
        result = function(**vars(options)) if few else function(options)
        if command.result:
            print(command.result.format(result))


def found(where: str) -> Any:
    """What the table names as "MODULE:NAME"; None for nothing."""
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(f"jaxdyn.{module}"), name) if where else None


if __name__ == "__main__":
    main()
