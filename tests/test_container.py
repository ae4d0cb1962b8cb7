"""The challenge's container without Docker: its entry point as another user, without network, on a read-only file
system, with next to no shared memory and within 256 threads, as far as this machine lets a test set such limits. The
Dockerfile is linted (hadolint, a development package); no image is built here."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers_data import affine_of, chest, write
from helpers_dicom import DICOMDIR, write_other, write_series
from helpers_scans import write_mha
from helpers_training import one_line

from ctclip.data.ct_rate import PREVALENCE
from ctclip_model import ABNORMALITIES, CTCLIPMultiAbnormalityModel

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "fixtures" / "tiny_a_classfine.pt"
UNSHARE = ["unshare", "--net", "--mount", "--propagation", "private"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """(input with three scans, one of them cut; model)"""
    root = tmp_path_factory.mktemp("container")
    for seed, name in enumerate(("amos_1", "amos_2", "amos_3")):
        write_mha(root / "input" / f"{name}.mha", chest(seed=seed), affine_of((7.5, 7.9, 12.25)), compressed=seed == 0)
    cut = root / "input" / "amos_2.mha"
    cut.write_bytes(cut.read_bytes()[:5000])
    CTCLIPMultiAbnormalityModel(str(TINY)).save_pretrained(root / "model")
    return root / "input", root / "model"


def start(monkeypatch, source: Path, model: Path, output: Path) -> int:
    """Exit code of the entry point in this process."""
    for name, place in (("INPUT", source), ("MODEL", model), ("OUTPUT", output)):
        monkeypatch.setenv(f"CTCLIP_{name}", str(place))
    return runpy.run_path(str(ROOT / "docker" / "entrypoint.py"))["main"]()


def environment(source: Path, model: Path, output: Path) -> dict[str, str]:
    """What the image sets, and the folders' places."""
    recipe = (ROOT / "docker" / "Dockerfile").read_text()
    block = re.search(r"^ENV ((?:.*\\\n)*.*)$", recipe, re.MULTILINE).group(1)
    image = dict(pair.split("=", 1) for pair in block.replace("\\\n", " ").split())
    assert image["HF_HUB_OFFLINE"] == "1" and int(image["OMP_NUM_THREADS"]) <= 32
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "VIRTUAL_ENV", "LANG")}
    places = {"CTCLIP_INPUT": str(source), "CTCLIP_MODEL": str(model), "CTCLIP_OUTPUT": str(output)}
    return kept | image | places


def check_results(output: Path) -> None:
    rows = json.loads((output / "results.json").read_text())["predictions"]
    answers = {row["input_image_name"]: row["probabilities"] for row in rows}
    assert len(rows) == 3 and sorted(answers) == ["amos_1", "amos_2", "amos_3"]
    assert answers["amos_2"] == PREVALENCE and answers["amos_1"] != answers["amos_3"]
    assert all(tuple(answer) == ABNORMALITIES for answer in answers.values())


