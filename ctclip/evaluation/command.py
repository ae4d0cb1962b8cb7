"""What the commands that evaluate share: settings from flags; an evaluation printed and written; `--apply`; and
`--example`, a simulated classifier that says "positive" 97 % of the time, to show what calibration and thresholds do.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from ctclip.config import CALIBRATION_FILE, Settings
from ctclip.data.cohort import read_metadata
from ctclip.data.ct_rate import PREVALENCE
from ctclip.data.label_map import LabelMap, read_label_map
from ctclip.data.label_table import listed_findings
from ctclip.data.patients import merge_ids, read_patients
from ctclip.data.tables import CohortError, join
from ctclip.errors import UserError
from ctclip.evaluation.calibration import load_calibration, read_prevalence
from ctclip.evaluation.cases import with_pictures, worst_cases
from ctclip.evaluation.ensemble import check_uncalibrated, combined_inputs, combined_table, stored_ensemble
from ctclip.evaluation.evaluate import Evaluation, evaluate_tables, write_calibrated, write_pictures, write_tables
from ctclip.evaluation.render import format_report
from ctclip.evaluation.run_folder import (
    APPLIED_FILES,
    ELSEWHERE,
    PAGE,
    REPORT_TEXT,
    RESULT_FILES,
    TABLES,
    alone_in,
    check_output_folder,
    is_run,
    own_files,
    run_metadata,
    run_record,
    writing,
)
from ctclip.evaluation.saved_ensemble import (
    check_ensemble_folder,
    check_partners,
    save_ensemble,
    saved_ensemble,
)
from ctclip.evaluation.summary import format_summary
from ctclip.evaluation.tables import (
    EvaluationInputs,
    VolumeTable,
    common_volumes,
    joined,
    patients_of,
    read_labels,
    read_predictions,
    rows_of,
    write_table,
)
from ctclip.evaluation.thresholds import objective_score
from ctclip.fileio import make_folder, naming
from ctclip.formatting import percent, plural
from ctclip.paths import script
from ctclip.phantoms.cohort import is_phantom_cohort

RESAMPLES_BETWEEN = 100, 10_000  # fewer say nothing, more need more memory than they are worth
EXAMPLE_NOTE = "Simulated predictions, neither patients nor a model: AUROC 0.75, and 97 % of all decisions positive."
EXAMPLE_TABLES = (*TABLES, *(f"tuning_{name}" for name in TABLES))
DISTANCE = 0.954  # of two unit normals whose AUROC is 0.75: sqrt(2) * 0.6745
OVERCONFIDENCE = 1.79  # added to the scores, as logits: 97 % of them lie above 0


def settings_from_flags(args: argparse.Namespace) -> Settings:
    """The Settings that the flags of add_evaluation_flags ask for; raises for a wrong value before any work."""
    objective_score(args.objective)
    low, high = RESAMPLES_BETWEEN
    if not low <= args.resamples <= high:
        raise UserError(f"found --resamples {args.resamples}, expected {low} to {high:,}; 1000 are usual")
    if args.pictures < 0:
        raise UserError(f"found --pictures {args.pictures}, expected 0 or more; 0 shows none")
    if args.baseline:
        read_baseline(args.baseline)
        baseline_record(args.baseline)
    if args.metadata:
        read_metadata(args.metadata)
    if getattr(args, "patients", None):
        read_patients(args.patients)
    return Settings(
        args.objective, args.calibration, args.unit, read_prevalence(args.prevalence) if args.prevalence else None,
        args.resamples, allow_partial=args.allow_partial, reference_standard=args.reference_standard,
    )


def read_baseline(
    path: str, findings: Sequence[str] | None = None, label_map: LabelMap | None = None
) -> VolumeTable:
    """`--baseline`: a table of predictions (of `findings`), or a run's folder, whose own is taken."""
    if not Path(path).is_dir():
        return read_predictions(path, findings, label_map)
    table = Path(path, TABLES[0])
    if not table.is_file():
        raise UserError(f"--baseline {path}: found no {table.name} in this folder, expected an evaluated run; evaluate "
                        f"it first: python {script('ctclip_evaluation.py')} --checkpoint {shlex.quote(path)}")
    return read_predictions(table, findings, label_map)


def baseline_record(path: str | None) -> dict:
    """run.json's content of the run that --baseline names, by its folder or its predictions; {} where there is none."""
    if not path:
        return {}
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return run_record(folder) if is_run(folder) else {}


