"""From slices to a subject: which summary of the slices ranks subjects best?

    python -m docs.experiments.aggregate runs/oasis-s?-f?

Runs are finished runs of train.py: seeds, folds, or both (the folds of a seed are pooled). RULES
were fixed before the first run, and none of them is chosen by test. Printed: subject-level AUROC of
each, mean over seeds, and the paired difference from the mean of p_AD, which predict.py takes; and
of the dark share, fitted on training.
"""

import numpy as np
import pandas as pd
from scipy.special import expit
from scipy.stats import rankdata, trim_mean

from adnc.cli import Parser, run_script
from adnc.errors import InputError, count
from adnc.scoring.assess import format_table, read_run
from docs.experiments.transfer import auroc, bootstrap
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
    return scan.logit.mean()


def median_logit(scan, places):
    return scan.logit.median()


def trimmed_logit(scan, places):
    return trim_mean(scan.logit, TRIM)


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
    """Scores of the test subjects of a run by each rule, a DataFrame with is_ad."""
    table, scores = read_run(folder, "test")
    if table.subject.isna().any():
        raise InputError(f"{folder} has test scans whose subject is not known")
    temperature = scores["calibration"]["temperature"]
    places = informative_places(with_places(read_run(folder, "val")[0], temperature))
    rows = []
    for (subject, _), scan in with_places(table, temperature).groupby(["subject", "scan"]):
        row = {name: rule(scan, places) for name, rule in RULES.items()}
        row[DARK_SHARE] = scan.dark_share.mean()
        rows.append({"subject": subject, "is_ad": scan.label.iloc[0] == "AD", **row})
    return pd.DataFrame(rows).groupby("subject").mean()


def read_seeds(folders):
    """One table of `score_run` for each seed, its folds pooled, all with the same subjects."""
    by_seed = {}
    for folder in folders:
        by_seed.setdefault(read_flags(folder).get("seed"), []).append(score_run(folder))
    tables = []
    for seed, parts in by_seed.items():
        table = pd.concat(parts).sort_index()
        if table.index.has_duplicates:
            raise InputError(
                f"the runs of seed {seed} share subjects; expected the folds of one "
                "cross-validation, or one run for each seed"
            )
        if tables and not table.index.equals(tables[0].index):
            raise InputError(f"the runs of seed {seed} have other subjects than those before")
        tables.append(table)
    return tables


def compare_rules(tables):
    """Rows of the table, with a paired bootstrap over subjects."""
    is_ad = tables[0].is_ad.to_numpy() > 0.5
    names = [*RULES, DARK_SHARE]
    scores = np.stack([table[names].to_numpy() for table in tables], axis=1)  # (S, seeds, R + 1)
    n_subjects, n_seeds, n_rules = scores.shape
    flat = scores.reshape(n_subjects, -1)
    points = auroc(is_ad, flat).reshape(n_seeds, n_rules).mean(0)
    resamples = bootstrap(is_ad, flat).reshape(-1, n_seeds, n_rules).mean(1)
    low, high = np.percentile(resamples, (2.5, 97.5), axis=0)
    gain_low, gain_high = np.percentile(resamples - resamples[:, :1], (2.5, 97.5), axis=0)
    rows = []
    for i, name in enumerate(names):
        gain = ""
        if i > 0:
            gain = f"{points[i] - points[0]:+.3f} [{gain_low[i]:+.3f}, {gain_high[i]:+.3f}]"
        rows.append([name, f"{points[i]:.3f} [{low[i]:.3f}, {high[i]:.3f}]", gain])
    return rows


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="finished runs of train.py")
    args = parser.parse_args(argv)
    tables = read_seeds(args.runs)
    print(f"{count(len(tables[0]), 'subject')}, {count(len(tables), 'seed')}\n")
    head = ["score of a scan", "subject-level AUROC", "minus the mean of p_AD"]
    for line in format_table([head, *compare_rules(tables)]):
        print(line)


if __name__ == "__main__":
    run_script(main)
