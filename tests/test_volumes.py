"""Volumes become slices whose left is left, whatever the file; other files are refused in a
sentence."""

import gzip
import os
import random
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from heads import AFFINE, CENTRE, VALUES, centre_of, cut, head, nib, place, stored, write_dicom
from PIL import Image

from adnc.data.index import describe_unused
from adnc.data.pixels import Unfit
from adnc.errors import InputError
from adnc.phantom import anatomy
from adnc.phantom import draw as phantom
from adnc.volumes import cut as volumes
from adnc.volumes import read as readers
from adnc.volumes.look import ADNI, Look, picture_sides

ORIENTATIONS = ("RAS", "LAS", "LPI", "RPS", "PSR", "ASL", "SRP", "IAL")
# ---------------------------------------------------------------- what is black, and what is a head


def noisy_head(background=0.0, shift=0.0, scale=1.0):
    """A head with noise in its tissue: 100 to 250 times `scale`, plus `shift`."""
    image = head(*place((4, 4, 4), (38, 46, 36)))
    values = np.asarray(image.dataobj).astype(np.float64)
    inside = values > 0
    values += np.random.default_rng(0).normal(0, 8, values.shape)
    values = np.where(inside, values * scale + shift, background)
    return nib.Nifti1Image(values.astype(np.float32), image.affine)


@pytest.mark.parametrize("background, shift, scale", [
    (-1024, 0, 1), (-2000, 0, 4), (-5, 1, 0.01), (0, -130 * 0.05, 0.05), (130, 0, 1), (1e4, 0, 1),
])  # fmt: skip
def test_a_background_that_is_not_the_darkest_value_becomes_black(
    tmp_path, background, shift, scale
):
    expected, _, record = cut(tmp_path / "a.nii", noisy_head(), spacing=4.0)
    assert record["notes"] is None
    slices, _, record = cut(
        tmp_path / "b.nii", noisy_head(background, shift, scale), spacing=4.0
    )
    assert f"{background:g} was taken for the background" in record["notes"]
    assert np.median(slices[:, [0, -1]]) == 0
    inside = expected > 60
    greys = np.corrcoef(slices[inside], expected[inside])[0, 1]
    assert greys > 0.97  # the order of tissues stays
    assert slices[~inside & (expected == 0)].max() <= 20


@pytest.mark.parametrize("background, shift, scale", [(0, 0, 1), (0, 400, 4), (3, 0, 1)])
def test_an_ordinary_background_stays_as_it_is(tmp_path, background, shift, scale):
    _, _, record = cut(tmp_path / "a.nii", noisy_head(background, shift, scale), spacing=4.0)
    assert record["notes"] is None and record["black"] == background


def test_slices_that_are_no_head_on_black_are_named(tmp_path):
    values = np.random.default_rng(0).normal(500, 100, (40, 40, 40)).astype(np.float32)
    _, _, record = cut(tmp_path / "a.nii", nib.Nifti1Image(values, np.eye(4)), spacing=1.0)
    assert "its background is not black" in record["notes"]


@pytest.mark.parametrize("labels", [[0, 1], [0, 255], [0, 1, 2, 3]])
def test_a_mask_is_no_head(tmp_path, labels):
    values = np.asarray(labels, np.uint8)[(VALUES / 60).astype(int) % len(labels)]
    with pytest.raises(Unfit, match=f"{len(labels)} different values, as a mask does"):
        cut(tmp_path / "a.nii", nib.Nifti1Image(values, AFFINE))


@pytest.mark.parametrize("name, problem", [
    ("sub-01_desc-brain_mask", "by its name, which ends in _mask"),
    ("sub-01_ses-2_dseg", "_dseg"), ("sub-1_label-GM_probseg", "_probseg"),
    ("sub-1_brainmask", "_brainmask"),
])  # fmt: skip
def test_what_is_no_head_by_its_bids_name_is_left_out(tmp_path, name, problem):
    for ending in (".nii.gz", ".NII.GZ"):
        with pytest.raises(Unfit, match=problem):
            cut(tmp_path / f"{name}{ending}", noisy_head(), spacing=4.0)


