"""Which leaves an update moves."""

import jax
import pytest

from jaxdyn.optim import OptimConfig, merge, split, trainable
from jaxdyn.types import JaxdynError

ADAPTED = {
    "backbone": {"layer": {"kernel": 1, "lora_a": 2, "lora_b": 3}, "norm": {"scale": 4}},
    "classifier": {"weight": 5, "lora_a": 6, "lora_b": 7},
    "value": {"weight": 8},
}


def moved(stage, params=ADAPTED, **modes):
    """The leaves that move, as a set of their numbers."""
    moving, frozen = trainable(OptimConfig(**modes), stage, params)
    assert merge(moving, frozen) == params
    assert not set(jax.tree.leaves(moving)) & set(jax.tree.leaves(frozen))
    return set(jax.tree.leaves(moving))


def test_full_training_moves_a_part_whole():
    assert moved("joint") == {1, 2, 3, 4, 5, 6, 7, 8}
    assert moved("classifier") == {5, 6, 7, 8}


@pytest.mark.parametrize(
    "backbone, classifier, joint, alone",
    [
        ("lora", "frozen", {2, 3, 8}, {8}),
        ("frozen", "lora", {6, 7, 8}, {6, 7, 8}),
        ("lora", "lora", {2, 3, 6, 7, 8}, {6, 7, 8}),
        ("lora", "full", {2, 3, 5, 6, 7, 8}, {5, 6, 7, 8}),
    ],
)
def test_adapters_move_alone_where_a_part_has_them(backbone, classifier, joint, alone):
    modes = {"backbone": backbone, "classifier": classifier}
    assert moved("joint", **modes) == joint
    assert moved("classifier", **modes) == alone


def test_a_tied_models_empty_classifier_survives():
    params = {"backbone": {"embed": {"embedding": 1}}, "classifier": {}}
    moving, frozen = split(params, lambda path: path[0] == "backbone")
    assert frozen == {"classifier": {}}
    assert merge(moving, frozen) == params


def test_nothing_that_moves_is_refused():
    with pytest.raises(JaxdynError, match="both frozen"):
        OptimConfig(backbone="frozen", classifier="frozen")
    with pytest.raises(JaxdynError, match=r"'frozen', but .*'classifier_first'"):
        OptimConfig(schedule="classifier_first", classifier="frozen")
