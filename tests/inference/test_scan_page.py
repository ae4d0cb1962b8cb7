"""The page of predicted scans: what its voxels lose, and, in a browser, that they lie where they should, that tables
sort, planes move, and windows and evidence change what is drawn."""

import io
from functools import partial

import numpy as np
import pytest
import torch
from helpers_browser import open_browser, watched_page
from helpers_data import chest, write
from helpers_maps import cylinder, maps_of, page_blocks, within
from helpers_training import one_line
from PIL import Image

import run_task2
from ctclip.data.hounsfield import HU_MAX, HU_MIN
from ctclip.inference import scan_page
from ctclip.inference.decisions import Decision
from ctclip.inference.scan_page import HU_OF_LEVEL, MOST_BYTES, PageFacts, ScanPage, encode, foremost, levels_of

HOSTILE = "</script><img src=x onerror=alert(1)>"
SHAPE = (20, 30, 36)  # of the model's cube: z, x, y
DECISIONS = [
    [("Cardiomegaly", 0.8, 0.5), ("Lung nodule", 0.7, 0.2), ("Emphysema", 0.1, 0.4)],
    [("Cardiomegaly", 0.3, 0.5), ("Lung nodule", 0.1, 0.2), ("Emphysema", 0.3, 0.4)],
    [("Cardiomegaly", 0.9, 0.5), ("Lung nodule", 0.1, 0.2), ("Emphysema", 0.2, 0.4)],
]


def whole(shape):
    return [(0, size) for size in shape]


# ------------------------------------------------------------------------------------------------------------- voxels


def test_each_hu_is_kept_within_half_a_step():
    hu = np.arange(HU_MIN, HU_MAX + 1)
    voxels = torch.from_numpy(hu[:, None, None] / 1000).float()[None, None]
    kept = HU_OF_LEVEL[levels_of(voxels, whole(voxels.shape[2:]))].ravel()[::-1]
    lost = np.abs(kept - hu)
    soft = (hu >= -160) & (hu <= 240)
    assert lost[soft].max() <= 1.6 + 1e-4 and lost[hu < -160].max() <= 6 + 1e-4 and lost.max() <= 6.4


def test_slices_are_kept_without_loss_where_they_fit_and_as_the_best_jpeg_that_fits_else():
    levels = np.random.default_rng(0).integers(60, 160, (6, 64, 64)).astype(np.uint8)
    exact = encode(levels)
    assert exact.mime == "image/png" and set(exact.error.values()) == {0}
    np.testing.assert_array_equal([np.asarray(Image.open(io.BytesIO(file))) for file in exact.files], levels)
    sizes = []
    for most in (18_000, 9_000):
        images = encode(levels, most)
        sizes.append(sum(map(len, images.files)))
        assert images.mime == "image/jpeg" and sizes[-1] <= most and len(images.files) == 6
        assert images.error["soft tissue"] > 0
    assert sizes[0] > 9_000


