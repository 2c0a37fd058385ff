"""From slices to a subject: which summary of the slices ranks subjects best?

    python -m docs.experiments.aggregate runs/oasis-s?-f?

Runs are finished runs of train.py: seeds, folds, or both (the folds of a seed are pooled). RULES
were fixed before the first run, and none of them is chosen by test. Printed: subject-level AUROC of
each, mean over seeds, and the paired difference from the mean of p_AD, which predict.py takes; and
of the dark share, fitted on training. Each rule gives a scan a score from 0 to 1, a subject gets
the mean of its scans.
"""

import pandas as pd
from scipy.special import expit
from scipy.stats import rankdata, trim_mean

from adnc.cli import Parser, run_script
from adnc.errors import InputError, count
from adnc.scoring.assess import format_table, read_run
from docs.experiments.tables import compare_ways
from docs.experiments.transfer import auroc
from tools.evaluate import read_flags

PLACES = 8  # along a scan, from its first slice to its last
TRIM = 0.25  # of the slices, at each end
DARK_SHARE = "dark share of the head"

# ---------------------------------------------------------------- rules


def informative_places(val):
    """The half of the places along a scan, at least one, at which the logit of a validation slice
    has the highest AUROC."""
    is_ad = (val.label == "AD").to_numpy()
    values = {}
    for place in sorted(val.place.unique()):
        here = (val.place == place).to_numpy()
        if is_ad[here].all() or not is_ad[here].any():
            values[place] = 0.5
        else:
            values[place] = float(auroc(is_ad[here], val.logit.to_numpy()[here]))
    best = sorted(values, key=values.get, reverse=True)
    return best[: max(1, len(best) // 2)]


def mean_probability(scan, places):
    return expit(scan.logit).mean()


def mean_logit(scan, places):
    return expit(scan.logit.mean())


def median_logit(scan, places):
    return expit(scan.logit.median())


def trimmed_logit(scan, places):
    return expit(trim_mean(scan.logit, TRIM))


def better_half(scan, places):
    chosen = scan[scan.place.isin(places)]
    if chosen.empty:  # a scan of fewer slices than places
        return expit(scan.logit).mean()
    return expit(chosen.logit).mean()


RULES = {
    "mean of p_AD": mean_probability,
    "mean of the logits": mean_logit,
    "median of the logits": median_logit,
    "mean of the middle half of the logits": trimmed_logit,
    "mean of p_AD at the half of the places that is best on validation": better_half,
}


# ---------------------------------------------------------------- runs


def with_places(table, temperature):
    """Predictions with their logit at the temperature of the run, and the place of each slice."""
    rank = table.groupby("scan").slice.transform(lambda numbers: rankdata(numbers) - 1)
    n_slices = table.groupby("scan").slice.transform("size")
    place = (rank * PLACES / n_slices).astype(int)
    return table.assign(logit=table.logit / temperature, place=place)


def score_run(folder):
    """A table of the test scans of a run: scan, subject, group, label, and the score by each rule
    and of the dark share."""
    table, scores = read_run(folder, "test")
    if table.subject.isna().any():
        raise InputError(f"{folder} has test scans whose subject is not known")
    temperature = scores["calibration"]["temperature"]
    places = informative_places(with_places(read_run(folder, "val")[0], temperature))
    rows = []
    for _, scan in with_places(table, temperature).groupby("scan"):
        row = scan[["scan", "subject", "group", "label"]].iloc[0].to_dict()
        row.update({name: rule(scan, places) for name, rule in RULES.items()})
        rows.append({**row, DARK_SHARE: scan.dark_share.mean()})
    return pd.DataFrame(rows)


def read_seeds(folders):
    """One table of `score_run` for each seed, its folds pooled, all with the same scans."""
    by_seed = {}
    for folder in folders:
        by_seed.setdefault(read_flags(folder).get("seed"), []).append(score_run(folder))
    tables = []
    for seed, parts in by_seed.items():
        if pd.concat([part.subject.drop_duplicates() for part in parts]).duplicated().any():
            raise InputError(
                f"the runs of seed {seed} share subjects; expected the folds of one "
                "cross-validation, or one run for each seed"
            )
        table = pd.concat(parts).sort_values("scan", ignore_index=True)
        if tables and not table.scan.equals(tables[0].scan):
            raise InputError(f"the runs of seed {seed} have other scans than those before")
        tables.append(table)
    return tables


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished runs of train.py")
    args = parser.parse_args(argv)
    tables = read_seeds(args.runs)
    print(f"{count(tables[0].subject.nunique(), 'subject')}, {count(len(tables), 'seed')}\n")
    head = ["score of a scan", "subject-level AUROC", "minus the mean of p_AD"]
    ways = {
        name: [table.assign(p_AD=table[name]) for table in tables] for name in (*RULES, DARK_SHARE)
    }
    for line in format_table([head, *compare_ways(ways)]):
        print(line)


if __name__ == "__main__":
    run_script(main)
