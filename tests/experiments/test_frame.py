"""What claims' scripts share: the rulings, and what is kept."""

import json

import frame
import matplotlib.pyplot as plt
import numpy as np
import pytest


@pytest.mark.parametrize(
    ("differences", "ruling"),
    [
        ([0.1, 0.12, 0.09, 0.11, 0.1, 0.13], "supported"),
        ([-0.1, -0.12, -0.09, -0.11, -0.1, -0.13], "not supported"),
        # Whatever it is, it is too small to matter.
        ([0.001, -0.002, 0.001, 0.0, 0.001, -0.001], "not supported"),
        ([0.3, -0.25, 0.2, -0.3, 0.1, 0.2], "undecided"),
        # Five pairs give no p below 1/16, and one gives nothing.
        ([0.1, 0.12, 0.09, 0.11, 0.1], "undecided"),
        ([0.0], "undecided"),
    ],
)
def test_rulings(differences, ruling):
    verdict = frame.compared("c", "s", differences, matters=0.02)
    assert (verdict.ruling, verdict.seeds) == (ruling, len(differences))
    assert verdict.over == f"{len(differences)} pairs of seeds"
    assert verdict.value == pytest.approx(np.mean(differences))
    assert min(differences) <= verdict.low <= verdict.value <= verdict.high <= max(differences)


def test_what_is_plain():
    found = frame.plain(
        {1: np.float32(1 / 3), "b": [np.bool_(True), np.int64(3)], "c": np.nan, "d": np.eye(2)}
    )
    assert found == {"1": 0.333333, "b": [True, 3], "c": None, "d": [[1.0, 0.0], [0.0, 1.0]]}
    json.dumps(found)


def test_an_answer_is_kept_and_not_asked_for_again(tmp_path, capsys):
    chosen = frame.parser("d").parse_args(["--output", str(tmp_path), "--name", "small"])
    asked = []

    def find(given):
        asked.append(given)
        verdict = frame.compared("it is", "nats", [0.5, 0.25], 0.02)
        return [verdict], {"x": np.arange(2)}, plt.figure(figsize=(1, 1))

    for _ in range(2):
        path = frame.keep(chosen, "claim", find)
    assert asked == [chosen] and not plt.get_fignums()
    assert path == tmp_path / "small/claim.json" and (tmp_path / "small/claim.png").stat().st_size
    content = json.loads(path.read_text())
    assert (content["script"], content["model"], content["size"]) == ("claim", "small", "small")
    assert content["rows"] == {"x": [0, 1]} and content["verdicts"][0]["value"] == 0.375
    said = capsys.readouterr().out
    assert "undecided: it is\n  nats: 0.375 (0.25 to 0.5), 2 pairs of seeds" in said


def test_arms_and_trainings(tmp_path):
    for name in ("b/seed-10", "b/seed-2", "a/seed-0"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "base-0").mkdir()
    assert frame.arms(tmp_path) == ["a", "b"]
    assert [path.name for path in frame.trainings(tmp_path, "b")] == ["seed-2", "seed-10"]
