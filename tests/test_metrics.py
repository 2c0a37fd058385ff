import time

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn import metrics as sk

from adnc.scoring import metrics


def predictions_of(**columns):
    """A table with the columns that predictions always have, empty where they are not given."""
    table = pd.DataFrame(columns).assign(threshold=0.5, exposure=None, prediction_set=None, out_of_range=None)
    table = table.astype({"subject": "string", "prediction_set": "string"})
    return metrics.with_predictions(table.assign(group=table.subject))


def random_predictions(subjects=30, seed=0, slices=5, digits=2):
    """A table of 5 slices a scan and 1 to 3 scans a subject, right more often than not, alike within a subject."""
    rng = np.random.default_rng(seed)
    scans = rng.integers(1, 4, subjects)
    subject = np.repeat(np.arange(subjects), scans)  # of each scan
    visit = np.concatenate([np.arange(n) for n in scans])
    y, shift = subject % 2, rng.normal(0, 1, subjects)[subject]
    subject, visit, y, shift = (np.repeat(values, slices) for values in (subject, visit, y, shift))
    logit = (2 * y - 1) * 0.8 + shift + rng.normal(0, 0.5, len(y))
    return predictions_of(
        scan=[f"{s}s{n}" for s, n in zip(subject, visit)], slice=np.tile(np.arange(slices), scans.sum()),
        subject=[f"p{s}" for s in subject], label=np.where(y == 1, "AD", "NC"), logit=logit,
        p_AD=expit(logit).round(digits))  # fmt: skip


def arrays(table):
    return metrics.arrays(table, "slice")[:3]


# ---------------------------------------------------------------- metrics and their intervals


@pytest.mark.parametrize("label", ["AD", "NC"])
def test_a_score_that_needs_two_classes_is_not_defined_with_one(label):
    p = np.linspace(0.1, 0.9, 12)
    y = np.full(12, label == "AD")
    scores = metrics.point_scores(y, p, p >= 0.5)
    undefined = {name for name, value in scores.items() if value is None}
    assert undefined == {"balanced_accuracy", "f1", "auroc", "average_precision",
                         "specificity" if label == "AD" else "sensitivity"}
    drawn = metrics.resampled_scores(y, p, p >= 0.5, metrics.Bootstrap(np.arange(12).astype(str), 50))
    assert {name for name, values in drawn.items() if np.isnan(values).all()} == undefined


