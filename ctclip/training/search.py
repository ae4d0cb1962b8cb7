"""Random search over settings of a frozen run (--search): every setting is trained from the same cached features, on
the same split and seed, and compared by macro AUROC on the validation patients.

A trial is the training of an ordinary run without its files, so that the run that the printed command trains comes to
the same AUROC; to rounding where processes trained side by side, each with fewer threads. Of several settings the best
looks better than it is on the patients that chose it; `score_elsewhere` says by how much.
"""

from __future__ import annotations

import copy
import csv
import json
import shlex
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from scipy.special import expit
from torch import nn

from ctclip.config import QUICK_TEST, SYNTHETIC_NOTE, TrainingConfig, TrainingError, flag_of, flags_of
from ctclip.data.feature_cache import FeatureCache
from ctclip.evaluation.bootstrap import draw
from ctclip.evaluation.metrics import Resamples, lacks_a_class, nanmean, ranking_columns
from ctclip.evaluation.run_folder import writing
from ctclip.fileio import make_folder, replacing
from ctclip.formatting import decimal, plural
from ctclip.paths import script
from ctclip.training.checkpoint import Progress, TrainingState
from ctclip.training.loop import train_epoch, validate
from ctclip.training.optimization import TrainableParameters, rng_state, set_rng_state
from ctclip.training.run import TrainingJob, create_criterion, prepare
from ctclip.training.steps import load_features
from ctclip.training.study import SAME_COMMAND, Study
from ctclip.training.trial_workers import TrialWorkers, processes_to_start
from ctclip_model import SLICE_HEADS

SEARCHED = ("head", "loss_type", "alpha", "gamma", "learning_rate", "weight_decay", "dropout")
CTCLIP_HEADS = ("linear", "mlp", "attention")
LOSSES = ("focal", "bce", "asl")
# Ranges: uniform, or uniform in the logarithm. Learning rates are factors of the head's default.
ALPHA, GAMMA, DROPOUT = (0.15, 0.85), (0.0, 4.0), (0.0, 0.6)
LEARNING_RATE_FACTOR, WEIGHT_DECAY = (0.1, 10.0), (1e-4, 1.0)
SECONDS_WORTH_PROCESSES = 20.0  # of training; each needs some seconds to start
RESAMPLES = 500
MOST_CANDIDATES = 200  # epochs of all trials, from the best down, that a resample chooses among


@dataclass
class Trial:
    """A setting and what it came to: macro AUROC and logits (E, n, L) of the validation volumes after each epoch.
    `failed` says why there are none."""

    number: int
    config: TrainingConfig
    scores: np.ndarray
    logits: np.ndarray
    seconds: float
    failed: str = ""

    @property
    def best_epoch(self) -> int:
        """Counted from 1; the first of the best, as a run keeps it."""
        return int(np.argmax(self.scores)) + 1

    @property
    def score(self) -> float:
        return -np.inf if self.failed else float(self.scores.max())

    @property
    def row(self) -> dict[str, Any]:
        """The trial's line of search.csv."""
        found = {"auroc_macro": None, "epoch": None} if self.failed else {"auroc_macro": self.score,
                                                                          "epoch": self.best_epoch}
        return {"trial": self.number, **settings_of(self.config), **found, "seconds": round(self.seconds, 2),
                "failed": self.failed}


def settings_of(config: TrainingConfig) -> dict[str, Any]:
    """What is searched of a configuration; None for what its loss does not have."""
    values = {name: getattr(config, name) for name in SEARCHED} | {"learning_rate": config.head_learning_rate}
    if config.loss_type != "focal":
        values |= {"alpha": None, "gamma": None}
    return values


