"""A run goes on as it began, or says what differs; a damaged last.pth blocks nothing; files choose no folder."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import script, start_small_run

from commands.command_line import parse
from data_loader.data_loaders import ImbalanceDigitsDataLoader
from data_loader.image_lists import ImageList
from evaluation import load_run
from trainer import continuity, train
from trainer.registry import read_config
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> dict:
    """A run of one epoch of a tiny network, and its config with two epochs."""
    return start_small_run(tmp_path_factory.mktemp("small"))


@pytest.fixture
def started(small_run, tmp_path) -> dict:
    """A copy of it, to go on with."""
    folder = tmp_path / Path(small_run["last"]).parent.name
    shutil.copytree(Path(small_run["last"]).parent, folder)
    return {"last": folder / "last.pth", "config": small_run["config"]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 99}, "seed was 1 and is 99"),
        ({"loss;args;tau": 1.5}, "loss;args;tau was 2 and is 1.5"),
        ({"loss": {"type": "CrossEntropyLoss"}}, "loss;type was DiverseExpertLoss and is CrossEntropyLoss"),
        ({"data_loader;args;imb_factor": 0.5}, "data_loader;args;imb_factor was 0.05 and is 0.5"),
        ({"data_loader;args;imb_factor": 0.5}, "405 training images were in 10 classes and 8[0-9]+ are in 10"),
        ({"data_loader;args;balanced": True}, "data_loader;args;balanced was False and is True"),
        ({"trainer;mixup_alpha": 0.4}, "trainer;mixup_alpha was 0.0 and is 0.4"),
    ],
)
def test_another_training_is_named_and_refused(started, change, named):
    with pytest.raises(UserError, match=f"one/last.pth was trained otherwise: .*{named}.* with --allow_changes"):
        train({**started["config"], **change}, resume=started["last"])


def test_five_differences_are_named_and_the_rest_counted(monkeypatch):
    monkeypatch.setattr(continuity, "changes", lambda *_: list("1234567"))
    with pytest.raises(UserError, match=r"trained otherwise: 1; 2; 3; 4; 5 \(and 2 more\); undo"):
        continuity.check_continuity({}, "last.pth", read_config({}), [], {}, allow=False)


def test_allowed_changes_are_said_and_taken(started, capsys):
    arguments = ["-r", str(started["last"]), "--seed", "99", "--epochs", "2", "--allow_changes"]
    options = parse(train, "", arguments)
    assert options["allow_changes"] and not parse(train, "", arguments[:-1])["allow_changes"]
    results = train(**options)
    assert results["epoch"] == 2 and "Going on otherwise than" in capsys.readouterr().out
    assert load_checkpoint(results["last"])["config"]["seed"] == 99


def test_free_changes_are_taken_without_a_word(started, capsys):
    free = {
        "optimizer;args;lr": 0.02,
        "lr_scheduler;args;step1": 7,
        "trainer;monitor": "max val_few",
        "data_loader;args;distributions": ["uniform"],
        "data_loader;args;num_workers": 2,
        "data_loader;args;shuffle": True,  # what the default says
        "metrics": ["top5_accuracy"],
    }
    assert train({**started["config"], **free}, resume=started["last"])["epoch"] == 2
    assert "otherwise" not in capsys.readouterr().out


@pytest.mark.parametrize("part", ["pixels", "labels"])
def test_other_images_are_noticed(started, monkeypatch, part):
    original = ImbalanceDigitsDataLoader.load

    def changed(self, train):
        images, targets = original(self, train)
        if part == "pixels":
            images[0, 0, 3, 3] += 1
        else:
            first = [int(np.flatnonzero(targets == label)[0]) for label in (0, 1)]
            targets[first] = targets[first[::-1]]
        return type(original(self, train))(images, targets)

    monkeypatch.setattr(ImbalanceDigitsDataLoader, "load", changed)
    with pytest.raises(UserError, match="the training images' (pixels|labels) differ"):
        train(started["config"], resume=started["last"])


def test_the_fingerprint_of_lists_depends_on_order_and_boundaries(tmp_path):
    def of(text: str) -> dict:
        from data_loader.data_loaders import ListDataLoader

        (tmp_path / "train.txt").write_text(text)
        (tmp_path / "test.txt").write_text("x.png 0\ny.png 1\n")
        loader = ListDataLoader(str(tmp_path), str(tmp_path / "train.txt"), str(tmp_path / "test.txt"), 8)
        return loader.fingerprint(read_images=False)

    base = of("a/1.png 0\na/2.png 0\nb.png 1\n")
    assert of("a/1.png 0\r\na/2.png  0\n\nb.png 1") == base  # the same list
    assert of("a/2.png 0\na/1.png 0\nb.png 1\n")["paths"] != base["paths"]
    assert of("a/1.pnga 0\n/2.png 0\nb.png 1\n")["paths"] != base["paths"]
    swapped = of("a/1.png 0\na/2.png 1\nb.png 0\n")
    assert swapped["labels"] != base["labels"] and swapped["paths"] == base["paths"]
    assert ImageList.read(tmp_path / "train.txt", tmp_path).targets.tolist() == [0, 1, 0]


def test_evaluation_says_when_the_training_list_is_another(tmp_path, capsys):
    """Of as many images a class; no image is read."""
    lists = {f"{split}_list": str(tmp_path / f"{split}.txt") for split in ("train", "test")}
    loader = {"data_dir": str(tmp_path), "batch_size": 8, "image_size": 32, "num_workers": 0, **lists}
    arch = {"type": "ResNet32Model", "args": {"num_classes": 2}}
    config = {"name": "x", "arch": arch, "data_loader": {"type": "ListDataLoader", "args": loader}}
    (tmp_path / "train.txt").write_text("a.png 0\nb.png 0\nc.png 1\n")
    (tmp_path / "test.txt").write_text("x.png 0\ny.png 1\n")
    checked = read_config(config)
    content = {"model": checked.build("arch").state_dict(), "config": config, "epoch": 1, "cls_num_list": [2, 1]}
    fingerprint = checked.build("data_loader").fingerprint()
    for now, recorded, said in (
        ("a.png 0\nb.png 0\nc.png 1\n", fingerprint, ""),
        ("a.png 0\nb.png 1\nc.png 0\n", fingerprint, "as many of each class: their labels differ."),
        ("a.png 0\nB.png 0\nc.png 1\n", fingerprint, "as many of each class: their paths differ."),
        ("a.png 0\nB.png 0\nc.png 1\n", None, ""),
    ):
        save_checkpoint(tmp_path / "a.pth", {**content, "fingerprint": recorded})
        (tmp_path / "train.txt").write_text(now)
        load_run(tmp_path / "a.pth")
        printed = capsys.readouterr().out
        assert said in printed and ("other images" in printed) == bool(said)


def test_results_record_what_was_trained_on(small_run, tmp_path):
    results = script("test").main(checkpoint=Path(small_run["last"]), output=tmp_path / "out")
    trained_on = load_checkpoint(small_run["last"])["fingerprint"]
    assert results["checkpoint"]["fingerprint"] == trained_on and len(trained_on["labels"]) == 32


def test_a_damaged_last_checkpoint_does_not_block_another(started, capsys):
    best = started["last"].with_name("model_best.pth")
    started["last"].write_bytes(started["last"].read_bytes()[:1000])
    with pytest.raises(UserError, match="its folder may hold last.pth, model_best.pth"):
        train(started["config"], resume=started["last"])
    resumed = train(started["config"], resume=best)
    assert resumed["run_dir"] == str(best.parent) and load_checkpoint(started["last"])["epoch"] == 2
    assert "It will be replaced" in capsys.readouterr().out


def test_a_file_does_not_choose_where_is_written(started, tmp_path, monkeypatch):
    content = load_checkpoint(started["last"])
    content["config"]["trainer"] |= {"save_dir": str(tmp_path / "chosen by the file"), "epochs": 2}
    (tmp_path / "elsewhere").mkdir()
    stranger = tmp_path / "elsewhere" / "last.pth"
    save_checkpoint(stranger, content)
    monkeypatch.chdir(tmp_path)
    assert Path(train(resume=stranger)["run_dir"]).parts[0] == "saved"
    asked = train({"trainer;save_dir": str(tmp_path / "asked")}, resume=stranger)
    assert Path(asked["run_dir"]).is_relative_to(tmp_path / "asked")
    assert not (tmp_path / "chosen by the file").exists()
    for name in ("../out", "/tmp/out", "a/../../b"):
        content["config"]["name"] = name
        save_checkpoint(stranger, content)
        with pytest.raises(UserError, match="give the name of a folder below save_dir"):
            train(resume=stranger)


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("random", {"torch": torch.zeros(7, dtype=torch.uint8)}),
        ("optimizer;param_groups;0;lr", "fast"),
        ("optimizer;param_groups;0;initial_lr", "fast"),
        ("optimizer;param_groups", []),
        ("optimizer;state;0;momentum_buffer", torch.zeros(2, 2)),
        ("optimizer;state;0;momentum_buffer", torch.zeros(2, 2).numpy().tolist()),
        ("scheduler", None),
        ("random", None),
    ],
)
def test_states_that_do_not_fit_are_one_sentence(started, entry, value):
    content = load_checkpoint(started["last"])
    *parents, last = (int(key) if key.isdigit() else key for key in entry.split(";"))
    target = content
    for key in parents:
        target = target[key]
    target[last] = value
    save_checkpoint(started["last"], content)
    with pytest.raises(UserError, match="is damaged|parameter groups|weights alone"):
        train(started["config"], resume=started["last"])


def test_a_config_that_is_not_understood_gives_way_to_ones_own(started):
    content = load_checkpoint(started["last"])
    content["config"]["trainer"] = []
    save_checkpoint(started["last"], content)
    with pytest.raises(UserError, match="its config cannot be compared .*--allow_changes"):
        train(started["config"], resume=started["last"])
    assert train(started["config"], resume=started["last"], allow_changes=True)["epoch"] == 2


def test_a_config_without_a_seed_has_seed_1(small_run):
    content = load_checkpoint(small_run["last"])
    unnamed = {key: value for key, value in small_run["config"].items() if key != "seed"}
    for old, now in ((unnamed, small_run["config"]), (small_run["config"], unnamed)):
        found = continuity.changes({**content, "config": old}, read_config(now), content["cls_num_list"], {})
        assert content["seed"] == 1 and found == []
