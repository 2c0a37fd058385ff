"""Predict slices, scans and subjects with a trained checkpoint.

    python predict.py ADNI/AD_NC/test --checkpoint runs/tiny/best_model.pth --out results
    python predict.py 218391_78.jpeg --checkpoint runs/tiny    # one slice
    python predict.py SLICES --checkpoint RUN --coverage 0.9   # AD, NC, or AD|NC if it is not sure
    python predict.py scan.nii.gz --plane sagittal     # a volume, cut as the training slices are
    python predict.py SLICES --explain auto            # attribution maps of each slice
    python predict.py SLICES --report report.html      # an HTML page with every scan

INPUT is a slice, a folder of slices, a folder with AD/ and NC/, a volume (NIfTI, MGZ, Analyze), a
DICOM folder, or a folder of volumes. The checkpoint decides the architecture, the image size and,
if it knows, how volumes are cut. Without --checkpoint, weights/phantom.pth is used, which was
trained on drawings alone: it gives scores and ranks, and no verdicts. Written to --out:
predictions.csv (one row per slice), scans.csv and subjects.csv (mean p_AD, the calibrated
probability of AD), and if the labels are known metrics.json and pictures. A file that cannot be
read gets a row with the reason; a slice out of the training range gets a warning.
"""

import os
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from scipy.special import expit
from tqdm import tqdm

if str(Path(__file__).parent) not in sys.path:
    sys.path.insert(0, str(Path(__file__).parent))  # under python -P it is missing

from adnc.cli import describe_other_modules

if other := describe_other_modules(__file__):
    raise ImportError(other)

from adnc import CLASSES
from adnc.cli import COUNT, Parser, number, run_script
from adnc.cpu_engine import make_engine
from adnc.data.augment import MEAN, STD, eval_transform
from adnc.data.index import describe_one_scan, list_inputs
from adnc.data.orientation import describe_turned
from adnc.data.pixels import out_of_range
from adnc.data.subjects import describe_same_names, describe_shared_names, find_exposure
from adnc.errors import InputError, printable
from adnc.files import new_folder, require_new, unused_name
from adnc.scoring import metrics
from adnc.scoring.assess import (
    describe_distrust,
    format_assessment,
    is_drawn,
    statements,
    write_results,
)
from adnc.scoring.baselines import predict_baselines
from adnc.scoring.calibration import apply_calibration, max_coverage
from adnc.volumes.look import add_look_flags, given_look_flags
from dataset import Batches, load_inputs
from modules import describe_model, make_model
from utils import (
    build_model,
    explain_out_of_memory,
    load_checkpoint,
    pick_amp,
    pick_device,
    precision_name,
)

# The methods of adnc.explain.attribution, which is imported only for --explain.
METHODS = ("auto", "integrated-gradients", "occlusion", "grad-cam")

# ---------------------------------------------------------------- from slices to logits


@torch.inference_mode()
def predict_logits(
    model, slices, *, image_size, device, amp, mean=MEAN, std=STD, batch_size=64, progress=None
):
    """z_AD - z_NC of a model for the N slices of a SliceSet, float64 (N,), in the order of its
    index.

    The inference path of validation, the final test and predict.py. `progress` labels a progress
    bar. InputError if an output is not finite, as when float16 overflows.
    """
    engine = make_engine(model, device=device, amp=amp)
    batches = Batches(slices, batch_size, device=device)
    logits = [torch.zeros(0, len(CLASSES), device=device)]
    for images, _ in tqdm(
        batches, progress, unit=" batches", leave=False, disable=None if progress else True
    ):
        logits.append(engine(eval_transform(images, image_size, mean, std)))

    z = torch.cat(logits).double().cpu().numpy()
    z = z[:, CLASSES.index("AD")] - z[:, CLASSES.index("NC")]
    n_lost = int((~np.isfinite(z)).sum())
    if n_lost:
        raise InputError(
            f"the model gives no finite output for {n_lost} of {len(z)} slices in "
            f"{precision_name(amp)}; try --amp off, or a lower --lr if it is being trained"
        )
    return z


