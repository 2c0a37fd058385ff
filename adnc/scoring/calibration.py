"""Temperature, decision threshold, conformal prediction sets and the weight of the network beside
the dark share, fitted on validation alone, or across folds.

A calibration is a dict of plain values in the checkpoint. It serves the two classes NC and AD.
"""

import math

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from adnc.scoring.metrics import (
    THRESHOLD,
    Bootstrap,
    aggregate,
    exact_interval,
    interval,
    with_predictions,
)

# ---------------------------------------------------------------- fitting


def calibrate(val, threshold="0.5", divided_by=1.0):
    """Fit the calibration of a model; returns plain values for its checkpoint.

    `val` is a table of labelled slices with the columns metrics.PREDICTIONS. `threshold` is "0.5"
    or "youden". `divided_by` is a temperature by which the logits have been divided before. The
    temperature fits slices. For prediction sets, `scores` holds 1 - p(label) of each validation
    scan, and `weights` gives every group the same weight.
    """
    is_ad = (val.label == "AD").to_numpy(bool)
    temperature = fit_temperature(val.logit.to_numpy(), is_ad, val.group, divided_by)

    scans = aggregate(val.assign(p_AD=expit(val.logit / temperature)), "scan")
    y, p, group = (scans.label == "AD").to_numpy(bool), scans.p_AD.to_numpy(), scans.group
    scores = np.where(y, 1 - p, p)
    weights = 1 / group.map(group.value_counts()).to_numpy()
    order = np.argsort(scores, kind="stable")
    return {
        "temperature": temperature,
        "threshold": youden(y, p) if threshold == "youden" else THRESHOLD,
        "threshold_rule": threshold,
        "groups": int(group.nunique()),
        "scores": scores[order].tolist(),
        "weights": weights[order].tolist(),
    }


def fit_temperature(z, y, group, divided_by=1.0):
    """The temperature T for which expit(z / T) fits y best (Guo et al. 2017, arXiv 1706.04599).

    z: logits (N,); y: booleans (N,); group: the group of each row. The mean cross-entropy is
    multiplied by the number of groups, and log T has a normal prior with mean 0 and an SD of log 2.
    With many subjects this is Guo's optimum; with a handful, all predicted correctly, the prior
    keeps the model from becoming infinitely certain. Of logits that a temperature has divided
    before, the prior is that of the product of both.
    """
    n_groups = len(np.unique(group))

    def loss(log_t):
        x = z / math.exp(log_t)
        cross_entropy = np.mean(np.logaddexp(0, x) - y * x)
        of_both = log_t + math.log(divided_by)
        return n_groups * cross_entropy + (of_both / math.log(2)) ** 2 / 2

    bounds = (math.log(0.05), math.log(20))
    fit = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(math.exp(fit.x))


def youden(y, p):
    """The threshold on p (N,) with the largest sensitivity + specificity - 1 (Youden 1950).

    Candidates are 0.5 and the midpoints between values of p. Ties: the one nearest to 0.5.
    """
    values = np.unique(p)
    cuts = np.append((values[:-1] + values[1:]) / 2, THRESHOLD)
    index = [(p[y] >= cut).mean() - (p[~y] >= cut).mean() for cut in cuts]
    best = np.isclose(index, max(index), atol=1e-12)
    return float(cuts[best][np.abs(cuts[best] - THRESHOLD).argmin()])


def fit_with_dark_share(val):
    """The weights of the logits of network and dark share, and the bias, of a logistic regression
    on both, fitted on the validation slices.

    It answers whether the network knows more than that number (metrics.json, beyond_dark_share).
    From few subjects the weights are noisy, which makes both together look worse than they are; of
    several folds `fit_across` has more.
    """
    x, is_ad = two_logits(val), (val.label == "AD").to_numpy(bool)
    scaler = StandardScaler().fit(x)
    model = LogisticRegression().fit(scaler.transform(x), is_ad)
    weights = model.coef_[0] / scaler.scale_
    return [*weights.tolist(), float(model.intercept_[0] - weights @ scaler.mean_)]


def fit_across(folds):
    """The p_AD of network and dark share together, an array for each table of folds of one
    cross-validation: by the weights that the other folds give, so that none is scored on the
    subjects on which it was fitted. The logits must have one scale in all of them. None if the
    others of a fold are all of one class.
    """
    together = []
    for k, fold in enumerate(folds):
        others = pd.concat([*folds[:k], *folds[k + 1 :]])
        if others.label.nunique() < 2:
            return None
        *weights, bias = fit_with_dark_share(others)
        together.append(expit(two_logits(fold) @ np.array(weights) + bias).round(7))
    return together


def two_logits(predictions):
    """The logits of the network and of the dark share, float (N, 2)."""
    dark = predictions.dark_share.to_numpy(float).clip(1e-6, 1 - 1e-6)
    return np.column_stack([predictions.logit.to_numpy(float), logit(dark)])


