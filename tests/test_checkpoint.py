import json
import os
import pickle
import secrets
import sys
import types

import pytest
import torch

from commands.convert_checkpoint import main
from model.model import ResNet32Model
from utils.checkpoint import load_checkpoint, load_weights, save_checkpoint, sha256, write_together
from utils.errors import UserError
from utils.torch_file import REBUILT


@pytest.fixture
def network():
    return ResNet32Model(10, True, True, 2)


def test_round_trip(tmp_path, network):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"model": network.state_dict(), "epoch": 3, "config": {"name": "x"}})
    content = load_checkpoint(path)
    assert content["epoch"] == 3 and content["config"] == {"name": "x"}
    load_weights(ResNet32Model(10, True, True, 2), content["model"], path)
    assert len(sha256(path)) == 64


def test_module_prefixes_are_ignored(tmp_path, network):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"model": {f"module.{k}": v for k, v in network.state_dict().items()}})
    load_weights(network, load_checkpoint(path)["model"], path)


def test_a_bare_state_dict_loads(tmp_path, network):
    torch.save(network.state_dict(), tmp_path / "a.pth")
    assert load_checkpoint(tmp_path / "a.pth")["epoch"] is None


@pytest.mark.parametrize("cut", [0, 10, 1000, -1000, -10])
def test_truncated(tmp_path, network, cut):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"model": network.state_dict()})
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        load_checkpoint(path)


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no checkpoint .*give the path of a .pth file"):
        load_checkpoint(tmp_path / "absent.pth")
    (tmp_path / "a.pth").write_text("hello")
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        load_checkpoint(tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"There are: .*a\.pth"):
        load_checkpoint(tmp_path / "b.pth")
    torch.save([1, 2], tmp_path / "a.pth")
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_checkpoint(tmp_path / "a.pth")
    torch.save({"model": {"x": 1}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="no network weights"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ((10, True, True, 3), "lacks backbone.layer2s.2"),
        ((100, True, True, 2), "another width"),
        ((10, False, True, 2), "another width"),
        ((10, True, False, 2), "lacks backbone.linears.0.bias"),
    ],
)
def test_another_architecture_is_named(tmp_path, network, other, message):
    with pytest.raises(UserError, match=f"does not fit the architecture of the config: .*({message})"):
        load_weights(ResNet32Model(*other), network.state_dict(), "some.pth")


def _reference_checkpoint(path, network, config_state):
    """A pickle with an object of a class that is not there when it is read, as the reference's checkpoints have."""
    module = types.ModuleType("parse_config")

    class ConfigParser:
        def __init__(self, state):
            self.__dict__.update(state)

    ConfigParser.__module__, ConfigParser.__qualname__ = "parse_config", "ConfigParser"
    module.ConfigParser = ConfigParser
    sys.modules["parse_config"] = module
    try:
        torch.save(
            {
                "arch": "Model",
                "epoch": 200,
                "monitor_best": 0.5,
                "config": ConfigParser(config_state),
                "state_dict": {f"module.{k}": v for k, v in network.state_dict().items()},
            },
            path,
        )
    finally:
        del sys.modules["parse_config"]


def test_the_references_checkpoints_load(tmp_path, network):
    path = tmp_path / "reference.pth"
    _reference_checkpoint(path, network, {"_config": {"name": "x", "trainer": {"epochs": 200}}, "resume": None})
    content = load_checkpoint(path)
    assert content["epoch"] == 200 and content["config"] == {"name": "x", "trainer": {"epochs": 200}}
    load_weights(ResNet32Model(10, True, True, 2), content["model"], path)


