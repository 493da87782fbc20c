import inspect

import pytest
import torch
from conftest import ROOT

from commands.command_line import parse
from commands.jobs import RECOMMENDED
from data_loader.data_loaders import ListDataLoader
from evaluation.aggregators import build_aggregator
from trainer import train
from trainer.build import build_loss, build_network, parameter_groups
from trainer.registry import COMPONENTS, read_config
from utils.errors import UserError
from utils.parse_config import ConfigParser, fits, merge, parameters_of, parse_assignment, read_json
from utils.seed import epoch_generator, seed_everything

CONFIGS = sorted((ROOT / "configs").glob("*.json"))
TADE = "config_cifar100_ir100_tade.json"


@pytest.fixture
def config() -> dict:
    return read_json(ROOT / "configs" / TADE)


@pytest.fixture(scope="module")
def stepped() -> set:
    """What has trained a step already: configs of a data set's imbalance ratios differ in nothing that counts here."""
    return set()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds_what_it_names_and_trains_a_step(path, stepped):
    config = read_config(read_json(path))
    if "arch" not in config:
        assert "data_loader" not in config  # the checkpoint's counts
        build_aggregator(config, torch.zeros(3, 5), torch.zeros(5))
        return
    if issubclass(COMPONENTS["data_loader"][config["data_loader"]["type"]], ListDataLoader):
        counts = [9] * config["arch"]["args"]["num_classes"]  # its lists are not here
    else:
        counts = config.build("data_loader").cls_num_list
    network, criterion = build_network(config, len(counts), torch.device("cpu")), build_loss(config, counts)
    optimizer = config.build("optimizer", parameter_groups(config, network))
    config.build("lr_scheduler", optimizer)
    config.build("trainer")
    kind = f"{config['arch']} {config['loss']}"
    if kind in stepped:
        return
    stepped.add(kind)
    size = 32 if config["arch"]["type"] == "ResNet32Model" else 64
    criterion(network(torch.randn(2, 3, size, size)), torch.tensor([0, len(counts) - 1])).backward()
    assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in network.parameters())
    before = network.backbone.conv1.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, network.backbone.conv1.weight)


@pytest.mark.parametrize("data", sorted(path.stem[7:-8] for path in CONFIGS if path.stem.endswith("_softmax")))
def test_methods_share_data_and_network_family(data):
    tade, ride, softmax = (read_json(ROOT / "configs" / f"config_{data}_{m}.json") for m in ("tade", "ride", "softmax"))
    assert tade["data_loader"]["type"] == ride["data_loader"]["type"] == softmax["data_loader"]["type"]
    assert tade["arch"]["type"] == ride["arch"]["type"] == softmax["arch"]["type"]
    assert [c["loss"]["type"] for c in (tade, ride, softmax)] == ["DiverseExpertLoss", "RIDELoss", "CrossEntropyLoss"]
    assert softmax["optimizer"] == tade["optimizer"] and softmax["lr_scheduler"] == tade["lr_scheduler"]
    assert softmax["arch"]["args"]["num_experts"] == 1 and not softmax["arch"]["args"]["use_norm"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("trainer;epoch", 3, 'argument of TrainerOptions in config section "trainer" "epoch": did you mean "epochs"'),
        ("optimiser", {}, 'key in the config "optimiser": did you mean "optimizer"'),
        ("arch;type", "ResNet322Model", 'type in config section "arch" "ResNet322Model": did you mean "ResNet32Model"'),
        ("arch;args;num_expert", 3, 'did you mean "num_experts"'),
        ("arch;arguments", {}, 'key in config section "arch" "arguments"'),
        ("loss;args;lambda", 2, 'argument of DiverseExpertLoss in config section "loss" "lambda"'),
        ("loss;args;tau", "two", '"tau" in loss.DiverseExpertLoss must be of type float, not "two"'),
        ("trainer;type", "Trainr", 'type in config section "trainer" "Trainr": did you mean "Trainer"'),
        ("averaged_views", 10**9, "averaged_views must be at most 10000"),
        ("data_loader;args;batch_size", 12.5, '"batch_size" in data_loader.* must be of type int'),
        ("optimizer;args;learning_rate", 0.1, 'argument of SGD in config section "optimizer" "learning_rate"'),
        ("metrics", ["acuracy"], 'Unknown metric "acuracy": did you mean "accuracy"'),
        ("n_gpu", "one", '"n_gpu" in config must be of type int'),
        ("arch;args", 3, "must be a JSON object"),
    ],
)
def test_what_is_unknown_or_of_the_wrong_type_is_named(config, path, value, message):
    config = merge(config, {path: value})
    with pytest.raises(UserError, match=message):
        read_config(config)