def test_a_scan_of_noise_at_the_published_size_fits_as_well():
    """Nothing compresses worse; a real one of that size is stored at the first quality."""
    levels = np.random.default_rng(0).integers(0, 256, (8, 480, 480)).astype(np.uint8)
    images = encode(levels, MOST_BYTES * len(levels) // 240)
    assert 4 / 3 * sum(map(len, images.files)) * 240 / len(levels) < 14e6


def test_findings_that_are_called_come_by_distance_from_the_cut_and_the_highest_without_cuts():
    rows = [Decision("a", 0.6, 0.5), Decision("b", 0.5, 0.1), Decision("c", 0.9, 0.95)]
    assert [d.finding for d in foremost(rows)] == ["b", "a"]
    bare = [Decision(name, p, None) for name, p in (("a", 0.1), ("b", 0.4), ("c", 0.3), ("d", 0.2))]
    assert [d.finding for d in foremost(bare)] == ["b", "c", "d"]


# ----------------------------------------------------------------------------------------------------------- the page


def voxels_of(seed: int) -> torch.Tensor:
    """A body whose every voxel differs a little, with one bright voxel off every middle."""
    volume = cylinder(SHAPE)
    volume += torch.from_numpy(np.random.default_rng(seed).uniform(-0.03, 0.03, volume.shape)).float()
    volume[0, 0, 4, 21, 9] = 0.9
    return volume.clamp(-1, 1)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Three scans: two with evidence, one stored as JPEG and with none."""
    path = tmp_path_factory.mktemp("page") / "answers.html"
    values = np.zeros((3, 5, 6, 6), np.float32)
    values[0, 1, 4, 2], values[1, 3, 1, 4], values[2, 2, 2, 2] = 1, 0.5, 0.2
    placement = within((0.0, 0.8), shape=(60, 72, 40))
    with ScanPage(path) as page:
        for number, (name, decisions) in enumerate(zip((HOSTILE, "b.nii.gz", "a.nii.gz"), DECISIONS, strict=True)):
            maps = maps_of(values, decisions, placement, voxels_of(number), name)
            with pytest.MonkeyPatch.context() as patch:
                if number == 2:
                    patch.setattr(scan_page, "encode", partial(encode, most_bytes=9_000))
                page.add(name, placement, maps.voxels, maps.decisions, None if number == 2 else maps,
                         "little lung" if number == 1 else "")  # fmt: skip
        size = page.finish(PageFacts([("Model", HOSTILE)], "Synthetic", [("c.mha", HOSTILE)], "answers.csv"))
    assert size == path.stat().st_size and [file.name for file in path.parent.iterdir()] == ["answers.html"]
    return path


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(browser, path):
    with watched_page(browser, path) as page:
        yield page


@pytest.fixture
def opened(page):
    """The page with the first scan open, as it opens."""
    page.goto(f"{page.url.split('#')[0]}#")
    page.locator("tr[data-scan='0'] button").click()
    page.wait_for_selector("#viewer[aria-busy=false]")
    settle(page)
    return page


def settle(page):
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))")


def pixels(page, plane=0):
    settle(page)
    return page.evaluate("""plane => {
      const canvas = document.querySelectorAll("canvas")[plane];
      const data = new Uint32Array(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer);
      return data.reduce((sum, value) => (31 * sum + value) % 1e9, 0);
    }""", plane)


def place(page):
    return page.evaluate("scan.at")


def rows_of(page):
    return page.locator("tbody th").all_inner_texts()


def test_opens_quietly_and_names_stay_text(page, path):
    assert page.seen == [path.as_uri()]  # one request, no console message, no error, no dialog
    assert page.locator("img").count() == 0
    assert rows_of(page) == [HOSTILE, "b.nii.gz", "a.nii.gz"]
    assert page.locator(".failures").inner_text() == f"c.mha: {HOSTILE}"
    assert page.locator("td.warning").all_inner_texts() == ["", "little lung", ""]
    assert page.locator("tr[data-scan='1'] li").all_inner_texts() == ["none called"]
    assert page.locator("tr[data-scan='0'] li").all_inner_texts() == ["Lung nodule 0.70", "Cardiomegaly 0.80"]


def test_rows_sort_and_a_column_is_chosen(page):
    def sort(key):
        page.locator(f"th[data-order={key}] button").click()
        return [rows_of(page).index(name) for name in (HOSTILE, "b.nii.gz", "a.nii.gz")]

    assert sort("name") == [0, 2, 1] and sort("name") == [2, 0, 1]
    assert sort("called") == [0, 2, 1]
    assert sort("finding") == [1, 2, 0]  # Cardiomegaly 0.8, 0.3, 0.9
    assert page.locator("td.chosen").all_inner_texts() == ["0.90", "0.80", "0.30"]
    page.locator("#finding").select_option(label="Emphysema")  # 0.1, 0.3, 0.2: still sorted by the column
    assert page.locator("td.chosen").all_inner_texts() == ["0.30", "0.20", "0.10"]
    assert page.locator("th[aria-sort=descending]").inner_text() == "Emphysema"


@pytest.mark.parametrize("number", [0, 2])
def test_voxels_arrive_where_they_are(page, number):
    """Exactly, turned to (z from the head, y, x) and cut at the scan's end, at 0.8 of the cube; as JPEG as Pillow
    decodes them."""
    page.goto(f"{page.url.split('#')[0]}#scan-{number}")
    page.wait_for_selector("#viewer[aria-busy=false]")
    seen = np.array(page.evaluate("[...scan.levels]"))
    levels = levels_of(voxels_of(number), [(0, 16), (0, 30), (0, 36)])
    assert page.evaluate("scan.data.shape") == list(levels.shape) == [16, 36, 30]
    if number == 2:
        files = encode(levels, 9_000).files
        decoded = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
        assert np.abs(seen - decoded.ravel().astype(int)).max() <= 1
        assert "as JPEG: 95 % of voxels are off by at most" in page.locator("#fidelity").inner_text()
        return
    np.testing.assert_array_equal(seen, levels.ravel())
    assert HU_OF_LEVEL[seen.max()] == pytest.approx(900, abs=6.4)
    assert np.unravel_index(seen.argmax(), levels.shape) == (11, 9, 21)  # z 4 of 0 to 15 upwards


def test_a_scan_opens_at_the_strongest_evidence_of_what_is_called(opened):
    """Lung nodule, the farthest from its cut: token (3, 1, 4) of (5, 6, 6), z upwards; the cube has 20 x 30 x 36."""
    assert opened.locator("#findings button").first.get_attribute("aria-pressed") == "true"
    assert opened.locator("#findings .label").all_inner_texts() == ["Lung nodule", "Cardiomegaly", "Emphysema"]
    assert opened.locator("#findings .told").first.inner_text() == "0.70, cut 0.20"
    assert place(opened) == [2, 27, 7]  # z: (1 - 3.5 / 5) * 20 from the head of the cube, whose upper 4 are empty
    assert "mm below the top of the scan" in opened.locator("#words").inner_text()
    assert opened.locator("#windows [aria-pressed=true]").inner_text().startswith("Lung")
    opened.locator("#findings button", has_text="Cardiomegaly").click()
    assert place(opened) == [10, 15, 22]
    assert opened.locator("#windows [aria-pressed=true]").inner_text().startswith("Mediastinum")


def test_slices_are_counted_as_viewers_count(opened):
    """The file's own 40 slices over 0.8 of the cube, of which the model sees 16."""
    assert opened.locator(".place").first.inner_text() == "slice 7 of 40, 45 mm below the top"
    assert opened.locator(".place").nth(2).inner_text() == "slice 15 of 60, 90 mm from the right"


def test_wheel_keys_and_sliders_move_a_plane(opened):
    before, image = place(opened), pixels(opened)
    opened.locator("canvas").first.hover()
    opened.mouse.wheel(0, 100)
    settle(opened)
    assert place(opened) == [before[0] + 2, *before[1:]] and pixels(opened) != image
    opened.keyboard.press("ArrowUp")
    opened.keyboard.press("ArrowUp")
    assert place(opened) == before and pixels(opened) == image
    opened.locator("canvas").nth(1).focus()
    opened.keyboard.press("ArrowDown")
    assert place(opened) == [before[0], before[1] + 1, before[2]]
    opened.keyboard.press("Home")
    assert place(opened)[1] == 0
    opened.locator("input[aria-label='Sagittal slice']").fill("3")
    assert place(opened) == [before[0], 0, 3]


def test_windows_evidence_opacity_and_lines_change_what_is_drawn(opened):
    plain, seen = pixels(opened), set()
    for key in "234":
        opened.keyboard.press(key)
        seen.add(pixels(opened))
    assert len(seen | {plain}) == 4
    opened.keyboard.press("1")
    assert pixels(opened) == plain
    for key in "ox":
        opened.keyboard.press(key)
        assert pixels(opened) != plain
        opened.keyboard.press(key)
        assert pixels(opened) == plain
    assert opened.locator("#overlay").is_checked()
    opened.locator("#opacity").fill("20")
    assert pixels(opened) != plain


def test_a_click_moves_the_other_planes(opened):
    before, others = place(opened), [pixels(opened, plane) for plane in (1, 2)]
    box = opened.locator("canvas").first.bounding_box()
    opened.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2 + 4)
    assert place(opened) == [before[0], 18, 15]
    assert all(pixels(opened, plane) != other for plane, other in zip((1, 2), others, strict=True))


