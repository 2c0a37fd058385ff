"""Evaluation: predictions -> tables, scores and pictures in a folder, and back.

train.py writes the evaluation of its best model, predict.py its predictions; tools.evaluate and the
report read such folders. The scores are those of metrics.py and calibration.py.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from adnc.errors import InputError, count
from adnc.files import fingerprint_file, read_csv, read_json, write_csv, write_json
from adnc.scoring import metrics, plots
from adnc.scoring.calibration import score_sets
from adnc.scoring.metrics import (
    AGGREGATED,
    BASELINES,
    METRICS,
    PREDICTIONS,
    SPREAD,
    UNITS,
    aggregate,
    bootstrap_scores,
    summarise,
)

RECORDED = "predictions_sha256"  # in metrics.json: the fingerprint of predictions.csv
COVERAGE = 0.9  # of the prediction sets in a run's own evaluation

# The metrics that tables show beside the baselines. Accuracy decides who is better.
COMPARED = ("accuracy", "balanced_accuracy", "auroc", "brier")

# ---------------------------------------------------------------- from predictions to scores


def statements(checkpoint):
    """Sentences for the title of everything that a checkpoint predicts.

    Returns {"leaks": leaks in its training, "notes": what is unknown about its training}.
    """
    leaks, notes = [], []
    if checkpoint["split_by"] == "slice":
        leaks.append("trained with --split-by slice")
    if checkpoint["test_read_after"]:
        epochs = ", ".join(map(str, checkpoint["test_read_after"]))
        notes.append(f"test was read before, after epoch {epochs}, and the run then trained on")
    if is_drawn(checkpoint):
        notes.append("trained on drawings alone")
    init = checkpoint["init"]
    if init and not init["exposure"]:
        notes.append(f"starts from {init['file']}, which does not record its training subjects")
    return {"leaks": leaks, "notes": notes}


def find_leaks(predictions, leaks=(), notes=()):
    """(leaks, notes): the sentences about a run, and those about exposure and range."""
    leaks, notes = list(leaks), list(notes)
    exposure = predictions.drop_duplicates("scan").exposure
    n_seen, n_unknown = (exposure == "yes").sum(), (exposure == "unknown").sum()
    n_out_of_range = int(predictions.out_of_range.notna().sum())
    if n_seen:
        leaks.append(f"{n_seen} of {len(exposure)} scans are of subjects seen in training")
    if n_unknown:
        notes.append(f"for {n_unknown} scans it is unknown whether training saw the subject")
    if n_out_of_range:
        notes.append(f"{n_out_of_range} of {len(predictions)} slices are out of the training range")
    return leaks, notes


def unseen_rows(tables):
    """Which rows of predictions of the same slices are of subjects that no model has seen in
    training, a boolean Series; None if there are no such rows, or no subjects that one has seen."""
    exposure = pd.concat([table.exposure for table in tables], axis=1)
    unseen = (exposure == "no").all(axis=1)
    if unseen.any() and (exposure == "yes").any(axis=None):
        return unseen
    return None


def score(predictions, title, *, leaks=(), notes=(), coverage=None, runs=(), withheld=None):
    """All scores of labelled slice-level predictions, a dict as in metrics.json.

    `withheld` is the reason of `why_no_verdicts`: then there are only the scores of an order.
    `leaks` and `notes` are sentences about the run. Those about exposure and range are added, and
    all of them are part of the title. If training saw some subjects and not others, the scores of
    the others are also given apart, under "unseen_subjects". `runs` are the metrics.json of the
    runs whose predictions are pooled here; their mean is given under "each_run".
    """
    all_leaks, all_notes = find_leaks(predictions, leaks, notes)
    names = metrics.RANKING if withheld else METRICS
    parts = [title]
    if all_leaks:
        parts.append("LEAKY: " + ", ".join(all_leaks))
    exposure = predictions.drop_duplicates("scan").exposure
    scores = {
        "title": "; ".join([*parts, *all_notes]),
        "what": title,
        "leaks": all_leaks,
        "notes": all_notes,
        "run_leaks": list(leaks),
        "run_notes": list(notes),
        "withheld": withheld,
        "exposure": {name: int((exposure == name).sum()) for name in ("no", "unknown", "yes")},
        **score_part(predictions, coverage, names),
    }
    if len(runs) > 1:
        scores["each_run"] = summarise_runs(runs)
    unseen = unseen_rows([predictions])
    if unseen is not None:
        part = score_part(predictions[unseen], coverage, names)
        scores["unseen_subjects"] = {"title": "only subjects not seen in training", **part}
    scores["conclusion"] = conclude_ranks(scores, withheld) if withheld else conclude(scores)
    return scores


def summarise_runs(runs):
    """Accuracy and AUROC of pooled runs, each with a model of its own, from their metrics.json.

    Pooling ranks the scans of all runs together, although each model has a scale of its own; the
    mean over runs does not.
    """
    unit = "subject" if all(run["subject"] for run in runs) else "scan"
    summary = {"unit": unit, "runs": len(runs)}
    for name in ("accuracy", "auroc"):
        values = [run[unit].get(name) for run in runs]  # None if a run's test has one class alone
        defined = [value for value in values if value is not None]
        if len(defined) > 1:
            mean, sd = float(np.mean(defined)), float(np.std(defined, ddof=1))
            summary[name] = {"values": values, "mean": mean, "sd": sd}
    return summary


def score_part(predictions, coverage, names=METRICS):
    """Scores of the model, the baselines, their differences, and the prediction sets; of the
    METRICS those in `names`."""
    samples = bootstrap_scores(predictions)
    scores = metrics.keep_metrics(summarise(samples), names)

    baselines = {}
    for name in BASELINES:
        if predictions[name].notna().all():
            baselines[name] = bootstrap_scores(metrics.as_baseline(predictions, name))
    if baselines:
        scores["baselines"] = {}
        scores["minus_baseline"] = {}
        for name, baseline in baselines.items():
            difference = metrics.compare(samples, baseline)
            scores["baselines"][name] = metrics.keep_metrics(summarise(baseline), names)
            scores["minus_baseline"][name] = metrics.keep_metrics(difference, names)
    if "dark_share" in baselines and predictions.with_dark_share.notna().all():
        both = bootstrap_scores(metrics.as_baseline(predictions, "with_dark_share"))
        scores["beyond_dark_share"] = compare_with_dark_share(
            samples, both, baselines["dark_share"]
        )

    if predictions.prediction_set.notna().all():
        scores["prediction_sets"] = score_sets(predictions, coverage)
    return scores


def compare_with_dark_share(network, both, dark_share):
    """AUROC of the network minus that of the dark share, and of both together minus it, from
    results of `bootstrap_scores`."""
    differences = {"network_minus": network, "both_minus": both}
    for name, samples in differences.items():
        comparison = metrics.compare(samples, dark_share)
        differences[name] = metrics.keep_metrics(comparison, ("auroc",))
    return differences


# ---------------------------------------------------------------- what the scores say

# The verdicts of `conclude`. With all but "works" the report shows no verdicts on scans.
WORKS, NOT_SHOWN, SWAPPED = "works", "not shown to work", "worse than chance"
TOO_FEW, NO_TEST = "tested on too few subjects", "tested on subjects seen in training"
RANKS_ONLY = "ranks only"

NO_TEST_SENTENCE = "That is no test: a model can recognise subjects that it has seen."
ONE_CLASS = "Only one class is there, so that nothing can be said about telling them apart."


def conclude(scores):
    """What scores as in metrics.json say about a model, in three sentences.

    Returns {"verdict", "unit", "sentences"}: what the model got on subjects not seen in training,
    whether that beats the baselines, and what to do next. The verdict is WORKS if the intervals of
    AUROC and of the accuracy minus that of the larger class lie above 0.5 and above 0.
    """
    part, unit, who = decisive_part(scores)
    sample, exposure = part[unit], scores["exposure"]
    first = (
        f"On {who}: AUROC {cell(sample, 'auroc')}, accuracy {cell(sample, 'accuracy')} "
        f"({unit}-level)."
    )

    worse = find_worse_than_chance(part, unit)
    if worse:
        verdict = SWAPPED
        second = (
            f"{worse} WORSE THAN CHANCE: are AD and NC swapped, in the folders, in the metadata, "
            "or in the training set of this checkpoint?"
        )
        third = "Find out before you use any of these numbers."
    elif part is scores and exposure["yes"]:
        verdict = NO_TEST
        second = NO_TEST_SENTENCE
        third = "Test it on other subjects, or train with --drop-test-subjects."
    elif sample["auroc"] is None:
        verdict = TOO_FEW
        second = ONE_CLASS
        third = "Test it on subjects of both classes."
    elif sample["groups"] < metrics.MIN_GROUPS:
        verdict = TOO_FEW
        second = describe_too_few(sample["groups"])
        third = "Add subjects, or let --fold and --folds predict each of them once."
    else:
        beaten, not_beaten = beaten_baselines(part, unit)
        second = describe_beaten(beaten, not_beaten)
        verdict = NOT_SHOWN if CHANCE in not_beaten else WORKS
        if verdict == NOT_SHOWN and ranks_better_than_chance(sample):
            second += (
                f" It ranks the {unit}s better than chance; that its accuracy is above that of the "
                "larger class is not shown."
            )
        third = next_step(verdict, part, unit)
    return {"verdict": verdict, "unit": unit, "sentences": [first, second, third]}


# Of notes on scans of an ensemble, which change what a sentence calls them.
SOME_HAVE_SEEN = "are of subjects that some members have seen in training"
CALIBRATED_ON_THEM = "the ensemble was calibrated on their labels"


def decisive_part(scores):
    """(part, unit, who) of scores: the subjects not seen in training, if there are others, their
    unit, and what a sentence calls them."""
    part = scores.get("unseen_subjects", scores)
    unit = main_unit(part)
    sample, exposure = part[unit], scores["exposure"]
    who = f"the {sample['n']:,} {unit}s not seen in training"
    if any(SOME_HAVE_SEEN in note for note in scores["run_notes"]):
        who = f"the {sample['n']:,} {unit}s that the members which predict them have not seen"
    if part is scores and exposure["unknown"]:
        who = f"{sample['n']:,} {unit}s of which it is unknown whether training saw them"
        if exposure["no"]:
            who = (
                f"{sample['n']:,} {unit}s (for {exposure['unknown']:,} scans it is unknown whether "
                "training saw the subject)"
            )
    if part is scores and exposure["yes"]:
        who = f"{sample['n']:,} {unit}s, some or all of them seen in training"
    if any(CALIBRATED_ON_THEM in note for note in scores["run_notes"]):
        who += " (the ensemble was calibrated on the labels of some or all of them)"
    if "each_run" in scores:
        who += f", pooled from {scores['each_run']['runs']} runs"
    return part, unit, who


# Why a model gives no verdicts, whatever its test says: the beginning of a sentence.
DREW, NO_CALIBRATION = "The model saw drawings alone", "The members have no common calibration"
UNCALIBRATED = "uncalibrated"  # the design of such an ensemble


def why_no_verdicts(checkpoint):
    """DREW, NO_CALIBRATION, or None if the scores of a checkpoint have a threshold."""
    if is_drawn(checkpoint):
        return DREW
    if checkpoint.get("design") == UNCALIBRATED:
        return NO_CALIBRATION
    return None


def conclude_ranks(scores, why):
    """The conclusion, as of `conclude`, on a model whose scores rank, and have no threshold. `why`
    begins a sentence."""
    part, unit, who = decisive_part(scores)
    first = f"On {who}: AUROC {cell(part[unit], 'auroc')} ({unit}-level)."
    second = (
        f"{why}: its scores only put scans in an order. There is no threshold, and so no accuracy, "
        "sensitivity, specificity or calibration."
    )
    if part is scores and scores["exposure"]["yes"]:
        second += f" {NO_TEST_SENTENCE}"
    if part[unit]["auroc"] is None:
        second += f" {ONE_CLASS}"
    third = "For verdicts, calibrate it: tools.ensemble of folds, or of seeds of one split."
    if why == DREW:
        third = "For verdicts, train on labelled slices: train.py --data AD_NC --recipe small."
    return {"verdict": RANKS_ONLY, "unit": unit, "sentences": [first, second, third]}


def find_worse_than_chance(part, unit):
    """The beginning of a sentence if the interval of the model's AUROC is below 0.5, or that of the
    logistic regression, which learned the same classes, while the model has learned none; else
    None."""
    limits = part[unit]["ci95"]["auroc"]
    if limits and limits[1] < 0.5:
        return "That is"
    baseline = part.get("baselines", {}).get("logistic_regression")
    if baseline is None or ranks_better_than_chance(part[unit]):
        return None
    limits = baseline[unit]["ci95"]["auroc"]
    if limits and limits[1] < 0.5:
        return f"The logistic regression, AUROC {cell(baseline[unit], 'auroc')}, is"
    return None


def ranks_better_than_chance(sample):
    """Whether the interval of the AUROC of a summary is above 0.5."""
    limits = sample["ci95"]["auroc"]  # None if the model says the same of every scan
    return limits is not None and limits[0] > 0.5


# Of weights that were trained on drawings, without a verdict whatever their test on drawings says.
DRAWN = (
    "trained on drawings alone. Its score is the resemblance to drawn atrophy; it grows with age, "
    "too, and is no diagnosis. Only the order of scans made in the same way says something."
)
NOT_TRIED = "What it is worth on real slices is not known."


def describe_distrust(checkpoint):
    """Why the verdicts of a checkpoint should not be used, as sentences, or None if the test of its
    run has shown that it works on real people's slices or on what the user trained it on."""
    if is_drawn(checkpoint):
        return f"{DRAWN} {checkpoint.get('real') or NOT_TRIED}"
    conclusion = checkpoint.get("conclusion")
    if why_no_verdicts(checkpoint) == NO_CALIBRATION:
        return "never tested, since its members have no common calibration."
    if conclusion is None:
        return "never tested, since its run did not finish."
    if conclusion["verdict"] == WORKS:
        return None
    return f"{conclusion['verdict']}. {describe_worth(checkpoint)}"


