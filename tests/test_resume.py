"""A run that is stopped at any moment, by anything, resumes and ends with the bits of a run without
the stop."""

import json
import os
import re
import shutil
import signal
import time

import command
import pandas as pd
import pytest
import torch
from conftest import ROOT, SMALL, train_small, train_steps, without_evaluation
from PIL import Image, ImageOps

import train
from adnc.errors import InputError
from adnc.scoring import assess
from utils import load_checkpoint, save_checkpoint

FLAGS = ["--epochs", "4", "--ema", "0.9", "--mixup", "0.2", "--drop-path", "0.2"]


def assert_same(a, b):
    """Two runs hold the same weights, states, history and predictions, bit for bit."""
    for name in ("last.pth", "best_model.pth"):
        one, other = load_checkpoint(a / name), load_checkpoint(b / name)
        assert one["epoch"] == other["epoch"] and one.get("calibration") == other.get("calibration")
        assert all(
            torch.equal(one["weights"][key], other["weights"][key]) for key in one["weights"]
        )
        if one.get("ema"):
            assert all(torch.equal(one["ema"][key], other["ema"][key]) for key in one["ema"])
    states = [load_checkpoint(run / "last.pth")["optimizer"]["state"] for run in (a, b)]
    for number, state in states[0].items():
        assert all(torch.equal(state[key], states[1][number][key]) for key in state)
    costs = "images_per_s|val_seconds|memory"
    histories = [pd.read_csv(run / "training_history.csv") for run in (a, b)]
    histories = [each.drop(columns=each.filter(regex=costs)) for each in histories]
    assert histories[0].equals(histories[1]) and len(histories[0])
    for file in ("test/predictions.csv", "test/scans.csv", "val/predictions.csv", "split.csv"):
        if (a / file).exists():
            assert (a / file).read_bytes() == (b / file).read_bytes()


def resume(run, *flags):
    with without_evaluation():
        train.main(["--out", str(run), "--resume", *flags])
    return run


def stop_in_epoch(epoch, monkeypatch, problem=KeyboardInterrupt):
    """Stop the next run within that epoch (from 1)."""
    step = train.train_step

    def stopping(state, *args, **kwargs):
        if state.epoch == epoch - 1:
            raise problem
        return step(state, *args, **kwargs)

    monkeypatch.setattr(train, "train_step", stopping)


@pytest.fixture(scope="module")
def whole(ad_nc, tmp_path_factory):
    """A run without a stop."""
    return train_steps(ad_nc, tmp_path_factory.mktemp("whole") / "run", *FLAGS)


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_run_stopped_by_ctrl_c_resumes_bit_identical_from_anywhere(
    ad_nc, tmp_path, monkeypatch, whole, epoch
):
    with monkeypatch.context() as patch:
        stop_in_epoch(epoch, patch)
        with pytest.raises(SystemExit) as stop:
            train_steps(ad_nc, tmp_path / "run", *FLAGS)
    assert stop.value.code == 130
    log = (tmp_path / "run" / "training_log.txt").read_text()
    assert "stopped by Ctrl-C; " in log and "last.pth holds the last finished epoch" in log
    assert log.rstrip().endswith("--resume")
    assert load_checkpoint(tmp_path / "run" / "last.pth")["epoch"] == epoch - 1
    monkeypatch.chdir(tmp_path)
    resume("run")
    assert_same(whole, tmp_path / "run")


