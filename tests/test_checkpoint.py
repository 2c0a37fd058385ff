"""Checkpoints are data, never code, and what does not fit is said in a sentence."""

import argparse
import os
import pickle
import re
import shutil
from pathlib import Path

import command
import numpy as np
import pytest
import torch
from conftest import ROOT, train_steps, without_report
from safetensors.torch import save_file

import utils as checkpoint
import train
from adnc import cli as utils
from utils import build_model, load_checkpoint, save_checkpoint
from modules import convnext


def content(run_folder, name="best_model.pth"):
    """What a checkpoint holds, to be saved again with a change."""
    loaded = load_checkpoint(run_folder / name)
    loaded.pop("format")
    return loaded


def test_a_checkpoint_rebuilds_the_model(run_folder, tmp_path):
    model = convnext("femto", drop_path_rate=0.1)
    facts = {"variant": "femto", "in_chans": 1, "num_classes": 2, "drop_path_rate": 0.1}
    save_checkpoint(tmp_path / "m.pth", **content(run_folder) | {"weights": model.state_dict(), "model": facts})
    again = build_model(load_checkpoint(tmp_path / "m.pth"))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a checkpoint ran code')",))


def test_a_checkpoint_that_would_run_code_is_refused(run_folder, tmp_path):
    file = tmp_path / "m.pth"
    file.write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(ValueError, match="holds exec, which cannot be read without running code"):
        load_checkpoint(file)
    torch.save({"format": checkpoint.FORMAT, **content(run_folder), "flags": Bomb()}, file)
    with pytest.raises(SystemExit, match="ran code"):  # it is loaded, as code, by whoever trusts it
        torch.load(file, weights_only=False)
    with pytest.raises(ValueError, match="holds exec"):
        load_checkpoint(file)


@pytest.mark.parametrize("beside", [argparse.Namespace(lr=1, out=Path("x")), {"best": np.float64(0.9)}, None])
def test_init_reads_plain_data_beside_the_weights_and_safetensors(tmp_path, beside):
    state, file = convnext("atto").state_dict(), tmp_path / "weights.pth"
    torch.save({"model": state, "args": beside}, file)
    assert set(checkpoint.load_tensors(file)["model"]) == set(state)
    save_file(state, tmp_path / "weights.safetensors")
    assert set(checkpoint.load_tensors(tmp_path / "weights.safetensors")) == set(state)


def test_init_says_which_of_several_sets_of_weights_it_took(tmp_path):
    state = {name: torch.full_like(x, 0.5) for name, x in convnext("atto").state_dict().items()}
    torch.save({"teacher": {name: x + 1 for name, x in state.items()}, "student": state}, tmp_path / "w.pth")
    log, args = [], train.parse_args(["--model", "atto", "--init", str(tmp_path / "w.pth")])
    model, _ = checkpoint.start_model(args, log.append)
    assert "w.pth: 128 of 128 tensors loaded from student, left: 128 of teacher" in log[0]
    assert all((x == 0.5).all() for x in model.state_dict().values())


def test_init_of_a_file_that_would_run_code_or_is_no_file_is_refused_with_what_to_do(tmp_path):
    torch.save(convnext("atto"), tmp_path / "model.pth")
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    for name, sentence in (("model.pth", r"holds modules.ConvNeXt, .* save the weights alone: torch.save\(model.state"),
                           ("pipe.pth", "not a regular file"), ("cut.safetensors", "cannot be read as tensors"),
                           ("none.safetensors", "there is no file")):
        with pytest.raises(utils.InputError, match=sentence):
            checkpoint.load_tensors(tmp_path / name)


