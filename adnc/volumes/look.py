"""How volumes are cut into slices: the class Look, and its flags on a command line."""

import argparse
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from adnc.cli import number
from adnc.errors import InputError
from adnc.files import read_json

# For each plane: the world axis across the slices, that along which rows are counted, and that of
# the columns; with -1 if they are counted against the axis.
PLANES = {
    "axial": (2, (1, -1), (0, 1)),
    "coronal": (1, (2, -1), (0, 1)),
    "sagittal": (0, (2, -1), (1, -1)),
}


@dataclass(frozen=True)
class Look:
    """How volumes are cut.

    plane: axial, coronal or sagittal.
    slices: (from, to, "index" or "mm"), or None for the `count` slices in the middle of the head.
    size: (width, height) in pixels about the middle of the head, or None for the whole volume.
    turn: degrees, counter-clockwise.
    spacing, step: mm from pixel to pixel, and from slice to slice (None: as spacing).
    strip: remove the skull.
    brightest: grey level of the 99 % quantile of the slices, or None: the head fills 0 to 255.
    """

    plane: str = "axial"
    slices: tuple | None = None
    count: int = 20
    size: tuple | None = None
    turn: int = 0
    spacing: float = 1.0
    step: float | None = None
    strip: bool = False
    brightest: float | None = None

    def __str__(self):
        where = f"{self.count} central slices"
        if self.slices:
            low, high, unit = self.slices
            where = f"slices {low:g} to {high:g} ({unit})"
        size = "of the whole volume"
        if self.size:
            size = f"{self.size[0]} x {self.size[1]}"
        step = self.step or self.spacing
        parts = [self.plane, f"{where} every {step:g} mm", size, f"{self.spacing:g} mm per pixel"]
        if self.turn:
            parts.append(f"turned by {self.turn} degrees")
        if self.strip:
            parts.append("skull stripped")
        if self.brightest is not None:
            parts.append(f"99 % quantile at grey {self.brightest:.0f}")
        return ", ".join(parts)


# What is at the (negative, positive) end of each world axis.
ENDS = (("left", "right"), ("back", "front"), ("bottom", "top"))


def picture_sides(look):
    """What is at the (left, right) edge of the pictures that a Look cuts: left and right of the
    patient, front and back, or bottom and top."""
    _, down, along = PLANES[look.plane]
    ends = {}
    for name, (axis, sign) in (("down", down), ("along", along)):
        ends[name] = ENDS[axis][::sign]  # (first, last): of the rows, of the columns
    sides = {
        0: ends["along"],
        90: ends["down"],  # counter-clockwise: what was at the top comes to the left
        180: ends["along"][::-1],
        270: ends["down"][::-1],
    }
    return sides[look.turn]


def describe_order(look, first, last):
    """A sentence on slices `first` to `last` that a Look cuts: their plane and their order."""
    across, _, _ = PLANES[look.plane]
    low, high = ENDS[across]
    step = look.step or look.spacing
    return (
        f"{look.plane}, from {low} ({first}) to {high} ({last}), {step:g} mm apart; what is outside"
        " of these slices was not assessed"
    )


# As the slices of AD_NC are: MP-RAGE, sagittal, face to the left.
ADNI = Look("sagittal", size=(256, 240), step=1.2)


def parse_range(word):
    """A `type` for argparse: FROM:TO as (from, to, "index" or "mm").

    81:100 are numbers of slices, -10mm:10mm are positions.
    """
    index = re.fullmatch(r"(\d{1,4}):(\d{1,4})", word)
    position = re.fullmatch(r"(-?\d{1,4}(?:\.\d+)?)mm:(-?\d{1,4}(?:\.\d+)?)mm", word)
    match = index or position
    if not match:
        raise argparse.ArgumentTypeError(
            f"{word} is not FROM:TO; expected slice numbers as in 81:100, or millimetres as in "
            "-10mm:10mm"
        )
    low, high = float(match[1]), float(match[2])
    if low > high:
        raise argparse.ArgumentTypeError(f"{word} ends before it begins")
    return low, high, "index" if index else "mm"


def parse_size(word):
    """A `type` for argparse: WIDTHxHEIGHT in pixels, as (width, height)."""
    match = re.fullmatch(r"(\d{2,4})x(\d{2,4})", word)
    if not match or not all(16 <= int(side) <= 4096 for side in match.groups()):
        raise argparse.ArgumentTypeError(
            f"{word} is not WIDTHxHEIGHT with sides of 16 to 4096 pixels, as 256x240 is"
        )
    return int(match[1]), int(match[2])


def add_look_flags(parser, default="the defaults in brackets"):
    """Add the flags of a Look, None if not given; returns their group."""
    group = parser.add_argument_group("how volumes are cut into slices", f"(default: {default})")
    add = group.add_argument
    add(
        "--plane", choices=("axial", "coronal", "sagittal"),
        help="left is on the left; a sagittal face looks to the left (axial)",
    )
    add(
        "--slices", type=parse_range, metavar="FROM:TO",
        help="numbers, as in 81:100; positions need an =, as in --slices=-10mm:10mm",
    )
    add(
        "--count", type=number(1, 1000, int), metavar="N",
        help="the N slices in the middle of the head (20)",
    )
    add(
        "--size", type=parse_size, metavar="WxH",
        help="pixels of a slice, about the middle of the head (the whole volume)",
    )
    add("--turn", type=int, choices=(0, 90, 180, 270), help="degrees, counter-clockwise (0)")
    add("--spacing", type=number(0.25, 10), metavar="MM", help="size of a pixel (1)")
    add(
        "--step", type=number(0.25, 50), metavar="MM",
        help="from one slice to the next (as --spacing)",
    )
    add(
        "--strip", action="store_true", default=None,
        help="remove the skull with deepbet (requirements-extra.txt)",
    )  # fmt: skip
    return group


def given_look_flags(args):
    """The flags of `add_look_flags` that were given, as a dict for `Look`."""
    names = ("plane", "slices", "count", "size", "turn", "spacing", "step", "strip")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if "slices" in given and "count" in given:
        raise InputError("--slices and --count both choose slices; give one of them")
    return given


def recorded_look(root):
    """How tools.extract cut the slices under `root`: a dict for `Look`, or None if not recorded.

    Read from extraction.json in `root` or its parent. InputError if that file is damaged.
    """
    for path in (Path(root) / "extraction.json", Path(root).parent / "extraction.json"):
        if not path.exists():
            continue
        try:
            look = Look(**read_json(path))
            usable = look.plane in PLANES and look.turn in (0, 90, 180, 270) and look.spacing > 0
            if look.slices is not None:
                usable = usable and len(look.slices) == 3
            if look.size is not None:
                usable = usable and len(look.size) == 2
            if not usable:
                raise ValueError("there is no such cut")
        except (ValueError, TypeError) as problem:
            raise InputError(
                f"{path} is not what tools.extract writes ({problem}); restore it, so that the "
                "model knows how its slices were cut, or remove it"
            ) from None
        return asdict(look)
    return None