def test_point_scores_are_what_their_names_say():
    y, p, predicted = arrays(random_predictions())
    scores = metrics.point_scores(y, p, predicted)
    assert set(scores) == set(metrics.METRICS)
    tn, fp, fn, tp = sk.confusion_matrix(y, p >= 0.5).ravel()
    assert scores["sensitivity"] == tp / (tp + fn) and scores["specificity"] == tn / (tn + fp)
    assert scores["accuracy"] == (tp + tn) / len(y) and scores["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert scores["balanced_accuracy"] == pytest.approx((scores["sensitivity"] + scores["specificity"]) / 2)
    pairs = p[y][:, None] - p[~y]
    assert scores["auroc"] == pytest.approx(np.mean((pairs > 0) + 0.5 * (pairs == 0)))
    cuts = np.unique(p)[::-1]
    recall = np.array([0, *((p[y] >= cut).mean() for cut in cuts)])
    precision = [y[p >= cut].mean() for cut in cuts]
    assert scores["average_precision"] == pytest.approx((np.diff(recall) * precision).sum())
    assert scores["brier"] == pytest.approx(((p - y) ** 2).mean())


def test_the_calibration_error_is_zero_for_honest_probabilities_and_the_gap_for_others():
    p = np.repeat([0.25, 0.75], 400)
    y = np.tile([True, False, False, False], 100)
    honest = np.concatenate([y, ~y])
    assert metrics.point_scores(honest, p, p >= 0.5)["calibration_error"] == pytest.approx(0)
    sure = metrics.point_scores(honest, np.where(p > 0.5, 0.95, 0.05), p >= 0.5)
    assert sure["calibration_error"] == pytest.approx(0.2)


def test_bootstrap_equals_drawing_the_subjects_one_by_one():
    table = random_predictions()
    y, p, predicted = arrays(table)
    drawn = metrics.resampled_scores(y, p, predicted, metrics.Bootstrap(table.subject, 200, 5))

    names = sorted(table.subject.unique())
    counts = np.random.default_rng(5).multinomial(30, np.full(30, 1 / 30), 200)
    for i, row in enumerate(counts):
        pick = np.concatenate([np.flatnonzero(table.subject == s).repeat(c) for s, c in zip(names, row)]).astype(int)
        expected = metrics.point_scores(y[pick], p[pick], predicted[pick])
        for name in metrics.METRICS:
            assert drawn[name][i] == pytest.approx(expected[name], abs=1e-12), name


def test_intervals_hold_their_promise():
    """Of 200 samples of 40 subjects, about 95 % of the intervals hold the figure of the population."""
    rng, hits = np.random.default_rng(0), 0
    for seed in range(200):
        right = rng.random(40) < 0.7  # a subject is right or wrong with all of its 10 slices
        y = np.repeat(np.arange(40) % 2 == 1, 10)
        p = np.where(np.repeat(right, 10) == y, 0.9, 0.1)
        drawn = metrics.resampled_scores(y, p, p >= 0.5, metrics.Bootstrap(np.repeat(np.arange(40), 10), 400, seed))
        low, high = metrics.interval(drawn["accuracy"])
        hits += low <= 0.7 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_intervals_over_subjects_are_wider_than_over_slices():
    table = random_predictions()
    by_subject, by_slice = (metrics.resampled_scores(*arrays(table), metrics.Bootstrap(group))["accuracy"].std()
                            for group in (table.subject, np.arange(len(table))))
    assert by_subject > 1.5 * by_slice


def test_two_thousand_resamples_of_nine_thousand_slices_take_less_than_two_seconds():
    table = random_predictions(225, slices=20, digits=9)
    assert len(table) > 8500
    times = []
    for _ in range(3):  # the best of three: another process may take the core
        start = time.process_time()
        metrics.summarise(metrics.bootstrap_scores(table))
        times.append(time.process_time() - start)
    assert min(times) < 2


def test_score_gives_each_unit_its_own_n_and_survives_unknown_subjects():
    table = random_predictions()
    scores = metrics.summarise(metrics.bootstrap_scores(table))
    assert scores["slice"]["n"] == len(table) and scores["scan"]["n"] == table.scan.nunique()
    assert scores["subject"]["n"] == 30
    for unit in metrics.UNITS:
        for name, (low, high) in scores[unit]["ci95"].items():
            # Which resampling raises.
            assert low <= scores[unit][name] <= high or name == "calibration_error"
    unknown = metrics.summarise(metrics.bootstrap_scores(table.assign(subject=pd.array([None] * len(table), "string"))))
    assert unknown["subject"] is None and unknown["scan"]["accuracy"] == scores["scan"]["accuracy"]


def test_score_of_one_class_leaves_undefined_scores_empty():
    table = random_predictions()
    scores = metrics.summarise(metrics.bootstrap_scores(table[table.label == "AD"]))["slice"]
    assert scores["specificity"] is scores["auroc"] is scores["balanced_accuracy"] is None
    assert scores["average_precision"] is scores["ci95"]["average_precision"] is None
    assert scores["ci95"]["auroc"] is None and scores["accuracy"] == scores["sensitivity"]


def test_a_scan_and_a_subject_get_the_mean_over_their_slices():
    table = random_predictions()
    scans, subjects = metrics.aggregate(table, "scan"), metrics.aggregate(table, "subject")
    one = table[table.scan == "3s0"]
    row = scans.set_index("scan").loc["3s0"]
    assert row.p_AD == pytest.approx(one.p_AD.mean()) and row.n_slices == 5 and row.label == "AD"
    assert row.prediction == ("AD" if one.p_AD.mean() >= 0.5 else "NC")
    assert subjects.n_slices.sum() == len(table)


def test_scans_of_other_numbers_of_equal_slices_have_equal_scores():
    """Or the majority class would rank scans by the rounding of their means: of 0.3, seven and eight times, too."""
    table = random_predictions()
    names = pd.Series([f"s{n}" for n in range(1, 60) for _ in range(n)])
    table = table.iloc[[0] * len(names)].assign(scan=names.to_numpy(), subject=names.to_numpy())
    table["label"] = np.where(table.scan.str[1:].astype(int) % 2, "AD", "NC")
    for share in (0.3, 0.52, 1 / 3):
        for unit in ("scan", "subject"):
            units = metrics.aggregate(table.assign(p_AD=share), unit)
            assert units.p_AD.nunique() == 1 and sk.roc_auc_score(units.label == "AD", units.p_AD) == 0.5


def test_a_threshold_moves_the_predictions_of_all_units_and_no_probability():
    table = random_predictions()
    strict = metrics.with_predictions(table.assign(threshold=0.8))
    for unit in metrics.UNITS:
        a, b = metrics.aggregate(table, unit), metrics.aggregate(strict, unit)
        assert a.p_AD.equals(b.p_AD) and ((b.prediction == "AD") == (b.p_AD >= 0.8)).all()
    a, b = (metrics.summarise(metrics.bootstrap_scores(x))["scan"] for x in (table, strict))
    assert a["auroc"] == b["auroc"] and a["accuracy"] != b["accuracy"]


def test_the_roc_band_holds_the_curve():
    y, p, _, group = metrics.arrays(random_predictions(), "scan")
    grid = np.linspace(0, 1, 21)
    low, high = metrics.roc_band(y, p, group, grid)
    false_positive, sensitivity, _ = sk.roc_curve(y, p)
    curve = np.interp(grid, false_positive, sensitivity)
    assert (low <= high).all() and ((low <= curve + 1e-9) & (curve <= high + 1e-9))[1:-1].mean() > 0.9


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_scaling_finds_the_temperature(temperature):
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, 20_000)
    y = rng.random(20_000) < expit(z)
    found = metrics.fit_temperature(z * temperature, y, np.arange(20_000))
    assert found == pytest.approx(temperature, rel=0.05)


