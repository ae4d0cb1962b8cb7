"""`--recipe`: settings that a run could be started with, and nothing that it would not look at."""

import pytest
from helpers_training import one_line

from ctclip.config import TrainingConfig, config_from_flags, flags_of, training_flag_uses, training_parser
from ctclip.recipes import NOT_MEASURED, RECIPES
from ctclip_training import main


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_the_run_of_its_flags_and_has_no_flag_without_effect(name):
    recipe = config_from_flags(training_parser("").parse_args(["--recipe", name]))
    recipe.check()
    flags = training_parser("").parse_args(flags_of(RECIPES[name].settings))
    assert config_from_flags(flags) == recipe != TrainingConfig()
    unused = [flag for flag, (_, used) in training_flag_uses(recipe).items() if not used]
    assert not {flag.split("=")[0] for flag in flags_of(RECIPES[name].settings)} & set(unused)


def test_other_flags_win():
    given = ["--epochs", "2", "--recipe", "video-resnet", "--stem-stride", "4"]
    config = config_from_flags(training_parser("").parse_args(given))
    assert (config.epochs, config.stem_stride) == (2, 4)
    assert config.batch_size == RECIPES["video-resnet"].settings["batch_size"]


def test_a_run_says_what_its_recipe_is_and_that_it_was_not_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--recipe", "classfine", "--data-dir", "nowhere"]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("Recipe:   classfine, ") and NOT_MEASURED in out and "--adapt none" in out
    assert one_line(err)


@pytest.mark.parametrize(("flags", "found"), [
    (["--recipe", "classfine", "--config", "mine.json"], "found --config and --recipe classfine"),
    (["--recipe", "classfine", "--resume", "run"], "found --recipe too"),
    (["--recipe", "best"], "invalid choice: 'best'"),
])  # fmt: skip
def test_a_recipe_that_something_else_would_overrule_is_one_line(flags, found, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(flags)
    except SystemExit as ended:  # argparse's own
        code = ended.code
    assert code == 2
    error = capsys.readouterr().err
    assert one_line(error) and found in error
