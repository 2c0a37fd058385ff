"""Evaluate predictions: a run once more, the folds of a cross-validation pooled, or two models against each other.

    python evaluate.py runs/tiny                                 # the test tables of a run
    python evaluate.py runs/fold* --out results                  # the out-of-fold predictions of all folds in one table
    python evaluate.py runs/fold* --against runs/other-fold*     # is the first better, or is it noise?
    python evaluate.py runs/a runs/b --each                      # several runs in one table, not pooled

RUN is a folder of train.py (its test/ is read, or with --part val its val/) or of predict.py on labelled slices.
Several must not share a scan. Printed are the metrics by slice, scan and subject, the baselines beside them, prediction
sets and three ways to get from slices to a scan; --out writes what a run's test/ holds. Nothing is chosen here.
"""

import json
from pathlib import Path

from dataset import CLASSES, Parser, run


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or folder of labelled predictions")
    parser.add_argument("--against", nargs="+", metavar="RUN", help="the same scans by another model: compare the two")
    parser.add_argument("--each", action="store_true", help="do not pool: rows for each run, its val and its test")
    parser.add_argument("--part", choices=("test", "val"), default="test", help="of a run folder (default: test)")
    parser.add_argument("--out", metavar="DIR", help="write tables, metrics.json and pictures there")
    parser.add_argument("--markdown", action="store_true", help="print the tables as the README has them")
    args = parser.parse_args(argv)
    if args.each and (args.against or args.out):
        parser.error("--each prints what the runs have written; it does not go with --against or --out")
    return args


# Read before torch is imported, so that --help and a mistyped flag answer at once.
ARGS = parse_args() if __name__ == "__main__" else None

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402

import metrics  # noqa: E402
import utils  # noqa: E402
from baselines import BASELINES  # noqa: E402
from metrics import LOWER_IS_BETTER, METRICS, UNITS, aggregate, sample, score  # noqa: E402

COLUMNS = ["path", "scan", "slice", "subject", "p_AD", "prediction", "label", "error", "unlike"]  # of predictions.csv
PARTS = {"val": "validation (epoch and calibration were chosen on it)", "test": "test"}
COMPARED = ("accuracy", "balanced_accuracy", "auroc", "brier")  # shown beside the baselines; accuracy decides

# ---------------------------------------------------------------- from predictions to figures


def assess(predictions, title, *, leaks=(), notes=(), coverage=None):
    """All figures of labelled predictions by slice, a dict as it stands in metrics.json.

    `leaks` are sentences on the run, such as a split by slice, `notes` others; what the column seen ("yes", "no",
    "unknown") says is added to them, and all go into the title. Where some subjects were seen in training and others
    not, the figures of the others stand under "unseen_subjects".
    """
    what, run_leaks, run_notes = title, list(leaks), list(notes)
    leaks, notes = find_leaks(predictions, leaks, notes)
    title = "; ".join([what] + (["LEAKY: " + ", ".join(leaks)] if leaks else []) + notes)
    figures = {"title": title, "what": what, "leaks": leaks, "notes": notes, "run_leaks": run_leaks,
               "run_notes": run_notes}
    figures |= _figures(predictions, coverage)
    if "seen" in predictions and (predictions.seen == "yes").any() and (predictions.seen == "no").any():
        apart = _figures(predictions[predictions.seen == "no"], coverage)
        figures["unseen_subjects"] = {"title": "only subjects not seen in training", **apart}
    return figures


def find_leaks(predictions, leaks, notes):
    """Sentences (leaks, notes) on a run, and on what the column seen says of its predictions."""
    leaks, notes = list(leaks), list(notes)
    scans = predictions.drop_duplicates("scan")
    seen = scans.seen if "seen" in scans else pd.Series("unknown", scans.index)
    if (seen == "yes").any():
        leaks.append(f"{(seen == 'yes').sum()} of {len(seen)} scans are of subjects seen in training")
    if (seen == "unknown").any():
        notes.append(f"whether training saw the subjects of {(seen == 'unknown').sum()} scans is unknown")
    if "unlike" in predictions and predictions.unlike.notna().any():
        notes.append(f"{predictions.unlike.notna().sum()} of {len(predictions)} slices are unlike those of training")
    return leaks, notes


