"""From predictions to scores: the three units, intervals, calibration, prediction sets, comparisons.

Not run by itself; evaluate.py is its command. Predictions are a DataFrame with a row a slice and the columns of
`PREDICTIONS`, empty where unknown. Everything here is a function of such tables: nothing is printed, drawn or read.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import expit, logit

UNITS = ("slice", "scan", "subject")
THRESHOLD = 0.5
BINS = 10  # of equal width, for the calibration error and the reliability diagram
RESAMPLES = 2000
METRICS = {  # as metrics.json and as people call them
    "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "sensitivity": "sensitivity",
    "specificity": "specificity", "f1": "F1", "auroc": "AUROC", "average_precision": "average precision",
    "brier": "Brier score", "calibration_error": "calibration error",
}  # fmt: skip
LOWER_IS_BETTER = ("brier", "calibration_error")
FEWEST = 10  # groups for a verdict: with fewer, bootstrap intervals are too narrow (8 to 11 % errors instead of 5)

# The columns of predictions.csv: first what people look for, then what evaluate.py needs as well. `threshold` is the
# p_AD from which the prediction is AD, the last three are the p_AD of the baselines.
BASELINES = {"majority_class": "majority class", "window_vote": "window vote",
             "logistic_regression": "logistic regression on a blur"}  # fmt: skip
PREDICTIONS = ("path", "scan", "slice", "subject", "label", "logit", "p_AD", "prediction", "exposure", "out_of_range",
               "error", "group", "threshold", "prediction_set", *BASELINES)  # fmt: skip
NUMBERS = {"slice": "Int64", **dict.fromkeys(("logit", "p_AD", "threshold", *BASELINES), float)}  # the others are text
# Those of scans.csv; of subjects.csv all but the first.
AGGREGATED = ("scan", "subject", "p_AD", "n_slices", "prediction", "prediction_set", "label", "exposure",
              "n_out_of_range")  # fmt: skip

# ---------------------------------------------------------------- units


def with_predictions(table):
    """Set prediction: "AD" where p_AD reaches the row's threshold, else "NC"; <NA> where there is no p_AD."""
    predicted = pd.Series(np.where(table.p_AD >= table.threshold, "AD", "NC"), table.index, dtype="string")
    return table.assign(prediction=predicted.where(table.p_AD.notna()))


def aggregate(predictions, unit):
    """Slice-level predictions -> those per "slice", "scan" or "subject": the mean p_AD over the unit's slices.

    Slices of unknown subject have no row in the table of subjects, and there is no prediction set of a subject. Adds
    n_slices and n_out_of_range; what else is carried over is that of the first slice, for it does not differ within a
    scan. (A subject with scans of both classes, whom the audit names, has the label of its first.)
    """
    counts = predictions.assign(n_slices=1, n_out_of_range=predictions.out_of_range.notna().astype(int))
    if unit == "slice":
        return with_predictions(counts)
    carried = ["label", "threshold", "exposure", "group", "prediction_set"] + ["subject"] * (unit == "scan")
    columns = {"p_AD": "mean", "n_slices": "sum", "n_out_of_range": "sum", **dict.fromkeys(carried, "first")}
    table = counts.groupby(unit).agg(columns).reset_index()
    # rounded, since means of the same numbers, of 19 slices and of 20, may differ in the last bit, and no rank may
    table = with_predictions(table.assign(p_AD=table.p_AD.round(12)))
    return table if unit == "scan" else table.assign(prediction_set=pd.array([None] * len(table), "string"))


def verdict(scan):
    """What a row of `aggregate` for scans says to people: "no verdict" where half of the slices or more are out of the
    training range, else the prediction set, or where no coverage was asked for the prediction."""
    if 2 * scan.n_out_of_range >= scan.n_slices:
        return "no verdict"
    return scan.prediction if pd.isna(scan.prediction_set) else scan.prediction_set


# ---------------------------------------------------------------- calibration, on validation alone


