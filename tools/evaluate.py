"""Evaluate predictions: a run once more, the folds of a cross-validation pooled, or two models against each other.

    python evaluate.py runs/tiny                                 # the test scores of a run
    python evaluate.py runs/fold* --out results                  # the out-of-fold predictions of all folds in one table
    python evaluate.py runs/fold* --against runs/other-fold*     # is the first better, or is it noise?
    python evaluate.py runs/a runs/b --each                      # several runs in one table, not pooled
    python evaluate.py runs/a runs/b --stress                    # what small changes of the slices do to decisions
    python evaluate.py runs/n*-s? --curve curve.png              # how many subjects does it take?

RUN is a folder of train.py (its test/ is read, or with --part val its val/) or of predict.py on labelled slices.
Several must not share a scan, unless they are of other seeds: then scores are means over seeds. Printed are the slice-,
scan- and subject-level metrics, the baselines beside them, prediction sets and three ways to get from slices to a scan;
--out writes what a run's test/ holds. Nothing is chosen.
"""

import json
from pathlib import Path
from typing import NamedTuple

from adnc.cli import InputError, Parser, picture, read_flags, run_script


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or folder of labelled predictions")
    parser.add_argument("--part", choices=("test", "val"), default="test", help="of a run folder (default: test)")
    parser.add_argument("--out", metavar="DIR", help="write tables, metrics.json and pictures there")
    add = parser.add_argument_group("what is asked (default: the scores of all runs, pooled)").add_argument
    add("--against", nargs="+", metavar="RUN", help="the same scans by another model: compare the two")
    add("--each", action="store_true", help="do not pool: rows for each run, its val and its test")
    add("--stress", action="store_true", help="change the test slices a little, and look at each stage")
    add("--curve", type=picture, metavar="PNG", help="AUROC by training subjects, and a picture of it")
    add("--by", nargs=2, metavar=("CSV", "COLUMN"),
        help="AD of each value of a column, such as the severity, against all NC")
    args = parser.parse_args(argv)
    if args.stress and (args.against or args.each or args.part != "test"):
        parser.error("--stress looks at the test of each run; it goes with --out only")
    if args.each and (args.against or args.out):
        parser.error("--each prints what the runs have written; it does not go with --against or --out")
    if args.by and (args.each or args.stress):
        parser.error("--by goes with the scores of pooled runs; leave out --each and --stress")
    if args.curve and (args.against or args.each or args.stress or args.out or args.by):
        parser.error("--curve writes its table and picture only; it goes with --part only")
    return args


if __name__ == "__main__":
    ARGS = read_flags(parse_args)

import numpy as np
import pandas as pd

from adnc.scoring import assess
from adnc.scoring import metrics
from adnc.scoring import plots
from adnc.scoring.assess import COMPARED, cell, format_difference, format_table, read_run
from adnc.files import own_folder, read_bytes, read_csv, read_table, write_csv, write_json
from adnc.scoring.metrics import LOWER_IS_BETTER, METRICS, UNITS, mean_scores
from modules import describe_model

# ---------------------------------------------------------------- finished runs


class Pool(NamedTuple):
    """The predictions of runs that share no scan, in one table, and metrics.json of each run."""

    folders: list
    table: pd.DataFrame
    runs: list

    @property
    def stated(self):
        """What the runs state about themselves, once each: {"leaks": sentences, "notes": sentences}."""
        return {name: list(dict.fromkeys(text for run in self.runs for text in run[f"run_{name}"]))
                for name in ("leaks", "notes")}


def pool(found):
    """The Pool of several runs, a (folder, predictions, metrics.json) each; InputError where two share a scan."""
    folders, tables, scores = map(list, zip(*found))
    owners = pd.concat([pd.Series(folder, table.scan.unique()) for folder, table in zip(folders, tables)])
    again = owners[owners.index.duplicated()]
    if len(again):
        scan = again.index[0]
        raise InputError(f"scan {scan} is in {owners[scan].iloc[0]} and in {again.iloc[0]}; expected the folds of one "
                         "cross-validation, which share none, or runs of other seeds")
    table = pd.concat(tables, ignore_index=True)
    coverages = {score.get("prediction_sets", {}).get("coverage") for score in scores}
    if len(coverages) != 1 or None in coverages:  # sets for different promises cannot be pooled
        table["prediction_set"] = pd.array([None] * len(table), "string")
    return Pool(folders, table, scores)


