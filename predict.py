"""Predict slices, scans and subjects with a trained checkpoint.

    python predict.py ADNI/AD_NC/test --checkpoint runs/tiny/best_model.pth --out results
    python predict.py 218391_78.jpeg                   # one slice, with the newest run under runs/
    python predict.py SLICES --coverage 0.9            # AD, NC, or AD|NC where it is not sure enough

INPUT is a slice, a folder of slices, or a folder with AD/ and NC/. The checkpoint alone decides the architecture, the
image size and the classes. Written to --out: predictions.csv (a row a slice), scans.csv and subjects.csv (mean p_AD,
the probability of AD, calibrated on the run's validation), and where the labels are known metrics.json, baselines.csv
and pictures. --coverage 0.9 adds prediction sets that promise to hold the truth for 90 % of scans like those of
validation. A file that cannot be read gets a row with the reason; the exit status is 2 if none could be.
"""

import os
import sys
from datetime import datetime
from pathlib import Path

from dataset import EXTENSIONS, Parser, is_junk, list_images, mark_seen, parse_name, read_subjects, run


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="a slice, or a folder of slices (or of AD/ and NC/)")
    parser.add_argument("--checkpoint", metavar="FILE", help="best_model.pth of a run (default: newest in runs/)")
    parser.add_argument("--out", metavar="DIR", help="folder for the results (default: predictions/<time>)")
    parser.add_argument("--coverage", type=float, metavar="C",
                        help="prediction sets by scan that hold the truth with this probability, e.g. 0.9")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="slices at once (default: 64)")
    parser.add_argument("--amp", choices=("auto", "fp16", "bf16", "off"), default="auto",
                        help="precision; auto is fp16 on CUDA, bf16 on a CPU that has it (default: auto)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    args = parser.parse_args(argv)
    if not 1 <= args.batch_size <= 1e6:
        parser.error(f"--batch-size is {args.batch_size}; expected a number from 1 to 1e+06")
    if args.coverage is not None and not 0 < args.coverage < 1:
        parser.error(f"--coverage is {args.coverage}; expected more than 0 and less than 1, such as 0.9")
    return args


# Read before torch is imported, so that --help and a mistyped flag answer at once.
ARGS = parse_args() if __name__ == "__main__" else None

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402

import utils  # noqa: E402
from baselines import predict_baselines  # noqa: E402
from evaluate import format_assessment, write_results  # noqa: E402
from metrics import THRESHOLD, aggregate, conformal_quantile, expit, prediction_sets, with_predictions  # noqa: E402
from slices import fingerprint_slices, load_slices  # noqa: E402

# ---------------------------------------------------------------- input


def read_inputs(inputs):
    """Files and folders -> a table with a row a slice: path, scan, slice, subject, and label where one is known.

    A file that is not named <scan>_<slice> counts as a scan of its own, with its path for a name and no slice number.
    What else lies in the folders is passed over and named in `table.attrs["passed_over"]`. Raises ValueError for an
    input that is not there or holds no images, for a scan under both AD/ and NC/ and for two files of one slice.
    """
    rows, passed_over = [], []
    for given in map(Path, inputs):
        for path, label in _list_input(given, passed_over):
            rows.append((path, *(parse_name(path) or (path, None)), label, os.path.realpath(path)))
    table = pd.DataFrame(rows, columns=["path", "scan", "slice", "label", "file"])
    table = table.sort_values("label", na_position="last", kind="stable").drop_duplicates("file").drop(columns="file")
    both = table.groupby("scan").label.nunique()
    if (both > 1).any():
        paths = table[table.scan == both.index[both > 1][0]].drop_duplicates("label").path
        raise ValueError(f"the same scan stands under both classes: {' and '.join(paths)}; predict one of them")
    twice = table[table.slice.notna() & table.duplicated(["scan", "slice"], keep=False)].sort_values(["scan", "slice"])
    if len(twice):
        raise ValueError(f"two files are the same slice of a scan: {' and '.join(twice.path[:2])}; predict one of them")
    subjects = {}
    for root in {_set_root(given) for given in inputs}:
        subjects |= read_subjects(root)[0]
    table["slice"] = table.slice.astype("Int64")
    table.insert(3, "subject", table.scan.map(subjects).astype("string"))
    if table.label.isna().all():
        table = table.drop(columns="label")
    table = table.sort_values(["scan", "slice", "path"], ignore_index=True)
    table.attrs["passed_over"] = passed_over
    return table


def _list_input(given, passed_over):
    """The (path, label or None) of each image of one INPUT; appends to `passed_over` what it leaves."""
    if not given.exists():
        raise ValueError(f"{given} does not exist; expected an image or a folder of images")
    if given.is_file():
        if given.suffix.lower() not in EXTENSIONS:
            raise ValueError(f"{given} is not an image that is read here; expected .jpeg, .jpg or .png")
        return [(str(given), None)]
    labelled = [label for label in ("AD", "NC") if (given / label).is_dir()]
    if labelled:
        found = [(path, label) for label in labelled for path in list_images(given / label)]
    else:
        found = [(path, None) for path in list_images(given)]
    for folder in [given, *(given / label for label in labelled)]:
        entries = {entry.path for entry in os.scandir(folder) if not is_junk(entry.name)}
        passed_over += sorted(entries - {path for path, _ in found} - {str(given / label) for label in labelled})
    if not found:
        hints = [given / name for name in ("test", "AD_NC/test") if (given / name).is_dir()]
        hint = f"; did you mean {hints[0]}?" if hints else ""
        raise ValueError(f"{given} holds no images (.jpeg, .jpg, .png), nor do AD/ and NC/ in it{hint}")
    return found


def _set_root(given):
    """The folder that the metadata stands in or beside: AD_NC for AD_NC/test/AD/x.jpeg, else the folder itself."""
    folder = Path(os.path.abspath(given))
    if not folder.is_dir():
        folder = folder.parent
    while folder.name in ("AD", "NC", "train", "test"):
        folder = folder.parent
    return folder


# ---------------------------------------------------------------- from a checkpoint and a table to results


def predict_table(checkpoint, table, *, device, amp, batch_size=64, images=None, seen=None):
    """Run a checkpoint's model, and its baselines, on a table of slices.

    Returns the table with logit and p_AD as the model gives them (see `calibrated`), p_AD of each baseline, and seen
    (see `mark_seen`; of the checkpoint's training, or of the `seen` given). If a file could not be read there is also
    a column error, and the row has no p_AD. `images` (M, H, W) spares the decoding: the table's labels are its rows,
    and its column pixels holds their fingerprints.
    """
    if images is not None:
        good = pd.Series(True, table.index)
        rows, at, pixels, table = table, table.index, table.pixels, table.drop(columns="pixels")
    else:
        images, errors = load_slices(table.path.tolist(), checkpoint["slice_size"], bar="decoding")
        errors = pd.Series(errors, index=table.index, dtype=object)
        good = errors.isna()
        rows, at = table[good], np.flatnonzero(good)
        pixels = fingerprint_slices(images[row] for row in at)
    model = utils.build_model(checkpoint).to(device, memory_format=torch.channels_last)
    recipe = {name: checkpoint[name] for name in ("image_size", "mean", "std")}
    predicted = utils.evaluate(
        model, images, rows, rows=at, **recipe, device=device, amp=amp, batch_size=batch_size, bar="predicting"
    )[["logit", "p_AD"]]
    if checkpoint.get("baselines"):
        predicted = predicted.join(predict_baselines(checkpoint["baselines"], images, rows, at))
    seen = checkpoint["seen"] if seen is None else seen
    predicted["seen"] = mark_seen(rows.assign(pixels=pixels), seen)
    table = table.join(predicted)
    return table if good.all() else table.assign(error=errors)


def calibrated(predictions, checkpoint, coverage=None):
    """Predictions as the checkpoint's calibration has them: p_AD at its temperature, prediction at its threshold, and
    where a coverage is asked for prediction_set, "AD", "NC" or "AD|NC", that of the whole scan."""
    calibration = checkpoint.get("calibration")
    if calibration is None:
        if coverage is not None:
            raise ValueError("the checkpoint was not calibrated, for its run did not finish; finish it with --resume, "
                             "or leave out --coverage")
        calibration = {"temperature": 1.0, "threshold": THRESHOLD}
    # seven digits from here on, as the files have them, so that figures can be repeated from files
    p_ad = expit(predictions.logit / calibration["temperature"]).round(7)
    table = with_predictions(predictions.assign(p_AD=p_ad, threshold=calibration["threshold"]))
    table["prediction"] = table.prediction.where(table.p_AD.notna())
    if coverage is not None:
        quantile = conformal_quantile(calibration, coverage)
        scans = aggregate(table[table.p_AD.notna()], "scan")
        sets = prediction_sets(scans.p_AD.to_numpy(float), scans.prediction.to_numpy(), quantile)
        table["prediction_set"] = table.scan.map(dict(zip(scans.scan, sets)))
    return table


# ---------------------------------------------------------------- the command


def run_leaks(checkpoint):
    """Sentences on how the run itself was split, for the titles of all that it predicts."""
    return ["of a run split by slice"] if checkpoint["split_by"] == "slice" else []


def run_notes(checkpoint):
    """Sentences on what cannot be known of a run, for the same titles."""
    init = checkpoint.get("init")
    if not init or init["seen"]:
        return []
    return [f"starts from {init['file']}, which does not say on whom it was trained"]


def newest_checkpoint():
    found = sorted(Path("runs").glob("*/best_model.pth"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError("there is no runs/*/best_model.pth; train a model with train.py or name one with --checkpoint")
    return found[-1]


def main(args):
    path = args.checkpoint or newest_checkpoint()
    checkpoint = utils.load_checkpoint(path)
    if "optimizer" in checkpoint:
        raise ValueError(f"{path} is there to resume a training; predict with best_model.pth beside it")
    device = utils.pick_device(args.device)
    amp = utils.pick_amp(args.amp, device)
    table = read_inputs(args.inputs)
    passed_over = table.attrs["passed_over"]
    if passed_over:
        print(f"warning: passed over {len(passed_over)} files and folders that are no slices, first {passed_over[0]}",
              file=sys.stderr)
    out = Path(args.out) if args.out else utils.new_folder(f"predictions/{datetime.now():%Y%m%d-%H%M%S}")
    model = checkpoint["model"]
    print(f"{path}: ConvNeXt {model['variant']}, {checkpoint['image_size']} px, epoch {checkpoint['epoch']}; "
          f"{len(table):,} slices on {device}, {utils.precision_name(amp)}")

    calibration = checkpoint.get("calibration")
    if calibration is None:
        print("warning: the run did not finish: its p_AD are not calibrated", file=sys.stderr)
    predictions = predict_table(checkpoint, table, device=device, amp=amp, batch_size=args.batch_size)
    predictions = calibrated(predictions, checkpoint, args.coverage)
    if args.coverage is not None and not np.isfinite(conformal_quantile(calibration, args.coverage)):
        k = calibration["subjects"]
        print(f"warning: {k} validation subjects can promise a coverage of at most {k / (k + 1):.3f}: every set is "
              "AD|NC", file=sys.stderr)
    title = f"predictions of {Path(path).parent.name}/{Path(path).name}"
    unlabelled = table.label.isna().sum() if "label" in table else 0
    if unlabelled:
        print(f"warning: {unlabelled} of {len(table)} slices have no label: no figures are computed", file=sys.stderr)
    figures = write_results(predictions, out, title=title, leaks=run_leaks(checkpoint), notes=run_notes(checkpoint),
                            coverage=args.coverage, calibration=calibration)
    if "error" in predictions:
        bad = predictions[predictions.error.notna()]
        for row in bad.head(10).itertuples():
            print(f"warning: {row.path} {row.error}", file=sys.stderr)
        print(f"warning: {len(bad)} of {len(predictions)} files could not be read", file=sys.stderr)
        if len(bad) == len(predictions):
            raise ValueError(f"none of the {len(bad)} files could be read; {out / 'predictions.csv'} says why")
    scans = aggregate(predictions.dropna(subset="p_AD"), "scan")
    if (scans.seen == "yes").any():
        print(f"warning: {(scans.seen == 'yes').sum()} of {len(scans)} scans are of subjects that training has seen: "
              "memory, no test (column seen of scans.csv)", file=sys.stderr)
    for row in scans.head(10).itertuples():
        verdict = row.prediction if args.coverage is None else row.prediction_set
        print(f"scan {row.scan}: {verdict}{' (uncertain)' if verdict == 'AD|NC' else ''}, p_AD {row.p_AD:.3f} "
              f"(mean of {row.n_slices} slices)")
    if len(scans) > 10:
        print(f"... and {len(scans) - 10} more scans")
    print(*(format_assessment(figures) if figures else []), f"results in {out}", sep="\n")


if __name__ == "__main__":
    run(main, ARGS)
