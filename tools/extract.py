"""Cut volumes into slices: NIfTI, MGZ, Analyze pairs, or a DICOM folder.

    python extract.py scan.nii.gz --plane axial --count 32 --out slices     # the 32 slices in the middle of the head
    python extract.py VOLUMES --like ADNI --strip --out SET                 # as AD_NC has them, without the skull
    python extract.py scan.nii.gz --like runs/tiny/best_model.pth           # as that model was trained on them

INPUT is a volume, a DICOM folder of one series, or a folder of such. Written to --out: slices/<scan>_<slice>.png (in
AD/ and NC/, where the volumes are), extraction.csv (a row a volume: where it lies, which slices, what was decided, why
it was skipped), extraction.json (these flags; train.py keeps them with the model), and where a table beside the volumes
or BIDS names know them subjects.csv. Left is on the left, a sagittal slice looks to the left. The exit status is 2 if
no volume could be cut.
"""

import sys
from dataclasses import replace
from datetime import datetime

from adnc.cli import InputError, Parser, add_volume_flags, number, printable, read_flags, run_script


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="a volume, a DICOM folder, or a folder of such")
    parser.add_argument("--out", metavar="DIR", help="folder for the slices (default: extracted/<time>)")
    parser.add_argument("--like", metavar="WHAT", help="ADNI, or the checkpoint of a run; flags that are given win")
    parser.add_argument("--workers", type=number(1, 64, int), metavar="N", help="volumes at once (one a core, up to 8)")
    add_volume_flags(parser)
    args = parser.parse_args(argv)
    if args.strip and args.workers:
        parser.error("--workers does not go with --strip, which takes one volume after the other with all cores")
    return args


if __name__ == "__main__":
    ARGS = read_flags(parse_args)

from adnc.volumes import cut as volumes
from adnc.files import clear_folder, own_folder
from adnc.data.pixels import load_slices, out_of_range


def main(args):
    checkpoint, warnings = None, []
    if args.like and args.like != "ADNI":
        from utils import load_checkpoint  # PyTorch: seconds that other volumes need not wait

        checkpoint = load_checkpoint(args.like)
        look, known, warnings = volumes.look_of(checkpoint, args)
    else:
        look, known = replace(volumes.ADNI if args.like else volumes.Look(), **volumes.flags_given(args)), args.like
    found = volumes.find_all(args.inputs)
    mixed = volumes.describe_mixed(found)
    if mixed:
        raise InputError(f"{mixed}; move these away or rename their folders, or give each folder of volumes by itself")
    print(f"{look}" + f" ({known})" * bool(known))
    with own_folder(args.out, f"extracted/{datetime.now():%Y%m%d-%H%M%S}") as out:
        cut(found, look, out, args, checkpoint, warnings)


def cut(found, look, out, args, checkpoint, warnings):
    """Cut the volumes into the folder `out`, and print what came of it."""
    found, tables, lines = volumes.tabled_subjects(found, args.inputs)
    table = volumes.extract(found, look, out, args.workers)
    warnings += lines + volumes.remarks(table, found, args.inputs, tables)
    bad = table[table.error.notna()]
    all_bad = len(bad) == len(table)
    warnings += [f"{row.source} {row.error}" for row in bad.head(len(bad) if all_bad else 10).itertuples()]
    if len(bad) and not all_bad:
        warnings.append(f"{len(bad)} of {len(table)} volumes were skipped (column error of extraction.csv)")
    for warning in warnings:
        print(f"warning: {printable(warning, '')}", file=sys.stderr)
    if all_bad:
        clear_folder(out)  # so that the corrected command can be given
        raise InputError(f"none of the {len(table)} volumes could be cut, and nothing is left in {out}")
    if checkpoint:  # do the slices resemble those that it was trained on?
        paths = sorted(map(str, (out / "slices").rglob("*.png")))
        _, stats, _ = load_slices(paths, checkpoint["slice_size"], "comparing")
        strange = out_of_range(stats, checkpoint["slice_stats"]).dropna()
        print(f"all {len(paths)} slices are within the range of the training slices" if strange.empty else
              f"{len(strange)} of {len(paths)} slices are out of the training range, first {paths[strange.index[0]]}: "
              f"{strange.iloc[0]}")
    print(f"{table.n_slices.sum():,.0f} slices of {len(table) - len(bad)} volumes in {out / 'slices'}")


if __name__ == "__main__":
    run_script(main, ARGS)