class Hostile:
    """Runs a command when an ordinary pickle reader meets it."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_checkpoint_is_run(tmp_path, network, legacy):
    path, witness = tmp_path / "hostile.pth", tmp_path / "witness"
    torch.save(
        {"state_dict": network.state_dict(), "epoch": 1, "config": Hostile(witness)},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    content = load_checkpoint(path)
    assert not witness.exists() and content["epoch"] == 1 and content["config"] is None
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(Hostile(witness)))
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "bare.pth")
    assert not witness.exists()


def test_a_file_cannot_change_what_it_names(tmp_path, network):
    """BUILD with slot state sets attributes: here of the function that rebuilds tensors, in torch and in our reader."""
    hostile = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__K\x01K\x02\x86s\x86b."
    functions = [torch._utils._rebuild_tensor_v2, REBUILT["torch._utils", "_rebuild_tensor_v2"]]
    before = [function.__defaults__ for function in functions]
    assert pickle.loads(hostile).__defaults__ == (1, 2)  # an ordinary reader does it
    functions[0].__defaults__ = before[0]
    (tmp_path / "hostile.pth").write_bytes(hostile)
    with pytest.raises(UserError, match="it sets attributes"):
        load_checkpoint(tmp_path / "hostile.pth")
    assert [function.__defaults__ for function in functions] == before
    _reference_checkpoint(tmp_path / "reference.pth", network, {"_config": {}})
    load_checkpoint(tmp_path / "reference.pth")


OPTIMIZER = {"state": {0: {"momentum_buffer": torch.zeros(1)}}, "param_groups": [{"params": [0], "lr": 0.1}]}


@pytest.mark.parametrize(
    ("entry", "good", "bad"),
    [
        ("optimizer", OPTIMIZER, [[], {}, {**OPTIMIZER, "state": []}, {**OPTIMIZER, "param_groups": [1]}]),
        ("scheduler", {"last_epoch": 3}, [3, {}, {"last_epoch": "3"}, {"last_epoch": -1}]),
        ("scaler", {}, [[], 1.0]),
        ("random", {"torch": torch.get_rng_state()}, [[], {}, {"torch": 5}, {"torch": torch.zeros(3)}]),
        ("seconds", 1.5, ["1.5", -1, float("nan"), 10**400, torch.ones(1)]),
        ("epoch", 3, ["three", 3.0, True, -1, 10**400, [3]]),
        ("best", 0.5, ["0.5", float("inf"), True]),
        ("seed", 1, ["1", 2**64]),
        ("cls_num_list", [5, 5], [5, ["5"], [5.0], [-1]]),
        ("precision", "bf16", ["fp8", 16, ["fp32"]]),
        ("class_map", [1, 0], ["10", [None]]),
        ("config", {"name": "x"}, [[1], "x", {1: 2}, {"name": torch.zeros(1)}]),
        ("selected_by", "the last so far", [3, "x" * 20_000]),
    ],
)
def test_entries_of_the_wrong_type_are_named(tmp_path, entry, good, bad):
    weights = {"model": {"a": torch.zeros(1)}}
    save_checkpoint(tmp_path / "a.pth", {**weights, entry: good})
    assert load_checkpoint(tmp_path / "a.pth").keys() == {"format", "model", entry}
    for value in bad:
        save_checkpoint(tmp_path / "a.pth", {**weights, entry: value})
        with pytest.raises(UserError, match=f'its "{entry}" is not what train.py writes'):
            load_checkpoint(tmp_path / "a.pth")


def test_a_strangers_entries_count_for_nothing(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "best": torch.zeros(1), "seed": 3}, tmp_path / "a.pth")
    content = load_checkpoint(tmp_path / "a.pth")
    assert "best" not in content and content["seed"] == 3


@pytest.mark.parametrize(
    "content",
    [
        {0: torch.zeros(1)},
        {"model": {0: torch.zeros(1)}},
        {"model": {"a": torch.zeros(1)}, "config": [1]},
        {"model": {"a": torch.zeros(1)}, "cls_num_list": 5},
        {"model": {"a": torch.zeros(1)}, "epoch": "three"},
    ],
)
def test_contents_of_the_wrong_kind(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "a.pth")


def test_a_legacy_file_cut_anywhere(tmp_path):
    torch.save({"model": {"a": torch.arange(3.0)}}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    data = (tmp_path / "a.pth").read_bytes()
    for length in range(0, len(data) - 4, 3):
        (tmp_path / "b.pth").write_bytes(data[:length])
        with pytest.raises(UserError):
            load_checkpoint(tmp_path / "b.pth")


def test_a_failed_write_leaves_the_earlier_file(tmp_path, network, monkeypatch):
    path = tmp_path / "a.pth"
    save_checkpoint(path, {"model": network.state_dict(), "epoch": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device.*untouched"):
        save_checkpoint(path, {"model": network.state_dict(), "epoch": 2})
    assert load_checkpoint(path)["epoch"] == 1 and [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_nobody_can_guess_where_a_file_is_written_aside(tmp_path):
    """A link left under the name of an unfinished file must not be followed."""
    (tmp_path / "victim").write_text("precious")
    for name in ("a.pth.tmp", ".a.pth.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    os.umask(before := os.umask(0))
    names = []
    for _ in range(2):
        write_together(tmp_path, {"a.pth": b"1", "b": b"2"})
        names.append(sorted(os.listdir(tmp_path)))
        assert (tmp_path / "a.pth").stat().st_mode & 0o777 == 0o666 & ~before
    assert (tmp_path / "victim").read_text() == "precious"
    assert names == [sorted([".a.pth.tmp", "a.pth", "a.pth.tmp", "b", "victim"])] * 2


def test_the_name_aside_is_opened_exclusively(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda count: "0" * 2 * count)
    (tmp_path / "victim").write_text("precious")
    (tmp_path / f".a.pth.{'0' * 16}.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="File exists"):
        write_together(tmp_path, {"a.pth": b"1"})
    assert (tmp_path / "victim").read_text() == "precious" and not (tmp_path / "a.pth").exists()


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
    write_together(tmp_path, {"table": b"old", "plot": b"old", "last": b"old"})
    steps = []

    class Killed(BaseException):
        pass

    for stop in range(1, 30):
        for name in ("fsync", "replace", "unlink"):
            real = getattr(os, name)

            def step(*args, real=real, **kwargs):
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
        if "last" in present:
            old = present == {"table": b"old", "plot": b"old", "last": b"old"}
            assert old or present == {"table": b"new", "last": b"new"}, (stop, present)
        if len(steps) < stop:
            break
        write_together(tmp_path, {"table": b"old", "plot": b"old", "last": b"old"})
    assert 5 < stop < 20 and present == {"table": b"new", "last": b"new"}


NETWORK = {
    "type": "ResNet32Model",
    "args": {"num_classes": 10, "num_experts": 2, "reduce_dimension": True, "use_norm": True},
}


def test_convert_from_the_reference_and_back(tmp_path, network):
    source, ours, back = (tmp_path / f"{name}.pth" for name in ("reference", "ours", "back"))
    _reference_checkpoint(source, network, {"_config": {"name": "x", "arch": NETWORK}})
    main(["convert", str(source), str(ours)])
    content = load_checkpoint(ours)
    assert content["format"] == 1 and content["epoch"] == 200 and content["best"] == 0.5
    assert content["config"]["arch"] == NETWORK
    load_weights(ResNet32Model(10, True, True, 2), content["model"], ours)
    main(["convert", str(ours), str(back)])
    written = torch.load(back, weights_only=True)  # plain enough for any reader
    assert written["arch"] == "ResNet32Model" and written["epoch"] == 200 and written["monitor_best"] == 0.5
    for name, tensor in network.state_dict().items():
        assert torch.equal(written["state_dict"][name], tensor)
    again = load_checkpoint(back)
    assert "format" not in again and again["config"]["arch"] == NETWORK and again["foreign"] == []


def test_convert_drops_what_the_network_has_not_and_checks_the_rest(tmp_path, network, capsys):
    state = {**network.state_dict(), "backbone.expert_help_pred_fcs.0.weight": torch.zeros(2, 2)}  # as RIDE's has
    torch.save({"state_dict": state, "epoch": 5}, tmp_path / "ride.pth")
    (tmp_path / "config.json").write_text(json.dumps({"arch": NETWORK}))
    main(["convert", str(tmp_path / "ride.pth"), str(tmp_path / "a.pth"), "-c", str(tmp_path / "config.json")])
    assert "Left out: backbone.expert_help_pred_fcs.0.weight" in capsys.readouterr().out
    load_weights(network, load_checkpoint(tmp_path / "a.pth")["model"], "a.pth")
    with pytest.raises(UserError, match="a.pth exists already"):
        main(["convert", str(tmp_path / "ride.pth"), str(tmp_path / "a.pth")])
    (tmp_path / "config.json").write_text(
        json.dumps({"arch": {**NETWORK, "args": {**NETWORK["args"], "num_experts": 3}}})
    )
    with pytest.raises(UserError, match="lacks backbone.layer2s.2"):
        main(["convert", str(tmp_path / "ride.pth"), str(tmp_path / "b.pth"), "-c", str(tmp_path / "config.json")])
    (tmp_path / "config.json").write_text(
        json.dumps({"arch": {**NETWORK, "args": {**NETWORK["args"], "num_experts": 1}}})
    )
    with pytest.raises(UserError, match="too many"):  # an expert is not left out
        main(["convert", str(tmp_path / "ride.pth"), str(tmp_path / "b.pth"), "-c", str(tmp_path / "config.json")])
    assert not (tmp_path / "b.pth").exists()
    with pytest.raises(UserError, match="Could not save"):
        main(["convert", str(tmp_path / "ride.pth"), str(tmp_path / "config.json" / "b.pth")])


def test_weights_alone_to_share(tmp_path, network):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    save_checkpoint(
        tmp_path / "last.pth",
        {
            "model": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "config": {"arch": NETWORK},
            "epoch": 3,
            "cls_num_list": [5] * 10,
        },
    )
    main(["convert", str(tmp_path / "last.pth"), str(tmp_path / "small.pth"), "--to", "tade"])
    content = load_checkpoint(tmp_path / "small.pth")
    assert "optimizer" not in content and content["cls_num_list"] == [5] * 10 and content["epoch"] == 3


def test_inspect_names_what_it_did_not_run(tmp_path, network, capsys):
    witness = tmp_path / "witness"
    torch.save({"state_dict": network.state_dict(), "epoch": 7, "config": Hostile(witness)}, tmp_path / "a.pth")
    main(["inspect", str(tmp_path / "a.pth")])
    text = capsys.readouterr().out
    assert not witness.exists() and "system" in text and "epoch:          7" in text and "experts:        2" in text
    assert sha256(tmp_path / "a.pth") in text


def test_inspect_prints_no_control_characters_and_refuses_damaged_weights(tmp_path, network, capsys):
    evil = "\x1b]0;owned\x07\x1b[2J\nSHA-256: faked\u202e\ud800"
    config = {"name": evil, "arch": {**NETWORK, "args": {evil: evil}}, "loss": {"type": evil}}
    save_checkpoint(
        tmp_path / "a.pth",
        {"model": {evil: torch.zeros(2), **network.state_dict()}, "config": config, "selected_by": evil, "epoch": 1},
    )
    main(["inspect", str(tmp_path / "a.pth")])
    text = capsys.readouterr().out
    assert "owned" in text and all(c.isprintable() or c == "\n" for c in text)
    assert text.count("SHA-256:") > 1 and sum(line.startswith("SHA-256:") for line in text.splitlines()) == 1
    state = network.state_dict()
    state["backbone.bn1.running_mean"][0] = float("nan")
    save_checkpoint(tmp_path / "b.pth", {"model": state})
    with pytest.raises(UserError, match="backbone.bn1.running_mean is infinite or not a number"):
        main(["inspect", str(tmp_path / "b.pth")])
    assert not capsys.readouterr().out


def test_entries_that_are_missing_and_too_many_are_counted():
    network = torch.nn.Linear(2, 2)
    with pytest.raises(UserError) as refused:
        load_weights(network, {name: torch.zeros(1) for name in "xyz"}, "a.pth")
    assert "it lacks bias (and 1 more) and it has x (and 2 more) too many; use the config" in str(refused.value)
    with pytest.raises(UserError) as refused:
        load_weights(network, {**network.state_dict(), "x": torch.zeros(1)}, "a.pth")
    assert "lacks" not in str(refused.value) and "it has x (and 0 more) too many" in str(refused.value)