def test_masks_and_labels_are_found_before_they_are_smoothed(tmp_path):
    inside = np.asarray(head(*place((2, 2, 2), (75, 93, 72))).dataobj) > 0
    affine = place((2, 2, 2), (75, 93, 72))[0]
    with pytest.raises(Unfit, match="2 different values, as a mask does"):
        cut(tmp_path / "a.nii", nib.Nifti1Image(inside.astype(np.uint8), affine), spacing=6.0)
    for n_labels, dtype in ((20, np.int16), (120, np.uint8), (120, np.float32)):
        blocks = [np.arange(side) // 8 for side in inside.shape]
        numbers = 1 + sum(np.ix_(blocks[0], 5 * blocks[1], 25 * blocks[2])) % n_labels
        labels = nib.Nifti1Image(np.where(inside, numbers, 0).astype(dtype), affine)
        path = tmp_path / f"{n_labels}-{np.dtype(dtype)}.nii"
        _, _, record = cut(path, labels, spacing=6.0)
        assert "equal: is it a segmentation?" in record["notes"]
    outside = np.where(inside, numbers, np.nan).astype(np.float32)
    _, _, record = cut(tmp_path / "nan.nii", nib.Nifti1Image(outside, affine), spacing=6.0)
    assert "equal: is it a segmentation?" in record["notes"]
    _, _, record = cut(tmp_path / "head.nii", noisy_head(), spacing=6.0)
    assert "segmentation" not in str(record["notes"])


@pytest.mark.parametrize("spacing", [4.0, 8.0])  # at 8 mm the volume is smoothed
@pytest.mark.parametrize("change", ["mixed", "bright"])
def test_padding_below_zero_is_found_where_it_is_mixed_or_far_away(tmp_path, spacing, change):
    expected = cut(tmp_path / "a.nii", noisy_head(), spacing=spacing)[0]
    image = noisy_head()
    values = np.asarray(image.dataobj)
    if change == "bright":
        values = 16 * values
    padded = np.where(values == 0, -1024, values)
    if change == "mixed":  # as linear interpolation does at the border of the head
        padded = (padded + np.roll(padded, 1, 0)) / 2
        expected = None
    slices, _, record = cut(
        tmp_path / "b.nii", nib.Nifti1Image(padded.astype(np.float32), image.affine),
        spacing=spacing,
    )  # fmt: skip
    assert "-1024 was taken for the background" in record["notes"] and record["black"] == 0
    assert slices[:, 0].max() == 0 and 100 < np.median(slices[slices > 60]) < 180
    if expected is not None:
        assert np.abs(slices.astype(int) - expected).max() <= 2


def test_another_contrast_than_t1_is_named(tmp_path):
    for name, note in (("sub-1_T2w", True), ("sub-1_ses-1_FLAIR", True), ("sub-1_T1w", False)):
        _, _, record = cut(tmp_path / f"{name}.nii", noisy_head(), spacing=4.0)
        assert ("not T1w" in (record["notes"] or "")) == note
    _, _, record = cut(tmp_path / "scan_T2w.nii", noisy_head(), spacing=4.0)  # no name of BIDS
    assert record["notes"] is None


# ---------------------------------------------------------------- where things are


def test_a_marker_on_the_left_stays_on_the_left_and_the_front_is_where_it_is_documented(tmp_path):
    axial, coronal, sagittal = (
        cut(tmp_path / "h.nii", head(), plane=plane, count=40)[0] for plane in volumes.PLANES
    )
    for slices in (axial, coronal):
        assert centre_of(slices, 250)[2] < 0.4  # left, on the left of the picture
    assert centre_of(axial, 205, 225)[1] < 0.35  # front, at the top
    assert centre_of(coronal, 165, 185)[1] < 0.4  # crown, at the top
    # Face to the left, crown at the top.
    assert centre_of(sagittal, 205, 225)[2] < 0.35 and centre_of(sagittal, 165, 185)[1] < 0.4
    # Numbered from left to right, from back to front, from bottom to top.
    assert centre_of(sagittal, 250)[0] < 0.4
    assert centre_of(coronal, 205, 225)[0] > 0.6 and centre_of(axial, 165, 185)[0] > 0.6


MARKS = {"left": (250, 256), "front": (205, 225), "top": (165, 185)}  # grey levels


@pytest.mark.parametrize("plane", volumes.PLANES)
@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_the_sides_of_a_picture_are_where_the_markers_are(tmp_path, plane, turn):
    slices, _, _ = cut(tmp_path / "h.nii", head(), plane=plane, turn=turn, count=40)
    sides = picture_sides(Look(plane=plane, turn=turn))
    (mark,) = set(sides) & set(MARKS)
    column = centre_of(slices, *MARKS[mark])[2]
    assert column < 0.4 if sides[0] == mark else column > 0.6
    pairs = ({"left", "right"}, {"back", "front"}, {"bottom", "top"})
    assert set(sides) in pairs


@pytest.mark.parametrize("plane", volumes.PLANES)
def test_a_head_gives_the_same_slices_however_it_is_stored(tmp_path, plane):
    # Fine voxels, odd numbers of them.
    for voxels, shape in (((6, 6, 6), (25, 31, 24)), ((1.9, 3, 2.9), (79, 63, 50))):
        image = head(*place(voxels, shape))
        expected, numbers, _ = cut(tmp_path / "RAS.nii", image, plane=plane)
        for axes in ORIENTATIONS[1:]:
            slices, again, record = cut(tmp_path / f"{axes}.nii", stored(image, axes), plane=plane)
            assert record["orientation"] == axes and (numbers == again).all()
            np.testing.assert_array_equal(slices, expected, axes)


def summary(slices, record):
    """Where the ball on the left is (mm up, rows and columns of 6 mm), and the size of the head in
    pixels."""
    return [
        *np.argwhere(slices > 235).mean(0) * (6, 1, 1) + (record["first_mm"], 0, 0),
        (slices > 50).sum() ** (1 / 3),
    ]


def turned(degrees, axis):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn, (a, b) = np.eye(4), [i for i in range(3) if i != axis]
    turn[a, a], turn[a, b], turn[b, a], turn[b, b] = c, -s, s, c
    return turn


SHEAR = np.eye(4)
SHEAR[0, 1] = 0.3


@pytest.mark.parametrize(
    "change", [turned(25, 0), turned(-20, 1), turned(30, 2), turned(20, 2) @ turned(15, 0), SHEAR]
)
def test_an_oblique_or_skewed_affine_is_resampled_to_the_axes_of_the_world(tmp_path, change):
    affine, shape = place((3, 3, 3), (66, 78, 66))
    image = head(change @ affine, shape)
    image.set_qform(None, 0)  # which cannot say that it is skewed
    places = []
    for name, what in (("a.nii", head(affine, shape)), ("b.nii", image)):
        slices, _, record = cut(tmp_path / name, what, count=18, size=(32, 32))
        places.append(summary(slices, record))
    np.testing.assert_allclose(places[0], places[1], atol=1.1)  # grids differ by a pixel
    assert ("right angles" in (record["notes"] or "")) == (change is SHEAR)


def test_voxels_that_are_not_cubes_and_fine_ones_keep_the_proportions(tmp_path):
    expected, _, record = cut(tmp_path / "a.nii", head(*place((6, 6, 6), (26, 32, 24))))
    reference = summary(expected, record)
    for voxels, shape in (
        ((3, 6, 2), (52, 32, 72)),
        ((1.5, 1.5, 6), (104, 128, 24)),
        ((6, 4, 9), (26, 48, 16)),
    ):
        slices, _, record = cut(tmp_path / "b.nii", head(*place(voxels, shape)))
        np.testing.assert_allclose(summary(slices, record), reference, atol=1.1)


def test_the_transform_that_was_used_is_reported(tmp_path):
    """qform alone, both equal, both that disagree, neither, and an invalid qform."""
    image = head()
    mirrored = np.diag([-1, 1, 1, 1]) @ image.affine
    for qform, sform, source, note in (
        (image.affine, None, "qform", None),
        (image.affine, image.affine, "sform", None),
        (mirrored, image.affine, "sform", "sform and qform disagree by up to 144 mm; the sform"),
        (None, None, "assumed", "neither sform nor qform is set: left and right are nibabel's"),
    ):
        image.set_qform(qform, 0 if qform is None else 1)
        image.set_sform(sform, 0 if sform is None else 1)
        record = cut(tmp_path / "h.nii", image)[2]
        assert record["affine_from"] == source and (record["notes"] or "").startswith(note or "")
        assert bool(record["notes"]) == bool(note)


def write_half_turned(path, klass=nib.Nifti1Image, **changes):
    """Write the head so that its quaternion has length 1 and w = 0, and change its header."""
    image = stored(head(), "LPS")
    image = klass(np.asarray(image.dataobj), image.affine)
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 1)
    nib.save(image, path)

    file = readers.header_of(path)
    opener = gzip.open if file.endswith(".gz") else open
    with opener(file, "rb") as stream:
        data = stream.read()
    size = klass.header_class.template_dtype.itemsize
    header = klass.header_class(data[:size])
    for name, value in changes.items():
        header[name] = value
    with opener(file, "wb") as stream:
        stream.write(header.binaryblock + data[size:])
    return path


