"""The optimizer: optax transformations kept apart for the two halves of the model.

The applied update is Δθ = −η_t · μ (P m + λ θ), with μ the classifier's multiplier, 1 of all else:
`make_optimizer` gives the direction, μ in it, and the caller multiplies by the learning rate of its
step, a traced scalar, so that a schedule never recompiles anything and never depends on how long an
optimizer state has lived.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import optax

from jaxdyn.grammar import above, at_least, between
from jaxdyn.optim.labels import Mode, moves, split
from jaxdyn.optim.stages import SPILL, WHITENED, Schedule, StageName
from jaxdyn.types import JaxdynError, Params


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How the parameters move.

    Attributes:
      schedule: joint, or joint_extra, with the classifier stage's extra steps (the equal-budget
        control); of RL also classifier_first and classifier_only, and the same two whitened, and
        spill and spill_first, joint and classifier_first with a budget of entropy; of supervised
        training linear_probe and linear_probe_then_finetune.
      classifier_steps: length of the classifier stage.
      learning_rate: peak learning rate of joint training.
      classifier_learning_rate: that of the classifier in its stage; `classifier_multiplier` times
        the joint one when not given.
      classifier_multiplier: the classifier's learning rate, in units of the body's. What W learns
        depends on its scale, φ → cφ, W → W/c, which is none of the model: so vary this.
      warmup_steps: linear warm-up at the start of each stage.
      decay: shape after the warm-up, to zero at the stage's end, or constant.
      optimizer: adamw, or sgd with `momentum`.
      max_grad_norm: clip the global norm of the gradient; 0 turns clipping off.
      reset_classifier_state: start the classifier's moments afresh when joint training begins.
      whitened_kl: KL of a whitened step, to second order, in nats a token.
      whitened_ridge: λ of a whitened step, in units of the features' mean square.
      spill_budget: entropy that a step of a spill schedule may take through the classifier, to
        first order, in nats a token.
      backbone: full, lora (its adapters alone move) or frozen.
      classifier: the same for the classifier.
    """

    schedule: Schedule = "joint"
    classifier_steps: int = 50
    learning_rate: float = 1e-6
    classifier_learning_rate: float | None = None
    classifier_multiplier: float = 1.0
    warmup_steps: int = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    reset_classifier_state: bool = False
    whitened_kl: float = 1e-3
    whitened_ridge: float = 1e-3
    spill_budget: float = 1e-3
    backbone: Mode = "full"
    classifier: Mode = "full"

    def __post_init__(self):
        above(0, self, "optim", "learning_rate", "classifier_learning_rate", "eps")
        above(0, self, "optim", "classifier_multiplier")
        above(0, self, "optim", "whitened_kl", "whitened_ridge")
        between(0, 1, self, "optim", "b1", "b2", "momentum", ends="[)")
        at_least(0, self, "optim", "weight_decay", "max_grad_norm", "spill_budget")
        at_least(0, self, "optim", "warmup_steps", "classifier_steps")
        if (self.whitened or self.spills) and self.classifier != "full":
            raise JaxdynError(
                f"optim.schedule {self.schedule} moves the classifier's weight itself: "
                f"optim.classifier must be full, got {self.classifier}"
            )
        if self.classifier == "frozen":
            if self.backbone == "frozen":
                raise JaxdynError("nothing moves: optim.backbone and .classifier are both frozen")
            if self.schedule not in ("joint", "joint_extra"):
                raise JaxdynError(
                    f"optim.classifier is 'frozen', but optim.schedule {self.schedule!r} has a "
                    "stage that moves the classifier alone"
                )

    @property
    def whitened(self) -> bool:
        """Whether the classifier stage's steps are whitened."""
        return self.schedule in WHITENED

    @property
    def spills(self) -> bool:
        """Whether its steps keep to a budget of entropy."""
        return self.schedule in SPILL

    @property
    def rule(self) -> "OptimConfig":
        """What of it a compiled update depends on: one for all schedules and learning rates."""
        names = [*("optimizer", "b1", "b2", "eps", "momentum", "weight_decay", "max_grad_norm")]
        names.append("classifier_multiplier")
        return OptimConfig(**{name: getattr(self, name) for name in names})


def trainable(config: OptimConfig, stage: StageName, params: Params) -> tuple[Params, Params]:
    """The leaves of `params` that a stage moves, and the rest.

    A value head moves in every stage, the backbone in joint training only.
    """
    modes: dict[str, Mode] = {
        "backbone": "frozen" if stage == "classifier" else config.backbone,
        "classifier": config.classifier,
        "value": "full",
    }
    return split(params, lambda path: moves(modes[path[0]], path))


def by_part(
    inner: optax.GradientTransformation, times: Mapping[str, float] = {}
) -> optax.GradientTransformation:
    """`inner` on each top-level part of the tree, with a state of its own for each; its updates of
    a part in `times` so many times.

    Parts can then join and leave (a stage moves the classifier alone, the next both) while the
    other part's moments and step counts stay what they were.
    """

    def init(params):
        return {part: inner.init(params[part]) for part in params}

    def update(updates, state, params=None):
        out = {part: inner.update(updates[part], state[part], params[part]) for part in updates}
        scaled = {part: optax.tree.scale(times.get(part, 1), u) for part, (u, _) in out.items()}
        return scaled, {part: s for part, (_, s) in out.items()}

    return optax.GradientTransformation(init, update)


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """The direction μ (P m + λθ): global-norm clip, then AdamW's or SGD's moments, by part."""
    clip = optax.clip_by_global_norm(config.max_grad_norm) if config.max_grad_norm else None
    if config.optimizer == "adamw":
        moments = optax.scale_by_adam(config.b1, config.b2, config.eps)
    elif config.momentum:
        moments = optax.trace(config.momentum)
    else:
        moments = optax.identity()
    decay = optax.add_decayed_weights(config.weight_decay)
    times = {"classifier": config.classifier_multiplier}
    return optax.chain(clip or optax.identity(), by_part(optax.chain(moments, decay), times))


def learning_rate(config: OptimConfig, stage: str, step: int, steps: int) -> float:
    """η at the `step`-th of a stage's `steps` steps, the classifier's divided by μ."""
    peak = config.learning_rate
    if stage == "classifier" and config.classifier_learning_rate is not None:
        peak = config.classifier_learning_rate / config.classifier_multiplier
    warmup = min(config.warmup_steps, steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    rest = max(steps - warmup, 1)
    shape = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.decay]
    return float(shape(step - warmup))


def enter_stage(
    optimizer: optax.GradientTransformation,
    moving: Params,
    previous: optax.OptState | None,
    reset: bool,
) -> optax.OptState:
    """The optimizer state with which a stage begins.

    A part that begins to move starts fresh; one that moved in the previous stage keeps its state
    unless `reset`.
    """
    clip, parts = optimizer.init(moving)
    if previous is None or reset:
        return clip, parts
    return clip, {**parts, **{part: s for part, s in previous[1].items() if part in parts}}