def check_shared(volumes: Collection[str], baseline: str | None, metadata: str | None) -> None:
    """Raises UserError where the table of `--baseline` or `--metadata` has no row for any of the volumes."""
    for path, read in ((baseline, lambda path: read_baseline(path).frame.index), (metadata, read_metadata)):
        if path and not join(volumes, read(path)):
            raise UserError(f"{path}: found no row for any of the {len(volumes)} volumes, expected rows named as they "
                            "are; check VolumeName")


def evaluate_and_write(
    inputs: EvaluationInputs, output_dir: Path, settings: Settings, baseline: str | None, metadata: str | None,
    pictures: int, verbose: bool = False,
) -> Evaluation:
    """Evaluates, writes the tables, prints the summary, draws: a full disk under the log loses none of the tables.

    `baseline` is a file or a run's folder, `metadata` a file; `pictures` says how many of the most wrong volumes of
    each label and kind are shown as slices on the page. `verbose` prints the whole report before the summary.
    """
    check_shared(inputs.predictions.frame.index, baseline, metadata)
    other = read_baseline(baseline, inputs.labels.findings, inputs.label_map) if baseline else None
    groups = read_metadata(metadata) if metadata else run_metadata(inputs.data_dir)
    with threadpool_limits(1):  # of BLAS, whose threads would wait for each other longer than they work
        evaluation = evaluate_tables(inputs, settings, other, groups, baseline_record(baseline))
    with alone_in(make_folder(output_dir, ELSEWHERE)):
        write_tables(output_dir, evaluation)
        with naming("standard output"):
            report = [format_report(evaluation.metrics)] if verbose else []
            print("", *report, format_summary(evaluation.metrics), sep="\n\n" if verbose else "\n", flush=True)
        tables = f"{REPORT_TEXT}, metrics.json, tables (*.csv), {CALIBRATION_FILE}"
        try:
            unread = draw(output_dir, evaluation, pictures)
        except BaseException:
            print(f"\nWrote {output_dir}: {tables}; no {PAGE}, no figures")
            raise
    if unread:
        more = f", and {len(unread) - 1} more" if len(unread) > 1 else ""
        print(f"No picture of {unread[0][0]}: {unread[0][1]}{more}")
    print(f"Report: {output_dir / PAGE} (as text: {REPORT_TEXT}; beside it metrics.json, tables, figures)")
    return evaluation


def check_ensemble(method: str | None, sources: Sequence[str] | None) -> None:
    """Raises UserError for --ensemble where there is a single table or run."""
    if method and len(sources or ()) < 2:
        raise UserError(f"found --ensemble {method} with one source, expected several; name more runs "
                        "(--checkpoint) or tables (--predictions), or leave it out")


def ensemble_to_save(
    name: str | None, runs: Sequence[str] | None, method: str | None, data_dir: str | None,
    output_dir: str | None = None,
) -> Path | None:
    """The folder of --save-ensemble; None without it. Raises UserError, before any work, where nothing can be saved."""
    if name is None:
        return None
    if len(runs or ()) < 2:
        raise UserError("found --save-ensemble with one source, expected several runs; name more (--checkpoint), or "
                        "leave it out")
    for flag, given, remedy in (
        ("--ensemble pooled", method == "pooled", "choose mean or stacked"),
        ("--data-dir", data_dir is not None, "save first, then evaluate the ensemble on the other cohort"),
        ("--output-dir", output_dir is not None, "leave one of them out, as results go to the ensemble's folder"),
    ):
        if given:
            raise UserError(f"found {flag} with --save-ensemble, expected one of them; {remedy}")
    folder = Path("results", name) if Path(name).name == name else Path(name)
    check_ensemble_folder(folder)
    check_output_folder(folder, *RESULT_FILES)
    check_partners(runs or ())
    return folder


def save_evaluated(folder: Path, runs: Sequence[str], inputs: EvaluationInputs) -> str:
    """Keeps runs that have been evaluated together, in the folder of the results; -> what to print."""
    tables = joined({"predictions": inputs.predictions, "labels": inputs.labels})
    volumes, _ = common_volumes(tables, allow_partial=True)
    labels = replace(tables["labels"], lines=())
    reported = inputs.predictions, replace(labels, frame=labels.frame.loc[volumes])
    ensemble = save_ensemble(folder, runs, inputs.ensemble["weights"], inputs.tuning, reported)
    bare = "" if inputs.tuning else "; calibration and thresholds are fitted on the reported patients"
    return f"Saved {folder}: {ensemble.description}{bare}"


def ensemble_folder(output_dir: str | None, method: str | None) -> Path:
    """Where several predictions are evaluated: in a folder that is no run's."""
    folder = Path(output_dir or Path("results", f"ensemble_{method or 'mean'}"))
    check_output_folder(folder, *RESULT_FILES, TABLES[0])
    return folder


