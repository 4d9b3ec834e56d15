"""`jaxdyn sketch`, and `jaxdyn influence --from-sketch`, which looks completions up in its file."""

import json

import jaxtyping
import numpy as np
import pytest
import tiny_runs

from jaxdyn.cli import main
from jaxdyn.commands.influence_options import InfluenceOptions
from jaxdyn.commands.sketch_options import SketchOptions
from jaxdyn.kernels import open_sketches
from jaxdyn.types import JaxdynError

FEW = ["--max-prompt-length", "8", "--max-completion-length", "4"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, another of another width, texts, and the file of sketches of the texts."""
    root = tmp_path_factory.mktemp("sketch")
    tiny_runs.make_model(root / "model")
    tiny_runs.make_model(root / "tied", tied=True)
    tiny_runs.make_prompts(root / "prompts.jsonl", 12)
    rows = [{"prompt": "1=", "completion": "ab"}, {"prompt": "24=", "completion": "cd"}]
    (root / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["sketch", *sketch_words(root), "--output", str(root / "out")])
    return root


def sketch_words(root):
    words = ["--model", str(root / "model"), "--prompts", str(root / "prompts.jsonl"), *FEW]
    return [*words, "--completion-field", "completion", "--quantity", "sequence"]


def look_up(root, output, model="model", file="out/sketches.safetensors", **changes):
    words = ["--from-sketch", str(root / file), "--completions", str(root / "asked.jsonl")]
    words += ["--model", str(root / model), "--output", str(output), *FEW, "--top", "12"]
    main(["influence", *words, *(f"--{name}={value}" for name, value in changes.items())])
    return json.loads((output / "nearest.json").read_text())


def test_completions_are_looked_up(root, tmp_path, capsys):
    """The first one asked for is row 1 of the file, the other is not in it; all rows are told."""
    found = look_up(root, tmp_path / "found")
    first, second = found["neighbours"]
    stored = open_sketches(root / "out" / "sketches.safetensors")
    whole = np.asarray(stored.rows, np.float64)
    assert len(stored) == 12 and (stored.replicates, stored.side) == (32, 8)
    itself = next(x for x in first["up"] if x["row"] == 1)
    assert (itself["context"], itself["target"]) == ("1=", "ab")
    assert itself["cosine"] == pytest.approx(1, rel=1e-4)
    # The model is untied: the two paths lie side by side.
    each = np.einsum("jrk,njrk->nr", whole[1], whole)
    estimates, errors = each.mean(axis=1), each.std(axis=1, ddof=1) / np.sqrt(32)
    for side, sign in (("up", -1), ("down", 1)):
        rows = [x["row"] for x in first[side]]
        assert sorted(rows) == list(range(12))
        wanted = sign * np.sort(sign * estimates)
        np.testing.assert_allclose(estimates[rows], wanted, rtol=1e-5)
    for x in (*first["up"], *first["down"]):
        row = x["row"]
        assert x["total"] == pytest.approx(estimates[row], rel=1e-4)
        assert x["standard_error"] == pytest.approx(errors[row], rel=1e-3)
        assert x["representation"] + x["gradient"] == pytest.approx(x["total"], rel=1e-5)
        norms = np.sqrt((whole[row] ** 2).sum() * (whole[1] ** 2).sum()) / 32
        assert x["cosine"] == pytest.approx(estimates[row] / norms, rel=1e-4)
    assert second["prompt"] == "24=" and second["completion"] == "cd"
    assert all(x["cosine"] < 0.99 for x in second["up"])
    assert "2 completions against 12 rows" in capsys.readouterr().out


def test_prompts_alone_are_sketched_at_their_last_token(root, tmp_path):
    words = ["--model", str(root / "model"), "--prompts", str(root / "prompts.jsonl")]
    main(["sketch", *words, "--output", str(tmp_path), "--limit", "3", "--replicates", "2"])
    stored = open_sketches(tmp_path / "sketches.safetensors")
    assert stored.rows.shape == (3, 2, 2, 64) and stored.text("context", 2) == "2="
    # The same command again leaves the file as it is; another is refused.
    inode = (tmp_path / "sketches.safetensors").stat().st_ino
    main(["sketch", *words, "--output", str(tmp_path), "--limit", "3", "--replicates", "2"])
    assert (tmp_path / "sketches.safetensors").stat().st_ino == inode
    with pytest.raises(SystemExit):
        main(["sketch", *words, "--output", str(tmp_path), "--limit", "2", "--replicates", "2"])


def test_complaints(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    content = (root / "out" / "sketches.safetensors").read_bytes()
    for name, data in (("cut", content[:-8]), ("empty", b"")):
        (root / name).write_bytes(data)
    for changes, words in (
        ({"model": "tied"}, "is of another model: tied is False there, got True"),
        ({"file": "cut"}, "is not a whole file of sketches"),
        ({"file": "empty"}, "is not a whole file of sketches"),
        ({"file": "nothing"}, "cannot read the sketches"),
        ({"file": "prompts.jsonl"}, "is not a whole file of sketches"),
    ):
        with pytest.raises(SystemExit):
            look_up(root, tmp_path / "refused", **changes)
        line = capsys.readouterr().err
        assert words in line and line.count("\n") == 1, line
        assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"from_sketch": "f"}, "--from-sketch needs --completions FILE"),
        ({"from_sketch": "f", "completions": "c", "momentum": 2}, "--momentum has no use with"),
        ({"from_sketch": "f", "completions": "c", "top": 0}, "top must be at least 1, got 0"),
        ({"completions": "c", "top": 3}, "--top goes with --from-sketch FILE, got 3"),
    ],
)
def test_options_of_a_look_up(fields, words):
    with pytest.raises(JaxdynError, match=words):
        InfluenceOptions(model="m", **fields)


def test_options_of_sketches():
    for fields, words in (
        ({"replicates": 1}, "replicates must be at least 2, got 1"),
        ({"side": 0}, "side must be at least 1, got 0"),
        ({"quantity": "sequence"}, "--quantity sequence needs completions"),
    ):
        with pytest.raises(JaxdynError, match=words):
            SketchOptions(prompts="p", model="m", **fields)
