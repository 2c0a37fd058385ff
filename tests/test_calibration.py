"""Temperature, threshold, and the coverage of prediction sets."""

import numpy as np
import pandas as pd
import pytest
from fake_predictions import make_predictions, random_predictions, slice_arrays
from scipy.special import expit
from sklearn.metrics import roc_auc_score, roc_curve

from adnc.scoring import metrics
from adnc.scoring.calibration import (
    apply_calibration,
    calibrate,
    conformal_quantile,
    fit_across,
    fit_temperature,
    max_coverage,
    prediction_sets,
    score_sets,
    youden,
)

# ---------------------------------------------------------------- network and dark share together


def folds_with_dark_share(n_folds=4, subjects=60):
    """Folds of random predictions with another number that knows something of the label, too."""
    table = random_predictions(subjects, slices=2)
    rng = np.random.default_rng(1)
    of_subject = dict(zip(table.subject.unique(), rng.normal(0, 1, subjects)))
    table["dark_share"] = expit(
        np.where(table.label == "AD", 0.7, -0.7) + table.subject.map(of_subject)
    )
    fold = table.subject.str[1:].astype(int) // 2 % n_folds  # both classes in each
    return [table[fold == k] for k in range(n_folds)]


def test_folds_are_weighted_without_their_own_labels():
    folds = folds_with_dark_share()
    before = fit_across(folds)
    swapped = folds[0].assign(label=np.where(folds[0].label == "AD", "NC", "AD"))
    after = fit_across([swapped, *folds[1:]])
    assert np.array_equal(before[0], after[0])
    assert not np.array_equal(before[1], after[1])


def test_two_numbers_that_know_different_things_rank_better_together():
    folds = folds_with_dark_share()
    table = pd.concat(folds).assign(both=np.concatenate(fit_across(folds)))
    subjects = table.groupby("subject").agg(
        ad=("label", lambda label: label.iloc[0] == "AD"),
        network=("p_AD", "mean"),
        share=("dark_share", "mean"),
        both=("both", "mean"),
    )
    auroc = {name: roc_auc_score(subjects.ad, subjects[name]) for name in subjects.columns[1:]}
    assert auroc["both"] > max(auroc["network"], auroc["share"])


# ---------------------------------------------------------------- temperature and threshold


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_scaling_recovers_the_temperature(temperature):
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, 20_000)
    y = rng.random(20_000) < expit(z)
    fitted = fit_temperature(z * temperature, y, np.arange(20_000))
    assert fitted == pytest.approx(temperature, rel=0.05)


def test_a_model_that_is_right_on_two_subjects_does_not_become_infinitely_certain():
    y = np.repeat([True, False], 20)
    z = np.where(y, 4.0, -4.0)
    two_subjects = y.astype(int)
    few = fit_temperature(z, y, two_subjects)
    many = fit_temperature(z, y, np.arange(40))
    assert 0.8 < few < 1
    assert 0.05 < many < few  # more subjects are more evidence
    assert 2 < fit_temperature(z, ~y, two_subjects) < 20


def test_calibration_lowers_the_error_of_overconfident_outputs_and_keeps_their_order():
    table = random_predictions(200)
    overconfident = table.assign(logit=table.logit * 4, p_AD=expit(table.logit * 4))
    temperature = calibrate(overconfident)["temperature"]
    calibrated = overconfident.assign(p_AD=expit(overconfident.logit / temperature))
    before = metrics.point_scores(*slice_arrays(overconfident))
    after = metrics.point_scores(*slice_arrays(calibrated))
    assert temperature > 2
    assert after["calibration_error"] < before["calibration_error"] / 2
    assert after["brier"] < before["brier"]
    assert after["auroc"] == before["auroc"] and after["accuracy"] == before["accuracy"]


def test_youden_is_the_best_threshold():
    y, p, *_ = metrics.arrays(random_predictions(), "scan")
    cut = youden(y, p)
    false_positive_rate, sensitivity, _ = roc_curve(y, p)
    best = (sensitivity - false_positive_rate).max()
    assert (p[y] >= cut).mean() - (p[~y] >= cut).mean() == pytest.approx(best)


def test_youden_is_one_half_if_that_is_as_good():
    labels = np.array([False, True])
    assert youden(labels, np.array([0.1, 0.9])) == 0.5
    assert 0.1 < youden(labels, np.array([0.1, 0.3])) < 0.3


# ---------------------------------------------------------------- coverage


