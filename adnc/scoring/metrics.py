"""Metrics of predictions at slice, scan and subject level, with bootstrap confidence intervals.

The task is binary by design: AD, the positive class, against NC. Predictions are a DataFrame with
one row per slice and the columns of `PREDICTIONS`, empty where unknown. Everything here is a
function of tables and arrays: nothing is printed, drawn or read.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.stats import beta

UNITS = ("slice", "scan", "subject")
THRESHOLD = 0.5
BINS = 10  # of equal width, for the calibration error and the reliability diagram
RESAMPLES = 2000

# Groups needed for a verdict. With fewer, bootstrap intervals miss the true value too often:
# docs/scores.md has the table.
MIN_GROUPS = 10

# name in metrics.json: name in tables
METRICS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "f1": "F1",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "brier": "Brier score",
    "calibration_error": "calibration error",
}
LOWER_IS_BETTER = ("brier", "calibration_error")
RANKING = ("auroc", "average_precision")  # need an order alone, no threshold and no probability
BASELINES = {
    "majority_class": "majority class",
    "window_vote": "window vote",
    "logistic_regression": "logistic regression on a blur",
    "dark_share": "dark share of the head",
}

# The columns of predictions.csv: first what people look for, then what tools.evaluate needs as
# well. `threshold` is the p_AD from which the prediction is AD; the last columns are the p_AD of
# the baselines, and with_dark_share that of the network and the dark share together.
PREDICTIONS = (
    "path", "scan", "slice", "subject", "label", "logit", "p_AD", "prediction", "exposure",
    "out_of_range", "error", "group", "threshold", "prediction_set", *BASELINES, "with_dark_share",
)  # fmt: skip

# The numeric columns with their types. The other columns hold text.
NUMBERS = {
    "slice": "Int64",
    **dict.fromkeys(("logit", "p_AD", "threshold", *BASELINES, "with_dark_share"), float),
}

# The columns of scans.csv, before SPREAD. Those of subjects.csv are the same without the first.
AGGREGATED = (
    "scan", "subject", "p_AD", "n_slices", "prediction", "prediction_set", "label", "exposure",
    "n_out_of_range", "dark_share", "rank",
)  # fmt: skip
SPREAD = ("members", "members_AD", "member_sd")  # of an ensemble, see `ensemble.scan_spread`

# ---------------------------------------------------------------- units


def with_predictions(table):
    """Set prediction: "AD" if p_AD reaches the row's threshold, else "NC"; <NA> without p_AD."""
    predicted = np.where(table.p_AD >= table.threshold, "AD", "NC")
    predicted = pd.Series(predicted, table.index, dtype="string")
    return table.assign(prediction=predicted.where(table.p_AD.notna()))


def aggregate(predictions, unit):
    """Slice-level predictions -> one row per "slice", "scan" or "subject", with the mean p_AD and
    the mean dark_share.

    Adds n_slices, n_out_of_range, and to scans and subjects their rank by p_AD, 1 for the highest,
    equal ones alike, <NA> for those `mostly_out_of_range`. Other columns are those of the first
    slice, since they do not differ within a scan. Slices of unknown subjects are left out at
    subject level, and subjects have no prediction set. A subject with scans of both classes, which
    the audit reports, gets the label of the first scan.
    """
    out_of_range = predictions.out_of_range.notna().astype(int)
    counts = predictions.assign(n_slices=1, n_out_of_range=out_of_range)
    if unit == "slice":
        return with_predictions(counts)

    carried = ["label", "threshold", "exposure", "group"]
    if unit == "scan":
        carried += ["subject", "prediction_set"]
    columns = {
        "p_AD": "mean",
        "dark_share": "mean",
        "n_slices": "sum",
        "n_out_of_range": "sum",
        **dict.fromkeys(carried, "first"),
    }
    table = counts.groupby(unit).agg(columns).reset_index()

    # The means of 19 and of 20 equal numbers may differ in the last bit, which would rank them.
    table = with_predictions(table.assign(p_AD=table.p_AD.round(12)))
    usable = table.p_AD.where(~mostly_out_of_range(table))
    table["rank"] = usable.rank(ascending=False, method="min").astype("Int64")
    if unit == "subject":
        table["prediction_set"] = pd.Series(None, table.index, dtype="string")
    return table


