"""Writes training_history.csv and the final scores as scalars for TensorBoard."""

from pathlib import Path

from adnc.errors import InputError
from adnc.scoring.metrics import METRICS, UNITS


def import_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "--tensorboard needs tensorboard; install it with: python -m pip install tensorboard, "
            "or use --no-tensorboard"
        ) from None
    return SummaryWriter


class ScalarLog:
    """Scalars of a run in event files of TensorBoard in its folder.

    training_history.csv is the source of truth. The events of an earlier process are deleted and
    all rows written again, so that after a stop no epoch is missing or doubled.
    """

    def __init__(self, out, history):
        SummaryWriter = import_writer()
        for path in Path(out).glob("events.out.tfevents.*"):
            path.unlink()
        self.writer = SummaryWriter(str(out))
        for row in history:
            self.add_row(row)

    def add_row(self, row):
        """A row of the history: each number at its epoch."""
        for name, value in row.items():
            if name != "epoch" and value is not None:
                part, _, rest = name.partition("_")
                tag = f"{part}/{rest}" if part in ("train", "val") else name
                self.writer.add_scalar(tag, value, row["epoch"])
        self.writer.flush()

    def add_scores(self, part, scores, epoch):
        """The scores of metrics.json of a part ("val", "test"), at the epoch that was kept."""
        for unit in UNITS:
            if scores[unit] is None:
                continue
            for name in METRICS:
                value = scores[unit][name]
                if value is not None:
                    self.writer.add_scalar(f"final_{part}/{unit}_{name}", value, epoch)
        self.writer.flush()

    def close(self):
        self.writer.close()