def _figures(predictions, coverage):
    sampled = sample(predictions)
    figures = score(sampled)
    present = [name for name in BASELINES if name in predictions]
    if present:
        figures["baselines"], figures["minus_baseline"] = {}, {}
        for name in present:
            other = sample(predictions.drop(columns="threshold", errors="ignore").assign(p_AD=predictions[name]))
            figures["baselines"][name] = score(other)
            figures["minus_baseline"][name] = metrics.compare(sampled, other)
    if "prediction_set" in predictions:
        figures["prediction_sets"] = metrics.score_sets(predictions, coverage)
    return figures


# ---------------------------------------------------------------- figures as text


def cell(part, name, digits=3):
    """`0.735 [0.588, 0.882]` of a dict of figures with ci95."""
    if part is None or part[name] is None:
        return "undefined"
    if part["ci95"][name] is None:
        return f"{part[name]:.{digits}f}"
    low, high = part["ci95"][name]
    return f"{part[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def format_table(rows, markdown=False):
    """Lines of a table whose first row is the header."""
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return [lines[0], "| --- " * len(rows[0]) + "|", *lines[1:]]
    widths = [max(map(len, column)) + 3 for column in zip(*rows)]
    return ["".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]


def format_score(figures, title, markdown=False):
    """`score`'s dict as lines: a row a metric, a column a unit."""
    units = [unit for unit in UNITS if figures[unit] is not None]
    rows = [["", *(f"by {unit} (n = {figures[unit]['n']:,})" for unit in units)]]
    rows += [[label, *(cell(figures[unit], name) for unit in units)] for name, label in METRICS.items()]
    lines = [title, "", *format_table(rows, True)] if markdown else [title, *format_table(rows)]
    return lines + ([] if "subject" in units else [""] * markdown + ["by subject: subjects unknown"])


def format_baselines(figures, markdown=False, unit="scan"):
    """The ConvNeXt beside the baselines, and whether it is shown to beat them."""
    header = [f"by {unit} (n = {figures[unit]['n']:,})", *(METRICS[name] for name in COMPARED)]
    rows = [[*header, "accuracy of the ConvNeXt minus it"]]
    rows.append(["ConvNeXt", *(cell(figures[unit], name) for name in COMPARED), ""])
    beaten, unbeaten = [], []
    for name, part in figures["baselines"].items():
        minus = figures["minus_baseline"][name][unit]
        difference = minus["accuracy"]
        low, high = difference["ci95"]
        text = f"{difference['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        rows.append([BASELINES[name], *(cell(part[unit], metric) for metric in COMPARED), text])
        (beaten if metrics.is_better(minus, "accuracy") else unbeaten).append(BASELINES[name])
    verdict = []
    if beaten:
        verdict.append(f"In accuracy by {unit}, the ConvNeXt beats: {', '.join(beaten)}.")
    if figures[unit]["subjects"] < metrics.FEWEST:
        verdict = [f"{figures[unit]['subjects']} subjects are too few for a verdict; it takes {metrics.FEWEST}."]
    elif unbeaten:
        verdict.append(f"In accuracy by {unit}, the ConvNeXt is NOT shown to beat: {', '.join(unbeaten)}.")
    return ["", *format_table(rows, markdown), *([""] if markdown else []), " ".join(verdict)]


def format_sets(figures):
    part = figures["prediction_sets"]
    return [f"prediction sets for a coverage of {part['coverage']:g}, by scan (n = {part['n']:,}): "
            f"{cell(part, 'covered')} hold the label, {cell(part, 'uncertain')} are AD|NC; "
            f"accuracy of the other {part['n_certain']:,} {cell(part, 'accuracy_if_certain')}"]  # fmt: skip


def format_assessment(figures, markdown=False):
    """`assess`'s dict as lines for people."""
    lines = []
    for part in (figures, figures.get("unseen_subjects")):
        if part is not None:
            lines += format_score(part, part["title"], markdown)
            lines += format_baselines(part, markdown) if "baselines" in part else []
            lines += ([""] if markdown else []) + format_sets(part) if "prediction_sets" in part else []
            lines.append("")
    return lines[:-1]


# ---------------------------------------------------------------- figures as files