NO_ROTATION = {"quatern_b": 9, "quatern_c": 9, "quatern_d": 9}
NAN = {"quatern_b": np.nan}
FLAT = {"srow_x": 0, "srow_y": 0, "srow_z": 0}
NAN_SFORM = {"srow_y": np.nan}


@pytest.mark.parametrize("klass, name", [
    (nib.Nifti1Image, "h.nii"), (nib.Nifti1Image, "h.nii.gz"), (nib.Nifti2Image, "h.nii"),
    (nib.Nifti1Pair, "h.img"),
])  # fmt: skip
@pytest.mark.parametrize("changes, source, note", [
    (NO_ROTATION, "sform", "its qform is no invertible affine; the sform was used"),
    (NAN, "sform", "its qform is no invertible affine; the sform was used"),
    (FLAT, "qform", "its sform is no invertible affine; the qform was used"),
    (NAN_SFORM, "qform", "its sform is no invertible affine; the qform was used"),
    ({"quatern_d": 1.0002}, "sform", None),
    ({"quatern_d": 1.0002, "sform_code": 0}, "qform", "its quaternion is rounded (length 1.0002)"),
])  # fmt: skip
def test_of_two_transforms_the_good_one_is_used(tmp_path, klass, name, changes, source, note):
    expected = cut(write_half_turned(tmp_path / "good.nii"))[0]
    slices, _, record = cut(write_half_turned(tmp_path / name, klass, **changes))
    assert np.abs(slices.astype(int) - expected).max() <= 1
    assert record["affine_from"] == source
    assert (record["notes"] or "").startswith(note or "") and bool(record["notes"]) == bool(note)


@pytest.mark.parametrize("changes", [
    {**NO_ROTATION, **FLAT}, {**NO_ROTATION, "sform_code": 0}, {**FLAT, "qform_code": 0},
])  # fmt: skip
def test_two_transforms_that_cannot_be_used_are_refused(tmp_path, changes):
    write_half_turned(tmp_path / "h.nii", **changes)
    with pytest.raises(Unfit, match="cannot be inverted|w2 should be positive"):
        cut(tmp_path / "h.nii")


@pytest.mark.parametrize("wrong, right", [
    ("h.nii", "h.nii.gz"), ("h.nii.gz", "h.nii"), ("h.mgz", "h.mgh"), ("h.mgh", "h.mgz"),
    ("h.NII", "h.nii.gz"),
])  # fmt: skip
def test_a_volume_is_decompressed_by_what_it_holds(tmp_path, wrong, right):
    values, affine = VALUES.astype(np.float32), AFFINE
    klass = nib.MGHImage if "mg" in right else nib.Nifti1Image
    expected = cut(tmp_path / right, klass(values, affine))[0]
    (tmp_path / right).rename(tmp_path / wrong)
    assert np.array_equal(cut(tmp_path / wrong)[0], expected)


