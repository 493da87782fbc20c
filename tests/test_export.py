"""A network for production: onnxruntime and torch.export say what the checkpoint says, and tade alone adapts it."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
from conftest import ROOT

import model.model
from commands.jobs import run_export, run_test
from deploy.export import FORMATS, Exporter, onnx_runner
from deploy.model_card import figures_of, model_card
from evaluation.loaded_run import load_run
from evaluation.prediction import predict, with_images
from tade import PriorAggregator
from trainer.registry import read_config
from utils.checkpoint import load_checkpoint, save_checkpoint, sha256
from utils.errors import UserError

NAMES = [f"class {c}" for c in range(10)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A small network that was never trained, its batch norms not at their first values; calibrated."""
    folder = tmp_path_factory.mktemp("run")
    narrow = {"layer3_output_dim": 128, "layer4_output_dim": 128}
    config = {
        "name": "Small",
        "arch": {"type": "ResNet10Model", "args": {"num_classes": 10, "num_experts": 2, **narrow}},
        "loss": {"type": "DiverseExpertLoss", "args": {}},
        "data_loader": {"type": "ImbalanceDigitsDataLoader", "args": {"batch_size": 32}},
        "trainer": {"epochs": 3},
    }
    torch.manual_seed(0)
    state = read_config({"arch": config["arch"]}).build("arch").state_dict()
    for name, tensor in state.items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
    counts = [120, 86, 61, 44, 31, 22, 16, 11, 8, 6]
    content = {"model": state, "config": config, "epoch": 3, "cls_num_list": counts, "class_names": NAMES}
    save_checkpoint(folder / "net.pth", content)
    record = {"a": 0.8, "b1": -0.1, "b2": 0.0, "standard_errors": None, "source": "5 images", "averaged_views": 0}
    record["checkpoint_sha256"] = sha256(folder / "net.pth")
    (folder / "net.calibration.json").write_text(json.dumps(record))
    return folder / "net.pth"


@pytest.fixture(scope="module")
def exported(checkpoint) -> Path:
    """Everything that export.py writes."""
    content = run_export(checkpoint)
    assert all(difference < 1e-4 for name, difference in content["differences"].items() if name != "safetensors")
    assert set(content["differences"]) == set(FORMATS)
    return checkpoint.parent / "results" / "net" / "export"


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (40, 3, 16, 16), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("count", [1, 7])
def test_onnx_and_torch_say_what_the_checkpoint_says(checkpoint, exported, images, count):
    run = load_run(checkpoint, "cpu", data=False)
    expected = with_images(run, images[:count]).test_logits
    session = onnxruntime.InferenceSession(exported / "network.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": (images[:count] / 255).numpy()})
    assert found.dtype == np.float32 and np.abs(found - expected.numpy()).max() < 1e-4
    shapes = [value.shape for value in (*session.get_inputs(), *session.get_outputs())]
    assert shapes == [["batch", 3, 16, 16], ["batch", 2, 10]]
    program = torch.export.load(exported / "network.pt2").module()
    torch.testing.assert_close(program(images[:count] / 255), expected, atol=1e-4, rtol=0)


ALONE = """
import importlib.util, json, sys
sys.path[0] = sys.argv[1]
assert not importlib.util.find_spec("trainer") and not importlib.util.find_spec("data_loader")
import numpy, torch, tade
priors = json.load(open(sys.argv[2] + "/priors.json"))
logits, view1, view2 = (torch.from_numpy(part) for part in numpy.load(sys.argv[3]))
aggregator = tade.PriorAggregator(
    torch.tensor(priors["expert_log_priors"]), torch.tensor(priors["log_prior"]), priors["calibration"]
)
aggregator.fit(logits, [(view1, view2)])
numpy.save(sys.argv[4], aggregator.predict(logits).numpy())
ours = {m.partition(".")[0] for m in sys.modules} & {"trainer", "model", "data_loader", "base", "utils", "torchvision"}
print(sorted(ours))
"""


