"""Volumes become slices whose left is left, whatever the file; what is no head is refused in a sentence."""

import gzip
import json
import os
import random
import re
import resource
import shutil
import struct
import sys
import tracemalloc
from pathlib import Path

import command
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, train_steps
from PIL import Image
from test_predict import run_predict

import anatomy
import checkpoint
import extract
import phantom
import predict
import readers
import volumes
from slices import Unfit
from utils import InputError, read_csv
from volumes import ADNI, Look

nib = pytest.importorskip("nibabel", reason="volumes need nibabel (requirements-volumes.txt)")
MRICRON = Path("/usr/share/mricron/templates")  # of Debian's mricron-data
ORIENTATIONS = ("RAS", "LAS", "LPI", "RPS", "PSR", "ASL", "SRP", "IAL")
CENTRE = -2.0, 4.0, 6.0  # mm


def brightness(x, y, z):
    """A head in mm: an ellipsoid with a bright ball on its left, a darker one at its front, the darkest at its top."""
    x, y, z = x - CENTRE[0], y - CENTRE[1], z - CENTRE[2]
    value = 100.0 * ((x / 60) ** 2 + (y / 78) ** 2 + (z / 54) ** 2 < 1)
    for grey, radius, place in ((250, 17, (-38, 0, 0)), (210, 13, (0, 55, 0)), (170, 13, (0, 0, 34))):
        value = np.where((x - place[0]) ** 2 + (y - place[1]) ** 2 + (z - place[2]) ** 2 < radius**2, grey, value)
    return value


def place(voxels=(6, 6, 6), shape=(25, 31, 24)):
    """An affine for a grid about the origin."""
    affine = np.diag([*map(float, voxels), 1.0])
    affine[:3, 3] = -np.array(voxels) * (np.array(shape) - 1) / 2
    return affine, shape


def head(affine=None, shape=None, dtype=np.float32):
    """An image of nibabel: the head, sampled where the affine says."""
    if affine is None:
        affine, shape = place()
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    return nib.Nifti1Image(brightness(*np.moveaxis(grid, -1, 0)).astype(dtype), affine)


def stored(image, axes):
    """The same image with its voxels stored along other axes."""
    to = nib.orientations.ornt_transform(nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(axes))
    return image.as_reoriented(to)


def cut(path, image=None, **look):
    """(slices, numbers, facts) of a file, or of an image that is written there first."""
    if image is not None:
        nib.save(image, path)
    return volumes.extract_volume(str(path), Look(**{"spacing": 6.0, "count": 12} | look))


def centre_of(slices, low, high=256):
    """Mean (slice, row, column) of grey levels, as shares of the size."""
    inside = np.argwhere((slices >= low) & (slices < high))
    return (inside.mean(0) + 0.5) / slices.shape


# ---------------------------------------------------------------- where things are


def test_a_marker_on_the_left_stays_on_the_left_and_the_front_is_where_it_is_documented(tmp_path):
    axial, coronal, sagittal = (cut(tmp_path / "h.nii", head(), plane=plane, count=40)[0] for plane in volumes.PLANES)
    for slices in (axial, coronal):
        assert centre_of(slices, 250)[2] < 0.4  # left, on the left of the picture
    assert centre_of(axial, 205, 225)[1] < 0.35  # front, at the top
    assert centre_of(coronal, 165, 185)[1] < 0.4  # crown, at the top
    assert centre_of(sagittal, 205, 225)[2] < 0.35 and centre_of(sagittal, 165, 185)[1] < 0.4  # face to the left
    # numbered from left to right, from back to front, from bottom to top
    assert centre_of(sagittal, 250)[0] < 0.4
    assert centre_of(coronal, 205, 225)[0] > 0.6 and centre_of(axial, 165, 185)[0] > 0.6


@pytest.mark.parametrize("plane", volumes.PLANES)
def test_a_head_gives_the_same_slices_however_it_is_stored(tmp_path, plane):
    for voxels, shape in (((6, 6, 6), (25, 31, 24)), ((1.9, 3, 2.9), (79, 63, 50))):  # fine voxels, odd numbers of them
        image = head(*place(voxels, shape))
        expected, numbers, _ = cut(tmp_path / "RAS.nii", image, plane=plane)
        for axes in ORIENTATIONS[1:]:
            slices, again, facts = cut(tmp_path / f"{axes}.nii", stored(image, axes), plane=plane)
            assert facts["orientation"] == axes and (numbers == again).all()
            np.testing.assert_array_equal(slices, expected, axes)


def summary(slices, facts):
    """Where the ball on the left is (mm up, rows and columns of 6 mm), and the size of the head in pixels."""
    return [*np.argwhere(slices > 235).mean(0) * (6, 1, 1) + (facts["first_mm"], 0, 0), (slices > 50).sum() ** (1 / 3)]


def turned(degrees, axis):
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    turn, (a, b) = np.eye(4), [i for i in range(3) if i != axis]
    turn[a, a], turn[a, b], turn[b, a], turn[b, b] = c, -s, s, c
    return turn


SHEAR = np.eye(4)
SHEAR[0, 1] = 0.3


