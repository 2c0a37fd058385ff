"""From predictions to figures: calibration, the three units, metrics with intervals, prediction sets, comparisons.

Not run by itself; evaluate.py is its command. Predictions are a DataFrame with a row a slice: scan, slice, subject,
p_AD, where known label, and where a model has its own the column threshold (p_AD from which the prediction is AD).
Everything here is a function of such tables: nothing is printed, drawn or read.
"""

import math

import numpy as np
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
FEWEST = 10  # subjects for a verdict: with fewer, bootstrap intervals are too narrow (8 to 11 % errors instead of 5)

# ---------------------------------------------------------------- units


def with_predictions(table):
    """Add prediction: "AD" where p_AD reaches the row's threshold (0.5 where the table has none), else "NC"."""
    threshold = table.threshold if "threshold" in table else THRESHOLD
    return table.assign(prediction=np.where(table.p_AD >= threshold, "AD", "NC"))


def aggregate(predictions, unit):
    """Predictions by slice -> by "slice", "scan" or "subject": the mean p_AD over the unit's slices.

    Slices of unknown subject have no row in the table by subject. Adds n_slices; label, threshold, seen and
    prediction_set are those of the first slice, for they do not differ within a scan. (A subject with scans of both
    classes, whom the audit names, has the label of its first.)
    """
    if unit == "slice":
        return with_predictions(predictions).assign(n_slices=1)
    columns = {"p_AD": ("p_AD", "mean"), "n_slices": ("p_AD", "size")}
    carried = ["label", "threshold", "seen"] + (["subject", "prediction_set"] if unit == "scan" else [])
    columns |= {name: (name, "first") for name in carried if name in predictions}
    columns |= {"n_unlike": ("unlike", "count")} if "unlike" in predictions else {}  # those with a reason
    return with_predictions(predictions.groupby(unit).agg(**columns).reset_index())


def groups(table):
    """Who is drawn together in a bootstrap: the subject; a scan of unknown subject counts as one of its own."""
    known = table.subject.astype("string")
    return (known if "scan" not in table else known.fillna("scan " + table.scan.astype(str))).astype(str)


# ---------------------------------------------------------------- calibration, on validation alone


def calibrate(val, threshold="0.5"):
    """What validation says of the model's outputs, as plain values for the checkpoint.

    `val` holds labelled predictions by slice with the column logit (z_AD - z_NC). Returns the temperature; the
    threshold, 0.5 or for "youden" the one that `youden` finds on the validation scans; and for prediction sets each
    validation scan's score 1 - p(its label) with its weight, so that all subjects weigh the same.
    """
    group = groups(val)
    temperature = fit_temperature(val.logit.to_numpy(), (val.label == "AD").to_numpy(), group)
    scans = aggregate(val.assign(p_AD=expit(val.logit / temperature)), "scan")
    y, p, group = (scans.label == "AD").to_numpy(), scans.p_AD.to_numpy(), groups(scans)
    order = np.argsort(np.where(y, 1 - p, p), kind="stable")
    return {
        "temperature": temperature,
        "threshold": youden(y, p) if threshold == "youden" else THRESHOLD,
        "threshold_rule": threshold,
        "subjects": int(group.nunique()),
        "scores": np.where(y, 1 - p, p)[order].tolist(),
        "weights": (1 / group.map(group.value_counts()).to_numpy())[order].tolist(),
    }


