"""Train a ConvNeXt to tell AD from NC.

    python train.py --demo                             # no data needed: draws a phantom set, under 2 minutes on a CPU
    python train.py --data ADNI/AD_NC --out runs/tiny  # the documented recipe; one CUDA GPU
    torchrun --nproc-per-node 4 train.py --data ADNI/AD_NC --out runs/tiny4  # a quarter of each batch on each

A run folder holds best_model.pth, last.pth, config.json (every value), split.csv (who is where), training_log.txt,
training_history.csv, lr_schedule.png, training_curves.png, val/ and test/. The epoch is chosen on val (unless --keep
last); test is read once, at the end. `--out RUN --resume` resumes a run that was stopped, at any moment, and ends where
it would have ended. Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP end the step, save and say so (exit status 130, 143, 138, 129).
"""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from adnc.files import read_bytes
from adnc.cli import AMOUNT, COUNT, POSITIVE, SEED, SHARE, SIDE, InputError, Parser, number, read_flags, run_script

DEMO_SUBJECTS = 80
# The flags of each recipe; explicit flags take precedence.
RECIPES = {
    "default": {},  # the documented one: the architecture of Liu et al. 2022, but not their training settings
    # few subjects: chosen on folds of the training set with the local cue, see docs/recipes.md
    "small": dict(model="narrow", image_size=112, epochs=10, batch_size=32, lr=2e-3, drop_path=0.0, keep="last"),
    # the small one, in a minute on two cores; with so few steps the last epoch is not reliably the best
    "demo": dict(model="narrow", image_size=64, epochs=4, batch_size=32, lr=2e-3, drop_path=0.0, val_fraction=0.2),
}
# What a ConvNeXt may differ from the paper's in: the names of modules.PAPER, which is not imported for --help.
ARCHITECTURE = ("norm", "stem", "downsample", "layer_scale", "init_std", "head_norm")
# What may differ when a run is resumed: where it runs and when it ends, not how it learns.
FREE_ON_RESUME = {"resume", "out", "data", "device", "epochs", "patience", "threshold", "no_cache", "compile",
                  "workers"}

# ---------------------------------------------------------------- flags


