"""Killed before any of its file operations and given again, a command ends as one never killed.

What is computed is small or made up: what is tried is how it is written.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from crash import interrupt_unheard, interruptible, kill_everywhere

from jaxdyn.cli import main
from jaxdyn.commands import kernel, ledger
from jaxdyn.commands.kernel_options import KernelOptions
from jaxdyn.commands.ledger_options import LedgerOptions
from jaxdyn.data import load_tokenizer
from jaxdyn.errors import JaxdynError
from jaxdyn.kernels.store import Store
from jaxdyn.models import load_pretrained, save_pretrained
from jaxdyn.report.kernel_file import load_kernel

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, what it became, and two prompts."""
    root = tmp_path_factory.mktemp("killed")
    tiny_runs.make_model(root / "model")
    model, params = load_pretrained(root / "model")
    tokenizer = load_tokenizer(root / "model")
    moved = jax.tree.map(lambda x: x + jnp.asarray(0.01, x.dtype), params)
    save_pretrained(root / "after", model, moved, stop_ids=tokenizer.stop_ids)
    tokenizer.save(root / "after")
    lines = [json.dumps({"prompt": a, "completion": b}) for a, b in (("1=", "ab"), ("23=", "b"))]
    (root / "texts.jsonl").write_text("\n".join(lines) + "\n")
    return root


def once(function):
    """The function, which is called the first time alone."""
    found = []

    def first(*given):
        if not found:
            found.append(function(*given))
        return found[0]

    return first


def kernel_options(root, output):
    return KernelOptions(
        prompts=str(root / "texts.jsonl"),
        model=str(root / "model"),
        output=str(output),
        completion_field="completion",
        sites_per_completion=1,
        method="gram",
    )


def test_a_kernel(root, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel, "drawn_kernel", lambda saved: b"a picture")
    for name in ("open_subject", "completion_places", "compute", "to_save"):
        monkeypatch.setattr(kernel, name, once(getattr(kernel, name)))

    def work(output):  # where a relative path means the same in all of them
        output.parent.mkdir(exist_ok=True)
        monkeypatch.chdir(output.parent)
        kernel.run(kernel_options(root, "out"))

    for output in kill_everywhere(tmp_path, work):
        if (output / "kernel.npz").exists():
            assert load_kernel(output / "kernel.npz").total.shape == (4, 4)


def test_an_interrupted_kernel_says_so(root, tmp_path, monkeypatch, capsys):
    """Whatever the moment: its exit code is not that of one that came to its end."""
    monkeypatch.setattr(kernel, "compute", lambda *given: interrupt_unheard())
    words = ["kernel", "--model", str(root / "model"), "--prompts", str(root / "texts.jsonl")]
    with interruptible(), pytest.raises(SystemExit) as ended:
        main([*words, "--output", str(tmp_path / "out")])
    assert ended.value.code == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == "jaxdyn: interrupted; the same command goes on from there"
    assert not (tmp_path / "out" / "kernel.npz").exists()


def test_its_tiles(tmp_path):
    tiles = [{"total": np.full((2, 2), i, np.float32)} for i in range(2)]

    def work(output):
        store = Store(output, ["a kernel"])
        for i, tile in enumerate(tiles):
            if (kept := store.load(i, 0)) is None:
                store.save(i, 0, tile)
            else:
                assert np.array_equal(kept["total"], tile["total"])

    for _ in kill_everywhere(tmp_path, work):
        pass


def test_a_kernel_of_other_options_is_not_taken_for_this_one(root, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel, "drawn_kernel", lambda saved: b"a picture")
    path = kernel.run(kernel_options(root, tmp_path / "out"))
    (tmp_path / "out" / "blocks").mkdir()  # killed as it tidied up
    before = path.read_bytes()
    assert kernel.run(kernel_options(root, tmp_path / "out")) == path
    assert path.read_bytes() == before and not (tmp_path / "out" / "blocks").exists()
    (tmp_path / "out" / "blocks").mkdir()
    other = KernelOptions(**{**vars(kernel_options(root, tmp_path / "out")), "seed": 5})
    with pytest.raises(JaxdynError, match=r"out already holds kernel.npz; choose another output"):
        kernel.run(other)


def test_damaged_tiles_are_made_again(root, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel, "drawn_kernel", lambda saved: b"a picture")
    expected = load_kernel(kernel.run(kernel_options(root, tmp_path / "whole"))).total
    monkeypatch.setattr(kernel, "finish", lambda output, files: None)  # so its tiles stay
    kernel.run(kernel_options(root, tmp_path / "out"))
    (tile,) = (tmp_path / "out" / "blocks" / "kernel").glob("tile*.npz")
    whole = tile.read_bytes()
    monkeypatch.undo()
    monkeypatch.setattr(kernel, "drawn_kernel", lambda saved: b"a picture")
    for number, damaged in enumerate(
        [b"", b"PK", whole[:-30], b"\x93NUMPY" + whole[6:], whole[::-1]]
    ):
        output = tmp_path / str(number)
        (output / "blocks" / "kernel").mkdir(parents=True)
        for path in (tmp_path / "out" / "blocks" / "kernel").iterdir():
            (output / "blocks" / "kernel" / path.name).write_bytes(path.read_bytes())
        (output / "blocks" / "kernel" / tile.name).write_bytes(damaged)
        assert (load_kernel(kernel.run(kernel_options(root, output))).total == expected).all()


def test_a_ledger(root, tmp_path, monkeypatch):
    for name in ("texts_of", "compute", "to_save"):
        monkeypatch.setattr(ledger, name, once(getattr(ledger, name)))

    def work(output):
        output.parent.mkdir(exist_ok=True)
        monkeypatch.chdir(output.parent)
        ledger.run(
            LedgerOptions(
                (str(root / "model"), str(root / "after")),
                prompts=str(root / "texts.jsonl"),
                output="out",
                completion_field="completion",
                prompt_template="plain",
                through="features",
            )
        )

    for _ in kill_everywhere(tmp_path, work):
        pass
