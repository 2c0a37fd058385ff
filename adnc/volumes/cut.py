"""Cut volumes into oriented, resampled, windowed slices; many volumes into a folder of slices.

World coordinates are those of NIfTI: millimetres, x to the right of the patient, y to the front, z
up. Every plane is shown in the neurological convention: left is on the left. An axial slice has the
front at the top, a coronal one the crown, a sagittal one the crown, with the face to the left.
Slices are numbered from left to right, from back to front and from bottom to top. Left and right
are those of the file; no picture can confirm them.
"""

import os
import re
import tempfile
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from adnc.data.index import (
    METADATA,
    TABLE,
    check_match,
    describe_unused,
    merge_subjects,
    read_subjects,
)
from adnc.data.pixels import LARGEST, NEAR_BLACK, SMALLEST, Unfit
from adnc.errors import InputError, is_system_limit
from adnc.files import fingerprint, new_folder, read_csv, same_name, write_csv, write_json
from adnc.volumes import read
from adnc.volumes.look import ADNI, PLANES, Look, recorded_look
from adnc.volumes.read import ASSUMED, EXTENSIONS, MAX_VOXELS, find_volumes, holds_volumes, reason

COLUMNS = (  # of extraction.csv
    "source", "scan", "subject", "session",
    "shape", "voxel_sizes", "orientation", "oriented_to", "affine_from", "affine",
    "plane", "n_slices", "first_slice", "last_slice", "first_mm", "last_mm",
    "black", "white", "grey", "notes", "error",
)  # fmt: skip

# ---------------------------------------------------------------- how training slices were cut


def look_of(checkpoint, flags):
    """How to cut volumes for a checkpoint: as its training slices, changed by the given flags.

    checkpoint: a dict with slice_size, slice_stats and extraction (see `recorded_look`).
    flags: a dict of those fields of a Look that were given.

    Returns (Look, origin, warnings). What the checkpoint does not record is assumed, and `origin`
    is a phrase that says so. The warnings name flags that make other slices than those in training,
    which the range check may not notice. InputError if nothing can be assumed.
    """
    height, width = checkpoint["slice_size"]
    warnings = []
    if checkpoint["extraction"]:
        trained = look = Look(**checkpoint["extraction"])
        origin = "as the checkpoint's training slices were cut"
        if look.slices and look.slices[2] == "index" and not {"slices", "count"} & set(flags):
            # The numbers of slices fit the heads of one set, not the next head.
            low, high, _ = look.slices
            look = replace(look, slices=None, count=int(high) - int(low) + 1)
            warnings.append(
                f"in training slices {low:g} to {high:g} of each volume were cut; other volumes "
                f"have them elsewhere, so that the {look.count} central slices are cut: name the "
                "place with --slices, in mm"
            )
    else:
        brightest = float(np.mean(checkpoint["slice_stats"]["brightest"]))
        if (width, height) == ADNI.size:
            trained = ADNI
            look = replace(ADNI, brightest=brightest)
            origin = "assumed from the size of the training slices, that of AD_NC"
        elif "plane" in flags:
            trained = None
            look = Look(brightest=brightest)
            origin = "the plane as given, size and brightness as in training"
        else:
            raise InputError(
                "the checkpoint does not record the plane of its training slices "
                f"({width} x {height} pixels); name it with --plane axial, coronal or sagittal"
            )

    differences = []
    if trained is not None:
        for name in ("plane", "turn", "spacing", "step"):
            before = getattr(trained, name)
            if name == "step" and before is None:
                before = trained.spacing
            if name in flags and flags[name] != before:
                differences.append(f"--{name} {flags[name]}, those in training with {before}")
    if flags.get("size", (width, height)) != (width, height):
        differences.append(f"--size {'{}x{}'.format(*flags['size'])}, {width}x{height} in training")
    if differences:
        warnings.append(
            f"the slices are cut with {'; with '.join(differences)}: p_AD may be meaningless"
        )
    if flags:
        origin += f", with the flags that are given ({', '.join(flags)})"
    if "count" in flags:  # instead of the slices of training
        look = replace(look, slices=None)
    look = replace(look, **{"size": (width, height), **flags})
    return look, origin, warnings


