"""How well is it measured whether a network adds something to the dark share? A table in Markdown.

    python -m docs.experiments.both_together

Subjects of two classes have two normal scores, of a network (AUROC 0.69) and of a number (0.733),
which are correlated within a class; each slice of a subject shows them with noise. Both together
are a logistic regression, fitted on 11 subjects of a validation in each of five folds, or on the
four other folds, as tools.evaluate does. The table has the AUROC of both together minus that of the
number: the true one, of the best weights for endless data, and the mean over REPEATS samples of
what is measured, with the share of samples in which it is below 0.
"""

import numpy as np
import pandas as pd
from scipy.special import expit, logit
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from adnc.scoring.assess import format_table
from adnc.scoring.calibration import fit_across, fit_with_dark_share, two_logits

N_AD, N_NC, FOLDS, SLICES, REPEATS = 78, 58, 5, 8, 200  # subjects as in OASIS-1
VALIDATION = {"AD": 6, "NC": 5}  # subjects of a fold's validation
AUROC = {"network": 0.69, "dark share": 0.733}
NOISE = 0.7  # SD of a slice about its subject; that of subjects within a class is 1
CORRELATIONS = (0.0, 0.5)


def distances():
    """The distance of the class means of both scores, in SDs of subjects."""
    return np.sqrt(2) * norm.ppf(list(AUROC.values()))


def true_gain(correlation):
    """AUROC of the best linear combination minus that of the number alone (Su & Liu 1993, Journal
    of the American Statistical Association 88, 1350), on means over the slices of a subject."""
    covariance = np.array([[1, correlation], [correlation, 1]]) + np.eye(2) * NOISE**2 / SLICES
    d = distances()
    both = norm.cdf(np.sqrt(d @ np.linalg.solve(covariance, d) / 2))
    return both - norm.cdf(d[1] / np.sqrt(2 * covariance[1, 1]))


def draw_folds(correlation, rng):
    """Predictions of a cross-validation: for each fold a table of the slices of its subjects."""
    is_ad = rng.permutation(np.arange(N_AD + N_NC) < N_AD)
    covariance = [[1, correlation], [correlation, 1]]
    means = np.where(is_ad, 0.5, -0.5)[:, None] * distances()
    subjects = means + rng.multivariate_normal([0, 0], covariance, len(is_ad))
    slices = np.repeat(subjects, SLICES, axis=0)
    slices += rng.normal(0, NOISE, slices.shape)
    table = pd.DataFrame({
        "subject": np.repeat(np.arange(len(is_ad)), SLICES),
        "label": np.repeat(np.where(is_ad, "AD", "NC"), SLICES),
        "logit": slices[:, 0],
        "dark_share": expit(slices[:, 1]),
    })  # fmt: skip
    return [table[table.subject % FOLDS == k] for k in range(FOLDS)]


def fit_on_validation(folds, rng):
    """The p_AD of both together for each fold, by weights of a few subjects of the other folds."""
    together = []
    for k, fold in enumerate(folds):
        others = pd.concat([*folds[:k], *folds[k + 1 :]])
        label = others.groupby("subject").label.first()
        chosen = np.concatenate([
            rng.choice(label.index[label == name], n, replace=False)
            for name, n in VALIDATION.items()
        ])  # fmt: skip
        *weights, bias = fit_with_dark_share(others[others.subject.isin(chosen)])
        together.append(expit(two_logits(fold) @ np.array(weights) + bias))
    return together


def gain(folds, together):
    """AUROC of subjects: of both together minus that of the number."""
    table = pd.concat(folds).assign(both=np.concatenate(together))
    table["number"] = logit(table.dark_share)
    subjects = table.groupby("subject")[["both", "number"]].mean()
    is_ad = table.groupby("subject").label.first() == "AD"
    return roc_auc_score(is_ad, subjects.both) - roc_auc_score(is_ad, subjects.number)


def main():
    rows = [["correlation", "true", "weights of validation", "weights of the other folds"]]
    for correlation in CORRELATIONS:
        rng = np.random.default_rng(0)
        measured = []
        for _ in range(REPEATS):
            folds = draw_folds(correlation, rng)
            both_ways = fit_on_validation(folds, rng), fit_across(folds)
            measured.append([gain(folds, together) for together in both_ways])
        measured = np.array(measured)
        cells = [
            f"{each.mean():+.3f}, below 0 in {(each < 0).mean():.0%}" for each in measured.T
        ]
        rows.append([f"{correlation:g}", f"{true_gain(correlation):+.3f}", *cells])
    print("\n".join(format_table(rows)))


if __name__ == "__main__":
    main()
