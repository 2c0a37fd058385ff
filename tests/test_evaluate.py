import json
import os
import re
import shutil

import command
import pandas as pd
import pytest
from conftest import SCANS, train_small, write_set, write_slice

import dataset
from tools import evaluate
from adnc.phantom import draw as phantom
import predict


def run_evaluate(capsys, *words):
    """Evaluate in this process; returns what it prints."""
    evaluate.main(evaluate.parse_args([*map(str, words)]))
    return capsys.readouterr().out


@pytest.fixture(scope="session")
def folds(ad_nc, tmp_path_factory):
    """A cross-validation of three folds, one epoch each."""
    root = tmp_path_factory.mktemp("folds")
    return [train_small(ad_nc, root / f"fold{k}", "--epochs", "1", "--fold", str(k), "--folds", "3") for k in range(3)]


def test_a_run_evaluated_again_gives_the_scores_that_it_wrote(run_folder, tmp_path, capsys, pictures):
    text = run_evaluate(capsys, run_folder, "--out", tmp_path)
    a, b = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path, run_folder / "test"))
    for name in ("scan", "slice", "subject", "baselines", "minus_baseline", "prediction_sets"):
        assert a[name] == b[name]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (run_folder / "test").iterdir()}
    for word in ("slices (n = 30)", "scans (n = 6)", "average precision", "logistic regression", "mean logit"):
        assert word in text
    text = run_evaluate(capsys, run_folder, "--part", "val")
    assert "scans (n = 2)" in text and text.startswith("validation (epoch and calibration were chosen on it)")


def test_pooled_folds_count_every_training_scan_once(folds, tmp_path, capsys):
    text = run_evaluate(capsys, *folds, "--out", tmp_path)
    scans = pd.read_csv(tmp_path / "scans.csv", dtype={"scan": str})
    assert sorted(scans.scan) == sorted([*map(str, range(100, 106)), *map(str, range(200, 206))])
    assert "subjects (n = 12)" in text and "warning" not in text and "scan-level accuracy of each run" in text
    assert (scans.exposure == "no").all()
    assert run_evaluate(capsys, *folds[:2]).startswith("warning: of 3 folds, 2 are missing")


def test_runs_that_share_scans_cannot_be_pooled(run_folder, folds, capsys):
    with pytest.raises(ValueError, match="scan 300 is in .* expected the folds of one cross-validation"):
        run_evaluate(capsys, run_folder, run_folder)


def test_two_models_are_compared_on_the_same_slices(folds, ad_nc, tmp_path, capsys):
    others = [train_small(ad_nc, tmp_path / f"o{k}", "--epochs", "1", "--fold", str(k), "--folds", "3", "--lr", "1e-9")
              for k in range(3)]  # fmt: skip
    text = run_evaluate(capsys, *folds, "--against", *others, "--out", tmp_path / "out")
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    a, b = ([json.loads((run / "test" / "metrics.json").read_text()) for run in runs] for runs in (folds, others))
    mean = [sum(x["slice"]["accuracy"] * x["slice"]["n"] for x in runs) / 60 for runs in (a, b)]
    assert comparison["slice"]["accuracy"]["difference"] == pytest.approx(mean[0] - mean[1])
    assert "the first is better" in text or "may be noise" in text
    with pytest.raises(ValueError, match="slices are in one of the two only"):
        run_evaluate(capsys, *folds, "--against", *others[:2])


@pytest.fixture(scope="session")
def sizes(ad_nc, tmp_path_factory):
    """Runs of two seeds on six and on all twelve subjects."""
    root = tmp_path_factory.mktemp("sizes")
    return [train_small(ad_nc, root / f"n{n}-s{seed}", "--epochs", "2", "--subjects", n, "--seed", seed)
            for n in ("6", "12") for seed in ("0", "1")]  # fmt: skip


def test_scores_of_two_seeds_are_averaged_and_paired(sizes, tmp_path, capsys):
    few, many = sizes[:2], sizes[2:]
    text = run_evaluate(capsys, *few, "--against", *many)
    for words in ("logistic regression on a blur", "mean over 2 seeds", "mean over 2 and 2 seeds"):
        assert words in text and "warning" not in text
    brier = [json.loads((run / "test" / "metrics.json").read_text())["subject"]["brier"] for run in sizes]
    few_brier, many_brier = sum(brier[:2]) / 2, sum(brier[2:]) / 2
    row = next(line for line in text.splitlines() if line.startswith("| Brier"))
    assert f"{few_brier:.3f} [" in row
    row = next(line for line in text.splitlines() if line.startswith("| Brier score (lower"))
    assert f"{few_brier - many_brier:+.3f} [" in row
    with pytest.raises(ValueError, match="--out takes runs of one seed"):
        run_evaluate(capsys, *few, "--out", tmp_path / "out")