def draw_scans(rng, n):
    """Arrays (subject, visit, is AD, logit) of the scans of n subjects, 1 to 8 each. Subjects with
    many scans are easier."""
    n_scans = rng.integers(1, 9, n)
    y = rng.random(n) < 0.5
    ease = rng.normal(0.3 * n_scans - 0.6, 1)
    subject = np.repeat(np.arange(n), n_scans)
    visit = np.concatenate([np.arange(k) for k in n_scans])
    logit = ((2 * y - 1) * ease)[subject] + rng.normal(0, 0.5, len(subject))
    return subject, visit, y[subject], logit


def as_table(subject, visit, y, logit):
    return make_predictions(
        scan=[f"{s}s{k}" for s, k in zip(subject, visit)],
        slice=0,
        subject=[f"p{s}" for s in subject],
        label=np.where(y, "AD", "NC"),
        logit=logit,
        p_AD=expit(logit),
    )


def coverage_of(calibration, new, coverage):
    """(how often the set of a scan drawn from a new subject contains its label, the sets)"""
    p = expit(new.logit / calibration["temperature"]).to_numpy()
    predicted = np.where(p >= 0.5, "AD", "NC")
    sets = prediction_sets(p, predicted, conformal_quantile(calibration, coverage))
    covered = pd.Series([label in one.split("|") for label, one in zip(new.label, sets)])
    return covered.groupby(new.subject).mean().mean(), sets


@pytest.mark.parametrize("coverage", [0.8, 0.9])
def test_prediction_sets_reach_their_coverage_over_many_random_splits(coverage, repeats):
    """Calibrated on 29 subjects, new ones are covered as often as asked for, and little more."""
    rng, rates, uncertain = np.random.default_rng(1), [], []
    for _ in range(repeats(80, 400)):
        calibration = calibrate(as_table(*draw_scans(rng, 29)))
        rate, sets = coverage_of(calibration, as_table(*draw_scans(rng, 20)), coverage)
        rates.append(rate)
        uncertain.append((sets == "AD|NC").mean())
    error = np.std(rates) / np.sqrt(len(rates))
    assert coverage - 2 * error <= np.mean(rates) <= coverage + 1 / 30 + 2 * error
    assert 0 < np.mean(uncertain) < 1


def test_weighting_scans_instead_of_subjects_would_lose_coverage(repeats):
    """The reason for the hierarchy: subjects with many scans are easy here, so a quantile over
    scans is too small for the others."""
    rng = np.random.default_rng(2)
    rates = {"scans": [], "subjects": []}
    for _ in range(repeats(60, 300)):
        calibration = calibrate(as_table(*draw_scans(rng, 40)))
        new = as_table(*draw_scans(rng, 40))
        p_ad = expit(new.logit / calibration["temperature"])
        y, p, _, subject = metrics.arrays(new.assign(p_AD=p_ad), "scan")
        n = len(calibration["scores"])
        quantiles = {
            "subjects": conformal_quantile(calibration, 0.8),
            "scans": calibration["scores"][int(np.ceil(0.8 * (n + 1))) - 1],
        }
        for name, quantile in quantiles.items():
            covered = pd.Series(np.where(y, 1 - p, p) <= quantile)
            rates[name].append(covered.groupby(subject).mean().mean())
    assert np.mean(rates["scans"]) < 0.78 < 0.79 < np.mean(rates["subjects"])


def test_choosing_the_epoch_on_the_calibration_subjects_can_cost_coverage(repeats):
    """The worst case: the best of 20 equally good and independent models, which epochs are not, is
    chosen on the 29 subjects that calibrate the sets."""

    def accuracy(scans):
        _, _, y, logit = scans
        return ((logit >= 0) == y).mean()

    rng, rates = np.random.default_rng(5), []
    for _ in range(repeats(90, 400)):
        best = max((draw_scans(rng, 29) for _ in range(20)), key=accuracy)
        new = as_table(*draw_scans(rng, 20))
        rates.append(coverage_of(calibrate(as_table(*best)), new, 0.9)[0])
    assert 0.8 < np.mean(rates) < 0.9 - 2 * np.std(rates) / np.sqrt(len(rates))


def test_few_validation_subjects_allow_little_coverage_and_leave_every_scan_uncertain():
    calibration = calibrate(random_predictions(8))
    assert conformal_quantile(calibration, 0.9) == np.inf
    assert max_coverage(calibration, 0.9) == pytest.approx(8 / 9)

    assert np.isfinite(conformal_quantile(calibration, 8 / 9))
    assert max_coverage(calibration, 8 / 9) is None

    sets = prediction_sets(np.array([0.0, 1.0]), np.array(["NC", "AD"]), np.inf)
    assert sets.tolist() == ["AD|NC", "AD|NC"]
    with pytest.raises(ValueError, match="coverage is 1.5; expected"):
        conformal_quantile(calibration, 1.5)