def pool_seeds(folders, part):
    """The Pool of runs that share no scan; of others a Pool for each --seed."""
    found, seeds = [(folder, *read_run(folder, part)) for folder in folders], {}
    shared = pd.concat([table.scan.drop_duplicates() for _, table, _ in found]).duplicated().any()
    named = [read_config(folder).get("seed") for folder in folders]
    for run, seed in zip(found, named):  # a folder of predict.py has none
        seeds.setdefault(seed if shared and None not in named else None, []).append(run)
    return [pool(members) for members in seeds.values()]


def find_leaks(pools):
    """Sentences on the leaks of several Pools, once each."""
    return list(dict.fromkeys(leak for found in pools for leak in assess.find_leaks(found.table, **found.stated)[0]))


def read_config(folder):
    """The flags of a run of train.py, {} for a folder of predict.py."""
    path = Path(folder) / "config.json"
    if not path.exists():
        return {}
    try:
        return dict(json.loads(read_bytes(path))["flags"])
    except (ValueError, KeyError, TypeError) as problem:
        raise InputError(f"{path} cannot be read ({problem}); expected that of a run of train.py") from None


def warn_of_flags(pools, *free):
    """Sentences on what does not fit in the flags of runs that are pooled or averaged. `free` flags may differ, and of
    several Pools the seed."""
    free = {"fold", "out", "data", "resume", "device", *free, *["seed"] * (len(pools) > 1)}
    folders = [folder for found in pools for folder in found.folders]
    flags = [config for config in map(read_config, folders) if config]
    if len(flags) < 2:
        return
    one = flags[0]
    differ = sorted(name for name in one if name not in free and any(other.get(name) != one[name] for other in flags))
    if differ:
        yield f"warning: the runs differ in --{', --'.join(name.replace('_', '-') for name in differ)}"
    folds = one.get("folds")
    missing = sorted(set(range(folds or 0)) - {other.get("fold") for other in flags})
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
    names = [Path(folder).absolute().name for folder in folders]
    names = names if len(set(names)) == len(names) else list(map(str, folders))
    for called, folder in zip(names, folders):
        parts = [part for part in ("val", "test") if (Path(folder) / part / "metrics.json").exists()] or [""]
        for part in parts:
            _, scores = read_run(folder, part or "test")
            name = (part or "all") + ", LEAKY" * bool(scores["leaks"]) + ", NOT CHECKED" * bool(scores["notes"])
            for title, found in ((name, scores), ("only unseen subjects", scores.get("unseen_subjects"))):
                for unit in UNITS if found else ():
                    if found[unit] is not None:
                        cells = (cell(found[unit], metric) for metric in COMPARED)
                        rows.append([called, title, unit, f"{found[unit]['n']:,}", *cells])
    return format_table(rows)


def check_same(tables):
    """Tables of the same slices with the same labels, else an InputError; returned in one order and with the same
    groups, so that their resamples are pairs. A subject that one of them does not know is taken from the others."""
    key = ["scan", "slice"]
    first, *others = (table.sort_values(key, ignore_index=True) for table in tables)
    for other in others:
        both = first.merge(other, on=key, how="outer", indicator=True, suffixes=("", "_b"))
        alone = both[both._merge != "both"]
        if len(alone):
            row = alone.iloc[0]
            where = "the first" if row._merge == "left_only" else "the second"
            raise InputError(f"{len(alone)} slices are in one of the two only, first {row.scan}_{row.slice} in "
                             f"{where}; expected predictions of the same slices")
        for name in ("label", "subject"):
            differ = both[both[name].notna() & both[f"{name}_b"].notna() & (both[name] != both[f"{name}_b"])]
            if len(differ):
                raise InputError(f"the two disagree on the {name} of {differ.scan.nunique()} scans, first "
                                 f"{differ.scan.iloc[0]}; expected predictions of the same slices")
        first = first.assign(subject=first.subject.combine_first(other.subject),
                             group=first.group.where(first.subject.notna(), other.group))
    return [table.assign(subject=first.subject, group=first.group) for table in (first, *others)]


def compare_runs(first, second):
    """Compare two lists of Pools, a Pool a seed: dicts of `metrics.compare` with a title that names the leaks of both.
    Where training has seen subjects of some scans but not of others, a second one is of the latter alone."""
    tables = check_same([found.table for found in (*first, *second)])
    title = "first against second, paired bootstrap over subjects"
    if len(tables) > 2:
        title += f", mean over {len(first)} and {len(second)} seeds"
    for name, pools in (("first", first), ("second", second)):
        leaks = find_leaks(pools)
        title += f"; {name} LEAKY: {', '.join(leaks)}" * bool(leaks)
    apart = pd.Series(True, tables[0].index)
    for table in tables:
        apart &= table.exposure == "no"
    comparisons = {title: tables}
    if apart.any() and not apart.all():
        comparisons["the same, only subjects that neither has seen in training"] = [table[apart] for table in tables]
    for title, parts in comparisons.items():
        one, other = mean_scores(parts[: len(first)]), mean_scores(parts[len(first) :])
        yield {"title": title, **metrics.compare(one, other)}


