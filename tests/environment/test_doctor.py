"""ctclip_setup.py --doctor: every state of every row that a machine without a GPU can be brought into, offline.

Reference: what a user reads, and exit codes. The hub is helpers_hub's; a machine's memory is a tree of files laid out
as Linux does; GPUs are what nvidia-smi and torch would say of them.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers_data import HEADER, META_HEADER, chest, label_line, meta_line, put, tables, write
from helpers_hub import NEWCOMER, TOKEN, UNSCOPED, Hub

from ctclip.data.ct_rate import volume_path
from ctclip.environment import doctor
from ctclip.environment.doctor import ProcessFailed, Row
from ctclip.environment.packages import Requirement, SetupError
from ctclip.memory import system_memory

ROOT = Path(__file__).resolve().parents[2]
FILE = "models/CT-CLIP-Related/CT_LiPro_v2.pt"
NAMES = ["python", "packages", "gpu", "memory", "shared memory", "disk", "hub", "weights", "prompts", "cohort"]
NAMES += ["forward pass"]
OPTIONAL = ("memory", "shared memory")  # where the system tells


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


def test_a_row_on_files_only_where_one_is_missing(monkeypatch):
    assert list(doctor.files_rows()) == []
    monkeypatch.setattr(doctor, "missing_files", lambda: ["ctclip/hub/push.py"])
    row = only(doctor.files_rows())
    assert (row.name, row.state) == ("files", "failed") and row.found.startswith("found no ctclip/hub/push.py in ")
    assert row.remedy[0].startswith("put a ctclip.zip beside ctclip_setup.py")


# ---- all of it, through the command line


def rows_of(text):
    """The table back as (name, mark, finding and remedy in one line)."""
    found = []
    for line in text.splitlines()[:-2]:
        if line[:4].strip() in doctor.MARKS.values():
            found.append((line[6:21].strip(), line[:6].strip(), line[21:]))
        else:
            name, mark, said = found.pop()
            found.append((name, mark, f"{said} {line.strip()}"))
    return found


def test_everything_at_once(tmp_path, phantoms, tiny_classfine):
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
        done = run(tmp_path, "--data-dir", str(phantoms), HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    assert [(verb, token) for verb, path, token, _ in hub.requests if path.endswith(FILE)] == [("HEAD", TOKEN)]
    rows = rows_of(done.stdout)
    assert done.returncode == 2 and done.stdout.endswith(" 2 failed\n") and "\u00a0" not in done.stdout
    assert set(NAMES) - {name for name, *_ in rows} <= set(OPTIONAL)
    assert all(("-> " in said.replace("-> logits", "")) == (mark in ("warn", "FAIL")) for _, mark, said in rows)
    by_name = {name: (mark, said) for name, mark, said in rows}
    assert by_name["hub"][1].startswith("the token may read CT-RATE (127.0.0.1:")
    assert by_name["forward pass"][0] == "ok"

    classfine, vocabfine, zeroshot = ((mark, said) for name, mark, said in rows if name == "weights")
    digest = json.loads((models / "ctclip_classfine.json").read_text())["fingerprint"]["digest"]
    assert classfine[0] == "ok" and f", SHA-256 as kept; fingerprint {digest[:12]}; " in classfine[1]
    assert vocabfine[0] == zeroshot[0] == "FAIL"
    assert "ctclip_vocabfine.pt is not a readable weights file" in vocabfine[1].replace("\\", "/")
    assert "delete it and run" in vocabfine[1]
    assert f"SHA-256 {good[:12]}... where {other[:12]}... was kept" in zeroshot[1]
    assert zeroshot[1].endswith("ctclip_setup.py --model zeroshot")

    train, valid = (said for name, _, said in rows if name == "cohort")
    assert train.startswith("train: 40 volumes, ") and valid.startswith("valid: 16 volumes, ")
    assert "; 3 of 3 files tried can be read; as " in train and "; 3 of 3 files tried can be read; as " in valid


def test_an_interpreter_with_nothing_installed(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    bare = tmp_path / "bare" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = run(tmp_path, "--data-dir", str(tmp_path), python=str(bare), HF_TOKEN=TOKEN)
    assert done.returncode == 2
    rows = {name: (mark, said) for name, mark, said in rows_of(done.stdout)}
    assert set(NAMES) - set(rows) <= {"prompts", *OPTIONAL}  # no weights that take any
    for name, need in {"gpu": "torch", "hub": "huggingface_hub", "cohort": "numpy", "forward pass": "timm"}.items():
        assert rows[name] == ("skip", f"needs {need}")
    mark, said = rows["packages"]
    assert mark == "FAIL" and said.startswith("0 of 12 are here; missing or too old: torch>=2.6")
    assert said.endswith(f" -> python {ROOT / 'ctclip_setup.py'} installs them")
    assert done.stdout.endswith(", 1 failed, 4 skipped\n")


# ---- the table


ROWS = [
    Row("disk", "ok", "1.00\u00a0GB free"),
    Row("token", "warning", "none " + "word " * 40, ("1. accept " + "the terms " * 20, "then run this again")),
    Row("hub", "skipped", "no usable token to ask with"),
    Row("cohort", "failed", "a file", ("copy it again",)),
]


@pytest.mark.parametrize("count, code, last", [(3, 0, "0 failed, 1 skipped"), (4, 2, "1 failed, 1 skipped")])
def test_the_table(monkeypatch, capsys, count, code, last):
    monkeypatch.setattr(doctor, "examine", lambda data_dir: iter(ROWS[:count]))
    assert doctor.doctor(None) == code
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 100
    assert lines[0] == "ok    disk           1.00 GB free"
    assert lines[1].startswith("warn  token          none word") and lines[2].startswith(" " * 21 + "word")
    arrow = next(i for i, line in enumerate(lines) if "->" in line)
    assert lines[arrow].startswith("      -> 1. accept the terms")
    assert lines[arrow + 1].startswith("            the terms") or lines[arrow + 1].startswith("            terms")
    assert "         then run this again" in lines
    assert lines[-1] == f"1 ok, 1 warning, {last}"


def test_a_check_that_breaks_is_a_failed_row_and_stops_no_other(monkeypatch):
    def broken():
        yield Row("memory", "ok", "so far")
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(doctor, "memory_rows", broken)
    for name in ("packages", "gpu", "disk", "hub", "weights"):
        monkeypatch.setattr(doctor, f"{name}_rows", lambda: iter(()))
    monkeypatch.setattr(doctor, "run_probe", lambda probe: {"found": "computes"})
    rows = list(doctor.examine(None))
    assert [row.name for row in rows] == ["python", "memory", "memory", "cohort", "forward pass"]
    assert (rows[2].state, rows[2].found) == ("failed", "RuntimeError: first line")
    assert rows[2].remedy == (doctor.BROKEN,)
    assert (rows[3].state, rows[3].found) == ("skipped", "no --data-dir given")


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


def test_only_where_packages_are_missing_is_a_check_skipped(monkeypatch):
    def fails(probe):
        raise ProcessFailed("ModuleNotFoundError: No module named 'sklearn'")

    monkeypatch.setattr(doctor, "run_probe", fails)
    monkeypatch.setattr(doctor, "weights_rows", lambda: iter(()))
    for state, present in (("skipped", False), ("failed", True)):
        monkeypatch.setattr(doctor, "packages_rows", lambda ok=present: [Row("packages", "ok" if ok else "failed", "")])
        row = next(row for row in doctor.examine(None) if row.name == "forward pass")
        assert row.state == state and "sklearn" in row.found and bool(row.remedy) == present


# ---- Python and packages


def test_python():
    row = only(doctor.python_rows())
    assert row.state == "ok" and row.found.startswith(sys.version.split()[0]) and sys.executable in row.found


def test_packages(monkeypatch):
    monkeypatch.setattr(doctor, "read_requirements", lambda development: [Requirement("numpy", "1.26")])
    row = only(doctor.packages_rows())
    assert row.state == "ok" and row.found.startswith("all 1 are here: numpy")
    wanted = [Requirement("numpy", "1.26"), Requirement("nibabel", "99"), Requirement("no-such-package", "1")]
    monkeypatch.setattr(doctor, "read_requirements", lambda development: wanted)
    row = only(doctor.packages_rows())
    assert row.state == "failed" and row.found.startswith("1 of 3 are here; missing or too old: nibabel>=99 (found 5")
    assert row.found.endswith("no-such-package>=1")


def test_a_suite_without_its_requirements(monkeypatch):
    def unreadable(development):
        raise SetupError("cannot read requirements.txt (No such file); get the whole suite")

    monkeypatch.setattr(doctor, "read_requirements", unreadable)
    row = next(row for row in doctor.examine(None) if row.name == "packages")
    assert (row.state, row.remedy) == ("failed", ("get the whole suite",))


# ---- the GPU

NONE = {"gpus": "", "build": "torch 2.9.0+cu126 for CUDA 12.6", "problem": "No CUDA GPUs are available"}
ONE = {"gpus": "1 x Tesla T4 with 16.11 GB", "build": "torch 2.9.0+cu126 for CUDA 12.6; half precision: float16"}
LISTED = "GPU 0: Tesla T4 (UUID: GPU-0)\n"
GPUS = {  # what `nvidia-smi -L` says, what torch says, state, found, remedy
    "none": (ProcessFailed("NVIDIA-SMI has failed"), NONE, "ok", "none: everything runs on the CPU; torch 2.9", None),
    "no nvidia-smi": (FileNotFoundError("nvidia-smi"), NONE, "ok", "none: everything runs on the CPU", None),
    "one": (LISTED, ONE, "ok", "1 x Tesla T4 with 16.11 GB; torch 2.9.0+cu126 for CUDA 12.6; half", None),
    "not for torch": (
        LISTED, NONE, "warning",
        "GPU 0: Tesla T4 is here, but not for torch: No CUDA GPUs are available; torch 2.9.0+cu126 for CUDA 12.6",
        "unset CUDA_VISIBLE_DEVICES, or install torch and torchvision for its driver's CUDA: https://pytorch.org/",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GPUS)
def test_gpu(monkeypatch, case):
    said, seen, state, found, remedy = GPUS[case]
    answering(monkeypatch, said)
    monkeypatch.setattr(doctor, "run_probe", lambda probe: seen)
    row = only(doctor.gpu_rows())
    assert (row.state, found in row.found) == (state, True), row.found
    assert row.remedy[0].startswith(remedy) if remedy else row.remedy == ()


def test_torch_is_asked_for_real():
    seen = doctor.run_probe("gpu")
    assert seen["build"].startswith("torch ") and bool(seen["gpus"]) == ("problem" not in seen)


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
    found = system_memory(tmp_path)
    assert (found.available, found.total) == (available * GIB, total * GIB)
    monkeypatch.setattr(doctor, "system_memory", lambda: found)
    row = only(doctor.memory_rows(tmp_path / "none"))
    assert row.state == state and bool(row.remedy) == (state == "warning")


def test_a_system_without_proc(tmp_path, monkeypatch):
    assert system_memory(tmp_path) is None
    monkeypatch.setattr(doctor, "system_memory", lambda: None)
    assert list(doctor.memory_rows(tmp_path / "none")) == []


# ---- shared memory and the disk


def sized(monkeypatch, **free):
    """Free bytes of the disk, or of the folders of those names."""
    monkeypatch.setattr(
        doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(total=9e9, free=free.get(folder.name, free["disk"]))
    )


def test_shared_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "system_memory", lambda: None)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: (8e9, 0, 8e9))
    assert only(doctor.memory_rows(tmp_path)).state == "ok"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: (64 << 20, 0, 64 << 20))
    row = only(doctor.memory_rows(tmp_path))
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
    row = next(row for row in doctor.examine(None) if row.name == "disk")
    assert row.state == "failed" and row.found == f"{Path.cwd()} cannot be written to (Read-only file system)"


# ---- the hub

ASK = "from ctclip.environment.doctor import *; [row.print() for row in hub_rows()]"


def ask_hub(folder, **variables):
    """The row, in one line."""
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=ROOT, env=environment(folder, **variables), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    token = variables.get("HF_TOKEN", TOKEN).strip('"')
    assert token[3:12] not in done.stdout + done.stderr and "secret" not in done.stdout + done.stderr
    return " ".join(done.stdout.split())


HUB = {  # token, fault of the server, mark, found
    "good": (TOKEN, "", "ok", "the token may read CT-RATE (127.0.0.1:"),
    "unknown": ("hf_" + "Wn2" * 11, "", "FAIL", "the hub refused the token (401)"),
    "terms": (NEWCOMER, "", "FAIL", "its account has not accepted CT-RATE's terms (403)"),
    "scope": (UNSCOPED, "", "FAIL", "may not read gated repositories (403)"),
    "moved": (TOKEN, "404 EntryNotFound", "FAIL", "(404)"),
    "down": (TOKEN, "500", "warn", "answered with an error of its own (500)"),
}


@pytest.mark.parametrize("case", HUB)
def test_hub(tmp_path, case):
    token, fault, mark, found = HUB[case]
    with Hub({FILE: b"weights"}) as hub:
        hub.fault = lambda verb, path, n: fault
        said = ask_hub(tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=token)
    assert said.startswith(f"{mark} hub ") and found in said and (" -> " in said) == (mark != "ok")


def test_no_token_and_a_broken_one_ask_nobody(tmp_path):
    with Hub({FILE: b"weights"}) as hub:
        none = ask_hub(tmp_path, HF_ENDPOINT=hub.url)
        broken = ask_hub(tmp_path, HF_ENDPOINT=hub.url, HF_TOKEN=f'"{TOKEN}"')
    assert hub.requests == []
    terms = "1. accept the terms, once: https://huggingface.co/datasets/"
    assert none.startswith(f"warn hub no Hugging Face token found -> {terms}")
    assert broken.startswith("FAIL hub ") and "characters that no token has" in broken


def test_a_stored_token_and_no_connection(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(TOKEN)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://someone:secret@127.0.0.1:{closed.getsockname()[1]}"
    assert ask_hub(tmp_path, HF_ENDPOINT=endpoint).startswith("warn hub no connection to 127.0.0.1:")


def test_offline(tmp_path):
    said = ask_hub(tmp_path, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
    assert said.startswith("warn hub HF_HUB_OFFLINE is set, so nothing is fetched -> unset HF_HUB_OFFLINE")


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
    assert (row.state, row.found) == ("warning", "zeroshot: new prompts need more; the rest works")
    assert row.remedy[0].endswith("ctclip_setup.py --model zeroshot fetches its vocabulary")
    assert row.remedy[1] == "pip install transformers"
    (models / "BiomedVLP-CXR-BERT-specialized").mkdir()
    (models / "BiomedVLP-CXR-BERT-specialized" / "vocab.txt").touch()
    assert only(doctor.prompts_rows()).remedy == ("pip install transformers",)
    monkeypatch.setattr(doctor, "installed_version", lambda name: "5.24.0")
    row = only(doctor.prompts_rows())
    assert row.state == "ok" and row.found.endswith("vocab.txt, transformers 5.24.0")


def answering(monkeypatch, answer):
    """In place of every other process; -> the last argument of each, as a file's name."""
    asked = []

    def output_of(command, seconds=None):
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
    assert [row.state for row in rows] == ["failed", "failed"]
    assert rows[0].found.startswith("classfine: PermissionError") and rows[1].found.startswith("vocabfine: Permission")


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
    assert "; skipped: 1 x not a chest (no-chest list): valid_5_a_1.nii.gz; " in row.found
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