@pytest.mark.parametrize("change", [turned(25, 0), turned(-20, 1), turned(30, 2), turned(20, 2) @ turned(15, 0), SHEAR])
def test_an_oblique_or_skewed_affine_is_resampled_to_the_axes_of_the_world(tmp_path, change):
    affine, shape = place((3, 3, 3), (66, 78, 66))
    image = head(change @ affine, shape)
    image.set_qform(None, 0)  # which cannot say that it is skewed
    places = []
    for name, what in (("a.nii", head(affine, shape)), ("b.nii", image)):
        slices, _, facts = cut(tmp_path / name, what, count=18, size=(32, 32))
        places.append(summary(slices, facts))
    np.testing.assert_allclose(places[0], places[1], atol=1.1)  # grids differ by a pixel
    assert ("right angles" in (facts["notes"] or "")) == (change is SHEAR)


def test_voxels_that_are_not_cubes_and_fine_ones_keep_the_proportions(tmp_path):
    expected, _, facts = cut(tmp_path / "a.nii", head(*place((6, 6, 6), (26, 32, 24))))
    known = summary(expected, facts)
    for voxels, shape in (((3, 6, 2), (52, 32, 72)), ((1.5, 1.5, 6), (104, 128, 24)), ((6, 4, 9), (26, 48, 16))):
        slices, _, facts = cut(tmp_path / "b.nii", head(*place(voxels, shape)))
        np.testing.assert_allclose(summary(slices, facts), known, atol=1.1)


def test_which_of_two_transforms_was_used_is_reported(tmp_path):
    """qform alone, both alike, both that disagree, neither, and a qform that is none."""
    image = head()
    mirrored = np.diag([-1, 1, 1, 1]) @ image.affine
    for qform, sform, source, note in (
        (image.affine, None, "qform", None), (image.affine, image.affine, "sform", None),
        (mirrored, image.affine, "sform", "sform and qform disagree by up to 144 mm; the sform was used"),
        (None, None, "assumed", "neither sform nor qform is set: left and right are nibabel's guess"),
    ):  # fmt: skip
        image.set_qform(qform, 0 if qform is None else 1)
        image.set_sform(sform, 0 if sform is None else 1)
        facts = cut(tmp_path / "h.nii", image)[2]
        assert facts["affine_from"] == source and (facts["notes"] or "").startswith(note or "")
        assert bool(facts["notes"]) == bool(note)
    data = bytearray((tmp_path / "h.nii").read_bytes())
    data[252:256] = struct.pack("<hh", 1, 1)  # qform and sform code
    data[256:268] = struct.pack("<3f", 9, 9, 9)  # no rotation has such a quaternion
    data[280:328] = struct.pack("<12f", *image.affine[:3].ravel())
    (tmp_path / "h.nii").write_bytes(data)
    assert cut(tmp_path / "h.nii")[2]["notes"] == "sform and qform disagree by up to inf mm; the sform was used"


# ---------------------------------------------------------------- what is in a file


def test_any_kind_of_number_and_file_gives_the_same_slices(tmp_path):
    image = head()
    expected = cut(tmp_path / "a.nii", image)[0]
    values, affine = np.asarray(image.dataobj), image.affine
    for dtype in ("u1", ">i2", "f8", "i4"):
        assert (cut(tmp_path / "b.nii.gz", nib.Nifti1Image(values.astype(dtype), affine))[0] == expected).all()
    scaled = nib.Nifti1Image(values, affine)
    scaled.header.set_data_dtype(np.int16)
    scaled.header.set_slope_inter(0.05, 10)
    assert np.abs(cut(tmp_path / "c.nii", scaled)[0].astype(int) - expected).max() <= 1
    assert (cut(tmp_path / "d.nii", nib.Nifti1Image(values[..., None], affine))[0] == expected).all()  # 4-D, of one
    assert (cut(tmp_path / "e.mgz", nib.MGHImage(values, affine))[0] == expected).all()
    assert (cut(tmp_path / "f.nii", nib.Nifti2Image(values, affine))[0] == expected).all()
    assert (cut(tmp_path / "g.img", nib.Nifti1Pair(values, affine))[0] == expected).all()
    slices, _, facts = cut(tmp_path / "h.img", nib.AnalyzeImage(values.astype(np.int16), np.diag([-6, 6, 6, 1])))
    assert facts["affine_from"] == "assumed" and "Analyze files do not say where left is" in facts["notes"]
    assert [path for path, _ in readers.find_volumes(tmp_path)] == sorted(map(str, tmp_path.glob("*.[nmi][!d]*")))


def test_voxels_that_are_no_numbers_are_black_and_counted(tmp_path):
    image = head()
    values = np.asarray(image.dataobj).copy()
    expected = cut(tmp_path / "a.nii", image)[0]
    values[:3] = np.nan
    values[0, 0, 0] = np.inf
    slices, _, facts = cut(tmp_path / "b.nii", nib.Nifti1Image(values, image.affine))
    assert (slices[:, :, 3:] == expected[:, :, 3:]).all() and slices[:, :, :3].max() == 0
    assert facts["notes"] == f"{3 * 31 * 24:,} of {values.size:,} voxels are not finite numbers, and black"


def header(**changes):
    """The bytes of a NIfTI file with some fields of its header changed, and no more than a thousand bytes of voxels."""
    image = head(dtype=np.int16)
    for name, value in changes.items():
        image.header[name] = value
    return image.header.binaryblock + bytes(4) + bytes(1000)


def written(folder, name, image=None, data=None):
    if image is not None:
        nib.save(image, folder / name)
        data = (folder / name).read_bytes()
    (folder / name).write_bytes(data)
    return folder / name


