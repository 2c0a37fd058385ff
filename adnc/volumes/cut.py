"""From a volume (NIfTI, MGZ, Analyze, or a DICOM folder) to oriented, resampled, windowed slices.

Not run by itself; extract.py and predict.py come here. What is in a file is read by readers.py.

World coordinates are those of NIfTI: millimetres, x to the right of the patient, y to the front, z up. Every plane is
shown in the neurological convention: left is on the left. An axial slice has the front at the top, a coronal one the
crown, a sagittal one the crown, with the face to the left; slices are numbered from left to right, from back to front
and from bottom to top. Where only the file knows left from right, the file is believed.
"""

import contextlib
import json
import os
import re
import tempfile
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from adnc.volumes import read as readers
from adnc.files import DRAFT, clear_folder, own_folder, read_bytes, write_csv, write_json
from adnc.data.metadata import check_match, has_table, read_subjects, spelling
from adnc.volumes.read import EXTENSIONS, MOST_VOXELS, find_volumes, reason
from adnc.data.pixels import LARGEST, NEAR_BLACK, SMALLEST, Unfit, passed_over
from adnc.cli import InputError, Threads

# world axis of slices, rows, columns, and whether it is counted upwards
PLANES = {"axial": ((2, 1), (1, -1), (0, 1)), "coronal": ((1, 1), (2, -1), (0, 1)),
          "sagittal": ((0, 1), (2, -1), (1, -1))}  # fmt: skip
COLUMNS = ("source", "scan", "subject", "session", "shape", "voxel_sizes", "orientation", "oriented_to", "affine_from",
           "affine", "plane", "n_slices", "first_slice", "last_slice", "first_mm", "last_mm", "black", "white", "grey",
           "notes", "error")  # fmt: skip

# ---------------------------------------------------------------- how a volume is cut


@dataclass(frozen=True)
class Look:
    """How volumes are cut: the flags of utils.add_volume_flags. `size` is (width, height) in pixels, None the whole
    volume; `brightest` the grey level that the 99 % quantile of the slices gets; None: the head fills 0 to 255."""

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
        where = f"slices {'{:g} to {:g} ({})'.format(*self.slices)}" if self.slices else f"{self.count} central slices"
        size = "{} x {}".format(*self.size) if self.size else "of the whole volume"
        return (f"{self.plane}, {where} every {self.step or self.spacing:g} mm, {size}, {self.spacing:g} mm a pixel"
                + f", turned by {self.turn} degrees" * bool(self.turn) + ", skull stripped" * self.strip
                + (f", 99 % quantile at grey {self.brightest:.0f}" if self.brightest is not None else ""))


ADNI = Look("sagittal", size=(256, 240), step=1.2)  # as the slices of AD_NC are: MP-RAGE, face to the left


def flags_given(args):
    """Those flags of utils.add_volume_flags that were given, as a dict for `Look`."""
    given = {name: getattr(args, name, None) for name in vars(Look())}  # --brightest is no flag
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    if {"slices", "count"} <= given.keys():
        raise InputError("--slices and --count both say which slices; give one of them")
    return given


def look_of(checkpoint, args):
    """(Look, sentence, warnings): how the training slices of a checkpoint were cut, with the flags that were given.
    What the checkpoint does not record is assumed, and the sentence says so; InputError where nothing can be assumed.
    The warnings name flags that make other slices than those in training, which the range check may not notice."""
    height, width = checkpoint["slice_size"]
    recorded = checkpoint.get("extraction")
    if recorded:
        look, known = Look(**recorded), "as the checkpoint's training slices were cut"
    elif (width, height) == ADNI.size:
        look, known = ADNI, "assumed from the size of the checkpoint's training slices, that of AD_NC"
    elif args.plane:
        look, known = Look(), "the plane as asked, the rest as the training slices are"
    else:
        raise InputError(f"the checkpoint does not record of which plane its training slices ({width} x {height} "
                         "pixels) are; name it with --plane axial, coronal or sagittal")
    asked = flags_given(args)
    trained = asdict(look) if recorded or look is ADNI else asked
    other = [f"--{name} {asked[name]}, those in training with {trained[name]}"
             for name in ("plane", "turn", "spacing", "step") if name in asked and asked[name] != trained[name]]
    if not recorded:
        look = replace(look, brightest=float(np.mean(checkpoint["slice_stats"]["brightest"])))
    known += f", with the flags that are given ({', '.join(asked)})" * bool(asked)
    return (replace(look, **{"size": (width, height), **asked}), known,
            [f"the slices are cut with {'; with '.join(other)}: p_AD may mean nothing"] if other else [])


