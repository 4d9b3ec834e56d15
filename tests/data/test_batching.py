import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from jaxdyn.data import (
    Tokenizer,
    batch_indices,
    bucket,
    character_tokenizer,
    decode_completions,
    encode_prompts,
    encode_supervised,
    epoch_of,
)
from jaxdyn.types import JaxdynError


@pytest.fixture
def tokenizer():
    return character_tokenizer("0123456789+-=")


@pytest.mark.parametrize(("batch_size", "num_examples"), [(3, 7), (7, 7), (10, 4), (1, 1)])
def test_every_example_once_an_epoch(batch_size, num_examples):
    stream = np.concatenate([batch_indices(5, k, batch_size, num_examples) for k in range(60)])
    for epoch in range(len(stream) // num_examples):
        seen = stream[epoch * num_examples : (epoch + 1) * num_examples]
        assert sorted(seen) == list(range(num_examples))


def test_batches_depend_on_seed_and_step_alone():
    later = batch_indices(1, 9, 16, 1000)
    for step in range(9):
        batch_indices(2, step, 16, 1000)
    np.testing.assert_array_equal(batch_indices(1, 9, 16, 1000), later)
    assert not np.array_equal(batch_indices(2, 9, 16, 1000), later)
    first, second = (batch_indices(1, step, 1000, 1000) for step in (0, 1))
    assert not np.array_equal(first, second)


def test_epochs_are_counted_in_examples():
    assert epoch_of(0, 3, 12) == 0
    assert epoch_of(6, 3, 12) == 1.5


def test_no_examples_is_an_error():
    with pytest.raises(JaxdynError, match="batch of 4 from 0 examples"):
        batch_indices(0, 0, 4, 0)


@pytest.mark.parametrize(
    ("length", "limit", "slots"),
    [(1, 64, 8), (8, 64, 8), (9, 64, 16), (33, 64, 64), (33, 48, 48), (5, 6, 6)],
)
def test_bucket(length, limit, slots):
    assert bucket(length, limit) == slots


def test_prompts_are_padded_on_the_left(tokenizer):
    batch = encode_prompts(tokenizer, ["17=", "1="], 32)
    np.testing.assert_array_equal(
        batch.prompt_ids, [[0, 0, 0, 0, 1, 4, 10, 15], [0, 0, 0, 0, 0, 1, 4, 15]]
    )
    np.testing.assert_array_equal(
        batch.prompt_mask, [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]]
    )
    assert batch.prompt_ids.dtype == np.int32
    assert encode_prompts(tokenizer, ["1" * 8], 32).prompt_ids.shape == (1, 16)


def test_a_prompt_that_is_too_long_is_named(tokenizer):
    with pytest.raises(JaxdynError, match=r"example 1 \('123456'\).* 7 tokens.*length is 6"):
        encode_prompts(tokenizer, ["1", "123456"], 6)


def test_a_prompt_without_a_token_is_named():
    bare = Tokenizer(Backend(models.WordLevel({"a": 0})), pad_id=0, stop_ids=(0,))
    with pytest.raises(JaxdynError, match=r"example 1 \(''\): the prompt is empty"):
        encode_prompts(bare, ["a", ""], 8)
    with pytest.raises(JaxdynError, match=r"example 0 \(''\): the prompt is empty"):
        encode_supervised(bare, [""], ["a"], 8)
    with pytest.raises(JaxdynError, match="without prompts"):
        encode_prompts(bare, [], 8)


def test_supervised_rows_predict_the_completion_and_its_stop_token(tokenizer):
    tokens, mask, predicted = encode_supervised(tokenizer, ["17=", "2="], ["9+8", "2-0"], 16)
    np.testing.assert_array_equal(
        tokens, [[1, 4, 10, 15, 12, 13, 11, 2], [1, 5, 15, 5, 14, 3, 2, 0]]
    )
    np.testing.assert_array_equal(mask, [[1] * 8, [1] * 7 + [0]])
    np.testing.assert_array_equal(predicted, [[0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1, 0]])
    with pytest.raises(JaxdynError, match=r"prompt and completion has 8 tokens, max_length is 7"):
        encode_supervised(tokenizer, ["17="], ["9+8"], 7)


def test_a_merge_across_the_seam_leaves_the_prompt_as_the_rollout_sees_it():
    vocab = {"a": 0, "b": 1, "ab": 2, ".": 3}
    merging = Tokenizer(Backend(models.BPE(vocab, [("a", "b")])), pad_id=3, stop_ids=(3,))
    assert merging.encode("aab") == [0, 2]
    tokens, mask, predicted = encode_supervised(merging, ["aa", "a"], ["b", "aab"], 8)
    np.testing.assert_array_equal(tokens[:, :4], [[0, 0, 1, 3], [0, 0, 2, 3]])
    np.testing.assert_array_equal(mask.sum(1), [4, 4])
    np.testing.assert_array_equal(predicted[:, :4], [[0, 0, 1, 1], [0, 1, 1, 1]])


def test_sampled_completions_as_text(tokenizer):
    ids = np.array([[12, 13, 11, 2, 0], [4, 4, 4, 4, 4], [2, 0, 0, 0, 0]])
    mask = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], bool)
    texts, finished, kept = decode_completions(tokenizer, ids, mask)
    assert texts == ["9+8", "11111", ""]
    assert finished == [True, False, True]
    assert kept == [[12, 13, 11, 2], [4] * 5, [2]]