def format_by(tables, file, column):
    """Lines of a table: AD with each value of a column of a CSV file (which has scan or subject, too) against all NC,
    mean over tables of the same slices."""
    column = column.lower()
    known = read_table(file, [column])
    unit = next((name for name in ("scan", "subject") if name in known), None)
    if unit is None:
        raise InputError(f"{file} has the columns {', '.join(known)}; expected scan or subject beside {column}")
    known = known.dropna(subset=[unit, column]).drop_duplicates([unit, column])
    twice = known[unit][known[unit].duplicated()]
    if len(twice):
        raise InputError(f"{file} gives {unit} {twice.iloc[0]} two values of {column}; expected one")
    value = tables[0][unit].map(dict(zip(known[unit], known[column])))
    ad = tables[0].label == "AD"
    if value[ad].isna().all():
        raise InputError(f"{file} knows {column} of none of the AD scans; its {unit} is such as "
                         f"{next(iter(known[unit]), 'missing')}, theirs {tables[0][unit].iloc[0]}")
    rows = [[f"AD with this {column}, against all NC", "subjects", "AUROC", "sensitivity"]]
    for level in sorted(value[ad].dropna().unique()):
        scores = metrics.summarise(mean_scores([table[~ad | (value == level)] for table in tables]))
        part = scores["subject"] or scores["scan"]
        rows.append([level, f"{part['n']}", cell(part, "auroc"), cell(part, "sensitivity")])
    unknown = tables[0].scan[ad & value.isna()].nunique()
    lost = [f"{unknown} AD scans are in no row: {file} does not know theirs"] if unknown else []
    return ["", *format_table(rows), *lost]


def learning_curve(folders, part):
    """Subject-level scores by number of training subjects of each model, mean over seeds: {model: {subjects: scores}},
    with the logistic regression of the first model's runs; and lines on what leaks or does not fit."""
    found = {}
    for folder in folders:
        split, model = read_csv(Path(folder) / "split.csv"), describe_model(read_config(folder)["model"])
        n = split.group[split.split != "test"].nunique()
        found.setdefault(model, {}).setdefault(n, []).append(folder)
    pools = {(model, n): pool_seeds(members, part) for model, sizes in found.items() for n, members in sizes.items()}
    everyone = [one for several in pools.values() for one in several]
    lines = [f"LEAKY: {leak}" for leak in find_leaks(everyone)]
    for model in found:
        lines += warn_of_flags([one for n in found[model] for one in pools[model, n]], "subjects")
    same, curves, blur = iter(check_same([one.table for one in everyone])), {}, metrics.BASELINES["logistic_regression"]
    for (model, n), several in pools.items():
        tables = [next(same) for _ in several]
        names = {model: tables}
        if model == next(iter(found)):
            names[blur] = [metrics.as_baseline(table, "logistic_regression") for table in tables]
        for name, members in names.items():
            means = metrics.summarise(mean_scores(members))
            curves.setdefault(name, {})[n] = means["subject"] or means["scan"]
    return {model: dict(sorted(sizes.items())) for model, sizes in curves.items()}, lines


def show_curve(args):
    curves, lines = learning_curve(args.runs, args.part)
    counts = sorted({n for sizes in curves.values() for n in sizes})
    rows = [["training subjects", *curves]]
    rows += [[f"{n:,}", *(cell(sizes[n], "auroc") if n in sizes else "" for sizes in curves.values())]
             for n in counts]  # fmt: skip
    print("AUROC by number of training subjects, mean over seeds", *lines, "", *format_table(rows), sep="\n")
    plots.plot_curve(args.curve, curves, "; ".join(["how many subjects do you need?", *lines]))
    print(f"\npicture in {args.curve}")


def format_metrics(head, parts, names=COMPARED):
    """Lines of a table of the metrics `names`: a row for each of {label: scores of one unit}."""
    rows = [[head, *(METRICS[name] for name in names)]]
    return format_table(rows + [[label, *(cell(part, name) for name in names)] for label, part in parts.items()])


