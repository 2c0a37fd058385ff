import json
import os
import re
import shutil
import subprocess
import sys

import command
import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from conftest import ROOT, SCANS, SMALL, train_small, train_steps, write_set

from adnc import engine
from adnc import files
import modules
import train
from adnc import cli as utils
from utils import load_checkpoint
from modules import convnext


def history(run):
    return pd.read_csv(run / "training_history.csv")


# ---------------------------------------------------------------- a whole run


def test_a_run_learns_and_holds_all_its_files(run_folder):
    assert {p.name for p in run_folder.iterdir()} == {
        "best_model.pth", "last.pth", "config.json", "split.csv", "training_log.txt", "training_history.csv",
        "lr_schedule.png", "training_curves.png", "val", "test",
    }  # fmt: skip
    assert {p.name for p in (run_folder / "test").iterdir()} == {
        "predictions.csv", "scans.csv", "subjects.csv", "metrics.json", "confusion_matrix.png", "roc_curve.png",
        "calibration.png", "window_accuracy.png", "risk_coverage.png",
    }  # fmt: skip
    scores = json.loads((run_folder / "test" / "metrics.json").read_text())
    assert scores["slice"]["n"] == 30 and scores["scan"]["n"] == scores["subject"]["n"] == 6
    assert scores["scan"]["accuracy"] == 1.0
    assert history(run_folder).train_loss.iloc[-1] < 0.5 < history(run_folder).train_loss.iloc[0]


def test_config_records_every_flag_and_split_csv_every_slice(run_folder):
    config = json.loads((run_folder / "config.json").read_text())
    assert set(config["flags"]) == set(vars(train.parse_args([])))
    assert config["flags"]["label_smoothing"] == 0.1 and config["versions"]["torch"] == torch.__version__
    split = pd.read_csv(run_folder / "split.csv", dtype=str)
    assert len(split) == 90 and set(split.split) == {"train", "val", "test"}
    assert split.path.str.match(r"(train|test)/(AD|NC)/\d+_\d+\.jpeg").all()
    subjects = split.groupby("split").subject.agg(set)
    assert not subjects["train"] & subjects["val"] and not subjects["train"] & subjects["test"]


def test_the_log_has_a_line_an_epoch_and_the_best_is_the_best(run_folder):
    log = (run_folder / "training_log.txt").read_text()
    lines = re.findall(r"^ +\d+  \S+e-\d\d .*$", log, re.MULTILINE)
    assert len(lines) == 6
    best = load_checkpoint(run_folder / "best_model.pth")
    table = history(run_folder)
    assert best["val"]["val_accuracy"] == table.val_accuracy.max()
    assert lines[best["epoch"] - 1].endswith("best")


