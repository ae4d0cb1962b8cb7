"""An evaluation's report: the same values as text, Markdown and HTML; the page's slider against compute_metrics; its
markup through an HTML parser, with names that try to be markup; its behaviour in a headless Chromium, where there is
one.
"""

import base64
import dataclasses
import io
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers_browser import open_browser, watched_page
from helpers_evaluation import simulate

from ctclip.config import PHANTOM_ENCODER_NOTE, SYNTHETIC_NOTE
from ctclip.data.windows import SOFT_TISSUE_WINDOW
from ctclip.evaluation import render
from ctclip.evaluation.case_slices import Slice
from ctclip.evaluation.cases import Case, Picture
from ctclip.evaluation.evaluate import Settings, evaluate_tables
from ctclip.evaluation.figures import MOST_POINTS, new_figure, svg, thinned
from ctclip.evaluation.metrics import compute_metrics, per_label_metrics
from ctclip.evaluation.render import format_report, markdown, write_page
from ctclip.evaluation.report import Figure, Paragraph, Table, Value, figure_sections, report_sections
from ctclip.evaluation.run_folder import encoder_note
from ctclip.evaluation.summary import format_summary
from ctclip.evaluation.tables import EvaluationInputs, VolumeTable, as_table
from ctclip_model import ABNORMALITIES

HOSTILE = """<img src=x onerror=alert(1)>"'&.nii.gz"""
BREAKOUT = "</script></title><script>alert(2)</script>"
ONE_CLASS = "Hiatal hernia"  # without positives
LABEL = 9
STOPS = (0, 27, 60, 100, 101, 162, 200)  # of the slider, in steps of 0.005
KEYS = ("positive_rate", "hamming_accuracy", "f1_macro", "precision_macro", "recall_macro", "crg")
RECORD = {"config": {"model": "ctclip", BREAKOUT: BREAKOUT, "data_dir": "/secret/place"},
          "data_dir": f"/data/{HOSTILE}", "device": "cpu", "volumes": {"train": 3}, "versions": {"torch": "2"}}
MOVE = """stops => stops.map(k => {
  const slider = document.getElementById("threshold");
  slider.value = k;
  slider.dispatchEvent(new Event("input"));
  const shown = [...document.querySelectorAll("#sweep dd")].map(e => [e.dataset.value, e.textContent]);
  return [Object.fromEntries(shown), document.querySelector("[data-value=threshold]").textContent];
})"""
BESIDE = {"metrics.json", "per_label.csv", "calibration.json"}  # of the page: made before it
HISTORY = [
    {"epoch": 1, "stage": "frozen", "train_loss": 0.5, "tuning_loss": float("inf"), "tuning_auroc_macro": 0.6,
     "positive_rate": 0.9, "label_rate": 0.2, "best": True},
    {"epoch": 2, "stage": "open", "train_loss": 0.4, "tuning_loss": 0.5, "tuning_auroc_macro": None,
     "positive_rate": 0.5, "label_rate": 0.2, "best": False},
]


@pytest.fixture(scope="module")
def evaluation():
    """120 volumes; a third of the probabilities lie on the slider's stops, one label has no positives."""
    predictions, labels = simulate(60, seed=0, shift=1.0)
    baseline, _ = simulate(60, seed=1)
    predictions.iloc[::3] = (200 * predictions.iloc[::3]).round() / 200
    labels[ONE_CLASS] = 0
    tables = [table.rename(index={predictions.index[0]: HOSTILE}) for table in (predictions, labels, baseline)]
    sexes = {name: {"PatientSex": "FM"[i % 2], "Manufacturer": HOSTILE if i < 90 else "rare"}
             for i, name in enumerate(tables[0].index)}
    tuning = tuple(VolumeTable(frame) for frame in simulate(40, seed=2, shift=1.0, split="train"))
    this, other = ({"config": {"head": head, "epochs": 5, "cache_dir": head, "augment": head == BREAKOUT,
                               "data_dir": f"/secret/place/{len(head)}"}} for head in ("mlp", BREAKOUT))
    inputs = EvaluationInputs(VolumeTable(tables[0], "results/mine/predictions.csv"), VolumeTable(tables[1]), tuning,
                              note=BREAKOUT, record=this)
    return evaluate_tables(inputs, Settings(resamples=50), VolumeTable(tables[2], f"b/{BREAKOUT}"), sexes, other)