def write_results(predictions, out, *, title, leaks=(), notes=(), coverage=None, calibration=None):
    """Write the tables, and where all labels are known figures and pictures, of predictions into folder `out`.

    `calibration` is that of the checkpoint, to be told in metrics.json. Returns the dict of `assess`, or None where a
    label is missing.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    pictures = ("confusion_matrix", "roc_curve", "calibration", "window_accuracy", "risk_coverage")
    for name in ("metrics.json", "baselines.csv", "comparison.json", *(f"{name}.png" for name in pictures)):
        (out / name).unlink(missing_ok=True)  # of an earlier prediction, they would not belong to these tables
    utils.write_csv(out / "predictions.csv", predictions[[name for name in COLUMNS if name in predictions]])
    predictions = predictions[predictions.p_AD.notna()]
    tables = {unit: aggregate(predictions, unit) for unit in UNITS}
    columns = ["p_AD", "n_slices", "prediction", "prediction_set", "label", "seen", "n_unlike"]
    if "threshold" in predictions and (predictions.threshold != metrics.THRESHOLD).any():
        columns.append("threshold")
    for unit, keys in (("scan", ["scan", "subject"]), ("subject", ["subject"])):
        table = tables[unit]
        utils.write_csv(out / f"{unit}s.csv", table[keys + [name for name in columns if name in table]])
    if predictions.empty or "label" not in predictions or predictions.label.isna().any():
        return None

    figures = assess(predictions, title, leaks=leaks, notes=notes, coverage=coverage)
    if calibration is not None:
        told = ("temperature", "threshold", "threshold_rule", "subjects")
        figures["calibration"] = {name: calibration[name] for name in told}
    utils.write_json(out / "metrics.json", figures)
    present = [name for name in BASELINES if name in predictions]
    if present:
        utils.write_csv(out / "baselines.csv", predictions[["path", "scan", "slice", *present]])
    title = figures["title"]
    tables = {unit: table for unit, table in tables.items() if len(table)}
    utils.plot_confusion(out / "confusion_matrix.png", tables, title)
    utils.plot_calibration(out / "calibration.png", tables, title)
    utils.plot_risk(out / "risk_coverage.png", tables, title, figures.get("prediction_sets"))
    if predictions.slice.notna().any():
        utils.plot_windows(out / "window_accuracy.png", predictions, title)
    if predictions.label.nunique() == 2:
        utils.plot_roc(out / "roc_curve.png", tables, title)
    return figures


# ---------------------------------------------------------------- finished runs


def read_run(folder, part="test"):
    """Predictions by slice of a run's `part`, or of a folder that predict.py wrote.

    Returns (predictions, facts): a table as `write_results` took it, and what metrics.json says. A folder without
    labels or of another kind is a ValueError.
    """
    folder = Path(folder)
    if (folder / "best_model.pth").exists() or (folder / part / "metrics.json").exists():
        folder = folder / part
    try:
        facts = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        table = utils.read_csv(folder / "predictions.csv")
        scans = utils.read_csv(folder / "scans.csv").set_index("scan")
        missing = {"what", "leaks", "notes", "run_leaks", "run_notes", *UNITS} - set(facts) | (
            {"scan", "slice", "subject", "p_AD", "prediction", "label"} - set(table)) | ({"seen"} - set(scans))
        if missing:
            raise ValueError(f"there is no {', no '.join(sorted(missing))}")
        rest = utils.read_csv(folder / "baselines.csv") if (folder / "baselines.csv").exists() else pd.DataFrame()
        table = table[table.p_AD.notna()].reset_index(drop=True)
        table = table.join(rest[[name for name in BASELINES if name in rest]])
        # text to numbers by Python's float: pandas' fast parser may be off in the last digit
        table = table.astype({name: float for name in ("p_AD", *BASELINES) if name in table} | {"slice": "Int64"})
        if len(table) != facts["slice"]["n"] or set(table.scan) != set(scans.index):
            raise ValueError("its tables and metrics.json are not of the same slices and scans")
        if not (table.p_AD.between(0, 1).all() and table.label.isin(CLASSES).all()):
            raise ValueError("expected a p_AD from 0 to 1 and the label AD or NC in each row of predictions.csv")
    except OSError:
        raise ValueError(f"{folder} holds no predictions with figures; expected a finished run of train.py, or what "
                         "predict.py wrote of labelled slices") from None
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{folder} cannot be read ({problem}); expected what train.py or predict.py wrote") from None
    for name in ("prediction_set", "seen", "threshold"):
        if name in scans:
            table[name] = table.scan.map(scans[name])
    table["threshold"] = table.threshold.astype(float) if "threshold" in table else metrics.THRESHOLD
    if (metrics.with_predictions(table).prediction != table.prediction).any():
        raise ValueError(f"{folder} has been changed: its predictions do not follow from p_AD at its threshold; "
                         "expected what train.py or predict.py wrote")
    return table, facts


def pool(folders, part="test"):
    """The predictions of several runs in one table; returns (predictions, facts of each)."""
    tables, facts, owner = [], [], {}
    for folder in folders:
        table, fact = read_run(folder, part)
        for scan in table.scan.unique():
            if scan in owner:
                raise ValueError(f"scan {scan} stands in {owner[scan]} and in {folder}; expected the folds of one "
                                 "cross-validation, which share none")
            owner[scan] = folder
        tables.append(table)
        facts.append(fact)
    shared = set.intersection(*(set(table.columns) for table in tables))
    return pd.concat([table[[c for c in table if c in shared]] for table in tables], ignore_index=True), facts


def warn_of_folds(folders):
    """Sentences on what does not fit in the flags of runs that are pooled."""
    flags = {}
    for folder in folders:
        path = Path(folder) / "config.json"
        if path.exists():
            try:
                flags[folder] = json.loads(path.read_text(encoding="utf-8"))["flags"]
            except (ValueError, KeyError, TypeError) as problem:
                raise ValueError(f"{path} cannot be read ({problem}); expected that of a run of train.py") from None
    if len(flags) < 2:
        return
    first, one = next(iter(flags.items()))
    differ = sorted({name for other in flags.values() for name in one
                     if name not in ("fold", "out", "data", "resume", "device") and other.get(name) != one[name]})
    if differ:
        yield f"warning: the runs differ in --{', --'.join(name.replace('_', '-') for name in differ)}"
    folds = one.get("folds")
    missing = sorted(set(range(folds or 0)) - {other.get("fold") for other in flags.values()})
    if missing:
        yield f"warning: of {folds} folds, {', '.join(map(str, missing))} are missing: not all subjects are counted"


def format_comparison(comparison, markdown=False):
    """`compare`'s dict as lines: a row a metric, a column a unit."""
    units = [unit for unit in UNITS if comparison[unit] is not None]
    rows = [["first minus second", *(f"by {unit}" for unit in units)]]
    lines = [comparison["title"], *([""] if markdown else [])]
    for name, label in METRICS.items():
        row = [label + (" (lower is better)" if name in LOWER_IS_BETTER else "")]
        for unit in units:
            part = comparison[unit][name]
            if part is None:
                row.append("undefined")
                continue
            low, high = part["ci95"]
            row.append(f"{part['difference']:+.3f} [{low:+.3f}, {high:+.3f}], p = {part['p']:.3f}")
        rows.append(row)
    scan = comparison["scan"]
    low, high = scan["accuracy"]["ci95"]
    verdict = (f"{scan['subjects']} subjects are too few for a verdict" if scan["subjects"] < metrics.FEWEST else
               "the first is better" if low > 0 else "the second is better" if high < 0 else
               "the difference may be noise: its interval holds 0")
    return [*lines, *format_table(rows, markdown), *([""] if markdown else []), f"Accuracy by scan: {verdict}."]


