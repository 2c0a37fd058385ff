"""tools.evaluate: a run once more, folds pooled, seeds averaged, two models compared."""

import json

import command
import numpy as np
import pandas as pd
import pytest
from conftest import train_small, write_slice
from fake_predictions import random_predictions, without_subjects, write_run
from sklearn.metrics import roc_auc_score

import predict
from adnc.errors import InputError
from adnc.files import write_csv
from adnc.scoring.assess import read_run
from tools import evaluate


def few_slices(subjects=30):
    """Random predictions of two slices a scan, which are scored faster."""
    return random_predictions(subjects, slices=2)


def run_evaluate(capsys, *words):
    """Evaluate in this process; returns what is printed."""
    capsys.readouterr()
    evaluate.main([str(word) for word in words])
    return capsys.readouterr().out


def read_scores(folder, name="metrics"):
    return json.loads((folder / f"{name}.json").read_text())


def fold_of(table, k, folds=3):
    """The rows of a table whose subject is in fold k."""
    return table[table.subject.str[1:].astype(int) % folds == k]


def worse(table, seed=0):
    """The same slices, predicted by a model with more noise."""
    noise = np.random.default_rng(seed).normal(0, 2, len(table))
    return table.assign(logit=table.logit + noise)


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """A cross-validation of three folds on 30 subjects."""
    root, table = tmp_path_factory.mktemp("folds"), few_slices()
    return [write_run(root / f"fold{k}", fold_of(table, k), fold=k, folds=3) for k in range(3)]


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Two runs with two seeds on the same test set."""
    root, table = tmp_path_factory.mktemp("seeds"), few_slices()
    return [write_run(root / f"s{seed}", worse(table, seed), seed=seed) for seed in (0, 1)]


# ---------------------------------------------------------------- one run


def test_a_run_evaluated_again_gives_the_scores_that_it_wrote(run_folder, tmp_path, capsys):
    text = run_evaluate(capsys, run_folder, "--out", tmp_path / "out")
    again, written = read_scores(tmp_path / "out"), read_scores(run_folder / "test")
    for name in ("slice", "scan", "subject", "baselines", "minus_baseline", "prediction_sets"):
        assert again[name] == written[name]
    for words in ("slices (n = 30)", "scans (n = 6)", "average precision", "logistic regression"):
        assert words in text
    for name in ("predictions", "scans", "subjects"):
        again = (tmp_path / "out" / f"{name}.csv").read_text()
        assert again == (run_folder / "test" / f"{name}.csv").read_text()


def test_the_validation_of_a_run_can_be_evaluated(run_folder, capsys):
    text = run_evaluate(capsys, run_folder, "--part", "val")
    assert text.startswith("validation (epoch and calibration were chosen on it)")
    assert "scans (n = 2)" in text
    assert text.endswith(f"{evaluate.ON_VALIDATION}\n") and "not seen in training" not in text


def test_the_validation_of_several_runs_is_named_and_gives_no_conclusion(tmp_path, capsys):
    what = "validation (calibration was chosen on it)"
    table = few_slices()
    seeds = [
        write_run(tmp_path / f"s{seed}", worse(table, seed), title=what, seed=seed)
        for seed in (0, 1)
    ]
    text = run_evaluate(capsys, *seeds, "--part", "val", "--against", seeds[0])
    assert text.startswith(f"mean over 2 seeds, {what}\n")
    assert f"mean over 2 and 1 seeds, {what}\n" in text
    assert evaluate.ON_VALIDATION in text and "The mean over seeds has" not in text
    halves = [
        write_run(tmp_path / f"f{k}", fold_of(table, k, 2), title=what, fold=k, folds=2)
        for k in (0, 1)
    ]
    text = run_evaluate(capsys, *halves, "--part", "val")
    assert f"2 runs pooled, {what}\n" in text and evaluate.ON_VALIDATION in text


def test_results_are_not_overwritten(run_folder, capsys):
    for out in (run_folder, run_folder / "test"):
        with pytest.raises(InputError, match="exists, and nothing is overwritten"):
            run_evaluate(capsys, run_folder, "--out", out)


def test_predictions_of_training_slices_stay_leaky(run_folder, ad_nc, tmp_path, capsys):
    out = tmp_path / "out"
    checkpoint = str(run_folder / "best_model.pth")
    predict.main([str(ad_nc / "train"), "--checkpoint", checkpoint, "--out", str(out)])
    assert "LEAKY: 12 of 12 scans" in run_evaluate(capsys, out)


def test_a_leaky_run_stays_leaky(tmp_path, capsys):
    run = write_run(tmp_path / "run", few_slices(), leaks=["trained with --split-by slice"])
    assert "LEAKY: trained with --split-by slice" in run_evaluate(capsys, run)


def test_any_name_of_a_scan_survives_the_files(run_folder, tmp_path, capsys):
    names = ["007", "NA", "null", "=1+1", 'my brain, "left"']
    for number, name in enumerate(names):
        write_slice(tmp_path / "in" / "AD" / f"{name}_1.png", True, number)
        write_slice(tmp_path / "in" / "NC" / f"{name} NC_1.png", False, number)
    (tmp_path / "in" / "AD" / "unreadable_1.png").write_bytes(b"no image")
    words = ["--checkpoint", str(run_folder / "best_model.pth"), "--out", str(tmp_path / "out")]
    predict.main([str(tmp_path / "in"), *words])

    text = run_evaluate(capsys, tmp_path / "out", "--out", tmp_path / "again")
    assert "scans (n = 10)" in text
    first, again = (tmp_path / name / "scans.csv" for name in ("out", "again"))
    assert first.read_text() == again.read_text()
    scans = pd.read_csv(again, keep_default_na=False, dtype=str).scan
    assert sorted(scans) == sorted(names + [f"{name} NC" for name in names])


def test_the_threshold_of_youden_is_that_of_all_tables(ad_nc, tmp_path, capsys):
    flags = ["--epochs", "1", "--lr", "1e-9", "--threshold", "youden"]
    run = train_small(ad_nc, tmp_path / "run", *flags)
    calibration = read_scores(run / "test")["calibration"]
    assert calibration["threshold_rule"] == "youden" and calibration["threshold"] != 0.5
    for name in ("predictions", "scans", "subjects"):
        table = pd.read_csv(run / "test" / f"{name}.csv")
        assert ((table.prediction == "AD") == (table.p_AD >= calibration["threshold"])).all()

    run_evaluate(capsys, run, "--out", tmp_path / "again")
    again, written = read_scores(tmp_path / "again"), read_scores(run / "test")
    assert again["scan"] == written["scan"]


def test_wrong_input_is_one_line_and_status_2(run_folder):
    sentence = "nowhere does not exist; expected a finished run"
    process = command.run("tools.evaluate", "nowhere", cwd=run_folder)
    assert process.returncode == 2 and process.stderr.startswith(f"error: {sentence}")
    assert process.stderr.count("\n") == 1


# ---------------------------------------------------------------- several runs


def test_pooled_folds_count_every_scan_once(folds, tmp_path, capsys):
    table = few_slices()
    text = run_evaluate(capsys, *folds, "--out", tmp_path / "out")
    scans = pd.read_csv(tmp_path / "out" / "scans.csv", dtype=str)
    assert sorted(scans.scan) == sorted(table.scan.unique())
    assert "subjects (n = 30)" in text and "warning" not in text
    assert "On the 30 subjects not seen in training, pooled from 3 runs: AUROC" in text

    summary = read_scores(tmp_path / "out")["each_run"]
    assert (summary["unit"], summary["runs"]) == ("subject", 3)
    for name, label in (("accuracy", "accuracy"), ("auroc", "AUROC")):
        values = [read_scores(run / "test")["subject"][name] for run in folds]
        assert summary[name]["mean"] == pytest.approx(np.mean(values))
        each = ", ".join(f"{value:.3f}" for value in values)
        line = f"subject-level {label} of each run: {each}; their mean, each model on its own scale"
        assert f"{line}: {np.mean(values):.3f} (SD {np.std(values, ddof=1):.3f})" in text


def test_missing_folds_are_reported_in_any_order_of_the_runs(folds, tmp_path, capsys):
    missing = "warning: of 3 folds, 2 are missing: not all subjects are counted"
    text = run_evaluate(capsys, *folds[:2])
    assert text.startswith(missing)
    given = [  # another seed of the same folds, by --split
        write_run(tmp_path / f"s1f{k}", fold_of(few_slices(), k), seed=1, split=f"f{k}/split.csv")
        for k in range(2)
    ]
    for runs in ([*folds[:2], *given], [*given, *folds[:2]]):
        text = run_evaluate(capsys, *runs)
        assert missing in text and "the runs differ" not in text
    assert "warning" not in run_evaluate(capsys, *given)


def test_a_run_with_one_class_has_no_auroc_of_its_own(tmp_path, capsys):
    tables = [fold_of(few_slices(), k) for k in range(3)]
    tables[1] = tables[1][tables[1].label == "NC"]
    runs = [
        write_run(tmp_path / str(k), table, fold=k, folds=3) for k, table in enumerate(tables)
    ]
    text = run_evaluate(capsys, *runs)
    first, last = (read_scores(runs[k] / "test")["subject"]["auroc"] for k in (0, 2))
    assert f"AUROC of each run: {first:.3f}, undefined, {last:.3f}; the mean of the other 2" in text


def test_runs_of_one_seed_that_share_scans_cannot_be_pooled(folds, capsys):
    with pytest.raises(InputError, match="expected the folds of one cross-validation"):
        run_evaluate(capsys, folds[0], folds[0])
    # A folder of predictions has no seed, so it may be the same run.
    with pytest.raises(InputError, match="which share none, or runs of other seeds"):
        run_evaluate(capsys, folds[0], folds[0] / "test")


def test_runs_that_share_a_subject_cannot_be_pooled(folds, tmp_path, capsys):
    table = few_slices()
    subject = table.subject.iloc[0]
    other_scans = table[table.subject == subject].assign(scan="another-" + table.scan)
    other = write_run(tmp_path / "o", other_scans, fold=3, folds=4)
    (first,) = [k for k in range(3) if subject in set(fold_of(table, k).subject)]
    with pytest.raises(InputError, match=f"subject {subject} is in .* and in .*expected the folds"):
        run_evaluate(capsys, folds[first], other)


def test_prediction_sets_of_different_coverage_are_not_pooled(folds, tmp_path, capsys):
    other = write_run(tmp_path / "o", fold_of(few_slices(), 2), coverage=0.8, fold=2, folds=3)
    assert "prediction sets" in run_evaluate(capsys, *folds)
    assert "prediction sets" not in run_evaluate(capsys, *folds[:2], other)


def test_flags_that_differ_are_named_when_runs_are_pooled(folds, tmp_path, capsys):
    other = write_run(
        tmp_path / "o", fold_of(few_slices(), 2), lr=1e-3, fold=2, folds=3, batch_size=8
    )
    for runs in ([*folds[:2], other], [other, *folds[:2]]):  # also flags that the first lacks
        text = run_evaluate(capsys, *runs)
        assert "warning: the runs differ in --batch-size, --lr\n" in text


def test_runs_that_changed_their_epochs_or_cannot_be_checked_are_named(tmp_path, capsys):
    runs = [
        write_run(tmp_path / str(k), fold_of(few_slices(), k), fold=k, folds=2, epochs=9)
        for k in range(2)
    ]
    assert "warning" not in run_evaluate(capsys, *runs)
    path = runs[1] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "earlier_epochs": [5]}))
    assert "warning: the runs differ in --epochs\n" in run_evaluate(capsys, *runs)
    path = runs[0] / "test" / "metrics.json"
    scores = json.loads(path.read_text())
    del scores["predictions_sha256"]
    path.write_text(json.dumps(scores))
    assert f"warning: {runs[0]}: of an earlier version, which" in run_evaluate(capsys, *runs)


def combined_auroc(runs):
    """(AUROC of subjects by the mean logit of runs of the same slices, that minus the mean AUROC),
    by scikit-learn."""
    tables = []
    for run in runs:
        table = pd.read_csv(run / "test" / "predictions.csv").set_index(["scan", "slice"])
        tables.append(table.sort_index())
    mean = sum(table.logit for table in tables) / len(tables)  # the runs have no temperature
    frame = tables[0].assign(p=1 / (1 + np.exp(-mean)))
    scores = frame.groupby("subject").agg(p=("p", "mean"), label=("label", "first"))
    together = roc_auc_score(scores.label == "AD", scores.p)
    single = np.mean([read_scores(run / "test")["subject"]["auroc"] for run in runs])
    return together, together - single


def test_scores_of_two_seeds_are_averaged(seeds, tmp_path, capsys):
    text = run_evaluate(capsys, *seeds)
    assert text.startswith("mean over 2 seeds\n") and "warning" not in text
    brier = np.mean([read_scores(run / "test")["subject"]["brier"] for run in seeds])
    row = next(line for line in text.splitlines() if line.startswith("| Brier"))
    assert f"{brier:.3f} [" in row
    each = [read_scores(run / "test") for run in seeds]
    minus = np.mean([
        scores["subject"]["accuracy"]
        - scores["baselines"]["majority_class"]["subject"]["accuracy"]
        for scores in each
    ])  # fmt: skip
    row = next(line for line in text.splitlines() if line.startswith("| majority class"))
    assert f" | {minus:+.3f} [" in row
    assert "| logistic regression on a blur |" in text
    together, gain = combined_auroc(seeds)
    line = next(line for line in text.splitlines() if line.startswith("| all seeds together"))
    assert f"{together:.3f} [" in line
    line = next(line for line in text.splitlines() if line.startswith("| difference, paired"))
    assert f"{gain:+.3f} [" in line
    assert "Does the network know more than the dark share of the head?" in text
    auroc = np.mean([read_scores(run / "test")["subject"]["auroc"] for run in seeds])
    assert f"The mean over seeds has a subject-level AUROC of {auroc:.3f} [" in text

    with pytest.raises(InputError, match="--out takes runs of one seed"):
        run_evaluate(capsys, *seeds, "--out", tmp_path / "out")


def test_leaks_and_flags_of_averaged_seeds_are_named(seeds, tmp_path, capsys):
    table = worse(few_slices(), 2)
    leaks, notes = ["trained with --split-by slice"], ["test was read before, after epoch 3"]
    other = write_run(tmp_path / "o", table, seed=2, lr=1e-3, leaks=leaks, notes=notes)
    text = run_evaluate(capsys, seeds[0], other, "--against", seeds[0])
    assert "warning: the runs differ in --lr" in text
    stated = "LEAKY: trained with --split-by slice; test was read before, after epoch 3"
    assert f"mean over 2 seeds; {stated}" in text
    assert f"mean over 2 and 1 seeds; first: {stated}\n" in text


def test_seeds_are_scored_again_on_subjects_that_training_has_not_seen(tmp_path, capsys):
    table = few_slices()
    exposure = np.where(table.subject.isin(["p0", "p1", "p2"]), "yes", "no")
    tables = [each.assign(exposure=exposure) for each in (table, worse(table))]
    runs = [write_run(tmp_path / str(k), each, seed=k) for k, each in enumerate(tables)]
    text = run_evaluate(capsys, *runs)
    everyone, unseen = text.split("mean over 2 seeds, only subjects not seen in training")
    assert "subjects (n = 30)" in everyone and "subjects (n = 27)" in unseen
    aurocs = [read_scores(run / "test")["unseen_subjects"]["subject"]["auroc"] for run in runs]
    assert f"has a subject-level AUROC of {np.mean(aurocs):.3f} [" in unseen
    assert "has a subject-level AUROC" not in everyone


def test_an_ensemble_is_compared_with_its_members_on_unseen_scans_that_all_predict(
    tmp_path, capsys
):
    table = few_slices().assign(exposure="no")
    rng = np.random.default_rng(0)
    logits = table.logit.to_numpy()[:, None] + rng.normal(0, 2, (len(table), 2))
    logits[table.subject == "p1", 0] = np.nan  # the first member has seen this subject
    seen = table.subject == "p2"
    table = table.assign(logit=np.nanmean(logits / [2.0, 1.0], axis=1))
    table = table.assign(exposure=np.where(seen, "yes", "no"))
    folder = write_run(tmp_path / "run", table) / "test"
    paths = read_run(folder)[0].path
    members = pd.DataFrame({"path": paths, "logit_1": logits[:, 0], "logit_2": logits[:, 1]})
    write_csv(folder / "members.csv", members)
    runs = pd.DataFrame(
        {"member": ["logit_1", "logit_2"], "run": ["a", "b"], "temperature": [2.0, 1.0]}
    )
    write_csv(folder / "member_runs.csv", runs)
    text = run_evaluate(capsys, folder, "--out", tmp_path / "out")
    n, n_left_out = table.scan.nunique(), table.scan[table.subject.isin(["p1", "p2"])].nunique()
    which = "that all members predict and whose subjects training has not seen"
    assert f"on the {n - n_left_out} of {n} scans {which}:" in text
    assert text.index("| difference, paired") < text.index("subjects not seen in training: AUROC")
    scans = pd.read_csv(tmp_path / "out" / "scans.csv")
    assert (scans.members == np.where(scans.subject == "p1", 1, 2)).all()
    assert (scans.member_sd.notna() == (scans.members == 2)).all()
    for name in ("members", "member_runs"):
        again = pd.read_csv(tmp_path / "out" / f"{name}.csv")
        written = pd.read_csv(folder / f"{name}.csv")
        assert again[written.columns].equals(written), name

    write_csv(folder / "member_runs.csv", runs.assign(temperature=1.0))
    with pytest.raises(InputError, match="members.csv of .* does not fit its predictions.csv"):
        run_evaluate(capsys, folder)
    write_csv(folder / "members.csv", pd.concat([members, members.iloc[:1]]))
    with pytest.raises(InputError, match="cannot be read .*; predict again"):
        run_evaluate(capsys, folder)
    write_csv(folder / "members.csv", members)
    (folder / "member_runs.csv").unlink()
    with pytest.raises(InputError, match="cannot be read .*; predict again"):
        run_evaluate(capsys, folder)


# ---------------------------------------------------------------- comparisons


def test_seeds_with_a_split_that_is_given_are_no_warning_and_few_subjects_no_verdict(
    tmp_path, capsys
):
    table = few_slices(8)
    runs = [
        write_run(tmp_path / "a", table, seed=0),
        write_run(tmp_path / "b", worse(table), seed=1, split="a/split.csv"),
    ]
    text = run_evaluate(capsys, *runs)
    assert "the runs differ" not in text
    assert "8 independent subjects are too few to tell whether that beats guessing" in text


def test_two_models_are_compared_on_the_same_slices(folds, tmp_path, capsys):
    table = few_slices()
    others = []
    for k in range(3):
        run = tmp_path / f"other{k}"
        others.append(write_run(run, worse(fold_of(table, k), k), fold=k, folds=3))
    text = run_evaluate(capsys, *folds, "--against", *others, "--out", tmp_path / "out")

    means = []
    for runs in (folds, others):
        slices = [read_scores(run / "test")["slice"] for run in runs]
        means.append(sum(part["accuracy"] * part["n"] for part in slices) / len(table))
    comparison = read_scores(tmp_path / "out", "comparison")
    assert comparison["slice"]["accuracy"]["difference"] == pytest.approx(means[0] - means[1])
    assert comparison["unseen_subjects"] is None
    assert "the first is better" in text or "may be noise" in text

    with pytest.raises(InputError, match="slices are predicted by some of the runs only"):
        run_evaluate(capsys, *folds, "--against", *others[:2])


def test_models_that_disagree_on_a_label_or_subject_are_not_compared(tmp_path, capsys):
    table = few_slices()
    one = write_run(tmp_path / "one", table)
    for column, value in (("label", "AD"), ("subject", "p99")):
        changed = table.copy()
        changed.loc[changed.scan == "0s0", column] = value
        other = write_run(tmp_path / column, changed)
        with pytest.raises(InputError, match=f"disagree on the {column} of 1 scans, first 0s0"):
            run_evaluate(capsys, one, "--against", other)


def test_seeds_are_paired_with_seeds(seeds, tmp_path, capsys):
    table = few_slices()
    better = [write_run(tmp_path / f"b{seed}", table, seed=seed) for seed in (0, 1)]
    text = run_evaluate(capsys, *seeds, "--against", *better)
    assert "mean over 2 and 2 seeds" in text
    brier = []
    for runs in (seeds, better):
        brier.append(np.mean([read_scores(run / "test")["subject"]["brier"] for run in runs]))
    row = next(line for line in text.splitlines() if line.startswith("| Brier score (lower"))
    assert f"{brier[0] - brier[1]:+.3f} [" in row


def test_a_comparison_names_the_leaks_of_both_sides_and_scores_unseen_subjects(tmp_path, capsys):
    table = few_slices()
    seen = table.subject.isin(["p0", "p1", "p2"])
    clean = write_run(tmp_path / "clean", table)
    leaky = worse(table).assign(exposure=np.where(seen, "yes", "no"))
    leaky = write_run(tmp_path / "leaky", leaky, leaks=["trained with --split-by slice"])
    text = run_evaluate(capsys, clean, "--against", leaky, "--out", tmp_path / "out")

    n_seen, n = table.scan[seen].nunique(), table.scan.nunique()
    title = (
        f"second: LEAKY: trained with --split-by slice, {n_seen} of {n} scans are of subjects "
        "seen in training"
    )
    comparison = read_scores(tmp_path / "out", "comparison")
    assert title in text and title in comparison["title"] and "first: LEAKY" not in text
    assert "the same, only subjects that neither has seen in training" in text
    assert comparison["scan"]["groups"] == 30
    assert comparison["unseen_subjects"]["scan"]["groups"] == 27


def test_few_subjects_get_no_verdict(tmp_path, capsys):
    table = few_slices(6)
    one, other = write_run(tmp_path / "a", table), write_run(tmp_path / "b", worse(table))
    text = run_evaluate(capsys, one, "--against", other)
    assert "6 subjects are too few for a verdict" in text


def test_resamples_are_paired_if_one_side_does_not_know_the_subjects(tmp_path, capsys):
    table = few_slices()
    unknown = without_subjects(table).assign(group=table.scan)
    known = write_run(tmp_path / "known", table)
    unknown = write_run(tmp_path / "unknown", unknown)
    for name, runs in (("a", (known, unknown)), ("b", (unknown, known))):
        run_evaluate(capsys, runs[0], "--against", runs[1], "--out", tmp_path / name)
        comparison = read_scores(tmp_path / name, "comparison")
        for part in (comparison["subject"]["brier"], comparison["scan"]["accuracy"]):
            assert part["difference"] == 0 and part["p"] is None  # 0 in all resamples
        assert comparison["scan"]["groups"] == 30
