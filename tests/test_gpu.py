"""What needs a GPU: runs on a real one, and the path of every tensor on an imitated one."""

import glob
import os
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import GPUS, ROOT, SMALL, small_flags
from test_resume import assert_same
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

import dataset
import train
from modules import make_model
from utils import load_checkpoint

REAL_GPUS = glob.glob("/dev/nvidia[0-9]*")
needs_gpu = pytest.mark.skipif(not REAL_GPUS, reason="no NVIDIA GPU")

# ---------------------------------------------------------------- on a real GPU


def start(*words):
    """Start a script that sees the GPUs, which the other tests hide."""
    environment = dict(os.environ)
    del environment["CUDA_VISIBLE_DEVICES"]
    if GPUS is not None:
        environment["CUDA_VISIBLE_DEVICES"] = GPUS
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(*words, status=0):
    """What a script prints."""
    process = start(*words)
    out, err = process.communicate(timeout=400)
    assert process.returncode == status, err
    return out + err


def train_on_gpu(data, out, *flags):
    run("train.py", "--data", data, "--out", out, "--device", "cuda", *small_flags(*flags))
    return out


@needs_gpu
@pytest.mark.parametrize("flags", [
    ["--amp", "fp16"],
    ["--amp", "bf16"],
    ["--compile"],
    ["--recipe", "small", "--image-size", "64"],
    ["--amp", "fp16", "--model", "cnn", "--epochs", "24"],
    ["--amp", "fp16", "--mixup", "0.2", "--cutmix", "1", "--ema", "0.5"],
    ["--amp", "fp16", "--model-args", "head_norm=batch"],
], ids=" ".join)  # fmt: skip
def test_a_run_on_the_gpu_learns_and_a_cpu_predicts_the_same(ad_nc, tmp_path, flags):
    out = train_on_gpu(ad_nc, tmp_path / "run", "--epochs", "8", *flags)
    if "--amp" in flags:
        precision = {"fp16": "float16", "bf16": "bfloat16"}[flags[flags.index("--amp") + 1]]
        assert f", {precision}," in (out / "training_log.txt").read_text()
    table = pd.read_csv(out / "test" / "predictions.csv")
    assert (table.prediction == table.label).mean() >= 0.9
    weights = load_checkpoint(out / "best_model.pth")["weights"]
    assert not any("_orig_mod" in name for name in weights)

    p = {}
    for device, amp in (("cuda", "auto"), ("cpu", "off")):
        run(
            "predict.py", ad_nc / "test", "--checkpoint", out / "best_model.pth",
            "--device", device, "--amp", amp, "--out", tmp_path / device,
        )  # fmt: skip
        p[device] = pd.read_csv(tmp_path / device / "predictions.csv").p_AD
    assert len(p["cpu"]) == 30
    assert np.abs(p["cuda"] - p["cpu"]).max() < 0.01


@needs_gpu
def test_a_run_killed_on_the_gpu_ends_bit_identical_if_deterministic(ad_nc, tmp_path):
    flags = ["--epochs", "40", "--deterministic", "--drop-path", "0.2", "--mixup", "0.2"]
    flags += ["--patience", "0", "--device", "cuda"]
    whole = train_on_gpu(ad_nc, tmp_path / "whole", *flags)
    killed = tmp_path / "killed"
    process = start("train.py", "--data", ad_nc, "--out", killed, *SMALL, *flags)
    while process.poll() is None and not (killed / "training_history.csv").exists():
        time.sleep(0.01)
    time.sleep(0.1)  # within a later epoch
    process.kill()
    process.communicate()
    assert 0 < load_checkpoint(killed / "last.pth")["epoch"] < 40
    run("train.py", "--out", killed, "--resume")
    assert_same(whole, killed)


@needs_gpu
def test_exhausted_gpu_memory_is_one_error_line_with_advice(ad_nc, tmp_path):
    flags = ["--model", "large", "--image-size", 4096, "--batch-size", 64, "--device", "cuda"]
    words = ("train.py", "--data", ad_nc, "--out", tmp_path / "run", *SMALL, *flags)
    printed = run(*words, status=2)
    assert printed.count("error:") == 1 and "Traceback" not in printed
    assert "out of memory" in printed
    assert "lower --batch-size (64) first, then --image-size (4096)" in printed


@needs_gpu
def test_more_processes_than_gpus_end_with_a_reason(ad_nc, tmp_path):
    processes = len(REAL_GPUS) + 1
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    words = ("train.py", "--data", ad_nc, "--out", tmp_path / "run", *SMALL, "--device", "cuda")
    printed = run(*torchrun, *words, status=1)
    assert "this machine has no GPU" in printed
    assert not (tmp_path / "run").exists()


