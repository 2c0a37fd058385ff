import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_slice
from PIL import Image

from adnc import files
from adnc import cpu_engine as inference
from adnc.scoring import metrics
import predict
from adnc.data import pixels as slices
from utils import load_checkpoint, save_checkpoint
from dataset import load_inputs
from adnc.data.index import list_inputs
from adnc.explain.report import claimed
from adnc.distributed import Runtime
from adnc.data.pixels import MOST_PLACES, passed_over
from adnc.cli import InputError


def run_predict(run_folder, out, *inputs, checkpoint=None):
    """Predict in this process; returns predictions.csv."""
    words = [*map(str, inputs), "--checkpoint", str(checkpoint or run_folder / "best_model.pth"), "--out", str(out)]
    predict.main(predict.parse_args(words))
    return pd.read_csv(out / "predictions.csv", dtype={"scan": str})


def test_a_labelled_folder_repeats_the_runs_own_test(run_folder, ad_nc, tmp_path):
    run_predict(run_folder, tmp_path, ad_nc / "test")
    ours, theirs = (pd.read_csv(folder / "predictions.csv") for folder in (tmp_path, run_folder / "test"))
    assert list(ours.columns) == list(metrics.PREDICTIONS)
    assert ours.drop(columns=["prediction_set", "out_of_range", "error"]).notna().all(axis=None)
    theirs["prediction_set"] = ours["prediction_set"]  # the run's own has sets, here no coverage is asked for
    pd.testing.assert_frame_equal(ours.drop(columns="path"), theirs.drop(columns="path"), check_exact=True)
    a, b = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, run_folder / "test"))
    same = [*metrics.UNITS, "baselines", "minus_baseline", "calibration", "leaks"]
    assert [a[name] for name in same] == [b[name] for name in same]


def test_metrics_json_has_each_unit_with_scores_and_intervals(run_folder, ad_nc, tmp_path):
    run_predict(run_folder, tmp_path, ad_nc / "test")
    scores = json.loads((tmp_path / "metrics.json").read_text())
    names = set(metrics.METRICS)
    for unit in ("slice", "scan", "subject"):
        assert set(scores[unit]) == names | {"n", "groups", "ci95"} and set(scores[unit]["ci95"]) == names
    assert "LEAKY" not in scores["title"] and scores["leaks"] == []
    assert set(scores["baselines"]) == {"majority_class", "window_vote", "logistic_regression"}