def test_a_model_that_is_right_on_two_subjects_is_not_made_infinitely_sure():
    y = np.repeat([True, False], 20)
    z = np.where(y, 4.0, -4.0)
    few, many = (metrics.fit_temperature(z, y, group) for group in (y.astype(int), np.arange(40)))
    assert 0.05 < many < few and 0.8 < few < 1  # all right: the more subjects say so, the surer
    wrong = metrics.fit_temperature(z, ~y, y.astype(int))
    assert 2 < wrong < 20


def test_calibration_lowers_the_error_of_overconfident_outputs_and_keeps_their_order():
    table = random_predictions(200)
    sure = table.assign(logit=table.logit * 4, p_AD=expit(table.logit * 4))
    t = metrics.calibrate(sure)["temperature"]
    calibrated = sure.assign(p_AD=expit(sure.logit / t))
    a, b = (metrics.point_scores(*arrays(x)) for x in (sure, calibrated))
    assert t > 2 and b["calibration_error"] < a["calibration_error"] / 2 and b["brier"] < a["brier"]
    assert a["auroc"] == b["auroc"] and a["accuracy"] == b["accuracy"]


def test_youden_is_the_best_threshold_and_half_where_it_is_as_good():
    y, p, *_ = metrics.arrays(random_predictions(), "scan")
    cut = metrics.youden(y, p)
    false_positive, sensitivity, _ = sk.roc_curve(y, p)
    assert (p[y] >= cut).mean() - (p[~y] >= cut).mean() == pytest.approx((sensitivity - false_positive).max())
    assert metrics.youden(np.array([False, True]), np.array([0.1, 0.9])) == 0.5
    assert 0.1 < metrics.youden(np.array([False, True]), np.array([0.1, 0.3])) < 0.3


