"""The scripts of Places-LT and iNaturalist, as command lines, on lists of their layout over a few images."""

import json

import pytest
from conftest import ROOT, call_script
from test_on_disk import COUNTS, SIZE, folder  # noqa: F401 (a fixture)

from trainer import train
from utils.parse_config import read_json

#: config -> prefix of the lists, which of them is tested on, test distributions, what its scripts' names end in
DATA_SETS = {
    "places_lt_resnet152": ("Places_LT_v2/Places_LT", "test", ("forward50", "uniform", "backward50"), "places"),
    "iNaturalist_resnet50": ("iNaturalist18/iNaturalist18", "val", ("forward3", "forward2", "uniform"), "inat"),
}


def run(name: str, *arguments) -> str:
    """What a script prints."""
    done = call_script(name, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=DATA_SETS)
def run_of_a_data_set(folder, tmp_path_factory, request):  # noqa: F811
    """One epoch of a small network on its loader: config name, distributions, what scripts end in, last.pth."""
    prefix, tested, distributions, suffix = DATA_SETS[request.param]
    lists = tmp_path_factory.mktemp(suffix)
    (lists / prefix).parent.mkdir()
    tests = (folder / "test.txt").read_text().splitlines(keepends=True)
    splits = {"train": (folder / "train.txt").read_text(), "val": "".join(tests), tested: "".join(tests)}
    chosen = {"forward": [0, 1, 2, 4], "uniform": range(12), "backward": [0, 8, 9, 10]}
    splits |= {name: "".join(tests[i] for i in chosen[name.rstrip("0123456789")]) for name in distributions}
    for name, text in splits.items():
        (lists / f"{prefix}_{name}.txt").write_text(text)
    config = read_json(ROOT / "configs" / f"config_{request.param}_tade.json")
    config["arch"] = {"type": "ResNet10Model", "args": {"num_classes": len(COUNTS), "num_experts": 2, "use_norm": True}}
    config["arch"]["args"] |= {f"layer{stage}_output_dim": 16 for stage in (2, 3, 4)}
    config["data_loader"]["args"] |= {
        "data_dir": str(folder),
        "list_dir": str(lists),
        "batch_size": 8,
        "num_workers": 0,
        "image_size": SIZE,
        "distributions": list(distributions),
    }
    config["trainer"] |= {"epochs": 1, "save_dir": str(lists), "tensorboard": False}
    config.pop("weights", None)
    return request.param, distributions, suffix, train(config)["last"]


def test_scripts_of_a_published_data_set(run_of_a_data_set, tmp_path):
    name, distributions, suffix, last = run_of_a_data_set
    run("test_places" if suffix == "places" else "test", "-r", last, "-o", tmp_path / "balanced")
    run(f"test_all_{suffix}", "-r", last, "-o", tmp_path / "all")
    options = ["-c", f"configs/test_time_{name}_tade.json", "-r", last, "-o", tmp_path / "learned"]
    printed = run(f"test_train_{suffix}", *options, "--set", "aggregator;args;epochs=1")
    read = {kind: json.loads((tmp_path / kind / "results.json").read_text()) for kind in ("balanced", "all", "learned")}
    assert list(read["balanced"]["distributions"]) == ["uniform"]
    sizes = {entry: 12 if entry == "uniform" else 4 for entry in distributions}
    for kind in ("all", "learned"):
        found = read[kind]["distributions"]
        assert {entry: figures["images"] for entry, figures in found.items()} == sizes
        for entry in distributions:
            assert found[entry]["experts_top1"] == read["all"]["distributions"][entry]["experts_top1"]
    assert read["balanced"]["distributions"]["uniform"]["top1"] == read["all"]["distributions"]["uniform"]["top1"]
    assert all("learning" not in entry for entry in read["all"]["distributions"].values())
    assert all("weights_after_pass" in entry["learning"] for entry in read["learned"]["distributions"].values())
    assert str(tmp_path / "learned") in printed
