"""Predict slices, scans and subjects with a trained checkpoint.

    python predict.py ADNI/AD_NC/test --checkpoint runs/tiny/best_model.pth --out results
    python predict.py 218391_78.jpeg                   # one slice, with the newest run under runs/
    python predict.py SLICES --coverage 0.9            # AD, NC, or AD|NC where it is not sure enough
    python predict.py scan.nii.gz --plane sagittal     # a volume, cut as the training slices are
    python predict.py SLICES --explain auto            # and what in each slice speaks for it
    python predict.py SLICES --report report.html      # and a page to look at, with every slice

INPUT is a slice, a folder of slices, a folder with AD/ and NC/, a volume (NIfTI, MGZ, Analyze), a DICOM folder, or a
folder of volumes. The checkpoint alone decides the architecture, the image size and the classes, and how volumes are
cut, if it knows; where its slices have the size of AD_NC, that is assumed, else --plane is needed. Written to --out:
predictions.csv (a row a slice), scans.csv and subjects.csv (mean p_AD, the probability of AD, calibrated on the run's
validation), and where the labels are known metrics.json and pictures.
--coverage 0.9 adds prediction sets that promise to hold the truth for 90 % of scans like those of validation. A file
that cannot be read gets a row with the reason; the exit status is 2 if none could be. A slice that is out of the
training range (a photograph, an inverted picture, a head with its skull) gets a warning.
"""

import contextlib
import os
import sys
from datetime import datetime
from pathlib import Path

from adnc.cli import COUNT, InputError, Parser, add_volume_flags, number, printable, read_flags, run_script

METHODS = ("auto", "integrated-gradients", "occlusion", "grad-cam")  # of explain.py, not imported for --help


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="a slice, a volume, or a folder of such")
    parser.add_argument("--checkpoint", metavar="FILE", help="best_model.pth of a run (default: newest in runs/)")
    parser.add_argument("--out", metavar="DIR", help="folder for the results (default: predictions/<time>)")
    add = parser.add_argument_group("what is asked beside probabilities").add_argument
    add("--coverage", type=number(1e-6, 0.999999), metavar="C",
        help="scan-level prediction sets that hold the truth with this probability, e.g. 0.9")
    add("--explain", choices=METHODS, metavar="METHOD",
        help="what in each slice speaks for AD or NC, as pictures and arrays in --out/explanations; "
             f"{', '.join(METHODS)} (auto: the first that passes its check on this model)")
    add("--report", metavar="FILE",
        help="write a page (.html) for people: each scan with its slices, and what not to conclude")
    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=COUNT, metavar="N", help="slices at once (default: as in training)")
    add("--amp", choices=("auto", "fp16", "bf16", "off"), default="auto",
        help="precision; auto is fp16 on CUDA, bf16 on a CPU that has it (default: auto)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    add_volume_flags(parser, "the checkpoint's, or those of AD_NC").add_argument(
        "--keep-slices", metavar="DIR", help="keep the slices that volumes are cut into")
    args = parser.parse_args(argv)
    if args.out and args.keep_slices and os.path.abspath(args.out) == os.path.abspath(args.keep_slices):
        parser.error(f"--out and --keep-slices are both {args.out}; name two folders")
    return args


if __name__ == "__main__":
    ARGS = read_flags(parse_args)

from adnc.scoring.assess import format_assessment, statements, write_results
from utils import load_checkpoint
from dataset import load_inputs
from adnc.explain.attribution import Explainer
from adnc.files import own_folder
from adnc.cpu_engine import calibrated, most_coverage, predict_slices
from adnc.data.index import list_inputs
from adnc.scoring.metrics import aggregate, verdict
from modules import describe_model
from adnc.explain.report import Report, claimed, write_report
from adnc.distributed import Runtime, explain_end, pick_amp, pick_device
from adnc.volumes.cut import CutInputs