def test_foreign_cut_and_older_files_get_a_sentence(run_folder, tmp_path):
    file = tmp_path / "m.pth"
    with pytest.raises(ValueError, match="there is no file"):
        load_checkpoint(file)
    whole = (run_folder / "best_model.pth").read_bytes()
    texts = b"", b"text", b"epoch,loss\n1,2\n", b"hello world"
    for part in (*texts, whole[:2000], whole[: len(whole) // 2], whole[:-1000]):
        file.write_bytes(part)
        with pytest.raises(ValueError, match=r"cannot be read as tensors \([A-Za-z]\S+ [^)]+\)"):
            load_checkpoint(file)
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        load_checkpoint(file)
    for version in (checkpoint.FORMAT - 1, 99, "new"):
        torch.save({**content(run_folder), "format": version}, file)
        with pytest.raises(ValueError, match=f"has format {version}, this version reads {checkpoint.FORMAT}"):
            load_checkpoint(file)
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(ValueError, match="folder.pth is a folder; expected a file"):
        load_checkpoint(tmp_path / "folder.pth")


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_byte_is_found_or_harmless(run_folder, tmp_path, seed):
    """torch.load does not look at the checksums of its own files: weights would silently be others."""
    raw = bytearray((run_folder / "best_model.pth").read_bytes())
    raw[int(np.random.default_rng(seed).integers(len(raw)))] ^= 0x40
    (tmp_path / "m.pth").write_bytes(raw)
    try:
        again = load_checkpoint(tmp_path / "m.pth")
    except ValueError:
        return
    before = load_checkpoint(run_folder / "best_model.pth")  # in the padding between tensors
    tensors = [content.pop("weights") | {"mean_slice": content.pop("mean_slice")} for content in (before, again)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert before == again


@pytest.mark.parametrize("file", ["best_model.pth", "last.pth"])
def test_a_checkpoint_without_one_of_its_keys_is_refused_by_name(run_folder, tmp_path, file):
    good = content(run_folder, file)
    keys = checkpoint.KEYS + (checkpoint.RESUMABLE if file == "last.pth" else ())
    assert set(keys) <= set(good)
    small = dict.fromkeys(good, 0) | {"classes": ["NC", "AD"]}  # the keys are looked at, weights take time
    for name in keys:
        save_checkpoint(tmp_path / "m.pth", **{key: value for key, value in small.items() if key != name})
        with pytest.raises(ValueError, match=f"is not a whole checkpoint: it has no {name}"):
            load_checkpoint(tmp_path / "m.pth")
    save_checkpoint(tmp_path / "m.pth", **small | {"classes": ["AD", "NC"]})
    with pytest.raises(ValueError, match="knows the classes"):
        load_checkpoint(tmp_path / "m.pth")


def test_a_checkpoint_without_checksums_is_refused(run_folder, tmp_path):
    """The format of torch.save before it wrote archives with checksums."""
    old = {"format": checkpoint.FORMAT, **content(run_folder)}
    torch.save(old, tmp_path / "m.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        load_checkpoint(tmp_path / "m.pth")


def test_weights_of_another_model_are_a_sentence_at_the_command_line(run_folder, ad_nc, tmp_path):
    changed = content(run_folder)
    changed["model"]["variant"] = "pico"
    save_checkpoint(tmp_path / "m.pth", **changed)
    words = [ad_nc / "test", "--checkpoint", tmp_path / "m.pth", "--out", tmp_path / "out"]
    done = command.run(ROOT / "predict.py", *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: the weights are not those of a ConvNeXt pico")


def test_a_state_that_does_not_fit_is_refused_on_resume(run_folder, tmp_path):
    import shutil

    run = shutil.copytree(run_folder, tmp_path / "run")
    changed = content(run, "last.pth")
    changed["optimizer"]["param_groups"] = changed["optimizer"]["param_groups"][:1]
    save_checkpoint(run / "last.pth", **changed)
    before = (run / "config.json").read_text()
    with pytest.raises(ValueError, match="last.pth does not fit the run"):
        train.main(train.parse_args(["--out", str(run), "--resume"]))
    assert (run / "config.json").read_text() == before


@pytest.mark.parametrize("scan", ["100", "300"])
def test_a_run_is_not_resumed_where_a_table_makes_other_people_of_its_scans(ad_nc, run_folder, tmp_path, scan):
    root = shutil.copytree(ad_nc.parent, tmp_path / "set")
    run = shutil.copytree(run_folder, tmp_path / "run")
    table = root / "subjects.csv"
    table.write_text(re.sub(f"(?m)^{scan},.*", f"{scan},somebody else", table.read_text()))
    with pytest.raises(utils.InputError, match="the same subjects in the scans"), without_report():
        train.main(train.parse_args(["--out", str(run), "--resume", "--epochs", "7", "--data", str(root / "AD_NC")]))
    assert (run / "split.csv").read_bytes() == (run_folder / "split.csv").read_bytes()


@pytest.mark.parametrize("name, source, said", [
    ("best_model.pth", "another run", "is of another run than"), ("best_model.pth", None, "is gone"),
    ("last.pth", "best_model.pth", "holds a model and not a training"),
])  # fmt: skip
def test_a_run_is_resumed_with_its_own_files_or_not_at_all(ad_nc, run_folder, tmp_path, name, source, said):
    run = shutil.copytree(run_folder, tmp_path / "run")
    (run / name).unlink()
    if source == "another run":
        shutil.copy(train_steps(ad_nc, tmp_path / "other", "--epochs", "1") / name, run)
    elif source:
        shutil.copy(run / source, run / name)
    with pytest.raises(utils.InputError, match=said), without_report():
        train.main(train.parse_args(["--out", str(run), "--resume", "--epochs", "7"]))
    assert (run / "training_history.csv").read_text() == (run_folder / "training_history.csv").read_text()
