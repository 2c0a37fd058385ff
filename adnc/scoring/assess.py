"""From predictions to a folder of tables, scores and pictures, and back.

Not run by itself: train.py assesses its best model here, predict.py what it predicted, and evaluate.py reads such
folders again. All scores are those of metrics.py; what is decided here is how they are put and what they are called.
"""

import json
from pathlib import Path

import numpy as np

from adnc.scoring import metrics
from adnc.scoring import plots
from adnc.data import subjects
from adnc.scoring.baselines import fit_baselines
from utils import load_checkpoint, save_checkpoint
from adnc.files import read_bytes, read_csv, write_csv, write_json
from adnc.cpu_engine import COVERAGE, calibrated, most_coverage, predict_slices
from adnc.scoring.metrics import AGGREGATED, BASELINES, METRICS, PREDICTIONS, UNITS, aggregate, bootstrap_scores, summarise
from adnc.cli import CLASSES, InputError

PARTS = {"val": "validation (epoch and calibration were chosen on it)", "test": "test"}
COMPARED = ("accuracy", "balanced_accuracy", "auroc", "brier")  # shown beside the baselines; accuracy decides

# ---------------------------------------------------------------- from predictions to scores


def score(predictions, title, *, leaks=(), notes=(), coverage=None):
    """All scores of labelled slice-level predictions, a dict as it is in metrics.json.

    `leaks` are sentences on the run, such as a split by slice, `notes` others; what the column exposure says is added
    to them, and all go into the title. Where some subjects were seen in training and others not, the scores of the
    others are under "unseen_subjects".
    """
    all_leaks, all_notes = find_leaks(predictions, leaks, notes)
    whole = "; ".join([title, *["LEAKY: " + ", ".join(all_leaks)] * bool(all_leaks), *all_notes])
    scores = {"title": whole, "what": title, "leaks": all_leaks, "notes": all_notes, "run_leaks": leaks,
              "run_notes": notes, **_scores(predictions, coverage)}
    if (predictions.exposure == "yes").any() and (predictions.exposure == "no").any():
        apart = _scores(predictions[predictions.exposure == "no"], coverage)
        scores["unseen_subjects"] = {"title": "only subjects not seen in training", **apart}
    return scores


def find_leaks(predictions, leaks, notes):
    """Sentences (leaks, notes) on a run, and on what its predictions say about exposure and range."""
    leaks, notes = list(leaks), list(notes)
    exposure, strange = predictions.drop_duplicates("scan").exposure, int(predictions.out_of_range.notna().sum())
    if (exposure == "yes").any():
        leaks.append(f"{(exposure == 'yes').sum()} of {len(exposure)} scans are of subjects seen in training")
    if (exposure == "unknown").any():
        notes.append(f"whether training saw the subjects of {(exposure == 'unknown').sum()} scans is unknown")
    if strange:
        notes.append(f"{strange} of {len(predictions)} slices are out of the training range")
    return leaks, notes


def _scores(predictions, coverage):
    samples = bootstrap_scores(predictions)
    scores = summarise(samples)
    others = {name: bootstrap_scores(metrics.as_baseline(predictions, name)) for name in BASELINES
              if predictions[name].notna().all()}  # fmt: skip
    if others:
        scores["baselines"] = {name: summarise(other) for name, other in others.items()}
        scores["minus_baseline"] = {name: metrics.compare(samples, other) for name, other in others.items()}
    if predictions.prediction_set.notna().all():
        scores["prediction_sets"] = metrics.score_sets(predictions, coverage)
    return scores


# ---------------------------------------------------------------- scores as text


def cell(part, name):
    """`0.735 [0.588, 0.882]` of a dict of scores with ci95."""
    if part is None or part[name] is None:
        return "undefined"
    if part["ci95"][name] is None:
        return f"{part[name]:.3f}"
    low, high = part["ci95"][name]
    return f"{part[name]:.3f} [{low:.3f}, {high:.3f}]"


def format_table(rows):
    """Lines of a Markdown table whose first row is the header, padded for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return ["| " + " | ".join(text.ljust(width) for text, width in zip(row, widths)) + " |" for row in rows]


def format_difference(part):
    """`+0.059 [-0.029, +0.157]` of a metric that `metrics.compare` compared."""
    return f"{part['difference']:+.3f} [{part['ci95'][0]:+.3f}, {part['ci95'][1]:+.3f}]"


def format_scores(scores, title):
    """`summarise`'s dict as lines: a row a metric, a column a unit."""
    units = [unit for unit in UNITS if scores[unit] is not None]
    rows = [["", *(f"{unit}s (n = {scores[unit]['n']:,})" for unit in units)]]
    rows += [[label, *(cell(scores[unit], name) for unit in units)] for name, label in METRICS.items()]
    return [title, "", *format_table(rows), *([] if "subject" in units else ["", "subject-level: subjects unknown"])]


