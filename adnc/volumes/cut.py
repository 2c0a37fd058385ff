"""Cut volumes into oriented, resampled, windowed slices; many volumes into a folder of slices.

World coordinates are those of NIfTI: millimetres, x to the right of the patient, y to the front, z
up. Every plane is
shown in the neurological convention: left is on the left. An axial slice has the front at the top,
a coronal one the crown, a sagittal one the crown, with the face to the left; slices are numbered
from left to right, from back to front and from bottom to top. If only the file knows left from
right, the file is believed.
"""

import contextlib
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from adnc.data.index import check_match, describe_unused, read_subjects
from adnc.data.pixels import LARGEST, NEAR_BLACK, SMALLEST, Unfit
from adnc.errors import InputError
from adnc.files import new_folder, read_json, write_csv, write_json
from adnc.volumes import read
from adnc.volumes.look import ADNI, Look
from adnc.volumes.read import EXTENSIONS, MAX_VOXELS, find_volumes, holds_volumes, reason

# World axes of slices, of rows and of columns; rows and columns with the direction in which they
# are counted.
PLANES = {
    "axial": (2, (1, -1), (0, 1)),
    "coronal": (1, (2, -1), (0, 1)),
    "sagittal": (0, (2, -1), (1, -1)),
}
COLUMNS = (
    "source",
    "scan",
    "subject",
    "session",
    "shape",
    "voxel_sizes",
    "orientation",
    "oriented_to",
    "affine_from",
    "affine",
    "plane",
    "n_slices",
    "first_slice",
    "last_slice",
    "first_mm",
    "last_mm",
    "black",
    "white",
    "grey",
    "notes",
    "error",
)

# ---------------------------------------------------------------- how training slices were cut


def look_of(checkpoint, flags):
    """(Look, sentence, warnings): how the training slices of a checkpoint were cut, changed by the
    `flags` that were given (a dict). What the checkpoint does not record is assumed, and the
    sentence says so. The warnings name flags that make other slices than those in training, which
    the range check may not notice. InputError if nothing can be assumed."""
    height, width = checkpoint["slice_size"]
    recorded = checkpoint["extraction"]
    brightest = float(np.mean(checkpoint["slice_stats"]["brightest"]))
    if recorded:
        trained = Look(**recorded)
        look, known = trained, "as the checkpoint's training slices were cut"
    elif (width, height) == ADNI.size:
        trained = ADNI
        look, known = (
            replace(ADNI, brightest=brightest),
            "assumed from the size of the training slices, that of AD_NC",
        )
    elif "plane" in flags:
        trained = None
        look, known = (
            Look(brightest=brightest),
            "the plane as asked, the rest as the training slices are",
        )
    else:
        raise InputError(
            f"the checkpoint does not record the plane of its training slices ({width} x {height} "
            "pixels); name it with --plane axial, coronal or sagittal"
        )
    warnings = []
    if trained is not None:
        differ = []
        for name in ("plane", "turn", "spacing", "step"):
            if name in flags and flags[name] != getattr(trained, name):
                differ.append(
                    f"--{name} {flags[name]}, those in training with {getattr(trained, name)}"
                )
        if differ:
            warnings.append(
                f"the slices are cut with {'; with '.join(differ)}: p_AD may mean nothing"
            )
    if flags:
        known += f", with the flags that are given ({', '.join(flags)})"
    return replace(look, **{"size": (width, height), **flags}), known, warnings


def recorded_look(root):
    """The record of tools.extract on the slices under `root`, in it or in its parent, as a dict for
    `Look`; None if there is none. InputError if it is damaged."""
    for path in (Path(root) / "extraction.json", Path(root).parent / "extraction.json"):
        if not path.exists():
            continue
        try:
            look = Look(**read_json(path))
            if look.plane not in PLANES or not look.spacing > 0 or look.turn % 90:
                raise ValueError("there is no such cut")
        except (ValueError, TypeError) as problem:
            raise InputError(
                f"{path} is not what tools.extract writes ({problem}); restore it, so that the "
                "model knows how its slices were cut, or remove it"
            ) from None
        return {**asdict(look), "slices": None}  # they belong to one set, not to the next head
    return None


