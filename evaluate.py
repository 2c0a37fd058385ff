"""Evaluate predictions: a run once more, the folds of a cross-validation pooled, or two models against each other.

    python evaluate.py runs/tiny                                 # the test scores of a run
    python evaluate.py runs/fold* --out results                  # the out-of-fold predictions of all folds in one table
    python evaluate.py runs/fold* --against runs/other-fold*     # is the first better, or is it noise?
    python evaluate.py runs/a runs/b --each                      # several runs in one table, not pooled
    python evaluate.py runs/a runs/b --stress                    # what small changes of the slices do to decisions

RUN is a folder of train.py (its test/ is read, or with --part val its val/) or of predict.py on labelled slices.
Several must not share a scan. Printed are the slice-, scan- and subject-level metrics, the baselines beside them,
prediction sets and three ways to get from slices to a scan; --out writes what a run's test/ holds. Nothing is chosen.
"""

import json
from pathlib import Path

from utils import InputError, Parser, read_flags, run_script


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or folder of labelled predictions")
    parser.add_argument("--against", nargs="+", metavar="RUN", help="the same scans by another model: compare the two")
    parser.add_argument("--each", action="store_true", help="do not pool: rows for each run, its val and its test")
    parser.add_argument("--stress", action="store_true", help="change the test slices a little, and look at each stage")
    parser.add_argument("--part", choices=("test", "val"), default="test", help="of a run folder (default: test)")
    parser.add_argument("--out", metavar="DIR", help="write tables, metrics.json and pictures there")
    args = parser.parse_args(argv)
    if args.stress and (args.against or args.each or args.part != "test"):
        parser.error("--stress looks at the test of each run; it goes with --out only")
    if args.each and (args.against or args.out):
        parser.error("--each prints what the runs have written; it does not go with --against or --out")
    return args


if __name__ == "__main__":
    ARGS = read_flags(parse_args)

import numpy as np
import pandas as pd

import assess
import metrics
import plots
from assess import COMPARED, cell, format_difference, format_table, read_run
from metrics import LOWER_IS_BETTER, METRICS, UNITS, bootstrap_scores
from utils import open_out, write_csv, write_json

# ---------------------------------------------------------------- finished runs


def pool(folders, part="test"):
    """The predictions of several runs in one table; returns (predictions, metrics.json of each)."""
    tables, scores, owner = [], [], {}
    for folder in folders:
        table, score = read_run(folder, part)
        for scan in table.scan.unique():
            if scan in owner:
                raise InputError(f"scan {scan} is in {owner[scan]} and in {folder}; expected the folds of one "
                                 "cross-validation, which share none")
            owner[scan] = folder
        tables.append(table)
        scores.append(score)
    table = pd.concat(tables, ignore_index=True)
    coverages = {score.get("prediction_sets", {}).get("coverage") for score in scores}
    if len(coverages) != 1 or None in coverages:  # sets for different promises cannot be pooled
        table["prediction_set"] = pd.array([None] * len(table), "string")
    return table, scores


def warn_of_folds(folders):
    """Sentences on what does not fit in the flags of runs that are pooled."""
    flags = {}
    for folder in folders:
        path = Path(folder) / "config.json"
        if path.exists():
            try:
                flags[folder] = json.loads(path.read_text(encoding="utf-8"))["flags"]
            except (ValueError, KeyError, TypeError) as problem:
                raise InputError(f"{path} cannot be read ({problem}); expected that of a run of train.py") from None
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