# ---------------------------------------------------------------- from logits to predictions


def predict_slices(checkpoint, slices, *, device, amp, batch_size=64, exposure=None):
    """Predict a SliceSet with the model and the baselines of a checkpoint.

    Returns a table with metrics.PREDICTIONS, one row per row of the index; rows of files that could
    not be read are empty. p_AD, the softmax probability of AD, is not yet calibrated: see
    `apply_calibration`. `exposure` replaces the record of the checkpoint's training.
    """
    slices = replace(slices, index=slices.index.reset_index(drop=True))
    readable = slices.where(slices.index.error.isna())
    model = build_model(checkpoint).to(device, memory_format=torch.channels_last)
    logits = predict_logits(
        model,
        readable,
        image_size=checkpoint["image_size"],
        mean=checkpoint["mean"],
        std=checkpoint["std"],
        device=device,
        amp=amp,
        batch_size=batch_size,
        progress="predicting",
    )

    index = readable.index
    predicted = index[[]].assign(
        logit=logits,
        p_AD=expit(logits),
        out_of_range=out_of_range(index, checkpoint["slice_stats"]),
        exposure=find_exposure(index, checkpoint["exposure"] if exposure is None else exposure),
    )
    if "baselines" in checkpoint:
        predicted = predicted.join(predict_baselines(checkpoint["baselines"], readable))
    table = slices.index.join(predicted).reindex(columns=metrics.PREDICTIONS)
    types = {**dict.fromkeys(metrics.PREDICTIONS, "string"), **metrics.NUMBERS}
    return table.astype(types).assign(threshold=metrics.THRESHOLD)


# ---------------------------------------------------------------- what is printed


def warn_of_rows(predictions, column, what, begin=""):
    """Warnings about the rows that have a text in a column: the first row of each of ten scans, and
    how many rows there are. `begin` is put before each text."""
    rows = predictions[predictions[column].notna()]
    firsts = rows.drop_duplicates("scan")
    for path, text in firsts[["path", column]].head(10).itertuples(index=False):
        yield f"{path} {begin}{text}"
    if len(rows):
        yield f"{len(rows)} of {len(predictions)} {what} (column {column} of predictions.csv)"


def warnings_about(predictions, checkpoint, coverage):
    """Warnings about calibrated predictions, as lines of text."""
    readable = predictions[predictions.p_AD.notna()]
    distrust = describe_distrust(checkpoint)
    if distrust and not is_drawn(checkpoint):  # which the last line says
        yield f"this model: {distrust}"
    for leak in statements(checkpoint)["leaks"]:
        yield f"the model is LEAKY: {leak}"
    if "calibration" not in checkpoint:
        yield "the run did not finish: its p_AD are not calibrated"
    elif coverage is not None:
        most = max_coverage(checkpoint["calibration"], coverage)
        if most is not None:
            n_groups = checkpoint["calibration"]["groups"]
            yield (
                f"{n_groups} validation subjects allow a coverage of at most {most:.3f}: every set "
                "is AD|NC"
            )
    n_unlabelled = readable.label.isna().sum()
    if 0 < n_unlabelled < len(readable):
        yield f"{n_unlabelled} of {len(readable)} slices have no label: no scores are computed"
    yield from warn_of_rows(predictions, "error", "files could not be used")
    yield from warn_of_rows(
        readable,
        "out_of_range",
        "slices are out of the training range; do not rely on their p_AD (if they show a skull and "
        "the training slices did not, use --strip)",
        begin="is out of the training range: ",
    )
    n_seen = readable.scan[readable.exposure == "yes"].nunique()
    if n_seen:
        yield (
            f"{n_seen} of {readable.scan.nunique()} scans are of subjects seen in training: "
            "their scores are no test (column exposure of scans.csv)"
        )


