"""predict.py: slices, scans and subjects of a checkpoint."""

import json
import os
import shutil

import command
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, write_slice
from PIL import Image

import predict
from adnc import files
from adnc.data.index import list_inputs
from adnc.errors import InputError
from adnc.scoring import metrics
from adnc.scoring.assess import WORKS
from adnc.scoring.calibration import apply_calibration
from dataset import load_inputs
from modules import convnext
from tools import evaluate
from utils import load_checkpoint, save_checkpoint


def run_predict(run_folder, out, *inputs, checkpoint=None, flags=()):
    """Predict in this process; returns predictions.csv."""
    checkpoint = checkpoint or run_folder / "best_model.pth"
    predict.main([*map(str, inputs), "--checkpoint", str(checkpoint), "--out", str(out), *flags])
    return pd.read_csv(out / "predictions.csv", dtype={"scan": str})


def changed_checkpoint(run_folder, file, **changes):
    """Save the checkpoint of a run with changes, None for a key to leave out; returns the file."""
    checkpoint = load_checkpoint(run_folder / "best_model.pth")
    del checkpoint["format"]
    checkpoint.update(changes)
    for name, value in changes.items():
        if value is None:
            del checkpoint[name]
    save_checkpoint(file, **checkpoint)
    return file


# ---------------------------------------------------------------- tables and scores


def test_a_labelled_folder_repeats_the_runs_own_test(run_folder, ad_nc, tmp_path):
    run_predict(run_folder, tmp_path / "out", ad_nc / "test")
    ours, theirs = (
        pd.read_csv(folder / "predictions.csv")
        for folder in (tmp_path / "out", run_folder / "test")
    )
    assert list(ours.columns) == list(metrics.PREDICTIONS)
    assert ours.drop(columns=["prediction_set", "out_of_range", "error"]).notna().all(axis=None)
    theirs["prediction_set"] = ours[
        "prediction_set"
    ]  # the run's own has sets, here no coverage is asked for
    pd.testing.assert_frame_equal(
        ours.drop(columns="path"), theirs.drop(columns="path"), check_exact=True
    )
    a, b = (
        json.loads((folder / "metrics.json").read_text())
        for folder in (tmp_path / "out", run_folder / "test")
    )
    same = [*metrics.UNITS, "baselines", "minus_baseline", "calibration", "leaks"]
    assert [a[name] for name in same] == [b[name] for name in same]


def test_metrics_json_has_each_unit_with_scores_and_intervals(run_folder, ad_nc, tmp_path):
    run_predict(run_folder, tmp_path / "out", ad_nc / "test")
    scores = json.loads((tmp_path / "out" / "metrics.json").read_text())
    names = set(metrics.METRICS)
    for unit in ("slice", "scan", "subject"):
        assert (
            set(scores[unit]) == names | {"n", "groups", "ci95"}
            and set(scores[unit]["ci95"]) == names
        )
    assert "LEAKY" not in scores["title"] and scores["leaks"] == []
    assert set(scores["baselines"]) == set(metrics.BASELINES)


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
    # bf16 rounds a batch of one differently.
    assert one.p_AD[0] == pytest.approx(row.p_AD, abs=0.01)


def test_scans_and_subjects_are_means_of_the_slices(run_folder, ad_nc, tmp_path):
    table = run_predict(run_folder, tmp_path / "out", ad_nc / "test")
    scans = pd.read_csv(tmp_path / "out" / "scans.csv", dtype={"scan": str}).set_index("scan")
    subjects = pd.read_csv(tmp_path / "out" / "subjects.csv").set_index("subject")
    np.testing.assert_allclose(scans.p_AD, table.groupby("scan").p_AD.mean(), rtol=1e-6)
    assert (scans.n_slices == 5).all() and (scans.exposure == "no").all()
    assert list(scans.columns) == [*metrics.AGGREGATED[1:], *metrics.SPREAD]
    assert list(subjects.columns) == list(metrics.AGGREGATED[2:])
    assert scans[list(metrics.SPREAD)].isna().all(axis=None)  # of a single model
    assert subjects.p_AD["ta1"] == scans.p_AD["301"]