def calibrate(val, threshold="0.5"):
    """What validation says of the model's outputs, as plain values for the checkpoint.

    `val` holds labelled predictions by slice with the column logit (z_AD - z_NC). Returns the temperature; the
    threshold, 0.5 or for "youden" the one that `youden` finds on the validation scans; and for prediction sets each
    validation scan's score 1 - p(its label) with its weight, so that all groups weigh the same.
    """
    temperature = fit_temperature(val.logit.to_numpy(), (val.label == "AD").to_numpy(), val.group)
    scans = aggregate(val.assign(p_AD=expit(val.logit / temperature)), "scan")
    y, p, group = (scans.label == "AD").to_numpy(), scans.p_AD.to_numpy(), scans.group
    order = np.argsort(np.where(y, 1 - p, p), kind="stable")
    return {
        "temperature": temperature,
        "threshold": youden(y, p) if threshold == "youden" else THRESHOLD,
        "threshold_rule": threshold,
        "groups": int(group.nunique()),
        "scores": np.where(y, 1 - p, p)[order].tolist(),
        "weights": (1 / group.map(group.value_counts()).to_numpy())[order].tolist(),
    }


def fit_temperature(z, y, group):
    """The temperature T (Guo et al. 2017, arXiv 1706.04599) for which expit(z / T) fits y (N,) best, logits z (N,).

    The mean cross-entropy counts as often as there are names in `group`, and log T has a normal prior about 0 with
    an SD of log 2. With many subjects that is Guo's optimum; a model that is right on a handful is not made infinitely
    sure.
    """
    from scipy.optimize import minimize_scalar  # late, as all that a prediction of one slice does not need

    subjects = len(np.unique(group))

    def loss(log_t):
        x = z / math.exp(log_t)
        cross_entropy = np.mean(np.logaddexp(0, x) - y * x)
        return subjects * cross_entropy + (log_t / math.log(2)) ** 2 / 2

    fit = minimize_scalar(loss, bounds=(math.log(0.05), math.log(20)), method="bounded", options={"xatol": 1e-6})
    return float(math.exp(fit.x))


def youden(y, p):
    """The threshold on p (N,) with the largest sensitivity + specificity - 1 (Youden 1950): half-way between two values
    of p, or 0.5; of equally good ones the nearest to 0.5."""
    values = np.unique(p)
    cuts = np.append((values[:-1] + values[1:]) / 2, THRESHOLD)
    index = [(p[y] >= cut).mean() - (p[~y] >= cut).mean() for cut in cuts]
    best = np.isclose(index, max(index), atol=1e-12)
    return float(cuts[best][np.abs(cuts[best] - THRESHOLD).argmin()])


