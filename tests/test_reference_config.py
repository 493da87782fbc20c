"""The reference's own JSON files parse and run as they are."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT, script

from commands.command_line import parse
from commands.jobs import run_test_train
from data_loader.class_profiles import CIFAR_DISTRIBUTIONS
from data_loader.data_loaders import ImbalanceCIFAR100DataLoader
from data_loader.datasets import ImageSet
from evaluation import adapt, load_run
from evaluation.aggregators import build_aggregator
from trainer import train
from trainer.build import parameter_groups
from trainer.registry import COMPONENTS, read_config
from utils.errors import UserError
from utils.parse_config import merge, read_json

#: The shape of each of its twelve files, with the published hyper-parameters.
SHAPES = ROOT / "tests" / "reference_configs"
FILES = sorted(SHAPES.glob("*.json"))
TRAINING = [path for path in FILES if "test_time" not in path.name]
TEST_TIME = [path for path in FILES if "test_time" in path.name]


def test_all_twelve_are_here():
    assert len(TRAINING) == 6 and len(TEST_TIME) == 6


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_a_training_file_builds_what_it_names(path):
    config = read_config(read_json(path), training=True)
    network = config.build("arch")
    counts = list(range(network.num_classes, 0, -1))
    config.build("loss", cls_num_list=counts)
    config.build("trainer")
    optimizer = config.build("optimizer", parameter_groups(config, network))
    config.build("lr_scheduler", optimizer)
    assert len(optimizer.param_groups) == (2 if "places" in path.name else 1)  # share_lr


@pytest.mark.parametrize("path", TEST_TIME, ids=lambda path: path.stem)
def test_a_test_time_file_is_the_published_method(path):
    config = read_config(read_json(path))
    aggregator = build_aggregator(config, torch.zeros(3, 5), torch.zeros(5))
    assert (aggregator.epochs, aggregator.batch_size, aggregator.stop_below) == (5, 128, 0.05)
    assert aggregator.entropy_coefficient == (-0.01 if "iNaturalist" in path.name else 0)
    given = read_json(path)["optimizer"]["args"]
    assert aggregator.optimizer.param_groups[0]["lr"] == given["lr"]


def test_what_has_no_effect_is_named_once(digits_run, capsys):
    read_config(read_json(SHAPES / "config_cifar100_ir100_tade.json"))
    said = "Without effect here: add_extra_info, arch;args;returns_feat, data_loader;args;num_workers."
    assert said in capsys.readouterr().out
    changes = {"arch;args;returns_feat": True, "add_extra_info": True, "epochs": 1}
    adapt(load_run(digits_run["last"], overrides=changes), names=["forward10", "uniform"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "Without effect" in line]
    assert lines == ["Without effect here: add_extra_info, arch;args;returns_feat."]


def test_without_an_epoch_training_is_taken_to_be_over(digits_run, tmp_path):
    checkpoint = torch.load(digits_run["last"], weights_only=True)
    checkpoint["config"]["loss"] = {"type": "LDAMLoss", "args": {"reweight_epoch": 3}}
    torch.save({**checkpoint, "epoch": None}, tmp_path / "weights.pth")
    torch.save({**checkpoint, "epoch": 2}, tmp_path / "early.pth")
    late, early = (load_run(tmp_path / name).expert_log_priors for name in ("weights.pth", "early.pth"))
    torch.save({**checkpoint, "epoch": 4}, tmp_path / "late.pth")
    assert torch.equal(late, load_run(tmp_path / "late.pth").expert_log_priors) and not torch.allclose(late, early)


def test_a_misspelt_key_beside_them_is_still_named():
    config = read_json(SHAPES / "config_cifar100_ir100_tade.json")
    with pytest.raises(UserError, match='Unknown key in the config "add_extra_infos"'):
        read_config(merge(config, {"add_extra_infos": True}))


class SmallCIFAR100(ImbalanceCIFAR100DataLoader):
    """Random images in CIFAR-100's shape, two of each class to test on."""

    largest_class = 10

    def load(self, train: bool) -> ImageSet:
        count = 100 * (10 if train else 2)
        images = torch.randint(
            0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        return ImageSet(images, torch.arange(100).repeat_interleave(count // 100))


def test_they_run(tmp_path, monkeypatch, capsys):
    """train.py and test_train_cifar.py with the reference's files as they are; only epochs and data are made small."""
    monkeypatch.setitem(COMPONENTS["data_loader"], "ImbalanceCIFAR100DataLoader", SmallCIFAR100)
    config, test_time = (SHAPES / f"{kind}_cifar100_ir10_tade.json" for kind in ("config", "test_time"))
    flags = ["--epochs", "1", "--save_dir", str(tmp_path), "--run_id", "one"]
    trained = script("train").main(**parse(train, "", ["-c", str(config), *flags]))
    printed = capsys.readouterr().out
    assert trained["epoch"] == 1 and printed.count("Without effect here") == 1
    assert f"Done. Last epoch: {trained['last']}, best: {trained['best']}" in printed

    at = ["-c", str(test_time), "-r", trained["last"]]
    results = script("test_train_cifar").main(**parse(run_test_train, "", at))
    printed = capsys.readouterr().out
    assert printed.count("Without effect here") == 1 and "StabilityAggregator" in results["protocol"]
    assert list(results["distributions"]) == list(CIFAR_DISTRIBUTIONS)
    passes = [len(entry["learning"]["stability_in_pass"]) for entry in results["distributions"].values()]
    assert 1 <= min(passes) and max(passes) <= 5 and "forward50   passes " in printed
    assert "pass 1  forward50" in (Path(trained["run_dir"]) / "results/last/test_train/log.txt").read_text()
