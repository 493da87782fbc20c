import json
import os
import pickle
import secrets
import subprocess

import pytest
import torch
from hostile import Call, archive

from commands.convert_checkpoint import main
from model.model import ResNet32Model
from utils.checkpoint import load_checkpoint, load_weights, save_checkpoint, sha256
from utils.errors import UserError
from utils.files import write_together


@pytest.fixture(scope="module")
def network():
    return ResNet32Model(10, reduce_dimension=True, use_norm=True, num_experts=2)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_round_trip(tmp_path, network, prefix):
    path = tmp_path / "a.pth"
    weights = {f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}
    save_checkpoint(path, {"model": weights, "epoch": 3, "config": {"name": "x"}})
    content = load_checkpoint(path)
    assert content["epoch"] == 3 and content["config"] == {"name": "x"}
    load_weights(ResNet32Model(10, reduce_dimension=True, use_norm=True, num_experts=2), content["model"], path)


@pytest.mark.parametrize("cut", [0, 10, 1000, -1000, -10])
def test_truncated(tmp_path, network, cut):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"model": network.state_dict()})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        load_checkpoint(path)


def test_a_file_that_is_not_there_is_told_with_those_that_are(tmp_path):
    with pytest.raises(UserError, match="no checkpoint .*give the path of a .pth file"):
        load_checkpoint(tmp_path / "absent.pth")
    (tmp_path / "a.pth").write_text("hello")
    with pytest.raises(UserError, match=r"There are: .*a\.pth"):
        load_checkpoint(tmp_path / "b.pth")


WEIGHTS = {"a": torch.zeros(1)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], r"holds no checkpoint \(a list\)"),
        ({"model": {"x": 1}}, "no network weights"),
        ({0: torch.zeros(1)}, "no network weights"),
        ({"model": {0: torch.zeros(1)}}, "no network weights"),
        ({"state_dict": {}}, "no network weights"),
        ({"model": WEIGHTS, "config": {(1, 2): 3}}, "it has a tuple as a key"),
    ],
)
def test_contents_of_the_wrong_kind(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=message):
        load_checkpoint(tmp_path / "a.pth")


def test_a_file_of_torch_before_1_6_is_to_be_saved_again(tmp_path):
    torch.save({"model": WEIGHTS}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="a file of torch before 1.6 becomes one if torch loads and saves it again"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((10, True, True, 3), "lacks backbone.layer2s.2"),
        ((100, True, True, 2), "another width"),
        ((10, False, True, 2), "another width"),
        ((10, True, False, 2), r"it lacks backbone.linears.0.bias \(and 1 more\); use the config"),
        ((10, True, True, 1), r"it has backbone\S+ \(and \d+ more\) too many; use the config"),
    ],
)
def test_another_architecture_is_named(network, other, message):
    names = ("num_classes", "reduce_dimension", "use_norm", "num_experts")
    with pytest.raises(UserError, match=f"does not fit the architecture of the config: .*({message})"):
        load_weights(ResNet32Model(**dict(zip(names, other, strict=True))), network.state_dict(), "some.pth")


def test_nothing_in_a_checkpoint_is_run(tmp_path, network, capsys):
    path, witness, state = tmp_path / "hostile.pth", tmp_path / "witness", network.state_dict()
    torch.save({"state_dict": state, "epoch": 7, "config": Call(subprocess.getoutput, f"touch {witness}")}, path)
    content = load_checkpoint(path)
    assert content["epoch"] == 7 and content["config"] is None
    main(["inspect", str(path)])
    text = capsys.readouterr().out
    assert "getoutput" in text and "epoch:          7" in text and "experts:        2" in text and sha256(path) in text
    torch.save({"state_dict": state, "config": Call(os.system, f"touch {witness}")}, path)  # what torch never takes
    with pytest.raises(UserError):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Call(os.system, f"touch {witness}")))
    with pytest.raises(UserError):
        load_checkpoint(path)
    assert not witness.exists()


def test_a_file_cannot_change_what_it_names(tmp_path):
    """BUILD with slot state sets attributes, for an ordinary reader: here of the function that rebuilds tensors."""
    before = torch._utils._rebuild_tensor_v2.__defaults__
    attributes = b"N}X\x0c\x00\x00\x00__defaults__K\x01K\x02\x86s\x86b."
    archive(tmp_path / "hostile.pth", b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + attributes)
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "hostile.pth")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before


PROCESS = {"random": {}, "sums": torch.zeros(3), "mixup": torch.zeros(1), "skipped": 0}
MID_EPOCH = {"step": 1, "steps": 2, "seconds": 1.0, "processes": [PROCESS]}