def test_missing_argument_and_missing_section(config):
    del config["lr_scheduler"]["args"]["step1"]
    with pytest.raises(UserError, match='"lr_scheduler" .* lacks the argument "step1"'):
        read_config(config)
    del config["lr_scheduler"]
    with pytest.raises(UserError, match='The config has no "lr_scheduler"'):
        read_config(config).build("lr_scheduler")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("data_loader;args;imb_factor", 1.5, r"imb_factor must lie in \(0, 1\]"),
        ("data_loader;args;imb_factor", 0, r"imb_factor must lie in \(0, 1\]"),
        ("data_loader;args;batch_size", 0, "batch_size must be at least 1"),
        ("trainer;precision", "fp8", 'precision must be "auto", "fp32", "bf16" or "fp16"'),
        ("trainer;monitor", "val_accuracy", "monitor must be"),
        ("trainer;epochs", 0, "epochs must be at least 1"),
        ("arch;args;num_experts", 0, "num_experts must be at least 1"),
    ],
)
def test_values_out_of_range_are_named(config, path, value, message):
    config = read_config(merge(config, {path: value}))
    with pytest.raises(UserError, match=message):
        for section in ("trainer", "data_loader", "arch"):
            config.build(section)


def test_flags_and_assignments_override_the_file():
    path = str(ROOT / "configs" / TADE)
    flags = "--lr 0.05 --bs 64 --epochs 30 --num_experts 4 --name mine --save_period 7 --seed 3 --step1 24 -d cpu"
    assigned = "--imb_factor 0.1 --compile --set loss;args;tau=1.5 --set trainer;monitor=off"
    options = parse(train, "", ["-c", path, *flags.split(), *assigned.split()])
    config = read_config(options["config"], training=True)
    assert config["optimizer"]["args"]["lr"] == 0.05 and config["data_loader"]["args"]["batch_size"] == 64
    assert config["trainer"] == {
        **read_json(path)["trainer"],
        **{"epochs": 30, "save_period": 7, "monitor": "off", "compile": True},
    }
    assert config["arch"]["args"]["num_experts"] == 4 and config["name"] == "mine" and config["seed"] == 3
    assert config["lr_scheduler"]["args"]["step1"] == 24 and config["loss"]["args"]["tau"] == 1.5
    assert config["data_loader"]["args"]["imb_factor"] == 0.1
    assert options["device"] == "cpu" and options["resume"] is None and options["run_id"] is None


def test_merging_leaves_both_sides_alone():
    base, changes = {"a": {"b": {"c": 1}}, "d": 2}, {"a": {"b": {}}, "a;b;e": 3, "f;g": [4]}
    merged = merge(base, changes)
    assert merged == {"a": {"b": {"e": 3}}, "d": 2, "f": {"g": [4]}}
    merged["f"]["g"].append(5)
    assert base == {"a": {"b": {"c": 1}}, "d": 2} and changes == {"a": {"b": {}}, "a;b;e": 3, "f;g": [4]}
    with pytest.raises(UserError, match='"d" is a value, not a section'):
        merge(base, {"d;type": 1})


def test_assignments():
    assert parse_assignment('metrics=["accuracy"]') == ("metrics", ["accuracy"])
    assert parse_assignment("optimizer;type=Adam") == ("optimizer;type", "Adam")
    with pytest.raises(UserError, match="--set needs KEY;PATH=VALUE"):
        parse_assignment("optimizer;type")


