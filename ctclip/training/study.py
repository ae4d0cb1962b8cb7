"""Several runs as one study (--folds, --seeds, --search): what its flags may be, where it lies, and how the same
command goes on with it after an interruption.

    results/NAME/
        folds.json, seeds.json or search.json     its settings and results; "running" until all is done
        fold_1/ fold_2/ ...                       runs like any other (of a search: trials/, which are none)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ctclip.cli import refuse_unused
from ctclip.config import (
    Machine,
    TrainingConfig,
    TrainingError,
    config_from_flags,
    flag_of,
    machine_from_flags,
    recipe_lines,
    training_flag_uses,
)
from ctclip.evaluation.run_folder import LOCK, check_names, writing
from ctclip.fileio import check_writable, locked, make_folder, read_json, replacing
from ctclip.memory import torchrun_number
from ctclip.training.run import changed_flags, check_run_folder, default_folder, named_folder, new_folder

KINDS = ("folds", "seeds", "search")  # flags, and names of the records
SAME_COMMAND = "the same command goes on"
LEAST = 2  # runs of a study

# Of a search: flags that make no frozen run, or one without cached features.
UNFREEZING = ("freeze_epochs", "unfreeze_layers", "patience", "backbone_learning_rate", "adapter_learning_rate",
              "layer_decay", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "train_slices", "augment",
              "window_jitter")

OF_KEPT_RUNS = ("--report-to", "--save-minutes", "--average-epochs")


def chosen_kind(args: argparse.Namespace) -> str | None:
    """Which study the flags of ctclip_training.py ask for; None for a single run."""
    asked = [kind for kind in KINDS if getattr(args, kind) is not None]
    if len(asked) > 1:
        raise TrainingError(f"found --{asked[0]} and --{asked[1]}, expected one of them, as each compares runs that "
                            "differ in one thing only; choose one, then the other with what the first has shown")
    return asked[0] if asked else None


@dataclass
class Study:
    """A study's folder, its settings (those that all of its runs have), and how many runs it is of. `fixed`: settings
    that the command line names."""

    kind: str
    count: int
    folder: Path
    config: TrainingConfig
    machine: Machine
    fixed: tuple[str, ...] = ()

    @property
    def record(self) -> Path:
        return self.folder / f"{self.kind}.json"

    def write(self, status: str, **content: Any) -> None:
        """Replaces the record."""
        settings = {"status": status, "count": self.count, "config": asdict(self.config)}
        with writing(self.folder, self.record.name), replacing(self.record) as temporary:
            temporary.write_text(json.dumps(settings | content, indent=2) + "\n")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Inside the block no other process works on this study."""
        busy = f"{self.folder}: found another process that works on this study, expected none; wait for its end"
        with locked(self.folder / LOCK, f"{busy}, or choose another --output-dir"):
            yield


def study_from_flags(args: argparse.Namespace, kind: str) -> Study:
    """The study that the flags ask for: a new one, or the one that they began before. Its folder is there then."""
    count: int = getattr(args, kind)
    if count < LEAST:
        raise TrainingError(f"--{kind} is {count}, expected at least {LEAST}")
    for flag, given in (("--resume", args.resume is not None), ("--plan", args.plan)):
        if given:
            raise TrainingError(f"found {flag} with --{kind}, expected one of them; a study goes on with the command "
                                "that began it, and is planned by the --plan of one run; leave one out")
    if torchrun_number("WORLD_SIZE", 1) > 1:
        raise TrainingError(f"found torchrun with --{kind}, expected one process; start it with python")
    config = config_from_flags(args)
    if config.fold is not None or config.split_seed is not None:
        raise TrainingError(f"found the settings of a study's run (--config) with --{kind}, expected those of a single "
                            "run; name another run")
    if kind == "search":
        config = frozen_config(config)
    single = dict.fromkeys(OF_KEPT_RUNS, ("runs that are kept, not --search,", kind != "search"))
    refuse_unused(args.given, training_flag_uses(config) | single)
    config.check()
    machine = machine_from_flags(args)
    machine.check()
    if args.recipe:
        print(*recipe_lines(args.recipe), sep="\n")
    folder = study_folder(kind, count, config, named_folder(args))
    fixed = tuple(name for name in asdict(config) if hasattr(args, name))
    return Study(kind, count, folder, config, machine, fixed)


def frozen_config(config: TrainingConfig) -> TrainingConfig:
    """The same with a frozen backbone. Raises TrainingError where settings say otherwise."""
    changed = [name for name in UNFREEZING if getattr(config, name) != getattr(TrainingConfig, name)]
    if config.adapt not in (None, "none"):
        changed.insert(0, "adapt")
    if changed:
        found = f"found {', '.join(map(flag_of, changed))} with --search"
        raise TrainingError(f"{found}, expected a frozen backbone, from whose cached features all settings are "
                            "trained; leave that out, and unfreeze the setting that was found")
    return config if config.stays_frozen else replace(config, freeze_backbone=True)


def study_folder(kind: str, count: int, config: TrainingConfig, wanted: Path | None) -> Path:
    """The folder of a study: `wanted`, or without it that of the unfinished study of these settings under results/ that
    was written last, or a new one. Raises TrainingError where another study, a run or other files are there."""
    if wanted is None:
        records = sorted(Path("results").glob(f"*/{kind}.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        for record in records:
            content = stored_study(record)
            if content["status"] == "running" and not differences(content, kind, count, config):
                print(f"Going on with {record.parent}", flush=True)
                return record.parent
        folder = default_folder(config)
        return new_folder(folder.with_name(f"{folder.name}_{kind}"))
    if (wanted / "run.json").is_file():
        raise TrainingError(f"{wanted} holds a run, expected a folder of its own for --{kind}; choose another "
                            "--output-dir")
    record = wanted / f"{kind}.json"
    begun = record.is_file() and any(path.is_dir() for path in wanted.iterdir())
    if not begun:  # a record alone is of settings with which nothing could be trained
        check_run_folder(wanted)
    elif changed := differences(stored_study(record), kind, count, config):
        raise TrainingError(f"{wanted} holds a study with other values for {', '.join(changed)}; choose another "
                            "--output-dir")
    check_writable(wanted, "change --output-dir")
    folder = make_folder(wanted, "change --output-dir")
    check_names(folder, record.name)
    return folder


def stored_study(record: Path) -> dict:
    """The content of a study's record."""
    try:
        content = read_json(record)
        TrainingConfig(**content["config"])
        return {"status": str(content["status"]), "count": int(content["count"]), "config": content["config"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{record}: found no record of a study of this version ({error}); restore it, or choose "
                            "another --output-dir") from error


def differences(content: Mapping, kind: str, count: int, config: TrainingConfig) -> list[str]:
    """Flags by which a stored study is another one. A search may grow: its first trials stay the same."""
    changed = changed_flags(TrainingConfig(**content["config"]), asdict(config))
    other_count = content["count"] > count if kind == "search" else content["count"] != count
    return [f"--{kind}"] * other_count + changed
