"""Predicting images that nobody has labelled: a checkpoint and a folder are enough, at once or as a stream."""

import inspect
import json
import os
import shutil
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from PIL import Image

import evaluation
from commands.command_line import parse
from commands.jobs import RECOMMENDED, run_export, run_predict_folder, run_test_all, run_test_train
from data_loader.image_lists import ImageList
from deploy.prediction_files import FORMATS, PredictionWriter, paths_in, table_file
from deploy.watch import Inbox, watch
from evaluation import predict_stream
from evaluation.loaded_run import load_run
from evaluation.prediction import PredictionStream, predict, with_images
from evaluation.results import CheckpointRecord, Predictions
from tade import EMAggregator, GivenPriorAggregator, PriorAggregator, StabilityAggregator
from trainer.registry import read_config
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import UserError

NAMES = [f"digit {c}" for c in "abcdefghij"]
SINGLE_VIEW = {**RECOMMENDED, "averaged_views": 0}


@pytest.fixture(scope="module")
def named(trained_digits, tmp_path_factory) -> Path:
    """A checkpoint with class names in it."""
    path = tmp_path_factory.mktemp("named") / "last.pth"
    save_checkpoint(path, {**load_checkpoint(trained_digits), "class_names": NAMES})
    return path


@pytest.fixture(scope="module")
def photos(trained_digits, tmp_path_factory) -> Path:
    """A folder of 60 digits as PNG, six of every class."""
    folder = tmp_path_factory.mktemp("photos")
    test_set = load_run(trained_digits, "cpu").loader.test
    for c in range(10):
        for k, index in enumerate((test_set.targets == c).nonzero().flatten()[:6].tolist()):
            Image.fromarray(test_set.images[index].permute(1, 2, 0).numpy()).save(folder / f"{k}_{c}.png")
    return folder


@pytest.fixture(scope="module")
def run(named):
    return load_run(named, "cpu", SINGLE_VIEW, data=False)


def run_predict(named, photos, out, **options) -> dict:
    return run_predict_folder(config=SINGLE_VIEW, checkpoint=named, device="cpu", output=out, images=photos, **options)


# --- no data ---


def list_checkpoint(folder: Path, kind: str = "ListDataLoader", **entries) -> Path:
    """A network for three classes whose lists are not there."""
    lists = {"train_list": "absent.txt", "test_list": "absent.txt"}
    config = {
        "name": "listed",
        "arch": {"type": "ResNet32Model", "args": {"num_classes": 3, "num_experts": 2}},
        "loss": {"type": "DiverseExpertLoss", "args": {}},
        "data_loader": {
            "type": kind,
            "args": {"data_dir": "absent", **lists, "batch_size": 4, "image_size": 16, "num_workers": 0},
        },
    }
    torch.manual_seed(0)
    network = read_config(config).build("arch")
    content = {"model": network.state_dict(), "config": config, "epoch": 1, "cls_num_list": [6, 4, 2], **entries}
    save_checkpoint(folder / "net.pth", content)
    return folder / "net.pth"


@pytest.mark.parametrize("kind", ["ListDataLoader", "ImageNetLTDataLoader", "Places_LT"])
def test_lists_are_not_needed(photos, tmp_path, kind, capsys):
    path = list_checkpoint(tmp_path, kind, class_names=["ant", "bee", "cat"], class_map=[2, 0, 1])
    with pytest.raises(UserError, match="The image list absent.txt cannot be read"):
        load_run(path)
    written = run_predict_folder(config={}, checkpoint=path, device="cpu", output=tmp_path / "out", images=photos)
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert written["images"] == len(table) == 60 and set(table["class"]) <= {"ant", "bee", "cat"}
    assert list(table)[-2:] == ["class_3", "probability_3"]  # three classes, so no five
    printed = capsys.readouterr().out
    assert "the data of training are not here, nor a calibration beside" in printed and "left out" not in printed
    mix = pd.read_csv(tmp_path / "out" / "class_mix.csv")
    assert mix["class"].tolist() == ["ant", "bee", "cat"] and mix["training_images"].tolist() == [6, 4, 2]


def test_the_same_predictions_with_the_data_and_without(trained_digits, photos):
    with_data, without = (load_run(trained_digits, "cpu", SINGLE_VIEW, data=data) for data in (True, False))
    assert with_data.loader.has_data and not without.loader.has_data
    tables = [predict(r, photos, r.make_aggregator).table() for r in (with_data, without)]
    assert tables[0].equals(tables[1]) and torch.equal(with_data.expert_log_priors, without.expert_log_priors)


