"""On a real GPU, which few machines have: what the other tests show of a CPU, of fp16 with its scaler as well."""

import glob
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from conftest import GPUS, ROOT, SMALL
from test_interruption import same

from utils import load_checkpoint

GPU = "cuda"
pytestmark = pytest.mark.skipif(not glob.glob("/dev/nvidia[0-9]*"), reason="no NVIDIA GPU")


def start(script, *words):
    environment = {**os.environ, **({} if GPUS is None else {"CUDA_VISIBLE_DEVICES": GPUS})}
    if GPUS is None:
        del environment["CUDA_VISIBLE_DEVICES"]
    return subprocess.Popen([sys.executable, script, *map(str, words)], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def run(script, *words, status=0):
    process = start(script, *words)
    out, err = process.communicate(timeout=400)
    assert process.returncode == status, err
    return out + err


def trained(data, out, *flags):
    run("train.py", "--data", data, "--out", out, *SMALL, "--device", GPU, *flags)
    return out


@pytest.mark.parametrize("flags", [
    [], ["--compile"], ["--recipe", "small", "--image-size", "64"], ["--model", "cnn", "--epochs", "24"],
    ["--workers", "2"],
    ["--amp", "bf16"], ["--mixup", "0.2", "--cutmix", "1", "--ema", "0.5", "--head-norm", "batch"],
], ids=" ".join)  # fmt: skip
def test_a_run_on_the_gpu_learns_and_predicts_what_a_cpu_predicts(ad_nc, tmp_path, flags):
    out = trained(ad_nc, tmp_path / "run", "--epochs", "8", *flags)
    checkpoint = load_checkpoint(out / "best_model.pth")
    assert (out / "training_log.txt").read_text().count(", float16") or "bf16" in flags
    table = pd.read_csv(out / "test" / "predictions.csv")
    assert (table.prediction == table.label).mean() >= 0.9 and not any("_orig_mod" in key for key in
                                                                       checkpoint["weights"])  # fmt: skip
    p = {}
    for device in (GPU, "cpu"):
        run("predict.py", ad_nc / "test", "--checkpoint", out / "best_model.pth", "--device", device, "--amp",
            "auto" if device == GPU else "off", "--out", tmp_path / device)  # fmt: skip
        p[device] = pd.read_csv(tmp_path / device / "predictions.csv").p_AD
    assert len(p["cpu"]) == 30 and np.abs(p[GPU] - p["cpu"]).max() < 0.01


def test_a_run_that_was_stopped_on_the_gpu_ends_bit_identical_if_deterministic(ad_nc, tmp_path):
    flags = ["--epochs", "40", "--deterministic", "--drop-path", "0.2", "--mixup", "0.2", "--patience", "0"]
    whole = trained(ad_nc, tmp_path / "whole", *flags)
    process = start("train.py", "--data", ad_nc, "--out", tmp_path / "run", *SMALL, *flags)
    for _ in process.stdout:
        if (tmp_path / "run" / "training_history.csv").exists():
            break
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=100)
    last = load_checkpoint(tmp_path / "run" / "last.pth")
    assert process.returncode == 143 and 0 < last["epoch"] < 40, err
    run("train.py", "--out", tmp_path / "run", "--resume")
    assert same(whole, tmp_path / "run")


def test_out_of_the_memory_of_a_gpu_is_one_line_and_leaves_nothing(ad_nc, tmp_path):
    said = run("train.py", "--data", ad_nc, "--out", tmp_path / "run", *SMALL, "--model", "large", "--image-size", 2048,
               "--batch-size", 40, status=2)  # fmt: skip
    assert said.count("error:") == 1 and "Traceback" not in said and not (tmp_path / "run").exists()
    assert "the memory of the GPU ran out at --batch-size 40 and --image-size 2048" in said and "lower" in said


def test_two_processes_on_one_gpu_end_with_a_reason(ad_nc, tmp_path):
    """NCCL takes no GPU twice, and calls it an error of its own."""
    said = run("-m", "torch.distributed.run", "--nproc-per-node", 2, "train.py", "--data", ad_nc, "--out",
               tmp_path / "run", *SMALL, "--device", f"{GPU}:0", status=1)  # fmt: skip
    assert "is one GPU for 2 processes" in said and "train.py\", line" not in said, said


@pytest.mark.parametrize("method", ["integrated-gradients", "occlusion", "grad-cam"])
def test_maps_on_the_gpu_are_those_of_a_cpu(ad_nc, tmp_path, method):
    pytest.importorskip("captum")
    out = trained(ad_nc, tmp_path / "run", "--epochs", "2", "--amp", "off")
    maps = {}
    for device in (GPU, "cpu"):
        run("predict.py", ad_nc / "test", "--checkpoint", out / "best_model.pth", "--device", device, "--amp", "off",
            "--explain", method, "--out", tmp_path / device)  # fmt: skip
        maps[device] = np.concatenate([np.load(path)["maps"].ravel() for path in
                                       sorted((tmp_path / device).rglob("*.npz"))])  # fmt: skip
    assert len(maps["cpu"]) and np.corrcoef(maps["cpu"], maps[GPU])[0, 1] > 0.99
