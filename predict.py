"""Predict slices, scans and subjects with a trained checkpoint.

    python predict.py ADNI/AD_NC/test --checkpoint runs/tiny/best_model.pth --out results
    python predict.py 218391_78.jpeg --checkpoint runs/tiny    # one slice
    python predict.py SLICES --checkpoint RUN --coverage 0.9   # AD, NC, or AD|NC if it is not sure
    python predict.py SLICES --checkpoint runs/fold?   # several runs together: an ensemble
    python predict.py scan.nii.gz                      # a volume, cut as the training slices are
    python predict.py SLICES --explain auto            # attribution maps of each slice
    python predict.py SLICES --report report.html      # an HTML page with every scan

INPUT is a slice, a folder of slices, a folder with AD/ and NC/, a volume (NIfTI, MGZ, Analyze), a
DICOM folder, or a folder of volumes. The checkpoint decides the architecture, the image size and,
if it knows, how volumes are cut. Without --checkpoint, weights/phantom.pth is used, which was
trained on drawings alone: it gives scores and ranks, and no verdicts. Written to --out:
predictions.csv (one row per slice), scans.csv and subjects.csv (mean p_AD: how much the slices
resemble those labelled AD, calibrated on validation), of several runs members.csv and
member_runs.csv, and if the labels are known metrics.json and pictures. A file that cannot be read
gets a row with the reason; a slice out of the training range gets a warning.
"""