def format_scans(scans, trusted=True, drawn=False, most=10):
    """A line for each of the first scans of a table of `metrics.aggregate`. `trusted` is whether
    the model may give a verdict, `drawn` whether it saw drawings alone: then it gives ranks."""
    ranks = scans.p_AD.rank(ascending=False, method="min").astype(int)
    for row, rank in zip(scans.head(most).itertuples(), ranks):
        slices = f"{row.n_slices} slice{'s' if row.n_slices > 1 else ''}"
        verdict = metrics.verdict(row)
        if drawn:
            rank = f"rank {rank} of {len(scans)}"
            text = f"no verdict: score {row.p_AD:.3f}, {rank}, mean of {slices}"
        elif not trusted or verdict == "no verdict":
            text = f"no verdict: {slices}"
        else:
            name = "AD|NC (uncertain)" if verdict == "AD|NC" else verdict
            text = f"{name}, p_AD {row.p_AD:.3f}, mean of {slices}"
        if row.n_out_of_range:
            text += f", {row.n_out_of_range} out of the training range"
        yield f"scan {row.scan}: {text}"
    if len(scans) > most:
        yield f"... and {len(scans) - most} more scans"


def describe_folders_of_one_scan(index, look):
    """A line if all files of a folder are slices of one scan, for the first such folder; none if
    volumes were cut, whose slices are named here."""
    if look:
        return
    lines = []
    for folder, part in index.groupby(index.path.map(os.path.dirname), sort=False):
        lines += describe_one_scan(part, f"all files of {folder or 'the current folder'}")
    if len(lines) > 1:
        lines[0] += f" (and so in {len(lines) - 1} more folders)"
    yield from lines[:1]


# ---------------------------------------------------------------- command


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="a slice, a volume, or a folder of either"
    )
    parser.add_argument(
        "--checkpoint", metavar="RUN",
        help="a run or its best_model.pth (default: weights/phantom.pth, trained on drawings)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="new folder for the results (default: predictions/<time>)"
    )
    add = parser.add_argument_group("beyond probabilities").add_argument
    add("--coverage", type=number(1e-6, 0.999999), metavar="C",
        help="scan-level prediction sets that contain the label with this probability, e.g. 0.9")
    add("--explain", choices=METHODS, metavar="METHOD",
        help="attribution maps in --out/explanations; auto: the first that passes its check")
    add("--report", metavar="FILE", help="write an HTML page with every scan")
    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=COUNT, metavar="N", help="slices at once (default: as in training)")
    add("--amp", choices=("auto", "fp16", "bf16", "off"), default="auto",
        help="auto: bf16 if the device has it, else fp16 on CUDA (auto)")  # fmt: skip
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (auto)")
    group = add_look_flags(parser, "the checkpoint's, or those of AD_NC")
    group.add_argument(
        "--keep-slices", metavar="DIR", help="keep the slices that volumes are cut into"
    )
    return parser.parse_args(argv)


PHANTOM = Path(__file__).parent / "weights" / "phantom.pth"


def main(argv=None):
    args = parse_args(argv)
    out = args.out or unused_name(f"predictions/{datetime.now():%Y%m%d-%H%M%S}")
    require_new(out)
    path = Path(args.checkpoint or PHANTOM)
    if path.is_dir():
        path = path / "best_model.pth"
    checkpoint = load_checkpoint(path)
    if "optimizer" in checkpoint:
        raise InputError(
            f"{path} is a training to resume; predict with best_model.pth beside it"
        )
    if args.coverage is not None and "calibration" not in checkpoint:
        raise InputError(
            "the checkpoint is not calibrated, since its run did not finish; finish it with "
            "--resume, or leave out --coverage"
        )
    if args.coverage is not None and is_drawn(checkpoint):
        raise InputError(
            f"--coverage is for verdicts, and {path} was trained on drawings alone and gives none; "
            "leave it out, or name a model trained on people with --checkpoint"
        )
    if args.report:
        from adnc.explain import report

        report.require_writable(args.report, out)
    device = pick_device(args.device)
    amp = pick_amp(args.amp, device)

    explainer = None
    if args.explain:
        from adnc.explain.attribution import Explainer

        explainer = Explainer(
            build_model(checkpoint),
            lambda: make_model(**checkpoint["model"]),
            checkpoint,
            args.explain,
            device,
        )
    with explain_out_of_memory("lower --batch-size, or give fewer files at once"):
        predict(args, path, checkpoint, Path(out), explainer, device, amp)