def format_each(folders, markdown=False):
    """Lines of a table of what runs have written themselves: a row for each run, part and unit."""
    names = ("accuracy", "balanced_accuracy", "auroc", "brier")
    rows = [["run", "part", "unit", "n", *(METRICS[name] for name in names)]]
    for folder in folders:
        parts = [part for part in ("val", "test") if (Path(folder) / part / "metrics.json").exists()] or [""]
        for part in parts:
            _, facts = read_run(folder, part or "test")
            name = (part or "all") + ", LEAKY" * bool(facts["leaks"]) + ", NOT CHECKED" * bool(facts["notes"])
            for title, figures in ((name, facts), ("only unseen subjects", facts.get("unseen_subjects"))):
                for unit in UNITS if figures else ():
                    if figures[unit] is not None:
                        cells = (cell(figures[unit], metric) for metric in names)
                        rows.append([Path(folder).name, title, unit, f"{figures[unit]['n']:,}", *cells])
    return format_table(rows, markdown)


def check_same(a, b):
    """Two tables of the same slices with the same labels, else a ValueError; returned in one order and with the same
    subjects, so that their resamples are pairs. A subject that one of them does not know is taken from the other."""
    key = ["scan", "slice"]
    both = a.merge(b, on=key, how="outer", indicator=True, suffixes=("", "_b"))
    alone = both[both._merge != "both"]
    if len(alone):
        row = alone.iloc[0]
        where = "the first" if row._merge == "left_only" else "the second"
        raise ValueError(f"{len(alone)} slices are in one of the two only, first {row.scan}_{row.slice} in {where}; "
                         "expected predictions of the same slices")
    for name in ("label", "subject"):
        differ = both[both[name].notna() & both[f"{name}_b"].notna() & (both[name] != both[f"{name}_b"])]
        if len(differ):
            raise ValueError(f"the two disagree on the {name} of {differ.scan.nunique()} scans, first "
                             f"{differ.scan.iloc[0]}; expected predictions of the same slices")
    a, b = (table.sort_values(key, ignore_index=True) for table in (a, b))
    subject = a.subject.combine_first(b.subject)
    return a.assign(subject=subject), b.assign(subject=subject)


