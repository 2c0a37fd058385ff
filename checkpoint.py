"""Checkpoints: data, never code.

Not run by itself. A checkpoint holds plain Python values and tensors, is written beside the old one and moved into its
place, and is read with weights_only=True. A file that is damaged, foreign or of another version gets a sentence.

best_model.pth is a model with all that predict.py needs; last.pth is a run with all that --resume needs.
"""

import re
import zipfile

import torch

from dataset import CLASSES, remember, split_hash
from modules import VARIANTS, convnext
from slices import FACTS, LARGEST, MEAN, STD, summarise
from utils import write_atomically

FORMAT = 2  # raise it when an older checkpoint can no longer be read

# ---------------------------------------------------------------- what a checkpoint holds


def _number(low, high, kind=(int, float)):
    return lambda value: isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


def _list(of):
    return lambda value: isinstance(value, list) and all(map(of, value))


def _dict(**fields):
    return lambda value: isinstance(value, dict) and all(name in value and test(value[name])
                                                         for name, test in fields.items())


def _mapping(of):
    return lambda value: isinstance(value, dict) and all(isinstance(name, str) and of(v) for name, v in value.items())


def _or_none(test):
    return lambda value: value is None or test(value)


def _text(value):
    return isinstance(value, str)


def _anything(value):
    return True


def _tensor(value):
    return torch.is_tensor(value) and value.layout == torch.strided and value.is_floating_point()


def _same_length(*names):
    return lambda value: len({len(value[name]) for name in names}) == 1


_FINITE = _number(-1e30, 1e30)
_ROW = _dict(epoch=_number(1, 1e6, int), val_accuracy=_FINITE, val_loss=_FINITE)
_SEEN = _dict(subjects=_list(_text), scans=_list(_text), slices=_list(_text), unknown=lambda v: isinstance(v, bool))

# name -> (is it that?, what is expected); what a run learns only at its end may be missing
SCHEMA = {
    "model": (_dict(variant=lambda v: v in VARIANTS, in_chans=lambda v: v == 1, num_classes=lambda v: v == 2,
                    drop_path_rate=_number(0, 1)), "a variant of ConvNeXt for one channel and two classes"),
    "image_size": (_number(32, 4096, int), "a side from 32 to 4096"),
    "slice_size": (lambda v: _list(_number(1, LARGEST, int))(v) and len(v) == 2, "the height and width of slices"),
    "mean": (_FINITE, "a number"), "std": (_number(1e-6, 1e6), "a number over 0"),
    "split_by": (lambda v: v in ("subject", "slice"), "subject or slice"), "split_hash": (_text, "a text"),
    "seen": (_SEEN, "fingerprints of subjects, scans and slices"),
    "init": (_or_none(_dict(file=_text, seen=_or_none(_SEEN))), "a file and whom it has seen"),
    "flags": (_dict(epochs=_number(1, 1e6, int)), "the flags of a run"), "precision": (_text, "a text"),
    "machine": (_text, "a text"),
    "statistics": (_dict(**dict.fromkeys(FACTS, lambda v: _list(_FINITE)(v) and len(v) == 2)),
                   f"two numbers for each of {', '.join(FACTS)}"),
    "epoch": (_number(0, 1e6, int), "a whole number"), "weights": (_mapping(_tensor), "tensors by name"),
}  # fmt: skip
OF_A_FINISHED_RUN = {
    "baselines": (_dict(share_AD=_number(0, 1), windows=lambda v: isinstance(v, dict) and all(map(_FINITE, v.values())),
                        weights=_list(_FINITE), bias=_FINITE), "the fitted baselines"),
    "calibration": (lambda v: _dict(temperature=_number(1e-6, 1e6), threshold=_FINITE, threshold_rule=_text,
                                    subjects=_number(0, 1e9, int), scores=_list(_FINITE), weights=_list(_FINITE))(v)
                    and _same_length("scores", "weights")(v), "a temperature, a threshold and scores"),
}  # fmt: skip
OF_A_RUN_THAT_GOES_ON = {
    "optimizer": (_mapping(_anything), "the state of AdamW"), "scaler": (_mapping(_anything), "that of the scaler"),
    "ema": (_or_none(_mapping(_anything)), "the averaged weights"), "history": (_list(_ROW), "rows of figures"),
    "progress": (_dict(step=_number(0, 1e9, int), sums=_list(_list(lambda v: isinstance(v, float)))),
                 "the step within the epoch, and the sums up to it"),
}  # fmt: skip


def check(checkpoint, path):
    """ValueError if a loaded checkpoint is not what SCHEMA says."""
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of this project; expected best_model.pth of a run")
    if checkpoint["format"] != FORMAT:
        raise ValueError(f"{path} has format {checkpoint['format']}, this version reads {FORMAT}; train it anew, or "
                         "use the version that wrote it")
    if checkpoint.get("classes") != list(CLASSES):
        raise ValueError(f"{path} knows the classes {checkpoint.get('classes')}; expected {list(CLASSES)}")
    optional = {name: rule for name, rule in OF_A_FINISHED_RUN.items() if name in checkpoint}
    resumable = OF_A_RUN_THAT_GOES_ON if "optimizer" in checkpoint else {}
    for name, (fits, expected) in (SCHEMA | optional | resumable).items():
        if name not in checkpoint:
            raise ValueError(f"{path} is no whole checkpoint: it has no {name}; expected {expected}")
        if not fits(checkpoint[name]):
            raise ValueError(f"{path} is no checkpoint to be used: its {name} is not {expected}")


# ---------------------------------------------------------------- files