VALUES = np.asarray(head().dataobj)
AFFINE = head().affine
COLOUR = np.zeros((16, 16, 16), [("R", "u1"), ("G", "u1"), ("B", "u1")])
REFUSED = {  # name: (image or bytes, what the reason says)
    "empty.nii": (b"", "cannot be read as a volume: Empty file"),
    "text.nii": (b"no volume, but a text", "cannot be read as a volume: "),
    "text.nii.gz": (b"no volume, but a text", "cannot be read as a volume: "),
    "several.nii": (nib.Nifti1Image(np.stack([VALUES] * 3, 3), AFFINE), "holds 3 volumes; expected one volume"),
    "more.nii": (nib.Nifti1Image(np.zeros((16, 16, 16, 2, 5), "u1"), AFFINE), "holds 2x5 volumes; expected one"),
    "plane.nii": (nib.Nifti1Image(VALUES[..., 0], AFFINE), "holds 2 dimensions; expected one volume"),
    "thin.nii": (nib.Nifti1Image(VALUES[..., :5], AFFINE), "claims 25 x 31 x 5 voxels; expected 8 to 1024 a side"),
    "colour.nii": (nib.Nifti1Image(COLOUR, AFFINE), "has voxels in colour; expected one real number a voxel"),
    "complex.nii": (nib.Nifti1Image(VALUES.astype(np.complex64), AFFINE), "has voxels that are complex"),
    "flat.nii": (header(sform_code=1, srow_z=[0, 0, 0, 0]), "has an affine that cannot be inverted"),
    "nan.nii": (nib.Nifti1Image(np.full((16, 16, 16), np.nan), AFFINE), "holds a single grey level, or nothing but"),
    "black.nii": (nib.Nifti1Image(np.zeros((16, 16, 16), "u1"), AFFINE), "holds a single grey level"),
    "mouse.nii": (nib.Nifti1Image(VALUES, np.diag([0.2, 0.2, 0.2, 1])), "is 5 x 6.2 x 4.8 mm large; expected 30 to"),
    "metres.nii": (nib.Nifti1Image(VALUES, np.diag([600, 600, 600, 1])), "with the header in millimetres"),
    "cut.nii": (header(), "cannot be read as a volume: Expected"),
    "huge.nii": (header(dim=[3, 20000, 20000, 20000, 1, 1, 1, 1]), "claims 20000 x 20000 x 20000 voxels; expected 8"),
    "huge.nii.gz": (gzip.compress(header(dim=[3, 1000, 1000, 1000, 1, 1, 1, 1])), "claims 1000 x 1000 x 1000 voxels"),
    "negative.nii": (header(dim=[3, -20, 20, 20, 1, 1, 1, 1]), "claims -20 x 20 x 20 voxels"),
    "cut.nii.gz": (gzip.compress(header() + bytes(30000))[:-40], "cannot be read as a volume: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_head_is_refused_with_the_reason(tmp_path, name):
    what, reason = REFUSED[name]
    if isinstance(what, bytes):
        (tmp_path / name).write_bytes(what)
    else:
        nib.save(what, tmp_path / name)
    with pytest.raises(Unfit) as caught:
        cut(tmp_path / name)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.nii")
    with pytest.raises(Unfit, match="is not a regular file"):
        cut(tmp_path / "pipe.nii")
    with pytest.raises(FileNotFoundError):
        cut(tmp_path / "gone.nii")


def peak(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_volume_is_read_in_slabs_and_a_false_size_before_it_takes_memory(tmp_path, monkeypatch):
    image = head(*place((1.2, 1.2, 1.2), (128, 150, 120)), dtype=np.float64)  # 18 MB
    expected = cut(tmp_path / "fine.nii.gz", image, spacing=4.8)[0]
    image.uncache()
    del image
    monkeypatch.setattr(readers, "SLAB", 2**15)
    assert peak(lambda: cut(tmp_path / "fine.nii.gz", spacing=4.8)) < 6e6
    assert (cut(tmp_path / "fine.nii.gz", spacing=4.8)[0] == expected).all()
    (tmp_path / "huge.nii").write_bytes(REFUSED["huge.nii"][0])
    with pytest.raises(Unfit):
        assert peak(lambda: cut(tmp_path / "huge.nii")) < 1e6


def test_a_thousand_mutated_volumes_are_cut_or_refused_in_a_sentence(tmp_path):
    """Headers more than voxels; mutations of compressed files, too."""
    affine, shape = place((9, 9, 9), (16, 18, 16))
    generator, cuts = random.Random(0), 0
    seeds = {}
    for name in ("a.nii", "a.nii.gz", "a.mgz"):
        image = head(affine, shape, np.int16)
        seeds[name] = written(tmp_path, name, image if "nii" in name else nib.MGHImage(
            np.asarray(image.dataobj, np.float32), affine)).read_bytes()  # fmt: skip
    special = [b"\0" * 4, b"\xff" * 4, struct.pack("<i", 2**31 - 1)]
    special += [struct.pack("<f", value) for value in (np.nan, np.inf, 1e30, -1e-30)]
    special += [struct.pack("<h", value) for value in (1, 2, 2**15 - 1)]

    def mutate(name):
        data = bytearray(seeds[name])
        for _ in range(generator.randrange(1, 5)):
            at = min(generator.randrange(348 if generator.random() < 0.9 else len(data)), len(data) - 1)
            kind = generator.randrange(4)
            if kind == 0:
                data[at] = generator.randrange(256)
            elif kind == 1:
                data[at : at + 4] = generator.choice(special)
            elif kind == 2:
                data = data[: generator.randrange(len(data))] or data
            else:
                at = generator.choice([40, 42, 44, 46, 48, 70, 72, 76, 80, 84, 88, 108, 112, 116, 252, 254, 280, 296])
                data[at : at + 4] = generator.choice(special)
        return bytes(data)

    def fuzz():
        nonlocal cuts
        for number in range(1000):
            name = generator.choice(["a.nii", "a.nii", "a.nii.gz", "a.mgz"])
            path = tmp_path / f"x.{name.split('.', 1)[1]}"
            path.write_bytes(mutate(name))
            try:
                slices, _, facts = cut(path, spacing=9.0, plane=list(volumes.PLANES)[number % 3])
                assert slices.dtype == np.uint8 and facts["orientation"]
                cuts += 1
            except (InputError, OSError) as problem:
                assert 5 < len(str(problem)) < 400 and "\n" not in str(problem)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fuzz()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2e5  # kB
    assert 100 < cuts < 900


# ---------------------------------------------------------------- which slices, how large


def test_slices_are_chosen_by_number_by_position_or_about_the_middle_of_the_head(tmp_path):
    nib.save(head(), tmp_path / "h.nii")
    every, numbers, facts = cut(tmp_path / "h.nii", count=100)
    assert numbers.tolist() == list(range(24)) and "only 24 of 100 slices are within the volume" in facts["notes"]
    middle, numbers, facts = cut(tmp_path / "h.nii", count=5)
    assert len(numbers) == 5 and abs(facts["first_mm"] + facts["last_mm"] - 2 * CENTRE[2]) <= 6
    assert (middle == every[numbers]).all()
    some, numbers, _ = cut(tmp_path / "h.nii", slices=(3, 7, "index"))
    assert numbers.tolist() == [3, 4, 5, 6, 7] and (some == every[3:8]).all()
    some, numbers, facts = cut(tmp_path / "h.nii", slices=(-20, 10, "mm"))
    assert (facts["first_mm"], facts["last_mm"], numbers.tolist()) == (-15, 9, [9, 10, 11, 12, 13])
    assert (some == every[9:14]).all()
    with pytest.raises(Unfit, match="has no slice there; expected 0:23, or -69mm:69mm"):
        cut(tmp_path / "h.nii", slices=(80, 90, "mm"))
    _, _, facts = cut(tmp_path / "h.nii", step=12.0, count=4)
    assert facts["last_mm"] - facts["first_mm"] == 36


def test_size_pads_and_crops_about_the_middle_of_the_head_and_turn_is_counter_clockwise(tmp_path):
    nib.save(head(), tmp_path / "h.nii")
    whole = cut(tmp_path / "h.nii")[0]
    assert whole.shape[1:] == (31, 25)
    large, _, facts = cut(tmp_path / "h.nii", size=(64, 48))
    assert large.shape[1:] == (48, 64) and facts["notes"] is None
    inside = np.argwhere(large.max(0) > 0)
    assert np.abs(inside.mean(0) - (24, 32)).max() < 1.5  # the middle, not that of the volume
    assert large.sum() == whole.sum()  # nothing is lost
    small, _, facts = cut(tmp_path / "h.nii", size=(16, 16))
    assert (small == large[:, 16:32, 24:40]).all() and "the head reaches the border of the slices" in facts["notes"]
    turned = cut(tmp_path / "h.nii", size=(48, 64), turn=90)[0]
    assert turned.shape[1:] == (64, 48) and (turned == np.rot90(large, 1, (1, 2))).all()
    fine = cut(tmp_path / "h.nii", spacing=3.0)[0]
    assert fine.shape[1:] == (61, 49)
    with pytest.raises(Unfit, match="slices of 13 x 16 pixels; expected 16 to 4096 a side"):
        cut(tmp_path / "h.nii", spacing=12.0)


@pytest.mark.parametrize("words", [
    ["--slices", "9"], ["--slices", "9:3"], ["--slices", "1mm:9"], ["--size", "256"], ["--size", "1x2"],
    ["--turn", "45"], ["--spacing", "0"], ["--plane", "oblique"], ["--slices", "1:9", "--count", "3"],
    ["--like", "nowhere.pth"],
])  # fmt: skip
def test_a_wrong_flag_is_one_error_line_and_status_2(tmp_path, words):
    nib.save(head(), tmp_path / "h.nii")
    done = command.run(extract.__file__, "h.nii", *words, cwd=tmp_path)
    assert done.returncode == 2 and re.fullmatch(r"error: .+\n", done.stderr) and not (tmp_path / "extracted").exists()


# ---------------------------------------------------------------- a folder of volumes


def run_extract(*words):
    """extract.py in this process; returns extraction.csv."""
    args = extract.parse_args([*map(str, words), "--spacing", "6", "--count", "4"])
    extract.main(args)
    return read_csv(Path(args.out) / "extraction.csv")


def test_a_folder_becomes_slices_a_table_and_what_was_skipped(tmp_path, capsys):
    for name in ("sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz", "7.mgz"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        nib.save(head() if "nii" in name else nib.MGHImage(VALUES, AFFINE), tmp_path / "in" / name)
    (tmp_path / "in" / "bad.nii").write_bytes(b"no volume")
    (tmp_path / "in" / "sub-02" / "anat" / "sub-02_T1w.json").write_text("{}")
    (tmp_path / "in" / "._7.mgz").write_bytes(b"junk")
    table = run_extract(tmp_path / "in", "--out", tmp_path / "out").set_index("scan")
    assert list(table.columns) == [name for name in volumes.COLUMNS if name != "scan"]
    assert sorted(path.name for path in (tmp_path / "out" / "slices").iterdir()) == sorted(
        f"{scan}_{number}.png" for scan in ("sub-01_ses-2_T1w", "sub-02_T1w", "7") for number in range(11, 15))
    assert table.error["bad"].startswith("cannot be read as a volume") and pd.isna(table.n_slices["bad"])
    row = table.loc["sub-01_ses-2_T1w"]
    assert (row.subject, row.session, row.orientation, row.affine_from) == ("sub-01", "ses-2", "RAS", "sform")
    assert (row["shape"], row.voxel_sizes, row.first_slice, row.last_slice) == ("25x31x24", "6x6x6", "11", "14")
    np.testing.assert_allclose([float(word) for word in row.affine.split()], AFFINE[:3].ravel())
    assert read_csv(tmp_path / "out" / "subjects.csv").subject.tolist() == ["sub-01", "sub-02"]
    told = capsys.readouterr()
    assert "12 slices of 3 volumes in " in told.out and "1 of 4 volumes were skipped" in told.err
    assert re.search(r"passed over: 1 file in .*sub-02.anat\n", told.err) and "tools, such as .DS_Store" in told.err
    with Image.open(tmp_path / "out" / "slices" / "7_12.png") as image:
        assert (np.asarray(image) == cut(tmp_path / "in" / "7.mgz", slices=(12, 12, "index"))[0][0]).all()


def test_folders_of_classes_are_kept_so_that_a_set_can_be_trained_on(tmp_path):
    from dataset import read_index

    for number, folder in enumerate(f"{split}/{label}" for split in ("train", "test") for label in ("AD", "NC")):
        (tmp_path / "in" / folder).mkdir(parents=True)
        nib.save(head(), tmp_path / "in" / folder / f"sub-{number}_T1w.nii")
    run_extract(tmp_path / "in", "--out", tmp_path / "out")
    index = read_index(tmp_path / "out" / "slices")
    assert len(index) == 16 and index.subject.nunique() == 4 and set(index.split + index.label) == {
        "trainAD", "trainNC", "testAD", "testNC"}  # fmt: skip


def test_names_are_safe_and_no_scan_takes_the_place_of_another(tmp_path):
    names = ["=cmd|' /C calc'!A0.nii", "a\nb.nii", "..nii", "x" * 200 + ".nii", "t1.nii", "T1.nii.gz"]
    names += ["one/t1.nii", "two/t1.nii", "two/t1.nii.gz"]
    table = volumes.name_scans([(name, os.path.dirname(name)) for name in names])
    assert table.scan.is_unique and table.scan.str.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*").all()
    assert table.scan[6:].tolist() == ["one_t1", "two_t1", "two_t1-2"] and table.scan.str.len().max() < 140
    nib.save(head(), tmp_path / names[0].replace("/", ""))
    done = run_extract(tmp_path, "--out", tmp_path / "out")
    assert done.source[0] == str(tmp_path / names[0].replace("/", "")) and done.error.isna().all()


def test_an_interrupted_extraction_leaves_no_half_set(tmp_path, monkeypatch):
    for name in "ab":
        nib.save(head(), tmp_path / f"{name}.nii")
    work = volumes.extract_volume

    def fail(path, look):
        return work(path, look) if "a.nii" in path else 1 / 0

    monkeypatch.setattr(volumes, "extract_volume", fail)
    with pytest.raises(ZeroDivisionError):
        run_extract(tmp_path, "--out", tmp_path / "out")
    assert not any((tmp_path / "out").iterdir())


def test_a_full_disk_is_one_error_and_leaves_no_half_set(tmp_path):
    nib.save(head(), tmp_path / "h.nii")
    done = command.run(extract.__file__, "h.nii", "--out", "out", cwd=tmp_path, file_size=1500)
    assert done.returncode == 2 and not any((tmp_path / "out").iterdir())
    assert done.stderr == "error: out/slices cannot be written: File too large; nothing is left there\n"


def test_nothing_is_overwritten_and_nothing_found_is_an_error(tmp_path):
    nib.save(head(), tmp_path / "h.nii")
    run_extract(tmp_path / "h.nii", "--out", tmp_path / "out")
    with pytest.raises(InputError, match="is not empty, and nothing is overwritten"):
        run_extract(tmp_path / "h.nii", "--out", tmp_path / "out")
    with pytest.raises(InputError, match="does not exist; expected a volume, a DICOM folder or a folder of volumes"):
        run_extract(tmp_path / "gone.nii", "--out", tmp_path / "a")
    with pytest.raises(InputError, match="holds no volume .* and no DICOM file"):
        run_extract(tmp_path / "out", "--out", tmp_path / "b")
    (tmp_path / "h.nii").write_bytes(b"")
    with pytest.raises(InputError, match="none of the 1 volumes could be cut"):
        run_extract(tmp_path / "h.nii", "--out", tmp_path / "c")
    assert not any((tmp_path / "c" / "slices").iterdir())


def test_a_missing_package_is_an_error_that_says_how_to_install_it(tmp_path, monkeypatch):
    nib.save(head(), tmp_path / "h.nii")
    (tmp_path / "dicom").mkdir()
    (tmp_path / "dicom" / "1").write_bytes(bytes(128) + b"DICM")
    monkeypatch.setenv("PATH", "")
    for module, given, words in (("dcm2niix", "dicom", []), ("deepbet.bet", "h.nii", ["--strip"]),
                                 ("nibabel", "h.nii", [])):  # fmt: skip
        readers.nibabel.cache_clear()
        readers._deepbet.cache_clear()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(InputError, match=f"{module.split('.')[0]}; install it with python -m pip install -r"):
                run_extract(tmp_path / given, "--out", tmp_path / module, *words)
    readers.nibabel.cache_clear()


# ---------------------------------------------------------------- DICOM


def element(group, number, kind, value):
    value = value.encode() if isinstance(value, str) else value
    value += (b"\0" if kind == "UI" else b" ") * (len(value) % 2)
    size = struct.pack("<HI", 0, len(value)) if kind in ("OB", "OW") else struct.pack("<H", len(value))
    return struct.pack("<HH", group, number) + kind.encode() + size + value


def write_dicom(folder, series=1):
    """The head as axial DICOM slices of one series; rows run to the left, columns to the back of the patient."""
    image = stored(head(), "LPS")
    corner = image.affine[:3, 3] * (-1, -1, 1)  # x and y of DICOM point to the left and to the back
    folder.mkdir(exist_ok=True)
    for number, plane in enumerate(np.moveaxis(np.asarray(image.dataobj), 2, 0)):
        rows = plane.T.astype("<u2")  # (left, back) -> (rows, columns)
        where = "\\".join(f"{value:g}" for value in corner + (0, 0, 6 * number))
        uid, kind = f"1.2.3.{series}.{number + 1}", "1.2.840.10008.5.1.4.1.1.4"
        meta = (element(2, 1, "OB", b"\0\1") + element(2, 2, "UI", kind) + element(2, 3, "UI", uid)
                + element(2, 0x10, "UI", "1.2.840.10008.1.2.1"))  # fmt: skip
        body = [(8, 0x16, "UI", kind), (8, 0x18, "UI", uid), (8, 0x60, "CS", "MR"), (8, 0x70, "LO", "SIEMENS"),
                (0x18, 0x50, "DS", "6"), (0x20, 0xD, "UI", "1.2.3"), (0x20, 0xE, "UI", f"1.2.3.{series}"),
                (0x20, 0x11, "IS", str(series)), (0x20, 0x13, "IS", str(number + 1)), (0x20, 0x32, "DS", where),
                (0x20, 0x37, "DS", "1\\0\\0\\0\\1\\0"), (0x28, 2, "US", struct.pack("<H", 1)),
                (0x28, 4, "CS", "MONOCHROME2"), (0x28, 0x10, "US", struct.pack("<H", rows.shape[0])),
                (0x28, 0x11, "US", struct.pack("<H", rows.shape[1])), (0x28, 0x30, "DS", "6\\6"),
                (0x28, 0x100, "US", struct.pack("<H", 16)), (0x28, 0x101, "US", struct.pack("<H", 16)),
                (0x28, 0x102, "US", struct.pack("<H", 15)), (0x28, 0x103, "US", struct.pack("<H", 0)),
                (0x7FE0, 0x10, "OW", rows.tobytes())]  # fmt: skip
        data = element(2, 0, "UL", struct.pack("<I", len(meta))) + meta + b"".join(element(*row) for row in body)
        (folder / f"{series}-{number:03d}.dcm").write_bytes(bytes(128) + b"DICM" + data)
    return folder


def test_a_dicom_folder_gives_the_slices_of_the_same_head(tmp_path):
    pytest.importorskip("dcm2niix", reason="DICOM folders need dcm2niix (requirements-volumes.txt)")
    expected = cut(tmp_path / "h.nii", head())[0]
    slices, _, facts = cut(write_dicom(tmp_path / "-scan of a head"))
    assert np.abs(slices.astype(int) - expected).max() <= 1 and facts["affine_from"] == "sform"
    write_dicom(tmp_path / "-scan of a head", 2)
    with pytest.raises(Unfit, match=r"holds 2 series \(series1, series2\); expected one"):
        cut(tmp_path / "-scan of a head")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1").write_bytes(bytes(128) + b"DICM" + b"rubbish" * 9)
    with pytest.raises(Unfit, match="cannot be converted by dcm2niix"):
        cut(tmp_path / "bad")


# ---------------------------------------------------------------- the phantom's heads


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Two heads of the phantom, every sixth slice of them, stored as RAS and LAS."""
    return phantom.draw_volumes(tmp_path_factory.mktemp("phantom"), 2, seed=1, every=6)


def test_the_phantoms_heads_have_the_orientation_class_and_brain_that_their_table_says(heads):
    table = pd.read_csv(heads.parent / "heads.csv")
    assert table.label.tolist() == ["NC", "AD"] and table.orientation.tolist() == list(phantom.STORED[:2])
    assert table.brain_litres.between(1.0, 2.0).all()
    for row in table.itertuples():
        image = nib.load(heads / f"{row.scan}.nii.gz")
        brain = nib.load(heads.parent / "brains" / f"{row.subject}_desc-brain_T1w.nii.gz")
        assert "".join(nib.aff2axcodes(image.affine)) == row.orientation and (image.affine == brain.affine).all()
        whole, only = np.asarray(image.dataobj), np.asarray(brain.dataobj)
        assert (whole[only > 0] == only[only > 0]).all() and (whole > 60).sum() > 1.1 * (only > 60).sum()
    with pytest.raises(InputError, match="heads exists; expected a folder without volumes"):
        phantom.draw_volumes(heads.parent, 2)


def test_the_capsule_on_the_left_temple_of_the_phantom_is_on_the_left(heads):
    for path in heads.iterdir():
        slices, _, _ = volumes.extract_volume(str(path), Look(spacing=2.0, count=50, size=(128, 128), brightest=120))
        ball = slices > 0.9 * slices.max()
        assert 0.1 < centre_of(ball, True, 2)[2] < 0.3 and ball[..., 64:].sum() == 0


def test_the_brain_of_the_phantom_gives_the_slices_that_the_phantom_draws(heads):
    """Cut as AD_NC is, the volume gives the pixels of the set's own slices, up to the window."""
    scan = next(scan for scan in phantom.plan(10, 1) if scan.visit == 0 and scan.label == "NC")
    path = heads.parent / "brains" / f"sub-{scan.subject.replace('_', '')}_desc-brain_T1w.nii.gz"
    look = Look("sagittal", slices=(0, 30, "index"), step=6 * anatomy.SPACING)
    slices, numbers, facts = volumes.extract_volume(str(path), look)
    drawn = anatomy.render(scan, 1, [i for i in range(0, 181, 6) if 30 <= i <= 151]).astype(float)
    expected = np.clip(drawn / facts["white"] * 255, 0, 255).round()
    assert slices.shape[1:] == (240, 256) and numbers.tolist() == list(range(31))
    np.testing.assert_array_equal(slices[5:26], expected)


# ---------------------------------------------------------------- like the slices of a checkpoint, and predicting


def with_record(run_folder, path, **more):
    """The checkpoint of a run, with other or more content."""
    content = checkpoint.load_checkpoint(run_folder / "best_model.pth") | more
    content.pop("format")
    checkpoint.save_checkpoint(path, **content)
    return path


def test_a_volume_is_predicted_like_its_slices(run_folder, tmp_path, capsys):
    nib.save(head(), tmp_path / "sub-9_T1w.nii.gz")
    words = [tmp_path / "sub-9_T1w.nii.gz", "--plane", "axial", "--spacing", "4", "--count", "5"]
    table = run_predict(run_folder, tmp_path / "a", *words, "--keep-slices", tmp_path / "kept")
    assert table.path.tolist() == sorted(map(str, (tmp_path / "kept" / "slices").iterdir()))
    assert (table.subject == "sub-9").all() and len(table) == 5 and table.error.isna().all()
    told = capsys.readouterr()
    assert "1 of 1 volumes cut: axial, 5 central slices every 4 mm, 48 x 40, 4 mm a pixel" in told.out
    again = run_predict(run_folder, tmp_path / "b", *words)  # in a temporary folder
    assert again.path.tolist() == [f"{tmp_path}/sub-9_T1w.nii.gz:{number}" for number in again.slice]
    assert (again.p_AD == table.p_AD).all()
    slices = run_predict(run_folder, tmp_path / "c", tmp_path / "kept" / "slices")
    assert (slices.p_AD == table.p_AD).all() and (slices.subject == "sub-9").all()
    # their 99 % quantile is that of training, so only the rest of the range check says anything
    assert not table.out_of_range.astype(str).str.contains("99 % quantile").any()
    with pytest.raises(InputError, match="kept is not empty, and nothing is overwritten; choose a new --out or --keep"):
        run_predict(run_folder, tmp_path / "d", *words, "--keep-slices", tmp_path / "kept")


def test_a_volume_that_cannot_be_cut_gets_a_row_with_the_reason(run_folder, ad_nc, tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.nii").write_bytes(b"no volume")
    nib.save(head(), tmp_path / "good.nii")
    words = ["--plane", "axial", "--spacing", "4", "--count", "2"]
    table = run_predict(run_folder, tmp_path / "a", tmp_path, ad_nc / "test" / "AD" / "300_70.jpeg", *words)
    bad = table[table.path == str(tmp_path / "bad.nii")]
    assert len(table) == 4 and bad.error.str.startswith("cannot be read as a volume").tolist() == [True]
    assert "bad.nii cannot be read as a volume" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    table = run_predict(run_folder, tmp_path / "c", "./bad.nii", ad_nc / "test" / "AD" / "300_70.jpeg", *words)
    assert table.error.dropna().str.startswith("cannot be read as a volume").tolist() == [True]
    with pytest.raises(InputError, match="bad.nii cannot be read as a volume"):
        run_predict(run_folder, tmp_path / "b", tmp_path / "bad.nii", *words)


def test_a_checkpoint_cuts_volumes_as_its_training_slices_or_says_what_it_assumes(run_folder, tmp_path, capsys):
    nib.save(head(), tmp_path / "h.nii")
    with pytest.raises(InputError, match="does not record of which plane .* name it with --plane"):
        run_predict(run_folder, tmp_path / "a", tmp_path / "h.nii")
    record = {"plane": "coronal", "count": 3, "size": (48, 40), "spacing": 5.0, "turn": 90}
    known = with_record(run_folder, tmp_path / "known.pth", extraction=vars(Look(**record)))
    run_predict(run_folder, tmp_path / "b", tmp_path / "h.nii", checkpoint=known)
    assert ("coronal, 3 central slices every 5 mm, 48 x 40, 5 mm a pixel, turned by 90 degrees (as the checkpoint's "
            "training slices were cut)") in capsys.readouterr().out
    with pytest.raises(InputError, match="need a volume among the inputs"):
        run_predict(run_folder, tmp_path / "c", run_folder, "--plane", "axial")
    args = predict.parse_args(["h.nii", "--turn", "0", "--count", "7"])
    look, _ = volumes.look_of({"slice_size": [40, 48], "extraction": vars(Look(**record))}, args)
    assert look == Look("coronal", count=7, size=(48, 40), spacing=5.0, turn=0)  # a flag that is given wins
    args = predict.parse_args(["h.nii", "--turn", "180"])
    content = {"slice_size": [240, 256], "slice_stats": {"brightest": [150, 190]}}
    look, known = volumes.look_of(content, args)
    assert (look.plane, look.size, look.step, look.turn, look.brightest) == ("sagittal", (256, 240), 1.2, 180, 170)
    assert known == "assumed from the size of the checkpoint's training slices, that of AD_NC"


def test_training_records_how_its_slices_were_cut(tmp_path, run_folder, ad_nc):
    nib.save(head(), tmp_path / "h.nii")
    run_extract(tmp_path / "h.nii", "--out", tmp_path / "out", "--plane", "coronal", "--turn", "90")
    assert checkpoint.load_checkpoint(run_folder / "best_model.pth")["extraction"] is None
    shutil.copytree(ad_nc, tmp_path / "out" / "AD_NC")  # in the place of slices/
    train_steps(tmp_path / "out" / "AD_NC", tmp_path / "run", "--epochs", "1")
    recorded = checkpoint.load_checkpoint(tmp_path / "run" / "best_model.pth")["extraction"]
    assert Look(**recorded) == Look("coronal", count=4, spacing=6.0, turn=90)
    (tmp_path / "out" / "extraction.json").write_text(json.dumps({"plane": "coronal", "nothing": 1}))
    assert volumes.recorded_look(tmp_path / "out" / "slices") is None


def test_extracting_like_a_checkpoint_says_whether_the_slices_resemble_its_own(run_folder, tmp_path, capsys):
    nib.save(head(), tmp_path / "h.nii")
    extract.main(extract.parse_args([str(tmp_path / "h.nii"), "--like", str(run_folder / "best_model.pth"), "--plane",
                                     "axial", "--spacing", "2", "--out", str(tmp_path / "out")]))  # fmt: skip
    assert re.search(r"20 of 20 slices are out of the training range, first .*_\d+.png: \w+", capsys.readouterr().out)


# ---------------------------------------------------------------- real heads, where they are at hand


def test_nibabels_own_volumes_are_cut_or_refused(tmp_path):
    data = Path(nib.__file__).parent / "tests" / "data"
    if not (data / "anatomical.nii").exists():
        pytest.skip("this nibabel comes without its test data")
    slices, _, facts = volumes.extract_volume(str(data / "anatomical.nii"), Look(spacing=3.0))  # big-endian int16
    assert facts["orientation"] == "LAS" and slices.max() == 255
    for name in ("functional.nii", "example4d.nii.gz", "test.mgz"):
        with pytest.raises(Unfit, match="holds .* volumes; expected one"):
            volumes.extract_volume(str(data / name), Look())


@pytest.fixture(scope="session")
def adult():
    """ch2.nii.gz, a whole adult head, with ch2bet.nii.gz, its brain."""
    if not (MRICRON / "ch2.nii.gz").exists():
        pytest.skip("no ch2.nii.gz; install Debian's mricron-data")
    return MRICRON / "ch2.nii.gz", MRICRON / "ch2bet.nii.gz"


def test_a_real_head_and_its_mirrored_storage_give_the_same_slices(adult, tmp_path):
    whole, _, facts = volumes.extract_volume(str(adult[0]), ADNI)
    assert (facts["orientation"], facts["affine_from"], facts["notes"]) == ("RAS", "sform", None)
    nib.save(stored(nib.load(adult[0]), "LAS"), tmp_path / "las.nii")
    assert (volumes.extract_volume(str(tmp_path / "las.nii"), ADNI)[0] == whole).all()
    brain, _, _ = volumes.extract_volume(str(adult[1]), ADNI)
    assert 0.6 < (brain < 16).mean() < 0.9 and (whole < 16).mean() < (brain < 16).mean()


def test_a_real_head_is_stripped_to_its_brain(adult):
    pytest.importorskip("deepbet", reason="--strip needs deepbet (requirements-volumes.txt)")
    image, _, _ = readers.open_volume(str(adult[0]))
    brain = readers.strip_skull(*readers.read_volume(image, 1.0)) > 0
    known = np.asarray(nib.load(adult[1]).dataobj) > 0
    assert 2 * (brain & known).sum() / (brain.sum() + known.sum()) > 0.92


def test_the_command_runs_as_its_help_says(tmp_path):
    nib.save(head(), tmp_path / "scan.nii.gz")
    done = command.run(str(ROOT / "extract.py"), "scan.nii.gz", "--plane", "axial", "--count", "32", "--out", "slices",
                       cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0 and "32 slices of 1 volumes in slices/slices" in done.stdout
    assert done.stderr == ""  # no bar where there is no terminal