def test_entry_point_answers_every_scan_and_exits_with_0(places, tmp_path):
    command = [sys.executable, ROOT / "docker" / "entrypoint.py"]
    done = subprocess.run(command, env=environment(*places, tmp_path), cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_results(tmp_path)
    assert "3 scans; uncalibrated probabilities" in done.stdout
    [warning] = done.stderr.strip().splitlines()
    assert warning.startswith("warning: answered with the prevalence: amos_2.mha: found 48 x 44 x 20 voxels declared")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_answers_that_are_no_numbers_are_answered_with_the_prevalence(places, tmp_path, monkeypatch, capsys):
    model = CTCLIPMultiAbnormalityModel(str(TINY))
    for parameter in model.classifier.parameters():
        parameter.data.fill_(3e38)  # finite, and the logits are not
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("ctclip_model.HUGE_WEIGHT", 1e39)
    assert start(monkeypatch, places[0], tmp_path / "model", tmp_path) == 0
    assert capsys.readouterr().err.count("answer that is no number") == 2
    rows = json.loads((tmp_path / "results.json").read_text())["predictions"]
    assert len(rows) == 3 and all(row["probabilities"] == PREVALENCE for row in rows)


def test_a_run_with_thresholds_answers_with_these_on_a_half(places, tmp_path, monkeypatch, capsys):
    from ctclip.evaluation.calibration import fit_calibration
    from ctclip.inference.predictions import predict

    source, plain = places
    random = np.random.default_rng(0)
    labels = (random.random((40, 18)) < 0.3).astype(int)
    patients = np.array([f"train_{i}" for i in range(40)])
    calibration = fit_calibration(labels, random.random((40, 18)), patients)
    shutil.copytree(plain, tmp_path / "model")
    calibration.save(tmp_path / "model" / "calibration.json")
    assert start(monkeypatch, source, tmp_path / "model", tmp_path) == 0
    assert "tuned thresholds (prevalence) lie at 0.5" in capsys.readouterr().out
    check_results(tmp_path)
    rows = json.loads((tmp_path / "results.json").read_text())["predictions"]
    given = predict(source / "amos_1.mha", plain, form="uncalibrated", device="cpu").to_numpy()
    found = np.array([list(row["probabilities"].values()) for row in rows if row["input_image_name"] == "amos_1"])
    np.testing.assert_allclose(found, calibration.rescale_to_half(given), atol=1e-5)
    assert np.abs(found - given).max() > 0.01


def test_entry_point_without_scans_or_model_is_one_line(places, tmp_path, monkeypatch, capsys):
    source, model = places
    (tmp_path / "empty").mkdir()
    for given, told in (((source, tmp_path), "no model.safetensors"), ((tmp_path / "empty", model), "found no .nii")):
        assert not (tmp_path / "results.json").exists()
        assert start(monkeypatch, *given, tmp_path) == 2
        assert told in (err := capsys.readouterr().err) and one_line(err)
    assert json.loads((tmp_path / "results.json").read_text())["predictions"] == []


def test_an_earlier_answer_is_replaced_and_a_file_of_the_user_is_not(places, tmp_path, monkeypatch, capsys):
    assert start(monkeypatch, *places, tmp_path) == 0 == start(monkeypatch, *places, tmp_path)
    check_results(tmp_path)
    (tmp_path / "results.json").write_text('{"predictions": "mine"}')
    capsys.readouterr()
    assert start(monkeypatch, *places, tmp_path) == 2
    assert "results.json: found a file that this command did not write, expected none" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == '{"predictions": "mine"}'


def test_an_empty_variable_of_the_container_is_none(monkeypatch):
    for name in ("INPUT", "MODEL", "OUTPUT"):
        monkeypatch.setenv(f"CTCLIP_{name}", "")
    found = runpy.run_path(str(ROOT / "docker" / "entrypoint.py"))
    places = found["INPUT"], found["MODEL"], found["OUTPUT"]
    assert places == (Path("/input"), ROOT / "docker" / "model", Path("/output/results.json"))


# Before the entry point: one scan at a time, and errors where a test wants them.
DRIVER = """
import os, runpy, signal, sys
from ctclip.data import loading
from ctclip.inference import predictor
original, scandir = loading.read_volume, os.scandir
predictor.PUBLISHED_SHAPE = (1, 1, 1)

def read_volume(volume, shape):
    if volume.name == "killed.mha":
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        signal.pause()
    if volume.name == "memory.mha":
        raise MemoryError
    if volume.name == "defect.mha":
        raise ZeroDivisionError
    return original(volume, shape)

def listed(top):
    if str(top).endswith("lost+found"):
        raise PermissionError(13, "Permission denied", str(top))
    return scandir(top)

loading.read_volume, os.scandir = read_volume, listed
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def run_driver(source: Path, model: Path, output: Path, signal: str = "") -> tuple[int, dict[str, dict], str]:
    """(exit code, answers by name, stderr)"""
    command = [sys.executable, "-c", DRIVER, ROOT / "docker" / "entrypoint.py", signal]
    env = environment(source, model, output) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True)
    rows = json.loads((output / "results.json").read_text())["predictions"]
    answers = {row["input_image_name"]: row["probabilities"] for row in rows}
    assert len(answers) == len(rows), "each once"
    return done.returncode, answers, done.stderr


def test_every_input_is_answered_once_whatever_happens_to_one_of_them(places, tmp_path):
    source, model = tmp_path / "in", places[1]
    scan = places[0] / "amos_1.mha"
    voxels = chest().astype(np.float32)
    write(source / "amos_1.nii.gz", voxels, (7.5, 7.9, 12.25))
    for name in ("amos_1.mha", "memory.mha", "defect.mha", "sub/amos_2.mha"):
        (source / name).parent.mkdir(exist_ok=True)
        shutil.copy(scan, source / name)
    voxels[3, 4, 5] = np.nan
    write_mha(source / "nan.mha", voxels, affine_of((7.5, 7.9, 12.25)))
    write_series(source / "cd" / "ct", chest(), affine_of((7.5, 7.9, 12.25)))
    write_other(source / "cd" / "DICOMDIR", DICOMDIR)
    (source / "lost+found").mkdir()
    (source / "notes.txt").write_text("not a scan")
    (source / "a.nrrd").write_bytes(b"NRRD")
    code, answers, err = run_driver(source, model, tmp_path)
    assert code == 0, err
    answered = ["amos_1", "amos_1.nii.gz", "amos_2", "ct"]
    assert sorted(answers) == sorted([*answered, "defect", "memory", "nan"])
    assert all(answers[name] == PREVALENCE for name in ("defect", "memory", "nan"))
    assert all(answers[name] != PREVALENCE for name in answered)
    for told in ("memory.mha: MemoryError", "defect.mha: found ZeroDivisionError", "nan.mha: found NaN",
                 "lost+found: found a folder that cannot be listed", "1 .nrrd", "Media Storage Directory"):
        assert told in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "results.json"]


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGTERM"])
def test_a_time_limit_loses_nothing_that_was_computed(places, tmp_path, signal):
    source = tmp_path / "in"
    source.mkdir()
    for name in ("a", "b", "killed", "z"):
        shutil.copy(places[0] / "amos_1.mha", source / f"{name}.mha")
    code, answers, err = run_driver(source, places[1], tmp_path, signal)
    assert code < 0 and list(answers) == ["a", "b", "killed", "z"], err
    assert answers["killed"] == answers["z"] == PREVALENCE and answers["a"] != PREVALENCE


def may_unshare() -> bool:
    """Whether namespaces can be made here: as root on Linux, mostly."""
    if sys.platform != "linux" or shutil.which("unshare") is None:
        return False
    inner = "mount -t tmpfs -o size=1m tmpfs /dev/shm && exec unshare --user --map-user=1000 --map-group=1000 true"
    return subprocess.run([*UNSHARE, "sh", "-c", inner], capture_output=True).returncode == 0


def test_entry_point_under_the_challenge_s_limits(places, tmp_path):
    """User 1000, no network, everything read-only but the output and 16 MB of /tmp, 1 MB of shared memory."""
    if not may_unshare():
        pytest.skip("this machine lets no test make namespaces: the entry point's limits are not tried")
    output, temporary = tmp_path / "output", tmp_path / "tmp"
    output.mkdir()
    temporary.mkdir()
    inner = (
        "mount -t tmpfs -o size=1m tmpfs /dev/shm && "
        f"mount --bind '{output}' '{output}' && mount -t tmpfs -o size=16m,mode=1777 tmpfs '{temporary}' && "
        "mount -o remount,bind,ro / && exec unshare --user --map-user=1000 --map-group=1000 "
        f"'{sys.executable}' -c \"{PROBE}\" '{ROOT / 'docker' / 'entrypoint.py'}'"
    )
    env = environment(*places, output) | {"TMPDIR": str(temporary), "HOME": str(temporary)}
    env |= {"HF_HOME": f"{temporary}/hub", "MPLCONFIGDIR": f"{temporary}/matplotlib"}
    process = subprocess.Popen([*UNSHARE, "sh", "-c", inner], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    most = 0
    while process.poll() is None:
        most = max(most, threads_below(process.pid))
        time.sleep(0.02)
    out, err = (stream.decode() for stream in process.communicate())
    assert process.returncode == 0, err
    assert "user 1000, no network, read-only" in out
    check_results(output)
    assert 1 < most < 256, "threads and processes at once"


PROBE = (
    "import os, runpy, socket, sys\n"
    "assert os.getuid() == 1000\n"
    "assert os.statvfs('/dev/shm').f_blocks * os.statvfs('/dev/shm').f_frsize <= 1 << 20\n"
    "for action in (lambda: socket.create_connection(('198.51.100.1', 80), 2), lambda: open('/nothing', 'w')):\n"
    "    try:\n"
    "        action()\n"
    "    except OSError:\n"
    "        continue\n"
    "    sys.exit('a limit does not hold')\n"
    "print('user 1000, no network, read-only', flush=True)\n"
    "sys.argv = sys.argv[1:]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')\n"
)


def threads_below(pid: int) -> int:
    """Threads of a process and of all that it started."""
    count, waiting = 0, [pid]
    while waiting:
        folder = Path("/proc", str(waiting.pop()), "task")
        try:
            tasks = list(folder.iterdir())
            count += len(tasks)
            for task in tasks:
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
            continue
    return count


def test_what_the_image_takes_is_what_the_entry_point_imports(places, tmp_path):
    """The files that the Dockerfile copies, alone in a folder, are enough."""
    folder = tmp_path / "opt"
    folder.mkdir()
    shutil.copy(ROOT / "ctclip_model.py", folder)
    shutil.copytree(ROOT / "ctclip", folder / "ctclip", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "docker" / "entrypoint.py", folder)
    shutil.copytree(places[1], folder / "model")
    env = environment(*places, tmp_path)
    del env["CTCLIP_MODEL"]
    done = subprocess.run([sys.executable, folder / "entrypoint.py"], env=env, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_results(tmp_path)


def test_dockerfile_passes_the_linter():
    linter = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if linter is None:
        pytest.skip("no hadolint here: python ctclip_setup.py --dev installs it")
    done = subprocess.run([linter, ROOT / "docker" / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout
    recipe = (ROOT / "docker" / "Dockerfile").read_text()
    assert re.search(r"^USER 1000", recipe, re.MULTILINE) and "ENTRYPOINT" in recipe
