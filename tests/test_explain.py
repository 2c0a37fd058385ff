"""Attributions: their arithmetic, the check that a method has to pass, and what predict.py writes."""

import filecmp
import importlib.util
import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, write_slice
from PIL import Image
from test_checkpoint import content
from torch import nn

from adnc.explain import attribution as explain
import predict
from adnc.phantom.anatomy import render
from utils import load_checkpoint, save_checkpoint
from dataset import read_index
from adnc.files import read_csv
from modules import ConvNeXt, make_model
from adnc.phantom.draw import plan_local
from adnc.data.augment import eval_transform

BLACK = -torch.ones(1, 1, 32, 32)


def noise(n, side=32):
    return torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(0))


def edges(model, x, baseline):
    """A method that looks like an explanation and ignores the model."""
    dy, dx = torch.gradient(x, dim=(2, 3))
    return dx.abs() + dy.abs()


def drawn_from_weights(model, x, baseline):
    """A method that is nothing but the weights: other weights, another map."""
    seed = int(1e6 * model.head.weight.abs().sum())
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def card(variant, **options):
    """As much of a checkpoint as the check reads, of a model whose blocks are not the identity."""
    torch.manual_seed(1)
    facts = {"variant": variant, "in_chans": 1, "num_classes": 2, **options}
    model = make_model(**facts)
    return {"model": facts, "weights": model.state_dict()}, model.eval()


@pytest.fixture(scope="module")
def atto():
    return card("atto", layer_scale=1.0, init_std="fan_in")


def bright_square(sign=1.0):
    """A network that sees only how bright a slice is, where it is bright, and calls that AD (or NC for sign -1); and a
    dark slice with a square."""
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(1, 2))  # fmt: skip
    with torch.no_grad():
        model[0].weight.fill_(1 / 9)
        model[0].bias.fill_(0.0)
        model[4].bias.fill_(0.0)
        model[4].weight.copy_(sign * torch.tensor([[-1.0], [1.0]]))
    x, region = BLACK.clone(), np.zeros((1, 32, 32), bool)
    x[..., 20:28, 4:12], region[0, 18:30, 2:14] = 1.0, True
    return model.eval(), x, region


# ---------------------------------------------------------------- the methods


@pytest.mark.parametrize("variant", ["atto", "cnn"])
def test_integrated_gradients_sum_to_the_margin_over_the_baseline(variant, atto):
    _, model = atto if variant == "atto" else card(variant)
    x = noise(3)
    maps = explain.attribute("integrated-gradients", model, x, BLACK)
    with torch.no_grad():
        expected = (explain.margin(model)(x) - explain.margin(model)(BLACK)).numpy()
    assert abs(expected).min() > 1e-3  # the sums are not those of nothing
    np.testing.assert_allclose(maps.sum((1, 2)), expected, rtol=0.05, atol=0.02 * abs(expected).max())


@pytest.mark.parametrize("method", explain.METHODS)
def test_what_a_network_looks_at_gets_the_attribution_with_the_sign_of_its_class(method):
    for sign in (1.0, -1.0):
        model, x, region = bright_square(sign)
        maps = explain.attribute(method, model, x, BLACK)
        assert maps.shape == (1, 32, 32) and maps.dtype == np.float32
        assert explain.share_inside(sign * maps, region)[0] > 0.95
        assert (sign * maps).sum() > 0 and not (-sign * maps).clip(min=0).sum() > 0.05 * abs(maps).sum()


def test_grad_cam_looks_at_a_sixteenth_of_the_side_whatever_the_number_of_stages():
    for variant, side in (("atto", 4), ("narrow", 4), ("cnn", 8)):
        model, seen = card(variant)[1], []
        explain.cam_layer(model).register_forward_hook(lambda layer, given, out: seen.append(out.shape))  # noqa: B023
        model(noise(1, 64))
        assert tuple(seen[0][2:]) == (side, side)


# ---------------------------------------------------------------- the check