def test_equal_weights_beside_the_prediction(run, photos):
    chosen = with_images(run, paths(photos, 0, 30))
    label, probability = predict(run, paths(photos, 0, 30), EMAggregator).equal_weights
    expected = chosen.test_logits.mean(dim=1).softmax(dim=1)
    assert torch.equal(label, expected.argmax(dim=1)) and probability.shape == (30,)
    torch.testing.assert_close(probability, expected.max(dim=1).values)


def test_what_needs_the_data_says_so(trained_digits, tmp_path):
    run = load_run(trained_digits, "cpu", data=False)
    listed = load_run(list_checkpoint(tmp_path), "cpu", data=False)
    for needing in (
        lambda: evaluation.evaluate(run),
        lambda: evaluation.evaluate(listed),
        lambda: run.test_logits,
        lambda: listed.test_logits,
        lambda: run.loader.train_set,
        lambda: listed.calibrate(),
        lambda: listed.calibrate("labeled.txt"),
    ):
        with pytest.raises(UserError, match="opened without its data"):
            needing()


def test_class_names_come_from_the_checkpoint_or_a_file(tmp_path):
    bare = load_run(list_checkpoint(tmp_path, class_map=[2, 0, 1]), "cpu", data=False)
    assert bare.loader.class_names == ["2", "0", "1"]
    path = list_checkpoint(tmp_path, class_names=["ant", "bee", "cat"])
    assert load_run(path, "cpu", data=False).loader.class_names == ["ant", "bee", "cat"]
    (tmp_path / "names.txt").write_text("x\ny\nz\n")
    other = {"data_loader;args;class_names": str(tmp_path / "names.txt")}
    assert load_run(path, "cpu", other, data=False).loader.class_names == ["x", "y", "z"]
    with pytest.raises(UserError, match="class names absent cannot be read"):
        load_run(path, "cpu", {"data_loader;args;class_names": "absent"}, data=False)


@pytest.mark.parametrize("entries", [{"class_map": [0, 1, 1]}, {"class_map": [0, 1, 3]}, {"class_names": ["ant"]}])
def test_entries_that_do_not_fit_each_other_are_refused(tmp_path, entries):
    with pytest.raises(UserError, match="do not fit its 3 classes"):
        load_run(list_checkpoint(tmp_path, **entries), "cpu", data=False)


def test_a_checkpoint_without_class_counts_wants_its_data(tmp_path):
    with pytest.raises(UserError, match="The image list absent.txt cannot be read"):
        load_run(list_checkpoint(tmp_path, cls_num_list=None), "cpu", data=False)


# --- tables ---


def predictions(**fields) -> Predictions:
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    given = {
        "names": ["a.png", "b.png"],
        "log_probabilities": probabilities.log(),
        "class_names": ["ant", "bee", "cat"],
        "learning": {},
        "checkpoint": CheckpointRecord("last.pth", "", 1, ""),
        "equal_weights": (torch.tensor([1, 2]), torch.tensor([0.6, 0.9])),
        "cls_num_list": [9, 3, 1],
    }
    return Predictions(**{**given, **fields})


def test_a_row_has_the_likeliest_classes_and_those_of_equal_weights():
    row = predictions().table(top_k=2).iloc[0].to_dict()
    assert [row[k] for k in ("path", "class", "equal_weights_class", "class_2")] == ["a.png", "ant", "bee", "bee"]
    numbers = [row[k] for k in ("probability", "margin", "equal_weights_probability", "probability_2")]
    assert numbers == pytest.approx([0.5, 0.2, 0.6, 0.3])
    assert "class_3" not in row and "class_3" in predictions().table() and "class_2" not in predictions().table(1)


def test_the_class_mix():
    mix = predictions().class_mix()
    assert mix["training_images"].tolist() == [9, 3, 1] and mix["predicted_count"].tolist() == [1, 0, 1]
    assert mix["equal_weights_count"].tolist() == [0, 1, 1]
    assert mix["expected_count"].tolist() == pytest.approx([0.6, 0.5, 0.9])
    assert mix["estimated_share"].tolist() == pytest.approx([0.3, 0.25, 0.45])  # no prior: the mean probability
    assert predictions(learning={"prior": [0.1, 0.2, 0.7]}).class_mix()["estimated_share"].tolist() == [0.1, 0.2, 0.7]