def test_p_ad_is_calibrated_at_the_temperature_of_the_checkpoint(run_folder, ad_nc):
    checkpoint = load_checkpoint(run_folder / "best_model.pth")
    slices = load_inputs(
        list_inputs([ad_nc / "test"]), slice_size=checkpoint["slice_size"], progress=None
    )
    raw = predict.predict_slices(checkpoint, slices, device=torch.device("cpu"), amp=None)
    p_ad = apply_calibration(raw, checkpoint["calibration"]).p_AD
    logits = np.log(p_ad / (1 - p_ad)) * checkpoint["calibration"]["temperature"]
    np.testing.assert_allclose(logits, raw.logit, atol=1e-4)  # seven digits
    assert checkpoint["calibration"]["temperature"] != 1


def test_predictions_follow_the_row_column_and_no_label_or_order_of_the_index(run_folder, ad_nc):
    checkpoint = load_checkpoint(run_folder / "best_model.pth")
    slices = load_inputs(
        list_inputs([ad_nc / "test"]), slice_size=checkpoint["slice_size"], progress=None
    )
    table = predict.predict_slices(checkpoint, slices, device=torch.device("cpu"), amp=None)
    slices.index = slices.index.iloc[np.random.default_rng(0).permutation(30)]
    slices.index.index = np.arange(30) // 3
    other = predict.predict_slices(checkpoint, slices, device=torch.device("cpu"), amp=None)
    both = table.set_index("path").logit.to_frame("one").join(other.set_index("path").logit)
    np.testing.assert_allclose(both.one, both.logit, atol=1e-5)


def test_a_folder_with_one_class_gives_the_scores_that_exist(run_folder, ad_nc, tmp_path, pictures):
    shutil.copytree(ad_nc / "test" / "AD", tmp_path / "in" / "AD")
    run_predict(run_folder, tmp_path / "out", tmp_path / "in")
    scores = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert scores["scan"]["auroc"] is None and scores["scan"]["sensitivity"] is not None
    assert (tmp_path / "out" / "risk_coverage.png").exists() and not (
        tmp_path / "out" / "roc_curve.png"
    ).exists()


# ---------------------------------------------------------------- what a checkpoint decides


def test_the_checkpoint_alone_decides_size_architecture_and_normalisation(
    run_folder, ad_nc, tmp_path
):
    torch.manual_seed(0)
    model = {"variant": "femto", "in_chans": 1, "num_classes": 2, "drop_path_rate": 0.0}
    tables = []
    for mean in (0.5, 0.1):
        file = changed_checkpoint(
            run_folder,
            tmp_path / f"{mean}.pth",
            model=model,
            weights=convnext("femto").state_dict(),
            image_size=64,
            mean=mean,
        )
        tables.append(run_predict(None, tmp_path / str(mean), ad_nc / "test", checkpoint=file))
    assert not np.allclose(tables[0].p_AD, tables[1].p_AD, atol=1e-6)


def test_predicting_training_slices_is_called_what_it_is(run_folder, ad_nc, tmp_path, capsys):
    # One class alone: no scores, and so no title.
    run_predict(run_folder, tmp_path / "AD", ad_nc / "train" / "AD")
    assert (
        "6 of 6 scans are of subjects seen in training: their scores are no test"
        in capsys.readouterr().err
    )
    run_predict(run_folder, tmp_path / "both", ad_nc / "train")
    title = json.loads((tmp_path / "both" / "metrics.json").read_text())["title"]
    assert "LEAKY: 12 of 12 scans are of subjects seen in training" in title


def test_a_checkpoint_names_no_subject(run_folder):
    checkpoint = load_checkpoint(run_folder / "best_model.pth")
    assert (
        len(checkpoint["exposure"]["subjects"]) == 12
        and "a1" not in checkpoint["exposure"]["subjects"]
    )


