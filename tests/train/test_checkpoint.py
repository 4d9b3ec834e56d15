"""Checkpoints alone: written in the background, on other devices, the newest and the best kept."""

import functools
import math
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint._src.path.atomicity as atomicity
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdyn.sections import TrainConfig
from jaxdyn.train.checkpoint import Checkpoints
from jaxdyn.train.loop import require_measured
from jaxdyn.types import JaxdynError

Renamed = atomicity.AtomicRenameTemporaryPath


def state_of(value):
    return {"weight": jnp.full((8, 16), value, jnp.float32), "count": jnp.int32(value)}


@functools.partial(jax.jit, donate_argnums=0)
def doubled(state):
    return jax.tree.map(lambda x: 2 * x, state)


def value(state):
    """The one number that all of a state's leaves hold."""
    values = {float(x) for leaf in jax.tree.leaves(state) for x in np.ravel(leaf)}
    (found,) = values
    return found


def test_training_goes_on_while_a_save_is_written(tmp_path, monkeypatch):
    """Its state is donated to the next updates; until it is whole, the one before is the newest."""
    reached, go_on = threading.Event(), threading.Event()
    original = Renamed.finalize

    def finalize(self, *args, **kwargs):
        reached.set()
        assert go_on.wait(30)
        return original(self, *args, **kwargs)

    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        state = state_of(1)
        checkpoints.save(1, state, {"step": 1})
        checkpoints.wait()
        monkeypatch.setattr(Renamed, "finalize", finalize)
        state = doubled(state)
        position = {"step": 2}
        checkpoints.save(2, state, position)
        position["step"] = -1
        for _ in range(3):
            state = doubled(state)
        assert reached.wait(30)
        assert value(state) == 16
        others = Checkpoints(tmp_path / "c")  # what a process that starts now would find
        assert others.steps() == [1]
        assert value(others.state(1, state)) == 1
        go_on.set()
        assert checkpoints.steps() == [2]
        assert value(checkpoints.state(2, state)) == 2
        assert checkpoints.position(2) == {"step": 2}


def test_the_newest_and_the_best_are_kept(tmp_path):
    rewards = [0.25, 0.75, 0.75, math.nan, 0.5, None]
    with Checkpoints(tmp_path / "c", keep=2, metric="eval_reward") as checkpoints:
        assert checkpoints.best() is None
        for step, reward in enumerate(rewards):
            metrics = {"loss": 9.0} if reward is None else {"eval_reward": reward}
            assert checkpoints.improves(metrics) == (step < 2)
            checkpoints.save(step, state_of(step), {"step": step}, metrics)
        assert checkpoints.steps() == [1, 4, 5]  # of equals the first
    with Checkpoints(tmp_path / "c", keep=1, metric="eval_reward") as checkpoints:
        assert (checkpoints.find("best"), checkpoints.find(None), checkpoints.find(4)) == (1, 5, 4)
        assert not checkpoints.improves({"eval_reward": 0.75})
        checkpoints.save(6, state_of(6), {"step": 6}, {"eval_reward": 0.8})
        assert (checkpoints.steps(), checkpoints.best()) == ([6], 6)
        with pytest.raises(JaxdynError, match=r"has checkpoints at steps \[6\], not at 4"):
            checkpoints.find(4)
    with pytest.raises(JaxdynError, match=r"has no best checkpoint: set train.keep_best"):
        Checkpoints(tmp_path / "c").find("best")


def test_a_failed_save_is_told_of_at_the_next_one_and_at_the_end(tmp_path, monkeypatch):
    original = Renamed.finalize

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(1, state_of(1), {"step": 1})
    checkpoints.wait()
    monkeypatch.setattr(Renamed, "finalize", full)
    checkpoints.save(2, state_of(2), {"step": 2})
    with pytest.raises(JaxdynError, match=r"^cannot save step 2 in .*c: No space left on .* needs"):
        checkpoints.save(3, state_of(3), {"step": 3})
    monkeypatch.setattr(Renamed, "finalize", original)
    assert checkpoints.steps() == [1]
    checkpoints.save(3, state_of(3), {"step": 3})  # once there is room again
    assert checkpoints.steps() == [3]
    monkeypatch.setattr(Renamed, "finalize", full)
    checkpoints.save(4, state_of(4), {"step": 4})
    with pytest.raises(JaxdynError, match="cannot save step 4"):
        checkpoints.close()
    with pytest.raises(KeyError, match="first"), Checkpoints(tmp_path / "c") as again:
        assert again.steps() == [3]
        again.save(5, state_of(5), {"step": 5})
        raise KeyError("first")


def test_restored_onto_other_devices(tmp_path):
    """From 4 x 2 devices onto 8 along the other axis, onto one, and to where shapes say."""
    devices = np.array(jax.devices())
    grid, line = Mesh(devices.reshape(4, 2), ("a", "b")), Mesh(devices, ("c",))
    weight = jax.random.normal(jax.random.key(0), (8, 16))
    saved = {"weight": jax.device_put(weight, NamedSharding(grid, P("a", "b")))}
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, saved, {"step": 1})
        wanted = NamedSharding(line, P(None, "c"))
        for like in (
            {"weight": jax.device_put(jnp.zeros((8, 16)), wanted)},
            {"weight": jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=wanted)},
            {"weight": jax.ShapeDtypeStruct((8, 16), jnp.float32)},
            {"weight": np.zeros((8, 16), np.float32)},
        ):
            checkpoints.wait()
            got = checkpoints.state(1, like)["weight"]
            one = not hasattr(like["weight"], "sharding") or like["weight"].sharding is None
            assert got.sharding.device_set == ({devices[0]} if one else set(devices))
            assert np.array_equal(got, weight)
            if not one:
                assert {shard.data.shape for shard in got.addressable_shards} == {(8, 2)}
        with pytest.raises(JaxdynError, match="cannot restore step 1 from"):
            checkpoints.state(1, {"weight": jnp.zeros((8, 15))})
        with pytest.raises(JaxdynError, match="cannot restore step 2 from"):
            checkpoints.position(2)


def test_the_best_is_by_a_metric_that_evaluations_measure():
    with pytest.raises(JaxdynError, match="such as eval_reward, got 'reward'"):
        TrainConfig(keep_best="reward")
    require_measured("", {})
    require_measured("eval_reward", {"eval_reward": 1.0})
    with pytest.raises(JaxdynError, match=r"eval_rewrad, which .* did you mean 'eval_reward'"):
        require_measured("eval_rewrad", {"eval_reward": 1.0})