def is_drawn(checkpoint):
    """Whether a model has seen nothing but drawings of `tools.phantom --cue varied`."""
    return checkpoint["exposure"].get("drawn", False)


def describe_worth(checkpoint):
    """The first two sentences of the conclusion of a checkpoint's run."""
    first, second, _ = checkpoint["conclusion"]["sentences"]
    return f"In the test of its run: {first.replace('On ', 'on ', 1)} {second}"


CHANCE = "guessing"


def beaten_baselines(part, unit):
    """(beaten, not_beaten): names of baselines whose AUROC the model is, and is not, shown to beat.

    The majority class stands for guessing: it is beaten in accuracy, too.
    """
    differences = part.get("minus_baseline", {})
    guessing = ranks_better_than_chance(part[unit])
    if "majority_class" in differences:
        guessing &= metrics.is_better(differences["majority_class"][unit], "accuracy")
    better = {CHANCE: guessing}
    for name in ("logistic_regression", "dark_share"):
        if name in differences:
            better[f"the {BASELINES[name]}"] = metrics.is_better(differences[name][unit], "auroc")
    beaten = [name for name, is_better in better.items() if is_better]
    not_beaten = [name for name, is_better in better.items() if not is_better]
    return beaten, not_beaten


def describe_too_few(n):
    return (
        f"{n} independent subjects are too few to tell whether that beats guessing; "
        f"{metrics.MIN_GROUPS} are needed."
    )