def test_tade_alone_adapts_what_onnx_gives(checkpoint, exported, images, tmp_path):
    """In a process that finds tade and nothing else of this project."""
    run = load_run(checkpoint, "cpu", data=False)
    assert run.calibration.numbers == [0.8, -0.1, 0.0]
    expected = predict(run, images, lambda *p: PriorAggregator(*p, calibration=run.calibration))
    network, loader = onnx_runner((exported / "network.onnx").read_bytes()), run.loader
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (loader.mean, loader.std))
    pairs = [
        tuple(x * std + mean for x in pair) for pair in with_images(run, images).images.views(np.arange(len(images)), 0)
    ]
    parts = [images / 255, *(torch.cat([pair[k] for pair in pairs]) for k in (0, 1))]
    np.save(tmp_path / "logits.npy", np.stack([network(part).numpy() for part in parts]))
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "tade").symlink_to(ROOT / "tade")
    arguments = [tmp_path / "lib", exported, tmp_path / "logits.npy", tmp_path / "predicted.npy"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stderr + done.stdout
    found = torch.from_numpy(np.load(tmp_path / "predicted.npy"))
    assert torch.equal(found.argmax(dim=1), expected.log_probabilities.argmax(dim=1))
    torch.testing.assert_close(found.exp(), expected.log_probabilities.exp(), atol=1e-4, rtol=0)


def test_priors_come_back_from_json_as_they_were(checkpoint, exported):
    run, priors = load_run(checkpoint, "cpu", data=False), json.loads((exported / "priors.json").read_text())
    assert torch.equal(torch.tensor(priors["expert_log_priors"]), run.expert_log_priors)
    assert torch.equal(torch.tensor(priors["log_prior"]), run.log_prior)
    assert priors["class_names"] == NAMES and priors["class_counts"] == run.cls_num_list
    assert priors["calibration"] == [0.8, -0.1, 0.0] and priors["calibration_source"]["source"] == "5 images"
    assert priors["checkpoint"]["sha256"] == sha256(checkpoint) and priors["image_size"] == 16
    assert priors["normalization_inside"] == {"mean": [0.3] * 3, "std": [0.37] * 3} and priors["averaged_views"] == 0


def test_safetensors_are_the_checkpoint_s_own_weights(checkpoint, exported):
    state = safetensors.torch.load_file(exported / "model.safetensors")
    expected = load_checkpoint(checkpoint)["model"]
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    with safetensors.safe_open(exported / "model.safetensors", "pt") as file:
        arch = json.loads(file.metadata()["arch"])
    getattr(model.model, arch["type"])(**arch["args"]).load_state_dict(state)


def test_the_card_says_what_it_is_and_its_code_runs(exported, monkeypatch, capsys):
    card = (exported / "README.md").read_text()
    for said in (
        "2 experts for 10 classes (class 0, class 1,",
        "405 images of which the largest class has 120 and the smallest 6",
        "`DiverseExpertLoss`",
        "epochs: 3 of 3",
        "RGB in 0..1; the network normalizes them itself",
        "`calibration` [0.8, -0.1, 0.0]",
        "None were beside the checkpoint",
        "## License Not stated here",
    ):
        assert said in " ".join(card.split()), said
    for name in ("network.onnx", "network.pt2", "model.safetensors", "priors.json"):
        assert f"`{name}`" in card and (exported / name).stat().st_size > 1000
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    monkeypatch.chdir(exported)
    exec(compile(code, "README.md", "exec"), {})
    assert len(re.findall("class [0-9]", capsys.readouterr().out)) == 8


def test_figures_stand_in_the_card_if_they_are_of_this_checkpoint(trained_digits, tmp_path):
    last = Path(shutil.copy(trained_digits, tmp_path / "last.pth"))
    assert figures_of(tmp_path / "net.pth", "") == ""
    run_test(last, device="cpu")
    assert "uniform" in figures_of(last, sha256(last)) and "uniform" not in figures_of(last, "other")
    (last.parent / "results" / last.stem / "test" / "results.json").write_text("[1]")
    assert figures_of(last, sha256(last)) == ""


def test_the_card_of_other_files_and_many_classes(exported):
    priors = json.loads((exported / "priors.json").read_text()) | {"calibration": None}
    priors["checkpoint"]["selected_by"] = "a\x1b[2J"
    card = model_card(priors, {}, {"model.safetensors": "weights"}, "the table")
    assert "## Use" not in card and "the table" in card and "\x1b" not in card and "(not calibrated)" in card
    assert 'torch.export.load("network.pt2")' in model_card(priors, {}, {"network.pt2": "it"}, "")
    for classes, named, listed in ((10, "c9)", True), (11, "c9, ...)", True), (201, "c9, ...)", False)):
        many = {"class_names": [f"c{n}" for n in range(classes)], "class_counts": list(range(classes, 0, -1))}
        card = model_card(priors | many, {}, {"model.safetensors": "weights"}, "")
        assert f"for {classes} classes (c0, c1," in card and named in card
        assert (str(many["class_counts"]) in card) == listed


@pytest.mark.parametrize(("name", "module"), [("onnx", "onnxscript"), ("safetensors", "safetensors")])
def test_missing_packages_are_one_sentence(monkeypatch, checkpoint, tmp_path, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"The format {name} needs the package {module}, .*or leave it out"):
        run_export(checkpoint, output=tmp_path / "out", formats=[name])
    assert not (tmp_path / "out").exists()


def test_a_network_that_came_out_wrong_is_refused(checkpoint, exported, monkeypatch):
    exporter = Exporter(load_run(checkpoint, "cpu", data=False))
    content = (exported / "network.onnx").read_bytes()
    assert exporter.check("onnx", content) < 1e-4 and exporter.check("safetensors", b"") is None
    exporter.network.mean += 0.5
    with pytest.raises(UserError, match=r"the exported network \(onnx\) differ by .*: nothing was written"):
        exporter.check("onnx", content)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert exporter.check("onnx", content) is None


def test_a_loader_that_does_not_say_how_it_normalizes(checkpoint):
    run = load_run(checkpoint, "cpu", data=False)
    for known in ({}, {"mean": (0.5,) * 3}, {"std": (0.5,) * 3}):
        run.loader = type("Own", (), {"image_size": 16, **known})()
        with pytest.raises(UserError, match="Own does not say how it normalizes images"):
            Exporter(run)


def test_the_example_compares_both_halves(checkpoint, exported, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("deploy_onnx", ROOT / "examples" / "deploy_onnx.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(["-r", str(checkpoint), "--exported", str(exported), "--images", "50"])
    printed = capsys.readouterr().out
    assert "50 of 50 predictions agree with the checkpoint's" in printed and "Accuracy: " in printed
    for arguments in (["-r", "none.pth", "--exported", exported], ["-r", checkpoint, "--exported", tmp_path]):
        with pytest.raises(SystemExit) as stopped:
            example.main(list(map(str, arguments)))
        assert str(stopped.value).startswith("There is no ")
