import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from jaxdyn.data import Tokenizer, decode_completions, stop_at_strings
from jaxdyn.types import Rollout


def byte_tokenizer():
    """Bytes, and a few pieces of several: a stop string can begin and end inside of tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<pad>", "</s>", *alphabet, "Ċ" + "Ċ", "ĊĊH", "um", "uman"]
    merges = [("Ċ", "Ċ"), ("ĊĊ", "H"), ("u", "m")]
    backend = Backend(models.BPE({p: i for i, p in enumerate(pieces[:-1])}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "</s>"])
    return Tokenizer(backend, pad_id=0, stop_ids=(1,))


def rollout_of(tokenizer, *texts, features=False):
    """Completions of these texts, a stop token after each `.`, in 12 slots."""
    rows = [tokenizer.encode(t) + [1] * t.endswith(".") for t in texts]
    ids = np.array([row + [0] * (12 - len(row)) for row in rows], np.int32)
    mask = np.arange(12) < np.array([len(row) for row in rows])[:, None]
    logps = jnp.where(mask, -1.0 - jnp.arange(12.0), 0)
    prompt = jnp.ones((len(rows), 1), jnp.int32)
    kept = jnp.where(mask[..., None], jnp.ones((len(rows), 12, 2)), 0) if features else None
    return Rollout(prompt, prompt == 1, jnp.asarray(ids), jnp.asarray(mask), logps, kept)


def test_a_completion_ends_with_the_token_that_completes_a_string():
    tokenizer = byte_tokenizer()
    texts = ("yes\n\nHum no", "é€ END x", "a.", "ENend", "\n\nH")
    rollout = rollout_of(tokenizer, *texts, features=True)
    cut = stop_at_strings(tokenizer, rollout, ("\n\n", "END", "€"))
    # `\n\nH` is one token, € three.
    lengths = [4, 5, 3, 5, 1]
    assert cut.completion_mask.sum(axis=1).tolist() == lengths
    kept = np.arange(12) < np.array(lengths)[:, None]
    for name, fill in (("completion_ids", 0), ("per_token_logps", 0)):
        np.testing.assert_array_equal(
            getattr(cut, name), np.where(kept, getattr(rollout, name), fill)
        )
    np.testing.assert_array_equal(cut.features, kept[..., None] * np.ones(2))
    read = decode_completions(
        tokenizer, cut.completion_ids, cut.completion_mask, ("\n\n", "END", "€")
    )
    assert read[:2] == (["yes", "é", "a.", "ENend", ""], [True, True, True, False, True])
    assert [len(ids) for ids in read[2]] == lengths


def test_without_strings_all_stays():
    tokenizer = byte_tokenizer()
    rollout = rollout_of(tokenizer, "END", "a.")
    assert stop_at_strings(tokenizer, rollout, ()) is rollout
    ids, mask = rollout.completion_ids, rollout.completion_mask
    assert decode_completions(tokenizer, ids, mask)[:2] == (["END", "a."], [False, True])
