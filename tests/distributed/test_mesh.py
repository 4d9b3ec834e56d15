"""The mesh's shape, the rules, and what a mesh that does not suit says."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxdyn.distributed import (
    Layout,
    make_mesh,
    one_device,
    require_divisible,
    shardings,
)
from jaxdyn.distributed.mesh import chosen_devices
from jaxdyn.models import LanguageModel, config_from_hf, gpt_neox
from jaxdyn.models.lora import LoraConfig, add_adapters
from jaxdyn.optim import OptimConfig, make_optimizer
from jaxdyn.sections import MeshConfig
from jaxdyn.train.update import TrainState
from jaxdyn.types import JaxdynError

NEOX = gpt_neox(vocab_size=48, width=16, num_layers=2, num_heads=4, rotary_fraction=0.5)


def mesh_of(data, fsdp, tensor):
    return make_mesh(MeshConfig(data, fsdp, tensor, devices=data * fsdp * tensor))


def test_one_axis_takes_what_the_others_leave():
    assert MeshConfig().sizes(8) == (1, 8, 1)
    assert MeshConfig(data=2, tensor=2).sizes(8) == (2, 2, 2)
    assert MeshConfig(data=-1, fsdp=1).sizes(8) == (8, 1, 1)
    assert mesh_of(2, 2, 2).shape == {"data": 2, "fsdp": 2, "tensor": 2}


def test_neighbours_share_the_tensor_axis():
    ids = np.vectorize(lambda device: device.id)(mesh_of(2, 2, 2).devices)
    np.testing.assert_array_equal(ids, np.arange(8).reshape(2, 2, 2))


def test_a_cpu_is_one_device_unless_asked():
    assert len(chosen_devices(MeshConfig())) == 1
    assert chosen_devices(MeshConfig(devices=4)) == jax.devices()[:4]
    assert one_device().mesh.size == 1


@pytest.mark.parametrize(
    ("config", "devices", "said"),
    [
        ({"data": 3}, 8, "a mesh of data 3 x fsdp -1 x tensor 1 does not divide 8 devices"),
        ({"data": 2, "fsdp": 2, "tensor": 1}, 8, "does not divide 8 devices"),
        ({"fsdp": 16}, 8, "does not divide 8 devices"),
        ({"data": -1}, 8, "only one of mesh.data, mesh.fsdp, mesh.tensor may be -1"),
        ({"tensor": 0}, 8, "mesh.tensor must be at least 1, or -1, got 0"),
        ({"devices": -1}, 8, "mesh.devices must be at least 0, got -1"),
        ({"devices": 16}, 16, "mesh.devices is 16: there are 8 devices on 1 processes"),
    ],
)
def test_a_mesh_that_does_not_divide_the_devices(config, devices, said):
    with pytest.raises(JaxdynError, match=said):
        make_mesh(dataclasses.replace(MeshConfig(devices=devices), **config))


@pytest.mark.parametrize(
    ("sizes", "rows", "said"),
    [
        ((1, 1, 8), 8, "mesh.tensor is 8, which does not divide num_heads 4"),
        ((1, 8, 1), 12, "mesh.data x mesh.fsdp is 8, which does not divide the 12 of train.num_"),
        ((2, 4, 1), 4, "mesh.data x mesh.fsdp is 8, which does not divide the 4 of train.num_"),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_or_the_batch(sizes, rows, said):
    with pytest.raises(JaxdynError, match=said):
        require_divisible(mesh_of(*sizes), NEOX, rows, "train.num_prompts")


def test_heads_that_share_keys_are_divided_by_their_keys():
    config = dataclasses.replace(NEOX, num_kv_heads=2)
    with pytest.raises(
        JaxdynError, match=r"mesh.tensor is 4, which does not divide num_kv_heads 2"
    ):
        require_divisible(mesh_of(1, 2, 4), config, 8, "train.num_prompts")


LLAMA = config_from_hf(
    {
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
)
GPT2 = config_from_hf(
    {"model_type": "gpt2", "vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 4}
    | {"n_positions": 32, "n_inner": None, "activation_function": "gelu_new"}
)


@pytest.mark.parametrize("config", [NEOX, LLAMA, GPT2], ids=["gpt_neox", "llama", "gpt2"])
def test_every_matrix_and_its_moments_are_divided_by_all(config):
    """What is copied is of the width, and a device holds little more than its share."""
    model, mesh = LanguageModel(config), mesh_of(2, 2, 2)
    both = {"backbone": True, "classifier": True}
    adapted = lambda key: add_adapters(model, model.init(key), LoraConfig(rank=4), key, **both)[1]
    params = jax.eval_shape(adapted, jax.random.key(0))
    state = TrainState(params, jax.eval_shape(make_optimizer(OptimConfig()).init, params))
    placed = shardings(mesh, state)
    for (path, x), s in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(placed), strict=True
    ):
        part = np.prod(s.shard_shape(x.shape))
        name = jax.tree_util.keystr(path)
        if x.size > 2 * 64:  # larger than the layers' norms, biases and an adapter's smaller side
            divisor = 2 if "lora" in name or x.shape[0] == 50 else 4
            assert part <= x.size // divisor, name
        assert not any(axis == "data" for axis in jax.tree.leaves(tuple(s.spec))), name


def test_the_rules_by_example():
    params = jax.eval_shape(LanguageModel(NEOX).init, jax.random.key(0))
    specs = jax.tree.map(lambda s: s.spec, shardings(mesh_of(2, 2, 2), params))
    layers = specs["backbone"]["layers"]
    assert layers["attention"]["query"]["kernel"] == P(None, "fsdp", "tensor")
    assert layers["attention"]["out"]["kernel"] == P(None, "tensor", "fsdp")
    alone = shardings(mesh_of(1, 8, 1), params)["backbone"]["layers"]
    assert alone["attention"]["out"]["kernel"].spec == P(None, "fsdp")
    assert layers["mlp"]["up"]["bias"] == P(None, "tensor")
    assert layers["mlp_norm"]["scale"] == P()
    assert specs["backbone"]["embed"]["embedding"] == P(None, ("tensor", "fsdp"))
    assert specs["classifier"]["weight"] == P(("tensor", "fsdp"))


def test_an_axis_that_does_not_divide_a_vocabulary_is_left_out():
    params = jax.eval_shape(LanguageModel(LLAMA).init, jax.random.key(0))
    weight = shardings(mesh_of(1, 4, 2), params)["classifier"]["weight"]
    assert weight.spec == P("tensor")  # 50 = 2 x 25


def test_rows_lie_where_they_divide_and_come_back():
    layout = Layout(mesh_of(2, 2, 2))
    batch = {"rows": np.arange(12.0).reshape(4, 3), "odd": np.arange(5), "one": np.float32(2)}
    placed = layout.rows(batch)
    assert placed["rows"].sharding.shard_shape((4, 3)) == (1, 3)
    assert placed["odd"].is_fully_replicated and placed["one"].is_fully_replicated
    for name, x in batch.items():
        np.testing.assert_array_equal(np.asarray(placed[name]), x)
