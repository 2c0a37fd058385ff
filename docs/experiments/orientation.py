"""How often is a scan wrongly said to be turned or mirrored, and how often is it missed?

    python -m docs.experiments.orientation FOLDER...

A FOLDER holds slices, as given to predict.py. Of each, every second scan gives the mean training
slice, and the others are compared with it as a prediction does: as they are, and in the seven other
orientations. Prints a Markdown table, a row per folder: false alarms of upright scans and of single
slices, and for each orientation the scans that were named as what they are.
"""

import numpy as np

from adnc.cli import Parser, run_script
from adnc.data.index import list_inputs
from adnc.data.orientation import VIEWS, find_view
from adnc.data.pixels import common_size, mean_slice
from adnc.errors import InputError
from adnc.scoring.assess import format_table
from dataset import load_inputs


def measure(folder):
    """A row of the table: texts."""
    listing = list_inputs([folder])
    size = common_size(listing.index.path)
    slices = load_inputs(listing, slice_size=size)
    index = slices.index[slices.index.error.isna()]
    scans = index.scan.unique()
    if len(scans) < 2:
        raise InputError(f"{folder} holds {len(scans)} scan; expected two or more")
    training = mean_slice(slices.images, rows_of(index, scans[::2]))

    n_right = dict.fromkeys(VIEWS, 0)
    for scan in scans[1::2]:
        mean = mean_slice(slices.images, rows_of(index, [scan]))
        for view, change in VIEWS.items():
            expected = None if view == "upright" else view
            n_right[view] += find_view(change(mean), training) == expected
    n_scans = len(scans[1::2])
    rows = rows_of(index, scans[1::2])
    alarms = sum(find_view(slices.images[row], training) is not None for row in rows)
    counts = [f"{n_scans - n_right['upright']} of {n_scans}", f"{alarms} of {len(rows):,}"]
    return [*counts, *(f"{n} of {n_scans}" for view, n in n_right.items() if view != "upright")]


def rows_of(index, scans):
    """The rows of the images of some scans."""
    return index.row[index.scan.isin(scans)].to_numpy(np.int64)


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a folder of slices")
    args = parser.parse_args(argv)
    views = [view for view in VIEWS if view != "upright"]
    rows = [["", "false alarms, scans", "false alarms, slices", *views]]
    for folder in args.folders:
        rows.append([folder, *measure(folder)])
    print("\n".join(format_table(rows)))


if __name__ == "__main__":
    run_script(main)