def conformal_quantile(calibration, coverage):
    """The largest score that a class may have to stand in a prediction set, or inf: every class may.

    Hierarchical split-conformal prediction (Lee, Barber & Willett 2023, arXiv 2306.06342): of K + 1 subjects with equal
    weight, spread over their scans, the new one counts as infinite. A scan of a new subject then has its label in the
    set with a probability of at least `coverage`, if the new subject and those of validation are exchangeable. They are
    not quite, where validation has also chosen the epoch: a test shows what that can cost.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"the coverage is {coverage}; expected more than 0 and less than 1, such as 0.9")
    weights = np.cumsum(calibration["weights"]) / (calibration["groups"] + 1)
    reached = np.flatnonzero(weights >= coverage - 1e-9)
    return float(calibration["scores"][reached[0]]) if len(reached) else math.inf


def prediction_sets(p_ad, predicted, quantile):
    """"AD", "NC" or "AD|NC" for each p_AD (N,): the classes whose 1 - p is within the quantile, and always the
    prediction, so that no set is empty (which can only raise the coverage)."""
    ad = (1 - p_ad <= quantile) | (predicted == "AD")
    nc = (p_ad <= quantile) | (predicted == "NC")
    return np.select([ad & nc, ad], ["AD|NC", "AD"], "NC")


# ---------------------------------------------------------------- metrics and their intervals


class Sample(NamedTuple):
    """Scores of one unit: how many, in how many groups, METRICS as they are, and METRICS in each resample."""

    n: int
    groups: int
    scores: dict
    resampled: dict


def bootstrap_scores(predictions):
    """Score labelled predictions at slice, scan and subject level, as they are and in a bootstrap over groups.

    The bootstrap (Efron & Tibshirani 1993) draws whole groups (subjects, mostly: see subjects.assign_groups), since
    slices of one brain are not independent samples. Returns a dict of a Sample for each unit, for `summarise` and
    `compare`; None where there is nothing.
    """
    return {unit: sample_unit(predictions, unit) for unit in UNITS}


def sample_unit(predictions, unit):
    y, p, predicted, group = arrays(predictions, unit)
    if len(y) == 0:
        return None
    resampled = resampled_scores(y, p, predicted, Bootstrap(group))
    return Sample(len(y), len(np.unique(group)), point_scores(y, p, predicted), resampled)


def summarise(samples):
    """The scores of `bootstrap_scores` as they go into metrics.json.

    Each unit holds n, the number of groups, the METRICS and ci95 with a pair for each: the 2.5th and 97.5th percentile
    of the resamples. A score that is not defined (a class is absent) is None, and so are an interval of one group and
    "subject" if no subject is known.
    """
    return {unit: sample and summarise_unit(sample) for unit, sample in samples.items()}


def summarise_unit(sample):
    ci95 = {name: interval(values) if sample.groups > 1 else None for name, values in sample.resampled.items()}
    return {"n": sample.n, "groups": sample.groups, **sample.scores, "ci95": ci95}


def mean_scores(tables):
    """`bootstrap_scores` of tables of the same slices, averaged over them: a dict of the same form."""
    results, means = [bootstrap_scores(table) for table in tables], {}
    for unit, first in results[0].items():
        means[unit] = first
        if first is not None:
            samples = [result[unit] for result in results]
            scores = {name: [sample.scores[name] for sample in samples] for name in METRICS}
            scores = {name: None if None in values else float(np.mean(values)) for name, values in scores.items()}
            resampled = {name: np.mean([sample.resampled[name] for sample in samples], 0) for name in METRICS}
            means[unit] = first._replace(scores=scores, resampled=resampled)
    return means


def arrays(predictions, unit):
    """(y, p, predicted, group), arrays (N,) of labelled predictions of a unit: whether AD, p_AD, whether AD is
    predicted, and the group."""
    table = aggregate(predictions, unit)
    ad, predicted = (table.label == "AD").to_numpy(bool), (table.prediction == "AD").to_numpy(bool)
    return ad, table.p_AD.to_numpy(float), predicted, table.group.to_numpy(str)


def as_baseline(predictions, name):
    """Predictions with those of a baseline in place of the model's."""
    return predictions.assign(p_AD=predictions[name], threshold=THRESHOLD)


def point_scores(y, p, predicted):
    """METRICS of p_AD `p` (N,) and booleans `predicted` (N,) against y (N,), True for AD; None where not defined."""
    once = Bootstrap(np.zeros(len(y)), 1)  # one group, drawn once
    scores = {name: float(values[0]) for name, values in resampled_scores(y, p, predicted, once).items()}
    return {name: None if math.isnan(value) else value for name, value in scores.items()}


def which_bin(p):
    return np.minimum((p * BINS).astype(int), BINS - 1)


class Bootstrap:
    """How often each group is drawn in each resample: `counts`, (resamples, groups)."""

    def __init__(self, group, resamples=RESAMPLES, seed=0):
        """`group` (N,) names the group of each row. Rows of equal groups and seeds get equal counts, which pairs the
        resamples of two models."""
        names, self.group = np.unique(np.asarray(group, str), return_inverse=True)
        n = len(names)
        self.counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples).astype(float)

    def total(self, values):
        """The sum of values (N,) in each resample, (resamples,)."""
        return self.counts @ np.bincount(self.group, values, self.counts.shape[1])

    def curves(self, y, p):
        """Per chunk of resamples, the numbers of AD and of NC with p at or above each distinct value of p, from the
        highest on: two arrays (chunk, values)."""
        order = np.argsort(-p, kind="stable")
        last = np.flatnonzero(np.diff(p[order], append=-np.inf))  # of each run of equal values
        ad, row = y[order].astype(float), self.group[order]
        for start in range(0, len(self.counts), 100):
            times = self.counts[start : start + 100, row]
            yield np.cumsum(times * ad, 1)[:, last], np.cumsum(times * (1 - ad), 1)[:, last]


