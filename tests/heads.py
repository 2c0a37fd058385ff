"""A head of a few thousand voxels whose left, front and top are known, as an image, a file or a
DICOM folder."""

import struct

import numpy as np
import pytest

from adnc.volumes import cut as volumes
from adnc.volumes.look import Look

nib = pytest.importorskip("nibabel", reason="volumes need nibabel (requirements.txt)")
CENTRE = -2.0, 4.0, 6.0  # mm


def brightness(x, y, z):
    """A head in mm: an ellipsoid with a bright ball on its left, a darker one at its front, the
    darkest at its top. All of it grows a little brighter to one corner: equal neighbours are those
    of a segmentation."""
    x, y, z = x - CENTRE[0], y - CENTRE[1], z - CENTRE[2]
    value = np.where((x / 60) ** 2 + (y / 78) ** 2 + (z / 54) ** 2 < 1, 100.0, 0.0)
    balls = ((250, 17, (-38, 0, 0)), (210, 13, (0, 55, 0)), (170, 13, (0, 0, 34)))
    for grey, radius, (left, front, up) in balls:
        inside = (x - left) ** 2 + (y - front) ** 2 + (z - up) ** 2 < radius**2
        value = np.where(inside, grey, value)
    return np.where(value > 0, value + 0.06 * (x + y + z), 0.0)


def place(voxels=(6, 6, 6), shape=(25, 31, 24)):
    """An affine for a grid about the origin."""
    affine = np.diag([*map(float, voxels), 1.0])
    affine[:3, 3] = -np.array(voxels) * (np.array(shape) - 1) / 2
    return affine, shape


def head(affine=None, shape=None, dtype=np.float32):
    """An image of nibabel: the head, sampled where the affine says."""
    if affine is None:
        affine, shape = place()
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    x, y, z = np.moveaxis(voxels @ affine[:3, :3].T + affine[:3, 3], -1, 0)
    return nib.Nifti1Image(brightness(x, y, z).astype(dtype), affine)


def stored(image, axes):
    """The same image with its voxels stored along other axes."""
    here = nib.io_orientation(image.affine)
    there = nib.orientations.axcodes2ornt(axes)
    return image.as_reoriented(nib.orientations.ornt_transform(here, there))


def cut(path, image=None, **look):
    """(slices, numbers, record) of a file, or of an image that is written there first."""
    if image is not None:
        nib.save(image, path)
    return volumes.extract_volume(str(path), Look(**{"spacing": 6.0, "count": 12} | look))


def centre_of(slices, low, high=256):
    """Mean (slice, row, column) of grey levels, as shares of the size."""
    inside = np.argwhere((slices >= low) & (slices < high))
    return (inside.mean(0) + 0.5) / slices.shape


VALUES = np.asarray(head().dataobj)
AFFINE = head().affine


def element(group, number, kind, value):
    """The bytes of a DICOM element."""
    value = value.encode() if isinstance(value, str) else value
    if len(value) % 2:  # lengths are even
        value += b"\0" if kind == "UI" else b" "
    if kind in ("OB", "OW"):
        size = struct.pack("<HI", 0, len(value))
    else:
        size = struct.pack("<H", len(value))
    return struct.pack("<HH", group, number) + kind.encode() + size + value


def write_dicom(folder, series=1, *, bare=False, shifted=None):
    """The head as axial DICOM slices of one series; rows run to the left, columns to the back of
    the patient. bare: without preamble and meta information, as before 1993; shifted: the number of
    a slice that is 3 mm too high."""
    image = stored(head(), "LPS")
    corner = image.affine[:3, 3] * (-1, -1, 1)  # x and y of DICOM point to the left and to the back
    folder.mkdir(exist_ok=True)
    for number, plane in enumerate(np.moveaxis(np.asarray(image.dataobj), 2, 0)):
        rows = plane.T.astype("<u2")  # (left, back) -> (rows, columns)
        height = 6 * number + 3 if number == shifted else 6 * number
        where = "\\".join(f"{value:g}" for value in corner + (0, 0, height))
        uid, kind = f"1.2.3.{series}.{number + 1}", "1.2.840.10008.5.1.4.1.1.4"
        meta = (element(2, 1, "OB", b"\0\1") + element(2, 2, "UI", kind) + element(2, 3, "UI", uid)
                + element(2, 0x10, "UI", "1.2.840.10008.1.2.1"))  # fmt: skip
        n_rows, n_columns = rows.shape
        short = struct.Struct("<H").pack
        body = [
            (8, 0x16, "UI", kind),
            (8, 0x18, "UI", uid),
            (8, 0x60, "CS", "MR"),
            (8, 0x70, "LO", "SIEMENS"),
            (0x18, 0x50, "DS", "6"),
            (0x20, 0xD, "UI", "1.2.3"),
            (0x20, 0xE, "UI", f"1.2.3.{series}"),
            (0x20, 0x11, "IS", str(series)),
            (0x20, 0x13, "IS", str(number + 1)),
            (0x20, 0x32, "DS", where),
            (0x20, 0x37, "DS", "1\\0\\0\\0\\1\\0"),
            (0x28, 2, "US", short(1)),
            (0x28, 4, "CS", "MONOCHROME2"),
            (0x28, 0x10, "US", short(n_rows)),
            (0x28, 0x11, "US", short(n_columns)),
            (0x28, 0x30, "DS", "6\\6"),
            (0x28, 0x100, "US", short(16)),
            (0x28, 0x101, "US", short(16)),
            (0x28, 0x102, "US", short(15)),
            (0x28, 0x103, "US", short(0)),
            (0x7FE0, 0x10, "OW", rows.tobytes()),
        ]
        data = b"".join(element(*row) for row in body)
        if not bare:
            meta = element(2, 0, "UL", struct.pack("<I", len(meta))) + meta
            data = bytes(128) + b"DICM" + meta + data
        (folder / f"{series}-{number:03d}.dcm").write_bytes(data)
    return folder
