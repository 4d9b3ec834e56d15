"""Classifier-first stages and the optimizer that keeps the model's two halves apart."""

from jaxdyn.optim.optimizer import (
    OptimConfig,
    by_part,
    enter_stage,
    learning_rate,
    make_optimizer,
)
from jaxdyn.optim.stages import Schedule, Stage, stage_at, stages, trainable
from jaxdyn.optim.tied import head_direction

__all__ = [
    "OptimConfig",
    "Schedule",
    "Stage",
    "by_part",
    "enter_stage",
    "head_direction",
    "learning_rate",
    "make_optimizer",
    "stage_at",
    "stages",
    "trainable",
]
