"""One bit flipped somewhere in a run's folder: what is read of it afterwards is what it was, or one line says that it
is not. By hand, any number of them:

    python tests/fuzz/flips.py --count 200 --seed 3

`finished`: predictions of a scan, evaluation, model card and ONNX's inputs of a run. `unfinished`: the run that goes on
from there, which has to end bit for bit as the undisturbed one. Pictures and the page are left out: nothing reads them.
Prints a line for each flip that is neither.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from helpers_training import read_once  # noqa: E402
from killed_runs import differences  # noqa: E402

from ctclip.config import Machine, Settings, TrainingConfig  # noqa: E402
from ctclip.data import loading  # noqa: E402
from ctclip.data.cohort import Volume  # noqa: E402
from ctclip.evaluation.evaluate import evaluate_tables, write_tables  # noqa: E402
from ctclip.evaluation.run_folder import run_calibration  # noqa: E402
from ctclip.hub.model_card import model_card  # noqa: E402
from ctclip.inference.predictor import load_model, predict_volumes  # noqa: E402
from ctclip.inference.run_predictions import run_inputs  # noqa: E402
from ctclip.phantoms.cohort import write_phantom_cohort  # noqa: E402
from ctclip.training import logging, steps  # noqa: E402
from ctclip.training.loop import train  # noqa: E402

TINY = Path(__file__).resolve().parents[1] / "fixtures" / "tiny_a_classfine.pt"
KINDS = ("finished", "unfinished")


class Stop(Exception):
    """Where a run is left."""


class Flips:
    """A finished run that was evaluated, and an unfinished one in its last epoch, in `work`; to be copied."""

    def __init__(self, work: Path, phantoms: Path):
        self.work, self.phantoms = work, phantoms
        self.config = TrainingConfig(
            data_dir=str(phantoms), ctclip_path=str(TINY), cache_dir=str(work / "cache"), limit=16, batch_size=8,
            epochs=3, freeze_epochs=1,
        )  # fmt: skip
        self.runs = {kind: work / kind for kind in KINDS}
        train(self.config, self.runs["finished"])
        self.undisturbed = shutil.copytree(self.runs["finished"], work / "undisturbed")
        self._leave_unfinished()
        inputs = run_inputs(self.runs["finished"], device="cpu", workers=0)
        write_tables(self.runs["finished"], evaluate_tables(inputs, Settings(resamples=100)))
        self.expected = self._answers(self.runs["finished"])

    def _leave_unfinished(self) -> None:
        original, calls = steps.accumulate_gradients, iter(range(1, 10**6))

        def left(*args: Any) -> Any:
            if next(calls) == 6:  # two steps an epoch
                raise Stop
            return original(*args)

        steps.accumulate_gradients = left
        try:
            train(self.config, self.runs["unfinished"], Machine(save_minutes=0))
        except Stop:
            pass
        finally:
            steps.accumulate_gradients = original

    def _answers(self, run: Path) -> list[Any]:
        """All that is read of a finished run."""
        model, inputs = load_model(run, "cpu"), run_inputs(run, device="cpu", workers=0)
        volume = sorted(self.phantoms.glob("dataset/valid_fixed/*/*/*.nii.gz"))[0]
        _, logits = predict_volumes(model, [Volume(volume.name, volume, np.zeros(18, np.float32))], workers=1)
        calibration, tuning = run_calibration(run), inputs.tuning
        assert calibration is not None and tuning is not None
        frames = [table.frame for table in (inputs.predictions, inputs.labels, *tuning)]
        return [
            logits.numpy().tolist(), model.labels, calibration.content(), inputs.history, inputs.phantom, inputs.record,
            [(list(frame.index), frame.to_numpy().tolist()) for frame in frames], model_card(model, run),
        ]  # fmt: skip

    def check(self, kind: str, seed: int, number: int) -> tuple[str, str]:
        """(outcome, what was flipped): "same", "refused", or what is wrong."""
        rng = np.random.default_rng([seed, number, len(kind)])
        with tempfile.TemporaryDirectory(dir=self.work) as folder:
            run = shutil.copytree(self.runs[kind], Path(folder) / "run")
            files = sorted(path for path in run.rglob("*") if path.is_file() and path.stat().st_size)
            path = files[int(rng.integers(len(files)))]
            content = bytearray(path.read_bytes())
            at, bit = int(rng.integers(len(content))), int(rng.integers(8))
            content[at] ^= 1 << bit
            path.write_bytes(content)
            how = f"{path.relative_to(run)}, byte {at}, bit {bit}"
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    if kind == "finished":
                        same = self._answers(run) == self.expected
                    else:
                        same = differences(self.undisturbed, train(self.config, run)) == []
                        load_model(run, "cpu")
                return ("same" if same else "another answer, and nothing said"), how
            except Exception as error:
                if getattr(error, "exit_code", None) == 2 and "\n" not in str(error):
                    return "refused", how
                return traceback.format_exc(limit=-4).replace("\n", " | "), how


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200, help="flips of each kind")
    parser.add_argument("--only", choices=KINDS, nargs="+", default=KINDS)
    parser.add_argument("--first", type=int, default=0, help="number to begin with")
    args = parser.parse_args()
    torch.set_num_threads(1)
    loading.read_volume = read_once  # no file outside the run's folder is flipped
    logging.write_training_figure = lambda *args: None  # nothing reads it
    start, bad = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as work:
        cohort = write_phantom_cohort(Path(work, "cohort"), 20, 6, seed=5, progress=False)
        with contextlib.redirect_stdout(io.StringIO()):
            flips = Flips(Path(work), cohort)
        for kind in args.only:
            counts = {"same": 0, "refused": 0}
            for number in range(args.first, args.first + args.count):
                outcome, how = flips.check(kind, args.seed, number)
                if outcome in counts:
                    counts[outcome] += 1
                else:
                    bad += 1
                    print(f"{kind} --seed {args.seed} --first {number} ({how}): {outcome}", flush=True)
            print(f"{kind}: {counts['same']} the same, {counts['refused']} refused", flush=True)
    print(f"{bad} wrong, {time.monotonic() - start:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
