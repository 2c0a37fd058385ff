"""The engine predicts what the model predicts."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import engine
import utils
from checkpoint import build_model, load_checkpoint
from modules import convnext

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


def random_model(variant="atto"):
    """All parts speak: at LayerScale's start of 1e-6 the blocks would hide."""
    torch.manual_seed(0)
    model = convnext(variant).eval()
    for p in model.parameters():
        nn.init.normal_(p, mean=0.0 if p.ndim > 1 else 0.3, std=0.05 if p.ndim > 1 else 0.3)
    return model


SHAPES = [("atto", (7, 1, 64, 64)), ("pico", (3, 1, 96, 80)), ("atto", (1, 1, 33, 47))]


@pytest.mark.parametrize("variant, shape", SHAPES)
def test_the_engine_equals_the_model(variant, shape):
    model, x = random_model(variant), torch.randn(shape)
    with torch.inference_mode():
        expected = model(x)
    assert expected.std() > 0.01
    assert (engine.make_engine(model, CPU)(x) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_engine_equals_the_model_where_pytorch_lacks_the_packed_linear(monkeypatch):
    model, x = random_model(), torch.randn(5, 1, 64, 64)
    packed = engine.make_engine(model, CPU)(x)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert (engine.make_engine(model, CPU)(x) - packed).abs().max() < 1e-4 * packed.abs().max()


def test_an_image_gets_the_same_answer_alone_and_in_a_batch_and_with_any_number_of_threads():
    model, x = random_model(), torch.randn(9, 1, 64, 64)
    run, threads = engine.make_engine(model, CPU), torch.get_num_threads()
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


def test_a_later_change_of_the_model_is_not_seen():
    model, x = random_model(), torch.randn(2, 1, 64, 64)
    run = engine.make_engine(model, CPU)
    before = run(x)
    with torch.no_grad():
        for p in model.stages.parameters():
            p.zero_()
    assert torch.equal(run(x), before)


def test_in_bf16_p_ad_moves_by_less_than_a_hundredth_on_a_trained_model(run_folder, ad_nc):
    from dataset import read_index
    from slices import load_slices

    index = read_index(ad_nc)
    index = index[index.split == "test"].reset_index(drop=True)
    images, _, _ = load_slices(index.path.tolist(), (40, 48), bar=None)
    model = build_model(load_checkpoint(run_folder / "best_model.pth"))
    recipe = dict(image_size=32, device=CPU)
    exact, short = (utils.evaluate(model, images, index, amp=amp, **recipe).p_AD for amp in (None, torch.bfloat16))
    assert 0 < (exact - short).abs().max() < 0.01 and exact.std() > 0.2


# ---------------------------------------------------------------- start-up


@pytest.mark.parametrize("script", ["train", "predict", "evaluate", "dataset", "phantom", "benchmark"])
def test_help_answers_before_torch_is_imported(script):
    words = [sys.executable, "-X", "importtime", ROOT / f"{script}.py", "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "pandas" in done.stderr
    assert not {"torch", "torchvision", "sklearn", "scipy", "matplotlib"} & {
        line.split("|")[-1].strip() for line in done.stderr.splitlines()
    }


def test_one_slice_is_predicted_without_importing_what_it_does_not_need(run_folder, ad_nc, tmp_path):
    words = [next((ad_nc / "test" / "AD").iterdir()), "--checkpoint", run_folder / "best_model.pth", "--out", tmp_path]
    words = [sys.executable, "-X", "importtime", ROOT / "predict.py", *words]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "predictions.csv").exists()
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "torch" in imported and not {"torchvision", "sklearn", "matplotlib", "scipy.optimize"} & imported
