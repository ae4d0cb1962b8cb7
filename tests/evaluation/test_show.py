"""Results shown in a notebook, for which a stand-in for IPython serves: the file's content is displayed unchanged."""

import re
import sys
from html import unescape
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from ctclip.errors import UserError
from ctclip_evaluation import show, show_scan
from ctclip_model import ABNORMALITIES

PAGE = "<!doctype html><title>a \"b\" &amp; 'c'</title><script>1 < 2 && 3</script>"


@pytest.fixture
def displayed(monkeypatch):
    """What a notebook displays; IPython is imported, and a kernel runs."""
    shown = []
    display = SimpleNamespace(display=lambda data, raw: shown.append(data))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: 1, display=display))
    return shown


def predictions(count):
    values = np.linspace(0, 1, 18 * count).reshape(count, 18)
    index = pd.Index([f"scan<{i}>" for i in range(count)], name="VolumeName")
    return pd.DataFrame(values, index, list(ABNORMALITIES))


@pytest.mark.parametrize("named", ["folder", "page"])
def test_a_report_is_shown_in_a_frame_of_its_own(named, tmp_path, displayed):
    (tmp_path / "report.html").write_text(PAGE)
    assert show(tmp_path if named == "folder" else str(tmp_path / "report.html"), height=500) is None
    frame = re.fullmatch(r'<iframe sandbox="allow-scripts" srcdoc="([^"]*)" style="[^"]*500px[^"]*"></iframe>',
                         displayed[0]["text/html"])
    assert unescape(frame[1]) == PAGE and displayed[0]["text/plain"] == f"Report: {tmp_path / 'report.html'}"


def test_predictions_are_shown_with_a_row_for_each_finding(displayed, capsys):
    table = predictions(12)
    show(table)
    html, text = displayed[0]["text/html"], displayed[0]["text/plain"]
    assert html.count("<tr") == 19 and "scan&lt;9&gt;" in html and "scan&lt;10&gt;" not in html
    assert "The first 10 of 12 scans" in html and "The first 10 of 12 scans" in text
    first = next(line for line in text.splitlines() if line.startswith(ABNORMALITIES[0])).split()[-10:]
    assert first == [f"{value:.2f}" for value in table.iloc[:10, 0]]
    show(predictions(2))
    assert "The first" not in displayed[1]["text/html"] and capsys.readouterr().out == ""


@pytest.mark.parametrize("imported", [True, False])
def test_outside_of_a_notebook_it_is_printed(imported, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    if imported:
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    (tmp_path / "report.html").write_text(PAGE)
    show(tmp_path)
    assert capsys.readouterr().out == f"Report: {tmp_path / 'report.html'}\n"
    show(predictions(1))
    assert len(capsys.readouterr().out.splitlines()) == 19


def test_a_run_without_a_report_is_named_with_the_way_to_one(tmp_path):
    with pytest.raises(UserError, match=r"report.html: found no such file, expected a report; evaluate the run"):
        show(tmp_path)


def test_a_scan_and_its_heat_map_go_to_the_viewer(tmp_path, monkeypatch):
    """A stand-in for ipyniivue 2.4, whose NiiVue takes height and load_volumes a list of such dictionaries."""
    loaded = []

    class NiiVue:
        def __init__(self, height):
            self.height = height

        def load_volumes(self, volumes):
            loaded.extend(volumes)

    monkeypatch.setitem(sys.modules, "ipyniivue", SimpleNamespace(NiiVue=NiiVue))
    scan, heat_map = (tmp_path / name for name in ("a.nii.gz", "map.nii.gz"))
    scan.touch()
    with pytest.raises(UserError, match="map.nii.gz: found no such file"):
        show_scan(scan, heat_map)
    heat_map.touch()
    assert show_scan(scan, heat_map, "mediastinum", height=300).height == 300
    assert loaded[0] == {"path": str(scan), "cal_min": -160, "cal_max": 240} and loaded[1]["path"] == str(heat_map)
    with pytest.raises(UserError, match="found window 'brain', expected one of lung, mediastinum, bone"):
        show_scan(scan, window="brain")
    monkeypatch.setitem(sys.modules, "ipyniivue", None)
    with pytest.raises(UserError, match="pip install ipyniivue"):
        show_scan(scan)
