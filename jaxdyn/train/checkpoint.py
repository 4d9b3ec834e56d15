"""Orbax checkpoints of a run: everything the next step depends on.

A checkpoint holds the parameters, the optimizer's state, and as JSON the position: the next step
(which is also the data's position and, with the seed, every random key), the CF-RL stage, and the
running totals. It is written while training goes on. Orbax writes under a temporary name and
renames, in a bucket it writes a mark at last, and only then are older ones deleted, on disk by a
rename too: so a killed save leaves no checkpoint, and the last good one stays. On disk a checkpoint
has checksums (`jaxdyn.train.seal`), and one that has changed since is not restored.
"""

import contextlib
import dataclasses
import logging
import math
import shutil
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN
from orbax.checkpoint.path import atomicity

from jaxdyn.errors import Closing, JaxdynError
from jaxdyn.storage.files import room
from jaxdyn.storage.paths import AnyPath, in_bucket, one_line
from jaxdyn.storage.reading import shown
from jaxdyn.train.seal import Sealed, damage

DELETED = "deleted"
"""Where a checkpoint goes that is not kept, by one rename, before its files are removed."""

# Orbax logs the traceback of every error that it raises; here they end as one line.
for _name in ("absl", "asyncio", "concurrent.futures"):
    logging.getLogger(_name).addFilter(lambda record: not record.exc_info)


