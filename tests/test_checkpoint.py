import json
import os
import pickle
import sys
import types

import pytest
import torch

from model.model import ResNet32Model
from utils.checkpoint import load_checkpoint, load_weights, save_checkpoint, sha256
from utils.convert_checkpoint import main
from utils.errors import UserError


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
    """BUILD with slot state sets attributes: here of the function that rebuilds tensors."""
    (tmp_path / "hostile.pth").write_bytes(
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00__defaults__(K\x01K\x02tst\x86b."
    )
    before = torch._utils._rebuild_tensor_v2.__defaults__
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "hostile.pth")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before
    _reference_checkpoint(tmp_path / "reference.pth", network, {"_config": {}})
    load_checkpoint(tmp_path / "reference.pth")


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
