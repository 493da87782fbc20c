"""A checkpoint's calibration: where it comes from, that it is used where it fits, and what the results say of it."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import script
from PIL import Image

import commands.calibrate
import evaluation
from commands.command_line import parse
from commands.jobs import run_calibrate, run_predict_folder
from data_loader.class_profiles import held_out_counts
from evaluation.calibration import CalibrationRecord, calibration_path
from evaluation.results import Results
from tade import Calibration, PriorAggregator, StabilityAggregator, fit_calibration, prior_free_logits
from trainer.build import build_network
from trainer.registry import read_config
from utils.checkpoint import load_checkpoint, save_checkpoint, sha256
from utils.errors import UserError

PRIOR = {"aggregator": {"type": "PriorAggregator", "args": {}}}
NAMES = ["forward10", "uniform"]


@pytest.fixture
def last(trained_digits, tmp_path) -> Path:
    """A copy of the run's checkpoint, so that files beside it are a test's own."""
    path = tmp_path / "last.pth"
    path.write_bytes(Path(trained_digits).read_bytes())
    return path


@pytest.fixture
def with_slice(last) -> Path:
    """The same as if a part of the training images had been held out."""
    content = load_checkpoint(last)
    content["config"]["data_loader"]["args"]["val_fraction"] = 0.2
    counts = content["cls_num_list"]
    content["cls_num_list"] = [n - h for n, h in zip(counts, held_out_counts(counts, 0.2), strict=True)]
    save_checkpoint(last, {key: value for key, value in content.items() if key != "format"})
    return last


def config_with(**arguments) -> dict:
    return {"aggregator": {"type": "PriorAggregator", "args": arguments}}


def test_a_record_goes_into_json_and_back():
    numbers = Calibration(0.7, -0.2, 0.1, (0.01, 0.02, 0.03))
    record = CalibrationRecord(numbers, "somewhere", 12, ("cat",), 4, "ab")
    assert record.to_json()["b1"] == -0.2 and "calibration" not in record.to_json()
    assert CalibrationRecord.from_json(json.loads(json.dumps(record.to_json()))) == record
    assert record.sentence() == (
        "Calibrated by a 0.700 (standard error 0.010), b1 -0.200 (standard error 0.020), "
        "b2 0.100 (standard error 0.030), from somewhere."
    )
    given = CalibrationRecord(Calibration(0.7, -0.2, 0.1), "given")
    assert CalibrationRecord.from_json(json.loads(json.dumps(given.to_json()))) == given
    with pytest.raises(ValueError, match="positive scale"):
        CalibrationRecord.from_json({**record.to_json(), "a": -1})


def test_without_labeled_images_there_is_none(last):
    run = evaluation.load_run(last, overrides=PRIOR)
    results = evaluation.adapt(run, names=NAMES)
    assert run.calibration is None and results.protocol.endswith(" Not calibrated.") and results.calibration is None
    assert not {"calibration", "remark"} & results.to_json().keys()
    with pytest.raises(UserError, match="no validation images that are neither"):
        run_calibrate(config={}, checkpoint=last)


@pytest.mark.parametrize("views", [0, 1])
def test_held_out_images_calibrate(with_slice, views):
    run = evaluation.load_run(with_slice, overrides={**PRIOR, "averaged_views": views})
    results = evaluation.adapt(run, names=NAMES)
    held_out = evaluation.load_run(with_slice, overrides={"averaged_views": views})
    held_out.other_images = held_out.loader.validation
    u = prior_free_logits(held_out.test_logits, held_out.expert_log_priors)
    expected = fit_calibration(u, held_out.targets, held_out.log_prior)
    record = run.calibration_record
    assert run.calibration == expected and record.images == len(held_out.targets) and record.averaged_views == views
    assert record.checkpoint_sha256 == sha256(with_slice) and record.classes_without_image == ()
    assert CalibrationRecord.from_json(results.to_json()["calibration"]) == record
    assert results.protocol.endswith(record.sentence()) and "held-out validation images" in record.source
    assert results.distributions["uniform"].learning["calibration"] == expected.numbers
    assert CalibrationRecord.from_json(Results.from_json(results.to_json()).calibration) == record


def test_the_file_beside_the_checkpoint_comes_first_where_it_fits(with_slice, capsys):
    made = run_calibrate(config={"averaged_views": 1}, checkpoint=with_slice)
    path = calibration_path(with_slice)
    assert path.name == "last.calibration.json" and json.loads(path.read_text()) == json.loads(json.dumps(made))
    printed = capsys.readouterr().out
    assert "standard error" in printed and f"Written: {path}" in printed
    path.write_text(json.dumps({**made, "a": 0.5, "source": "the file"}))
    fits = evaluation.load_run(with_slice, overrides={"averaged_views": 1})
    assert fits.calibration.a == 0.5 and fits.calibration_record.source == "the file"
    capsys.readouterr()
    other_views = evaluation.load_run(with_slice)
    assert other_views.calibration.a != 0.5 and "held-out" in other_views.calibration_record.source
    printed = capsys.readouterr().out
    assert "is for averaged_views 1 and not for 0 and is not used: make it anew with python -m com" in printed
    for content, reason in (
        (json.dumps({**made, "checkpoint_sha256": "00"}), "is of another network than the checkpoint is now"),
        (json.dumps({**made, "averaged_views": 0}), "is for averaged_views 0 and not for 1"),
        ("[]", "cannot be read as a calibration"),
        ('{"a": 1}', "cannot be read as a calibration"),
        ("{", "cannot be read as a calibration"),
    ):
        path.write_text(content)
        assert "held-out" in evaluation.load_run(with_slice, overrides={"averaged_views": 1}).calibration_record.source
        assert reason in capsys.readouterr().out


def test_the_config_decides(with_slice):
    off = evaluation.adapt(evaluation.load_run(with_slice, overrides=config_with(calibration=None)), names=NAMES)
    assert off.protocol.endswith(" Not calibrated.") and off.calibration is None
    run = evaluation.load_run(with_slice, overrides=config_with(calibration=[0.6, 0.1, 0.0]))
    given = evaluation.adapt(run, names=NAMES)
    assert given.distributions["uniform"].learning["calibration"] == [0.6, 0.1, 0.0]
    assert given.calibration["source"] == "numbers that were given" and given.calibration["images"] is None
    assert "Calibrated by a 0.600, b1 0.100, b2 0.000, from numbers that were given." in given.protocol


def test_nothing_is_paid_where_no_calibration_is_taken(with_slice, monkeypatch):
    run = evaluation.load_run(with_slice, overrides=config_with(calibration=None))
    monkeypatch.setattr(type(run.loader), "read_labeled", None)  # it is not asked
    evaluation.evaluate(run, names=NAMES)
    evaluation.adapt(run, names=NAMES)
    stability = evaluation.adapt(run, lambda *priors: StabilityAggregator(*priors, epochs=1), names=["forward10"])
    assert "alibrated" not in stability.protocol and "calibration_record" not in vars(run)


def test_from_python(with_slice):
    run = evaluation.load_run(with_slice, overrides=PRIOR)
    by_hand = evaluation.adapt(run, lambda *priors: PriorAggregator(*priors, calibration=run.calibration), names=NAMES)
    assert by_hand.calibration == run.calibration_record.to_json() and by_hand == evaluation.adapt(run, names=NAMES)
    predicted = evaluation.predict(run, run.loader.test.images[:30], run.make_aggregator)
    assert predicted.calibration == by_hand.calibration
    assert evaluation.predict(run, run.loader.test.images[:30]).calibration is None


def test_a_fit_that_fails_is_gone_without(with_slice, monkeypatch, capsys):
    def fails(*arguments):
        raise ValueError("nothing to learn")

    monkeypatch.setattr("evaluation.loaded_run.fit_calibration", fails)
    assert evaluation.load_run(with_slice).calibration is None
    assert "nothing to learn. Going on without a calibration." in capsys.readouterr().out
    with pytest.raises(UserError, match="cannot be calibrated on .* nothing to learn"):
        run_calibrate(config={}, checkpoint=with_slice)
    assert not calibration_path(with_slice).exists()


def test_labeled_test_images_are_left_out_of_every_figure(last, tmp_path):
    plain = evaluation.load_run(last)
    content = script("test_train_cifar").main(config=PRIOR, checkpoint=last, output=tmp_path, calibrate_on_test=2)
    drawn = plain.labeled_draw(2)
    assert torch.bincount(plain.targets[drawn]).tolist() == [2] * 10
    assert not np.array_equal(drawn, evaluation.load_run(last, overrides={"seed": 5}).labeled_draw(2))
    u = prior_free_logits(plain.test_logits[drawn], plain.expert_log_priors)
    expected = fit_calibration(u, plain.targets[drawn], plain.log_prior)
    equal, distributions = evaluation.evaluate(plain.calibrated_on_test(2)), plain.loader.test_distributions()
    for name, entry in content["distributions"].items():
        own = np.setdiff1d(distributions[name], drawn)
        assert entry["images"] == len(own) == equal.distributions[name].images
        right = float((plain.test_logits[own].mean(1).argmax(1) == plain.targets[own]).float().mean())
        assert entry["equal_weights_top1"] == equal.distributions[name].top1 == pytest.approx(100 * right)
        assert entry["learning"]["calibration"] == expected.numbers
    assert content["calibration"]["images"] == 20
    assert "2 labeled test images a class (seed 1), left out of every distribution" in content["calibration"]["source"]
    assert "not comparable with published figures" in content["protocol"] and "not comparable" in equal.protocol
    assert content["remark"] == "20 labeled test images calibrate and are left out of every figure"
    assert "**20 labeled test images calibrate" in (tmp_path / "results.md").read_text()
    assert evaluation.evaluation.evaluate_test_set(plain.calibrated_on_test(2)).distributions["uniform"].images == 480


def test_what_calibrate_on_test_refuses(last, tmp_path):
    job, out = script("test_train_cifar").main, tmp_path / "out"
    for config, number, message in (
        (
            PRIOR,
            50,
            'calibrate_on_test 50 leaves 10 classes without a test image, such as "0", which has 50: use fewer',
        ),
        (PRIOR, -1, "must be at least 1 image a class"),
        (config_with(calibration=None), 1, "takes a calibration and has none in the config"),
        ({}, 1, "and not for this StabilityAggregator"),
    ):
        with pytest.raises(UserError, match=message):
            job(config=config, checkpoint=last, output=out, calibrate_on_test=number)
    assert not out.exists()


def test_command_line():
    assert commands.calibrate.main is run_calibrate
    options = parse(run_calibrate, "", ["-r", "a.pth", "--images", "list.txt", "--averaged_views", "4"])
    assert options["labeled"] == Path("list.txt") and options["config"] == {"averaged_views": 4}
    with pytest.raises(SystemExit):
        parse(run_calibrate, "", ["-r", "a.pth", "-o", "out"])  # it goes beside the checkpoint


@pytest.fixture(scope="module")
def listed(tmp_path_factory) -> Path:
    """A folder with images of three classes, their lists, and the checkpoint of an untrained network."""
    root = tmp_path_factory.mktemp("listed")
    random = np.random.RandomState(0)
    lines: dict[str, list[str]] = {"train": [], "test": [], "labeled": []}
    for split, counts in (("train", [6, 4, 2]), ("test", [2, 2, 2]), ("labeled", [3, 2, 0])):
        for label, count in enumerate(counts):
            for number in range(count):
                name = f"{split}_{label}_{number}.png"
                Image.fromarray(random.randint(0, 255, (24, 24, 3)).astype(np.uint8)).save(root / name)
                lines[split].append(f"{name} {label}\n")
        (root / f"{split}.txt").write_text("".join(lines[split]))
    (root / "classes.txt").write_text("ant\nbee\ncat\n")
    lists = {"train_list": str(root / "train.txt"), "test_list": str(root / "test.txt")}
    arguments = {"data_dir": str(root), **lists, "class_names": str(root / "classes.txt"), "batch_size": 4}
    config = {
        "name": "listed",
        "arch": {"type": "ResNet32Model", "args": {"num_classes": 3, "num_experts": 2}},
        "loss": {"type": "DiverseExpertLoss", "args": {}},
        "data_loader": {
            "type": "ListDataLoader",
            "args": {**arguments, "image_size": 16, "num_workers": 0, "distributions": ["uniform"]},
        },
    }
    torch.manual_seed(0)
    network = build_network(read_config(config), 3, torch.device("cpu"))
    save_checkpoint(
        root / "net.pth", {"model": network.state_dict(), "config": config, "epoch": 1, "cls_num_list": [6, 4, 2]}
    )
    return root


def test_a_list_of_labeled_images_calibrates(listed, capsys):
    record = run_calibrate(config={"averaged_views": 0}, checkpoint=listed / "net.pth", labeled=listed / "labeled.txt")
    printed = capsys.readouterr().out
    assert "1 classes have no labeled image: cat." in printed and record["classes_without_image"] == ("cat",)
    assert record["images"] == 5 and "labeled.txt" in record["source"]
    assert all(math.isfinite(error) for error in record["standard_errors"])
    run = evaluation.load_run(listed / "net.pth", overrides=PRIOR)
    written = run_predict_folder(config=PRIOR, checkpoint=listed / "net.pth", images=listed, output=listed / "out")
    assert written["calibration"] == json.loads(json.dumps(record)) | {
        "standard_errors": record["standard_errors"],
        "classes_without_image": ("cat",),
    }
    assert run.calibration.numbers == [record[key] for key in ("a", "b1", "b2")]
    assert record["averaged_views"] == 0
    with pytest.raises(UserError, match="12 images of .*train.txt were trained on"):
        run_calibrate(config={}, checkpoint=listed / "net.pth", labeled=listed / "train.txt")


def test_absent_classes_do_not_compete(listed):
    run = evaluation.load_run(listed / "net.pth")
    record = run.calibrate(listed / "labeled.txt")
    labeled = dataclasses.replace(run, other_images=run.loader.read_labeled(listed / "labeled.txt"))
    labeled.test_logits[:, :, 2] += 50  # the class without an image, whatever its scores
    moved = fit_calibration(
        prior_free_logits(labeled.test_logits, run.expert_log_priors), labeled.targets, run.log_prior
    )
    assert moved.numbers[:2] == pytest.approx(record.calibration.numbers[:2], abs=0.5)


def test_logits_that_are_not_finite_end_with_one_sentence(last, tmp_path, monkeypatch):
    """Weights that are not finite are refused before; large ones can still overflow."""
    monkeypatch.setattr("utils.checkpoint.check_finite", lambda state, path: None)
    content = load_checkpoint(last)
    next(iter(content["model"].values())).view(-1)[3] = float("nan")
    save_checkpoint(last, {key: value for key, value in content.items() if key != "format"})
    message = r"logits are not finite for 500 of 500 images \(test images\)"
    for job, options in (
        ("test", {}),
        ("test_all_cifar", {}),
        ("test_train_cifar", {}),
        ("test_train_cifar", {"stream": True}),
    ):
        with pytest.raises(UserError, match=message):
            script(job).main(config=PRIOR, checkpoint=last, output=tmp_path / "out", **options)
    run = evaluation.load_run(last, overrides={"averaged_views": 1})
    for make in (None, StabilityAggregator, PriorAggregator):
        with pytest.raises(UserError, match="logits are not finite for 20 of 20 images"):
            evaluation.predict(run, run.loader.test.images[:20], make)
    with pytest.raises(UserError, match="random views of test images"):
        evaluation.adaptation.two_view_logits(run.inference_network, run.images, np.arange(9), 0, run.device)