def test_the_recorded_learning_rate_is_lr_at(run_folder):
    slices = (pd.read_csv(run_folder / "split.csv").split == "train").sum()
    steps = -(-slices // 16)  # the batch size, rounded up
    schedule = dict(steps_per_epoch=steps, epochs=6, warmup_epochs=1, lr=2e-3)
    expected = [utils.lr_at(epoch * steps + steps - 1, **schedule) for epoch in range(6)]
    np.testing.assert_allclose(history(run_folder).lr, expected, rtol=1e-6)  # the file has seven digits


def test_the_documented_recipe_is_the_default():
    args = train.parse_args([])
    recipe = dict(model="tiny", image_size=224, lr=1e-4, weight_decay=1e-4, label_smoothing=0.1, warmup_epochs=1,
                  clip_grad=1.0, val_fraction=0.1, split_by="subject", amp="auto", mixup=0, cutmix=0, ema=0)
    assert {name: getattr(args, name) for name in recipe} == recipe


# ---------------------------------------------------------------- resuming


def stop_after(epoch, monkeypatch):
    """End the next run as a killed process ends, in the epoch after `epoch`."""
    genuine = train.train_one_epoch

    def killed(state, *args):
        if state.epoch >= epoch:
            raise KeyboardInterrupt
        return genuine(state, *args)

    monkeypatch.setattr(train, "train_one_epoch", killed)


@pytest.fixture(scope="module")
def whole(ad_nc, tmp_path_factory):
    """A run that nobody stopped, and its flags."""
    flags = ["--epochs", "4", "--ema", "0.9", "--mixup", "0.2", "--drop-path", "0.2"]
    return train_small(ad_nc, tmp_path_factory.mktemp("whole") / "run", *flags), flags


@pytest.mark.parametrize("stopped_after", [0, 2])
def test_a_resumed_run_ends_bit_identical(ad_nc, tmp_path, monkeypatch, whole, stopped_after):
    unbroken, flags = whole
    with monkeypatch.context() as patch:
        stop_after(stopped_after, patch)
        with pytest.raises(KeyboardInterrupt):
            train_small(ad_nc, tmp_path / "broken", *flags)
    monkeypatch.chdir(tmp_path)  # wherever it is resumed
    train.main(train.parse_args(["--out", str(tmp_path / "broken"), "--resume"]))
    for name in ("last.pth", "best_model.pth"):
        a, b = (load_checkpoint(run / name) for run in (unbroken, tmp_path / "broken"))
        assert all(torch.equal(a["weights"][key], b["weights"][key]) for key in a["weights"])
    timeless = history(unbroken).drop(columns="images_per_s")
    assert timeless.equals(history(tmp_path / "broken").drop(columns="images_per_s"))
    assert (unbroken / "test/predictions.csv").read_text() == (tmp_path / "broken/test/predictions.csv").read_text()


def test_a_resumed_run_keeps_its_flags_and_names_those_that_differ(run_folder, capsys):
    args = train.parse_args(["--out", str(run_folder), "--resume"])
    assert args.lr == 2e-3 and args.model == "atto"
    with pytest.raises(SystemExit) as stop:
        train.parse_args(["--out", str(run_folder), "--resume", "--lr", "1", "--seed", "7"])
    assert stop.value.code == 2
    assert "--lr was 0.002, --seed was 0" in capsys.readouterr().err


def test_a_finished_run_without_last_pth_is_not_trained_over(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "last.pth").unlink()
    with pytest.raises(ValueError, match="no last.pth to resume from, and a run never overwrites another"):
        train.main(train.parse_args(["--out", str(tmp_path / "run"), "--resume"]))
    good = json.loads((tmp_path / "run" / "config.json").read_text())
    for broken in ([], {"flags": []}, good | {"flags": good["flags"] | {"lr": []}},
                   good | {"flags": good["flags"] | {"epochs": "many"}}):  # fmt: skip
        (tmp_path / "run" / "config.json").write_text(json.dumps(broken))
        with pytest.raises(SystemExit):
            train.parse_args(["--out", str(tmp_path / "run"), "--resume"])


def test_two_runs_of_the_same_second_get_two_folders(tmp_path):
    folders = [files.open_out(None, tmp_path / "runs" / "now") for _ in range(3)]
    assert [folder.name for folder in folders] == ["now", "now-2", "now-3"]


def test_two_runs_never_overwrite_each_other(ad_nc, run_folder):
    before = (run_folder / "training_log.txt").read_text()
    with pytest.raises(ValueError, match="is not empty, and nothing is overwritten"):
        train_small(ad_nc, run_folder, "--epochs", "1")
    assert (run_folder / "training_log.txt").read_text() == before


# ---------------------------------------------------------------- options


def test_same_seed_same_bits_and_another_seed_other_bits(ad_nc, tmp_path):
    runs = [train_steps(ad_nc, tmp_path / str(i), "--epochs", "1", "--seed", seed) for i, seed in enumerate("778")]
    a, b, c = (load_checkpoint(run / "last.pth")["weights"]["head.weight"] for run in runs)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_ema_mixup_and_cutmix_run_together(ad_nc, tmp_path):
    run = train_steps(ad_nc, tmp_path / "run", "--epochs", "2", "--ema", "0.5", "--mixup", "0.2", "--cutmix", "1",
                      "--no-flip")  # fmt: skip
    last = load_checkpoint(run / "last.pth")
    assert not torch.equal(last["weights"]["head.weight"], last["ema"]["module.head.weight"])


def test_with_ema_the_averaged_weights_are_validated_and_kept(ad_nc, tmp_path):
    run = train_steps(ad_nc, tmp_path / "run", "--epochs", "1", "--ema", "0.5")
    last, best = (load_checkpoint(run / name) for name in ("last.pth", "best_model.pth"))
    assert all(torch.equal(best["weights"][name], last["ema"][f"module.{name}"]) for name in best["weights"])
    assert not torch.equal(best["weights"]["head.weight"], last["weights"]["head.weight"])


def test_weight_decay_is_kept_off_one_dimensional_parameters():
    model = convnext("atto")
    decayed, others = engine.make_optimizer(model, 1e-4, 0.05).param_groups
    assert {p.ndim for p in others["params"]} == {1} and others["weight_decay"] == 0
    assert min(p.ndim for p in decayed["params"]) == 2 and decayed["weight_decay"] == 0.05
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_init_starts_from_torchvision_and_says_what_it_left(ad_nc, tmp_path):
    torch.save(torchvision.models.convnext_tiny().state_dict(), tmp_path / "tv.pth")
    run = train_steps(ad_nc, tmp_path / "run", "--model", "tiny", "--epochs", "1", "--init", str(tmp_path / "tv.pth"))
    log = (run / "training_log.txt").read_text()
    assert "180 of 182 tensors loaded, left: head.weight, head.bias" in log


def test_a_split_by_slice_is_marked_as_leaky_everywhere(ad_nc, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(train.parse_args(["--data", str(ad_nc), *SMALL, "--epochs", "1", "--split-by", "slice"]))
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
    assert "fold 1 of 3" in json.loads((run / "test" / "metrics.json").read_text())["title"]


def test_shared_subjects_are_reported_apart(tmp_path):
    scans = SCANS | {"300": ("test", "AD", "a0"), "400": ("test", "NC", "n1")}
    run = train_small(write_set(tmp_path, scans), tmp_path / "run", "--epochs", "1")
    scores = json.loads((run / "test" / "metrics.json").read_text())
    assert "LEAKY: 2 of 6 scans are of subjects seen in training" in scores["title"]
    assert scores["scan"]["n"] == 6 and scores["unseen_subjects"]["scan"]["n"] == 4
    assert "LEAK IN THE DATA: 2 test subjects" in (run / "training_log.txt").read_text()


def test_a_model_that_predicts_one_class_is_called_out_in_the_log(ad_nc, tmp_path):
    run = train_steps(ad_nc, tmp_path / "run", "--epochs", "1", "--lr", "1e-9")
    assert re.search(r"predicts (AD|NC) for every slice: not learning yet", (run / "training_log.txt").read_text())


def test_training_stops_early_when_validation_no_longer_improves(ad_nc, tmp_path):
    run = train_steps(ad_nc, tmp_path / "run", "--epochs", "30", "--lr", "1e-20", "--patience", "2")
    assert len(history(run)) < 30 and "stopped early" in (run / "training_log.txt").read_text()


# ---------------------------------------------------------------- wrong input


def test_files_that_cannot_be_read_are_listed_before_the_first_step(tmp_path):
    root = write_set(tmp_path)
    (root / "train" / "AD" / "100_70.jpeg").write_bytes(b"")
    (root / "test" / "NC" / "400_71.jpeg").write_bytes(b"text")
    with pytest.raises(ValueError, match="(?s)2 files cannot be used.*400_71.jpeg cannot.*100_70.jpeg cannot"):
        train_small(root, tmp_path / "run", "--epochs", "1")
    assert not (tmp_path / "run").exists()


def test_a_set_that_cannot_be_split_is_refused(tmp_path):
    scans = {scan: value for scan, value in SCANS.items() if scan[0] != "1" or scan == "100"}
    with pytest.raises(ValueError, match="no AD is left for val"):
        train_small(write_set(tmp_path, scans), tmp_path / "run", "--epochs", "1")


@pytest.mark.parametrize("flags, sentence", [
    (["--epochs", "0"], "--epochs: 0 is not a whole number from 1 to 1000000"),
    (["--lr", "inf"], "--lr: inf is not a number from 1e-30 to 1000000"),
    (["--lr", "fast"], "--lr: fast is not a number from 1e-30"),
    (["--drop-path", "1"], "--drop-path: 1 is not a number from 0 to 0.999999"),
    (["--fold", "1"], "--fold and --folds go together"),
    (["--fold", "1", "--folds", "5", "--drop-test-subjects"], "--folds does not read; leave out one of them"),
    (["--pool-test"], "--pool-test puts test/ into the folds; it goes with --fold and --folds"),
    (["--model", "cnn", "--head-norm", "batch"], "--model cnn has no --head-norm; leave it out"),
    (["--resume"], "--resume needs --out RUN"),
    (["--model", "huge", "--data", "x"], "there is no ConvNeXt variant 'huge'"),
    (["--data", "nowhere"], "nowhere does not exist; expected AD_NC with"),
    ([], "no data: there is no ./AD_NC here"),
])  # fmt: skip
def test_wrong_input_ends_with_status_2_and_one_error(tmp_path, flags, sentence):
    done = command.run(ROOT / "train.py", *flags, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and sentence in done.stderr
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["narrow", "cnn"])
def test_the_average_of_a_model_with_batch_norm_has_averaged_statistics_and_the_last_epoch_is_kept(
    ad_nc, tmp_path, model
):
    run = train_steps(ad_nc, tmp_path / "run", "--model", model, "--epochs", "2", "--ema", "0.5", "--keep", "last")
    last, best = (load_checkpoint(run / name) for name in ("last.pth", "best_model.pth"))
    name = next(name for name in last["weights"] if name.endswith("running_var"))
    assert not torch.equal(last["weights"][name], last["ema"][f"module.{name}"])
    assert best["epoch"] == 2 and torch.equal(best["weights"][name], last["ema"][f"module.{name}"])


def test_a_batch_is_not_taken_in_parts_where_its_statistics_count(ad_nc, tmp_path, monkeypatch):
    runs = []
    for at_once in (5, 1000):
        monkeypatch.setattr(engine, "micro_batch", lambda device, height, width: at_once)  # noqa: B023
        runs.append(train_steps(ad_nc, tmp_path / str(at_once), "--model", "narrow", "--epochs", "1"))
    assert history(runs[0]).train_loss.equals(history(runs[1]).train_loss)


def test_a_recipe_sets_flags_and_flags_that_are_given_win():
    args = train.parse_args(["--recipe", "small", "--lr", "3e-3"])
    assert (args.model, args.keep, args.lr) == ("narrow", "last", 3e-3)
    assert train.parse_args([]).model == "tiny" and set(train.ARCHITECTURE) == set(modules.PAPER)
    for name, flags in train.RECIPES.items():
        known = vars(train.parse_args([]))
        assert set(flags) <= set(known), name


# ---------------------------------------------------------------- the demo


def test_the_demo_learns_and_prints_a_command_that_predicts(tmp_path):
    """`python train.py --demo` as a newcomer runs it, and then the commands that it prints."""
    here = os.getcwd()
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": here}
    where = dict(cwd=tmp_path, env=environment)
    demo = subprocess.run([sys.executable, f"{here}/train.py", "--demo"], capture_output=True, text=True, **where)
    assert demo.returncode == 0, demo.stderr
    (run,) = (tmp_path / "runs").iterdir()
    scores = json.loads((run / "test" / "metrics.json").read_text())
    assert scores["scan"]["auroc"] >= 0.85
    assert scores["subject"]["accuracy"] < 1  # the phantom's classes overlap

    predict, draw, volumes = re.findall(r"^  (.*(?:predict|phantom)\.py .*)$", demo.stdout, re.MULTILINE)
    for line in (f"{predict} --out again", draw, f"{volumes} --out heads"):
        done = command.run_printed(line, **where)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "scans.csv").read_text() == (run / "test" / "scans.csv").read_text()
    assert "2 of 2 volumes cut: sagittal" in done.stdout and (tmp_path / "heads.html").stat().st_size > 50_000


def test_a_warm_up_that_never_ends_is_refused(capsys):
    train.parse_args(["--epochs", "3", "--warmup-epochs", "3"])
    with pytest.raises(SystemExit):
        train.parse_args(["--epochs", "3", "--warmup-epochs", "3.5"])
    assert "--warmup-epochs is 3.5, longer than --epochs 3" in capsys.readouterr().err


def test_parts_of_a_batch_add_up_to_the_step_of_the_whole(ad_nc, tmp_path, monkeypatch):
    assert engine.micro_batch(torch.device("cpu"), 224, 224) == 8 < engine.micro_batch(torch.device("cpu"), 64, 64)
    flags = ["--epochs", "2", "--amp", "off"]
    whole = train_steps(ad_nc, tmp_path / "whole", *flags)
    monkeypatch.setattr(engine, "micro_batch", lambda device, height, width: 5)  # of batches of 16
    parts = train_steps(ad_nc, tmp_path / "parts", *flags)
    a, b = history(whole), history(parts)
    np.testing.assert_allclose(a.train_loss[0], b.train_loss[0], rtol=1e-4)
    np.testing.assert_allclose(a.train_accuracy, b.train_accuracy)
    assert not a.train_loss.equals(b.train_loss)  # other roundings: it was indeed taken in parts


@pytest.fixture
def no_compiler(monkeypatch):
    """--compile without a compiler: the step runs as it was traced. Holds the shapes that it was traced with."""
    shapes, genuine = set(), torch.nn.Module.compile

    def backend(graph, inputs):
        shapes.update(value.shape for value in inputs if torch.is_tensor(value) and value.ndim == 4)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: genuine(self, backend=backend, **how))
    return shapes