# ---------------------------------------------------------------- sets


def test_every_prediction_set_contains_the_prediction():
    p = np.linspace(0, 1, 11)
    predicted = np.where(p >= 0.7, "AD", "NC")  # at a threshold of 0.7
    for quantile in (0.0, 0.2, 0.6, np.inf):
        sets = prediction_sets(p, predicted, quantile)
        assert all(label in one.split("|") for label, one in zip(predicted, sets))


def test_more_coverage_means_larger_sets():
    calibration = calibrate(random_predictions(60))
    p = np.linspace(0, 1, 101)
    predicted = np.where(p >= 0.5, "AD", "NC")
    uncertain = []
    for coverage in (0.7, 0.8, 0.9, 0.95):
        sets = prediction_sets(p, predicted, conformal_quantile(calibration, coverage))
        uncertain.append((sets == "AD|NC").sum())
    assert uncertain == sorted(uncertain) and uncertain[0] < uncertain[-1]


def test_scans_out_of_range_do_not_count_as_covered():
    table = random_predictions()
    strange = table.scan.str.endswith("s0")
    table["out_of_range"] = np.where(strange, "too dark", None)
    table["prediction_set"] = np.where(strange, "AD|NC", "NC")
    scores, scans = score_sets(table, 0.9), table[~strange].drop_duplicates("scan")
    assert scores["n_out_of_range"] == table.scan[strange].nunique()
    assert scores["n"] == len(scans) and scores["uncertain"] == 0
    assert scores["covered"] == pytest.approx((scans.label == "NC").mean())
    low, high = scores["ci95"]["uncertain"]
    assert low == 0 < high < 0.3  # exact, not a point
    nothing = score_sets(table.assign(out_of_range="too dark"), 0.9)
    assert nothing["n"] == 0 and nothing["covered"] is None and nothing["ci95"]["covered"] is None


def test_sets_are_scored_at_scan_level():
    table = random_predictions()
    uncertain = table.scan.str.endswith("s0")
    table["prediction_set"] = np.where(uncertain, "AD|NC", "AD")
    scores = score_sets(table, 0.9)
    scans = table.drop_duplicates("scan")
    uncertain, is_ad = scans.prediction_set == "AD|NC", scans.label == "AD"
    assert scores["n"] == len(scans)
    assert scores["uncertain"] == pytest.approx(uncertain.mean())
    assert scores["accuracy_if_certain"] == pytest.approx(is_ad[~uncertain].mean())
    assert scores["covered"] == pytest.approx((uncertain | is_ad).mean())
    for name in ("uncertain", "covered", "accuracy_if_certain"):
        low, high = scores["ci95"][name]
        assert low < scores[name] < high


# ---------------------------------------------------------------- predictions


def test_without_a_calibration_p_ad_is_the_softmax_and_the_threshold_one_half():
    table = random_predictions()
    calibrated = apply_calibration(table, None)
    np.testing.assert_allclose(calibrated.p_AD, expit(table.logit), atol=1e-7)
    assert (calibrated.threshold == 0.5).all() and calibrated.prediction_set.isna().all()


def test_temperature_and_threshold_of_the_calibration_apply_to_every_slice():
    table = random_predictions()
    calibrated = apply_calibration(table, {"temperature": 2.0, "threshold": 0.6})
    np.testing.assert_allclose(calibrated.p_AD, expit(table.logit / 2), atol=1e-7)
    assert ((calibrated.prediction == "AD") == (calibrated.p_AD >= 0.6)).all()


def test_a_scan_has_one_set_and_is_uncertain_if_a_slice_is_out_of_range():
    val, table = random_predictions(60), random_predictions(seed=1)
    strange = table.scan.eq("0s0") & table.slice.eq(2)
    table["out_of_range"] = np.where(strange, "too dark", None)
    calibrated = apply_calibration(table, calibrate(val), coverage=0.8)
    assert (calibrated.groupby("scan").prediction_set.nunique() == 1).all()
    assert (calibrated.prediction_set[calibrated.scan == "0s0"] == "AD|NC").all()
    assert (calibrated.prediction_set != "AD|NC").any()


def test_slices_that_could_not_be_read_stay_without_prediction():
    table = random_predictions().astype({"logit": float})
    table.loc[table.scan == "1s0", ["logit", "p_AD"]] = np.nan
    calibrated = apply_calibration(table, calibrate(random_predictions(60)), coverage=0.8)
    unread = calibrated[calibrated.scan == "1s0"]
    assert unread.prediction.isna().all() and unread.prediction_set.isna().all()