def draw_setting(base: TrainingConfig, fixed: Collection[str], heads: Sequence[str], number: int) -> TrainingConfig:
    """The configuration of a trial, counted from 1: the first is `base`, others are drawn by `base.seed` and their
    number alone, so that a longer search begins with the trials of a shorter one."""
    if number == 1:
        return base
    rng = np.random.default_rng([base.seed, number])

    def uniform(low: float, high: float) -> float:
        return round(float(rng.uniform(low, high)), 2)

    def log_uniform(low: float, high: float) -> float:
        return float(f"{np.exp(rng.uniform(np.log(low), np.log(high))):.2g}")

    peak = replace(base, learning_rate=None).head_learning_rate
    drawn: dict[str, Any] = {
        "head": heads[int(rng.integers(len(heads)))], "loss_type": LOSSES[int(rng.integers(len(LOSSES)))],
        "alpha": uniform(*ALPHA), "gamma": uniform(*GAMMA), "dropout": uniform(*DROPOUT),
        "learning_rate": log_uniform(*(peak * factor for factor in LEARNING_RATE_FACTOR)),
        "weight_decay": log_uniform(*WEIGHT_DECAY),
    }  # fmt: skip
    free = {name: value for name, value in drawn.items() if name not in fixed}
    if free.get("loss_type", base.loss_type) != "focal":
        free |= {name: getattr(TrainingConfig, name) for name in ("alpha", "gamma")}
    return replace(base, **free)


# ------------------------------------------------------------------ one trial


class HeadJob:
    """A job with its features in memory, on which all trials of one head are trained, and its state at the start."""

    def __init__(self, study: Study, config: TrainingConfig, data_dir: str | None = None):
        # A second head is prepared on the folder of the built-in cohort, which has been said once.
        self.job = prepare(replace(config, data_dir=data_dir or config.data_dir), study.folder, study.machine)
        torch.manual_seed(config.seed)
        load_features(self.job)
        self.rng = rng_state(self.job.run.device)
        self.start = {name: value.clone() for name, value in self.parameters(config).tensors().items()}

    def parameters(self, config: TrainingConfig) -> TrainableParameters:
        self.job.run.config = config
        return TrainableParameters(self.job.run, self.job.model)

    def job_of(self, config: TrainingConfig) -> TrainingJob:
        """The job of one trial, with the head as it was before the first."""
        run, model = copy.copy(self.job.run), self.job.model
        run.config = config
        run.scaler = torch.amp.GradScaler(run.device.type, enabled=run.scaler.is_enabled())
        tensors = model.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, value in self.start.items():
                tensors[name].copy_(value)
        for module in (model.dropout, *model.classifier.modules()):
            if isinstance(module, nn.Dropout):
                module.p = config.dropout
        return replace(self.job, run=run, criterion=create_criterion(config, self.job.train, run.device))

    def train(self, number: int, config: TrainingConfig) -> Trial:
        """Trains one setting as a run would. One that diverges has failed; what else is wrong ends the search."""
        started, job = time.perf_counter(), self.job_of(config)
        state = TrainingState(TrainableParameters(job.run, job.model), "", last_save=np.inf)
        set_rng_state(job.run.device, self.rng)
        scores, logits, failed = [], [], ""
        for epoch in range(config.epochs):
            state.trainable.unfreeze(epoch)
            try:
                train_epoch(job, state)
                validation = validate(job, state)
            except TrainingError as error:
                failed = str(error)
                break
            scores.append(validation.score)
            logits.append(validation.logits)
            state.progress = Progress(
                epoch + 1, skipped_in_a_row=state.progress.skipped_in_a_row, skipped_names=state.progress.skipped_names
            )
        found = torch.stack(logits) if logits else torch.zeros(0, 0, 0)
        return Trial(number, config, np.array(scores), found.numpy(), time.perf_counter() - started, failed)


class Trainer:
    """Trains settings of any head, of which one has its features in memory."""

    def __init__(self, study: Study, data_dir: str, first: HeadJob | None = None):
        self.study, self.data_dir, self.job = study, data_dir, first
        self.head = None if first is None else study.config.head

    def __call__(self, number: int, config: TrainingConfig) -> Trial:
        if self.job is None or config.head != self.head:
            self.job = None  # its memory, before that of the next
            self.job, self.head = HeadJob(self.study, config, self.data_dir), config.head
        return self.job.train(number, config)