def test_a_compiled_run_has_one_shape_and_clean_names(ad_nc, tmp_path, no_compiler):
    flags = ["--epochs", "2", "--amp", "off"]
    plain = train_steps(ad_nc, tmp_path / "plain", *flags)
    run = train_steps(ad_nc, tmp_path / "compiled", *flags, "--compile")
    assert {shape for shape in no_compiler if shape[1:] == (1, 32, 32)} == {(16, 1, 32, 32)}  # the last batch has 2
    a, b = (load_checkpoint(folder / "last.pth")["weights"] for folder in (plain, run))
    assert list(a) == list(b)
    np.testing.assert_allclose(history(plain).train_loss, history(run).train_loss, rtol=1e-3)


@pytest.mark.parametrize("model", ["narrow", "cnn"])
def test_what_fills_a_batch_up_is_not_in_the_statistics_of_batch_norm(ad_nc, tmp_path, no_compiler, model):
    flags = ["--epochs", "2", "--amp", "off", "--model", model, "--ema", "0.5"]
    plain = load_checkpoint(train_steps(ad_nc, tmp_path / "plain", *flags) / "last.pth")
    compiled = load_checkpoint(train_steps(ad_nc, tmp_path / "compiled", *flags, "--compile") / "last.pth")
    for part in ("weights", "ema"):
        assert all(torch.equal(plain[part][name], compiled[part][name]) for name in plain[part])