def verdict(scan):
    """The verdict on a scan, a row of `aggregate`: its prediction set, or its prediction if there
    is none. "no verdict" if it is `mostly_out_of_range`."""
    if mostly_out_of_range(scan):
        return "no verdict"
    if pd.isna(scan.prediction_set):
        return scan.prediction
    return scan.prediction_set


def mostly_out_of_range(scans):
    """Whether at least half of the slices of a row, or of each row of a table, of `aggregate` are
    out of the training range."""
    return 2 * scans.n_out_of_range >= scans.n_slices


def keep_metrics(by_unit, names):
    """A result of `summarise` or `compare` with those of METRICS that are in names."""
    kept = {}
    for unit, part in by_unit.items():
        if part is not None:
            dropped = set(METRICS) - set(names)
            part = {key: value for key, value in part.items() if key not in dropped}
            if "ci95" in part:
                part["ci95"] = {name: part["ci95"][name] for name in names}
        kept[unit] = part
    return kept


def arrays(predictions, unit):
    """Labelled predictions -> arrays (N,): is AD, p_AD, AD is predicted, group.

    The rows of `aggregate`, without what the scores do not need: a bootstrap asks for this of each
    unit and each baseline.
    """
    p, threshold = predictions.p_AD.to_numpy(float), predictions.threshold.to_numpy(float)
    first = np.arange(len(predictions))
    if unit != "slice":
        number, names = pd.factorize(predictions[unit], sort=True)  # -1: unknown
        named = np.flatnonzero(number >= 0)
        number = number[named]
        _, first = np.unique(number, return_index=True)
        first = named[first]
        n_slices = np.bincount(number, minlength=len(names))
        p = (np.bincount(number, p[named], len(names)) / n_slices).round(12)
        threshold = threshold[first]
    is_ad = (predictions.label == "AD").to_numpy(bool)[first]
    return is_ad, p, p >= threshold, predictions.group.to_numpy(str)[first]


def as_baseline(predictions, name):
    """Predictions with the p_AD of a baseline in place of the model's."""
    return predictions.assign(p_AD=predictions[name], threshold=THRESHOLD)


# ---------------------------------------------------------------- metrics and their intervals


class Bootstrap:
    """Resamples of whole groups (Efron & Tibshirani 1993): slices of one brain are not independent.

    `group` (N,) names the group of each row. `counts` (resamples, groups) holds how often each
    group is drawn. Equal groups and seeds give equal counts, which pairs the resamples of two
    models.
    """

    def __init__(self, group, resamples=None, seed=0):
        resamples = resamples or RESAMPLES
        names, self.group = np.unique(np.asarray(group, str), return_inverse=True)
        n = len(names)
        generator = np.random.default_rng(seed)
        self.counts = generator.multinomial(n, np.full(n, 1 / n), resamples).astype(float)

    def total(self, values):
        """The sum of values (N,) in each resample, (resamples,)."""
        return self.counts @ np.bincount(self.group, values, self.counts.shape[1])

    def curves(self, y, p):
        """For chunks of resamples, the number of AD and of NC whose p is at or above each distinct
        value of p, from the highest value to the lowest: two arrays (chunk, values)."""
        order = np.argsort(-p, kind="stable")
        last = np.flatnonzero(np.diff(p[order], append=-np.inf))  # the last of equal values
        ad, group = y[order].astype(float), self.group[order]
        for start in range(0, len(self.counts), 100):
            times = self.counts[start : start + 100, group]
            yield np.cumsum(times * ad, 1)[:, last], np.cumsum(times * (1 - ad), 1)[:, last]


def which_bin(p):
    return np.minimum((p * BINS).astype(int), BINS - 1)