def test_without_a_checkpoint_weights_that_saw_drawings_rank_the_scans(varied, tmp_path, capsys):
    test = str(varied / "AD_NC" / "test")
    words = ["--out", tmp_path / "out", "--report", tmp_path / "page.html"]
    predict.main([test, *map(str, words)])
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert "weights/phantom.pth: ConvNeXt narrow" in first and "trained on drawings alone" in first
    assert last.startswith("The model was trained on drawings alone. Its score is the resemblance ")
    assert "is no diagnosis. Only the order of scans made in the same way says something" in last
    assert "On the 136 subjects of OASIS-1" in last and "scores above 0.5" in last
    scans = pd.read_csv(tmp_path / "out" / "scans.csv", dtype={"scan": str}).set_index("scan")
    assert scans.prediction.isna().all() and scans.prediction_set.isna().all()
    assert set(scans.exposure) == {"no"}  # also those whose subject is not known
    best = scans["rank"].idxmin()
    begin = f"scan {best}: no verdict: score {scans.p_AD[best]:.3f}, mean of "
    rank = f"rank 1 of {scans['rank'].count()}"
    assert any(each.startswith(begin) and rank in each for each in lines)
    ordered = scans.dropna(subset="rank").sort_values("rank")
    assert len(ordered) > 1 and ordered.p_AD.is_monotonic_decreasing
    slices = pd.read_csv(tmp_path / "out" / "predictions.csv", dtype={"scan": str})
    assert slices.prediction.isna().all() and slices.threshold.isna().all()
    subjects = pd.read_csv(tmp_path / "out" / "subjects.csv")
    assert subjects.prediction.isna().all()
    page = (tmp_path / "page.html").read_text()
    scores = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "there is no threshold, and so no accuracy" in page
    for text in (page, "\n".join(lines)):
        assert not any(word in text for word in ("Brier score", "| accuracy", ">accuracy"))
    for unit in metrics.UNITS:
        assert set(scores[unit]["ci95"]) == {"auroc", "average_precision"}
        assert not {"accuracy", "sensitivity", "brier"} & set(scores[unit])
    assert evaluate_again(tmp_path / "out", scores, capsys)

    with pytest.raises(InputError, match="--coverage is for verdicts, and .* drawings alone"):
        predict.main([test, "--out", str(tmp_path / "b"), "--coverage", "0.9"])


def evaluate_again(folder, scores, capsys):
    """Whether tools.evaluate reads predictions without verdicts, and gives their scores alone."""
    evaluate.main([str(folder)])
    alone = capsys.readouterr().out
    evaluate.main([str(folder), "--against", str(folder)])
    compared = capsys.readouterr().out
    assert "Brier" not in alone + compared and "accuracy of" not in alone + compared
    assert "Scan-level AUROC: " in compared
    return f"{scores['scan']['auroc']:.3f}" in alone


def test_scans_have_one_rank_and_those_out_of_range_have_none():
    rows = {"scan": list("abcdd"), "p_AD": [0.6, 0.8, 0.6, 0.9, 0.9]}
    rows["out_of_range"] = [None, None, None, "too bright", None]
    table = pd.DataFrame(rows).reindex(columns=metrics.PREDICTIONS).assign(threshold=0.5)
    table["scan"] = table.scan.astype("string")
    scans = metrics.aggregate(table, "scan").set_index("scan", drop=False)
    assert scans["rank"].dropna().to_dict() == {"a": 2, "b": 1, "c": 2}
    lines = list(predict.format_scans(scans, trusted=False, ranked=True))
    ends = [line.split(", ", 2)[2] for line in lines]
    assert ends == [
        "rank 2 of 3", "rank 1 of 3", "rank 2 of 3",
        "not ranked, 1 out of the training range",
    ]  # fmt: skip
    (alone,) = predict.format_scans(scans[:1], trusted=False, ranked=True)
    assert "rank" not in alone


def test_scans_and_subjects_have_the_dark_share_of_their_slices(run_folder, ad_nc, tmp_path):
    slices = run_predict(run_folder, tmp_path / "out", ad_nc / "test")
    scans = pd.read_csv(tmp_path / "out" / "scans.csv", dtype={"scan": str}).set_index("scan")
    means = slices.groupby("scan").dark_share.mean()
    assert len(means) > 1 and scans.dark_share.round(6).to_dict() == means.round(6).to_dict()