@pytest.fixture(scope="module")
def path(evaluation, tmp_path_factory):
    from PIL import Image

    jpeg = io.BytesIO()
    Image.new("L", (40, 20), 128).save(jpeg, "JPEG")
    content = jpeg.getvalue()
    slices = Slice("Axial", content, (200, 400), (0.25, 0.5)), Slice("Coronal", content, (400, 400), None)
    picture = Picture(slices, SOFT_TISSUE_WINDOW, "through the strongest evidence (ring)", f"python '{HOSTILE}'")
    cases = [Case("Lung nodule", "false negative", HOSTILE, 0.1, 0.4, picture),
             Case("Lung nodule", "false positive", "valid_2_a_1.nii.gz", 0.9, 0.4)]
    path = tmp_path_factory.mktemp("page") / "report.html"
    for name in BESIDE:
        (path.parent / name).touch()
    write(path, evaluation, HISTORY, RECORD, cases)
    return path


def write(path, evaluation, *rest):
    write_page(path, evaluation.metrics, *arrays_of(evaluation), *rest)


def arrays_of(evaluation):
    return evaluation.rows.labels, evaluation.rows.probabilities, evaluation.fitted.calibrated


class Parsed(HTMLParser):
    """Elements as (tag, attributes), and all text outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.inside = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        self.text += data if self.inside not in ("script", "style") else ""


@pytest.fixture(scope="module")
def parsed(path):
    return Parsed(path.read_text(encoding="utf-8"))


def probabilities(evaluation, source):
    return evaluation.rows.probabilities if source == "uncalibrated" else evaluation.fitted.calibrated


# ----------------------------------------------------------------------------------------------------- three renderings


def cells(section):
    """Every value of a section's tables."""
    tables = [block for block in section.blocks if isinstance(block, Table)]
    return [cell for table in tables for row in table.rows for cell in row if cell]


def plain(text):
    """Text of a page or a card as the report's cells have it."""
    for shown, written in (("\N{EN DASH}", "-"), ("\N{MINUS SIGN}", "-"), ("\N{RIGHTWARDS ARROW}", "->"),
                           ("&lt;", "<"), ("&amp;", "&"), ("\\|", "|")):
        text = text.replace(shown, written)
    return re.sub(r"\s+", " ", text)


def test_the_same_values_in_text_markdown_and_page(evaluation, parsed):
    sections = report_sections(evaluation.metrics)
    assert {"data", "comparison", "thresholds", "per_label", "calibration", "subgroups", "baseline", "criteria"} \
        <= set(sections)
    text, page = plain(format_report(evaluation.metrics)), plain(parsed.text)
    for key, section in sections.items():
        card, values = plain(markdown(section.blocks)), cells(section)
        assert len(values) > 5 or key == "limits"  # which has no table
        for cell in values:
            figure, interval = (cell.text, cell.interval) if isinstance(cell, Value) else (cell, "")
            both = f"{figure} ({interval})" if interval else figure
            assert plain(both) in card
            if key != "headline":
                assert plain(both) in text or len(both) > 60  # wrapped
            if key != "threshold_table":  # the page has the slider
                assert plain(figure) in page and interval in page
        for block in section.blocks:
            if isinstance(block, Paragraph) and key != "threshold_table":
                assert plain(block.text) in page


def test_text_repeats_names_where_columns_do_not_fit():
    table = Table("t", ["Name", *(f"number {i}" for i in range(30))], [("group",), ("a", *map(str, range(30)))])
    lines = render._table_text(table)
    assert max(map(len, lines)) <= 100 and sum(line.startswith("  a ") for line in lines) > 1
    numbers = [int(word) for line in lines if line.startswith("  a ") for word in line.split()[1:]]
    assert numbers == list(range(30))


