"""Orbax checkpoints of a run: everything the next step depends on.

A checkpoint holds the parameters, the optimizer's state, and as JSON the position: the next step
(which is also the data's position and, with the seed, every random key), the CF-RL stage, and the
running totals. Orbax writes under a temporary name and renames, so a killed save leaves no
checkpoint, and the last good one stays.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxdyn.types import JaxdynError


class Checkpoints:
    """The checkpoints under one directory; the newest `keep` are kept (0: all)."""

    def __init__(self, directory: Path, keep: int = 0):
        self.directory = directory
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep or None, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, position: dict[str, Any]) -> None:
        """Save the state with which `step` begins.

        Raises:
          JaxdynError: if it cannot be written, to a full disk for one; earlier checkpoints stay.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
        )
        try:
            self._manager.save(step, args=args, force=True)
            self._manager.wait_until_finished()
        except Exception as error:  # its storage library raises many kinds
            raise JaxdynError(
                f"cannot save step {step} in {self.directory}: {_one_line(error)}"
            ) from error

    def position(self, step: int) -> dict[str, Any]:
        """The position saved with `step`."""
        args = ocp.args.Composite(position=ocp.args.JsonRestore())
        return self._restore(step, args)["position"]

    def state(self, step: int, like: Any) -> Any:
        """The state saved with `step`, in the shapes and dtypes of `like`.

        Raises:
          JaxdynError: for a checkpoint that cannot be read, or of another shape.
        """
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
        return self._restore(step, args)["state"]

    def _restore(self, step: int, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=args)
        except Exception as error:
            raise JaxdynError(
                f"cannot restore step {step} from {self.directory}: {_one_line(error)}"
            ) from error

    def close(self) -> None:
        self._manager.close()


def require_finite(metrics: dict[str, float], step: int, checkpoints: Checkpoints) -> None:
    """Stop a run whose metrics are no longer numbers, before anything is saved."""
    watched = ("loss", "policy_loss", "kl", "entropy", "grad_norm", "update_norm")
    bad = [name for name in watched if not np.isfinite(metrics.get(name, 0.0))]
    if bad:
        saved = checkpoints.steps()
        good = f"the last good checkpoint, step {saved[-1]}, is" if saved else "no checkpoint yet"
        raise JaxdynError(
            f"step {step}: {', '.join(bad)} stopped being finite; {good} in "
            f"{checkpoints.directory}; a lower learning rate may help"
        )


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
