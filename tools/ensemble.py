"""Make one checkpoint of several runs, which then predict together.

    python -m tools.ensemble runs/fold? --out ensemble.pth
    python predict.py SLICES --checkpoint ensemble.pth
    python predict.py SLICES --checkpoint runs/fold?      # the same, without a file

RUNs are seeds of one split, calibrated together on their common validation, or the folds of one
cross-validation, calibrated out of fold: each subject by the members that have not seen it. Prints
the test scores. python -m tools.evaluate RUN... compares seeds with their mean logit.
"""

from pathlib import Path

from adnc.cli import Parser, run_script
from adnc.files import require_new
from adnc.scoring.assess import format_assessment
from adnc.scoring.ensemble import describe_ensemble, make_ensemble
from predict import describe_checkpoint, load_members, read_run_tables
from utils import save_checkpoint


def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder of train.py")
    parser.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument(
        "--uncalibrated", action="store_true",
        help="take any runs, and give no prediction sets, no threshold and no verdicts",
    )  # fmt: skip
    args = parser.parse_args(argv)
    require_new(args.out, "--out")

    members = load_members(args.runs)
    tables = None if args.uncalibrated else read_run_tables(members)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)  # fails before the work, if at all
    ensemble = make_ensemble(members, tables)
    print(describe_checkpoint(ensemble))
    for line in describe_ensemble(ensemble):
        print(line)
    if tables:
        print("\n".join(format_assessment(ensemble["scores"])))
    else:
        print("uncalibrated: no threshold, no prediction sets, no verdicts")
    save_checkpoint(args.out, **ensemble)
    print(f"wrote {args.out}; predict with: predict.py SLICES --checkpoint {args.out}")


if __name__ == "__main__":
    run_script(main)
