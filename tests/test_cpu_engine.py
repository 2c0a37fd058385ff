"""The CPU engine predicts what the model predicts."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit
from torch import nn

from adnc.cpu_engine import make_engine
from adnc.data.index import list_inputs
from dataset import SliceSet, load_inputs
from modules import convnext
from predict import predict_logits
from utils import build_model, load_checkpoint

CPU = torch.device("cpu")


def random_model(variant="atto"):
    """A model whose every part has an effect: a new one has LayerScale at 1e-6."""
    torch.manual_seed(0)
    model = convnext(variant).eval()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, mean=0.0, std=0.05)
        else:
            nn.init.normal_(p, mean=0.3, std=0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.1, 2)
    return model


def largest_difference(a, b):
    """Relative to the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


# ---------------------------------------------------------------- the same answers


@pytest.mark.parametrize("variant, shape", [
    ("atto", (7, 1, 64, 64)), ("pico", (3, 1, 96, 80)), ("atto", (1, 1, 33, 47)),
    ("narrow", (7, 1, 64, 48)),
])  # fmt: skip
def test_the_engine_equals_the_model(variant, shape):
    model, x = random_model(variant), torch.randn(shape)
    with torch.inference_mode():
        expected = model(x)
    assert expected.std() > 0.01
    engine = make_engine(model, device=CPU, amp=None)
    assert largest_difference(engine(x), expected) < 1e-4


def test_the_engine_equals_the_model_if_pytorch_lacks_the_packed_linear(monkeypatch):
    model, x = random_model(), torch.randn(5, 1, 64, 64)
    packed = make_engine(model, device=CPU, amp=None)(x)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    unpacked = make_engine(model, device=CPU, amp=None)(x)
    assert largest_difference(unpacked, packed) < 1e-4


def test_an_image_gets_the_same_answer_alone_in_a_batch_and_with_any_number_of_threads():
    model, x = random_model(), torch.randn(9, 1, 64, 64)
    engine, threads = make_engine(model, device=CPU, amp=None), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([engine(image[None]) for image in x])
        one_thread = engine(x)
        torch.set_num_threads(3)
        three_threads = engine(x)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert largest_difference(one_thread, alone) < 1e-5
    assert largest_difference(three_threads, alone) < 1e-5


def test_a_later_change_of_the_model_has_no_effect():
    model, x = random_model(), torch.randn(2, 1, 64, 64)
    engine = make_engine(model, device=CPU, amp=None)
    before = engine(x)
    with torch.no_grad():
        for p in model.stages.parameters():
            p.zero_()
    assert torch.equal(engine(x), before)


# ---------------------------------------------------------------- the self-check


class ReplacedOperator:
    """torch.ops.mkldnn with one operator replaced; None: it is missing."""

    def __init__(self, name, operator):
        self.name, self.operator, self.original = name, operator, torch.ops.mkldnn

    def __getattr__(self, name):
        if name != self.name:
            return getattr(self.original, name)
        if self.operator is None:
            raise AttributeError(f"no operator {name}")
        return self.operator


def refuse(*args):
    raise RuntimeError("this processor cannot do that")


def zeros(x, weight, bias, kind, scalars, how):
    return torch.zeros(*x.shape[:-1], len(bias))


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_gelu_in_the_kernel_and_after_it_give_the_same_answer(monkeypatch, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model, x = random_model(), torch.randn(3, 1, 64, 64)
    with torch.inference_mode():
        expected = model(x)
    engine = make_engine(model, device=CPU, amp=None)
    torch.testing.assert_close(engine(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name, operator", [
    ("_reorder_linear_weight", None),
    ("_reorder_linear_weight", refuse),
    ("_linear_pointwise", lambda x, weight, bias: x),
    ("_linear_pointwise", zeros),
], ids=["missing", "refuses", "other signature", "other answer"])  # fmt: skip
def test_the_plain_model_predicts_if_a_private_operator_has_changed(monkeypatch, name, operator):
    model, x = random_model(), torch.randn(3, 1, 64, 64)
    with torch.inference_mode():
        expected = model(x)
    monkeypatch.setattr(torch.ops, "mkldnn", ReplacedOperator(name, operator))
    with pytest.warns(RuntimeWarning, match="cannot be used here .*; the plain model predicts"):
        engine = make_engine(model, device=CPU, amp=None)
    assert torch.allclose(engine(x), expected, atol=1e-5)


def test_a_self_check_that_passes_is_silent_and_draws_no_random_number():
    model = random_model()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_engine(model, device=CPU, amp=None)
    assert torch.equal(torch.rand(1), expected)


# ---------------------------------------------------------------- logits of slices


def test_in_bf16_p_ad_moves_by_less_than_a_hundredth_on_a_trained_model(run_folder, ad_nc):
    model = build_model(load_checkpoint(run_folder / "best_model.pth"))
    slices = load_inputs(list_inputs([ad_nc / "test"]), slice_size=(40, 48), progress=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a CPU without bf16 predicts with the plain model
        p, q = (
            expit(predict_logits(model, slices, image_size=32, device=CPU, amp=amp))
            for amp in (None, torch.bfloat16)
        )
    assert 0 < np.abs(p - q).max() < 0.01
    assert p.std() > 0.2


def test_logits_are_deterministic_and_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    model = convnext("atto")
    nn.init.normal_(model.head.weight, std=1.0)
    noise = np.random.default_rng(0).integers(0, 256, (9, 40, 48), dtype=np.uint8)
    slices = SliceSet(pd.DataFrame({"label": ["NC"] * 9, "row": range(9)}), noise)
    once, again, by_two = (
        predict_logits(model, slices, image_size=32, device=CPU, amp=None, batch_size=n)
        for n in (64, 64, 2)
    )
    assert np.array_equal(once, again)
    assert once.std() > 1e-3
    # kernels, and with them the order of sums, depend on the number of rows: some ten roundings
    np.testing.assert_allclose(by_two, once, atol=2e-6 * np.abs(once).max())
