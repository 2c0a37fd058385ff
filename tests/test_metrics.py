"""Metrics, bootstrap intervals, comparisons of two models, and slice windows."""


import numpy as np
import pandas as pd
import pytest
from fake_predictions import random_predictions, slice_arrays, without_subjects
from scipy.stats import norm
from sklearn import metrics as sk

from adnc.scoring import metrics
from adnc.scoring.metrics import Bootstrap, point_scores, resampled_scores

# ---------------------------------------------------------------- point scores


def test_point_scores_equal_their_definitions():
    y, p, predicted = slice_arrays(random_predictions())
    scores = point_scores(y, p, predicted)
    assert set(scores) == set(metrics.METRICS)

    tn, fp, fn, tp = sk.confusion_matrix(y, p >= 0.5).ravel()
    assert scores["sensitivity"] == tp / (tp + fn)
    assert scores["specificity"] == tn / (tn + fp)
    assert scores["accuracy"] == (tp + tn) / len(y)
    assert scores["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    mean = (scores["sensitivity"] + scores["specificity"]) / 2
    assert scores["balanced_accuracy"] == pytest.approx(mean)

    pairs = p[y][:, None] - p[~y]
    assert scores["auroc"] == pytest.approx(np.heaviside(pairs, 0.5).mean())
    cuts = np.unique(p)[::-1]
    recall = np.array([0, *((p[y] >= cut).mean() for cut in cuts)])
    precision = [y[p >= cut].mean() for cut in cuts]
    assert scores["average_precision"] == pytest.approx((np.diff(recall) * precision).sum())
    assert scores["brier"] == pytest.approx(((p - y) ** 2).mean())


def test_point_scores_equal_those_of_scikit_learn():
    y, p, predicted = slice_arrays(random_predictions(seed=1))
    scores = point_scores(y, p, predicted)
    assert scores["auroc"] == pytest.approx(sk.roc_auc_score(y, p))
    assert scores["average_precision"] == pytest.approx(sk.average_precision_score(y, p))
    assert scores["brier"] == pytest.approx(sk.brier_score_loss(y, p))
    assert scores["f1"] == pytest.approx(sk.f1_score(y, predicted))


@pytest.mark.parametrize("label", ["AD", "NC"])
def test_a_score_that_needs_two_classes_is_undefined_with_one(label):
    p = np.linspace(0.1, 0.9, 12)
    y = np.full(12, label == "AD")
    scores = point_scores(y, p, p >= 0.5)
    undefined = {name for name, value in scores.items() if value is None}
    expected = {"balanced_accuracy", "f1", "auroc", "average_precision"}
    expected.add("specificity" if label == "AD" else "sensitivity")
    assert undefined == expected

    resampled = resampled_scores(y, p, p >= 0.5, Bootstrap(np.arange(12), 50))
    assert {name for name, values in resampled.items() if np.isnan(values).all()} == expected


def test_the_calibration_error_is_the_gap_between_p_ad_and_the_share_of_ad():
    p = np.repeat([0.25, 0.75], 400)
    quarter = np.tile([True, False, False, False], 100)
    y = np.concatenate([quarter, ~quarter])
    assert point_scores(y, p, p >= 0.5)["calibration_error"] == pytest.approx(0)
    overconfident = np.where(p > 0.5, 0.95, 0.05)
    scores = point_scores(y, overconfident, p >= 0.5)
    assert scores["calibration_error"] == pytest.approx(0.2)


# ---------------------------------------------------------------- bootstrap intervals


def test_the_bootstrap_equals_drawing_subjects_one_by_one():
    table = random_predictions()
    y, p, predicted = slice_arrays(table)
    resampled = resampled_scores(y, p, predicted, Bootstrap(table.subject, 200, seed=5))

    rows = [np.flatnonzero(table.subject == name) for name in sorted(table.subject.unique())]
    counts = np.random.default_rng(5).multinomial(30, np.full(30, 1 / 30), 200)
    for i, times in enumerate(counts):
        drawn = np.concatenate([own.repeat(n) for own, n in zip(rows, times)])
        expected = point_scores(y[drawn], p[drawn], predicted[drawn])
        for name in metrics.METRICS:
            assert resampled[name][i] == pytest.approx(expected[name], abs=1e-12), name


def test_95_percent_intervals_contain_the_true_value_in_about_95_percent_of_samples():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(40), 10)
    y = group % 2 == 1
    hits = 0
    for seed in range(200):
        # A subject is right or wrong with all of its 10 slices.
        correct = np.repeat(rng.random(40) < 0.7, 10)
        p = np.where(correct == y, 0.9, 0.1)
        resampled = resampled_scores(y, p, p >= 0.5, Bootstrap(group, 400, seed))
        low, high = metrics.interval(resampled["accuracy"])
        hits += low <= 0.7 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_intervals_over_subjects_are_wider_than_over_slices():
    table = random_predictions()
    arrays = slice_arrays(table)
    over_subjects = resampled_scores(*arrays, Bootstrap(table.subject))["accuracy"].std()
    over_slices = resampled_scores(*arrays, Bootstrap(np.arange(len(table))))["accuracy"].std()
    assert over_subjects > 1.5 * over_slices


