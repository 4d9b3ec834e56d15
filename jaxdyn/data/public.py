"""Public data sets: where each is, and its rows as examples.

Every prompt is a list of messages. Beside it an example has, as texts, `completion` where the row
has a demonstration, `chosen` and `rejected` where it has a preference, `answer` where it has one.
A local copy may have the files' own names, or be called train.jsonl (or .json, .parquet, .gz).
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import NamedTuple

from jaxdyn.data.download import fetch
from jaxdyn.data.examples import Example, as_json, preference_of
from jaxdyn.data.files import Row, rows_of
from jaxdyn.data.jsonl import require_text
from jaxdyn.data.messages import Messages, reply, require_messages, require_prompt
from jaxdyn.grammar import nearest
from jaxdyn.types import JaxdynError

UNUSABLE = 0.02
"""The share of a data set's rows that may be left out: pairs of equals, dialogues out of order."""

Files = dict[str, tuple[str, ...]]
"""The files of `train`, and of `test` if there are some."""


class Public(NamedTuple):
    """A data set on the hub, at one revision; the first of its subsets is the usual one."""

    repository: str
    revision: str
    subsets: dict[str, Files]
    example: Callable[[Row, str], Example]


@dataclasses.dataclass(frozen=True)
class PublicFiles:
    """Files of one split: local ones, or by their names on the hub."""

    name: str
    files: tuple[str, ...]
    local: bool


class Unusable(JaxdynError):
    """A row that is well formed, and of no use."""


def public_examples(
    options: PublicFiles, split: str
) -> Generator[dict[str, str], None, dict[str, int]]:
    """The examples of all files, as JSON; returns how many rows were left out.

    Raises:
      JaxdynError: for a file that cannot be had or read, a row without a field, or if more than
        `UNUSABLE` of the rows are of no use.
    """
    known = PUBLIC[options.name]
    rows, unusable = 0, []
    for file in options.files:
        path = file if options.local else fetch(known.repository, file, known.revision)
        for row, where in rows_of(path):
            rows += 1
            try:
                example = known.example(row, where)
            except Unusable as error:
                unusable.append(error)
                continue
            yield {"json": as_json(example, where)}
    if len(unusable) > UNUSABLE * rows:
        raise JaxdynError(f"{len(unusable)} of {rows} rows cannot be used: {unusable[0]}")
    return {"left_out": len(unusable)}


def public_files(
    name: str, subset: str | None, path: str | None, test_path: str | None
) -> tuple[PublicFiles, PublicFiles | None]:
    """The train split's files and the test split's, if it has some of its own.

    Raises:
      JaxdynError: for an unknown subset, or a `path` that holds no copy of the data set.
    """
    subsets = PUBLIC[name].subsets
    subset = subset or next(iter(subsets))
    if subset not in subsets:
        hint = nearest(subset, subsets)
        raise JaxdynError(
            f"data.subset of {name} must be one of {', '.join(subsets)}, got {subset!r}{hint}"
        )
    named = subsets[subset]
    if path is None:
        test = PublicFiles(name, named["test"], False) if "test" in named else None
        return PublicFiles(name, named["train"], False), test
    local = {split: copies(Path(path), split, named) for split in ("train", "test")}
    if test_path is not None:
        local["test"] = (test_path,)
    if not local["train"]:
        raise JaxdynError(f"data.path {path} holds neither train.jsonl nor {named['train'][0]}")
    test = PublicFiles(name, local["test"], True) if local["test"] else None
    return PublicFiles(name, local["train"], True), test


def copies(path: Path, split: str, named: Files) -> tuple[str, ...]:
    """The local files of a split."""
    if not path.is_dir():
        return (str(path),) if split == "train" else ()
    own = [path / name for name in named.get(split, ())]
    if own and all(file.is_file() for file in own):
        return tuple(map(str, own))
    kinds = (".jsonl", ".jsonl.gz", ".json", ".parquet")
    found = [path / f"{split}{kind}" for kind in kinds]
    return tuple(str(file) for file in found if file.is_file())[:1]


# -- rows -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def unusable() -> Iterator[None]:
    """What is refused inside is a row of no use."""
    try:
        yield
    except JaxdynError as error:
        raise Unusable(str(error)) from error


def asked(text: str) -> Messages:
    """A user's question."""
    return [{"role": "user", "content": text}]


def gsm8k(row: Row, where: str) -> Example:
    """`answer` is the number after the solution's `####` (Cobbe et al. 2021, arXiv 2110.14168)."""
    question, solution = (require_text(row, n, n, where) for n in ("question", "answer"))
    _, mark, number = solution.rpartition("####")
    if not mark:
        raise JaxdynError(
            f"{where}: 'answer' should end in #### and a number, got {solution!r:.60}"
        )
    answer = number.strip().replace(",", "")
    return {"prompt": asked(question), "completion": solution, "answer": answer}


def math(row: Row, where: str) -> Example:
    """`answer` is what the solution's last box holds (Hendrycks et al. 2021, arXiv 2103.03874)."""
    problem, solution = (require_text(row, n, n, where) for n in ("problem", "solution"))
    answer = row.get("answer") or boxed(solution)
    if answer is None:
        raise Unusable(f"{where}: 'solution' has no \\boxed answer")
    about: Row = {name: row[name] for name in ("level", "type", "subject") if name in row}
    return {"prompt": asked(problem), "completion": solution, "answer": answer, **about}