class Checkpoints(Closing):
    """The checkpoints under one directory.

    The newest `keep` are kept (0: all), and the one that was saved with the largest `metric`, the
    earliest of equals, if one is named. One that was saved because the run was preempted goes with
    the next: an uninterrupted run has none there.
    """

    def __init__(self, directory: AnyPath, keep: int = 0, metric: str = ""):
        self.directory = directory
        self._metric = metric
        value_of = lambda metrics: metrics.get(metric, -math.inf)
        self._latest = _Latest(keep or None)
        policies: list[Any] = [self._latest]
        if metric:
            best = BestN(get_metric_fn=value_of, n=1, keep_checkpoints_without_metrics=False)
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            best_fn=value_of if metric else None,
            preservation_policy=AnyPreservationPolicy(policies),
            temporary_path_class=None if in_bucket(directory) else Sealed,
            todelete_subdir=None if in_bucket(directory) else DELETED,
        )
        where = directory if in_bucket(directory) else directory.absolute()
        self._manager = ocp.CheckpointManager(where, options=options)
        self._saving: int | None = None
        self._bytes = 0
        self._best: tuple[float, int | None] = (-math.inf, None)
        if metric and (step := self._manager.best_step()) is not None:
            measured = self._manager.metrics(step) or {}
            if metric in measured:
                self._best = (measured[metric], step)
        self._sound: set[int] = set()
        if saved := self._manager.all_steps():
            with contextlib.suppress(JaxdynError):  # who restores it is told
                if self.position(max(saved)).get("preempted"):
                    self._latest.passing.add(max(saved))

    def steps(self) -> list[int]:
        """The steps that have a whole checkpoint, ascending; waits for a save in progress."""
        self.wait()
        return sorted(self._manager.all_steps())

    def best(self) -> int | None:
        """The step whose checkpoint was saved with the largest metric."""
        return self._best[1]

    def find(self, step: int | Literal["best"] | None) -> int:
        """The step that is meant by its number, "best", or None: the newest.

        Raises:
          JaxdynError: if it has no checkpoint.
        """
        saved = self.steps()
        found = self.best() if step == "best" else saved[-1] if step is None else step
        if found is None:
            raise JaxdynError(f"{self.directory} has no best checkpoint: set train.keep_best")
        if found not in saved:
            raise JaxdynError(f"{self.directory} has checkpoints at steps {saved}, not at {found}")
        return found

    def improves(self, metrics: dict[str, Any]) -> bool:
        """Whether these metrics are better than those of every checkpoint so far."""
        return metrics.get(self._metric, -math.inf) > self._best[0]

    def save(
        self, step: int, state: Any, position: dict[str, Any], metrics: dict[str, Any] | None = None
    ) -> None:
        """Begin to save the state with which `step` begins, and what was measured of it.

        On return its arrays have been copied to the host (on a CPU they are shared, and JAX does
        not donate a shared array), so they may be donated; the rest goes on in the background.

        Raises:
          JaxdynError: if this or the save before it cannot be written, to a full disk for one;
            earlier checkpoints stay.
        """
        self.wait()
        self._remove_deleted()
        if position.get("preempted"):
            self._latest.passing.add(step)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(dict(position))
        )
        measured = {}
        if metrics and self.improves(metrics):
            measured = {self._metric: metrics[self._metric]}
            self._best = (metrics[self._metric], step)
        self._saving, self._bytes = step, sum(x.nbytes for x in jax.tree.leaves(state))
        try:
            self._manager.save(step, args=args, metrics=measured, force=True)
        except Exception as error:  # its storage library raises many kinds
            raise self._not_saved(error) from error

    def wait(self) -> None:
        """Wait for a save in progress; JaxdynError if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_saved(error) from error

    def tidy(self) -> None:
        """Remove what a killed process left half-saved or half-deleted; for the run's writer."""
        if in_bucket(self.directory) or jax.process_index() > 0:
            return
        for left in self.directory.glob(f"*{atomicity.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        self._remove_deleted()

    def _remove_deleted(self) -> None:
        if not in_bucket(self.directory) and jax.process_index() == 0:
            shutil.rmtree(self.directory / DELETED, ignore_errors=True)

    def _not_saved(self, error: Exception) -> JaxdynError:
        with contextlib.suppress(Exception):  # the storage itself may be gone
            self._manager.reload()  # what the save would have replaced is still there
        if isinstance(error, JaxdynError) and isinstance(error.__cause__, OSError):
            error = error.__cause__  # of one file of it, the checksums
        said = f"cannot save step {self._saving} in {self.directory}: "
        if "No space left" in str(error) and not in_bucket(self.directory):
            return JaxdynError(f"{said}No space left on device{room(self.directory, self._bytes)}")
        return JaxdynError(said + one_line(error))

    def position(self, step: int) -> dict[str, Any]:
        """The position saved with `step`; JaxdynError if it is not of that step."""
        args = ocp.args.Composite(position=ocp.args.JsonRestore())
        found = self._restore(step, args)["position"]
        of = found.get("step") if isinstance(found, dict) else found
        if type(of) is not int or of != step:
            raise JaxdynError(
                f"cannot restore step {step} from {self.directory}: its position is damaged, it "
                f"says step {shown(of)}"
            )
        return found

    def state(self, step: int, like: Any) -> Any:
        """The state saved with `step`, in the shapes and dtypes of `like` and where it lies.

        The leaves of `like` are arrays, or shapes with shardings; those without one go to this
        process's first device. The run that saved them may have had other devices.

        Raises:
          JaxdynError: for a checkpoint that cannot be read, or of another shape.
        """
        here = SingleDeviceSharding(jax.local_devices()[0])

        def shape(x):
            sharding = getattr(x, "sharding", None) or here
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        args = ocp.args.Composite(state=ocp.args.StandardRestore(jax.tree.map(shape, like)))
        return self._restore(step, args)["state"]

    def damage(self, step: int) -> str | None:
        """What of a checkpoint has changed since it was saved, in words; in a bucket not known."""
        return None if in_bucket(self.directory) else damage(self.directory / str(step))

    def _restore(self, step: int, args: Any) -> Any:
        if step not in self._sound and jax.process_index() == 0:
            if found := self.damage(step):
                raise JaxdynError(
                    f"cannot restore step {step} from {self.directory}: {found}; put back a copy, "
                    f"or delete {self.directory / str(step)} to go on from an earlier one"
                )
            self._sound.add(step)
        try:
            return self._manager.restore(step, args=args)
        except Exception as error:
            raise JaxdynError(
                f"cannot restore step {step} from {self.directory}: {one_line(error)}"
            ) from error

    def close(self) -> None:
        """Wait for a save in progress; JaxdynError if it failed."""
        self.wait()
        if self._saving is not None:
            self._remove_deleted()
        self._manager.close()


@dataclasses.dataclass
class _Latest:
    """An Orbax policy: keeps the last `n` (None: all) of those not `passing`, and the very last."""

    n: int | None
    passing: set[int] = dataclasses.field(default_factory=set)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        lasting = [info.step for info in checkpoints if info.step not in self.passing]
        kept = set(lasting if self.n is None else lasting[-self.n :])
        kept |= {info.step for info in checkpoints[-1:]}
        return [info.step in kept for info in checkpoints]


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