@pytest.mark.parametrize("flags", [["--norm", "batch"], ["--model", "narrow", "--head-norm", "batch"],
                                   ["--model", "cnn"]])  # fmt: skip
def test_a_last_batch_of_one_slice_is_left_out_of_batch_norm_and_reported(ad_nc, tmp_path, flags):
    flags = [*flags, "--epochs", "2", "--batch-size", "7"]  # of 50 slices
    run = train_steps(ad_nc, tmp_path / "run", *flags)
    assert "the last batch of an epoch would have 1 of 50 slices" in (run / "training_log.txt").read_text()
    last = load_checkpoint(run / "last.pth")
    assert {state["step"].item() for state in last["optimizer"]["state"].values()} == {14}
    steps = dict(steps_per_epoch=8, epochs=2, warmup_epochs=1, lr=2e-3)  # the schedule is that of all batches
    assert last["history"][1]["lr"] == utils.lr_at(15, **steps)
    layer = train_steps(ad_nc, tmp_path / "layer", "--epochs", "1", "--batch-size", "7")  # LayerNorm takes it
    assert {state["step"].item() for state in load_checkpoint(layer / "last.pth")["optimizer"]["state"].values()} == {8}


def test_batch_norm_and_batches_of_one_are_refused(ad_nc, tmp_path):
    with pytest.raises(ValueError, match="BatchNorm needs 2 slices in a batch; --batch-size is 1"):
        train_steps(ad_nc, tmp_path / "run", "--model", "narrow", "--batch-size", "1")
    assert not (tmp_path / "run").exists()
