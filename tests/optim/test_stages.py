"""The schedules' stages, as written out by hand."""

import jaxtyping
import pytest

from jaxdyn.optim import Stage, stage_at, stages
from jaxdyn.types import JaxdynError

PLANS = {
    "joint": (Stage("joint", 0, 5),),
    "classifier_first": (Stage("classifier", 0, 3), Stage("joint", 3, 8)),
    "classifier_only": (Stage("classifier", 0, 8),),
    "joint_extra": (Stage("joint", 0, 8),),
    "linear_probe": (Stage("classifier", 0, 5),),
    "linear_probe_then_finetune": (Stage("classifier", 0, 3), Stage("joint", 3, 8)),
}


@pytest.mark.parametrize("schedule", PLANS)
def test_stages_of_five_steps_and_three_classifier_steps(schedule):
    assert stages(schedule, 5, 3) == PLANS[schedule]


@pytest.mark.parametrize("schedule", PLANS)
def test_every_step_belongs_to_one_stage(schedule):
    plan = stages(schedule, 5, 3)
    expected = [stage for stage in PLANS[schedule] for _ in range(stage.start, stage.end)]
    assert [stage_at(plan, step) for step in range(len(expected))] == expected
    with pytest.raises(JaxdynError, match=f"step {len(expected)} lies outside"):
        stage_at(plan, len(expected))


def test_stages_without_steps_are_left_out():
    assert stages("classifier_first", 5, 0) == (Stage("joint", 0, 5),)
    assert stages("classifier_first", 0, 3) == (Stage("classifier", 0, 3),)
    assert stages("joint", 0, 3) == ()


def test_stage_numbers_are_those_of_the_metric():
    assert (Stage("classifier", 0, 1).number, Stage("joint", 0, 1).number) == (1, 2)


def test_bad_schedules_and_lengths_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(JaxdynError, match=r"one of .*joint_extra.*got 'both'"):
        stages("both", 1, 1)
    with pytest.raises(JaxdynError, match="got 5 and -1"):
        stages("joint", 5, -1)