def make_parser():
    parser = Parser(__doc__)
    data = parser.add_argument_group("data and output")
    add = data.add_argument
    add("--data", metavar="AD_NC", help="folder with {train,test}/{AD,NC} (default: ./AD_NC, if it is there)")
    add("--demo", action="store_true", help="draw a phantom set into the cache once, and train a small model on it")
    add("--out", metavar="RUN", help="run folder, must be new (default: runs/<time>-<model>)")
    add("--resume", action="store_true", help="resume the run in --out; its flags are taken from config.json")
    add("--skip-bad", action="store_true", help="leave out files that cannot be used, and list them in skipped.csv")
    parser.add_subject_pattern(data)
    add("--no-cache", action="store_true", help="decode into memory at each start, instead of once into the cache")
    add("--recipe", choices=RECIPES, default="default", help="small: narrow, 112 px, 10 epochs, for few subjects")
    add = parser.add_argument_group("split").add_argument
    add("--split", metavar="FILE", help="take who is where from the split.csv of an earlier run, or one made by hand")
    add("--val-fraction", type=SHARE, default=0.1, metavar="F", help="share of train/ for validation (0.1)")
    add("--split-by", choices=("subject", "slice"), default="subject", help="slice LEAKS, to show what it does")
    add("--fold", type=int, metavar="K", help="hold out fold K (from 0) of --folds of train/ instead of test/")
    add("--folds", type=int, metavar="N", help="number of folds of the cross-validation")
    add("--pool-test", action="store_true", help="folds of train/ and test/ together, where there are few subjects")
    add("--drop-test-subjects", action="store_true", help="leave out of train/ who is also in test/")
    add("--subjects", type=COUNT, metavar="N", help="use N subjects of train/ only, to see how many it takes")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="tiny", metavar="V",
        help="narrow, atto, femto, pico, nano, tiny, small, base or large; cnn: a plain CNN without drop-path (tiny)")
    add("--image-size", type=SIDE, default=224, metavar="PX", help="side of the model's square input (224)")
    add("--drop-path", type=SHARE, default=0.1, metavar="P", help="drop-path rate of the last block (0.1)")
    add("--norm", choices=("layer", "batch"), help="normalisation (that of the variant: layer, of narrow batch)")
    add("--stem", choices=("patch", "conv"), help="4x4 with stride 4, or 3x3 twice and pooling (that of the variant)")
    add("--downsample", choices=("patch", "pool"), help="2x2 with stride 2, or 3x3 and pooling (that of the variant)")
    add("--head-norm", choices=("layer", "batch"), help="normalisation of the pooled features (layer)")
    add("--layer-scale", type=AMOUNT, metavar="G", help="start of LayerScale (that of the variant)")
    add("--init-std", type=POSITIVE, metavar="SD", help="of the initial weights (that of the variant)")
    add("--init", metavar="FILE", help="start from weights of torchvision, timm, the paper or this project")
    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", type=COUNT, default=100, metavar="N", help="length of the schedule (100)")
    add("--batch-size", type=COUNT, default=64, metavar="N", help="slices a step (64)")
    add("--lr", type=POSITIVE, default=1e-4, help="peak learning rate of AdamW (1e-4)")
    add("--weight-decay", type=AMOUNT, default=1e-4, metavar="W", help="not on 1-D parameters (1e-4)")
    add("--label-smoothing", type=SHARE, default=0.1, metavar="S", help="of the cross-entropy (0.1)")
    add("--clip-grad", type=POSITIVE, default=1.0, metavar="NORM", help="largest norm of the gradient (1.0)")
    add("--warmup-epochs", type=AMOUNT, default=1, metavar="N", help="linear warm-up before the cosine (1)")
    add("--patience", type=number(0, 1e6, int), default=20, metavar="N",
        help="stop after N epochs without a better val (20; 0, or --keep last: never)")
    add("--keep", choices=("best", "last"), default="best", help="the epoch: best on validation, or the last")
    add("--threshold", choices=("0.5", "youden"), default="0.5", help="p_AD of an AD; youden: from validation (0.5)")
    add("--ema", type=SHARE, default=0.0, metavar="D", help="validate and keep a moving average, e.g. 0.999 (0: off)")
    add = parser.add_argument_group("augmentation").add_argument
    add("--no-flip", action="store_true", help="no horizontal flip (on AD_NC it swaps front and back)")
    add("--no-augment", action="store_true", help="train on the view of the evaluation; memorises soonest")
    add("--mixup", type=AMOUNT, default=0.0, metavar="A", help="MixUp with Beta(A, A), e.g. 0.2 (0: off)")
    add("--cutmix", type=AMOUNT, default=0.0, metavar="A", help="CutMix with Beta(A, A), e.g. 1.0 (0: off)")
    add = parser.add_argument_group("machine").add_argument
    add("--amp", choices=("auto", "fp16", "bf16", "off"), default="auto", help="auto: fp16 on CUDA, native bf16 on CPU")
    add("--compile", action="store_true", help="compile the step; for long runs, and needs a C++ compiler or CUDA")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (auto: CUDA if there is one)")
    add("--workers", type=number(0, 256, int), default=0, metavar="N",
        help="processes that fetch batches; the result is the same (0: none, two if a set does not fit onto the GPU)")
    add("--deterministic", action="store_true", help="on CUDA only kernels that give the same bits again; slower")
    add("--seed", type=SEED, default=0, metavar="S", help="of split, weights, order and augmentation (0)")
    return parser


def changed_flags(saved, args):
    """The flags, as words, that a run must keep when it is resumed and that are other ones now."""
    return ", ".join(f"--{name.replace('_', '-')} was {value}" for name, value in saved.items()
                     if name not in FREE_ON_RESUME and getattr(args, name, value) != value)