def test_a_curve_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.parse_args(["run", "--curve", str(tmp_path / "none" / "curve.png")])
    assert end.value.code == 2 and "there is no folder" in capsys.readouterr().err
    (tmp_path / "mine.png").write_text("precious")
    for script, flag in ((evaluate, "--curve"), (dataset, "--mean"), (dataset, "--montage"), (phantom, "--sheet")):
        for name, said in (("mine.png", "nothing is overwritten"), ("mine.csv", "does not end in .png")):
            with pytest.raises(SystemExit):
                script.parse_args(["run", flag, str(tmp_path / name)])
            assert said in capsys.readouterr().err


def test_a_learning_curve_has_a_row_a_size_with_the_baseline_beside_it(sizes, tmp_path, capsys, pictures):
    text = run_evaluate(capsys, *sizes, "--curve", tmp_path / "curve.png")
    header, _, six, twelve = [line for line in text.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in header.split("|")[1:-1]] == ["training subjects", "ConvNeXt atto",
                                                                 "logistic regression on a blur"]  # fmt: skip
    assert six.startswith("| 6 ") and twelve.startswith("| 12 ") and six.count("[") == 2
    assert (tmp_path / "curve.png").stat().st_size > 5000 and "warning" not in text and "LEAKY" not in text


def test_what_is_averaged_must_fit_and_leaks_are_named(sizes, ad_nc, tmp_path, capsys):
    flags = ["--epochs", "2", "--seed", "1", "--lr", "1e-3", "--split-by", "slice"]
    other = train_small(ad_nc, tmp_path / "other", *flags)
    for words in ([sizes[2], other], [*sizes[:3], other, "--curve", tmp_path / "curve.png"]):
        text = run_evaluate(capsys, *words)
        assert "warning: the runs differ in --lr, --split-by" in text and "LEAKY: of a run split by slice" in text
    with pytest.raises(ValueError, match="which share none, or runs of other seeds"):
        run_evaluate(capsys, sizes[0], sizes[0], "--curve", tmp_path / "again.png")
    with pytest.raises(ValueError, match="which share none, or runs of other seeds"):
        # No second seed, but the same run once more.
        run_evaluate(capsys, sizes[0], sizes[0] / "test")


def test_each_severity_is_scored_against_all_controls(sizes, tmp_path, capsys):
    table = pd.read_csv(sizes[0] / "test" / "subjects.csv")
    grade = {subject: grade for subject, grade in zip(table.subject[table.label == "AD"], ("mild", "mild", "severe"))}
    lines = ["subject,grade", *(f"{subject},{grade.get(subject, 'none')}" for subject in table.subject)]
    (tmp_path / "grades.csv").write_text("\n".join(lines) + "\n")
    text = run_evaluate(capsys, *sizes[:2], "--by", tmp_path / "grades.csv", "grade")
    rows = [line for line in text.splitlines() if line.startswith(("| mild", "| severe", "| none"))]
    # Two and one AD beside three NC.
    assert [row.split("|")[2].strip() for row in rows] == ["5", "4"]
    (tmp_path / "grades.csv").write_text("\n".join(lines[:-1]).replace("severe", "") + "\n")
    assert "1 AD scans are in no row" in run_evaluate(capsys, sizes[0], "--by", tmp_path / "grades.csv", "grade")
    # A spreadsheet's.
    (tmp_path / "grades.csv").write_text("\n".join(lines).replace("severe", "NA").replace(",", ";"))
    text = run_evaluate(capsys, sizes[0], "--by", tmp_path / "grades.csv", "Grade")
    assert "1 AD scans are in no row" in text and "| NA" not in text
    (tmp_path / "grades.csv").write_text("\n".join([*lines, f"{next(iter(grade))},severe"]))
    with pytest.raises(ValueError, match="gives subject .* two values of grade"):
        run_evaluate(capsys, sizes[0], "--by", tmp_path / "grades.csv", "grade")
    for rows in ("", "a,NA\n"):
        (tmp_path / "grades.csv").write_text("subject,grade\n" + rows)
        with pytest.raises(ValueError, match="its subject is such as missing"):
            run_evaluate(capsys, sizes[0], "--by", tmp_path / "grades.csv", "grade")
    (tmp_path / "grades.csv").write_text("subject,grade\nelse,1\n")
    with pytest.raises(ValueError, match="knows grade of none of the AD scans; its subject is such as else"):
        run_evaluate(capsys, sizes[0], "--by", tmp_path / "grades.csv", "grade")
    with pytest.raises(ValueError, match="has the columns subject, grade; expected cdr"):
        run_evaluate(capsys, sizes[0], "--by", tmp_path / "grades.csv", "cdr")