def format_comparison(comparison):
    """`compare`'s dict as lines: a row a metric, a column a unit."""
    units = [unit for unit in UNITS if comparison[unit] is not None]
    rows = [["first minus second", *(f"{unit}-level" for unit in units)]]
    for name, label in METRICS.items():
        parts = (comparison[unit][name] for unit in units)
        cells = (f"{format_difference(part)}, p = {part['p']:.3f}" if part else "undefined" for part in parts)
        rows.append([label + " (lower is better)" * (name in LOWER_IS_BETTER), *cells])
    groups, (low, high) = comparison["scan"]["groups"], comparison["scan"]["accuracy"]["ci95"]
    verdict = (f"{groups} subjects are too few for a verdict" if groups < metrics.FEWEST else
               "the first is better" if low > 0 else "the second is better" if high < 0 else
               "the difference may be noise: its interval holds 0")
    return ["", comparison["title"], "", *format_table(rows), "", f"Scan-level accuracy: {verdict}."]


def format_each(folders):
    """Lines of a table of what runs have written themselves: a row for each run, part and unit."""
    rows = [["run", "part", "unit", "n", *(METRICS[name] for name in COMPARED)]]
    for folder in folders:
        parts = [part for part in ("val", "test") if (Path(folder) / part / "metrics.json").exists()] or [""]
        for part in parts:
            _, scores = read_run(folder, part or "test")
            name = (part or "all") + ", LEAKY" * bool(scores["leaks"]) + ", NOT CHECKED" * bool(scores["notes"])
            for title, found in ((name, scores), ("only unseen subjects", scores.get("unseen_subjects"))):
                for unit in UNITS if found else ():
                    if found[unit] is not None:
                        cells = (cell(found[unit], metric) for metric in COMPARED)
                        rows.append([Path(folder).name, title, unit, f"{found[unit]['n']:,}", *cells])
    return format_table(rows)


def check_same(a, b):
    """Two tables of the same slices with the same labels, else an InputError; returned in one order and with the same
    groups, so that their resamples are pairs. A subject that one of them does not know is taken from the other."""
    key = ["scan", "slice"]
    both = a.merge(b, on=key, how="outer", indicator=True, suffixes=("", "_b"))
    alone = both[both._merge != "both"]
    if len(alone):
        row = alone.iloc[0]
        where = "the first" if row._merge == "left_only" else "the second"
        raise InputError(f"{len(alone)} slices are in one of the two only, first {row.scan}_{row.slice} in {where}; "
                         "expected predictions of the same slices")
    for name in ("label", "subject"):
        differ = both[both[name].notna() & both[f"{name}_b"].notna() & (both[name] != both[f"{name}_b"])]
        if len(differ):
            raise InputError(f"the two disagree on the {name} of {differ.scan.nunique()} scans, first "
                             f"{differ.scan.iloc[0]}; expected predictions of the same slices")
    a, b = (table.sort_values(key, ignore_index=True) for table in (a, b))
    who = {"subject": a.subject.combine_first(b.subject), "group": a.group.where(a.subject.notna(), b.group)}
    return a.assign(**who), b.assign(**who)


def statements(runs):
    """What runs state about themselves, once each: {"leaks": sentences, "notes": sentences}."""
    return {name: list(dict.fromkeys(text for run in runs for text in run[f"run_{name}"]))
            for name in ("leaks", "notes")}


def compare_runs(first, second, first_stated, second_stated):
    """Compare two pooled tables: dicts of `metrics.compare` with a title that names the leaks of both. Where training
    has seen subjects of some scans but not of others, a second one is of the latter alone."""
    first, second = check_same(first, second)
    titles, apart = [], pd.Series(True, first.index)
    for name, table, stated in (("first", first, first_stated), ("second", second, second_stated)):
        leaks, _ = assess.find_leaks(table, **stated)
        titles += [f"{name} LEAKY: {', '.join(leaks)}"] if leaks else []
        apart &= table.exposure == "no"
    comparisons = [(first, second, "; ".join(["first against second, paired bootstrap over subjects", *titles]))]
    if apart.any() and not apart.all():
        comparisons.append((first[apart], second[apart], "the same, only subjects that neither has seen in training"))
    for a, b, title in comparisons:
        yield {"title": title, **metrics.compare(bootstrap_scores(a), bootstrap_scores(b))}