# ------------------------------------------------------------------ all trials


def run_search(study: Study) -> None:
    """Trains the settings that are not done yet, prints them sorted, and the command of the best."""
    free = [name for name in SEARCHED if name not in study.fixed]
    if study.config.loss_type != "focal" and "loss_type" in study.fixed:
        free = [name for name in free if name not in ("alpha", "gamma")]
    if not free:
        raise TrainingError(f"found flags for all of {', '.join(map(flag_of, SEARCHED))}, expected one that is "
                            "searched; leave one out")
    if study.config.head == "max":
        raise TrainingError("found --head max with --search, expected a head that is trained by gradients alone; train "
                            "it without --search")
    started = time.perf_counter()
    with study.claimed():
        study.write("running")
        first = HeadJob(study, study.config)
        job = first.job
        labels, patients = job.validation.labels.numpy(), [volume.patient for volume in job.validation.volumes]
        if lacks_a_class(labels).all():
            raise TrainingError(f"found no finding with both classes among {plural(len(labels), 'validation volume')}, "
                                "expected some to compare settings by; add volumes, or raise --tuning-fraction")
        heads = searched_heads(study, first)
        job.run.log(job.cohort.summary())
        job.run.log(f"Search: {study.count} settings of {', '.join(map(flag_of, free))} on {len(job.train.volumes)} "
                    f"training volumes, scored on {len(labels)} validation volumes of "
                    f"{plural(len(set(patients)), 'patient')}; heads {', '.join(heads)}\nFolder: {study.folder}")
        configs = {number: draw_setting(study.config, study.fixed, heads, number)
                   for number in range(1, study.count + 1)}
        trials = train_trials(study, first, configs)
        elsewhere = score_elsewhere(trials, labels, patients, study.config.seed)
        rows = sorted(trials, key=lambda trial: (-trial.score, trial.number))
        if rows[0].failed:
            raise TrainingError(f"none of {len(rows)} settings could be trained ({rows[0].failed}), expected one")
        write_results(study, rows, elsewhere, job.phantom)
    print(search_text(study, rows, elsewhere, time.perf_counter() - started))
    if job.phantom:
        print(SYNTHETIC_NOTE)


def searched_heads(study: Study, first: HeadJob) -> tuple[str, ...]:
    """The heads to be compared: the fixed one; or all that train from features that are in the cache already."""
    config, model = study.config, first.job.model
    if "head" in study.fixed or config.init_head == "prompts" or config.is_video:
        return (config.head,)
    if model.is_ctclip:
        return CTCLIP_HEADS
    others = [head for head in SLICE_HEADS if head not in (config.head, "max")]  # max is fitted
    volumes = [volume for split in first.job.splits.values() for volume in split.volumes]
    found = [config.head]
    for head in others:
        other = prepare(replace(config, head=head, data_dir=str(first.job.data_dir)), study.folder, study.machine)
        if None in FeatureCache(config.cache_dir, other.model).rows(volumes):
            first.job.run.log(f"--head {head} is not searched: its features are not in {config.cache_dir}; train a run "
                              "with it first, or search with that flag alone")
        else:
            found.append(head)
    return tuple(sorted(found))


def train_trials(study: Study, first: HeadJob, configs: Mapping[int, TrainingConfig]) -> list[Trial]:
    """All trials, one head after the other, because each has its own features in memory; done ones are read."""
    names, log = first.job.validation.names, first.job.run.log
    folder = make_folder(study.folder / "trials", "change --output-dir")
    paths = {number: folder / f"{number:04d}.npz" for number in configs}
    stored = (read_trial(paths[number], number, config, names) for number, config in configs.items())
    trials = [trial for trial in stored if trial is not None]
    missing = dict(configs)
    for done, trial in enumerate(trials, 1):
        del missing[trial.number]
        log(f"{done:>3}/{study.count}  {trial_text(trial)}")
    try:
        for trial in missing_trials(study, first, missing):
            write_trial(paths[trial.number], trial, names)
            trials.append(trial)
            log(f"{len(trials):>3}/{study.count}  {trial_text(trial)}")
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"{len(trials)} of {study.count} settings are done; {SAME_COMMAND}") from error
    return sorted(trials, key=lambda trial: trial.number)


