"""`jaxdyn reward score`: a file's rows with their scores, and the lines it says when it cannot."""

import json

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import tiny_runs

from jaxdyn.cli import main
from jaxdyn.data import load_tokenizer
from jaxdyn.models import add_sequence_head, load_pretrained, load_reward_model, save_pretrained


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A reward model with a random head, and a language model beside it."""
    root = tmp_path_factory.mktemp("score")
    tiny_runs.make_model(root / "lm")
    lm, params = add_sequence_head(*load_pretrained(root / "lm"), pad_id=0)
    params["classifier"]["weight"] = jax.random.normal(jax.random.key(3), (1, lm.config.width))
    save_pretrained(root / "rm", lm, params, stop_ids=(2,))
    load_tokenizer(root / "lm").save(root / "rm")
    return root / "rm"


ROWS = [
    {"prompt": "1=", "completion": "ab", "note": 5},
    {"prompt": "2=", "chosen": "a", "rejected": "bb"},
    {"prompt": [{"role": "user", "content": "3="}], "completion": "d" * 40},
]


@pytest.fixture
def score(model, tmp_path, monkeypatch):
    """Score rows; the lines that were written."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    def run(rows, *words, where=model, output=tmp_path / "scores.jsonl"):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        main(["reward", "score", str(where), str(file), "--output", str(output), *words])
        return [json.loads(line) for line in output.read_text().splitlines()]

    return run


@pytest.fixture
def refused(score, capsys):
    def run(rows, *words, **options):
        with pytest.raises(SystemExit) as stop:
            score(rows, *words, **options)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1
        return said

    return run


def test_a_files_rows_with_their_scores(score, model, capsys, tmp_path):
    found = score(ROWS, "--prompt-template", "plain", "--overlong", "none")
    kept = [{k: v for k, v in row.items() if not k.startswith("score")} for row in found]
    assert kept == ROWS
    said = capsys.readouterr().out
    assert "1 completions: score" in said and "1 pairs" in said
    assert "1 rows are too long and have no score" in said and found[2]["score"] is None
    tokenizer = load_tokenizer(model)
    lm, params = load_reward_model(model)
    for text, value in (
        ("1=ab", found[0]["score"]),
        ("2=a", found[1]["score_chosen"]),
        ("2=bb", found[1]["score_rejected"]),
    ):
        tokens = jnp.array([[*tokenizer.encode(text), 2]])
        phi = lm.features(params["backbone"], tokens, jnp.ones(tokens.shape, bool))
        by_hand = phi[0, -1] @ params["classifier"]["weight"][0]
        np.testing.assert_allclose(value, by_hand, atol=1e-5)
    narrow = score(ROWS[:2], "--dtype", "bfloat16", output=tmp_path / "narrow.jsonl")
    # Rounding to 8 bits of a few dozen sums of 16 terms of order 1.
    assert narrow[0]["score"] != found[0]["score"]
    assert narrow[0]["score"] == pytest.approx(found[0]["score"], abs=0.1)


def test_what_it_refuses(refused, model, tmp_path):
    assert "line 1 has nothing to score: wanted 'completion', or" in refused([{"prompt": "1="}])
    equal = {"prompt": "1=", "chosen": "a", "rejected": "a"}
    assert "line 2: 'chosen' and 'rejected' are equal: 'a'" in refused([ROWS[1], equal])
    assert "is empty: wanted one JSON object a line" in refused([])
    long = refused([ROWS[2]], "--prompt-template", "plain")
    assert "have 44 tokens of the reward model's, the limit is 32" in long
    assert "the checkpoint has no chat template: prompt_template must be" in refused([ROWS[2]])
    lm = refused(ROWS[:1], where=model.parent / "lm")
    assert "lm has no head that scores sequences: config.json's architectures" in lm
    (tmp_path / "there").write_text("")
    assert "there already exists" in refused(ROWS[:1], output=tmp_path / "there")