@pytest.mark.parametrize("variant", ["atto", "narrow", "cnn"])
def test_weights_are_randomised_from_the_head_down_until_none_is_left(variant):
    checkpoint, _ = card(variant)
    models = list(explain.randomised(checkpoint))
    assert [name for name, _ in models] == ["head"] + [
        f"{'block' if variant == 'cnn' else 'stage'} {k}" for k in range(len(models) - 1, 0, -1)]
    drawn = [name for name, weight in checkpoint["weights"].items() if weight.ndim > 1]
    changed = [{name for name in drawn if not torch.equal(model.state_dict()[name], checkpoint["weights"][name])}
               for _, model in models]
    assert changed[0] and all(a < b for a, b in zip(changed, changed[1:])) and changed[-1] == set(drawn)


def test_a_method_that_ignores_the_weights_is_unusable_and_one_that_depends_on_them_passes(atto, monkeypatch):
    monkeypatch.setattr(explain, "STEPS", 8)
    x = noise(2)
    ignoring = explain.check(edges, atto[0], x, BLACK)
    assert (ignoring[["signed", "absolute"]] == 1).all(axis=None) and not explain.is_usable(ignoring)
    turned = explain.check(lambda model, *given: edges(model, *given) * model.head.bias.sum().add(1e-9).sign(),
                           atto[0], x, BLACK)  # the same picture, or the same in the other colour
    assert not explain.is_usable(turned)
    silent = explain.check(lambda model, x, baseline: torch.zeros_like(x), atto[0], x, BLACK)
    assert not explain.is_usable(silent)
    for method in (drawn_from_weights, "integrated-gradients", "grad-cam"):
        found = explain.check(method, atto[0], x, BLACK)
        assert explain.is_usable(found) and found.absolute.tail(explain.DRAWS).is_unique, method
    assert "UNUSABLE" in explain.describe("edges", ignoring, 2)
    # The mean decides, and the spread is said.
    one_of_three = found.assign(absolute=[0, 0, 0, 0, 0.4, 0.4, 0.6])
    assert explain.is_usable(one_of_three) and "0.47 without signs (0.40 to 0.60 in 3 draws)" in explain.describe(
        "m", one_of_three, 8)
    assert not explain.is_usable(one_of_three.assign(absolute=[0, 0, 0, 0, 0.4, 0.5, 0.6]))


def test_only_the_head_is_compared(atto):
    """Where slice and baseline are black, maps are alike for every model: that is no agreement."""
    x = BLACK.clone()
    x[..., 8:24, 8:24] = noise(1, 16).abs()
    where = explain.inside_head(x, BLACK)
    assert where[0, 8:24, 8:24].all() and where.sum() == 256
    assert explain.inside_head(BLACK, BLACK).all()  # nothing to see: everything counts


# ---------------------------------------------------------------- what a map is worth


def test_random_maps_are_as_smooth_as_the_map_and_elsewhere():
    maps = explain.attribute("occlusion", *bright_square()[:2], BLACK)
    other = explain.scramble(maps, np.random.default_rng(0))
    spectra = [abs(np.fft.rfft2(each - each.mean())) for each in (maps, other)]
    np.testing.assert_allclose(*spectra, atol=1e-3 * spectra[0].max())
    assert abs(np.corrcoef(maps.ravel(), other.ravel())[0, 1]) < 0.5


def test_deletion_takes_away_the_pixels_that_speak_most_for_ad():
    model, x, region = bright_square()
    found = np.zeros((1, 32, 32), np.float32)
    found[0, 20:28, 4:12] = 1  # 64 of 1,024 pixels
    everywhere = np.ones_like(region)
    before = explain.margin(model)(x).item()
    assert explain.deletion(model, x, BLACK, found, everywhere, 0.0625)[0] == pytest.approx(0, abs=1e-6)
    assert explain.deletion(model, x, BLACK, -found, everywhere, 0.0625)[0] == pytest.approx(before, rel=1e-5)
    assert explain.deletion(model, x, BLACK, found, ~region, 0.0625)[0] == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize("size", [(48, 40), (40, 48), (61, 33)])
def test_a_map_lies_over_the_place_of_the_slice_that_the_model_saw(size):
    pixels = np.zeros((1, *size), np.uint8)
    row, column = size[0] // 2 + 6, size[1] // 2 - 5
    pixels[0, row - 1 : row + 2, column - 1 : column + 2] = 255
    seen = eval_transform(torch.from_numpy(pixels)[:, None], 32, 0.0, 1.0)[0, 0].numpy()
    placed = explain.to_slice(seen, size)
    assert placed.shape == size
    found = np.array([(placed * at).sum() / placed.sum() for at in np.indices(size)])
    np.testing.assert_allclose(found, (row, column), atol=0.35)