def parse_args(argv=None):
    """The flags; where not given, those of --demo, or on --resume those of the run."""
    parser = make_parser()
    args = parser.parse_args(argv)  # for --recipe, --resume and --out; explicit flags win over what these set
    parser.set_defaults(**RECIPES["demo" if args.demo and args.recipe == "default" else args.recipe])
    if args.resume:
        if not args.out:
            parser.error("--resume needs --out RUN, the folder of the run to resume")
        try:
            config = json.loads(read_bytes(Path(args.out) / "config.json"))
            saved = config["flags"]
            where = config["used"]["data"]
            if not saved["demo"] and os.path.abspath(saved["data"] or "AD_NC") != where:
                saved["data"] = where  # it is resumed from another folder
            if saved["split"]:
                saved["split"] = str(Path(args.out) / "split.csv")  # which holds the same
        except (OSError, ValueError, KeyError, TypeError) as problem:
            parser.error(f"{args.out} holds no run to resume (config.json: {problem!r})")
        # as words, which are checked like those of the command line
        parser.set_defaults(**{name: value if isinstance(value, bool) else str(value) for name, value in saved.items()
                               if name not in ("resume", "out") and value is not None})
    args = parser.parse_args(argv)
    if args.resume:
        changed = changed_flags(saved, args)
        if changed:
            parser.error(f"a resumed run keeps its flags ({changed}); leave them out, or start a new run")
    if args.warmup_epochs > args.epochs:
        parser.error(f"--warmup-epochs is {args.warmup_epochs:g}, longer than --epochs {args.epochs}: the learning "
                     "rate would never reach --lr")
    if args.demo and args.data:
        parser.error("--demo draws its own data; leave out --data, or --demo")
    if (args.fold is None) != (args.folds is None):
        parser.error("--fold and --folds go together, as in --fold 0 --folds 5")
    if args.pool_test and args.folds is None:
        parser.error("--pool-test puts test/ into the folds; it goes with --fold and --folds")
    if args.split and (args.folds is not None or args.drop_test_subjects or args.split_by == "slice"):
        parser.error("--split names every slice's part; leave out --fold, --drop-test-subjects and --split-by slice")
    given = [name for name in ARCHITECTURE if getattr(args, name) is not None]
    if args.model == "cnn" and given:
        parser.error(f"--model cnn has no --{given[0].replace('_', '-')}; leave it out")
    if args.split and args.subjects:
        parser.error("--split names who is in train; leave out --subjects")
    if args.folds is not None and args.drop_test_subjects:
        parser.error("--drop-test-subjects looks into test/, which --folds does not read; leave out one of them")
    return args


if __name__ == "__main__":
    ARGS = read_flags(parse_args)

# late, so that --help answers at once
import pandas as pd
import torch

import utils as checkpoint
from adnc.scoring import plots
from adnc.scoring.assess import assess_run
from adnc.data.cache import cache_folder
from utils import Run, load_checkpoint, save_checkpoint
from dataset import load_set, make_loader
from adnc.engine import TrainState, check_batches, make_mix, schedule, train_one_epoch, validate
from adnc.files import clear_folder, locked, make_log, own_folder, write_csv
from adnc.cpu_engine import COVERAGE
from modules import VARIANTS, describe_model
from adnc.distributed import Stopped, StopRequest, explain_end, seed_everything, start
from adnc.data.subjects import describe_split, describe_transfer
from adnc.cli import fingerprint, near, seed_of

# ---------------------------------------------------------------- data and run folder


def find_data(args):
    """The folder AD_NC to train on; for --demo it is drawn into the cache, once."""
    if args.data:
        return args.data
    if args.demo:
        return demo_data()
    if os.path.isdir("AD_NC"):
        return "AD_NC"
    raise InputError(
        "no data: there is no ./AD_NC here, and neither --data nor --demo was given\n"
        "  python train.py --data AD_NC    trains on that folder: {train,test}/{AD,NC}/<scan>_<slice>.jpeg\n"
        "  python train.py --demo          needs no data: it draws a synthetic set first"
    )


