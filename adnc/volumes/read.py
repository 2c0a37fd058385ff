"""Read volumes (NIfTI, MGZ, Analyze, or a DICOM folder) as arrays with a place in the world.

nibabel is needed; dcm2niix for DICOM, deepbet for --strip (requirements-extra.txt); each is
imported when it is used. A header is checked before a voxel is read.
"""

import gzip
import io
import os
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

import numpy as np

from adnc import CLASSES
from adnc.data.index import list_folder
from adnc.data.pixels import EXTENSIONS as IMAGES
from adnc.data.pixels import Unfit, is_junk
from adnc.errors import InputError, is_system_limit, printable

INSTALL = "python -m pip install -r requirements-extra.txt"
EXTENSIONS = (".nii", ".nii.gz", ".mgz", ".mgh", ".img", ".img.gz", ".hdr", ".hdr.gz")
MIN_SIDE, MAX_SIDE = 8, 1024  # voxels
MAX_VOXELS = 2**28  # 1 GB as float32
MIN_ORTHOGONALITY = 0.1  # see `orthogonality`
MIN_FIELD, MAX_FIELD = 30, 1000  # mm: beyond these it is no head, or not in millimetres

# ---------------------------------------------------------------- files


def is_volume(path):
    return str(path).lower().endswith(EXTENSIONS)


def is_dicom(path):
    """Whether a file begins as DICOM does: "DICM" after 128 bytes, or, without that preamble, an
    element of group 2 or 8 with its type of two letters, or with its length in four bytes."""
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            start = file.read(132)
    except PermissionError:  # reading it as what it is will say so
        return False
    if start[128:] == b"DICM":
        return True
    group, element, kind, length = start[:2], start[2:4], start[4:6], start[4:8]
    if group not in (b"\2\0", b"\10\0") or element[1:] != b"\0":
        return False
    return kind in (b"UL", b"UI", b"CS", b"SH", b"LO", b"OB", b"DA") or length[1:] == b"\0\0\0"


def find_volumes(given):
    """A list of (path, folder relative to `given`) of the volumes in a file or folder.

    A folder that holds DICOM files and no volume counts as one volume. Of an Analyze pair (.img,
    .hdr) only the .img is listed. Links are followed. InputError for a single DICOM file, OSError
    for a folder that cannot be read.
    """
    if not os.path.isdir(given):
        if is_dicom(given):
            folder = os.path.dirname(os.path.abspath(given))
            raise InputError(
                f"{given} is one file of a DICOM series; give the folder that holds the whole "
                f"series and no other: {folder}"
            )
        return [(image_of(str(given)), "")] if is_volume(given) else []
    volumes, seen = [], set()
    for folder, folders, names in os.walk(given, followlinks=True, onerror=fail):
        if os.path.realpath(folder) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if not is_junk(name))
        names = sorted(name for name in names if not is_junk(name))
        place = os.path.relpath(folder, given)
        paths = {name: os.path.join(folder, name) for name in names}
        # Some scanners name DICOM files .img.
        here = [name for name in names if is_volume(name) and not is_dicom(paths[name])]
        headers = {header_of(name) for name in here if header_of(name) != name}
        volumes += [(paths[name], place) for name in here if name not in headers]
        others = [path for path in paths.values() if not path.lower().endswith(IMAGES)]
        if not here and any(map(is_dicom, others)):
            volumes.append((folder, place))
    return volumes


def fail(problem):
    raise problem


def header_of(path):
    """The name of the .hdr of an .img; of another file its own name."""
    return re.sub(r"\.img(\.gz)?$", r".hdr\1", str(path), flags=re.IGNORECASE)


def image_of(path):
    """The .img of a .hdr, if it is beside it; of another file its own name."""
    for extension in ("img", "IMG"):
        image = re.sub(r"\.hdr(\.gz)?$", rf".{extension}\1", path, flags=re.IGNORECASE)
        if os.path.isfile(image):
            return image
    return path


def files_of(source):
    """The files of a volume: itself and the header of a pair, or the DICOM files of a folder."""
    if os.path.isdir(source):
        paths = [os.path.join(source, name) for name in os.listdir(source)]
        return [path for path in paths if is_dicom(path)]
    return [source, header_of(source)]


