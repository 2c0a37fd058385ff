"""A run that was stopped, at any moment and by anything, loses nothing that was saved and ends where it would have."""

import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import command
import pandas as pd
import pytest
import torch
from conftest import ROOT, SMALL, train_small, train_steps, without_report
from PIL import Image, ImageOps

import utils as checkpoint
from adnc import engine
from adnc import cpu_engine as inference
from adnc import distributed as runtime
import train
from adnc import cli as utils
from utils import Run, load_checkpoint
from adnc.engine import TrainState
from adnc.distributed import Runtime, StopRequest

FLAGS = ["--epochs", "4", "--ema", "0.9", "--mixup", "0.2", "--drop-path", "0.2"]


def same(a, b):
    """Two runs hold the same weights, states, history and predictions, bit for bit."""
    for name in ("last.pth", "best_model.pth"):
        one, other = (load_checkpoint(run / name) for run in (a, b))
        for part in ("weights", *(["ema"] if name == "last.pth" and one["ema"] else [])):
            assert all(torch.equal(one[part][key], other[part][key]) for key in one[part])
        assert one.get("calibration") == other.get("calibration") and one["epoch"] == other["epoch"]
    for one, other in zip(*(load_checkpoint(run / "last.pth")["optimizer"]["state"].values() for run in (a, b))):
        assert all(torch.equal(one[key], other[key]) for key in one)
    tables = [pd.read_csv(run / "training_history.csv").drop(columns="images_per_s") for run in (a, b)]
    assert tables[0].equals(tables[1]) and len(tables[0])
    for file in ("test/predictions.csv", "test/scans.csv", "val/predictions.csv", "split.csv"):
        if (a / file).exists():  # of a run with a report
            assert (a / file).read_bytes() == (b / file).read_bytes()
    return True


def resume(run, *flags):
    with without_report():
        train.main(train.parse_args(["--out", str(run), "--resume", *flags]))
    return run


def report(run):
    """Resume a run that is trained: all that is left to do is the report."""
    train.main(train.parse_args(["--out", str(run), "--resume"]))
    return run


@pytest.fixture(scope="module")
def whole(ad_nc, tmp_path_factory):
    """A run that nobody stopped."""
    return train_steps(ad_nc, tmp_path_factory.mktemp("whole") / "run", *FLAGS)


# ---------------------------------------------------------------- killed


def test_a_run_killed_at_random_moments_saves_included_ends_bit_identical(ad_nc, tmp_path, repeats):
    flags = ["--data", str(ad_nc), *SMALL, *FLAGS, "--epochs", repeats("6", "12")]
    unbroken = command.run(ROOT / "train.py", *flags, "--out", tmp_path / "whole")
    assert unbroken.returncode == 0, unbroken.stderr
    n = repeats(8, 25)
    done = command.run(ROOT / "tests" / "kill.py", tmp_path, n, *flags, timeout=600)
    assert done.returncode == 0, done.stderr
    kills = re.findall(r"^killed .*half written: (.*)$", done.stdout, re.MULTILINE)
    assert len(kills) == n and sum(what != "nothing" for what in kills) >= n // 5  # in the middle of a save
    finished = len(re.findall(r"^run \d+ finished$", done.stdout, re.MULTILINE))
    assert finished >= 1 and all(same(tmp_path / "whole", tmp_path / str(run)) for run in range(finished))
    assert not list(tmp_path.rglob("*.tmp"))


# ---------------------------------------------------------------- asked to stop


def at_step(number, what, monkeypatch):
    """Do `what()` within training step `number` of the next run, counted over all epochs."""
    genuine, count = engine.train_transform, []

    def counting(images, *args, **kwargs):
        count.append(1)
        result = genuine(images, *args, **kwargs)
        replaced = what(result) if len(count) == number else None
        return result if replaced is None else replaced

    monkeypatch.setattr(engine, "train_transform", counting)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138),
                                            (signal.SIGHUP, 129)])  # fmt: skip