def demo_data():
    """The phantom set of --demo, drawn by phantom.py on the first call; another one where its code has changed."""
    here = Path(__file__).parent
    version = fingerprint("".join((here / name).read_text() for name in ("anatomy.py", "phantom.py")), 8)
    folder = cache_folder() / f"phantom-{DEMO_SUBJECTS}-{version}"
    if not folder.is_dir():
        draft = folder.with_name(f"{folder.name}.{os.getpid()}")  # another run may be drawing it, too
        try:
            draft.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise OSError(f"{draft} cannot be made: {problem.strerror}; name a folder that can be written with the "
                          "environment variable XDG_CACHE_HOME") from None
        print(f"drawing a phantom set of {DEMO_SUBJECTS} subjects into {folder}, once", flush=True)
        words = [sys.executable, here / "phantom.py", draft, "--subjects", str(DEMO_SUBJECTS)]
        try:
            status = subprocess.run(words, stdout=subprocess.DEVNULL).returncode
            if status:
                raise SystemExit(status)  # it has said why
            with contextlib.suppress(OSError):  # another was faster
                os.replace(draft, folder)
            if not folder.is_dir():
                raise OSError(f"{draft} cannot be moved to {folder}; name another folder with XDG_CACHE_HOME")
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder / "AD_NC"


def open_run(args, held):
    """The run's folder: a new one, or on --resume the one that is there. It is for this process alone as long as the
    ExitStack `held` is open."""
    if not args.resume:
        default = f"runs/{datetime.now():%Y%m%d-%H%M%S}-{args.model}{'-LEAKY' * (args.split_by == 'slice')}"
        return held.enter_context(own_folder(args.out, default, ", or add --resume"))
    out = Path(args.out)
    held.enter_context(locked(out))
    if (out / "best_model.pth").exists() and not (out / "last.pth").exists():
        raise InputError(f"{out} has a best_model.pth but no last.pth to resume from, and a run never overwrites "
                         "another; choose a new --out")
    return out


def join(words):
    return shlex.join(map(str, words))


def how_to_resume(out):
    return f"resume with:\n  {join([near(sys.executable), near(__file__), '--out', out, '--resume'])}"


def what_is_left(run):
    """What a run that had to end has saved, for its error: what the file holds, not what was to be written."""
    if not run.last.exists():
        return f"nothing is left of the run: {run.last} is gone"
    epoch = load_checkpoint(run.last)["epoch"]
    best = f", and {run.best} the best epoch so far" * run.best.exists()
    return (f"the last good checkpoint is {run.last}, after epoch {epoch}{best}; a resumed run keeps its flags, so to "
            f"change them start a new one, or {how_to_resume(run.out)}")


# ---------------------------------------------------------------- the loop

HEADER = "epoch        lr     loss     acc  val loss  val acc  bal acc   AUROC    img/s"


def format_epoch(row, best, remark):
    if row["skipped_steps"]:
        remark = "; ".join(filter(None, [f"{row['skipped_steps']} steps skipped, not finite", remark]))
    auroc = "-" if row["val_scan_auroc"] is None else f"{row['val_scan_auroc']:.3f}"
    return (f"{row['epoch']:>5}  {row['lr']:>8.2e}  {row['train_loss']:>7.4f}  {row['train_accuracy']:>6.3f}  "
            f"{row['val_loss']:>8.4f}  {row['val_accuracy']:>7.3f}  {row['val_balanced_accuracy']:>7.3f}  {auroc:>6}  "
            f"{row['images_per_s']:>7.1f}  {'best ' if best else ''}{remark}").rstrip()


def kept_of(history, keep):
    """The row of the epoch that is kept, or None: the last, or the one with the best validation accuracy; the lower
    loss decides between equals, for a whole-class guess ties in many epochs, and then the earlier row."""
    if keep == "last":
        return history[-1] if history else None
    return max(history, key=lambda row: (row["val_accuracy"], -row["val_loss"]), default=None)