def main(args):
    if args.each:
        print(*format_each(args.runs, args.markdown), sep="\n")
        return
    if args.out and any(Path(args.out).resolve().is_relative_to(Path(folder).resolve()) for folder in args.runs):
        raise ValueError(f"--out {args.out} lies in one of the runs, whose results it would replace; choose another")
    predictions, facts = pool(args.runs, args.part)
    coverages = {fact.get("prediction_sets", {}).get("coverage") for fact in facts}
    if len(coverages) != 1 or None in coverages:  # sets for different promises cannot be pooled
        predictions = predictions.drop(columns="prediction_set", errors="ignore")
    told = said(facts)
    title = f"{facts[0]['what']}, {args.runs[0]}"
    if len(facts) > 1:
        title = f"{len(facts)} runs pooled, {PARTS[args.part]}"
    extra = dict(title=title, **told, coverage=coverages.pop() if len(coverages) == 1 else None)
    lines = list(warn_of_folds(args.runs))
    figures = write_results(predictions, args.out, **extra) if args.out else assess(predictions, **extra)
    lines += format_assessment(figures, args.markdown)
    lines += ["", *format_aggregations(metrics.aggregations(predictions), args.markdown)]
    if len(args.runs) > 1:
        accuracies = [fact["scan"]["accuracy"] for fact in facts]
        lines += [""] * args.markdown
        lines.append(f"accuracy by scan of each run: {', '.join(f'{a:.3f}' for a in accuracies)} "
                     f"(mean {np.mean(accuracies):.3f}, SD {np.std(accuracies, ddof=1):.3f})")
    if args.against:
        lines += warn_of_folds(args.against)
        other, other_facts = pool(args.against, args.part)
        comparisons = list(compare_runs(predictions, other, told, said(other_facts)))
        for comparison in comparisons:
            lines += ["", *format_comparison(comparison, args.markdown)]
        if args.out:
            text = {"against": args.against, **comparisons[0], "unseen_subjects": (comparisons[1:] or [None])[0]}
            utils.write_json(Path(args.out) / "comparison.json", text)
    print(*lines, sep="\n")
    if args.out:
        print(f"results in {args.out}")


def said(facts):
    """What runs have said of themselves, once each: {"leaks": sentences, "notes": sentences}."""
    return {name: list(dict.fromkeys(text for fact in facts for text in fact[f"run_{name}"]))
            for name in ("leaks", "notes")}


def compare_runs(first, second, first_said, second_said):
    """Compare two pooled tables: dicts of `metrics.compare` with a title that tells the leaks of both. Where training
    has seen subjects of some scans but not of others, a second one is of the latter alone."""
    first, second = check_same(first, second)
    titles, apart = [], pd.Series(True, first.index)
    for name, table, told in (("first", first, first_said), ("second", second, second_said)):
        leaks, _ = find_leaks(table, **told)
        titles += [f"{name} LEAKY: {', '.join(leaks)}"] if leaks else []
        apart &= table.seen == "no"
    comparisons = [(first, second, "; ".join(["first against second, paired bootstrap over subjects", *titles]))]
    if apart.any() and not apart.all():
        comparisons.append((first[apart], second[apart], "the same, only subjects that neither has seen in training"))
    for a, b, title in comparisons:
        yield {"title": title, **metrics.compare(sample(a), sample(b))}


def format_aggregations(ways, markdown=False):
    names = ("accuracy", "auroc", "brier", "calibration_error")
    n = next(iter(ways.values()))["n"]
    rows = [[f"a scan (n = {n:,}) from its slices, at 0.5, by", *(METRICS[name] for name in names)]]
    return format_table(rows + [[way, *(cell(part, name) for name in names)] for way, part in ways.items()], markdown)


if __name__ == "__main__":
    run(main, ARGS)