def describe_beaten(beaten, not_beaten):
    if not not_beaten:
        return f"That is shown to beat {join(beaten, 'and')}."
    if not beaten:
        return f"That is NOT shown to beat {join(not_beaten, 'or')}."
    return (
        f"That is shown to beat {join(beaten, 'and')}, and NOT shown to beat "
        f"{join(not_beaten, 'or')}."
    )


def join(names, word):
    """Names as in "a, b and c"."""
    if len(names) == 1:
        return names[0]
    return f"{', '.join(names[:-1])} {word} {names[-1]}"


def next_step(verdict, part, unit):
    if verdict == NOT_SHOWN and ranks_better_than_chance(part[unit]):
        return (
            "Do not use its predictions: test it on more subjects, train longer, or let "
            "--threshold youden choose the threshold on validation."
        )
    if verdict == NOT_SHOWN:
        return (
            "Do not use its predictions: train on more subjects or with another --recipe, and look "
            "at training_curves.png."
        )
    if "beyond_dark_share" in part and not knows_more(part, unit):
        return (
            "It is not shown to know more than the dark share of the head, one number: take that "
            "number (dark_share in scans.csv, the p_AD of a regression on it), or train on more "
            "subjects."
        )
    return "Repeat it with other seeds before you report it; predict.py predicts new slices."


