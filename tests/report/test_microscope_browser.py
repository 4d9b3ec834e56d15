"""The page in a browser: what it shows is what the file says, and what is pressed works."""

import os
import re
import shutil

import numpy as np
import pytest
from synthetic import write_run
from synthetic_ledger import HOSTILE, KINDS, OUTSIDE, PARTS, QUANTITIES, influence_on, saved_ledger

from jaxdyn.report import write_report
from jaxdyn.report.ledger_file import load_ledger
from jaxdyn.report.microscope import write_microscope

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

TEXTS, LENGTH, SEGMENTS, LAYERS, SITE = 4, 18, 3, 5, 40


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("ledger") / "ledger.npz"
    saved_ledger(TEXTS, LENGTH, SEGMENTS, LAYERS).write(path)
    return load_ledger(path)


@pytest.fixture(scope="module")
def browser():
    # A browser's own sandbox does not start as root; the page is this test's.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as run:
        opened = run.chromium.launch(executable_path=BROWSER, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens a file, and fails if it said anything, asked for anything or raised anything."""
    said, asked, context = [], [], browser.new_context(viewport={"width": 1300, "height": 900})

    def open_page(path):
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready]", state="attached")
        return page

    yield open_page
    context.close()
    assert said == []
    assert all(url.startswith("file://") and url.endswith(".html") for url in asked), asked


@pytest.fixture
def page(open_page, saved, tmp_path):
    (path,) = write_microscope(saved, tmp_path / "ledger.html", influence_on(saved))
    return open_page(path)


# -- what is wanted, in float64 -------------------------------------------------------------------


def change(saved, quantity, first=0, last=SEGMENTS):
    values = np.float64(saved.values[quantity])
    return values[last] - values[first]


def through(saved, quantity, part, first=0, last=SEGMENTS):
    return np.float64(saved.parts[quantity][part][first:last]).sum(axis=0)


def residual(saved, quantity, first=0, last=SEGMENTS):
    parts = sum(through(saved, quantity, part, first, last) for part in PARTS)
    return parts - change(saved, quantity, first, last)


# -- what is shown --------------------------------------------------------------------------------


def numbers(page, selector):
    """The numbers within an element, which read as they are to four digits."""
    script = "all => all.map(x => [x.textContent, x.dataset.value, x.title])"
    shown = page.locator(f"{selector} .number").evaluate_all(script)
    for text, value, title in shown:
        assert title == value
        read = float(text.replace("−", "-"))
        assert read == pytest.approx(float(value), rel=5.01e-4, abs=0), (text, value)
        digits = re.sub(r"e.*|[^0-9]", "", text).lstrip("0")
        assert len(digits) == 4 or float(value) == 0, text
    return np.array([float(value) for _, value, _ in shown])


def cells(page, selector):
    script = "all => all.map(x => Number(x.dataset.value))"
    return np.array(page.locator(f"{selector} .cell").evaluate_all(script))


def amounts(page):
    """Of every token, in the order of sites."""
    script = "all => all.map(x => [Number(x.dataset.site), Number(x.dataset.value)])"
    return np.array([x for _, x in sorted(page.locator(".token").evaluate_all(script))])


def token(page, site):
    return page.locator(f".token[data-site='{site}']")


def focused(page):
    return page.evaluate("Number(document.activeElement.dataset.site)")


def close(found, wanted, **tolerance):
    np.testing.assert_allclose(found, wanted, **({"rtol": 1e-12, "atol": 1e-15} | tolerance))


# -- tests ----------------------------------------------------------------------------------------


def test_texts_are_shown_as_they_are(page, saved):
    found = page.locator(".token").all_text_contents()
    shown = {
        "\u202eevil": "⟨U+202E⟩evil",
        "\n\n": "⏎\n⏎\n",
        "\x00x\x1b[31m": "⟨U+0000⟩x⟨U+001B⟩[31m",
        "\u2028\u2029": "⟨U+2028⟩⟨U+2029⟩",
        "": "∅",
    }
    assert found == [shown.get(piece, piece) for piece in saved.pieces.tolist()]
    assert page.evaluate("document.images.length") == 0
    assert page.evaluate("document.scripts.length") == 2
    assert page.locator(".prompt").first.text_content() == saved.prompts[0]
    page.click("#about summary")
    settings = page.locator("#about dd").all_text_contents()
    assert settings == [HOSTILE[0], str(LAYERS), "nan"]
    assert saved.names[0] in page.text_content("#between")
    token(page, 7).click()
    assert page.text_content("#chosen") == "␣␣␣"


def test_a_long_prompt_opens(open_page, saved, tmp_path):
    long = "".join(f"{n} " for n in range(400))
    prompts = np.array([long] * TEXTS)
    changed = type(saved)(**{**vars(saved), "prompts": prompts})
    (path,) = write_microscope(changed, tmp_path / "ledger.html")
    page = open_page(path)
    prompt = page.locator(".prompt").first
    assert prompt.text_content() == f"… {len(long) - 280} characters before {long[-280:]}"
    prompt.locator("button").click()
    assert prompt.text_content() == long


def test_a_token_has_its_account(page, saved):
    token(page, SITE).click()
    found = numbers(page, "#statistics").reshape(-1, 3)
    rows = [saved.values[q].astype(np.float64)[[0, -1], SITE] for q in QUANTITIES]
    rows.insert(1, np.exp(rows[0]))
    close(found, [(before, after, after - before) for before, after in rows])
    wanted = [change(saved, "log_prob")[SITE]]
    wanted += [through(saved, "log_prob", part)[SITE] for part in PARTS]
    wanted += [residual(saved, "log_prob")[SITE]]
    close(numbers(page, "#components"), wanted)
    close(cells(page, "#by-token"), np.float64(saved.by_token["log_prob"][..., SITE]).sum(axis=0))
    assert page.locator("#by-token .cell").count() == LAYERS + 2


def test_alternatives_are_sorted_by_what_they_gained(page, saved):
    token(page, SITE).click()
    logs = np.float64(saved.alternative_values[[0, -1], SITE])
    gained = np.exp(logs[1]) - np.exp(logs[0])
    order = np.argsort(-gained)
    raised = [a for a in order if gained[a] > 0][:5]
    lowered = [a for a in order[::-1] if gained[a] < 0][:5]
    assert raised and lowered
    chosen = np.array(raised + lowered)
    parts = [
        np.float64(saved.alternative_parts[part][:, SITE, chosen]).sum(axis=0) for part in PARTS
    ]
    wanted = np.stack([*np.exp(logs[:, chosen]), logs[1, chosen] - logs[0, chosen], *parts], axis=1)
    close(numbers(page, "#alternatives").reshape(-1, 5), wanted)
    assert page.locator("#alternatives tbody").first.locator("tr").count() == len(raised)


def test_a_completion_has_its_map(page, saved):
    token(page, SITE).click()
    t, span = SITE // LENGTH, slice(SITE // LENGTH * LENGTH, (SITE // LENGTH + 1) * LENGTH)
    kinds = {
        kind: np.float64(x[:, t]).sum(axis=0) for kind, x in saved.by_layer["log_prob"].items()
    }
    close(cells(page, "#by-layer"), np.concatenate([kinds[kind] for kind in KINDS]))
    close(numbers(page, "#outside"), np.concatenate([kinds[kind] for kind in OUTSIDE]))
    whole = change(saved, "log_prob")[span].sum()
    parts = [through(saved, "log_prob", part)[span].sum() for part in PARTS]
    wanted = [whole, whole / LENGTH, *parts, sum(parts) - whole]
    close(numbers(page, "#completion"), wanted, atol=1e-13)
    nodes = ", ".join(map(str, saved.nodes[:, t]))
    assert f"Quadrature nodes: {nodes}." in page.text_content("#completion")
    cell = page.locator("#by-layer .cell").nth(LAYERS + 2)
    for act in (cell.hover, cell.focus):
        page.locator("#by-layer .cell").first.focus()
        act()
        close(numbers(page, "figure:has(#by-layer) figcaption"), [kinds[KINDS[1]][2]])
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    close(numbers(page, "figure:has(#by-layer) figcaption"), [kinds[KINDS[0]][3]])


def test_the_totals_are_of_all(page, saved):
    wanted = change(saved, "log_prob")
    parts = [through(saved, "log_prob", part).sum() for part in PARTS]
    rms = lambda x: np.sqrt(np.mean(x**2))
    missed = rms(residual(saved, "log_prob")) / rms(wanted)
    total = [wanted.sum(), wanted.mean(), *parts, missed]
    close(numbers(page, "#totals"), total, rtol=1e-9)
    assert f"{TEXTS * LENGTH} tokens of {TEXTS} completions" in page.text_content("#totals")


def test_colours_follow_what_is_chosen(page, saved):
    close(amounts(page), change(saved, "log_prob"))
    for part in PARTS:
        page.check(f"[name=part][value={part}]")
        close(amounts(page), through(saved, "log_prob", part))
    page.select_option("#quantity", "entropy")
    close(amounts(page), through(saved, "entropy", PARTS[1]))
    page.check("[name=part][value=layers]")
    of = np.float64(saved.by_token["entropy"]).sum(axis=0)
    close(amounts(page), of.sum(axis=0), rtol=1e-10, atol=1e-12)
    close(amounts(page), through(saved, "entropy", "gradient"), atol=1e-6)
    page.focus("#first")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.focus("#last")
    page.keyboard.press("ArrowLeft")
    assert page.text_content("#range") == f"layer 1 to layer {LAYERS - 1}"
    close(amounts(page), of[2 : LAYERS + 1].sum(axis=0), rtol=1e-10, atol=1e-12)
    up, down = (page.locator(f".token.{name}").count() for name in ("up", "down"))
    assert up == np.sum(amounts(page) > 0) and down == np.sum(amounts(page) < 0)
    page.select_option("#quantity", "kl")  # which has no account by token and layer
    assert page.locator("[name=part]:checked").input_value() == "total"
    close(amounts(page), change(saved, "kl"))


def test_the_scale_holds_ninety_eight_in_a_hundred(page, saved):
    size = np.sort(np.abs(change(saved, "log_prob")))
    end = size[int(0.98 * (len(size) - 1))]
    assert float(page.text_content("#high")) == pytest.approx(end, rel=5e-4)
    page.check("[name=part][value=representation]")
    assert float(page.text_content("#high")) == pytest.approx(end, rel=5e-4)
    page.check("#fit")
    size = np.sort(np.abs(through(saved, "log_prob", "representation")))
    end = size[int(0.98 * (len(size) - 1))]
    assert float(page.text_content("#high")) == pytest.approx(end, rel=5e-4)
    level = token(page, SITE).evaluate("x => x.style.getPropertyValue('--amount')")
    x = abs(through(saved, "log_prob", "representation")[SITE])
    assert float(level.rstrip("%")) == pytest.approx(85 * min(1, x / end), abs=0.06)


def test_sliders_choose_checkpoints(page, saved):
    token(page, SITE).click()
    page.focus("#from")
    page.keyboard.press("ArrowRight")
    close(amounts(page), change(saved, "log_prob", 1, 3))
    page.focus("#to")
    page.keyboard.press("ArrowLeft")
    close(amounts(page), change(saved, "log_prob", 1, 2))
    wanted = [through(saved, "log_prob", part, 1, 2)[SITE] for part in PARTS]
    close(numbers(page, "#components")[1:3], wanted)
    assert page.text_content("#segment") == " → ".join(saved.names[1:3])
    nodes = saved.nodes[1, SITE // LENGTH]
    assert f"Quadrature nodes: {nodes}." in page.text_content("#completion")
    page.keyboard.press("ArrowLeft")  # and the other makes way
    close(amounts(page), change(saved, "log_prob", 0, 1))
    page.focus("#from")
    page.keyboard.press("End")
    close(amounts(page), change(saved, "log_prob", 2, 3))
    close(cells(page, "#by-token"), np.float64(saved.by_token["log_prob"][2, :, SITE]))


def test_keys_go_along_and_between_completions(page):
    token(page, SITE).click()
    assert focused(page) == SITE
    last = (SITE // LENGTH + 1) * LENGTH - 1
    for key, wanted in (
        ("ArrowRight", SITE + 1),
        ("ArrowDown", SITE + 1 + LENGTH),
        ("ArrowUp", SITE + 1),
        ("ArrowLeft", SITE),
        ("End", last),
        ("ArrowRight", last),
        ("Home", last - LENGTH + 1),
        ("ArrowLeft", last - LENGTH + 1),
    ):
        page.keyboard.press(key)
        assert focused(page) == wanted, key
        assert page.locator("[aria-pressed=true]").get_attribute("data-site") == str(wanted)
        assert page.locator(".token[tabindex='0']").count() == 1
        where = f"token {wanted % LENGTH + 1} of {LENGTH}, completion {wanted // LENGTH + 1},"
        assert where in page.text_content("#panel")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "panel"
    page.keyboard.press("Escape")
    assert focused(page) == last - LENGTH + 1


def test_completions_are_ordered_by_what_is_chosen(page, saved):
    sums = change(saved, "log_prob").reshape(TEXTS, LENGTH).sum(axis=1)
    for order, wanted in (
        ("fall", np.argsort(-sums)),
        ("rise", np.argsort(sums)),
        ("file", range(4)),
    ):
        page.select_option("#order", order)
        shown = page.locator("article header span:first-child").all_text_contents()
        named = [text for text in shown if text.startswith("Completion")]
        assert named == [f"Completion {t + 1}" for t in wanted]
        close(numbers(page, "article header"), sums[list(wanted)], atol=1e-13)
    page.select_option("#order", "rise")
    first, second = np.argsort(sums)[:2]
    token(page, first * LENGTH + 2).click()
    page.keyboard.press("ArrowDown")
    assert focused(page) == second * LENGTH + 2


def test_who_moved_a_token(page, saved):
    influence = influence_on(saved)
    m = influence.rows.tolist().index(SITE)
    token(page, SITE).click()
    parts = influence.contributions["log_prob"]
    row = sum(parts.values())[m]
    order = np.argsort(-row)
    shown = np.concatenate([order[:4], order[-4:]])
    advantages = np.float64(influence.advantages)
    wanted = np.stack([row[shown], advantages[shown]], axis=1)
    close(numbers(page, "#influence summary").reshape(-1, 2), wanted)
    close(numbers(page, "#others"), [row[order[4:-4]].sum()])
    page.locator("#influence summary").first.click()
    opened = page.locator("#influence details[open]")
    assert influence.prompts[shown[0]] in opened.text_content()
    close(numbers(page, "details[open] p"), [x[m, shown[0]] for x in parts.values()])
    assert influence.about in page.text_content("#panel")
    token(page, SITE + 1).click()  # a site that has none
    assert page.locator("#influence").count() == 0


def test_one_segment_without_layers(open_page, tmp_path):
    bare = saved_ledger(1, 5, segments=1, words=("one", " two"), by_token=())
    bare.by_layer.clear()
    (path,) = write_microscope(bare, tmp_path / "ledger.html")
    page = open_page(path)
    for hidden in ("#steps", "#layers", "[name=part][value=layers]"):
        assert not page.locator(hidden).is_visible()
    assert page.locator("#by-layer, #by-token, #influence").count() == 0
    close(amounts(page), np.diff(np.float64(bare.values["log_prob"]), axis=0)[0])


def test_pages_are_linked(open_page, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxdyn.report.microscope.PAGE_TOKENS", 2 * LENGTH)
    first, second = write_microscope(saved, tmp_path / "a # b.html")
    page = open_page(first)
    assert page.text_content("#pages b") == "Completions 1 to 2"
    page.click("#pages a")
    page.wait_for_selector("body[data-ready]", state="attached")
    assert page.url == second.as_uri()
    assert page.locator("article").count() == 2
    close(amounts(page), change(saved, "log_prob")[2 * LENGTH :])
    total = change(saved, "log_prob").sum()
    close(numbers(page, "#totals")[0], total)


def test_a_narrow_screen_shows_the_text_first(page):
    page.set_viewport_size({"width": 390, "height": 800})
    assert not page.locator("#panel").is_visible()
    token(page, SITE).click()
    assert page.locator("#panel").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click("#leave")
    assert not page.locator("#panel").is_visible() and focused(page) == SITE


def test_a_report_shows_its_style_and_figures_and_runs_nothing(browser, tmp_path):
    """What its policy forbids is forbidden: a script, another picture, another style."""
    directory = write_run(tmp_path / "run", steps=4)
    path = write_report([directory])
    page = browser.new_page()
    page.goto(path.as_uri())
    widths = page.eval_on_selector_all("img", "all => all.map(x => x.naturalWidth)")
    assert widths and min(widths) > 100
    assert page.eval_on_selector("body", "x => getComputedStyle(x).maxWidth") == "1120px"
    evil = (
        "<script>window.ran = 1</script><img src='https://a.test/x.png' onerror='window.ran = 2'>"
    )
    evil += "<style>body { max-width: 3px !important; }</style><p id='there'>x</p>"
    path.write_text(path.read_text().replace("</h1>", f"</h1>{evil}"))
    refused = []
    page.on("requestfailed", lambda request: refused.append((request.url, request.failure)))
    page.goto(path.as_uri())
    page.wait_for_selector("#there", state="attached")
    assert page.evaluate("window.ran") is None
    assert page.eval_on_selector("body", "x => getComputedStyle(x).maxWidth") == "1120px"
    assert refused == [("https://a.test/x.png", "csp")]
    page.close()
