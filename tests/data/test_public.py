"""Public data sets: from a hub, whole or broken, and from local copies in all their forms."""

import gzip
import json
import socket

import huggingface_hub.constants as hub_constants
import jaxtyping
import pyarrow
import pyarrow.parquet
import pytest
from fake_hub import Hub

from jaxdyn.data import DataConfig, download, load_source
from jaxdyn.data.public import PUBLIC, boxed
from jaxdyn.types import JaxdynError


def asked(text, **more):
    return [{"role": "user", "content": text, **more}]


def said(text):
    return {"role": "assistant", "content": text}


GSM8K = {"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 1,002"}
MATH = {
    "problem": "x?",
    "level": "Level 1",
    "type": "Algebra",
    "solution": r"So \boxed{\frac{1}{2}}.",
}
FEEDBACK = {
    "prompt": "Hi",
    "chosen": [*asked("Hi"), said("Hello.")],
    "rejected": [*asked("Hi"), said("No.")],
    "score_chosen": 8.0,
    "score_rejected": 2.5,
}
TALK = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: A\nB\n\nAssistant:"
TURNS = [*asked("Hi"), said("Yes?"), *asked("A\nB")]
DIALOGUES = {"chosen": f"{TALK} good", "rejected": f"{TALK} bad"}
PAIR = {"completion": "good", "chosen": "good", "rejected": "bad"}
FARM = {"instruction": "Add.", "input": "1, 1", "output": "2"}
JUDGED = {
    "instruction": "Add.",
    "input": "",
    "output_1": "bad",
    "output_2": "good",
    "preference": 2,
}
TWO = asked("Add.\n\n1, 1", instruction="Add.", input="1, 1")

ROWS = {
    "gsm8k": [(GSM8K, {"prompt": asked("1+1?"), "completion": GSM8K["answer"], "answer": "1002"})],
    "math": [
        (
            MATH,
            {
                "prompt": asked("x?"),
                "completion": MATH["solution"],
                "answer": r"\frac{1}{2}",
                "level": "Level 1",
                "type": "Algebra",
            },
        )
    ],
    "ultrafeedback": [
        (
            FEEDBACK,
            {
                "prompt": asked("Hi"),
                "completion": "Hello.",
                "chosen": "Hello.",
                "rejected": "No.",
                "score_chosen": 8.0,
                "score_rejected": 2.5,
            },
        ),
        (
            {"prompt": "Human: Hi\nAssistant:", "response": "Hello."},
            {"prompt": asked("Hi"), "completion": "Hello."},
        ),
    ],
    "hh_rlhf": [
        (DIALOGUES, {"prompt": TURNS, **PAIR}),
        ({"prompt": TALK, "chosen": " good", "rejected": " bad"}, {"prompt": TURNS, **PAIR}),
    ],
    "alpaca_farm": [
        (FARM, {"prompt": TWO, "completion": "2"}),
        (JUDGED, {"prompt": asked("Add."), **PAIR}),
    ],
}
CASES = [(name, *case) for name, cases in ROWS.items() for case in cases]


def write(path, rows):
    """Rows in the form that a file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


@pytest.fixture(autouse=True)
def _a_users_process(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def load(tmp_path):
    def load(name, split="train", **options):
        return load_source(DataConfig(name, cache_dir=str(tmp_path / "cache"), **options), split)

    return load


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub() as hub:
        monkeypatch.setattr(hub_constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        yield hub


def put(hub, directory, name, subset=None):
    """A hub's files of a data set: a row in each for training, two for testing."""
    known = PUBLIC[name]
    files = known.subsets[subset or next(iter(known.subsets))]
    for split, names in files.items():
        for file in names:
            rows = [ROWS[name][0][0]] * (1 + (split == "test"))
            content = write(directory / file, rows).read_bytes()
            hub.put(known.repository, known.revision, file, content)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_set_is_fetched_once_and_read(name, hub, load, tmp_path):
    put(hub, tmp_path / "files", name)
    example = ROWS[name][0][1]
    train, test = load(name), load(name, "test")
    assert train[0] == test[0] == example
    files = 7 if name == "math" else 1
    assert (len(train), len(test)) == (files, 2 * files)
    assert len(hub.asked) == 2  # the hub's client knows equal files by their digests
    assert load(name)[0] == example and len(hub.asked) == 2