def format_baselines(scores):
    """The model beside the baselines, scan-level, and whether it is shown to beat them."""
    model, groups = scores["scan"], scores["scan"]["groups"]
    rows = [[f"scans (n = {model['n']:,})", *(METRICS[name] for name in COMPARED), "accuracy of the model minus it"]]
    rows.append(["the model", *(cell(model, name) for name in COMPARED), ""])
    verbs = {"beats": [], "is NOT shown to beat": []}
    for name, part in scores["baselines"].items():
        minus = scores["minus_baseline"][name]["scan"]
        cells = (cell(part["scan"], metric) for metric in COMPARED)
        rows.append([BASELINES[name], *cells, format_difference(minus["accuracy"])])
        verbs["beats" if metrics.is_better(minus, "accuracy") else "is NOT shown to beat"].append(BASELINES[name])
    said = [f"In scan-level accuracy, the model {verb}: {', '.join(names)}." for verb, names in verbs.items() if names]
    if groups < metrics.FEWEST:
        who = "subjects" if scores["subject"] else "scans of unknown subjects"
        said = [f"{groups} {who} are too few for a verdict; it takes {metrics.FEWEST}."]
    return ["", *format_table(rows), "", " ".join(said)]


def format_sets(scores):
    """What the prediction sets achieved, a sentence."""
    sets = scores["prediction_sets"]
    return (f"prediction sets for a coverage of {sets['coverage']:g}, scan-level (n = {sets['n']:,}): "
            f"{cell(sets, 'covered')} hold the label, {cell(sets, 'uncertain')} are AD|NC; accuracy of the other "
            f"{sets['n_certain']:,} {cell(sets, 'accuracy_if_certain')}")


def format_assessment(scores):
    """`score`'s dict as lines for people."""
    lines = []
    for part in filter(None, (scores, scores.get("unseen_subjects"))):
        lines += format_scores(part, part["title"])
        lines += format_baselines(part) if "baselines" in part else []
        lines += ["", format_sets(part)] if "prediction_sets" in part else []
        lines.append("")
    return lines[:-1]


# ---------------------------------------------------------------- scores as files


