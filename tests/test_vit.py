"""A Vision Transformer from timm as the trunk that all experts share."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import model.backbones.timm_trunk
from commands import gflops
from model.backbones.timm_trunk import import_timm
from model.cost import count_macs
from model.freeze import freeze
from model.loss import DiverseExpertLoss
from model.model import TimmModel, ViTModel
from model.pretrained import start_from
from utils.errors import UserError

needs_timm = pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="timm is not installed")
TINY = {"num_classes": 7, "image_size": 16, "patch_size": 8}


@needs_timm
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("use_norm", [False, True])
def test_output_contract_and_a_gradient_for_every_parameter(experts, use_norm):
    network = ViTModel(**TINY, num_experts=experts, use_norm=use_norm, returns_feat=True)
    output = network(torch.randn(4, 3, 16, 16))
    assert set(output) == {"output", "logits", "feat"}
    assert output["logits"].shape == (4, experts, 7) and output["feat"].shape == (4, experts, 192)
    torch.testing.assert_close(output["output"], output["logits"].mean(dim=1))
    DiverseExpertLoss([50, 40, 30, 20, 10, 5, 2])(output, torch.tensor([0, 1, 2, 6])).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@needs_timm
def test_parts_have_names():
    network = ViTModel(**TINY, num_experts=2)
    assert network.classifier_names() == {f"backbone.linears.{e}.{name}" for e in (0, 1) for name in ("weight", "bias")}
    assert network.plain_name("backbone.trunk.blocks.0.attn.qkv.weight") == "blocks.0.attn.qkv.weight"
    assert network.plain_name("backbone.trunk.cls_token") == "cls_token"
    assert network.plain_name("backbone.linears.1.weight") is None
    frozen = freeze(network, ["backbone.trunk"])
    assert network.backbone.trunk in frozen and network.backbone not in frozen


@needs_timm
def test_a_plain_transformer_of_timm_is_a_start():
    plain = import_timm().create_model("vit_tiny_patch16_224", img_size=16, patch_size=8, num_classes=11)
    network = ViTModel(**TINY, num_experts=2)
    filled = start_from(network, plain.state_dict(), "file")
    assert set(network.state_dict()) - set(filled) == network.classifier_names()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = plain.eval().forward_head(plain.forward_features(images), pre_logits=True)
        torch.testing.assert_close(network.eval()(images)["feat"][:, 1], expected)
    with pytest.raises(UserError, match=r"pos_embed is \[1, 5, 192\] in file and \[1, 17, 192\].*image size"):
        start_from(ViTModel(7, image_size=32, patch_size=8), plain.state_dict(), "file")


@needs_timm
def test_cost_is_counted_by_part():
    network = ViTModel(**TINY, num_experts=2, use_norm=False)
    names = set(network.state_dict())
    table = count_macs(network, 16)
    assert set(network.state_dict()) == names
    assert table.loc["total", "parameters"] == sum(p.numel() for p in network.parameters())
    assert table.loc["expert 1", "classifier"] == 192 * 7 and table.loc["expert 1", "linear layers"] == 0
    tokens = 5
    assert table.loc["stem", "linear layers"] == 12 * tokens * 192 * 192 * (3 + 1 + 4 + 4)  # qkv, proj, fc1, fc2
    assert table.loc["stem", "convolutions"] == 4 * 192 * 3 * 8 * 8
    assert "linear layers (G)" in gflops.format_cost(table)


def test_without_timm_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setattr(model.backbones.timm_trunk, "torchvision", lambda: None)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        ViTModel(**TINY)


def test_importing_the_networks_imports_neither_timm_nor_torchvision():
    code = "import sys, model.model; print({'timm', 'torchvision'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


@needs_timm
@pytest.mark.parametrize("variant", ["resnet10t", "mobilenetv3_small_050"])  # the second pools before its last layer
def test_any_network_of_timm_is_a_trunk(variant):
    network = TimmModel(7, variant, use_norm=True, num_experts=2).eval()
    plain = import_timm().create_model(variant, num_classes=11).eval()
    start_from(network, plain.state_dict(), "file")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        output = network(images)
        expected = plain.forward_head(plain.forward_features(images), pre_logits=True)
    assert output["logits"].shape == (2, 2, 7)
    for e in (0, 1):
        torch.testing.assert_close(output["feat"][:, e], expected)
    assert not torch.equal(output["logits"][:, 0], output["logits"][:, 1])  # classifiers are fresh


@needs_timm
def test_what_timm_has_not_is_named():
    with pytest.raises(UserError, match='timm has no network "resnet10s": did you mean .*resnet10t'):
        TimmModel(7, "resnet10s")
    with pytest.raises(ValueError, match="resnet10t refuses an argument"):
        model.backbones.timm_trunk.make_trunk("resnet10t", False, img_size=64)
    with pytest.raises(UserError, match="timm's weights for .* could not be had"):
        TimmModel(7, "resnet10t.no_such_tag", pretrained=True)