def test_a_flat_folder_and_a_single_slice_get_the_same_p_ad(run_folder, ad_nc, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (ad_nc / "test").rglob("*.jpeg"):
        shutil.copy(path, flat)
    (flat / "notes.txt").write_text("not a slice")
    table = run_predict(run_folder, tmp_path / "a", flat)
    assert len(table) == 30 and table.label.isna().all() and table.subject.isna().all()
    assert not (tmp_path / "a" / "metrics.json").exists()
    one = run_predict(run_folder, tmp_path / "b", flat / "301_72.jpeg")
    assert len(one) == 1
    row = table[(table.scan == "301") & (table.slice == 72)].iloc[0]
    assert one.p_AD[0] == pytest.approx(row.p_AD, abs=0.01)  # bf16 rounds a batch of one otherwise than one of 30


def test_scans_and_subjects_are_means_of_the_slices(run_folder, ad_nc, tmp_path):
    table = run_predict(run_folder, tmp_path, ad_nc / "test")
    scans = pd.read_csv(tmp_path / "scans.csv", dtype={"scan": str}).set_index("scan")
    subjects = pd.read_csv(tmp_path / "subjects.csv").set_index("subject")
    np.testing.assert_allclose(scans.p_AD, table.groupby("scan").p_AD.mean(), rtol=1e-6)
    assert (scans.n_slices == 5).all() and (scans.exposure == "no").all()
    assert list(scans.columns) == list(metrics.AGGREGATED[1:]) and list(subjects.columns) == list(scans.columns[1:])
    assert subjects.p_AD["ta1"] == scans.p_AD["301"]


def test_a_file_that_cannot_be_read_gets_a_row_with_the_reason(run_folder, ad_nc, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(ad_nc / "test" / "AD" / "300_70.jpeg", flat)
    (flat / "300_71.jpeg").write_bytes(b"no image")
    table = run_predict(run_folder, tmp_path / "out", flat)
    assert list(table.columns) == list(metrics.PREDICTIONS)
    bad = table[table.slice == 71].iloc[0]
    assert "cannot be read as an image" in bad.error and np.isnan(bad.p_AD)
    assert pd.read_csv(tmp_path / "out" / "scans.csv").n_slices.tolist() == [1]
    assert "1 of 2 files could not be read" in capsys.readouterr().err


def test_nothing_readable_is_an_error_but_the_reasons_are_written(run_folder, tmp_path):
    (tmp_path / "1_1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 1 files could be read"):
        run_predict(run_folder, tmp_path / "out", tmp_path / "1_1.png")
    assert pd.read_csv(tmp_path / "out" / "predictions.csv").error.notna().all()


def test_any_name_and_size_can_be_predicted(run_folder, tmp_path):
    write_slice(tmp_path / "my brain.png", True, 0, size=(300, 200))
    Image.new("RGB", (48, 40), "grey").save(tmp_path / "colour.jpg")
    table = run_predict(run_folder, tmp_path / "out", tmp_path).set_index("scan")
    assert set(table.index) == {f"{tmp_path}/my brain.png", f"{tmp_path}/colour.jpg"} and table.slice.isna().all()
    assert table.prediction[f"{tmp_path}/my brain.png"] == "AD"


def test_the_checkpoint_alone_decides_size_and_architecture(run_folder, ad_nc, tmp_path):
    """A checkpoint of another size and width predicts by itself; and its normalisation is used, not the default."""
    from modules import convnext

    checkpoint = load_checkpoint(run_folder / "best_model.pth")
    torch.manual_seed(0)
    checkpoint["model"] |= {"variant": "femto"}
    checkpoint["weights"] = convnext("femto").state_dict()
    checkpoint |= {"image_size": 64}
    checkpoint.pop("format")
    tables = {}
    for mean in (0.5, 0.1):
        save_checkpoint(tmp_path / "other.pth", **checkpoint | {"mean": mean})
        tables[mean] = run_predict(None, tmp_path / str(mean), ad_nc / "test", checkpoint=tmp_path / "other.pth")
    assert not np.allclose(tables[0.5].p_AD, tables[0.1].p_AD, atol=1e-6)


def test_predicting_training_slices_is_called_what_it_is(run_folder, ad_nc, tmp_path, capsys):
    run_predict(run_folder, tmp_path / "AD", ad_nc / "train" / "AD")  # without labels, there is no title to say it
    assert "6 of 6 scans are of subjects seen in training: memory, not a test" in capsys.readouterr().err
    run_predict(run_folder, tmp_path / "both", ad_nc / "train")
    title = json.loads((tmp_path / "both" / "metrics.json").read_text())["title"]
    assert "LEAKY: 12 of 12 scans are of subjects seen in training" in title


def test_a_checkpoint_names_no_subject(run_folder):
    checkpoint = load_checkpoint(run_folder / "best_model.pth")
    assert len(checkpoint["exposure"]["subjects"]) == 12 and "a1" not in checkpoint["exposure"]["subjects"]


def test_a_folder_with_one_class_gives_the_scores_that_exist(run_folder, ad_nc, tmp_path, pictures):
    shutil.copytree(ad_nc / "test" / "AD", tmp_path / "in" / "AD")
    run_predict(run_folder, tmp_path / "out", tmp_path / "in")
    scores = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert scores["scan"]["auroc"] is None and scores["scan"]["sensitivity"] is not None
    assert (tmp_path / "out" / "risk_coverage.png").exists() and not (tmp_path / "out" / "roc_curve.png").exists()


@pytest.mark.parametrize("given, sentence", [
    ("nowhere", "nowhere does not exist"), ("empty", "empty holds no images"), ("x.nii", "x.nii is not an image"),
])  # fmt: skip
def test_an_input_of_another_kind_is_refused_in_a_sentence(tmp_path, given, sentence):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.nii").write_bytes(b"")
    with pytest.raises(ValueError, match=sentence):
        list_inputs([tmp_path / given])


def test_the_root_of_a_set_is_refused_with_a_hint(ad_nc):
    with pytest.raises(ValueError, match="did you mean .*AD_NC/test"):
        list_inputs([ad_nc])


def test_the_newest_run_is_the_default(run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="there is no runs/.*/best_model.pth"):
        predict.newest_checkpoint()
    (tmp_path / "runs" / "a").mkdir(parents=True)
    shutil.copy(run_folder / "best_model.pth", tmp_path / "runs" / "a")
    assert str(predict.newest_checkpoint()) == "runs/a/best_model.pth"


def test_files_of_one_name_in_two_folders_are_two_scans(run_folder, tmp_path):
    for label in ("AD", "NC"):
        write_slice(tmp_path / "in" / label / "0001.png", label == "AD", 0)
    run_predict(run_folder, tmp_path / "out", tmp_path / "in")
    assert pd.read_csv(tmp_path / "out" / "scans.csv").label.tolist() == ["AD", "NC"]


def test_two_files_of_one_slice_are_refused_and_one_file_named_twice_counts_once(ad_nc, tmp_path, monkeypatch):
    write_slice(tmp_path / "300_70.png", True, 0)
    given = ad_nc / "test" / "AD" / "300_70.jpeg"
    with pytest.raises(ValueError, match="300_70.jpeg is the same slice of a scan as .*300_70.png"):
        list_inputs([given, tmp_path])
    write_slice(tmp_path / "300_71.png", True, 1)
    assert list_inputs([given, tmp_path]).index.error.isna().tolist() == [False, False, True]  # the rest goes on
    monkeypatch.chdir(given.parent)
    assert len(list_inputs([given, given.name]).index) == 1


def test_what_is_passed_over_is_named_by_kind_and_folder(run_folder, tmp_path, capsys):
    root = tmp_path / "in"
    for name in ("1_1.png", "more/2_2.png", "more/2_3.png", "more/deep/2_4.png", ".4_4.png"):
        write_slice(root / name, True, 0)
    (root / "3_3.dcm").write_bytes(b"")
    (root / "subjects.csv").write_text("scan,subject\n1,somebody\n")  # which is read
    assert len(run_predict(run_folder, tmp_path / "out", root)) == 1
    said = {f"1 .dcm file in {root}", f"2 files in {root}/more", f"1 file in {root}/more/deep",
            "1 file left by archives and tools, such as .DS_Store"}  # fmt: skip
    told = re.findall("passed over: (.*)", capsys.readouterr().err)
    assert set(told) == said and len(told) == len(said)
    (root / "more" / "notes.txt").write_text("")
    assert len(run_predict(run_folder, tmp_path / "again", root, root / "more")) == 3
    said = said - {f"2 files in {root}/more"} | {f"1 .txt file in {root}/more"}
    told = re.findall("passed over: (.*)", capsys.readouterr().err)
    assert set(told) == said and len(told) == len(said)


def test_a_third_class_beside_the_two_is_passed_over_by_count(ad_nc, tmp_path):
    for k in range(3):
        write_slice(tmp_path / "MCI" / f"9_{k}.png", True, 0)
    for label in ("AD", "NC"):
        (tmp_path / label).symlink_to(ad_nc / "test" / label)
    (tmp_path / "AD.png").symlink_to(next((ad_nc / "test" / "AD").iterdir()))
    assert [line for line in list_inputs([tmp_path]).warnings if line.startswith("passed")] == [
        f"passed over: 3 files in {tmp_path}/MCI", f"passed over: 1 .png file in {tmp_path}"]


def test_what_is_passed_over_in_a_hundred_places_is_added_up(tmp_path):
    for k in range(100):
        (tmp_path / f"sub-{k}").mkdir()
        (tmp_path / f"sub-{k}" / "x").write_text("")
    lines = passed_over(tmp_path, [])
    assert len(lines) == MOST_PLACES + 1 and lines[-1] == f"passed over: {100 - MOST_PLACES} files in other places"


def test_what_is_passed_over_is_counted_up_to_a_limit(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "all").symlink_to("/")
    monkeypatch.setattr(slices, "MOST_COUNTED", 1000)
    lines = passed_over(tmp_path / "in", [])
    assert "passed over: more than 1,000 files; the others are not counted" in lines and len(lines) < 50


def test_folders_of_classes_given_one_by_one_are_said_to_be_no_labels(ad_nc):
    said = "given one by one are no labels; for scores give the folder that holds them"
    assert any(said in line for line in list_inputs([ad_nc / "test" / "AD", ad_nc / "test" / "NC"]).warnings)
    assert not any(said in line for line in list_inputs([ad_nc / "test", ad_nc / "test" / "AD"]).warnings)


def test_last_pth_is_no_model_to_predict_with(run_folder, ad_nc, tmp_path):
    with pytest.raises(ValueError, match="last.pth is there to resume a training; predict with best_model.pth"):
        run_predict(run_folder, tmp_path, ad_nc / "test", checkpoint=run_folder / "last.pth")


def test_a_scan_under_both_classes_is_refused(tmp_path):
    for label in ("AD", "NC"):
        write_slice(tmp_path / label / "7_1.png", label == "AD", 0)
    with pytest.raises(ValueError, match="is of scan 7, which is in both classes"):
        list_inputs([tmp_path])
    write_slice(tmp_path / "AD" / "8_1.png", True, 1)
    assert list_inputs([tmp_path]).index.error.isna().tolist() == [False, False, True]  # the rest goes on


def test_some_unlabelled_slices_are_reported_and_cost_the_scores(run_folder, ad_nc, tmp_path, capsys):
    write_slice(tmp_path / "900_1.png", True, 0)
    table = run_predict(run_folder, tmp_path / "out", tmp_path / "900_1.png", ad_nc / "test" / "AD" / "300_70.jpeg",
                        ad_nc / "test")  # fmt: skip
    assert len(table) == 31 and table.label.isna().sum() == 1
    assert "1 of 31 slices have no label" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_prediction_does_not_replace_results(run_folder, ad_nc, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for out in (run, run / "test"):
        with pytest.raises(ValueError, match="is not empty, and nothing is overwritten; choose a new --out"):
            run_predict(run_folder, out, ad_nc / "test" / "AD" / "300_70.jpeg")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_another_process_is_writing_is_refused_and_what_fails_leaves_nothing(run_folder, ad_nc, tmp_path):
    words = [str(ad_nc / "test"), "--checkpoint", str(run_folder / "best_model.pth"), "--out", str(tmp_path / "out")]
    page = ["--report", str(tmp_path / "page.html")]
    (tmp_path / "out").mkdir()
    with files.locked(tmp_path / "out"), pytest.raises(InputError, match="out is in use by process"):
        predict.main(predict.parse_args(words))
    with claimed(page[1]), pytest.raises(InputError, match="page.html is for another process"):
        predict.main(predict.parse_args([*words, *page]))
    (tmp_path / "out").rmdir()
    (tmp_path / "page.html").touch()  # by a process that was killed
    with pytest.raises(InputError, match="nowhere does not exist"):
        predict.main(predict.parse_args([str(tmp_path / "nowhere"), *words[1:], *page]))
    assert list(tmp_path.iterdir()) == []
    predict.main(predict.parse_args([*words, "--report", str(tmp_path / "out" / "page.html")]))
    assert (tmp_path / "out" / "page.html").stat().st_size > 10_000
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_model_without_finite_output_is_an_error_and_not_nc(run_folder, ad_nc, tmp_path):
    checkpoint = load_checkpoint(run_folder / "best_model.pth")
    checkpoint["weights"]["head.weight"] *= float("inf")
    checkpoint.pop("format")
    save_checkpoint(tmp_path / "m.pth", **checkpoint)
    with pytest.raises(ValueError, match="no finite output for 30 of 30 slices"):
        run_predict(None, tmp_path / "out", ad_nc / "test", checkpoint=tmp_path / "m.pth")


def test_coverage_writes_a_prediction_set_for_each_scan(run_folder, ad_nc, tmp_path, capsys):
    words = [str(ad_nc / "test"), "--checkpoint", str(run_folder / "best_model.pth")]
    predict.main(predict.parse_args([*words, "--out", str(tmp_path / "a"), "--coverage", "0.6"]))
    sets = pd.read_csv(tmp_path / "a" / "scans.csv", dtype={"scan": str}).set_index("scan").prediction_set
    assert set(sets) <= {"AD", "NC", "AD|NC"} and sets["300"] == "AD" and sets["400"] == "NC"
    predict.main(predict.parse_args([*words, "--out", str(tmp_path / "b"), "--coverage", "0.9"]))
    assert (pd.read_csv(tmp_path / "b" / "scans.csv").prediction_set == "AD|NC").all()  # three validation subjects
    told = capsys.readouterr()
    assert "validation subjects can promise a coverage of at most 0." in told.err
    assert "scan 300: AD|NC (uncertain), p_AD" in told.out
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["prediction_sets"]["uncertain"] == 1


def test_a_checkpoint_of_an_unfinished_run_predicts_and_says_that_it_is_not_calibrated(
    run_folder, ad_nc, tmp_path, capsys
):
    checkpoint = load_checkpoint(run_folder / "best_model.pth")
    for name in ("calibration", "baselines"):
        del checkpoint[name]
    save_checkpoint(tmp_path / "m.pth", **checkpoint)
    run_predict(None, tmp_path / "out", ad_nc / "test", checkpoint=tmp_path / "m.pth")
    assert "not calibrated" in capsys.readouterr().err
    with pytest.raises(ValueError, match="was not calibrated, since its run did not finish"):
        predict.main(predict.parse_args([str(ad_nc / "test"), "--checkpoint", str(tmp_path / "m.pth"), "--out",
                                         str(tmp_path / "more"), "--coverage", "0.9"]))  # fmt: skip


def test_p_ad_is_calibrated_at_the_temperature_of_the_checkpoint(run_folder, ad_nc, tmp_path):
    checkpoint = load_checkpoint(run_folder / "best_model.pth")
    slices = load_inputs(list_inputs([ad_nc / "test"]), checkpoint, bar=None)
    raw = inference.predict_slices(checkpoint, slices, Runtime(torch.device("cpu")))
    done = inference.calibrated(raw, checkpoint)
    z = np.log(done.p_AD / (1 - done.p_AD))
    np.testing.assert_allclose(z * checkpoint["calibration"]["temperature"], raw.logit, atol=1e-4)  # of seven digits
    assert checkpoint["calibration"]["temperature"] != 1