# ---------------------------------------------------------------- prediction sets


def draw_scans(rng, n):
    """Scans of n subjects, 1 to 8 each, who differ in how hard they are: the more scans, the easier. Returns arrays
    with an entry a scan: the subject, the number of the scan, whether AD, the logit."""
    scans = rng.integers(1, 9, n)
    y, ease = rng.random(n) < 0.5, rng.normal(0.3 * scans - 0.6, 1)
    subject, visit = np.repeat(np.arange(n), scans), np.concatenate([np.arange(k) for k in scans])
    return subject, visit, y[subject], ((2 * y - 1) * ease)[subject] + rng.normal(0, 0.5, len(subject))


def subjects_with_scans(rng, n):
    return scans_as_table(*draw_scans(rng, n))


def scans_as_table(subject, visit, y, logit):
    return predictions_of(
        scan=[f"{s}s{k}" for s, k in zip(subject, visit)], slice=0, subject=[f"p{s}" for s in subject],
        label=np.where(y, "AD", "NC"), logit=logit, p_AD=expit(logit))  # fmt: skip


@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_prediction_sets_keep_their_promise_over_many_random_splits(coverage):
    """Calibrated on 29 subjects, a scan of a new subject is covered as often as promised, and not much more often."""
    rng, rates, uncertain = np.random.default_rng(1), [], []
    for _ in range(400):
        # the temperature is fitted on other subjects: what is tested is the promise for a given model
        calibration = metrics.calibrate(subjects_with_scans(rng, 29))
        new = subjects_with_scans(rng, 20)
        p = expit(new.logit / calibration["temperature"]).to_numpy()
        predicted = np.where(p >= 0.5, "AD", "NC")
        sets = metrics.prediction_sets(p, predicted, metrics.conformal_quantile(calibration, coverage))
        held = pd.Series([label in one.split("|") for label, one in zip(new.label, sets)])
        rates.append(held.groupby(new.subject).mean().mean())  # of a scan drawn from a subject
        uncertain.append((sets == "AD|NC").mean())
    error = np.std(rates) / np.sqrt(len(rates))
    assert coverage - 2 * error <= np.mean(rates) <= coverage + 1 / 30 + 2 * error
    assert 0 < np.mean(uncertain) < 1


def test_weighing_scans_instead_of_subjects_would_break_the_promise():
    """Why the hierarchy: where subjects with many scans are easy, a quantile over scans is too small for the others."""
    rng, rates = np.random.default_rng(2), {"scans": [], "subjects": []}
    for _ in range(100):
        calibration, new = metrics.calibrate(subjects_with_scans(rng, 40)), subjects_with_scans(rng, 40)
        y, p, *_ = metrics.arrays(new.assign(p_AD=expit(new.logit / calibration["temperature"])), "scan")
        n = len(calibration["scores"])
        quantiles = {"subjects": metrics.conformal_quantile(calibration, 0.8),
                     "scans": calibration["scores"][int(np.ceil(0.8 * (n + 1))) - 1]}  # fmt: skip
        for name, quantile in quantiles.items():
            held = pd.Series(np.where(y, 1 - p, p) <= quantile)
            rates[name].append(held.groupby(new.groupby("scan").subject.first().to_numpy()).mean().mean())
    assert np.mean(rates["scans"]) < 0.78 < 0.79 < np.mean(rates["subjects"])


