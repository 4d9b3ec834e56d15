"""The options of the commands that have few."""

import dataclasses
from typing import Annotated, Literal

import tyro

from jaxdyn.errors import JaxdynError
from jaxdyn.grammar import LARGEST_SEED, at_least


@dataclasses.dataclass(frozen=True)
class QuickstartOptions:
    """Make a small Pythia-like model, train it on anagrams until it is partly right, run standard
    and classifier-first RL from that checkpoint, and write the report. Needs no network.

    Attributes:
      output: where everything goes.
      seed: seed of the model, the data order and the sampling.
    """

    output: str = "runs/quickstart"
    seed: int = 0

    def __post_init__(self):
        at_least(0, self, "", "seed", most=LARGEST_SEED)


@dataclasses.dataclass(frozen=True)
class AnalyzeOptions:
    """Take again the update that follows each checkpoint of RUN, and measure what it did.

    Attributes:
      run: the run's directory.
      output: where to write; RUN/analysis when not given.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    output: str | None = None


@dataclasses.dataclass(frozen=True)
class CheckOptions:
    """Say whether the directory of RUN is whole: its configuration, the logs up to the newest
    checkpoint, the files of arrays, and the checkpoints by their checksums.

    Attributes:
      run: the run's directory.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """Figures, tables and one self-contained HTML page about the runs.

    Attributes:
      runs: run directories.
      output: where to write; by default `report` in the run, or in the runs' common parent.
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    output: str | None = None

    def __post_init__(self):
        if not self.runs:
            raise JaxdynError("jaxdyn report needs at least one run directory")


@dataclasses.dataclass(frozen=True)
class PresetsOptions:
    """The presets of `jaxdyn sft`, `reward` and `rl`: their models, the memory of each stage, and
    the hardware that holds it. Compiles nothing, and needs neither network nor device.

    Attributes:
      names: which; all when none is given.
      json: also write the figures, in bytes, to this file.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")] = ()
    json: str | None = None


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Write the model of RUN as a Hugging Face directory.

    Attributes:
      run: the run's directory.
      output: the directory to write.
      step: which checkpoint, or "best" (train.keep_best); the newest when not given.
      adapter: write the run's adapters alone, as PEFT reads them.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    output: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUTPUT")]
    step: int | Literal["best"] | None = None
    adapter: bool = False

    def __post_init__(self):
        at_least(0, self, "", "step")