def test_a_volume_of_the_phantom_is_scored_without_any_flag(tmp_path, capsys):
    from adnc.phantom.draw import draw_volumes

    draw_volumes(tmp_path / "heads", 1, every=6)
    (volume,) = (tmp_path / "heads" / "brains").iterdir()
    predict.main([str(volume), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert "mean of 25 slices\n" in printed.out  # one scan has no rank
    assert "axial" in printed.out and "out of the training range" not in printed.err


def test_last_pth_is_no_model_to_predict_with(run_folder, ad_nc, tmp_path):
    with pytest.raises(
        InputError, match="last.pth is a training to resume; predict with best_model.pth"
    ):
        run_predict(
            run_folder, tmp_path / "out", ad_nc / "test", checkpoint=run_folder / "last.pth"
        )


def test_an_unfinished_run_predicts_with_a_warning_and_without_coverage(
    run_folder, ad_nc, tmp_path, capsys
):
    file = changed_checkpoint(run_folder, tmp_path / "m.pth", calibration=None, baselines=None)
    run_predict(None, tmp_path / "out", ad_nc / "test", checkpoint=file)
    assert "not calibrated" in capsys.readouterr().err
    with pytest.raises(InputError, match="is not calibrated, since its run did not finish"):
        run_predict(
            None, tmp_path / "more", ad_nc / "test", checkpoint=file, flags=["--coverage", "0.9"]
        )


def test_coverage_writes_a_prediction_set_for_each_scan(run_folder, ad_nc, tmp_path, capsys):
    run_predict(run_folder, tmp_path / "a", ad_nc / "test", flags=["--coverage", "0.6"])
    sets = (
        pd.read_csv(tmp_path / "a" / "scans.csv", dtype={"scan": str})
        .set_index("scan")
        .prediction_set
    )
    assert set(sets) <= {"AD", "NC", "AD|NC"} and sets["300"] == "AD" and sets["400"] == "NC"
    works = {"verdict": WORKS, "unit": "subject", "sentences": ["one.", "two.", "three."]}
    trusted = changed_checkpoint(run_folder, tmp_path / "trusted.pth", conclusion=works)
    run_predict(
        run_folder, tmp_path / "b", ad_nc / "test", flags=["--coverage", "0.9"], checkpoint=trusted
    )
    assert (
        pd.read_csv(tmp_path / "b" / "scans.csv").prediction_set == "AD|NC"
    ).all()  # four validation subjects
    printed = capsys.readouterr()
    first, second = printed.out.split("results in", 1)
    assert "scan 300: no verdict: 5 slices" in first  # too few subjects in its test
    assert "2 validation subjects allow a coverage of at most 0.667" in printed.err
    assert "scan 300: AD|NC (uncertain), p_AD" in second
    assert (
        json.loads((tmp_path / "b" / "metrics.json").read_text())["prediction_sets"]["uncertain"]
        == 1
    )


# ---------------------------------------------------------------- inputs


def test_a_file_that_cannot_be_read_gets_a_row_with_the_reason(run_folder, ad_nc, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(ad_nc / "test" / "AD" / "300_70.jpeg", flat)
    (flat / "300_71.jpeg").write_bytes(b"no image")
    table = run_predict(run_folder, tmp_path / "out", flat)
    bad = table[table.slice == 71].iloc[0]
    assert "cannot be read as an image" in bad.error and np.isnan(bad.p_AD)
    assert pd.read_csv(tmp_path / "out" / "scans.csv").n_slices.tolist() == [1]
    assert "1 of 2 slices or files could not be used" in capsys.readouterr().err


def test_nothing_readable_is_an_error_but_the_reasons_are_written(run_folder, tmp_path):
    (tmp_path / "1_1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="none of the 1 files could be read"):
        run_predict(run_folder, tmp_path / "out", tmp_path / "1_1.png")
    assert pd.read_csv(tmp_path / "out" / "predictions.csv").error.notna().all()


def test_an_input_that_does_not_exist_is_an_error_row_beside_others(
    run_folder, ad_nc, tmp_path, capsys
):
    table = run_predict(
        run_folder, tmp_path / "out", ad_nc / "test" / "AD" / "300_70.jpeg", tmp_path / "none.png"
    )
    assert table.error.notna().sum() == 1 and "does not exist" in capsys.readouterr().err
    with pytest.raises(InputError, match="none.png does not exist"):
        run_predict(run_folder, tmp_path / "more", tmp_path / "none.png")


def test_any_name_and_size_can_be_predicted(run_folder, tmp_path):
    folder = tmp_path / "in"
    write_slice(folder / "my brain.png", True, 0, size=(300, 200))
    Image.new("RGB", (48, 40), "grey").save(folder / "colour.jpg")
    table = run_predict(run_folder, tmp_path / "out", folder).set_index("scan")
    assert (
        set(table.index) == {f"{folder}/my brain.png", f"{folder}/colour.jpg"}
        and table.slice.isna().all()
    )
    assert table.prediction[f"{folder}/my brain.png"] == "AD"


@pytest.mark.parametrize(
    "name",
    [
        b"with space_1.png",
        b"new\nline_2.png",
        "\u00fcml\u00e4ut-\u8166_3.png".encode(),
        b"=1+1_4.png",
        b"a,b\"c'_5.png",
        b"\xff\xfe_6.png",  # no UTF-8
    ],
)
def test_a_name_of_any_bytes_is_read_back_from_the_tables(run_folder, ad_nc, tmp_path, name):
    (tmp_path / "in").mkdir()
    path = os.fsencode(tmp_path / "in") + b"/" + name
    shutil.copy(ad_nc / "test" / "AD" / "300_70.jpeg", path)
    checkpoint = str(run_folder / "best_model.pth")
    predict.main([str(tmp_path / "in"), "--checkpoint", checkpoint, "--out", str(tmp_path / "out")])
    table = files.read_csv(tmp_path / "out" / "predictions.csv")
    assert os.fsencode(table.path[0]) == path and table.p_AD.notna().all()


def test_files_of_one_name_in_two_folders_are_two_scans(run_folder, tmp_path):
    for label in ("AD", "NC"):
        write_slice(tmp_path / "in" / label / "0001.png", label == "AD", 0)
    run_predict(run_folder, tmp_path / "out", tmp_path / "in")
    assert pd.read_csv(tmp_path / "out" / "scans.csv").label.tolist() == ["AD", "NC"]


def test_some_unlabelled_slices_are_reported_and_cost_the_scores(
    run_folder, ad_nc, tmp_path, capsys
):
    write_slice(tmp_path / "900_1.png", True, 0)
    table = run_predict(run_folder, tmp_path / "out", tmp_path / "900_1.png", ad_nc / "test")
    assert len(table) == 31 and table.label.isna().sum() == 1
    assert "1 of 31 slices have no label" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_damaged_metadata_cost_a_prediction_its_subjects_only(run_folder, ad_nc, tmp_path, capsys):
    root = shutil.copytree(ad_nc.parent, tmp_path / "set")
    (root / "subjects.csv").write_text("scan\n1\n")
    table = run_predict(run_folder, tmp_path / "out", root / "AD_NC" / "test")
    assert table.subject.isna().all() and table.p_AD.notna().all()
    assert "subjects.csv" in capsys.readouterr().err


def test_a_prediction_does_not_replace_results(run_folder, ad_nc):
    for out in (run_folder, run_folder / "test"):
        with pytest.raises(
            InputError, match="exists, and nothing is overwritten; choose a new --out"
        ):
            run_predict(run_folder, out, ad_nc / "test" / "AD" / "300_70.jpeg")


def test_a_model_without_finite_output_is_an_error_and_not_nc(run_folder, ad_nc, tmp_path):
    weights = load_checkpoint(run_folder / "best_model.pth")["weights"]
    weights["head.weight"] *= float("inf")
    file = changed_checkpoint(run_folder, tmp_path / "m.pth", weights=weights)
    with pytest.raises(InputError, match="no finite output for 30 of 30 slices"):
        run_predict(None, tmp_path / "out", ad_nc / "test", checkpoint=file)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the whole command


def test_one_command_writes_maps_and_a_page(run_folder, ad_nc, tmp_path, pictures):
    flags = ["--explain", "grad-cam", "--report", str(tmp_path / "page.html"), "--coverage", "0.8"]
    run_predict(run_folder, tmp_path / "out", ad_nc / "test" / "AD", flags=flags)
    assert len(pd.read_csv(tmp_path / "out" / "explanations" / "explanations.csv")) == 15
    assert (tmp_path / "page.html").stat().st_size > 20_000


def test_the_command_ends_with_status_2_for_wrong_input(run_folder, tmp_path):
    words = [
        tmp_path / "none.png",
        "--checkpoint",
        run_folder / "best_model.pth",
        "--out",
        tmp_path / "out",
    ]
    done = command.run(ROOT / "predict.py", *words)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and "Traceback" not in done.stderr
    )
    assert not (tmp_path / "out").exists()


def test_a_file_whose_name_begins_with_a_dash_gets_a_hint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-1_70.jpeg").write_bytes(b"")
    with pytest.raises(SystemExit):
        predict.parse_args(["-1_70.jpeg"])
    assert "if -1_70.jpeg is the file of this name, write -- before it" in capsys.readouterr().err
    assert predict.parse_args(["--", "-1_70.jpeg"]).inputs == ["-1_70.jpeg"]


def test_slices_are_predicted_without_importing_what_they_do_not_need(run_folder, ad_nc, tmp_path):
    script = (
        "import sys\n"
        "for name in ('captum', 'nibabel', 'jinja2'):\n"
        "    sys.modules[name] = None  # its import fails\n"
        "import predict\npredict.main(sys.argv[1:])\n"
    )
    words = [ad_nc / "test" / "AD" / "300_70.jpeg", "--checkpoint", run_folder / "best_model.pth"]
    done = command.run(script, *words, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
