"""utils.py: seeds, device and precision, learning-rate schedule."""

import random
import types

import numpy as np
import pytest
import torch

import utils
from utils import explain_out_of_memory, lr_at, pick_amp, pick_device, seed_everything, seed_of

SCHEDULE = dict(steps_per_epoch=10, epochs=5, warmup_epochs=1, lr=1e-3)


def test_learning_rate_rises_to_its_peak_over_the_first_epoch_and_falls_to_zero():
    rates = [lr_at(step, **SCHEDULE) for step in range(51)]
    assert rates[0] == pytest.approx(1e-4)  # a tenth of the way up, not a wasted step at zero
    assert rates[9] == pytest.approx(1e-3) == rates[10] == max(rates)
    assert np.all(np.diff(rates[:10]) > 0) and np.all(np.diff(rates[10:]) < 0)
    assert rates[30] == pytest.approx(0.5e-3)  # halfway through the cosine
    assert rates[50] == pytest.approx(0, abs=1e-12)


def test_learning_rate_without_warm_up_or_with_nothing_but_warm_up():
    assert lr_at(0, **{**SCHEDULE, "warmup_epochs": 0}) == 1e-3
    assert lr_at(9, **{**SCHEDULE, "epochs": 1}) == pytest.approx(1e-3)
    assert lr_at(4, **{**SCHEDULE, "warmup_epochs": 0.5}) == pytest.approx(1e-3)


def test_seeds_of_different_steps_differ_and_seed_all_generators():
    assert len({seed_of(seed, epoch) for seed in range(20) for epoch in range(20)}) == 400
    draws = []
    for _ in range(2):
        seed_everything(3, 1)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_amp_modes_that_a_device_cannot_do_are_refused():
    cpu = torch.device("cpu")
    assert pick_amp("off", cpu) is None and pick_amp("bf16", cpu) == torch.bfloat16
    with pytest.raises(ValueError, match="fp16 needs a CUDA GPU"):
        pick_amp("fp16", cpu)


@pytest.mark.parametrize("name", ["cuda:99", "meta", "toaster"])
def test_a_device_that_cannot_be_used_is_refused_in_a_sentence(name):
    with pytest.raises(ValueError, match=f"device {name} cannot be used here"):
        pick_device(name)


@pytest.mark.parametrize("problem", [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9"),
    MemoryError(),
])  # fmt: skip
def test_exhausted_memory_is_one_sentence_with_advice(problem):
    with pytest.raises(OSError, match="out of memory.*; lower --batch-size"):
        with explain_out_of_memory("lower --batch-size"):
            raise problem


def test_another_error_of_pytorch_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        with explain_out_of_memory("lower --batch-size"):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_validation_scores_are_slice_level_but_for_the_auroc():
    import pandas as pd

    index = pd.DataFrame({"scan": list("aabb"), "label": ["AD", "AD", "NC", "NC"]})
    scores, remark = utils.validation_scores(index, np.array([2.0, -1.0, -0.5, -3.0]))
    assert scores["val_accuracy"] == 0.75 and scores["val_scan_auroc"] == 1.0 and remark == ""
    p_label = 1 / (1 + np.exp(-np.array([2.0, -1.0, 0.5, 3.0])))
    assert scores["val_loss"] == pytest.approx(-np.log(p_label).mean())
    assert utils.validation_scores(index, np.ones(4))[1] == "predicts AD for every slice"


@pytest.mark.parametrize(("capability", "expected"), [
    ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16),
])  # fmt: skip
def test_auto_precision_on_a_gpu_is_bf16_where_the_card_has_it(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_amp("auto", torch.device("cuda")) == expected
    assert pick_amp("fp16", torch.device("cuda")) == torch.float16


@pytest.mark.parametrize("missing", ["torch.ops.mkldnn", "torch.cpu"])
def test_a_pytorch_without_its_private_names_trains_in_float32(monkeypatch, missing):
    """Which CPU this is, only private functions tell."""
    monkeypatch.setattr(missing, types.SimpleNamespace())
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    if missing == "torch.cpu":
        ops = types.SimpleNamespace(_is_mkldnn_bf16_supported=lambda: True)
        monkeypatch.setattr(torch.ops, "mkldnn", ops)
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert not utils.has_native_bf16()
    assert pick_amp("auto", torch.device("cpu")) is None