def test_a_comparison_names_the_leaks_of_both_sides(tmp_path, capsys):
    root = write_set(tmp_path, SCANS | {"300": ("test", "AD", "a0"), "400": ("test", "NC", "n1")})
    clean = train_small(root, tmp_path / "clean", "--epochs", "1", "--drop-test-subjects")
    leaky = train_small(root, tmp_path / "leaky", "--epochs", "1", "--split-by", "slice")
    text = run_evaluate(capsys, clean, "--against", leaky, "--out", tmp_path / "out")
    title = "second LEAKY: of a run split by slice, 2 of 6 scans are of subjects seen in training"
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert title in text and title in comparison["title"] and "first LEAKY" not in text
    assert "the same, only subjects that neither has seen in training" in text
    assert comparison["scan"]["groups"] == 6 and comparison["unseen_subjects"]["scan"]["groups"] == 4
    assert "6 subjects are too few for a verdict" in text


def test_resamples_are_pairs_also_where_one_side_does_not_know_the_subjects(run_folder, ad_nc, tmp_path, capsys):
    shutil.copytree(ad_nc / "test", tmp_path / "elsewhere")
    for name, folder in (("known", ad_nc / "test"), ("unknown", tmp_path / "elsewhere")):
        words = ["--checkpoint", str(run_folder / "best_model.pth"), "--out", str(tmp_path / name)]
        predict.main(predict.parse_args([str(folder), *words]))
    for one, other in (("known", "unknown"), ("unknown", "known")):
        run_evaluate(capsys, tmp_path / one, "--against", tmp_path / other, "--out", tmp_path / f"out {one}")
        comparison = json.loads((tmp_path / f"out {one}" / "comparison.json").read_text())
        assert comparison["subject"]["brier"]["ci95"] == comparison["scan"]["accuracy"]["ci95"] == [0, 0]


@pytest.mark.parametrize("file, text", [
    ("metrics.json", "[]"), ("metrics.json", "{}"), ("metrics.json", "{"), ("predictions.csv", "scan,slice\n1,2\n"),
    ("predictions.csv", ""), ("predictions.csv", 10), ("metrics.json", ('"n": 30', '"n": 31')),
    ("predictions.csv", (",NC,", ",AD,")),
    ("predictions.csv", (",tn0,NC,", ",tn0,XX,")), ("predictions.csv", (",tn0,NC,", ",tn0,,")),
    ("predictions.csv", (",NC,no,,,tn0,", ",AD,no,,,tn0,")), ("predictions.csv", (",no,,,tn0,", ",no,,,,")),
    # Of one slice.
    ("predictions.csv", (",threshold", ",cut")), ("predictions.csv", (",tn0,NC,", ",tn0,AD,", 1)),
    ("predictions.csv", (",NC,no,,,tn0,", ",NC,maybe,,,tn0,")), ("predictions.csv", ("AD|NC", "both")),
])  # fmt: skip
def test_a_damaged_folder_is_one_sentence(run_folder, tmp_path, capsys, file, text):
    shutil.copytree(run_folder / "test", tmp_path / "x")
    path = tmp_path / "x" / file
    whole = path.read_text()
    if isinstance(text, int):  # cut off after some lines
        text = "".join(whole.splitlines(keepends=True)[:text])
    path.write_text(whole.replace(*text) if isinstance(text, tuple) else text)
    for flags in ([], ["--each"]):
        with pytest.raises(ValueError, match="x cannot be read .* expected what train.py or predict.py wrote"):
            run_evaluate(capsys, tmp_path / "x", *flags)


