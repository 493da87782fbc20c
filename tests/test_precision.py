"""What "auto" chooses, what a resumed run keeps, and what stays in float32 under autocast."""

import importlib.util
import logging

import pytest
import torch
from conftest import ROOT
from torch import nn

from data_loader.data_loaders import ImbalanceDigitsDataLoader
from model.loss import CrossEntropyLoss
from model.model import ResNet10Model, ResNet32Model, ViTModel
from trainer import train
from trainer.options import TrainerOptions
from trainer.precision import automatic_precision, choose_precision, has_amx
from trainer.registry import COMPONENTS
from trainer.trainer import Trainer
from utils.checkpoint import load_checkpoint
from utils.logger import get_logger
from utils.parse_config import read_json

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def messages():
    """What is logged from now on, as (level, message)."""
    found = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append((record.levelname, record.getMessage()))
    get_logger(verbosity=2).addHandler(handler)
    yield found
    get_logger().removeHandler(handler)


def set_amx(monkeypatch, there: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: there, raising=False)


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((10, 0), "bf16")])
def test_auto_is_bf16_on_cuda_since_ampere(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    precision, why = automatic_precision(CUDA)
    assert precision == chosen and f"{capability[0]}.{capability[1]}" in why


def test_auto_is_bf16_on_a_cpu_with_amx_and_fp32_elsewhere(monkeypatch, messages):
    set_amx(monkeypatch, True)
    assert choose_precision("auto", CPU) == "bf16"
    set_amx(monkeypatch, False)
    assert choose_precision("auto", CPU) == "fp32"
    assert messages == [
        ("INFO", "Precision: bf16 (the CPU has AMX)."),
        ("INFO", "Precision: fp32 (the CPU has no AMX, which bf16 needs)."),
    ]
    assert automatic_precision(torch.device("mps"))[0] == "fp32"
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")  # another torch, which cannot tell
    assert not has_amx()


def test_a_precision_asked_for_by_name_is_taken(monkeypatch, messages):
    set_amx(monkeypatch, True)
    assert [choose_precision(name, CPU, "bf16") for name in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
    assert messages == []
    set_amx(monkeypatch, False)
    assert choose_precision("bf16", CPU) == "bf16"
    assert [level for level, _ in messages] == ["WARNING"] and "slower than fp32" in messages[0][1]


def test_a_run_that_goes_on_keeps_its_precision(monkeypatch, messages, digits_config):
    digits_config["trainer"] |= {"epochs": 1, "precision": "auto", "valid_period": 3, "monitor": "off"}
    digits_config["arch"]["args"]["num_experts"] = 1
    digits_config["data_loader"]["args"]["imb_factor"] = 0.01
    set_amx(monkeypatch, False)
    first = train(digits_config, device="cpu", run_id="a")["last"]
    assert load_checkpoint(first)["precision"] == "fp32"
    assert load_checkpoint(first)["config"]["trainer"]["precision"] == "auto"
    messages.clear()
    set_amx(monkeypatch, True)  # another machine
    resumed = train({"trainer;epochs": 2}, resume=first, device="cpu")
    assert load_checkpoint(resumed["last"])["precision"] == "fp32"
    assert [message for level, message in messages if level == "WARNING" and "recision" in message] == [
        "Precision: fp32, as this run was trained so far; a new one would take bf16 here (the CPU has AMX). "
        "--precision bf16 changes it."
    ]


def test_kept_precision_may_be_slow_here_and_is_named(monkeypatch, messages):
    set_amx(monkeypatch, False)
    assert choose_precision("auto", CPU, "bf16") == "bf16"
    assert [level for level, _ in messages] == ["WARNING", "WARNING"] and "slower than fp32" in messages[1][1]
    assert choose_precision("auto", CPU, "fp32") == "fp32"
    assert messages[2] == ("INFO", "Precision: fp32 (the CPU has no AMX, which bf16 needs; as so far).")


def test_every_training_config_says_its_precision():
    for path in (ROOT / "configs").glob("config_*.json"):
        says = read_json(path)["trainer"]["precision"]
        assert says == ("auto" if path.name == "config_custom_example.json" else "fp32"), path.name


def with_distant_weights(network: nn.Module) -> nn.Module:
    """Classifier weights that bfloat16 does not hold exactly, on logits of some size."""
    for name, parameter in network.named_parameters():
        if ".linear" in name and name.endswith("weight"):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    return network


NETWORKS = {
    "cosine, CIFAR": lambda: ResNet32Model(100, use_norm=True, num_experts=3),
    "linear, CIFAR, one expert": lambda: ResNet32Model(100),
    "cosine, large images": lambda: ResNet10Model(100, use_norm=True, num_experts=2),
    "linear, large images": lambda: ResNet10Model(100, num_experts=2),
    "cosine, ViT": lambda: ViTModel(100, image_size=32, patch_size=16, use_norm=True, num_experts=2),
    "linear, ViT": lambda: ViTModel(100, image_size=32, patch_size=16, num_experts=2),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_classifiers_compute_in_float32_under_autocast(kind):
    if "ViT" in kind and not importlib.util.find_spec("timm"):
        pytest.skip("timm is not installed")
    torch.manual_seed(0)
    network = with_distant_weights(NETWORKS[kind]()).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = network(images)
    assert output["logits"].dtype == output["output"].dtype == torch.float32
    for expert in range(network.num_experts):
        with torch.no_grad():
            head = network.expert_modules(expert)[-1]
            features = output["feat"][:, expert].float()
            exact = head.double()(features.double()) * network.backbone.scale
        size = float(exact.abs().max())
        assert float((output["logits"][:, expert] - exact).abs().max()) < 1e-5 * size  # bfloat16 holds 4e-3
    exact_mean = output["logits"].double().mean(dim=1)
    assert torch.allclose(output["output"].double(), exact_mean, rtol=0, atol=1e-5 * size)


class TwoLinearExperts(nn.Module):
    """[B, 3, 4, 4] -> the output of a network whose logits autocast makes bfloat16."""

    num_experts = 2

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(48, 20)

    def forward(self, images):
        logits = self.linear(images.flatten(1)).unflatten(1, (2, 10))
        return {"output": logits.mean(dim=1), "logits": logits}


def make_trainer(folder, precision: str, criterion: nn.Module) -> Trainer:
    torch.manual_seed(0)
    network = TwoLinearExperts()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    options = TrainerOptions(epochs=1, monitor="off", precision=precision, tensorboard=False)
    return Trainer(network, criterion, {}, ImbalanceDigitsDataLoader(8), optimizer, None, options, folder, {})


@pytest.mark.parametrize("name", COMPONENTS["loss"])
def test_every_loss_is_computed_in_float32(name, tmp_path):
    """The criterion sees float32 logits outside of autocast, and its value is that of the fp32 loss on them."""
    counts = [60, 30, 20, 10, 5, 4, 3, 2, 1, 1]
    criterion = COMPONENTS["loss"][name](counts)
    seen = []

    class Watched(nn.Module):
        def forward(self, output, target):
            seen.append((torch.is_autocast_enabled("cpu"), output))
            return criterion(output, target)

    target = torch.arange(4)
    loss, _ = make_trainer(tmp_path, "bf16", Watched()).train_step(torch.randn(4, 3, 4, 4), target)
    (under_autocast, output), *more = seen
    assert not more and not under_autocast and all(value.dtype == torch.float32 for value in output.values())
    exact = criterion.double()({key: value.double() for key, value in output.items()}, target)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-5)


def test_fp16_scales_the_loss_and_skips_a_step_whose_gradients_overflow(tmp_path):
    trainer = make_trainer(tmp_path, "fp16", CrossEntropyLoss([1] * 10))
    weight, images = trainer.model.linear.weight, torch.randn(4, 3, 4, 4)
    before, scale = weight.clone(), trainer.update.scaler.get_scale()
    trainer.train_step(images * 1e4, torch.arange(4))
    assert torch.equal(weight, before) and trainer.update.scaler.get_scale() == scale / 2
    trainer.train_step(images, torch.arange(4))
    assert not torch.equal(weight, before) and weight.dtype == torch.float32


def test_float64_networks_keep_float64():
    network = ResNet32Model(10, use_norm=True).double()
    assert network(torch.randn(2, 3, 32, 32, dtype=torch.float64))["logits"].dtype == torch.float64