def newest_checkpoint():
    found = sorted(Path("runs").glob("*/best_model.pth"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError("there is no runs/*/best_model.pth; train a model with train.py or name one with --checkpoint")
    return found[-1]


def warn_of_rows(predictions, column, kind, what):
    """Warnings of the rows, of some kind, that have something in a column: the first ten, and how many there are."""
    rows = predictions[predictions[column].notna()]
    for row in rows.head(10).itertuples():
        text = "is out of the training range: " * (column == "out_of_range") + getattr(row, column)
        yield f"{row.path} {text}"
    if len(rows):
        yield f"{len(rows)} of {len(predictions)} {kind} {what} (column {column} of predictions.csv)"


def format_scans(scans):
    """A line for each of the first ten scans; where there is no verdict, p_AD means nothing."""
    for row in scans.head(10).itertuples():
        said = {"AD|NC": "AD|NC (uncertain)"}.get(verdict(row), verdict(row))
        said += f", p_AD {row.p_AD:.3f}, mean of" * (said != "no verdict") + ":" * (said == "no verdict")
        strange = f", {row.n_out_of_range} of them out of the training range" * (row.n_out_of_range > 0)
        yield printable(f"scan {row.scan}: {said} {row.n_slices} slice{'s' * (row.n_slices > 1)}{strange}", "")
    if len(scans) > 10:
        yield f"... and {len(scans) - 10} more scans"


def warn(predictions, checkpoint, coverage):
    """Warnings about predictions as `calibrated` gives them."""
    read = predictions[predictions.p_AD.notna()]
    if "calibration" not in checkpoint:
        yield "the run did not finish: its p_AD are not calibrated"
    elif coverage is not None and (most := most_coverage(checkpoint, coverage)) is not None:
        subjects = checkpoint["calibration"]["groups"]
        yield f"{subjects} validation subjects can promise a coverage of at most {most:.3f}: every set is AD|NC"
    if 0 < read.label.isna().sum() < len(read):
        yield f"{read.label.isna().sum()} of {len(read)} slices have no label: no scores are computed"
    yield from warn_of_rows(predictions, "error", "files", "could not be read")
    yield from warn_of_rows(read, "out_of_range", "slices", "are out of the training range, do not rely on their p_AD; "
                            "if they show skulls and training did not, strip volumes with --strip")
    seen, scans = read.scan[read.exposure == "yes"].nunique(), read.scan.nunique()
    if seen:
        yield (f"{seen} of {scans} scans are of subjects seen in training: memory, not a test (column exposure of "
               "scans.csv)")


def main(args):
    path = args.checkpoint = args.checkpoint or newest_checkpoint()
    checkpoint = load_checkpoint(path)
    if "optimizer" in checkpoint:
        raise InputError(f"{path} is there to resume a training; predict with best_model.pth beside it")
    args.batch_size = args.batch_size or checkpoint["flags"]["batch_size"]
    device = pick_device(args.device)
    runtime = Runtime(device, pick_amp(args.amp, device))
    explainer = Explainer(checkpoint, args.explain, device) if args.explain else None
    with contextlib.ExitStack() as held:
        out = held.enter_context(own_folder(args.out, f"predictions/{datetime.now():%Y%m%d-%H%M%S}"))
        held.enter_context(claimed(args.report))  # which may be in it
        cut = CutInputs(args, checkpoint, held)  # volumes become slices
        predict(args, checkpoint, runtime, explainer, cut, out)


def predict(args, checkpoint, runtime, explainer, cut, out):
    """Predict the slices of CutInputs, and write all that was asked for into the folder `out`."""
    path = args.checkpoint
    listing = list_inputs(cut.inputs, checkpoint["flags"].get("subject_pattern"), cut.failed)
    listing.warnings.extend(cut.warnings)
    print(f"{path}: {describe_model(checkpoint['model']['variant'])}, {checkpoint['image_size']} px, epoch "
          f"{checkpoint['epoch']}; {len(listing.index):,} slices on {runtime.device}, {runtime.precision}",
          *cut.lines, sep="\n")

    with explain_end(args):
        slices = load_inputs(listing, checkpoint)
        cut.finish(slices.index)
        raw = predict_slices(checkpoint, slices, runtime, batch_size=args.batch_size)
    predictions = calibrated(raw, checkpoint, args.coverage)
    title = f"predictions of {Path(path).parent.name}/{Path(path).name}"
    scores = write_results(predictions, out, title=title, **statements(checkpoint), coverage=args.coverage,
                           calibration=checkpoint.get("calibration"))
    warnings = [*slices.passed, *warn(predictions, checkpoint, args.coverage)]
    for warning in warnings:
        print(f"warning: {printable(warning, '')}", file=sys.stderr)
    scans = aggregate(predictions[predictions.p_AD.notna()], "scan")
    if scans.empty:
        raise InputError(f"none of the {len(predictions)} files could be read; {out / 'predictions.csv'} says why")
    print(*format_scans(scans), sep="\n")
    print(*(format_assessment(scores) if scores else []), f"results in {out}", sep="\n")
    overlays = {}
    if explainer:
        with explain_end(args):
            explained = explainer.write(slices, out / "explanations")
        print("warning: " * (not explained.usable) + explained.sentence,
              file=sys.stdout if explained.usable else sys.stderr)
        print(f"attribution maps in {explained.folder}")
        overlays = {"overlays": explained.overlays, "overlay_note": f"{explained.caution} {explained.sentence}."}
    if args.report:
        print(write_report(args.report, Report(path, checkpoint, args.inputs, args.coverage, slices, predictions, out,
                                               scores, warnings, cut.lines, **overlays)))


if __name__ == "__main__":
    run_script(main, ARGS)