def recorded_look(root):
    """What extract.py recorded about the slices under `root`, or in its parent, as a dict for `Look`; or None.
    InputError where that is damaged."""
    for path in (folder / "extraction.json" for folder in (Path(root), Path(root).parent)):
        if not path.exists():
            continue
        try:
            look = Look(**json.loads(read_bytes(path)))
            if look.plane not in PLANES or not (look.spacing > 0 and (look.step is None or look.step > 0) and
                                                look.turn % 90 == 0 and (look.size is None or len(look.size) == 2)):
                raise ValueError("there is no such cut")
            return asdict(look) | {"slices": None}  # of one set, not of the next head
        except (ValueError, TypeError) as problem:
            raise InputError(f"{path} is not what extract.py writes ({problem}); restore it, so that the model knows "
                             "how its slices were cut, or remove it") from None
    return None


# ---------------------------------------------------------------- files


def name_scans(found):
    """A table of volumes, (path, folder) each: source, folder, scan, name, subject and session. A scan is named as its
    file; where two are named alike, with its folders before it. Only letters, digits, dots, - and _ are kept, so that
    the name is safe on any system. Subject and session are those of BIDS: sub-01_ses-2_T1w.nii.gz."""
    def safe(text):
        return re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip(".")[-120:] or "scan"

    table = pd.DataFrame(found, columns=["source", "folder"])
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


# ---------------------------------------------------------------- an array to slices


def find_head(volume):
    """(black, white, middle) of a volume: background and bright tissue in its units, and the voxel in the middle of the
    head. The head is what lies above a tenth of the way between the 2 % and 98 % quantiles (Smith 2002, BET), white its
    99.5 % quantile, its extent 98 % of it along each axis. Unfit where all voxels are alike."""
    step = max(1, int(np.ceil((volume.size / 2**21) ** (1 / 3))))
    sample = volume[::step, ::step, ::step]
    sample = sample[np.isfinite(sample)].astype(np.float64)
    black, bright = np.percentile(sample, (2, 98)) if sample.size else (0, 0)
    bright = bright if bright > black else sample.max(initial=black)
    if not bright > black:
        raise Unfit("holds a single grey level, or nothing but what is not a number; expected a head")
    threshold = black + 0.1 * (bright - black)
    head = volume > threshold
    middle = []
    for axis in range(3):
        share = np.cumsum(head.sum(tuple(other for other in range(3) if other != axis)))
        middle.append(np.searchsorted(share, (0.01 * share[-1], 0.99 * share[-1])).mean())
    return float(black), float(np.percentile(sample[sample > threshold], 99.5)), np.array(middle)


