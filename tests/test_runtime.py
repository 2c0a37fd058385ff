"""Where a run happens. Several processes take the steps that one would take, and only the first writes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import command
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SMALL, train_small, without_report

from tools import evaluate
import predict
from adnc import distributed as runtime
import train
from utils import load_checkpoint
from modules import ConvNeXtBlock
from adnc.distributed import Runtime

EXACT = ["--amp", "off", "--no-flip", "--warmup-epochs", "0"]


def torchrun(processes, *words, timeout=300):
    """What the command torchrun does, without the start of the libraries; returns how the processes ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    waits = [command.start(ROOT / "train.py", *words, env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
             for rank in range(processes)]
    ends = [wait(timeout) for wait in waits]
    return subprocess.CompletedProcess(words, max(end.returncode for end in ends),
                                       *("".join(getattr(end, name) for end in ends) for name in ("stdout", "stderr")))


@pytest.mark.parametrize("batch, epochs", [("64", "8"), ("13", "2")])  # a step an epoch; 4 uneven steps an epoch
def test_two_processes_take_the_steps_of_one(ad_nc, tmp_path, pictures, batch, epochs):
    flags = ["--epochs", epochs, "--batch-size", batch, *EXACT]
    one = train_small(ad_nc, tmp_path / "one", *flags)
    done = torchrun(2, "--data", ad_nc, "--out", tmp_path / "two", *SMALL, *flags)
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout and done.stdout.count("best epoch") == 1
    a, b = (pd.read_csv(run / "training_history.csv") for run in (one, tmp_path / "two"))
    assert len(a) == len(b) == int(epochs)
    for column in ("lr", "train_loss", "val_loss", "val_accuracy"):
        np.testing.assert_allclose(a[column], b[column], rtol=2e-4)
    np.testing.assert_allclose(a.train_loss[0], b.train_loss[0], rtol=1e-6)
    assert a.train_loss.nunique() > 1
    for part in ("val", "test"):  # each slice once, though the shares are uneven
        p, q = (pd.read_csv(run / part / "predictions.csv") for run in (one, tmp_path / "two"))
        assert p.path.tolist() == q.path.tolist() and not p.path.duplicated().any()
        np.testing.assert_allclose(p.p_AD, q.p_AD, atol=2e-3)
    assert {f.name for f in (tmp_path / "two").iterdir()} == {f.name for f in one.iterdir()}


def test_a_run_of_several_processes_is_resumed_by_one(ad_nc, tmp_path):
    flags = ["--epochs", "2", "--ema", "0.5", "--mixup", "0.2", "--drop-path", "0.1"]
    assert torchrun(3, "--data", ad_nc, "--out", tmp_path / "run", *SMALL, *flags).returncode == 0
    with without_report():
        train.main(train.parse_args(["--out", str(tmp_path / "run"), "--resume", "--epochs", "3"]))
    assert len(pd.read_csv(tmp_path / "run" / "training_history.csv")) == 3


def test_wrong_input_ends_all_processes(ad_nc, run_folder):
    done = torchrun(2, "--data", ad_nc, "--out", run_folder, *SMALL, timeout=120)
    assert done.returncode != 0 and done.stderr.count("is not empty, and nothing is overwritten") == 1
    assert "train.py\", line" not in done.stderr  # of none of the processes there is a traceback


def test_several_processes_on_a_cpu_do_not_train_batch_norm(ad_nc, tmp_path):
    """There, each would have the statistics of its share, and the steps would not be those of one process."""
    done = torchrun(2, "--data", ad_nc, "--out", tmp_path / "run", *SMALL, "--model", "narrow", timeout=120)
    assert done.returncode == 2 and done.stderr == (
        "error: PyTorch has BatchNorm over several processes on CUDA only, and this is cpu; start one process, or take "
        "a model without BatchNorm\n")
    assert not (tmp_path / "run").exists()


def test_a_scheduler_that_names_only_the_number_of_processes_starts_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    cpu = torch.device("cpu")
    assert runtime.join_processes(cpu, None, None) == Runtime(cpu, None, None, 0, 1, 0)


def test_shares_cover_a_batch_once():
    for world in (1, 2, 3, 5):
        for n in range(12):
            assert sum(Runtime(None, rank=rank, world=world).share(n) for rank in range(world)) == n


def test_the_optimizer_of_a_run_is_the_fused_one(run_folder):
    groups = load_checkpoint(run_folder / "last.pth")["optimizer"]["param_groups"]
    assert all(group["fused"] for group in groups)


def start(run, ad_nc, *flags):
    """Two processes under torchrun, after two epochs of many. Returns (launcher, {rank: process id})."""
    words = ["--standalone", "--nproc-per-node", "2", ROOT / "train.py", "--data", ad_nc, "--out", run, *SMALL, *flags]
    launcher = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *map(str, words)], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    history, patience = run / "training_history.csv", time.monotonic() + 120
    while not history.exists() or len(history.read_text().splitlines()) < 3:
        assert launcher.poll() is None and time.monotonic() < patience, launcher.communicate()
        time.sleep(0.05)
    ranks = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == launcher.pid:
                rank = re.search(r"\0RANK=(\d+)\0", (folder / "environ").read_text())[1]
                ranks[int(rank)] = int(folder.name)
        except (OSError, TypeError, UnicodeDecodeError):
            continue
    return launcher, ranks


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_ends_all_within_a_minute(ad_nc, tmp_path, rank):
    launcher, ranks = start(tmp_path / "run", ad_nc, "--epochs", "5000")
    assert set(ranks) == {0, 1}
    os.kill(ranks[rank], signal.SIGKILL)
    _, told = launcher.communicate(timeout=60)
    assert launcher.returncode != 0 and "train.py\", line" not in told
    assert not any(Path(f"/proc/{number}").exists() for number in ranks.values())
    assert load_checkpoint(tmp_path / "run" / "last.pth")["epoch"] >= 2  # and the run can be resumed