def test_choosing_the_epoch_on_the_same_subjects_can_cost_coverage():
    """The reservation, at its worst: of 20 models that are equally good and independent (epochs of a run are neither),
    the one is kept that is best on the 29 subjects that the sets are then calibrated on."""
    rng, rates = np.random.default_rng(5), []
    for _ in range(150):
        best = max((draw_scans(rng, 29) for _ in range(20)), key=lambda val: ((val[3] >= 0) == val[2]).mean())
        calibration, new = metrics.calibrate(scans_as_table(*best)), subjects_with_scans(rng, 20)
        p = expit(new.logit / calibration["temperature"]).to_numpy()
        sets = metrics.prediction_sets(p, np.where(p >= 0.5, "AD", "NC"), metrics.conformal_quantile(calibration, 0.9))
        held = pd.Series([label in one.split("|") for label, one in zip(new.label, sets)])
        rates.append(held.groupby(new.subject).mean().mean())
    assert 0.8 < np.mean(rates) < 0.9 - 2 * np.std(rates) / np.sqrt(len(rates))


def test_few_validation_subjects_cannot_promise_much_and_leave_every_scan_open():
    calibration = metrics.calibrate(random_predictions(8))
    assert metrics.conformal_quantile(calibration, 0.9) == np.inf
    assert np.isfinite(metrics.conformal_quantile(calibration, 8 / 9))
    assert metrics.prediction_sets(np.array([0.0, 1.0]), np.array(["NC", "AD"]), np.inf).tolist() == ["AD|NC"] * 2
    with pytest.raises(ValueError, match="coverage is 1.5; expected"):
        metrics.conformal_quantile(calibration, 1.5)


def test_no_prediction_set_is_empty_or_without_the_prediction():
    p = np.linspace(0, 1, 11)
    predicted = np.where(p >= 0.7, "AD", "NC")  # as a threshold of 0.7 has it
    for quantile in (0.0, 0.2, 0.6, np.inf):
        sets = metrics.prediction_sets(p, predicted, quantile)
        assert all(one in found.split("|") for one, found in zip(predicted, sets))


def test_more_coverage_means_larger_sets():
    calibration, p = metrics.calibrate(random_predictions(60)), np.linspace(0, 1, 101)
    predicted = np.where(p >= 0.5, "AD", "NC")
    open_ = [(metrics.prediction_sets(p, predicted, metrics.conformal_quantile(calibration, c)) == "AD|NC").sum()
             for c in (0.7, 0.8, 0.9, 0.95)]
    assert open_ == sorted(open_) and open_[0] < open_[-1]


def test_sets_are_scored_scan_level():
    table = random_predictions()
    table["prediction_set"] = table.scan.map(lambda scan: "AD|NC" if scan.endswith("s0") else "AD")
    scores = metrics.score_sets(table, 0.9)
    scans = table.drop_duplicates("scan")
    first = scans.scan.str.endswith("s0")
    assert scores["n"] == len(scans) and scores["uncertain"] == pytest.approx(first.mean())
    assert scores["accuracy_if_certain"] == pytest.approx((scans.label[~first] == "AD").mean())
    assert scores["covered"] == pytest.approx((first | (scans.label == "AD")).mean())


# ---------------------------------------------------------------- comparisons


def test_a_better_model_is_found_better_and_the_same_model_is_not():
    good, seed = random_predictions(80), np.random.default_rng(3)
    bad = metrics.with_predictions(good.assign(p_AD=seed.permutation(good.p_AD)))
    a, b = metrics.bootstrap_scores(good), metrics.bootstrap_scores(bad)
    found = metrics.compare(a, b)["scan"]
    for name in ("accuracy", "auroc", "brier"):
        assert metrics.is_better(found, name) and found[name]["p"] < 0.01
    same = metrics.compare(a, a)["scan"]
    assert not metrics.is_better(same, "accuracy") and same["accuracy"]["p"] == 1
    turned = metrics.compare(b, a)["scan"]
    assert turned["accuracy"]["difference"] == -found["accuracy"]["difference"]
    assert not metrics.is_better(turned, "accuracy")