@pytest.mark.parametrize("name", ["metrics.json", "predictions.csv"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(run_folder, tmp_path, capsys, name):
    folder = shutil.copytree(run_folder / "test", tmp_path / "x")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match="it is a folder or a pipe"):
        run_evaluate(capsys, folder)


def test_results_are_not_written_over_those_of_the_run(run_folder, capsys):
    for out in (run_folder, run_folder / "test"):
        with pytest.raises(ValueError, match="is not empty, and nothing is overwritten"):
            run_evaluate(capsys, run_folder, "--out", out)


def test_runs_with_other_flags_are_named_when_they_are_pooled(folds, ad_nc, tmp_path, capsys):
    other = train_small(ad_nc, tmp_path / "o", "--epochs", "1", "--fold", "2", "--folds", "3", "--lr", "1e-9")
    assert "warning: the runs differ in --lr" in run_evaluate(capsys, *folds[:2], other)


def test_what_predict_wrote_can_be_evaluated_with_its_leaks(run_folder, ad_nc, tmp_path, capsys):
    words = [str(ad_nc / "train"), "--checkpoint", str(run_folder / "best_model.pth"), "--out", str(tmp_path)]
    predict.main(predict.parse_args(words))
    assert "LEAKY: 12 of 12 scans" in run_evaluate(capsys, tmp_path)


def test_any_name_of_a_scan_survives_the_files(run_folder, tmp_path, capsys):
    names = ["007_1.png", "NA_1.png", "null_3.png", "=1+1_1.png", 'my brain, "left".png']
    for i, name in enumerate(names):
        for label in ("AD", "NC"):
            write_slice(tmp_path / "in" / label / name.replace("_", f"{label}_" if i else "_"), label == "AD", i)
    (tmp_path / "in" / "NC" / "007_1.png").rename(tmp_path / "in" / "NC" / "NA_9.png")
    (tmp_path / "in" / "AD" / "NAAD_1.png").write_bytes(b"no image")
    words = [str(tmp_path / "in"), "--checkpoint", str(run_folder / "best_model.pth"), "--out", str(tmp_path / "out")]
    predict.main(predict.parse_args(words))
    capsys.readouterr()
    text = run_evaluate(capsys, tmp_path / "out", "--against", tmp_path / "out", "--out", tmp_path / "again")
    assert "scans (n = 9)" in text
    a, b = ((tmp_path / name / "scans.csv").read_text() for name in ("out", "again"))
    assert a == b and "\n007," in a and "\nNA," in a


def test_a_leaky_run_stays_leaky_when_it_is_evaluated(ad_nc, tmp_path, capsys):
    run = train_small(ad_nc, tmp_path / "run", "--epochs", "1", "--split-by", "slice")
    assert "LEAKY: of a run split by slice" in run_evaluate(capsys, run)
    assert "LEAKY: split by slice, its scans were trained on" in run_evaluate(capsys, run, "--part", "val")
    assert "val, LEAKY" in run_evaluate(capsys, run, "--each")


def test_each_marks_what_could_not_be_checked(tmp_path, capsys):
    run = train_small(write_set(tmp_path, subjects=False), tmp_path / "run", "--epochs", "1")
    assert "test, NOT CHECKED" in run_evaluate(capsys, run, "--each")


def test_each_lists_runs_as_they_wrote_themselves(run_folder, folds, capsys):
    lines = run_evaluate(capsys, run_folder, *folds, "--each").splitlines()
    assert len(lines) == 2 + 4 * 2 * 3 and all(line.startswith("| ") for line in lines)
    assert re.match(r"\| run +\| test +\| slice +\| 30 +\| 1.000 \[1.000, 1.000\] \|", lines[5])


def test_each_tells_runs_of_equal_names_apart(run_folder, tmp_path, capsys, monkeypatch):
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        (tmp_path / parent / "fold0").symlink_to(run_folder)
    monkeypatch.chdir(tmp_path)
    lines = run_evaluate(capsys, "a/fold0", "b/fold0", "--each").splitlines()
    assert {line.split()[1] for line in lines[2:]} == {"a/fold0", "b/fold0"}


def test_the_threshold_of_youden_goes_through_to_all_tables(ad_nc, tmp_path, capsys):
    run = train_small(ad_nc, tmp_path / "run", "--epochs", "1", "--lr", "1e-9", "--threshold", "youden")
    calibration = json.loads((run / "test" / "metrics.json").read_text())["calibration"]
    threshold = calibration["threshold"]
    assert calibration["threshold_rule"] == "youden" and threshold != 0.5
    for name in ("predictions", "scans", "subjects"):
        table = pd.read_csv(run / "test" / f"{name}.csv")
        assert ((table.prediction == "AD") == (table.p_AD >= threshold)).all()
    capsys.readouterr()
    # Predictions follow from p_AD, or it is an error.
    one = run_evaluate(capsys, run, "--out", tmp_path / "again")
    two = run_evaluate(capsys, tmp_path / "again")
    assert one.splitlines()[1:12] == two.splitlines()[1:12]


@pytest.mark.parametrize("flags, sentence", [
    (["nowhere"], "nowhere holds no predictions with scores; expected a finished run"),
    (["x", "--each", "--out", "y"], "it does not go with --against or --out"),
])  # fmt: skip
def test_wrong_input_is_one_error(flags, sentence):
    done = command.run("evaluate.py", *flags)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1