def test_config_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no config file .*Nearest of the [0-9]+ in .*config_cifar100_ir100_tade.json"):
        read_json(ROOT / "configs" / "config_cifar100_ir100.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"name": "x",}')
    with pytest.raises(UserError, match="not valid JSON: line 1, column"):
        read_json(broken)
    broken.write_text("[1]")
    with pytest.raises(UserError, match="one JSON object"):
        read_json(broken)


def test_fits():
    assert fits([1, 2], list[int]) and not fits([1, "2"], list[int]) and not fits(3, list[int])
    assert fits(None, int | None) and not fits("3", int | None) and fits(3, float) and not fits(True, float)


def test_every_data_set_has_its_recommended_config():
    published = sorted((ROOT / "configs").glob("test_time_*_tade.json"))
    assert len(published) == 10
    for path in [*published, ROOT / "configs" / "test_time_custom_example.json"]:
        recommended = read_json(path.with_name(f"{path.stem.removesuffix('_tade')}_prior.json"))
        assert {key: recommended[key] for key in RECOMMENDED} == RECOMMENDED
        assert recommended["name"] != read_json(path)["name"] and recommended["seed"] == read_json(path)["seed"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"seed": ' + "9" * 5000 + "}", "a number in it has too many digits"),
        ('{"a": ' + "[" * 40 + "]" * 40 + "}", "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ('{"name": "a\\u0000b"}', "holds a character that cannot be printed"),
        ('{"a\\nb": 1}', "holds a character that cannot be printed"),
        ('{"name": "\\ud800"}', "holds a character that cannot be printed"),
    ],
)
def test_what_no_config_holds(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_json(tmp_path / "c.json")
    assert len(str(caught.value)) < 500
    with pytest.raises(UserError, match=message):
        parse_assignment(f"arch={text}")


@pytest.mark.parametrize(
    ("path", "value"),
    [("seed", 2**64), ("seed", 10**400), ("optimizer;args;lr", 10**400), ("trainer;epochs", -(2**63) - 1)],
)
def test_numbers_of_any_length_are_refused(config, path, value):
    with pytest.raises(UserError, match=r"must lie between -2\^63 and 2\^63|must be of type float"):
        read_config(merge(config, {path: value}))
    assert read_config(merge(config, {"seed": 2**63 - 1}))["seed"] == 2**63 - 1
    seed_everything(2**63 - 1)
    assert torch.rand(1, generator=epoch_generator(2**63 - 1, 1)) >= 0


def test_long_values_are_shown_in_part(config):
    for key in ("n_gpu", "x" * 10_000):
        with pytest.raises(UserError) as caught:
            read_config({**config, key: "x" * 10_000})
        assert len(str(caught.value)) < 1000


def test_another_type_leaves_behind_what_only_the_one_before_took():
    config = read_json(ROOT / "configs" / "config_digits_tade.json")
    changed = read_config({**config, "loss;type": "CrossEntropyLoss"})
    assert changed["loss"] == {"type": "CrossEntropyLoss", "args": {}}
    changed = read_config({**config, "optimizer;type": "Adam", "optimizer;args;lr": 0.001})
    assert changed["optimizer"]["args"] == {"lr": 0.001, "weight_decay": 0.0005}
    with pytest.raises(UserError, match='Unknown argument of CrossEntropyLoss.* "tau"'):
        read_config({**config, "loss;type": "CrossEntropyLoss", "loss;args;tau": 2})
    with pytest.raises(UserError, match='Unknown argument of CrossEntropyLoss.* "tau"'):
        read_config({**config, "loss": {"type": "CrossEntropyLoss", "args": {"tau": 2}}})


@pytest.mark.parametrize("section", ["name", "arch", "data_loader", "optimizer", "loss", "lr_scheduler", "trainer"])
def test_a_training_wants_every_section(section):
    config = read_json(ROOT / "configs" / "config_digits_tade.json")
    del config[section]
    with pytest.raises(UserError, match=f'"{section}"'):
        read_config(config, training=True)


def test_arguments_are_collected_over_the_classes_that_options_are_passed_on_to():
    class Base:
        def __init__(self, size: int, name: str = "base", *, hidden: float = 0.0):
            pass

    class Middle(Base):
        pass

    class Leaf(Middle):
        def __init__(self, name: str | None = None, **options: object):
            super().__init__(name=name or "leaf", **options)

    class Closed(Leaf):
        def __init__(self, size: int):
            super().__init__(size=size)

    assert {n: (p.default, p.annotation) for n, p in parameters_of(Leaf).items()} == {
        "name": (None, str | None),
        "size": (inspect.Parameter.empty, int),
        "hidden": (0.0, float),
    }
    assert list(parameters_of(Closed)) == ["size"] and list(parameters_of(Middle)) == ["size", "name", "hidden"]
    with pytest.raises(UserError, match='"hiden"'):
        ConfigParser({"s": {"type": "Leaf", "args": {"size": 1, "hiden": 2}}}, {"s": {"Leaf": Leaf}})
