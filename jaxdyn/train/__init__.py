"""The training loops, and the jitted updates they are made of."""

from jaxdyn.train.analyze import analyze, export
from jaxdyn.train.progress import Progress
from jaxdyn.train.rl import run_rl
from jaxdyn.train.sft import run_sft
from jaxdyn.train.update import TrainState, UpdateBatch, update

__all__ = [
    "Progress",
    "TrainState",
    "UpdateBatch",
    "analyze",
    "export",
    "run_rl",
    "run_sft",
    "update",
]
