
import numpy as np
import pandas as pd
import pytest
import torch

import utils
from modules import ConvNeXtBlock, convnext

RECIPE = dict(steps_per_epoch=10, epochs=5, warmup_epochs=1, lr=1e-3)


# ---------------------------------------------------------------- schedule


def test_learning_rate_rises_to_its_peak_over_the_first_epoch_and_falls_to_zero():
    lrs = [utils.lr_at(step, **RECIPE) for step in range(51)]
    assert lrs[0] == pytest.approx(1e-4)  # a tenth of the way up, not a wasted step at zero
    assert lrs[9] == pytest.approx(1e-3) == lrs[10] == max(lrs)
    assert np.all(np.diff(lrs[:10]) > 0) and np.all(np.diff(lrs[10:]) < 0)
    assert lrs[30] == pytest.approx(0.5e-3)  # halfway through the cosine
    assert lrs[50] == pytest.approx(0, abs=1e-12)


def test_learning_rate_without_warm_up_or_with_nothing_but_warm_up():
    assert utils.lr_at(0, **RECIPE | dict(warmup_epochs=0)) == 1e-3
    assert utils.lr_at(9, **RECIPE | dict(epochs=1)) == pytest.approx(1e-3)
    assert utils.lr_at(4, **RECIPE | dict(warmup_epochs=0.5)) == pytest.approx(1e-3)


# ---------------------------------------------------------------- precision and device


def test_amp_modes_that_a_device_cannot_do_are_refused():
    cpu = torch.device("cpu")
    assert utils.pick_amp("off", cpu) is None and utils.pick_amp("bf16", cpu) == torch.bfloat16
    assert utils.pick_amp("auto", torch.device("cuda")) == torch.float16
    with pytest.raises(ValueError, match="fp16 needs a CUDA GPU"):
        utils.pick_amp("fp16", cpu)


def test_a_device_that_is_not_there_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="device cuda:99 cannot be used here"):
        utils.pick_device("cuda:99")


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


# ---------------------------------------------------------------- evaluation and checkpoints


def test_evaluation_is_deterministic_and_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    model = convnext("atto")
    torch.nn.init.normal_(model.head.weight, std=1.0)
    images = np.random.default_rng(0).integers(0, 256, (9, 40, 48), dtype=np.uint8)
    table = pd.DataFrame({"scan": list("aaabbbccc"), "slice": range(9)})
    common = dict(image_size=32, device=torch.device("cpu"), amp=None)
    one = utils.evaluate(model, images, table, **common)
    assert one.p_AD.between(0, 1).all() and one.p_AD.std() > 1e-3
    assert one.equals(utils.evaluate(model, images, table, **common))
    by_two = utils.evaluate(model, images, table, **common, batch_size=2)
    # kernels, and with them the order of sums, depend on the number of rows: some ten roundings of float32
    np.testing.assert_allclose(by_two.logit, one.logit, atol=2e-6 * one.logit.abs().max())


def test_a_write_that_fails_leaves_the_file_before_it(tmp_path):
    file = tmp_path / "x.json"
    utils.write_json(file, {"a": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        utils.write_atomically(file, fail)
    assert file.read_text() == '{\n  "a": 1\n}\n' and [p.name for p in tmp_path.iterdir()] == ["x.json"]
