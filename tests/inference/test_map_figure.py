"""Pictures of maps: turned as radiologists look, by markers; coloured by the answer and never outside the body; what is
written on them. References: pixels and places known by construction."""

import numpy as np
import pytest
import torch
from helpers_maps import cube, cylinder, maps_of, within
from PIL import Image

from ctclip.data.windows import LUNG_WINDOW, SOFT_TISSUE_WINDOW, display_window
from ctclip.inference import map_figure
from ctclip.inference.map_figure import PLANES, map_picture, overview_picture, shown_box, title_of
from ctclip.inference.scan_maps import strongest_place
from ctclip_model import ABNORMALITIES

NAMES = [plane.name for plane in PLANES]


def slices_of(maps, label: int = 0, per_mm: float = 1.0) -> dict:
    """{name of a plane: its slice through the strongest evidence}"""
    place = strongest_place(maps, label)
    return {plane.name: map_figure._Slice(maps, plane, place[plane.axis], shown_box(maps), per_mm) for plane in PLANES}


@pytest.fixture
def texts(monkeypatch) -> list[str]:
    """Everything that is written on pictures, in order."""
    written: list[str] = []
    write, sign = map_figure._write, map_figure._sign
    monkeypatch.setattr(map_figure, "_write", lambda image, at, text, *rest, **bold: written.append(text)
                        or write(image, at, text, *rest, **bold))  # fmt: skip
    monkeypatch.setattr(map_figure, "_sign", lambda text, size: written.append(text) or sign(text, size))
    return written


def test_planes_are_turned_as_radiologists_look():
    """A marker at the patient's right, front and head, and the strongest token on it: on the left, at the top."""
    hu = cylinder((40, 60, 60))
    hu[0, 0, 30:35, 12:18, 12:18] = 1
    values = np.full((1, 8, 10, 10), -0.1)
    values[0, 6, 2, 2] = 2
    for name, each in slices_of(maps_of(values, voxels=hu)).items():
        plain = each.plain(SOFT_TISSUE_WINDOW).astype(int)
        evidence = each.evidence(0)
        for found in (plain == 255, evidence > 0.5):
            rows, columns = np.nonzero(found)
            assert rows.mean() < 0.35 * len(plain) and columns.mean() < 0.25 * plain.shape[1], name
            row, column = (each.pixel(axis, share) for axis, share in (
                (each.plane.rows, strongest_place(each.maps, 0)[each.plane.rows]),
                (each.plane.columns, strongest_place(each.maps, 0)[each.plane.columns])))  # fmt: skip
            assert abs(rows.mean() - row) < 9 and abs(columns.mean() - column) < 9, name
        assert plain.shape == evidence.shape == (len(each.rows), len(each.columns))


def test_all_panels_have_one_scale():
    box = shown_box(maps := maps_of(np.ones((1, 8, 10, 10)), placement=within((0.2, 0.7))))
    assert box[0] == pytest.approx((72, 252))  # all of the scan
    assert box[1] == box[2] == pytest.approx((0.125 * 360 - 6, 0.875 * 360 + 6))  # the body and a margin
    shapes = {name: each.plain(LUNG_WINDOW).shape[:2] for name, each in slices_of(maps, per_mm=0.5).items()}
    assert shapes == {"Axial": (141, 141), "Coronal": (90, 141), "Sagittal": (90, 141)}


def test_no_colour_outside_the_body_nor_of_what_speaks_against():
    values = np.full((1, 8, 10, 10), 3.0)
    values[0, :, :5] = -3
    maps = maps_of(values, (("Emphysema", 1.0, 0.5),))
    each = slices_of(maps)["Axial"]
    plain = each.plain(LUNG_WINDOW)
    changed = (each.overlaid(plain, 0) != plain[..., None]).any(-1)
    x, y = np.meshgrid(each.columns, each.rows)
    inside = (np.abs(x - 0.5) < 0.375) & (np.abs(y - 0.5) < 0.375)
    assert changed[inside & (x > 0.6) & (x < 0.8) & (np.abs(y - 0.5) < 0.3)].all()
    assert not changed[~inside].any() and not changed[x < 0.45].any()


