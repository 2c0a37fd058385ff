"""Cut volumes into slices: NIfTI, MGZ, Analyze pairs, or a DICOM folder.

    python -m tools.extract scan.nii.gz --plane axial --count 32 --out slices
    python -m tools.extract VOLUMES --like ADNI --strip --out SET   # as in AD_NC, without skull
    python -m tools.extract scan.nii.gz --like runs/tiny/best_model.pth --out slices

INPUT is a volume, a DICOM folder of one series, or a folder of volumes. Written to --out:

    slices/<scan>_<slice>.png   in AD/ and NC/ (of train/ and test/) if the volumes are
    extraction.csv              a row per volume: header, slices, decisions, why it was skipped
    subjects.csv                if a table beside the volumes or BIDS names know the subjects
    extraction.json             these flags, which train.py keeps with the model; written last

A killed extraction leaves an incomplete folder without extraction.json: delete it, or train on it
at your own risk. Left is on the left, and a sagittal face looks to the left. The exit status is 2
if no volume could be cut.
"""

import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from adnc.cli import Parser, number, run_script
from adnc.data.pixels import load_slices, out_of_range
from adnc.errors import InputError, printable
from adnc.files import new_folder, require_new, unused_name
from adnc.volumes import cut
from adnc.volumes.look import ADNI, Look, add_look_flags, given_look_flags
from utils import load_checkpoint


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="a volume, a DICOM folder, or a folder of them")
    add("--out", metavar="DIR", help="new folder for the slices (default: extracted/<time>)")
    add("--like", metavar="WHAT", help="ADNI, or the checkpoint of a run; flags that are given win")
    add(
        "--workers", type=number(1, 64, int), metavar="N",
        help="volumes at once (one a core, at most 8; always 1 with --strip)",
    )  # fmt: skip
    add_look_flags(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out = args.out or unused_name(f"extracted/{datetime.now():%Y%m%d-%H%M%S}")
    require_new(out)

    flags = given_look_flags(args)
    checkpoint, warnings = None, []
    if args.like is None:
        look = replace(Look(), **flags)
        print(look)
    elif args.like == "ADNI":
        look = replace(ADNI, **flags)
        print(f"{look} (ADNI)")
    else:
        path = Path(args.like)
        if path.is_dir():  # a run
            path = path / "best_model.pth"
        checkpoint = load_checkpoint(path)
        look, origin, warnings = cut.look_of(checkpoint, flags)
        print(f"{look} ({origin})")

    volumes = cut.find_all(args.inputs)
    mixed = cut.describe_mixed(volumes)
    if mixed:
        raise InputError(
            f"{mixed}; move these away or rename their folders, or extract each folder by itself"
        )
    volumes, tables, lines = cut.add_table_subjects(volumes, args.inputs)

    out = new_folder(out)
    table = cut.extract(volumes, look, out, args.workers)

    bad = table[table.error.notna()]
    warnings += lines + cut.remarks(table, volumes, args.inputs, tables)
    warnings += [f"{row.source} {row.error}" for row in bad.head(10).itertuples()]
    if len(bad):
        warnings.append(
            f"{len(bad)} of {len(table)} volumes were skipped (column error of "
            f"{out / 'extraction.csv'})"
        )
    for warning in warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    if len(bad) == len(table):
        raise InputError(f"none of the {len(table)} volumes could be cut")

    if checkpoint is not None:
        print(compare_with_training(out, checkpoint))
    n_slices = table.n_slices.sum()
    print(f"{n_slices:,.0f} slices of {len(table) - len(bad)} volumes in {out / 'slices'}")


def compare_with_training(out, checkpoint):
    """A sentence on whether the slices are in the range of a checkpoint's training slices."""
    paths = sorted(map(str, (out / "slices").rglob("*.png")))
    _, stats, _ = load_slices(paths, checkpoint["slice_size"], "comparing")
    outside = out_of_range(stats, checkpoint["slice_stats"]).dropna()
    if outside.empty:
        return f"all {len(paths)} slices are in the range of the training slices"
    return (
        f"{len(outside)} of {len(paths)} slices are out of the training range, first "
        f"{paths[outside.index[0]]}: {outside.iloc[0]}"
    )


if __name__ == "__main__":
    run_script(main)