# ---------------------------------------------------------------- an array to slices

FEW_VALUES = 4  # of a mask, or of a segmentation into background, fluid, grey and white matter
# Of neighbouring voxels beside the background, the share that is equal. In the atlases of Debian's
# mricron-data (33 to 669 values) it is 0.81 or more, in its T1 templates 0.25 or less.
EQUAL_NEIGHBOURS = 0.7


def check_values(volume):
    """A list with a sentence if a volume may be a segmentation. Unfit if it has as few values as a
    mask, or only one."""
    n_values = len(np.unique(thin_out(volume)))
    if n_values < 2:
        raise Unfit("holds a single grey level, or no finite numbers; expected a head")
    if n_values <= FEW_VALUES:
        raise Unfit(f"holds {n_values} different values, as a mask does; expected a head")
    share = share_of_equal_neighbours(volume)
    if share > EQUAL_NEIGHBOURS:
        return [f"{share:.0%} of neighbouring voxels in it are equal: is it a segmentation?"]
    return []


def share_of_equal_neighbours(volume):
    """Of the pairs of neighbouring voxels of which none has the most frequent value, the share that
    is equal; the mean over the three axes."""
    values, counts = np.unique(thin_out(volume), return_counts=True)
    background = values[counts.argmax()]
    shares = []
    for axis in range(3):
        along = np.moveaxis(volume, axis, 0)[:, ::2, ::2]  # every second row is enough
        before, after = along[:-1], along[1:]
        inside = (before != background) & (after != background)
        inside &= np.isfinite(before) & np.isfinite(after)
        shares.append((before == after)[inside].sum() / max(inside.sum(), 1))
    return float(np.mean(shares))


def thin_out(volume):
    """Some finite voxels of a volume, float64 (N,), about two million at most."""
    step = max(1, int(np.ceil((volume.size / 2**21) ** (1 / 3))))
    sample = volume[::step, ::step, ::step]
    return sample[np.isfinite(sample)].astype(np.float64)


def faces(volume):
    """The voxels on the six faces of a volume, (N,)."""
    return np.concatenate(
        [volume.take(end, axis).ravel() for axis in range(3) for end in (0, -1)]
    )


MIXED = 0.2  # the largest share of voxels of a head that resampling mixes with the background


def blacken_background(volume):
    """(volume, list of a sentence): a background that is not about the darkest value becomes it.

    The background is the most frequent value on the six faces, if a tenth of them have it: what
    pads a series, or what was put outside of a brain. With -1024 all tissue would be bright, and in
    a volume with a mean of 0 a background of 0 would be grey.
    """
    values, counts = np.unique(faces(volume), return_counts=True)
    background = values[counts.argmax()]
    if not np.isfinite(background) or counts.max() < 0.1 * counts.sum():
        return volume, []
    rest = thin_out(volume)
    rest = rest[rest != background]
    if rest.size == 0:
        return volume, []
    taken = f"{background:g} was taken for the background"
    # Below a head that begins at 0. Where the two were mixed by resampling, some of it is below 0.
    if background < 0 and np.mean(rest < 0) < MIXED:
        return np.maximum(volume, 0), [f"{taken}, and what is below 0 made black"]
    low, high = np.percentile(rest, (2, 98))
    if background > low + 0.1 * (high - low):
        dark = np.where(volume == background, volume.dtype.type(low), volume)
        return dark, [f"{taken}, and made as dark as {low:.4g}"]
    if background < min(0, low - 0.5 * (high - low)):
        dark = np.maximum(volume, volume.dtype.type(low))
        return dark, [f"{taken}, and made as dark as {low:.4g}"]
    return volume, []


