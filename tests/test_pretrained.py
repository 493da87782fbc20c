import pytest
import torch

from model.model import ResNet10Model
from model.pretrained import read_weights, start_from
from trainer.build import parameter_groups
from trainer.registry import make_config
from utils.errors import UserError


@pytest.fixture(scope="module")
def plain() -> dict:
    """A plain network in torchvision's and OLTR's names, without the counters that old files lack."""
    state = ResNet10Model(num_classes=11).backbone.state_dict()
    return {k.replace("linear", "fc"): v for k, v in state.items() if not k.endswith("num_batches_tracked")}


@pytest.mark.parametrize("share", [False, True])
def test_every_expert_starts_from_the_plain_stages(plain, share):
    network = ResNet10Model(num_classes=5, use_norm=True, num_experts=3, share_layer3=share)
    heads = [network.backbone.linears[e].weight.clone() for e in range(3)]
    start_from(network.backbone, plain, "file")
    state = network.backbone.state_dict()
    torch.testing.assert_close(state["layer1.0.conv1.weight"], plain["layer1.0.conv1.weight"])
    for e in range(3):
        torch.testing.assert_close(state[f"layer4s.{e}.0.bn2.running_var"], plain["layer4.0.bn2.running_var"])
        name = "layer3.0.conv2.weight" if share else f"layer3s.{e}.0.conv2.weight"
        torch.testing.assert_close(state[name], plain["layer3.0.conv2.weight"])
        torch.testing.assert_close(network.backbone.linears[e].weight, heads[e])


def test_what_does_not_fit_is_named(plain, tmp_path):
    with pytest.raises(UserError, match=r"layer3.0.conv1.weight is \[256.*\] in file and \[192.*full width"):
        start_from(ResNet10Model(5, True, True, 2).backbone, plain, "file")
    with pytest.raises(UserError, match="file has no layer1.0.conv2.weight.*keys like conv1.weight"):
        start_from(
            ResNet10Model(5, num_experts=2).backbone,
            {k: v for k, v in plain.items() if k != "layer1.0.conv2.weight"},
            "file",
        )
    with pytest.raises(UserError, match=r'There is no file .*resnet152.pth, which "weights" .* OLTR'):
        read_weights(tmp_path / "resnet152.pth")
    (tmp_path / "resnet152.pth").write_text("no weights")
    with pytest.raises(UserError, match="truncated or not a checkpoint.* OLTR"):
        read_weights(tmp_path / "resnet152.pth")
    torch.save(plain, tmp_path / "resnet152.pth")
    assert read_weights(tmp_path / "resnet152.pth").keys() == plain.keys()


def test_classifiers_and_the_rest_learn_at_their_own_rates():
    network = ResNet10Model(5, num_experts=2)
    config = make_config({"optimizer": {"type": "SGD", "args": {"lr": 0.01}, "share_lr": 0.001}})
    groups = config.build("optimizer", parameter_groups(config, network)).param_groups
    assert [group["lr"] for group in groups] == [0.01, 0.001]
    assert [len(group["params"]) for group in groups] == [4, len(list(network.parameters())) - 4]
    with pytest.raises(UserError, match='did you mean "share_lr"'):
        make_config({"optimizer": {"type": "SGD", "args": {}, "share_lrs": 1}})
