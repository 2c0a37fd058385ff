"""A phantom made for transfer: one head a subject, cut along all planes, each slice as if another
scanner had made it.

What a network learns from a set with one scanner is partly the style of that scanner. Here
contrast, sharpness, noise, field of view, pose and background of every slice are drawn at random,
so that the anatomy is what is left to learn (domain randomisation; Billot et al. 2023, SynthSeg,
doi 10.1016/j.media.2023.102789).
"""

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter

from adnc.phantom.anatomy import CSF, GREY, WHITE, Anatomy

SIDE = 112  # pixels
SLICES = 12  # of a subject: four along each plane
# How much a unit of atrophy widens ventricles and sulci, in units of ageing. With ageing of SD 1.7
# the classes are then 0.8 SD apart in what a healthy brain shows with age, too.
SPREAD = 0.5

# plane -> (axis of the image to the right, axis down, axis across), in a right-handed head:
# x to the right, y to the front, z up. As in adnc.volumes.cut.
PLANES = {
    "axial": ((1, 0, 0), (0, -1, 0), (0, 0, 1)),
    "coronal": ((1, 0, 0), (0, 0, -1), (0, 1, 0)),
    "sagittal": ((0, -1, 0), (0, 0, -1), (1, 0, 0)),
}
RANGES = {"axial": (-30, 45), "coronal": (-50, 40), "sagittal": (-42, 42)}  # mm
CENTRE = np.array((0.0, -2.0, 10.0))  # mm, of the brain
# mm: no brain outside of this ellipsoid
HALF_HEAD = np.array((76, 98, 88), np.float32)[:, None]

VARIATIONS = ("contrast", "bias", "sharpness", "noise", "pose", "mask", "levels")


def varied_anatomy(seed, subject, atrophy, ageing):
    """The Anatomy of a subject: ageing widens ventricles and sulci; disease shrinks the
    hippocampus, widens the temporal horn and, less, ventricles and sulci.

    Ventricles and sulci are wider than those of the other cues, and vary by themselves, too.
    """
    looks = ageing + SPREAD * atrophy
    rng = np.random.default_rng([seed, 7, int(subject[:3]), int(subject[6:])])
    own = rng.standard_normal(2)
    anatomy = Anatomy(seed, subject, atrophy, looks)
    anatomy.ventricle = float(np.exp(0.25 + 0.9 * np.tanh(0.45 * looks) + 0.2 * own[0]))
    anatomy.sulcus = float(np.exp(0.25 + 0.35 * np.tanh(0.6 * looks) + 0.2 * own[1]))
    # The horn is part of the ventricle, and widens with it.
    anatomy.horn *= float(np.exp(0.12 * looks))
    return anatomy


LATENTS = ("hippocampus", "horn", "ventricle", "sulcus")  # factors of size, of an Anatomy
# Of a slice: where it is cut (mm along the normal of its plane) and its share of fluid.
SHOWN = ("plane", "place", "fluid")


# ---------------------------------------------------------------- one subject


