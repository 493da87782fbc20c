import pytest
import torch

from model.model import ResNet10Model, ResNet18Model, ResNet32Model, ResNet34Model
from model.pretrained import read_weights, start_from
from trainer.build import TORCHVISION_NAMES, parameter_groups
from trainer.registry import read_config
from utils.checkpoint import save_checkpoint
from utils.errors import UserError
from utils.torchvision_import import torchvision


@pytest.fixture(scope="module")
def plain() -> dict:
    """A plain network in torchvision's and OLTR's names, without the counters that old files lack."""
    state = ResNet10Model(num_classes=11).backbone.state_dict()
    return {k.replace("linear", "fc"): v for k, v in state.items() if not k.endswith("num_batches_tracked")}


@pytest.mark.parametrize("share", [False, True])
def test_every_expert_starts_from_the_plain_stages(plain, share):
    network = ResNet10Model(num_classes=5, use_norm=True, num_experts=3, share_layer3=share)
    heads = [network.backbone.linears[e].weight.clone() for e in range(3)]
    start_from(network, plain, "file")
    state = network.backbone.state_dict()
    torch.testing.assert_close(state["layer1.0.conv1.weight"], plain["layer1.0.conv1.weight"])
    for e in range(3):
        torch.testing.assert_close(state[f"layer4s.{e}.0.bn2.running_var"], plain["layer4.0.bn2.running_var"])
        name = "layer3.0.conv2.weight" if share else f"layer3s.{e}.0.conv2.weight"
        torch.testing.assert_close(state[name], plain["layer3.0.conv2.weight"])
        torch.testing.assert_close(network.backbone.linears[e].weight, heads[e])


def test_what_does_not_fit_is_named(plain, tmp_path):
    with pytest.raises(UserError, match=r"layer3.0.conv1.weight is \[256.*\] in file and \[192.*full width"):
        start_from(ResNet10Model(5, reduce_dimension=True, use_norm=True, num_experts=2), plain, "file")
    with pytest.raises(UserError, match="file has no layer1.0.conv2.weight.*keys like conv1.weight"):
        start_from(
            ResNet10Model(5, num_experts=2),
            {k: v for k, v in plain.items() if k != "layer1.0.conv2.weight"},
            "file",
        )
    with pytest.raises(UserError, match=r'There is no file .*resnet152.pth, which "weights" .* OLTR'):
        read_weights(tmp_path / "resnet152.pth")
    (tmp_path / "resnet152.pth").write_text("no weights")
    with pytest.raises(UserError, match="truncated or not a checkpoint.* OLTR"):
        read_weights(tmp_path / "resnet152.pth")
    with pytest.raises(UserError) as error:  # the file of Places-LT is no help to others
        read_weights(tmp_path / "mine.pth")
    assert "OLTR" not in str(error.value) and "checkpoint of this project" in str(error.value)
    torch.save(plain, tmp_path / "resnet152.pth")
    assert read_weights(tmp_path / "resnet152.pth").keys() == plain.keys()


def test_classifiers_and_the_rest_learn_at_their_own_rates():
    network = ResNet10Model(5, num_experts=2)
    config = read_config({"optimizer": {"type": "SGD", "args": {"lr": 0.01}, "share_lr": 0.001}})
    groups = config.build("optimizer", parameter_groups(config, network)).param_groups
    assert [group["lr"] for group in groups] == [0.01, 0.001]
    assert [len(group["params"]) for group in groups] == [4, len(list(network.parameters())) - 4]
    with pytest.raises(UserError, match='did you mean "share_lr"'):
        read_config({"optimizer": {"type": "SGD", "args": {}, "share_lrs": 1}})


def trained(num_experts: int, path, **arguments) -> dict:
    """Weights of a network of this project, written and read as a checkpoint."""
    network = ResNet32Model(**{"num_classes": 5, "reduce_dimension": True} | arguments, num_experts=num_experts)
    save_checkpoint(path / "last.pth", {"model": network.state_dict(), "epoch": 3, "config": None})
    return read_weights(path / "last.pth")


@pytest.mark.parametrize("experts", [1, 3])
def test_a_checkpoint_of_this_project_gives_each_expert_its_own_stages(experts, tmp_path):
    """The second stage of two-stage training: everything but the classifiers, whatever these are."""
    before = trained(experts, tmp_path, use_norm=True)
    network = ResNet32Model(9, reduce_dimension=True, num_experts=experts)
    fresh = {name: network.state_dict()[name].clone() for name in network.classifier_names()}
    filled = start_from(network, before, "last.pth")
    state = network.state_dict()
    assert set(filled) == set(state) - set(fresh)
    assert all(torch.equal(state[name], before[name]) for name in filled)
    assert all(torch.equal(state[name], tensor) for name, tensor in fresh.items())


def test_experts_start_from_a_checkpoint_of_one_expert(tmp_path):
    before = trained(1, tmp_path)
    network = ResNet32Model(5, reduce_dimension=True, num_experts=3)
    start_from(network, before, "last.pth")
    for e in range(3):
        for name in ("layer2{}.0.conv1.weight", "layer3{}.4.bn2.running_var"):
            own = network.state_dict()["backbone." + name.format(f"s.{e}")]
            assert torch.equal(own, before["backbone." + name.format("")])


def test_a_checkpoint_that_does_not_fit_is_explained(tmp_path):
    before = trained(3, tmp_path)
    for experts in (1, 2, 4):  # two of three experts would be filled without a word
        with pytest.raises(UserError, match=f"has 3 experts and this network {experts}: set .*num_experts to 3"):
            start_from(ResNet32Model(5, reduce_dimension=True, num_experts=experts), before, "last.pth")
    with pytest.raises(UserError, match=r"conv1.weight is \[24.*\] in last.pth and \[32.*reduce_dimension"):
        start_from(ResNet32Model(5, num_experts=3), before, "last.pth")
    with pytest.raises(UserError, match="f has no backbone.layer3.0.*: it belongs to another architecture") as error:
        start_from(
            ResNet10Model(5, share_layer3=True, num_experts=2), ResNet10Model(5, num_experts=2).state_dict(), "f"
        )
    assert "OLTR" not in str(error.value)


@pytest.mark.parametrize(("kind", "name"), [(ResNet18Model, "resnet18"), (ResNet34Model, "resnet34")])
def test_experts_start_with_the_features_of_torchvisions_network(kind, name):
    """ResNet-18 and -34 with torchvision's weights see what torchvision's networks see."""
    plain = torchvision().models.get_model(name, weights=None).eval()
    network = kind(num_classes=5, use_norm=True, num_experts=2).eval()
    start_from(network, plain.state_dict(), "torchvision")
    assert TORCHVISION_NAMES[kind.__name__] == name
    plain.fc = torch.nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        feat, expected = network(images)["feat"], plain(images)
    for e in (0, 1):
        torch.testing.assert_close(feat[:, e], expected, atol=1e-5, rtol=1e-4)
