"""Ensembles: several trained models that predict together, as one checkpoint.

The logit of an ensemble is the mean over its members of z_AD - z_NC, each at its temperature.
(Lakshminarayanan et al. 2017, arXiv 1612.01474, average probabilities instead.) A subject that some
members saw in training is predicted by the others.

The calibration depends on how the members were trained (`find_folds`): seeds of one split are
calibrated on their common validation, folds of a cross-validation out of fold. A fold may have
several members, its seeds.
"""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import expit

from adnc.data.subjects import merge_exposure
from adnc.errors import InputError, count
from adnc.scoring.assess import COVERAGE, UNCALIBRATED, score, statements
from adnc.scoring.calibration import apply_calibration, calibrate, fit_with_dark_share
from adnc.scoring.metrics import BASELINES

SEEDS, FOLDS = "seeds", "folds"

# What a member keeps of its checkpoint, beside its weights.
OWN = (
    "model", "image_size", "mean", "std", "epoch", "flags", "exposure", "slice_stats",
)  # fmt: skip
# What members must have in common, and the ensemble takes over: key -> what it is called.
COMMON = {
    "classes": "classes",
    "slice_size": "size of the training slices",
    "bits": "bits of 16-bit files",
    "extraction": "way in which volumes were cut",
    "mean": "mean of normalised slices",
    "std": "standard deviation of normalised slices",
}

# Flags that say nothing about how models differ.
FREE_FLAGS = {"out", "resume", "device", "tensorboard", "no_cache"}
# Flags that --split replaces: of two runs one may have them, and the other its split.csv.
SPLIT_FLAGS = {
    "split", "fold", "folds", "pool_test", "subjects", "drop_test_subjects", "split_by",
    "val_fraction",
}  # fmt: skip

# ---------------------------------------------------------------- members -> one checkpoint


def make_ensemble(members, tables=None):
    """A checkpoint, without its format, of {name: checkpoint of a finished run} that fit together
    (`require_fit`).

    `tables` are the predictions {name: {"val": table, "test": table}} of the runs, for the
    calibration; None leaves the ensemble uncalibrated. InputError if nothing calibrates the members
    together.
    """
    ensemble = merge_members(members)
    if tables is None:
        return {**ensemble, "design": UNCALIBRATED}

    folds = find_folds(members, tables)
    for member, fold in zip(ensemble["members"], folds):
        member["fold"] = fold
    ensemble["design"] = FOLDS if max(folds) > 0 else SEEDS
    rules = sorted({each["calibration"]["threshold_rule"] for each in members.values()})
    if len(rules) > 1:
        raise InputError(
            f"the members differ in --threshold, {' and '.join(rules)}; expected one for all"
        )
    (rule,) = rules
    common = common_predictions(ensemble, tables)
    ensemble["calibration"] = calibrate_members(common, rule, ensemble["members"])
    ensemble["scores"] = score_test(ensemble, tables)
    ensemble["conclusion"] = ensemble["scores"]["conclusion"]
    return ensemble


def require_fit(members):
    """InputError if checkpoints {name: checkpoint} differ in what members must have in common."""
    first_name, first = next(iter(members.items()))
    for name, checkpoint in members.items():
        if "members" in checkpoint:
            raise InputError(f"{name} is an ensemble; name its members instead")
        if "calibration" not in checkpoint:
            raise InputError(
                f"{name} is not calibrated, since its run did not finish; finish it with "
                "train.py --resume"
            )
        for key, what in COMMON.items():
            if checkpoint[key] != first[key]:
                raise InputError(
                    f"{first_name} and {name} differ in the {what}: {first[key]} and "
                    f"{checkpoint[key]}; expected models that were trained on slices of one kind"
                )
        patterns = [each["flags"].get("subject_pattern") for each in (first, checkpoint)]
        if patterns[0] != patterns[1]:
            raise InputError(
                f"{first_name} and {name} differ in their --subject-pattern, {patterns[0]} and "
                f"{patterns[1]}; expected one for all, so that they name subjects alike"
            )
        drawn = [each["exposure"].get("drawn", False) for each in (first, checkpoint)]
        if drawn[0] != drawn[1]:
            raise InputError(
                f"one of {first_name} and {name} has seen drawings alone; expected all or none of "
                "the members"
            )
    for (name, one), (other_name, other) in itertools.combinations(members.items(), 2):
        if same_weights(one["weights"], other["weights"]):
            raise InputError(
                f"{name} and {other_name} hold the same weights, so that one run would count "
                "twice; leave out one of them"
            )