def resampled_scores(y, p, predicted, bootstrap):
    """METRICS in each resample, a dict of arrays (resamples,); NaN if a needed class is not drawn.

    The Brier score is the mean squared error of p_AD. The calibration error is the expected one
    over ten equal bins of p_AD: the distance between mean p_AD and share of AD in a bin, weighted
    by the size of the bin; small samples raise it. To add a metric, add a line here and its name
    to METRICS.
    """
    total = bootstrap.total
    n, ad, nc = total(np.ones(len(y))), total(y), total(~y)
    hit_ad, hit_nc = total(predicted & y), total(~predicted & ~y)
    bins = which_bin(p)
    error = sum(np.abs(total(np.where(bins == b, p - y, 0))) for b in np.unique(bins))
    areas = [areas_under_curves(*curve) for curve in bootstrap.curves(y, p)]

    with np.errstate(invalid="ignore", divide="ignore"):
        sensitivity, specificity = hit_ad / ad, hit_nc / nc
        f1 = 2 * hit_ad / (hit_ad + ad + nc - hit_nc)
        return {
            "accuracy": (hit_ad + hit_nc) / n,
            "balanced_accuracy": (sensitivity + specificity) / 2,
            "sensitivity": sensitivity,
            "specificity": specificity,
            "f1": np.where((ad > 0) & (nc > 0), f1, np.nan),
            "auroc": np.concatenate([auroc for auroc, _ in areas]),
            "average_precision": np.concatenate([precision for _, precision in areas]),
            "brier": total((p - y) ** 2) / n,
            "calibration_error": error / n,
        }