# ---------------------------------------------------------------- an array to slices


def find_head(volume):
    """(black, white, middle) of a volume: background and bright tissue in its units, and the voxel
    in the middle of the head.

    The head is what is above a tenth of the way between the 2 % and 98 % quantiles (Smith 2002,
    BET), white its 99.5 % quantile, its extent 98 % of it along each axis. Unfit if all voxels are
    alike.
    """
    step = max(1, int(np.ceil((volume.size / 2**21) ** (1 / 3))))
    sample = volume[::step, ::step, ::step]
    sample = sample[np.isfinite(sample)].astype(np.float64)
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
    """The numbers (N,) of the slices that a Look asks for, of n slices with positions origin +
    number * spacing in mm and the middle of the head at number `centre`. Unfit if there is none."""
    if look.slices is None:
        first = centre - (look.count - 1) // 2
        numbers = np.arange(first, first + look.count)
    else:
        low, high, unit = look.slices
        if unit == "mm":
            low, high = (low - origin) / spacing, (high - origin) / spacing
        numbers = np.arange(np.ceil(low - 1e-6), np.floor(high + 1e-6) + 1).astype(int)
    numbers = numbers[(numbers >= 0) & (numbers < n)]
    if len(numbers) == 0:
        last = origin + (n - 1) * spacing
        raise Unfit(f"has no slice there; expected 0:{n - 1}, or {origin:.0f}mm:{last:.0f}mm")
    return numbers


