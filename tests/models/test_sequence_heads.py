"""Heads that score sequences: parity with transformers and with NumPy, in and out, and refusals."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import numpy_decoder
import pytest
import tiny_checkpoints
from safetensors.numpy import load_file

from jaxdyn.models import (
    add_sequence_head,
    config_from_hf,
    load_pretrained,
    load_reward_model,
    read_by,
    save_pretrained,
    sequence_scores,
    turn_in,
)
from jaxdyn.models.heads import TURN
from jaxdyn.types import JaxdynError

PAD = 7
_ONE = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "pad_token_id": PAD}
_TINY = tiny_checkpoints.CONFIGS
CONFIGS = {
    "gpt_neox": {
        **_TINY["gpt_neox_parallel"],
        **_ONE,
        "architectures": ["GPTNeoXForSequenceClassification"],
    },
    "llama": {
        **_TINY["llama_tied_linear_scaling"],
        **_ONE,
        "rope_scaling": None,
        "architectures": ["LlamaForSequenceClassification"],
    },
    "qwen2": {
        **_TINY["qwen2"],
        **_ONE,
        "architectures": ["Qwen2ForSequenceClassification"],
    },
    "qwen3": {
        **_TINY["qwen3"],
        **_ONE,
        "architectures": ["Qwen3ForSequenceClassification"],
    },
}
GATED = {
    **_TINY["qwen2"],
    "model_type": "llama",
    "attention_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "architectures": ["LlamaForRewardModelWithGating"],
    "pad_token_id": 40,
    "num_objectives": 5,
    "gating_temperature": 10,
    "gating_hidden_dim": 12,
    "gating_n_hidden": 3,
}
# The last id of the vocabulary pads; PAD also stands inside the second row, and ends two of them.
ROWS = (
    [1, 5, 9, 3, 22, 31, 2, 17, 4, 6],
    [8, PAD, 30, 12, 5, 16, PAD],
    [PAD, 11, PAD, PAD],
    [25, 3, 14],
)
TOLERANCE = 1e-4
"""On scores of size 1, in float32, as on logits."""

jitted = jax.jit(sequence_scores, static_argnums=0)


def tensors_of(config):
    """A language model's tensors with `score.weight` in the place of the classifier."""
    found = tiny_checkpoints.weights({**config, "tie_word_embeddings": True})
    draw = np.random.RandomState(5).standard_normal((1, config["hidden_size"]))
    return {**found, "score.weight": (draw / config["hidden_size"] ** 0.5).astype(np.float32)}


def gated_tensors(config=GATED):
    stream, width, k = np.random.RandomState(6), config["hidden_size"], config["num_objectives"]
    sizes = [width, *[config["gating_hidden_dim"]] * config["gating_n_hidden"], k]
    found = tiny_checkpoints.weights({**config, "tie_word_embeddings": True})
    found["regression_layer.weight"] = stream.standard_normal((k, width)) / width**0.5
    found["reward_transform_matrix"] = np.eye(k)
    found["reward_transform_matrix"][4] -= stream.uniform(0, 1, k)
    for i, (inner, out) in enumerate(itertools.pairwise(sizes)):
        # Large, so that a gate that reads elsewhere gives another score.
        found[f"gating.layers.{i}.weight"] = 8 / inner**0.5 * stream.standard_normal((out, inner))
        found[f"gating.layers.{i}.bias"] = stream.standard_normal(out)
    found["gating.logit_scale"] = np.array([1.5])
    return {name: tensor.astype(np.float32) for name, tensor in found.items()}


def padded(rows, left):
    slots = max(map(len, rows))
    tokens, mask = np.zeros((len(rows), slots), np.int32), np.zeros((len(rows), slots), bool)
    for i, row in enumerate(rows):
        where = slice(slots - len(row), slots) if left else slice(0, len(row))
        tokens[i, where], mask[i, where] = row, True
    return jnp.asarray(tokens), jnp.asarray(mask)