def missing_trials(study: Study, first: HeadJob, configs: Mapping[int, TrainingConfig]) -> Iterator[Trial]:
    """Each trained; in several processes what is left of a head when its first setting has shown that this is worth
    their start."""
    data_dir = str(first.job.data_dir)
    train = Trainer(study, data_dir, first)
    with ExitStack() as stack:
        workers: TrialWorkers | None = None
        for head in sorted({config.head for config in configs.values()}, key=lambda head: (head != train.head, head)):
            left = {number: config for number, config in configs.items() if config.head == head}
            while left:
                number = min(left)
                trial = train(number, left.pop(number))
                yield trial
                count = processes_to_start(first.job.run.device, len(left))
                if count > 1 and trial.seconds * len(left) > SECONDS_WORTH_PROCESSES:
                    workers = workers or stack.enter_context(TrialWorkers(count, Trainer, study, data_dir))
                    yield from workers.train(left)
                    left = {}


def write_trial(path: Path, trial: Trial, names: Sequence[str]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, config=json.dumps(asdict(trial.config)), names=list(names), scores=trial.scores,
                 logits=trial.logits, seconds=trial.seconds, failed=trial.failed)


def read_trial(path: Path, number: int, config: TrainingConfig, names: Sequence[str]) -> Trial | None:
    """A trial that an earlier process has finished; None where there is none of this configuration. Raises
    TrainingError where it was scored on other volumes."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            content = {name: stored[name] for name in ("config", "names", "scores", "logits", "seconds", "failed")}
    except (OSError, ValueError, KeyError, BadZipFile, EOFError) as error:
        raise TrainingError(f"{path}: found a damaged trial ({error}), expected it as it was written; remove it, and "
                            "it is trained again") from error
    if json.loads(str(content["config"])) != asdict(config):
        return None
    if content["names"].tolist() != list(names):
        raise TrainingError(f"{path}: found other validation volumes than the cohort's split has now, expected the "
                            "same; bring the volumes back, or choose another --output-dir")
    return Trial(number, config, content["scores"], content["logits"], float(content["seconds"]),
                 str(content["failed"]))


# ------------------------------------------------------------------ what the best is worth


def score_elsewhere(
    trials: Sequence[Trial], labels: np.ndarray, patients: Sequence[str], seed: int, resamples: int = RESAMPLES
) -> dict[str, float | int | None]:
    """Macro AUROC of the best setting on patients who did not choose it: setting and epoch are chosen on patients drawn
    with replacement, scored on those who were not drawn, over and over (Tsamardinos, Greasidou and Borboudakis, Machine
    Learning 2018: BBC-CV). -> {"auroc_macro"; "gain": over the first trial, whose epoch is chosen likewise;
    "agreement": share of the resamples that chose the best trial of all; "resamples"}.

    A draw has about 63 % of the patients, so the choice is a little worse than that of all of them. AUROCs of a finding
    are averaged over the resamples in which it has both classes, then over the findings.
    """
    own = [(trial.scores[epoch], trial.number, epoch) for trial in trials for epoch in range(len(trial.scores))]
    kept = sorted(own, key=lambda entry: (-entry[0], entry[1:]))[:MOST_CANDIDATES]
    kept += [entry for entry in own if entry[1] == 1 and entry not in kept]
    by_number = {trial.number: trial for trial in trials}
    drawn = draw(patients, resamples, seed)
    counts = drawn.counts[1:]
    both = Resamples(drawn.group, np.concatenate([counts, (counts == 0).astype(counts.dtype)]))
    aurocs = np.stack([
        ranking_columns(labels, expit(by_number[number].logits[epoch].astype(np.float64)), both, ap=False)["auroc"]
        for _, number, epoch in kept
    ])  # (C, 2 B, L)
    chosen_on, scored_on = nanmean(aurocs[:, :resamples]), aurocs[:, resamples:]
    numbers, best = np.array([number for _, number, _ in kept]), kept[0][1]

    def score(allowed: np.ndarray) -> tuple[float, np.ndarray]:
        """(mean score of what is chosen among these candidates, the trials that were chosen (B,))."""
        picked = np.argmax(np.where(allowed[:, None], np.nan_to_num(chosen_on), -np.inf), axis=0)
        of_findings = nanmean(scored_on[picked, np.arange(resamples)].T)
        return float(nanmean(of_findings)), numbers[picked]

    of_all, picked = score(numbers > 0)
    gain = of_all - score(numbers == 1)[0] if (numbers == 1).any() else None
    return {"auroc_macro": of_all, "gain": gain, "agreement": float((picked == best).mean()), "resamples": resamples}


# ------------------------------------------------------------------ what is written and printed


def command_of(config: TrainingConfig) -> str:
    """The command line that trains a run of this configuration."""
    words = ["python", script("ctclip_training.py")]
    changed: dict[str, Any] = {}
    if config.mode == "quick_test":
        words += ["--mode", config.mode]
        changed = QUICK_TEST
    default, settings = TrainingConfig(**changed), asdict(config)
    own = [item.name for item in fields(TrainingConfig)
           if item.metadata and settings[item.name] != getattr(default, item.name)]
    return " ".join([*words, *map(shlex.quote, flags_of({name: settings[name] for name in own}))])


def write_results(study: Study, rows: Sequence[Trial], elsewhere: Mapping[str, Any], phantom: bool) -> None:
    """search.csv and search.json: the sorted table, the best command, and what it is worth."""
    best = rows[0]
    path = study.folder / "search.csv"
    with writing(study.folder, path.name), replacing(path) as temporary, temporary.open("w", newline="") as file:
        table = csv.DictWriter(file, list(best.row))
        table.writeheader()
        table.writerows(trial.row for trial in rows)
    study.write(
        "finished", note=SYNTHETIC_NOTE if phantom else None,
        best={"trial": best.number, "command": command_of(best.config), **best.row}, on_other_patients=dict(elsewhere),
        trials=[trial.row for trial in rows],
    )


def trial_text(trial: Trial) -> str:
    """A trial as a line of the table."""
    values = settings_of(trial.config)
    focal = f"{values['alpha']:>5.2f}  {values['gamma']:>5.2f}" if trial.config.loss_type == "focal" else f"{'':>12}"
    result = trial.failed or f"{trial.score:.4f}  {trial.best_epoch:>5}"
    rest = f"{values['learning_rate']:>7.2g}  {values['weight_decay']:>7.2g}  {values['dropout']:>7.2f}  {result}"
    return f"{trial.number:>5}  {values['head']:<9}  {values['loss_type']:<5}  {focal}  {rest}"


HEADER = "trial  head       loss   alpha  gamma     rate    decay  dropout  AUROC   epoch"


def search_text(study: Study, rows: Sequence[Trial], elsewhere: Mapping[str, Any], seconds: float) -> str:
    best, first = rows[0], next(trial for trial in rows if trial.number == 1)
    given = "" if first.failed else f" The settings as given (trial 1): {first.score:.3f}."
    gain = "" if elsewhere["gain"] is None else f", {elsewhere['gain']:+.3f} against trial 1"
    return "\n".join([
        "", HEADER, *map(trial_text, rows), "",
        f"Best: trial {best.number}, macro AUROC {best.score:.3f} on the validation patients, who chose it.{given}",
        f"On patients who did not choose: about {decimal(elsewhere['auroc_macro'], 3)}{gain} "
        f"({elsewhere['resamples']} draws of the patients, {100 * elsewhere['agreement']:.0f} % of which chose trial "
        f"{best.number}).",
        f"{study.count} settings in {seconds:.0f} s; table: {study.folder / 'search.csv'}, {study.record.name}",
        "Train the best, then evaluate it on unseen patients:", command_of(best.config),
    ])
