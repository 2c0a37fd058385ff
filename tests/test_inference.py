"""The engine predicts what the model predicts."""

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import dataset
from adnc import cpu_engine as inference
from adnc.data import index as listing
from utils import build_model, load_checkpoint
from modules import convnext
from adnc.distributed import Runtime

CPU = Runtime(torch.device("cpu"))
ROOT = Path(__file__).parents[1]


def random_model(variant="atto"):
    """All parts speak: at LayerScale's start of 1e-6 the blocks would hide."""
    torch.manual_seed(0)
    model = convnext(variant).eval()
    for p in model.parameters():
        nn.init.normal_(p, mean=0.0 if p.ndim > 1 else 0.3, std=0.05 if p.ndim > 1 else 0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.1, 2)
    return model


SHAPES = [("atto", (7, 1, 64, 64)), ("pico", (3, 1, 96, 80)), ("atto", (1, 1, 33, 47)), ("narrow", (7, 1, 64, 48))]


@pytest.mark.parametrize("variant, shape", SHAPES)
def test_the_engine_equals_the_model(variant, shape):
    model, x = random_model(variant), torch.randn(shape)
    with torch.inference_mode():
        expected = model(x)
    assert expected.std() > 0.01
    assert (inference.make_engine(model, CPU)(x) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_engine_equals_the_model_where_pytorch_lacks_the_packed_linear(monkeypatch):
    model, x = random_model(), torch.randn(5, 1, 64, 64)
    packed = inference.make_engine(model, CPU)(x)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert (inference.make_engine(model, CPU)(x) - packed).abs().max() < 1e-4 * packed.abs().max()


def test_an_image_gets_the_same_answer_alone_and_in_a_batch_and_with_any_number_of_threads():
    model, x = random_model(), torch.randn(9, 1, 64, 64)
    run, threads = inference.make_engine(model, CPU), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, single = torch.cat([run(image[None]) for image in x]), run(x)
        torch.set_num_threads(3)
        several = run(x)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    for other in (single, several):
        assert torch.allclose(alone, other, atol=1e-5 * alone.abs().max().item())


class Other:
    """torch.ops.mkldnn in which one operator is replaced; None: it is missing."""

    def __init__(self, name, operator):
        self.name, self.operator, self.genuine = name, operator, torch.ops.mkldnn

    def __getattr__(self, name):
        found = self.operator if name == self.name else getattr(self.genuine, name)
        if found is None:
            raise AttributeError(f"no operator {name}")
        return found


def refuse(*args):
    raise RuntimeError("this processor cannot do that")


@pytest.mark.parametrize("name, operator", [
    ("_reorder_linear_weight", None), ("_reorder_linear_weight", refuse), ("_linear_pointwise", lambda x, w, b: x),
    ("_linear_pointwise", lambda x, w, b, kind, scalars, how: torch.zeros(*x.shape[:-1], len(b))),
], ids=["missing", "refuses", "other signature", "other answer"])  # fmt: skip
def test_where_private_operators_are_not_what_they_were_the_plain_model_predicts_and_says_so(
    monkeypatch, name, operator
):
    model, x = random_model(), torch.randn(3, 1, 64, 64)
    with torch.inference_mode():
        expected = model(x)
    monkeypatch.setattr(torch.ops, "mkldnn", Other(name, operator))
    with pytest.warns(RuntimeWarning, match="the fast engine cannot be used here .*; the plain model predicts"):
        run = inference.make_engine(model, CPU)
    assert torch.allclose(run(x), expected, atol=1e-5)


def test_the_check_of_the_engine_says_nothing_where_it_is_right_and_uses_no_random_number():
    torch.manual_seed(0)
    expected = torch.rand(1)
    model = random_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(0)
        inference.make_engine(model, CPU)
    assert torch.equal(torch.rand(1), expected)


def test_a_later_change_of_the_model_is_not_seen():
    model, x = random_model(), torch.randn(2, 1, 64, 64)
    run = inference.make_engine(model, CPU)
    before = run(x)
    with torch.no_grad():
        for p in model.stages.parameters():
            p.zero_()
    assert torch.equal(run(x), before)


def test_in_bf16_p_ad_moves_by_less_than_a_hundredth_on_a_trained_model(run_folder, ad_nc):
    model = build_model(load_checkpoint(run_folder / "best_model.pth"))
    slices = dataset.load_inputs(listing.list_inputs([ad_nc / "test"]), {"slice_size": (40, 48)}, bar=None)
    with warnings.catch_warnings():
        # A processor without bf16 instructions has the plain model in bf16.
        warnings.simplefilter("ignore")
        exact, short = (inference.predict_logits(model, slices, {"image_size": 32}, Runtime(CPU.device, amp))
                        for amp in (None, torch.bfloat16))  # fmt: skip
    p, q = (1 / (1 + np.exp(-z)) for z in (exact, short))
    assert 0 < np.abs(p - q).max() < 0.01 and p.std() > 0.2


# ---------------------------------------------------------------- from slices to predictions


def noise(n=9):
    """A SliceSet of n slices of noise, three a scan."""
    images = np.random.default_rng(0).integers(0, 256, (n, 40, 48), dtype=np.uint8)
    index = pd.DataFrame({"scan": [f"s{i // 3}" for i in range(n)], "slice": range(n), "label": "NC", "row": range(n)})
    return dataset.SliceSet(index, images)


def test_prediction_is_deterministic_and_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    model = convnext("atto")
    torch.nn.init.normal_(model.head.weight, std=1.0)
    one, again, by_two = (inference.predict_logits(model, noise(), {"image_size": 32}, CPU, batch_size=n)
                          for n in (64, 64, 2))  # fmt: skip
    assert np.array_equal(one, again) and one.std() > 1e-3
    # kernels, and with them the order of sums, depend on the number of rows: some ten roundings of float32
    np.testing.assert_allclose(by_two, one, atol=2e-6 * np.abs(one).max())


def test_predictions_follow_the_column_row_and_no_label_or_order_of_the_index(run_folder, ad_nc):
    checkpoint = load_checkpoint(run_folder / "best_model.pth")
    slices = dataset.load_inputs(listing.list_inputs([ad_nc / "test"]), checkpoint, bar=None)
    order = np.random.default_rng(0).permutation(len(slices))
    index = slices.index.iloc[order]
    index.index = np.arange(len(index)) // 2 + 1000  # neither in order, nor unique, nor rows
    shuffled = dataset.SliceSet(index, slices.images)
    key = ["scan", "slice"]
    raw = (inference.predict_slices(checkpoint, part, CPU) for part in (slices, shuffled))
    one, other = (inference.calibrated(table, checkpoint, 0.6).sort_values(key) for table in raw)
    text = [name for name in one if name not in ("logit", "p_AD")]
    assert one[text].reset_index(drop=True).equals(other[text].reset_index(drop=True)) and one.p_AD.std() > 0.1
    np.testing.assert_allclose(one.logit, other.logit, atol=1e-5)


# ---------------------------------------------------------------- start-up


def test_one_slice_is_predicted_without_importing_what_it_does_not_need(run_folder, ad_nc, tmp_path):
    words = [next((ad_nc / "test" / "AD").iterdir()), "--checkpoint", run_folder / "best_model.pth", "--out", tmp_path]
    words = [sys.executable, "-X", "importtime", ROOT / "predict.py", *words]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "predictions.csv").exists()
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "torch" in imported and not {"torchvision", "sklearn", "matplotlib", "scipy.optimize"} & imported