@pytest.mark.parametrize("step", [1, 6])  # of four an epoch
def test_a_signal_lets_the_step_end_saves_and_the_run_resumes_bit_identically(
    ad_nc, tmp_path, whole, monkeypatch, capsys, number, status, step
):
    with monkeypatch.context() as patch:
        at_step(step, lambda x: os.kill(os.getpid(), number), patch)
        with pytest.raises(SystemExit) as stop:
            train_steps(ad_nc, tmp_path / "run", *FLAGS)
    assert stop.value.code == status
    last = load_checkpoint(tmp_path / "run" / "last.pth")
    assert (last["epoch"], last["step"]) == divmod(step, 4)  # no step is lost
    log = (tmp_path / "run" / "training_log.txt").read_text()
    assert f"saved after step {step % 4} of 4 of epoch {step // 4 + 1}" in log and f"stopped by {number.name}" in log
    assert "train.py --out " in log.splitlines()[-1] and log.splitlines()[-1].endswith(" --resume")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the program's handlers are gone with it
    assert same(whole, resume(tmp_path / "run"))
    assert f"resumed after epoch {step // 4} and {step % 4} steps of the next" in capsys.readouterr().out


def test_a_signal_in_validation_ends_it_after_a_batch_and_keeps_the_trained_epoch(ad_nc, tmp_path, whole, monkeypatch):
    transform, predict, batches = inference.eval_transform, engine.predict_logits, []

    def stop(*args, **kwargs):
        batches.append(1)
        if len(batches) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return transform(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(inference, "eval_transform", stop)
        patch.setattr(engine, "predict_logits", lambda *args, **how: predict(*args, **how | {"batch_size": 2}))
        with pytest.raises(runtime.Stopped):
            train_steps(ad_nc, tmp_path / "run", *FLAGS)
    assert len(batches) == 1  # of five
    last = load_checkpoint(tmp_path / "run" / "last.pth")
    assert last["epoch"] == 0 and last["step"] == 4
    assert same(whole, resume(tmp_path / "run"))


def test_a_signal_in_a_save_waits_for_its_end(ad_nc, tmp_path, whole, monkeypatch):
    genuine, sent = torch.save, []

    def save(content, path):
        if "history" in content and len(content["history"]) == 2 and not sent:
            sent.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
        genuine(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(runtime.Stopped):
            train_steps(ad_nc, tmp_path / "run", *FLAGS)
    assert load_checkpoint(tmp_path / "run" / "last.pth")["epoch"] == 2
    assert len(pd.read_csv(tmp_path / "run" / "training_history.csv")) == 2
    assert same(whole, resume(tmp_path / "run"))


def test_a_second_signal_ends_at_once_and_leaves_what_was_saved(ad_nc, tmp_path, whole, monkeypatch):
    def twice(x):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # at once: the same request, by a launcher
        reached.append(x)
        time.sleep(utils.ONE_REQUEST + 0.1)
        os.kill(os.getpid(), signal.SIGINT)

    reached = []

    with monkeypatch.context() as patch:
        at_step(6, twice, patch)
        with pytest.raises(SystemExit) as stop:
            train_steps(ad_nc, tmp_path / "run", *FLAGS)
    assert stop.value.code == 130 and len(reached) == 1
    assert load_checkpoint(tmp_path / "run" / "last.pth")["step"] == 0  # of the epoch before
    assert same(whole, resume(tmp_path / "run"))


@pytest.mark.parametrize("where, says", [("load_set", "before the first step"), ("assess_run", "resume with")])
def test_a_signal_outside_training_ends_the_process_at_once(ad_nc, tmp_path, monkeypatch, capsys, where, says):
    reached = []

    def stop(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("the line after the signal")

    monkeypatch.setattr(train, where, stop)
    with pytest.raises(runtime.Stopped) as stopped:
        train_small(ad_nc, tmp_path / "run", "--epochs", "1")
    assert stopped.value.code == 143 and not reached
    assert f"stopped by SIGTERM {says}" in " ".join("".join(capsys.readouterr()).replace(";", "").split())
    if where == "assess_run":  # what was trained is there
        monkeypatch.undo()
        assert same(train_steps(ad_nc, tmp_path / "whole", "--epochs", "1"), resume(tmp_path / "run"))


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_exits_with_the_status_of_the_signal_and_says_how_to_resume(ad_nc, tmp_path, number, status):
    words = [sys.executable, ROOT / "train.py", "--data", ad_nc, "--out", tmp_path / "run", *SMALL, "--epochs", "2000"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if re.match(r" +2 ", line):  # the second epoch is done
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in err and f"stopped by {number.name}; resume with:" in out
    epochs = load_checkpoint(tmp_path / "run" / "last.pth")["epoch"]
    again = command.run_printed(re.findall(r"^  (.*train\.py .*)$", out, re.MULTILINE)[-1], "--epochs", epochs + 1)
    assert again.returncode == 0, again.stderr
    assert "--epochs was 2000: the cosine now ends at epoch" in again.stdout  # what it does to the schedule


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138),
                                            (signal.SIGHUP, 129)])
def test_a_signal_to_the_whole_group_of_processes_is_a_saved_stop(ad_nc, tmp_path, number, status):
    words = [sys.executable, ROOT / "train.py", "--data", ad_nc, "--out", tmp_path / "run", *SMALL, "--epochs", "2000",
             "--workers", "2"]  # fmt: skip
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stdout:
        if re.match(r" +1 ", line):
            break
    for _ in range(2):  # as `timeout` does, which hands on what it gets with the group
        os.killpg(process.pid, number)
        time.sleep(0.01)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in err and f"stopped by {number.name}; resume with:" in out
    last = load_checkpoint(tmp_path / "run" / "last.pth")
    assert last["epoch"] >= 1 and (last["step"] > 0 or "saved after step" not in out)


def test_a_model_with_batch_norm_is_resumed_bit_identically(ad_nc, tmp_path, monkeypatch):
    flags = ["--epochs", "2", "--ema", "0.9", "--model", "narrow", "--keep", "last"]
    whole = train_steps(ad_nc, tmp_path / "whole", *flags)
    with monkeypatch.context() as patch:
        at_step(6, lambda x: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(runtime.Stopped):
            train_steps(ad_nc, tmp_path / "run", *flags)
    assert same(whole, resume(tmp_path / "run"))  # its running statistics included


def test_a_run_stopped_in_its_first_epoch_resumes_on_its_own_slices_only(ad_nc, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(2, lambda x: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(runtime.Stopped):
            train_steps(ad_nc, tmp_path / "run", "--epochs", "1")
    other = shutil.copytree(ad_nc.parent, tmp_path / "other") / "AD_NC"
    (other / "train" / "AD" / "100_70.jpeg").unlink()
    split = (tmp_path / "run" / "split.csv").read_bytes()
    with pytest.raises(ValueError, match="these slices are not those that .* was trained on"):
        resume(tmp_path / "run", "--data", str(other))
    assert (tmp_path / "run" / "split.csv").read_bytes() == split
    resume(tmp_path / "run")


def invert(path):
    ImageOps.invert(Image.open(path)).save(path)


def exchange(one, other):
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


@pytest.mark.parametrize("change, n, first", [
    (lambda train, test: [invert(train / "AD" / "100_70.jpeg"), invert(train / "NC" / "200_71.jpeg")], 2, "AD/100_70"),
    (lambda train, test: exchange(train / "AD" / "101_70.jpeg", train / "NC" / "200_70.jpeg"), 2, "AD/101_70"),
    (lambda train, test: exchange(train / "AD" / "101_70.jpeg", train / "AD" / "101_71.jpeg"), 2, "AD/101_70"),
    (lambda train, test: invert(test / "NC" / "400_72.jpeg"), 1, "NC/400_72"),
    # of a pair of equal pictures one becomes black: the set of pictures holds what it held
    (lambda train, test: Image.new("L", (48, 40)).save(train / "AD" / "103_70.jpeg"), 1, "AD/103_70"),
    (lambda train, test: Image.new("L", (48, 40), 9).save(train / "AD" / "102_70.jpeg"), 1, "AD/102_70"),
])  # fmt: skip
def test_a_run_resumes_on_the_pixels_of_each_of_its_files_only(ad_nc, tmp_path, monkeypatch, change, n, first):
    data = shutil.copytree(ad_nc.parent, tmp_path / "set") / "AD_NC"
    shutil.copy(data / "train" / "AD" / "103_71.jpeg", data / "train" / "AD" / "103_70.jpeg")
    Image.new("L", (48, 40), 200).save(data / "train" / "AD" / "102_70.jpeg")
    with monkeypatch.context() as patch:
        at_step(2, lambda x: os.kill(os.getpid(), signal.SIGTERM), patch)
        with pytest.raises(runtime.Stopped):
            train_steps(data, tmp_path / "run", "--epochs", "1")
    before = (tmp_path / "run" / "last.pth").read_bytes()
    change(data / "train", data / "test")
    with pytest.raises(ValueError, match=f"{n} of 90 files do not show what they showed .* first t.*/{first}"):
        resume(tmp_path / "run")
    assert (tmp_path / "run" / "last.pth").read_bytes() == before


@pytest.mark.parametrize("after", [0.1, 0.4, 1.5])
def test_ctrl_c_while_a_script_imports_ends_it_quietly(tmp_path, after):
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "--data", tmp_path, "--out", tmp_path / "run"],
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    while not Path(f"/proc/{process.pid}/maps").read_text().count("_multiarray") and process.poll() is None:
        time.sleep(0.01)  # until it imports NumPy, so that it is past Python's own start
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err and process.returncode in (-signal.SIGINT, 130, 2)  # 2: it has seen that folder
    assert not (tmp_path / "run").exists()


def test_fewer_epochs_than_there_are_is_refused(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    before = (run / "config.json").read_bytes()
    with pytest.raises(ValueError, match="--epochs is 3, but .* has trained 6; expected no fewer"):
        resume(run, "--epochs", "3")
    assert (run / "config.json").read_bytes() == before


def test_an_edited_config_is_not_what_a_run_is_resumed_with(run_folder, tmp_path):
    run, text = shutil.copytree(run_folder, tmp_path / "run"), (run_folder / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"lr": 0.002', '"lr": 0.02'))
    with pytest.raises(utils.InputError, match="config.json has other flags than .*last.pth, in which --lr was 0.002;"):
        resume(run)
    (run / "config.json").write_text(text)
    resume(run, "--epochs", "7")


def test_a_run_on_a_relative_path_is_resumed_with_it(ad_nc, tmp_path, monkeypatch):
    monkeypatch.chdir(ad_nc.parent)
    run = train_small(ad_nc.name, tmp_path / "run", "--epochs", "1")
    before = (run / "test" / "predictions.csv").read_bytes()
    assert b"\nAD_NC/test" in before
    report(run)
    assert (run / "test" / "predictions.csv").read_bytes() == before
    monkeypatch.chdir(tmp_path)
    report(run)  # from elsewhere it has to be absolute
    assert str(ad_nc).encode() + b"/test" in (run / "test" / "predictions.csv").read_bytes()


def test_a_run_that_is_done_can_be_resumed_and_stays_as_it_was(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    assert same(run_folder, report(run))


def restored(run, last, amp=None):
    """The state of a run after `last`, a changed last.pth, was put into it."""
    where = Runtime(torch.device("cpu"), amp, StopRequest())
    state = TrainState(checkpoint.build_model(last), where, lr=1e-3)
    card = {name: last[name] for name in ("split_hash", "machine")}
    run = Run(run, print, card, last["pixels"])
    checkpoint.restore_run(state, last, train.parse_args(["--epochs", "7"]), run, where)
    return state


def test_sums_of_several_processes_are_taken_over_by_one(run_folder):
    last = load_checkpoint(run_folder / "last.pth")
    sums = [dict(zip(engine.SUMS, values)) for values in ([1.0, 2.0, 3.0, 1.0, 1.0], [10.0, 20.0, 30.0, 1.0, 1.0])]
    state = restored(run_folder, last | {"step": 2, "sums": sums})
    assert state.step == 2 and list(state.numbers().values()) == [11.0, 22.0, 33.0, 1.0, 1.0]


def test_the_scale_of_another_precision_is_not_taken_over(run_folder, capsys):
    last = load_checkpoint(run_folder / "last.pth")
    last["precision"], last["scaler"]["scale"] = "bfloat16", 0.25
    for amp, scale in ((torch.bfloat16, 0.25), (torch.float16, 2.0**16)):
        assert restored(run_folder, last, amp).scaler.get_scale() == scale
    assert "the run so far was in bfloat16, it resumes in float16" in capsys.readouterr().out


# ---------------------------------------------------------------- writes that fail


def test_a_full_disk_is_one_error_and_the_checkpoint_before_it_is_intact(ad_nc, tmp_path):
    run = train_steps(ad_nc, tmp_path / "run", "--epochs", "2")
    before = {path: path.read_bytes() for path in run.rglob("*.pth")}
    done = command.run(ROOT / "train.py", "--out", run, "--resume", "--epochs", "4", file_size=5_000_000)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert re.search(r"\.pth cannot be written: .*; what was there before is untouched", done.stderr)
    assert re.search(r"the last good checkpoint is .*last\.pth, after epoch 2, .*--resume", done.stderr, re.DOTALL)
    assert all(path.read_bytes() == data for path, data in before.items()) and not list(run.rglob("*.tmp"))
    assert len(pd.read_csv(resume(run) / "training_history.csv")) == 4


def test_an_out_that_is_a_file_is_refused_before_anything_is_done(ad_nc, run_folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    for script, words in (("train.py", ["--data", ad_nc]), ("predict.py", [ad_nc / "test", "--checkpoint",
                                                                          run_folder / "best_model.pth"])):
        for out in (tmp_path / "file", tmp_path / "file" / "below"):
            done = command.run(ROOT / script, *words, "--out", out)
            assert done.returncode == 2 and "Traceback" not in done.stderr and "is not a folder" in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_folder_that_is_deleted_meanwhile_is_one_error(ad_nc, tmp_path, monkeypatch):
    at_step(6, lambda x: shutil.rmtree(tmp_path / "run"), monkeypatch)
    with pytest.raises(OSError, match="the folder .*run is gone") as problem:
        train_steps(ad_nc, tmp_path / "run", *FLAGS)
    assert "nothing is left of the run" in str(problem.value)


# ---------------------------------------------------------------- processes


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_number_of_workers_changes_no_bit(ad_nc, tmp_path, whole, workers):
    assert same(whole, train_steps(ad_nc, tmp_path / "run", *FLAGS, "--workers", workers))


def test_a_worker_that_is_killed_ends_the_run_with_a_sentence(ad_nc, tmp_path, monkeypatch):
    def kill(x):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(0.5)

    at_step(3, kill, monkeypatch)
    start = time.monotonic()
    with pytest.raises(OSError, match="a process that fetches batches has ended .*killed by signal"):
        train_steps(ad_nc, tmp_path / "run", "--epochs", "3", "--workers", "2")
    assert time.monotonic() - start < 60
    resume(tmp_path / "run", "--workers", "0")


def test_deterministic_mode_asks_for_deterministic_kernels(ad_nc, tmp_path):
    script = ("import os, sys, torch, conftest\n"
              "conftest.train_steps(sys.argv[1], sys.argv[2], '--epochs', '1', '--deterministic')\n"
              "assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark\n"
              "assert os.environ['CUBLAS_WORKSPACE_CONFIG']")
    for out in ("a", "b"):  # a process each
        done = command.run(script, ad_nc, tmp_path / out)
        assert done.returncode == 0, done.stderr
    assert same(tmp_path / "a", tmp_path / "b")