def fit_temperature(z, y, group):
    """The temperature T (Guo et al. 2017, arXiv 1706.04599) for which expit(z / T) fits y (N,) best, logits z (N,).

    The mean cross-entropy counts as often as there are subjects in `group`, and log T has a normal prior about 0 with
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
    weights = np.cumsum(calibration["weights"]) / (calibration["subjects"] + 1)
    reached = np.flatnonzero(weights >= coverage - 1e-9)
    return float(calibration["scores"][reached[0]]) if len(reached) else math.inf


def prediction_sets(p_ad, predicted, quantile):
    """"AD", "NC" or "AD|NC" for each p_AD (N,): the classes whose 1 - p is within the quantile, and always the
    prediction, so that no set is empty (which can only raise the coverage)."""
    ad = (1 - p_ad <= quantile) | (predicted == "AD")
    nc = (p_ad <= quantile) | (predicted == "NC")
    return np.select([ad & nc, ad], ["AD|NC", "AD"], "NC")


# ---------------------------------------------------------------- metrics and their intervals


def sample(predictions, resamples=RESAMPLES, seed=0):
    """Score labelled predictions by slice, scan and subject, as they are and in a bootstrap over subjects.

    The bootstrap (Efron & Tibshirani 1993) draws whole subjects, since slices of one brain are no independent samples.
    Returns a dict by unit of (n, number of subjects, METRICS, METRICS in each resample), for `score` and `compare`;
    None where n is 0.
    """
    return {unit: _sample(predictions, unit, resamples, seed) for unit in UNITS}


def _sample(predictions, unit, resamples=RESAMPLES, seed=0):
    y, p, predicted, group = arrays(predictions, unit)
    if len(y) == 0:
        return None
    drawn = draw(y, p, predicted, Bootstrap(group, resamples, seed))
    return len(y), len(np.unique(group)), point_figures(y, p, predicted), drawn


def score(sampled):
    """The figures of `sample`'s dict, as they go into metrics.json.

    Each unit holds n, the number of subjects, the METRICS and ci95 with a pair for each: the 2.5th and 97.5th
    percentile of the resamples. A figure that is not defined (a class is absent) is None, an interval of one subject,
    too; so is "subject" if no subject is known.
    """
    return {unit: part and _figures(*part) for unit, part in sampled.items()}


def _figures(n, subjects, point, drawn):
    ci95 = {name: interval(values) if subjects > 1 else None for name, values in drawn.items()}
    return {"n": n, "subjects": subjects, **point, "ci95": ci95}


def arrays(predictions, unit):
    """(y, p, predicted, group), arrays (N,) of labelled predictions by unit: whether AD, p_AD, whether AD is predicted,
    and the subject."""
    table = aggregate(predictions, unit)
    ad, predicted = (table.label == "AD").to_numpy(), (table.prediction == "AD").to_numpy()
    return ad, table.p_AD.to_numpy(float), predicted, groups(table).to_numpy()


def point_figures(y, p, predicted):
    """METRICS of p_AD `p` (N,) and booleans `predicted` (N,) against y (N,), True for AD; None where not defined.

    The Brier score is the mean squared error of p_AD. The calibration error is the expected one of ten equal bins of
    p_AD: the mean distance between p_AD and the share of AD, by bin, weighted by its size; small samples raise it.
    """
    from sklearn import metrics as sk

    ad, nc = bool(y.any()), bool(not y.all())
    figures = {
        "accuracy": sk.accuracy_score(y, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(y, predicted) if ad and nc else None,
        "sensitivity": sk.recall_score(y, predicted) if ad else None,
        "specificity": sk.recall_score(y, predicted, pos_label=False) if nc else None,
        "f1": sk.f1_score(y, predicted) if ad or predicted.any() else None,
        "auroc": sk.roc_auc_score(y, p) if ad and nc else None,
        "average_precision": sk.average_precision_score(y, p) if ad else None,
        "brier": sk.brier_score_loss(y, p) if ad and nc else np.mean((p - y) ** 2),
        "calibration_error": np.abs(np.bincount(which_bin(p), p - y)).sum() / len(y),
    }
    return {name: None if value is None else float(value) for name, value in figures.items()}


def which_bin(p):
    return np.minimum((p * BINS).astype(int), BINS - 1)


class Bootstrap:
    """How often each subject is drawn in each resample: `counts`, (resamples, subjects)."""

    def __init__(self, group, resamples=RESAMPLES, seed=0):
        """`group` (N,) names the subject of each row. Rows of equal groups and seeds get equal counts, which pairs the
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


def draw(y, p, predicted, bootstrap):
    """METRICS in each resample, a dict of arrays (resamples,); nan where a resample lacks a class."""
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
            "f1": 2 * hit_ad / (hit_ad + ad + nc - hit_nc),
            "auroc": np.concatenate([auroc for auroc, _ in areas]),
            "average_precision": np.concatenate([precision for _, precision in areas]),
            "brier": total((p - y) ** 2) / n,
            "calibration_error": error / n,
        }


