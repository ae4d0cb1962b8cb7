"""Fine-tuning: the head on a frozen backbone first, then layer by layer into it, with states that a run resumes from.

A frozen backbone gives the same features for a volume in every epoch, so a frozen epoch reads them from the cache of
`ctclip.data.feature_cache` and costs next to nothing. An unfrozen epoch reads and encodes every volume.
"""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor
from tqdm.auto import tqdm

from ctclip.config import Machine, TrainingConfig, TrainingError
from ctclip.evaluation.run_folder import is_finished
from ctclip.formatting import BAR
from ctclip.inference.predictor import chunks
from ctclip.memory import out_of_memory
from ctclip.training import checkpoint, logging, steps
from ctclip.training.checkpoint import BestEpoch, Progress, TrainingState, save_checkpoint
from ctclip.training.max_head import start_max_head
from ctclip.training.optimization import swapped_in
from ctclip.training.run import TrainingJob, claimed_folder, prepare
from ctclip.training.steps import StepResult, Validation
from ctclip.training.tracking import open_tracker

VALIDATION_CHUNK = 128  # volumes that a rank predicts between two moments at which the state can be saved
BAD_STEPS = 3  # steps in a row that are not finite, after which a run ends


def train(config: TrainingConfig, folder: Path | None = None, machine: Machine | None = None) -> Path:
    """Starts or resumes the training run of `folder` (None: starts one in a new folder under results/), which no other
    process can meanwhile. Returns the folder.

    Raises a UserError or FileNotFoundError with one line for the user, and Interrupted (a KeyboardInterrupt) after
    Ctrl-C or SIGTERM, when the state is saved: the same call resumes from there. A finished run is left as it is.
    """
    start = time.perf_counter()
    job = prepare(config, folder, machine or Machine())
    with claimed_folder(job.run):
        return train_epochs(job, start)


def train_epochs(job: TrainingJob, start: float) -> Path:
    """`train` of a job whose folder is claimed; `start`: when it began, for what it took in all."""
    run, config = job.run, job.run.config
    logging.print_setup(job)
    state = checkpoint.resume_or_start(job)
    if is_finished(run.folder):
        logging.print_finished(run)
        run.ranks.destroy()
        return run.folder
    run.ranks.barrier()  # the others must not see the next line's file
    logging.write_run_file(job, "running")
    if state.history:
        logging.write_history(run, state.history)  # the last line may be missing, after a kill between state and log
    tracker = open_tracker(run, state.progress.epoch)
    with run.stop:
        while state.progress.epoch < config.epochs and not state.progress.stopped:
            state.epoch_start = time.perf_counter() - state.progress.seconds

            # 1. Freeze the backbone, whose features are then cached, or unfreeze its next layers.
            state.trainable.unfreeze(state.progress.epoch)
            open_inputs(job, state)

            # 2. One pass over the training volumes, one over the validation volumes.
            train_loss = train_epoch(job, state)
            validation = validate(job, state)
            record = logging.epoch_record(state, train_loss, validation, time.perf_counter() - state.epoch_start)
            if tracker is not None:
                tracker.log(record)
            state.history.append(record)

            # 3. Keep the best weights; stop early when validation gets worse.
            if validation.score > state.best.score:
                evaluated = state.trainable.tensors() | state.trainable.ema.averages
                tensors = {name: value.cpu().clone() for name, value in evaluated.items()}
                state.best = BestEpoch(
                    validation.score, state.progress.epoch + 1, validation.names, validation.logits, tensors
                )  # fmt: skip
            if (chosen := config.averaged_epochs) and state.progress.epoch + 1 in chosen:
                tensors = state.trainable.tensors(chosen[-1] - 1) | state.trainable.ema.averages
                state.average.add(state.progress.epoch + 1, tensors)
            stopped, bad_epochs = should_stop(job, state, validation)

            # 4. Save.
            state.progress = Progress(
                epoch=state.progress.epoch + 1,
                skipped_in_a_row=state.progress.skipped_in_a_row,
                skipped_names=state.progress.skipped_names,
                bad_epochs=bad_epochs,
                stopped=stopped,
            )
            epochs_done, frozen = state.progress.epoch, state.trainable.backbone_frozen
            # While the backbone is frozen the best weights wait in the state, where they are small.
            milestone = not frozen or epochs_done in (1, config.frozen_epochs, config.epochs)
            if state.best.tensors and milestone:
                checkpoint.save_best(job, state.best)
            state.epoch_start = time.perf_counter()  # of the next epoch
            save_checkpoint(job, state)
            logging.write_history(run, state.history)
            run.log(logging.epoch_line(record, config.epochs))  # after the state: a full disk may take no line
            if stopped:
                run.log(stopped)
            if milestone:
                logging.write_curves(job, state.history)
        compare_average(job, state)
    logging.write_run_file(job, state.progress.stopped or "finished", state.average)
    logging.write_curves(job, state.history)
    logging.print_summary(job, state, time.perf_counter() - start)
    if tracker is not None:
        tracker.close()
    run.ranks.destroy()
    return run.folder