@pytest.mark.parametrize("side", [0.9375, 1.0, 1.25])  # exact in float32, as NIfTI stores them
@pytest.mark.parametrize("axes", ["RAS", "PSR"])
def test_voxels_of_the_size_of_a_pixel_are_used_as_they_are(tmp_path, side, axes):
    shape = (60, 66, 54)
    values = np.random.default_rng(0).uniform(20, 200, shape).astype(np.float32)
    image = nib.Nifti1Image(values, place((side,) * 3, shape)[0])
    slices, _, record = cut(
        tmp_path / "h.nii", stored(image, axes), spacing=side, slices=(0, 53, "index")
    )
    grey = (values - record["black"]) / (record["white"] - record["black"]) * 255
    expected = grey.clip(0, 255)[:, ::-1].T  # (x, y, z) -> (slice, row from the front, column)
    assert np.abs(slices - expected).max() < 0.51


# ---------------------------------------------------------------- what is in a file


def test_any_kind_of_number_and_file_gives_the_same_slices(tmp_path):
    values = VALUES.round()
    image, affine = nib.Nifti1Image(values, AFFINE), AFFINE
    expected = cut(tmp_path / "a.nii", image)[0]
    for dtype in ("u1", ">i2", "f8", "i4"):
        slices = cut(tmp_path / "b.nii.gz", nib.Nifti1Image(values.astype(dtype), affine))[0]
        assert (slices == expected).all()
    scaled = nib.Nifti1Image(values, affine)
    scaled.header.set_data_dtype(np.int16)
    scaled.header.set_slope_inter(0.05, 10)
    assert np.abs(cut(tmp_path / "c.nii", scaled)[0].astype(int) - expected).max() <= 1
    one_volume = nib.Nifti1Image(values[..., None], affine)
    assert (cut(tmp_path / "d.nii", one_volume)[0] == expected).all()
    assert (cut(tmp_path / "e.mgz", nib.MGHImage(values, affine))[0] == expected).all()
    assert (cut(tmp_path / "f.nii", nib.Nifti2Image(values, affine))[0] == expected).all()
    assert (cut(tmp_path / "g.img", nib.Nifti1Pair(values, affine))[0] == expected).all()
    analyze = nib.AnalyzeImage(values.astype(np.int16), np.diag([-6, 6, 6, 1]))
    _, _, record = cut(tmp_path / "h.img", analyze)
    assert record["affine_from"] == "assumed"
    assert "Analyze files do not say where left is" in record["notes"]
    volumes_here = [path for path, _ in readers.find_volumes(tmp_path)]
    assert volumes_here == sorted(map(str, tmp_path.glob("*.[nmi][!d]*")))  # not the .hdr


def test_voxels_that_are_not_finite_become_black_and_are_counted(tmp_path):
    image = head()
    values = np.asarray(image.dataobj).copy()
    expected = cut(tmp_path / "a.nii", image)[0]
    values[:3] = np.nan
    values[0, 0, 0] = np.inf
    slices, _, record = cut(tmp_path / "b.nii", nib.Nifti1Image(values, image.affine))
    assert (slices[:, :, 3:] == expected[:, :, 3:]).all() and slices[:, :, :3].max() == 0
    count = f"{3 * 31 * 24:,} of {values.size:,} voxels"
    assert record["notes"] == f"{count} are not finite numbers; they become black"


def test_a_voxel_that_is_not_finite_is_one_voxel_also_if_the_volume_is_smoothed(tmp_path):
    affine, shape = place((2, 2, 2), (75, 93, 72))
    values = np.asarray(head(affine, shape).dataobj)
    noise = np.random.default_rng(0).normal(0, 2, shape).astype(np.float32)
    values = np.where(values > 0, values + noise, 0)

    def cut_values(name, values):
        return cut(tmp_path / name, nib.Nifti1Image(values.astype(np.float32), affine), spacing=6.0)

    expected = cut_values("a.nii", values)[0].astype(int)
    holed = values.copy()
    holed[37, 46, 36] = np.nan
    slices, _, record = cut_values("b.nii", holed)
    assert record["notes"].startswith(f"1 of {values.size:,} voxels are not finite")
    assert abs(slices - expected).max() < 30  # a voxel of 27 became black
    assert (cut_values("c.nii", np.where(values == 0, np.nan, values))[0] == expected).all()


def test_slices_that_are_asked_for_and_not_there_are_counted(tmp_path):
    for asked, there, n in (((10, 99, "index"), 14, 90), ((10, 12, "index"), 3, 3)):
        _, numbers, record = cut(tmp_path / f"{n}.nii", head(), slices=asked)
        assert len(numbers) == there
        note = f"only {there} of {n} slices are within the volume"
        assert (note in str(record["notes"])) == (there < n)


def test_an_mgh_file_without_an_orientation_is_refused(tmp_path):
    nib.save(nib.MGHImage(VALUES, AFFINE), tmp_path / "h.mgh")
    data = bytearray((tmp_path / "h.mgh").read_bytes())
    data[28:30] = bytes(2)
    (tmp_path / "h.mgh").write_bytes(data)
    with pytest.raises(Unfit, match="does not say where left, front and top are"):
        cut(tmp_path / "h.mgh")


def header(**changes):
    """The bytes of a NIfTI file with changed fields in its header, and 1,000 bytes of voxels."""
    image = head(dtype=np.int16)
    for name, value in changes.items():
        image.header[name] = value
    return image.header.binaryblock + bytes(4) + bytes(1000)