def holds_volumes(given):
    """Whether an input is a volume, DICOM, or a folder of volumes without slices. InputError for a
    folder of DICOM with pictures beside it, which may be slices or previews."""
    if not os.path.isdir(given):
        return is_volume(given) or is_dicom(given)
    folders = [Path(given, label) for label in CLASSES if Path(given, label).is_dir()]
    if not folders:
        folders = [given]
    for folder in folders:
        images, _ = list_folder(folder)
        if images and any(place == "." for _, place in find_volumes(folder)):
            raise InputError(
                f"{folder} holds {len(images)} pictures beside volumes or DICOM; give those that "
                "are meant in a folder of their own"
            )
        if images:
            return False
    return bool(find_volumes(given))


# ---------------------------------------------------------------- optional packages


@lru_cache
def import_nibabel():
    try:
        import nibabel
        import nibabel.processing
    except ImportError:
        install = INSTALL.replace("-extra", "")
        raise InputError(f"volumes need nibabel; install it with {install}") from None
    nibabel.imageglobals.logger.disabled = True  # repairs of headers are checked below
    return nibabel


@lru_cache
def load_deepbet():
    try:
        from deepbet.bet import BrainExtraction
    except ImportError:
        raise InputError(f"--strip needs deepbet; install it with {INSTALL}") from None
    return BrainExtraction(no_gpu=True)


def is_negative(path):
    """Whether a DICOM file says MONOCHROME1: 0 is white."""
    with open(path, "rb") as file:
        header, _, _ = file.read(2**20).partition(b"\xe0\x7f\x10\0")  # the element of pixels
    return b"MONOCHROME1" in header