def make_batches(state, train, args):
    """The batches of the training set, and the generator that orders them; `state.forward` is set to what a step
    calls."""
    runtime, order = state.runtime, torch.Generator()
    # a compiled step wants one shape, and no process may be without images; but what fills up counts for BatchNorm
    filled = (args.compile or runtime.world > 1) and not state.whole
    size = -(-args.batch_size // runtime.world) if filled else 0
    share = runtime.rank, runtime.world, size
    if args.compile:
        state.model.compile(dynamic=False)  # in place: the names of the weights stay clean
    state.forward = runtime.wrap(state.model)
    return make_loader(train, args.batch_size, generator=order, device=runtime.device, share=share,
                       workers=args.workers), order


def fit(state, slices, args, run):
    """Train up to args.epochs, keep the epoch that --keep names, stop early. Returns whether training came to
    its end; False if a signal stopped it, and last.pth then holds the state after the last step."""
    runtime, train, val = state.runtime, slices.part("train"), slices.part("val")
    batches, order = make_batches(state, train, args)
    mix, best = make_mix(args), kept_of(state.history, args.keep)
    if runtime.is_rank_0:
        plots.plot_lr(run.out / "lr_schedule.png", **schedule(args, len(batches)))
        if state.history:  # a killed run may have saved an epoch and not yet listed it
            write_csv(run.out / "training_history.csv", pd.DataFrame(state.history))
    if args.compile:
        run.log("the step is compiled: the first one takes a minute or more")
    run.log(HEADER)
    while state.epoch < args.epochs:
        if best is not None and 0 < args.patience <= state.epoch - best["epoch"]:
            run.log(f"stopped early: no better validation in {args.patience} epochs")
            break
        order.manual_seed(seed_of(args.seed, state.epoch + 1))
        row = {"epoch": state.epoch + 1} | train_one_epoch(state, batches, len(train), args, mix)
        validated = None if runtime.stop.agreed else validate(state, val, args)
        if validated is None:  # a stop was requested: all processes agree on it, and hand over what they have summed up
            runtime.stop_requested()
            sums = runtime.gather(state.numbers())
            if runtime.is_rank_0:
                run.save(state, sums)
            run.log(f"saved after step {state.step} of {len(batches)} of epoch {state.epoch + 1}")
            return False
        scores, remark = validated
        state.history.append(row | scores)
        state.start_epoch()
        best = kept_of(state.history, args.keep)
        better = best is state.history[-1]
        if runtime.is_rank_0:
            if better:
                save_checkpoint(run.best, **run.card, weights=state.kept.state_dict(), epoch=state.epoch, val=best)
            run.save(state)
            write_csv(run.out / "training_history.csv", pd.DataFrame(state.history))
            run.log(format_epoch(state.history[-1], better and args.keep == "best", remark))
        if runtime.stop_requested():
            return False
    if runtime.is_rank_0:
        title = f"{args.model}{', LEAKY split by slice' if args.split_by == 'slice' else ''}"
        plots.plot_history(run.out / "training_curves.png", pd.DataFrame(state.history), best["epoch"], title)
        if runtime.device.type == "cuda":
            most = torch.cuda.max_memory_allocated(runtime.device) / 2**30
            run.log(f"memory of the GPU used at most: {most:.2f} GiB")
    return True


# ---------------------------------------------------------------- from the flags to the assessment


def main(args):
    with StopRequest() as stop, explain_end(args):
        try:
            train(args, stop)
        except Stopped as stopped:
            if not stopped.reported:
                print(f"stopped by {stopped} before the first step", file=sys.stderr)
                stopped.reported = True
            raise


def train(args, stop):
    runtime = start(args, stop)
    if args.model not in (*VARIANTS, "cnn"):
        raise InputError(f"there is no ConvNeXt variant {args.model!r}; choose one of {', '.join(VARIANTS)}, or cnn")
    bar = "decoding" if runtime.is_rank_0 else None
    slices = runtime.one_after_the_other(lambda: load_set(args, find_data(args), bar))
    with contextlib.ExitStack() as held:
        out = runtime.from_rank_0(lambda: open_run(args, held))
        state = None
        try:
            with explain_end(args):  # here, too: memory that runs out arrives below as an OSError
                state, run = prepare(args, slices, out, runtime)
                with stop.deferred():
                    done = fit(state, slices, args, run) and not runtime.stop_requested()
                if not done:
                    raise Stopped(128 + stop.agreed)
                runtime.leave()
                if runtime.is_rank_0:
                    finish(slices, args, run, runtime)
        except BaseException as problem:  # nothing trained, stopped by a signal, or an error of the user
            if state is None or (isinstance(problem, Exception) and not (state.epoch or state.step)):
                if runtime.is_rank_0 and not args.resume:
                    clear_folder(out)
            elif isinstance(problem, Stopped):
                run.log(f"stopped by {problem}; {how_to_resume(out)}")
                problem.reported = True
            elif isinstance(problem, (InputError, OSError)):
                raise type(problem)(f"{problem}\n{what_is_left(run)}") from None
            raise


def prepare(args, slices, out, runtime):
    """(TrainState, Run) before the first step, or where last.pth left them; writes config.json, split.csv and the
    first lines of the log."""
    log = make_log(out / "training_log.txt") if runtime.is_rank_0 else lambda line: None
    last = load_checkpoint(out / "last.pth") if args.resume and (out / "last.pth").exists() else None
    if not last and runtime.is_rank_0:
        checkpoint.write_start(out, args, slices, runtime)
    seed_everything(args.seed)
    model, init = checkpoint.start_model(args, log, last)
    state = TrainState(model, runtime, lr=args.lr, weight_decay=args.weight_decay, ema=args.ema)
    lines = runtime.from_rank_0(lambda: check_batches(state, len(slices.part("train")), args))
    run = Run(out, log, checkpoint.model_card(args, slices, runtime, init), checkpoint.record_pixels(slices))
    if last:
        changed = changed_flags(last["flags"] | {"split": args.split}, args)  # its own split.csv, by another name
        if changed:
            raise InputError(f"{out / 'config.json'} has other flags than {run.last}, in which {changed}; restore it, "
                             "or start a new run")
        checkpoint.restore_run(state, last, args, run, runtime)
        if runtime.is_rank_0:
            checkpoint.write_start(out, args, slices, runtime)
    elif runtime.is_rank_0:  # so that a run that was stopped in its first epoch is resumed, too, on the same slices
        run.save(state)
    several = f", {runtime.world} processes" * (runtime.world > 1)
    size = sum(p.numel() for p in model.parameters())
    if args.model == "cnn" and args.drop_path:
        log(f"--drop-path {args.drop_path:g} is not used: the plain CNN has none")
    log(f"{describe_model(args.model)}, {size:,} parameters, {args.image_size} px, {runtime.device}, "
        f"{runtime.precision}{several}; run folder {out}")
    for line in (*slices.passed, *describe_split(slices.index, args.split_by, slices.dropped),
                 *describe_transfer(slices.index, init), *lines):
        log(line)
    if args.skip_bad:
        log(f"left out, and listed in skipped.csv: {len(slices.bad)} files that cannot be used")
    return state, run


def finish(slices, args, run, runtime):
    """The assessment of the best model, and how to repeat it."""
    assess_run(slices, args, run, runtime)
    run.log(f"pictures in {run.out} and {run.out / 'test'}")
    if args.folds is None:
        predict, test = Path(__file__).with_name("predict.py"), Path(slices.root) / "test"
        python, model = near(sys.executable), ["--checkpoint", run.best, "--coverage", COVERAGE]
        run.log(f"predict again with:\n  {join([python, near(predict), test, *model])}")
        if args.demo:
            draw = [python, near(predict.with_name("phantom.py")), "HEADS", "--volumes", 2, "--seed", 1]
            read = [python, near(predict), "HEADS/brains", *model, "--report", "heads.html"]
            run.log("or two volumes (for which requirements-volumes.txt is installed), with a page to look at:\n  "
                    f"{join(draw)}\n  {join(read)}")


if __name__ == "__main__":
    run_script(main, ARGS)