def test_markdown_shows_markup_as_text():
    text = markdown([Paragraph(f"{BREAKOUT} | x"), Table("t", ("a", "b"), [(BREAKOUT, "1|2\n3")])])
    assert "<" not in text and "1\\|2 3" in text and text.count("\n") == 4


def test_drawings_are_the_same_each_time(evaluation):
    first, second = (figure_sections(evaluation.metrics, *arrays_of(evaluation), HISTORY) for _ in range(2))
    drawings = [panel.svgs for section in first.values() for block in section.blocks if isinstance(block, Figure)
                for panel in block.panels]
    assert first == second and len(drawings) == 4 * 18 + 2 + 3 + 2
    figure = new_figure(1, 1)
    figure.subplots().set_title("<b>&")
    figure.axes[0].set(xlim=(0.12, 0.34), xticks=(0.123, 0.333), yticks=())
    drawing = svg(figure, "")
    assert "&lt;b&gt;&amp;" in drawing  # and numbers that are read keep their digits
    assert [text for text in re.findall(r">([^<>]+)</text>", drawing) if "b" not in text] == ["0.123", "0.333"]


# ---------------------------------------------------------------------------------------------------- without a browser


def test_names_stay_text(parsed):
    """Names that try to be markup are shown as they are; nothing in the page runs but its own script."""
    assert parsed.text.count(HOSTILE) >= 3  # data folder, subgroup, case
    assert parsed.text.count(BREAKOUT) >= 4  # note, baseline, configuration: name and value
    assert sum(tag == "script" for tag, _ in parsed.elements) == 2
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    assert "/secret/place" not in parsed.text
    alts = [attributes["alt"] for tag, attributes in parsed.elements if tag == "img"]
    assert alts == [f"{plane} slice of {HOSTILE}" for plane in ("Axial", "Coronal")]