def main_unit(part):
    return "subject" if part["subject"] else "scan"


def knows_more(part, unit):
    """Whether the network, or network and dark share together, are shown to rank better than the
    dark share."""
    differences = part["beyond_dark_share"].values()
    return any(metrics.is_better(difference[unit], "auroc") for difference in differences)


# ---------------------------------------------------------------- scores as text


def cell(part, name):
    """`0.735 [0.588, 0.882]`: a score and its interval, from a dict of scores with ci95."""
    if part is None or part[name] is None:
        return "undefined"
    if part["ci95"][name] is None:
        return f"{part[name]:.3f}"
    low, high = part["ci95"][name]
    return f"{part[name]:.3f} [{low:.3f}, {high:.3f}]"


def format_difference(part):
    """`+0.059 [-0.029, +0.157]`: the difference of a metric, from `metrics.compare`."""
    if part is None:
        return "undefined"
    low, high = part["ci95"]
    return f"{part['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"


def format_table(rows):
    """Lines of a Markdown table, padded for a terminal. The first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows = [rows[0], ["".ljust(width, "-") for width in widths], *rows[1:]]
    lines = []
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row, widths)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def format_scores(scores, title):
    """The result of `summarise` as lines: one row per metric, one column per unit."""
    units = [unit for unit in UNITS if scores[unit] is not None]
    rows = [["", *(f"{unit}s (n = {scores[unit]['n']:,})" for unit in units)]]
    for name, label in METRICS.items():
        if name in scores[units[0]]:
            rows.append([label, *(cell(scores[unit], name) for unit in units)])
    lines = [title, "", *format_table(rows)]
    if "subject" not in units:
        lines += ["", "subject-level: subjects unknown"]
    return lines


def format_baselines(scores):
    """Lines with scan-level scores of model and baselines, and which ones the model beats, in
    accuracy, or if there is none in AUROC."""
    model = scores["scan"]
    compared = [name for name in COMPARED if name in model]
    decisive = compared[0]
    header = [f"scans (n = {model['n']:,})", *(METRICS[name] for name in compared)]
    header.append(f"{METRICS[decisive]} of the model minus it")
    rows = [header, ["the model", *(cell(model, name) for name in compared), ""]]
    beaten, not_beaten = [], []
    for name, part in scores["baselines"].items():
        difference = scores["minus_baseline"][name]["scan"]
        cells = [cell(part["scan"], metric) for metric in compared]
        rows.append([BASELINES[name], *cells, format_difference(difference[decisive])])
        if metrics.is_better(difference, decisive):
            beaten.append(BASELINES[name])
        else:
            not_beaten.append(BASELINES[name])

    sentences = []
    if model["groups"] < metrics.MIN_GROUPS:
        unit = "subjects" if scores["subject"] else "scans of unknown subjects"
        sentences.append(
            f"{model['groups']} {unit} are too few for a verdict; {metrics.MIN_GROUPS} are needed."
        )
    elif model["auroc"] is None:
        sentences.append(ONE_CLASS)
    else:
        if beaten:
            names = ", ".join(beaten)
            sentences.append(f"In scan-level {METRICS[decisive]}, the model beats: {names}.")
        if not_beaten:
            names = ", ".join(not_beaten)
            sentences.append(
                f"In scan-level {METRICS[decisive]}, the model is NOT shown to beat: {names}."
            )
    return ["", *format_table(rows), "", " ".join(sentences)]


def format_sets(scores):
    """A sentence with the scores of the prediction sets."""
    sets = scores["prediction_sets"]
    if sets["n"] == 0:
        return "prediction sets: every scan has a slice out of the training range, and gets AD|NC"
    others = ""
    if sets["n_out_of_range"]:
        n_scans = count(sets["n_out_of_range"], "scan")
        others = f"; {n_scans} out of the training range, AD|NC, left out"
    certain = "no scan has another"
    if sets["n_certain"]:
        accuracy = cell(sets, "accuracy_if_certain")
        certain = f"the other {sets['n_certain']:,} have an accuracy of {accuracy}"
    return (
        f"prediction sets for a coverage of {sets['coverage']:g}, scan-level (n = {sets['n']:,}): "
        f"{cell(sets, 'covered')} contain the label, {cell(sets, 'uncertain')} are AD|NC; "
        f"{certain}{others}"
    )


def format_beyond(scores):
    """Lines on whether the network knows more than the dark share of the head."""
    unit, beyond = main_unit(scores), scores["beyond_dark_share"]
    network, both = beyond["network_minus"][unit]["auroc"], beyond["both_minus"][unit]["auroc"]
    if network is None or both is None:
        return []
    answer = "it does" if knows_more(scores, unit) else "that is not shown"
    return [
        "",
        "Does the network know more than the dark share of the head? "
        f"{unit.capitalize()}-level AUROC of the network minus that of the dark share "
        f"{format_difference(network)}; of both together minus the dark share "
        f"{format_difference(both)}: {answer}.",
    ]


def format_assessment(scores):
    """The result of `score` as lines to print, subjects not seen in training first; the last three
    lines are its conclusion."""
    parts = [scores]
    if "unseen_subjects" in scores:
        parts.insert(0, scores["unseen_subjects"])
    lines = []
    for part in parts:
        lines += format_scores(part, part["title"])
        if "baselines" in part:
            lines += format_baselines(part)
        if "beyond_dark_share" in part:
            lines += format_beyond(part)
        if "prediction_sets" in part:
            lines += ["", format_sets(part)]
        lines.append("")
    return lines + scores["conclusion"]["sentences"]


# ---------------------------------------------------------------- folders of results


def write_results(
    predictions,
    out,
    *,
    title,
    leaks=(),
    notes=(),
    coverage=None,
    calibration=None,
    withheld=None,
    runs=(),
    spread=None,
    members=(),
):
    """Write predictions into the folder `out`: tables, and if every label is known, scores and
    pictures. Of an ensemble, `spread` is its `scan_spread` and `members` are those of its
    checkpoint: members.csv then has the logit of each, and member_runs.csv says which run it is.

    `calibration` is that of the checkpoint; metrics.json records it. `withheld` is the reason of
    `why_no_verdicts`: then no table has a prediction or a threshold, and the scores are those of an
    order. Returns the dict of `score`, or None if a label is missing.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    # A resumed run may have left scores here, which no longer belong to the tables.
    (out / "metrics.json").unlink(missing_ok=True)

    rows = predictions[list(PREDICTIONS)]
    if withheld:
        rows = rows.assign(prediction="", threshold="")
    write_csv(out / "predictions.csv", rows)
    if spread is not None:
        logits = [name for name in predictions if name.startswith("logit_")]
        write_csv(out / "members.csv", predictions[["path", "scan", "slice", *logits]])
        runs_of = pd.DataFrame({
            "member": logits,
            "run": [member["name"] for member in members],
            "temperature": [member["temperature"] for member in members],
        })  # fmt: skip
        write_csv(out / "member_runs.csv", runs_of)
    predictions = predictions[predictions.p_AD.notna()]
    tables = {unit: aggregate(predictions, unit) for unit in UNITS}
    for unit, columns in (("scan", AGGREGATED), ("subject", AGGREGATED[1:])):
        table = tables[unit][list(columns)]
        if withheld:
            table = table.assign(prediction="")
        if unit == "scan":
            table = add_spread(table, spread, withheld)
        write_csv(out / f"{unit}s.csv", table)
    if predictions.empty or predictions.label.isna().any():
        return None

    scores = score(
        predictions, title, leaks=leaks, notes=notes, coverage=coverage, runs=runs,
        withheld=withheld,
    )  # fmt: skip
    if calibration is not None:
        recorded = ("temperature", "threshold", "threshold_rule", "groups")
        scores["calibration"] = {name: calibration[name] for name in recorded}
    scores[RECORDED] = fingerprint_file(out / "predictions.csv")  # for `read_run`
    write_json(out / "metrics.json", scores)

    tables = {unit: table for unit, table in tables.items() if len(table)}
    title = f"{out.resolve().parent.name}/{out.name}: {scores['title']}"
    if not withheld:
        plots.plot_confusion(out / "confusion_matrix.png", tables, title)
        plots.plot_calibration(out / "calibration.png", tables, title)
        plots.plot_risk(out / "risk_coverage.png", tables, title, scores.get("prediction_sets"))
        if tables["slice"].slice.notna().any():
            plots.plot_windows(out / "window_accuracy.png", tables["slice"], title)
    if tables["slice"].label.nunique() == 2:
        plots.plot_roc(out / "roc_curve.png", tables, title)
    return scores


