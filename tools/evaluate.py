"""Evaluate predictions: a run once more, the folds of a cross-validation pooled, or two models compared.

    python -m tools.evaluate runs/tiny                              # the test scores of a run
    python -m tools.evaluate runs/fold* --out results               # the out-of-fold predictions of all folds, pooled
    python -m tools.evaluate runs/fold* --against runs/other-fold*  # is the first better, or is it noise?

RUN is a folder of train.py (its test/ is read, or with --part val its val/) or of predict.py on labelled slices. Several
runs must not share a scan, unless they have other seeds: then scores are means over seeds. Printed are the slice-, scan-
and subject-level metrics, the baselines beside them, and prediction sets; --out writes what a run's test/ holds. Nothing
is chosen.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from adnc.cli import Parser, run_script
from adnc.errors import InputError
from adnc.files import new_folder, read_json, require_new, write_json
from adnc.scoring import assess, metrics
from adnc.scoring.assess import COMPARED, cell, format_difference, format_table, read_run
from adnc.scoring.metrics import LOWER_IS_BETTER, METRICS, UNITS, mean_scores

PARTS = {"val": "validation (epoch and calibration were chosen on it)", "test": "test"}

# ---------------------------------------------------------------- finished runs


@dataclass
class Pool:
    """The predictions of runs that share no scan, in one table, and metrics.json of each run."""

    folders: list
    table: pd.DataFrame
    runs: list

    @property
    def stated(self):
        """What the runs state about themselves, once each: {"leaks": sentences, "notes": sentences}."""
        stated = {}
        for name in ("leaks", "notes"):
            sentences = [text for run in self.runs for text in run[f"run_{name}"]]
            stated[name] = list(dict.fromkeys(sentences))
        return stated


def pool(members):
    """The Pool of several runs, a (folder, predictions, metrics.json) each; InputError if two share a scan."""
    folders, tables, runs = map(list, zip(*members))
    owner = {}
    for folder, table in zip(folders, tables):
        for scan in table.scan.unique():
            if scan in owner:
                raise InputError(
                    f"scan {scan} is in {owner[scan]} and in {folder}; expected the folds of one cross-validation, which "
                    "share none, or runs of other seeds"
                )
            owner[scan] = folder
    table = pd.concat(tables, ignore_index=True)
    coverages = {run.get("prediction_sets", {}).get("coverage") for run in runs}
    if len(coverages) != 1 or None in coverages:  # sets of different coverage cannot be pooled
        table["prediction_set"] = pd.array([None] * len(table), "string")
    return Pool(folders, table, runs)


def pool_seeds(folders, part):
    """One Pool of runs that share no scan; of other runs a Pool for each --seed."""
    runs = [(folder, *read_run(folder, part)) for folder in folders]
    scans = pd.concat([table.scan.drop_duplicates() for _, table, _ in runs])
    seeds = [read_flags(folder).get("seed") for folder in folders]
    if not scans.duplicated().any() or None in seeds:  # a folder of predict.py has no seed
        return [pool(runs)]
    by_seed = {}
    for run, seed in zip(runs, seeds):
        by_seed.setdefault(seed, []).append(run)
    return [pool(members) for members in by_seed.values()]


def read_flags(folder):
    """The flags of a run of train.py, {} for a folder of predict.py."""
    path = Path(folder) / "config.json"
    if not path.exists():
        return {}
    try:
        return dict(read_json(path)["flags"])
    except (ValueError, KeyError, TypeError) as problem:
        raise InputError(f"{path} cannot be read ({problem}); expected that of a run of train.py") from None


def describe_flags(pools):
    """Sentences on flags that differ among runs that are pooled or averaged, and on missing folds."""
    free = {"fold", "out", "data", "resume", "device"}
    if len(pools) > 1:
        free.add("seed")
    flags = [read_flags(folder) for one in pools for folder in one.folders]
    flags = [config for config in flags if config]
    if len(flags) < 2:
        return
    first = flags[0]
    differ = [name for name in first if name not in free and any(other.get(name) != first[name] for other in flags)]
    if differ:
        names = ", ".join("--" + name.replace("_", "-") for name in sorted(differ))
        yield f"warning: the runs differ in {names}"
    missing = set(range(first.get("folds") or 0)) - {other.get("fold") for other in flags}
    if missing:
        numbers = ", ".join(map(str, sorted(missing)))
        yield f"warning: of {first['folds']} folds, {numbers} are missing: not all subjects are counted"


def find_leaks(pools):
    """Sentences on the leaks of several Pools, once each."""
    leaks = []
    for one in pools:
        leaks += assess.find_leaks(one.table, **one.stated)[0]
    return list(dict.fromkeys(leaks))


# ---------------------------------------------------------------- comparisons


def align(tables):
    """Tables of the same slices with the same labels, in one order and with the same groups, so that their resamples are
    pairs; else an InputError. A subject that one table does not know is taken from the others."""
    key = ["scan", "slice"]
    first, *others = (table.sort_values(key, ignore_index=True) for table in tables)
    for other in others:
        both = first.merge(other, on=key, how="outer", indicator=True, suffixes=("", "_other"))
        alone = both[both._merge != "both"]
        if len(alone):
            row = alone.iloc[0]
            where = "the first" if row._merge == "left_only" else "the second"
            raise InputError(
                f"{len(alone)} slices are in one of the two only, first {row.scan}_{row.slice} in {where}; expected "
                "predictions of the same slices"
            )
        for name in ("label", "subject"):
            known = both[name].notna() & both[f"{name}_other"].notna()
            differ = both[known & (both[name] != both[f"{name}_other"])]
            if len(differ):
                raise InputError(
                    f"the two disagree on the {name} of {differ.scan.nunique()} scans, first {differ.scan.iloc[0]}; "
                    "expected predictions of the same slices"
                )
        group = first.group.where(first.subject.notna(), other.group)
        first = first.assign(subject=first.subject.combine_first(other.subject), group=group)
    return [table.assign(subject=first.subject, group=first.group) for table in (first, *others)]


def compare_runs(first, second):
    """Compare two lists of Pools, a Pool a seed: dicts of `metrics.compare` with a title that names the leaks of both. If
    training has seen subjects of some scans but not of others, a second dict covers the others alone."""
    tables = align([one.table for one in (*first, *second)])
    title = "first against second, paired bootstrap over subjects"
    if len(tables) > 2:
        title += f", mean over {len(first)} and {len(second)} seeds"
    for name, pools in (("first", first), ("second", second)):
        leaks = find_leaks(pools)
        if leaks:
            title += f"; {name} LEAKY: {', '.join(leaks)}"
    comparisons = {title: tables}
    unseen = pd.concat([table.exposure == "no" for table in tables], axis=1).all(axis=1)
    if unseen.any() and not unseen.all():
        comparisons["the same, only subjects that neither has seen in training"] = [table[unseen] for table in tables]
    for title, parts in comparisons.items():
        one, other = mean_scores(parts[: len(first)]), mean_scores(parts[len(first) :])
        yield {"title": title, **metrics.compare(one, other)}


def format_comparison(comparison):
    """The dict of `compare_runs` as lines: a row a metric, a column a unit."""
    units = [unit for unit in UNITS if comparison[unit] is not None]
    rows = [["first minus second", *(f"{unit}-level" for unit in units)]]
    for name, label in METRICS.items():
        if name in LOWER_IS_BETTER:
            label += " (lower is better)"
        row = [label]
        for unit in units:
            part = comparison[unit][name]
            row.append(f"{format_difference(part)}, p = {part['p']:.3f}" if part else "undefined")
        rows.append(row)

    n_groups, (low, high) = comparison["scan"]["groups"], comparison["scan"]["accuracy"]["ci95"]
    if n_groups < metrics.MIN_GROUPS:
        verdict = f"{n_groups} subjects are too few for a verdict"
    elif low > 0:
        verdict = "the first is better"
    elif high < 0:
        verdict = "the second is better"
    else:
        verdict = "the difference may be noise: its interval contains 0"
    return ["", comparison["title"], "", *format_table(rows), "", f"Scan-level accuracy: {verdict}."]


# ---------------------------------------------------------------- tables


def format_metrics(head, parts, names=COMPARED):
    """Lines of a table of the metrics `names`: a row for each of {label: scores of one unit}."""
    rows = [[head, *(METRICS[name] for name in names)]]
    for label, part in parts.items():
        rows.append([label, *(cell(part, name) for name in names)])
    return format_table(rows)


def format_pool(one, part, out):
    """Lines on one Pool; its tables, scores and pictures are written into the folder `out`, unless it is None."""
    title = f"{one.runs[0]['what']}, {one.folders[0]}"
    if len(one.runs) > 1:
        title = f"{len(one.runs)} runs pooled, {PARTS[part]}"
    coverage = one.runs[0].get("prediction_sets", {}).get("coverage")
    if out:
        scores = assess.write_results(one.table, out, title=title, **one.stated, coverage=coverage)
    else:
        scores = assess.score(one.table, title, **one.stated, coverage=coverage)
    lines = [*describe_flags([one]), *assess.format_assessment(scores)]
    if len(one.runs) > 1:
        accuracies = [run["scan"]["accuracy"] for run in one.runs]
        each = ", ".join(f"{accuracy:.3f}" for accuracy in accuracies)
        mean, sd = np.mean(accuracies), np.std(accuracies, ddof=1)
        lines += ["", f"scan-level accuracy of each run: {each} (mean {mean:.3f}, SD {sd:.3f})"]
    return lines


def format_seeds(pools):
    """Lines on Pools of the same slices, one a seed: scores averaged over them, and those of the baselines."""
    tables, leaks = align([one.table for one in pools]), find_leaks(pools)
    title = f"mean over {len(pools)} seeds"
    if leaks:
        title += f"; LEAKY: {', '.join(leaks)}"
    scores = metrics.summarise(mean_scores(tables))
    unit = "subject" if scores["subject"] else "scan"
    parts = {"the model": scores[unit]}
    for name, label in metrics.BASELINES.items():
        if tables[0][name].notna().all():
            means = mean_scores([metrics.as_baseline(table, name) for table in tables])
            parts[label] = metrics.summarise(means)[unit]
    lines = [*describe_flags(pools), *assess.format_scores(scores, title), ""]
    return lines + format_metrics(f"{unit}s (n = {scores[unit]['n']:,})", parts)


# ---------------------------------------------------------------- command


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or folder of labelled predictions")
    parser.add_argument("--part", choices=("test", "val"), default="test", help="of a run folder (test)")
    parser.add_argument("--against", nargs="+", metavar="RUN", help="predictions of the same scans by another model")
    parser.add_argument("--out", metavar="DIR", help="new folder for tables, metrics.json and pictures")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.out:
        require_new(args.out)
    first = pool_seeds(args.runs, args.part)
    if args.out and len(first) > 1:
        raise InputError(f"--out takes runs of one seed; {', '.join(args.runs)} have {len(first)}")
    second = pool_seeds(args.against, args.part) if args.against else []
    comparisons = list(compare_runs(first, second)) if second else []

    out = new_folder(args.out) if args.out else None
    lines = format_seeds(first) if len(first) > 1 else format_pool(first[0], args.part, out)
    lines += describe_flags(second)
    for comparison in comparisons:
        lines += format_comparison(comparison)
    if out and comparisons:
        unseen = comparisons[1] if len(comparisons) > 1 else None
        write_json(out / "comparison.json", {"against": args.against, **comparisons[0], "unseen_subjects": unseen})
    print("\n".join(lines))
    if out:
        print(f"results in {out}")


if __name__ == "__main__":
    run_script(main)
