"""The cost of the networks, against the published method's figures and against torch's own counter."""

import sys

import pytest
import torch
from conftest import ROOT, call_script
from torch.utils.flop_counter import FlopCounterMode

from commands.gflops import cost_of
from model.cost import count_macs
from model.model import ResNet10Model
from trainer.registry import read_config
from utils.errors import UserError
from utils.parse_config import read_json

#: config -> (G multiply-adds the published way, millions of parameters), as counted with the reference's networks.
REFERENCE = {
    "cifar100_ir100_softmax": (0.0695, 0.470),
    "cifar100_ir100_tade": (0.1013, 0.784),
    "imagenet_lt_resnext50_softmax": (4.2593, 25.03),
    "imagenet_lt_resnext50_ride": (6.0837, 42.89),
    "iNaturalist_resnet50_softmax": (4.1260, 40.19),
    "iNaturalist_resnet50_tade": (5.7950, 76.59),
    "places_lt_resnet152_softmax": (11.5574, 58.89),
    "places_lt_resnet152_share_layer3_tade": (13.1777, 90.32),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_cost_is_that_of_the_references_network(name):
    macs, parameters = REFERENCE[name]
    total = cost_of(read_config(read_json(ROOT / "configs" / f"config_{name}.json"))).loc["total"]
    assert total["published way"] / 1e9 == pytest.approx(macs, abs=6e-5)
    assert total["parameters"] / 1e6 == pytest.approx(parameters, abs=6e-3)


def test_parts_add_up_and_agree_with_torchs_counter():
    network = ResNet10Model(num_classes=50, num_experts=2, reduce_dimension=True, use_norm=True).eval()
    names = set(network.state_dict())
    table = count_macs(network, 64)
    assert set(network.state_dict()) == names and not network.training  # nothing is left behind
    assert list(table.index) == ["stem", "expert 1", "expert 2", "total"]
    assert table.loc["total", "parameters"] == sum(p.numel() for p in network.parameters())
    assert table.loc["expert 1"].equals(table.loc["expert 2"])
    assert table.loc["total", "cosine classifier"] == 2 * 384 * 50 and not table["classifier"].any()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 3, 64, 64))
    multiplied = table.loc["total", "MACs"] - table.loc["total", "batch norm"]
    assert 2 * multiplied == counter.get_total_flops()


def test_without_thop_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "thop", None)
    with pytest.raises(UserError, match="lacks thop: pip install thop setuptools"):
        count_macs(ResNet10Model(num_classes=5), 64)


def test_command_line_prints_every_part_and_names_what_is_wrong():
    done = call_script("commands/gflops", "-c", "configs/config_cifar100_ir100_tade.json")
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in ("stem", "expert 3", "0.1013", "Not\ncounted"))
    done = call_script("commands/gflops", "-c", "configs/absent.json")
    assert done.returncode == 1 and done.stderr.startswith("There is no config file") and "Traceback" not in done.stderr