COLOUR = np.zeros((16, 16, 16), [("R", "u1"), ("G", "u1"), ("B", "u1")])
REFUSED = {  # name: (image or bytes, start of the reason)
    "empty.nii": (b"", "cannot be read as a volume: Empty file"),
    "text.nii": (b"no volume, but a text", "cannot be read as a volume: "),
    "text.nii.gz": (b"no volume, but a text", "cannot be read as a volume: "),
    "several.nii": (
        nib.Nifti1Image(np.stack([VALUES] * 3, 3), AFFINE),
        "holds 3 volumes; expected one volume",
    ),
    "more.nii": (
        nib.Nifti1Image(np.zeros((16, 16, 16, 2, 5), "u1"), AFFINE),
        "holds 2x5 volumes; expected one",
    ),
    "plane.nii": (
        nib.Nifti1Image(VALUES[..., 0], AFFINE),
        "holds 2 dimensions; expected one volume",
    ),
    "thin.nii": (
        nib.Nifti1Image(VALUES[..., :5], AFFINE),
        "claims 25 x 31 x 5 voxels; expected 8 to 1024 a side",
    ),
    "colour.nii": (
        nib.Nifti1Image(COLOUR, AFFINE),
        "has voxels in colour; expected one real number per voxel",
    ),
    "complex.nii": (
        nib.Nifti1Image(VALUES.astype(np.complex64), AFFINE),
        "has voxels that are complex",
    ),
    "flat.nii": (
        header(sform_code=1, srow_z=[0, 0, 0, 0]),
        "has an affine that cannot be inverted",
    ),
    "nan.nii": (
        nib.Nifti1Image(np.full((16, 16, 16), np.nan), AFFINE),
        "holds a single grey level, or no finite",
    ),
    "black.nii": (
        nib.Nifti1Image(np.zeros((16, 16, 16), "u1"), AFFINE),
        "holds a single grey level",
    ),
    "mouse.nii": (
        nib.Nifti1Image(VALUES, np.diag([0.2, 0.2, 0.2, 1])),
        "measures 5 x 6.2 x 4.8 mm; expected sides of 30 to",
    ),
    "metres.nii": (
        nib.Nifti1Image(VALUES, np.diag([600, 600, 600, 1])),
        "is its header in another unit?",
    ),
    "cut.nii": (header(), "cannot be read as a volume: Expected"),
    "huge.nii": (
        header(dim=[3, 20000, 20000, 20000, 1, 1, 1, 1]),
        "claims 20000 x 20000 x 20000 voxels; expected 8",
    ),
    "huge.nii.gz": (
        gzip.compress(header(dim=[3, 1000, 1000, 1000, 1, 1, 1, 1])),
        "claims 1000 x 1000 x 1000 voxels",
    ),
    "negative.nii": (header(dim=[3, -20, 20, 20, 1, 1, 1, 1]), "claims -20 x 20 x 20 voxels"),
    "cut.nii.gz": (gzip.compress(header() + bytes(30000))[:-40], "cannot be read as a volume: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_unusable_file_is_refused_with_the_reason(tmp_path, name):
    what, reason = REFUSED[name]
    if isinstance(what, bytes):
        (tmp_path / name).write_bytes(what)
    else:
        nib.save(what, tmp_path / name)
    with pytest.raises(Unfit) as caught:
        cut(tmp_path / name)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_pipe_and_a_missing_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.nii")
    with pytest.raises(Unfit, match="is not a file"):
        cut(tmp_path / "pipe.nii")
    with pytest.raises(Unfit, match="does not exist"):
        cut(tmp_path / "gone.nii")


def test_a_false_size_is_refused_before_it_takes_memory(tmp_path):
    (tmp_path / "huge.nii").write_bytes(REFUSED["huge.nii"][0])
    with pytest.raises(Unfit, match="claims 20000 x 20000 x 20000 voxels"):
        cut(tmp_path / "huge.nii")


def test_mutated_volumes_are_cut_or_refused_in_a_sentence(tmp_path, repeats):
    """Mostly mutated headers, some of compressed files."""
    affine, shape = place((9, 9, 9), (16, 18, 16))
    generator, cuts = random.Random(0), 0
    n_files = repeats(80, 1000)
    seeds = {}
    for name in ("a.nii", "a.nii.gz", "a.mgz"):
        image = head(affine, shape, np.int16)
        if name == "a.mgz":
            image = nib.MGHImage(np.asarray(image.dataobj, np.float32), affine)
        nib.save(image, tmp_path / name)
        seeds[name] = (tmp_path / name).read_bytes()
    special = [b"\0" * 4, b"\xff" * 4, struct.pack("<i", 2**31 - 1)]
    special += [struct.pack("<f", value) for value in (np.nan, np.inf, 1e30, -1e-30)]
    special += [struct.pack("<h", value) for value in (1, 2, 2**15 - 1)]

    def mutate(name):
        data = bytearray(seeds[name])
        for _ in range(generator.randrange(1, 5)):
            in_header = generator.random() < 0.9
            at = min(generator.randrange(348 if in_header else len(data)), len(data) - 1)
            kind = generator.randrange(4)
            if kind == 0:
                data[at] = generator.randrange(256)
            elif kind == 1:
                data[at : at + 4] = generator.choice(special)
            elif kind == 2:
                data = data[: generator.randrange(len(data))] or data
            else:
                at = generator.choice(
                    [40, 42, 44, 46, 48, 70, 72, 76, 80, 84, 88, 108, 112, 116, 252, 254, 280, 296]
                )
                data[at : at + 4] = generator.choice(special)
        return bytes(data)

    for number in range(n_files):
        name = generator.choice(["a.nii", "a.nii", "a.nii.gz", "a.mgz"])
        path = tmp_path / f"x.{name.split('.', 1)[1]}"
        path.write_bytes(mutate(name))
        try:
            slices, _, record = cut(path, spacing=9.0, plane=list(volumes.PLANES)[number % 3])
            assert slices.dtype == np.uint8 and record["orientation"]
            cuts += 1
        except (InputError, OSError) as problem:
            assert 5 < len(str(problem)) < 400 and "\n" not in str(problem)
    assert 0.1 * n_files < cuts < 0.9 * n_files


# ---------------------------------------------------------------- which slices, how large


def test_slices_are_chosen_by_number_by_position_or_about_the_middle_of_the_head(tmp_path):
    nib.save(head(), tmp_path / "h.nii")
    every, numbers, record = cut(tmp_path / "h.nii", count=100)
    assert numbers.tolist() == list(range(24))
    assert "only 24 of 100 slices are within the volume" in record["notes"]
    middle, numbers, record = cut(tmp_path / "h.nii", count=5)
    assert len(numbers) == 5 and abs(record["first_mm"] + record["last_mm"] - 2 * CENTRE[2]) <= 6
    assert (middle == every[numbers]).all()
    some, numbers, _ = cut(tmp_path / "h.nii", slices=(3, 7, "index"))
    assert numbers.tolist() == [3, 4, 5, 6, 7] and (some == every[3:8]).all()
    some, numbers, record = cut(tmp_path / "h.nii", slices=(-20, 10, "mm"))
    assert (record["first_mm"], record["last_mm"]) == (-15, 9)
    assert numbers.tolist() == [9, 10, 11, 12, 13]
    assert (some == every[9:14]).all()
    with pytest.raises(Unfit, match="has no slice there; expected 0:23, or -69mm:69mm"):
        cut(tmp_path / "h.nii", slices=(80, 90, "mm"))
    _, _, record = cut(tmp_path / "h.nii", step=12.0, count=4)
    assert record["last_mm"] - record["first_mm"] == 36


def test_size_pads_and_crops_about_the_middle_of_the_head_and_turn_is_counter_clockwise(tmp_path):
    nib.save(head(), tmp_path / "h.nii")
    whole = cut(tmp_path / "h.nii")[0]
    assert whole.shape[1:] == (31, 25)
    large, _, record = cut(tmp_path / "h.nii", size=(64, 48))
    assert large.shape[1:] == (48, 64) and record["notes"] is None
    inside = np.argwhere(large.max(0) > 0)
    assert np.abs(inside.mean(0) - (24, 32)).max() < 1.5  # the middle, not that of the volume
    assert large.sum() == whole.sum()  # nothing is lost
    small, _, record = cut(tmp_path / "h.nii", size=(16, 16))
    assert (small == large[:, 16:32, 24:40]).all()
    assert "the head reaches the border of the slices" in record["notes"]
    turned = cut(tmp_path / "h.nii", size=(48, 64), turn=90)[0]
    assert turned.shape[1:] == (64, 48) and (turned == np.rot90(large, 1, (1, 2))).all()
    fine = cut(tmp_path / "h.nii", spacing=3.0)[0]
    assert fine.shape[1:] == (61, 49)
    with pytest.raises(Unfit, match="slices of 13 x 16 pixels; expected 16 to 4096 a side"):
        cut(tmp_path / "h.nii", spacing=12.0)


# ---------------------------------------------------------------- DICOM


def test_a_dicom_folder_gives_the_slices_of_the_same_head(tmp_path):
    pytest.importorskip("dcm2niix", reason="DICOM folders need dcm2niix (requirements-extra.txt)")
    expected = cut(tmp_path / "h.nii", head())[0]
    slices, _, record = cut(write_dicom(tmp_path / "-scan of a head"))
    assert np.abs(slices.astype(int) - expected).max() <= 1 and record["affine_from"] == "sform"
    write_dicom(tmp_path / "-scan of a head", 2)
    with pytest.raises(Unfit, match=r"holds 2 series \(series1, series2\); expected one"):
        cut(tmp_path / "-scan of a head")
    gap = write_dicom(tmp_path / "gap")
    sorted(Path(gap).iterdir())[10].unlink()
    with pytest.raises(Unfit, match="cannot be converted by dcm2niix: .*(issing|nterslice)"):
        cut(gap)
    cut_off = sorted(Path(write_dicom(tmp_path / "cut off")).iterdir())[10]
    cut_off.write_bytes(cut_off.read_bytes()[:-300])
    with pytest.raises(Unfit, match="by dcm2niix: .*not large enough .*010.dcm"):
        cut(cut_off.parent)
    (cut_off.parent / "notes.txt").write_text("")
    (line,) = describe_unused(cut_off.parent, readers.files_of(str(cut_off.parent)))
    assert line.startswith("not used: 1 other file") and ".txt" in line
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1").write_bytes(bytes(128) + b"DICM" + b"rubbish" * 9)
    with pytest.raises(Unfit, match="cannot be converted by dcm2niix"):
        cut(tmp_path / "bad")


def test_dicom_without_a_preamble_is_read_where_dcm2niix_reads_it(tmp_path):
    pytest.importorskip("dcm2niix", reason="DICOM folders need dcm2niix (requirements-extra.txt)")
    expected = cut(write_dicom(tmp_path / "whole"))[0]
    assert np.array_equal(cut(write_dicom(tmp_path / "bare", bare=True))[0], expected)
    for file in write_dicom(tmp_path / "cut off").iterdir():
        file.write_bytes(file.read_bytes()[132:])
    with pytest.raises(Unfit, match="the files may be damaged or lack their preamble"):
        cut(tmp_path / "cut off")


def test_dicom_in_which_zero_is_white_is_refused(tmp_path):
    pytest.importorskip("dcm2niix", reason="DICOM folders need dcm2niix (requirements-extra.txt)")
    for file in write_dicom(tmp_path / "series").iterdir():
        file.write_bytes(file.read_bytes().replace(b"MONOCHROME2", b"MONOCHROME1"))
    with pytest.raises(Unfit, match="would be read as its negative"):
        cut(tmp_path / "series")


@pytest.mark.parametrize("bare", [False, True])
def test_a_single_dicom_file_is_one_of_a_series(tmp_path, bare):
    file = sorted(write_dicom(tmp_path / "series", bare=bare).iterdir())[3]
    assert readers.holds_volumes(file)
    with pytest.raises(InputError, match=f"one file of a DICOM series; .*: {tmp_path}/series"):
        readers.find_volumes(file)


@pytest.mark.parametrize("start", [
    b"", b"\10", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n", b"\10\0text of something else", bytes(200),
])  # fmt: skip
def test_other_files_are_no_dicom(tmp_path, start):
    (tmp_path / "x.dcm").write_bytes(start)
    assert not readers.is_dicom(tmp_path / "x.dcm")


def test_dicom_at_varying_distances_is_refused_with_that_reason(tmp_path):
    pytest.importorskip("dcm2niix", reason="DICOM folders need dcm2niix (requirements-extra.txt)")
    with pytest.raises(Unfit, match="by dcm2niix: .*distance varies"):
        cut(write_dicom(tmp_path / "series", shifted=10))


@pytest.mark.parametrize("damage", ["bit", "sum"])
def test_a_damaged_gzip_file_is_refused(tmp_path, damage):
    data = bytearray(gzip.compress(noisy_head().to_bytes()))
    data[len(data) // 2 if damage == "bit" else -6] ^= 4
    (tmp_path / "h.nii.gz").write_bytes(data)
    with pytest.raises(Unfit, match="cannot be read as a volume"):
        cut(tmp_path / "h.nii.gz")


def test_voxels_without_a_place_are_read_from_behind_the_header(tmp_path):
    expected = cut(tmp_path / "h.nii", head())[0]
    data = bytearray((tmp_path / "h.nii").read_bytes())
    data[108:112] = bytes(4)
    (tmp_path / "h.nii").write_bytes(data)
    slices, _, record = cut(tmp_path / "h.nii")
    assert np.array_equal(slices, expected) and "gives no place of the voxels" in record["notes"]


@pytest.mark.parametrize("name", ["aseg.mgz", "aparc+aseg.mgz", "lh.ribbon.mgz", "wmparc.mgz"])
def test_segmentations_of_freesurfer_are_no_heads(tmp_path, name):
    with pytest.raises(Unfit, match="FreeSurfer segmentation"):
        cut(tmp_path / name, nib.MGHImage(VALUES.astype(np.float32), AFFINE))


def test_linked_folders_are_read_once_and_unreadable_ones_are_an_error(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "real").mkdir()
    nib.save(head(), tmp_path / "real" / "h.nii")
    (tmp_path / "set" / "link").symlink_to("../real")
    (tmp_path / "real" / "back").symlink_to("../set")
    paths = [path for path, _ in readers.find_volumes(tmp_path / "set")]
    assert paths == [str(tmp_path / "set" / "link" / "h.nii")]
    monkeypatch.setattr(os, "scandir", lambda path: (_ for _ in ()).throw(PermissionError(path)))
    with pytest.raises(PermissionError):
        readers.find_volumes(tmp_path / "set")


def test_dicom_is_found_behind_many_other_files_and_under_any_ending(tmp_path):
    folder = write_dicom(tmp_path / "series")
    for number in range(60):
        (folder / f"0_{number}.txt").write_text("a note")
    for file in folder.glob("*.dcm"):
        file.rename(file.with_suffix(".img"))
    assert readers.find_volumes(folder) == [(str(folder), ".")]
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(folder / "preview.png")
    with pytest.raises(InputError, match="1 pictures beside volumes or DICOM"):
        readers.holds_volumes(folder)


# ---------------------------------------------------------------- the phantom's heads


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Two heads of the phantom, every sixth slice of them, stored as RAS and LAS."""
    return phantom.draw_volumes(tmp_path_factory.mktemp("phantom"), 2, seed=1, every=6)


def test_the_phantoms_heads_have_the_orientation_class_and_brain_that_their_table_says(heads):
    table = pd.read_csv(heads.parent / "heads.csv")
    assert table.label.tolist() == ["NC", "AD"]
    assert table.orientation.tolist() == list(phantom.STORED[:2])
    assert table.brain_litres.between(1.0, 2.0).all()
    for row in table.itertuples():
        image = nib.load(heads / f"{row.scan}.nii.gz")
        brain = nib.load(heads.parent / "brains" / f"{row.subject}_desc-brain_T1w.nii.gz")
        assert "".join(nib.aff2axcodes(image.affine)) == row.orientation
        assert (image.affine == brain.affine).all()
        whole, only = np.asarray(image.dataobj), np.asarray(brain.dataobj)
        assert (whole[only > 0] == only[only > 0]).all()
        n_whole, n_only = np.count_nonzero(whole > 60), np.count_nonzero(only > 60)
        assert n_whole > 1.1 * n_only
    with pytest.raises(InputError, match="heads exists"):
        phantom.draw_volumes(heads.parent, 2)


def test_the_capsule_on_the_left_temple_of_the_phantom_is_on_the_left(heads):
    for path in heads.iterdir():
        slices, _, _ = volumes.extract_volume(
            str(path), Look(spacing=2.0, count=50, size=(128, 128), brightest=120)
        )
        ball = slices > 0.9 * slices.max()
        assert 0.1 < centre_of(ball, True, 2)[2] < 0.3 and ball[..., 64:].sum() == 0


def test_the_brain_of_the_phantom_gives_the_slices_that_the_phantom_draws(heads):
    """Cut as AD_NC is, the volume gives the pixels of the set's own slices, up to the window."""
    scan = next(scan for scan in phantom.plan(10, 1) if scan.visit == 0 and scan.label == "NC")
    path = heads.parent / "brains" / f"sub-{scan.subject.replace('_', '')}_desc-brain_T1w.nii.gz"
    look = Look("sagittal", slices=(0, 30, "index"), step=6 * anatomy.SPACING)
    slices, numbers, record = volumes.extract_volume(str(path), look)
    drawn = anatomy.render(scan, 1, [i for i in range(0, 181, 6) if 30 <= i <= 151]).astype(float)
    expected = np.clip(drawn / record["white"] * 255, 0, 255).round()
    assert slices.shape[1:] == (240, 256) and numbers.tolist() == list(range(31))
    np.testing.assert_array_equal(slices[5:26], expected)


# ---------------------------------------------------------------- real heads, if installed


def test_nibabels_own_volumes_are_cut_or_refused(tmp_path):
    data = Path(nib.__file__).parent / "tests" / "data"
    if not (data / "anatomical.nii").exists():
        pytest.skip("this nibabel comes without its test data")
    slices, _, record = volumes.extract_volume(str(data / "anatomical.nii"), Look(spacing=3.0))
    assert record["orientation"] == "LAS" and slices.max() == 255
    for name in ("functional.nii", "example4d.nii.gz", "test.mgz"):
        with pytest.raises(Unfit, match="holds .* volumes; expected one"):
            volumes.extract_volume(str(data / name), Look())


def test_a_real_head_and_its_mirrored_storage_give_the_same_slices(adult, tmp_path):
    whole, _, record = volumes.extract_volume(str(adult[0]), ADNI)
    assert (record["orientation"], record["affine_from"], record["notes"]) == ("RAS", "sform", None)
    nib.save(stored(nib.load(adult[0]), "LAS"), tmp_path / "las.nii")
    assert (volumes.extract_volume(str(tmp_path / "las.nii"), ADNI)[0] == whole).all()
    brain, _, _ = volumes.extract_volume(str(adult[1]), ADNI)
    assert 0.6 < (brain < 16).mean() < 0.9 and (whole < 16).mean() < (brain < 16).mean()


def test_the_mni152_template_lies_where_nilearn_puts_it(tmp_path):
    """Darkened on the left, because the template is symmetric, and stored along other axes than
    nilearn's own."""
    image = pytest.importorskip(
        "nilearn.image", reason="needs nilearn, whose package holds the MNI152 template"
    )
    template = pytest.importorskip("nilearn.datasets").load_mni152_template(resolution=2)
    values = np.array(template.dataobj)
    values[: values.shape[0] // 2] *= 0.7
    other = stored(nib.Nifti1Image(values, template.affine), "PSL")
    slices, _, record = cut(tmp_path / "h.nii", other, spacing=2.0, slices=(40, 59, "index"))
    upright = np.asarray(image.reorder_img(other).dataobj)[:, ::-1, 40:60].T
    expected = (upright / record["white"] * 255).clip(0, 255)
    assert record["orientation"] == "PSL" and np.abs(slices - expected).max() < 1.01


def test_an_atlas_is_noted_as_a_segmentation_and_a_template_is_not(adult):
    look = Look(plane="axial", size=(128, 128), spacing=2.0, count=3)
    for path in (*adult, adult[0].with_name("ch2better.nii.gz")):
        _, _, record = volumes.extract_volume(str(path), look)
        assert "segmentation" not in str(record["notes"])
    for name in ("aal", "AICHAmc", "inia19-NeuroMaps"):  # 117, 193 and 669 values
        _, _, record = volumes.extract_volume(str(adult[0].with_name(f"{name}.nii.gz")), look)
        assert "equal: is it a segmentation?" in record["notes"]


# deepbet stores its weights as TorchScript.
@pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated")
def test_a_real_head_is_stripped_to_its_brain(adult):
    pytest.importorskip("deepbet", reason="--strip needs deepbet (requirements-extra.txt)")
    image, _, _ = readers.open_volume(str(adult[0]))
    brain = readers.strip_skull(*readers.read_volume(image)) > 0
    mask = np.asarray(nib.load(adult[1]).dataobj) > 0
    assert 2 * (brain & mask).sum() / (brain.sum() + mask.sum()) > 0.92