# ---------------------------------------------------------------- predict.py --explain


def explained(run_folder, out, inputs, method="grad-cam", checkpoint=None):
    words = [str(inputs), "--checkpoint", str(checkpoint or run_folder / "best_model.pth"), "--out", str(out),
             "--explain", method]  # fmt: skip
    predict.main(predict.parse_args(words))
    folder = out / "explanations"
    summary = json.loads((folder / "summary.json").read_text())
    table = read_csv(folder / "explanations.csv").astype({"slice": "Int64", "place": int, **dict.fromkeys(
        ("for_AD", "for_NC", "full_colour", "signed", "absolute"), float)})
    return explain.Explained(folder, table, summary["sentence"], summary["usable"], summary["caution"])


def test_the_methods_of_the_flag_are_those_of_explain():
    assert predict.METHODS == ("auto", *explain.METHODS)


def test_a_checkpoint_holds_the_mean_of_its_training_slices(run_folder, ad_nc):
    split = pd.read_csv(run_folder / "split.csv")
    train = np.stack([np.asarray(Image.open(ad_nc / path)) for path in split.path[split.split == "train"]])
    mean = load_checkpoint(run_folder / "best_model.pth")["mean_slice"]
    assert mean.dtype == torch.uint8
    np.testing.assert_array_equal(mean.numpy(), train.astype(float).mean(0).round())


def test_each_slice_gets_an_overlay_and_arrays_whatever_it_is_named(run_folder, tmp_path, pictures, capsys):
    hostile = ["7_1", "7_2", "a b_1", "a?b_1", "=1+1_3", "_..", "new\nline_4", "x" * 200 + "_5", "<b>&_6", "\udcff_7"]
    for seed, name in enumerate(hostile):
        write_slice(tmp_path / "in" / "slice.png", True, seed)
        (tmp_path / "in" / "slice.png").rename(tmp_path / "in" / f"{name}.jpeg")
    (tmp_path / "in" / "8_1.jpeg").write_bytes(b"no image")
    found = explained(run_folder, tmp_path / "out", tmp_path / "in")
    predictions = pd.read_csv(tmp_path / "out" / "predictions.csv", encoding_errors="surrogateescape")
    assert len(predictions) == len(hostile) + 1 and len(found.table) == len(hostile)
    folder = tmp_path / "out" / "explanations"
    names = [path.name for path in folder.iterdir()]
    assert not any(path.is_dir() for path in folder.iterdir()) and all(name.isascii() for name in names)
    assert found.table.overlay.is_unique and set(found.table.overlay) | set(found.table.maps) < set(names)
    for row in found.table.itertuples():
        assert Image.open(folder / row.overlay).size == (48, 40)
        arrays = np.load(folder / row.maps)
        assert arrays["maps"][row.place].shape == (32, 32) and arrays["maps"].dtype == np.float32
        assert arrays["maps"][row.place].clip(min=0).sum() == pytest.approx(row.for_AD, rel=1e-4)
        np.testing.assert_allclose(arrays["mean"], arrays["maps"].mean(0), rtol=1e-5, atol=1e-7)
    assert len({(row.maps, row.place) for row in found.table.itertuples()}) == len(hostile)
    assert {"legend.png", "checks.csv", "summary.json"} < set(names)
    # That of scan 7, which has two slices.
    assert sum(name.startswith("scan_") for name in names) == 1
    out = capsys.readouterr()
    assert found.sentence in out.out + out.err
    checks = pd.read_csv(folder / "checks.csv")
    assert checks.part.tolist() == ["head", "stage 4", "stage 3", "stage 2", *["stage 1"] * explain.DRAWS]
    assert checks.draw.tolist() == [0, 0, 0, 0, *range(explain.DRAWS)]
    assert (checks.method == "grad-cam").all()