def show_stress(args, out):
    """Print, and with --out write, what changes do to the decisions of runs, and what their stages know."""
    from docs.experiments import stress
    from adnc.distributed import Runtime, explain_end, pick_amp, pick_device

    device = pick_device()
    runtime = Runtime(device, pick_amp("auto", device))
    tables, known = {}, {}
    for folder in args.runs:
        with explain_end(args):
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
    rows = [["linear read-out", *(f"{folder}: {what}" for folder in known for what in ("AUROC", "spread"))]]
    for name in names:
        cells = (["undefined" if scores[name][0] != scores[name][0] else f"{scores[name][0]:.3f}",
                  f"{scores[name][1]:.2g}"] if name in scores else ["", ""] for scores in known.values())  # fmt: skip
        rows.append([f"after {name}", *sum(cells, [])])
    title = ("scan-level AUROC of a linear read-out of the mean over the map, cross-validated by group; and the "
             "spread: the SD of that mean over slices, relative to its size")  # fmt: skip
    print("", title, "", *format_table(rows), sep="\n")
    if out:
        table = pd.concat([table.assign(run=name) for name, table in tables.items()])
        write_csv(out / "stress.csv", table.astype({name: str for name in table if name.endswith("ci95")}))
        plots.plot_stress(out / "stress.png", tables, "decisions that change where the slices are changed")
        plots.plot_probe(out / "probe.png", known, "what is known after each stage, and how far slices differ there")
        print(f"results in {out}")


def format_pool(found, args, out):
    """Lines on one Pool; its tables, scores and pictures are written into the folder `out`, unless it is None."""
    several = f"{len(found.runs)} runs pooled, {assess.PARTS[args.part]}"
    title = several if len(found.runs) > 1 else f"{found.runs[0]['what']}, {found.folders[0]}"
    extra = dict(title=title, **found.stated, coverage=found.runs[0].get("prediction_sets", {}).get("coverage"))
    lines = list(warn_of_flags([found]))
    scores = assess.write_results(found.table, out, **extra) if out else assess.score(found.table, **extra)
    lines += assess.format_assessment(scores)
    head = f"scans (n = {scores['scan']['n']:,}), at 0.5, from their slices by"
    names = ("accuracy", "auroc", "brier", "calibration_error")
    lines += ["", *format_metrics(head, metrics.aggregations(found.table), names)]
    if len(found.runs) > 1:
        accuracies = [run["scan"]["accuracy"] for run in found.runs]
        lines += ["", f"scan-level accuracy of each run: {', '.join(f'{a:.3f}' for a in accuracies)} "
                  f"(mean {np.mean(accuracies):.3f}, SD {np.std(accuracies, ddof=1):.3f})"]
    return lines


def format_seeds(pools):
    """Lines on Pools of the same slices, one a seed: scores averaged over them, and those of the baselines."""
    tables, leaks = check_same([found.table for found in pools]), find_leaks(pools)
    title = f"mean over {len(pools)} seeds" + f"; LEAKY: {', '.join(leaks)}" * bool(leaks)
    scores = metrics.summarise(mean_scores(tables))
    lines = [*warn_of_flags(pools), *assess.format_scores(scores, title), ""]
    unit = "subject" if scores["subject"] else "scan"
    parts = {"the model": scores[unit]}
    for name, label in metrics.BASELINES.items():
        if tables[0][name].notna().all():
            means = mean_scores([metrics.as_baseline(table, name) for table in tables])
            parts[label] = metrics.summarise(means)[unit]
    return lines + format_metrics(f"{unit}s (n = {scores[unit]['n']:,})", parts)


def main(args):
    with own_folder(args.out) as out:
        evaluate(args, out)


def evaluate(args, out):
    if args.stress:
        return show_stress(args, out)
    if args.curve:
        return show_curve(args)
    if args.each:
        print(*format_each(args.runs), sep="\n")
        return
    first = pool_seeds(args.runs, args.part)
    if args.out and len(first) > 1:
        raise InputError(f"--out takes runs of one seed; {', '.join(args.runs)} are of {len(first)}")
    lines = format_seeds(first) if len(first) > 1 else format_pool(first[0], args, out)
    if args.by:
        lines += format_by(check_same([found.table for found in first]), *args.by)
    if args.against:
        second = pool_seeds(args.against, args.part)
        lines += warn_of_flags(second)
        comparisons = list(compare_runs(first, second))
        for comparison in comparisons:
            lines += format_comparison(comparison)
        if out:
            text = {"against": args.against, **comparisons[0], "unseen_subjects": (comparisons[1:] or [None])[0]}
            write_json(out / "comparison.json", text)
    print(*lines, sep="\n")
    if out:
        print(f"results in {out}")


if __name__ == "__main__":
    run_script(main, ARGS)
