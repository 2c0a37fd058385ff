"""The phantom's brain: a parametric 3-D shape, and a scan of it as sagittal slices.

Every shape is a signed distance in mm, negative inside, so that parts are joined and painted by
arithmetic on arrays. Points are p = (x, y, z) in mm: x from the midline, y forward, z up.
"""

import itertools
from typing import NamedTuple

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter, zoom

WIDTH, HEIGHT, SLICES = 256, 240, 20
MIDLINE = 90.5  # slice index of the midline
SPACING = 1.2  # mm between slices; a pixel is 1 mm
CSF, GREY, WHITE = 0.16, 0.60, 1.0  # T1 contrast, relative to white matter

# The temporal horn and the hippocampus of either side are in these slices.
LOCAL_SLICES = (68, 71, 74, 107, 110, 113)


class Scan(NamedTuple):
    """One scan of the plan.

    `atrophy` is the subject's latent; `visit` counts the subject's scans from 0. With the local cue
    `ageing` is a second latent, independent of the class: atrophy then acts on the temporal horn
    and the hippocampus alone, ageing on ventricles and sulci, and scanners and heads differ more.
    """

    scan: int
    subject: str
    label: str
    split: str
    start: int
    atrophy: float
    visit: int
    ageing: float | None = None

    @property
    def indices(self):
        """The slice indices of the scan: its window, or LOCAL_SLICES with the local cue."""
        if self.ageing is not None:
            return LOCAL_SLICES
        return tuple(range(self.start, self.start + SLICES))


# ---------------------------------------------------------------- shapes


def ellipsoid(p, centre, radii):
    """Approximate signed distance to an ellipsoid."""
    d = [(a - c) / r for a, c, r in zip(p, centre, radii)]
    q = np.sqrt(d[0] ** 2 + d[1] ** 2 + d[2] ** 2) + 1e-6
    slope = np.sqrt(sum((a / r) ** 2 for a, r in zip(d, radii))) + 1e-6
    return q * (q - 1) / slope


def tube(p, *knots):
    """Signed distance to a round tube along knots (x, y, z, radius)."""
    best = None
    for a, b in itertools.pairwise(knots):
        along = [v - u for u, v in zip(a[:3], b[:3])]
        d = [v - u for u, v in zip(a[:3], p)]
        t = np.clip(sum(u * v for u, v in zip(d, along)) / sum(u * u for u in along), 0, 1)
        far = np.sqrt(sum((u - t * v) ** 2 for u, v in zip(d, along))) - (a[3] + t * (b[3] - a[3]))
        best = far if best is None else np.minimum(best, far)
    return best


def join(a, b, k):
    """Union with a rounded seam of k mm."""
    h = np.clip(0.5 + 0.5 * (b - a) / k, 0, 1)
    return b + (a - b) * h - k * h * (1 - h)


def cover(distance, soft=1.5):
    """Share of a pixel inside a shape: 1 deep inside, 0 outside, a ramp of `soft` mm between."""
    return np.clip(0.5 - distance / soft, 0, 1)


def paint(image, distance, value, soft=1.5):
    """Set the brightness inside a shape, in place."""
    image += (value - image) * cover(distance, soft)


# ---------------------------------------------------------------- one subject


