"""Predict slices, scans and subjects with a trained checkpoint.

    python predict.py ADNI/AD_NC/test --checkpoint runs/tiny/best_model.pth --out results
    python predict.py 218391_78.jpeg                   # one slice, with the newest run under runs/

INPUT is a slice, a folder of slices, or a folder with AD/ and NC/. The checkpoint alone decides the architecture, the
image size and the classes. Written to --out: predictions.csv (a row a slice), scans.csv and subjects.csv (mean p_AD,
the probability of AD), and where the labels are known metrics.json, confusion_matrix.png, roc_curve.png and
calibration.png. A file that cannot be read gets a row with the reason; the exit status is 2 if none could be.
"""

import os
import sys
from datetime import datetime
from pathlib import Path

from dataset import EXTENSIONS, Parser, is_junk, list_images, load_slices, parse_name, read_subjects, run


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="a slice, or a folder of slices (or of AD/ and NC/)")
    parser.add_argument("--checkpoint", metavar="FILE", help="best_model.pth of a run (default: newest in runs/)")
    parser.add_argument("--out", metavar="DIR", help="folder for the results (default: predictions/<time>)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="slices at once (default: 64)")
    parser.add_argument("--amp", choices=("auto", "fp16", "bf16", "off"), default="auto",
                        help="precision; auto is fp16 on CUDA, bf16 on a CPU that has it (default: auto)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: auto)")
    args = parser.parse_args(argv)
    if not 1 <= args.batch_size <= 1e6:
        parser.error(f"--batch-size is {args.batch_size}; expected a number from 1 to 1e+06")
    return args


# Read before torch is imported, so that --help and a mistyped flag answer at once.
ARGS = parse_args() if __name__ == "__main__" else None

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402

import utils  # noqa: E402

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


def predict_table(checkpoint, table, *, device, amp, batch_size=64, images=None):
    """Predict a table of slices with a checkpoint. Returns it with p_AD and prediction; if a file could not be read,
    also with a column error, and no p_AD in that row. `images` (N, H, W) spares the decoding."""
    errors = np.full(len(table), None)
    if images is None:
        images, errors = load_slices(table.path.tolist(), checkpoint["slice_size"], bar="decoding")
    errors = pd.Series(errors, index=table.index, dtype=object)
    good = errors.isna()
    model = utils.build_model(checkpoint).to(device, memory_format=torch.channels_last)
    recipe = {name: checkpoint[name] for name in ("image_size", "mean", "std")}
    predicted = utils.evaluate(
        model, images[good.to_numpy()], table[good], **recipe, device=device, amp=amp, batch_size=batch_size,
        bar="predicting",
    )
    table = table.join(predicted[["p_AD", "prediction"]])
    order = [column for column in table if column != "label"] + ["label"] * ("label" in table)
    table = table[order]
    return table if good.all() else table.assign(error=errors)


def mark_seen(predictions, seen):
    """What the model's training already knew: (seen, unsure), boolean arrays by row.

    `seen` of a checkpoint holds fingerprints of the subjects and scans of train and val. A row is seen if its subject
    or scan is among them; unsure if its own subject, or that of any training scan, is not known.
    """
    subjects, scans = set(seen["subjects"]), set(seen["scans"])
    known = predictions.subject.notna()
    same = predictions.subject.map(utils.fingerprint, na_action="ignore").isin(subjects) & known
    same |= predictions.scan.map(utils.fingerprint).isin(scans)
    return same.to_numpy(bool), (~same & (~known | bool(seen["unknown"]))).to_numpy(bool)


def write_results(predictions, out, *, title, checkpoint=None):
    """Write the tables, and where all labels are known figures and pictures, of predictions into folder `out`.

    Returns the lines to print. With the checkpoint, its leaks go into the title, and each figure is given twice where
    they differ: for all subjects, and for those not seen in training.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.json", "confusion_matrix.png", "roc_curve.png", "calibration.png"):
        (out / name).unlink(missing_ok=True)  # of an earlier prediction, they would not belong to these tables
    utils.write_csv(out / "predictions.csv", predictions)
    predictions = predictions[predictions.p_AD.notna()]
    tables = {unit: utils.aggregate(predictions, unit) for unit in utils.UNITS}
    columns = ["p_AD", "n_slices", "prediction"] + ["label"] * ("label" in predictions)
    utils.write_csv(out / "scans.csv", tables["scan"][["scan", "subject", *columns]])
    utils.write_csv(out / "subjects.csv", tables["subject"][["subject", *columns]])
    if predictions.empty or "label" not in predictions or predictions.label.isna().any():
        return []

    figures, lines = {}, []
    if checkpoint is not None:
        if checkpoint["split_by"] == "slice":
            title += " (of a LEAKY run: split by slice)"
        same, unsure = mark_seen(predictions, checkpoint["seen"])
        shared = predictions.scan[same].nunique()
        if shared:
            title += f"; LEAKY: {shared} of {predictions.scan.nunique()} scans are of subjects seen in training"
        if unsure.any():
            title += f"; whether training saw the subjects of {predictions.scan[unsure].nunique()} scans is unknown"
        if shared and not (same | unsure).all():
            unseen_title = "only subjects not seen in training"
            figures["unseen_subjects"] = {"title": unseen_title, **utils.score(predictions[~same & ~unsure])}
            lines = [utils.format_score(figures["unseen_subjects"], unseen_title)]
    figures = {"title": title, **utils.score(predictions), **figures}
    utils.write_json(out / "metrics.json", figures)
    tables = {unit: table for unit, table in tables.items() if len(table)}
    utils.plot_confusion(out / "confusion_matrix.png", tables, title)
    utils.plot_calibration(out / "calibration.png", tables, title)
    if predictions.label.nunique() == 2:
        utils.plot_roc(out / "roc_curve.png", tables, title)
    return [utils.format_score(figures, title), *lines]


# ---------------------------------------------------------------- the command


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

    predictions = predict_table(checkpoint, table, device=device, amp=amp, batch_size=args.batch_size)
    title = f"predictions of {Path(path).parent.name}/{Path(path).name}"
    unlabelled = table.label.isna().sum() if "label" in table else 0
    if unlabelled:
        print(f"warning: {unlabelled} of {len(table)} slices have no label: no figures are computed", file=sys.stderr)
    lines = write_results(predictions, out, title=title, checkpoint=checkpoint)
    if "error" in predictions:
        bad = predictions[predictions.error.notna()]
        for row in bad.head(10).itertuples():
            print(f"warning: {row.path} {row.error}", file=sys.stderr)
        print(f"warning: {len(bad)} of {len(predictions)} files could not be read", file=sys.stderr)
        if len(bad) == len(predictions):
            raise ValueError(f"none of the {len(bad)} files could be read; {out / 'predictions.csv'} says why")
    scans = utils.aggregate(predictions.dropna(subset="p_AD"), "scan")
    for row in scans.head(10).itertuples():
        print(f"scan {row.scan}: {row.prediction}, p_AD {row.p_AD:.3f} (mean of {row.n_slices} slices)")
    if len(scans) > 10:
        print(f"... and {len(scans) - 10} more scans")
    print(*lines, f"results in {out}", sep="\n")


if __name__ == "__main__":
    run(main, ARGS)
