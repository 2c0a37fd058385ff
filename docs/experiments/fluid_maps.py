"""Do the maps of the shipped weights light the fluid of a slice, and does the score depend on it?

    python -m docs.experiments.fluid_maps OASIS/AD_NC VARIED/AD_NC

Fluid is what is darker than half the median grey of the head (adnc.scoring.baselines). Of some
slices of each set, evenly chosen: the share of the head that is fluid; the share of an attribution
map (integrated gradients, absolute values, smoothed as in the pictures) that lies on it; the
change of z_AD - z_NC if the fluid is filled with the median grey (deletion); and the change if the
shape of the fluid, turned by 180 degrees, is filled so, where it lies on the head and on no fluid:
an area of a similar form, but smaller. Means, with intervals over subjects.
"""

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import zoom

from adnc.cli import COUNT, Parser, run_script
from adnc.data.augment import eval_transform
from adnc.data.pixels import find_head
from adnc.explain.attribution import attribute, margin, smooth
from adnc.scoring.assess import format_table
from adnc.scoring.metrics import Bootstrap, interval
from adnc.scoring.plots import evenly
from dataset import decode_set
from predict import PHANTOM
from utils import build_model, load_checkpoint, pick_device

DARK = 0.5  # of the median grey of the head
COLUMNS = {
    "fluid": "share of the head that is fluid",
    "map": "share of the map on it",
    "filled": "change of z if it is filled",
    "elsewhere": "change of z if its turned shape is filled",
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
    options = {name: checkpoint[name] for name in ("image_size", "mean", "std")}

    def view(pixels):
        return eval_transform(torch.from_numpy(pixels)[None, None].to(device), **options)

    def z(pixels):
        with torch.inference_mode():
            return float(margin(model)(view(pixels)))

    baseline = view(checkpoint["mean_slice"].numpy())
    rows = []
    for pixels in images:
        fluid, head, median = find_fluid(pixels)
        turned = np.rot90(fluid, 2) & head & ~fluid
        size = abs(smooth(attribute("integrated-gradients", model, view(pixels), baseline)))[0]
        scale = np.array(size.shape) / pixels.shape
        on_fluid = zoom(fluid.astype(np.float32), scale, order=1) > 0.5
        on_head = zoom(head.astype(np.float32), scale, order=1) > 0.5
        before = z(pixels)
        rows.append({
            "fluid": fluid.sum() / max(head.sum(), 1),
            "map": size[on_fluid].sum() / max(size[on_head].sum(), 1e-12),
            "filled": z(fill(pixels, fluid, median)) - before,
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
        slices = decode_set(root, progress=None)
        numbers = evenly(np.arange(len(slices.index)), args.slices)
        index = slices.index.iloc[numbers]
        images = slices.images[index.row.to_numpy(np.int64)]
        values = pd.DataFrame(look_at(checkpoint, images, device))
        bootstrap = Bootstrap(index.group)
        cells = []
        for name in COLUMNS:
            total = bootstrap.total(values[name].to_numpy())
            low, high = interval(total / bootstrap.total(np.ones(len(values))))
            cells.append(f"{values[name].mean():.3f} [{low:.3f}, {high:.3f}]")
        table.append([str(root), str(len(values)), *cells])
    print("\n".join(format_table(table)))


if __name__ == "__main__":
    run_script(main)
