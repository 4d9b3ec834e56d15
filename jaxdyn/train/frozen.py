"""Weights that do not move, held in `model.frozen_dtype`.

They are those that no stage of a run moves (a frozen half, what adapters are beside, the body of a
schedule with a classifier stage alone), and the reference policy, none of which moves. Of these the
matrices are rounded; scales and biases, a thousandth of the bytes, stay. A pass in bfloat16 rounds
its matrices anyway, so that held in bfloat16 they give the same numbers, bit for bit.
"""

from jaxdyn.config import Config
from jaxdyn.models.held import held
from jaxdyn.optim import StageName, merge, stages, trainable
from jaxdyn.types import Params


def with_frozen(params: Params, config: Config) -> Params:
    """The parameters with which a run starts; what no stage of it moves as `model.frozen_dtype`."""
    optim = config.optim
    plan = stages(optim.schedule, config.train.steps, optim.classifier_steps)
    # Joint training moves all that a classifier stage moves.
    last: StageName = "joint" if any(stage.name == "joint" for stage in plan) else "classifier"
    moving, frozen = trainable(optim, last, params)
    return merge(moving, held(frozen, config.model.frozen_dtype))
