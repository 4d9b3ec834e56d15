import dataclasses
import json
import re
import string
import subprocess
import sys
from collections import Counter
from itertools import combinations
from typing import get_args, get_type_hints

import pytest
import tyro

from jaxdyn.data import SETS, AnagramsConfig, DataConfig, StoriesConfig, columns, load_source
from jaxdyn.data.builders.table import Table
from jaxdyn.data.stories import FEELINGS, openings
from jaxdyn.types import JaxdynError

SMALL = AnagramsConfig("abcxyz", length=3, train_examples=600, test_examples=5, seed=1)


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_anagrams_are_right_and_letter_sets_held_out(cache):
    config = DataConfig(anagrams=SMALL, cache_dir=cache)
    train, test = load_source(config, "train"), load_source(config, "test")
    assert (len(train), len(test)) == (600, 5)
    for example in [*train, *test]:
        assert example["prompt"] == example["letters"] + "="
        assert len(set(example["letters"])) == 3
        assert sorted(example["completion"]) == sorted(example["letters"])
    held_out = {frozenset(e["letters"]) for e in test}
    others = {frozenset(e["letters"]) for e in train}
    # C(6, 3) = 20 sets: the 5 held out are distinct, and 600 draws reach each of the other 15
    # (one is missed with a probability of 15 * (14/15)^600 < 1e-16).
    assert len(held_out) == 5 and held_out | others == set(
        map(frozenset, combinations("abcxyz", 3))
    )
    assert not held_out & others


def test_anagrams_orders_are_uniform_and_independent(cache):
    config = AnagramsConfig(letters="abc", length=2, train_examples=6000, test_examples=1)
    train = load_source(DataConfig(anagrams=config, cache_dir=cache), "train")
    # Two sets and two orders of each, for the prompt and for the completion alone: 8 pairs.
    pairs = Counter((e["prompt"], e["completion"]) for e in train)
    assert len(pairs) == 8
    # 6000 draws of probability 1/8: a standard deviation of 25.6; five of them.
    assert all(abs(count - 750) < 128 for count in pairs.values())


