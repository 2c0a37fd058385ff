"""Make the weights that are shipped from a run on drawings.

    python train.py --recipe phantom --out runs/phantom
    python -m docs.experiments.transfer runs/phantom --sets OASIS/AD_NC
    python -m docs.experiments.fluid_maps OASIS/AD_NC --checkpoint runs/phantom/best_model.pth
    python -m docs.experiments.ship runs/phantom weights/phantom.pth --real "On ..." --maps "On ..."

The file is best_model.pth with its weights in float16, half as large, and without the paths of the
machine that made it. Printed is how far its p_AD are from those of float32, on the test of the
run. `--real` is a sentence on what the scores are worth on real people, which every prediction
ends with; `--maps` one on what its attribution maps show there, which the report repeats. A run
on anything but drawings is refused: its weights must not be shipped.
"""

from pathlib import Path

import numpy as np
import torch
from scipy.special import expit

from adnc.cli import Parser, run_script
from adnc.errors import InputError
from adnc.files import require_new
from dataset import decode_set
from predict import predict_checkpoint
from utils import load_checkpoint, save_checkpoint


def halve(weights):
    """A state dict with its floating-point tensors in float16. InputError if one overflows."""
    halved = {}
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            tensor = tensor.half()
            if not tensor.isfinite().all():
                raise InputError(f"{name} has values beyond those of float16")
        halved[name] = tensor
    return halved


def strip(checkpoint, real, maps):
    """The checkpoint without paths, with halved weights and the sentences `real` and `maps`."""
    if not checkpoint["exposure"].get("drawn"):
        raise InputError(
            "the run was not trained on drawings alone: its weights must not be shipped"
        )
    flags = {**checkpoint["flags"], **dict.fromkeys(("data", "out", "init", "split"))}
    exposure = {**checkpoint["exposure"], "sets": []}
    weights = halve(checkpoint["weights"])
    own = {"weights": weights, "flags": flags, "exposure": exposure, "data": None}
    return {**checkpoint, **own, "real": real, "maps": maps}


def largest_difference(one, other, root):
    """The largest difference of p_AD between two checkpoints on the test slices of a set, and their
    number."""
    slices = decode_set(root, progress=None).part("test")
    p = []
    for checkpoint in (one, other):
        p.append(expit(predict_checkpoint(checkpoint, slices, device=torch.device("cpu"))))
    return np.abs(p[0] - p[1]).max(), len(slices)


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="a run of --recipe phantom")
    parser.add_argument("file", metavar="FILE", help="the file to write, as weights/phantom.pth")
    parser.add_argument("--real", required=True, metavar="TEXT", help="what it is worth")
    parser.add_argument("--maps", required=True, metavar="TEXT", help="what its maps show")
    args = parser.parse_args(argv)
    require_new(args.file, "FILE")
    checkpoint = load_checkpoint(Path(args.run) / "best_model.pth")
    small = strip(checkpoint, args.real, args.maps)
    del small["format"]
    Path(args.file).parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(args.file, **small)
    difference, n = largest_difference(checkpoint, load_checkpoint(args.file), checkpoint["data"])
    size = Path(args.file).stat().st_size
    print(
        f"{args.file}, {size / 1e6:.2f} MB: the largest difference of p_AD from float32 is "
        f"{difference:.1e}, on {n:,} test slices"
    )


if __name__ == "__main__":
    run_script(main)