@pytest.mark.parametrize(
    ("entry", "good", "bad"),
    [
        ("optimizer", {"state": {}, "param_groups": []}, [[], 1]),
        ("scheduler", {"last_epoch": 3}, [3, {}, {"last_epoch": "3"}, {"last_epoch": -1}]),
        ("random_of_processes", [{}], [{}, [3]]),
        ("mid_epoch", MID_EPOCH, [{}, {**MID_EPOCH, "step": 3}, {**MID_EPOCH, "processes": []}]),
        ("seconds", 1.5, ["1.5", float("nan"), torch.ones(1)]),
        ("epoch", 3, ["three", 3.0, True, -1, [3]]),
        ("best", 0.5, ["0.5", float("inf"), True]),
        ("seed", 1, ["1", 2**64]),
        ("cls_num_list", [5, 5], [5, ["5"], [5.0], [-1]]),
        ("precision", "bf16", ["fp8", 16, ["fp32"]]),
        ("config", {"name": "x"}, [[1], "x", {1: 2}, {"name": torch.zeros(1)}]),
        ("selected_by", "the last so far", [3, "x" * 20_000]),
    ],
)
def test_entries_of_the_wrong_type_are_named(tmp_path, entry, good, bad):
    save_checkpoint(tmp_path / "a.pth", {"model": WEIGHTS, entry: good})
    assert load_checkpoint(tmp_path / "a.pth").keys() == {"format", "model", entry}
    for value in bad:
        save_checkpoint(tmp_path / "a.pth", {"model": WEIGHTS, entry: value})
        with pytest.raises(UserError, match=f'its "{entry}" is not what train.py writes'):
            load_checkpoint(tmp_path / "a.pth")


