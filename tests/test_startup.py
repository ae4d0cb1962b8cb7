"""Every script but the model answers --help and wrong usage from the standard library: never by way of torch.

Checked: what each has imported by then, as Python itself lists it. No times: tests/benchmarks/startup.py has these.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from ctclip import __version__
from ctclip.paths import module_environment

SUITE = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "pandas", "huggingface_hub", "safetensors", "sklearn", "scipy.stats", "matplotlib", "timm"}
SCRIPTS = ("run_task2", "ctclip_training", "ctclip_evaluation", "ctclip_setup", "ctclip.hub", "ctclip.phantoms")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_version_and_wrong_usage_import_nothing_heavy(script, tmp_path):
    for flags, code in ((["--help"], 0), (["--version"], 0), (["--no-such-flag", "x", "y"], 2)):
        start = ["-m", script] if "." in script else [SUITE / f"{script}.py"]
        command = [sys.executable, "-X", "importtime", *start, *flags]
        done = subprocess.run(
            command, cwd=tmp_path, env=module_environment(), capture_output=True, text=True, timeout=60
        )
        listed = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
        said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
        imported = {line.rpartition("|")[2].strip() for line in listed}
        assert done.returncode == code and "argparse" in imported
        assert not imported & HEAVY
        if code:
            assert len(said) == 1 and said[0].startswith("error: ")
        else:
            assert ("usage: " in done.stdout or done.stdout == f"ctclip {__version__}\n") and not said


def test_the_model_answers_too_but_imports_torch(tmp_path):
    command = [sys.executable, SUITE / "ctclip_model.py"]
    done = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--no-pretrained" in done.stdout and not done.stderr
    done = subprocess.run([*command, "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"ctclip {__version__}\n"
    done = subprocess.run([*command, "--no-such-flag"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_facts_that_are_also_written_where_torch_is_not_imported():
    """`ctclip_model` imports nothing of ours, and these import nothing but the standard library."""
    import ctclip_model
    from ctclip import config, paths
    from ctclip.hub import client as hub_client

    assert __version__ == ctclip_model.__version__
    assert paths.CLASSFINE_PATH == ctclip_model.CLASSFINE_PATH and str(paths.DEMO_PATH) == ctclip_model.DEMO_PATH
    assert config.MOST_GAMMA == ctclip_model.MOST_GAMMA
    assert hub_client.VOCABULARY_REPOSITORY == ctclip_model.VOCABULARY_REPOSITORY
    weights = Path("a", "b.pt")
    assert hub_client.vocabulary_path(weights) == ctclip_model.vocabulary_path(weights)
    saved_as = {f"ctclip_{name}" for name in hub_client.WEIGHTS}
    published = {Path(file).stem for file in hub_client.WEIGHTS.values()} | saved_as
    assert set(ctclip_model.PUBLISHED_FILES) == published | {Path(ctclip_model.DEMO_PATH).stem}


def test_scripts_hand_on_what_other_scripts_import_from_them():
    from ctclip import config as config_module
    from ctclip.evaluation import evaluate as evaluate_module
    from ctclip.evaluation import thresholds
    from ctclip.training import loop

    for name in ("TrainingConfig", "Machine", "TrainingError"):
        assert getattr(loop, name) is getattr(config_module, name)
    assert evaluate_module.Settings is config_module.Settings
    assert tuple(thresholds.OBJECTIVE_SCORES) == config_module.OBJECTIVES