def add_spread(table, spread, withheld):
    """A table of scans with the columns SPREAD, empty for a single model."""
    if spread is None:
        return table.assign(**dict.fromkeys(SPREAD, ""))
    spread = spread.round(4)
    if withheld:
        spread["members_AD"] = ""
    return table.join(spread, on="scan")


def read_run(folder, part="test"):
    """Read the predictions of a run's `part`, or of a folder of predict.py on labelled slices.

    Returns (predictions, scores): the table as `write_results` received it, without files that
    could not be read, and the content of metrics.json. InputError for a folder of another kind, and
    if predictions.csv was changed after metrics.json was written: the scores would silently be
    wrong.
    """
    folder = Path(folder)
    if (folder / "best_model.pth").exists() or (folder / part / "metrics.json").exists():
        folder = folder / part
    if not folder.exists():
        raise InputError(
            f"{folder} does not exist; expected a finished run of train.py, or what predict.py "
            "wrote about labelled slices"
        )
    for name in ("metrics.json", "predictions.csv"):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder} holds no {name}; expected a finished run of train.py, or what "
                "predict.py wrote about labelled slices"
            )
    scores = read_json(folder / "metrics.json")
    try:
        return parse_predictions(folder / "predictions.csv", scores), scores
    except (ValueError, KeyError, TypeError) as problem:
        raise InputError(
            f"{folder} cannot be read ({problem}); expected what train.py or predict.py wrote: "
            "restore it, resume the run, or predict again"
        ) from None


def parse_predictions(path, scores):
    """The table of a predictions.csv with numbers, of the slices that could be read. ValueError if
    it is not the file whose scores metrics.json holds."""
    missing = {"what", "leaks", "notes", "run_leaks", "run_notes", *UNITS} - set(scores)
    if missing:
        raise ValueError(f"there is no {', no '.join(sorted(missing))}")
    if RECORDED in scores and scores[RECORDED] != fingerprint_file(path):
        raise ValueError(f"{path.name} was changed after its scores were written")
    table = read_csv(path)
    missing = set(PREDICTIONS) - set(table)
    if missing:
        raise ValueError(f"there is no {', no '.join(sorted(missing))}")

    # Text to float by Python: the fast parser of pandas may be off in the last digit.
    table = table[table.p_AD.notna()].reset_index(drop=True).astype(metrics.NUMBERS)
    if len(table) != scores["slice"]["n"]:
        raise ValueError("predictions.csv and metrics.json are not of the same slices")
    if table.prediction.isna().all():  # withheld: the model has no threshold
        table = metrics.with_predictions(table)
    return table
