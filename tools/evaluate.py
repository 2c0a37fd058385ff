"""Evaluate predictions: score a run, pool the folds of a cross-validation, compare two models.

    python -m tools.evaluate runs/tiny                              # the test scores of a run
    python -m tools.evaluate runs/fold* --out results               # all folds, pooled
    python -m tools.evaluate runs/fold* --against runs/other-fold*  # better, or is it noise?
    python -m tools.evaluate runs/* --resources                     # time and memory of each run

RUN is a run folder of train.py (its test/ is read, or its val/ with --part val) or a folder of
predict.py on labelled slices; for an ensemble, its AUROC is printed beside the mean AUROC of its
members. Several runs must not share a scan, unless their seeds differ: then the scores are means
over seeds, and the AUROC of their mean logit is printed beside them (tools.ensemble has its other
scores). Prints slice-, scan- and subject-level metrics, the baselines beside them, and the scores
of the prediction sets. --out takes runs of one seed and writes the same files as the test/ of a
run, and with --against comparison.json.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import expit

from adnc.cli import Parser, run_script
from adnc.errors import InputError, count
from adnc.files import new_folder, read_csv, read_json, require_new, write_json
from adnc.resources import resource_rows
from adnc.scoring import assess, metrics
from adnc.scoring.assess import COMPARED, cell, format_difference, format_table, read_run
from adnc.scoring.calibration import fit_across
from adnc.scoring.ensemble import differing_flags, member_logits, scan_spread
from adnc.scoring.metrics import LOWER_IS_BETTER, METRICS, UNITS, mean_scores

# ---------------------------------------------------------------- finished runs


@dataclass
class Pool:
    """Runs that share no subject: their folders, their predictions in one table, and the
    metrics.json of each."""

    folders: list
    table: pd.DataFrame
    runs: list

    @property
    def stated(self):
        """The statements of the runs about themselves, without repeats: {"leaks": sentences,
        "notes": sentences}."""
        stated = {}
        for name in ("leaks", "notes"):
            sentences = [text for run in self.runs for text in run[f"run_{name}"]]
            stated[name] = list(dict.fromkeys(sentences))
        return stated

    @property
    def validation(self):
        """What runs call their validation, which says what was chosen on it, if these are
        predictions of it; else None."""
        whats = (run["what"] for run in self.runs)
        return next((what for what in whats if what.startswith("validation")), None)

    @property
    def withheld(self):
        """The reason of `why_no_verdicts` if a run has one: then there are scores of an order
        alone."""
        return next((run["withheld"] for run in self.runs if run.get("withheld")), None)


def pool(members):
    """Pool runs, each a (folder, predictions, metrics.json). InputError if two share a subject.

    The column scaled_logit is the logit at the temperature of its run, whose scale is comparable.
    Of several runs, network and dark share together are refitted, each run on the others: the
    few subjects of a run's own validation give a noisy fit.
    """
    folders, tables, runs = map(list, zip(*members))
    for unit in ("scan", "group"):  # the group of scans of an unknown subject is their name
        owner = {}
        for folder, table in zip(folders, tables):
            for name in table[unit].unique():
                if name in owner:
                    what = "scan" if unit == "scan" else "subject"
                    raise InputError(
                        f"{what} {name} is in {owner[name]} and in {folder}; expected the folds of "
                        "one cross-validation, which share none, or runs of other seeds"
                    )
                owner[name] = folder

    scaled = []
    for each, run in zip(tables, runs):
        temperature = 1.0  # of a model that is not calibrated
        if run.get("calibration"):
            temperature = run["calibration"]["temperature"]
        scaled.append(each.assign(scaled_logit=each.logit / temperature))
    table = pd.concat(scaled, ignore_index=True)
    if len(scaled) > 1 and table.with_dark_share.notna().all():
        together = fit_across([each.assign(logit=each.scaled_logit) for each in scaled])
        table["with_dark_share"] = np.nan if together is None else np.concatenate(together)
    coverages = {run.get("prediction_sets", {}).get("coverage") for run in runs}
    if len(coverages) != 1 or None in coverages:  # sets of different coverages cannot be pooled
        table["prediction_set"] = pd.Series(None, table.index, dtype="string")
    return Pool(folders, table, runs)


def pool_seeds(folders, part):
    """One Pool if the runs share no scan, else one Pool for each seed."""
    runs = [(folder, *read_run(folder, part)) for folder in folders]
    scans = pd.concat([table.scan.drop_duplicates() for _, table, _ in runs])
    seeds = [read_flags(folder).get("seed") for folder in folders]
    if not scans.duplicated().any() or None in seeds:  # a folder of predict.py has no seed
        return [pool(runs)]
    by_seed = {}
    for run, seed in zip(runs, seeds):
        by_seed.setdefault(seed, []).append(run)
    return [pool(runs_of_seed) for runs_of_seed in by_seed.values()]


def read_flags(folder):
    """The flags of a run of train.py, or {} for a folder of predict.py. If it was resumed with
    other --epochs, these are a list of all that it had."""
    path = Path(folder) / "config.json"
    if not path.exists():
        return {}
    config = read_json(path)
    try:
        flags = dict(config["flags"])
        if config.get("earlier_epochs"):
            flags["epochs"] = [*config["earlier_epochs"], flags["epochs"]]
        return flags
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} holds no flags; expected the file of a run of train.py") from None


def check_flags(pools):
    """Warnings about predictions that cannot be checked, about flags that differ between runs, and
    about missing folds."""
    warnings = []
    unchecked = [
        folder
        for one in pools
        for folder, run in zip(one.folders, one.runs)
        if assess.RECORDED not in run
    ]
    if unchecked:
        which = str(unchecked[0])
        if len(unchecked) > 1:
            which += f" and {count(len(unchecked) - 1, 'other')}"
        warnings.append(
            f"warning: {which}: of an earlier version, which recorded no fingerprint of "
            "predictions.csv, so that changes of it are not noticed"
        )
    flags = [read_flags(folder) for one in pools for folder in one.folders]
    flags = [each for each in flags if each]
    if len(flags) < 2:
        return warnings

    free = {"fold", "data"}  # which differ between runs that are pooled
    if len(pools) > 1:
        free.add("seed")
    differing = differing_flags(flags, free)
    if differing:
        warnings.append(f"warning: the runs differ in {', '.join(differing)}")

    n_folds = max(each.get("folds") or 0 for each in flags)  # 0: their split was given by --split
    missing = set(range(n_folds)) - {each.get("fold") for each in flags}
    if missing:
        numbers = ", ".join(map(str, sorted(missing)))
        warnings.append(
            f"warning: of {n_folds} folds, {numbers} are missing: not all subjects are counted"
        )
    return warnings


def describe_pools(pools):
    """What titles say of several Pools, without repeats: a list of "LEAKY: ..." and their notes."""
    leaks, notes = [], []
    for one in pools:
        of_pool, notes_of_pool = assess.find_leaks(one.table, **one.stated)
        leaks += of_pool
        notes += notes_of_pool
    notes = list(dict.fromkeys(notes))
    if leaks:
        notes.insert(0, f"LEAKY: {', '.join(dict.fromkeys(leaks))}")
    return notes


# ---------------------------------------------------------------- comparisons


def align(tables):
    """Tables of the same slices, in one order and with the same groups, so that resamples pair.

    A subject that one table does not know is taken from the others. InputError if slices, labels or
    subjects differ.
    """
    key = ["scan", "slice"]
    first, *others = (table.sort_values(key, ignore_index=True) for table in tables)
    for other in others:
        both = first.merge(other, on=key, how="outer", indicator=True, suffixes=("", "_other"))
        unpaired = both[both._merge != "both"]
        if len(unpaired):
            row = unpaired.iloc[0]
            raise InputError(
                f"{len(unpaired)} slices are predicted by some of the runs only, first "
                f"{row.scan}_{row.slice}; expected predictions of the same slices"
            )
        for name in ("label", "subject"):
            in_both = both[name].notna() & both[f"{name}_other"].notna()
            differ = both[in_both & (both[name] != both[f"{name}_other"])]
            if len(differ):
                raise InputError(
                    f"the runs disagree on the {name} of {differ.scan.nunique()} scans, first "
                    f"{differ.scan.iloc[0]}; expected predictions of the same slices"
                )
        group = first.group.where(first.subject.notna(), other.group)
        subject = first.subject.combine_first(other.subject)
        first = first.assign(subject=subject, group=group)
    return [table.assign(subject=first.subject, group=first.group) for table in (first, *others)]


def compare_runs(first, second):
    """Compare two lists of Pools, each with one Pool per seed.

    Returns dicts of `metrics.compare` with a title that names the leaks of both sides. If training
    saw the subjects of some scans and not of others, a second dict compares the others alone.
    """
    tables = align([one.table for one in (*first, *second)])
    title = "first against second, paired bootstrap over subjects"
    if len(tables) > 2:
        title += f", mean over {len(first)} and {len(second)} seeds"
    if first[0].validation:
        title += f", {first[0].validation}"
    for name, pools in (("first", first), ("second", second)):
        stated = describe_pools(pools)
        if stated:
            title += f"; {name}: {'; '.join(stated)}"
    comparisons = {title: tables}

    unseen = assess.unseen_rows(tables)
    if unseen is not None:
        title = "the same, only subjects that neither has seen in training"
        comparisons[title] = [table[unseen] for table in tables]

    ranks_only = any(pool.withheld for pool in (*first, *second))
    names = metrics.RANKING if ranks_only else METRICS
    results = []
    for title, parts in comparisons.items():
        one, other = mean_scores(parts[: len(first)]), mean_scores(parts[len(first) :])
        differences = metrics.keep_metrics(metrics.compare(one, other), names)
        results.append({"title": title, **differences})
    return results


def format_comparison(comparison):
    """A result of `compare_runs` as lines: one row per metric, one column per unit."""
    units = [unit for unit in UNITS if comparison[unit] is not None]
    rows = [["first minus second", *(f"{unit}-level" for unit in units)]]
    for name, label in METRICS.items():
        if name not in comparison["scan"]:
            continue
        if name in LOWER_IS_BETTER:
            label += " (lower is better)"
        row = [label]
        for unit in units:
            part = comparison[unit][name]
            if part is None or part["p"] is None:
                row.append(format_difference(part))
            else:
                row.append(f"{format_difference(part)}, p = {part['p']:.3f}")
        rows.append(row)

    scans = comparison["scan"]
    decisive = "accuracy" if "accuracy" in scans else "auroc"
    if scans[decisive] is None:
        verdict = "undefined, since only one class is there"
    elif scans["groups"] < metrics.MIN_GROUPS:
        verdict = f"{scans['groups']} subjects are too few for a verdict"
    elif metrics.is_better(scans, decisive):
        verdict = "the first is better"
    elif scans[decisive]["ci95"][1] < 0:
        verdict = "the second is better"
    else:
        verdict = "the difference may be noise: its interval contains 0"
    return [
        "",
        comparison["title"],
        "",
        *format_table(rows),
        "",
        f"Scan-level {METRICS[decisive]}: {verdict}.",
    ]


# ---------------------------------------------------------------- scores


ON_VALIDATION = (
    "Validation is no test: the calibration was chosen on it, and with --keep best the epoch, too. "
    "So there is no conclusion."
)


def evaluate_pool(one, out=None):
    """Lines with the scores of a Pool. Writes tables, scores and pictures into the folder `out`."""
    title = f"{one.runs[0]['what']}, {one.folders[0]}"
    if len(one.runs) > 1:
        title = f"{len(one.runs)} runs pooled, {one.validation or 'test'}"
    coverage = one.runs[0].get("prediction_sets", {}).get("coverage")
    given = {
        "title": title,
        **one.stated,
        "coverage": coverage,
        "runs": one.runs,
        "withheld": one.withheld,
    }
    table, members, of_one = one.table, [], {}
    if len(one.runs) == 1:  # what several runs do not have in common
        folder, calibration = Path(one.folders[0]), one.runs[0].get("calibration")
        of_one["calibration"] = calibration
        if (folder / "members.csv").exists():
            table, members = read_members(folder, table)
            ensemble = {"members": members, "calibration": calibration or {}}
            of_one.update(members=members, spread=scan_spread(table, ensemble))
    if out:
        scores = assess.write_results(table, out, **given, **of_one)
    else:
        scores = assess.score(table, **given)

    lines = check_flags([one])
    if "each_run" in scores:
        lines += [*format_each_run(scores["each_run"]), ""]
    *tables, first, second, third = assess.format_assessment(scores)
    lines += tables
    conclusion = [ON_VALIDATION] if one.validation else [first, second, third]
    if members:
        lines += [*evaluate_members(table, members), ""]
    return [*lines, *conclusion]


def format_each_run(summary):
    """Lines with accuracy and AUROC of each pooled run, and their mean, from "each_run" of
    `assess.score`."""
    for name in ("accuracy", "auroc"):
        if name not in summary:
            continue
        values = summary[name]["values"]
        each = ", ".join("undefined" if value is None else f"{value:.3f}" for value in values)
        n_undefined = values.count(None)
        mean = "their mean"
        if n_undefined:
            mean = f"the mean of the other {len(values) - n_undefined}"
        yield (
            f"{summary['unit']}-level {METRICS[name]} of each run: {each}; {mean}, each model on "
            f"its own scale: {summary[name]['mean']:.3f} (SD {summary[name]['sd']:.3f}); all "
            "scores below are pooled"
        )


def combine(tables):
    """Predictions of all seeds together, from aligned tables: the mean over them of the logits,
    each at its temperature. They rank; their calibration and threshold are those of a file of
    tools.ensemble."""
    logit = np.mean([table.scaled_logit for table in tables], axis=0)
    return tables[0].assign(logit=logit, p_AD=expit(logit))


def format_together(together, single, unit, what):
    """Lines of a table with the AUROC of models together beside the mean of single ones, from
    results of `bootstrap_scores`. `what` is what they are called, in the plural."""
    gain = metrics.compare(together, single)[unit]["auroc"]
    rows = [
        ["", f"AUROC of {unit}s"],
        [f"mean over {what}", cell(metrics.summarise(single)[unit], "auroc")],
        [f"all {what} together, mean logit", cell(metrics.summarise(together)[unit], "auroc")],
        ["difference, paired", format_difference(gain)],
    ]
    return format_table(rows)


def evaluate_seeds(pools):
    """Lines with scores and baselines averaged over Pools of the same slices, one per seed, and
    with the scores of all seeds together. If training saw some of the subjects, those of the others
    follow, and the conclusion is theirs."""
    tables = align([one.table for one in pools])
    title = f"mean over {len(pools)} seeds"
    if pools[0].validation:
        title += f", {pools[0].validation}"
    title = "; ".join([title, *describe_pools(pools)])
    lines, conclusion = score_seeds(tables, title)
    lines = [*check_flags(pools), *lines]
    unseen = assess.unseen_rows(tables)
    if unseen is not None:
        parts = [table[unseen] for table in tables]
        title = f"mean over {len(pools)} seeds, only subjects not seen in training"
        lines_of_unseen, conclusion = score_seeds(parts, title)
        lines += ["", *lines_of_unseen]
        conclusion = f"On subjects not seen in training: {conclusion}"
    if pools[0].validation:
        conclusion = ON_VALIDATION
    return [*lines, "", conclusion]


def score_seeds(tables, title):
    """(lines, conclusion) of aligned tables, one for each seed."""
    model = mean_scores(tables)
    scores = metrics.summarise(model)
    unit = assess.main_unit(scores)
    together = metrics.bootstrap_scores(combine(tables))
    means = {}
    for name in (*metrics.BASELINES, "with_dark_share"):
        if all(table[name].notna().all() for table in tables):
            means[name] = mean_scores([metrics.as_baseline(table, name) for table in tables])
    scores["minus_baseline"] = {name: metrics.compare(model, means[name]) for name in means}

    header = [f"{unit}s (n = {scores[unit]['n']:,})", *(METRICS[name] for name in COMPARED)]
    compared = ("accuracy", "auroc")
    rows = [[*header, *(f"{METRICS[name]} of the model minus it" for name in compared)]]
    rows.append(["the model", *(cell(scores[unit], name) for name in COMPARED), "", ""])
    for name, label in metrics.BASELINES.items():
        if name in means:
            baseline = metrics.summarise(means[name])[unit]
            minus = scores["minus_baseline"][name][unit]
            differences = [format_difference(minus[metric]) for metric in compared]
            rows.append([label, *(cell(baseline, metric) for metric in COMPARED), *differences])
    lines = [*assess.format_scores(scores, title), "", *format_table(rows)]
    lines += ["", *format_together(together, model, unit, "seeds")]
    if {"dark_share", "with_dark_share"} <= set(means):
        scores["beyond_dark_share"] = assess.compare_with_dark_share(
            model, means["with_dark_share"], means["dark_share"]
        )
        lines += assess.format_beyond(scores)
    beaten = assess.describe_beaten(*assess.beaten_baselines(scores, unit))
    if scores[unit]["groups"] < metrics.MIN_GROUPS:
        beaten = assess.describe_too_few(scores[unit]["groups"])
    auroc = cell(scores[unit], "auroc")
    return lines, f"The mean over seeds has a {unit}-level AUROC of {auroc}. {beaten}"


def read_members(folder, table):
    """(table, members) of the prediction of an ensemble in a folder: `table` with the logit of each
    member, missing where it does not predict, and {"name", "temperature"} of each.

    InputError if they are not those from which predict.py made the logits of `table`.
    """
    try:
        logits = read_csv(folder / "members.csv").set_index("path")
        if not logits.index.is_unique:
            raise ValueError("a path is there twice")
        runs = read_csv(folder / "member_runs.csv").astype({"temperature": float})
        members = [
            {"name": run, "temperature": temperature}
            for run, temperature in zip(runs.run, runs.temperature)
        ]
        columns = {name: table.path.map(logits[name]).astype(float) for name in runs.member}
        table = table.assign(**columns)
        means = np.nanmean(member_logits(table) / runs.temperature.to_numpy(), axis=1)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise InputError(
            f"members.csv and member_runs.csv of {folder} cannot be read ({problem}); predict again"
        ) from None
    if not np.allclose(means, table.logit, rtol=1e-4, atol=1e-4):
        raise InputError(
            f"members.csv of {folder} does not fit its predictions.csv; expected the files of one "
            "prediction"
        )
    return table, members


def evaluate_members(table, members):
    """Lines with the AUROC of an ensemble beside the mean of its members, from what `read_members`
    returns: on the scans that all members predict, and of these, if training saw some, on the
    others."""
    if len(members) < 2:
        return []
    n_scans = table.scan.nunique()
    table = table[~np.isnan(member_logits(table)).any(axis=1)]
    if table.empty:
        return ["", "No scan is predicted by all members: there is no mean of them to compare."]
    which = "that all members predict"
    unseen = assess.unseen_rows([table])
    if unseen is not None:
        table = table[unseen]
        which += " and whose subjects training has not seen"

    # Both at the temperatures of the members: the mean of p_AD over slices depends on the scale.
    logits = member_logits(table) / [member["temperature"] for member in members]
    single = mean_scores([table.assign(p_AD=expit(each)) for each in logits.T])
    together = metrics.bootstrap_scores(table.assign(p_AD=expit(table.logit)))
    n_used = table.scan.nunique()
    lines = format_together(together, single, assess.main_unit(single), "members")
    if n_used < n_scans:
        lines = [f"on the {n_used} of {n_scans} scans {which}:", "", *lines]
    return ["", *lines]


# ---------------------------------------------------------------- command


def read_resources(folders):
    """Lines of a table of what runs have cost, from their resources.json."""
    runs = []
    for folder in folders:
        path = Path(folder) / "resources.json"
        if not path.is_file():
            raise InputError(f"{path} does not exist; expected finished runs of train.py")
        runs.append((str(folder), read_json(path)))
    return format_table(resource_rows(runs))


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run folder, or folder of labelled predictions")
    add("--part", choices=("test", "val"), default="test", help="the part of a run folder (test)")
    add("--against", nargs="+", action="extend", metavar="RUN",
        help="the same slices, predicted by another model")  # fmt: skip
    add("--resources", action="store_true", help="print what the runs have cost instead of scores")
    add("--out", metavar="DIR", help="new folder for tables, metrics.json and pictures")
    args = parser.parse_args(argv)
    if args.resources and (args.against or args.out or args.part != "test"):
        parser.error("--resources prints costs alone; leave out --against, --out and --part")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.resources:
        print("\n".join(read_resources(args.runs)))
        return
    if args.out:
        require_new(args.out)

    first = pool_seeds(args.runs, args.part)
    if args.out and len(first) > 1:
        raise InputError(f"--out takes runs of one seed; {', '.join(args.runs)} have {len(first)}")
    second, comparisons = [], []
    if args.against:
        second = pool_seeds(args.against, args.part)
        comparisons = compare_runs(first, second)

    out = new_folder(args.out) if args.out else None
    if len(first) > 1:
        lines = evaluate_seeds(first)
    else:
        lines = evaluate_pool(first[0], out)
    lines += check_flags(second)
    for comparison in comparisons:
        lines += format_comparison(comparison)
    print("\n".join(lines))

    if out and comparisons:
        unseen = comparisons[1] if len(comparisons) > 1 else None
        result = {"against": args.against, **comparisons[0], "unseen_subjects": unseen}
        write_json(out / "comparison.json", result)
    if out:
        print(f"results in {out}")


if __name__ == "__main__":
    run_script(main)
