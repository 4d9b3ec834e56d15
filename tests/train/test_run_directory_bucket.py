"""Runs in a bucket: a directory stands for it that can do no more than an object store."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import orbax.checkpoint._src.path.gcs_utils as gcs_utils
import pytest
import tiny_runs
from etils import epath
from etils.epath import backend, gpath
from tiny_runs import assert_same_run

from jaxdyn import cli
from jaxdyn.report import load_run, write_report
from jaxdyn.storage.files import require_writable
from jaxdyn.storage.paths import common_parent, in_bucket, open_path
from jaxdyn.train import export, loop, open_run, run_rl
from jaxdyn.train.run_directory import RunDirectory
from jaxdyn.types import JaxdynError


class Store(backend._OsPathBackend):
    """`gs://…` in a directory; neither appends nor renames, and counts what is written."""

    def __init__(self, root: Path):
        self.root, self.written, self.refuses = root, [], False

    def here(self, path) -> str:
        name = os.fspath(path)
        return str(self.root / name.removeprefix("gs://")) if name.startswith("gs://") else name

    def open(self, path, mode):
        assert "a" not in mode, "an object store cannot append"
        if "w" in mode:
            if self.refuses:
                raise OSError(f"Forbidden: {path}\nno access")
            self.written.append(os.fspath(path))
        return super().open(self.here(path), mode)

    def rename(self, path, dst):
        raise AssertionError("an object store cannot rename")

    replace = rename

    def exists(self, path):
        return super().exists(self.here(path))

    def isdir(self, path):
        return super().isdir(self.here(path))

    def listdir(self, path):
        return super().listdir(self.here(path))

    def glob(self, path):
        prefix = str(self.root) + "/"
        return ["gs://" + found.removeprefix(prefix) for found in super().glob(self.here(path))]

    def makedirs(self, path, **options):
        return super().makedirs(self.here(path), **options)

    def mkdir(self, path, **options):
        return super().mkdir(self.here(path), **options)

    def rmtree(self, path):
        return super().rmtree(self.here(path))

    def remove(self, path):
        return super().remove(self.here(path))

    def stat(self, path):
        return super().stat(self.here(path))


@pytest.fixture
def store(tmp_path, monkeypatch):
    found = Store(tmp_path / "store")
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", found)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    file = lambda path: {"driver": "file", "path": found.here(path)}
    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", file)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    return found


class Killed(BaseException):
    """Stands for the process's end."""


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_on_disk(root, joint_run, store, tmp_path, monkeypatch):
    """Killed on the way, taken up with nothing left on disk, reported, exported."""
    output = "gs://bucket/runs/one"
    config = dataclasses.replace(tiny_runs.rl_config(root, "x"), output=output)
    original = loop.STEPS["rl"]

    def take_step(*args):
        if args[-1] == 4:
            store.refuses = True  # a killed run publishes nothing more
            raise Killed
        return original(*args)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setitem(loop.STEPS, "rl", take_step)
        run_rl(config)
    store.refuses = False
    there = tmp_path / "store" / "bucket" / "runs" / "one"
    assert [line["step"] for line in tiny_runs.lines(there, "metrics.jsonl")] == [-1, 0, 1, 2]
    run = run_rl(config)
    assert str(run) == output
    assert_same_run(there, joint_run)
    assert list((there / "tensorboard").iterdir())
    assert not list(there.rglob("*.partial"))

    loaded, expected = load_run(run), load_run(joint_run)
    assert tiny_runs.without_times(loaded.metrics) == tiny_runs.without_times(expected.metrics)
    assert np.array_equal(loaded.probe(3)["actual"], expected.probe(3)["actual"])
    page = write_report([output])
    assert str(page) == f"{output}/report/report.html"
    assert (there / "report" / "report.html").read_text().startswith("<!doctype html>")
    export(open_path(output), tmp_path / "from_bucket")
    export(joint_run, tmp_path / "from_disk")
    weights = [tmp_path / name / "model.safetensors" for name in ("from_bucket", "from_disk")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    with pytest.raises(JaxdynError, match="written on disk, got gs://b/model"):
        export(joint_run, open_path("gs://b/model"))
    with open_run(output) as saved:
        assert saved.steps == [3, 6]


def test_only_what_changed_is_published(root, store, tmp_path):
    config = tiny_runs.rl_config(root, "unused")
    with RunDirectory("gs://b/run", config) as directory:
        directory.rewind(-1)
        directory.log("samples.jsonl", {"step": 0, "completion": "é"})
        directory.save_arrays(0, {"x": np.arange(3)})
        directory.publish()
        logs = [name for name in store.written if "tensorboard" not in name]
        assert logs == [
            "gs://b/run/config.json",
            "gs://b/run/dynamics/step_000000.npz",
            "gs://b/run/samples.jsonl",
        ]
        store.written.clear()
        directory.publish()
        assert store.written == []
        directory.log("samples.jsonl", {"step": 1, "completion": "z"})
        scratch = directory.local
    assert [name for name in store.written if "tensorboard" not in name] == [
        "gs://b/run/samples.jsonl"
    ]
    assert not scratch.exists()
    with RunDirectory("gs://b/run", config) as directory:
        directory.rewind(0)
        assert (directory.local / "samples.jsonl").read_text() == ""
    there = tmp_path / "store" / "b" / "run"
    assert (there / "samples.jsonl").read_text() == ""
    assert not list((there / "dynamics").iterdir())
    with pytest.raises(JaxdynError, match=r"gs://b/run already holds another run \(seed: 0 there"):
        RunDirectory("gs://b/run", dataclasses.replace(config, seed=1))
    (there.parent / "mine").mkdir()
    (there.parent / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(JaxdynError, match="gs://b/mine is not empty and holds no run"):
        RunDirectory("gs://b/mine", config)


def test_of_many_processes_one_writes(root, tmp_path):
    config = tiny_runs.rl_config(root, "unused")
    with RunDirectory(tmp_path / "run", config, writes=False) as other:
        other.rewind(-1)
        other.log("metrics.jsonl", {"step": 0, "loss": 1.0})
        other.save_arrays(0, {"x": np.arange(3)})
        assert other.path == tmp_path / "run"
        scratch = other.local
    assert not scratch.exists()
    assert not (tmp_path / "run").exists()
    RunDirectory(tmp_path / "run", config).close()
    with pytest.raises(JaxdynError, match="another run"):
        RunDirectory(tmp_path / "run", dataclasses.replace(config, seed=1), writes=False)


def test_a_bucket_that_cannot_be_written_is_refused_first(root, store, monkeypatch, capsys):
    monkeypatch.setattr(loop, "open_task", lambda *_: pytest.fail("something heavy"))
    store.refuses = True
    with pytest.raises(SystemExit) as ended:
        cli.main(["rl", "--output", "gs://b/run"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert (
        said
        == "jaxdyn: cannot write to gs://b/run: OSError: Forbidden: gs://b/run/writable no access\n"
    )
    for output in ("s3://b/run", "gs://"):
        with pytest.raises(JaxdynError, match=f"gs://BUCKET/FOLDER, got {output}"):
            run_rl(dataclasses.replace(tiny_runs.rl_config(root, "x"), output=output))


def test_the_package_for_buckets_is_named(monkeypatch):
    missing = type("Missing", (), {"makedirs": lambda *_, **__: __import__("gcsfs_is_not_here")})
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, "gs", missing())
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    with pytest.raises(
        JaxdynError, match=r"^gs://b/run needs the package gcsfs: pip install gcsfs$"
    ):
        require_writable(open_path("gs://b/run"))


def test_paths_on_disk_and_in_buckets():
    assert open_path("runs/x") == Path("runs/x")
    bucket = open_path("gs://b/runs/x")
    assert in_bucket(bucket) and not in_bucket(Path("x"))
    assert str(bucket / "a.json") == "gs://b/runs/x/a.json"
    assert open_path(bucket) == bucket
    assert str(common_parent([bucket, epath.Path("gs://b/runs/y/z")])) == "gs://b/runs"
    assert common_parent([Path("/a/b"), Path("/a/b/c")]) == Path("/a/b")