def test_what_may_be_no_chest_is_a_warning_of_its_split(tmp_path, here):
    names = [f"valid_{n}_a_1.nii.gz" for n in (1, 2)]
    tables(tmp_path, [HEADER, *map(label_line, names)], [META_HEADER, *map(meta_line, names)])
    put(tmp_path, names[0], fixed=True)
    hu = chest()  # without its lungs
    write(tmp_path / volume_path(names[1], fixed=True), np.where(np.abs(hu + 850) < 100, 40, hu).astype(np.int16))
    good, warned = doctor.cohort_rows(tmp_path)
    assert good.state == "ok" and "2 of 2 files tried can be read" in good.found
    assert warned.state == "warning" and warned.remedy[0].endswith("dataset/metadata/no_chest_valid.txt")
    found = "valid, 2 files tried: 1 volume with a warning, first valid_2_a_1.nii.gz: little lung"
    assert warned.found.startswith(found)


def test_a_table_that_gives_no_cohort(tmp_path, here):
    tables(tmp_path, [HEADER, label_line("valid_1_a_1.nii.gz")])
    row = only(doctor.cohort_rows(tmp_path))
    assert row.state == "failed" and "no usable valid volume" in row.found
    assert row.remedy == (f"add volumes, such as {tmp_path / volume_path('valid_1_a_1.nii.gz', fixed=True)}",)


# ---- the forward pass


def test_forward_pass_that_fails(monkeypatch):
    def fails(probe):
        raise ProcessFailed("ImportError: operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor, "run_probe", fails)
    monkeypatch.setattr(doctor, "weights_rows", lambda: iter(()))
    row = next(row for row in doctor.examine(None) if row.name == "forward pass")
    assert row.state == "failed" and "torchvision::nms" in row.found and doctor.REINSTALL in row.remedy[0]
