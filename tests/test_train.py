"""train.py: a whole run, its flags and options, the demo."""

import json
import re
import shutil

import command
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from conftest import (
    ROOT,
    SCANS,
    SMALL,
    train_small,
    train_steps,
    without_evaluation,
    write_set,
)

import modules
import train
from adnc.errors import InputError
from utils import load_checkpoint, lr_at


def history(run):
    return pd.read_csv(run / "training_history.csv")


# ---------------------------------------------------------------- a whole run


def test_a_run_learns_and_holds_all_its_files(run_folder):
    assert {path.name for path in run_folder.iterdir()} == {
        "best_model.pth",
        "last.pth",
        "config.json",
        "split.csv",
        "training_log.txt",
        "training_history.csv",
        "lr_schedule.png",
        "training_curves.png",
        "resources.json",
        "val",
        "test",
    }
    assert {path.name for path in (run_folder / "test").iterdir()} == {
        "predictions.csv",
        "scans.csv",
        "subjects.csv",
        "metrics.json",
        "confusion_matrix.png",
        "roc_curve.png",
        "calibration.png",
        "window_accuracy.png",
        "risk_coverage.png",
    }
    scores = json.loads((run_folder / "test" / "metrics.json").read_text())
    assert scores["slice"]["n"] == 30 and scores["scan"]["n"] == scores["subject"]["n"] == 6
    assert scores["scan"]["accuracy"] == 1.0
    assert history(run_folder).train_loss.iloc[-1] < 0.5 < history(run_folder).train_loss.iloc[0]


def test_config_records_every_flag_and_split_csv_every_slice(run_folder):
    config = json.loads((run_folder / "config.json").read_text())
    assert set(config["flags"]) == set(train.DEFAULTS)
    assert (
        config["flags"]["label_smoothing"] == 0.1
        and config["versions"]["torch"] == torch.__version__
    )
    split = pd.read_csv(run_folder / "split.csv", dtype=str)
    assert len(split) == 90 and set(split.split) == {"train", "val", "test"}
    assert split.path.str.match(r"(train|test)/(AD|NC)/\d+_\d+\.jpeg").all()
    subjects = split.groupby("split").subject.agg(set)
    assert not subjects["train"] & subjects["val"] and not subjects["train"] & subjects["test"]


def test_the_log_has_a_line_an_epoch_and_the_best_is_the_best(run_folder):
    log = (run_folder / "training_log.txt").read_text()
    lines = re.findall(r"^ +\d+  \S+e-\d\d .*$", log, re.MULTILINE)
    assert len(lines) == 6
    best = load_checkpoint(run_folder / "best_model.pth")["epoch"]
    table = history(run_folder)
    assert table.val_accuracy[best - 1] == table.val_accuracy.max()
    assert lines[best - 1].endswith("best")


