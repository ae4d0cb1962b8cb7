"""`--report-to`: the values of log.jsonl, epoch by epoch, in TensorBoard, trackio or Weights & Biases as well."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ctclip.config import TrainingError
from ctclip.training.run import Run

PROJECT = "ctclip-task2"  # under which trackio and wandb list the runs


class Tracker:
    """Where an epoch's values go: `log({name: value}, step)`, and `close()` at the end."""

    def __init__(self, log: Callable[[dict[str, float], int], Any], close: Callable[[], Any]):
        self._log, self.close = log, close

    def log(self, record: dict) -> None:
        """A line of log.jsonl; what is no number is left out."""
        self._log({key: value for key, value in record.items() if isinstance(value, (int, float)) and key != "epoch"},
                  record["epoch"])


def open_tracker(run: Run, epoch: int) -> Tracker | None:
    """The tracker that the run asks for, in the main process; a continued run (`epoch` > 0) goes on in its curves."""
    name = run.machine.report_to
    if name == "none" or not run.ranks.is_main:
        return None
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=epoch + 1)

        def log(values: dict[str, float], step: int) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return Tracker(log, writer.close)
    module = importlib.import_module(name)  # trackio has wandb's functions
    place = {"dir": str(run.folder), "id": run.folder.name} if name == "wandb" else {}
    try:
        module.init(project=PROJECT, name=run.folder.name, config=asdict(run.config), resume="allow", **place)
    except Exception as error:  # no login, no network: each has a class of its own
        raise TrainingError(f"--report-to {name} could not start: {error}; mend it and add --resume {run.folder}, or "
                            "leave --report-to out") from error
    return Tracker(lambda values, step: module.log(values, step=step), module.finish)
