"""From the file of a volume (NIfTI, MGZ, Analyze, or a DICOM folder) to an array whose place in the world is known.

Not run by itself; volumes.py makes slices of it. nibabel is needed, for DICOM dcm2niix, for --strip deepbet
(requirements-volumes.txt); none is imported before it is needed. A header is judged before a voxel is read.
"""

import contextlib
import os
import re
import shutil
import stat
import subprocess
from functools import lru_cache
from pathlib import Path

import numpy as np

from adnc.data.pixels import Unfit, is_junk, list_folder
from adnc.cli import InputError, printable

INSTALL = "python -m pip install -r requirements-volumes.txt"
EXTENSIONS = (".nii", ".nii.gz", ".mgz", ".mgh", ".img", ".img.gz", ".hdr", ".hdr.gz")
FEWEST, MOST = 8, 1024  # voxels a side
MOST_VOXELS = 2**28  # as float32 1 GB
SLAB = 2**22  # voxels read at once
FIELD = 30, 1000  # mm a side: what is outside is no head, or not in millimetres

# ---------------------------------------------------------------- files


def is_volume(path):
    return str(path).lower().endswith(EXTENSIONS)


def _is_dicom(path):
    with contextlib.suppress(OSError):
        if os.path.isfile(path):  # a pipe would wait for ever
            with open(path, "rb") as file:
                return file.read(132)[128:] == b"DICM"
    return False


def find_volumes(given):
    """[(path, folder relative to `given`)] of the volumes in a file or folder; a folder that holds DICOM files and no
    volume counts as one. Empty where there is none; OSError where a folder cannot be listed."""
    if not os.path.isdir(given):
        return [(str(given), "")] if is_volume(given) else []
    def fail(problem):
        raise problem

    found = []
    for folder, folders, names in os.walk(given, onerror=fail):
        folders[:] = sorted(name for name in folders if not is_junk(name))
        names = sorted(name for name in names if not is_junk(name))
        volumes = [name for name in names if is_volume(name)]
        pairs = {re.sub(r"\.img(\.gz)?$", "", name.lower()) for name in volumes}
        volumes = [name for name in volumes if not (name.lower().endswith((".hdr", ".hdr.gz"))
                                                    and re.sub(r"\.hdr(\.gz)?$", "", name.lower()) in pairs)]
        place = os.path.relpath(folder, given)
        found += [(os.path.join(folder, name), place) for name in volumes]
        if not volumes and any(_is_dicom(os.path.join(folder, name)) for name in names[:50]):
            found.append((folder, place))
    return found


def files_of(source):
    """The files that a volume consists of: itself, the other half of a pair, or the DICOM files of a folder."""
    if os.path.isdir(source):
        return list(filter(_is_dicom, (os.path.join(source, name) for name in os.listdir(source))))
    return [source, re.sub(r"\.img(\.gz)?$", r".hdr\1", source, flags=re.I)]


def holds_volumes(given):
    """Whether an INPUT of predict.py is a volume, a DICOM folder, or a folder of volumes without slices."""
    if not os.path.isdir(given):
        return is_volume(given)
    with contextlib.suppress(OSError):
        labelled = [Path(given, label) for label in ("AD", "NC") if Path(given, label).is_dir()]
        return not any(list_folder(folder)[0] for folder in labelled or [given]) and bool(find_volumes(given))
    return False


@lru_cache
def nibabel():
    """The package, or an InputError that says how to install it."""
    try:
        import nibabel as package
    except ImportError:
        raise InputError(f"volumes need nibabel; install it with {INSTALL}") from None
    package.imageglobals.logger.disabled = True  # what it repairs in headers is judged below
    return package


