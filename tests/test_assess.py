"""Scores of a set of predictions: titles, verdicts, files, and what is read back."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
from fake_predictions import complete, random_predictions, without_subjects, write_run
from PIL import Image

from adnc.errors import InputError
from adnc.scoring import assess, metrics
from adnc.scoring.assess import ONE_CLASS, format_assessment, read_run, score, write_results


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run", random_predictions())


@pytest.fixture
def results(finished, tmp_path):
    """A folder of results on 30 subjects, which a test may change."""
    return shutil.copytree(finished / "test", tmp_path / "results")


# ---------------------------------------------------------------- scores and titles


def test_a_split_by_slice_and_an_unknown_init_are_stated():
    checkpoint = {"split_by": "subject", "init": None, "test_read_after": [], "exposure": {}}
    assert assess.statements(checkpoint) == {"leaks": [], "notes": []}
    init = {"file": "other.pth", "exposure": None}
    changes = {"split_by": "slice", "init": init, "test_read_after": [3]}
    stated = assess.statements({**checkpoint, **changes})
    assert stated["leaks"] == ["trained with --split-by slice"]
    note = "starts from other.pth, which does not record its training subjects"
    read = "test was read before, after epoch 3, and the run then trained on"
    assert stated["notes"] == [read, note]


def test_the_title_names_leaks_unknown_exposure_and_slices_out_of_range():
    table = random_predictions()
    seen = table.subject.isin(["p0", "p1"]).to_numpy(bool)
    unknown = (table.subject == "p2").to_numpy(bool)
    table["exposure"] = np.select([seen, unknown], ["yes", "unknown"], "no")
    table["out_of_range"] = np.where(table.index < 3, "too dark", None)
    scores = score(complete(table), "test", leaks=["trained with --split-by slice"], coverage=0.9)

    n_scans = table.scan.nunique()
    n_seen, n_unknown = table.scan[seen].nunique(), table.scan[unknown].nunique()
    assert scores["title"] == "; ".join(
        [
            f"test; LEAKY: trained with --split-by slice, {n_seen} of {n_scans} scans are of "
            "subjects seen in training",
            f"for {n_unknown} scans it is unknown whether training saw the subject",
            f"3 of {len(table)} slices are out of the training range",
        ]
    )
    assert scores["run_leaks"] == ["trained with --split-by slice"] and scores["run_notes"] == []


def test_subjects_not_seen_in_training_are_also_scored_apart():
    table = random_predictions()
    table["exposure"] = np.where(table.subject < "p2", "yes", "no")
    scores = score(complete(table), "test", coverage=0.9)
    unseen = score(complete(table[table.exposure == "no"]), "test", coverage=0.9)
    assert "unseen_subjects" not in unseen
    for name in (*metrics.UNITS, "baselines", "minus_baseline", "prediction_sets"):
        assert scores["unseen_subjects"][name] == unseen[name]
    text = "\n".join(assess.format_assessment(scores))
    assert "LEAKY" in text and "only subjects not seen in training" in text


def test_the_model_beats_a_baseline_if_the_whole_interval_of_the_difference_is_above_zero():
    scores = score(complete(random_predictions(60)), "test", coverage=0.9)
    *_, sentence = assess.format_baselines(scores)
    beaten, _, not_beaten = sentence.partition("the model is NOT shown to beat: ")
    for name, label in metrics.BASELINES.items():
        low, _ = scores["minus_baseline"][name]["scan"]["accuracy"]["ci95"]
        assert (label in beaten) == (low > 0) and (label in not_beaten) == (low <= 0)
    assert "majority class" in beaten


def test_too_few_subjects_get_no_verdict():
    scores = score(complete(random_predictions(9)), "test", coverage=0.9)
    *_, sentence = assess.format_baselines(scores)
    assert sentence == "9 subjects are too few for a verdict; 10 are needed."


def test_without_subjects_the_scores_say_so():
    table = without_subjects(random_predictions())
    lines = assess.format_assessment(score(complete(table), "test", coverage=0.9))
    assert "subject-level: subjects unknown" in lines


# ---------------------------------------------------------------- the conclusion


def conclude(table, **changes):
    """The conclusion on predictions with some columns replaced."""
    return score(complete(table).assign(**changes), "test", coverage=0.9)["conclusion"]


def test_a_good_model_is_shown_to_beat_guessing_and_the_last_three_lines_say_so():
    table = random_predictions(80)
    scores = score(complete(table), "test", coverage=0.9)
    conclusion = scores["conclusion"]
    assert (conclusion["verdict"], conclusion["unit"]) == (assess.WORKS, "subject")
    assert assess.format_assessment(scores)[-3:] == conclusion["sentences"]
    auroc = assess.cell(scores["subject"], "auroc")
    assert conclusion["sentences"][0].startswith(
        f"On the 80 subjects not seen in training: AUROC {auroc}, accuracy "
    )
    assert "shown to beat guessing" in conclusion["sentences"][1]


@pytest.mark.parametrize("logit", [
    lambda table: np.zeros(len(table)),
    lambda table: np.random.default_rng(0).normal(size=len(table)),
    lambda table: np.full(len(table), 50.0),
])  # fmt: skip
def test_a_useless_model_is_not_shown_to_work(logit):
    table = random_predictions(80)
    conclusion = conclude(table.assign(logit=logit(table)))
    assert conclusion["verdict"] == assess.NOT_SHOWN
    assert "NOT shown to beat guessing" in conclusion["sentences"][1]
    assert "Do not use its predictions" in conclusion["sentences"][2]


def test_swapped_classes_end_in_a_question():
    table = random_predictions(80)
    table["label"] = np.where(table.label == "AD", "NC", "AD")
    conclusion = conclude(table)
    assert conclusion["verdict"] == assess.SWAPPED
    assert "That is WORSE THAN CHANCE: are AD and NC swapped" in conclusion["sentences"][1]
    few = table[table.subject.isin([f"p{i}" for i in range(8)])]
    for changed in (conclude(few), conclude(table, exposure="yes")):
        assert changed["verdict"] == assess.SWAPPED


def test_a_baseline_that_is_worse_than_chance_asks_whether_the_classes_are_swapped():
    table = random_predictions(80)
    wrong = np.where(table.label == "AD", 0.1, 0.9)
    useless = conclude(table, p_AD=0.5, logistic_regression=wrong)
    assert useless["verdict"] == assess.SWAPPED
    assert useless["sentences"][1].startswith("The logistic regression, AUROC 0.000 [0.000, 0.")
    works = conclude(table, logistic_regression=wrong)  # the model has learned the classes of test
    assert works["verdict"] == assess.WORKS


def test_a_model_that_ranks_well_and_calls_all_scans_alike_hears_what_is_wrong():
    table = complete(random_predictions(80))
    low = metrics.with_predictions(table.assign(p_AD=table.p_AD / 3))
    conclusion = score(low, "test", coverage=0.9)["conclusion"]
    assert conclusion["verdict"] == assess.NOT_SHOWN
    assert "It ranks the subjects better than chance" in conclusion["sentences"][1]
    assert "--threshold youden" in conclusion["sentences"][2]


def test_subjects_of_training_are_no_test_and_few_subjects_no_verdict():
    table = random_predictions(40)
    assert conclude(table, exposure="yes")["verdict"] == assess.NO_TEST
    assert conclude(random_predictions(9))["verdict"] == assess.TOO_FEW
    one_class = random_predictions(40).query("label == 'AD'")
    assert conclude(one_class)["verdict"] == assess.TOO_FEW
    unknown = conclude(table, exposure="unknown")
    assert "unknown whether training saw them" in unknown["sentences"][0]
    some = np.where(table.subject < "p2", "unknown", "no")
    assert "not seen in training" not in conclude(table, exposure=some)["sentences"][0]


def test_subjects_not_seen_in_training_are_printed_first_and_decide():
    table = complete(random_predictions(80))
    seen = table.subject.isin([f"p{i}" for i in range(20)])
    scores = score(table.assign(exposure=np.where(seen, "yes", "no")), "test", coverage=0.9)
    assert scores["exposure"]["yes"] and scores["exposure"]["no"]
    assert assess.format_assessment(scores)[0] == "only subjects not seen in training"
    assert scores["conclusion"]["sentences"][0].startswith("On the 60 subjects not seen")


def test_what_the_network_knows_beyond_the_dark_share_is_a_paired_interval():
    table = complete(random_predictions(80))
    same = score(table.assign(with_dark_share=table.dark_share), "test", coverage=0.9)
    beyond = same["beyond_dark_share"]["both_minus"]["subject"]["auroc"]
    assert beyond["difference"] == 0 and not assess.knows_more(same, "subject")
    assert "take that number" in same["conclusion"]["sentences"][2]
    noise = np.random.default_rng(0).uniform(size=len(table))
    more = score(table.assign(dark_share=noise), "test", coverage=0.9)
    assert assess.knows_more(more, "subject")
    # A bad fit of both together does not hide a network that is better alone.
    alone = score(table.assign(dark_share=noise, with_dark_share=noise), "test", coverage=0.9)
    assert assess.knows_more(alone, "subject")
    assert "it does." in "\n".join(assess.format_beyond(more))
    assert "that is not shown." in "\n".join(assess.format_beyond(same))


# ---------------------------------------------------------------- cells


def test_cells_show_the_interval_or_that_a_score_is_undefined():
    part = {"auroc": 0.75, "f1": None, "ci95": {"auroc": [0.5, 1], "f1": None}}
    assert assess.cell(part, "auroc") == "0.750 [0.500, 1.000]"
    assert assess.cell(part, "f1") == assess.cell(None, "f1") == "undefined"
    assert assess.cell({"auroc": 0.75, "ci95": {"auroc": None}}, "auroc") == "0.750"


# ---------------------------------------------------------------- files


def test_results_are_tables_scores_and_pictures(run_folder):
    folder = run_folder / "test"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "predictions.csv", "scans.csv", "subjects.csv", "metrics.json", "confusion_matrix.png",
        "roc_curve.png", "calibration.png", "risk_coverage.png", "window_accuracy.png",
    }  # fmt: skip
    for path in folder.glob("*.png"):
        assert np.asarray(Image.open(path).convert("L")).std() > 5


def test_tables_always_have_the_same_columns(results):
    for name, columns in (
        ("predictions", metrics.PREDICTIONS),
        ("scans", (*metrics.AGGREGATED, *metrics.SPREAD)),
        ("subjects", metrics.AGGREGATED[1:]),
    ):
        assert list(pd.read_csv(results / f"{name}.csv").columns) == list(columns)


def test_a_model_is_not_compared_with_baselines_on_one_class(tmp_path):
    table = complete(random_predictions(60))
    table = table[table.label == "AD"]
    scores = write_results(table, tmp_path / "out", title="test", coverage=0.9)
    lines = "\n".join(format_assessment(scores))
    assert ONE_CLASS in lines and "the model beats" not in lines and "NOT shown" not in lines


def test_predictions_without_every_label_get_tables_and_no_scores(tmp_path):
    table = complete(random_predictions())
    table.loc[3, "label"] = pd.NA
    assert write_results(table, tmp_path / "out", title="test") is None
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"predictions.csv", "scans.csv", "subjects.csv"}


def test_scores_computed_from_the_files_equal_those_in_metrics_json(results, tmp_path):
    predictions, scores = read_run(results)
    write_results(predictions, tmp_path / "again", title="test", coverage=0.9)
    assert json.loads((tmp_path / "again" / "metrics.json").read_text()) == scores
    for name in ("predictions", "scans", "subjects"):
        again = (tmp_path / "again" / f"{name}.csv").read_text()
        assert again == (results / f"{name}.csv").read_text()


def test_metrics_json_records_the_calibration_without_its_scores(tmp_path):
    calibration = {
        "temperature": 1.5, "threshold": 0.4, "threshold_rule": "youden", "groups": 9,
        "scores": [0.1], "weights": [1.0],
    }  # fmt: skip
    table = complete(random_predictions())
    scores = write_results(table, tmp_path / "out", title="test", calibration=calibration)
    recorded = ("temperature", "threshold", "threshold_rule", "groups")
    assert scores["calibration"] == {name: calibration[name] for name in recorded}


def test_metrics_json_of_an_interrupted_run_does_not_stay_beside_new_tables(results):
    table = complete(random_predictions())
    table.loc[0, "label"] = pd.NA
    write_results(table, results, title="test")
    assert not (results / "metrics.json").exists()


# ---------------------------------------------------------------- reading results


def test_files_that_could_not_be_read_take_no_part_in_scores(tmp_path):
    table = complete(random_predictions())
    unread = table.index < 5
    table.loc[unread, ["logit", "p_AD"]] = math.nan
    table.loc[unread, ["prediction", "prediction_set"]] = pd.NA
    table.loc[unread, "error"] = "cannot be decoded"
    write_results(table, tmp_path, title="test", coverage=0.9)
    predictions, scores = read_run(tmp_path)
    assert len(predictions) == scores["slice"]["n"] == len(table) - 5


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", '{"what": "test"}'])
def test_a_damaged_metrics_json_is_refused(results, content):
    (results / "metrics.json").write_text(content)
    with pytest.raises(InputError, match="cannot be read"):
        read_run(results)


def forget_fingerprint(folder):
    """metrics.json as an earlier version wrote it."""
    path = folder / "metrics.json"
    scores = json.loads(path.read_text())
    del scores["predictions_sha256"]
    path.write_text(json.dumps(scores))


@pytest.mark.parametrize("content", ["", "scan,slice\n1,2\n", "scan,slice\n1,2,3,4\n"])
def test_a_damaged_predictions_csv_is_refused(results, content):
    (results / "predictions.csv").write_text(content)
    with pytest.raises(InputError, match="predictions.csv was changed after its scores"):
        read_run(results)
    forget_fingerprint(results)
    with pytest.raises(InputError, match="cannot be read"):
        read_run(results)


# (rows to edit, column, new value)
EDITS = [
    (slice(None), "label", "AD"),
    (slice(None), "exposure", "yes"),
    (slice(None), "prediction_set", "AD"),
    (slice(None), "threshold", "0.9"),
    (slice(None), "group", "p9"),
    (0, "label", None),
    (0, "subject", None),
    (0, "p_AD", "0.999"),
    (0, "logit", "inf"),
    (0, "dark_share", "0.5"),
]


@pytest.mark.parametrize("rows, column, value", EDITS)
def test_edited_predictions_are_refused(results, rows, column, value):
    path = results / "predictions.csv"
    table = pd.read_csv(path, dtype=str)
    table.to_csv(path, index=False)
    read_run(results)  # it is the edit that is refused, not the writing
    table.loc[rows, column] = value
    table.to_csv(path, index=False)
    with pytest.raises(InputError, match="predictions.csv was changed after its scores"):
        read_run(results)


def test_predictions_of_a_version_without_fingerprints_are_read_if_they_fit(results):
    forget_fingerprint(results)
    path = results / "predictions.csv"
    table = pd.read_csv(path, dtype=str)
    assert len(read_run(results)[0]) == len(table)
    refused = [
        (table.iloc[5:], "are not of the same slices"),
        (table.assign(p_AD="high"), "could not convert"),
        (table.drop(columns="threshold"), "there is no threshold"),
    ]
    for changed, error in refused:
        changed.to_csv(path, index=False)
        with pytest.raises(InputError, match=error):
            read_run(results)


def test_a_folder_without_results_is_refused(results):
    (results / "predictions.csv").unlink()
    with pytest.raises(InputError, match="holds no predictions.csv; expected a finished run"):
        read_run(results)
    with pytest.raises(InputError, match="nowhere does not exist; expected a finished run"):
        read_run("nowhere")
