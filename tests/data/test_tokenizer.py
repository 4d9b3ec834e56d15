import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jaxdyn.data import Tokenizer, character_tokenizer, load_tokenizer
from jaxdyn.types import JaxdynError

ALPHABET = "0123456789+-="


def sentencepiece_like() -> tokenizers.Tokenizer:
    """Spaces are `▁`, one is put before every text, and decoding takes the first one off."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "c", "▁a", "▁b", "▁c", "."]
    merges = [("▁", "a"), ("▁", "b"), ("▁", "c")]
    backend = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def write(directory, backend, **files):
    backend.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


def test_characters_one_token_each_after_the_beginning():
    tokenizer = character_tokenizer(ALPHABET)
    assert tokenizer.encode("10+9=") == [1, 4, 3, 13, 12, 15]
    assert tokenizer.encode("10", special_tokens=False) == [4, 3]
    assert (tokenizer.pad_id, tokenizer.stop_ids, tokenizer.bos_id) == (0, (2,), 1)
    assert tokenizer.vocab_size == 3 + len(ALPHABET)


def test_characters_round_trip():
    alphabet = "ab é\n\t.▁漢🙂#"
    tokenizer = character_tokenizer(alphabet)
    rng = np.random.default_rng(0)
    for size in range(20):
        text = "".join(rng.choice(list(alphabet), size))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_unknown_character_is_named():
    with pytest.raises(JaxdynError, match=r"no token for 'x' in the text '1x2'"):
        character_tokenizer(ALPHABET).encode("1x2")
    with pytest.raises(JaxdynError, match="non-empty"):
        character_tokenizer("")


def test_save_and_load(tmp_path):
    tokenizer = character_tokenizer(ALPHABET)
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("17=9+8") == tokenizer.encode("17=9+8")
    assert (loaded.pad_id, loaded.stop_ids, loaded.bos_id) == (0, (2,), 1)


def test_save_keeps_several_stop_ids_and_settings(tmp_path):
    write(
        tmp_path,
        sentencepiece_like(),
        tokenizer_config={"eos_token": {"content": "</s>"}, "chat_template": "T"},
        generation_config={"eos_token_id": [1, 2]},
    )
    loaded = load_tokenizer(tmp_path)
    # The tokenizer's own end comes first; generation may stop at others too.
    assert loaded.stop_ids == (2, 1)
    loaded.save(tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.stop_ids == (2, 1)
    assert again.settings["chat_template"] == "T"


@pytest.mark.parametrize(
    ("settings", "generation", "model", "stop_ids", "pad_id"),
    [
        ({"eos_token": "</s>"}, {}, {}, (2,), 2),
        ({"eos_token": "</s>"}, {"eos_token_id": 5}, {"eos_token_id": 6}, (5,), 5),
        ({}, {}, {"eos_token_id": [6, 2]}, (6, 2), 6),
        ({"eos_token": "</s>", "pad_token": "<unk>"}, {}, {"pad_token_id": 4}, (2,), 0),
        ({"eos_token": "</s>"}, {"pad_token_id": 3}, {"pad_token_id": 4}, (2,), 4),
        ({"eos_token": "</s>"}, {}, {"pad_token_id": -1}, (2,), 2),
    ],
)
def test_where_stop_and_pad_ids_come_from(tmp_path, settings, generation, model, stop_ids, pad_id):
    write(
        tmp_path,
        sentencepiece_like(),
        tokenizer_config=settings,
        generation_config=generation,
        config=model,
    )
    loaded = load_tokenizer(tmp_path)
    assert (loaded.stop_ids, loaded.pad_id) == (stop_ids, pad_id)


def test_beginning_of_sequence_as_the_config_states(tmp_path):
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    write(tmp_path, sentencepiece_like(), tokenizer_config=settings)
    assert load_tokenizer(tmp_path).encode("a") == [7]
    write(tmp_path, sentencepiece_like(), tokenizer_config={**settings, "add_bos_token": True})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a") == [1, 7]
    write(tmp_path, tokenizer.backend, tokenizer_config={**settings, "add_bos_token": False})
    assert load_tokenizer(tmp_path).encode("a") == [7]


def test_truncation_stored_in_the_file_is_ignored(tmp_path):
    backend = sentencepiece_like()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    write(tmp_path, backend, config={"eos_token_id": 2})
    assert load_tokenizer(tmp_path).encode("a b c") == [7, 8, 9]


def test_completion_keeps_its_leading_space_and_loses_its_stop_token():
    tokenizer = Tokenizer(sentencepiece_like(), pad_id=0, stop_ids=(2, 10))
    assert tokenizer.decode([8, 9]) == "b c"
    assert tokenizer.decode_completion([8, 9]) == " b c"
    assert tokenizer.decode_completion([8, 9, 2]) == " b c"
    # A stop token that is ordinary text is left out at the end, and only there.
    assert tokenizer.decode_completion([5, 10, 9, 10]) == "b. c"
    assert tokenizer.decode_completion([]) == ""
    characters = character_tokenizer("+-")
    assert characters.decode_completion([*characters.encode("+-")[1:], 2]) == "+-"


def byte_level() -> tokenizers.Tokenizer:
    """A token for every byte, and a few of several bytes that begin or end inside a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spell = lambda text: pre_tokenizers.ByteLevel(False).pre_tokenize_str(text)[0][0]
    first, second, third = spell("漢")
    merges = [(first, second), (third, "a"), ("a", "b")]
    words = [*alphabet, *(a + b for a, b in merges)]
    backend = tokenizers.Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """Spaces are `▁`; a character without a token of its own is written as its bytes."""
    tokens = [
        "<unk>",
        "<s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "a",
        "▁a",
        "▁▁",
        "漢",
        ".",
    ]
    words = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(words, [], byte_fallback=True))
    replaced = decoders.Replace("▁", " ")
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence([replaced, decoders.ByteFallback(), decoders.Fuse(), strip])
    backend.add_special_tokens(["<unk>", "<s>"])
    return backend


