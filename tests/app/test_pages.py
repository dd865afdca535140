"""The pages in a real browser: headless Chromium, no network. Where there is none, these tests are skipped and say so."""

import importlib.resources
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from throughtime.cells import CELLS, Parameters, sequence
from throughtime.insight import worked_example
from throughtime.lm.run import open_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SHORT = ("--lags", 24, "--probe", 8)
DESKTOP, PHONE = (1280, 800), (390, 844)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., Any]]:
    """Open a page; at the end, see that it said nothing on the console and asked the network for nothing."""
    said: list[str] = []
    contexts = []

    def on_request(request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            said.append(f"request for {request.url}")

    def call(path: Path, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda message: said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("request", on_request)
        page.goto(path.as_uri())
        return page

    yield call
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture(scope="session")
def run_page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _written(tmp_path_factory, run)


@pytest.fixture(scope="session")
def noise_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _written(tmp_path_factory, "--cell", "rnn", "--hidden", 8, "--layers", 2)


@pytest.fixture(scope="session")
def word_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from throughtime.app.cli import main

    path = tmp_path_factory.mktemp("pages") / "ybigta.html"
    assert main(["explain", "ybigta", "--html", str(path)]) == 0
    return path


def _written(tmp_path_factory: pytest.TempPathFactory, *what: object) -> Path:
    from throughtime.app.cli import main

    folder = tmp_path_factory.mktemp("pages")
    assert main(["gradients", *map(str, (*what, *SHORT, "--out", folder))]) == 0
    return folder / "gradients.html"


def data_of(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text.partition('id="data">')[2].partition("</script>")[0])


def shown(page: Any, selector: str) -> str:
    return page.locator(selector).inner_text()


def test_a_curve_ends_where_it_leaves_its_chart(noise_page: Path, open_page: Callable[..., Any]) -> None:
    """It isn't drawn along the lowest decade, as if that much were left."""
    page = open_page(noise_page)
    page.check("input[name=cell][value=lstm]")
    ends = page.evaluate("""() => [...document.querySelectorAll("#play-curve polyline, #play-steps polyline")].map(
      (line) => [...line.points].at(-1).x / line.ownerSVGElement.viewBox.baseVal.width)""")
    assert len(ends) == 3
    assert max(ends) < 0.9


def test_columns_without_a_figure_are_left_out(noise_page: Path, run_page: Path, open_page: Callable[..., Any]) -> None:
    heads = {path: open_page(path).locator("#steps th[scope=col]").all_inner_texts() for path in (noise_page, run_page)}
    assert heads[noise_page] == ["", "‖J‖", "radius of J", "σ_max(W_hh)", "bound γσ_max"]
    assert heads[run_page] == ["", "‖J‖", "radius of J"]


# What a page is ------------------------------------------------------------------------------------------------------


def test_the_parts_are_in_the_package() -> None:
    parts = {part.name for part in (importlib.resources.files("throughtime.app") / "page").iterdir()}
    assert parts == {
        *("page.html", "page.css", "charts.js", "cells.js"),
        *(f"{name}.{suffix}" for name in ("gradients", "explain") for suffix in ("html", "js")),
    }


@pytest.mark.parametrize("path", ["run_page", "noise_page", "word_page"])
def test_a_page_is_whole(path: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(path).read_text(encoding="utf-8")
    assert "{{" not in text
    assert text.count("<script") == text.count("</script>") == 4
    for outside in ("http:", "https:", "src=", "@import", "url("):
        assert outside not in text.replace("http://www.w3.org/2000/svg", "")
    assert len(text) < 400_000


HOSTILE = "</script><!--<script>\u2028\u2029\ud800\x00&amp;\"'{{data}}"


def test_any_text_is_safe_in_a_page(open_page, tmp_path) -> None:
    from throughtime.app.explain import write_page

    write_page(HOSTILE, tmp_path / "hostile.html", descent=worked_example.Descent())
    assert data_of(tmp_path / "hostile.html")["letters"][0] == "<"
    page = open_page(tmp_path / "hostile.html")
    assert page.evaluate("data.letters.length") == len(set(HOSTILE))
    assert shown(page, "#word").startswith("</script><!--<script>\\u2028")


def test_a_text_of_hostile_tokens_is_shown(open_page, tmp_path, throughtime) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes("</script>\u2028<b>한국어\x00\r\n".encode() * 20)
    throughtime("gradients", "--cell", "gru", "--hidden", 4, "--text", text, *SHORT, "--out", tmp_path)
    page = open_page(tmp_path / "gradients.html")
    assert shown(page, "#ribbon").replace("\n", "").startswith("</script>")


# The report ----------------------------------------------------------------------------------------------------------


def test_the_report_says_what_the_terminal_says(open_page, run_page, throughtime, run) -> None:
    page = open_page(run_page)
    first, second, *_ = throughtime("gradients", run, *SHORT).out.splitlines()
    assert shown(page, "#subject") == first
    assert shown(page, "#verdict") == second
    assert "forget" in shown(page, "#gates")
    assert "median norm before" in shown(page, "#clip")
    assert "--init forget:3" in shown(page, "#trials")
    held_out = open_run(run).corpus().held_out
    text = open_run(run).tokenizer.decode(held_out[:31]).replace(" ", "␣")
    assert page.evaluate("ribbon.cells.map((cell) => cell.textContent).join('')") == text
    assert page.locator("#ribbon [role=option]").count() == 31


def test_a_curve_is_drawn_as_far_down_as_it_goes(open_page, tmp_path, throughtime) -> None:
    measured = ("--cell", "rnn", "--hidden", 8, "--lags", 60, "--probe", 4)
    assert throughtime("gradients", *measured, "--out", tmp_path).code == 0
    curve = data_of(tmp_path / "gradients.html")["report"]["lanes"][-1]["curve"]
    assert curve[-1] < 1e-12
    page = open_page(tmp_path / "gradients.html")
    heights = page.evaluate("[...document.querySelector('#curve polyline.series').points].map((point) => point.y)")
    fallen = [below > above for above, below in itertools.pairwise(curve)]
    drawn = [below < above for above, below in itertools.pairwise(heights)]
    assert len(heights) == 60
    assert drawn == fallen  # no floor on which the end lies flat


def test_the_packed_numbers_are_those_measured(open_page, run_page, run) -> None:
    from throughtime.app.gradients import Subject, find_subject
    from throughtime.insight import input_reach, lag_matrix

    page = open_page(run_page)
    found = find_subject(Subject(run=run, lags=24, probe=8))
    recording, gradients = found.record(torch.float32)
    reach = input_reach(recording, gradients, lags=24)[20, :, 0]
    page.evaluate("ribbon.select(20)")
    shares = torch.tensor(page.evaluate("Array.from({length: 21}, (_, t) => ribbon.share(t))"), dtype=torch.float64)
    torch.testing.assert_close(shares.flip(0), (reach / reach.sum())[:21].double(), atol=1e-5, rtol=0)
    h = recording.lanes[0].states[0][:, 0, 3]
    page.evaluate("ribbon.select(null); byId('unit').value = 3")
    values = torch.tensor(page.evaluate("ribbon.cells.map((_, t) => ribbon.value(t))"))
    torch.testing.assert_close(values, h, atol=(h.max() - h.min()).item() / 100 + 0.005, rtol=0)
    (lag,) = lag_matrix(recording, gradients, lags=24, probes=8)
    page.locator("#matrix").press("ArrowDown")  # the last loss, at its own step
    assert f"loss at s = {lag.losses[-1]}, step t = 30: " in shown(page, "#matrix + .readout")
    said = float(shown(page, "#matrix + .readout").rpartition(" ")[2])
    assert said == pytest.approx(lag.matrix[-1, -1].item(), rel=0.03)


def test_a_click_colours_the_text_before(open_page, run_page) -> None:
    page = open_page(run_page)
    colours = "ribbon.cells.map((cell) => cell.style.background)"
    before = page.evaluate(colours)
    page.locator("#ribbon [role=option]").nth(25).click()
    after = page.evaluate(colours)
    assert after[20:26] != before[20:26]
    assert len(set(after[26:])) == 1  # what comes after has no share
    assert page.evaluate("ribbon.selected") == 25
    assert "half of its gradient comes from the last" in shown(page, "#ribbon-readout")
    assert sum(page.evaluate("ribbon.values")) == pytest.approx(1, abs=1e-3)
    page.locator("#clear").click()
    assert page.evaluate(colours) == before


def test_the_text_is_coloured_by_unit_and_gate(open_page, run_page) -> None:
    page = open_page(run_page)
    unit = page.evaluate("ribbon.values")
    page.select_option("#quantity", "forget gate/mean")
    mean = page.evaluate("ribbon.values")
    assert mean != unit
    assert all(0 < value < 1 for value in mean)
    page.select_option("#quantity", "c/unit")
    page.fill("#unit", "5")
    assert page.evaluate("ribbon.values") not in (unit, mean)


def test_the_text_is_read_with_the_keyboard(open_page, run_page) -> None:
    page = open_page(run_page)
    page.locator("#ribbon [role=option]").first.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert page.evaluate("ribbon.selected") == 3
    page.keyboard.press("Escape")
    assert page.evaluate("ribbon.selected") is None
    page.locator("#curve").focus()
    page.keyboard.press("End")
    assert "lag k 23: " in shown(page, "#curve ~ .readout")
    assert page.locator("#ribbon [tabindex='0']").count() == 1
    unnamed = "[...document.querySelectorAll('[tabindex]:not([role=option])')].filter((e) => !e.ariaLabel).length"
    assert page.evaluate(unnamed) == 0


@pytest.mark.parametrize(
    ("slider", "value"), [("gain", "1.5"), ("bias", "3"), ("clip-norm", "-1.5"), ("steps-back", "40")]
)
def test_a_slider_changes_what_is_drawn(open_page, run_page, slider: str, value: str) -> None:
    page = open_page(run_page)
    drawn = "[...document.querySelectorAll('#play-curve polyline, #play-steps polyline')].map((p) => p.getAttribute('points'))"
    before = page.evaluate(drawn), page.screenshot(full_page=True)
    page.locator(f"#{slider}").fill(value)
    assert page.evaluate(drawn) != before[0]
    assert page.screenshot(full_page=True) != before[1]


def test_the_small_cell_vanishes_explodes_and_is_clipped(open_page, noise_page) -> None:
    page = open_page(noise_page)  # of an RNN, so the small cell is one too
    assert page.locator("#bias").is_disabled()
    page.locator("#gain").fill("0.5")
    assert shown(page, "#play-verdict").startswith("vanishing beyond lag")
    page.check("input[name=cell][value=lstm]")
    page.locator("#gain").fill("1")
    page.locator("#bias").fill("6")
    assert shown(page, "#play-verdict").startswith("healthy within 100 steps: at lag 99")
    page.locator("#clip-norm").fill("-3")
    assert page.evaluate("playground.scale * playground.norm") == pytest.approx(1e-3)
    assert "clipping scales it by" in shown(page, "#play-verdict")


@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_the_browsers_bptt_is_that_of_the_equations(open_page, word_page, cell: str) -> None:
    steps, width, hidden = 13, 3, 5
    name = "rnn_tanh" if cell == "rnn" else "lstm"
    rows = CELLS[name].spec.gates * hidden
    random = np.random.default_rng(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.normal(size=shape))

    weights = Parameters(draw(rows, width), draw(rows, hidden), draw(rows), draw(rows))
    x, grad_outputs = draw(steps, 1, width), draw(steps, 1, hidden)
    nothing = tuple(torch.zeros(1, hidden, dtype=torch.float64) for _ in range(len(CELLS[name].spec.states)))
    ahead = sequence.forward(CELLS[name], x, nothing, weights)
    back = sequence.backward(CELLS[name], grad_outputs, nothing, ahead.saved, weights)

    page = open_page(word_page)
    given = {key: value.flatten().tolist() for key, value in weights.there().items()}
    found = page.evaluate(
        """([cell, weights, x, gradOutputs]) => {
            const arrays = Object.fromEntries(Object.entries(weights).map(([k, v]) => [k, Float64Array.from(v)]));
            const rows = (list) => list.map((row) => Float64Array.from(row));
            const result = backpropagateThroughTime(cell, arrays, rows(x), rows(gradOutputs));
            const plain = (array) => Array.from(array, (row) => (typeof row === "number" ? row : [...row]));
            const gradient = Object.fromEntries(Object.entries(result.gradient).map(([k, v]) => [k, [...v]]));
            return {
                outputs: plain(result.outputs), gradInputs: plain(result.gradInputs), gradient,
                states: plain(result.states), steps: plain(result.steps),
            };
        }""",
        [cell, given, x[:, 0].tolist(), grad_outputs[:, 0].tolist()],
    )

    def same(found: list[Any], wanted: torch.Tensor) -> None:
        torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), wanted, atol=1e-10, rtol=1e-10)

    same(found["outputs"], ahead.outputs[:, 0])
    same(found["gradInputs"], back.inputs[:, 0])
    for key, wanted in back.parameters.there().items():
        same(found["gradient"][key], wanted.flatten())

    state, states, parts = nothing, [], []  # the norms along the way
    for t in reversed(range(steps)):
        state = (state[0] + grad_outputs[t], *state[1:])
        states.append(math.hypot(*(part.norm().item() for part in state)))
        gradient = CELLS[name].step_backward(state, ahead.saved[t], weights)
        parts.append(gradient.parameters.weight_hh.norm().item())
        state = gradient.state
    same(found["states"], torch.tensor(states[::-1], dtype=torch.float64))
    same(found["steps"], torch.tensor(parts[::-1], dtype=torch.float64))


def test_the_small_cells_weights_are_orthogonal(open_page, word_page) -> None:
    page = open_page(word_page)
    flat = page.evaluate("[...drawWeights('lstm', 16, 4, 1.25, 3, 7).weight_hh]")
    for block in torch.tensor(flat, dtype=torch.float64).reshape(4, 16, 16):
        torch.testing.assert_close(block @ block.T, 1.25**2 * torch.eye(16, dtype=torch.float64))


# The worked example --------------------------------------------------------------------------------------------------


def test_the_word_is_stepped_through(open_page, word_page) -> None:
    page = open_page(word_page)
    titles = []
    while page.locator("#forward").is_enabled():
        titles.append(shown(page, "#stage-title"))
        page.click("#forward")
    titles.append(shown(page, "#stage-title"))
    assert [title.partition(",")[0] for title in titles] == [
        *("Weights", *["Forward"] * 5, "Losses", *["Backward"] * 5),
        *("The same gradient", "Clipping", "Update", "Training"),
    ]
    page.locator("#stage-title").click()
    page.keyboard.press("ArrowLeft")
    assert shown(page, "#stage-title") == "Update"
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    assert shown(page, "#stage-title") == "Forward, t = 1: y → b"
    page.locator("#stage").fill("7")
    assert shown(page, "#stage-title") == "Backward, t = 5: t → a"


def test_every_number_of_the_word_is_on_its_page(open_page, word_page) -> None:
    from throughtime.app.terminal import number

    word = worked_example.Word.read("ybigta")
    weights = worked_example.initial_weights(word, hidden_size=3)
    ahead, back = worked_example.forward(word, weights), worked_example.backward(word, weights)
    steps = worked_example.steps_back(word, weights)
    update = worked_example.Descent().update(weights, back.gradient)
    page = open_page(word_page)
    stages = [page.evaluate(f"(show({i}), byId('numbers').innerText)") for i in range(16)]

    def check(text: str, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            for value in tensor.flatten().tolist():
                assert number(value) in text

    check(stages[0], *weights)
    for t in range(5):
        check(stages[1 + t], *(part[t] for part in ahead))
        check(stages[11 - t], *steps[t][:5], *steps[t].parts)
    check(stages[6], ahead.losses)
    check(stages[7 + 4], *(sum(step.parts[i] for step in steps) for i in range(3)))
    check(stages[12], back.per_step, back.total, back.autograd.hh, back.reach[back.reach > 0])
    check(stages[13], *back.gradient, *update.gradient, torch.tensor([update.norm, update.scale]))
    check(stages[14], *weights, *update.gradient, *update.weights)
    assert "ybigta" in stages[15]


# Everywhere ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("path", ["run_page", "noise_page", "word_page"])
def test_a_page_fits_its_window_in_both_schemes(
    open_page, path: str, size: tuple[int, int], scheme: str, request: pytest.FixtureRequest
) -> None:
    page = open_page(request.getfixturevalue(path), size, scheme)
    stages = 16 if path == "word_page" else 1
    for stage in range(stages):
        if path == "word_page":
            page.evaluate(f"show({stage})")
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    assert page.evaluate(_CONTRAST) >= 4.5
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(251, 250, 248)" if scheme == "light" else "rgb(20, 20, 19)")


_CONTRAST = """(() => {
    // the lowest contrast of a text with what it stands on, by WCAG 2
    const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
    const luminance = (colour) => {
        const [r, g, b] = numbers(colour).map((c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (element) => {
        for (let at = element; at; at = at.parentElement) {
            const colour = getComputedStyle(at).backgroundColor, [, , , alpha = 1] = numbers(colour);
            if (alpha === 1) return colour;
        }
    };
    const isHidden = (e) => !e.checkVisibility() || e.closest(".later, :disabled, label:has(:disabled), noscript");
    const saysSomething = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    const texts = [...document.querySelectorAll("body *")].filter(saysSomething);
    const ratios = texts.filter((e) => !isHidden(e) && !e.matches("script, option")).map((e) => {
        const style = getComputedStyle(e);
        const [a, b] = [luminance(e.closest("svg") ? style.fill : style.color), luminance(behind(e))].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
    });
    return Math.min(...ratios);
})()"""