def areas_under_curves(above_ad, above_nc):
    """AUROC (trapezoidal, ties count half) and average precision (by steps), arrays (chunk,), of
    curves (chunk, values)."""
    more_ad = np.diff(above_ad, axis=1, prepend=0)
    more_nc = np.diff(above_nc, axis=1, prepend=0)
    ad, nc = above_ad[:, -1], above_nc[:, -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.nan_to_num(above_ad / (above_ad + above_nc))  # 0 if nothing is above
        auroc = (more_nc * (above_ad - more_ad / 2)).sum(1) / (ad * nc)
        average_precision = (more_ad * precision).sum(1) / ad
    return auroc, np.where(nc > 0, average_precision, np.nan)


def point_scores(y, p, predicted):
    """METRICS of p_AD (N,) and booleans `predicted` (N,) against y (N,), True for AD.

    A score that is not defined, because a class is absent, is None.
    """
    # One group that is drawn once is the sample itself.
    once = Bootstrap(np.zeros(len(y)), resamples=1)
    scores = {}
    for name, values in resampled_scores(y, p, predicted, once).items():
        value = float(values[0])
        scores[name] = None if math.isnan(value) else value
    return scores


def percentiles(resampled):
    """The 2.5 % and 97.5 % percentiles of a score's resamples, [low, high]; None if all are NaN."""
    # A resample without one of the classes says nothing about the score.
    resampled = resampled[np.isfinite(resampled)]
    if len(resampled) == 0:
        return None
    return [float(q) for q in np.quantile(resampled, [0.025, 0.975])]


def interval(resampled):
    """The 95 % percentile interval of a score's resamples; None if it would be a point."""
    limits = percentiles(resampled)
    if limits is None or limits[0] == limits[1]:
        return None
    return limits


def exact_interval(share, n):
    """The exact 95 % interval [low, high] of a share of 0 or 1 of n independent cases (Clopper &
    Pearson 1934)."""
    if share >= 0.5:
        return [float(beta.ppf(0.025, n, 1)), 1.0]
    return [0.0, float(beta.ppf(0.975, 1, n))]


# Metrics that are best and worst at 1 and 0, and the classes whose groups decide them.
SHARES = {
    "accuracy": ("AD", "NC"),
    "sensitivity": ("AD",),
    "specificity": ("NC",),
    "balanced_accuracy": None,
    "f1": None,
    "auroc": None,
    "average_precision": None,
}


def edge_interval(name, score, groups):
    """The 95 % interval of a metric whose score is 0 or 1, where a bootstrap only repeats itself.

    groups: {"AD": number of groups with AD, "NC": ...; "all": ...}. A share of groups has the exact
    interval. AUROC: pairing each group of the smaller class with another group of the other class
    gives m independent pairs, each ordered rightly with probability AUROC; all m are, or none is,
    so that the interval is that of m cases. (Obuchowski & Lieber 2002 treat the same problem.) The
    other metrics of both classes take the same m.
    """
    classes = SHARES.get(name, ("AD", "NC"))
    if classes == ("AD", "NC"):
        return exact_interval(score, groups["all"])
    if classes:
        return exact_interval(score, groups[classes[0]])
    return exact_interval(score, min(groups["AD"], groups["NC"]))


@dataclass
class Sample:
    """Scores of one unit: the numbers of units and groups, METRICS, and METRICS per resample.

    class_groups: the number of groups with a unit of AD, of NC, and of all groups.
    """

    n: int
    groups: int
    scores: dict
    resampled: dict
    class_groups: dict


def bootstrap_scores(predictions):
    """A dict with a Sample of labelled predictions for each unit; None for a unit without rows."""
    return {unit: sample_unit(predictions, unit) for unit in UNITS}


def sample_unit(predictions, unit):
    y, p, predicted, group = arrays(predictions, unit)
    if len(y) == 0:
        return None
    resampled = resampled_scores(y, p, predicted, Bootstrap(group))
    n_groups = len(np.unique(group))
    class_groups = {
        "AD": len(np.unique(group[y])),
        "NC": len(np.unique(group[~y])),
        "all": n_groups,
    }
    return Sample(len(y), n_groups, point_scores(y, p, predicted), resampled, class_groups)


def summarise(samples):
    """The result of `bootstrap_scores` as metrics.json has it.

    Each unit holds n, groups, the METRICS and ci95, the 95 % interval of each metric: percentiles
    of the bootstrap, or at 0 and 1, where it says nothing, `edge_interval`. A score that is not
    defined is None, and so are an interval that would be a point, and "subject" if no subject is
    known.
    """
    summary = {}
    for unit, sample in samples.items():
        summary[unit] = None if sample is None else summarise_unit(sample)
    return summary


def summarise_unit(sample):
    ci95 = {}
    for name, values in sample.resampled.items():
        if is_at_edge(sample, name):
            ci95[name] = limits_of(sample, name)
        else:
            ci95[name] = interval(values)
    return {"n": sample.n, "groups": sample.groups, **sample.scores, "ci95": ci95}


def is_at_edge(sample, name):
    """Whether a metric is 0 or 1, where the bootstrap of a Sample says nothing."""
    return name in SHARES and sample.scores[name] in (0, 1)


def limits_of(sample, name):
    """[low, high] of a metric of a Sample: exact at 0 and 1, else of its bootstrap, also if that is
    a point, as of a constant model."""
    if is_at_edge(sample, name):
        return edge_interval(name, sample.scores[name], sample.class_groups)
    return percentiles(sample.resampled[name])


def mean_scores(tables):
    """`bootstrap_scores` averaged over tables of the same slices, a dict of the same form."""
    results = [bootstrap_scores(table) for table in tables]
    means = {}
    for unit in UNITS:
        samples = [result[unit] for result in results]
        if samples[0] is None:
            means[unit] = None
            continue
        scores, resampled = {}, {}
        for name in METRICS:
            values = [sample.scores[name] for sample in samples]
            scores[name] = None if None in values else float(np.mean(values))
            resampled[name] = np.mean([sample.resampled[name] for sample in samples], 0)
        means[unit] = replace(samples[0], scores=scores, resampled=resampled)
    return means


def roc_band(y, p, group, grid):
    """95 % band of the sensitivity at each false-positive rate of `grid`: arrays low and high."""
    lines = []
    for above_ad, above_nc in Bootstrap(group).curves(y, p):
        for ad, nc in zip(above_ad, above_nc):
            if ad[-1] and nc[-1]:
                false_positive_rate = np.append(0, nc / nc[-1])
                sensitivity = np.append(0, ad / ad[-1])
                lines.append(np.interp(grid, false_positive_rate, sensitivity))
    return np.quantile(lines, [0.025, 0.975], axis=0)


# ---------------------------------------------------------------- comparisons


def compare(a, b):
    """Is `a` better than `b`, or is it noise? Two results of `bootstrap_scores` on the same slices.

    Returns for each unit the number of groups, and for each metric the `difference` a - b of a
    paired bootstrap: both models are scored on the same resamples. p is two-sided: twice
    the share of resamples on the rarer side of 0, with one added to both numbers, so that it is
    never 0. Both tables need the same groups, else the resamples are not paired.
    """
    differences = dict.fromkeys(UNITS)
    for unit in UNITS:
        if a[unit] is None or b[unit] is None:
            continue
        differences[unit] = {"groups": a[unit].groups, **dict.fromkeys(METRICS)}
        for name in METRICS:
            differences[unit][name] = difference(a[unit], b[unit], name)
    return differences


def difference(a, b, name):
    """{"difference", "ci95", "p"} of a metric of two Samples, or None if it is not defined.

    The interval is that of the paired bootstrap, but where that says nothing, and p is then None.
    If one of the scores is 0 or 1, the interval goes from the lower end of one to the upper end of
    the other, which holds however the two depend on each other. If the difference is the same in
    all resamples, as of equal predictions, it is plus and minus the exact bound on the share of
    groups in which the two differ, of which none was seen.
    """
    resampled = a.resampled[name] - b.resampled[name]
    resampled = resampled[np.isfinite(resampled)]
    if len(resampled) == 0:  # a score that is not defined is undefined in all resamples
        return None
    score_a, score_b = a.scores[name], b.scores[name]
    result = {"difference": score_a - score_b}
    if (is_at_edge(a, name) or is_at_edge(b, name)) and score_a != score_b:
        (low_a, high_a), (low_b, high_b) = limits_of(a, name), limits_of(b, name)
        return {**result, "ci95": [low_a - high_b, high_a - low_b], "p": None}
    if np.ptp(resampled) < 1e-12:
        bound = edge_interval(name, 0, a.class_groups)[1]
        ci95 = [result["difference"] - bound, result["difference"] + bound]
        return {**result, "ci95": ci95, "p": None}
    rarer = min((resampled <= 0).sum(), (resampled >= 0).sum())
    p = float(min(1, 2 * (rarer + 1) / (len(resampled) + 1)))
    return {**result, "ci95": percentiles(resampled), "p": p}


def is_better(comparison, metric):
    """Whether the whole interval of a difference is on the better side of 0, with MIN_GROUPS or
    more groups."""
    if comparison[metric] is None or comparison["groups"] < MIN_GROUPS:
        return False
    low, high = comparison[metric]["ci95"]
    if metric in LOWER_IS_BETTER:
        return high < 0
    return low > 0


# ---------------------------------------------------------------- risk and coverage


def risk_coverage(p, correct, threshold=THRESHOLD):
    """Error rate among the most certain share of units (El-Yaniv & Wiener 2010).

    The certainty of a prediction is the distance of p (N,) from the threshold. Returns the arrays
    coverage and risk, (N,), the most certain unit first.
    """
    order = np.argsort(-np.abs(p - threshold), kind="stable")
    answered = np.arange(1, len(p) + 1)
    wrong = ~np.asarray(correct, bool)[order]
    return answered / len(p), np.cumsum(wrong) / answered


# ---------------------------------------------------------------- slice windows


def fit_windows(scans):
    """The share of AD by slice window: what a model can learn from the choice of slices alone.

    `scans` has one row per training scan, with label and `at`, the window: the lowest slice number
    of the scan. Laplace's rule keeps a window of two scans from being certain.
    """
    windows = (scans.label == "AD").groupby(scans["at"]).agg(["sum", "size"])
    return (windows["sum"] + 1) / (windows["size"] + 2)


def window_vote(index):
    """Scan-level accuracy on test of a vote on the slice window alone, fitted on train.

    A window that does not occur in train counts as the larger class of train.
    """
    scans = index.groupby(["split", "scan"]).agg(label=("label", "first"), at=("slice", "min"))
    scans = scans.reset_index()
    train, test = scans[scans.split == "train"], scans[scans.split == "test"]
    share = test["at"].map(fit_windows(train)).fillna((train.label == "AD").mean())
    predicted = np.where(share >= THRESHOLD, "AD", "NC")
    return float((predicted == test.label).mean())


def by_window(predictions):
    """Scan-level accuracy for each slice window, or slice-level accuracy for each slice number if
    all scans have the same window.

    Returns a table with at, n, accuracy and share_AD, and the name of the unit.
    """
    unit = "scan"
    table = aggregate(predictions, "scan").set_index("scan")
    table["at"] = predictions.groupby("scan").slice.min()
    if table["at"].nunique() < 2:
        unit = "slice"
        table = aggregate(predictions, "slice")
        table["at"] = table.slice

    table = table.assign(correct=table.prediction == table.label, ad=table.label == "AD")
    columns = {
        "n": ("correct", "size"),
        "accuracy": ("correct", "mean"),
        "share_AD": ("ad", "mean"),
    }
    return table.groupby("at").agg(**columns).reset_index(), unit