def test_neighbours_without_evidence_and_the_way_back(opened):
    opened.locator("#previous:enabled, #next:enabled").first.click()
    opened.wait_for_selector("#viewer[aria-busy=false]")
    assert opened.locator("#name").inner_text() in ("b.nii.gz", "a.nii.gz")
    opened.goto(f"{opened.url.split('#')[0]}#scan-2")
    opened.wait_for_selector("#viewer[aria-busy=false]")
    assert opened.locator("#words").inner_text() == scan_page.NO_MAPS and not opened.locator(".legend").is_visible()
    opened.keyboard.press("Escape")
    opened.wait_for_selector("#list:visible")
    assert opened.locator("#viewer").is_hidden()
    assert opened.evaluate("document.activeElement.textContent") == "a.nii.gz"
    assert [text for text in opened.seen if "://" not in text] == []


def test_a_narrow_window_shows_one_plane_and_a_finger_moves_it(browser, path):
    context = browser.new_context(viewport={"width": 390, "height": 800}, has_touch=True)
    page = context.new_page()
    page.goto(path.as_uri())
    called = page.locator("tr[data-scan='0'] li").last.bounding_box()
    assert called["x"] + called["width"] <= 390 and page.evaluate("document.documentElement.scrollWidth") <= 390
    page.goto(f"{path.as_uri()}#scan-0")
    page.wait_for_selector("#viewer[aria-busy=false]")
    visible = [canvas.is_visible() for canvas in page.locator("canvas").all()]
    assert visible == [True, False, False]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#layout button", has_text="Coronal").click()
    assert [canvas.is_visible() for canvas in page.locator("canvas").all()] == [False, True, False]
    before = place(page)
    box = page.locator("canvas").nth(1).bounding_box()
    x, y = box["x"] + 100, box["y"] + 200
    session = context.new_cdp_session(page)
    for kind, points in (("touchStart", [(x, y)]), ("touchMove", [(x, y - 60)]), ("touchEnd", [])):
        touches = [{"x": a, "y": b} for a, b in points]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})
    assert place(page) == [before[0], before[1] - 9, before[2]]  # a quarter of 36 slices
    context.close()


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    for name in "ab":
        write(folder / f"{name}.nii.gz", chest())
    return folder