def save_checkpoint(path, **content):
    """Save plain Python values and tensors, so that they load with weights_only=True. OSError if it cannot be."""

    def write(temporary):
        try:
            torch.save({"format": FORMAT, **content}, temporary)
        except RuntimeError as problem:  # of PyTorch's own writer, on a full disk
            raise OSError(f"no space, or a file system that refuses: {str(problem).splitlines()[0]}") from None

    write_atomically(path, write)


def load_tensors(path):
    """What torch.save wrote, on the CPU, as data and never as code. ValueError if it is not there or something else."""
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; expected one that torch.save or train.py wrote") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder; expected a file, such as best_model.pth of a run") from None
    except Exception as problem:  # torch.load raises nearly anything on a foreign file
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(problem))  # torch colours its advice
        reason = re.split(r"[.:]\s|\n", text)[0] or type(problem).__name__
        raise ValueError(f"{path} cannot be read as tensors ({reason}); expected a file of torch.save") from None


def load_checkpoint(path):
    """A checkpoint of `save_checkpoint`, checked. ValueError for a file of another kind or version or a damaged one."""
    checkpoint = load_tensors(path)
    check(checkpoint, path)
    return checkpoint


def build_model(checkpoint):
    """The model that a checkpoint describes, with its weights; ValueError where they are those of another one."""
    arguments = dict(checkpoint["model"])
    model = convnext(arguments.pop("variant"), **arguments)
    try:
        model.load_state_dict(checkpoint["weights"])
    except RuntimeError as problem:
        first = str(problem).splitlines()[1:2] or [str(problem)]
        raise ValueError(f"the weights are not those of a ConvNeXt {checkpoint['model']['variant']}: "
                         f"{first[0].strip()}") from None
    return model


# ---------------------------------------------------------------- a run


def describe_machine(job):
    """The device, threads and processes on which the bits of a run depend, in words."""
    name = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "cpu"
    return f"{name}, {torch.get_num_threads()} threads, {job.ranks.world} processes"


def describe_model(args, index, images, job, init=None):
    """What a checkpoint says of its model beside the weights: all that predict.py needs. `init` tells of the weights of
    --init: {"file", "seen"}, the latter None where the file does not say. Whom they have seen, this model has seen."""
    seen = remember(index[index.split != "test"])  # trained and chosen on
    if init and init["seen"]:
        theirs = init["seen"]
        seen = {name: value or theirs[name] if name == "unknown" else sorted({*value, *theirs.get(name, [])})
                for name, value in seen.items()}
    return {
        "model": {"variant": args.model, "in_chans": 1, "num_classes": 2, "drop_path_rate": args.drop_path},
        "classes": list(CLASSES), "image_size": args.image_size, "slice_size": list(images.shape[1:]),
        "mean": MEAN, "std": STD, "split_by": args.split_by, "split_hash": split_hash(index),
        "statistics": summarise(index[index.split == "train"]),
        "seen": seen, "init": init, "flags": vars(args), "precision": job.precision, "machine": describe_machine(job),
    }


def save_run(state, job, facts, history, progress, everybody=None):
    """last.pth: all that a run needs to go on from `progress` in the epoch behind `history`. `state` is (model, ema or
    None, optimizer, scaler), `facts` is of `describe_model`, `everybody` lists the sums of `epoch.train_epoch` of each
    process (at the start of an epoch they are the same). Random states are not among it: what is random in a step comes
    from (seed, epoch, step)."""
    model, ema, optimizer, scaler = state
    sums = everybody or [progress["sums"].tolist()] * job.ranks.world
    save_checkpoint(
        job.out / "last.pth", weights=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
        ema=ema.state_dict() if ema is not None else None, epoch=len(history), history=history,
        progress={"step": progress["step"], "sums": sums}, **facts,
    )


def restore_run(state, last, args, job, facts):
    """Put last.pth, as loaded, back into `state` and say what will differ; returns the progress within the next epoch.
    ValueError where it is of other slices, or does not fit."""
    model, ema, optimizer, scaler = state
    path = job.out / "last.pth"
    if args.epochs < last["epoch"]:
        raise ValueError(f"--epochs is {args.epochs}, but {job.out} has trained {last['epoch']}; expected no fewer")
    if last["split_hash"] != facts["split_hash"]:
        raise ValueError(f"these slices are not those that {job.out} was trained on; expected the same files and split")
    try:
        model.load_state_dict(last["weights"])
        optimizer.load_state_dict(last["optimizer"])
        if last["precision"] == job.precision:  # the scale of another one would be wrong
            scaler.load_state_dict(last["scaler"])
        if ema is not None:
            ema.load_state_dict(last["ema"])
        step, sums = last["progress"]["step"], torch.tensor(last["progress"]["sums"])
        if len(sums) == job.ranks.world:
            mine = sums[job.ranks.rank]
        else:  # the first process takes over what all have summed
            mine = torch.cat((sums[:, :3].sum(0) * (job.ranks.rank == 0), sums[0, 3:]))
        if mine.shape != (5,):
            raise ValueError("its sums are not five")
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as problem:
        raise ValueError(f"{path} does not fit the run ({str(problem).splitlines()[0]}); expected its own last.pth"
                         ) from None
    job.log(f"resumed after epoch {last['epoch']}" + f" and {step} steps of the next" * (step > 0))
    if last["flags"]["epochs"] != args.epochs:
        job.log(f"--epochs was {last['flags']['epochs']}: the cosine now ends at epoch {args.epochs}, so that the "
                "learning rate jumps here, and the run is not the one that started with this length")
    if last["precision"] != job.precision:
        job.log(f"the run so far was in {last['precision']}, it goes on in {job.precision}")
    if last["machine"] != facts["machine"]:
        job.log(f"the run so far was on {last['machine']}, it goes on on {facts['machine']}: its bits will differ")
    return {"step": step, "sums": mine.to(job.device)}
