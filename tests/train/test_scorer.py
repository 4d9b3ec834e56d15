"""A reward model as a function of texts: its own tokenizer and template, batches by length."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from jaxdyn.data import DataConfig, Tokenizer, character_tokenizer
from jaxdyn.distributed import one_device
from jaxdyn.models import (
    Gating,
    LanguageModel,
    SequenceHead,
    add_sequence_head,
    llama,
    load_pretrained,
    save_pretrained,
)
from jaxdyn.rewards import LearnedReward, RewardConfig, make_reward
from jaxdyn.train import scorer as scoring
from jaxdyn.train.scorer import Scorer
from jaxdyn.train.task import open_task
from jaxdyn.types import JaxdynError

TEMPLATE = (
    "{% for m in messages %}{{ '<u>' if m.role == 'user' else '<a>' }}{{ m.content }}<e>"
    "{% endfor %}"
    "{{ '<a>' if add_generation_prompt else '' }}"
)


def tokenizer_with(template):
    plain = character_tokenizer("0123456789=abcd ")
    plain.backend.add_special_tokens(["<u>", "<a>", "<e>"])
    return dataclasses.replace(plain, chat_template=template)


def make_scorer(template=TEMPLATE, gating=None, pad_id=0, **options):
    tokenizer = tokenizer_with(template)
    head = SequenceHead(3 if gating else 1, pad_id, gating)
    model = LanguageModel(
        llama(tokenizer.vocab_size, 16, 1, 2, max_positions=24, head=head, tied=False)
    )
    params = model.init(jax.random.key(1))
    params["classifier"]["weight"] *= 50
    told = LearnedReward("x", **options)
    data = DataConfig(prompt_template=told.prompt_template)
    return Scorer("model", model, params, tokenizer, one_device(), told, data)


def features(scorer, row):
    """φ [T, D] of a sequence of ids, by a pass of its own over nothing else."""
    tokens = jnp.array([row])
    return scorer.model.features(scorer.params["backbone"], tokens, jnp.ones(tokens.shape, bool))[0]


def one_by_one(scorer, rows):
    """The scores of sequences of ids."""
    head = scorer.params["classifier"]["weight"][0]
    return [float(features(scorer, row)[-1] @ head) for row in rows]


def test_messages_are_read_in_the_models_own_template_and_texts_as_they_are():
    scorer = make_scorer(batch_size=2)
    ids = scorer.tokenizer.backend.token_to_id
    user, assistant, end = map(ids, ("<u>", "<a>", "<e>"))
    letters = lambda text: [ids(letter) for letter in text]
    rows = [
        [user, *letters("1=a"), end, assistant, *letters("b" * n), end] for n in (1, 7, 3, 12, 2)
    ]
    rows.append([1, *letters("2="), *letters("ab"), 2])  # a text, <s> before and </s> after it
    talk = [{"role": "user", "content": "1=a"}]
    prompts = ["what the policy's template wrote"] * 5 + ["2="]
    completions = ["b" * n for n in (1, 7, 3, 12, 2)] + ["ab"]
    before = scoring.jitted_scores._cache_size()
    found = scorer(prompts, completions, messages=[talk] * 5 + [None], answer=[None] * 6)
    np.testing.assert_allclose(found, one_by_one(scorer, rows), atol=1e-5)
    assert np.std(found) > 0.1
    # Lengths of 18, 13, 9, 8, 7 and 6 in pairs: of 24 (the context), 16 and 8 slots.
    assert scoring.jitted_scores._cache_size() - before == 3
    alone = scorer(prompts[:1], completions[:1], messages=[talk])
    np.testing.assert_allclose(alone, found[:1], atol=1e-5)
    assert scorer([], []) == []


def test_a_padding_token_at_the_end_is_not_read():
    """With the stop token as the padding, as GPT-NeoX's checkpoints have it."""
    scorer = make_scorer(template=None, pad_id=2)
    rows = [scorer.tokenizer.encode("1=ab")]
    np.testing.assert_allclose(scorer(["1="], ["ab"]), one_by_one(scorer, rows), atol=1e-5)