def test_a_no_is_dim_and_a_yes_bright_whatever_the_evidence():
    """The brightest pixel lies below the middle of the scale, or above; without a threshold at its end."""
    values = np.zeros((3, 8, 10, 10))
    values[:, 4, 5, 5] = 0.2, 50, 1
    maps = maps_of(values, (("A", 0.9, 0.5), ("B", 0.1, 0.36), ("C", 0.1, None)))
    changes = []
    for label in range(3):
        each = slices_of(maps, label)["Axial"]
        plain = each.plain(SOFT_TISSUE_WINDOW)
        changes.append(np.abs(each.overlaid(plain, label).astype(int) - plain[..., None]).max())
    assert changes[0] > 100 and changes[1] == 0 and changes[2] > 100


def test_what_is_said_of_a_yes(texts):
    values = np.zeros((1, 8, 12, 12))
    values[0, 5, 8, 8] = 3
    maps = maps_of(values, (("Pleural effusion", 0.68, 0.36),), cube((95, 80, 70)), name="a/b")
    picture = map_picture(maps, 0, "a note")
    assert picture.size[0] == map_figure.WIDTH and picture.mode == "RGB"
    where = "on the patient's left, in the posterior third of the body, 112 mm below the top of the scan"
    assert texts[:4] == ["Pleural effusion: yes (0.68, cut 0.36)", "a/b",
                         f"Evidence for pleural effusion is strongest {where}.",
                         "Called; brightest evidence reaches 75 % of the scale."]  # fmt: skip
    for expected in ("Axial, slice 22 of 70", "Coronal, slice 57 of 80", "Sagittal, slice 68 of 95", "a note"):
        assert texts.count(expected) == 1, expected
    assert any(text.startswith("W 400 L 40. Slices count from 1: axial from the head") for text in texts)
    assert any("50 % (white line) is the cut" in text for text in texts)
    assert [texts.count(sign) for sign in (*"RLAP", "5 cm")] == [4, 4, 2, 2, 6]


def test_what_is_said_of_a_no_without_evidence_and_without_a_threshold(texts):
    values = np.zeros((3, 8, 12, 12))
    values[[0, 2], 5, 8, 8] = 3
    values[1] -= 1
    maps = maps_of(values, (("CT sign", 0.01, 0.36), ("Emphysema", 0.3, 0.2), ("B", 0.5, None)))
    map_picture(maps, 0)
    assert texts[0] == "CT sign: no (0.01, cut 0.36)" and texts[2].startswith("Evidence for CT sign is strongest")
    assert texts[3] == "Not called; brightest evidence reaches 1 % of the scale; nothing is coloured below 20 %."
    assert texts.count("R") == 2, "plain slices only"
    del texts[:]
    map_picture(maps, 1)
    assert texts[2].startswith("Nothing in the body speaks for emphysema: no colours.") and "100 %" not in texts
    del texts[:]
    map_picture(maps, 2)
    assert texts[0] == "B: not decided (0.50)" and any("Colours are scaled to this scan" in text for text in texts)


def test_it_is_said_where_most_of_the_evidence_is_not_shown(texts):
    values = np.zeros((2, 8, 12, 12))
    values[:, 5, 8, 8], values[:, 5, 0, 8] = 1, 3
    maps = maps_of(values, (("Emphysema", 0.9, 0.5), ("B", 0.1, 0.5)))
    map_picture(maps, 0)
    assert texts[3].endswith(" 30 % of the scale.")
    assert texts[4].startswith("75 % of what speaks for it lies outside the body")
    del texts[:]
    map_picture(maps, 1)
    assert not any("outside the body" in text for text in texts)


