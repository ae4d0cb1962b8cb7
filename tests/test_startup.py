"""Every script answers --help and wrong usage from the standard library, numpy and nibabel: never by way of torch.

Checked: what each has imported by then, as Python itself lists it. No times: tests/benchmarks/startup.py has these.
"""

import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "pandas", "huggingface_hub", "safetensors", "sklearn", "scipy.stats", "matplotlib", "timm"}
SCRIPTS = ("run_task2", "ctclip_training", "ctclip_evaluation", "ctclip_model", "ctclip_weights", "ctclip_phantom",
           "ctclip_card", "ctclip_setup")  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_wrong_usage_import_nothing_heavy(script, tmp_path):
    for flags, code in ((["--help"], 0), (["--no-such-flag", "x", "y"], 2)):
        command = [sys.executable, "-X", "importtime", SUITE / f"{script}.py", *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        listed = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
        said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
        imported = {line.rpartition("|")[2].strip() for line in listed}
        assert done.returncode == code and "argparse" in imported
        assert not imported & HEAVY
        if code:
            assert len(said) == 1 and said[0].startswith("error: ")
        else:
            assert "usage: " in done.stdout and not said


def test_what_moved_to_lighter_rooms_is_still_handed_on():
    import ctclip_basics
    import ctclip_config
    import ctclip_model
    import ctclip_training

    for name in ("ABNORMALITIES", "CLASSFINE_PATH", "CheckpointError", "OneLineParser", "replacing"):
        assert getattr(ctclip_model, name) is getattr(ctclip_basics, name)
    for name in ("TrainingConfig", "Machine", "TrainingError"):
        assert getattr(ctclip_training, name) is getattr(ctclip_config, name)