def word_pieces() -> tokenizers.Tokenizer:
    words = ["[UNK]", "a", "b", "##a", "##b", ".", "n't", "do"]
    backend = tokenizers.Tokenizer(
        models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(["[UNK]"])
    return backend


def pieces_by_whole_texts(tokenizer, ids):
    """Every prefix decoded as a whole: a token's piece is what the text has more."""
    found, plain, said = [], [], ""
    for i in ids:
        text = tokenizer.decode([*plain, i])
        if text == said and not tokenizer.decode([i]):
            found.append(tokenizer.backend.id_to_token(i))
            continue
        plain.append(i)
        whole = not text.endswith("\ufffd")
        found.append(text[len(said) :] if whole else "")
        said = text if whole else said
    return found


@pytest.mark.parametrize(
    "backend",
    [byte_level, byte_fallback, sentencepiece_like, word_pieces],
    ids=lambda f: f.__name__,
)
def test_pieces_are_what_whole_texts_have_more(backend):
    """Of random tokens, most of them no text at all, and of those that lie at the end."""
    tokenizer = Tokenizer(backend(), pad_id=0, stop_ids=(1,))
    rng = np.random.default_rng(0)
    for low in (0, max(0, tokenizer.vocab_size - 12)):
        for _ in range(30):
            ids = rng.integers(low, tokenizer.vocab_size, 24).tolist()
            assert tokenizer.pieces(ids) == pieces_by_whole_texts(tokenizer, ids)


def test_pieces_of_a_text_are_the_text():
    text = "ab 漢 aab 🙂é漢a" * 5
    tokenizer = Tokenizer(byte_level(), pad_id=0, stop_ids=(1,))
    ids = tokenizer.encode(text)
    assert "".join(tokenizer.pieces(ids)) == tokenizer.decode(ids)


def test_pieces_decode_each_token_a_few_times():
    """And not every token once for each that follows."""

    class Counting(Tokenizer):
        decoded = 0

        def decode(self, ids):
            Counting.decoded += len(ids)
            return super().decode(ids)

    tokenizer = Counting(byte_level(), pad_id=0, stop_ids=(1,))
    tokenizer.pieces(tokenizer.encode("ab 漢字" * 100, special_tokens=False))
    assert Counting.decoded < 5 * 100 * 8


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.json": "{"}, "cannot read .*tokenizer.json"),
        ({"tokenizer.json": None}, "names a stop token"),
        ({"tokenizer.json": None, "config.json": "{,"}, "config.json is not JSON"),
        ({"tokenizer.json": None, "config.json": "[]"}, "should hold a JSON object, got "),
    ],
)
def test_errors_are_one_line(tmp_path, files, message):
    for name, content in files.items():
        if content is None:
            sentencepiece_like().save(str(tmp_path / name))
        else:
            (tmp_path / name).write_text(content)
    with pytest.raises(JaxdynError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parity
def test_transformers_reads_what_save_wrote(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = character_tokenizer(ALPHABET)
    tokenizer.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs("17=9+8")["input_ids"] == tokenizer.encode("17=9+8")
    assert theirs.decode(tokenizer.encode("17=9+8"), skip_special_tokens=True) == "17=9+8"
    assert (theirs.pad_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 2)