def test_a_model_with_batch_norm_resumes_bit_identical(ad_nc, tmp_path, monkeypatch):
    flags = ["--epochs", "2", "--ema", "0.9", "--model", "narrow", "--keep", "last"]
    whole = train_steps(ad_nc, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        stop_in_epoch(2, patch)
        with pytest.raises(SystemExit):
            train_steps(ad_nc, tmp_path / "run", *flags)
    assert_same(whole, resume(tmp_path / "run"))


def test_a_run_killed_at_random_moments_ends_bit_identical(ad_nc, tmp_path, repeats):
    flags = ["--data", str(ad_nc), *SMALL, *FLAGS, "--epochs", repeats("4", "12")]
    whole = command.run(ROOT / "train.py", *flags, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    n_kills = repeats(4, 25)
    done = command.run(ROOT / "tests" / "kill.py", tmp_path, n_kills, *flags, timeout=900)
    assert done.returncode == 0, done.stderr
    kills = re.findall(r"^killed; half written: (.*)$", done.stdout, re.MULTILINE)
    assert len(kills) == n_kills
    assert any(what != "nothing" for what in kills)  # in the middle of a save, too
    n_finished = len(re.findall(r"^run \d+ finished$", done.stdout, re.MULTILINE))
    assert n_finished >= 1
    for run in range(n_finished):
        assert_same(tmp_path / "whole", tmp_path / str(run))


def test_the_command_printed_at_a_stop_resumes_the_run(ad_nc, tmp_path):
    def stop(process, stdout):
        while process.is_alive() and not (
            stdout.exists() and re.search(r"^ +1 ", stdout.read_text(), re.MULTILINE)
        ):
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)

    words = ["--data", ad_nc, "--out", tmp_path / "run", *SMALL, "--epochs", "2000"]
    done = command.run(ROOT / "train.py", *words, meanwhile=stop)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    epochs = load_checkpoint(tmp_path / "run" / "last.pth")["epoch"] + 1
    again = command.run_printed(
        re.findall(r"^  (.*train\.py .*)$", done.stdout, re.MULTILINE)[-1], "--epochs", epochs
    )
    assert again.returncode == 0, again.stderr
    assert "--epochs was 2000: the cosine now ends at epoch" in again.stdout


@pytest.fixture(scope="module")
def two_epochs(ad_nc, tmp_path_factory):
    return train_steps(ad_nc, tmp_path_factory.mktemp("two") / "run", *KEEP_LAST)


KEEP_LAST = ["--epochs", "2", "--ema", "0.9", "--keep", "last"]


@pytest.mark.parametrize("lost", ["training_history.csv", "best_model.pth"])
def test_a_kill_after_the_last_checkpoint_leaves_no_file_an_epoch_behind(
    ad_nc, two_epochs, tmp_path, monkeypatch, lost
):
    name = {"training_history.csv": "write_csv", "best_model.pth": "save_model"}[lost]
    original = getattr(train, name)

    def killed(*args, **kwargs):
        last = tmp_path / "run" / "last.pth"
        if last.exists() and load_checkpoint(last)["epoch"] == 1:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train, name, killed)
        with pytest.raises(SystemExit):
            train_steps(ad_nc, tmp_path / "run", *KEEP_LAST)
    assert load_checkpoint(tmp_path / "run" / "last.pth")["epoch"] == 1
    assert_same(two_epochs, resume(tmp_path / "run"))


def test_a_run_that_a_kill_left_without_its_newest_model_gets_it_from_the_checkpoint(
    run_folder, tmp_path
):
    """Also if the run then trains on with another precision, and the epoch is not repeated."""
    run = shutil.copytree(run_folder, tmp_path / "run")
    last = load_checkpoint(run / "last.pth")
    del last["format"]
    for row in last["history"]:
        row["val_accuracy"] = row["epoch"] / 10
    save_checkpoint(run / "last.pth", **last)
    (run / "best_model.pth").unlink()
    resume(run)
    best = load_checkpoint(run / "best_model.pth")
    assert best["epoch"] == 6
    assert all(torch.equal(best["weights"][name], w) for name, w in last["weights"].items())