def test_a_strangers_entries_count_where_they_mean_the_same(tmp_path):
    torch.save({"model": WEIGHTS, "best": torch.zeros(1), "seed": 3, "lr": 1}, tmp_path / "a.pth")
    content = load_checkpoint(tmp_path / "a.pth")
    assert content.keys() == {"model", "epoch", "config", "seed", "foreign"} and content["seed"] == 3
    torch.save(WEIGHTS, tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth")["model"] == WEIGHTS


def test_a_failed_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"model": WEIGHTS, "epoch": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device.*untouched"):
        save_checkpoint(path, {"model": WEIGHTS, "epoch": 2})
    assert load_checkpoint(path)["epoch"] == 1 and [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_the_name_aside_is_random_and_opened_exclusively(tmp_path, monkeypatch):
    """A link left under the name of an unfinished file must not be followed."""
    os.umask(before := os.umask(0))
    write_together(tmp_path, {"a.pth": b"1", "b": b"2"})
    assert (tmp_path / "a.pth").stat().st_mode & 0o777 == 0o666 & ~before
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "b"]
    monkeypatch.setattr(secrets, "token_hex", lambda count: "0" * 2 * count)
    (tmp_path / "victim").write_text("precious")
    (tmp_path / f".a.pth.{'0' * 16}.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="File exists"):
        write_together(tmp_path, {"a.pth": b"3"})
    assert (tmp_path / "victim").read_text() == "precious" and (tmp_path / "a.pth").read_bytes() == b"1"


def test_what_a_killed_process_left_is_removed_later(tmp_path):
    old, new, other = (tmp_path / f".{name}.{'a' * 15}{i}.tmp" for i, name in enumerate(("a.pth", "a.pth", "b.pth")))
    for path in (old, new, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (0, 0))
    write_together(tmp_path, {"a.pth": b"whole"})
    assert {path.name for path in tmp_path.iterdir()} == {"a.pth", new.name, other.name}


def test_files_written_together_are_never_mixed(tmp_path, monkeypatch):
    """Killed at any of the steps, the last file is there only with the others of its time."""
    before, after = {"table": b"old", "plot": b"old", "last": b"old"}, {"table": b"new", "last": b"new"}
    steps = []

    class Killed(BaseException):
        pass

    for stop in range(1, 30):
        write_together(tmp_path, before)
        for name in ("fsync", "replace", "unlink"):

            def step(*args, real=getattr(os, name), **kwargs):
                steps.append(1)
                if len(steps) == stop:
                    raise Killed
                return real(*args, **kwargs)

            monkeypatch.setattr(os, name, step)
        steps.clear()
        try:
            write_together(tmp_path, {"table": b"new", "plot": None, "last": b"new"})
        except Killed:
            pass
        monkeypatch.undo()
        present = {p.name: p.read_bytes() for p in tmp_path.iterdir() if not p.name.endswith(".tmp")}
        assert "last" not in present or present in (before, after), (stop, present)
        if len(steps) < stop:
            break
    assert 5 < stop < 20 and present == after


NETWORK = {
    "type": "ResNet32Model",
    "args": {"num_classes": 10, "num_experts": 2, "reduce_dimension": True, "use_norm": True},
}


class ConfigParser:
    """As the reference's checkpoints have: torch does not know it, and it is never imported."""

    def __init__(self, config):
        self._config, self.resume = config, None


def test_convert_from_the_reference_and_back(tmp_path, network):
    source, ours, back = (tmp_path / f"{name}.pth" for name in ("reference", "ours", "back"))
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    config = ConfigParser({"name": "x", "arch": NETWORK})
    torch.save({"arch": "Model", "epoch": 200, "monitor_best": 0.5, "config": config, "state_dict": state}, source)
    assert load_checkpoint(source)["foreign"] == [f"{__name__}.ConfigParser"]
    main(["convert", str(source), str(ours)])
    content = load_checkpoint(ours)
    assert content["format"] == 1 and content["epoch"] == 200 and content["best"] == 0.5
    assert content["config"]["arch"] == NETWORK
    load_weights(ResNet32Model(10, reduce_dimension=True, use_norm=True, num_experts=2), content["model"], ours)
    main(["convert", str(ours), str(back)])
    written = torch.load(back, weights_only=True)  # plain enough for any reader
    assert written["arch"] == "ResNet32Model" and written["epoch"] == 200 and written["monitor_best"] == 0.5
    for name, tensor in network.state_dict().items():
        assert torch.equal(written["state_dict"][name], tensor)
    again = load_checkpoint(back)
    assert "format" not in again and again["config"]["arch"] == NETWORK and again["foreign"] == []


def test_convert_drops_what_the_network_has_not_and_checks_the_rest(tmp_path, network, capsys):
    source, target, config = (tmp_path / name for name in ("ride.pth", "a.pth", "config.json"))

    def convert(experts, target):
        config.write_text(json.dumps({"arch": {**NETWORK, "args": {**NETWORK["args"], "num_experts": experts}}}))
        main(["convert", str(source), str(target), "-c", str(config)])

    state = {**network.state_dict(), "backbone.expert_help_pred_fcs.0.weight": torch.zeros(2, 2)}  # as RIDE's has
    torch.save({"state_dict": state, "epoch": 5}, source)
    convert(2, target)
    assert "Left out: backbone.expert_help_pred_fcs.0.weight" in capsys.readouterr().out
    load_weights(network, load_checkpoint(target)["model"], target)
    for experts, place, message in (
        (2, target, "a.pth exists already"),
        (3, tmp_path / "b.pth", "lacks backbone.layer2s.2"),
        (1, tmp_path / "b.pth", "too many"),  # an expert is not left out
        (2, config / "b.pth", "Could not save"),
    ):
        with pytest.raises(UserError, match=message):
            convert(experts, place)
    assert not (tmp_path / "b.pth").exists()


def test_weights_alone_to_share(tmp_path, network):
    content = {"model": network.state_dict(), "optimizer": {"state": {}}, "config": {"arch": NETWORK}, "epoch": 3}
    save_checkpoint(tmp_path / "last.pth", {**content, "cls_num_list": [5] * 10})
    main(["convert", str(tmp_path / "last.pth"), str(tmp_path / "small.pth"), "--to", "tade"])
    content = load_checkpoint(tmp_path / "small.pth")
    assert "optimizer" not in content and content["cls_num_list"] == [5] * 10 and content["epoch"] == 3


def test_inspect_prints_no_control_characters(tmp_path, network, capsys):
    evil = "\x1b]0;owned\x07\x1b[2J\nSHA-256: faked\u202e\ud800"
    config = {"name": evil, "arch": {**NETWORK, "args": {evil: evil}}, "loss": {"type": evil}}
    weights = {evil: torch.zeros(2), **network.state_dict()}
    save_checkpoint(tmp_path / "a.pth", {"model": weights, "config": config, "selected_by": evil, "epoch": 1})
    main(["inspect", str(tmp_path / "a.pth")])
    text = capsys.readouterr().out
    assert "owned" in text and all(c.isprintable() or c == "\n" for c in text)
    assert text.count("SHA-256:") > 1 and sum(line.startswith("SHA-256:") for line in text.splitlines()) == 1
