"""What training carries from step to step, and how a stage begins."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxdyn.distributed import Layout
from jaxdyn.models import init_value_head
from jaxdyn.optim import OptimConfig, Stage, StageName, enter_stage, make_optimizer, trainable
from jaxdyn.types import Model, Params


class TrainState(struct.PyTreeNode):
    """Parameters as stored (an update is given those that move alone), and their optimizer's state.

    For tied models `head_moment` [V, D] follows the head path's part of the shared matrix's
    momentum and `head_share` [V, D] sums its part of the updates since it was last set to zero;
    else both are None. The leaves may also be shapes or anything else that checkpoints put there.
    """

    params: Params
    opt_state: Any
    head_moment: Any = None
    head_share: Any = None

    @property
    def reference(self) -> Any:
        """The KL's reference, where it is a part of the state."""
        return None


class FollowedState(TrainState):
    """One with a reference that follows the policy (`jaxdyn.train.reference`)."""

    reference: Any = None


def fresh_state(
    model: Model, params: Params, optim: OptimConfig, stage: StageName, critic: bool = False
) -> TrainState:
    """The state in which `stage` begins from `params`, of which it has copies: updates donate them.

    Args:
      critic: whether a value head learns beside the policy; it starts at 0.
    """
    params = jax.tree.map(jnp.copy, params)
    if critic:
        params["value"] = init_value_head(model.config.width)
    moving, _ = trainable(optim, stage, params)
    state = TrainState(params, make_optimizer(optim).init(moving))
    if not model.config.tied:
        return state
    zeros = jnp.zeros_like(params["backbone"]["embed"]["embedding"])
    return state.replace(head_moment=zeros, head_share=jnp.copy(zeros))


def begin_stage(layout: Layout, optim: OptimConfig, stage: Stage, state: TrainState) -> TrainState:
    """Give the parts that begin to move an optimizer state."""
    moving, _ = trainable(optim, stage.name, state.params)
    reset = optim.reset_classifier_state
    opt_state = enter_stage(make_optimizer(optim), moving, state.opt_state, reset)
    return layout.place(state.replace(opt_state=opt_state))