def test_the_roc_band_contains_the_curve():
    y, p, _, group = metrics.arrays(random_predictions(), "scan")
    grid = np.linspace(0, 1, 21)
    low, high = metrics.roc_band(y, p, group, grid)
    false_positive_rate, sensitivity, _ = sk.roc_curve(y, p)
    curve = np.interp(grid, false_positive_rate, sensitivity)
    assert (low <= high).all()
    within = (low <= curve + 1e-9) & (curve <= high + 1e-9)
    assert within[1:-1].mean() > 0.9


# ---------------------------------------------------------------- units


def test_each_unit_has_its_own_n_and_unknown_subjects_cost_only_the_subject_level():
    table = random_predictions()
    scores = metrics.summarise(metrics.bootstrap_scores(table))
    assert scores["slice"]["n"] == len(table)
    assert scores["scan"]["n"] == table.scan.nunique()
    assert scores["subject"]["n"] == 30
    for unit in metrics.UNITS:
        for name, (low, high) in scores[unit]["ci95"].items():
            if name != "calibration_error":  # resampling raises it
                assert low <= scores[unit][name] <= high

    unknown = metrics.summarise(metrics.bootstrap_scores(without_subjects(table)))
    assert unknown["subject"] is None
    assert unknown["scan"]["accuracy"] == scores["scan"]["accuracy"]


def test_scores_of_one_class_leave_undefined_scores_and_intervals_empty():
    table = random_predictions()
    table = table[table.label == "AD"]
    scores = metrics.summarise(metrics.bootstrap_scores(table))["slice"]
    for name in ("specificity", "auroc", "balanced_accuracy", "average_precision"):
        assert scores[name] is None and scores["ci95"][name] is None
    assert scores["accuracy"] == scores["sensitivity"]


def test_the_interval_of_a_single_subject_is_none_or_exact():
    table = random_predictions(5)
    for n_right, expected in ((5, [0.025, 1]), (3, None), (0, [0, 0.975])):
        one = table[table.scan == "0s0"].assign(p_AD=np.where(np.arange(5) < n_right, 0.1, 0.9))
        scores = metrics.summarise(metrics.bootstrap_scores(metrics.with_predictions(one)))
        assert scores["slice"]["groups"] == 1
        assert scores["slice"]["ci95"]["accuracy"] == pytest.approx(expected)


def test_an_interval_is_never_a_point():
    """20 right of 20, and 8 AD of 8 missed."""
    table = random_predictions(20)
    right = metrics.with_predictions(table.assign(p_AD=np.where(table.label == "AD", 0.9, 0.1)))
    ci95 = metrics.summarise(metrics.bootstrap_scores(right))["subject"]["ci95"]
    assert ci95["accuracy"] == pytest.approx([0.8316, 1], abs=1e-4)  # Clopper-Pearson, 20 of 20
    for name in ("sensitivity", "specificity", "auroc", "balanced_accuracy", "f1"):
        assert ci95[name] == pytest.approx([0.6915, 1], abs=1e-4)  # 10 of 10
    missed = metrics.with_predictions(table.assign(p_AD=0.1))
    ci95 = metrics.summarise(metrics.bootstrap_scores(missed))["subject"]["ci95"]
    assert ci95["sensitivity"] == pytest.approx([0, 0.3085], abs=1e-4)
    assert ci95["auroc"] is None  # every subject gets the same


