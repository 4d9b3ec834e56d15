"""The page's file: its data are the ledger's, its text is inert, it fits, and it is paged."""

import base64
import dataclasses
import gzip
import hashlib
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from synthetic_ledger import HOSTILE, influence_on, saved_ledger

from jaxdyn.report import microscope
from jaxdyn.report.ledger_file import load_ledger
from jaxdyn.report.microscope import Influence, write_microscope
from jaxdyn.types import JaxdynError


class Page(HTMLParser):
    """A page's elements with their attributes, and what is in its scripts and styles."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.text = path.read_bytes().decode("utf-8")
        self.elements, self.open, self.inside = [], "", []
        self.feed(self.text)
        self.data = json.loads(self.within("script", 0))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open = tag
        self.inside.append((tag, []))

    def handle_endtag(self, tag):
        self.open = ""

    def handle_data(self, data):
        if self.open:
            self.inside[-1][1].append(data)

    def within(self, tag, n):
        return ["".join(data) for name, data in self.inside if name == tag][n]


def array(packed):
    kind = np.dtype(packed["kind"]).newbyteorder("<")
    planes = gzip.decompress(base64.b64decode(packed["data"]))
    whole = np.frombuffer(planes, np.uint8).reshape(kind.itemsize, -1).T.tobytes()
    return np.frombuffer(whole, kind).reshape(packed["shape"])


def same(packed, wanted):
    if isinstance(wanted, dict):
        assert list(packed) == list(wanted)
        for name, x in wanted.items():
            same(packed[name], x)
    else:
        found = array(packed)
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)


@pytest.fixture
def saved():
    return saved_ledger()


def test_a_page_has_the_files_numbers(tmp_path, saved):
    saved.write(tmp_path / "ledger.npz")
    saved = load_ledger(tmp_path / "ledger.npz")
    (path,) = write_microscope(saved, tmp_path / "page" / "ledger.html")
    data = Page(path).data
    for name in ("values", "parts", "by_token", "by_layer", "alternative_values"):
        same(data[name], getattr(saved, name))
    same(data["alternative_parts"], saved.alternative_parts)
    same(data["alternatives"], saved.alternatives)
    same(data["targets"], saved.targets)
    np.testing.assert_array_equal(array(data["nodes"]), saved.nodes)
    strings = np.array(data["strings"], dtype=object)
    for name in ("pieces", "alternative_pieces", "prompts"):
        assert strings[array(data[name])].tolist() == getattr(saved, name).tolist()
    for quantity, total in data["totals"].items():
        change = np.float64(saved.values[quantity][1:]) - np.float64(saved.values[quantity][:-1])
        np.testing.assert_allclose(array(total["change"]), change.sum(axis=1), rtol=1e-12)
        for part, x in saved.parts[quantity].items():
            wanted = np.float64(x).sum(axis=1)
            np.testing.assert_allclose(array(total["parts"][part]), wanted, rtol=1e-12)


def test_sites_come_in_the_order_of_their_texts(tmp_path, saved):
    order = np.random.default_rng(3).permutation(len(saved.rows))
    at = lambda tree, axis: (
        {name: at(x, axis) for name, x in tree.items()}
        if isinstance(tree, dict)
        else np.take(tree, order, axis=axis)
    )
    first = ("rows", "positions", "targets", "is_prompt", "pieces", "alternatives")
    axes = dict.fromkeys((*first, "alternative_pieces"), 0) | {"by_token": 2}
    axes |= dict.fromkeys(("values", "parts", "alternative_values", "alternative_parts"), 1)
    shuffled = {name: at(getattr(saved, name), axis) for name, axis in axes.items()}
    (path,) = write_microscope(saved, tmp_path / "a.html")
    (other,) = write_microscope(dataclasses.replace(saved, **shuffled), tmp_path / "b.html")
    wanted, found = Page(path).data, Page(other).data
    for data in (wanted, found):
        del data["totals"], data["pages"]  # floats added up in another order, and the files' names
    assert found == wanted


def test_no_text_is_markup(tmp_path, saved):
    (path,) = write_microscope(saved, tmp_path / "ledger.html", influence_on(saved))
    page, plain = Page(path), Page(plain_page(tmp_path))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    scripts = [(tag, attributes) for tag, attributes in page.elements if tag == "script"]
    assert scripts == [
        ("script", {"type": "application/json", "id": "data"}),
        ("script", {}),
    ]
    raw = page.within("script", 0)
    assert raw.isascii() and not set("<>&") & set(raw)
    assert set(HOSTILE) <= set(page.data["strings"])
    assert page.data["about"]["model"] == {"name": HOSTILE[0], "layers": 4}
    assert page.data["about"]["tolerance"] == "nan"
    assert page.within("title", 0).startswith(saved.names[0])


def plain_page(tmp_path):
    return write_microscope(saved_ledger(words=("a", "b")), tmp_path / "plain.html")[0]


def test_a_page_needs_nothing_and_lets_nothing_else_run(tmp_path, saved):
    (path,) = write_microscope(saved, tmp_path / "ledger.html", influence_on(saved))
    page = Page(path)
    for tag, attributes in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert not {"src", "href", "style", "srcset"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    script, style = page.within("script", 1), page.within("style", 0)
    digest = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{digest(script)}'; "
        f"style-src 'sha256-{digest(style)}'; base-uri 'none'; form-action 'none'"
    )
    for word in ("innerHTML", "outerHTML", "insertAdjacent", "eval(", "document.write", "fetch("):
        assert word not in script
    assert "http" not in script + style and "url(" not in style and "@import" not in style


def test_sixty_four_completions_fit_on_a_page(tmp_path):
    words = [f" word{n}" for n in range(200)]
    saved = saved_ledger(64, 64, segments=3, layers=24, wide=8, words=words, by_token=())
    paths = write_microscope(saved, tmp_path / "ledger.html", influence_on(saved, 64))
    assert [path.name for path in paths] == ["ledger.html"]
    assert 1_000_000 < paths[0].stat().st_size < 5_000_000


@pytest.mark.parametrize("limit", ["bytes", "tokens", "one"])
def test_more_are_paged(tmp_path, monkeypatch, limit):
    saved = saved_ledger(texts=11)
    whole = write_microscope(saved, tmp_path / "whole.html")[0].stat().st_size
    overhead = sum(len(p.read_bytes()) for p in sources()) + 4000
    if limit == "bytes":
        monkeypatch.setattr(microscope, "PAGE_BYTES", (whole - overhead) * 2 // 5)
    else:
        monkeypatch.setattr(microscope, "PAGE_TOKENS", 24 if limit == "tokens" else 1)
    paths = write_microscope(saved, tmp_path / "ledger.html", influence_on(saved))
    assert len(paths) == {"bytes": len(paths), "tokens": 3, "one": 11}[limit] > 2
    assert [p.name for p in paths] == ["ledger.html"] + [
        f"ledger-{n}.html" for n in range(2, len(paths) + 1)
    ]
    pages, shown = [Page(path).data for path in paths], 0
    for n, data in enumerate(pages):
        assert data["page"] == n and data["pages"] == pages[0]["pages"]
        link = data["pages"][n]
        assert link["file"] == paths[n].name and link["first"] == shown + 1
        rows = [text["row"] for text in data["texts"]]
        assert rows == list(range(shown, shown + len(rows)))
        sites = slice(6 * shown, 6 * (shown + len(rows)))
        for quantity, x in saved.values.items():
            np.testing.assert_array_equal(array(data["values"][quantity]), x[:, sites])
        np.testing.assert_array_equal(array(data["nodes"]), saved.nodes[:, rows])
        shown += len(rows)
        assert link["last"] == shown
        assert data["tokens"] == 66 and data["completions"] == 11
    assert shown == 11
    influenced = [data["influence"]["sites"] for data in pages]
    assert sum(map(len, influenced)) == 33


def sources():
    folder = microscope.importlib.resources.files("jaxdyn.report")
    return [folder.joinpath(name) for name in microscope._SOURCES]


@pytest.mark.parametrize("count", [2, 5, 12])
def test_the_strongest_influences_and_all_others(tmp_path, saved, count):
    influence = influence_on(saved, count)
    (path,) = write_microscope(saved, tmp_path / "ledger.html", influence)
    data = Page(path).data
    found, strings = data["influence"], np.array(data["strings"], dtype=object)
    assert found["sites"] == influence.rows.tolist()
    assert strings[array(found["texts"])].tolist() == influence.texts.tolist()
    assert strings[array(found["prompts"])].tolist() == influence.prompts.tolist()
    np.testing.assert_array_equal(array(found["advantages"]), np.float64(influence.advantages))
    for quantity, parts in influence.contributions.items():
        kept = found["quantities"][quantity]
        who = array(kept["who"])
        total = sum(parts.values())
        for m, row in enumerate(total):
            named = sorted(row, reverse=True)
            named = named if count <= 8 else named[:4] + named[-4:]
            np.testing.assert_array_equal(row[who[m]], named)
        for part, x in parts.items():
            amounts = array(kept["parts"][part])
            np.testing.assert_array_equal(amounts, np.take_along_axis(x, who, axis=1))
            whole = amounts.sum(axis=1) + array(kept["others"][part])
            np.testing.assert_allclose(whole, x.sum(axis=1), rtol=1e-12, atol=1e-14)


def test_influence_has_nothing_to_add_up_without_completions(tmp_path, saved):
    none = Influence(
        rows=np.arange(2),
        contributions={"log_prob": {"gradient": np.zeros((2, 0))}},
        texts=np.array([], str),
        prompts=np.array([], str),
        advantages=np.zeros(0),
    )
    (path,) = write_microscope(saved, tmp_path / "ledger.html", none)
    kept = Page(path).data["influence"]["quantities"]["log_prob"]
    assert array(kept["who"]).shape == (2, 0)
    np.testing.assert_array_equal(array(kept["others"]["gradient"]), [0, 0])


def test_what_cannot_be_shown_or_written(tmp_path, saved):
    empty = dataclasses.replace(saved, rows=saved.rows[:0])
    with pytest.raises(JaxdynError, match="wanted at least 1, got 0"):
        write_microscope(empty, tmp_path / "ledger.html")
    (tmp_path / "file").write_text("")
    with pytest.raises(JaxdynError, match=r"cannot write .*file/ledger\.html: .*/file\)$"):
        write_microscope(saved, tmp_path / "file" / "ledger.html")