def test_the_recorded_learning_rate_is_lr_at(run_folder):
    n_slices = (pd.read_csv(run_folder / "split.csv").split == "train").sum()
    steps = -(-n_slices // 16)  # the batch size, rounded up
    schedule = dict(steps_per_epoch=steps, epochs=6, warmup_epochs=1, lr=2e-3)
    expected = [lr_at(epoch * steps + steps - 1, **schedule) for epoch in range(6)]
    # The file has seven digits.
    np.testing.assert_allclose(history(run_folder).lr, expected, rtol=1e-6)


def test_ties_are_broken_by_the_loss_and_then_by_the_epoch():
    rows = [
        dict(epoch=1, val_accuracy=0.5, val_loss=0.7),
        dict(epoch=2, val_accuracy=0.6, val_loss=0.9),
        dict(epoch=3, val_accuracy=0.6, val_loss=0.8),
        dict(epoch=4, val_accuracy=0.6, val_loss=0.8),
    ]
    assert train.kept_row(rows, "best")["epoch"] == 3
    assert train.kept_row(rows, "last")["epoch"] == 4
    assert train.kept_row([], "best") is None


# ---------------------------------------------------------------- flags


def test_the_documented_recipe_is_the_default():
    args = train.parse_args([])
    recipe = dict(
        model="tiny",
        image_size=224,
        lr=1e-4,
        weight_decay=1e-4,
        label_smoothing=0.1,
        warmup_epochs=1,
        clip_grad=1.0,
        val_fraction=0.1,
        split_by="subject",
        amp="auto",
        mixup=0,
        cutmix=0,
        ema=0,
    )
    assert {name: getattr(args, name) for name in recipe} == recipe


def test_given_flags_win_over_saved_ones_over_the_recipe_over_the_defaults():
    args = train.parse_args(["--recipe", "small", "--lr", "3e-3"])
    assert (args.model, args.keep, args.lr) == ("narrow", "last", 3e-3)
    assert train.parse_args(["--demo"]).image_size == 64
    merged = train.merge_flags({"epochs": 7}, {"epochs": 5, "lr": 1.0, "recipe": "small"})
    assert (merged["epochs"], merged["lr"], merged["model"]) == (7, 1.0, "tiny")


def test_every_flag_has_a_default_and_every_recipe_sets_flags():
    names = {action.dest for action in train.make_parser()._actions} - {"help", "misplaced"}
    assert names == set(train.DEFAULTS)
    for name, recipe in train.RECIPES.items():
        assert set(recipe) <= names, name


def test_model_args_reach_the_model_and_its_checkpoint(ad_nc, tmp_path):
    words = ["head_norm=batch", "layer_scale=1", "init_std=fan_in"]
    run = train_steps(ad_nc, tmp_path / "run", "--epochs", "1", "--model-args", *words)
    model = load_checkpoint(run / "best_model.pth")["model"]
    assert (model["head_norm"], model["layer_scale"], model["init_std"]) == ("batch", 1.0, "fan_in")
    assert "norm.running_mean" in load_checkpoint(run / "best_model.pth")["weights"]
    assert set(modules.MODEL_ARGS) <= set(modules.ConvNeXt.__init__.__kwdefaults__)

    again = ["--out", str(run), "--resume", "--model-args"]
    assert train.parse_args([*again, "norm=layer", *words]).model_args == dict(
        norm="layer", head_norm="batch", layer_scale=1.0, init_std="fan_in"
    )
    with pytest.raises(SystemExit):
        train.parse_args([*again, "head_norm=batch"])


@pytest.mark.parametrize("flags, sentence", [
    (["--epochs", "0"], "--epochs: 0 is not a whole number of at least 1 and at most 1000000"),
    (["--lr", "inf"], "--lr: inf is not a number above 0 and at most 1000000"),
    (["--lr", "fast"], "--lr: fast is not a number above 0"),
    (["--drop-path", "1"], "--drop-path: 1 is not a number of at least 0 and below 1"),
    (["--warmup-epochs", "3.5", "--epochs", "3"], "--warmup-epochs is 3.5, longer than --epochs 3"),
    (["--fold", "1"], "--fold and --folds go together"),
    (
        ["--fold", "1", "--folds", "5", "--drop-test-subjects"],
        "--folds does not read; leave out one of them",
    ),
    (["--pool-test"], "--pool-test puts test/ into the folds; it goes with --fold and --folds"),
    (["--split", "x.csv", "--subjects", "9"], "leave out --subjects"),
    (["--model", "cnn", "--model-args", "norm=batch"], "--model cnn takes no --model-args"),
    (["--model", "cnn", "--drop-path", "0.1"], "--model cnn has no residual blocks to drop"),
    (["--model-args", "colour=red"], "there is no colour; expected one of norm, stem"),
    (["--model-args", "norm=instance"], "norm is instance; choose layer or batch"),
    (["--model-args", "layer_scale=big"], "layer_scale is big; expected a number above 0"),
    (["--resume"], "--resume needs --out RUN"),
    (["--model", "huge", "--data", "x"], "there is no --model huge"),
    (["--data", "nowhere"], "nowhere does not exist; expected"),
    (["AD_NC"], "AD_NC belongs to no flag; did you mean --data AD_NC?"),
    (["--resume", "runs/x"], "runs/x belongs to no flag; did you mean --out runs/x?"),
    ([], "no data: there is no ./AD_NC here"),
])  # fmt: skip
def test_wrong_input_ends_with_status_2_and_one_error(tmp_path, flags, sentence):
    done = command.run(ROOT / "train.py", *flags, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and sentence in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- options


def test_same_seed_same_bits_and_another_seed_other_bits(ad_nc, tmp_path):
    runs = [
        train_steps(ad_nc, tmp_path / str(i), "--epochs", "1", "--seed", seed)
        for i, seed in enumerate("778")
    ]
    a, b, c = (load_checkpoint(run / "last.pth")["weights"]["head.weight"] for run in runs)
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("augment", ["no-flip", "none"])
def test_augmentation_can_be_reduced(ad_nc, tmp_path, augment):
    full = train_steps(ad_nc, tmp_path / "full", "--epochs", "1")
    other = train_steps(ad_nc, tmp_path / "other", "--epochs", "1", "--augment", augment)
    assert history(full).train_loss[0] != history(other).train_loss[0]


def test_init_starts_from_torchvision_and_reports_what_it_left(tmp_path):
    pretrained = torchvision.models.convnext_tiny()
    torch.save(pretrained.state_dict(), tmp_path / "tv.pth")
    model, lines = modules.convnext("tiny"), []
    init = train.load_init(model, str(tmp_path / "tv.pth"), lines.append)
    assert init == {"file": "tv.pth", "exposure": None}
    assert "180 of 182 tensors loaded, left: head.weight, head.bias" in lines[0]
    assert "--init does not record its training subjects" in lines[1]
    own, theirs = model.stages[2][3].dwconv.weight, pretrained.features[5][3].block[0].weight
    assert torch.equal(own, theirs)


def test_init_without_its_file_or_its_model_says_what_is_expected(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(["--init", "phanton"])
    assert "no file --init phanton; expected phantom, the weights" in capsys.readouterr().err
    with pytest.raises(InputError, match="these are weights of --model narrow"):
        train.load_init(modules.convnext("tiny"), "phantom", print)


def test_init_of_another_version_is_refused_and_a_foreign_file_with_a_format_is_read(tmp_path):
    model = modules.convnext("narrow")
    file = tmp_path / "weights.pth"
    torch.save({"format": 2, "weights": model.state_dict()}, file)
    assert train.load_init(model, str(file), print)["exposure"] is None
    with pytest.raises(InputError, match="--init .*weights.pth"):
        train.load_init(modules.convnext("tiny"), str(file), print)
    ours = {"format": 4, "exposure": {}, "model": {}, "weights": model.state_dict()}
    torch.save(ours, file)
    with pytest.raises(InputError, match="has format 4, this version reads"):
        train.load_init(model, str(file), print)


def test_compile_without_a_compiler_is_refused_at_once(monkeypatch, capsys):
    monkeypatch.setattr(train.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit):
        train.parse_args(["--compile"])
    assert "--compile needs a C++ compiler" in capsys.readouterr().err


@pytest.mark.parametrize("content", [torch.ones(3), 7, [torch.ones(3)]])
def test_init_of_a_file_without_named_weights_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="--init .*weights.pth"):
        train.load_init(modules.convnext("narrow"), str(tmp_path / "weights.pth"), print)


def test_init_of_a_run_inherits_its_exposure(ad_nc, run_folder, tmp_path):
    flags = ["--epochs", "1", "--init", str(run_folder / "best_model.pth"), "--seed", "5"]
    run = train_small(ad_nc, tmp_path / "run", *flags)
    log = (run / "training_log.txt").read_text()
    assert "LEAK BY TRANSFER: --init was trained on subjects of 2 of the 2 scans of val" in log
    inherited = load_checkpoint(run / "best_model.pth")["exposure"]["subjects"]
    assert set(load_checkpoint(run_folder / "best_model.pth")["exposure"]["subjects"]) <= set(
        inherited
    )


def test_a_split_by_slice_is_marked_as_leaky_everywhere(ad_nc, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--data", str(ad_nc), *SMALL, "--epochs", "1", "--split-by", "slice"])
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.endswith("LEAKY")
    assert "LEAKY SPLIT: train and val share scans" in (run / "training_log.txt").read_text()
    for part in ("val", "test"):
        assert "LEAKY" in json.loads((run / part / "metrics.json").read_text())["title"]
    assert load_checkpoint(run / "best_model.pth")["split_by"] == "slice"


def test_a_fold_is_held_out_of_train_and_the_official_test_set_is_not_read(ad_nc, tmp_path):
    run = train_small(ad_nc, tmp_path / "run", "--epochs", "1", "--fold", "1", "--folds", "3")
    predictions = pd.read_csv(run / "test" / "predictions.csv", dtype=str)
    assert set(predictions.scan) < {scan for scan, (split, *_) in SCANS.items() if split == "train"}
    title = json.loads((run / "test" / "metrics.json").read_text())["title"]
    assert title == "fold 1 of 3, held out of train"


def test_the_split_csv_of_a_run_gives_its_split_again(ad_nc, run_folder, tmp_path):
    run = train_steps(
        ad_nc, tmp_path / "run", "--epochs", "1", "--split", str(run_folder / "split.csv")
    )
    assert (run / "split.csv").read_bytes() == (run_folder / "split.csv").read_bytes()


@pytest.mark.parametrize(
    "flags", [["--subjects", "8"], ["--fold", "1", "--folds", "3"], ["--drop-test-subjects"]]
)
def test_the_split_csv_of_a_run_on_a_part_of_the_set_gives_the_same_part_again(flags, tmp_path):
    scans = SCANS | {"300": ("test", "AD", "a0"), "400": ("test", "NC", "n1")}
    root = write_set(tmp_path, scans)
    first = train_steps(root, tmp_path / "first", "--epochs", "1", *flags)
    split = first / "split.csv"
    assert (pd.read_csv(split).split == "unused").any()
    again = train_steps(
        root, tmp_path / "again", "--epochs", "1", "--seed", "1", "--split", str(split)
    )
    assert (again / "split.csv").read_bytes() == split.read_bytes()
    assert "not used: " in (again / "training_log.txt").read_text()


def test_shared_subjects_are_reported_apart(tmp_path):
    scans = SCANS | {"300": ("test", "AD", "a0"), "400": ("test", "NC", "n1")}
    run = train_small(write_set(tmp_path, scans), tmp_path / "run", "--epochs", "1")
    scores = json.loads((run / "test" / "metrics.json").read_text())
    assert "LEAKY: 2 of 6 scans are of subjects seen in training" in scores["title"]
    assert scores["scan"]["n"] == 6 and scores["unseen_subjects"]["scan"]["n"] == 4
    assert "LEAK IN THE DATA: 2 test subjects" in (run / "training_log.txt").read_text()


def test_test_subjects_can_be_left_out_of_training(tmp_path):
    scans = SCANS | {"300": ("test", "AD", "a0"), "400": ("test", "NC", "n1")}
    run = train_steps(
        write_set(tmp_path, scans), tmp_path / "run", "--epochs", "1", "--drop-test-subjects"
    )
    split = pd.read_csv(run / "split.csv")
    assert not split[split.split.isin(["train", "val"])].subject.isin(["a0", "n1"]).any()
    assert "LEAK" not in (run / "training_log.txt").read_text()


def test_a_model_that_predicts_one_class_is_called_out_in_the_log(ad_nc, tmp_path):
    run = train_steps(ad_nc, tmp_path / "run", "--epochs", "1", "--lr", "1e-9")
    assert re.search(r"predicts (AD|NC) for every slice", (run / "training_log.txt").read_text())


def test_training_stops_early_when_validation_no_longer_improves(ad_nc, tmp_path):
    run = train_steps(ad_nc, tmp_path / "run", "--epochs", "30", "--lr", "1e-20", "--patience", "2")
    assert len(history(run)) < 30 and "stopped early" in (run / "training_log.txt").read_text()


# ---------------------------------------------------------------- bad data


def test_files_that_cannot_be_read_are_listed_before_the_first_step(tmp_path):
    root = write_set(tmp_path)
    (root / "train" / "AD" / "100_70.jpeg").write_bytes(b"")
    (root / "test" / "NC" / "400_71.jpeg").write_bytes(b"text")
    with pytest.raises(
        ValueError, match="(?s)2 files cannot be used.*--skip-bad.*400_71.jpeg .*100_70.jpeg "
    ):
        train_small(root, tmp_path / "run", "--epochs", "1")
    assert not (tmp_path / "run").exists()


def test_skip_bad_trains_without_them_and_lists_them(tmp_path):
    root = write_set(tmp_path)
    (root / "train" / "AD" / "100_70.jpeg").write_bytes(b"")
    run = train_steps(root, tmp_path / "run", "--epochs", "1", "--skip-bad")
    skipped = pd.read_csv(run / "skipped.csv")
    assert len(skipped) == 1 and skipped.path[0].endswith("100_70.jpeg")
    assert len(pd.read_csv(run / "split.csv")) == 89


def test_a_set_that_cannot_be_split_is_refused(tmp_path):
    scans = {scan: value for scan, value in SCANS.items() if scan[0] != "1" or scan == "100"}
    with pytest.raises(ValueError, match="no AD is left for val"):
        train_small(write_set(tmp_path, scans), tmp_path / "run", "--epochs", "1")


# ---------------------------------------------------------------- the demo


def test_the_demo_learns_and_prints_a_command_that_predicts(
    phantom, tmp_path, monkeypatch, capsys, repeats
):
    """`python train.py --demo`, on fewer subjects, and then the command that it prints."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def draw_ten(out, *args, **kwargs):
        shutil.copytree(phantom, out)

    monkeypatch.setattr(train, "draw", repeats(draw_ten, train.draw))
    monkeypatch.chdir(tmp_path)
    train.main(["--demo"])
    (run,) = (tmp_path / "runs").iterdir()
    scores = json.loads((run / "test" / "metrics.json").read_text())
    assert scores["scan"]["auroc"] >= repeats(0.75, 0.85)

    printed = capsys.readouterr().out
    assert "says nothing about real slices" in printed
    (line,) = re.findall(r"^  (.*predict\.py .*)$", printed, re.MULTILINE)
    done = command.run_printed(line, "--out", "again", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    again = (tmp_path / "again" / "scans.csv").read_text()
    assert again == (run / "test" / "scans.csv").read_text()


def test_the_recipe_phantom_draws_its_set_and_learns_from_drawings_alone(
    varied, tmp_path, monkeypatch
):
    asked = []

    def draw_twelve(out, n_subjects, seed, *, cue):
        asked.append((n_subjects, seed, cue))
        shutil.copytree(varied, out)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(train, "draw", draw_twelve)
    flags = ["--recipe", "phantom", "--epochs", "1", "--seed", "3", "--image-size", "32"]
    with without_evaluation():
        train.main([*flags, "--out", str(tmp_path / "run")])
    assert asked == [(train.PHANTOM_SUBJECTS, 3, "varied")]
    checkpoint = load_checkpoint(tmp_path / "run" / "best_model.pth")
    assert checkpoint["flags"]["soft_labels"] and checkpoint["exposure"]["drawn"]
    assert checkpoint["slice_stats"]["height"] == [64, 512]
    assert checkpoint["extraction"]["plane"] == "axial"

    with pytest.raises(SystemExit):
        train.parse_args(["--soft-labels", "--mixup", "0.2"])


def test_soft_labels_that_are_not_there_leave_no_run_folder(ad_nc, tmp_path):
    with pytest.raises(InputError, match="soft labels are those of"):
        train_small(ad_nc, tmp_path / "run", "--soft-labels")
    assert not (tmp_path / "run").exists()


def test_a_run_on_drawings_from_weights_of_unknown_origin_has_seen_more_than_drawings(
    varied, tmp_path
):
    model = modules.make_model(variant="narrow", in_chans=1, num_classes=2)
    torch.save(model.state_dict(), tmp_path / "found.pth")
    flags = ["--data", str(varied / "AD_NC"), "--recipe", "phantom", "--epochs", "1"]
    flags += ["--image-size", "32", "--init", str(tmp_path / "found.pth")]
    with without_evaluation():
        train.main([*flags, "--out", str(tmp_path / "run")])
    assert not load_checkpoint(tmp_path / "run" / "best_model.pth")["exposure"]["drawn"]


def test_init_phantom_starts_from_the_shipped_weights():
    model, lines = modules.make_model(variant="narrow", in_chans=1, num_classes=2), []
    init = train.load_init(model, "phantom", lines.append)
    assert init["file"] == "phantom.pth" and init["exposure"]["drawn"]
    n = len(model.state_dict())
    assert f"{n} of {n} tensors loaded, left: none" in lines[0] and len(lines) == 1
    shipped = load_checkpoint(train.PHANTOM)["weights"]["head.weight"]
    assert torch.equal(model.head.weight, shipped.float())


# ---------------------------------------------------------------- the last lines of a run


def test_a_run_that_has_not_learned_says_so_in_its_last_lines(ad_nc, tmp_path):
    flags = ["--model", "cnn", "--lr", "50", "--epochs", "3", "--keep", "last"]
    run = train_small(ad_nc, tmp_path / "run", *flags)
    lines = (run / "training_log.txt").read_text().splitlines()
    assert "training loss not below 0.693, that of guessing: not learning" in "\n".join(lines)
    assert any("the model has not learned; try a lower --lr" in line for line in lines[-5:])
    scores = json.loads((run / "test" / "metrics.json").read_text())
    assert lines[-3:] == scores["conclusion"]["sentences"]
    assert load_checkpoint(run / "best_model.pth")["conclusion"] == scores["conclusion"]


@pytest.mark.parametrize("share_ad, smoothing, trained, remarked", [
    (0.5, 0.1, (0.695, 0.692, 0.691), True),
    (0.5, 0.1, (0.75, 0.72, 0.69), False),  # it still falls
    (0.5, 0.1, (0.69, 0.66, 0.64), False),
    (0.2, 0.0, (0.505, 0.503, 0.499), True),  # knows how rare AD is, and nothing else
    (0.2, 0.0, (0.49, 0.47, 0.45), False),
    (0.5, 0.9, (0.6930, 0.6910, 0.6890), False),  # of 0.688 at least
    (0.5, 0.1, (0.71, float("nan"), float("nan")), True),
    (0.5, 0.1, (0.69, 0.69), False),
])  # fmt: skip
def test_a_training_loss_that_stands_still_at_that_of_guessing_is_remarked(
    share_ad, smoothing, trained, remarked
):
    criterion = train.make_loss(smoothing)
    y = (torch.arange(10) < round(10 * share_ad)).long()
    losses = train.guessing_losses(y.numpy(), smoothing)
    constant = torch.tensor([(1 - smoothing) * (1 - share_ad), (1 - smoothing) * share_ad])
    constant = (constant + smoothing / 2).log().expand(10, 2)
    assert losses[0] == pytest.approx(criterion(constant, y).mean().item(), abs=1e-6)
    history = [{"train_loss": loss} for loss in trained]
    assert (train.describe_standstill(history, *losses) is not None) == remarked


def test_soft_labels_have_their_own_losses_of_guessing_and_of_a_perfect_model():
    p_ad = np.array([0.2, 0.5, 0.9])
    guessing, lowest = train.guessing_losses(p_ad, 0.1)
    target = torch.tensor(np.stack((1 - p_ad, p_ad), 1), dtype=torch.float32)
    smoothed = 0.9 * target + 0.05
    criterion = train.make_loss(0.1)
    assert lowest == pytest.approx(criterion(smoothed.log(), target).mean().item(), abs=1e-6)
    constant = smoothed.mean(0).log().expand(3, 2)
    assert guessing == pytest.approx(criterion(constant, target).mean().item(), abs=1e-6)
    assert guessing > lowest + 0.05


def test_a_run_that_diverges_after_its_kept_epoch_says_so():
    rows = [
        {"epoch": 1, "train_loss": 0.5, "val_accuracy": 0.9, "val_loss": 0.4},
        {"epoch": 2, "train_loss": 1398.0, "val_accuracy": 0.5, "val_loss": 900.0},
    ]
    (line,) = train.describe_end(rows, "best", 0.693)
    assert "ended at 1398" in line and "epoch 1, which was kept, it was below" in line
    (line,) = train.describe_end(rows, "last", 0.693)
    assert "the model has not learned; try a lower --lr" in line
    assert list(train.describe_end(rows[:1], "best", 0.693)) == []


def test_a_model_no_better_than_the_larger_class_on_validation_says_so(
    ad_nc, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "train_step", lambda state, x, *args, **kwargs: torch.zeros(4))
    run = train_small(ad_nc, tmp_path / "run", "--epochs", "1")
    log = (run / "training_log.txt").read_text()
    assert "on validation the kept model is no better than the larger class" in log


def test_a_batch_larger_than_the_set_is_remarked(ad_nc, tmp_path):
    run = train_steps(ad_nc, tmp_path / "run", "--epochs", "1", "--batch-size", "64")
    log = (run / "training_log.txt").read_text()
    assert "--batch-size is 64, and there are 50 training slices: one step an epoch" in log
    assert "losses and accuracies of slices, AUROC of scans:" in log
    assert "WARNING: validation has only 1 AD, 1 NC subjects" in log


def test_a_busy_machine_is_advised_to_use_one_thread(monkeypatch):
    monkeypatch.setattr(train.os, "getloadavg", lambda: (9.0, 9.0, 9.0))
    monkeypatch.setattr(train.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert train.is_busy()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not train.is_busy()
