"""Checkpoints are data, never code, and a file that does not fit gets a sentence."""

import argparse
import collections
import datetime
import pathlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import utils
from adnc.errors import InputError
from adnc.pretrained import find_state_dict, load_tensors
from modules import convnext
from utils import build_model, load_checkpoint, save_checkpoint


def content(run_folder, name="best_model.pth"):
    """What a checkpoint holds, to be saved again with a change."""
    checkpoint = load_checkpoint(run_folder / name)
    del checkpoint["format"]
    return checkpoint


def test_a_checkpoint_rebuilds_the_model(run_folder, tmp_path):
    model = convnext("femto", drop_path_rate=0.1)
    arguments = {"variant": "femto", "in_chans": 1, "num_classes": 2, "drop_path_rate": 0.1}
    changed = {**content(run_folder), "weights": model.state_dict(), "model": arguments}
    save_checkpoint(tmp_path / "m.pth", **changed)
    again = build_model(load_checkpoint(tmp_path / "m.pth"))
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())
    )


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a checkpoint ran code')",))


def test_a_checkpoint_that_would_run_code_is_refused(run_folder, tmp_path):
    file = tmp_path / "m.pth"
    file.write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(
        InputError, match="contains .*exec, which cannot be read without running code"
    ):
        load_checkpoint(file)
    torch.save({"format": utils.FORMAT, **content(run_folder), "flags": Bomb()}, file)
    with pytest.raises(SystemExit, match="ran code"):  # torch runs the code if it is trusted
        torch.load(file, weights_only=False)
    with pytest.raises(InputError, match="contains .*exec"):
        load_checkpoint(file)


def test_foreign_cut_and_older_files_get_a_sentence(run_folder, tmp_path):
    file = tmp_path / "m.pth"
    with pytest.raises(InputError, match="there is no file"):
        load_checkpoint(file)
    whole = (run_folder / "best_model.pth").read_bytes()
    for part in (
        b"",
        b"text",
        b"epoch,loss\n1,2\n",
        whole[:2000],
        whole[: len(whole) // 2],
        whole[:-1000],
    ):
        file.write_bytes(part)
        with pytest.raises(InputError, match="cannot be read as tensors|is empty"):
            load_checkpoint(file)
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(InputError, match="not a checkpoint of this project"):
        load_checkpoint(file)
    torch.save({**content(run_folder), "format": utils.FORMAT - 1}, file)
    with pytest.raises(
        InputError, match=f"has format {utils.FORMAT - 1}, this version reads {utils.FORMAT}"
    ):
        load_checkpoint(file)
    save_checkpoint(file, **{**content(run_folder), "classes": ["AD", "NC"]})
    with pytest.raises(InputError, match="has the classes"):
        load_checkpoint(file)


class OnWindows:
    """Is pickled as a path of Windows is."""

    def __reduce__(self):
        return pathlib.WindowsPath, ("C:\\", "runs")


@pytest.mark.parametrize("beside", [
    argparse.Namespace(lr=1, out=Path("x")), {"best": 0.9}, None, OnWindows(),
    {"keys": frozenset("a")}, collections.Counter("a"), range(3),
    np.float64(0.9), np.int32(3), np.bool_(True), np.arange(3), np.dtype("f4"), np.array(["a"]),
    datetime.datetime(2026, 1, 1),
])  # fmt: skip
def test_init_reads_plain_data_beside_the_weights_and_safetensors(tmp_path, beside):
    state, file = {"head.weight": torch.ones(2, 8)}, tmp_path / "weights.pth"
    torch.save({"model": state, "args": beside}, file)
    assert set(find_state_dict(load_tensors(file))) == set(state)
    save_file(state, tmp_path / "weights.safetensors")
    assert set(find_state_dict(load_tensors(tmp_path / "weights.safetensors"))) == set(state)


@pytest.mark.parametrize("before, after", [
    (b"numpy._core.", b"numpy.core."), (b"numpy.core.", b"numpy._core."),  # NumPy 2 and 1
    (b"cpathlib\n", b"cpathlib._local\n"),  # Python 3.13
])  # fmt: skip
def test_init_reads_what_other_versions_wrote(tmp_path, before, after):
    state, file = {"head.weight": torch.ones(2, 8)}, tmp_path / "weights.pth"
    beside = [np.float64(0.9), np.arange(3), Path("x"), OnWindows()]
    torch.save({"model": state, "beside": beside}, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes().replace(before, after))
    content = load_tensors(file)
    assert set(find_state_dict(content)) == set(state)
    assert content["beside"][0] == 0.9 and str(content["beside"][3]) == r"C:\runs"


def test_init_of_a_pickled_model_says_how_to_save_its_weights(tmp_path):
    torch.save(convnext("atto"), tmp_path / "model.pth")
    with pytest.raises(
        InputError,
        match=r"contains modules.ConvNeXt, .* save the weights alone: torch.save\(model.st",
    ):
        load_tensors(tmp_path / "model.pth")


def test_init_in_a_newer_pickle_protocol_says_how_to_save_the_weights(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth", pickle_protocol=4)
    with pytest.raises(InputError, match="damaged, or cannot be read .* save the weights alone"):
        load_tensors(tmp_path / "x.pth")


def test_init_with_an_object_that_is_not_plain_says_which(tmp_path):
    torch.save({"a": torch.zeros(1), "b": collections.defaultdict(list)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="contains collections.defaultdict, .* the weights alone"):
        load_tensors(tmp_path / "x.pth")


def test_of_several_sets_of_weights_the_largest_then_the_first_is_taken():
    state = {"a": torch.zeros(1), "b": torch.zeros(2)}
    assert find_state_dict({"epoch": 3, "model": state, "model_ema": dict(state)}) is not state
    assert (
        find_state_dict({"head": {"a": torch.zeros(1)}, "state_dict": state}).keys() == state.keys()
    )
    with pytest.raises(InputError, match="holds a dict without tensors"):
        find_state_dict({"epoch": 3})