def resampled_scores(y, p, predicted, bootstrap):
    """METRICS in each resample, a dict of arrays (resamples,); nan where a resample lacks a class that one needs.

    The Brier score is the mean squared error of p_AD. The calibration error is the expected one of ten equal bins of
    p_AD: the mean distance between p_AD and the share of AD, by bin, weighted by its size; small samples raise it.
    """
    total = bootstrap.total
    n, ad, nc = total(np.ones(len(y))), total(y), total(~y)
    hit_ad, hit_nc = total(predicted & y), total(~predicted & ~y)
    bins = which_bin(p)
    error = sum(np.abs(total((p - y) * (bins == b))) for b in np.unique(bins))
    areas = [_areas(*curve) for curve in bootstrap.curves(y, p)]
    with np.errstate(invalid="ignore", divide="ignore"):
        sensitivity, specificity = hit_ad / ad, hit_nc / nc
        return {
            "accuracy": (hit_ad + hit_nc) / n,
            "balanced_accuracy": (sensitivity + specificity) / 2,
            "sensitivity": sensitivity,
            "specificity": specificity,
            "f1": np.where((ad > 0) & (nc > 0), 2 * hit_ad / (hit_ad + ad + nc - hit_nc), np.nan),
            "auroc": np.concatenate([auroc for auroc, _ in areas]),
            "average_precision": np.concatenate([precision for _, precision in areas]),
            "brier": total((p - y) ** 2) / n,
            "calibration_error": error / n,
        }


def _areas(above_ad, above_nc):
    """AUROC (by trapezia, ties count half) and average precision (by steps) of curves (B, values)."""
    more_ad, more_nc = np.diff(above_ad, axis=1, prepend=0), np.diff(above_nc, axis=1, prepend=0)
    ad, nc = above_ad[:, -1], above_nc[:, -1]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.nan_to_num(above_ad / (above_ad + above_nc))  # 0 where nothing is above
        auroc = (more_nc * (above_ad - more_ad / 2)).sum(1) / (ad * nc)
        return auroc, np.where(nc > 0, (more_ad * precision).sum(1) / ad, np.nan)


def interval(drawn):
    """The 95 % percentile interval of a score's resamples, [low, high]; None if it was defined in none of them."""
    drawn = drawn[np.isfinite(drawn)]  # a resample without one of the classes says nothing of that class
    return [float(q) for q in np.quantile(drawn, [0.025, 0.975])] if len(drawn) else None


def roc_band(y, p, group, grid):
    """95 % band of the sensitivity at each false-positive rate of `grid`: arrays low and high, as long as the grid."""
    lines = []
    for above_ad, above_nc in Bootstrap(group).curves(y, p):
        for ad, nc in zip(above_ad, above_nc):
            if ad[-1] and nc[-1]:
                lines.append(np.interp(grid, np.append(0, nc / nc[-1]), np.append(0, ad / ad[-1])))
    return np.quantile(lines, [0.025, 0.975], axis=0)


# ---------------------------------------------------------------- comparisons, and what else predictions say


def compare(a, b):
    """Is `a` better than `b`, or is it noise? Two results of `bootstrap_scores` on the same slices.

    Returns for each unit the number of groups, and for each metric {"difference" (a - b), "ci95", "p"} of a paired
    bootstrap over groups: both models are scored on the same resamples. p is two-sided: twice the share of resamples
    on the rarer side of 0. Both need the same groups, or the resamples are not pairs.
    """
    differences = dict.fromkeys(UNITS)
    for unit in UNITS:
        if a[unit] is None or b[unit] is None:
            continue
        differences[unit] = {"groups": a[unit].groups, **dict.fromkeys(METRICS)}
        for name in METRICS:
            drawn = a[unit].resampled[name] - b[unit].resampled[name]
            drawn = drawn[np.isfinite(drawn)]
            if len(drawn):  # a score that is not defined is so in all resamples
                difference = a[unit].scores[name] - b[unit].scores[name]
                rarer = min((drawn <= 0).sum(), (drawn >= 0).sum())
                differences[unit][name] = {"difference": difference, "ci95": interval(drawn),
                                           "p": float(min(1, 2 * (rarer + 1) / (len(drawn) + 1)))}  # fmt: skip
    return differences


def is_better(comparison, metric):
    """Whether the whole interval of a comparison's difference lies on the better side of 0, of enough groups."""
    if comparison[metric] is None or comparison["groups"] < FEWEST:
        return False
    low, high = comparison[metric]["ci95"]
    return high < 0 if metric in LOWER_IS_BETTER else low > 0