def test_the_command_of_a_run_can_be_repeated_with_resume(ad_nc, run_folder, tmp_path, monkeypatch):
    shutil.copy(run_folder / "split.csv", tmp_path / "mine.csv")
    monkeypatch.chdir(tmp_path)
    words = ["--split", "mine.csv", "--epochs", "1"]
    train_steps(ad_nc, tmp_path / "run", *words)
    for _ in range(2):
        train_steps(ad_nc, tmp_path / "run", *words, "--resume")
        assert load_checkpoint(tmp_path / "run" / "last.pth")["flags"]["split"] == "mine.csv"
    with pytest.raises(SystemExit):
        train_steps(ad_nc, tmp_path / "run", "--split", "other.csv", "--resume")


def test_a_full_disk_is_one_error_and_the_checkpoint_before_it_is_intact(ad_nc, tmp_path):
    run = tmp_path / "run"
    words = ["--data", ad_nc, "--out", run, *SMALL, "--epochs", "2"]
    # Space for the weights, but not for the moments of AdamW, which the first epoch adds.
    done = command.run(ROOT / "train.py", *words, file_size=2_000_000)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    assert re.search(
        r"last\.pth cannot be written: .*\n.*last\.pth holds the last finished epoch; resume with",
        done.stderr,
    )
    assert load_checkpoint(run / "last.pth")["epoch"] == 0

    command.run(ROOT / "train.py", "--out", run, "--resume", file_size=500_000)
    assert load_checkpoint(run / "last.pth")["epoch"] == 0
    assert len(pd.read_csv(resume(run) / "training_history.csv")) == 2


def test_a_run_that_was_to_train_on_does_so_whatever_stopped_it(ad_nc, tmp_path, monkeypatch):
    run = train_steps(ad_nc, tmp_path / "run", *FLAGS)
    n_epochs = load_checkpoint(run / "last.pth")["epoch"]
    with monkeypatch.context() as patch:
        stop_in_epoch(n_epochs + 1, patch)
        with pytest.raises(SystemExit):
            resume(run, "--epochs", str(n_epochs + 2))
    assert load_checkpoint(resume(run) / "last.pth")["epoch"] == n_epochs + 2


# ---------------------------------------------------------------- what may differ


def test_a_resumed_run_keeps_its_flags_and_names_those_that_differ(run_folder, capsys):
    args = train.parse_args(["--out", str(run_folder), "--resume"])
    assert args.lr == 2e-3 and args.model == "narrow"
    with pytest.raises(SystemExit) as stop:
        train.parse_args(["--out", str(run_folder), "--resume", "--lr", "1", "--seed", "7"])
    assert stop.value.code == 2
    assert "--lr was 0.002, --seed was 0" in capsys.readouterr().err