def test_the_exact_interval_of_a_perfect_auroc_holds_the_true_value_in_95_of_100_samples():
    """Of samples from normal classes in which AD and NC are separated without a mistake."""
    rng = np.random.default_rng(0)
    true = 0.97
    shift = np.sqrt(2) * norm.ppf(true)
    covered = []
    for _ in range(20_000):
        ad, nc = rng.normal(shift, 1, 8), rng.normal(0, 1, 6)
        low = 0.0
        if ad.min() > nc.max():
            low, _ = metrics.edge_interval("auroc", 1, {"AD": 8, "NC": 6, "all": 14})
        covered.append(low <= true)
    assert np.mean(covered) >= 0.95


def test_a_scan_gets_the_mean_over_its_slices():
    table = random_predictions()
    own = table[table.scan == "3s0"]
    row = metrics.aggregate(table, "scan").set_index("scan").loc["3s0"]
    assert row.p_AD == pytest.approx(own.p_AD.mean())
    assert row.prediction == ("AD" if own.p_AD.mean() >= 0.5 else "NC")
    assert (row.n_slices, row.label) == (5, "AD")
    assert metrics.aggregate(table, "subject").n_slices.sum() == len(table)


def test_scans_with_different_numbers_of_equal_slices_are_not_ranked():
    """Else the majority class would rank scans by the rounding errors of their means."""
    names = pd.Series([f"s{n}" for n in range(1, 60) for _ in range(n)]).to_numpy()
    table = random_predictions().iloc[[0 for _ in names]].assign(scan=names, subject=names)
    table["label"] = np.where(table.scan.str[1:].astype(int) % 2, "AD", "NC")
    for share in (0.3, 0.52, 1 / 3):
        for unit in ("scan", "subject"):
            units = metrics.aggregate(table.assign(p_AD=share), unit)
            assert units.p_AD.nunique() == 1
            assert sk.roc_auc_score(units.label == "AD", units.p_AD) == 0.5


def test_a_threshold_moves_the_predictions_of_all_units_and_no_probability():
    table = random_predictions()
    strict = metrics.with_predictions(table.assign(threshold=0.8))
    for unit in metrics.UNITS:
        before, after = metrics.aggregate(table, unit), metrics.aggregate(strict, unit)
        assert before.p_AD.equals(after.p_AD)
        assert ((after.prediction == "AD") == (after.p_AD >= 0.8)).all()
    before = metrics.summarise(metrics.bootstrap_scores(table))["scan"]
    after = metrics.summarise(metrics.bootstrap_scores(strict))["scan"]
    assert before["auroc"] == after["auroc"]
    assert before["accuracy"] != after["accuracy"]


@pytest.mark.parametrize(
    "n_out_of_range, prediction_set, expected",
    [(0, pd.NA, "AD"), (0, "AD|NC", "AD|NC"), (4, "AD", "AD"), (5, "AD", "no verdict")],
)
def test_a_scan_with_half_of_its_slices_out_of_range_has_no_verdict(
    n_out_of_range, prediction_set, expected
):
    scan = pd.Series(
        dict(
            n_slices=10,
            n_out_of_range=n_out_of_range,
            prediction="AD",
            prediction_set=prediction_set,
        )
    )
    assert metrics.verdict(scan) == expected


# ---------------------------------------------------------------- comparisons


def test_a_better_model_is_better_and_the_same_model_is_not():
    good = random_predictions(80)
    shuffled = np.random.default_rng(3).permutation(good.p_AD)
    bad = metrics.with_predictions(good.assign(p_AD=shuffled))
    a, b = metrics.bootstrap_scores(good), metrics.bootstrap_scores(bad)
    comparison = metrics.compare(a, b)["scan"]
    for name in ("accuracy", "auroc", "brier"):
        assert metrics.is_better(comparison, name) and comparison[name]["p"] < 0.01

    same = metrics.compare(a, a)["scan"]
    assert not metrics.is_better(same, "accuracy") and same["accuracy"]["p"] is None

    swapped = metrics.compare(b, a)["scan"]
    assert swapped["accuracy"]["difference"] == -comparison["accuracy"]["difference"]
    assert not metrics.is_better(swapped, "accuracy")


def test_the_interval_of_a_difference_is_never_a_point():
    table = random_predictions(20)
    perfect = metrics.with_predictions(table.assign(p_AD=np.where(table.label == "AD", 0.9, 0.1)))
    constant = metrics.with_predictions(table.assign(p_AD=0.5))
    tables = {"random": table, "perfect": perfect, "constant": constant}
    samples = {name: metrics.bootstrap_scores(each) for name, each in tables.items()}
    for one in samples:
        for other in samples:
            comparison = metrics.compare(samples[one], samples[other])
            for unit in ("scan", "subject"):
                for name in metrics.METRICS:
                    part = comparison[unit][name]
                    low, high = part["ci95"]
                    assert low + 0.01 < high and low <= part["difference"] <= high
                    assert one != other or low == -high
    better = metrics.compare(samples["perfect"], samples["constant"])["subject"]
    low, high = better["auroc"]["ci95"]
    assert low == pytest.approx(metrics.exact_interval(1, 10)[0] - 0.5) and high == 0.5
    assert metrics.is_better(better, "auroc")