def score_sets(predictions, coverage):
    """How prediction sets did on labelled scans: the share whose set holds the label (covered), the share of AD|NC
    (uncertain), and the accuracy of the others, with intervals over groups."""
    scans = aggregate(predictions, "scan")
    certain = (scans.prediction_set != "AD|NC").to_numpy(bool)
    covered = ~certain | (scans.prediction_set == scans.label).to_numpy(bool)
    bootstrap = Bootstrap(scans.group)
    everyone = np.ones(len(scans))
    ratios = {"covered": (covered, everyone), "uncertain": (~certain, everyone),
              "accuracy_if_certain": (covered & certain, certain)}  # fmt: skip
    scores = {"coverage": coverage, "n": len(scans), "n_certain": int(certain.sum()), "ci95": {}}
    for name, (part, whole) in ratios.items():
        with np.errstate(invalid="ignore", divide="ignore"):
            scores[name] = float(part.sum() / whole.sum()) if whole.sum() else None
            scores["ci95"][name] = interval(bootstrap.total(part) / bootstrap.total(whole))
    return scores


def aggregations(predictions):
    """A scan's probability in three ways: mean p_AD, expit of the mean logit, and the share of slices that vote AD.

    Returns the scan-level scores (as `summarise` has them, at a threshold of 0.5) of each way, so that the choice of
    the first rests on scores."""
    predictions = predictions.assign(threshold=THRESHOLD)
    z = logit(predictions.p_AD.clip(1e-7, 1 - 1e-7).astype(float))
    ways = {
        "mean probability": predictions.p_AD,
        "mean logit": expit(z.groupby(predictions.scan).transform("mean")),
        "vote": (predictions.p_AD >= THRESHOLD).astype(float),
    }
    return {name: summarise_unit(sample_unit(predictions.assign(p_AD=p), "scan")) for name, p in ways.items()}


def risk_coverage(p, right, threshold=THRESHOLD):
    """Error rate among the surest share of units (El-Yaniv & Wiener 2010): arrays coverage and risk, (N,), from the
    surest on. How sure a prediction is, is the distance of p (N,) from the threshold."""
    order = np.argsort(-np.abs(p - threshold), kind="stable")
    answered = np.arange(1, len(p) + 1)
    return answered / len(p), np.cumsum(~np.asarray(right, bool)[order]) / answered


def fit_windows(scans):
    """The share of AD by slice window of a table of training scans, a row a scan: Series from `at` (the window: the
    lowest slice number of the scan) to a share, by Laplace's rule, so that a window of two scans is not certain; what a
    model can get from the choice of slices without looking at anatomy."""
    windows = (scans.label == "AD").groupby(scans["at"]).agg(["sum", "size"])
    return (windows["sum"] + 1) / (windows["size"] + 2)


def window_vote(index):
    """Scan accuracy on test of a vote on the slice window alone, fitted on train; windows unseen in train count as the
    larger class of train. Returns a fraction of the test scans."""
    scans = index.groupby(["split", "scan"]).agg(label=("label", "first"), at=("slice", "min")).reset_index()
    train, test = scans[scans.split == "train"], scans[scans.split == "test"]
    share = test["at"].map(fit_windows(train)).fillna((train.label == "AD").mean())
    return float((np.where(share >= THRESHOLD, "AD", "NC") == test.label).mean())


def by_window(predictions):
    """Scan-level accuracy for each slice window (the scan's lowest slice number); where all scans have one window,
    slice-level for each slice number. A table: at, n, accuracy, share_AD; and the name of the unit."""
    scans = aggregate(predictions, "scan").set_index("scan")
    scans["at"] = predictions.groupby("scan").slice.min()
    unit = "scan"
    if scans["at"].nunique() < 2:
        scans, unit = aggregate(predictions, "slice"), "slice"
        scans["at"] = scans.slice
    scans = scans.assign(right=scans.prediction == scans.label, ad=scans.label == "AD")
    table = scans.groupby("at").agg(n=("right", "size"), accuracy=("right", "mean"), share_AD=("ad", "mean"))
    return table.reset_index(), unit
