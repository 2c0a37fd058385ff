"""Several processes take the steps that one would take, and only the first writes."""

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SMALL, train_small

import parallel
import utils

EXACT = ["--amp", "off", "--no-flip", "--warmup-epochs", "0"]


def torchrun(processes, *words, timeout=300):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([*launcher, str(ROOT / "train.py"), *map(str, words)], capture_output=True, text=True,
                          timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    return done


@pytest.mark.parametrize("batch, epochs", [("64", "8"), ("13", "2")])  # a step an epoch; 4 uneven steps an epoch
def test_two_processes_take_the_steps_of_one(ad_nc, tmp_path, batch, epochs):
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
    import train

    train.main(train.parse_args(["--out", str(tmp_path / "run"), "--resume", "--epochs", "3"]))
    assert len(pd.read_csv(tmp_path / "run" / "training_history.csv")) == 3


def test_wrong_input_ends_all_processes(ad_nc, run_folder):
    done = torchrun(2, "--data", ad_nc, "--out", run_folder, *SMALL, timeout=120)
    assert done.returncode != 0 and done.stderr.count("is not empty, and a run never overwrites another") == 1
    assert "train.py\", line" not in done.stderr  # of none of the processes there is a traceback


def test_a_scheduler_that_names_only_the_number_of_processes_starts_one(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert parallel.start(torch.device("cpu")) == (parallel.Ranks(0, 1, 0), torch.device("cpu"))


def test_shares_cover_a_batch_once():
    for world in (1, 2, 3, 5):
        for n in range(12):
            assert sum(parallel.Ranks(rank, world).share(n) for rank in range(world)) == n


def test_the_optimizer_of_a_run_is_the_fused_one(run_folder):
    groups = utils.load_checkpoint(run_folder / "last.pth")["optimizer"]["param_groups"]
    assert all(group["fused"] for group in groups)
