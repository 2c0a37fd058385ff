"""Draw a synthetic imitation of the ADNI `AD_NC` set, for users without access to ADNI.

    python -m tools.phantom ADNI                              # 60 subjects, 140 scans, 2,800 slices
    python -m tools.phantom ADNI --subjects 680 --seed 1      # the size of the real set
    python -m tools.phantom LOCAL --cue local --subjects 250  # a cue that a blur does not show
    python -m tools.phantom VARIED --cue varied               # each slice from another scanner
    python -m tools.phantom HEADS --volumes 4                 # four heads with a skull, as NIfTI
    python -m tools.phantom --sheet figures/phantom.png       # a contact sheet only

writes

    ADNI/meta_data_with_label.json                       label and subject of each scan
    ADNI/AD_NC/{train,test}/{AD,NC}/<scan>_<slice>.jpeg  256 x 240, 8-bit grey, 20 slices per scan

The brain is a parametric shape. One number per subject, its atrophy, drives the anatomy; the
classes overlap, so that the best possible subject-level accuracy is about 0.915. With --cue local
only the temporal horn and the hippocampus show it; each subject has one scan of six slices.

With --cue varied the slices are 112 x 112, four along each plane. Contrast, sharpness, noise, pose
and background of each are drawn at random. Disease also widens ventricles and sulci, and so does
age. Beside AD_NC are latents.csv (the sizes that were drawn), slices.csv (the fluid that each slice
shows), subjects.csv and extraction.json (how predict.py cuts a volume for such a model).

--volumes writes HEADS/heads/sub-*_T1w.nii.gz, HEADS/brains/ and HEADS/heads.csv. A result on the
phantom shows that the code works; it says nothing about Alzheimer's disease.
"""

from adnc.cli import SEED, Parser, new_png, number, run_script
from adnc.phantom.draw import CUES, contact_sheet, draw, draw_volumes
from adnc.phantom.varied import VARIATIONS


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("out", nargs="?", metavar="OUT", help="folder to draw into")
    add = parser.add_argument_group("what is drawn").add_argument
    subjects, heads = number(10, 5000, int), number(1, 100, int)
    add("--subjects", type=subjects, metavar="N", help="the real set has 680 (60)")
    add("--cue", choices=CUES, help="see above (global)")
    add(
        "--without", nargs="+", choices=VARIATIONS, default=[], metavar="VARIATION",
        help=f"with --cue varied, leave out some of {', '.join(VARIATIONS)}",
    )  # fmt: skip
    add("--seed", type=SEED, default=0, metavar="S", help="another seed, another set (0)")
    add("--volumes", type=heads, metavar="N", help="draw N heads as NIfTI instead of slices")
    add("--sheet", type=new_png, metavar="PNG", help="save a contact sheet; alone without OUT")
    args = parser.parse_args(argv)

    if not args.out and not args.sheet:
        parser.error("nothing to do: expected OUT, a folder to draw into, or --sheet PNG")
    if args.volumes and not args.out:
        parser.error("--volumes needs OUT, a folder to draw into")
    if args.volumes and (args.subjects or args.cue):
        parser.error("--volumes draws heads of the global cue; leave out --subjects and --cue")
    if args.sheet and args.cue in ("local", "varied"):
        parser.error("--sheet shows the global cue; leave out --cue")
    if args.without and args.cue != "varied":
        parser.error("--without needs --cue varied, the only one with these variations")
    args.subjects = args.subjects or 60
    args.cue = args.cue or "global"
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.volumes:
        print(f"drew {draw_volumes(args.out, args.volumes, args.seed)}")
    elif args.out:
        out = draw(args.out, args.subjects, args.seed, cue=args.cue, without=args.without)
        print(f"drew {out}")
    if args.sheet:
        print(f"drew {contact_sheet(args.sheet, args.subjects, args.seed)}")


if __name__ == "__main__":
    run_script(main)
