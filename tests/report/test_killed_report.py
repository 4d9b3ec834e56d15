"""Reports and influence files, killed before any file operation and given again; and whose files
they do not replace."""

import contextlib
from types import SimpleNamespace

import jaxtyping
import pytest
from crash import content, kill_everywhere
from synthetic import bare_run
from test_influence_file import saved_one

from jaxdyn.commands import influence
from jaxdyn.commands.influence_options import InfluenceOptions
from jaxdyn.errors import JaxdynError
from jaxdyn.report import page, write_report


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Write the report of a run without figures, which take seconds."""
    monkeypatch.setattr(page, "EXHIBITS", ())
    run = bare_run(tmp_path / "runs" / "a")
    return lambda output: write_report([run], output)


@pytest.fixture
def account(monkeypatch):
    """Write an account that is made up."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setattr(influence, "to_save", lambda account, options: saved_one())
    monkeypatch.setattr(influence, "account_of_file", lambda options, progress: account)
    monkeypatch.setattr(influence, "print_summary", lambda saved, summary: None)
    monkeypatch.setattr(influence, "pages_of", lambda *given: {given[-1]: "a page"})
    account = SimpleNamespace(ledger=True, tokenizer=None, sites=None)
    options = lambda output: InfluenceOptions(model="m", completions="c", output=str(output))
    return lambda output: influence.run(options(output))


def test_a_report(report, tmp_path):
    for output in kill_everywhere(tmp_path, report):
        if (output / "report.html").exists():
            assert (output / "report.html").read_text().endswith("</html>\n")


def test_an_influence_file(account, tmp_path):
    for _ in kill_everywhere(tmp_path, account):
        pass


def test_a_full_disk_leaves_the_earlier_report(report, tmp_path, monkeypatch):
    report(tmp_path / "out")
    before = content(tmp_path / "out")
    monkeypatch.setattr(page, "CSS", "body { color: red }")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(JaxdynError) as caught:
        patched.setattr("os.fsync", full)
        report(tmp_path / "out")
    said = str(caught.value)
    assert said.startswith(
        f"cannot write {tmp_path / 'out' / 'report.html'}: No space left on device"
    )
    assert "(it needs " in said and said.endswith(" free)") and "\n" not in said
    assert content(tmp_path / "out") == before
    report(tmp_path / "out")
    assert content(tmp_path / "out") != before


def test_what_is_not_a_report_is_not_replaced(report, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.html").write_text("<title>jaxdyn, a thesis</title>")
    with pytest.raises(JaxdynError, match=r"report.html is not a report of jaxdyn; choose another"):
        report(tmp_path / "mine")
    (tmp_path / "tables" / "tables").mkdir(parents=True)
    (tmp_path / "tables" / "tables" / "summary.csv").write_text("mine")
    with pytest.raises(JaxdynError, match=r"summary.csv already exists, beside no report; choose"):
        report(tmp_path / "tables")
    assert content(tmp_path / "tables") == {"tables/summary.csv": b"mine"}
    with contextlib.suppress(JaxdynError):
        report(tmp_path / "mine")
    assert list(content(tmp_path / "mine")) == ["report.html"]


def test_what_is_not_an_account_is_not_replaced(account, tmp_path):
    for name, data, words in (
        ("influence.json", b"{}", "already holds influence.json"),
        ("influence.npz", b"mine", "influence.npz is not an influence file"),
        ("notes.txt", b"mine", "already holds notes.txt"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(data)
        with pytest.raises(JaxdynError, match=words):
            account(tmp_path / name)
        assert content(tmp_path / name) == {name: data}