import os
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
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
from adnc.data.index import describe_one_scan, describe_separate_classes, list_inputs
from adnc.data.orientation import describe_turned
from adnc.data.pixels import out_of_range
from adnc.data.subjects import describe_same_names, describe_shared_names, find_exposure
from adnc.errors import InputError, count, printable
from adnc.files import new_folder, require_new, unused_name
from adnc.scoring import metrics
from adnc.scoring.assess import (
    CALIBRATED_ON_THEM,
    NO_CALIBRATION,
    SOME_HAVE_SEEN,
    describe_distrust,
    format_assessment,
    is_drawn,
    read_run,
    statements,
    why_no_verdicts,
    write_results,
)
from adnc.scoring.baselines import predict_baselines
from adnc.scoring.calibration import apply_calibration, max_coverage
from adnc.scoring.ensemble import (
    FOLDS,
    describe_disagreement,
    describe_ensemble,
    exposure_over,
    make_ensemble,
    member_logits,
    members_that_predict,
    require_fit,
    scan_spread,
    split_members,
)
from adnc.volumes.cut import cut_inputs
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
    `apply_calibration`. `exposure` replaces the record of the checkpoint's training. For an
    ensemble the columns of `predict_members` are added.
    """
    slices = replace(slices, index=slices.index.reset_index(drop=True))
    readable = slices.where(slices.index.error.isna())
    options = dict(device=device, amp=amp, batch_size=batch_size)
    index, more = readable.index, []
    if "members" in checkpoint:
        predicted = predict_members(checkpoint, readable, **options)
        more = [name for name in predicted if name not in metrics.PREDICTIONS]
    else:
        recorded = checkpoint["exposure"] if exposure is None else exposure
        logits = predict_checkpoint(checkpoint, readable, **options)
        predicted = index[[]].assign(
            logit=logits,
            exposure=find_exposure(index, recorded),
            out_of_range=out_of_range(index, checkpoint["slice_stats"]),
        )
        if "baselines" in checkpoint:
            predicted = predicted.join(predict_baselines(checkpoint["baselines"], readable))
    table = slices.index.join(predicted.assign(p_AD=expit(predicted.logit)))
    types = {**dict.fromkeys(metrics.PREDICTIONS, "string"), **metrics.NUMBERS}
    usual = table.reindex(columns=metrics.PREDICTIONS).astype(types)
    return usual.assign(threshold=metrics.THRESHOLD).join(table[more])


def predict_checkpoint(checkpoint, slices, *, device, amp=None, batch_size=64):
    """`predict_logits` by the model of a checkpoint, which is built for it."""
    return predict_logits(
        build_model(checkpoint).to(device, memory_format=torch.channels_last),
        slices,
        image_size=checkpoint["image_size"],
        mean=checkpoint["mean"],
        std=checkpoint["std"],
        device=device,
        amp=amp,
        batch_size=batch_size,
        progress="predicting",
    )


def predict_members(checkpoint, slices, **options):
    """The predictions of an ensemble for the slices of a SliceSet, one member after the other.

    Returns a table with logit, exposure, out_of_range and the baselines, of the members that
    predict a slice (`members_that_predict`), and logit_1, logit_2, ..., those of the members,
    missing where a member does not predict.
    """
    index, members = slices.index, split_members(checkpoint)
    exposures = [find_exposure(index, member["exposure"]) for member in members]
    exposures = np.column_stack(exposures)
    used = members_that_predict(exposures, index.scan)
    logits, baselines = np.full(used.shape, np.nan), []
    ranges = pd.Series(None, index.index, dtype="string")
    for k, member in enumerate(members):
        rows = index.index[used[:, k]]
        part = replace(slices, index=index.loc[rows])
        logits[used[:, k], k] = predict_checkpoint(member, part, **options)
        ranges[rows] = ranges[rows].fillna(out_of_range(part.index, member["slice_stats"]))
        if member["baselines"]:
            baselines.append(predict_baselines(member["baselines"], part))

    at_temperature = logits / [member["temperature"] for member in members]
    table = index[[]].assign(
        logit=np.nanmean(at_temperature, axis=1),
        exposure=exposure_over(exposures, used),
        out_of_range=ranges,
    )
    if len(baselines) == len(members):
        table = table.join(pd.concat(baselines).groupby(level=0).mean())
    for k in range(len(members)):
        table[f"logit_{k + 1}"] = logits[:, k]
    return table


# ---------------------------------------------------------------- what is printed


def name_model(checkpoint):
    """What the model of a checkpoint is called."""
    model = checkpoint["model"]
    return describe_model(model["variant"], model.get("members", ()))


def describe_checkpoint(checkpoint):
    """The model of a checkpoint, its image size and its epoch."""
    name = name_model(checkpoint)
    if "members" in checkpoint:
        return f"{name} ({checkpoint['design']})"
    return f"{name}, {checkpoint['image_size']} px, epoch {checkpoint['epoch']}"


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
    if why_no_verdicts(checkpoint) == NO_CALIBRATION:
        yield f"{NO_CALIBRATION}: p_AD orders scans, and is no probability"
    elif "calibration" not in checkpoint and not is_drawn(checkpoint):
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
    yield from warn_of_rows(predictions, "error", "slices or files could not be used")
    yield from warn_of_rows(
        readable,
        "out_of_range",
        "slices are out of the training range; do not rely on their scores (if they show a skull "
        "and the training slices did not, use --strip)",
        begin="is out of the training range: ",
    )
    n_seen = readable.scan[readable.exposure == "yes"].nunique()
    if n_seen:
        yield (
            f"{n_seen} of {readable.scan.nunique()} scans are of subjects seen in training: "
            "their scores are no test (column exposure of scans.csv)"
        )


def notes_on_members(predictions, checkpoint):
    """A sentence about the scans that not all members of an ensemble predict, if there are any."""
    readable = predictions[predictions.p_AD.notna()]
    by_some = np.isnan(member_logits(readable)).any(1)
    n_scans, n_by_some = readable.scan.nunique(), readable.scan[by_some].nunique()
    if n_by_some == 0:
        return
    text = f"{n_by_some} of {n_scans} scans {SOME_HAVE_SEEN}"
    if checkpoint["design"] == FOLDS:
        yield (
            f"{text}: the others predict them, but {CALIBRATED_ON_THEM}, so that their p_AD and "
            "sets fit them too well"
        )
    else:
        yield f"{text}: the others predict them"


def format_scans(scans, trusted=True, ranked=False, most=10):
    """A line for each of the first scans of a table of `metrics.aggregate`. `trusted` is whether
    the model may give a verdict, `ranked` whether its scores have no threshold, and order scans if
    there are several."""
    n_ranked = scans["rank"].count()
    for row in scans.head(most).itertuples():
        slices = count(row.n_slices, "slice")
        verdict = metrics.verdict(row)
        if ranked:
            text = f"no verdict: score {row.p_AD:.3f}, mean of {slices}"
            if n_ranked > 1:
                text += ", not ranked" if pd.isna(row.rank) else f", rank {row.rank} of {n_ranked}"
        elif not trusted or verdict == "no verdict":
            text = f"no verdict: {slices}"
        else:
            name = "AD|NC (uncertain)" if verdict == "AD|NC" else verdict
            text = f"{name}, p_AD {row.p_AD:.3f}, mean of {slices}"
        if row.n_out_of_range:
            text += f", {row.n_out_of_range} out of the training range"
        yield f"scan {row.scan}: {text}"
    if len(scans) > most:
        yield f"... and {count(len(scans) - most, 'more scan')}"


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
        "inputs", nargs="*", metavar="INPUT", help="a slice, a volume, or a folder of either"
    )
    parser.add_argument(
        "--checkpoint", nargs="+", action="extend", metavar="RUN",
        help="a run or its best_model.pth, an ensemble, or the runs that make one "
        "(default: weights/phantom.pth, trained on drawings)",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="DIR", help="new folder for the results (default: predictions/<time>)"
    )
    add = parser.add_argument_group("beyond probabilities").add_argument
    add("--coverage", type=number(1e-6, 0.999999), metavar="C",
        help="scan-level prediction sets that contain the label with this probability, e.g. 0.9")
    add("--explain", choices=METHODS, metavar="METHOD",
        help="attribution maps in --out/explanations, which need captum of requirements-extra.txt; "
        "auto: the first that passes its check")
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
    args = parser.parse_args(argv)
    if not args.inputs:
        parser.error(
            "there is no INPUT; name slices, volumes or folders, before --checkpoint, which takes "
            "all names after it"
        )
    return args


PHANTOM = Path(__file__).parent / "weights" / "phantom.pth"


def load_run(path):
    """(path of best_model.pth, checkpoint) of a run folder or of a file."""
    path = Path(path)
    if path.is_dir():
        path = path / "best_model.pth"
    if not path.exists() and (path.parent / "last.pth").exists():
        raise InputError(
            f"{path} does not exist, since the run stopped in its first epoch; finish it with "
            "train.py --resume"
        )
    if not path.exists():
        raise InputError(
            f"{path} does not exist; expected the folder of a run of train.py, its best_model.pth, "
            "or a file of tools.ensemble"
        )
    checkpoint = load_checkpoint(path)
    if "optimizer" in checkpoint:
        raise InputError(f"{path} is a training to resume; predict with best_model.pth beside it")
    return path, checkpoint


def load_members(paths):
    """{path of best_model.pth: checkpoint} of the members of an ensemble."""
    members = {}
    for path, checkpoint in map(load_run, paths):
        if str(path) in members:
            raise InputError(f"{path} is named twice; expected each member once")
        members[str(path)] = checkpoint
    require_fit(members)
    return members


def read_run_tables(members):
    """{path of best_model.pth: {"val": predictions, "test": predictions}} of finished runs.
    InputError if they are not those of the checkpoint."""
    tables = {}
    for path, checkpoint in members.items():
        tables[path] = {}
        for part in ("val", "test"):
            tables[path][part], scores = read_run(Path(path).parent, part)
            recorded = scores.get("calibration", {}).get("temperature")
            if recorded != checkpoint["calibration"]["temperature"]:
                raise InputError(
                    f"{Path(path).parent / part} was not written for {path}; expected a run that "
                    "finished, and its best_model.pth"
                )
    return tables


def load_runs(paths):
    """(name, checkpoint) of one run, or of the ensemble that several runs make."""
    if len(paths) == 1:
        path, checkpoint = load_run(paths[0])
        return str(path), checkpoint
    members = load_members(paths)
    print(f"making an ensemble of {len(members)} runs, and scoring it on their test")
    name = f"ensemble of {', '.join(Path(path).parent.name for path in members)}"
    return name, make_ensemble(members, read_run_tables(members))


def main(argv=None):
    args = parse_args(argv)
    out = args.out or unused_name(f"predictions/{datetime.now():%Y%m%d-%H%M%S}")
    require_new(out)
    if args.keep_slices:
        kept = Path(os.path.abspath(args.keep_slices))
        if Path(os.path.abspath(out)) in (kept, *kept.parents):
            raise InputError(
                f"--keep-slices {kept} is --out or inside it, and that is made when all is "
                "predicted; choose another folder"
            )
    path, checkpoint = load_runs(args.checkpoint or [PHANTOM])
    if args.coverage is not None and is_drawn(checkpoint):
        raise InputError(
            f"--coverage is for verdicts, and {path} was trained on drawings alone and gives none; "
            "leave it out, or name a model trained on people with --checkpoint"
        )
    if args.coverage is not None and "calibration" not in checkpoint:
        reason = "its run did not finish; finish it with --resume"
        if why_no_verdicts(checkpoint) == NO_CALIBRATION:
            reason = "its members have no calibration in common; name members that have one"
        raise InputError(
            f"the checkpoint is not calibrated, since {reason}, or leave out --coverage"
        )
    if args.report:
        from adnc.explain import report

        report.require_writable(args.report, out)
    device = pick_device(args.device)
    amp = pick_amp(args.amp, device)

    if args.explain:
        from adnc.explain.attribution import import_captum

        import_captum()  # if it is missing, this fails now, and not after the prediction
    with explain_out_of_memory("lower --batch-size, or give fewer files at once"):
        predict(args, path, checkpoint, Path(out), device, amp)


def predict(args, path, checkpoint, out, device, amp):
    """Read the inputs, predict, and write everything that was asked for into the new folder
    `out`."""
    cut = cut_inputs(
        args.inputs, checkpoint=checkpoint, flags=given_look_flags(args), keep=args.keep_slices
    )
    pattern = checkpoint["flags"].get("subject_pattern")
    listing = list_inputs(cut.inputs, pattern, cut.failed, cut.problem)
    name = describe_checkpoint(checkpoint)
    drawn = is_drawn(checkpoint)
    if drawn:
        name += ", trained on drawings alone"
    n_slices = int(listing.index.error.isna().sum())
    print(f"{path}: {name}; {count(n_slices, 'slice')} on {device}, {precision_name(amp)}")
    if "members" in checkpoint:
        for line in describe_ensemble(checkpoint):
            print(line)
    for line in cut.lines:
        print(printable(line))

    slices = load_inputs(listing, slice_size=checkpoint["slice_size"], bits=checkpoint["bits"])
    slices.index = cut.name_rows(slices.index)
    looks = cut.looks(slices.index) if args.report else {}
    cut.close()
    batch_size = args.batch_size or checkpoint["flags"]["batch_size"]
    predictions = predict_slices(checkpoint, slices, device=device, amp=amp, batch_size=batch_size)
    predictions = apply_calibration(predictions, checkpoint.get("calibration"), args.coverage)
    spread = None
    if "members" in checkpoint:
        spread = scan_spread(predictions, checkpoint)

    if args.out is None:  # another prediction may have begun in the same second
        out = unused_name(out)
    new_folder(out)
    title = f"predictions of {'/'.join(Path(path).parts[-2:])}"
    stated, on_members = statements(checkpoint), list(notes_on_members(predictions, checkpoint))
    stated["notes"] = [*stated["notes"], *on_members]
    scores = write_results(
        predictions, out, title=title, **stated, coverage=args.coverage,
        calibration=checkpoint.get("calibration"), withheld=why_no_verdicts(checkpoint),
        spread=spread, members=checkpoint.get("members", ()),
    )  # fmt: skip
    turned = []
    if not drawn:  # drawings are of all planes, mirrored and turned
        turned = describe_turned(slices, checkpoint["mean_slice"].numpy())
    trusted = describe_distrust(checkpoint) is None
    disagreement = []
    if spread is not None and trusted:
        disagreement = describe_disagreement(spread)
    warnings = [
        *cut.notes,
        *slices.notes,
        *describe_separate_classes(args.inputs, slices.index),
        *describe_folders_of_one_scan(slices.index, cut.look),
        *describe_same_names(slices.index[slices.index.error.isna()], checkpoint["exposure"]),
        *describe_shared_names(slices.index, args.inputs),
        *turned,
        *disagreement,
        *on_members,
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
    for line in format_scans(scans, trusted, ranked=why_no_verdicts(checkpoint) is not None):
        print(printable(line, keep=""))
    if scores:
        print("\n".join(format_assessment(scores)))
    print(f"results in {out}")

    explained = None
    if args.explain:
        from adnc.explain.attribution import Explainer

        explainer = Explainer(
            build_model(checkpoint), lambda: make_model(**checkpoint["model"]), checkpoint,
            args.explain, device,
        )  # fmt: skip
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
            model_name=name_model(checkpoint),
            inputs=args.inputs,
            coverage=args.coverage,
            index=slices.index,
            images=slices.images,
            predictions=predictions,
            spread=spread,
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


if __name__ == "__main__":
    run_script(main)