def test_nothing_is_fetched(parsed, path):
    links = [attributes[key] for _, attributes in parsed.elements for key in ("src", "href") if key in attributes]
    assert len(links) > 10 and {link for link in links if not link.startswith(("#", "data:"))} == BESIDE
    assert not re.search(r"@import|url\(", path.read_text(encoding="utf-8"))
    policy = next(a["content"] for tag, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "img-src data:" in policy
    targets = {a["id"] for _, a in parsed.elements if "id" in a}
    assert {link[1:] for link in links if link.startswith("#")} <= targets


@pytest.mark.parametrize("source", ["uncalibrated", "calibrated"])
def test_slider_data_is_compute_metrics(evaluation, path, source):
    text = path.read_text(encoding="utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])
    assert data["labels"] == list(ABNORMALITIES) and data["metrics"] == list(KEYS)
    unpacked = zlib.decompress(base64.b64decode(data["values"][source]))
    values = np.frombuffer(unpacked, "<u2").reshape(len(KEYS), 19, data["stops"])
    assert data["stops"] == 201
    for k in range(0, 201, 7):
        for label in (None, LABEL, ABNORMALITIES.index(ONE_CLASS)):
            expected = metrics_at(evaluation.rows.labels, probabilities(evaluation, source), k / 200, label)
            shown = values[:, 0 if label is None else label + 1, k]
            for key, value in zip(KEYS, shown, strict=True):
                if expected[key] is None:
                    assert value == data["undefined"]
                else:
                    assert value / 10_000 == pytest.approx(expected[key], abs=5e-5 + 1e-12)


def test_undefined_is_said(path, parsed):
    text = path.read_text(encoding="utf-8")
    found = re.findall(rf'<th scope="row">{ONE_CLASS}</th>(.*?)</tr>', text)
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in found]
    undefined = rows[0][0], rows[1][4], rows[3][0]  # difference from the baseline, AUROC, average precision
    assert set(undefined) == {"undefined"}
    assert text.count("undefined: only one class") == 4  # ROC and precision-recall, seen and heard; not reliability
    assert text.count('<p class="nothing">') == 3 and "mean of 17 labels" in parsed.text
    assert re.search(r"rare15too few patients", parsed.text)
    assert f"No AUROC, only one class here: {ONE_CLASS}" in parsed.text


def test_blocks_come_and_go(evaluation, path, tmp_path):
    optional = {"training", "subgroups", "baseline", "cases"}
    full = path.read_text(encoding="utf-8")
    assert optional <= set(re.findall(r'<section id="(\w+)"', full)) and SYNTHETIC_NOTE not in full
    bare = evaluation.metrics | {"subgroups": None, "baseline": None, "phantom": True, "note": SYNTHETIC_NOTE}
    write(tmp_path / "bare.html", dataclasses.replace(evaluation, metrics=bare), None, {}, [])
    text = (tmp_path / "bare.html").read_text(encoding="utf-8")
    sections = re.findall(r'<section id="(\w+)"', text)
    assert not optional & set(sections) and len(sections) == 16
    assert re.findall(r'<li><a href="#(\w+)"', text) == sections
    assert f'<p class="note">{SYNTHETIC_NOTE}</p>' in text and "Research use only." in text
    assert "{{" not in text and [file.name for file in tmp_path.iterdir()] == ["bare.html"]


def test_files_are_linked_where_they_are_and_crg_is_explained_before_its_first_value(path):
    text = path.read_text(encoding="utf-8")
    assert set(re.findall(r'href="(\w+\.\w+)"', text[text.index('<section id="files"'):])) == BESIDE
    headings = dict(re.findall(r'<h2>([\w ]+)<a class="file" href="([\w.]+)"', text))
    assert headings == {"Headline results": "metrics.json", "Per label": "per_label.csv",
                        "Optimal threshold": "calibration.json", "Calibration": "calibration.json"}
    main = text[text.index("<main>"):]
    assert main.index("CRG is the score of the challenge") < main.index("CRG, tuned")
    assert re.findall(r'<section id="(\w+)"', text)[:3] == ["headline", "criteria", "baseline"]


def test_a_comparison_names_what_differs_and_draws_the_differences_in_order(evaluation):
    base = evaluation.metrics["baseline"]
    assert base["settings"] == {"run": ["mine", Path(f"b/{BREAKOUT}").parent.name], "--head": ["mlp", BREAKOUT],
                                "--augment": ["off", "on"], "--data-dir": ["3", str(len(BREAKOUT))]}
    section = figure_sections(evaluation.metrics, *arrays_of(evaluation), HISTORY)["baseline"]
    settings, _, figure, _, per_label = section.blocks
    assert settings.columns == ("", "Baseline", "This") and ("--head", BREAKOUT, "mlp") in settings.rows
    found = {name: row["difference"] for name, row in base["differences"]["per_label"]["auroc"].items()}
    order = [name for name, *_ in per_label.rows]
    known = sorted((name for name in found if found[name] is not None), key=lambda name: -found[name])
    assert 5 < len(known) < 18 and order[: len(known)] == known and set(order) == set(ABNORMALITIES)
    auroc, f1 = (re.findall(r">([^<>]+)</text>", panel.svgs[0]) for panel in figure.panels)
    assert [text for text in auroc if text in ABNORMALITIES] in (known, known[::-1])
    assert "All labels (macro)" in f1


def test_runs_alike_are_said_to_be(evaluation):
    base = evaluation.metrics["baseline"] | {"settings": {"run": ["a", "b"]}}
    text = format_report(evaluation.metrics | {"baseline": base})
    assert "Both runs were trained with the same flags." in text
    del base["settings"]  # of an earlier version, or no run's
    assert "same flags" not in format_report(evaluation.metrics | {"baseline": base})


def test_curves_are_thinned_not_moved():
    x = np.sort(np.random.default_rng(0).random(2000))
    a, b = thinned(x, x**2)
    assert len(a) <= MOST_POINTS and (a[0], a[-1]) == (x[0], x[-1]) and np.array_equal(b, a**2)
    assert np.isin(a, x).all() and np.diff(a).max() < 0.02


# -------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(browser, path):
    with watched_page(browser, path) as page:
        yield page


def test_opens_quietly(page, path):
    assert page.seen == [path.as_uri()]  # one request, no console message, no error, no dialog
    assert page.locator("img[src=x]").count() == 0
    assert page.locator("code", has_text=HOSTILE).count() == 2  # its name and its command


@pytest.mark.parametrize("source", ["uncalibrated", "calibrated"])
@pytest.mark.parametrize("label", [None, LABEL, ABNORMALITIES.index(ONE_CLASS)])
def test_slider_shows_compute_metrics(page, evaluation, source, label):
    page.locator(f"[value={source}]").check()
    page.locator("#label").select_option(str(0 if label is None else label + 1))
    for k, (shown, line) in zip(STOPS, page.evaluate(MOVE, STOPS), strict=True):
        expected = metrics_at(evaluation.rows.labels, probabilities(evaluation, source), k / 200, label)
        assert list(shown) == list(KEYS)
        for key in KEYS:
            if expected[key] is None:
                assert shown[key] == "undefined"
            elif key == "positive_rate":
                assert float(shown[key].removesuffix(" %")) == pytest.approx(100 * expected[key], abs=0.05 + 1e-9)
            else:
                assert float(shown[key]) == pytest.approx(expected[key], abs=5e-5 + 1e-9)
        assert line == f"threshold {k / 200:.3f}"


def metrics_at(labels, p, cut, label):
    """compute_metrics, or the same of one label alone."""
    if label is None:
        return compute_metrics(labels, p, cut)
    row = per_label_metrics(labels, p, cut)[ABNORMALITIES[label]]
    y, called, n = labels[:, label], p[:, label] >= cut, len(labels)
    a, tp, fp = y.sum(), (called & (y == 1)).sum(), (called & (y == 0)).sum()
    crg = None
    if 0 < a < n:
        r, u = (n - a) / (2 * a), (n - a) / 2
        crg = u / (2 * u - (r * tp - r * (a - tp) - fp))
    return {"positive_rate": row["positive_rate"], "hamming_accuracy": row["accuracy"], "f1_macro": row["f1"],
            "precision_macro": row["precision"], "recall_macro": row["recall"], "crg": crg}


def test_slider_by_keyboard(page):
    page.locator("#threshold").fill("100")
    page.locator("#threshold").press("ArrowRight")
    assert page.locator("[data-value=threshold]").text_content() == "threshold 0.505"


def test_curves_follow_the_choice(page, evaluation):
    """Each rendering's curve lies where its axes have the value."""
    page.locator("[value=calibrated]").check()
    page.locator("#label").select_option(str(LABEL + 1))
    paths = page.evaluate("""[...document.querySelectorAll("[data-curve=recall_macro] path")].map(
        path => [path.closest("svg").dataset.axes, path.getAttribute("d")])""")
    expected = [metrics_at(evaluation.rows.labels, evaluation.fitted.calibrated, k / 200, LABEL)["recall_macro"]
                for k in range(201)]
    assert len(paths) == 2  # wide and narrow
    for axes, path in paths:
        left, top, right, bottom = map(float, axes.split())
        x, y = np.array([list(map(float, point.split())) for point in path[1:].split("L")]).T
        np.testing.assert_allclose((x - left) / (right - left), np.arange(201) / 200, atol=1e-3)
        np.testing.assert_allclose((bottom - y) / (bottom - top), expected, atol=1e-3)


def test_headings_sort(page, evaluation):
    rows = page.locator("#per_label tbody th")
    head = page.locator("#per_label thead th").nth(5)
    auroc = {name: row["auroc"] for name, row in evaluation.metrics["per_label"].items()}
    defined = [name for name in ABNORMALITIES if auroc[name] is not None]
    by_auroc = sorted(defined, key=lambda name: round(auroc[name], 3))
    assert rows.all_text_contents() == list(ABNORMALITIES) and head.get_attribute("aria-sort") == "none"
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    shown = rows.all_text_contents()
    assert [round(auroc[n], 3) for n in shown[:-1]] == [round(auroc[n], 3) for n in by_auroc[::-1]]
    assert shown[-1] == ONE_CLASS  # undefined is last either way
    head.locator("button").press("Enter")
    assert head.get_attribute("aria-sort") == "ascending" and rows.all_text_contents() == [*by_auroc, ONE_CLASS]
    name = page.locator("#per_label thead th").first
    name.locator("button").press("Enter")
    assert rows.all_text_contents() == sorted(ABNORMALITIES, key=str.lower)
    assert (name.get_attribute("aria-sort"), head.get_attribute("aria-sort")) == ("ascending", "none")
    name.locator("button").click()
    name.locator("button").click()
    assert rows.all_text_contents() == list(ABNORMALITIES)


def test_fits_a_phone_in_light_and_dark(browser, path):
    papers = set()
    for scheme in ("light", "dark"):
        page = browser.new_page(viewport={"width": 360, "height": 800}, color_scheme=scheme)
        page.goto(path.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.close()
    assert len(papers) == 2


CONTENTS = """() => {
  const {top, bottom} = document.querySelector("nav").getBoundingClientRect();
  return [top >= 0 && bottom <= innerHeight, document.querySelector("nav details").open,
          [...document.querySelectorAll("nav [aria-current]")].map(link => link.textContent)];
}"""


@pytest.mark.parametrize(("width", "is_open"), [(1280, True), (390, False)])
def test_contents_stay_in_view_and_mark_the_section(browser, path, width, is_open):
    page = browser.new_page(viewport={"width": width, "height": 800}, reduced_motion="reduce")
    page.goto(path.as_uri())
    assert page.evaluate(CONTENTS)[1:] == [is_open, ["Headline results"]]
    for key, title in (("per_label", "Per label"), ("cases", "Worst errors")):
        if not is_open:
            page.locator("nav summary").click()
        page.locator(f"nav [href='#{key}']").click()
        page.locator(f"nav [aria-current][href='#{key}']").wait_for(state="attached")
        assert page.evaluate(CONTENTS) == [True, is_open, [title]]  # a choice folds the menu again
        below = page.locator("nav").bounding_box()["height"] if not is_open else 0
        assert page.locator(f"#{key} h2").bounding_box()["y"] >= below  # and hides no heading
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    page.close()


def test_a_click_enlarges_a_slice_and_puts_it_back(page):
    page.locator("#cases > details > summary").first.click()
    first, second = page.locator(".slice summary > span").all()
    before = [each.bounding_box() for each in (first, second)]
    assert min(box["width"] for box in before) >= 380 and before[0]["y"] == before[1]["y"]
    ring = page.locator(".ring").bounding_box()
    assert ring["x"] + ring["width"] / 2 == pytest.approx(before[0]["x"] + before[0]["width"] / 4, abs=1)
    assert "Window: level 40, width 400 HU" in page.locator("#cases figcaption").inner_text()
    first.click()
    large = first.bounding_box()
    assert large["width"] > 1.5 * before[0]["width"] and large["y"] >= 0 and large["y"] + large["height"] <= 800
    page.keyboard.press("Escape")
    assert first.bounding_box() == before[0]
    first.click()
    first.click()
    assert first.bounding_box() == before[0]
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".slice[open]").count() == 0  # unfolding for paper enlarges nothing
    page.evaluate("dispatchEvent(new Event('afterprint'))")


def test_reads_without_script(browser, path):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(path.as_uri())
    assert page.locator("input, select, button").count() == 0
    assert page.locator("#per_label tbody tr").count() == 18 and page.locator("#sweep svg path").count() > 6
    context.close()


def test_results_of_an_encoder_trained_on_phantoms_say_so():
    predictions, labels = (as_table(table) for table in simulate(30, seed=0))
    record = {"phantom": False, "phantom_encoder": True}
    metrics = evaluate_tables(EvaluationInputs(predictions, labels, record=record), Settings(resamples=100)).metrics
    for text in (format_report(metrics), format_summary(metrics)):
        assert PHANTOM_ENCODER_NOTE in " ".join(text.split())
    assert encoder_note(record | {"phantom": True}) is None  # there the stronger note is said
