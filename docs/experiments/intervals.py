"""How often do the intervals of metrics.json hold the true value? A table in Markdown.

    python -m docs.experiments.intervals

Accuracy: n independent groups, each right with the true probability; the coverage is exact, a sum
over the possible numbers of right groups. AUROC: n / 2 groups of each class with normal scores, the
means so far apart that the true AUROC is the given one; 1,000 samples. "bootstrap" is the
percentile interval alone, which at 0 and 1 is a point; "used" is that of metrics.json, which is
exact there. An interval that is not given holds nothing.
"""

import numpy as np
from scipy.stats import binom, norm

from adnc.scoring import metrics
from adnc.scoring.assess import format_table

GROUPS = (5, 10, 20, 50)
TRUE = (0.5, 0.9, 0.99)
SAMPLES = 1000


def intervals(y, p):
    """(bootstrap, used): the intervals of accuracy and AUROC of one sample of groups, as dicts."""
    groups = {"AD": int(y.sum()), "NC": int((~y).sum()), "all": len(y)}
    predicted = p >= 0.5
    bootstrap = metrics.Bootstrap(np.arange(len(y)), resamples=1000)
    resampled = metrics.resampled_scores(y, p, predicted, bootstrap)
    sample = metrics.Sample(
        len(y), len(y), metrics.point_scores(y, p, predicted), resampled, groups
    )
    names = ("accuracy", "auroc")
    ci95 = metrics.summarise_unit(sample)["ci95"]
    return (
        {name: metrics.percentiles(resampled[name]) for name in names},
        {name: ci95[name] for name in names},
    )


def holds(limits, true):
    """Whether an interval holds the true value; one that is not given does not."""
    return limits is not None and limits[0] - 1e-9 <= true <= limits[1] + 1e-9


def accuracy_coverage(n, true):
    """(bootstrap, used): the probability that the interval of accuracy holds the true value."""
    y = np.arange(n) % 2 == 1
    covered = np.zeros(2)
    for n_right in range(n + 1):
        right = np.arange(n) < n_right
        both = intervals(y, np.where(y == right, 0.9, 0.1))
        held = [holds(limits["accuracy"], true) for limits in both]
        covered += binom.pmf(n_right, n, true) * np.array(held)
    return covered


def auroc_coverage(n, true, seed=0):
    """The same for AUROC, as a share of SAMPLES samples."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2 == 1
    covered = np.zeros(2)
    for _ in range(SAMPLES):
        score = rng.normal(size=n) + y * np.sqrt(2) * norm.ppf(true)
        both = intervals(y, norm.cdf(score))
        covered += [holds(limits["auroc"], true) for limits in both]
    return covered / SAMPLES


def main():
    rows = [["groups", "true value", "accuracy: bootstrap", "used", "AUROC: bootstrap", "used"]]
    for n in GROUPS:
        for true in TRUE:
            cells = [*accuracy_coverage(n, true), *auroc_coverage(n, true)]
            rows.append([str(n), f"{true:g}", *(f"{cell:.3f}" for cell in cells)])
    print("\n".join(format_table(rows)))


if __name__ == "__main__":
    main()
