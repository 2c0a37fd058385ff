"""Transforms of batches: what evaluation sees, and random augmentation."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from adnc.data.augment import (
    MEAN,
    STD,
    affine,
    as_trained,
    eval_transform,
    sample_affine,
    train_transform,
    warp,
)

TF = v2.functional


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def smooth():
    """A smooth random image, uint8 (1, 1, 240, 256)."""
    noise = torch.rand(1, 1, 240, 256, generator=seeded())
    return (TF.gaussian_blur(noise, [9, 9]) * 255).to(torch.uint8)


@pytest.fixture
def noisy():
    """32 images of noise, uint8 (32, 1, 60, 64)."""
    return torch.randint(0, 256, (32, 1, 60, 64), dtype=torch.uint8, generator=seeded())


# ---------------------------------------------------------------- evaluation


def test_the_evaluation_transform_equals_torchvisions_and_is_deterministic(smooth):
    reference = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Resize(224),
            v2.CenterCrop(224),
            v2.Normalize([0.5], [0.5]),
        ]
    )
    x = eval_transform(smooth, 224)
    assert x.shape == (1, 1, 224, 224)
    assert (x - reference(smooth)).abs().max() < 1e-6
    assert torch.equal(x, eval_transform(smooth, 224))


@pytest.mark.parametrize(
    "shape, size", [((40, 48), 32), ((33, 97), 64), ((300, 101), 50), ((57, 57), 33)]
)
def test_the_evaluation_transform_equals_torchvisions_at_odd_sizes(shape, size):
    images = torch.randint(0, 256, (2, 1, *shape), dtype=torch.uint8, generator=seeded())
    x = TF.resize(TF.to_dtype(images, torch.float32, scale=True), [size], antialias=True)
    expected = (TF.center_crop(x, [size, size]) - MEAN) / STD
    assert (eval_transform(images, size) - expected).abs().max() < 1e-6


def test_mean_and_std_of_a_checkpoint_are_used(noisy):
    zero_to_one = eval_transform(noisy, 32, 0.0, 1.0)
    assert torch.allclose(eval_transform(noisy, 32, 0.2, 0.3), (zero_to_one - 0.2) / 0.3)


def test_shrinking_averages_pixels():
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(112).expand(1, 1, 224, 224)
    assert warp_one(stripes, w=224.0, h=224.0, size=112).std() < 1e-5
    assert eval_transform(stripes, 56).std() < 0.05


# ---------------------------------------------------------------- affine maps


def warp_one(image, x0=0.0, y0=0.0, w=256.0, h=240.0, mirror=1.0, degrees=0.0, size=224):
    """An image under one map, in [0, 1]."""
    box = [torch.tensor([number]) for number in (x0, y0, w, h)]
    angle = torch.deg2rad(torch.tensor([degrees]))
    theta = affine(*box, image.shape[2:], torch.tensor([mirror]), angle)
    return warp(image, theta, size) * STD + MEAN


def inner(x):
    # At the very edge torchvision repeats the border of the crop, and the map looks beyond it.
    return x[..., 1:-1, 1:-1]


@pytest.mark.parametrize("mirror", [1.0, -1.0])
def test_a_crop_and_a_flip_equal_torchvisions(smooth, mirror):
    expected = TF.resized_crop(smooth / 255, 20, 30, 200, 210, [224, 224], antialias=False)
    if mirror < 0:
        expected = TF.horizontal_flip(expected)
    x = warp_one(smooth, 30, 20, 210, 200, mirror=mirror)
    assert (inner(x) - inner(expected)).abs().max() < 1e-5


@pytest.mark.parametrize("degrees", [-10.0, 3.0, 10.0])
def test_a_rotation_equals_torchvisions(smooth, degrees):
    def rotate(x):
        return TF.rotate(x, degrees, interpolation=v2.InterpolationMode.BILINEAR)

    crop = TF.crop(smooth / 255, 8, 16, 224, 224)
    inside = rotate(torch.ones_like(crop)) > 1 - 1e-6
    difference = (warp_one(smooth, 16, 8, 224, 224, degrees=degrees) - rotate(crop)).abs()
    assert difference[inside].max() < 1e-5


# ---------------------------------------------------------------- random augmentation


def test_crops_have_the_area_and_aspect_of_the_recipe_and_stay_inside_the_image():
    theta = sample_affine(4000, 240, 256, flip=False, degrees=0, generator=seeded())
    w, h = theta[:, 0, 0] * 256, theta[:, 1, 1] * 240
    area = w * h / (240 * 256)
    assert area.min() >= 0.8 - 1e-4 and area.max() <= 1 + 1e-4
    assert 0.85 < area.mean() < 0.95
    assert (w / h).min() >= 3 / 4 - 1e-4 and (w / h).max() <= 4 / 3 + 1e-4
    assert (theta[:, 0, 2].abs() + theta[:, 0, 0] <= 1 + 1e-5).all()
    assert (theta[:, 1, 2].abs() + theta[:, 1, 1] <= 1 + 1e-5).all()


def test_half_of_the_images_are_flipped_unless_flips_are_turned_off():
    flipped = sample_affine(4000, 60, 64, generator=seeded())[:, 0, 0] < 0
    assert flipped.float().mean() == pytest.approx(0.5, abs=0.04)  # 5 standard errors
    assert (sample_affine(4000, 60, 64, flip=False)[:, 0, 0] > 0).all()


def test_rotations_are_uniform_within_ten_degrees():
    theta = sample_affine(4000, 64, 64, flip=False, generator=seeded())
    # The first row is (w cos, -w sin) / W.
    degrees = torch.rad2deg(torch.atan2(-theta[:, 0, 1], theta[:, 0, 0]))
    assert degrees.abs().max() <= 10 + 1e-3
    assert degrees.mean().abs() < 0.5 and degrees.std() == pytest.approx(20 / 12**0.5, rel=0.05)


def test_augmentation_keeps_the_range_and_the_number_of_images(noisy):
    x = train_transform(noisy, 48)
    assert x.shape == (32, 1, 48, 48) and x.dtype == torch.float32
    assert x.min() >= -1 and x.max() <= 1 and x.std() > 0.1


def test_augmentation_keeps_the_order_of_the_images():
    greys = torch.arange(0, 250, 10, dtype=torch.uint8).reshape(-1, 1, 1, 1)
    x = train_transform(greys.expand(-1, 1, 60, 64), 32)
    assert torch.allclose(x[:, 0, 16, 16], greys[:, 0, 0, 0] / 127.5 - 1, atol=1e-5)


def test_training_without_augmentation_sees_what_evaluation_sees(noisy):
    plain = train_transform(noisy, 48, augment=False)
    assert torch.equal(plain, eval_transform(noisy, 48))
    assert not torch.equal(train_transform(noisy, 48), plain)


def test_augmentation_repeats_with_the_seed(noisy):
    one = train_transform(noisy, 48, generator=seeded(5))
    assert torch.equal(one, train_transform(noisy, 48, generator=seeded(5)))
    assert not torch.equal(one, train_transform(noisy, 48, generator=seeded(6)))


@pytest.mark.parametrize("n", [32, 31])
def test_a_share_of_a_batch_is_augmented_as_in_the_whole_batch(noisy, n):
    """So that a run on several GPUs sees what a run on one sees."""
    images = noisy[:n]
    whole = train_transform(images, 48, generator=seeded())
    for rank in range(3):
        part = train_transform(images[rank::3], 48, generator=seeded(), share=(n, rank, 3))
        assert torch.equal(part, whole[rank::3])


def test_pictures_of_augmented_slices_show_one_draw_of_the_recipe():
    images = np.zeros((8, 48, 40), np.uint8)
    images[:, 10:20, 5:15] = 200
    drawn = as_trained(images, 32)
    assert drawn.shape == (8, 32, 32) and drawn.dtype == np.uint8
    assert len({each.tobytes() for each in drawn}) == 8  # each has a map of its own
    assert 150 < drawn.max() <= 200
    np.testing.assert_array_equal(drawn, as_trained(images, 32))