def test_a_handful_of_subjects_is_no_proof():
    """Five right against five wrong: a sign test has p = 0.06, though no resample of five says otherwise."""
    table = random_predictions(5).assign(p_AD=lambda t: np.where(t.label == "AD", 0.9, 0.1))
    right, wrong = (metrics.bootstrap_scores(t) for t in (table, table.assign(p_AD=1 - table.p_AD)))
    found = metrics.compare(right, wrong)["scan"]
    assert found["groups"] == 5 and found["accuracy"]["ci95"] == [1, 1]
    assert not metrics.is_better(found, "accuracy")
    one = metrics.summarise(metrics.bootstrap_scores(metrics.with_predictions(table[table.subject == "p0"])))
    assert one["scan"]["accuracy"] == 1 and one["scan"]["ci95"]["accuracy"] is None


def test_noise_is_called_better_no_more_often_than_promised():
    """Two models that are equally good: of 200 pairs, at most one in ten or so differs by its 95 % interval."""
    rng, hits = np.random.default_rng(4), 0
    for seed in range(200):
        y = np.arange(40) % 2 == 1
        sides = []
        for _ in range(2):
            p = np.where((rng.random(40) < 0.75) == y, 0.9, 0.1)
            resampled = metrics.resampled_scores(y, p, p >= 0.5, metrics.Bootstrap(np.arange(40), 400, seed))
            sample = metrics.Sample(40, 40, metrics.point_scores(y, p, p >= 0.5), resampled)
            sides.append({"slice": sample, "scan": None, "subject": None})
        low, high = metrics.compare(*sides)["slice"]["accuracy"]["ci95"]
        hits += not low <= 0 <= high
    assert hits / 200 <= 0.1


def test_pairing_makes_the_interval_of_a_difference_narrow():
    """Models that are wrong on the same subjects: their difference is known better than either accuracy."""
    table = random_predictions(60)
    other = metrics.with_predictions(table.assign(p_AD=(table.p_AD - 0.03).clip(0, 1)))
    a = metrics.bootstrap_scores(table)
    low, high = metrics.compare(a, metrics.bootstrap_scores(other))["scan"]["accuracy"]["ci95"]
    alone = metrics.summarise(a)["scan"]["ci95"]["accuracy"]
    assert high - low < (alone[1] - alone[0]) / 2


# ---------------------------------------------------------------- what else


def test_the_three_ways_to_a_scan_are_what_their_names_say():
    table = random_predictions()
    ways = metrics.aggregations(table.assign(threshold=0.9))
    y = table.groupby("scan").label.first().eq("AD").to_numpy()
    vote = table.assign(v=table.p_AD >= 0.5).groupby("scan").v.mean().to_numpy()
    mean = table.groupby("scan").p_AD.mean().to_numpy()
    z = np.log(table.p_AD.clip(1e-7, 1 - 1e-7) / (1 - table.p_AD.clip(1e-7, 1 - 1e-7)))
    logit = z.groupby(table.scan).mean().to_numpy()
    assert ways["mean probability"]["brier"] == pytest.approx(((mean - y) ** 2).mean())
    assert ways["mean logit"]["brier"] == pytest.approx(((expit(logit) - y) ** 2).mean())
    assert ways["vote"]["accuracy"] == pytest.approx(((vote >= 0.5) == y).mean())


def test_risk_falls_to_zero_where_the_sure_are_right():
    p, y = np.array([0.99, 0.02, 0.6, 0.45]), np.array([True, False, False, True])
    coverage, risk = metrics.risk_coverage(p, (p >= 0.5) == y)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1] and risk.tolist() == [0, 0, 1 / 3, 1 / 2]


def test_accuracy_by_window_counts_each_scan_once():
    table = random_predictions()
    moved = table.assign(slice=table.slice + np.where(table.label == "AD", 70, 80))
    found, unit = metrics.by_window(moved)
    assert unit == "scan" and found["at"].tolist() == [70, 80] and found.n.sum() == table.scan.nunique()
    assert found.share_AD.tolist() == [1, 0]
    found, unit = metrics.by_window(table)
    assert unit == "slice" and found["at"].tolist() == [0, 1, 2, 3, 4] and found.n.sum() == len(table)