def predict(*flags) -> int:
    return run_task2.main(["--mode", "predict", "--device", "cpu", *map(str, flags)])


def test_the_command_writes_the_page_and_its_table(scans, tiny_classfine, tmp_path, capsys):
    out = tmp_path / "out" / "answers.html"
    flags = ["--checkpoint", tiny_classfine, "--input", scans, "--output", out]
    assert predict(*flags, "--explain", "Emphysema") == 0
    printed = capsys.readouterr().out
    assert f"Wrote {out}: 2 scans, " in printed and f"Wrote {out.with_suffix('.csv')}: 2 scans" in printed
    assert "4 files" not in printed and "8 files of heat maps" in printed  # two scans, the finding that is named
    told = page_blocks(out)
    assert [block["name"] for block in told] == ["a.nii.gz", "b.nii.gz"]
    assert len(told[0]["findings"]) == 18 and all("words" in finding for finding in told[0]["findings"])
    assert 'href="answers.csv"' in out.read_text() and "uncalibrated probabilities" in out.read_text()
    assert predict(*flags) == 0, "a page of an earlier command is replaced"


def test_what_is_not_a_page_of_ours_stays(scans, tiny_classfine, tmp_path, capsys):
    flags = ["--checkpoint", tiny_classfine, "--input", scans, "--output"]
    mine = tmp_path / "mine.html"
    for own, content in ((mine, "<p>mine</p>"), (tmp_path / "mine.csv", "name,grade\nx,1\n")):
        own.write_text(content)
        assert predict(*flags, mine) == 2
        err = capsys.readouterr().err
        assert f"{own}: found a file that this command did not write" in err and one_line(err)
        assert own.read_text() == content
        own.unlink()
    assert predict(*flags, mine, "--map-thresholds") == 2
    assert "found --map-thresholds, which goes with" in capsys.readouterr().err and not list(tmp_path.iterdir())
