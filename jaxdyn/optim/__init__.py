"""Classifier-first stages and the optimizer that keeps the model's two halves apart."""

from jaxdyn.optim.applied import Applied, applied_parts, multiplied
from jaxdyn.optim.labels import merge, split
from jaxdyn.optim.optimizer import (
    OptimConfig,
    by_part,
    enter_stage,
    learning_rate,
    make_optimizer,
    trainable,
)
from jaxdyn.optim.stages import OF_RL, SUPERVISED, Schedule, Stage, StageName, stage_at, stages
from jaxdyn.optim.tied import head_direction