def test_a_method_that_fails_its_check_is_marked_on_every_picture(run_folder, ad_nc, tmp_path, pictures, monkeypatch,
                                                                  capsys):
    monkeypatch.setitem(explain.METHODS, "grad-cam", edges)
    found = explained(run_folder, tmp_path / "bad", ad_nc / "test" / "AD" / "300_70.jpeg")
    assert not found.usable and found.sentence.startswith("UNUSABLE: grad-cam")
    assert json.loads((tmp_path / "bad" / "explanations" / "summary.json").read_text())["usable"] is False
    assert f"warning: {found.sentence}" in capsys.readouterr().err
    monkeypatch.setattr(explain, "LIMIT", 2.0)
    fine = explained(run_folder, tmp_path / "good", ad_nc / "test" / "AD" / "300_70.jpeg")
    marked, plain = (np.asarray(Image.open(each.folder / each.table.overlay[0])) for each in (found, fine))
    assert fine.usable and (marked != plain).any() and (marked[20:] == plain[20:]).all()


def test_auto_takes_the_first_method_that_passes_on_the_model(run_folder, ad_nc, tmp_path, monkeypatch):
    monkeypatch.setitem(explain.METHODS, "integrated-gradients", edges)
    monkeypatch.setitem(explain.METHODS, "occlusion", drawn_from_weights)
    found = explained(run_folder, tmp_path, ad_nc / "test" / "AD" / "300_70.jpeg", "auto")
    checks = pd.read_csv(found.folder / "checks.csv")
    assert checks.method.tolist() == ["integrated-gradients"] * 7 + ["occlusion"] * 7
    assert found.usable and json.loads((found.folder / "summary.json").read_text())["method"] == "occlusion"
    assert found.sentence.startswith("occlusion passes") and found.sentence.endswith("; integrated-gradients failed it")


def test_the_plain_model_in_float32_is_explained(run_folder):
    explainer = explain.Explainer(load_checkpoint(run_folder / "best_model.pth"), "auto", torch.device("cpu"))
    assert isinstance(explainer.model, ConvNeXt) and not explainer.model.training
    assert {weight.dtype for weight in explainer.model.parameters()} == {explainer.baseline.dtype} == {torch.float32}
    assert explainer.baseline.shape == (1, 1, 32, 32)


def test_what_an_explanation_lacks_is_said_before_anything_is_written(run_folder, ad_nc, tmp_path, monkeypatch):
    old = content(run_folder)
    old.pop("mean_slice")
    save_checkpoint(tmp_path / "old.pth", **old)
    with pytest.raises(ValueError, match="holds no mean of its training slices.*train it again"):
        explained(run_folder, tmp_path / "out", ad_nc / "test", checkpoint=tmp_path / "old.pth")
    predict.main(predict.parse_args([str(ad_nc / "test"), "--checkpoint", str(tmp_path / "old.pth"), "--out",
                                     # Without --explain it predicts as ever.
                                     str(tmp_path / "fine")]))
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ValueError, match="needs captum.*pip install 'captum>=0.9'"):
        explained(run_folder, tmp_path / "out", ad_nc / "test")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the script behind docs/explain.md


@pytest.fixture(scope="module")
def attribution():
    path = ROOT / "docs" / "attribution.py"
    spec = importlib.util.spec_from_file_location("attribution", path)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_shuffled_labels_keep_subjects_whole_and_change_nothing_else(attribution, ad_nc, tmp_path):
    before, after = read_index(ad_nc), read_index(attribution.shuffle_labels(ad_nc, tmp_path / "shuffled"))
    assert (after.groupby("subject").label.nunique() == 1).all()
    joined = before.merge(after, on=["scan", "slice", "subject", "split"], validate="one_to_one")
    assert len(joined) == len(before) == len(after)
    assert before.label.value_counts().equals(after.label.value_counts())
    assert 0.2 < (joined.label_x != joined.label_y).mean() < 0.8
    assert all(map(filecmp.cmp, joined.path_x, joined.path_y))


def test_the_altered_region_is_where_atrophy_acts_and_not_the_noise(attribution):
    scan = plan_local(10)[0]._replace(atrophy=0.0)
    region = attribution.altered(scan)
    assert region.shape == (6, 240, 256) and (0.0005 < region.mean((1, 2))).all() and (region.mean((1, 2)) < 0.02).all()
    rows, columns = np.nonzero(region.any(0))
    # Temporal, below.
    assert 100 < rows.min() and rows.max() < 190 and 80 < columns.min() and columns.max() < 200
    assert (render(scan._replace(atrophy=1.0))[~region] == render(scan._replace(atrophy=1.1))[~region]).mean() > 0.99
