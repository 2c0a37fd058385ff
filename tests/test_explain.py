"""Attribution maps: their arithmetic, the randomisation check, and the folder of explanations."""

import filecmp
import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import write_slice
from PIL import Image
from torch import nn

import predict
from adnc.data.augment import eval_transform
from adnc.data.index import list_inputs
from adnc.errors import InputError
from adnc.explain import attribution
from adnc.phantom.anatomy import render
from adnc.phantom.draw import plan_local
from dataset import decode_set, load_inputs, read_index
from docs.experiments import attribution as experiment
from modules import make_model
from utils import build_model, load_checkpoint

BLACK = -torch.ones(1, 1, 32, 32)
# With the paper's initialisation an untrained block is close to the identity.
LIVELY = {"layer_scale": 1.0, "init_std": "fan_in"}


def noise(n, side=32):
    return torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(0))


def build(variant, **options):
    """(a function that builds a model, one of its models in evaluation mode)."""

    def fresh_model():
        return make_model(variant=variant, in_chans=1, num_classes=2, **options)

    torch.manual_seed(1)
    return fresh_model, fresh_model().eval()


@pytest.fixture(scope="module")
def atto():
    return build("atto", **LIVELY)


def edges(model, x, baseline):
    """A method that looks like an explanation and ignores the model."""
    dy, dx = torch.gradient(x, dim=(2, 3))
    return dx.abs() + dy.abs()