@needs_gpu
@pytest.mark.parametrize("method", ["integrated-gradients", "occlusion", "grad-cam"])
def test_maps_of_the_gpu_are_those_of_a_cpu(ad_nc, tmp_path, method):
    pytest.importorskip("captum")
    out = train_on_gpu(ad_nc, tmp_path / "run", "--epochs", "2", "--amp", "off")
    maps = {}
    for device in ("cuda", "cpu"):
        run(
            "predict.py", ad_nc / "test", "--checkpoint", out / "best_model.pth",
            "--device", device, "--amp", "off", "--explain", method, "--out", tmp_path / device,
        )  # fmt: skip
        files = sorted((tmp_path / device).rglob("*.npz"))
        maps[device] = np.concatenate([np.load(file)["maps"].ravel() for file in files])
    assert len(maps["cpu"])
    assert np.corrcoef(maps["cpu"], maps["cuda"])[0, 1] > 0.99


# ---------------------------------------------------------------- on an imitated GPU

CUDA = torch.device("cuda", 0)


class SameThread:
    """ThreadPoolExecutor in the calling thread, because FakeTensorMode is a mode of one thread."""

    def __init__(self, workers):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        pass

    def submit(self, function, *args):
        future = SameThread(1)
        future.value = function(*args)
        return future

    def result(self):
        return self.value


@pytest.fixture
def fake_state(monkeypatch):
    """A function (model, amp) -> TrainState on a GPU that does not exist.

    Its tensors have a device, a type and a shape, but no numbers: those that are read are 0. An
    operation on tensors of two devices fails, here and not on the first user's GPU.
    """
    state = None

    def backward(loss):  # would start threads of a real device
        assert loss.device == CUDA and loss.ndim == 0
        for p in state.model.parameters():
            p.grad = torch.empty_like(p)

    def zeros(tensor):
        assert tensor.device.type == "cpu" or tensor.numel() <= 8  # a small transfer
        return np.zeros(tensor.shape, float if tensor.is_floating_point() else int)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.Tensor, "numpy", zeros)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: zeros(tensor).tolist())
    for operator in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default):
        monkeypatch.setitem(op_implementations_dict, operator, lambda mode, operator, tensor: 0)
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", lambda weight, std: weight)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**34, 2**34))
    monkeypatch.setattr(dataset, "ThreadPoolExecutor", SameThread)

    def make_state(model, amp):
        nonlocal state
        with CUDA:  # a fake parameter cannot be moved, so it is made there
            module = make_model(model)
        monkeypatch.setattr(torch.nn.Module, "to", lambda self, device, **options: self)
        state = train.TrainState(module, device=CUDA, amp=amp, lr=1e-3)
        return state

    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            torch.from_numpy(np.zeros(2))[torch.arange(2)].to(CUDA, non_blocking=True)
            torch.nn.Conv2d(1, 1, 3, device=CUDA)
        except RuntimeError as problem:
            pytest.skip(f"this PyTorch imitates no GPU ({str(problem).splitlines()[0]})")
        yield make_state


@pytest.fixture(scope="module")
def slices(ad_nc):
    return dataset.load_set(ad_nc, val_fraction=0.25, progress=None)


def train_fake_epoch(state, slices, **options):
    batches = dataset.Batches(
        slices.part("train"), 16, generator=torch.Generator(), device=state.device
    )
    schedule = dict(steps_per_epoch=len(batches), epochs=2, warmup_epochs=1, lr=1e-3)
    return train.train_one_epoch(
        state, batches, criterion=train.make_loss(), schedule=schedule, image_size=32, **options
    )


@pytest.mark.parametrize("model, amp, mixed, augment", [
    ("atto", torch.bfloat16, True, "full"),
    ("narrow", torch.float16, False, "no-flip"),
    ("cnn", None, False, "none"),
])  # fmt: skip
def test_an_epoch_and_its_validation_keep_every_tensor_on_the_gpu(
    slices, fake_state, model, amp, mixed, augment
):
    state, mix = fake_state(model, amp), None
    if mixed:
        with unset_fake_temporarily():
            mix = train.make_mix(mixup=0.2, cutmix=1.0)
    row = train_fake_epoch(state, slices, mix=mix, augment=augment)
    assert set(row) >= {"train_loss", "lr"}
    assert state.scaler.is_enabled()
    tensors = list(state.model.state_dict().values())
    for values in state.optimizer.state.values():
        tensors += values.values()
    assert {tensor.device for tensor in tensors} == {CUDA}
    scores, _ = train.validate(state, slices.part("val"), image_size=32, batch_size=16)
    assert scores["val_accuracy"] is not None


def test_a_tensor_on_the_wrong_device_fails(slices, fake_state, monkeypatch):
    def on_cpu(x, size, **options):
        return torch.zeros(len(x), 1, size, size)

    state = fake_state("atto", torch.float16)
    monkeypatch.setattr(train, "train_transform", on_cpu)
    with pytest.raises(RuntimeError, match="device|should be the same"):
        train_fake_epoch(state, slices)


def test_a_set_is_kept_on_the_gpu_only_if_it_fits(slices, fake_state, monkeypatch):
    part = slices.part("train")
    assert dataset.Batches(part, 16, device=CUDA).images.device == CUDA
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 1000))
    batches = dataset.Batches(part, 16, device=CUDA)
    assert not torch.is_tensor(batches.images)
    images, labels = next(iter(batches))
    assert images.device == labels.device == CUDA
