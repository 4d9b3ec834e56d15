import re
import shutil

import numpy as np
import pytest
import tiny_runs
from disk import Disk

from jaxdyn.commands import quickstart as command
from jaxdyn.commands.quickstart import quickstart
from jaxdyn.presets import RL, SFT
from jaxdyn.report import page as page_module
from jaxdyn.report.ledger_file import load_ledger
from jaxdyn.report.plotting import STYLE
from jaxdyn.types import JaxdynError


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The presets, a few steps long, of a few rows, and figures of few pixels."""
    monkeypatch.setitem(STYLE, "savefig.dpi", 50)
    monkeypatch.setenv("JAXDYN_CACHE", str(tmp_path / "cache"))
    sft, rl = tiny_runs.quickstart_presets()
    monkeypatch.setitem(SFT, "quickstart", sft)
    monkeypatch.setitem(RL, "quickstart", rl)
    monkeypatch.setattr(command, "LEDGER_PROMPTS", 2)


@pytest.mark.slow
def test_the_whole_story_and_started_again(small, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    page = quickstart(output, seed=1)
    assert page.is_file() and page.parent == output / "report"
    for schedule in ("joint", "classifier_first"):
        assert (output / "ledger" / schedule / "ledger.html").is_file()
        saved = load_ledger(output / "ledger" / schedule / "ledger.npz")
        assert np.any(saved.change("log_prob")) and len(saved.prompts) == 4
    said = capsys.readouterr()
    rows = [line.split() for line in said.out.splitlines() if "→" in line]
    assert [row[0] for row in rows[1:]] == ["joint", "classifier_first"]  # after the title
    # Without a terminal every stage still says how far it is.
    for stage in ("sft · supervised  2/2", "joint · joint  2/2", "classifier_first  3/3"):
        assert stage in said.err
    logs = [output / run / "metrics.jsonl" for run in ("sft", "joint", "classifier_first")]
    # A line a step, and one before the first.
    assert [len(log.read_text().splitlines()) for log in logs] == [3, 3, 4]
    before = [log.read_bytes() for log in logs]
    with pytest.raises(JaxdynError, match=r"already holds another run \(seed: 1 there, 2 here\)"):
        quickstart(output, seed=2)

    # A part of it is damaged, then gone; on a disk without room it says so, and goes on with room.
    # How figures are drawn has been seen.
    monkeypatch.setattr(page_module, "_png", lambda figure: page_module.SOFTWARE.encode())
    ledger = output / "ledger" / "joint"
    whole = (ledger / "ledger.npz").read_bytes()
    (ledger / "ledger.npz").write_bytes(whole[:-9])
    with pytest.raises(JaxdynError, match=r"joint/ledger.npz is not a (readable|ledger)"):
        quickstart(output, seed=1)
    shutil.rmtree(ledger)
    for full in (r"ledger/joint/", "report/"):
        page.unlink(missing_ok=True)
        with Disk(output, full) as disk, pytest.raises(JaxdynError) as caught:
            quickstart(output, seed=1)
        assert disk.room is not None
        wanted = rf"cannot write {output}/{full}\S+: No space left on device \(it needs .* free\)"
        assert re.fullmatch(wanted, str(caught.value)), caught.value
    assert quickstart(output, seed=1) == page and page.is_file()
    (tmp_path / "earlier.npz").write_bytes(whole)
    changes = [
        load_ledger(p).change("log_prob") for p in (tmp_path / "earlier.npz", ledger / "ledger.npz")
    ]
    np.testing.assert_array_equal(*changes)
    assert [log.read_bytes() for log in logs] == before


def test_a_disk_without_room_for_the_model(small, tmp_path):
    output = tmp_path / "disk" / "out"
    with Disk(output, r"\.new\.partial"), pytest.raises(JaxdynError) as caught:
        quickstart(output)
    said = str(caught.value)
    assert said.startswith(f"cannot write the checkpoint {output / 'new'}: No space left on device")
    assert "(it needs 1.6 MB, " in said and said.endswith(" free)")
    assert not (tmp_path / "disk").exists()


def test_an_output_that_holds_something_else(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "make_model", lambda *_: pytest.fail("work was done"))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(JaxdynError, match=r"already holds notes.txt; choose another output"):
        quickstart(tmp_path)
    with pytest.raises(JaxdynError, match=r"notes.txt is not a directory"):
        quickstart(tmp_path / "notes.txt")
    with pytest.raises(JaxdynError, match="seed must be at least 0, got -1"):
        quickstart(tmp_path / "new", seed=-1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt"]
