"""Transforms of whole batches on any device: resize and crop for evaluation, random augmentation.

The augmentation (random resized crop, flip, rotation) is one affine map per image.
"""

import numpy as np
import torch
import torch.nn.functional as F

MEAN, STD = 0.5, 0.5  # [0, 1] -> [-1, 1]


def eval_transform(images, image_size, mean=MEAN, std=STD):
    """uint8 (N, 1, H, W) -> float32 (N, 1, S, S), normalised: short side to S, then centre crop."""
    height, width = images.shape[2:]
    short = min(height, width)
    size = (image_size * height // short, image_size * width // short)
    x = images.to(torch.float32) / 255
    x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (round((side - image_size) / 2) for side in size)
    return (x[..., top : top + image_size, left : left + image_size] - mean) / std


def train_transform(images, image_size, *, augment=True, flip=True, generator=None, share=None):
    """uint8 (N, 1, H, W) -> float32 (N, 1, S, S), normalised and augmented at random.

    Without `augment` it is `eval_transform`. The random numbers come from `generator`, a CPU
    generator whatever the device, or from PyTorch's own. With share = (n, rank, world) the images
    are the rows rank, rank + world, ... of a batch of n, and each gets the map that it would get in
    the whole batch.
    """
    if not augment:
        return eval_transform(images, image_size)
    n, rank, world = len(images), 0, 1
    if share is not None:
        n, rank, world = share
    theta = sample_affine(n, *images.shape[2:], flip=flip, generator=generator)
    return warp(images, theta[rank::world], image_size)


def sample_affine(n, height, width, *, min_area=0.8, flip=True, degrees=10.0, generator=None):
    """Draw a random resized crop, horizontal flip and rotation as one affine map per image.

    The crop is drawn as torchvision's RandomResizedCrop draws it: area uniform in [min_area, 1],
    aspect log-uniform in [3/4, 4/3], the first of ten that fits; the whole image if none does.
    Returns float32 (n, 2, 3), from output to input, in the coordinates of grid_sample.
    """

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    area = height * width * uniform(min_area, 1.0, n, 10)
    aspect = torch.exp(uniform(np.log(3 / 4), np.log(4 / 3), n, 10))
    widths, heights = (area * aspect).sqrt(), (area / aspect).sqrt()
    fits = ((widths <= width) & (heights <= height)).float()
    first = fits.argmax(1, keepdim=True)
    none_fits = fits.sum(1) == 0
    w = widths.gather(1, first)[:, 0].masked_fill(none_fits, width)
    h = heights.gather(1, first)[:, 0].masked_fill(none_fits, height)
    x0 = (width - w) * uniform(0, 1, n)
    y0 = (height - h) * uniform(0, 1, n)

    flipped = torch.rand(n, generator=generator) < (0.5 if flip else 0.0)
    mirror = 1.0 - 2.0 * flipped.float()
    angle = torch.deg2rad(uniform(-degrees, degrees, n))
    return affine(x0, y0, w, h, (height, width), mirror, angle)


def affine(x0, y0, w, h, size, mirror, angle):
    """The map (n, 2, 3) of a crop, a mirror and a rotation, in this order.

    The crop is at (x0, y0), w x h pixels out of size (H, W); mirror is -1 or 1; the angle is in
    radians, counter-clockwise. All but the size are tensors (n,). As grid_sample needs it, the map
    leads from output to input: rotation in the square output, mirror, then into the crop.
    """
    height, width = size
    cos, sin = torch.cos(angle), torch.sin(angle)
    sx, sy = w / width, h / height
    row_x = torch.stack((sx * mirror * cos, -sx * mirror * sin, (2 * x0 + w) / width - 1), 1)
    row_y = torch.stack((sy * sin, sy * cos, (2 * y0 + h) / height - 1), 1)
    return torch.stack((row_x, row_y), 1)


def warp(images, theta, image_size, mean=MEAN, std=STD):
    """uint8 (N, 1, H, W) and maps (N, 2, 3) -> float32 (N, 1, S, S), normalised.

    Bilinear; what is outside the image is black. If the image is shrunk by 1.5 or more, each pixel
    is the average of k x k points, against aliasing.
    """
    k = max(1, round(min(images.shape[2:]) / image_size))
    x = images.to(torch.float32) / 255
    if x.is_cuda:  # a copy from pageable memory would wait for all work before it
        theta = theta.pin_memory()
    theta = theta.to(x.device, non_blocking=True)
    grid = F.affine_grid(theta, (len(x), 1, k * image_size, k * image_size), align_corners=False)
    return (F.avg_pool2d(F.grid_sample(x, grid, align_corners=False), k) - mean) / std


def as_trained(images, image_size=224):
    """uint8 (N, H, W) -> uint8 (N, S, S): slices as an epoch of the documented recipe shows them.

    For pictures. The same slices get the same random numbers.
    """
    generator = torch.Generator().manual_seed(int(images.sum()))
    x = train_transform(torch.from_numpy(images)[:, None], image_size, generator=generator)
    return ((x[:, 0] * STD + MEAN) * 255).round().clip(0, 255).to(torch.uint8).numpy()