def test_anagrams_depend_on_the_seed_alone(cache, tmp_path):
    first = load_source(DataConfig(anagrams=SMALL, cache_dir=cache), "train")
    again = load_source(DataConfig(anagrams=SMALL, cache_dir=str(tmp_path / "b")), "train")
    assert list(first) == list(again)
    other = dataclasses.replace(SMALL, seed=2)
    assert list(load_source(DataConfig(anagrams=other, cache_dir=cache), "train")) != list(first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"letters": "abca"}, "letters must be distinct letters or digits, got 'abca'"),
        ({"letters": "ab="}, "letters must be distinct letters or digits, got 'ab='"),
        ({"letters": ""}, "letters must be distinct letters or digits, got ''"),
        ({"length": 0}, r"length must lie in \[1, 16\], got 0"),
        ({"length": 17}, r"length must lie in \[1, 16\], got 17"),
        ({"letters": string.ascii_letters, "length": 5}, "length must .*, got 5, .* 2598960$"),
        ({"test_examples": 4368}, "test_examples must hold out at least 1 of the 4368 .* got 4368"),
        ({"test_examples": 0}, "test_examples must .* got 0"),
        ({"train_examples": 0}, "train_examples must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_anagrams_that_cannot_be_made(options, message):
    with pytest.raises(JaxdynError, match=rf"^data\.anagrams\.{message}") as caught:
        AnagramsConfig(**options)
    assert "\n" not in str(caught.value)


def test_stories_name_what_they_ask_for(cache):
    config = DataConfig("stories", stories=StoriesConfig(60, 20), cache_dir=cache)
    train, test = load_source(config, "train"), load_source(config, "test")
    assert (len(train), len(test)) == (60, 20)
    for example in [*train, *test]:
        thing, feeling = example["words"]
        assert re.search(rf"\b{thing}\b", example["prompt"])
        assert feeling in FEELINGS
        assert "{" not in example["prompt"] and example["prompt"].endswith(".")
    assert len({e["prompt"] for e in [*train, *test]}) == 80
    too_many = DataConfig("stories", stories=StoriesConfig(len(openings()), 1), cache_dir=cache)
    with pytest.raises(JaxdynError, match=r"data.stories.train_prompts and .* at most \d+ "):
        load_source(too_many, "train")


def test_jsonl_keeps_every_column(cache, tmp_path):
    row = {"question": "é?", "answer": "#### 7", "tags": ["a", "b"], "deep": {"n": None}, "x": 1.5}
    path = write_rows(tmp_path / "a.jsonl", row)
    config = DataConfig(
        "jsonl",
        path=path,
        test_path=path,
        prompt_field="question",
        completion_field="answer",
        cache_dir=cache,
    )
    expected = {**row, "prompt": "é?", "completion": "#### 7"}
    assert list(load_source(config, "train")) == [expected]
    assert list(load_source(config, "test")) == [expected]


def test_jsonl_holds_a_share_out(cache, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", *({"prompt": f"p{i}"} for i in range(40)))
    config = DataConfig("jsonl", path=path, held_out=0.25, cache_dir=cache)
    train, test = load_source(config, "train"), load_source(config, "test")
    assert (len(train), len(test)) == (30, 10)
    assert {e["prompt"] for e in [*train, *test]} == {f"p{i}" for i in range(40)}
    assert train[-1] == train[29] and train[2:5] == [train[2], train[3], train[4]]
    with pytest.raises(IndexError):
        train[30]
    one = DataConfig("jsonl", path=write_rows(tmp_path / "b.jsonl", {"prompt": "p"}))
    with pytest.raises(JaxdynError, match=r"one row.*test_path"):
        load_source(DataConfig(**{**vars(one), "cache_dir": cache}), "train")


def test_an_edited_file_is_built_again(cache, tmp_path):
    path = tmp_path / "a.jsonl"
    config = DataConfig("jsonl", path=str(path), held_out=0.5, cache_dir=cache)
    for word in ("one", "two"):
        write_rows(path, {"prompt": word}, {"prompt": word})
        assert load_source(config, "train")[0] == {"prompt": word}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.jsonl is empty"),
        (b"\n \n", "a.jsonl is empty"),
        (b'{"prompt": "a"}\n\n{"prompt": \n', "line 3 is not JSON"),
        (b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "line 2 is not JSON"),
        (b'["a"]\n', "line 1 should hold a JSON object, not list"),
        (b'{"prompt": "a"}\n{"text": "b"}\n', "line 2 has no field 'prompt'.*it has text"),
        (b'{"prompt": 3}\n', "line 1: 'prompt' should be a non-empty text, got 3"),
        (b'{"prompt": ""}\n', "line 1: 'prompt' should be a non-empty text, got ''"),
        (b'{"prompt": "\\ud800"}\n', "line 1: 'prompt' is not valid Unicode"),
        (b"[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_a_bad_file_is_named_with_its_line(cache, tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    config = DataConfig("jsonl", path=str(tmp_path / "a.jsonl"), cache_dir=cache)
    with pytest.raises(JaxdynError, match=message) as caught:
        load_source(config, "train")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "a.jsonl") in str(caught.value)
    # Nothing half-built is left to be read next time.
    assert not list((tmp_path / "cache" / "jsonl").iterdir())


def test_other_bad_input(cache, tmp_path):
    with pytest.raises(JaxdynError, match=r"^data.path must name a file .*, got None$"):
        load_source(DataConfig("jsonl", cache_dir=cache), "train")
    with pytest.raises(JaxdynError, match=r"cannot read .*absent.jsonl: No such file"):
        load_source(DataConfig("jsonl", path="absent.jsonl", cache_dir=cache), "train")
    with pytest.raises(JaxdynError, match="unknown split 'validation'"):
        load_source(DataConfig(cache_dir=cache), "validation")
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxdynError, match="cannot build the data set anagrams"):
        load_source(DataConfig(cache_dir=str(tmp_path / "file")), "train")


def test_two_builds_at_once(cache, monkeypatch):
    """The other build ends while this one is under way: both read the same data."""
    config = DataConfig(anagrams=SMALL, cache_dir=cache)
    prepare, others = Table.download_and_prepare, []

    def interrupted(self):
        prepare(self)
        if not others:
            others.append(None)
            others[0] = load_source(config, "train")

    monkeypatch.setattr(Table, "download_and_prepare", interrupted)
    mine = load_source(config, "train")
    assert len(mine) == 600 and list(mine) == list(others[0])


def test_a_build_that_dies_leaves_nothing(cache, tmp_path, monkeypatch):
    config = DataConfig(anagrams=SMALL, cache_dir=cache)
    with monkeypatch.context() as patch:
        patch.setattr(Table, "_generate_examples", lambda self, split: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load_source(config, "train")
    assert not list((tmp_path / "cache" / "anagrams").iterdir())
    assert len(load_source(config, "train")) == 600


def test_a_full_disk_is_one_line(cache, monkeypatch):
    def full(self):
        raise RuntimeError("write() failed:\nNo space left on device")

    monkeypatch.setattr(Table, "download_and_prepare", full)
    with pytest.raises(JaxdynError, match=r"cannot build .*failed: No space left on device"):
        load_source(DataConfig(cache_dir=cache), "train")


def test_a_share_that_is_none_is_refused():
    for share in (0.0, 1.0, 1.5):
        with pytest.raises(JaxdynError, match=rf"data.held_out .* \(0, 1\), got {share}$"):
            DataConfig(held_out=share)


def test_every_set_of_the_table_can_be_chosen():
    assert get_args(get_type_hints(DataConfig)["name"]) == tuple(SETS)


def test_what_was_built_before_is_found_again(cache, tmp_path):
    """The keys depend on the options and their values, and on nothing else."""
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "p"}, {"prompt": "q"})
    for config, key in (
        (DataConfig(anagrams=SMALL, cache_dir=cache), "b83bc9b9fdf905a0"),
        (DataConfig("stories", stories=StoriesConfig(60, 20), cache_dir=cache), "2474216616a4c48e"),
        (DataConfig("jsonl", path=path, cache_dir=cache), "36113d78cbda283d"),
    ):
        load_source(config, "train")
        built = tmp_path / "cache" / config.name / key / config.name / "1.0.0"
        assert (built / "dataset_info.json").is_file()


def test_columns_fill_gaps_with_none():
    assert columns([{"a": 1, "b": 2}, {"b": 3, "c": 4}]) == {
        "a": [1, None],
        "b": [2, 3],
        "c": [None, 4],
    }


def test_the_command_line_can_edit_it():
    args = ["--name", "stories", "--stories.test-prompts", "5", "--anagrams.length", "4"]
    config = tyro.cli(DataConfig, args=args)
    assert (config.name, config.stories.test_prompts, config.anagrams.length) == ("stories", 5, 4)


def test_tensorflow_is_never_imported(cache, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", *({"prompt": f"p{i}"} for i in range(4)))
    script = f"""
import sys
import jaxdyn.data as data
assert "tensorflow_datasets" not in sys.modules
for name in ("anagrams", "stories", "jsonl"):
    config = data.DataConfig(name, path={path!r}, cache_dir={cache!r})
    assert all(data.load_source(config, split)[0]["prompt"] for split in ("train", "test"))
print(sorted(name for name in sys.modules if name.split(".")[0] == "tensorflow"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