TEST_TIME = ROOT / "configs" / "test_time_digits_tade.json"
READERS = {"csv": pd.read_csv, "parquet": pd.read_parquet, "jsonl": lambda path: pd.read_json(path, lines=True)}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_says_the_same(tmp_path, kind):
    odd, table = predictions(names=["caf\udce9.png", 'a,"b".png']), predictions().table()
    (tmp_path / f"1.{kind}").write_bytes(table_file(odd.table(), kind))
    for name in (f".1.{kind}", "notes.txt", ".hidden"):  # no tables
        (tmp_path / name).write_text("a,b\n")
    assert paths_in(tmp_path) == {"caf\\udce9.png", 'a,"b".png'}
    (tmp_path / f"2.{kind}").write_bytes(table_file(table, kind))
    read = READERS[kind](tmp_path / f"2.{kind}")
    assert list(read) == list(table) and read["class"].tolist() == ["ant", "cat"]
    assert np.allclose(read["probability"], table["probability"], atol=5e-5)
    (tmp_path / f"2.{kind}").write_text("a,b\n")
    with pytest.raises(UserError, match=f"2.{kind} is no table of predictions"):
        paths_in(tmp_path)


def test_parquet_without_pyarrow_is_one_sentence(named, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="Parquet needs the package pyarrow.*or use --format csv or jsonl"):
        run_predict(named, photos, tmp_path / "out", file_format="parquet")
    assert not (tmp_path / "out").exists()