def open_inputs(job: TrainingJob, state: TrainingState) -> None:
    """What the model is given next: features from the cache while the backbone is frozen, after that voxels, which are
    read and encoded each time."""
    if not state.trainable.backbone_frozen:
        state.sources = steps.check_data(job, state.sources)
        for split in job.splits.values():
            split.rows = split.features = None
    elif job.validation.rows is None:
        state.sources = steps.check_data(job, state.sources)
        steps.load_features(job)
        if job.model.head_name == "max" and (state.progress.epoch, state.progress.step) == (0, 0):
            start_max_head(job)


def compare_average(job: TrainingJob, state: TrainingState) -> None:
    """Once all epochs are over: keeps the mean of --average-epochs as the run's weights where it is better than the
    best epoch. Of fewer than two epochs, after an early stop, there is none."""
    average, best = state.average, state.best
    if len(average.epochs) < 2 or average.compared:
        return
    open_inputs(job, state)
    validation = validate(job, state, average.tensors)
    average.compared, average.kept = True, validation.score > best.score
    average.auroc = validation.metrics["auroc_macro"]
    if average.kept:
        state.best = BestEpoch(
            validation.score, best.epoch, validation.names, validation.logits, dict(average.tensors)
        )  # fmt: skip
        checkpoint.save_best(job, state.best)
    state.progress.predicted, average.tensors = {}, {}
    save_checkpoint(job, state)


def train_epoch(job: TrainingJob, state: TrainingState) -> float | None:
    """One pass over the training volumes, from where an earlier process was interrupted.

    Returns the mean loss over all ranks; None where every step was skipped. Saves the steps of an unfrozen epoch; after
    a signal, saves and raises Interrupted.
    """
    run, trainable, progress = job.run, state.trainable, state.progress
    batches, labels = steps.shuffled_batches(job.train, run.config, progress.epoch), job.train.labels
    known = [steps.known_labels(labels[batch]) for batch in batches]
    micro_batches = None
    job.model.train()
    with tqdm(
        total=len(batches), initial=progress.step, desc=f"epoch {progress.epoch + 1}", unit=" steps", bar_format=BAR,
        delay=2, leave=False, disable=not run.ranks.is_main,
    ) as bar:  # fmt: skip
        while progress.step < len(batches):
            if micro_batches is None:
                micro_batches = steps.read_micro_batches(job, batches[progress.step :], progress.epoch)
            snapshot = trainable.snapshot()
            trainable.set_learning_rates(progress.epoch + (progress.step + 0.5) / len(batches))
            try:
                result = steps.accumulate_gradients(job, micro_batches, known[progress.step])
            except (RuntimeError, MemoryError) as error:
                result = StepResult(out_of_memory=out_of_memory(error))
                # The signal that stops this process may have ended a reading process as well.
                if not result.out_of_memory and not (run.stop.number and "DataLoader worker" in str(error)):
                    raise
            lacking, bad, save_due, stopping = run.ranks.all_reduce_max(
                result.out_of_memory, bool(result.not_finite), state.save_is_due(job), run.stop.number
            )
            if stopping or lacking:  # on any rank: as if this step had not begun
                trainable.roll_back(snapshot)
                micro_batches = None  # closes its reading processes before new ones start
                if stopping:
                    break
                run.use_less_memory(job.model)
                continue
            finite = False
            if not bad:
                trainable.average_gradients()
                finite = trainable.clip_and_step()
            trainable.optimizer.zero_grad()
            progress.step += 1
            bar.update()
            count_step(job, state, result, finite)
            if save_due:
                save_checkpoint(job, state)
    (stopping,) = run.ranks.all_reduce_max(run.stop.number)  # a signal on any rank stops all
    if stopping and state.best.tensors:
        checkpoint.save_best(job, state.best)
    if stopping or not trainable.backbone_frozen:
        save_checkpoint(job, state)
    if stopping:
        run.stop.number = int(stopping)
        run.stop.check(f"saved after step {progress.step} of {len(batches)} of epoch {progress.epoch + 1}")
    run.ranks.broadcast(job.model.buffers())  # running statistics of slice backbones
    loss_sum, seen = run.ranks.all_reduce_sum(progress.loss_sum, progress.known)
    if not seen and not progress.skipped:
        raise TrainingError("none of the training volumes could be read; see the lines above")
    return loss_sum / seen if seen else None


