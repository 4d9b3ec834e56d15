"""Checkpoints on disk: exact round trips, every float type, shards, and one-line errors."""

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_checkpoints
from safetensors.numpy import load_file, save_file

from jaxdyn.distributed import Layout, make_mesh
from jaxdyn.models import (
    huggingface,
    load_pretrained,
    local_directory,
    placing,
    save_pretrained,
)
from jaxdyn.sections import MeshConfig
from jaxdyn.types import JaxdynError

CONFIGS = tiny_checkpoints.CONFIGS


@pytest.fixture
def checkpoint(tmp_path):
    return tiny_checkpoints.write(tmp_path / "checkpoint", CONFIGS["llama_llama3_scaling"])


def one_line(function, *args, **options):
    """The message of the JaxdynError it raises."""
    with pytest.raises(JaxdynError) as error:
        function(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def assert_same_tree(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# -- round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_saving_what_was_loaded_gives_the_same_tensors(name, tmp_path):
    tiny_checkpoints.write(tmp_path / "in", CONFIGS[name])
    model, params = load_pretrained(tmp_path / "in")
    save_pretrained(tmp_path / "out", model, params, bos_token_id=1, stop_ids=(2,))
    original, exported = (load_file(tmp_path / d / "model.safetensors") for d in ("in", "out"))
    assert original.keys() == exported.keys()
    for key, tensor in original.items():
        np.testing.assert_array_equal(exported[key], tensor)
    again, reloaded = load_pretrained(tmp_path / "out")
    assert again == model
    assert_same_tree(reloaded, params)


@pytest.mark.parametrize("name", ["gpt_neox_tied", "qwen2"])  # fused matrices, and biases
def test_large_leaves_are_written_on_their_devices_layer_by_layer(name, tmp_path, monkeypatch):
    directory = tiny_checkpoints.write(tmp_path / name, CONFIGS[name])
    whole = load_pretrained(directory)[1]
    layout = Layout(make_mesh(MeshConfig(1, 2, 2, devices=4)))
    monkeypatch.setattr(placing, "STREAMED", 0)
    assert_same_tree(load_pretrained(directory)[1], whole)
    divided = load_pretrained(directory, where=layout.where)[1]
    assert_same_tree(divided, whole)
    of_leaf = lambda tree: [leaf.sharding.spec for leaf in jax.tree.leaves(tree)]
    assert of_leaf(divided) == of_leaf(layout.place(whole))
    kernel = divided["backbone"]["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_parameters_have_the_models_own_tree(tmp_path):
    for name in ("gpt_neox_tied", "qwen2"):
        model, params = load_pretrained(tiny_checkpoints.write(tmp_path / name, CONFIGS[name]))
        wanted = jax.eval_shape(model.init, jax.random.key(0))
        assert jax.tree.structure(params) == jax.tree.structure(wanted)
        types = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
        assert types(params) == types(wanted)


def test_shards_round_trip_and_each_stays_within_its_size(checkpoint, tmp_path):
    model, params = load_pretrained(checkpoint)
    out = tmp_path / "out"
    save_pretrained(out, model, params, max_shard_bytes=8000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 3
    assert {f.name for f in files} == set(index["weight_map"].values())
    sizes = [sum(t.nbytes for t in load_file(f).values()) for f in files]
    assert max(sizes) <= 8000
    assert sum(sizes) == index["metadata"]["total_size"]
    assert_same_tree(load_pretrained(out)[1], params)
    # A tensor larger than a shard gets one to itself.
    save_pretrained(out, model, params, max_shard_bytes=1)
    assert len(list(out.glob("*.safetensors"))) == len(index["weight_map"])
    assert_same_tree(load_pretrained(out)[1], params)
    # And a later save in one file leaves no shards behind.
    save_pretrained(out, model, params)
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert_same_tree(load_pretrained(out)[1], params)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_every_float_type_becomes_float32(dtype, checkpoint):
    tensors = {k: t.astype(dtype) for k, t in load_file(checkpoint / "model.safetensors").items()}
    save_file(tensors, checkpoint / "model.safetensors")
    model, params = load_pretrained(checkpoint, dtype=jnp.bfloat16)
    assert model.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(
        params["backbone"]["layers"]["mlp"]["up"]["kernel"][1],
        tensors["model.layers.1.mlp.up_proj.weight"].astype(np.float32).T,
    )


def test_old_and_bare_checkpoints_load(tmp_path):
    """Without the body's prefix, with the masks old versions stored, with a tied head repeated."""
    config = CONFIGS["gpt2_tied"]
    whole = load_pretrained(tiny_checkpoints.write(tmp_path / "whole", config))[1]
    tensors = {
        name.removeprefix("transformer."): tensor
        for name, tensor in tiny_checkpoints.weights(config).items()
    }
    tensors["h.0.attn.bias"] = np.ones((1, 1, 32, 32), bool)
    tensors["h.0.attn.masked_bias"] = np.array(-1e4, np.float32)
    tensors["lm_head.weight"] = tensors["wte.weight"]
    bare = load_pretrained(tiny_checkpoints.write(tmp_path / "bare", config, tensors))[1]
    assert_same_tree(bare, whole)


# -- what goes wrong when loading ---------------------------------------------------------------


def test_neither_directory_nor_hub_name(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert local_directory(tmp_path) == tmp_path
    message = one_line(load_pretrained, str(tmp_path / "nothing"))
    assert f"{tmp_path / 'nothing'} is neither a directory nor a model" in message
    assert "somebody/nothing is neither" in one_line(load_pretrained, "somebody/nothing")
    (tmp_path / "file").write_text("")
    assert "is a file; the directory" in one_line(load_pretrained, tmp_path / "file")


def test_only_json_safetensors_and_the_template_are_fetched(tmp_path, monkeypatch):
    asked = {}

    def fetch(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert local_directory("somebody/model") == tmp_path
    assert asked == {
        "name": "somebody/model",
        "allow_patterns": ["*.json", "*.safetensors", "chat_template.jinja"],
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not JSON"),
        ("[1]", "should hold a JSON object, got [1]"),
    ],
)
def test_a_config_that_is_missing_or_malformed(content, said, checkpoint):
    (checkpoint / "config.json").unlink()
    if content is not None:
        (checkpoint / "config.json").write_text(content)
    message = one_line(load_pretrained, checkpoint)
    assert str(checkpoint / "config.json") in message
    assert said in message


def change(checkpoint, edit):
    """Rewrite the weights after `edit(tensors)`."""
    tensors = load_file(checkpoint / "model.safetensors")
    edit(tensors)
    save_file(tensors, checkpoint / "model.safetensors")


def test_a_missing_tensor(checkpoint):
    change(checkpoint, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    message = one_line(load_pretrained, checkpoint)
    assert str(checkpoint / "model.safetensors") in message
    assert message.endswith("lacks the tensor model.layers.1.mlp.up_proj.weight, shape [40, 24]")


def test_an_untied_model_needs_its_head(checkpoint):
    change(checkpoint, lambda t: t.pop("lm_head.weight"))
    assert "lacks the tensor lm_head.weight, shape [41, 24]" in one_line(
        load_pretrained, checkpoint
    )


def test_tensors_of_a_deeper_model_are_not_dropped_in_silence(checkpoint):
    config = {**CONFIGS["llama_llama3_scaling"], "num_hidden_layers": 1}
    (checkpoint / "config.json").write_text(json.dumps(config))
    message = one_line(load_pretrained, checkpoint)
    assert "holds the tensor model.layers.1." in message
    assert message.endswith("a llama of this config.json does not have (and 8 more)")


def test_a_tensor_of_another_shape(checkpoint):
    change(checkpoint, lambda t: t.update({"model.norm.weight": np.ones(23, np.float32)}))
    assert one_line(load_pretrained, checkpoint).endswith(
        "model.safetensors: the tensor model.norm.weight has shape [23], wanted [24]"
    )


def test_another_vocabulary(checkpoint):
    config = {**CONFIGS["llama_llama3_scaling"], "vocab_size": 50}
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert "has shape [41, 24], wanted [50, 24]" in one_line(load_pretrained, checkpoint)


def test_a_tensor_that_is_no_float(checkpoint):
    change(checkpoint, lambda t: t.update({"model.norm.weight": np.ones(24, np.int8)}))
    message = one_line(load_pretrained, checkpoint)
    assert "model.norm.weight has type I8, wanted one of F64, F32, F16, BF16" in message


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_half_written_file(keep, checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{path} is not a whole safetensors file" in one_line(load_pretrained, checkpoint)


def test_no_weights_at_all(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    message = one_line(load_pretrained, checkpoint)
    assert "has neither model.safetensors nor model.safetensors.index.json" in message


def sharded(checkpoint, tmp_path):
    out = tmp_path / "sharded"
    save_pretrained(out, *load_pretrained(checkpoint), max_shard_bytes=8000)
    return out


def test_a_missing_shard(checkpoint, tmp_path):
    out = sharded(checkpoint, tmp_path)
    shard = sorted(out.glob("*.safetensors"))[1]
    shard.unlink()
    assert one_line(load_pretrained, out).startswith(f"{shard} is missing")


def test_a_truncated_shard(checkpoint, tmp_path):
    out = sharded(checkpoint, tmp_path)
    shard = sorted(out.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert f"{shard} is not a whole safetensors file" in one_line(load_pretrained, out)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "'../secret.safetensors', not a file"),
        ("{", "is not JSON"),
    ],
)
def test_an_index_that_makes_no_sense(index, said, checkpoint):
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(index)
    assert said in one_line(load_pretrained, checkpoint)


# -- what goes wrong when saving ----------------------------------------------------------------


def test_saving_leaves_other_files_alone(checkpoint):
    (checkpoint / "tokenizer.json").write_text("{}")
    save_pretrained(checkpoint, *load_pretrained(checkpoint))
    assert (checkpoint / "tokenizer.json").read_text() == "{}"


def test_another_models_parameters_are_not_saved(tmp_path):
    model, params = load_pretrained(tiny_checkpoints.write(tmp_path, CONFIGS["gpt2_tied"]))
    untied, copied = model.untie(params)
    message = one_line(save_pretrained, tmp_path / "out", model, copied)
    assert "classifier/weight has shape (41, 24), the model wants None" in message
    message = one_line(save_pretrained, tmp_path / "out", untied, params)
    assert "classifier/weight has shape None, the model wants (41, 24)" in message
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_written(checkpoint, tmp_path):
    (tmp_path / "file").write_text("")
    model, params = load_pretrained(checkpoint)
    message = one_line(save_pretrained, tmp_path / "file", model, params)
    assert message.startswith(f"cannot write the checkpoint {tmp_path / 'file'}")


@pytest.mark.parametrize("files_written", [0, 1, 2])
def test_a_failed_save_keeps_the_old_checkpoint(files_written, checkpoint, monkeypatch):
    """A full disk, at the first file or later: the old weights stay, nothing is left behind."""
    model, params = load_pretrained(checkpoint)
    before = {p.name: p.read_bytes() for p in checkpoint.iterdir()}
    real, done = huggingface.save_file, []

    def full_disk(*args, **options):
        if len(done) == files_written:
            raise OSError(28, "No space left on device")
        done.append(real(*args, **options))

    monkeypatch.setattr(huggingface, "save_file", full_disk)
    changed = jax.tree.map(lambda x: x + 1, params)
    message = one_line(save_pretrained, checkpoint, model, changed, max_shard_bytes=8000)
    assert "No space left on device" in message
    assert {p.name: p.read_bytes() for p in checkpoint.iterdir()} == before


KILLED_SAVE = """
import os, signal, sys
from pathlib import Path
from jaxdyn.models import load_pretrained, save_pretrained
model, params = load_pretrained(sys.argv[1])
replaced, real = [], Path.replace
def replace(self, target):
    if len(replaced) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    replaced.append(real(self, target))
Path.replace = replace
save_pretrained(sys.argv[2], model, params, max_shard_bytes=8000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("renames", [0, 2])
def test_a_killed_save_is_no_checkpoint(renames, checkpoint, tmp_path):
    """Killed between two renames, over an older checkpoint: the mixture must not load."""
    out = sharded(checkpoint, tmp_path)
    command = [sys.executable, "-c", KILLED_SAVE, str(checkpoint), str(out), str(renames)]
    killed = subprocess.run(command, capture_output=True, env=os.environ)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert f"{out / 'config.json'} cannot be read" in one_line(load_pretrained, out)
    # Saving again mends it.
    model, params = load_pretrained(checkpoint)
    save_pretrained(out, model, params, max_shard_bytes=8000)
    assert_same_tree(load_pretrained(out)[1], params)
    assert not list(out.glob("*.partial"))
