"""Messages on their way to the model: rows, templates, tokens, lengths."""

import json
import re

import jaxtyping
import numpy as np
import pytest
from chat_templates import CHATML, HEADERS, MANY, ONE, THINKING, chat_tokenizer, message

from jaxdyn.data import (
    DataConfig,
    Prompts,
    encode_prompts,
    encode_supervised,
    fit_prompts,
    load_source,
    load_tokenizer,
    written,
)
from jaxdyn.data import fit as fitting
from jaxdyn.data.templates import Rendered
from jaxdyn.types import JaxdynError


@pytest.fixture
def prompts(tmp_path, monkeypatch):
    """Rows of a file as a run reads them, in an order of their own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

    def make(*rows, template=CHATML, **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"path": str(path), "test_path": str(path), "cache_dir": str(tmp_path / "cache")}
        config = DataConfig("jsonl", **files, **options)
        source = load_source(config, "train")
        in_order = np.array(sorted(range(len(source)), key=lambda i: str(source[i])))
        return Prompts(source, config, chat_tokenizer(template), in_order)

    return make


PROMPT = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
PROMPT += "<|im_start|>assistant\n"


def test_rows_of_messages(prompts):
    (one,) = prompts({"prompt": ONE, "answer": 7})
    assert one == {"prompt": PROMPT.format("  Hi <é>\n"), "messages": ONE, "answer": 7}
    (one,) = prompts({"messages": [*ONE, message("assistant", "Ho")]})
    assert (one["prompt"], one["completion"]) == (PROMPT.format("  Hi <é>\n"), "Ho")
    assert one["messages"] == ONE
    (one,) = prompts(
        {"turns": ONE, "done": [message("assistant", "Ho")]},
        prompt_field="turns",
        completion_field="done",
    )
    assert (one["messages"], one["completion"]) == (ONE, "Ho")
    (one,) = prompts({"prompt": "a text"})
    assert one == {"prompt": "a text"}


def test_which_template(prompts):
    chat = prompts({"prompt": "Hi"}, prompt_template="chat")[0]
    assert chat["prompt"] == PROMPT.format("Hi") and isinstance(chat["prompt"], Rendered)
    hh = prompts({"prompt": ONE, "completion": "Ho"}, prompt_template="hh", template=None)[0]
    assert (hh["prompt"], hh["completion"]) == ("\n\nHuman:   Hi <é>\n\n\nAssistant:", " Ho")
    assert type(hh["prompt"]) is str
    told = {"chat_template_kwargs": '{"enable_thinking": false}', "template_date": "2026-02-03"}
    thinking = prompts({"prompt": ONE, "tools": [{"a": 1}]}, template=THINKING, **told)[0]["prompt"]
    assert thinking.startswith('<|im_start|>system\nTools:\n{"a": 1}<|im_end|>')
    assert thinking.endswith("</think>\n\n")
    assert (
        "\n\nToday: 03 Feb 2026\n"
        in prompts({"prompt": ONE}, template=HEADERS, **told)[0]["prompt"]
    )
    with pytest.raises(
        JaxdynError,
        match=r"jsonl, example 0: .* no chat template: .* of plain, hh, alpaca, got auto",
    ):
        prompts({"prompt": ONE}, template=None)[0]
    with pytest.raises(JaxdynError, match=r"list of messages, and prompt_template is none"):
        prompts({"prompt": ONE}, prompt_template="none")[0]
    with pytest.raises(JaxdynError, match=r"example 0: the chat template fails: no$"):
        prompts({"prompt": ONE}, template="{{ raise_exception('no') }}")[0]


def test_special_tokens_are_not_added_twice():
    tokenizer = chat_tokenizer(HEADERS)
    ids = tokenizer.encode("Hi")
    assert ids[0] == 1 and tokenizer.encode("<s>Hi") == ids
    config = DataConfig()
    headed = written({"prompt": ONE}, config, tokenizer)["prompt"]
    assert headed.startswith("<s><|start|>") and tokenizer.encode(headed).count(1) == 1
    bare = written({"prompt": ONE}, config, chat_tokenizer(CHATML))["prompt"]
    assert 1 not in tokenizer.encode(bare) and 1 not in tokenizer.encode(bare + "more")
    assert 1 in tokenizer.encode(str(bare))
    texts = [headed, bare, str(bare), "Hi"]
    assert tokenizer.lengths(texts) == [len(tokenizer.encode(text)) for text in texts]
    with pytest.raises(JaxdynError, match="no token for 'ü'"):
        tokenizer.lengths(["Hi", "ü"])
    tokens, mask, predicted = encode_supervised(tokenizer, [bare], ["Ho"], 512)
    kept = tokens[0][mask[0]].tolist()
    assert 1 not in kept and tokenizer.decode(tokens[0][predicted[0]].tolist()) == "Ho"
    assert kept[-1] == tokenizer.backend.token_to_id("<|im_end|>")


def test_the_template_is_read_and_exported(tmp_path):
    inside = chat_tokenizer(None)
    inside.settings["chat_template"] = [
        {"name": "tool_use", "template": "t"},
        {"name": "default", "template": CHATML},
    ]
    inside.save(tmp_path / "a")
    loaded = load_tokenizer(tmp_path / "a")
    assert loaded.chat_template == CHATML
    assert loaded.special_tokens == {
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "pad_token": "<pad>",
    }
    loaded.save(tmp_path / "b")
    assert not (tmp_path / "b" / "chat_template.jinja").exists()
    assert load_tokenizer(tmp_path / "b").chat_template == CHATML
    (tmp_path / "b" / "chat_template.jinja").write_text(HEADERS)
    beside = load_tokenizer(tmp_path / "b")
    assert beside.chat_template == HEADERS
    beside.save(tmp_path / "c")
    assert (tmp_path / "c" / "chat_template.jinja").read_text() == HEADERS
    assert load_tokenizer(tmp_path / "c").chat_template == HEADERS
    (tmp_path / "c" / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(JaxdynError, match=r"cannot read .*chat_template.jinja: .*utf-8"):
        load_tokenizer(tmp_path / "c")


TURN = message("assistant", "x")


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": []}, "'prompt' should be a list of messages, got []"),
        (
            {"prompt": ["Hi"]},
            "'prompt', message 1 should be an object with role and content, not 'Hi'",
        ),
        (
            {"prompt": [{"role": "bot", "content": "x"}]},
            "message 1: role should be one of .*, got 'bot'",
        ),
        ({"prompt": [{"role": "user"}]}, "message 1: content should be a text, got None"),
        ({"prompt": [*ONE, *ONE]}, "message 2 is out of order: user after user"),
        ({"prompt": [TURN, *ONE, TURN, MANY[0]]}, "message 4 is out of order: system belongs"),
        ({"prompt": [*ONE, TURN]}, "the last message should be the user's, got assistant's"),
        ({"messages": [TURN]}, "'messages' should be a list of messages, got []"),
        ({"prompt": [message("user", "\ud800")]}, "is not valid Unicode"),
        ({"prompt": "a", "completion": ONE}, "'completion' should be a text, or .* got"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "'chosen' and 'rejected' are equal: 'b'"),
        (
            {"prompt": "a", "chosen": "b", "rejected": ""},
            "'rejected' should be a non-empty text, got ''",
        ),
    ],
)
def test_a_bad_row_is_named_with_its_line(prompts, row, words):
    with pytest.raises(JaxdynError, match=words.replace("[]", r"\[\]")) as caught:
        prompts({"prompt": "a"}, row)
    assert re.search(r"rows.jsonl, line 2\b", str(caught.value)) and "\n" not in str(caught.value)


def test_preferences_are_two_answers(prompts):
    pair = {
        "chosen": [*ONE, message("assistant", "yes")],
        "rejected": [*ONE, message("assistant", "no")],
    }
    for row in (pair, {"prompt": "  Hi", **pair}, {"prompt": ONE, **pair}):
        (one,) = prompts(row)
        assert (one["chosen"], one["rejected"]) == ("yes", "no")
    assert prompts(pair)[0]["messages"] == ONE
    other = {**pair, "rejected": [*MANY, message("assistant", "no")]}
    with pytest.raises(JaxdynError, match="'rejected' does not begin with the prompt's messages"):
        prompts(other)


# -- length ---------------------------------------------------------------------------------------

LONG = ({"prompt": "1"}, {"prompt": "12345"}, {"prompt": "123"}, {"prompt": "1234"})


def test_what_is_too_long_is_refused_dropped_or_cut(prompts):
    refused = r"^example 2 \('1234'\): the prompt has 5 tokens, max_prompt_length is 4; .* \(and 1 "
    rows = LONG
    with pytest.raises(JaxdynError, match=refused):
        fit_prompts(prompts(*rows), 4)
    kept, overlong = fit_prompts(prompts(*rows, overlong="drop"), 4)
    assert ([e["prompt"] for e in kept], overlong) == (["1", "123"], 2)
    assert kept[-1]["prompt"] == "123" and [e["prompt"] for e in kept[:1]] == ["1"]
    kept, overlong = fit_prompts(prompts(*rows, overlong="truncate-left"), 4)
    assert (len(kept), overlong) == (4, 2)
    texts = [e["prompt"] for e in kept]
    batch = encode_prompts(kept.tokenizer, texts, 4, truncate=True)
    read = [
        kept.tokenizer.decode(row[mask].tolist())
        for row, mask in zip(
            np.asarray(batch.prompt_ids), np.asarray(batch.prompt_mask), strict=True
        )
    ]
    assert read == ["1", "123", "234", "345"] and np.all(batch.prompt_ids[1:, 0] == 1)
    tokens, mask, predicted = encode_supervised(kept.tokenizer, texts, ["+"] * 4, 8, 4)
    assert kept.tokenizer.decode(tokens[3][mask[3]].tolist()) == "345+"
    assert predicted.sum(axis=1).tolist() == [2] * 4
    with pytest.raises(
        JaxdynError, match=r"drop leaves no prompt: the shortest has 2 tokens, .* 1$"
    ):
        fit_prompts(prompts(*rows, overlong="drop"), 1)


def test_rows_of_a_supervised_run_fit_whole(prompts):
    """`<s>`, 1 to 5 characters of the prompt, 3 of the completion and a stop token."""
    rows = [{**row, "completion": "abc"} for row in LONG]
    refused = r"^example 3 \('12345'\): prompt and completion have 10 tokens, the context is 9; "
    with pytest.raises(JaxdynError, match=refused):
        fit_prompts(prompts(*rows), 6, 9)
    texts = lambda fitted: [e["prompt"] for e in fitted.prompts]
    dropped = fit_prompts(prompts(*rows, overlong="drop"), 6, 9)
    assert (texts(dropped), dropped.overlong) == (["1", "123", "1234"], 1)
    cut = fit_prompts(prompts(*rows, overlong="truncate-left"), 3, 7)
    assert (len(texts(cut)), cut.overlong) == (4, 3)
    encode_supervised(cut.prompts.tokenizer, texts(cut), ["abc"] * 4, 7, 3)
    left = fit_prompts(
        prompts(rows[0], {**rows[1], "completion": "abcd"}, overlong="truncate-left"), 3, 7
    )
    assert (texts(left), left.overlong) == (["1"], 1)


def test_lengths_are_counted_once(prompts, monkeypatch):
    found = prompts(*LONG)
    first = fitting.token_counts(found)
    assert sorted(first) == [2, 4, 5, 6]
    monkeypatch.setattr(type(found), "__getitem__", None)
    np.testing.assert_array_equal(fitting.token_counts(found), first)
    for other in (
        Prompts(found.source, found.config, chat_tokenizer(HEADERS)),
        Prompts(found.source, DataConfig(prompt_template="hh"), found.tokenizer),
        found.at(np.array([0, 1, 3, 2])),
    ):
        assert fitting._key(other) != fitting._key(found)


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"chat_template_kwargs": "[1]"},
            r"chat_template_kwargs must be a JSON object, got '\[1\]'",
        ),
        ({"chat_template_kwargs": "{"}, "chat_template_kwargs must be a JSON object, got '{'"),
        ({"template_date": "May"}, "template_date must be a day, YYYY-MM-DD, got 'May'"),
    ],
)
def test_options(options, words):
    with pytest.raises(JaxdynError, match=rf"^data\.{words}$"):
        DataConfig(**options)


# -- beside transformers --------------------------------------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("template", [CHATML, HEADERS, THINKING])
@pytest.mark.parametrize("add_bos", [False, True])
def test_as_transformers_applies_it(tmp_path, template, add_bos):
    transformers = pytest.importorskip("transformers")
    import datetime

    tokenizer = chat_tokenizer(template, add_bos)
    tokenizer.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    config = DataConfig(template_date=datetime.date.today().isoformat())
    for messages in (ONE, MANY):
        text = written({"prompt": messages}, config, ours)["prompt"]
        apply = lambda m=messages, **how: theirs.apply_chat_template(
            m, add_generation_prompt=True, **how
        )
        assert text == apply(tokenize=False)
        assert ours.encode(text) == apply(tokenize=True, return_dict=False)