def predict(args, path, checkpoint, out, explainer, device, amp):
    """Read the inputs, predict, and write everything that was asked for into the new folder
    `out`."""
    cut = cut_volumes(args, checkpoint)
    listing = list_inputs(cut.inputs, checkpoint["flags"].get("subject_pattern"), cut.failed)
    name = describe_model(checkpoint["model"]["variant"])
    drawn = is_drawn(checkpoint)
    print(
        f"{path}: {name}, {checkpoint['image_size']} px, epoch {checkpoint['epoch']}"
        f"{', trained on drawings alone' if drawn else ''}; {len(listing.index):,} slices on "
        f"{device}, {precision_name(amp)}"
    )
    for line in cut.lines:
        print(printable(line))

    slices = load_inputs(listing, slice_size=checkpoint["slice_size"], bits=checkpoint["bits"])
    slices.index = cut.name_rows(slices.index)
    looks = cut.looks(slices.index) if args.report else {}
    cut.close()
    batch_size = args.batch_size or checkpoint["flags"]["batch_size"]
    predictions = predict_slices(checkpoint, slices, device=device, amp=amp, batch_size=batch_size)
    predictions = apply_calibration(predictions, checkpoint.get("calibration"), args.coverage)

    new_folder(out)
    title = f"predictions of {Path(path).parent.name}/{Path(path).name}"
    scores = write_results(
        predictions, out, title=title, **statements(checkpoint), coverage=args.coverage,
        calibration=checkpoint.get("calibration"), verdicts=not drawn,
    )  # fmt: skip
    turned = []
    if not drawn:  # drawings are of all planes, mirrored and turned
        turned = describe_turned(slices, checkpoint["mean_slice"].numpy())
    warnings = [
        *cut.notes,
        *slices.notes,
        *describe_folders_of_one_scan(slices.index, cut.look),
        *describe_same_names(slices.index[slices.index.error.isna()], checkpoint["exposure"]),
        *describe_shared_names(slices.index, args.inputs),
        *turned,
        *warnings_about(predictions, checkpoint, args.coverage),
    ]
    for warning in warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr)
    scans = metrics.aggregate(predictions[predictions.p_AD.notna()], "scan")
    if scans.empty:
        raise InputError(
            f"none of the {len(predictions)} files could be read; {out / 'predictions.csv'} lists "
            "why"
        )
    trusted = describe_distrust(checkpoint) is None
    for line in format_scans(scans, trusted, drawn):
        print(printable(line))
    if scores:
        print("\n".join(format_assessment(scores)))
    print(f"results in {out}")

    explained = None
    if explainer:
        explained = explainer.write(slices, out / "explanations")
        if explained.usable:
            print(explained.sentence)
        else:
            print(f"warning: {explained.sentence}", file=sys.stderr)
        print(f"attribution maps in {explained.folder}")
    if args.report:
        from adnc.explain.report import Report, write_report

        page = Report(
            file=str(path),
            checkpoint=checkpoint,
            model_name=name,
            inputs=args.inputs,
            coverage=args.coverage,
            index=slices.index,
            images=slices.images,
            predictions=predictions,
            out=out,
            scores=scores,
            warnings=warnings,
            notes=cut.lines,
            looks=looks,
            explained=explained,
        )
        print(write_report(args.report, page))
    if drawn:
        print(f"The model was {describe_distrust(checkpoint)}")


def cut_volumes(args, checkpoint):
    """The inputs with every volume replaced by a folder of its slices."""
    from adnc.volumes.cut import cut_inputs

    return cut_inputs(
        args.inputs, checkpoint=checkpoint, flags=given_look_flags(args), keep=args.keep_slices
    )


if __name__ == "__main__":
    run_script(main)