def _areas(above_ad, above_nc):
    """AUROC (by trapezia, ties count half) and average precision (by steps) of curves (B, values)."""
    more_ad, more_nc = np.diff(above_ad, axis=1, prepend=0), np.diff(above_nc, axis=1, prepend=0)
    ad, nc = above_ad[:, -1], above_nc[:, -1]
    above = above_ad + above_nc
    precision = np.divide(above_ad, above, out=np.zeros_like(above), where=above > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        auroc = (more_nc * (above_ad - more_ad / 2)).sum(1) / (ad * nc)
        return auroc, (more_ad * precision).sum(1) / ad


def interval(drawn):
    """The 95 % percentile interval of a figure's resamples, [low, high]; None if it was defined in none of them."""
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


# ---------------------------------------------------------------- what else is said of predictions


def compare(a, b):
    """Is `a` better than `b`, or is it noise? Two dicts of `sample` of the same slices, with the same seed.

    Returns for each unit the number of subjects, and for each metric {"difference" (a - b), "ci95", "p"} of a paired
    bootstrap over subjects: both models are scored on the same resamples. p is two-sided: twice the share of resamples
    on the rarer side of 0. Both need the same subjects, or the resamples are no pairs.
    """
    figures = {}
    for unit in UNITS:
        if a[unit] is None or b[unit] is None:
            figures[unit] = None
            continue
        (_, subjects, point_a, drawn_a), (_, _, point_b, drawn_b) = a[unit], b[unit]
        figures[unit] = {"subjects": subjects}
        for name in METRICS:
            drawn = drawn_a[name] - drawn_b[name]
            drawn = drawn[np.isfinite(drawn)]
            if point_a[name] is None or point_b[name] is None or len(drawn) == 0:
                figures[unit][name] = None
                continue
            rarer = min((drawn <= 0).sum(), (drawn >= 0).sum())
            figures[unit][name] = {"difference": point_a[name] - point_b[name], "ci95": interval(drawn),
                                   "p": float(min(1, 2 * (rarer + 1) / (len(drawn) + 1)))}  # fmt: skip
    return figures


def is_better(comparison, metric):
    """Whether the whole interval of a comparison's difference lies on the better side of 0, of enough subjects."""
    if comparison[metric] is None or comparison["subjects"] < FEWEST:
        return False
    low, high = comparison[metric]["ci95"]
    return high < 0 if metric in LOWER_IS_BETTER else low > 0


def score_sets(predictions, coverage):
    """How prediction sets did on labelled scans: the share whose set holds the label (covered), the share of AD|NC
    (uncertain), and the accuracy of the others, with intervals over subjects."""
    scans = aggregate(predictions, "scan")
    certain = (scans.prediction_set != "AD|NC").to_numpy()
    covered = ~certain | (scans.prediction_set == scans.label).to_numpy()
    bootstrap = Bootstrap(groups(scans))
    everyone = np.ones(len(scans))
    ratios = {"covered": (covered, everyone), "uncertain": (~certain, everyone),
              "accuracy_if_certain": (covered & certain, certain)}  # fmt: skip
    figures = {"coverage": coverage, "n": len(scans), "n_certain": int(certain.sum()), "ci95": {}}
    for name, (part, whole) in ratios.items():
        with np.errstate(invalid="ignore", divide="ignore"):
            figures[name] = float(part.sum() / whole.sum()) if whole.sum() else None
            figures["ci95"][name] = interval(bootstrap.total(part) / bootstrap.total(whole))
    return figures


def aggregations(predictions):
    """A scan's probability in three ways: mean p_AD, expit of the mean logit, and the share of slices that vote AD.

    Returns the figures by scan (as `score` has them, at a threshold of 0.5) of each way, so that the choice of the
    first rests on figures."""
    predictions = predictions.drop(columns="threshold", errors="ignore")
    z = logit(predictions.p_AD.clip(1e-7, 1 - 1e-7).astype(float))
    ways = {
        "mean probability": predictions.p_AD,
        "mean logit": expit(z.groupby(predictions.scan).transform("mean")),
        "vote": (predictions.p_AD >= THRESHOLD).astype(float),
    }
    return {name: _figures(*_sample(predictions.assign(p_AD=p), "scan")) for name, p in ways.items()}


def risk_coverage(p, right, threshold=THRESHOLD):
    """Error rate among the surest share of units (El-Yaniv & Wiener 2010): arrays coverage and risk, (N,), from the
    surest on. How sure a prediction is, is the distance of p (N,) from the threshold."""
    order = np.argsort(-np.abs(p - threshold), kind="stable")
    answered = np.arange(1, len(p) + 1)
    return answered / len(p), np.cumsum(~np.asarray(right)[order]) / answered


def by_window(predictions):
    """Accuracy by scan for each slice window (the scan's lowest slice number); where all scans have one window, by
    slice for each slice number. A table: at, n, accuracy, share_AD; and the name of the unit."""
    scans = aggregate(predictions, "scan").set_index("scan")
    scans["at"] = predictions.groupby("scan").slice.min()
    unit = "scan"
    if scans["at"].nunique() < 2:
        scans, unit = aggregate(predictions, "slice"), "slice"
        scans["at"] = scans.slice
    scans = scans.assign(right=scans.prediction == scans.label, ad=scans.label == "AD")
    table = scans.groupby("at").agg(n=("right", "size"), accuracy=("right", "mean"), share_AD=("ad", "mean"))
    return table.reset_index(), unit