def boxed(solution: str) -> str | None:
    r"""What the last \boxed of a solution holds, braces inside it balanced."""
    begins = [found.end() for found in re.finditer(r"\\(?:boxed|fbox)\s*", solution)]
    if not begins:
        return None
    rest, depth = solution[begins[-1] :], 0
    if not rest.startswith("{"):
        return rest[:1] or None
    for place, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return rest[1:place]
    return None


def ultrafeedback(row: Row, where: str) -> Example:
    """A preference between two conversations, or a prompt and one response
    (Cui et al. 2023, arXiv 2310.01377).
    """
    if "chosen" not in row:
        text, response = (require_text(row, n, n, where) for n in ("prompt", "response"))
        question = text.removeprefix("Human: ").removesuffix("\nAssistant:")
        return {"prompt": asked(question), "completion": response}
    with unusable():
        messages = require_messages(row["chosen"], f"{where}: 'chosen'")
        prompt = require_prompt(messages[:-1], f"{where}: 'chosen'")
        pair = preference_of(row, prompt, where)
    scores: Row = {name: row[name] for name in ("score_chosen", "score_rejected") if name in row}
    return {"prompt": prompt, "completion": pair["chosen"], **pair, **scores}


def hh_rlhf(row: Row, where: str) -> Example:
    """Two dialogues that differ in the last answer, or a dialogue and two answers
    (Bai et al. 2022, arXiv 2204.05862).
    """
    pair = {name: require_text(row, name, name, where) for name in ("chosen", "rejected")}
    if "prompt" in row:
        head = require_text(row, "prompt", "prompt", where)
        pair = {name: f"{head}{answer}" for name, answer in pair.items()}
    with unusable():
        chosen, rejected = (dialogue(text, f"{where}: {name!r}") for name, text in pair.items())
        if chosen[:-1] != rejected[:-1]:
            raise Unusable(f"{where}: 'chosen' and 'rejected' begin otherwise")
        prompt = require_prompt(chosen[:-1], where)
        answers = {
            name: talk[-1]["content"] for name, talk in zip(pair, (chosen, rejected), strict=True)
        }
        answers = preference_of(answers, prompt, where)
    return {"prompt": prompt, "completion": answers["chosen"], **answers}


def dialogue(text: str, where: str) -> Messages:
    """A dialogue of Human and Assistant as messages, of which the assistant has the last."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    role = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    messages = [{"role": role[who], "content": said.strip()} for who, said in turns]
    require_messages(messages, where)
    reply(messages[-1:], where)
    return messages


def alpaca_farm(row: Row, where: str) -> Example:
    """An instruction, with an input or without; one output, or two and which is preferred
    (Dubois et al. 2023, arXiv 2305.14387).
    """
    instruction, given = require_text(row, "instruction", "instruction", where), row.get("input")
    prompt = asked(instruction)
    if given:
        parts = {"instruction": instruction, "input": require_text(row, "input", "input", where)}
        prompt = [{"role": "user", "content": "\n\n".join(parts.values()), **parts}]
    if "preference" not in row:
        return {"prompt": prompt, **({"completion": row["output"]} if row.get("output") else {})}
    if row["preference"] not in (1, 2):
        raise JaxdynError(f"{where}: 'preference' should be 1 or 2, got {row['preference']!r:.60}")
    names = ("output_1", "output_2") if row["preference"] == 1 else ("output_2", "output_1")
    with unusable():
        texts = [require_text(row, name, name, where) for name in names]
        pair = preference_of(dict(zip(("chosen", "rejected"), texts, strict=True)), prompt, where)
    return {"prompt": prompt, "completion": pair["chosen"], **pair}


# -- the table ------------------------------------------------------------------------------------


def _both(form: str, *folders: str) -> Files:
    """Files of both splits: one a folder."""
    return {s: tuple(form.format(f, s) for f in folders) for s in ("train", "test")}


SUBJECTS = (
    *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
    *("number_theory", "prealgebra", "precalculus"),
)
HH = ("helpful-base", "harmless-base", "helpful-online", "helpful-rejection-sampled")
PARQUET, LINES = "{}/{}-00000-of-00001.parquet", "{}/{}.jsonl.gz"
FARM = {"test": ("alpaca_instructions/val.json",)}

PUBLIC: dict[str, Public] = {
    "gsm8k": Public(
        "openai/gsm8k",
        "e53f048856ff4f594e959d75785d2c2d37b678ee",
        {"main": _both(PARQUET, "main")},
        gsm8k,
    ),
    "math": Public(
        "EleutherAI/hendrycks_math",
        "21a5633873b6a120296cce3e2df9d5550074f4a3",
        {"all": _both(PARQUET, *SUBJECTS), **{s: _both(PARQUET, s) for s in SUBJECTS}},
        math,
    ),
    "ultrafeedback": Public(
        "HuggingFaceH4/ultrafeedback_binarized",
        "3949bf5f8c17c394422ccfab0c31ea9c20bdeb85",
        {"prefs": _both("{}/{}_prefs-00000-of-00001.parquet", "data")},
        ultrafeedback,
    ),
    "hh_rlhf": Public(
        "Anthropic/hh-rlhf",
        "09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
        {folder: _both(LINES, folder) for folder in HH},
        hh_rlhf,
    ),
    "alpaca_farm": Public(
        "tatsu-lab/alpaca_farm",
        "main",
        {
            "unlabeled": {"train": ("alpaca_instructions/unlabeled.json",), **FARM},
            "sft": {"train": ("alpaca_instructions/sft.json",), **FARM},
            "gpt4_preference": {"train": ("alpaca_gpt4_preference.json",)},
            "human_preference": {"train": ("alpaca_human_preference.json",)},
        },
        alpaca_farm,
    ),
}