def test_five_subjects_are_too_few_to_be_better():
    """Five right against five wrong: p is 0.06 in a sign test, but no resample says otherwise."""
    table = random_predictions(5)
    table["p_AD"] = np.where(table.label == "AD", 0.9, 0.1)
    right = metrics.bootstrap_scores(table)
    wrong = metrics.bootstrap_scores(table.assign(p_AD=1 - table.p_AD))
    comparison = metrics.compare(right, wrong)["scan"]
    assert comparison["groups"] == 5 and comparison["accuracy"]["p"] is None
    assert comparison["accuracy"]["ci95"] == pytest.approx([-0.0436, 1], abs=1e-4)
    assert not metrics.is_better(comparison, "accuracy")


def test_equally_good_models_differ_significantly_in_at_most_one_of_ten_samples():
    rng = np.random.default_rng(4)
    y = np.arange(40) % 2 == 1
    hits = 0
    for seed in range(200):
        sides = []
        for _ in range(2):
            p = np.where((rng.random(40) < 0.75) == y, 0.9, 0.1)
            resampled = resampled_scores(y, p, p >= 0.5, Bootstrap(np.arange(40), 400, seed))
            groups = {"AD": 20, "NC": 20, "all": 40}
            sample = metrics.Sample(40, 40, point_scores(y, p, p >= 0.5), resampled, groups)
            sides.append({"slice": sample, "scan": None, "subject": None})
        low, high = metrics.compare(*sides)["slice"]["accuracy"]["ci95"]
        hits += not low <= 0 <= high
    assert hits / 200 <= 0.1


def test_pairing_narrows_the_interval_of_a_difference():
    """Of models that are wrong on the same subjects."""
    table = random_predictions(60)
    other = metrics.with_predictions(table.assign(p_AD=(table.p_AD - 0.03).clip(0, 1)))
    a, b = metrics.bootstrap_scores(table), metrics.bootstrap_scores(other)
    low, high = metrics.compare(a, b)["scan"]["accuracy"]["ci95"]
    alone = metrics.summarise(a)["scan"]["ci95"]["accuracy"]
    assert high - low < (alone[1] - alone[0]) / 2


def test_mean_scores_average_scores_and_resamples():
    tables = [random_predictions(seed=0)]
    tables.append(metrics.with_predictions(tables[0].assign(p_AD=1 - tables[0].p_AD)))
    mean = metrics.mean_scores(tables)["scan"]
    samples = [metrics.bootstrap_scores(table)["scan"] for table in tables]
    for name in metrics.METRICS:
        assert mean.scores[name] == pytest.approx(np.mean([s.scores[name] for s in samples]))
        resampled = (samples[0].resampled[name] + samples[1].resampled[name]) / 2
        np.testing.assert_allclose(mean.resampled[name], resampled)
    assert mean.scores["auroc"] == pytest.approx(0.5)


# ---------------------------------------------------------------- risk and windows


def test_risk_falls_to_zero_if_the_most_certain_predictions_are_right():
    p, y = np.array([0.99, 0.02, 0.6, 0.45]), np.array([True, False, False, True])
    coverage, risk = metrics.risk_coverage(p, (p >= 0.5) == y)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert risk.tolist() == [0, 0, 1 / 3, 1 / 2]


def test_accuracy_by_window_counts_each_scan_once():
    table = random_predictions()
    window = np.where(table.label == "AD", 70, 80)
    windows, unit = metrics.by_window(table.assign(slice=table.slice + window))
    assert unit == "scan" and windows["at"].tolist() == [70, 80]
    assert windows.n.sum() == table.scan.nunique()
    assert windows.share_AD.tolist() == [1, 0]


def test_if_all_scans_have_one_window_accuracy_is_by_slice_number():
    table = random_predictions()
    numbers, unit = metrics.by_window(table)
    assert unit == "slice" and numbers["at"].tolist() == [0, 1, 2, 3, 4]
    assert numbers.n.sum() == len(table)