def find_head(volume):
    """(black, white, middle) of a volume: grey levels of background and bright tissue, and the
    coordinates of the voxel in the middle of the head.

    Black is the 2 % quantile of the volume. The head is every voxel above a tenth of the way from
    there to the 98 % quantile (Smith 2002, BET); white is the 99.5 % quantile of the head. The
    middle is that of the central 98 % of the head along each axis. Unfit if all voxels are alike.
    """
    sample = thin_out(volume)
    black, bright = np.percentile(sample, (2, 98)) if sample.size else (0, 0)
    if not bright > black:
        bright = sample.max(initial=black)
    if not bright > black:
        raise Unfit("holds a single grey level, or no finite numbers; expected a head")
    threshold = black + 0.1 * (bright - black)
    head = volume > threshold
    middle = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        share = np.cumsum(head.sum(others))
        middle.append(np.searchsorted(share, (0.01 * share[-1], 0.99 * share[-1])).mean())
    white = np.percentile(sample[sample > threshold], 99.5)
    return float(black), float(white), np.array(middle)


def choose_slices(look, n, centre, origin, spacing):
    """The numbers (N,) of the slices that a Look selects out of n, and how many it asks for.

    Slice `number` is at origin + number * spacing mm; slice `centre` is in the middle of the head.
    Unfit if no slice is selected.
    """
    if look.slices is None:
        first = centre - (look.count - 1) // 2
        numbers = np.arange(first, first + look.count)
    else:
        low, high, unit = look.slices
        if unit == "mm":
            low, high = (low - origin) / spacing, (high - origin) / spacing
        numbers = np.arange(np.ceil(low - 1e-6), np.floor(high + 1e-6) + 1).astype(int)
    n_asked = len(numbers)
    numbers = numbers[(numbers >= 0) & (numbers < n)]
    if len(numbers) == 0:
        last = origin + (n - 1) * spacing
        raise Unfit(f"has no slice there; expected 0:{n - 1}, or {origin:.0f}mm:{last:.0f}mm")
    return numbers, n_asked