def cut(volume, affine, look, middle, black):
    """(slices float32 (N, H, W), numbers (N,), positions in mm (N,)) of a volume with axes nearest
    to x, y and z.

    Slices are on a grid of the world: `spacing` in the plane, `step` across it, from the corner of
        the volume, so that voxels of that size are taken as they are; others are interpolated
        linearly. Outside of the volume is `black`.
        """
    nib = read.import_nibabel()
    across, (down, down_way), (along, along_way) = PLANES[look.plane]
    grid = np.full(3, look.spacing)
    grid[across] = look.step or look.spacing
    shape, world = nib.spaces.vox2out_vox((volume.shape, affine), grid)
    origin = world[:3, 3]
    centre = np.rint(((affine[:3, :3] @ middle + affine[:3, 3]) - origin) / grid)
    numbers = choose_slices(look, shape[across], int(centre[across]), origin[across], grid[across])

    width, height = shape[along], shape[down]
    if look.size:
        width, height = look.size if look.turn % 180 == 0 else look.size[::-1]
    n_pixels = len(numbers) * height * width
    if not SMALLEST <= min(width, height) <= max(width, height) <= LARGEST or n_pixels > MAX_VOXELS:
        raise Unfit(
            f"would give {len(numbers)} slices of {width} x {height} pixels; expected {SMALLEST} "
            f"to {LARGEST} a side: choose another --size or --spacing"
        )

    # From (slice, row, column) to the grid.
    to_grid = np.diag([0.0, 0.0, 0.0, 1.0])
    to_grid[across, 0], to_grid[across, 3] = 1, numbers[0]
    for column, axis, way, side in ((1, down, down_way, height), (2, along, along_way, width)):
        first = 0 if way > 0 else shape[axis] - 1
        if look.size:
            first = centre[axis] - way * (side // 2)
        to_grid[axis, column], to_grid[axis, 3] = way, first
    slices = resample(volume, affine, world @ to_grid, (len(numbers), height, width), black)
    slices = np.rot90(slices, look.turn // 90, (1, 2))
    return slices, numbers, origin[across] + numbers * grid[across]


def resample(volume, affine, to_affine, shape, black):
    """The volume on another grid of the world, by linear interpolation; outside is `black`."""
    from nibabel.processing import resample_from_to

    nib = read.import_nibabel()
    image = nib.Nifti1Image(volume, affine)
    return np.asarray(resample_from_to(image, (shape, to_affine), order=1, cval=black).dataobj)


def extract_volume(path, look):
    """(slices uint8 (N, H, W), numbers (N,), columns of COLUMNS) of a volume or DICOM folder, as a
    Look says. Unfit or OSError if that cannot be done."""
    with contextlib.ExitStack() as stack:
        if os.path.isdir(path):
            path = read.convert_dicom(
                path, stack.enter_context(tempfile.TemporaryDirectory(prefix="dicom-"))
            )
        image, facts, notes = read.open_volume(path)
        with np.errstate(all="ignore"):  # an overflow is counted as not finite
            volume, affine = read.read_volume(image, look.spacing)
    if look.strip:
        volume = read.strip_skull(np.nan_to_num(volume, nan=0, posinf=0, neginf=0), affine)
    black, white, middle = find_head(volume)
    lost = ~np.isfinite(volume)
    if lost.any():
        notes.append(
            f"{lost.sum():,} of {volume.size:,} voxels are not finite numbers; they become black"
        )
        volume = np.where(lost, np.float32(black), volume)

    slices, numbers, positions = cut(volume, affine, look, middle, black)
    if look.slices is None and len(numbers) < look.count:
        notes.append(f"only {len(numbers)} of {look.count} slices are within the volume")
    grey = 255.0
    if look.brightest is not None:  # the statistic of pixels.STATS
        grey = look.brightest
        white = max(float(np.quantile(slices, 0.99)), black + 1e-3 * (white - black))
    with np.errstate(all="ignore"):  # numbers of 1e38 overflow, and are white
        slices = np.clip((slices - black) / (white - black) * grey, 0, 255)
        slices = np.nan_to_num(slices).round().astype(np.uint8)
    edges = np.concatenate([slices[:, [0, -1]].ravel(), slices[:, :, [0, -1]].ravel()])
    if look.size and (edges > 2 * NEAR_BLACK).mean() > 0.02:
        notes.append("the head reaches the border of the slices; a larger --size shows all of it")
    return slices, numbers, {
        **facts,
        "plane": look.plane,
        "n_slices": len(numbers),
        "first_slice": int(numbers[0]),
        "last_slice": int(numbers[-1]),
        "first_mm": positions[0],
        "last_mm": positions[-1],
        "black": black,
        "white": white,
        "grey": grey,
        "notes": "; ".join(notes) or None,
    }


# ---------------------------------------------------------------- many volumes


def name_scans(volumes):
    """A table of volumes, (path, folder) each: source, folder, scan, name, subject and session.

    A scan is named as its file; if two have one name, with the folders before it. Only letters,
    digits, dots, - and _ are kept, so that the name is safe on any system. Subject and session are
    those of BIDS: sub-01_ses-2_T1w.nii.gz.
    """

    def safe(text):
        return re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip(".")[-120:] or "scan"

    table = pd.DataFrame(volumes, columns=["source", "folder"])
    stem = table.source.map(os.path.abspath).map(os.path.basename)
    stem = stem.str.replace(r"(\.nii|\.img|\.hdr|\.mg[zh])(\.gz)?$", "", case=False, regex=True)
    table["scan"], table["name"] = stem.map(safe), stem
    twins = table.scan.duplicated(keep=False)
    table.loc[twins, "scan"] = (table.folder + "_" + stem).str.replace(os.sep, "_").map(safe)
    number = table.groupby("scan").cumcount()
    table["scan"] += ("-" + (number + 1).astype(str)).where(number > 0, "")
    for column, key in (("subject", "sub"), ("session", "ses")):
        table[column] = table.source.str.findall(rf"(?:^|[_/\\])({key}-[A-Za-z0-9]+)").str[-1]
    return table


def find_all(inputs):
    """The volumes in files and folders, each once, as a table of `name_scans`. InputError if an
    input has none."""
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


def in_classes(table):
    """Whether each volume is in a folder AD/ or NC/, of train/ or test/ if there are such."""
    pattern = r"((train|test)[/\\])?(AD|NC)"
    return table.folder.map(lambda folder: bool(re.fullmatch(pattern, folder))).astype(bool)


def describe_mixed(table):
    """A sentence on volumes of `find_all` of which some are in folders AD/ and NC/ and others are
    not, so that the slices of all would have no classes; None if there are no such."""
    inside = in_classes(table)
    if inside.all() or not inside.any():
        return None
    return (
        f"{inside.sum():,} of {len(table):,} volumes are in folders AD/ and NC/ (of train/ and "
        f"test/), and others are not, such as {table.source[~inside].iloc[0]}, so that the classes "
        "of all would be lost"
    )


def add_table_subjects(table, inputs):
    """The table of `find_all` with the subjects that tables in or beside the inputs name, before
    those of BIDS names; the paths of these tables; and lines on tables that know no volume.
    InputError if two contradict each other."""
    places = [
        given if os.path.isdir(given) else os.path.dirname(given) for given in map(str, inputs)
    ]
    places += table.source.map(os.path.dirname).unique().tolist()
    subjects, sources, lines = {}, {}, []
    for folder in dict.fromkeys(map(os.path.abspath, places)):
        known, _, here = read_subjects(folder)
        for scan in known.keys() & subjects.keys():
            if known[scan] != subjects[scan]:
                raise InputError(
                    f"scan {scan} belongs to {known[scan]} in {next(iter(here))}, and to "
                    f"{subjects[scan]} in another table; correct one of them, or move it away"
                )
        subjects = {**known, **subjects}
        sources.update(here)
    used = []
    for path, known in sources.items():
        try:
            check_match(pd.concat([table.scan, table.name]), known, [path])
            used.append(path)
        except InputError as problem:
            lines.append(f"a table of subjects is not used: {problem}")
    subject = [
        subjects.get(row.scan, subjects.get(row.name, row.subject))
        for row in table.itertuples(index=False)
    ]
    return table.assign(subject=subject), used, lines


def extract(table, look, out, workers=None, progress="extracting"):
    """Cut the volumes of `find_all`, in parallel, into out/slices/<scan>_<slice>.png.

    Writes out/extraction.csv (a row a volume, COLUMNS, with an `error` if it was skipped),
    out/subjects.csv if subjects are known, and last out/extraction.json (the Look). If all volumes
    are in folders AD/ and NC/ (or in those of train/ and test/), so are the slices. Returns the
    table of extraction.csv. A killed extraction leaves slices without extraction.json.
    """
    out = Path(out)
    keep_classes = in_classes(table).all()
    (out / "slices").mkdir()

    def work(row):
        try:
            slices, numbers, facts = extract_volume(row.source, look)
        except (
            Unfit
        ) as problem:  # another InputError, such as a missing package, concerns all volumes
            return {"error": str(problem)}
        except OSError as problem:
            return {"error": f"cannot be read: {reason(problem)}"}
        folder = out / "slices"
        if keep_classes:
            folder = folder / row.folder
        folder.mkdir(parents=True, exist_ok=True)
        for number, pixels in zip(numbers, slices):
            Image.fromarray(pixels).save(folder / f"{row.scan}_{number}.png")
        return facts

    # deepbet uses every core by itself
    n_threads = 1 if look.strip else workers or min(os.cpu_count() or 1, 8)
    with ThreadPoolExecutor(n_threads) as pool:
        done = pool.map(work, table.itertuples(index=False))
        bar = tqdm(
            done,
            progress,
            len(table),
            unit=" volumes",
            disable=None if progress else True,
            leave=False,
        )
        rows = list(bar)
    table = table.join(pd.DataFrame(rows, index=table.index)).reindex(columns=COLUMNS)
    whole_numbers = {name: "Int64" for name in ("n_slices", "first_slice", "last_slice")}
    write_csv(out / "extraction.csv", table.astype(whole_numbers))
    if table.subject.notna().any():
        write_csv(out / "subjects.csv", table.loc[table.subject.notna(), ["scan", "subject"]])
    write_json(out / "extraction.json", asdict(look))
    return table


def remarks(table, volumes, inputs, tables):
    """Lines on a table of `extract`, made from the table `volumes` of `find_all`: files of the
    inputs that were not used (beside the `tables` of subjects), equal names, and what was decided
    about volumes."""
    used = [file for source in table.source for file in read.files_of(source)] + list(
        map(str, tables)
    )
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
    for source, note in table.loc[table.notes.notna(), ["source", "notes"]].itertuples(index=False):
        lines.append(f"{source}: {note}")
    return lines


# ---------------------------------------------------------------- the volumes of a prediction


class CutInputs:
    """The inputs of predict.py with every volume replaced by a folder of its slices.

    inputs: paths of slices and folders. failed: the reasons why volumes could not be cut, by path.
        notes: warnings.
    lines: how the volumes were cut.
    """

    def __init__(self, inputs):
        self.inputs, self.failed, self.notes, self.lines = list(inputs), {}, [], []
        self.temporary, self.folder, self.table = None, None, None

    def name_rows(self, index):
        """The index with the paths of slices from volumes as volume:slice, such as
        head.nii.gz:81."""
        if self.folder is None:
            return index
        ours = index.path.str.startswith(f"{self.folder}{os.sep}")
        source = index.scan.map(dict(zip(self.table.scan, self.table.source)))
        return index.assign(path=index.path.mask(ours, source + ":" + index.slice.astype("string")))

    def close(self):
        """Remove the slices, unless they are to be kept."""
        if self.temporary is not None:
            self.temporary.cleanup()


def cut_inputs(inputs, *, checkpoint, flags, keep=None):
    """Cut the volumes among the inputs as the training slices of a checkpoint, changed by `flags`
    (see `look_of`), into a temporary folder or the new folder `keep`. Returns a CutInputs.
    InputError if no volume can be cut and there is no other input."""
    volumes = [given for given in inputs if holds_volumes(given)]
    cut = CutInputs(given for given in inputs if given not in volumes)
    if not volumes:
        if keep or flags:
            raise InputError(
                "--keep-slices and the flags on how volumes are cut need a volume among the "
                "inputs, or a folder of volumes without slices beside them"
            )
        return cut
    look, known, warnings = look_of(checkpoint, flags)
    cut.notes += warnings
    if keep:
        folder = new_folder(keep, "--keep-slices")
    else:
        cut.temporary = tempfile.TemporaryDirectory(prefix="slices-")
        folder = Path(cut.temporary.name)
    table, tables = find_all(volumes), []
    mixed = describe_mixed(table)
    if mixed:
        cut.notes.append(mixed)
    try:
        table, tables, lines = add_table_subjects(table, volumes)
        cut.notes += lines
    except InputError as problem:  # this costs a prediction its subjects only
        cut.notes.append(f"subjects are unknown: {problem}")

    cut.table, cut.folder = extract(table, look, folder), folder / "slices"
    cut.notes += remarks(cut.table, table, volumes, tables)
    bad = cut.table[cut.table.error.notna()]
    n_good = len(cut.table) - len(bad)
    if n_good == 0 and not cut.inputs:
        raise InputError("; ".join(f"{row.source} {row.error}" for row in bad.itertuples()))
    if n_good:
        parts = [cut.folder / name for name in ("train", "test") if (cut.folder / name).is_dir()]
        cut.inputs += map(str, parts or [cut.folder])
    cut.failed = dict(zip(bad.source, bad.error))
    cut.lines.append(f"{n_good} of {len(cut.table)} volumes cut: {look} ({known})")
    return cut