def count_step(job: TrainingJob, state: TrainingState, result: StepResult, finite: bool) -> None:
    """Adds a step to the epoch's sums. One that was skipped because its loss or gradient is not finite is counted; too
    many in a row end the run."""
    run, progress = job.run, state.progress
    if finite:
        progress.loss_sum += result.loss_sum
        progress.known += result.known
        state.trained_volumes += result.seen
        progress.skipped_in_a_row, progress.skipped_names = 0, []
        return
    names = sorted({name for part in run.ranks.all_gather(result.not_finite) for name in part})
    progress.skipped += 1
    progress.skipped_in_a_row += 1
    progress.skipped_names = [*progress.skipped_names, *names]
    shown = ", ".join(names) or "gradient"
    run.log(f"Step {progress.step} of epoch {progress.epoch + 1} skipped: not finite ({shown})")
    if progress.skipped_in_a_row >= BAD_STEPS:
        listed = ", ".join(dict.fromkeys(progress.skipped_names)) or "none by itself: the gradients overflow"
        raise TrainingError(
            f"{BAD_STEPS} steps in a row were not finite, expected numbers (volumes: {listed}); look at these volumes, "
            f"or lower --learning-rate (now {run.config.head_learning_rate:g}). The last good state is in {run.folder}"
        )


def validate(job: TrainingJob, state: TrainingState, tensors: dict[str, Tensor] | None = None) -> Validation:
    """Predicts the validation volumes, less those that were predicted before an interruption; saves on the way.
    `tensors` take the place of the model's own (default: the moving average, if there is one)."""
    run, predicted = job.run, state.progress.predicted
    left = [i for i in range(len(job.validation.volumes)) if i not in predicted]
    size = len(left) if state.trainable.backbone_frozen else VALIDATION_CHUNK * run.ranks.world
    for chunk in chunks(left, max(1, size)):
        with swapped_in(job.model, state.trainable.ema.averages if tensors is None else tensors):
            predicted |= steps.predict_validation(job, chunk)
        if run.ranks.all_reduce_max(state.save_is_due(job))[0]:
            save_checkpoint(job, state)
    validation = steps.validation_metrics(job, predicted)
    run.exchange_records()
    return validation


def should_stop(job: TrainingJob, state: TrainingState, validation: Validation) -> tuple[str, int]:
    """Early stopping: (why training ends now, or "", bad epochs in a row). Frozen epochs are never bad ones."""
    best, bad_epochs = state.best, state.progress.bad_epochs + 1
    if best.epoch == state.progress.epoch + 1 or state.trainable.backbone_frozen:
        return "", 0
    if not steps.is_significantly_worse(validation, best.names, best.logits, job.validation):
        return "", 0
    if bad_epochs < job.run.config.patience:
        return "", bad_epochs
    reason = (
        f"validation AUROC below the best ({best.score:.3f}) by more than one standard error in {bad_epochs} epochs in "
        f"a row: back to the weights of epoch {best.epoch}, training ends"
    )
    return reason, bad_epochs