def cut(volume, affine, look, middle, black):
    """(slices float32 (N, H, W), numbers (N,), positions in mm (N,)) of a volume with axes nearest to x, y and z.

    Slices lie on a grid of the world: `spacing` in the plane, `step` across it, from the corner of the volume, so that
    voxels of that size are taken as they are; others are interpolated linearly. Outside of the volume is `black`.
    """
    from nibabel.spaces import vox2out_vox
    from scipy.ndimage import affine_transform

    (across, _), (down, _), (along, _) = axes = PLANES[look.plane]
    grid = np.full(3, look.spacing)
    grid[across] = look.step or look.spacing
    shape, world = vox2out_vox((volume.shape, affine), grid)
    origin, n = world[:3, 3], shape[across]
    centre = np.rint(((affine[:3, :3] @ middle + affine[:3, 3]) - origin) / grid)
    if look.slices is None:
        first = int(centre[across]) - (look.count - 1) // 2
        numbers = np.arange(first, first + look.count)
    else:
        low, high, unit = look.slices
        if unit == "mm":
            low, high = (np.array([low, high]) - origin[across]) / grid[across]
        numbers = np.arange(np.ceil(low - 1e-6), np.floor(high + 1e-6) + 1).astype(int)
    numbers = numbers[(numbers >= 0) & (numbers < n)]
    if not len(numbers):
        ends = origin[across], origin[across] + (n - 1) * grid[across]
        raise Unfit(f"has no slice there; expected 0:{n - 1}, or {ends[0]:.0f}mm:{ends[1]:.0f}mm")
    size = look.size and (look.size if look.turn % 180 == 0 else look.size[::-1])
    width, height = sides = size or (shape[along], shape[down])
    if not SMALLEST <= min(sides) <= max(sides) <= LARGEST or len(numbers) * height * width > MOST_VOXELS:
        raise Unfit(f"would give {len(numbers)} slices of {width} x {height} pixels; expected {SMALLEST} to {LARGEST} "
                    "a side: choose another --size or --spacing")
    chosen = np.diag([0.0, 0.0, 0.0, 1.0])  # (slice, row, column) -> the grid
    chosen[across, [0, 3]] = 1, numbers[0]
    for column, (axis, way), side in ((1, axes[1], height), (2, axes[2], width)):
        first = centre[axis] - way * (side // 2) if size else 0 if way > 0 else shape[axis] - 1
        chosen[axis, [column, 3]] = way, first
    # rounded: a voxel of the border at -1e-15 would count as outside
    slices = affine_transform(volume, (np.linalg.inv(affine) @ (world @ chosen))[:3].round(9),
                              output_shape=(len(numbers), height, width), order=1, cval=black)
    return np.rot90(slices, look.turn // 90, (1, 2)), numbers, origin[across] + numbers * grid[across]


def extract_volume(path, look):
    """(slices uint8 (N, H, W), numbers (N,), columns of COLUMNS) of a volume or DICOM folder, as a Look says. Unfit,
    InputError or OSError where that cannot be done."""
    with contextlib.ExitStack() as stack:
        if os.path.isdir(path):
            path = readers.convert_dicom(path, stack.enter_context(tempfile.TemporaryDirectory(prefix="dicom-")))
        image, facts, notes = readers.open_volume(path)
        with np.errstate(all="ignore"):  # what overflows is counted as not finite
            volume, affine = readers.read_volume(image, look.spacing)
    if look.strip:
        volume = readers.strip_skull(np.nan_to_num(volume, nan=0, posinf=0, neginf=0), affine)
    black, white, middle = find_head(volume)
    lost = ~np.isfinite(volume)
    if lost.any():
        notes.append(f"{lost.sum():,} of {volume.size:,} voxels are not finite numbers, and black")
        volume = np.where(lost, np.float32(black), volume)
    slices, numbers, positions = cut(volume, affine, look, middle, black)
    if look.slices is None and len(numbers) < look.count:
        notes.append(f"only {len(numbers)} of {look.count} slices are within the volume")
    grey = 255.0
    if look.brightest is not None:  # the statistic of slices.STATS
        grey, white = look.brightest, max(float(np.quantile(slices, 0.99)), black + 1e-3 * (white - black))
    with np.errstate(all="ignore"):  # numbers of 1e38 overflow, and are white
        slices = np.nan_to_num(np.clip((slices - black) / (white - black) * grey, 0, 255)).round().astype(np.uint8)
    edges = np.concatenate([slices[:, [0, -1]].ravel(), slices[:, :, [0, -1]].ravel()])
    if look.size and (edges > 2 * NEAR_BLACK).mean() > 0.02:
        notes.append("the head reaches the border of the slices; a larger --size shows all of it")
    return slices, numbers, facts | {
        "plane": look.plane, "n_slices": len(numbers), "first_slice": int(numbers[0]), "last_slice": int(numbers[-1]),
        "first_mm": positions[0], "last_mm": positions[-1], "black": black, "white": white, "grey": grey,
        "notes": "; ".join(notes) or None}  # fmt: skip


# ---------------------------------------------------------------- many volumes to a folder of slices


def find_all(inputs):
    """The volumes in files and folders, each once, as `extract` takes them. InputError where one holds none."""
    found = []
    for given in map(str, inputs):
        if not os.path.exists(given):
            raise InputError(f"{given} does not exist; expected a volume, a DICOM folder or a folder of volumes")
        here = find_volumes(given)
        if not here:
            raise InputError(f"{given} holds no volume ({', '.join(EXTENSIONS[:5])}) and no DICOM file")
        found += here
    return name_scans(list({os.path.realpath(row[0]): row for row in found}.values()))


def _in_classes(table):
    return table.folder.map(lambda folder: bool(re.fullmatch(r"((train|test)[/\\])?(AD|NC)", folder))).astype(bool)


def describe_mixed(table):
    """A sentence on volumes of `find_all` of which some are in folders AD/ and NC/ and others are not, so that the
    slices of all would come without classes; None where there is no such."""
    inside = _in_classes(table)
    if inside.all() or not inside.any():
        return None
    return (f"{inside.sum():,} of {len(table):,} volumes are in folders AD/ and NC/ (of train/ and test/), and others "
            f"are not, such as {table.source[~inside].iloc[0]}, so that the classes of all would be lost")


def tabled_subjects(table, inputs):
    """The table of `find_all`, with the subjects that tables in or beside the inputs or the folders of volumes name,
    before those of BIDS names; the paths of these tables; and lines on tables that know no volume. InputError where two
    contradict each other, or one cannot be read."""
    known, read, lines = {}, {}, []
    places = [given if os.path.isdir(given) else os.path.dirname(given) for given in map(str, inputs)]
    places += filter(has_table, dict.fromkeys(map(os.path.dirname, table.source)))  # not beside each of a thousand
    for folder in dict.fromkeys(map(os.path.abspath, places)):
        who, _, sources = read_subjects(folder)
        for scan in who.keys() & known.keys():
            if spelling(who[scan]) != spelling(known[scan]):
                one, other = (next(path for path, scans in of.items() if scan in scans) for of in (sources, read))
                raise InputError(f"scan {scan} is of {who[scan]} in {one}, and of {known[scan]} in {other}; correct "
                                 "one of them, or move it away")
        known, read = who | known, read | sources
    used = []
    for path, who in read.items():
        try:
            check_match(pd.concat([table.scan, table.name]), who, {path: who})
            used.append(path)
        except InputError as problem:
            lines.append(f"a table of subjects is not used: {problem}")
    subject = [known.get(row.scan, known.get(row.name, row.subject)) for row in table.itertuples(index=False)]
    return table.assign(subject=subject), used, lines


def extract(table, look, out, workers=None, bar="extracting"):
    """Cut the volumes of `find_all` into out/slices/<scan>_<slice>.png, in parallel, and write
    out/extraction.csv (a row a volume, COLUMNS, with an `error` where it was skipped), out/extraction.json (the Look)
    and, where subjects are known, out/subjects.csv. Where all volumes are in folders AD/ and NC/ (or in those of
    train/ and test/), so are the slices.

    Returns the table of extraction.csv. out/slices is moved into its place last, so
    that a folder of that name is always complete.
    """
    from tqdm import tqdm

    out = Path(out)
    classes = _in_classes(table).all()

    def work(row):
        try:
            slices, numbers, facts = extract_volume(row.source, look)
        except Unfit as problem:  # no other InputError: a package that is missing is missing for all
            return {"error": str(problem)}
        except OSError as problem:
            return {"error": f"cannot be read: {reason(problem)}"}
        except MemoryError:
            raise OSError(f"memory ran out at {row.source}; take a larger --spacing, fewer volumes at once (--workers "
                          "of extract.py), or a larger machine") from None
        folder = Path(draft, "slices", row.folder if classes else "")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for number, pixels in zip(numbers, slices):
                Image.fromarray(pixels).save(folder / f"{row.scan}_{number}.png")
        except OSError as problem:
            raise OSError(f"{out / 'slices'} cannot be written: {reason(problem)}; nothing is left there") from None
        return facts

    # filters of warnings are those of the process: around the pool; deepbet uses every core by itself
    with (tempfile.TemporaryDirectory(prefix=DRAFT, dir=out, ignore_cleanup_errors=True) as draft,
          warnings.catch_warnings(),
          Threads(1 if look.strip else workers or min(os.cpu_count() or 1, 8)) as pool):
        warnings.filterwarnings("ignore", module="nibabel|torch")  # repaired headers; deepbet's weights
        Path(draft, "slices").mkdir()
        done = pool.map(work, table.itertuples(index=False))
        rows = list(tqdm(done, bar, len(table), unit=" volumes", disable=None if bar else True, leave=False))
        table = table.join(pd.DataFrame(rows, index=table.index)).reindex(columns=COLUMNS)
        write_csv(out / "extraction.csv", table.astype({name: "Int64" for name in COLUMNS if "_slice" in name}))
        write_json(out / "extraction.json", asdict(look))
        if table.subject.notna().any():
            write_csv(out / "subjects.csv", table.loc[table.subject.notna(), ["scan", "subject"]])
        os.replace(Path(draft, "slices"), out / "slices")
    return table


def remarks(table, found, inputs, tables):
    """Lines on a table of `extract`, made of that of `find_all`: what was passed over in the inputs, beside the
    `tables` of subjects that were read, and what had to be decided about volumes."""
    used = [file for source in table.source for file in readers.files_of(source)] + tables
    lines = [line for given in inputs if os.path.isdir(given) for line in passed_over(given, used)]
    twins = found[found.name.duplicated(keep=False)].sort_values("name", kind="stable")
    if len(twins):
        one, other = twins.scan[:2]
        lines.append(f"{len(twins)} volumes have the name of another, such as {twins.source.iloc[0]} and "
                     f"{twins.source.iloc[1]}; each is taken for a scan of its own, {one} and {other}")
    return lines + [f"{row.source}: {row.notes}" for row in table[table.notes.notna()].itertuples()]


class CutInputs:
    """The inputs of predict.py, the volumes among them cut into a folder of slices: `inputs` has that folder in their
    place, `lines` say how they were cut, `failed` why others were not, by their path. The folder is temporary, or
    --keep-slices, which must be empty, and is for this process alone as long as the ExitStack `held` is open."""

    def __init__(self, args, checkpoint, held):
        volumes = [given for given in args.inputs if readers.holds_volumes(given)]
        self.inputs, self.lines = [given for given in args.inputs if given not in volumes], []
        self.temporary, self.failed, self.warnings = None, {}, []
        self.table = pd.DataFrame(columns=COLUMNS)
        if not volumes:
            if args.keep_slices or flags_given(args):
                raise InputError("--keep-slices and the flags on how volumes are cut need a volume among the inputs, "
                                 "or a folder of volumes without slices beside them")
            return
        look, known, self.warnings = look_of(checkpoint, args)
        if not args.keep_slices:
            self.temporary = tempfile.TemporaryDirectory(prefix="slices-")
            held.enter_context(self.temporary)
        folder = held.enter_context(own_folder(args.keep_slices or self.temporary.name, None, " or --keep-slices"))
        found, tables = find_all(volumes), []
        self.warnings += filter(None, [describe_mixed(found)])
        try:
            found, tables, lines = tabled_subjects(found, volumes)
            self.warnings += lines
        except InputError as problem:  # a prediction goes on
            self.warnings.append(f"subjects are not known: {problem}")
        self.table, self.folder = extract(found, look, folder), folder / "slices"
        self.warnings += remarks(self.table, found, volumes, tables)
        bad = self.table[self.table.error.notna()]
        if len(bad) == len(self.table) and not self.inputs:
            clear_folder(folder)  # so that the corrected command can be given
            raise InputError("; ".join(f"{row.source} {row.error}" for row in bad.itertuples()))
        parts = [self.folder / name for name in ("train", "test") if (self.folder / name).is_dir()]
        self.inputs += map(str, parts or [self.folder] * (len(bad) < len(self.table)))
        self.failed = dict(zip(bad.source, bad.error))
        self.lines = [f"{len(self.table) - len(bad)} of {len(self.table)} volumes cut: {look} ({known})"]

    def finish(self, index):
        """Once its slices are decoded: the temporary folder is removed, and each row of `index` gets the path of its
        volume with the number of the slice, as in head.nii.gz:81."""
        if self.temporary:
            self.temporary.cleanup()
            ours = index.path.str.startswith(f"{self.folder}{os.sep}")
            source = index.scan.map(dict(zip(self.table.scan, self.table.source)))
            index["path"] = index.path.mask(ours, source + ":" + index.slice.astype("string"))