def cut(volume, affine, look, middle, black):
    """Cut a volume (as from `read_volume`) into slices.

    middle, black: see `find_head`.

    Returns (slices float32 (N, H, W), numbers (N,), positions in mm (N,), how many slices the Look
    asks for). Slices are on a grid of the world, `spacing` mm apart in the plane and `step` mm
    across, from the corner of the volume: voxels of that size are used as they are, others are
    interpolated linearly. Outside of the volume is `black`.
    """
    nib = read.import_nibabel()
    across, (down, down_sign), (along, along_sign) = PLANES[look.plane]
    grid = np.full(3, look.spacing)
    grid[across] = look.step or look.spacing
    shape, world = nib.spaces.vox2out_vox((volume.shape, affine), grid)
    origin = world[:3, 3]
    centre = np.rint(((affine[:3, :3] @ middle + affine[:3, 3]) - origin) / grid)
    numbers, n_asked = choose_slices(
        look, shape[across], int(centre[across]), origin[across], grid[across]
    )

    width, height = shape[along], shape[down]
    if look.size:
        width, height = look.size if look.turn % 180 == 0 else look.size[::-1]
    n_pixels = len(numbers) * height * width
    if not SMALLEST <= min(width, height) <= max(width, height) <= LARGEST or n_pixels > MAX_VOXELS:
        raise Unfit(
            f"would give {len(numbers)} slices of {width} x {height} pixels; expected {SMALLEST} "
            f"to {LARGEST} a side: choose another --size or --spacing"
        )

    # An affine from (slice, row, column) to the grid.
    to_grid = np.diag([0.0, 0.0, 0.0, 1.0])
    to_grid[across, 0] = 1
    to_grid[across, 3] = numbers[0]
    rows_and_columns = ((1, down, down_sign, height), (2, along, along_sign, width))
    for column, axis, sign, side in rows_and_columns:
        if look.size:
            first = centre[axis] - sign * (side // 2)
        elif sign > 0:
            first = 0
        else:
            first = shape[axis] - 1
        to_grid[axis, column] = sign
        to_grid[axis, 3] = first

    slices = resample(volume, affine, world @ to_grid, (len(numbers), height, width), black)
    slices = np.rot90(slices, look.turn // 90, (1, 2))
    return slices, numbers, origin[across] + numbers * grid[across], n_asked


def resample(volume, affine, to_affine, shape, black):
    """The volume on another grid of the world, by linear interpolation; outside is `black`."""
    nib = read.import_nibabel()
    # In coordinates of voxels, rounded: else rounding errors decide whether the outermost row of
    # voxels counts as outside, and becomes black. Another number of digits would change slices.
    to_voxels = (np.linalg.inv(affine) @ to_affine).round(9)
    image = nib.Nifti1Image(volume, np.eye(4))
    image = nib.processing.resample_from_to(image, (shape, to_voxels), order=1, cval=black)
    return np.asarray(image.dataobj)


def extract_volume(path, look):
    """Cut a volume or DICOM folder as a Look says.

    Returns (slices uint8 (N, H, W), numbers (N,), a dict of columns of extraction.csv). Unfit or
    OSError if that cannot be done.
    """
    suffix = bids_suffix(path)
    if suffix and suffix.lower().endswith(NO_HEADS):
        raise Unfit(f"is no head by its name, which ends in _{suffix}")
    if FREESURFER_LABELS.match(Path(path).name):
        raise Unfit("is no head by its name, which is that of a FreeSurfer segmentation")
    with tempfile.TemporaryDirectory(prefix="dicom-") as folder:
        if os.path.isdir(path):
            path = read.convert_dicom(path, folder)
        image, record, notes = read.open_volume(path)
        with np.errstate(all="ignore"):  # an overflow becomes infinite, and is counted below
            volume, affine = read.read_volume(image)
    if suffix not in (None, "T1w"):
        notes.append(f"its name says {suffix}, not T1w: other contrasts have other greys")
    notes += check_values(volume)
    # Before the volume is smoothed, which mixes voxels, and its background with the head.
    lost = ~np.isfinite(volume)
    if lost.any():
        notes.append(
            f"{lost.sum():,} of {volume.size:,} voxels are not finite numbers; they become black"
        )
        darkest = min(0, float(volume[~lost].min()))  # a background of NaN stands for one of 0
        volume = np.where(lost, np.float32(darkest), volume)
    volume, backgrounds = blacken_background(volume)
    with np.errstate(all="ignore"):
        volume = read.smooth_fine_axes(volume, affine, look.spacing)
    if look.strip:
        volume = read.strip_skull(volume, affine)
        volume, outside = blacken_background(volume)
        backgrounds += outside
    notes += backgrounds
    black, white, middle = find_head(volume)
    slices, numbers, positions, n_asked = cut(volume, affine, look, middle, black)
    if len(numbers) < n_asked:
        notes.append(f"only {len(numbers)} of {n_asked} slices are within the volume")
    grey = 255.0
    if look.brightest is not None:  # the statistic of pixels.STATS
        grey = look.brightest
        white = max(float(np.quantile(slices, 0.99)), black + 1e-3 * (white - black))
    with np.errstate(all="ignore"):  # numbers of 1e38 overflow, and become white
        slices = np.clip((slices - black) / (white - black) * grey, 0, 255)
        slices = np.nan_to_num(slices).round().astype(np.uint8)

    edges = np.concatenate([slices[:, [0, -1]].ravel(), slices[:, :, [0, -1]].ravel()])
    if look.size and (edges > 2 * NEAR_BLACK).mean() > 0.02:
        notes.append("the head reaches the border of the slices; a larger --size shows all of it")
    border = (np.median(faces(volume)) - black) / (white - black) * grey
    if border > 2 * NEAR_BLACK:
        notes.append(
            f"the border of the volume has grey {border:.0f}: its background is not black, unlike "
            "that of the training slices"
        )
    record.update(
        plane=look.plane,
        n_slices=len(numbers),
        first_slice=int(numbers[0]),
        last_slice=int(numbers[-1]),
        first_mm=positions[0],
        last_mm=positions[-1],
        black=black,
        white=white,
        grey=grey,
        notes="; ".join(notes) or None,
    )
    return slices, numbers, record


# ---------------------------------------------------------------- many volumes

NO_HEADS = ("mask", "seg")  # ends of suffixes: brainmask, dseg, probseg
FREESURFER_LABELS = re.compile(r"((lh|rh)\.)?(aseg|aparc|wmparc|ribbon|filled)\b", re.IGNORECASE)


def bids_suffix(path):
    """The suffix of a name in the form of BIDS, T1w of sub-01_T1w.nii.gz, or None."""
    pattern = r"sub-.*_([A-Za-z0-9]+)\.(nii|mg[hz]|img|hdr)(\.gz)?"
    match = re.fullmatch(pattern, Path(path).name, re.IGNORECASE)
    return match and match[1]


LONGEST = 120  # bytes of the name of a scan: with a slice number it is the name of a file


def safe_name(name):
    """The name of a scan from that of a volume, fit for the name of a file on any system.

    Letters and digits of all scripts, dots, - and _ are kept. Where anything else was replaced or
    cut off, a hash of the name is added, so that different names never become equal.
    """
    safe = ""
    for char in name:
        kept = char in "._-" or unicodedata.category(char)[0] in "LMN"  # letters, marks, numbers
        safe += char if kept else " "
    safe = re.sub(" +", "-", safe).lstrip(".")
    while len(os.fsencode(safe)) > LONGEST:
        safe = safe[1:]  # the end of a name tells more than its beginning
    if safe == name:
        return safe
    return f"{safe or 'scan'}-{fingerprint(name, 6)}"


def name_scans(volumes):
    """A table of volumes, given as (path, folder): source, folder, scan, name, subject and session.

    A scan has the name of its file (see `safe_name`); if two files have one name, the folders are
    put before it, and if that is not enough, a hash of the path behind it. Subject and session are
    those of BIDS names such as sub-01_ses-2_T1w.nii.gz.
    """
    table = pd.DataFrame(volumes, columns=["source", "folder"])
    stem = table.source.map(os.path.abspath).map(os.path.basename)
    stem = stem.str.replace(r"(\.nii|\.img|\.hdr|\.mg[zh])(\.gz)?$", "", case=False, regex=True)
    stem = stem.map(same_name)
    table["scan"] = stem.map(safe_name)
    table["name"] = stem
    twins = table.scan.str.lower().duplicated(keep=False)  # for some systems they are the same file
    paths = table.source.map(os.path.abspath)
    # A file that was given by itself has no folder in the table.
    folder = table.folder.where(~table.folder.isin(["", "."]), paths.map(folder_name))
    longer = (folder.map(same_name) + "_" + stem).str.replace(os.sep, "_").map(safe_name)
    table["scan"] = table.scan.where(~twins, longer)
    twins = table.scan.str.lower().duplicated(keep=False)
    table["scan"] = table.scan.where(~twins, table.scan + "-" + paths.map(fingerprint_of_path))
    for column, key in (("subject", "sub"), ("session", "ses")):
        pattern = rf"(?:^|[_/\\])({key}-[^\W_]+)(?=[_/\\.]|$)"
        # Not of folders above the input, which may be the name of a study.
        below = (table.folder + os.sep + stem).map(same_name)
        table[column] = below.str.findall(pattern).str[-1]
    return table


def folder_name(path):
    return os.path.basename(os.path.dirname(path))


def fingerprint_of_path(path):
    return fingerprint(path, 6)


def find_all(inputs):
    """The volumes in files and folders, each once, as a table (see `name_scans`).

    InputError if an input holds no volume.
    """
    volumes = {}
    for given in map(str, inputs):
        if not os.path.exists(given):
            raise InputError(
                f"{given} does not exist; expected a volume, a DICOM folder or a folder of volumes"
            )
        here = find_volumes(given)
        if not here:
            raise InputError(
                f"{given} holds no volume ({', '.join(EXTENSIONS[:5])}) and no DICOM file"
            )
        for path, folder in here:
            volumes.setdefault(os.path.realpath(path), (path, folder))
    return name_scans(list(volumes.values()))


def class_folder(folder):
    """The folder of the class that a relative folder is in, train/AD of train/AD/sub-1/anat; "" if
    it is in none."""
    match = re.match(r"(?:(train|test)[/\\])?(AD|NC)(?=[/\\]|$)", folder, re.IGNORECASE)
    if not match:
        return ""
    split, label = match.groups()
    return os.path.join((split or "").lower(), label.upper())


def keeps_classes(table):
    """Whether the slices of the volumes of `find_all` get their folders: if all are in AD/ or NC/,
    or in folders in these, and all or none of them in those of train/ or test/."""
    folders = table.folder.map(class_folder)
    splits = folders.map(os.path.dirname)  # train, test, or "" for AD
    return bool((folders != "").all() and ((splits != "").all() or (splits == "").all()))


def describe_mixed(table):
    """A sentence if the volumes of `find_all` are in folders AD/ and NC/, but not all of them in
    one way, else None.

    The slices of all volumes would then have no classes.
    """
    folders = table.folder.map(class_folder)
    inside = folders != ""
    if keeps_classes(table) or not inside.any():
        return None
    if inside.all():
        split = folders.map(os.path.dirname) != ""
        return (
            f"{split.sum():,} of {len(table):,} volumes are in train/ or test/, the others, such "
            f"as {table.source[~split].iloc[0]}, in AD/ or NC/ alone: then no slice gets a class"
        )
    return (
        f"{inside.sum():,} of {len(table):,} volumes are in folders AD/ and NC/ of an input, the "
        f"others, such as {table.source[~inside].iloc[0]}, are not: then no slice gets a class"
    )


def add_table_subjects(table, inputs):
    """Add the subjects that subjects.csv or meta_data_with_label.json in or beside the inputs, or
    in the folders of the volumes, give to the scans. They replace those of BIDS names.

    Returns (table of `find_all`, paths of the tables used, sentences on tables that know none of
    the volumes). InputError if two tables contradict each other.
    """
    folders = []
    for given in map(str, inputs):
        folders.append(given if os.path.isdir(given) else os.path.dirname(given))
    for folder in table.source.map(os.path.dirname).unique():
        if any(os.path.exists(os.path.join(folder, name)) for name in (METADATA, TABLE)):
            folders.append(folder)

    sources = {}
    for folder in dict.fromkeys(map(os.path.abspath, folders)):
        _, _, tables = read_subjects(folder)
        sources.update(tables)
    repeated = set(table.name[table.name.duplicated()])  # of which each table has its own
    subjects = merge_subjects({
        path: {scan: subject for scan, subject in subject_of.items() if scan not in repeated}
        for path, subject_of in sources.items()
    })  # fmt: skip

    used, lines = [], []
    for path, subject_of in sources.items():
        try:
            check_match(pd.concat([table.scan, table.name]), subject_of, [path])
            used.append(path)
        except InputError as problem:
            lines.append(f"a table of subjects is not used: {problem}")
    listed = [find_subject(row, repeated, subjects, sources) for row in table.itertuples()]
    table = table.assign(subject=one_id_each(table, listed))
    n_unknown = int(table.subject.isna().sum())
    if used and n_unknown:
        first, tables = table.name[table.subject.isna()].iloc[0], " or ".join(map(str, used))
        lines.append(
            f"{n_unknown} of {len(table)} volumes, such as {first}, have no subject in {tables}"
        )
    return table, used, lines


def find_subject(row, repeated, subjects, sources):
    """The subject that tables give to a volume, a row of `find_all`, or None.

    repeated: the names of several volumes. subjects: {scan: subject} of all tables, without these.
    sources: {path of a table: its {scan: subject}}. Tables list a scan by the name of its file,
    even if folders were put before its own name; for a repeated name, the table in the nearest
    folder above the volume counts.
    """
    if row.scan in subjects:
        return subjects[row.scan]
    if row.name not in repeated:
        return subjects.get(row.name)
    by_folder = {
        Path(os.path.abspath(path)).parent: subject_of[row.name]
        for path, subject_of in sources.items()
        if row.name in subject_of
    }
    for folder in Path(os.path.abspath(row.source)).parents:  # the nearest first
        if folder in by_folder:
            return by_folder[folder]
    return None


def one_id_each(table, listed):
    """The subject of each volume of `find_all`: that of the tables (`listed`), else the one that
    they give to other volumes with the same BIDS name, else the BIDS name. Thus a person of whose
    scans only some are listed has one id. InputError if tables give a BIDS name several subjects.
    """
    ids = {}  # of BIDS names
    for name, subject in zip(table.subject, listed):
        if pd.notna(name) and subject is not None:
            ids.setdefault(name, set()).add(subject)
    column = []
    for row, subject in zip(table.itertuples(), listed):
        candidates = ids.get(row.subject, set())
        if subject is None and len(candidates) > 1:
            raise InputError(
                f"no table has a subject of {row.source}, and they give {row.subject} several, "
                f"{' and '.join(sorted(candidates))}; add {row.scan} to a table"
            )
        if subject is None:
            subject = next(iter(candidates), row.subject)
        column.append(subject)
    return column


def extract(table, look, out, workers=None):
    """Cut the volumes of `find_all`, in parallel, into out/slices/<scan>_<slice>.png.

    If all volumes are in folders AD/ and NC/ (or in those of train/ and test/), so are the slices.
    Writes out/extraction.csv (a row per volume, COLUMNS, with an `error` if it was skipped),
    out/subjects.csv if subjects are known, and last out/extraction.json (the Look). Returns the
    table of extraction.csv.

    A killed extraction leaves a folder of slices without extraction.json. It is not cleaned up, and
    training on it is the user's decision.
    """
    out = Path(out)
    keep_classes = keeps_classes(table)
    (out / "slices").mkdir()

    def work(row):
        try:
            slices, numbers, record = extract_volume(row.source, look)
        except Unfit as problem:  # another InputError concerns all volumes: a missing package
            return {"error": str(problem)}
        except OSError as problem:
            if is_system_limit(problem):
                raise
            return {"error": f"cannot be read: {reason(problem)}"}
        folder = out / "slices"
        if keep_classes:
            folder = folder / class_folder(row.folder)
        folder.mkdir(parents=True, exist_ok=True)
        for number, pixels in zip(numbers, slices):
            Image.fromarray(pixels).save(folder / f"{row.scan}_{number}.png")
        return record

    if look.strip:
        workers = 1  # deepbet uses every core by itself
    elif workers is None:
        workers = min(os.cpu_count() or 1, 8)
    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(work, table.itertuples(index=False))
        bar = tqdm(done, "extracting", len(table), unit=" volumes", leave=False, disable=None)
        rows = list(bar)

    table = table.join(pd.DataFrame(rows, index=table.index)).reindex(columns=COLUMNS)
    whole_numbers = {name: "Int64" for name in ("n_slices", "first_slice", "last_slice")}
    write_csv(out / "extraction.csv", table.astype(whole_numbers))
    identified = table[table.subject.notna()]
    if len(identified):
        write_csv(out / "subjects.csv", identified[["scan", "subject"]])
    write_json(out / "extraction.json", asdict(look))
    return table


def remarks(table, volumes, inputs, tables):
    """Sentences on an extraction: files that were not used, equal names, notes on volumes.

    table: that of `extract`, made from `volumes`, that of `find_all`. tables: paths of the tables
    of subjects that were used.
    """
    used = list(map(str, tables))
    for source in table.source:
        used += read.files_of(source)
    lines = []
    for given in inputs:
        if os.path.isdir(given):
            lines += describe_unused(given, used)
    twins = volumes[volumes.name.duplicated(keep=False)].sort_values("name", kind="stable")
    if len(twins):
        lines.append(
            f"{len(twins)} volumes have the name of another, such as {twins.source.iloc[0]} and "
            f"{twins.source.iloc[1]}; each is a scan of its own, {twins.scan.iloc[0]} and "
            f"{twins.scan.iloc[1]}"
        )
    for row in table[table.notes.notna()].itertuples():
        lines.append(f"{row.source}: {row.notes}")
    return lines


# ---------------------------------------------------------------- the volumes of a prediction


class CutInputs:
    """The inputs of predict.py with every volume replaced by a folder of its slices.

    inputs: paths of slices and folders of slices.
    failed: a dict from the path of each volume that could not be cut to the reason.
    notes: warnings.
    lines: how the volumes were cut.
    problem: why a table of the subjects of volumes cannot be used, or None.
    """

    def __init__(self, inputs):
        self.inputs = list(inputs)
        self.failed = {}
        self.notes = []
        self.lines = []
        self.temporary = None  # the folder of slices that are not to be kept
        self.table = None  # of `extract`
        self.problem = None  # why a table of subjects cannot be used
        self.look = None  # how the volumes were cut

    def name_rows(self, index):
        """The index with paths such as head.nii.gz:81 for the slices in the temporary folder."""
        if self.temporary is None:
            return index
        ours = index.path.str.startswith(f"{self.temporary.name}{os.sep}")
        source = index.scan.map(dict(zip(self.table.scan, self.table.source)))
        return index.assign(path=index.path.mask(ours, source + ":" + index.slice.astype("string")))

    def looks(self, index):
        """{scan: the Look of its slices}, where it is known: of volumes, and of folders that
        tools.extract wrote, unless the file of the volume does not say where left is. InputError if
        its record is damaged."""
        looks, tables = {}, []
        for given in map(str, map(Path, self.inputs)):  # as paths in the index are
            look = recorded_look(given) if os.path.isdir(given) else None
            if look:
                own = index.path.str.startswith(f"{given}{os.sep}")
                looks.update(dict.fromkeys(index.scan[own], Look(**look)))
                files = [place / "extraction.csv" for place in (Path(given), Path(given).parent)]
                tables += [read_csv(file) for file in files if file.is_file()]
        if self.look:
            looks.update(dict.fromkeys(self.table.scan, self.look))
            tables.append(self.table)
        for table in tables:
            for scan in table.scan[table.affine_from == ASSUMED]:
                looks.pop(scan, None)
        return looks

    def close(self):
        """Remove the temporary folder."""
        if self.temporary is not None:
            self.temporary.cleanup()


def cut_inputs(inputs, *, checkpoint, flags, keep=None):
    """Cut the volumes among the inputs, into a temporary folder or the new folder `keep`.

    checkpoint, flags: how to cut, see `look_of`. Returns a CutInputs. InputError if there are flags
    and no volume, or if no volume can be cut and there is no other input.
    """
    volumes = [given for given in inputs if holds_volumes(given)]
    result = CutInputs(given for given in inputs if given not in volumes)
    if not volumes:
        if (keep or flags) and any(map(os.path.exists, inputs)):  # else `list_inputs` fails
            names = ["--keep-slices"] if keep else []
            names += [f"--{name}" for name in flags]
            raise InputError(
                f"{', '.join(names)}: for volumes only, and no input is one; leave it out, or give "
                "a volume, or a folder of volumes"
            )
        return result

    look, origin, warnings = look_of(checkpoint, flags)
    result.notes += warnings
    table = find_all(volumes)
    mixed = describe_mixed(table)
    if mixed:
        result.notes.append(mixed)
    tables = []
    try:
        table, tables, lines = add_table_subjects(table, volumes)
        result.notes += lines
    except InputError as problem:  # the prediction only loses its subjects
        result.problem = str(problem)
        table = table.assign(subject=pd.NA)  # also those of BIDS names: tables may have others

    if keep:
        folder = new_folder(keep, "--keep-slices")
    else:
        result.temporary = tempfile.TemporaryDirectory(prefix="slices-")
        folder = Path(result.temporary.name)
    result.look = look
    result.table = extract(table, look, folder)
    result.notes += remarks(result.table, table, volumes, tables)

    bad = result.table[result.table.error.notna()]
    result.failed = dict(zip(bad.source, bad.error))
    n_cut = len(result.table) - len(bad)
    if n_cut == 0 and not result.inputs:
        reasons = [f"{source} {error}" for source, error in result.failed.items()]
        raise InputError("; ".join(reasons))
    slices = folder / "slices"
    parts = [slices / name for name in ("train", "test") if (slices / name).is_dir()]
    if parts:
        result.inputs += map(str, parts)
    elif n_cut:
        result.inputs.append(str(slices))
    about_skull = "" if look.strip else "; no skull is removed, which --strip would do"
    result.lines.append(
        f"{n_cut} of {len(result.table)} volumes cut: {look} ({origin}){about_skull}"
    )
    return result