def test_an_outline_is_drawn_where_it_crosses_zero():
    values = np.zeros((1, 8, 10, 10))
    values[0, 4, 5, 5] = 1
    maps = maps_of(values)
    drawn = np.full((32, 48, 48), -1.0)
    drawn[12:20, 20:28, 20:28] = 1
    blue = [np.all(np.asarray(map_picture(maps, 0, None, outline)) == map_figure.OUTLINE, axis=-1).sum()
            for outline in (None, drawn)]  # fmt: skip
    assert blue[1] > blue[0] + 300  # the marks of the planes are of that colour, too


def test_an_overview_shows_what_is_called_and_tells_the_rest(texts):
    values = np.random.default_rng(0).normal(size=(3, 8, 10, 10))
    told = (("Emphysema", 0.8, 0.5), ("Lung nodule", 0.1, 0.5), ("x" * 90, 0.9, 0.5), ("Cardiomegaly", 0.7, 0.5),
            ("B", 0.2, None))  # fmt: skip
    picture = overview_picture(maps_of(values, told), "a note")
    assert texts[:3] == ["scan", "Emphysema", texts[2]] and texts[2].startswith("0.80, cut 0.50; axial slice ")
    names = [text for text in texts if text.startswith("xxxx")]
    assert len(names) == 1 and names[0].endswith("x…") and len(names[0]) < 60
    rest = ["Called, without a map: Cardiomegaly (0.70, cut 0.50)", "Not called: Lung nodule (0.10, cut 0.50)"]
    assert texts[-4:] == [*rest, "Not decided: B (0.20)", "a note"]
    none = overview_picture(maps_of(values[:1], (("Emphysema", 0.1, 0.5),)))
    assert none.size[1] < 120 < picture.size[1]


def test_long_lines_are_broken_within_the_picture(texts):
    told = [(f"Finding number {i}", 0.1, 0.5) for i in range(30)]
    overview_picture(maps_of(np.zeros((1, 8, 10, 10)), told))
    lines = texts[1:]
    assert len(lines) > 4 and all(map_figure._font(14).getlength(line) < map_figure.WIDTH - 30 for line in lines)
    assert " ".join(lines).count("Finding number") == 30


@pytest.mark.parametrize("z", [(0.0, 1.0), (0.45, 0.55), (0.499, 0.501)])
def test_flat_and_small_scans_have_pictures(z):
    values = np.random.default_rng(0).normal(size=(1, 8, 10, 10))
    voxels = cylinder(z=(max(0, z[0] - 0.02), z[1] + 0.02))
    maps = maps_of(values, placement=within(z, shape=(96, 80, 3)), voxels=voxels)
    assert map_picture(maps, 0).size[1] > 200


def test_windows_show_findings_beside_their_surroundings():
    windows = {label: display_window(label) for label in ABNORMALITIES}
    assert windows["Consolidation"] == windows["Atelectasis"] and windows["Consolidation"].limits()[1] > 400
    assert windows["Pleural effusion"] == SOFT_TISSUE_WINDOW and windows["Lung nodule"] == LUNG_WINDOW


def test_titles():
    maps = maps_of(np.zeros((1, 2, 2, 2)), (("Cardiomegaly", 0.012, 0.357),), cube(), torch.zeros(1, 1, 4, 4, 4))
    assert title_of(maps.decisions[0]) == "Cardiomegaly: no (0.01, cut 0.36)"


def test_a_picture_is_known_as_ours(tmp_path):
    image = Image.new("RGB", (10, 10))
    map_figure.write_picture(image, tmp_path / "a.png")
    image.putpixel((3, 4), (9, 200, 31))
    map_figure.write_picture(image, tmp_path / "c.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "c.png")), np.asarray(image))
    image.save(tmp_path / "b.png")
    assert [map_figure.is_picture(tmp_path / name) for name in ("a.png", "b.png")] == [True, False]
