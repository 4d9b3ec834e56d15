"""Which parameters an update moves, and when: the schedules of RL and of supervised training.

A schedule is a list of stages over the run's steps. With `n` steps of joint training and a
classifier stage of `c` steps (theory: Tomihari 2026, section on CF-RL; the paper's c is one extra
epoch), of RL

    joint             joint [0, n)
    classifier_first  classifier [0, c), joint [c, c + n)
    classifier_only   classifier [0, c + n)
    joint_extra       joint [0, c + n)        the equal-budget control
    whitened_first, whitened_only   as classifier_first and classifier_only, by whitened steps
                                    (`jaxdyn.optim.whitened`)
    spill, spill_first              as joint and classifier_first, with a budget of entropy
                                    (`jaxdyn.optim.spill`)

and of supervised training (Kumar et al. 2022, arXiv 2202.10054)

    joint, joint_extra             the same
    linear_probe                   classifier [0, n)
    linear_probe_then_finetune     classifier [0, c), joint [c, c + n)

Step t always draws batch t, so that schedules of equal length see the same data in the same order.
"""

import dataclasses
from typing import Literal, get_args

from jaxdyn.types import JaxdynError

Schedule = Literal[
    "joint",
    "classifier_first",
    "classifier_only",
    "joint_extra",
    "whitened_first",
    "whitened_only",
    "spill",
    "spill_first",
    "linear_probe",
    "linear_probe_then_finetune",
]
WHITENED: tuple[Schedule, ...] = ("whitened_first", "whitened_only")
SPILL: tuple[Schedule, ...] = ("spill", "spill_first")
OF_RL: tuple[Schedule, ...] = (
    *("joint", "classifier_first", "classifier_only", "joint_extra"),
    *WHITENED,
    *SPILL,
)
SUPERVISED: tuple[Schedule, ...] = (
    *("joint", "linear_probe", "linear_probe_then_finetune", "joint_extra"),
)
StageName = Literal["classifier", "joint"]


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps `start <= step < end`, in which the parts named by `parts` move."""

    name: StageName
    start: int
    end: int

    @property
    def number(self) -> int:
        """1 for the classifier stage, 2 for joint training: the metric `cfrl/stage`."""
        return 1 if self.name == "classifier" else 2


def stages(schedule: Schedule, steps: int, classifier_steps: int) -> tuple[Stage, ...]:
    """The stages of a schedule; raises JaxdynError for an unknown one or negative lengths."""
    if schedule not in get_args(Schedule):
        raise JaxdynError(f"schedule must be one of {get_args(Schedule)}, got {schedule!r}")
    if steps < 0 or classifier_steps < 0:
        raise JaxdynError(
            f"steps and classifier_steps must not be negative, got {steps} and {classifier_steps}"
        )
    both = classifier_steps + steps
    first = Stage("classifier", 0, classifier_steps), Stage("joint", classifier_steps, both)
    plan: tuple[Stage, ...] = {
        "joint": (Stage("joint", 0, steps),),
        "classifier_first": first,
        "classifier_only": (Stage("classifier", 0, both),),
        "whitened_first": first,
        "whitened_only": (Stage("classifier", 0, both),),
        "spill": (Stage("joint", 0, steps),),
        "spill_first": first,
        "joint_extra": (Stage("joint", 0, both),),
        "linear_probe": (Stage("classifier", 0, steps),),
        "linear_probe_then_finetune": first,
    }[schedule]
    return tuple(stage for stage in plan if stage.end > stage.start)


def stage_at(plan: tuple[Stage, ...], step: int) -> Stage:
    """The stage that `step` belongs to."""
    for stage in plan:
        if stage.start <= step < stage.end:
            return stage
    raise JaxdynError(f"step {step} lies outside the schedule, which ends at {plan[-1].end}")