@pytest.mark.parametrize("to, number", [
    ("one process", signal.SIGTERM),  # the others must not wait for it in vain
    ("all", signal.SIGTERM),  # as a terminal, SLURM and containers do; the launcher hands it on, too
    ("all", signal.SIGUSR1), ("launcher", signal.SIGUSR1), ("launcher", signal.SIGKILL),  # which it dies of
])  # fmt: skip
def test_a_signal_stops_all_processes_after_the_same_step_and_any_number_resumes(ad_nc, tmp_path, to, number):
    launcher, ranks = start(tmp_path / "run", ad_nc, "--epochs", "5000")
    if to == "all":
        for process in ranks.values():
            os.kill(process, number)
    os.kill(ranks[1] if to == "one process" else launcher.pid, number)
    launcher.communicate(timeout=60)  # until the last of them has closed its output
    log = (tmp_path / "run" / "training_log.txt").read_text()
    last = load_checkpoint(tmp_path / "run" / "last.pth")
    stopped = re.search(r"saved after step (\d+) of 4 of epoch (\d+)", log)
    assert re.search("stopped by SIG(TERM|USR1); resume with", log) and launcher.returncode != 0
    if stopped:  # within an epoch; else it was asked between two
        assert (last["step"], last["epoch"] + 1) == tuple(map(int, stopped.groups()))
        assert len(last["sums"]) == 2
    with without_report():
        train.main(train.parse_args(["--out", str(tmp_path / "run"), "--resume", "--epochs", str(last["epoch"] + 1)]))
    assert len(pd.read_csv(tmp_path / "run" / "training_history.csv")) == last["epoch"] + 1


# ---------------------------------------------------------------- precision and device


def test_amp_modes_that_a_device_cannot_do_are_refused():
    cpu = torch.device("cpu")
    assert runtime.pick_amp("off", cpu) is None and runtime.pick_amp("bf16", cpu) == torch.bfloat16
    assert runtime.pick_amp("auto", torch.device("cuda")) == torch.float16
    with pytest.raises(ValueError, match="fp16 needs a CUDA GPU"):
        runtime.pick_amp("fp16", cpu)


def test_a_device_that_is_not_there_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="device cuda:99 cannot be used here"):
        runtime.pick_device("cuda:99")


def test_layer_scale_gives_no_gradient_in_fp16_without_the_scaler():
    """Why the scaler is not optional: at 1e-6 the gradients of a block's MLP are below fp16's smallest number."""
    torch.manual_seed(0)
    block, x = ConvNeXtBlock(8).half(), torch.randn(2, 8, 7, 7).half()
    largest = {}
    for scale in (1.0, 2.0**16):  # GradScaler starts at 2**16
        block.zero_grad()
        (block(x).float().square().mean() * scale).backward()
        largest[scale] = block.pwconv1.weight.grad.abs().max()
    assert largest[1.0] == 0 < largest[2.0**16]


def test_out_of_memory_and_lost_helpers_are_explained_and_defects_are_not():
    args = train.parse_args(["--batch-size", "96"])
    reasons = [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"),
         "memory of the GPU ran out at --batch-size 96 and --image-size 224"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "memory of the GPU ran out at"),
        (MemoryError("Unable to allocate 9 GiB"), "memory ran out at .* 224 .Unable to allocate 9 GiB"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9"), "lower --batch-size"),
        (RuntimeError("std::bad_alloc"), "the memory ran out at --batch-size 96"),
        (RuntimeError("DataLoader timed out after 60 seconds"), "/dev/shm is full: make room there, or take --workers"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
                      "workers are out of shared memory."), "/dev/shm is full: make room there, or take --workers 0"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "a process that fetches batches has"),
    ]
    for problem, sentence in reasons:
        with pytest.raises(OSError, match=sentence), runtime.explain_end(args):
            raise problem
    with pytest.raises(RuntimeError, match="mat1 and mat2"), runtime.explain_end(args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_the_advice_names_flags_that_the_command_has():
    problems = [RuntimeError("std::bad_alloc"), RuntimeError("DataLoader timed out after 60 seconds"),
                RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")]  # fmt: skip
    for parse_args in (train.parse_args, predict.parse_args, evaluate.parse_args):
        args = parse_args([] if parse_args is train.parse_args else ["x"])
        for problem in problems:
            reason = runtime.why_it_ended(problem, args)
            assert {flag[2:].replace("-", "_") for flag in re.findall(r"--[a-z-]+", reason)} <= set(vars(args))


def test_parts_of_a_table_are_joined_in_its_order_whatever_its_index(monkeypatch):
    table = pd.DataFrame({"value": range(7)}, index=[5, 5, 1, 0, 3, 3, 2])
    for world in (2, 3):
        parts = [table.iloc[rank::world] for rank in range(world)]
        where = Runtime(None, rank=0, world=world)
        monkeypatch.setattr(Runtime, "gather", lambda self, value: parts)  # noqa: B023
        assert where.by_parts(table, lambda part: part).equals(table)