class Anatomy:
    """The shape of one subject's brain, a function of seed, subject, atrophy and ageing alone."""

    GRID, PITCH, WAVE = 64, 3.0, 22.0  # folding: cells, mm per cell, mm for two sulci

    def __init__(self, seed, subject, atrophy, ageing=None):
        rng = np.random.default_rng([seed, 2, int(subject[:3]), int(subject[6:])])
        own = rng.standard_normal(4)  # each effect of atrophy has a spread of its own
        wide = atrophy if ageing is None else ageing  # drives what changes all over the brain

        # Plain floats: a NumPy float64 would turn every float32 array that it meets into float64.
        # tanh: steep where the classes meet, with a limit to what fits into a head.
        self.ventricle = float(np.exp(0.05 + 0.9 * np.tanh(0.45 * wide) + 0.11 * own[0]))
        self.sulcus = float(np.exp(0.20 * wide + 0.10 * own[1]))
        self.temporal = float(np.exp(-0.025 * wide + 0.02 * own[3]))
        if ageing is None:
            self.hippocampus = float(np.exp(-0.09 * atrophy + 0.05 * own[2]))
            self.horn = self.ventricle
        else:
            self.hippocampus = float(np.exp(-0.12 * atrophy + 0.05 * own[2]))
            self.horn = float(np.exp(0.30 * atrophy))
        self.size = (1 + 0.025 * rng.standard_normal(3)).tolist()
        self.bumps = rng.uniform(-2.5, 2.5, 10).tolist()
        self.phase = rng.uniform(0, 2 * np.pi, 12).tolist()
        self.folds = self._folding(rng)

    def _folding(self, rng):
        """Signed distance (mm) to the sulci, the zero crossings of periodic band-pass noise."""
        k = np.fft.fftfreq(self.GRID, self.PITCH)
        radius = np.sqrt(k[:, None, None] ** 2 + k[:, None] ** 2 + k[: self.GRID // 2 + 1] ** 2)
        band = np.exp(-0.5 * ((radius * self.WAVE - 1) / 0.16) ** 2)
        white = rng.standard_normal((self.GRID, self.GRID, self.GRID))
        noise = np.fft.irfftn(np.fft.rfftn(white) * band)
        wave = 2 * np.pi / self.WAVE
        slope = 0
        for axis in range(3):
            change = np.roll(noise, -1, axis) - np.roll(noise, 1, axis)
            slope = slope + (change / self.PITCH / 2) ** 2
        return (noise / np.sqrt(slope + (wave * noise) ** 2)).astype(np.float32).ravel()

    def sheet_distance(self, p):
        """The folding field at p (mm), by linear interpolation."""
        n, place = self.GRID, np.stack(p) / self.PITCH + 4 * self.GRID
        low = place.astype(np.int32)
        share = place - low
        corners, weights = (low % n, (low + 1) % n), (1 - share, share)
        total = 0
        for i in (0, 1):
            for j in (0, 1):
                line = (corners[i][0] * n + corners[j][1]) * n
                near, far = self.folds[line + corners[0][2]], self.folds[line + corners[1][2]]
                total = total + (near + (far - near) * share[2]) * weights[i][0] * weights[j][1]
        return np.abs(total)

    def cerebrum(self, p):
        b = self.bumps
        main = ellipsoid(p, (0, b[0], 21), (66, 84, 49 + b[1]))
        front = ellipsoid(p, (0, 43 + b[2], 12), (52, 39, 32 + b[3]))
        back = ellipsoid(p, (0, -51 + b[4], 8), (56, 36, 28 + b[5]))
        t = self.temporal
        lobe = ellipsoid(p, (43, 12 + b[6], -21), (25 * t, 44 * t, 19 * t))
        return join(join(join(main, front, 8), back, 8), lobe, 4)

    def section(self, x, y, z):
        """Brightness (white matter 1) and share of brain at points x, y, z (mm); float32 (n,)."""
        left = x < 0
        p = [np.abs(x) / self.size[0], y / self.size[1], z / self.size[2]]
        hull = self.cerebrum(p)
        image = np.full_like(y, WHITE)
        sheet = self._cortex(image, p, left, hull)

        # each part is drawn only where it can be, which takes half the time
        lower = np.full_like(y, 99)
        deep = np.flatnonzero((p[1] > -72) & (p[1] < 48) & (p[2] > -34) & (p[2] < 42) & (hull < 2))
        image[deep] = self._deep(image[deep], [a[deep] for a in p])
        hind = np.flatnonzero((p[1] < 22) & (p[2] < 12))
        image[hind], lower[hind] = self._hindbrain(image[hind], [a[hind] for a in p], hull[hind])

        image *= 1 + 0.025 * np.sin(p[1] / 9 + self.phase[0]) * np.sin(p[2] / 8 + self.phase[1])
        # gyri bulge between the sulci
        notch = (0.6 + 1.0 * self.sulcus) * np.clip(1 - sheet / 4, 0, 1)
        return image, cover(np.minimum(hull + notch, lower), 2.0)

    def _cortex(self, image, p, left, hull):
        """Paint the grey ribbon under the surface and along the sulci.

        Returns the distance to the sulci, mm.
        """
        x, y, z = p
        w = self.phase
        # looked up along rays from the centre, so that the sheets stand upright on the surface
        q = np.sqrt((x / 66) ** 2 + (y / 83) ** 2 + ((z - 14) / 50) ** 2)
        pull = 0.35 + 0.65 / np.maximum(q, 0.45)
        bend = 4 * np.sin(y / 11 + w[2]) + 4 * np.sin(z / 9 + w[3])
        side = np.where(left, -1, 1).astype(np.float32)
        along_x = side * (x * pull + 7) + bend
        along_y = y * pull + 5 * np.sin(z / 8 + w[4])
        along_z = (z - 14) * pull + 5 * np.sin(y / 9 + w[5])
        sheet = self.sheet_distance((along_x, along_y, along_z))

        depth = np.minimum(-hull, x + 1.0)  # the medial wall is a surface, too
        reach = 15 + 5 * np.sin(y / 17 + w[6]) * np.sin(z / 14 + w[7]) + 0.4 * np.minimum(x, 30)
        over = np.maximum(depth - reach, 0)

        # cingulate sulcus, over the corpus callosum, with gaps
        arch = ellipsoid(p, (0, 0, 4), (400, 46, 34))
        cingulate = np.sqrt((arch - 2 * np.sin(y / 11 + w[8])) ** 2 + np.maximum(x - 9, 0) ** 2)
        cingulate += np.maximum(-8 - z, 0) + np.maximum(1.5 * np.sin(y / 7 + w[4]), 0)

        sulcus = np.minimum(np.sqrt(sheet**2 + over**2), cingulate)
        width = 0.7 - 0.25 * np.clip(depth / 15, 0, 1) + 0.9 * np.clip(1 + hull / 5, 0, 1)
        half = self.sulcus * width
        paint(image, np.minimum(depth, sulcus - half) - 2.3, GREY, 1.5)
        paint(image, sulcus - half, CSF, 1.6)
        s = self.sulcus
        sylvian = tube(p, (31, 28, -9, 1.8 * s), (34, 2, -3, 1.6 * s), (37, -24, 6, 1.2 * s))
        paint(image, sylvian, CSF)
        return sheet

    def _deep(self, image, p):
        """Paint the inner structures, in the order of this function; returns image."""
        x, y, z = p
        v, h, t = self.ventricle, self.hippocampus, self.horn
        lift = 2.5 * (v - 1)  # wide ventricles raise the corpus callosum

        # fmt: off
        paint(image, ellipsoid(p, (17, -2, 4), (15, 34, 19)), WHITE, 4)   # around the nuclei
        paint(image, ellipsoid(p, (0, -1, 8), (9, 31, 17)), 0.74, 3)      # septum
        paint(image, ellipsoid(p, (10, -9, 5), (9.5, 15, 9)), 0.72, 3)    # thalamus
        paint(image, ellipsoid(p, (25, 6, 1), (6, 17, 10)), 0.64, 2.5)    # putamen
        paint(image, ellipsoid(p, (18.5, 2, 0), (4, 10, 6)), 0.82, 2.5)   # pallidum
        paint(image, ellipsoid(p, (13, 21, 7), (5.5, 10, 8)), 0.64, 2)    # caudate head
        paint(image, ellipsoid(p, (5, 4, -7), (8, 12, 5)), 0.66, 3)       # hypothalamus
        paint(image, ellipsoid(p, (23, 12, -20), (9, 9, 8)), 0.62, 3)     # amygdala
        paint(image, ellipsoid(p, (0, -1, 0), (1.4 * v, 12, 7)), CSF)     # third ventricle
        paint(image, ellipsoid(p, (0, -6, 3), (4, 5.5, 4.5)), 0.68)       # massa intermedia

        # lateral ventricle: body and temporal horn
        body = tube(p, (11, 35, 5, 2.6 * v), (9, 25, 12, 4.4 * v), (8, 6, 17 + lift / 2, 4.0 * v),
                    (11, -14, 16 + lift / 2, 4.0 * v), (17, -28, 11, 5.0 * v),
                    (23, -38, 4, 5.4 * v), (25, -60, 1, 1.6 * v))
        horn = tube(p, (23, -36, 2, 4.5 * v), (28, -24, -8, 2.3 * t), (29, -8, -14, 2.0 * t),
                    (30, 6, -17, 1.5 * t))
        paint(image, join(body, horn, 3), CSF)

        # hippocampus; CSF fills the space that it leaves when it shrinks
        tail = [(25, 3, -20, 6.0), (27, -10, -18.5, 5.2), (25, -24, -11, 4.2), (20, -34, -1, 3.0)]
        paint(image, tube(p, *[(a, b, c, r * 1.12) for a, b, c, r in tail]), CSF)
        paint(image, tube(p, *[(a, b, c - r * (1 - h), r * h) for a, b, c, r in tail]), GREY)

        callosum = tube((0, y, z - lift), (0, 19, -1, 1.2), (0, 29, 1, 2.8), (0, 33, 8, 4.4),
                        (0, 28, 17, 3.2), (0, 14, 24, 2.7), (0, -4, 26, 2.5), (0, -20, 22, 2.6),
                        (0, -30, 15, 3.4), (0, -34, 8, 4.8))
        paint(image, np.maximum(callosum + 0.5 * (self.sulcus - 1), x - 14), 1.04)
        fornix = tube(p, (2, -25, 14, 1.6), (2, -8, 17, 1.7), (2, 8, 13, 1.7), (2, 12, 3, 1.3))
        paint(image, np.maximum(fornix, x - 4), 0.95)
        # fmt: on
        return image

    def _hindbrain(self, image, p, hull):
        """Paint cerebellum and brainstem below the cerebrum; returns image and their distance."""
        x, y, z = p
        w, b = self.phase, self.bumps

        # cerebellum: lobules fan out from its front
        centre, radii = (0, -46 + b[7], -39 + b[8]), (52, 33, 25)
        bell = ellipsoid(p, centre, radii)
        dy, dz = y - centre[1] - 12, z - centre[2]
        angle = np.arctan2(dz, dy)
        out = np.sqrt(dy**2 + dz**2)
        twist = 0.25 * np.sin(out / 6 + w[9]) + 0.15 * np.sin(x / 5 + w[10])
        branch = np.abs(np.sin(4.5 * (angle + twist) + w[11])) * out / 4.5
        branch -= np.clip(2.2 - out / 30, 0.8, 2.2)
        folia = np.clip(np.cos(30 * (angle + 0.6 * twist) + x / 3), 0, 1)
        folia = np.where(bell > -14, folia, 0.0)
        folia *= np.clip(out / 20, 0, 1)
        bell += 0.7 * folia
        tissue = GREY + 0.02 - 0.20 * folia
        core = ellipsoid(p, (14, centre[1] + 8, centre[2] + 1), (16, 13, 8))
        paint(tissue, np.minimum(core, np.maximum(branch, 5 + bell)), 0.94, 2.5)

        # fmt: off
        stem = tube(p, (4, -12, -2, 9), (0, -12, -13, 8.5), (0, -5, -27, 13.5), (0, -13, -44, 7.5),
                    (0, -20, -58, 6.5), (0, -25, -72, 5.5))
        peduncle = tube(p, (8, -14, -30, 7), (17, -32, -34, 6))
        stem = join(stem, peduncle, 4)

        image[hull > 0] = CSF
        paint(image, np.maximum(bell, 1.5 - hull), tissue)  # a dark cleft under the cerebrum stays
        paint(image, np.where(hull > -6, stem, np.maximum(stem, z + 4)), 0.90, 2)
        paint(image, ellipsoid(p, (0, -24, -34), (7, 4, 9)), CSF)          # fourth ventricle
        paint(image, tube(p, (0, -19, -8, 1.3), (0, -22, -26, 1.5)), CSF)  # aqueduct
        # fmt: on
        return image, np.minimum(bell, stem)


# ---------------------------------------------------------------- one scan


def render(scan, seed=0, slices=None):
    """Draw a scan: uint8 (slices, 240, 256), by default the slices of `scan.indices`.

    Pose, brightness, contrast, bias and noise depend on seed, subject and visit only, never on the
    class.
    """
    if slices is None:
        slices = scan.indices
    key = [seed, 3, int(scan.subject[:3]), int(scan.subject[6:])]
    head = np.random.default_rng(key).standard_normal(8)
    rng = np.random.default_rng(key + [scan.visit])
    pose = (0.8 * head + 0.35 * rng.standard_normal(8)).tolist()
    # from scan to scan the disease progresses a little, in both classes alike
    atrophy = scan.atrophy + 0.06 * scan.visit + 0.06 * rng.standard_normal()
    anatomy = Anatomy(seed, scan.subject, atrophy, scan.ageing)
    more = local_differences(scan, key)

    # pixels -> mm in the plane of the slice; the face looks to the left
    turn = np.deg2rad(3.0 * pose[0] + more["turn"])
    scale = 1 + 0.025 * head[1] + 0.004 * pose[1]
    column, row = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    right = (column - 128 - 2.5 * pose[2] - more["right"]) / scale
    down = (row - 123 - 2.5 * pose[3] - more["down"]) / scale
    y = (-np.cos(turn) * right - np.sin(turn) * down).astype(np.float32)
    z = (np.sin(turn) * right - np.cos(turn) * down).astype(np.float32)
    near = np.flatnonzero((y / 101) ** 2 + ((z + 2) / 89) ** 2 < 1)  # no brain outside this ellipse
    y, z = y.ravel()[near], z.ravel()[near]

    white = float(178 * np.exp(0.09 * pose[4]))
    gamma = (1 + 0.08 * pose[5]) * more["gamma"]
    bias = 1 + 0.05 * pose[6] * y / 80 + 0.05 * pose[7] * z / 60
    noise = white * float(rng.uniform(0.022, 0.04)) * more["noise"]
    drawn = np.zeros((len(slices), HEIGHT * WIDTH), np.uint8)
    for picture, index in zip(drawn, slices):
        x = np.full_like(y, (index - MIDLINE + 0.5 * pose[1]) * SPACING / scale)
        x = x + more["roll"] * z + more["yaw"] * y
        image, share = anatomy.section(x, y, z)
        image = white * bias * np.clip(image, 0, None) ** gamma
        real, imaginary = noise * noise_fields(rng, near, more["grain"])
        # Rician, as a magnitude image; the stripped skull leaves true black
        picture[near] = np.clip(share * np.hypot(image + real, imaginary), 0, 255)
    return drawn.reshape(-1, HEIGHT, WIDTH)


def local_differences(scan, key):
    """Further differences between heads and between scanners with the local cue.

    A turn (degrees) and shifts (pixels) in the plane, slopes of the plane, factors of gamma and
    noise, and the SD in pixels of the blur of the noise.
    """
    if scan.ageing is None:
        return dict(
            turn=0.0, right=0.0, down=0.0, roll=0.0, yaw=0.0, gamma=1.0, noise=1.0, grain=0.0
        )
    rng = np.random.default_rng(key + [scan.visit, 1])
    z = rng.standard_normal(6).tolist()
    return dict(
        turn=6 * z[0],
        right=6 * z[1],
        down=6 * z[2],
        roll=0.026 * z[3],
        yaw=0.026 * z[4],  # 1.5 degrees
        gamma=float(np.exp(0.12 * z[5])),
        noise=float(rng.uniform(0.8, 1.6)),
        grain=float(rng.uniform(0, 0.9)),
    )


def noise_fields(rng, near, grain):
    """Two fields of noise of unit variance at the pixels `near`, float32 (2, n).

    `grain` is the SD of a blur in pixels; 0 is white noise.
    """
    if not grain:
        return rng.standard_normal((2, len(near)), np.float32)
    noise = gaussian_filter(rng.standard_normal((2, HEIGHT, WIDTH), np.float32), (0, grain, grain))
    return (noise / noise.std()).reshape(2, -1)[:, near]


# ---------------------------------------------------------------- a head with its skull


def render_head(scan, seed=0, every=1):
    """The same scan with its skull: (head, brain, affine to mm), uint8 (181 / every, 256, 240).

    The axes run to the right, to the front and up; only each `every`-th slice is drawn. The brain
    is that of `render`. The head adds fluid, skull with marrow, scalp, and a capsule on the left
    temple, which in real scans tells left from right.
    """
    indices = range(0, 181, every)
    with_brain = [index for index in indices if 30 <= index <= 151]
    # (slices, rows down, columns to the back) -> (right, front, up)
    drawn = render(scan, seed, with_brain).transpose(0, 2, 1)[:, ::-1, ::-1]
    brain = np.zeros((len(indices), WIDTH, HEIGHT), np.uint8)
    brain[[indices.index(index) for index in with_brain]] = drawn
    affine = np.diag([every * SPACING, 1.0, 1.0, 1.0])
    affine[:3, 3] = -MIDLINE * SPACING, 128 - WIDTH + 1, 123 - HEIGHT + 1

    # mm to the closing of the brain by 25 mm, into whose folds a skull does not follow; computed at
    # 2 mm in the plane, for speed
    spacing = (every * SPACING, 2, 2)
    outer = distance_transform_edt(brain[:, ::2, ::2] == 0, spacing) < 25
    away = (25 - distance_transform_edt(outer, spacing)).astype(np.float32)
    away = zoom(away, (1, 2, 2), order=1)

    white = float(np.quantile(brain[brain > 0], 0.9))
    ends = (3.0, 4.5, 6.5, 8.0, 13.0)  # mm: fluid, bone, marrow, bone, scalp, then air
    brightness = np.array((CSF, 0.05, 0.45, 0.05, 0.85, 0), np.float32)
    values = white * brightness[np.searchsorted(ends, away)]
    rng = np.random.default_rng([seed, 5, scan.scan])
    noise = 0.03 * white * rng.standard_normal((2, *brain.shape), np.float32)
    head = np.hypot(values + noise[0], noise[1])  # Rician

    y, z = 128, HEIGHT - 124
    first = int(np.flatnonzero(away[:, y, z] <= 13)[0])
    left = affine[0, 0] * first - 5  # mm from the first slice
    grid = np.ogrid[tuple(slice(side) for side in brain.shape)]
    capsule = (affine[0, 0] * grid[0] - left) ** 2 + (grid[1] - y) ** 2 + (grid[2] - z) ** 2 < 6**2
    head[capsule] = 255
    return np.where(brain > 0, brain, np.clip(head, 0, 255).astype(np.uint8)), brain, affine
