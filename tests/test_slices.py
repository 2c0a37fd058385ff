"""What becomes of the pixels."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_set, write_slice
from PIL import Image
from torchvision.transforms import v2

import dataset
from adnc.data import pixels as slices
from adnc.data import augment as transforms
from dataset import read_index

TF = v2.functional

# ---------------------------------------------------------------- decoding and batches


def test_decoding_gives_the_files_pixels_and_reports_what_it_cannot_read(ad_nc, tmp_path):
    paths = read_index(ad_nc).path.tolist()[:4]
    (tmp_path / "x_1.jpeg").write_bytes(b"not an image")
    assert slices.common_size(paths) == (40, 48)
    images, _, errors = slices.load_slices([*paths, str(tmp_path / "x_1.jpeg")], (40, 48), bar=None)
    assert images.shape == (5, 40, 48) and images.dtype == np.uint8
    for image, path in zip(images, paths):
        assert np.array_equal(image, np.asarray(Image.open(path)))
    assert errors[:4] == [None] * 4 and "cannot be read" in errors[4] and images[4].max() == 0


@pytest.mark.parametrize("form", ["png", "tiff", "webp", "bmp"])
def test_pixels_that_are_damaged_are_refused_and_never_guessed(tmp_path, form):
    """Whatever Pillow refuses is refused, although its reader of metadata meets the error first."""
    noise, path = np.random.default_rng(0), tmp_path / f"1_70.{form}"
    slope = np.add.outer(np.arange(120), np.arange(100)) + noise.integers(0, 30, (120, 100))
    Image.fromarray(slope.astype(np.uint8)).save(path, **{"compression": "tiff_lzw"} if form == "tiff" else {})
    good, refused = path.read_bytes(), 0
    for at in noise.integers(60, len(good) - 20, 40):
        path.write_bytes(good[:at] + bytes([good[at] ^ 255]) + good[at + 1 :])
        try:
            with Image.open(path) as image:
                image.load()
        except Exception:
            refused += 1
            assert "cannot be read" in slices.load_slices([str(path)], (120, 100), bar=None)[2][0]
    assert refused == 40 or form != "png"  # which has a checksum


def write_16_bits(folder, **largest):
    """Files of 16 bits a pixel, a slope from 0 to `largest` in each; returns their paths."""
    paths = [folder / f"{name}_1.png" for name in largest]
    for path, most in zip(paths, largest.values()):
        Image.fromarray(np.linspace(0, most, 40 * 48).reshape(40, 48).round().astype(np.uint16)).save(path)
    return list(map(str, paths))


@pytest.mark.parametrize(("largest", "bits"), [
    (dict(a=4000, dark=120), 12), (dict(a=24_000, dark=900), 15), (dict(a=65_535, dark=3000), 16),
    (dict(a=200, dark=0), 8), (dict(a=4096, b=4095), 13)])  # fmt: skip
def test_files_of_16_bits_are_read_by_one_rule_for_the_whole_set(tmp_path, largest, bits):
    """The bits that the largest value of all takes: a file alone would make its own, and brighten what is dark."""
    paths = write_16_bits(tmp_path, **largest)
    Image.fromarray(np.full((40, 48), 77, np.uint8)).save(tmp_path / "plain_1.png")
    images, stats, errors = slices.load_slices([*paths, str(tmp_path / "plain_1.png")], (40, 48), bar=None)
    assert errors == [None] * 3 and stats.bits.tolist() == [bits, bits, 8] and images[2].max() == 77
    assert [int(image.max()) for image in images[:2]] == [round(n * 255 / (2**bits - 1)) for n in largest.values()]
    assert len(np.unique(images[0])) > 120 * (largest["a"] > 1000)


def test_one_bright_pixel_that_darkens_a_whole_set_is_named(tmp_path):
    paths = write_16_bits(tmp_path, **{f"a{n}": 4000 + n for n in range(9)}, hot=40_000)
    _, stats, _ = slices.load_slices(paths, (40, 48), bar=None)
    table = stats.assign(path=paths, label=None)
    assert stats.depth.tolist() == [12] * 9 + [16] and (stats.bits == 16).all()
    said = list(slices.describe_bits(table))
    assert len(said) == 2 and said[1].startswith("SUSPICIOUS: most of them use 12 bits or fewer, and become 16 times")
    assert f"for the sake of 1 that use 16, first {paths[9]}" in said[1]
    assert len(list(slices.describe_bits(table[:9]))) == 1


def test_files_of_16_bits_that_use_8_are_named_too(tmp_path):
    _, stats, _ = slices.load_slices(write_16_bits(tmp_path, dark=200), (40, 48), bar=None)
    (said,) = slices.describe_bits(stats.assign(path="x", label=None))
    assert said.startswith("1 of 1 slices have 16 bits a pixel and are read as of 8")


@pytest.mark.parametrize("damage", [
    lambda data: data[: len(data) // 2] + b"\xff\xd9", lambda data: data[: len(data) // 2] + bytes(300) + data[-200:],
    lambda data: encoded_as(data, lambda pixels: 255 - pixels),
    lambda data: encoded_as(data, lambda pixels: pixels * 0),
])  # fmt: skip
def test_a_slice_that_looks_unlike_the_others_is_named(tmp_path, damage):
    """JPEG data that are damaged in the middle decode without an error."""
    root = write_set(tmp_path, slices=[70, 71])
    for number, path in enumerate(read_index(root).path):
        write_slice(Path(path), True, number, (256, 240))
    assert not any("unlike" in line for line in dataset.decode_set(root, keep=False, bar=None).passed)
    path = sorted((root / "train" / "AD").iterdir())[3]
    path.write_bytes(damage(path.read_bytes()))
    found = dataset.decode_set(root, keep=False, bar=None)
    assert not found.bad
    (said,) = (line for line in found.passed if "unlike" in line)
    assert said.startswith(f"SUSPICIOUS: 1 of 36 slices look unlike the others, first {path}: ") and "usual are" in said


def encoded_as(data, change):
    file = io.BytesIO()
    Image.fromarray(change(np.asarray(Image.open(io.BytesIO(data))))).save(file, "JPEG")
    return file.getvalue()


def test_files_of_16_bits_are_read_as_those_in_training(tmp_path):
    paths = write_16_bits(tmp_path, dark=120, full=4095, more=4096)
    images, stats, errors = slices.load_slices(paths, (40, 48), bar=None, bits=12)
    assert [int(image.max()) for image in images] == [7, 255, 0] and errors[:2] == [None] * 2
    assert "holds values up to 4,096; expected 4,095 at most" in errors[2]


def test_an_image_of_another_size_is_scaled_to_cover_and_cropped(tmp_path):
    Image.fromarray(np.tile(np.arange(100, dtype=np.uint8), (40, 1))).save(tmp_path / "a.png")
    image = slices.decode(tmp_path / "a.png", (40, 60))
    assert image.shape == (40, 60)
    assert image[0, 0] == 20 and image[0, -1] == 79  # the middle 60 of 100 columns


# ---------------------------------------------------------------- transforms


@pytest.fixture
def smooth():
    """A smooth random image, uint8 (1, 1, 240, 256)."""
    noise = torch.rand(1, 1, 240, 256, generator=torch.Generator().manual_seed(0))
    return (TF.gaussian_blur(noise, [9, 9]) * 255).to(torch.uint8)


def warp_one(image, x0=0.0, y0=0.0, w=256.0, h=240.0, mirror=1.0, degrees=0.0, size=224):
    """`warp` by one map, on the scale [0, 1]."""
    numbers = [torch.tensor([v]) for v in (x0, y0, w, h)]
    angle = torch.deg2rad(torch.tensor([degrees]))
    theta = transforms.affine(*numbers, image.shape[2:], torch.tensor([mirror]), angle)
    return transforms.warp(image, theta, size) * transforms.STD + transforms.MEAN


def inner(x):
    # At the very edge torchvision repeats the crop's border, the map looks beyond it.
    return x[..., 1:-1, 1:-1]


def test_a_crop_equals_torchvisions(smooth):
    expected = TF.resized_crop(smooth / 255, 20, 30, 200, 210, [224, 224], antialias=False)
    assert (inner(warp_one(smooth, 30, 20, 210, 200)) - inner(expected)).abs().max() < 1e-5


def test_a_flip_equals_torchvisions(smooth):
    expected = TF.horizontal_flip(TF.resized_crop(smooth / 255, 20, 30, 200, 210, [224, 224], antialias=False))
    assert (inner(warp_one(smooth, 30, 20, 210, 200, mirror=-1.0)) - inner(expected)).abs().max() < 1e-5


@pytest.mark.parametrize("degrees", [-10.0, 3.0, 10.0])
def test_a_rotation_equals_torchvisions(smooth, degrees):
    def rotate(x):
        return TF.rotate(x, degrees, interpolation=v2.InterpolationMode.BILINEAR)

    crop = TF.crop(smooth / 255, 8, 16, 224, 224)
    inside = rotate(torch.ones_like(crop)) > 1 - 1e-6
    difference = (warp_one(smooth, 16, 8, 224, 224, degrees=degrees) - rotate(crop)).abs()
    assert difference[inside].max() < 1e-5


def test_augmentation_keeps_range_shape_and_number():
    images = torch.randint(0, 256, (32, 1, 60, 64), dtype=torch.uint8)
    x = transforms.warp(images, transforms.sample_affine(32, 60, 64), 48)
    assert x.shape == (32, 1, 48, 48) and x.dtype == torch.float32
    assert x.min() >= -1 and x.max() <= 1 and x.std() > 0.1


def test_augmentation_keeps_the_label_with_its_image():
    images = torch.arange(0, 250, 10, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 60, 64)
    centre = transforms.warp(images, transforms.sample_affine(25, 60, 64), 32)[:, 0, 16, 16]
    assert torch.allclose(centre, images[:, 0, 0, 0] / 127.5 - 1, atol=1e-5)


def test_training_without_augmentation_sees_what_evaluation_sees():
    images = torch.randint(0, 256, (4, 1, 60, 64), dtype=torch.uint8)
    assert torch.equal(transforms.train_transform(images, 48, augment=False), transforms.eval_transform(images, 48))
    assert not torch.equal(transforms.train_transform(images, 48), transforms.train_transform(images, 48))


def test_crops_have_the_area_and_aspect_of_the_recipe():
    theta = transforms.sample_affine(4000, 240, 256, flip=False, degrees=0, generator=torch.Generator().manual_seed(0))
    w, h = theta[:, 0, 0] * 256, theta[:, 1, 1] * 240
    area = w * h / (240 * 256)
    assert area.min() >= 0.8 - 1e-4 and area.max() <= 1 + 1e-4
    assert 0.85 < area.mean() < 0.95
    assert (w / h).min() >= 3 / 4 - 1e-4 and (w / h).max() <= 4 / 3 + 1e-4
    # The crop stays inside the image.
    assert (theta[:, 0, 2].abs() + theta[:, 0, 0] <= 1 + 1e-5).all()
    assert (theta[:, 1, 2].abs() + theta[:, 1, 1] <= 1 + 1e-5).all()


def test_half_of_the_images_are_flipped_unless_it_is_turned_off():
    generator = torch.Generator().manual_seed(0)
    flipped = transforms.sample_affine(4000, 60, 64, generator=generator)[:, 0, 0] < 0
    assert flipped.float().mean() == pytest.approx(0.5, abs=0.04)  # 5 standard errors
    assert (transforms.sample_affine(4000, 60, 64, flip=False)[:, 0, 0] > 0).all()


def test_augmentation_repeats_with_the_seed():
    one, two = (transforms.sample_affine(8, 60, 64, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, transforms.sample_affine(8, 60, 64))


def test_shrinking_averages_instead_of_skipping():
    stripes = (torch.arange(224) % 2 * 255).to(torch.uint8).expand(1, 1, 224, 224)  # one pixel wide
    assert warp_one(stripes, w=224.0, h=224.0, size=112).std() < 1e-5
    assert transforms.eval_transform(stripes, 56).std() < 0.05


def test_evaluation_transform_equals_torchvisions_and_is_deterministic(smooth):
    expected = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Resize(224), v2.CenterCrop(224),
                           v2.Normalize([0.5], [0.5])])(smooth)  # fmt: skip
    x = transforms.eval_transform(smooth, 224)
    assert x.shape == (1, 1, 224, 224) and (x - expected).abs().max() < 1e-6
    assert torch.equal(x, transforms.eval_transform(smooth, 224))


@pytest.mark.parametrize("shape, size", [((40, 48), 32), ((33, 97), 64), ((300, 101), 50), ((57, 57), 33)])
def test_evaluation_transform_equals_torchvisions_at_odd_sizes(shape, size):
    images = torch.randint(0, 256, (2, 1, *shape), dtype=torch.uint8)
    x = TF.resize(TF.to_dtype(images, torch.float32, scale=True), [size], antialias=True)
    expected = (TF.center_crop(x, [size, size]) - transforms.MEAN) / transforms.STD
    assert (transforms.eval_transform(images, size) - expected).abs().max() < 1e-6
