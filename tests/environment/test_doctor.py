"""ctclip_setup.py --doctor: every state of every row that a machine without a GPU can be brought into, offline.

Reference: what a user reads, the JSON that scripts read, and exit codes. The hub is helpers_hub's; a machine's memory
is a tree of files laid out as Linux does; GPUs are what nvidia-smi and torch would say of them.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers_data import HEADER, META_HEADER, label_line, meta_line, put, tables
from helpers_hub import NEWCOMER, TOKEN, UNSCOPED, Hub

from ctclip.data.ct_rate import volume_path
from ctclip.environment import doctor
from ctclip.environment.doctor import ProcessFailed, Row
from ctclip.environment.packages import Requirement, SetupError

ROOT = Path(__file__).resolve().parents[2]
FILE = "models/CT-CLIP-Related/CT_LiPro_v2.pt"
NAMES = ["python", "packages", "gpu", "memory", "shared memory", "disk", "token", "hub", "weights", "prompts", "cohort"]
NAMES += ["forward pass"]


def only(rows):
    (row,) = rows
    return row


def environment(folder, **variables):
    """Nothing of the person running the tests: no token, no hub cache, no proxy."""
    kept = {key: os.environ[key] for key in ("PATH", "SYSTEMROOT", "TMPDIR", "TEMP") if key in os.environ}
    return {**kept, "HOME": str(folder), "HF_HOME": str(folder / "hf"), "NO_PROXY": "127.0.0.1"} | variables


def run(folder, *arguments, python=sys.executable, **variables):
    """The real command line in `folder`."""
    done = subprocess.run(
        [python, str(ROOT / "ctclip_setup.py"), "--doctor", *arguments],
        cwd=folder, env=environment(folder, **variables), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert TOKEN not in done.stdout + done.stderr and TOKEN[3:12] not in done.stdout + done.stderr
    assert done.stderr == ""
    return done


# ---- all of it, through the command line


def test_everything_at_once_for_scripts(tmp_path, phantoms, tiny_classfine):
    """One good file of weights, one that was cut off and one of other bytes than were fetched; a whole cohort."""
    models = tmp_path / "models"
    models.mkdir()
    whole = Path(tiny_classfine).read_bytes()
    for name, content in {"classfine": whole, "vocabfine": whole[:100_000], "zeroshot": whole}.items():
        (models / f"ctclip_{name}.pt").write_bytes(content)
    good, other = hashlib.sha256(whole).hexdigest(), "0" * 64
    (models / "ctclip_classfine.json").write_text(json.dumps({"size": len(whole), "sha256": good}))
    (models / "ctclip_zeroshot.json").write_text(json.dumps({"size": len(whole), "sha256": other}))
    with Hub({FILE: b"weights"}) as hub:
        done = run(tmp_path, "--json", "--data-dir", str(phantoms), HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    assert [(verb, token) for verb, path, token, _ in hub.requests if path.endswith(FILE)] == [("HEAD", TOKEN)]
    report = json.loads(done.stdout)
    assert done.returncode == 2 and report["failed"] == 2
    assert set(report) == {"rows", "failed", "python", "versions"}
    assert report["python"] == sys.version.split()[0] and report["versions"].keys() >= {"torch", "nibabel"}
    rows = report["rows"]
    assert list(dict.fromkeys(row["name"] for row in rows)) == NAMES
    for row in rows:
        assert row["state"] in doctor.MARKS and row["found"]
        assert bool(row["remedy"]) == (row["state"] in ("warning", "failed")), row
        assert "\u00a0" not in row["found"] + row["remedy"]
    by_name = {row["name"]: row for row in rows}
    assert by_name["token"]["found"] == "found, in HF_TOKEN"
    assert by_name["hub"]["found"].startswith("the token may read CT-RATE (127.0.0.1:")
    assert by_name["forward pass"]["state"] == "ok"

    classfine, vocabfine, zeroshot = (row for row in rows if row["name"] == "weights")
    assert classfine["state"] == "ok" and classfine["sha256"] == good
    assert ", SHA-256 as kept; fingerprint " + classfine["fingerprint"] in classfine["found"]
    assert vocabfine["state"] == zeroshot["state"] == "failed"
    assert "ctclip_vocabfine.pt is not a readable weights file" in vocabfine["found"].replace("\\", "/")
    assert "delete it and run" in vocabfine["remedy"]
    assert f"SHA-256 {good[:12]}... where {other[:12]}... was kept" in zeroshot["found"]
    assert zeroshot["remedy"].endswith("ctclip_setup.py --model zeroshot")

    train, valid = (row for row in rows if row["name"] == "cohort")
    assert (train["split"], train["volumes"], train["on_disk"]) == ("train", 40, 40)
    assert (valid["split"], valid["volumes"], valid["on_disk"]) == ("valid", 16, 16)
    assert len(train["readings"]) == 3 and {reading for _, reading, _ in valid["readings"]} <= {"hu", "stored"}


def test_an_interpreter_with_nothing_installed(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    bare = tmp_path / "bare" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = run(tmp_path, "--data-dir", str(tmp_path), python=str(bare), HF_TOKEN=TOKEN)
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    starts = {line[6:21].strip(): line for line in lines if line[:4].strip() in doctor.MARKS.values()}
    assert list(starts) == [name for name in NAMES if name != "prompts"]  # no weights that take any
    for name, need in {"gpu": "torch", "token": "huggingface_hub", "cohort": "torch", "forward pass": "timm"}.items():
        assert starts[name] == f"{'skip':<6}{name:<15}needs {need}"
    assert starts["packages"].startswith("FAIL  packages       0 of 12 are here; missing or too old: torch>=2.6")
    assert f"      -> python {ROOT / 'ctclip_setup.py'} installs them" in lines
    assert lines[-1].endswith(", 1 failed, 5 skipped")


# ---- the table


ROWS = [
    Row("disk", "ok", "1.00\u00a0GB free", numbers={"free_bytes": 10**9}),
    Row("token", "warning", "none " + "word " * 40, ("1. accept " + "the terms " * 20, "then run this again")),
    Row("hub", "skipped", "no usable token to ask with"),
    Row("cohort", "failed", "a file", ("copy it again",)),
]


@pytest.mark.parametrize("count, code, last", [(3, 0, "0 failed, 1 skipped"), (4, 2, "1 failed, 1 skipped")])
def test_the_table(monkeypatch, capsys, count, code, last):
    monkeypatch.setattr(doctor, "examine", lambda data_dir: iter(ROWS[:count]))
    assert doctor.doctor(None, as_json=False) == code
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 100
    assert lines[0] == "ok    disk           1.00 GB free"
    assert lines[1].startswith("warn  token          none word") and lines[2].startswith(" " * 21 + "word")
    arrow = next(i for i, line in enumerate(lines) if "->" in line)
    assert lines[arrow].startswith("      -> 1. accept the terms")
    assert lines[arrow + 1].startswith("            the terms") or lines[arrow + 1].startswith("            terms")
    assert "         then run this again" in lines
    assert lines[-1] == f"1 ok, 1 warning, {last}"


def test_the_table_for_scripts(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda data_dir: iter(ROWS))
    assert doctor.doctor(None, as_json=True) == 2
    report = json.loads(capsys.readouterr().out)
    assert report["failed"] == 1 and report["versions"] == {}
    assert report["rows"][0] == {
        "name": "disk", "state": "ok", "found": "1.00 GB free", "remedy": "", "free_bytes": 10**9
    }  # fmt: skip
    assert report["rows"][1]["remedy"].splitlines()[1] == "then run this again"


def test_a_check_that_breaks_is_a_failed_row_and_stops_no_other(monkeypatch):
    def broken():
        yield Row("memory", "ok", "so far")
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(doctor, "memory_rows", broken)
    for name in ("packages", "gpu", "disk", "token", "hub", "weights", "forward"):
        monkeypatch.setattr(doctor, f"{name}_rows", lambda: iter(()))
    rows = list(doctor.examine(None))
    assert [row.name for row in rows] == ["python", "memory", "memory", "shared memory", "cohort"]
    assert (rows[2].state, rows[2].found) == ("failed", "RuntimeError: first line")
    assert rows[2].remedy == (doctor.BROKEN,)
    assert (rows[4].state, rows[4].found) == ("skipped", "no --data-dir given")


# ---- processes of their own


def test_a_process_that_dies_is_told_with_its_signal_or_last_line():
    def said(code, seconds=60):
        with pytest.raises(ProcessFailed) as caught:
            doctor.output_of([sys.executable, "-c", code], seconds)
        return caught.value

    assert str(said("import no_such_module")) == "ModuleNotFoundError: No module named 'no_such_module'"
    assert str(said("raise SystemExit(7)")) == "the process ended with code 7"
    assert str(said("import time; time.sleep(9)", seconds=0.2)) == "no result within 0.2 s"
    if os.name != "nt":
        killed = said("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
        assert str(killed) == "the process was ended by SIGKILL (out of memory?)"
        assert doctor.failed_row("cohort", killed).remedy == (doctor.MORE_MEMORY,)


def test_only_what_requirements_txt_names_and_lacks_is_skipped(monkeypatch):
    absent = ProcessFailed("ModuleNotFoundError: No module named 'sklearn'")
    assert doctor.failed_row("x", absent).state == "failed"  # installed, and yet it cannot be imported
    monkeypatch.setattr(doctor, "installed_version", lambda name: None)
    row = doctor.failed_row("x", absent)
    assert (row.state, row.found) == ("skipped", "needs scikit-learn")
    for module in ("ctclip_model", "typing_extensions"):
        absent = ProcessFailed(f"ModuleNotFoundError: No module named '{module}'")
        assert doctor.failed_row("x", absent).state == "failed"


# ---- Python and packages


def test_python(monkeypatch):
    row = only(doctor.python_rows())
    assert row.state == "ok" and row.found.startswith(sys.version.split()[0]) and sys.executable in row.found
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (9, 9))
    row = only(doctor.python_rows())
    assert (row.state, row.remedy) == ("failed", ("run this with Python 9.9 or newer (python3.11, ...)",))


def test_packages(monkeypatch):
    monkeypatch.setattr(doctor, "read_requirements", lambda development: [Requirement("numpy", "1.26")])
    row = only(doctor.packages_rows())
    assert row.state == "ok" and row.found.startswith("all 1 are here: numpy") and "numpy" in row.numbers["versions"]
    wanted = [Requirement("numpy", "1.26"), Requirement("nibabel", "99"), Requirement("no-such-package", "1")]
    monkeypatch.setattr(doctor, "read_requirements", lambda development: wanted)
    row = only(doctor.packages_rows())
    assert row.state == "failed" and row.found.startswith("1 of 3 are here; missing or too old: nibabel>=99 (found 5")
    assert row.numbers["missing"] == ["nibabel>=99", "no-such-package>=1"] and "nibabel" in row.numbers["versions"]


def test_a_suite_without_its_requirements(monkeypatch):
    def unreadable(development):
        raise SetupError("cannot read requirements.txt (No such file); get the whole suite")

    monkeypatch.setattr(doctor, "read_requirements", unreadable)
    row = next(row for row in doctor.examine(None) if row.name == "packages")
    assert (row.state, row.remedy) == ("failed", ("get the whole suite",))
    assert doctor.failed_row("gpu", ProcessFailed("ModuleNotFoundError: No module named 'nothing'")).state == "failed"


# ---- the GPU

T4 = {"name": "Tesla T4", "memory_bytes": 15 << 30}
SEEN = {"torch": "2.9.0+cu126", "cuda": "12.6", "devices": [], "precision": None, "problem": "CUDA unknown error"}
OLD_DRIVER = "The NVIDIA driver on your system is too old (found version 11040)."
OLD_GPU = "CUDA error: no kernel image is available for execution on the device"
GPUS = {  # (nvidia-smi's GPUs, driver and complaint), what differs in torch's answer, state, found, remedy
    "none": (([], None, ""), {}, "ok", "none: everything runs on the CPU; torch 2.9.0+cu126 for CUDA 12.6", None),
    "no driver": (([], None, "has failed"), {}, "ok", "for CUDA 12.6; nvidia-smi: has failed", None),
    "one": (
        ([T4], "550.54", ""),
        {"devices": [T4], "precision": "fp16", "problem": None},
        "ok",
        "Tesla T4 with 16.11 GB; torch 2.9.0+cu126 for CUDA 12.6, driver 550.54; half precision: fp16",
        None,
    ),
    "two, no nvidia-smi": (
        ([], None, ""),
        {"devices": [T4, T4], "precision": "bf16"},
        "ok",
        "2 x Tesla T4 with 16.11 GB; torch 2.9.0+cu126 for CUDA 12.6; half precision: bf16",
        None,
    ),
    "torch for the CPU": (
        ([T4], "550.54", ""),
        {"torch": "2.9.0+cpu", "cuda": None, "problem": "Torch not compiled with CUDA enabled"},
        "warning",
        "Tesla T4 with 16.11 GB is here, but not for torch: torch 2.9.0+cpu is built for the CPU only",
        "built for CUDA: https://pytorch.org/",
    ),
    "driver too old": (
        ([T4], "470.57", ""),
        {"problem": OLD_DRIVER},
        "warning",
        "not for torch: driver 470.57 is too old for its CUDA 12.6",
        "update the driver, or install torch",
    ),
    "GPU too old": (([T4], "550", ""), {"problem": OLD_GPU}, "warning", "has no kernels for it", "another CUDA"),
    "something else": (([T4], "550", ""), {}, "warning", "not for torch: CUDA unknown error", "restart the machine"),
}


@pytest.mark.parametrize("case", GPUS)
def test_gpu(monkeypatch, case):
    smi, differs, state, found, remedy = GPUS[case]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(doctor, "driver_gpus", lambda: smi)
    monkeypatch.setattr(doctor, "run_probe", lambda probe: {**SEEN, **differs})
    row = only(doctor.gpu_rows())
    assert (row.state, found in row.found) == (state, True), row.found
    assert (remedy in row.remedy[0]) if remedy else row.remedy == ()


def test_a_hidden_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    hidden = {**SEEN, "problem": "No CUDA GPUs are available"}
    assert doctor.unseen_gpu(hidden, "550") == ("CUDA_VISIBLE_DEVICES is ''", "unset CUDA_VISIBLE_DEVICES")


def test_a_torch_that_cannot_be_imported(monkeypatch):
    monkeypatch.setattr(doctor, "driver_gpus", lambda: ([T4], "550.54", ""))

    def fails(probe):
        raise ProcessFailed(said)

    monkeypatch.setattr(doctor, "run_probe", fails)
    said = "OSError: libcudart.so.12: cannot open shared object file"
    row = only(doctor.gpu_rows())
    assert row.state == "failed" and row.found.startswith(said) and doctor.REINSTALL in row.remedy[0]
    monkeypatch.setattr(doctor, "installed_version", lambda name: None)
    said = "ModuleNotFoundError: No module named 'torch'"
    row = only(doctor.gpu_rows())
    assert (row.state, row.remedy) == ("skipped", ())
    assert row.found == "needs torch; nvidia-smi sees Tesla T4 with 16.11 GB, driver 550.54"


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for nvidia-smi")
@pytest.mark.parametrize(
    "script, expected",
    [
        ("echo 'Tesla T4, 15360, 550.54.15'", ([T4], "550.54.15", "")),
        ("echo 'A, B 10GB, [N/A], 570.1'", ([{"name": "A, B 10GB", "memory_bytes": None}], "570.1", "")),
        ("echo 'NVIDIA-SMI has failed'; exit 9", ([], None, "NVIDIA-SMI has failed")),
        ("echo 'No devices were found'", ([], None, "No devices were found")),
    ],
)
def test_what_nvidia_smi_says(tmp_path, monkeypatch, script, expected):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert doctor.driver_gpus() == expected


def test_torch_is_asked_for_real():
    seen = doctor.run_probe("gpu")
    assert seen["torch"] and bool(seen["devices"]) == (seen["problem"] is None)


# ---- memory

GIB = 1 << 30
MEMINFO = f"MemTotal:       {16 << 20} kB\nMemFree:         1024 kB\nMemAvailable:   {8 << 20} kB\n"
NO_LIMIT = 9223372036854771712  # how version 1 writes it
CGROUPS = {  # /proc/self/cgroup, files under /sys/fs/cgroup, expected: available and total in GiB, state
    "none": ("0::/\n", {}, (8, 16, "ok")),
    "v2, a container": ("0::/\n", {"memory.max": 6 * GIB, "memory.current": GIB}, (5, 6, "ok")),
    "v2, page cache is no use": (
        "0::/\n",
        {"memory.max": 6 * GIB, "memory.current": 5 * GIB, "memory.stat": f"file 1\ninactive_file {4 * GIB}\n"},
        (5, 6, "ok"),
    ),
    "v2, a job below": (
        "0::/slurm/job_7/step\n",
        {"slurm/job_7/memory.max": 3 * GIB, "slurm/job_7/memory.current": GIB, "slurm/memory.max": "max"},
        (2, 3, "warning"),
    ),
    "v1, a container": (
        "9:name=systemd:/\n4:cpu,memory:/docker/abc\n",
        {"memory/memory.limit_in_bytes": 2 * GIB, "memory/memory.usage_in_bytes": 3 * GIB},
        (0, 2, "warning"),
    ),
    "v1, no limit": (
        "4:memory:/a\n0::/\n",
        {"memory/memory.limit_in_bytes": NO_LIMIT, "memory/memory.usage_in_bytes": GIB},
        (8, 16, "ok"),
    ),
    "above what a container sees": (
        "0::/../../other\n",
        {"memory.max": 6 * GIB, "memory.current": GIB},
        (5, 6, "ok"),
    ),
}


@pytest.mark.parametrize("case", CGROUPS)
def test_memory_and_its_limits(tmp_path, monkeypatch, case):
    cgroup, files, (available, total, state) = CGROUPS[case]
    for path, text in {"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    for name, content in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    monkeypatch.setattr(doctor, "SYSTEM", tmp_path)
    row = only(doctor.memory_rows())
    assert (row.numbers["available_bytes"], row.numbers["total_bytes"]) == (available * GIB, total * GIB)
    assert row.state == state and bool(row.remedy) == (state == "warning")
    assert row.numbers["cgroup_limited"] == ("the limit of its cgroup" in row.found) == (total < 16)


def test_a_system_without_proc(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "SYSTEM", tmp_path)
    assert only(doctor.memory_rows()).state == only(doctor.shared_rows()).state == "skipped"


# ---- shared memory and the disk


def sized(monkeypatch, **free):
    """Free bytes of the disk, or of the folders of those names."""
    monkeypatch.setattr(
        doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(total=9e9, free=free.get(folder.name, free["disk"]))
    )


def test_shared_memory(tmp_path, monkeypatch):
    (tmp_path / "dev/shm").mkdir(parents=True)
    monkeypatch.setattr(doctor, "SYSTEM", tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: (8e9, 0, 8e9))
    assert only(doctor.shared_rows()).state == "ok"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: (64 << 20, 0, 64 << 20))
    row = only(doctor.shared_rows())
    assert (row.state, row.found) == ("warning", "67.11 MB free of 67.11 MB") and "--workers 0" in row.remedy[0]


def test_disk(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path)
    sized(monkeypatch, disk=6e9)
    row = only(doctor.disk_rows())
    assert (row.state, row.found) == ("ok", f"6.00 GB free in {Path.cwd()}")
    sized(monkeypatch, disk=6e9, results=4e9)  # on a disk of its own
    row = only(doctor.disk_rows())
    assert row.state == "warning" and row.found == f"4.00 GB free in {Path.cwd() / 'results'}"
    assert os.listdir(tmp_path) == ["results"] and os.listdir(tmp_path / "results") == []


def test_a_disk_that_cannot_be_written_to(tmp_path, monkeypatch):
    def refused(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refused)  # root may write anywhere
    row = only(doctor.disk_rows())
    assert row.state == "failed" and row.found == f"{Path.cwd()} cannot be written to (Read-only file system)"


# ---- token and hub

BOTH = "import json; from ctclip.environment.doctor import *; "
BOTH += "print(json.dumps([row.as_dict() for row in (*token_rows(), *hub_rows())]))"


def token_and_hub(folder, **variables):
    done = subprocess.run(
        [sys.executable, "-c", BOTH],
        cwd=ROOT, env=environment(folder, **variables), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    token = variables.get("HF_TOKEN", "").strip('"')
    assert not token or token[3:12] not in done.stdout + done.stderr
    token_row, hub_row = json.loads(done.stdout)
    return token_row, hub_row


HUB = {  # token, fault of the server, state, found
    "good": (TOKEN, "", "ok", "the token may read CT-RATE (127.0.0.1:"),
    "unknown": ("hf_" + "Wn2" * 11, "", "failed", "the hub refused the token (401)"),
    "terms": (NEWCOMER, "", "failed", "its account has not accepted CT-RATE's terms (403)"),
    "scope": (UNSCOPED, "", "failed", "may not read gated repositories (403)"),
    "moved": (TOKEN, "404 EntryNotFound", "failed", "(404)"),
    "down": (TOKEN, "500", "warning", "answered with an error of its own (500)"),
}


@pytest.mark.parametrize("case", HUB)
def test_hub(tmp_path, case):
    token, fault, state, found = HUB[case]
    with Hub({FILE: b"weights"}) as hub:
        hub.fault = lambda verb, path, n: fault
        token_row, hub_row = token_and_hub(tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=token)
    assert (token_row["state"], token_row["source"]) == ("ok", "in HF_TOKEN")
    assert (hub_row["state"], found in hub_row["found"]) == (state, True), hub_row
    assert bool(hub_row["remedy"]) == (state != "ok")


def test_no_token_and_a_broken_one_ask_nobody(tmp_path):
    with Hub({FILE: b"weights"}) as hub:
        none = token_and_hub(tmp_path, HF_ENDPOINT=hub.url)
        broken = token_and_hub(tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=f'"{TOKEN}"')
    assert hub.requests == []
    assert (none[0]["state"], none[0]["found"]) == ("warning", "no Hugging Face token found")
    assert none[0]["remedy"].startswith("1. accept the terms, once: https://huggingface.co/datasets/")
    assert broken[0]["state"] == "failed" and "characters that no token has" in broken[0]["found"]
    assert none[1]["state"] == broken[1]["state"] == "skipped"


def test_a_stored_token_and_no_connection(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(TOKEN)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://someone:secret@127.0.0.1:{closed.getsockname()[1]}"
    token_row, hub_row = token_and_hub(tmp_path, HF_ENDPOINT=endpoint)
    assert token_row["source"] == "stored by `hf auth login`"
    assert hub_row["state"] == "warning" and hub_row["found"].startswith("no connection to 127.0.0.1:")
    assert TOKEN[3:12] not in json.dumps([token_row, hub_row]) and "secret" not in json.dumps(hub_row)


def test_offline(tmp_path):
    _, hub_row = token_and_hub(tmp_path, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
    assert (hub_row["state"], hub_row["found"]) == ("skipped", "HF_HUB_OFFLINE is set, so nothing is asked")


# ---- weights


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    return tmp_path / "models"


def test_no_weights(models):
    row = only(doctor.weights_rows())
    assert row.state == "warning" and "ctclip_setup.py" in row.remedy[0]


def test_what_prompts_lack_is_a_warning_with_both_remedies(models, monkeypatch):
    assert list(doctor.prompts_rows()) == []
    (models / "ctclip_zeroshot.safetensors").write_bytes(b"slim")
    monkeypatch.setattr(doctor, "installed_version", lambda name: None)
    row = only(doctor.prompts_rows())
    assert row.state == "warning" and row.remedy[0].endswith("ctclip_setup.py --model zeroshot fetches it")
    assert row.found.startswith("zeroshot: without its vocabulary and the package transformers no prediction by")
    assert row.remedy[1] == "pip install transformers"
    (models / "BiomedVLP-CXR-BERT-specialized").mkdir()
    (models / "BiomedVLP-CXR-BERT-specialized" / "vocab.txt").touch()
    monkeypatch.setattr(doctor, "installed_version", lambda name: "5.24.0")
    row = only(doctor.prompts_rows())
    assert row.state == "ok" and row.found.endswith("vocab.txt, transformers 5.24.0")
    monkeypatch.setattr(doctor, "installed_version", lambda name: None)
    assert only(doctor.prompts_rows()).state == "warning"
    (models / "ctclip_zeroshot.prompts_0123456789ab.safetensors").touch()  # a head made before
    row = only(doctor.prompts_rows())
    assert row.state == "ok" and row.remedy == ("pip install transformers",)
    assert "answers to prompts used before; others need the package transformers" in row.found


def answering(monkeypatch, answer):
    """In place of `python -m ctclip.hub weights FILE`; -> the files it was asked about."""
    asked = []

    def output_of(command, seconds):
        asked.append(Path(command[-1]).name)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(doctor, "output_of", output_of)
    return asked


def test_a_slim_copy_is_compared_with_its_own_record(models, monkeypatch):
    asked = answering(monkeypatch, "fingerprint 5efe6dc2d671; logits of the fixed phantom: 0.133, as kept")
    slim = models / "ctclip_zeroshot.safetensors"
    slim.write_bytes(b"slim")
    record = {"size": 1_770_000_000, "sha256": "1" * 64, "slim_sha256": hashlib.sha256(b"slim").hexdigest()}
    slim.with_suffix(".json").write_text(json.dumps(record))
    row = only(doctor.weights_rows())
    assert row.state == "ok" and asked == ["ctclip_zeroshot.safetensors"]
    assert row.found.endswith(
        "0.00 MB, SHA-256 as kept; fingerprint 5efe6dc2d671; logits of the fixed phantom: 0.133, as kept"
    )
    assert row.numbers["fingerprint"] == "5efe6dc2d671" and row.numbers["weights"] == "zeroshot"
    slim.write_bytes(b"mils")
    assert only(doctor.weights_rows()).state == "failed" and len(asked) == 1


def test_a_record_that_is_none(models, monkeypatch):
    answering(monkeypatch, "fingerprint 5efe6dc2d671; logits")
    (models / "ctclip_classfine.pt").write_bytes(b"half")
    (models / "ctclip_classfine.json").write_text("[torn")
    row = only(doctor.weights_rows())
    assert row.state == "ok" and "SHA-256" not in row.found


def test_an_error_of_the_weights_command_is_shown_with_its_remedy(models, monkeypatch):
    (models / "ctclip_classfine.pt").write_bytes(b"x")
    said = "error: models/x.pt: found other tensors, expected the kept one; fetch it again"
    answering(monkeypatch, ProcessFailed(said))
    row = only(doctor.weights_rows())
    assert (row.state, row.found) == ("failed", "classfine: models/x.pt: found other tensors, expected the kept one")
    assert row.remedy == ("fetch it again",)


def test_one_file_that_breaks_the_check_hides_no_other(models, monkeypatch):
    for name in ("classfine", "vocabfine"):
        (models / f"ctclip_{name}.pt").write_bytes(b"x")
    answering(monkeypatch, ProcessFailed("PermissionError: [Errno 13] Permission denied: 'models/x.json'"))
    rows = list(doctor.weights_rows())
    assert [(row.state, row.numbers["weights"]) for row in rows] == [("failed", "classfine"), ("failed", "vocabfine")]
    assert rows[0].found.startswith("classfine: PermissionError")
    answering(monkeypatch, ProcessFailed("ModuleNotFoundError: No module named 'nibabel'"))
    monkeypatch.setattr(doctor, "installed_version", lambda name: None)
    assert [row.state for row in doctor.weights_rows()] == ["skipped", "skipped"]


# ---- the cohort


@pytest.fixture
def here(monkeypatch):
    """The probes in this process: what they return is what JSON can carry."""
    monkeypatch.setattr(doctor, "run_probe", lambda probe, *args: json.loads(json.dumps(doctor.PROBES[probe](*args))))


def test_no_cohort_to_look_at(tmp_path, here):
    assert only(doctor.cohort_rows(None)).state == "skipped"
    row = only(doctor.cohort_rows(tmp_path / "none"))
    assert (row.state, row.remedy) == ("failed", ("check --data-dir",)) and "found no folder" in row.found
    row = only(doctor.cohort_rows(tmp_path))
    assert row.state == "failed" and "train_predicted_labels.csv, expected a table of labels" in row.found


def test_a_cohort_of_both_versions_with_volumes_missing_and_left_out(tmp_path, here):
    names = [f"valid_{n}_a_1.nii.gz" for n in range(1, 7)]
    tables(
        tmp_path,
        [HEADER, *(label_line(name) for name in names)],
        [META_HEADER, *(meta_line(name) for name in names)],
        no_chest=names[4],
    )
    for number, name in enumerate(names[:5]):
        put(tmp_path, name, fixed=number < 2, seed=number)
    row = only(doctor.cohort_rows(tmp_path))
    assert row.state == "ok" and row.found.startswith("valid: 4 volumes, 4 scans, 4 patients; not on disk: 1 ")
    assert row.numbers["left_out"] == {"not a chest (no-chest list)": 1}
    assert [reading[:2] for reading in row.numbers["readings"]] == [
        ["valid_1_a_1", "hu"], ["valid_3_a_1", "stored"], ["valid_4_a_1", "stored"]
    ]  # fmt: skip
    assert "; 3 of 3 files tried can be read; as hu: valid_1_a_1 (version-2 folder, " in row.found
    assert "; as stored: valid_3_a_1, valid_4_a_1 (version-1 folder, " in row.found


def test_files_that_cannot_be_read_are_rows_of_their_own(tmp_path, here):
    names = [f"valid_{n}_a_1.nii.gz" for n in (1, 2)]
    tables(tmp_path, [HEADER, *map(label_line, names)], [META_HEADER, *map(meta_line, names)])
    for name in names:
        put(tmp_path, name, fixed=True)
    cut = tmp_path / volume_path(names[0], fixed=True)
    cut.write_bytes(cut.read_bytes()[:5000])
    good, bad = doctor.cohort_rows(tmp_path)
    assert good.state == "ok" and "1 of 2 files tried can be read" in good.found
    assert (bad.state, bad.remedy) == ("failed", ("copy or download the file again",))
    assert bad.found.startswith("valid_1_a_1.nii.gz: found a truncated file")


def test_a_table_that_gives_no_cohort(tmp_path, here):
    tables(tmp_path, [HEADER, label_line("valid_1_a_1.nii.gz")])
    row = only(doctor.cohort_rows(tmp_path))
    assert (row.state, row.remedy) == ("failed", ("add volumes",)) and "no usable valid volume" in row.found


# ---- the forward pass


def test_forward_pass_that_fails(monkeypatch):
    def fails(probe):
        raise ProcessFailed("ImportError: operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor, "run_probe", fails)
    row = only(doctor.forward_rows())
    assert row.state == "failed" and "torchvision::nms" in row.found and doctor.REINSTALL in row.remedy[0]