def same_weights(one, other):
    """Whether two state dicts are equal to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def merge_members(members):
    """The checkpoint of an ensemble without a calibration."""
    checkpoints = list(members.values())
    first = checkpoints[0]
    weights, kept = {}, []
    for i, (name, checkpoint) in enumerate(members.items()):
        own = {key: checkpoint[key] for key in OWN}
        own["name"] = name
        own["temperature"] = checkpoint["calibration"]["temperature"]
        own["baselines"] = checkpoint.get("baselines")
        kept.append(own)
        for key, tensor in checkpoint["weights"].items():
            weights[f"members.{i}.{key}"] = tensor

    parts = [
        {key: member[key] for key in ("model", "image_size", "temperature")} for member in kept
    ]
    exposure = first["exposure"]
    for checkpoint in checkpoints[1:]:
        exposure = merge_exposure(exposure, checkpoint["exposure"])
    init = first["init"]
    for checkpoint in checkpoints:
        if checkpoint["init"] and not checkpoint["init"]["exposure"]:
            init = checkpoint["init"]  # whose training subjects are not recorded
    split_by = "subject"
    if any(checkpoint["split_by"] == "slice" for checkpoint in checkpoints):
        split_by = "slice"
    test_read_after = set().union(*(checkpoint["test_read_after"] for checkpoint in checkpoints))
    means = [checkpoint["mean_slice"].float() for checkpoint in checkpoints]
    flags = [checkpoint["flags"] for checkpoint in checkpoints]
    data = {"AD_NC" if each["data"] is None else str(each["data"]) for each in flags}
    return {
        **{key: first[key] for key in COMMON},
        "model": {"variant": "ensemble", "members": parts},
        "weights": weights,
        "members": kept,
        "image_size": max(checkpoint["image_size"] for checkpoint in checkpoints),
        "slice_stats": common_ranges([checkpoint["slice_stats"] for checkpoint in checkpoints]),
        "mean_slice": (sum(means) / len(means)).round().byte(),
        "map_scale": None,
        "exposure": exposure,
        "init": init,
        "split_by": split_by,
        "test_read_after": sorted(test_read_after),
        "flags": {
            "data": ", ".join(sorted(data)),
            "demo": any(each["demo"] for each in flags),
            "subject_pattern": flags[0].get("subject_pattern"),
            "batch_size": min(each["batch_size"] for each in flags),
        },
    }


def common_ranges(ranges):
    """The ranges {name: [lowest, highest]} that lie within those of all members: a slice is out of
    range if it is so for one of them."""
    common = {}
    for name in ranges[0]:
        lows, highs = zip(*(each[name] for each in ranges))
        common[name] = [max(lows), min(highs)]
    return common


def differing_flags(flags, free=()):
    """{"--flag": its value in each run} of the flags in which runs differ, from their dicts of
    flags, but those that say nothing about how models differ, and those in `free`."""
    left_out = FREE_FLAGS | set(free)
    if any(each.get("split") for each in flags):
        left_out |= SPLIT_FLAGS
    differing = {}
    for name in sorted(set().union(*flags) - left_out):
        values = [each.get(name) for each in flags]
        if any(value != values[0] for value in values):
            differing[f"--{name.replace('_', '-')}"] = values
    return differing


def describe_ensemble(checkpoint):
    """Lines on the members of an ensemble: their files, the flags in which they differ, and what
    is missing of a cross-validation."""
    members = checkpoint["members"]
    yield f"members: {', '.join(member['name'] for member in members)}"
    flags = [member["flags"] for member in members]
    free = set()
    if checkpoint["design"] != UNCALIBRATED:
        free.add("data")  # `find_folds` has compared the slices themselves
    for name, values in differing_flags(flags, free).items():
        yield f"{name}: {', '.join(map(str, values))}"
    if checkpoint["design"] != FOLDS:
        return
    numbers = [member["fold"] for member in members]
    sizes = [numbers.count(k) for k in sorted(set(numbers))]
    n_folds = max(each["folds"] or 0 for each in flags)  # 0 if all have their split by --split
    if len(sizes) < n_folds:
        yield f"{len(sizes)} of {n_folds} folds are given: subjects of the others are not scored"
    if len(set(sizes)) > 1:
        yield (
            f"the folds have {', '.join(map(str, sizes))} members; a new subject is predicted by "
            "the mean of all members, so that folds with more of them count more"
        )


# ---------------------------------------------------------------- calibration


def find_folds(members, tables):
    """The fold of each member, a list of numbers from 0. Members whose test has the same slices
    share a fold: they are its seeds.

    Of a single fold all members have the same validation. Of several, which are a cross-validation,
    no two have a test subject in common, and no member has seen its own. InputError if that does
    not hold, or if the runs have not read the same data.
    """
    tests, validations, folds = [], [], []  # slices of each fold's test, of each validation
    for each in tables.values():
        test, validation = slices_of(each["test"]), slices_of(each["val"])
        if test not in tests:
            tests.append(test)
        if validation not in validations:
            validations.append(validation)
        folds.append(tests.index(test))

    # Weights of an earlier version do not record it.
    group_hashes = {checkpoint.get("group_hash") for checkpoint in members.values()} - {None}
    problem = None
    advice = f"train the others with --split {Path(next(iter(members))).parent / 'split.csv'}"
    if len({checkpoint["data_hash"] for checkpoint in members.values()}) > 1:
        problem = "they have not read the same slices"
    elif len(group_hashes) > 1:
        problem = "they know the subjects of these slices differently, from another table"
    elif len(tests) == 1 and len(validations) > 1:
        problem = (
            "they have the same test slices, and not the same validation slices; for seeds of one "
            f"split, {advice}"
        )
    elif len(tests) > 1:
        problem = find_overlap(folds, tables)
    if problem:
        raise InputError(
            f"{', '.join(members)} cannot be calibrated together: {problem}. Expected seeds of one "
            "split or folds of one cross-validation; tools.ensemble --uncalibrated makes a model "
            "without verdicts of any runs"
        )
    return folds


def slices_of(predictions):
    """Which slices a table has: pairs of scan and number."""
    return set(zip(predictions.scan, predictions.slice))


def find_overlap(folds, tables):
    """What keeps runs from being a cross-validation, as a clause; None if each test subject is in
    one fold alone and was not seen by the members of that fold."""
    owner = {}
    for fold, (name, each) in zip(folds, tables.items()):
        test = each["test"]
        seen = test[test.exposure == "yes"]
        if len(seen):
            return (
                f"{name} was trained on subjects of its own test, the first with scan "
                f"{seen.scan.iloc[0]}"
            )
        for group in test.group.unique():
            other_fold, other_name = owner.setdefault(group, (fold, name))
            if other_fold != fold:
                return (
                    f"{other_name} and {name} differ in their test, but share subjects of it "
                    "(another --seed draws other folds; to repeat a fold with another seed, use "
                    f"--split {Path(other_name).parent / 'split.csv'})"
                )
    return None


def calibrate_members(table, rule, members):
    """`calibrate` for predictions of members at their temperatures, with the weights of network and
    dark share where that is measured. InputError if there are subjects of one class alone."""
    if table.label.nunique() < 2:
        raise InputError(
            f"the subjects that would calibrate the ensemble are all {table.label.iloc[0]}; "
            "expected both classes"
        )
    log_temperatures = [np.log(member["temperature"]) for member in members]
    calibration = calibrate(table, rule, divided_by=np.exp(np.mean(log_temperatures)))
    if table.dark_share.notna().all():
        calibration["with_dark_share"] = fit_with_dark_share(table)
    return calibration


def common_predictions(ensemble, tables):
    """Predictions that none of the weights were trained on: the mean logit on the common validation
    of SEEDS, or for FOLDS the test of each fold by its own members."""
    if ensemble["design"] == FOLDS:
        return pd.concat(test_of_folds(ensemble, tables), ignore_index=True)
    return mean_predictions(ensemble["members"], tables, "val")


def test_of_folds(ensemble, tables):
    """The test predictions of each fold, by the mean logit of its own members."""
    n_folds = 1 + max(member["fold"] for member in ensemble["members"])
    return [mean_predictions(members_of_fold(ensemble, k), tables, "test") for k in range(n_folds)]


def members_of_fold(ensemble, k):
    return [member for member in ensemble["members"] if member["fold"] == k]


def calibrate_across(folds, ensemble, coverage):
    """The predictions of all folds in one table, each fold calibrated on the others, so that no
    calibration is scored on the subjects on which it was fitted."""
    rule = ensemble["calibration"]["threshold_rule"]
    calibrated = []
    for k, fold in enumerate(folds):
        others = pd.concat([*folds[:k], *folds[k + 1 :]], ignore_index=True)
        members = [member for member in ensemble["members"] if member["fold"] != k]
        calibration = calibrate_members(others, rule, members)
        calibrated.append(apply_calibration(fold, calibration, coverage))
    return pd.concat(calibrated, ignore_index=True)


def mean_predictions(members, tables, part):
    """The predictions of a part ("val", "test") of the runs of an ensemble, with the mean over
    members of their logits, each at its temperature, and of their baselines.

    A slice counts as seen, of unknown exposure or out of range if it is so for any member.
    InputError if the runs have not predicted the same slices with the same labels.
    """
    key = ["scan", "slice"]
    every = [tables[member["name"]][part].sort_values(key, ignore_index=True) for member in members]
    first = every[0]
    for member, table in zip(members, every):
        if not first[[*key, "label", "group"]].equals(table[[*key, "label", "group"]]):
            raise InputError(
                f"{members[0]['name']} and {member['name']} have not predicted the same slices, "
                f"labels and subjects in {part}/; expected runs of one split"
            )
    logits = [table.logit / member["temperature"] for member, table in zip(members, every)]
    exposures = np.column_stack([table.exposure for table in every])
    mean = {"logit": np.mean(logits, axis=0)}
    mean["exposure"] = exposure_over(exposures, np.ones(exposures.shape, bool))
    for name in BASELINES:
        mean[name] = np.mean([table[name] for table in every], axis=0)
    combined = first.assign(**mean)
    for table in every[1:]:
        combined["out_of_range"] = combined.out_of_range.fillna(table.out_of_range)
    return combined


def score_test(ensemble, tables):
    """The scores, as in metrics.json, of the test of the runs, with prediction sets.

    SEEDS: the mean over members. FOLDS: each subject by the members of its fold, calibrated on the
    other folds.
    """
    n = len(ensemble["members"])
    if ensemble["design"] == SEEDS:
        title = f"mean logit of {count(n, 'run')}, test"
        table = mean_predictions(ensemble["members"], tables, "test")
        table = apply_calibration(table, ensemble["calibration"], COVERAGE)
    else:
        folds = test_of_folds(ensemble, tables)
        title = f"{len(folds)} folds, each subject by the member that has not seen it"
        if n > len(folds):
            title = f"{n} runs of {len(folds)} folds, each subject by those that have not seen it"
        table = calibrate_across(folds, ensemble, COVERAGE)
    return score(table, title, **statements(ensemble), coverage=COVERAGE)


# ---------------------------------------------------------------- prediction


def split_members(checkpoint):
    """The checkpoints of the members of an ensemble."""
    members = []
    for i, member in enumerate(checkpoint["members"]):
        begin = f"members.{i}."
        weights = {
            key.removeprefix(begin): tensor
            for key, tensor in checkpoint["weights"].items()
            if key.startswith(begin)
        }
        members.append({**member, "weights": weights})
    return members


def members_that_predict(exposures, scan):
    """Which members predict which slice, bool (N, M), given the exposure of each slice to each
    member and its scan (N,).

    A scan that some members have seen is predicted by the others, and one that all have seen by
    all.
    """
    seen = pd.DataFrame(np.asarray(exposures) == "yes")
    seen = seen.groupby(np.asarray(scan)).transform("any").to_numpy(bool)
    return ~seen | seen.all(axis=1, keepdims=True)


def exposure_over(exposures, used):
    """The exposure of each slice to the members that predict it, (N,): "yes" if one has seen it,
    else "unknown" if that is not known of one, else "no"."""
    exposures = np.asarray(exposures)
    seen = (used & (exposures == "yes")).any(1)
    unknown = (used & (exposures == "unknown")).any(1)
    return np.select([seen, unknown], ["yes", "unknown"], "no")


def member_logits(predictions):
    """The columns logit_1, logit_2, ... of predictions of an ensemble, float64 (N, M): missing
    where a member does not predict. (N, 0) of a single model."""
    names = [name for name in predictions if name.startswith("logit_")]
    return predictions[names].to_numpy(float)


def scan_spread(predictions, checkpoint):
    """How far the members of an ensemble are apart: a row for each scan of calibrated predictions.

    members: how many predict it. members_AD: how many of them predict AD, by the rule of the
    ensemble. member_sd: the SD over them of the scan's mean logit, each at its temperature (missing
    for one member).
    """
    readable = predictions[predictions.p_AD.notna()]
    temperatures = [member["temperature"] for member in checkpoint["members"]]
    at_temperature = member_logits(readable) / temperatures
    temperature = checkpoint.get("calibration", {}).get("temperature", 1.0)
    scan = readable.scan.to_numpy()
    means = pd.DataFrame(at_temperature).groupby(scan).mean()
    p_ad = pd.DataFrame(expit(at_temperature / temperature)).groupby(scan).mean()
    threshold = readable.groupby("scan").threshold.first()
    return pd.DataFrame({
        "members": means.notna().sum(axis=1),
        "members_AD": p_ad.ge(threshold, axis=0).sum(axis=1),
        "member_sd": means.std(axis=1),
    })  # fmt: skip


def describe_disagreement(spread):
    """A line if members disagree on the class of scans in a table of `scan_spread`."""
    split = spread[(spread.members_AD > 0) & (spread.members_AD < spread.members)]
    if len(split):
        nearest = (split.members_AD / split.members - 0.5).abs().idxmin()
        row = split.loc[nearest]
        yield (
            f"the members disagree on {len(split)} of {len(spread)} scans, most of all on "
            f"{nearest}: {row.members_AD:.0f} of {row.members:.0f} predict AD (member_sd in "
            "scans.csv)"
        )