def noise_from_weights(model, x, baseline):
    """A method that depends on nothing but the weights."""
    seed = int(1e6 * model.head.weight.abs().sum())
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def brightness_model(sign=1.0):
    """(model, slice, region): the logit of AD, or of NC for sign -1, is the mean brightness; the
    slice is black with a white square inside the region."""
    model = nn.Sequential(
        nn.Conv2d(1, 1, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(1, 2),
    )
    with torch.no_grad():
        model[0].weight.fill_(1 / 9)
        model[0].bias.fill_(0.0)
        model[4].bias.fill_(0.0)
        model[4].weight.copy_(sign * torch.tensor([[-1.0], [1.0]]))
    x = BLACK.clone()
    x[..., 20:28, 4:12] = 1.0
    region = np.zeros((1, 32, 32), bool)
    region[0, 18:30, 2:14] = True
    return model.eval(), x, region


# ---------------------------------------------------------------- the methods


def test_the_flag_of_predict_offers_every_method():
    assert predict.METHODS == ("auto", *attribution.METHODS)


@pytest.mark.parametrize("variant, options", [("atto", LIVELY), ("cnn", {})])
def test_integrated_gradients_sum_to_the_margin_over_the_baseline(variant, options):
    _, model = build(variant, **options)
    x = noise(3)
    maps = attribution.attribute("integrated-gradients", model, x, BLACK)
    margin = attribution.margin(model)
    with torch.no_grad():
        expected = (margin(x) - margin(BLACK)).numpy()
    assert abs(expected).min() > 1e-3
    tolerance = 0.02 * abs(expected).max()
    np.testing.assert_allclose(maps.sum((1, 2)), expected, rtol=0.05, atol=tolerance)


@pytest.mark.parametrize("method", attribution.METHODS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_only_feature_of_a_model_gets_the_attribution_with_the_sign_of_its_class(method, sign):
    model, x, region = brightness_model(sign)
    maps = attribution.attribute(method, model, x, BLACK)
    assert maps.shape == (1, 32, 32)
    assert maps.dtype == np.float32
    towards_class = sign * maps
    assert experiment.share_inside(towards_class, region)[0] > 0.95
    assert towards_class.sum() > 0
    assert -towards_class.clip(max=0).sum() <= 0.05 * abs(maps).sum()


@pytest.mark.parametrize("variant, side", [("atto", 4), ("narrow", 4), ("cnn", 8)])
def test_the_layer_of_grad_cam_has_the_expected_resolution(variant, side):
    _, model = build(variant)
    shapes = []
    layer = attribution.cam_layer(model)
    layer.register_forward_hook(lambda layer, inputs, output: shapes.append(output.shape))
    model(noise(1, 64))
    assert tuple(shapes[0][2:]) == (side, side)


# ---------------------------------------------------------------- the randomisation check


@pytest.mark.parametrize("variant", ["atto", "narrow", "cnn"])
def test_weights_are_randomised_from_the_head_down_until_none_is_left(variant):
    fresh_model, model = build(variant)
    trained = model.state_dict()
    names = [name for name, _ in attribution.model_parts(model)]
    part = "block" if variant == "cnn" else "stage"
    assert names == ["head", *(f"{part} {k}" for k in range(len(names) - 1, 0, -1))]

    drawn = {name for name, weight in trained.items() if weight.ndim > 1}
    before = set()
    for n_parts in range(1, len(names) + 1):
        weights = attribution.randomise(model, fresh_model, n_parts).state_dict()
        changed = {name for name in drawn if not torch.equal(weights[name], trained[name])}
        assert before < changed
        before = changed
    assert before == drawn


def test_randomising_leaves_the_model_and_the_random_state_as_they_were(atto):
    fresh_model, model = atto
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    attribution.randomise(model, fresh_model, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def edges_of_one_sign(model, x, baseline):
    """The same picture for every model, or the same in the other colour."""
    return edges(model, x, baseline) * model.head.bias.sum().add(1e-9).sign()


def no_map(model, x, baseline):
    return torch.zeros_like(x)


@pytest.mark.parametrize("method", [edges, edges_of_one_sign, no_map])
def test_a_method_that_ignores_the_weights_is_unusable(atto, method):
    fresh_model, model = atto
    table = attribution.check(method, model, fresh_model, noise(2), BLACK)
    assert (table[["signed", "absolute"]] == 1).all(axis=None)
    assert not attribution.is_usable(table)
    assert attribution.describe("edges", table, 2).startswith("UNUSABLE: edges")


@pytest.mark.parametrize("method", [noise_from_weights, "integrated-gradients"])
def test_a_method_that_depends_on_the_weights_passes(atto, method, monkeypatch):
    monkeypatch.setattr(attribution, "STEPS", 8)
    fresh_model, model = atto
    table = attribution.check(method, model, fresh_model, noise(2), BLACK)
    draws = ["stage 1" for _ in range(attribution.N_DRAWS)]
    assert table.part.tolist() == ["head", "stage 4", "stage 3", "stage 2", *draws]
    assert table.draw.tolist() == [0, 0, 0, 0, *range(attribution.N_DRAWS)]
    assert attribution.is_usable(table)
    assert table.absolute.tail(attribution.N_DRAWS).is_unique  # each draw has weights of its own


def test_the_mean_over_the_draws_decides_and_their_range_is_reported():
    table = pd.DataFrame({
        "part": ["head", "stage 1", "stage 1", "stage 1"],
        "draw": [0, 0, 1, 2],
        "signed": 0.0,
        "absolute": [1, 0.4, 0.4, 0.6],
    })  # fmt: skip
    assert attribution.is_usable(table)
    sentence = attribution.describe("a method", table, 8)
    assert "0.47 without signs (0.40 to 0.60 in 3 draws)" in sentence
    assert not attribution.is_usable(table.assign(absolute=[0, 0.4, 0.5, 0.6]))


def test_maps_are_compared_inside_the_head_only():
    """Where slice and baseline are black, the maps of all models are alike."""
    x = BLACK.clone()
    x[..., 8:24, 8:24] = noise(1, 16).abs()
    mask = attribution.inside_head(x, BLACK)
    assert mask[0, 8:24, 8:24].all()
    assert mask.sum() == 16 * 16
    assert attribution.inside_head(BLACK, BLACK).all()  # a black slice is compared everywhere


# ---------------------------------------------------------------- the folder of explanations


def make_explainer(model_functions, method):
    fresh_model, model = model_functions
    checkpoint = {
        "image_size": 32,
        "mean": 0.5,
        "std": 0.5,
        "mean_slice": torch.full((40, 48), 60, dtype=torch.uint8),
        "calibration": {"temperature": 2.0},
    }
    return attribution.Explainer(model, fresh_model, checkpoint, method, torch.device("cpu"))


def test_what_is_known_about_the_maps_of_a_model_is_said_wherever_they_are(atto):
    explainer = make_explainer(atto, "grad-cam")
    assert explainer.caution("grad-cam").startswith("A colour shows")
    explainer.checkpoint["maps"] = "They do not light the ventricles."
    for method in attribution.METHODS:
        assert explainer.caution(method).startswith("They do not light the ventricles. A colour")


def load(folder):
    return load_inputs(list_inputs([folder]), slice_size=(40, 48), progress=None)


@pytest.fixture(scope="module")
def two_slices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    write_slice(folder / "7_1.png", True, 1)
    write_slice(folder / "8_1.png", False, 2)
    return load(folder)


def test_a_checkpoint_holds_the_mean_of_its_training_slices(run_folder, ad_nc):
    split = pd.read_csv(run_folder / "split.csv")
    train = []
    for path in split.path[split.split == "train"]:
        with Image.open(ad_nc / path) as image:
            train.append(np.asarray(image, float))
    mean = load_checkpoint(run_folder / "best_model.pth")["mean_slice"]
    assert mean.dtype == torch.uint8
    np.testing.assert_array_equal(mean.numpy(), np.mean(train, axis=0).round())


def test_each_slice_gets_an_overlay_and_arrays_whatever_its_name(atto, tmp_path, pictures):
    names = [
        "7_1", "7_2", "a b_1", "a?b_1", "=1+1_3", "_..", "new\nline_4", "x" * 200 + "_5", "<b>&_6",
        "\udcff_7",
    ]  # fmt: skip
    for seed, name in enumerate(names):
        write_slice(tmp_path / "in" / "slice.png", True, seed)
        (tmp_path / "in" / "slice.png").rename(tmp_path / "in" / f"{name}.png")
    (tmp_path / "in" / "8_1.png").write_bytes(b"no image")
    slices = load(tmp_path / "in")
    explained = make_explainer(atto, "grad-cam").write(slices, tmp_path / "out")

    table = explained.table
    assert sorted(table.path) == sorted(slices.index.path[slices.index.error.isna()])
    assert len(table) == len(names)
    files = {path.name for path in (tmp_path / "out").iterdir() if path.is_file()}
    assert len(files) == len(list((tmp_path / "out").iterdir()))
    assert all(name.isascii() for name in files)
    assert table.overlay.is_unique
    assert not table[["maps", "place"]].duplicated().any()
    assert {*table.overlay, *table.maps, "legend.png", "checks.csv", "summary.json"} < files
    assert sum(name.startswith("scan_") for name in files) == 1  # of scan 7, with two slices

    for row in table.itertuples():
        with Image.open(explained.overlays[row.path]) as image:
            assert image.size == (48, 40)
        arrays = np.load(tmp_path / "out" / row.maps)
        values = arrays["maps"][row.place]
        assert values.shape == (32, 32)
        assert values.dtype == np.float32
        assert values.clip(min=0).sum() == pytest.approx(row.for_AD, rel=1e-4)
        np.testing.assert_allclose(arrays["mean"], arrays["maps"].mean(0), rtol=1e-5, atol=1e-7)

    written = pd.read_csv(tmp_path / "out" / "explanations.csv", encoding_errors="surrogateescape")
    assert written.overlay.tolist() == table.overlay.tolist()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["method"] == "grad-cam"
    assert summary["sentence"] == explained.sentence


def test_a_method_that_fails_its_check_is_marked_on_every_picture(
    atto, two_slices, tmp_path, pictures, monkeypatch
):
    monkeypatch.setitem(attribution.METHODS, "grad-cam", edges)
    explainer = make_explainer(atto, "grad-cam")
    failed = explainer.write(two_slices, tmp_path / "failed")
    assert not failed.usable
    assert failed.sentence.startswith("UNUSABLE: grad-cam")
    assert json.loads((tmp_path / "failed" / "summary.json").read_text())["usable"] is False

    monkeypatch.setattr(attribution, "LIMIT", 2.0)  # now the same maps pass
    passed = explainer.write(two_slices, tmp_path / "passed")
    assert passed.usable
    for path in two_slices.index.path:
        with Image.open(failed.overlays[path]) as image:
            marked = np.asarray(image)
        with Image.open(passed.overlays[path]) as image:
            plain = np.asarray(image)
        assert (marked != plain).any()
        assert (marked[20:] == plain[20:]).all()  # the mark is at the top


def test_all_scans_have_the_scale_of_the_training_slices(
    run_folder, ad_nc, two_slices, tmp_path, pictures
):
    """A map of half the size gets half the colour."""
    checkpoint = load_checkpoint(run_folder / "best_model.pth")
    recorded = checkpoint["map_scale"]
    assert set(recorded) == set(attribution.METHODS) and min(recorded.values()) > 0

    def write(out):
        explainer = attribution.Explainer(
            build_model(checkpoint), lambda: make_model(**checkpoint["model"]), checkpoint,
            "grad-cam", torch.device("cpu"),
        )  # fmt: skip
        return explainer.write(two_slices, out)

    trained = write(tmp_path / "trained")
    assert trained.full_colour == recorded["grad-cam"]
    assert trained.scale == "the 99.5 % quantile of the maps of 8 training slices"
    assert json.loads((tmp_path / "trained" / "summary.json").read_text())["full_colour"] == (
        trained.full_colour
    )
    slices = decode_set(ad_nc, progress=None)
    slices.index["split"] = "train"
    again = attribution.measure_map_scale(
        checkpoint, build_model(checkpoint), slices.part("train"), torch.device("cpu")
    )
    for method in attribution.METHODS:  # on more slices, about the same
        assert 0.3 < again[method] / recorded[method] < 3

    checkpoint["map_scale"] = {**recorded, "grad-cam": 1e6 * recorded["grad-cam"]}
    pale = write(tmp_path / "pale")
    assert max(map(colour_of, trained.overlays.values())) > 100
    assert max(map(colour_of, pale.overlays.values())) < 2

    checkpoint["map_scale"] = None
    own = write(tmp_path / "own")
    assert own.scale.endswith("of 2 of these slices, since the checkpoint has none of its training")


def colour_of(path):
    """The largest difference of the channels of a picture."""
    with Image.open(path) as image:
        return int(np.ptp(np.asarray(image).astype(int), axis=2).max())


def test_without_captum_training_records_no_scale(run_folder, two_slices, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    checkpoint = load_checkpoint(run_folder / "best_model.pth")
    model = build_model(checkpoint)
    cpu = torch.device("cpu")
    assert attribution.measure_map_scale(checkpoint, model, two_slices, cpu) is None


def test_nothing_is_painted_outside_the_head(atto, tmp_path, pictures, monkeypatch):
    """Even if the map is there: the centre of this slice is a head, with a black hole in it."""
    pixels = np.zeros((40, 48), np.uint8)
    pixels[10:30, 14:34] = 120
    pixels[18:22, 22:26] = 0
    Image.fromarray(pixels).save(tmp_path / "7_1.png")
    monkeypatch.setitem(attribution.METHODS, "grad-cam", lambda model, x, baseline: x * 0 + 1)
    explained = make_explainer(atto, "grad-cam").write(load(tmp_path / "7_1.png"), tmp_path / "out")
    with Image.open(explained.overlays[explained.table.path.iloc[0]]) as image:
        coloured = np.ptp(np.asarray(image).astype(int), axis=2) > 0
    coloured[:18] = False  # where UNUSABLE is written
    assert coloured[18:30, 14:34].all()
    coloured[18:30, 14:34] = False
    assert not coloured.any()


def test_auto_takes_the_first_method_that_passes(atto, two_slices, tmp_path, monkeypatch):
    monkeypatch.setitem(attribution.METHODS, "integrated-gradients", edges)
    monkeypatch.setitem(attribution.METHODS, "occlusion", noise_from_weights)
    explained = make_explainer(atto, "auto").write(two_slices, tmp_path / "out")
    assert explained.usable
    assert explained.sentence.startswith("occlusion passes")
    assert explained.sentence.endswith("; integrated-gradients failed it")
    checks = pd.read_csv(tmp_path / "out" / "checks.csv")
    assert len(checks) == 14 and set(checks.method[:7]) == {"integrated-gradients"}
    assert set(checks.method[7:]) == {"occlusion"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["method"] == "occlusion"


@pytest.mark.parametrize("size", [(48, 40), (40, 48), (61, 33)])
def test_a_map_is_laid_over_the_part_of_the_slice_that_the_model_saw(size):
    pixels = np.zeros((1, *size), np.uint8)
    row, column = size[0] // 2 + 6, size[1] // 2 - 5
    pixels[0, row - 1 : row + 2, column - 1 : column + 2] = 255
    view = eval_transform(torch.from_numpy(pixels)[:, None], 32, 0.0, 1.0)[0, 0].numpy()
    placed = attribution.to_slice(view, size)
    assert placed.shape == size
    centre = [(placed * at).sum() / placed.sum() for at in np.indices(size)]
    np.testing.assert_allclose(centre, (row, column), atol=0.35)


def test_without_captum_the_explainer_is_refused(atto, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(InputError, match="needs captum.*requirements-extra.txt"):
        make_explainer(atto, "auto")


# ---------------------------------------------------------------- docs/experiments/attribution.py


def test_random_maps_have_the_spectrum_of_a_map_in_other_places():
    model, x, _ = brightness_model()
    maps = attribution.attribute("occlusion", model, x, BLACK)
    other = experiment.scramble(maps, np.random.default_rng(0))
    spectrum, other_spectrum = (abs(np.fft.rfft2(m - m.mean())) for m in (maps, other))
    np.testing.assert_allclose(spectrum, other_spectrum, atol=1e-3 * spectrum.max())
    assert abs(np.corrcoef(maps.ravel(), other.ravel())[0, 1]) < 0.5


def test_deletion_replaces_the_highest_pixels_inside_the_mask():
    model, x, region = brightness_model()
    maps = np.zeros((1, 32, 32), np.float32)
    maps[0, 20:28, 4:12] = 1  # the white square: 64 of 1,024 pixels
    everywhere = np.ones_like(region)
    before = attribution.margin(model)(x).item()

    def margin_after(maps, mask):
        return experiment.deletion(model, x, BLACK, maps, mask, share=0.0625)[0]

    assert margin_after(maps, everywhere) == pytest.approx(0, abs=1e-6)
    assert margin_after(-maps, everywhere) == pytest.approx(before, rel=1e-5)
    assert margin_after(maps, ~region) == pytest.approx(before, rel=1e-5)


def test_shuffled_labels_keep_subjects_whole_and_change_nothing_else(ad_nc, tmp_path):
    before = read_index(ad_nc)
    after = read_index(experiment.shuffle_labels(ad_nc, tmp_path / "shuffled"))
    assert (after.groupby("subject").label.nunique() == 1).all()
    keys = ["scan", "slice", "subject", "split"]
    joined = before.merge(after, on=keys, validate="one_to_one")
    assert len(joined) == len(before) == len(after)
    assert before.label.value_counts().equals(after.label.value_counts())
    assert 0.2 < (joined.label_x != joined.label_y).mean() < 0.8
    assert all(map(filecmp.cmp, joined.path_x, joined.path_y))


def test_the_altered_region_is_where_atrophy_acts_and_not_the_noise():
    scan = plan_local(10)[0]._replace(atrophy=0.0)
    region = experiment.altered(scan)
    assert region.shape == (6, 240, 256)
    area = region.mean((1, 2))
    assert area.min() > 0.0005
    assert area.max() < 0.02
    rows, columns = np.nonzero(region.any(0))
    assert 100 < rows.min() and rows.max() < 190  # the temporal lobe
    assert 80 < columns.min() and columns.max() < 200
    a, b = render(scan._replace(atrophy=1.0)), render(scan._replace(atrophy=1.1))
    assert (a[~region] == b[~region]).mean() > 0.99


def test_maps_are_compared_with_regions_and_drawn(run_folder, ad_nc, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "N_RANDOM", 2)
    checkpoint = load_checkpoint(run_folder / "best_model.pth")
    slices = load_inputs(
        list_inputs([ad_nc / "test"]), slice_size=checkpoint["slice_size"], progress=None
    )
    regions = np.zeros((len(slices), *checkpoint["slice_size"]), bool)
    regions[:, 10:30, 14:34] = True  # the middle, where the blob of AD is
    tried = experiment.Experiment(checkpoint, checkpoint, slices, regions)
    assert tried.region.shape == (30, 32, 32) and 0.2 < tried.region.mean() < 0.4

    name, method = "distance", experiment.distance
    maps = attribution.attribute(method, tried.model, tried.x, tried.baseline)
    row, parts = tried.check(name, method, maps)
    assert row[-1] == "UNUSABLE" and len(row) == 3 + len(parts)  # it does not ask the model
    assert tried.localise(name, maps)[0] == tried.classify(name, maps)[0] == name
    experiment.plot_maps(tmp_path / "maps.png", tried, regions)
    assert Image.open(tmp_path / "maps.png").width > 500