def test_what_the_script_writes(named, photos, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for path in photos.iterdir():
        shutil.copy(path, tmp_path / "in")
    (tmp_path / "in" / "bad.png").write_bytes(b"no image")
    record = run_predict(named, tmp_path / "in", tmp_path / "out", file_format="jsonl", top_k=3)
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == record["images"] == 60 and "class_3" in lines[0] and "class_4" not in lines[0]
    assert record["changed"] == sum(line["class"] != line["equal_weights_class"] for line in lines)
    assert record["mean_confidence"] == pytest.approx(np.mean([line["probability"] for line in lines]), abs=1e-4)
    right = np.mean([line["class"] == NAMES[int(line["path"][2])] for line in lines])
    assert right > 0.3
    mix = [json.loads(line) for line in (tmp_path / "out" / "class_mix.jsonl").read_text().splitlines()]
    assert [row["class"] for row in mix] == NAMES and sum(row["predicted_count"] for row in mix) == 60
    assert [row["estimated_share"] for row in mix] == pytest.approx(record["learning"]["prior"])
    assert sum(row["expected_count"] for row in mix) == pytest.approx(60, abs=1e-3)
    printed = capsys.readouterr().out
    expected = sorted((row["expected_count"] for row in mix), reverse=True)
    table = printed.partition("Most frequent classes:\n")[2].splitlines()
    assert [float(line.split()[-2]) for line in table[1:6]] == pytest.approx(expected[:5], abs=0.051)
    assert f"60 images, mean confidence {record['mean_confidence']:.2f}; {record['changed']} of them" in printed
    assert "1 of 61 images are left out: bad.png is no image" in printed and "class_mix.jsonl" in printed
    assert "bad.png,is no image" in (tmp_path / "out" / "bad_images.csv").read_text()
    run_predict(named, photos, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"predictions.csv", "class_mix.csv", "weights.json"}
    assert not (tmp_path / "out" / "predictions.jsonl").exists()  # of another folder, and misleading now


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "--top_k must be at least 1"),
        ({"poll": 0}, "--poll must be more than 0"),
        ({"file_format": "xls"}, 'Unknown format "xls": valid are csv, parquet, jsonl'),
        ({"state": Path("absent/state")}, "There is no folder absent for --state"),
        ({"watch": True, "stream_batch": 0}, "batches have at least one image"),
    ],
)
def test_what_is_refused_leaves_no_folder(named, photos, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run_predict(named, photos, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_command_line():
    arguments = "-r a.pth --images inbox --watch --poll 5 --state s --format parquet --top_k 2 --prior uniform".split()
    given = {"watch": True, "poll": 5.0, "state": Path("s"), "file_format": "parquet", "top_k": 2, "prior": "uniform"}
    assert parse(run_predict_folder, "", arguments).items() >= given.items()
    plain = parse(run_predict_folder, "", ["-r", "a.pth", "--images", "in"])
    defaults = {n: p.default for n, p in inspect.signature(run_predict_folder).parameters.items()}
    assert plain == {**defaults, "checkpoint": Path("a.pth"), "images": Path("in")}
    arguments = ["-c", str(TEST_TIME), "-r", "a.pth", "--calibrate_on_test", "2"]
    assert parse(run_test_train, "", arguments)["calibrate_on_test"] == 2
    for job in (run_predict_folder, run_test_all):  # there are no labels, or nothing to calibrate
        with pytest.raises(SystemExit):
            parse(job, "", ["-r", "a.pth", "--images", "in", "--calibrate_on_test", "2"])
    assert parse(run_export, "", ["-r", "a.pth", "--formats", "onnx"])["formats"] == ["onnx"]


# --- streams ---


def paths(photos: Path, start: int, stop: int) -> list[Path]:
    return sorted(photos.glob("*.png"))[start:stop]


@pytest.mark.parametrize("make", [PriorAggregator, StabilityAggregator])
def test_a_stream_in_two_runs_is_one_stream(run, photos, tmp_path, make):
    batches = [paths(photos, k, k + 15) for k in range(0, 60, 15)]
    whole = list(predict_stream(run, batches, make))
    first = list(predict_stream(run, batches[:2], make, tmp_path / "state"))
    second = list(predict_stream(run, batches[2:], make, tmp_path / "state"))
    for one, other in zip(whole, first + second, strict=True):
        assert torch.equal(one.log_probabilities, other.log_probabilities) and one.names == other.names
        assert one.learning == other.learning and len(one.names) == 15
    stream = PredictionStream(run, make, tmp_path / "state")
    assert stream.images == 60 and stream.batches == 4
    assert torch.equal(stream.counts.predicted, sum(p.counts().predicted for p in whole))


def test_a_stream_takes_what_predict_takes(run, photos):
    (folder,) = predict_stream(run, [photos], PriorAggregator)
    (tensor,) = predict_stream(run, [run.loader.read(photos).images], PriorAggregator)
    assert torch.equal(folder.log_probabilities, tensor.log_probabilities) and tensor.names[3] == "3"
    with pytest.raises(UserError, match="There is no image to predict"):
        list(predict_stream(run, [[]], PriorAggregator))
    assert folder.checkpoint == run.checkpoint


def test_an_aggregator_that_falls_back_says_so(run, photos, capsys):
    alone = predict(run, paths(photos, 0, 1), PriorAggregator)  # one image says nothing of a class mix
    assert alone.learning["note"] in capsys.readouterr().out
    predict(run, paths(photos, 0, 20))
    assert "PriorAggregator" not in capsys.readouterr().out


def test_a_state_of_something_else_is_refused(run, named, photos, tmp_path):
    state = tmp_path / "state"
    next(predict_stream(run, [paths(photos, 0, 20)], PriorAggregator, state))
    other = tmp_path / "other.pth"
    save_checkpoint(other, {**load_checkpoint(named), "epoch": 5})
    for wrong, make, message in (
        (load_run(other, "cpu", SINGLE_VIEW, data=False), PriorAggregator, "of another checkpoint .*, and here it is"),
        (run, StabilityAggregator, "of another aggregator .*PriorAggregator.*, and here it is .*StabilityAgg"),
        (run, lambda *p: PriorAggregator(*p, calibration=[1.0, 0.1, 0.0]), "of another calibration"),
        (
            replace(run, config=read_config({**run.config.config, "averaged_views": 2})),
            PriorAggregator,
            "averaged view",
        ),
        (
            run,
            type("PriorAggregator", (PriorAggregator,), {"learned": ("skew",)}),
            "cannot be used .*remove it to start",
        ),
    ):
        with pytest.raises(UserError, match=message) as refused:
            PredictionStream(wrong, make, state)
        assert "\n" not in str(refused.value)
    data = state.read_bytes()
    for damaged in (b"", data[: len(data) // 2], b"no state", (named.read_bytes())):
        state.write_bytes(damaged)
        with pytest.raises(UserError, match="is no state of a stream, or a damaged one"):
            PredictionStream(run, PriorAggregator, state)
    state.write_bytes(data)
    assert PredictionStream(run, PriorAggregator, state).images == 20


def test_an_aggregator_that_keeps_no_state(run, photos, tmp_path):
    class Forgetful(PriorAggregator):
        learned = None

    (predicted,) = predict_stream(run, [paths(photos, 0, 20)], Forgetful)
    assert len(predicted.names) == 20
    with pytest.raises(UserError, match="Forgetful has no state_dict: leave --state out"):
        PredictionStream(run, Forgetful, tmp_path / "state")


def test_a_state_between_runs_of_the_script(run, named, photos, tmp_path):
    """Two folders one after the other: the second knows what the first taught."""
    for day, part in enumerate((paths(photos, 0, 30), paths(photos, 30, 60))):
        (tmp_path / f"day{day}").mkdir()
        for path in part:
            shutil.copy(path, tmp_path / f"day{day}")
    for day in (0, 1):
        record = run_predict(named, tmp_path / f"day{day}", tmp_path / f"out{day}", state=tmp_path / "state")
    alone = run_predict(named, tmp_path / "day1", tmp_path / "alone")
    assert record["images"] == alone["images"] == 30 and record["learning"]["prior"] != alone["learning"]["prior"]
    for name, stream in (
        ("whole", False),
        ("streamed", True),
    ):  # the first images of a stream are predicted knowing less
        run_predict(
            named, tmp_path / "day1", tmp_path / name, state=tmp_path / f"{name}.s", stream=stream, stream_batch=10
        )
    names = sorted(path.name for path in (tmp_path / "day1").iterdir())
    for name, batch in (("whole", None), ("streamed", 10)):
        expected = PredictionStream(run).predict(ImageList.of(tmp_path / "day1", names), batch).table()
        found = pd.read_csv(tmp_path / name / "predictions.csv").set_index("path")
        assert np.allclose(found.loc[expected["path"], "probability"], expected["probability"], atol=1e-4)
    whole, streamed = (pd.read_csv(tmp_path / name / "predictions.csv") for name in ("whole", "streamed"))
    assert not np.allclose(whole["probability"], streamed["probability"], atol=1e-3)
    before = (tmp_path / "state").read_bytes()
    with pytest.raises(UserError, match="of another aggregator"):
        run_predict(named, tmp_path / "day1", tmp_path / "no", state=tmp_path / "state", prior="uniform")
    assert not (tmp_path / "no").exists() and (tmp_path / "state").read_bytes() == before


def test_learned_weights_are_printed(named, photos, tmp_path, capsys):
    config = {**SINGLE_VIEW, "aggregator": {"type": "StabilityAggregator", "args": {"epochs": 1}}}
    record = run_predict_folder(config=config, checkpoint=named, device="cpu", output=tmp_path, images=photos)
    assert f", expert weights {', '.join(f'{w:.2f}' for w in record['weights'])}, mean" in capsys.readouterr().out


# --- watching ---


def test_an_inbox_gives_each_file_once_and_whole(photos, tmp_path):
    inbox = Inbox(tmp_path, {"done.png"})
    image = paths(photos, 0, 1)[0].read_bytes()
    (tmp_path / "done.png").write_bytes(image)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.png").write_bytes(image)
    (tmp_path / "slow.png").write_bytes(image[:40])
    (tmp_path / "empty.png").touch()
    assert inbox.poll() == []  # seen for the first time
    (tmp_path / "slow.png").write_bytes(image[:60])
    assert inbox.poll() == ["deep/a.png"] and inbox.take(["deep/a.png"]) == ["deep/a.png"]
    assert inbox.poll() == ["slow.png"] and inbox.take(["slow.png"]) == []  # stalled: half an image
    assert inbox.poll() == inbox.poll() == []
    (tmp_path / "slow.png").write_bytes(image)
    assert inbox.poll() == [] and inbox.poll() == ["slow.png"] and inbox.take(["slow.png"]) == ["slow.png"]
    assert inbox.poll() == []
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="no folder .* to watch"):
        inbox.poll()


def test_watching_a_folder_until_told_to_stop(named, photos, tmp_path, capsys):
    """Images come while it runs; a second run goes on where the first one was stopped."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()

    def watching(coming: list[Path], expected: int, number: int, **options) -> dict:
        def feed() -> None:
            for path in coming:
                shutil.copy(path, folder)
            for _ in range(1200):
                if len(paths_in(out / "predictions") if (out / "predictions").is_dir() else ()) >= expected:
                    break
                threading.Event().wait(0.05)
            os.kill(os.getpid(), number)

        thread = threading.Thread(target=feed)
        thread.start()
        try:
            return run_predict(named, folder, out, watch=True, poll=0.05, stream_batch=16, **options)
        finally:
            thread.join()

    record = watching(paths(photos, 0, 20), 20, signal.SIGTERM)
    assert record["images"] == 20 and record["batches"] >= 2 and set(record["last_batch"]) >= {"images", "changed"}
    record = watching(paths(photos, 20, 40), 40, signal.SIGINT, file_format="jsonl")
    assert record["images"] == 40 and record["folder"] == str(folder)
    tables = sorted((out / "predictions").iterdir())
    assert [path.stem for path in tables] == [f"{k:06}" for k in range(1, len(tables) + 1)]
    assert {path.suffix for path in tables} == {".csv", ".jsonl"} and record["batches"] == len(tables)
    rows = [pd.read_csv(path) for path in tables if path.suffix == ".csv"]
    rows += [pd.read_json(path, lines=True) for path in tables if path.suffix == ".jsonl"]
    assert sorted(pd.concat(rows)["path"]) == [path.name for path in paths(photos, 0, 40)]
    mix = pd.read_json(out / "class_mix.jsonl", lines=True)
    assert mix["predicted_count"].sum() == 40 and mix["expected_count"].sum() == pytest.approx(40, abs=1e-3)
    assert json.loads((out / "weights.json").read_text()) == json.loads(json.dumps(record))
    assert "20 images there have predictions already, and 20 were learned from" in capsys.readouterr().out
    run = load_run(named, "cpu", SINGLE_VIEW, data=False)
    assert PredictionStream(run, state=out / "stream.state").images == 40
    known = watching(paths(photos, 40, 44), 44, signal.SIGTERM, state=tmp_path / "known", prior="uniform")
    assert known["images"] == 4 and known["learning"]["prior"] == pytest.approx([0.1] * 10)
    assert known["aggregator"]["type"] == "GivenPriorAggregator"


def test_nothing_is_left_unwritten_when_a_batch_fails(run, photos, tmp_path):
    """A disk that is full ends it with one sentence, and the state stays that of the last batch that was written."""

    class Full(PredictionWriter):
        def save_batch(self, predictions, stream):
            if list(self.tables.iterdir()):
                raise UserError("The disk is full.")
            return super().save_batch(predictions, stream)

    with pytest.raises(UserError, match="The disk is full"):
        watch(Full(run, photos, tmp_path), PredictionStream(run, PriorAggregator, tmp_path / "state"), 20, 0.01)
    stream = PredictionStream(run, PriorAggregator, tmp_path / "state")
    assert stream.images == len(paths_in(tmp_path / "predictions")) == 20


def test_a_stop_ends_it_between_two_batches(run, photos, tmp_path):
    class Stopped(PredictionWriter):
        def save_batch(self, predictions, stream):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().save_batch(predictions, stream)

    watch(Stopped(run, photos, tmp_path), PredictionStream(run, PriorAggregator), 20, 0.01)
    assert len(paths_in(tmp_path / "predictions")) == 20


def test_watching_takes_one_process(named, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.distributed.world_size", lambda: 2)
    with pytest.raises(UserError, match="--watch works in one process"):
        run_predict(named, photos, tmp_path / "out", watch=True)


def test_a_given_prior_follows_a_stream(run, photos):
    prior = list(range(1, 11))
    one, other = (
        predict_stream(
            run, [paths(photos, 0, 20), paths(photos, 20, 40)], lambda *p: GivenPriorAggregator(*p, prior=prior)
        )
        for _ in range(2)
    )
    next(one)
    whole = predict(run, paths(photos, 0, 40), lambda *p: GivenPriorAggregator(*p, prior=prior))
    parts = torch.cat([p.log_probabilities for p in other])
    torch.testing.assert_close(parts, whole.log_probabilities, atol=1e-5, rtol=0)


def test_pictures_of_any_size_reach_a_network_for_small_images(run, tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    source = run.loader.read(tmp_path)
    images = source.images
    assert images.shape == (1, 3, 16, 16) and int(images[..., 1:-1].min()) == 200 and source.names == ["wide.png"]
    (tmp_path / "wide.png").write_bytes(b"")
    with pytest.raises(UserError, match="None of the 1 images of .* can be decoded"):
        run.loader.read(ImageList.of(tmp_path, ["wide.png"]))
