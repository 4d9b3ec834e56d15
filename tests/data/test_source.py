import json
import re
import subprocess
import sys
from collections import Counter

import pytest
import tyro

from jaxdyn.data import DataConfig, EquationsConfig, StoriesConfig, columns, load_source
from jaxdyn.data.builders.equations import Equations
from jaxdyn.data.stories import FEELINGS, openings
from jaxdyn.types import JaxdynError

SMALL = EquationsConfig(lowest=3, highest=12, per_target=40, seed=1)


def value(expression: str) -> int:
    first, operator, second = re.fullmatch(r"(\d+)([+-])(\d+)", expression).groups()
    return int(first) + (1 if operator == "+" else -1) * int(second)


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_equations_are_right_and_targets_held_out(cache):
    config = DataConfig(equations=SMALL, cache_dir=cache)
    train, test = load_source(config, "train"), load_source(config, "test")
    assert (len(train), len(test)) == (8 * 40, 2)
    for example in [*train, *test]:
        assert example["prompt"] == example["answer"] + "="
        assert value(example["completion"]) == int(example["answer"])
        operands = map(int, re.split(r"[+-]", example["completion"]))
        assert all(0 <= operand <= 12 for operand in operands)
    counts = Counter(example["answer"] for example in train)
    assert set(counts.values()) == {40}
    answers = {int(answer) for answer in counts} | {int(e["answer"]) for e in test}
    assert answers == set(range(3, 13))
    # Both kinds, and many answers to one prompt: of the 14, the 20 or so draws of a sum alone
    # would have to fall on three at most.
    assert {"+", "-"} <= {c for e in train for c in e["completion"]}
    for answer in counts:
        assert len({e["completion"] for e in train if e["answer"] == answer}) >= 4


def test_equations_depend_on_the_seed_alone(cache, tmp_path):
    first = load_source(DataConfig(equations=SMALL, cache_dir=cache), "train")
    again = load_source(DataConfig(equations=SMALL, cache_dir=str(tmp_path / "b")), "train")
    assert list(first) == list(again)
    other = EquationsConfig(lowest=3, highest=12, per_target=40, seed=2)
    assert list(load_source(DataConfig(equations=other, cache_dir=cache), "train")) != list(first)


def test_noise_is_the_share_of_wrong_demonstrations(cache):
    noisy = EquationsConfig(lowest=3, highest=12, per_target=250, noise=0.3)
    config = DataConfig(equations=noisy, cache_dir=cache)
    train = load_source(config, "train")
    wrong = [e for e in train if value(e["completion"]) != int(e["answer"])]
    # 2000 draws: a standard error of 0.0102; five of them.
    assert abs(len(wrong) / len(train) - 0.3) < 0.052
    assert {value(e["completion"]) for e in wrong} == set(range(3, 13))
    test = load_source(config, "test")
    assert all(value(e["completion"]) == int(e["answer"]) for e in test)


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
    with pytest.raises(JaxdynError, match="openings"):
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
    with pytest.raises(JaxdynError, match="needs a path"):
        load_source(DataConfig("jsonl", cache_dir=cache), "train")
    with pytest.raises(JaxdynError, match=r"cannot read .*absent.jsonl: No such file"):
        load_source(DataConfig("jsonl", path="absent.jsonl", cache_dir=cache), "train")
    with pytest.raises(JaxdynError, match="unknown split 'validation'"):
        load_source(DataConfig(cache_dir=cache), "validation")
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxdynError, match="cannot build the data set equations"):
        load_source(DataConfig(cache_dir=str(tmp_path / "file")), "train")
    with pytest.raises(JaxdynError, match="noise must lie"):
        EquationsConfig(noise=1.5)
    with pytest.raises(JaxdynError, match="lowest < highest, got 9 and 9"):
        EquationsConfig(lowest=9, highest=9)


def test_two_builds_at_once(cache, monkeypatch):
    """The other build ends while this one is under way: both read the same data."""
    config = DataConfig(equations=SMALL, cache_dir=cache)
    prepare, others = Equations.download_and_prepare, []

    def interrupted(self):
        prepare(self)
        if not others:
            others.append(None)
            others[0] = load_source(config, "train")

    monkeypatch.setattr(Equations, "download_and_prepare", interrupted)
    mine = load_source(config, "train")
    assert len(mine) == 320 and list(mine) == list(others[0])


def test_a_build_that_dies_leaves_nothing(cache, tmp_path, monkeypatch):
    config = DataConfig(equations=SMALL, cache_dir=cache)
    with monkeypatch.context() as patch:
        patch.setattr(Equations, "_generate_examples", lambda self, split: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load_source(config, "train")
    assert not list((tmp_path / "cache" / "equations").iterdir())
    assert len(load_source(config, "train")) == 320


def test_a_full_disk_is_one_line(cache, monkeypatch):
    def full(self):
        raise RuntimeError("write() failed:\nNo space left on device")

    monkeypatch.setattr(Equations, "download_and_prepare", full)
    with pytest.raises(JaxdynError, match=r"cannot build .*failed: No space left on device"):
        load_source(DataConfig(cache_dir=cache), "train")


def test_columns_fill_gaps_with_none():
    assert columns([{"a": 1, "b": 2}, {"b": 3, "c": 4}]) == {
        "a": [1, None],
        "b": [2, 3],
        "c": [None, 4],
    }


def test_the_command_line_can_edit_it():
    args = ["--name", "stories", "--stories.test-prompts", "5", "--equations.noise", "0.5"]
    config = tyro.cli(DataConfig, args=args)
    assert (config.name, config.stories.test_prompts, config.equations.noise) == ("stories", 5, 0.5)


def test_tensorflow_is_never_imported(cache, tmp_path):
    path = write_rows(tmp_path / "a.jsonl", *({"prompt": f"p{i}"} for i in range(4)))
    script = f"""
import sys
import jaxdyn.data as data
assert "tensorflow_datasets" not in sys.modules
for name in ("equations", "stories", "jsonl"):
    config = data.DataConfig(name, path={path!r}, cache_dir={cache!r})
    assert all(data.load_source(config, split)[0]["prompt"] for split in ("train", "test"))
print(sorted(name for name in sys.modules if name.split(".")[0] == "tensorflow"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