@pytest.mark.parametrize("template, lead", [("plain", "1=a"), ("hh", None), ("chat", None)])
def test_other_templates(template, lead):
    scorer = make_scorer(prompt_template=template)
    if template == "chat":
        row = scorer.tokenizer.encode("<u>1=<e><a>a<e>", special_tokens=False)
    elif template == "plain":
        row = [*scorer.tokenizer.encode(lead), 2]
    else:  # letters that this tokenizer has not
        with pytest.raises(JaxdynError, match="has no token for"):
            scorer(["1="], ["a"])
        return
    np.testing.assert_allclose(scorer(["1="], ["a"]), one_by_one(scorer, [row]), atol=1e-5)


def test_a_conversation_that_is_too_long():
    texts = (["1=", "1="], ["a", "a" * 30])
    with pytest.raises(JaxdynError, match="34 tokens of the reward model's, the limit is 24"):
        make_scorer()(*texts)
    short, none = make_scorer(overlong="none")(*texts)
    assert none is None and short == pytest.approx(make_scorer()(["1="], ["a"])[0], abs=1e-6)
    cut = make_scorer(overlong="truncate-left", max_length=8)
    row = [*cut.tokenizer.encode("1=" + "a" * 30), 2]
    np.testing.assert_allclose(cut(*texts)[1], one_by_one(cut, [[1, *row[-7:]]])[0], atol=1e-5)


def test_a_gate_reads_where_the_answer_begins(monkeypatch):
    scorer = make_scorer(gating=Gating(8, 2, 0.1))
    ids = scorer.tokenizer.backend.token_to_id
    monkeypatch.setattr("jaxdyn.models.heads.TURN", (ids("<e>"), ids("<a>")))
    talks = [[{"role": "user", "content": text}] for text in ("1", "22=")]
    found = scorer(["", ""], ["a", "bb"], messages=talks)
    by_hand = []
    gate = jax.tree.map(np.asarray, scorer.params["gating"])
    for text, turn in (("<u>1<e><a>a<e>", 2), ("<u>22=<e><a>bb<e>", 4)):
        row = scorer.tokenizer.encode(text, special_tokens=False)
        phi = np.asarray(features(scorer, row))
        x = phi[turn]
        for i in range(3):
            x = x @ gate[f"layer_{i}"]["kernel"]
            x = np.maximum(x, 0) if i < 2 else x
        weights = np.exp(x / 0.1) / np.exp(x / 0.1).sum()
        by_hand.append(weights @ (scorer.params["classifier"]["weight"] @ phi[-1]))
    np.testing.assert_allclose(found, by_hand, rtol=1e-4)


@pytest.mark.parametrize("name", ["model", "judge"])
def test_what_a_run_refuses(name, root):
    config = tiny_runs.rl_config(root, "refused")

    def one_line(reward):
        with pytest.raises(JaxdynError) as error:
            open_task(dataclasses.replace(config, reward=reward))
        assert "\n" not in str(error.value)
        return str(error.value)

    named = lambda path: RewardConfig((name,), **{name: LearnedReward(path)})
    assert f"reward.{name}.path must name a reward model, got ''" in one_line(named(""))
    assert "has no head that scores sequences" in one_line(named(str(root / "model")))
    with pytest.raises(JaxdynError, match=f"the reward '{name}' is a model, which is not loaded"):
        make_reward(named("x"))


def test_a_tokenizer_larger_than_the_reward_models_vocabulary(root, tmp_path):
    tiny_runs.make_model(tmp_path / "lm")
    model, params = add_sequence_head(*load_pretrained(tmp_path / "lm"))
    save_pretrained(tmp_path / "rm", model, params)
    larger: Tokenizer = character_tokenizer(tiny_runs.ALPHABET + "xyz")
    larger.save(tmp_path / "rm")
    reward = RewardConfig(("model",), model=LearnedReward(str(tmp_path / "rm")))
    with pytest.raises(JaxdynError, match="has 21 tokens, more than the model's vocabulary of 18"):
        open_task(dataclasses.replace(tiny_runs.rl_config(root, "refused"), reward=reward))