def convert_dicom(folder, into):
    """The path of the NIfTI file that dcm2niix makes of a DICOM folder. Unfit if it makes none, or several."""
    try:
        from dcm2niix import bin as program
    except ImportError:
        program = shutil.which("dcm2niix")
    if not program:
        raise InputError(f"DICOM folders need dcm2niix; install it with {INSTALL}")
    command = [program, "-b", "n", "-z", "n", "-d", "0", "-f", "series%s", "-o", str(into), os.path.abspath(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=600)
    except subprocess.TimeoutExpired:
        raise Unfit("keeps dcm2niix busy for more than ten minutes; convert it by hand") from None
    made = sorted(Path(into).glob("*.nii"))
    said = done.stdout.splitlines() + done.stderr.splitlines()
    said = [line for word in ("enough", "issing", "rror", "arning") for line in said if word in line]
    if not made or done.returncode:  # where images are missing it makes a volume of wrong distances, with status 1
        raise Unfit(f"cannot be converted by dcm2niix: {(said or ['it makes no volume'])[0].strip()}")
    if len(made) > 1:
        raise Unfit(f"holds {len(made)} series ({', '.join(path.stem for path in made[:5])}); expected one: leave one "
                    "in the folder, or convert it with dcm2niix and name a file")
    return made[0]


# ---------------------------------------------------------------- a file to an array


def open_volume(path):
    """(image, facts, notes): a volume of nibabel whose header is sound and whose voxels are not yet read, a dict of
    what the header says, and sentences on what had to be decided. Unfit or OSError for anything else."""
    nib, notes = nibabel(), []
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for ever
        raise Unfit("is not a regular file")
    try:
        image = nib.load(path, mmap=False, keep_file_open=True)
        shape, affine, dtype = tuple(map(int, image.shape)), image.affine, image.get_data_dtype()
        with np.errstate(all="ignore"):
            voxels = nib.affines.voxel_sizes(affine)
            angles = np.abs(np.linalg.det(affine[:3, :3] / voxels)) if voxels.all() else 0.0
    except Exception as problem:  # nibabel raises nearly anything on a damaged header
        raise Unfit(f"cannot be read as a volume: {reason(problem)}") from None
    if len(shape) < 3 or any(side != 1 for side in shape[3:]):
        what = f"{'x'.join(map(str, shape[3:]))} volumes" if len(shape) > 3 else f"{len(shape)} dimensions"
        raise Unfit(f"holds {what}; expected one volume of three dimensions")
    if not FEWEST <= min(shape[:3]) <= max(shape[:3]) <= MOST or np.prod(shape[:3], dtype=float) > MOST_VOXELS:
        raise Unfit(f"claims {' x '.join(map(str, shape[:3]))} voxels; expected {FEWEST} to {MOST} a side and at most "
                    f"{MOST_VOXELS:,}")
    if dtype.fields or dtype.kind not in "iufb":
        kind = "in colour" if dtype.fields else "that are complex" if dtype.kind == "c" else f"of type {dtype}"
        raise Unfit(f"has voxels {kind}; expected one real number a voxel")
    if not (np.isfinite(affine).all() and angles > 0.1):
        raise Unfit("has an affine that cannot be inverted, so that its voxels have no place; fix its header")
    field = voxels * shape[:3]
    if not (FIELD[0] <= field.min() and field.max() <= FIELD[1]):
        raise Unfit(f"is {' x '.join(f'{side:.3g}' for side in field)} mm large; expected {FIELD[0]} to {FIELD[1]} mm "
                    "a side, with the header in millimetres")
    if angles < 0.999:
        notes.append("its axes are not at right angles; resampled as its affine says")
    facts = {"shape": "x".join(map(str, shape)), "voxel_sizes": "x".join(f"{side:.4g}" for side in voxels),
             "orientation": "".join(nib.aff2axcodes(affine)), "oriented_to": "RAS",
             "affine_from": _affine_source(image, notes),
             "affine": " ".join(f"{number:.7g}" for number in affine[:3].ravel())}  # fmt: skip
    return image, facts, notes


def _affine_source(image, notes):
    """What in the header of an image its affine is from; appends to `notes` what is doubtful about it."""
    header, guess = image.header, "left and right are nibabel's guess (stored from right to left)"
    if isinstance(image, nibabel().MGHImage):
        return "header"
    if not hasattr(header, "get_sform"):
        notes.append(f"Analyze files do not say where left is: {guess}")
        return "assumed"
    (sform, by_sform), by_qform = header.get_sform(coded=True), header["qform_code"] > 0
    if by_sform and by_qform:
        corners = np.array(np.meshgrid(*[(0, side - 1) for side in image.shape[:3]], [1])).reshape(4, -1)
        try:
            apart = float(np.sqrt((((sform - header.get_qform()) @ corners)[:3] ** 2).sum(0)).max())
        except Exception:  # its quaternion is none
            apart = np.inf
        if not apart <= 1:
            notes.append(f"sform and qform disagree by up to {apart:.3g} mm; the sform was used")
    if not (by_sform or by_qform):
        notes.append(f"neither sform nor qform is set: {guess}")
        return "assumed"
    return "sform" if by_sform else "qform"


def reason(problem):
    """What an exception of a library says, as the end of a sentence."""
    text = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
    return printable(re.split(r"\n", text)[0][:200], "")


def _blocks(n, k, flipped):
    """First voxels of blocks of k along an axis of n voxels. A shorter block is the last one in the direction of the
    world axis, so that a volume and its mirrored storage have the same blocks."""
    starts = np.arange(0, n, k)
    return np.maximum(n - k - starts, 0)[::-1] if flipped else starts


def read_volume(image, spacing):
    """(float32 array, affine) of an opened volume, its axes nearest to x, y and z. Voxels of half of `spacing` (mm) or
    less are averaged in whole blocks as they are read, a slab at a time, so that a volume of fine voxels never lies in
    memory, and nothing aliases. Unfit for a file that is damaged."""
    nib = nibabel()
    affine, shape = image.affine, tuple(map(int, image.shape[:3]))
    k = np.clip(np.floor(spacing / nib.affines.voxel_sizes(affine) + 1e-3).astype(int), 1, shape)
    directions = nib.io_orientation(affine)[:, 1]
    starts = [_blocks(n, size, way < 0) for n, size, way in zip(shape, k, directions)]
    counts = [np.diff([*first, n]) for first, n in zip(starts, shape)]
    volume = np.empty([len(first) for first in starts], np.float32)
    most = max(1, int(SLAB // (shape[0] * shape[1] * k[2])))  # blocks at once
    for first in range(0, len(starts[2]), most):
        at, parts = (values[first : first + most] for values in (starts[2], counts[2]))
        place = slice(None), slice(None), slice(int(at[0]), int(at[0] + parts.sum())), *[0] * (len(image.shape) - 3)
        try:
            slab = np.asarray(image.dataobj[place])
        except Exception as problem:  # of nibabel, gzip or zlib, on a damaged file
            raise Unfit(f"cannot be read as a volume: {reason(problem)}") from None
        if (k > 1).any():
            for axis, begin in enumerate((starts[0], starts[1], at - at[0])):
                slab = np.add.reduceat(slab, begin, axis, dtype=np.float64)
            slab /= counts[0][:, None, None] * counts[1][:, None] * parts
        volume[:, :, first : first + most] = slab
    offset = [first[-1] - size * (len(first) - 1) + (size - 1) / 2 for first, size in zip(starts, k)]
    affine = affine @ np.block([[np.diag(k), np.array(offset)[:, None]], [np.zeros((1, 3)), 1]])
    image = nib.as_closest_canonical(nib.Nifti1Image(volume, affine))
    return np.asarray(image.dataobj), image.affine


@lru_cache
def _deepbet():
    try:
        from deepbet.bet import BrainExtraction
    except ImportError:
        raise InputError(f"--strip needs deepbet; install it with {INSTALL}") from None
    return BrainExtraction(no_gpu=True)


def strip_skull(volume, affine):
    """The volume with what is not brain at 0, by deepbet (Fisch et al. 2024, doi 10.1016/j.compbiomed.2024.108845), on
    the CPU. Unfit where it finds no brain, InputError where it is not installed."""
    model = _deepbet()
    try:
        with np.errstate(all="ignore"):
            mask = model.run(nibabel().Nifti1Image(np.ascontiguousarray(volume), affine))[1]
    except (AssertionError, ValueError, RuntimeError, IndexError) as problem:
        raise Unfit(f"cannot be stripped: deepbet finds no brain in it ({reason(problem)})") from None
    mask = np.asarray(mask.dataobj) > 0
    if not mask.any():
        raise Unfit("cannot be stripped: deepbet finds no brain in it")
    return np.where(mask, volume, np.float32(0))