def our_scores(directory, left=False):
    model, params = load_reward_model(directory)
    rows = [read_by(model.config, row) for row in ROWS]
    return np.asarray(jitted(model, params, *padded(rows, left)))[:, 0]


# -- classes for sequence classification ----------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_equal_those_by_hand(name, tmp_path):
    config, tensors = CONFIGS[name], tensors_of(CONFIGS[name])
    tiny_checkpoints.write(tmp_path, config, tensors)
    read = [9, 5, 1, 2]  # the rightmost id that is not PAD
    by_hand = [
        numpy_decoder.features(config, tensors, row)[last] @ tensors["score.weight"][0]
        for row, last in zip(ROWS, read, strict=True)
    ]
    assert np.std(by_hand) > 0.1
    np.testing.assert_allclose(our_scores(tmp_path), by_hand, atol=TOLERANCE)


def test_the_side_of_the_padding_does_not_matter(tmp_path):
    tiny_checkpoints.write(tmp_path, CONFIGS["llama"], tensors_of(CONFIGS["llama"]))
    np.testing.assert_allclose(our_scores(tmp_path, left=True), our_scores(tmp_path), atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_has_the_same_tensors_and_loads_again(name, tmp_path):
    tensors = tensors_of(CONFIGS[name])
    tiny_checkpoints.write(tmp_path / "in", CONFIGS[name], tensors)
    model, params = load_reward_model(tmp_path / "in")
    save_pretrained(tmp_path / "out", model, params, stop_ids=(2,))
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(exported[key], tensor)
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    kept = ("architectures", "id2label", "label2id", "pad_token_id")
    assert {key: said[key] for key in kept} == {key: CONFIGS[name][key] for key in kept}
    assert load_reward_model(tmp_path / "out")[0] == model


@pytest.mark.parametrize("name", ["gemma3_tied", "gpt2_untied", "olmo2", "smollm3"])
def test_every_family_may_have_a_head_and_begins_at_zero(name, tmp_path):
    tiny_checkpoints.write(tmp_path / "in", _TINY[name])
    model, params = add_sequence_head(*load_pretrained(tmp_path / "in"), pad_id=PAD)
    assert model.config.head.labels == 1 and not model.config.tied
    assert params["classifier"]["weight"].shape == (1, model.config.width)
    assert not np.any(jitted(model, params, *padded(ROWS, left=False)))
    save_pretrained(tmp_path / "out", model, params)
    assert load_reward_model(tmp_path / "out")[0] == model


def test_where_a_head_reads():
    read = lambda pad, ids: read_by(load_config(pad), ids)
    assert read(PAD, [1, PAD, 2, PAD, PAD]) == [1, PAD, 2]
    assert read(PAD, [PAD, PAD]) == [PAD]
    assert read(None, [1, 2, PAD]) == [1, 2, PAD]


def load_config(pad):
    return config_from_hf({**CONFIGS["llama"], "pad_token_id": pad})


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_equal_those_of_transformers(name, tmp_path):
    transformers, torch = (pytest.importorskip(x) for x in ("transformers", "torch"))
    tiny_checkpoints.write(tmp_path / "in", CONFIGS[name], tensors_of(CONFIGS[name]))
    model, params = load_reward_model(tmp_path / "in")
    save_pretrained(tmp_path / "out", model, params)

    def theirs(directory):
        loaded, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
        assert not any(info.values()), info
        ids = np.full((len(ROWS), 10), PAD)
        mask = np.zeros((len(ROWS), 10))
        for i, row in enumerate(ROWS):
            ids[i, : len(row)], mask[i, : len(row)] = row, 1
        with torch.no_grad():
            out = loaded.eval()(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
        return out.logits[:, 0].numpy()

    np.testing.assert_allclose(our_scores(tmp_path / "in"), theirs(tmp_path / "in"), atol=TOLERANCE)
    np.testing.assert_array_equal(theirs(tmp_path / "out"), theirs(tmp_path / "in"))


# -- ArmoRM ---------------------------------------------------------------------------------------


def test_the_gated_score_equals_that_by_hand(tmp_path):
    tensors = gated_tensors()
    tiny_checkpoints.write(tmp_path, GATED, tensors)
    model, params = load_reward_model(tmp_path)
    rows, turns = [[1, 5, 9, 3, 22, 31, 2, 17], [8, 11, 30, 12, 5]], [3, 1]
    by_hand = []
    for row, turn in zip(rows, turns, strict=True):
        h = numpy_decoder.features(GATED, tensors, row)
        rewards, x = tensors["regression_layer.weight"] @ h[-1], h[turn]
        for i in range(4):
            x = tensors[f"gating.layers.{i}.weight"] @ x + tensors[f"gating.layers.{i}.bias"]
            x = np.maximum(x, 0) if i < 3 else x
        gate = np.exp(x / 10) / np.exp(x / 10).sum() * 1.5
        assert gate.max() > 0.5  # it decides something
        by_hand.append(np.sum(gate * (rewards @ tensors["reward_transform_matrix"])))
    found = jitted(model, params, *padded(rows, left=False), jnp.array(turns))
    np.testing.assert_allclose(found[:, 0], by_hand, atol=TOLERANCE)

    save_pretrained(tmp_path / "out", model, params)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(exported[key], tensor)
    # What ends a sequence is its first pad here, not its last.
    assert read_by(model.config, [1, 2, 40, 3, 40]) == [1, 2]
    assert read_by(model.config, [1, 2, 3]) == [1, 2, 3]


def test_the_gate_reads_where_the_last_answer_begins():
    assert turn_in([1, *TURN, 5, *TURN, 6, 7]) == 7
    with pytest.raises(JaxdynError, match="where the assistant's answer begins, tokens 128009"):
        turn_in([1, *TURN[:4], 5])


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, words",
    [
        ({"architectures": ["LlamaForCausalLM"]}, "has no head that scores sequences"),
        ({"architectures": None}, "has no head that scores sequences"),
        ({"id2label": None, "num_labels": 3}, "num_labels is 3, and a reward is one number"),
        ({"id2label": None}, "num_labels is 2, and a reward is one number"),
        ({"id2label": []}, "id2label = [] is not supported"),
        ({"pad_token_id": "x"}, "pad_token_id = 'x' is not supported"),
        (
            {"architectures": ["LlamaRewardModel"]},
            "architectures = ['LlamaRewardModel'] is not supported; supported: "
            "LlamaForSequenceClassification or LlamaForRewardModelWithGating",
        ),
        (
            {"architectures": ["LlamaForRewardModelWithGating"], "num_quantiles": 19},
            "num_quantiles = 19 is not supported",
        ),
        ({"model_type": "qwen2"}, "architectures = ['LlamaForSequenceClassification'] is not"),
    ],
)
def test_what_a_configuration_may_not_say(change, words, tmp_path):
    config = {**CONFIGS["llama"], **change}
    tiny_checkpoints.write(tmp_path, config, tensors_of(CONFIGS["llama"]))
    with pytest.raises(JaxdynError) as error:
        load_reward_model(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_without_its_head_and_one_where_a_language_model_is_wanted(tmp_path):
    tensors = tensors_of(CONFIGS["llama"])
    tiny_checkpoints.write(tmp_path / "whole", CONFIGS["llama"], tensors)
    with pytest.raises(JaxdynError, match=r"scores sequences .* a language model is wanted"):
        load_pretrained(tmp_path / "whole")
    del tensors["score.weight"]
    tiny_checkpoints.write(tmp_path / "without", CONFIGS["llama"], tensors)
    with pytest.raises(JaxdynError, match=r"lacks the tensor score.weight, shape \[1, 32\]"):
        load_reward_model(tmp_path / "without")