@pytest.mark.parametrize("name, row, example", CASES)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "jsonl.gz"])
def test_a_local_copy(name, row, example, kind, load, tmp_path):
    write(tmp_path / "copy" / f"train.{kind}", [row, row])
    train = load(name, path=str(tmp_path / "copy"))
    assert (len(train), train[0]) == (1, example)  # the other is held out
    one = write(tmp_path / f"one.{kind}", [row])
    options = {"path": str(tmp_path / "copy"), "test_path": str(one)}
    assert (len(load(name, **options)), len(load(name, "test", **options))) == (2, 1)


def test_a_copy_with_the_hubs_own_names(load, tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        path = tmp_path / "main" / f"{split}-00000-of-00001.parquet"
        write(path, [{**GSM8K, "question": f"{split} {i}"} for i in range(count)])
    sizes = [len(load("gsm8k", split, path=str(tmp_path))) for split in ("train", "test")]
    assert sizes == [3, 2]


def test_what_the_last_box_holds():
    assert boxed(r"\boxed{1} or \fbox{ {a}_{b} }") == " {a}_{b} "
    assert boxed(r"it is $\boxed 7$") == "7"
    assert boxed(r"\boxed{{1}") is None and boxed("none") is None


# -- what breaks ----------------------------------------------------------------------------------


def left_over(tmp_path):
    """Files that a later run could take for data: of the cache, and of the hub's own."""
    files = [*(tmp_path / "cache").rglob("*"), *(tmp_path / "hub").glob("datasets--*/**/*")]
    return [path for path in files if path.is_file() and path.parent.name != "refs"]


def test_a_download_that_breaks_off_is_not_trusted(hub, load, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    put(hub, tmp_path / "files", "gsm8k")
    hub.sent = lambda content: content[:100]
    with pytest.raises(JaxdynError, match=r"^cannot download openai/gsm8k/main/train") as caught:
        load("gsm8k")
    assert "\n" not in str(caught.value) and "data.path takes a copy" in str(caught.value)
    assert not left_over(tmp_path)
    hub.sent = lambda content: content
    assert load("gsm8k")[0] == ROWS["gsm8k"][0][1]


def test_a_download_that_is_damaged_is_thrown_away(hub, load, tmp_path):
    put(hub, tmp_path / "files", "hh_rlhf")
    hub.sent = lambda content: content[:-1] + b"!"
    with pytest.raises(
        JaxdynError, match=r"hh-rlhf/helpful-base/train.jsonl.gz at 09be8c5bbc57 is"
    ):
        load("hh_rlhf")
    hub.sent = lambda content: content
    assert load("hh_rlhf")[0] == ROWS["hh_rlhf"][0][1]


def test_digests_are_gits_of_small_files(tmp_path):
    """What `git hash-object` says of this text."""
    (tmp_path / "a").write_text("hello\n")
    assert download.digest(tmp_path / "a", "0" * 40) == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_without_a_network_it_says_what_to_do(hub, load, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    template = f"{nowhere}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(JaxdynError, match=r"^cannot download .* data.path takes a copy") as caught:
        load("alpaca_farm")
    assert "\n" not in str(caught.value)


LINE, ROW = r"train.jsonl, line 2", r"train.parquet, row 2"
EQUAL = {**DIALOGUES, "rejected": DIALOGUES["chosen"]}


@pytest.mark.parametrize(
    "name, row, words",
    [
        (
            "gsm8k",
            {"question": "1?"},
            f"{LINE} has no field 'answer' for the answer; it has question",
        ),
        ("gsm8k", {**GSM8K, "answer": "7"}, f"{LINE}: 'answer' should end in #### and a number"),
        ("math", {**MATH, "solution": "7"}, rf"1 of 2 rows cannot be used: .*{LINE}: .*no \\boxed"),
        (
            "hh_rlhf",
            EQUAL,
            f"1 of 2 rows cannot be used: .*{LINE}: 'chosen' and 'rejected' are equal",
        ),
        ("hh_rlhf", {**DIALOGUES, "rejected": "\n\nHuman: A\n\nAssistant: b"}, "begin otherwise"),
        (
            "hh_rlhf",
            {**DIALOGUES, "chosen": "Hm"},
            f"{LINE}: 'chosen' should be a list of messages",
        ),
        ("ultrafeedback", {"prompt": "a"}, f"{LINE} has no field 'response'"),
        (
            "ultrafeedback",
            {**FEEDBACK, "chosen": TURNS},
            "'chosen': the last message should be the user's",
        ),
        ("alpaca_farm", {"input": "a"}, f"{LINE} has no field 'instruction'"),
        (
            "alpaca_farm",
            {**JUDGED, "preference": 3},
            f"{LINE}: 'preference' should be 1 or 2, got 3",
        ),
    ],
)
def test_a_bad_row_is_named(name, row, words, load, tmp_path):
    write(tmp_path / "train.jsonl", [ROWS[name][0][0], row])
    with pytest.raises(JaxdynError, match=words) as caught:
        load(name, path=str(tmp_path))
    assert "\n" not in str(caught.value) and not left_over(tmp_path)


def test_what_is_left_out_is_counted(load, tmp_path):
    write(tmp_path / "train.jsonl", [DIALOGUES] * 99 + [EQUAL])
    for _ in range(2):  # as it is built, and as it is read again
        train = load("hh_rlhf", path=str(tmp_path))
        assert (len(train), list(train.left_out.values())) == (89, [1])


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("train.jsonl", b'{"question": "\xff"}\n', "line 1 is not JSON: it is not UTF-8"),
        ("train.jsonl", b"", "train.jsonl is empty"),
        ("train.json", b"[]", "train.json should hold a list of JSON objects"),
        ("train.json", b"[1]", "train.json, row 1 should hold a JSON object, not int"),
        ("train.parquet", b"PAR1", r"cannot read .*train.parquet: "),
        (
            "train.jsonl.gz",
            gzip.compress(b"\n" * 99, mtime=0)[:-9],
            "cannot read .*train.jsonl.gz",
        ),
        ("other.jsonl", b"{}", r"^data.path .* holds neither train.jsonl nor main/train-00000-of"),
    ],
)
def test_a_bad_file_is_named(name, content, words, load, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(JaxdynError, match=words) as caught:
        load("gsm8k", path=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_parquet_of_ones_own(load, tmp_path):
    rows = [{"prompt": asked(f"{i}?"), "n": i} for i in range(4)]
    path = str(write(tmp_path / "mine.parquet", rows))
    train = load("parquet", path=path)
    assert sorted(row["n"] for row in train) == sorted(
        {0, 1, 2, 3} - {load("parquet", "test", path=path)[0]["n"]}
    )
    assert all(row["prompt"] == asked(f"{row['n']}?") for row in train)
    table = pyarrow.table(
        {"prompt": pyarrow.array([b"ok", b"\xff"]).cast(pyarrow.binary()).view("string")}
    )
    pyarrow.parquet.write_table(table, tmp_path / "bad.parquet")
    with pytest.raises(JaxdynError, match=r"bad.parquet, row 2 is not UTF-8"):
        load("parquet", path=str(tmp_path / "bad.parquet"))
    write(tmp_path / "none.parquet", [{"text": "a"}])
    with pytest.raises(
        JaxdynError, match=r"none.parquet, row 1 has no field 'prompt'.*it has text"
    ):
        load("parquet", path=str(tmp_path / "none.parquet"))


def test_an_unknown_subset(load):
    with pytest.raises(
        JaxdynError, match=r"^data.subset of hh_rlhf must be one of .* mean 'helpful-base'"
    ):
        load("hh_rlhf", subset="helpful_base")
    with pytest.raises(JaxdynError, match=r"^data\.subset is of public data sets .* for jsonl$"):
        load("jsonl", subset="main")