def write_results(predictions, out, *, title, leaks=(), notes=(), coverage=None, calibration=None):
    """Write the tables, and where all labels are known scores and pictures, of predictions into folder `out`.

    `calibration` is that of the checkpoint, to be recorded in metrics.json. Returns the dict of `score`, or None where
    a label is missing.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").unlink(missing_ok=True)  # of a run that is resumed: until the tables are whole
    write_csv(out / "predictions.csv", predictions[list(PREDICTIONS)])
    predictions = predictions[predictions.p_AD.notna()]
    tables = {unit: aggregate(predictions, unit) for unit in UNITS}
    write_csv(out / "scans.csv", tables["scan"][list(AGGREGATED)])
    write_csv(out / "subjects.csv", tables["subject"][list(AGGREGATED[1:])])
    if predictions.empty or predictions.label.isna().any():
        return None

    scores = score(predictions, title, leaks=leaks, notes=notes, coverage=coverage)
    if calibration is not None:
        recorded = ("temperature", "threshold", "threshold_rule", "groups")
        scores["calibration"] = {name: calibration[name] for name in recorded}
    write_json(out / "metrics.json", scores)
    tables, title = {unit: table for unit, table in tables.items() if len(table)}, scores["title"]
    plots.plot_confusion(out / "confusion_matrix.png", tables, title)
    plots.plot_calibration(out / "calibration.png", tables, title)
    plots.plot_risk(out / "risk_coverage.png", tables, title, scores.get("prediction_sets"))
    if tables["slice"].slice.notna().any():
        plots.plot_windows(out / "window_accuracy.png", tables["slice"], title)
    if tables["slice"].label.nunique() == 2:
        plots.plot_roc(out / "roc_curve.png", tables, title)
    return scores


def read_run(folder, part="test"):
    """Slice-level predictions of a run's `part`, or of a folder that predict.py wrote.

    Returns (predictions, scores): a table as `write_results` took it, without the files that could not be read, and
    what metrics.json says. InputError for a folder without labels or of another kind.
    """
    folder = Path(folder)
    if (folder / "best_model.pth").exists() or (folder / part / "metrics.json").exists():
        folder = folder / part
    try:
        for name in ("metrics.json", "predictions.csv"):
            (folder / name).stat()  # an OSError of its own: what is not there is not damaged
        scores = json.loads(read_bytes(folder / "metrics.json"))
        table = read_csv(folder / "predictions.csv")
        missing = {"what", "leaks", "notes", "run_leaks", "run_notes", *UNITS} - set(scores)
        missing |= set(PREDICTIONS) - set(table)
        if missing:
            raise ValueError(f"there is no {', no '.join(sorted(missing))}")
        table = table[table.p_AD.notna()].reset_index(drop=True)
        # text to numbers by Python's float: pandas' fast parser may be off in the last digit
        table = table.astype(metrics.NUMBERS)
        if len(table) != scores["slice"]["n"]:
            raise ValueError("its predictions.csv and metrics.json are not of the same slices")
        if not (table.p_AD.between(0, 1).all() and table.label.isin(CLASSES).all() and table.group.notna().all()):
            raise ValueError("expected a p_AD from 0 to 1, a group and a label AD or NC in each row of predictions.csv")
        whole = ["label", "subject", "group", "threshold", "exposure", "prediction_set"]
        differ = table.groupby("scan")[whole].nunique(dropna=False).gt(1).any(axis=1)
        if differ.any() or not (table.exposure.isin(["yes", "no", "unknown"]).all()
                                and table.prediction_set.dropna().isin(["AD", "NC", "AD|NC"]).all()):
            raise ValueError(f"expected one of {', '.join(whole)} for each scan, as predict.py writes them"
                             + f"; not so for scan {differ.idxmax()}" * bool(differ.any()))
        right = (table.label == table.prediction).mean()
        if not np.isfinite(table.logit).all() or abs(right - scores["slice"]["accuracy"]) > 1e-6:
            raise ValueError("its logits are not finite, or its labels not those of metrics.json")
        if (metrics.with_predictions(table).prediction != table.prediction).any():
            raise ValueError("its predictions do not follow from p_AD at its threshold")
    except OSError:
        raise InputError(f"{folder} holds no predictions with scores; expected a finished run of train.py, or what "
                         "predict.py wrote about labelled slices") from None
    except (ValueError, KeyError, TypeError) as problem:
        raise InputError(f"{folder} cannot be read ({problem}); expected what train.py or predict.py wrote") from None
    return table, scores


# ---------------------------------------------------------------- a run's own assessment


def statements(checkpoint):
    """Sentences for the titles of all that a checkpoint predicts: {"leaks": how its run was split, "notes": what cannot
    be known about it}."""
    init = checkpoint["init"]
    unknown = init and not init["exposure"]
    return {"leaks": ["of a run split by slice"] * (checkpoint["split_by"] == "slice"),
            "notes": [f"starts from {init['file']}, which does not say on whom it was trained"] if unknown else []}


def assess_run(slices, args, run, runtime):
    """Calibrate the best model of a run on val, then assess it on val and, once, on test, by the road of predict.py.

    What is learned here, from train and val alone, goes into best_model.pth: the baselines and the calibration.
    """
    checkpoint = load_checkpoint(run.best)
    last = args.keep == "last"
    run.log(f"{'last' if last else 'best'} epoch {checkpoint['epoch']}{', chosen by validation accuracy' * (not last)}")
    checkpoint["baselines"] = fit_baselines(slices)
    titles = PARTS | ({"val": "validation (calibration was chosen on it)"} if last else {})
    if args.folds is not None:
        titles["test"] = f"fold {args.fold} of {args.folds}, held out of train"
    nobody = subjects.record_exposure(slices.index[:0])
    for split, title in titles.items():
        part = slices.part(split)
        # val was chosen on, and is in the checkpoint's exposure; what is asked about it is whether --init saw it
        init = checkpoint["init"] or {}
        exposure = None if split == "test" else init.get("exposure") or nobody
        # in the order of predict.py, so that its batches, and with them the last digits, are the same
        part.index = part.index.sort_values(["scan", "slice"])
        predictions = predict_slices(checkpoint, part, runtime, batch_size=args.batch_size, exposure=exposure)
        if split == "val":
            checkpoint["calibration"] = metrics.calibrate(predictions, args.threshold)
            save_checkpoint(run.best, **checkpoint)
            who = "subjects" if predictions.subject.notna().all() else "subjects (or scans, where they are unknown)"
            run.log("calibrated on the {groups} {who} of validation: temperature {temperature:.3f}, threshold "
                    "{threshold:.3f}".format(who=who, **checkpoint["calibration"]))
            if most_coverage(checkpoint, COVERAGE):
                run.log(f"too few subjects to promise a coverage of {COVERAGE}: every prediction set is AD|NC")
        stated = statements(checkpoint)
        if stated["leaks"] and split == "val":
            stated["leaks"] = ["split by slice, its scans were trained on"]
        scores = write_results(calibrated(predictions, checkpoint, COVERAGE), run.out / split, title=title, **stated,
                               coverage=COVERAGE, calibration=checkpoint["calibration"])
        if split == "val":  # it was chosen on: a line is enough
            run.log(f"{scores['title']}: accuracy slice-level {cell(scores['slice'], 'accuracy')}, "
                    f"scan-level {cell(scores['scan'], 'accuracy')}")
        else:
            run.log("\n".join(format_assessment(scores)))