def table_inputs(args: argparse.Namespace) -> tuple[EvaluationInputs, Path]:
    """(inputs, output folder) of --predictions with --labels; of several predictions, those of all together."""
    data_dir, given = Path(args.data_dir) if args.data_dir else None, [Path(path) for path in args.predictions]
    label_map = read_label_map(args.label_map) if args.label_map else None
    labels = read_labels(args.labels, listed_findings(args.findings), args.minus_one_is_unknown, label_map)
    tuning_labels, findings = None, labels.findings
    if args.tuning_labels:
        tuning_labels = read_labels(args.tuning_labels, findings, args.minus_one_is_unknown, label_map)
    # a phantom run's tables are about phantoms anywhere
    phantom = any(run_record(path.parent).get("phantom") for path in given)
    phantom = phantom or (data_dir is not None and is_phantom_cohort(data_dir))
    members = []
    for place, path in enumerate(given):
        predictions, tuning = read_predictions(path, findings, label_map), None
        if tuning_labels:
            tuning = read_predictions(args.tuning_predictions[place], findings, label_map), tuning_labels
        patients = patients_of(args.patients, predictions)
        members.append(EvaluationInputs(predictions, labels, tuning, phantom=phantom, data_dir=data_dir,
                                        patients=patients, label_map=label_map))
    if len(members) > 1:
        folder = ensemble_folder(args.output_dir, args.ensemble)
        together = combined_inputs(members, args.ensemble or "mean", args.allow_partial)
        return replace(together, label_map=label_map), folder
    folder = Path(args.output_dir or Path("results", "evaluation"))
    is_own = given[0].name == TABLES[0]
    replaced = [] if is_own and given[0].parent.resolve() == folder.resolve() else [TABLES[0]]
    check_output_folder(folder, *RESULT_FILES, *replaced, own=given[0].parent if is_own else None)
    return members[0], folder


def next_step(
    folder: Path, source: str = "run", ensemble: Mapping | None = None, label_map: LabelMap | None = None
) -> str:
    """What to do after an evaluation, in `folder`, of a "run", of "tables" (of an `ensemble`, by a `label_map`), or of
    the "example"."""
    there, new = shlex.quote(str(folder)), ["NEW.csv"]
    if ensemble and ensemble["method"] != "pooled":
        new = [f"NEW{place}.csv" for place in range(1, 1 + len(ensemble["sources"]))]
    steps = {
        "run": f"{script('run_task2.py')} --mode predict --checkpoint {there} --input SCANS",
        "tables": f"{script('ctclip_evaluation.py')} --apply {there} --predictions {' '.join(new)}"
                  + (f" --label-map {shlex.quote(label_map.name)}" if label_map else ""),
        "example": f"{script('ctclip_evaluation.py')} --predictions PREDICTIONS.csv --labels LABELS.csv",
    }
    return f"Next: python {steps[source]}"


def draw(output_dir: Path, evaluation: Evaluation, pictures: int) -> list[tuple[str, str]]:
    """The figures and the page, with slices of the worst cases; -> (name, reason) of those that cannot be shown."""
    rows, data_dir, evidence = evaluation.rows, evaluation.inputs.data_dir, evaluation.inputs.evidence
    cases = worst_cases(rows, evaluation.fitted)
    unread: list[tuple[str, str]] = []
    if data_dir is not None and pictures:
        try:
            cases, unread = with_pictures(cases, rows.unit, data_dir, pictures, rows.ids, evidence)
        except CohortError as error:  # the volumes may be elsewhere; the metrics need none of them
            unread = [("any volume", str(error))]
    write_pictures(output_dir, evaluation, cases)
    return unread


def read_applied(
    source: str, predictions: Sequence[str], findings: Sequence[str], label_map: LabelMap | None = None
) -> VolumeTable:
    """The table to which the calibration of --apply's `source` is applied; of an ensemble's, the members' combined."""
    folder = Path(source) if Path(source).is_dir() else Path(source).parent
    sources, weights = stored_ensemble(folder / "metrics.json", findings)
    if (ensemble := saved_ensemble(folder)) is not None:  # one table is of the ensemble itself
        sources = [] if len(predictions) == 1 else [str(partner) for partner in ensemble.partners]
        weights = ensemble.weights_of(findings)
    if len(predictions) != len(sources or [""]):
        expected = f"{len(sources)}, those of {', '.join(sources)} in this order" if sources else "one"
        raise UserError(f"found {plural(len(predictions), 'table')} of predictions, expected {expected}, as {folder} "
                        "was evaluated; name them after --predictions")
    tables = [read_predictions(path, findings, label_map) for path in predictions]
    if not sources:
        return tables[0]
    check_uncalibrated(tables)
    tables = list(joined({str(place): table for place, table in enumerate(tables)}).values())
    volumes = list(tables[0].frame.index)
    if other := [table.source for table in tables if set(table.frame.index) != set(volumes)]:
        raise UserError(f"{other[0]}: found other volumes than in {tables[0].source}, expected the same; predict with "
                        "all members of the ensemble")
    ids = merge_ids([(table.source, table.ids) for table in tables], volumes)
    return combined_table(tables, volumes, findings, weights, ids)