# ---------------------------------------------------------------- prediction sets


def conformal_quantile(calibration, coverage):
    """The largest score 1 - p with which a class is in a prediction set; inf if every class is.

    Hierarchical split-conformal prediction (Lee, Barber & Willett 2023, arXiv 2306.06342): K + 1
    groups have equal weight, spread over their scans, and the new group counts as infinite. The set
    of a scan of a new group then contains its label with a probability of at least `coverage`, if
    the new group and those of validation are exchangeable. They are not quite exchangeable if the
    epoch was chosen on validation, too.
    """
    if not 0 < coverage < 1:
        raise ValueError(
            f"the coverage is {coverage}; expected more than 0 and less than 1, such as 0.9"
        )
    weights = np.cumsum(calibration["weights"]) / (calibration["groups"] + 1)
    reached = np.flatnonzero(weights >= coverage - 1e-9)
    if len(reached) == 0:
        return math.inf
    return float(calibration["scores"][reached[0]])


def max_coverage(calibration, coverage):
    """The largest coverage that the validation groups allow, or None if `coverage` is allowed."""
    largest = calibration["groups"] / (calibration["groups"] + 1)
    if largest < coverage - 1e-9:
        return largest
    return None


def prediction_sets(p_ad, predicted, quantile):
    """The set of each p_AD (N,), "AD", "NC" or "AD|NC": classes whose 1 - p is within the quantile.

    The prediction is always in its set, so no set is empty. This can only raise the coverage.
    """
    ad = (1 - p_ad <= quantile) | (predicted == "AD")
    nc = (p_ad <= quantile) | (predicted == "NC")
    return np.select([ad & nc, ad], ["AD|NC", "AD"], "NC")


def apply_calibration(predictions, calibration, coverage=None):
    """Predictions with calibrated p_AD and prediction, and with a coverage, prediction_set; and
    the p_AD of network and dark share together, if both are known.

    Without a calibration (None), the temperature is 1 and the threshold 0.5. A prediction set
    belongs to the whole scan. A scan with a slice out of the training range gets "AD|NC", since the
    coverage holds only for scans like those of validation.
    """
    if calibration is None:
        calibration = {"temperature": 1.0, "threshold": THRESHOLD}

    # Seven digits from here on, as in the files, so that scores can be repeated from files.
    p_ad = expit(predictions.logit / calibration["temperature"]).round(7)
    table = with_predictions(predictions.assign(p_AD=p_ad, threshold=calibration["threshold"]))

    if "with_dark_share" in calibration:
        *weights, bias = calibration["with_dark_share"]
        table["with_dark_share"] = expit(two_logits(table) @ np.array(weights) + bias).round(7)

    if coverage is not None:
        quantile = conformal_quantile(calibration, coverage)
        scans = aggregate(table[table.p_AD.notna()], "scan")
        sets = prediction_sets(scans.p_AD.to_numpy(float), scans.prediction.to_numpy(str), quantile)
        sets = np.where(scans.n_out_of_range > 0, "AD|NC", sets)
        table["prediction_set"] = table.scan.map(dict(zip(scans.scan, sets))).astype("string")
    return table


def score_sets(predictions, coverage):
    """Scores of prediction sets on labelled scans, with intervals over groups.

    A scan with a slice out of the training range is always given the set AD|NC, which says nothing
    about the coverage: `n_out_of_range` counts these scans, and the scores are those of the others.
    covered: the share of scans whose set contains the label; uncertain: the share of AD|NC;
    accuracy_if_certain: the accuracy of the other scans. A score without a scan is None.
    """
    scans = aggregate(predictions, "scan")
    in_range = (scans.n_out_of_range == 0).to_numpy(bool)
    n_out_of_range = int((~in_range).sum())
    scans = scans[in_range]
    certain = (scans.prediction_set != "AD|NC").to_numpy(bool)
    covered = ~certain | (scans.prediction_set == scans.label).to_numpy(bool)
    everyone = np.ones(len(scans), bool)
    ratios = {
        "covered": (covered, everyone),
        "uncertain": (~certain, everyone),
        "accuracy_if_certain": (covered & certain, certain),
    }

    scores = {
        "coverage": coverage,
        "n": len(scans),
        "n_certain": int(certain.sum()),
        "n_out_of_range": n_out_of_range,
        "ci95": {},
    }
    for name, (part, whole) in ratios.items():
        scores[name], scores["ci95"][name] = None, None
        if not whole.any():
            continue
        scores[name] = float(part.sum() / whole.sum())
        if scores[name] in (0, 1):
            n_groups = scans.group[whole].nunique()
            scores["ci95"][name] = exact_interval(scores[name], n_groups)
            continue
        bootstrap = Bootstrap(scans.group)
        with np.errstate(invalid="ignore", divide="ignore"):
            scores["ci95"][name] = interval(bootstrap.total(part) / bootstrap.total(whole))
    return scores
