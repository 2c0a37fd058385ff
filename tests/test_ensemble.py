"""Ensembles: several runs as one checkpoint, and what they predict together."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import train_small, write_set
from fake_predictions import make_predictions
from scipy.special import expit
from sklearn.metrics import roc_auc_score

import predict
import train
from adnc.errors import InputError
from adnc.scoring import ensemble as together
from adnc.scoring.assess import read_run, score
from adnc.scoring.calibration import apply_calibration, calibrate
from adnc.volumes.cut import look_of
from dataset import decode_set
from modules import Ensemble, make_model
from tools import ensemble, evaluate
from utils import build_model, load_checkpoint


@pytest.fixture(scope="module")
def seeds(ad_nc, shared_once):
    """Two runs of one split: a narrow ConvNeXt at 32 px, and a plain CNN at 40 px."""

    def make(folder):
        first = train_small(ad_nc, folder / "s0", "--epochs", "2")
        split = ["--split", str(first / "split.csv")]
        flags = ["--model", "cnn", "--image-size", "40", "--seed", "1", "--epochs", "2", *split]
        train_small(ad_nc, folder / "s1", *flags)

    folder = shared_once("ensemble_seeds", make)
    return [folder / "s0", folder / "s1"]


@pytest.fixture(scope="module")
def folds(ad_nc, shared_once):
    """The three folds of a cross-validation over all subjects."""

    def make(folder):
        for k in range(3):
            flags = ["--fold", str(k), "--folds", "3", "--pool-test", "--epochs", "1"]
            train_small(ad_nc, folder / f"f{k}", *flags)

    folder = shared_once("ensemble_folds", make)
    return [folder / f"f{k}" for k in range(3)]


def make_file(out, *runs):
    """Make an ensemble of runs; returns its checkpoint."""
    ensemble.main([*map(str, runs), "--out", str(out)])
    return load_checkpoint(out)


def run_predict(inputs, out, *words):
    """(predictions.csv, members.csv, scans.csv) of a command."""
    predict.main([*map(str, inputs), "--out", str(out), *map(str, words)])
    names = ("predictions", "members", "scans")
    return [pd.read_csv(out / f"{name}.csv", dtype={"scan": str}) for name in names]


def temperature(run):
    return load_checkpoint(run / "best_model.pth")["calibration"]["temperature"]


def fit_together(table, *runs):
    """The temperature of predictions of runs at their temperatures."""
    before = np.exp(np.mean([np.log(temperature(run)) for run in runs]))
    return calibrate(table, divided_by=before)["temperature"]


# ---------------------------------------------------------------- numbers


def test_a_subject_is_predicted_by_the_members_that_have_not_seen_it():
    exposures = np.array([
        ["yes", "no", "no"], ["yes", "yes", "yes"], ["no", "unknown", "yes"], ["no", "no", "no"],
    ])  # fmt: skip
    used = together.members_that_predict(exposures, list("abcd"))
    assert used.tolist() == [
        [False, True, True], [True, True, True], [True, True, False], [True, True, True],
    ]  # fmt: skip
    assert together.exposure_over(exposures, used).tolist() == ["no", "yes", "unknown", "no"]
    of_one_scan = together.members_that_predict(exposures, list("abcc"))
    assert of_one_scan[2:].tolist() == [[True, True, False]] * 2  # for all slices of a scan


def test_the_spread_of_a_scan_is_that_of_the_means_of_its_slices():
    table = pd.DataFrame({
        "scan": list("aabcd"), "p_AD": [0.5, 0.5, 0.5, 0.5, np.nan], "threshold": 0.5,
        "logit_1": [2.0, 6, 2, 10, np.nan], "logit_2": [-2.0, -4, 2, np.nan, np.nan],
    })  # fmt: skip
    checkpoint = {"members": [{"temperature": 2.0}, {"temperature": 1.0}]}
    spread = together.scan_spread(table, checkpoint)
    assert spread.index.tolist() == list("abc")
    assert spread.members.tolist() == [2, 2, 1] and spread.members_AD.tolist() == [1, 2, 1]
    assert spread.member_sd.tolist()[:2] == pytest.approx([np.std([2, -3], ddof=1), 0.5**0.5])
    assert np.isnan(spread.member_sd["c"])
    (line,) = together.describe_disagreement(spread)
    assert "disagree on 1 of 3 scans" in line and "a: 1 of 2 predict AD" in line
    assert not list(together.describe_disagreement(spread.loc[["b", "c"]]))

    strict = together.scan_spread(table.assign(threshold=0.9), checkpoint)  # as of youden
    assert strict.members_AD.tolist() == [0, 0, 1]


def test_the_margin_of_the_module_is_the_mean_at_each_temperature():
    torch.manual_seed(0)
    models = [dict(variant="narrow"), dict(variant="cnn")]
    members = [
        dict(model=models[0], image_size=32, temperature=2.0),
        dict(model=models[1], image_size=32, temperature=0.5),
    ]
    model = make_model("ensemble", members=members).eval()
    assert isinstance(model, Ensemble)
    x = torch.randn(3, 1, 32, 32)
    with torch.inference_mode():
        first, second = (member(x) for member in model.members)
        margin = model(x).diff(dim=1)[:, 0]
    expected = (first.diff(dim=1) / 2.0 + second.diff(dim=1) / 0.5)[:, 0] / 2
    torch.testing.assert_close(margin, expected)


# ---------------------------------------------------------------- one checkpoint


def test_an_ensemble_of_one_member_predicts_what_the_member_does(ad_nc, seeds, tmp_path):
    one = make_file(tmp_path / "one.pth", seeds[0])
    alone = load_checkpoint(seeds[0] / "best_model.pth")
    slices = decode_set(ad_nc, progress=None).part("test")
    options = dict(device=torch.device("cpu"), amp=None)
    expected = predict.predict_slices(alone, slices, **options)
    table = predict.predict_slices(one, slices, **options)
    assert np.array_equal(table.logit_1, expected.logit)  # to the bit
    assert np.array_equal(table.logit, expected.logit / alone["calibration"]["temperature"])
    for name in ("exposure", "out_of_range", "dark_share", "logistic_regression"):
        assert table[name].equals(expected[name])
    table = apply_calibration(table, one["calibration"])
    expected = apply_calibration(expected, alone["calibration"])
    np.testing.assert_allclose(table.p_AD, expected.p_AD, atol=1e-5)
    assert (table.prediction == expected.prediction).all()


def test_seeds_predict_by_their_mean_logit_from_a_file_or_on_the_fly(ad_nc, seeds, tmp_path):
    checkpoint = make_file(tmp_path / "e.pth", *seeds)
    test = [ad_nc / "test"]
    words = ["--checkpoint", tmp_path / "e.pth"]
    table, members, scans = run_predict(test, tmp_path / "file", *words)
    mean = (members.logit_1 / temperature(seeds[0]) + members.logit_2 / temperature(seeds[1])) / 2
    np.testing.assert_allclose(table.logit, mean, atol=2e-6)
    own = checkpoint["calibration"]["temperature"]
    np.testing.assert_allclose(table.p_AD, expit(table.logit / own), atol=1e-6)
    assert scans.members.tolist() == [2] * 6 and scans.member_sd.notna().all()

    run_predict(test, tmp_path / "fly", "--checkpoint", *seeds)
    for name in ("predictions", "members", "scans"):
        files = [tmp_path / folder / f"{name}.csv" for folder in ("file", "fly")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_prediction_of_an_ensemble_is_compared_with_the_mean_of_its_members(
    ad_nc, seeds, tmp_path, monkeypatch, capsys
):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(
        predict, "predict_checkpoint", lambda _, slices, **__: rng.normal(0, 1, len(slices.index))
    )
    noisy = tmp_path / "p"
    run_predict([ad_nc / "test"], noisy, "--checkpoint", *seeds)
    runs = pd.read_csv(noisy / "member_runs.csv")
    assert runs.run.tolist() == [str(run / "best_model.pth") for run in seeds]
    assert runs.temperature.tolist() == pytest.approx([temperature(run) for run in seeds])
    capsys.readouterr()
    evaluate.main([str(noisy)])
    text = capsys.readouterr().out

    members = pd.read_csv(noisy / "members.csv", dtype={"scan": str})
    is_ad = members.path.str.contains("AD/").groupby(members.scan).first()
    logits = members[["logit_1", "logit_2"]] / runs.temperature.to_numpy()
    logits = logits.assign(mean=logits.mean(axis=1))
    scans = expit(logits).groupby(members.scan).mean()
    first, second, mean = (roc_auc_score(is_ad, scans[name]) for name in scans)
    assert re.search(rf"\| mean over members +\| {(first + second) / 2:.3f} ", text)
    assert re.search(rf"\| all members together, mean logit +\| {mean:.3f} ", text)


def test_the_temperature_of_an_ensemble_is_no_difference_from_its_members():
    """Two equal members: the mean of p_AD over the slices of a scan depends on their scale, but at
    one scale the ensemble is what its members are."""
    names = [f"{label}{k}" for label in ("AD", "NC") for k in range(6)]
    table = make_predictions(
        scan=np.repeat(names, 3),
        slice=np.tile(range(3), 12),
        subject=np.repeat(names, 3),
        label=np.repeat(["AD", "NC"], 18),
        logit=[*([10.0, -1.0, -1.0] * 6), *([0.1] * 18)],
        p_AD=0.5,
    )
    table = table.assign(
        logit_1=table.logit, logit_2=table.logit, exposure="no", p_AD=expit(table.logit / 10)
    )
    members = [{"name": name, "temperature": 1.0} for name in "ab"]
    lines = evaluate.evaluate_members(table, members)
    assert lines[-1].split("|")[2].startswith(" +0.000 [")


def test_a_flag_of_several_names_may_be_repeated():
    args = predict.parse_args(["in", "--checkpoint", "a", "b", "--checkpoint", "c"])
    assert args.checkpoint == ["a", "b", "c"]
    assert evaluate.parse_args(["a", "--against", "b", "--against", "c"]).against == ["b", "c"]
    words = ["--model-args", "norm=batch", "--model-args", "stem=conv"]
    assert train.parse_args(words).model_args == {"norm": "batch", "stem": "conv"}


def test_seeds_are_calibrated_on_their_common_validation(seeds, tmp_path):
    checkpoint = make_file(tmp_path / "e.pth", *seeds)
    tables = [read_run(run, "val")[0] for run in seeds]
    mean = [table.logit / temperature(run) for table, run in zip(tables, seeds)]
    mean = tables[0].assign(logit=np.mean(mean, axis=0))
    assert checkpoint["design"] == "seeds"
    own = fit_together(mean, *seeds)
    assert checkpoint["calibration"]["temperature"] == pytest.approx(own)
    assert own != calibrate(mean)["temperature"]  # the prior is that of both temperatures


def test_folds_are_calibrated_out_of_fold_and_predict_each_subject_by_its_own_member(
    ad_nc, folds, tmp_path, capsys
):
    checkpoint = make_file(tmp_path / "e.pth", *folds)
    assert "3 folds, each subject by the member that has not seen it" in capsys.readouterr().out
    assert checkpoint["design"] == "folds" and checkpoint["calibration"]["groups"] == 18
    sets = checkpoint["scores"]["prediction_sets"]
    assert sets["coverage"] == 0.9 and 0 < sets["covered"] <= 1
    assert checkpoint["scores"]["exposure"] == {"no": 18, "unknown": 0, "yes": 0}
    assert len(checkpoint["exposure"]["subjects"]) == 18

    both = [ad_nc / "train", ad_nc / "test"]
    words = ["--checkpoint", tmp_path / "e.pth"]
    table, members, scans = run_predict(both, tmp_path / "p", *words)
    warned = capsys.readouterr().err
    assert "18 of 18 scans are of subjects that some members have seen in training" in warned
    scores = json.loads((tmp_path / "p" / "metrics.json").read_text())
    first = scores["conclusion"]["sentences"][0]
    assert "On the 18 subjects that the members which predict them have not seen (the" in first
    assert "calibrated on the labels of some or all of them" in first
    for text in (warned, scores["title"]):
        assert "the ensemble was calibrated on their labels" in text
    assert set(table.exposure) == {"no"} and set(scans.members) == {1}
    predicted = table.set_index("path").logit
    for k, run in enumerate(folds):
        test, _ = read_run(run, "test")
        expected = test.set_index("path").logit / temperature(run)
        np.testing.assert_allclose(predicted[expected.index], expected, rtol=1e-5, atol=1e-5)
        own = members[members.path.isin(expected.index)]
        at = checkpoint["calibration"]["temperature"]
        p_ad = table.set_index("path").p_AD[expected.index]
        np.testing.assert_allclose(p_ad, expit(expected / at), atol=1e-5)
        assert own[f"logit_{k + 1}"].notna().all()
        assert own[[f"logit_{j + 1}" for j in range(3) if j != k]].isna().all(axis=None)


def test_a_fold_may_have_several_seeds(ad_nc, folds, tmp_path, capsys):
    flags = ["--epochs", "1", "--seed", "1", "--split", str(folds[0] / "split.csv")]
    other = train_small(ad_nc, tmp_path / "f0-s1", *flags)
    checkpoint = make_file(tmp_path / "e.pth", *folds, other)
    title = "4 runs of 3 folds, each subject by those that have not seen it"
    assert title in capsys.readouterr().out
    assert [member["fold"] for member in checkpoint["members"]] == [0, 1, 2, 0]
    assert any("have 2, 1, 1 members" in line for line in together.describe_ensemble(checkpoint))

    # Another spelling of --data is a difference only of members whose slices were not compared.
    checkpoint["members"][1]["flags"]["data"] += "/../AD_NC"
    lines = list(together.describe_ensemble(checkpoint))
    assert not any("--data" in line for line in lines)
    assert any(line == "--seed: 0, 0, 0, 1" for line in lines)
    lines = together.describe_ensemble({**checkpoint, "design": "uncalibrated"})
    assert any(line.startswith("--data: ") for line in lines)

    # The scores are of the mean logit in fold 0, and of single members in the others.
    tests = [read_run(run, "test")[0] for run in (*folds, other)]
    scaled = [test.logit / temperature(run) for test, run in zip(tests, (*folds, other))]
    scaled = [(scaled[0] + scaled[3]) / 2, *scaled[1:3]]
    pooled = pd.concat([test.assign(logit=logit) for test, logit in zip(tests, scaled)])
    own = fit_together(pooled, *folds, other)
    assert checkpoint["calibration"]["temperature"] == pytest.approx(own, rel=1e-6)

    words = ["--checkpoint", tmp_path / "e.pth"]
    table, members, scans = run_predict([ad_nc / "train", ad_nc / "test"], tmp_path / "p", *words)
    in_fold_0 = scans.scan.isin(set(tests[0].scan.astype(str)))
    assert scans.members.tolist() == np.where(in_fold_0, 2, 1).tolist()


def test_the_scores_of_folds_are_calibrated_on_the_other_folds(folds, tmp_path):
    checkpoint = make_file(tmp_path / "e.pth", *folds)
    tests = [read_run(run, "test")[0] for run in folds]
    tests = [test.assign(logit=test.logit / temperature(run)) for test, run in zip(tests, folds)]
    parts = []
    for k in range(3):
        others = pd.concat(tests[:k] + tests[k + 1 :])
        others_of = folds[:k] + folds[k + 1 :]
        before = np.exp(np.mean([np.log(temperature(run)) for run in others_of]))
        parts.append(apply_calibration(tests[k], calibrate(others, divided_by=before)))
    expected = score(pd.concat(parts), "by hand")
    for name in ("brier", "auroc", "calibration_error"):
        assert checkpoint["scores"]["scan"][name] == pytest.approx(expected["scan"][name])


def test_new_subjects_are_predicted_by_all_folds_with_the_common_calibration(
    ad_nc, folds, tmp_path
):
    checkpoint = make_file(tmp_path / "e.pth", *folds)
    scans = {"900": ("test", "AD", "new1"), "901": ("test", "NC", "new2")}
    new = write_set(tmp_path / "new", scans)
    words = ["--checkpoint", tmp_path / "e.pth"]
    table, members, scans = run_predict([new / "test"], tmp_path / "p", *words)
    assert scans.members.tolist() == [3, 3]
    logits = [members[f"logit_{k + 1}"] / temperature(run) for k, run in enumerate(folds)]
    np.testing.assert_allclose(table.logit, np.mean(logits, axis=0), atol=1e-5)
    at = checkpoint["calibration"]["temperature"]
    np.testing.assert_allclose(table.p_AD, expit(table.logit / at), atol=1e-5)


def test_volumes_are_cut_for_an_ensemble_as_for_its_members(seeds, tmp_path):
    checkpoint = make_file(tmp_path / "e.pth", *seeds)
    member = load_checkpoint(seeds[0] / "best_model.pth")
    looks = [look_of(each, {"plane": "axial"})[0] for each in (checkpoint, member)]
    assert looks[0] == looks[1]


def test_the_range_of_an_ensemble_is_what_all_members_have_in_common():
    assert together.common_ranges([{"a": [1, 2]}, {"a": [0, 1.5]}]) == {"a": [1, 1.5]}


def test_the_exposure_of_seeds_is_that_of_every_member(seeds):
    members = [{"name": run.name, "temperature": 1.0} for run in seeds]
    tables = {run.name: {"test": read_run(run, "test")[0]} for run in seeds}
    tables["s1"]["test"] = tables["s1"]["test"].assign(exposure="yes", out_of_range="median 1")
    for order in (members, members[::-1]):
        mean = together.mean_predictions(order, tables, "test")
        assert set(mean.exposure) == {"yes"} and set(mean.out_of_range) == {"median 1"}
    other = tables["s1"]["test"].assign(label="AD")
    with pytest.raises(InputError, match="s0 and s1 have not predicted the same slices, labels"):
        together.mean_predictions(members, {**tables, "s1": {"test": other}}, "test")


# ---------------------------------------------------------------- what is refused


def test_runs_that_nothing_calibrates_together_give_no_verdicts(
    ad_nc, seeds, folds, tmp_path, capsys
):
    runs = [str(seeds[0]), str(folds[0])]
    ensemble.main([*runs, "--out", str(tmp_path / "e.pth"), "--uncalibrated"])
    assert "uncalibrated: no threshold, no prediction sets" in capsys.readouterr().out
    words = ["--checkpoint", tmp_path / "e.pth"]
    table, _, scans = run_predict([ad_nc / "test"], tmp_path / "p", *words)
    printed = capsys.readouterr()
    assert "The members have no common calibration" in printed.err
    assert "did not finish" not in printed.err and "ranks" not in printed.err
    assert "There is no threshold" in printed.out
    assert table.prediction.isna().all() and scans.prediction.isna().all()
    assert scans.members_AD.isna().all() and not (tmp_path / "p" / "confusion_matrix.png").exists()
    with pytest.raises(InputError, match="its members have no calibration in common"):
        run_predict([ad_nc / "test"], tmp_path / "q", *words, "--coverage", "0.9")


def read_tables(runs):
    return {run.name: {part: read_run(run, part)[0] for part in ("val", "test")} for run in runs}


def test_folds_that_share_a_subject_or_have_seen_theirs_are_no_cross_validation(folds):
    checkpoints = {run.name: load_checkpoint(run / "best_model.pth") for run in folds}
    tables = read_tables(folds)
    assert together.find_folds(checkpoints, tables) == [0, 1, 2]
    test = tables["f1"]["test"]
    shared = test.assign(group=test.group.replace(test.group[0], tables["f0"]["test"].group[0]))
    refused = [
        (shared, "f0 and f1 differ in their test, but share subjects of it"),
        (tables["f0"]["test"].iloc[1:], "f0 and f1 differ in their test, but share subjects of it"),
        (test.assign(exposure="yes"), "f1 was trained on subjects of its own test"),
    ]
    for changed, problem in refused:
        with pytest.raises(InputError, match=f"cannot be calibrated together: {problem}"):
            together.find_folds(checkpoints, {**tables, "f1": {**tables["f1"], "test": changed}})


def test_seeds_with_another_validation_or_other_data_are_refused(seeds):
    checkpoints = {run.name: load_checkpoint(run / "best_model.pth") for run in seeds}
    tables = read_tables(seeds)
    assert together.find_folds(checkpoints, tables) == [0, 0]
    val = {**tables, "s1": {**tables["s1"], "val": tables["s1"]["val"].iloc[1:]}}
    with pytest.raises(InputError, match="not the same validation slices.*--split.*--uncalibrated"):
        together.find_folds(checkpoints, val)
    checkpoints["s1"]["data_hash"] = "another"
    with pytest.raises(InputError, match="they have not read the same slices"):
        together.find_folds(checkpoints, tables)


def test_folds_that_know_their_subjects_from_different_tables_are_refused(ad_nc, folds, tmp_path):
    root = shutil.copytree(ad_nc.parent, tmp_path / "set") / "AD_NC"
    for table in root.parent.glob("*.*"):
        table.unlink()
    flags = ["--fold", "1", "--folds", "3", "--pool-test", "--epochs", "1"]
    other = train_small(root, tmp_path / "f1", *flags)
    assert load_checkpoint(other / "best_model.pth")["data_hash"] == (
        load_checkpoint(folds[0] / "best_model.pth")["data_hash"]
    )
    with pytest.raises(InputError, match="they know the subjects of these slices differently"):
        make_file(tmp_path / "e.pth", folds[0], other)


def test_one_class_alone_calibrates_no_ensemble(seeds):
    val = read_run(seeds[0], "val")[0]
    with pytest.raises(InputError, match="are all NC; expected both classes"):
        together.calibrate_members(val[val.label == "NC"], "0.5", [{"temperature": 1.0}])


def test_a_missing_fold_is_named(folds, tmp_path, capsys):
    make_file(tmp_path / "e.pth", *folds[:2])
    printed = capsys.readouterr().out
    assert "2 of 3 folds are given: subjects of the others are not scored" in printed


def test_members_that_do_not_fit_are_refused(seeds, folds, tmp_path):
    checkpoints = {run.name: load_checkpoint(run / "best_model.pth") for run in seeds}
    wide = {**checkpoints["s1"], "slice_size": [64, 64]}
    with pytest.raises(InputError, match="s0 and s1 differ in the size of the training slices"):
        together.require_fit({**checkpoints, "s1": wide})
    drawn = {**checkpoints["s1"], "exposure": {**wide["exposure"], "drawn": True}}
    with pytest.raises(InputError, match="one of s0 and s1 has seen drawings alone"):
        together.require_fit({**checkpoints, "s1": drawn})
    unfinished = {key: v for key, v in checkpoints["s1"].items() if key != "calibration"}
    with pytest.raises(InputError, match="s1 is not calibrated, since its run did not finish"):
        together.require_fit({**checkpoints, "s1": unfinished})

    file = tmp_path / "e.pth"
    with pytest.raises(InputError, match="s0/best_model.pth and .*phantom.pth differ in the size"):
        ensemble.main([str(seeds[0]), str(predict.PHANTOM), "--out", str(file)])
    with pytest.raises(InputError, match="is named twice"):
        ensemble.main([str(seeds[0]), str(seeds[0]), "--out", str(file)])
    shutil.copytree(seeds[0], tmp_path / "backup")
    with pytest.raises(InputError, match="hold the same weights, so that one run would count"):
        ensemble.main([str(seeds[0]), str(tmp_path / "backup"), "--out", str(file)])
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "last.pth").touch()
    with pytest.raises(InputError, match="stopped in its first epoch; finish it with"):
        predict.load_run(tmp_path / "first")
    with pytest.raises(InputError, match="nothing does not exist; expected the folder of a run"):
        ensemble.main([str(tmp_path / "nothing"), "--out", str(file)])
    with pytest.raises(InputError, match="is a training to resume"):
        ensemble.main([str(seeds[0] / "last.pth"), "--out", str(file)])
    make_file(file, *seeds)
    with pytest.raises(InputError, match="is an ensemble; name its members instead"):
        ensemble.main([str(file), str(seeds[0]), "--out", str(tmp_path / "f.pth")])
    with pytest.raises(InputError, match="exists"):
        ensemble.main([*map(str, seeds), "--out", str(file)])
    with pytest.raises(InputError, match="--init .* is an ensemble; expected a single model"):
        train.load_init(make_model("narrow"), str(file), print)


def test_scores_of_another_checkpoint_do_not_calibrate(seeds, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(seeds[0], run)
    shutil.copy(seeds[1] / "best_model.pth", run / "best_model.pth")
    with pytest.raises(InputError, match="val was not written for .*run/best_model.pth"):
        ensemble.main([str(run), "--out", str(tmp_path / "e.pth")])


def test_the_input_stands_before_the_runs(seeds, capsys):
    with pytest.raises(SystemExit):
        predict.parse_args(["--checkpoint", str(seeds[0]), "slices"])
    assert "before --checkpoint, which takes all names after it" in capsys.readouterr().err


# ---------------------------------------------------------------- report and maps


def test_an_ensemble_is_explained_and_reported(ad_nc, seeds, tmp_path, pictures):
    pytest.importorskip("captum")
    slices = sorted((ad_nc / "test" / "AD").glob("300_*"))[:2]
    page = tmp_path / "page.html"
    words = ["--checkpoint", *map(str, seeds), "--report", str(page), "--explain", "grad-cam"]
    predict.main([*map(str, slices), "--out", str(tmp_path / "p"), *words])
    text = re.sub(r"\s+", " ", page.read_text())
    for run in seeds:
        assert f"{run / 'best_model.pth'}: " in text
    assert "ensemble of 1 ConvNeXt narrow, 1 plain CNN, seeds" in text
    assert "Test of its runs" in text
    (maps,) = (tmp_path / "p" / "explanations").glob("*.npz")
    assert np.load(maps)["maps"].shape == (2, 40, 40)


def test_the_report_names_scans_on_which_members_disagree(ad_nc, seeds, tmp_path, monkeypatch):
    checkpoint = make_file(tmp_path / "e.pth", *seeds)
    checkpoint["conclusion"] = {**checkpoint["conclusion"], "verdict": "works"}
    monkeypatch.setattr(predict, "load_runs", lambda paths: (tmp_path / "e.pth", checkpoint))

    def disagree(member, slices, **options):
        sign = 1 if member["model"]["variant"] == "cnn" else -0.5
        return np.full(len(slices.index), sign, np.float32)

    monkeypatch.setattr(predict, "predict_checkpoint", disagree)
    folder = tmp_path / "slices"
    shutil.copytree(ad_nc / "test", folder)
    (folder / "AD" / "300_70.jpeg").write_bytes(b"broken")  # the first slice of a scan
    page = tmp_path / "page.html"
    words = ["--checkpoint", "e", "--report", str(page), "--out", str(tmp_path / "p")]
    predict.main([str(folder), *words])
    text = page.read_text()
    assert text.count("1 of 2 members predict AD") == 6
    assert text.count("SD of the members") == 6


def test_maps_of_an_ensemble_add_up_to_its_margin(seeds):
    pytest.importorskip("captum")
    from adnc.explain.attribution import integrated_gradients, margin, model_parts

    checkpoint = together.make_ensemble(
        {run.name: load_checkpoint(run / "best_model.pth") for run in seeds}
    )
    model = build_model(checkpoint).eval()
    torch.manual_seed(0)
    x, baseline = torch.rand(1, 1, 40, 40), torch.zeros(1, 1, 40, 40)
    with torch.no_grad():
        difference = margin(model)(x) - margin(model)(baseline)
    total = integrated_gradients(model, x, baseline).sum()
    assert total.item() == pytest.approx(difference.item(), rel=0.1)  # 32 steps of the integral
    names = {name for name, _ in model.named_parameters()}
    prefixes = tuple(prefix for _, part in model_parts(model) for prefix in part)
    assert all(name.startswith(prefixes) for name in names)
