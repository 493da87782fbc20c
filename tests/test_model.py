import numpy as np
import pytest
import torch
from conftest import GOLDEN, SHARED, golden_json, golden_random, golden_weights

import model.model
from model.backbones.multi_expert import CosineClassifier, experts_in
from model.loss import DiverseExpertLoss

GOLDEN_MODELS = golden_json("models.json")
SMALL = {"num_classes": 7, "reduce_dimension": True, "use_norm": True}


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_names_shapes_and_logits_are_the_references(name):
    entry = GOLDEN_MODELS[name]
    network = getattr(model.model, entry["type"])(**entry["args"]).eval()
    state = network.state_dict()
    assert {k: list(v.shape) for k, v in state.items()} == entry["state_dict"]
    assert sum(p.numel() for p in network.parameters()) == entry["parameters"]
    network.load_state_dict(golden_weights(state))
    images = torch.from_numpy(golden_random("input").standard_normal(entry["input"]).astype(np.float32))
    with torch.no_grad():
        output = network(images)
    figures = SHARED / "golden" if (SHARED / "golden").exists() else GOLDEN  # the copy leaves the largest array out
    for key, expected in np.load(figures / f"model_{name}.npz").items():
        np.testing.assert_allclose(output[key].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 6])
def test_output_contract_and_a_gradient_for_every_parameter(experts):
    network = model.model.ResNet32Model(**SMALL, num_experts=experts)
    output = network(torch.randn(4, 3, 32, 32))
    assert output["logits"].shape == (4, experts, 7) and output["feat"].shape == (4, experts, 48)
    torch.testing.assert_close(output["output"], output["logits"].mean(dim=1))
    DiverseExpertLoss([50, 40, 30, 20, 10, 5, 2])(output, torch.tensor([0, 1, 2, 6])).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_width_overrides():
    network = model.model.ResNet32Model(**SMALL, layer2_output_dim=20, layer3_output_dim=40, num_experts=2)
    assert network.backbone.linears[1].weight.shape == (40, 7)
    with pytest.raises(ValueError, match="narrower"):
        model.model.ResNet32Model(**SMALL, layer2_output_dim=8)
    with pytest.raises(ValueError, match="num_experts"):
        model.model.ResNet32Model(**SMALL, num_experts=0)


def test_layer3_can_be_shared():
    flags = {"num_classes": 5, "use_norm": True, "num_experts": 2}
    parts = {name.split(".")[1] for name in model.model.ResNet10Model(**flags, share_layer3=True).state_dict()}
    assert "layer3" in parts and "layer3s" not in parts and "layer4s" in parts
    parts = {name.split(".")[1] for name in model.model.ResNet10Model(**flags).state_dict()}
    assert "layer3" not in parts and "layer3s" in parts


@pytest.mark.parametrize("name", ["ResNet10Model", "ResNet50Model", "ResNeXt50Model"])
@pytest.mark.parametrize("experts", [1, 3])
def test_every_parameter_of_the_large_networks_gets_a_gradient(name, experts):
    network = getattr(model.model, name)(
        7, reduce_dimension=True, use_norm=True, num_experts=experts, layer3_output_dim=32, layer4_output_dim=64
    )
    output = network(torch.randn(3, 3, 64, 64))
    assert output["logits"].shape == (3, experts, 7)
    DiverseExpertLoss([50, 40, 30, 20, 10, 5, 2])(output, torch.tensor([0, 1, 6])).backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


def test_cosine_classifier_starts_with_unit_columns_and_gives_cosines():
    head = CosineClassifier(5, 3)
    torch.testing.assert_close(head.weight.norm(dim=0), torch.ones(3))
    feat = 7 * head.weight[:, 1].detach()[None]
    torch.testing.assert_close(head(feat)[0, 1], torch.tensor(1.0))


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_a_state_dict_says_how_many_experts_there_are(name):
    entry = GOLDEN_MODELS[name]
    assert experts_in(entry["state_dict"]) == entry["args"].get("num_experts", 1)
    assert experts_in(key.removeprefix("backbone.") for key in entry["state_dict"]) == experts_in(entry["state_dict"])
    assert experts_in(["conv1.weight", "fc.weight"]) == 1


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("use_norm", [False, True])
def test_classifiers_and_plain_names(experts, use_norm):
    network = model.model.ResNet10Model(5, use_norm=use_norm, num_experts=experts, share_layer3=True)
    state = network.state_dict()
    heads = {name for name in state if name.startswith("backbone.linear")}
    assert network.classifier_names() == heads and len(heads) == experts * (1 if use_norm else 2)
    plain = {name: network.plain_name(name) for name in state}
    assert {name for name, other in plain.items() if other is None} == heads
    assert plain["backbone.conv1.weight"] == "conv1.weight"
    assert plain["backbone.layer3.0.bn1.bias"] == "layer3.0.bn1.bias"
    last = "backbone.layer4.0.bn1.bias" if experts == 1 else "backbone.layer4s.2.0.bn1.bias"
    assert plain[last] == "layer4.0.bn1.bias"
    assert network.expert_modules(experts - 1)[-1].weight is network.get_parameter(sorted(heads)[-1])