def apply_calibration(
    source: str, predictions: Sequence[str], output_dir: Path, patients: str | None = None,
    label_map: str | None = None,
) -> None:
    """`--apply`: other predictions, calibrated and rescaled by a stored calibration, as two tables in `output_dir`,
    with the calibration and its thresholds beside them."""
    path = Path(source, CALIBRATION_FILE) if Path(source).is_dir() else Path(source)
    calibration = load_calibration(path)
    maps = read_label_map(label_map) if label_map else None
    table = read_applied(source, predictions, calibration.findings, maps)
    if table.scale != calibration.scale:
        raise UserError(f"{table.source}: found predictions that are {table.scale}, expected {calibration.scale} ones, "
                        "as the calibration was fitted on; predict with --uncalibrated")
    names = list(table.frame.index)
    ids = merge_ids([(table.source, table.ids), ("--patients", patients_of(patients, table))], names)
    rows = rows_of(table.frame, None, names, calibration.unit, ids=ids)
    files = (*APPLIED_FILES, CALIBRATION_FILE)
    check_output_folder(output_dir, *files)
    copy = output_dir / CALIBRATION_FILE
    if "metrics.json" in own_files(output_dir) and not (copy.exists() and copy.samefile(path)):
        raise UserError(f"{output_dir}: found an evaluation, whose tables and calibration others would replace, "
                        f"expected another folder; {ELSEWHERE}")
    with writing(make_folder(output_dir, ELSEWHERE), *files):
        write_calibrated(output_dir, calibration, rows)
        calibration.save(copy)
    positive = (rows.probabilities >= calibration.thresholds).mean()
    print(f"{len(rows):,} {rows.unit}s; calibration {calibration.method}, thresholds for {calibration.objective}: "
          f"positive rate {percent((rows.probabilities >= 0.5).mean())} at 0.5 uncalibrated, {percent(positive)} tuned")
    print(f"Wrote {output_dir}: {APPLIED_FILES[0]} (calibrated probabilities), {APPLIED_FILES[1]} (tuned thresholds "
          f"rescaled to 0.5), {CALIBRATION_FILE}")


def chosen_from_flags(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line names of the method, objective and prevalence of a calibration, for `run_calibration`."""
    chosen: dict[str, Any] = {}
    if "--calibration" in args.given:
        chosen["method"] = args.calibration
    if "--objective" in args.given:
        objective_score(args.objective)
        chosen["objective"] = args.objective
    if "--prevalence" in args.given:
        chosen["prevalence"] = read_prevalence(args.prevalence)
    return chosen


def example_inputs(folder: Path) -> EvaluationInputs:
    """An over-predictor's tables on 1000 reported and 300 tuning patients, written under a run's names.

    No CT and no model: 18 findings at CT-RATE's rates, a score that ranks each with an AUROC of 0.75, and probabilities
    that are all far too high. A patient's two volumes have one label and nearly one score.
    """
    tables = []
    for prefix, patients, seed in (("", 1000, 0), ("tuning_", 300, 1)):
        rng, shape = np.random.default_rng(seed), (patients, len(PREVALENCE))
        labels = np.repeat(rng.random(shape) < list(PREVALENCE.values()), 2, axis=0).astype(np.int8)
        score = DISTANCE * labels + np.repeat(rng.normal(size=shape), 2, axis=0)
        score = score + 0.05 * rng.normal(size=labels.shape)
        split = "train" if prefix else "valid"
        names = [f"{split}_{patient}_a_{k}.nii.gz" for patient in range(1, 1 + patients) for k in (1, 2)]
        paths = folder / f"{prefix}predictions.csv", folder / f"{prefix}labels.csv"
        with writing(folder, *(path.name for path in paths)):
            write_table(paths[0], names, 1 / (1 + np.exp(-(score + OVERCONFIDENCE))))
            write_table(paths[1], names, labels)
        tables.append((read_predictions(paths[0]), read_labels(paths[1])))
    return EvaluationInputs(*tables[0], tuning=tables[1], note=EXAMPLE_NOTE)