def render_varied(scan, seed=0, without=()):
    """Draw a subject: (uint8 (SLICES, SIDE, SIDE), a third of them along each of PLANES; JPEG
    quality of each; dict of LATENTS; a dict of SHOWN for each slice).

    `without` names VARIATIONS that are left out: they then have the value of a T1 scan like those
    of the other cues. The quality of the JPEG files always varies. All depends on seed, subject and
    `without` alone.
    """
    key = [seed, 6, int(scan.subject[:3]), int(scan.subject[6:])]
    anatomy = varied_anatomy(seed, scan.subject, scan.atrophy, scan.ageing)
    n_plane = SLICES // len(PLANES)
    poses = []
    for number in range(SLICES):
        rng = np.random.default_rng([*key, number])
        plane = list(PLANES)[number // n_plane]
        low, high = RANGES[plane]
        span = high - low
        place = low + span * (number % n_plane + rng.random()) / n_plane
        poses.append(draw_pose(rng, plane, place, "pose" not in without))

    drawn, shown = np.zeros((SLICES, SIDE, SIDE), np.uint8), []
    for number, (tissue, share) in enumerate(sections(anatomy, poses)):
        where = {name: poses[number][name] for name in SHOWN[:-1]}
        shown.append({**where, "fluid": share_of_fluid(tissue, share)})
        rngs = np.random.default_rng([*key, number, 1]).spawn(len(VARIATIONS))
        scanner = dict(zip(VARIATIONS, rngs))
        drawn[number] = scan_slice(tissue, share, poses[number], scanner, without)
    qualities = np.random.default_rng([*key, SLICES]).integers(60, 96, SLICES).tolist()
    return drawn, qualities, {name: getattr(anatomy, name) for name in LATENTS}, shown


def share_of_fluid(tissue, share):
    """The share of the brain in a section that is fluid, by brightness before any contrast.

    Half-way to grey matter counts as nothing, so that grey matter in a sulcus does not count.
    """
    half = (CSF + GREY) / 2
    fluid = np.clip((half - tissue) / (half - CSF), 0, 1)
    return float((fluid * share).sum() / max(share.sum(), 1e-3))


def scan_slice(tissue, share, pose, scanner, without):
    """A slice as a scanner sees it, uint8 (SIDE, SIDE).

    `scanner` has a random generator for each of VARIATIONS, so that to leave out one changes no
    other.
    """
    if "contrast" not in without:
        tissue = change_contrast(tissue, scanner["contrast"])
    image, covered = put_in_head(tissue, share, pose["spacing"], scanner["mask"], "mask" in without)
    if "bias" not in without:
        image = image * bias_field(scanner["bias"])
    if "sharpness" not in without:
        image, covered = blur(image, covered, scanner["sharpness"])
    image = add_noise(image, scanner["noise"], "noise" in without)
    image = set_levels(image, covered, scanner["levels"], "levels" in without)
    return orient(image, pose)


def draw_pose(rng, plane, place, varied):
    """Where a slice is cut and how it lies in the picture: `place` is in mm from the origin along
    the normal of the plane."""
    pose = {
        "plane": plane, "place": place, "thickness": 1.0, "spacing": 200 / SIDE,
        "shift": np.zeros(2), "tilt": np.zeros(3), "mirrored": False, "quarters": 0,
    }  # fmt: skip
    if varied:
        pose["thickness"] = rng.uniform(0, 4)  # mm
        pose["spacing"] = rng.uniform(165, 250) / SIDE  # mm per pixel
        pose["shift"] = 5 * rng.standard_normal(2)  # mm
        pose["tilt"] = np.deg2rad(6 * rng.standard_normal(3))
        pose["mirrored"] = rng.random() < 0.5
        if rng.random() < 0.2:
            pose["quarters"] = int(rng.integers(1, 4))
    return pose


def sections(anatomy, poses):
    """(brightness with white matter 1, share of brain) of each slice, float32 (SIDE, SIDE).

    A slice that is thicker than 2 mm is the mean of two. All are drawn at once, for speed.
    """
    layers = []  # (number of the slice, its share of the slice, pixels, points (3, n))
    for number, pose in enumerate(poses):
        points, across = grid(pose)
        offsets = (0.0,)
        if pose["thickness"] > 2:
            offsets = (-pose["thickness"] / 4, pose["thickness"] / 4)
        for offset in offsets:
            p = points + np.float32(offset) * across[:, None]
            near = np.flatnonzero(((p / HALF_HEAD) ** 2).sum(0) < 1)
            layers.append((number, 1 / len(offsets), near, p[:, near]))

    x, y, z = np.concatenate([points for *_, points in layers], axis=1)
    ends = np.cumsum([points.shape[1] for *_, points in layers])[:-1]
    drawn = [np.split(values, ends) for values in anatomy.section(x, y, z)]

    tissue, share = np.zeros((2, len(poses), SIDE**2), np.float32)
    for (number, weight, near, _), brightness, inside in zip(layers, *drawn):
        tissue[number, near] += weight * brightness * inside
        share[number, near] += weight * inside
    tissue /= np.maximum(share, 1e-3)
    shape = (len(poses), SIDE, SIDE)
    return zip(tissue.reshape(shape), share.reshape(shape))


def grid(pose):
    """The points of a slice in mm, float32 (3, SIDE * SIDE), and its unit normal."""
    axes = np.array(PLANES[pose["plane"]], float)
    right, down, across = axes @ rotation(pose["tilt"]).T
    middle = CENTRE + (pose["place"] - CENTRE @ across) * across
    middle = middle + pose["shift"][0] * right + pose["shift"][1] * down
    right, down, across, middle = np.float32((right, down, across, middle))[:, :, None, None]
    pixels = np.arange(SIDE) - (SIDE - 1) / 2  # from the middle
    steps = np.float32(pose["spacing"] * pixels)
    points = steps[:, None] * down + steps * right + middle
    return points.reshape(3, -1), across.ravel()


def rotation(angles):
    """A rotation matrix from angles about x, y and z."""
    a, b, c = angles
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


# ---------------------------------------------------------------- the scanner


def change_contrast(tissue, rng):
    """Other brightnesses of fluid, grey and white matter: nine times in ten in the order of T1."""
    fluid = rng.uniform(0.02, 0.35)
    grey = rng.uniform(fluid + 0.25, 0.85)
    values = (fluid, grey, 1.0)
    if rng.random() < 0.1:
        values = (1.0, rng.uniform(0.4, 0.8), rng.uniform(0.2, 0.5))  # T2: fluid is bright
    return np.interp(tissue, (CSF, GREY, WHITE), values).astype(np.float32)


def put_in_head(tissue, share, spacing, rng, plain):
    """(image, mask): the brain alone, or with what a bad extraction leaves of fluid and skull."""
    if plain or rng.random() < 0.6:
        return tissue * share, share
    # mm to the closing of the brain by 25 mm, into whose folds a skull does not follow
    outside = distance_transform_edt(share < 0.5) * spacing
    away = 25 - distance_transform_edt(outside < 25) * spacing
    ends = (2.0, 4.0, 6.0, 7.5, 12.0)  # fluid, bone, marrow, bone, scalp, then air
    brightness = np.array((0.15, 0.05, 0.45, 0.05, 0.85, 0.0), np.float32)
    brightness *= np.append(rng.uniform(0.7, 1.3, 5), 0)
    head = brightness[np.searchsorted(ends, away)]
    if rng.random() < 0.7:  # a part of it: up to some distance, in some directions
        reach = rng.uniform(0, 12)
        rows, columns = np.indices(share.shape) - SIDE / 2
        angle = np.arctan2(rows, columns) - rng.uniform(-np.pi, np.pi)
        near = (away < reach) & (np.cos(angle) > rng.uniform(-1, 1))
        head = np.where(near, head, 0)
    mask = np.maximum(share, head > 0)
    return (tissue * share + head * (1 - share)).astype(np.float32), mask


def bias_field(rng):
    """A smooth field about 1, as of a coil."""
    line = np.linspace(-1, 1, SIDE, dtype=np.float32)
    y, x = line[:, None], line[None, :]
    a, b, c, d, e = 0.12 * rng.standard_normal(5)
    return np.exp(a * x + b * y + c * x * y + d * (x**2 - 0.3) + e * (y**2 - 0.3))


def blur(image, mask, rng):
    """A point spread of up to 1.2 pixels, another one along either axis."""
    sd = rng.uniform(0, 1.2, 2)
    blurred = gaussian_filter(image, sd)
    return blurred, np.maximum(mask, blurred > 0.02)


def add_noise(image, rng, plain):
    """Rician noise, of some grain; sometimes the ghost of a motion."""
    sd = 0.02 if plain else rng.uniform(0.005, 0.07)
    noise = rng.standard_normal((2, SIDE, SIDE)).astype(np.float32)
    if not plain:
        noise = gaussian_filter(noise, (0, *rng.uniform(0, 0.7, 2)))
        noise /= noise.std()
        if rng.random() < 0.25:
            shift, axis = int(rng.integers(10, SIDE // 2)), int(rng.integers(2))
            ghost = np.roll(image, shift, axis) + np.roll(image, -shift, axis)
            image = image + rng.uniform(0.01, 0.06) * ghost
    return np.hypot(image + sd * noise[0], sd * noise[1])


def set_levels(image, mask, rng, plain):
    """Grey levels, float (SIDE, SIDE) of 0 to 255, by a curve and a window."""
    bright = float(np.quantile(image[mask > 0.5], 0.98)) if (mask > 0.5).any() else 1.0
    white, gamma, floor, masked = 190.0, 1.0, 0.0, True
    if not plain:
        white, gamma = rng.uniform(130, 255), float(np.exp(0.2 * rng.standard_normal()))
        masked = rng.random() < 0.7
        floor = 0.0 if masked else rng.uniform(0, 6)
    grey = white * np.clip(image / bright, 0, None) ** gamma
    if masked:
        grey = np.where(mask > 0.02, grey, 0)
    return np.clip(grey + floor, 0, 255)


def orient(image, pose):
    """The slice as uint8, mirrored and turned by quarters as its pose says."""
    if pose["mirrored"]:
        image = image[:, ::-1]
    return np.rot90(image, pose["quarters"]).round().astype(np.uint8)
