"""Do the maps of the shipped weights light the fluid of a slice, and does the score depend on it?

    python -m docs.experiments.fluid_maps OASIS/AD_NC VARIED/AD_NC

Fluid is what is darker than half the median grey of the head (adnc.scoring.baselines). Of some
slices of each set, evenly chosen: the share of the head that is fluid, as the model sees it; the
share of an attribution map (integrated gradients, absolute values, smoothed as in the pictures)
that lies on it; the change of z_AD - z_NC if the fluid is filled with the median grey (deletion);
and the change if the shape of the fluid, turned by 180 degrees, is filled so, where it lies on the
head and on no fluid: an area of a similar form, but smaller, whose share of the head is given, too.
Means, with intervals over subjects.
"""

import numpy as np
import pandas as pd
import torch

from adnc.cli import COUNT, Parser, run_script
from adnc.data.augment import eval_transform
from adnc.data.pixels import find_head
from adnc.explain.attribution import attribute, margin, smooth, view
from adnc.scoring.assess import cell, format_table
from adnc.scoring.metrics import Bootstrap, interval
from adnc.scoring.plots import evenly
from docs.experiments.transfer import read_set
from predict import PHANTOM
from utils import build_model, load_checkpoint, pick_device

DARK = 0.5  # of the median grey of the head
COLUMNS = {
    "fluid": "share of the head that is fluid",
    "map": "share of the map on it",
    "filled": "change of z if it is filled",
    "turned": "share of the head that is its turned shape",
    "elsewhere": "change of z if that is filled",
}


def find_fluid(pixels):
    """(fluid, head, median grey of the head) of a slice uint8 (H, W); masks bool (H, W)."""
    head = find_head(pixels)
    median = np.median(pixels[head]) if head.any() else 0
    return head & (pixels < DARK * median), head, median


def fill(pixels, mask, grey):
    return np.where(mask, grey, pixels).astype(np.uint8)


def look_at(checkpoint, images, device):
    """A dict of COLUMNS for each slice of uint8 (N, H, W)."""
    model = build_model(checkpoint).to(device).eval()

    def z(pixels):
        with torch.inference_mode():
            return float(margin(model)(view(checkpoint, pixels[None], device)))

    def seen(mask):
        """A mask (H, W) as the model sees it, (S, S)."""
        pixels = torch.from_numpy(255 * mask.astype(np.uint8))[None, None]
        return eval_transform(pixels, checkpoint["image_size"], mean=0, std=1)[0, 0].numpy() > 0.5

    baseline = view(checkpoint, checkpoint["mean_slice"].numpy()[None], device)
    rows = []
    for pixels in images:
        fluid, head, median = find_fluid(pixels)
        turned = np.rot90(fluid, 2) & head & ~fluid
        x = view(checkpoint, pixels[None], device)
        size = abs(smooth(attribute("integrated-gradients", model, x, baseline)))[0]
        seen_fluid, seen_head, before = seen(fluid), seen(head), z(pixels)
        n_head = max(seen_head.sum(), 1)
        rows.append({
            "fluid": seen_fluid.sum() / n_head,
            "map": size[seen_fluid].sum() / max(size[seen_head].sum(), 1e-12),
            "filled": z(fill(pixels, fluid, median)) - before,
            "turned": seen(turned).sum() / n_head,
            "elsewhere": z(fill(pixels, turned, median)) - before,
        })  # fmt: skip
    return rows


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("sets", nargs="+", metavar="AD_NC", help="sets of slices")
    parser.add_argument("--checkpoint", default=PHANTOM, help="a model (weights/phantom.pth)")
    parser.add_argument("--slices", type=COUNT, default=200, help="slices of each set (200)")
    args = parser.parse_args(argv)
    checkpoint, device = load_checkpoint(args.checkpoint), pick_device()
    table = [["", "slices", *COLUMNS.values()]]
    for root in args.sets:
        slices = read_set(root)
        numbers = evenly(np.arange(len(slices.index)), args.slices)
        index = slices.index.iloc[numbers]
        images = slices.images[index.row.to_numpy(np.int64)]
        values = pd.DataFrame(look_at(checkpoint, images, device))
        bootstrap = Bootstrap(index.group)
        cells = []
        for name in COLUMNS:
            total = bootstrap.total(values[name].to_numpy())
            ci95 = interval(total / bootstrap.total(np.ones(len(values))))
            cells.append(cell({name: values[name].mean(), "ci95": {name: ci95}}, name))
        table.append([str(root), str(len(values)), *cells])
    print("\n".join(format_table(table)))


if __name__ == "__main__":
    run_script(main)