def format_aggregations(ways):
    names = ("accuracy", "auroc", "brier", "calibration_error")
    n = next(iter(ways.values()))["n"]
    rows = [[f"scans (n = {n:,}), at 0.5, from their slices by", *(METRICS[name] for name in names)]]
    return format_table(rows + [[way, *(cell(part, name) for name in names)] for way, part in ways.items()])


def show_stress(args):
    """Print, and with --out write, what changes do to the decisions of runs, and what their stages know."""
    import stress
    from runtime import Runtime, pick_amp, pick_device

    out, device = open_out(args.out, "") if args.out else None, pick_device()
    runtime = Runtime(device, pick_amp("auto", device))
    tables, known = {}, {}
    for folder in args.runs:
        test = stress.load_test(folder, read_run(folder)[0])
        tables[folder], known[folder] = stress.stress(*test, runtime), stress.probe(*test, runtime)
    rows = [["change", *(f"{folder} (n = {table.n[0]:,}): {what}" for folder, table in tables.items()
                         for what in ("changed", "AUROC"))]]  # fmt: skip
    for i, row in tables[args.runs[0]].iterrows():
        cells = (cell({what: table[what][i], "ci95": {what: table[f"{what}_ci95"][i]}}, what)
                 for table in tables.values() for what in ("changed", "auroc"))  # fmt: skip
        rows.append([f"{row.change} {row.level}".strip(), *cells])
    title = "share of scans whose decision changes, and scan-level AUROC, if slices are changed"
    print(title, "", *format_table(rows), sep="\n")
    names = dict.fromkeys(name for scores in known.values() for name in scores)
    rows = [["linear read-out", *known]]
    rows += [[f"after {name}", *(f"{scores[name]:.3f}" if name in scores else "" for scores in known.values())]
             for name in names]  # fmt: skip
    title = "scan-level AUROC of a linear read-out of the mean over the map, cross-validated by group"
    print("", title, "", *format_table(rows), sep="\n")
    if out:
        table = pd.concat([table.assign(run=name) for name, table in tables.items()])
        write_csv(out / "stress.csv", table.astype({name: str for name in table if name.endswith("ci95")}))
        plots.plot_stress(out / "stress.png", tables, "decisions that change where the slices are changed")
        print(f"results in {out}")


def main(args):
    if args.stress:
        return show_stress(args)
    if args.each:
        print(*format_each(args.runs), sep="\n")
        return
    predictions, runs = pool(args.runs, args.part)
    stated = statements(runs)
    several = f"{len(runs)} runs pooled, {assess.PARTS[args.part]}"
    title = several if len(runs) > 1 else f"{runs[0]['what']}, {args.runs[0]}"
    extra = dict(title=title, **stated, coverage=runs[0].get("prediction_sets", {}).get("coverage"))
    lines = list(warn_of_folds(args.runs))
    out = open_out(args.out, "") if args.out else None
    scores = assess.write_results(predictions, out, **extra) if out else assess.score(predictions, **extra)
    lines += assess.format_assessment(scores)
    lines += ["", *format_aggregations(metrics.aggregations(predictions))]
    if len(runs) > 1:
        accuracies = [run["scan"]["accuracy"] for run in runs]
        lines.append("")
        lines.append(f"scan-level accuracy of each run: {', '.join(f'{a:.3f}' for a in accuracies)} "
                     f"(mean {np.mean(accuracies):.3f}, SD {np.std(accuracies, ddof=1):.3f})")
    if args.against:
        lines += warn_of_folds(args.against)
        other, other_runs = pool(args.against, args.part)
        comparisons = list(compare_runs(predictions, other, stated, statements(other_runs)))
        for comparison in comparisons:
            lines += format_comparison(comparison)
        if args.out:
            text = {"against": args.against, **comparisons[0], "unseen_subjects": (comparisons[1:] or [None])[0]}
            write_json(Path(args.out) / "comparison.json", text)
    print(*lines, sep="\n")
    if args.out:
        print(f"results in {args.out}")


if __name__ == "__main__":
    run_script(main, ARGS)