def convert_dicom(folder, out):
    """Convert a DICOM folder with dcm2niix; returns the path of the NIfTI file in the folder `out`.

    Unfit if dcm2niix makes no volume, or several, or if 0 is white.
    """
    if any(is_negative(path) for path in files_of(folder)):
        raise Unfit(  # dcm2niix does not invert them
            "holds DICOM in which 0 is white (MONOCHROME1), and would be read as its negative; "
            "save it as MONOCHROME2"
        )
    try:
        from dcm2niix import bin as program
    except ImportError:
        program = shutil.which("dcm2niix")
    if not program:
        raise InputError(f"DICOM folders need dcm2niix; install it with {INSTALL}")
    # No BIDS sidecar, no compression, no search in subfolders.
    options = ["-b", "n", "-z", "n", "-d", "0", "-f", "series%s", "-o", str(out)]
    command = [program, *options, os.path.abspath(folder)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")

    # With distances that vary, it may add a second version of a series.
    volumes = sorted(path for path in Path(out).glob("*.nii") if "_Eq" not in path.name)
    if len(volumes) > 1:
        names = ", ".join(path.stem for path in volumes[:5])
        raise Unfit(
            f"holds {len(volumes)} series ({names}); expected one: leave one in the folder, or "
            "convert it with dcm2niix and name a file"
        )
    # If images are missing, dcm2niix makes a volume with wrong distances, and its status is 1.
    if done.returncode or not volumes:
        output = done.stdout.splitlines() + done.stderr.splitlines()
        # dcm2niix warns of much that is harmless: lines that name what is wrong come first.
        words = ("not large enough", "missing", "varies", "only able", "error", "warning")
        problems = [line.strip() for word in words for line in output if word in line.lower()]
        problems.append("it finds no images; the files may be damaged or lack their preamble")
        raise Unfit(f"cannot be converted by dcm2niix: {problems[0]}")
    return volumes[0]


# ---------------------------------------------------------------- a file to an array


def reason(problem):
    """The text of an exception of a library, as the end of a sentence."""
    text = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
    return printable(text.splitlines()[0][:200])


def open_stream(path):
    """A file opened for reading, decompressed if it holds gzip data, whatever its name."""
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else open(path, "rb")


def load_image(path):
    """(nibabel image, sentences on what was wrong with its header and how it was read)."""
    nib = import_nibabel()
    with open_stream(header_of(path)) as stream:
        start = stream.read(540)
    for klass in (nib.Nifti1Pair, nib.Nifti2Pair):
        if not klass.header_class.may_contain_header(start):
            continue
        # The header of a single file (.nii) is given to nibabel as that of a pair, since in a pair
        # it may differ from the one in the file.
        header = klass.header_class(start[: klass.header_class.template_dtype.itemsize])
        notes = repair_transforms(header)
        if header["magic"] == header.single_magic and header["vox_offset"] < header.sizeof_hdr:
            header["vox_offset"] = header.sizeof_hdr + 4
            notes.append("its header gives no place of the voxels; they were read from behind it")
        files = {"header": io.BytesIO(header.binaryblock), "image": open_stream(path)}
        return klass.from_file_map(klass.make_file_map(files), mmap=False), notes
    if path.lower().endswith((".mgh", ".mgz")):
        image = nib.MGHImage.from_stream(open_stream(path))
        if start[28:30] == bytes(2):  # the flag goodRASFlag: nibabel then takes its own default
            raise Unfit("does not say where left, front and top are (goodRASFlag is 0)")
        return image, []
    return nib.load(path, mmap=False, keep_file_open=True), []


ROUNDING = 0.01  # of the squared length of a quaternion that is written with two decimals


def repair_transforms(header):
    """Repair the affines of a NIfTI header in place; returns sentences on what was done.

    A quaternion longer than 1 by rounding is normalised. Of sform and qform, one that cannot be
    used beside one that can is switched off.
    """

    def usable(form):
        try:
            affine, code = getattr(header, f"get_{form}")(coded=True)
            return code > 0 and has_inverse(affine)
        except Exception:  # nibabel raises several kinds on a quaternion that is none
            return False

    notes = []
    names = ("quatern_b", "quatern_c", "quatern_d")
    squared = sum(float(header[name]) ** 2 for name in names)
    if 1 < squared <= 1 + ROUNDING:
        for name in names:
            header[name] = float(header[name]) / squared**0.5
        if not usable("sform") and squared > 1 + 1e-6:  # beyond the precision of float32
            length = squared**0.5
            notes.append(f"its quaternion is rounded (length {length:.6g}) and was normalised")
    for form, other in (("sform", "qform"), ("qform", "sform")):
        if header[f"{form}_code"] > 0 and not usable(form) and usable(other):
            header[f"{form}_code"] = 0
            notes.append(f"its {form} is no invertible affine; the {other} was used")
    return notes


def orthogonality(affine):
    """The volume of a voxel over the product of its sides: 1 for a box, 0 for a flat one or for an
    affine (4, 4) that is not finite."""
    voxels = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or not voxels.all():
        return 0.0
    return float(np.abs(np.linalg.det(affine[:3, :3] / voxels)))


def has_inverse(affine):
    """Whether an affine (4, 4) is finite and not flat."""
    return orthogonality(affine) > MIN_ORTHOGONALITY


def open_volume(path):
    """Open a volume and check its header; its voxels are not yet read.

    Returns (image, record, notes): the nibabel image, a dict of what the header says (columns of
    extraction.csv), and sentences on what had to be decided. Unfit if the volume cannot be used.
    """
    nib = import_nibabel()
    if not os.path.isfile(path):
        raise Unfit("is not a file" if os.path.exists(path) else "does not exist")
    try:
        image, repairs = load_image(str(path))
        shape = tuple(int(side) for side in image.shape)
        affine, dtype = image.affine, image.get_data_dtype()
        with np.errstate(all="ignore"):
            voxels = nib.affines.voxel_sizes(affine)
            right_angles = orthogonality(affine) > 0.999
    except Exception as problem:  # nibabel raises nearly anything on a damaged header
        if is_system_limit(problem):
            raise
        raise Unfit(f"cannot be read as a volume: {reason(problem)}") from None

    if len(shape) < 3:
        raise Unfit(f"holds {len(shape)} dimensions; expected one volume of three dimensions")
    if any(side != 1 for side in shape[3:]):
        n_volumes = "x".join(map(str, shape[3:]))
        raise Unfit(
            f"holds {n_volumes} volumes; expected one volume of three dimensions: save one of them "
            "as a file of its own"
        )
    in_limits = MIN_SIDE <= min(shape[:3]) and max(shape[:3]) <= MAX_SIDE
    if not in_limits or np.prod(shape[:3], dtype=float) > MAX_VOXELS:
        raise Unfit(
            f"claims {' x '.join(map(str, shape[:3]))} voxels; expected {MIN_SIDE} to {MAX_SIDE} a "
            f"side and at most {MAX_VOXELS:,}"
        )
    if dtype.fields:
        raise Unfit("has voxels in colour; expected one real number per voxel")
    if dtype.kind == "c":
        raise Unfit("has voxels that are complex; expected one real number per voxel")
    if dtype.kind not in "iufb":
        raise Unfit(f"has voxels of type {dtype}; expected one real number per voxel")
    if not has_inverse(affine):
        raise Unfit(
            "has an affine that cannot be inverted, so its voxels have no place; fix its header"
        )
    field = voxels * shape[:3]
    if not (MIN_FIELD <= field.min() and field.max() <= MAX_FIELD):
        sides = " x ".join(f"{side:.3g}" for side in field)
        raise Unfit(
            f"measures {sides} mm; expected sides of {MIN_FIELD} to {MAX_FIELD} mm: is its header "
            "in another unit?"
        )

    notes = repairs
    if not right_angles:
        notes.append("its axes are not at right angles; it is resampled as its affine says")
    source, doubts = affine_source(image)
    record = {
        "shape": "x".join(map(str, shape)),
        "voxel_sizes": "x".join(f"{side:.4g}" for side in voxels),
        "orientation": "".join(nib.aff2axcodes(affine)),
        "oriented_to": "RAS",
        "affine_from": source,
        "affine": " ".join(f"{number:.7g}" for number in affine[:3].ravel()),
    }
    return image, record, [*notes, *doubts]


ASSUMED = "assumed"  # the affine of a file that does not say where left is


def affine_source(image):
    """(part of the header that the affine of an image comes from, sentences on doubts about it)."""
    header = image.header
    guess = "left and right are nibabel's guess (stored from right to left)"
    if isinstance(image, import_nibabel().MGHImage):
        return "header", []
    if not hasattr(header, "get_sform"):
        return ASSUMED, [f"Analyze files do not say where left is: {guess}"]
    sform, sform_code = header.get_sform(coded=True)
    qform_code = header["qform_code"]
    if not sform_code and qform_code <= 0:
        return ASSUMED, [f"neither sform nor qform is set: {guess}"]
    if not sform_code:
        return "qform", []
    if qform_code > 0:
        ends = [(0, side - 1) for side in image.shape[:3]]
        corners = np.array(np.meshgrid(*ends, [1])).reshape(4, -1)
        distances = np.sqrt((((sform - header.get_qform()) @ corners)[:3] ** 2).sum(0))
        apart = float(distances.max())
        if not apart <= 1:
            doubt = f"sform and qform disagree by up to {apart:.3g} mm; the sform was used"
            return "sform", [doubt]
    return "sform", []


def read_volume(image):
    """Read the voxels of an opened volume: (float32 array, affine), with axes nearest to x, y, z.

    Unfit for a damaged file.
    """
    nib = import_nibabel()
    try:
        voxels = np.asarray(image.dataobj, dtype=np.float32).reshape(image.shape[:3])
        stream = image.file_map["image"].fileobj
        if isinstance(stream, gzip.GzipFile):  # which checks its sum at the end
            while stream.read(2**20):
                pass
    except Exception as problem:  # of nibabel, gzip or zlib, on a damaged file
        if is_system_limit(problem):
            raise
        raise Unfit(f"cannot be read as a volume: {reason(problem)}") from None
    canonical = nib.as_closest_canonical(nib.Nifti1Image(voxels, image.affine))
    return np.asarray(canonical.dataobj, dtype=np.float32), canonical.affine


def smooth_fine_axes(volume, affine, spacing):
    """The volume, smoothed against aliasing along axes whose voxels are half of `spacing` (mm) or
    less, by a Gaussian as wide as `spacing` at half its height."""
    nib = import_nibabel()
    fine = nib.affines.voxel_sizes(affine) <= spacing / 2
    if not fine.any():
        return volume
    image = nib.Nifti1Image(volume, affine)
    smooth = nib.processing.smooth_image(image, np.where(fine, spacing, 0))
    return np.asarray(smooth.dataobj, dtype=np.float32)


def strip_skull(volume, affine):
    """The volume with everything but the brain at 0, by deepbet on the CPU.

    Fisch et al. 2024, doi 10.1016/j.compbiomed.2024.108845. Unfit if deepbet finds no brain.
    """
    model = load_deepbet()
    image = import_nibabel().Nifti1Image(np.ascontiguousarray(volume), affine)
    no_brain = "cannot be stripped: deepbet finds no brain in it"
    try:
        with np.errstate(all="ignore"):
            mask = model.run(image)[1]
    except (AssertionError, ValueError, RuntimeError, IndexError) as problem:
        raise Unfit(f"{no_brain} ({reason(problem)})") from None
    mask = np.asarray(mask.dataobj) > 0
    if not mask.any():
        raise Unfit(no_brain)
    return np.where(mask, volume, np.float32(0))