def test_fewer_epochs_than_are_trained_are_refused(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    with pytest.raises(InputError, match="--epochs is 3, but .* has trained 6; expected no fewer"):
        resume(run, "--epochs", "3")


def test_a_run_that_is_ended_before_its_schedule_says_so(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    resume(run, "--epochs", "9")
    log = (run / "training_log.txt").read_text()
    assert "--epochs was 6: the cosine now ends at epoch 9, the learning rate jumps here" in log
    last = load_checkpoint(run / "last.pth")
    last["flags"]["epochs"] = 12
    save_checkpoint(run / "last.pth", **last)
    resume(run, "--epochs", "9")
    log = (run / "training_log.txt").read_text()
    assert "--epochs was 12: the run ends here, in the middle of its schedule" in log
    assert json.loads((run / "config.json").read_text())["earlier_epochs"] == [6, 12]


def test_a_finished_run_can_be_resumed_and_stays_as_it_was(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    train.main(["--out", str(run), "--resume"])
    assert_same(run_folder, run)
    assert read_test_notes(run) == []  # it was read twice, but nothing changed in between


def read_test_notes(run):
    notes = json.loads((run / "test" / "metrics.json").read_text())["notes"]
    return [note for note in notes if note.startswith("test was read before")]


def test_a_run_that_trains_on_after_test_was_read_says_so_everywhere(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    train.main(["--out", str(run), "--resume", "--epochs", "7"])
    note = "test was read before, after epoch 6, and the run then trained on"
    assert read_test_notes(run) == [note]
    log = (run / "training_log.txt").read_text()
    assert "test was read after epoch 6, and the run now trains on" in log
    assert f"test; {note}" in log
    assert assess.statements(load_checkpoint(run / "best_model.pth"))["notes"] == [note]
    with without_evaluation():  # also if it stopped before the second reading
        train.main(["--out", str(run), "--resume", "--epochs", "8"])
    assert load_checkpoint(run / "last.pth")["test_read_after"] == [6, 7]


def test_a_run_is_resumed_with_its_own_files_or_not_at_all(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    (run / "best_model.pth").unlink()
    last = load_checkpoint(run / "last.pth")
    del last["format"]
    last["history"][0]["val_accuracy"] = 2.0  # so that an earlier epoch is the best
    save_checkpoint(run / "last.pth", **last)
    with pytest.raises(InputError, match="best_model.pth is gone"):
        resume(run, "--epochs", "7")
    shutil.copy(run_folder / "best_model.pth", run / "last.pth")
    with pytest.raises(InputError, match="holds a model and no training to resume"):
        resume(run)
    (run / "last.pth").unlink()
    with pytest.raises(InputError, match="holds no last.pth to resume"):
        resume(run)
    with pytest.raises(InputError, match="run-2 does not exist; --resume expects"):
        resume(run.with_name("run-2"))
    assert (run / "training_history.csv").read_bytes() == (
        run_folder / "training_history.csv"
    ).read_bytes()


def test_a_run_resumes_on_its_own_slices_and_subjects_only(ad_nc, run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    other = shutil.copytree(ad_nc.parent, tmp_path / "other")
    table = other / "subjects.csv"
    genuine = table.read_text()
    table.write_text(re.sub("(?m)^100,.*", "100,somebody else", genuine))
    with pytest.raises(InputError, match="the slices are not those that .* was trained on"):
        resume(run, "--epochs", "7", "--data", str(other / "AD_NC"))
    table.write_text(genuine)
    (other / "AD_NC" / "train" / "AD" / "100_70.jpeg").unlink()
    with pytest.raises(InputError, match="the slices are not those that .* was trained on"):
        resume(run, "--epochs", "7", "--data", str(other / "AD_NC"))
    assert (run / "split.csv").read_bytes() == (run_folder / "split.csv").read_bytes()


def invert(path):
    ImageOps.invert(Image.open(path)).save(path)


def exchange(one, other):
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


@pytest.mark.parametrize("change", [
    lambda root: invert(root / "train" / "AD" / "100_70.jpeg"),
    lambda root: exchange(
        root / "train" / "AD" / "101_70.jpeg", root / "train" / "AD" / "101_71.jpeg"
    ),
    lambda root: invert(root / "test" / "NC" / "400_72.jpeg"),
])  # fmt: skip
def test_a_run_resumes_on_the_same_pixels_only(ad_nc, tmp_path, change):
    root = shutil.copytree(ad_nc.parent, tmp_path / "set") / "AD_NC"
    run = train_steps(root, tmp_path / "run", "--epochs", "1")
    before = (run / "last.pth").read_bytes()
    change(root)
    with pytest.raises(InputError, match="some files show other pixels"):
        resume(run, "--epochs", "2")
    assert (run / "last.pth").read_bytes() == before


def test_a_run_on_the_default_folder_is_resumed_from_another_place(ad_nc, tmp_path, monkeypatch):
    monkeypatch.chdir(ad_nc.parent)
    with without_evaluation():
        train.main(["--out", str(tmp_path / "run"), *SMALL, "--epochs", "1"])
    monkeypatch.chdir(tmp_path)
    resume("run", "--epochs", "2")
    last = load_checkpoint(tmp_path / "run" / "last.pth")
    assert last["epoch"] == 2 and last["flags"]["data"] == str(ad_nc)
    monkeypatch.chdir(ad_nc.parent)  # where the path is the same, it stays as it was given
    args = train.parse_args(["--out", str(tmp_path / "run"), "--resume"])
    assert args.data == str(ad_nc)
    last["flags"]["data"] = "AD_NC"
    save_checkpoint(tmp_path / "run" / "last.pth", **last)
    assert train.parse_args(["--out", str(tmp_path / "run"), "--resume"]).data == "AD_NC"


def test_another_precision_and_compilation_are_reported(run_folder, tmp_path, monkeypatch):
    run = shutil.copytree(run_folder, tmp_path / "run")
    last = load_checkpoint(run / "last.pth")
    del last["format"]
    save_checkpoint(run / "last.pth", **{**last, "precision": "float64"})
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: None)
    resume(run, "--epochs", "7", "--compile")
    log = (run / "training_log.txt").read_text()
    assert "so far the run used float64, now" in log
    assert "so far the run was not compiled, now it is compiled: its bits will differ" in log
    resume(run, "--epochs", "8", "--no-compile")
    log = (run / "training_log.txt").read_text()
    assert "so far the run was compiled, now it is not compiled: its bits will differ" in log


def test_other_versions_of_packages_are_reported_and_both_kept(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    last = load_checkpoint(run / "last.pth")
    del last["format"]
    old = {**last["versions"], "numpy": "1.0", "torch": "2.0"}
    save_checkpoint(run / "last.pth", **{**last, "versions": old})
    resume(run, "--epochs", "7")
    log = (run / "training_log.txt").read_text()
    now = last["versions"]
    assert f"used torch 2.0, numpy 1.0, now torch {now['torch']}, numpy {now['numpy']}" in log
    resume(run, "--epochs", "8")  # with the same versions as before
    config = json.loads((run / "config.json").read_text())
    assert config["versions"] == now and config["earlier_versions"] == [old]
    assert (run / "training_log.txt").read_text().count("so far the run used") == 1


def test_data_that_were_moved_are_named_and_found_again(ad_nc, tmp_path):
    shutil.copytree(ad_nc.parent, tmp_path / "set")
    run = train_steps(tmp_path / "set" / "AD_NC", tmp_path / "run", "--epochs", "1")
    shutil.move(tmp_path / "set", tmp_path / "elsewhere")
    with pytest.raises(InputError, match="are no longer at .*--data"):
        train.main(["--out", str(run), "--resume", "--epochs", "2"])
    with without_evaluation():
        moved = str(tmp_path / "elsewhere" / "AD_NC")
        train.main(["--out", str(run), "--resume", "--epochs", "2", "--data", moved])
    assert load_checkpoint(run / "last.pth")["epoch"] == 2


def test_deterministic_mode_asks_for_deterministic_kernels(ad_nc, tmp_path):
    script = (
        "import os, sys, torch, conftest\nconftest.train_steps(sys.argv[1], sys.argv[2], "
        "'--epochs', '1', '--deterministic')\nassert torch.are_deterministic_algorithms_enabled() "
        "and not torch.backends.cudnn.benchmark\nassert os.environ['CUBLAS_WORKSPACE_CONFIG']\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    done = command.run(script, ad_nc, tmp_path / "run", env=environment)
    assert done.returncode == 0, done.stderr


def test_two_runs_never_overwrite_each_other(ad_nc, run_folder):
    before = (run_folder / "training_log.txt").read_text()
    with pytest.raises(
        InputError, match="exists, and nothing is overwritten; choose a new --out, or add --resume"
    ):
        train_small(ad_nc, run_folder, "--epochs", "1")
    assert (run_folder / "training_log.txt").read_text() == before


def test_a_wrong_start_leaves_nothing(ad_nc, tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    with pytest.raises(InputError, match="cannot be read as tensors"):
        train_steps(ad_nc, tmp_path / "run", "--init", str(tmp_path / "weights.pth"))
    assert not (tmp_path / "run").exists()
