import json
from dataclasses import replace

import pandas as pd
import pytest
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evaluation.results import CheckpointRecord, DistributionResult, Results
from evaluation.results_folder import job_of, results_folder
from report.save import save_results
from report.tables import console_table, markdown_table
from utils.errors import UserError

ENTRY = {
    "images": 10,
    "top1": 62.55,
    "many": 70.0,
    "medium": 55.0,
    "few": None,
    "top1_interval": [50.0, 75.0],
    "balanced_accuracy": 61.0,
    "macro_f1": 60.0,
    "expected_calibration_error": 7.0,
    "experts_top1": [60.0, 50.0],
    "weights": [0.75, 0.25],
}
ADAPTED = {"equal_weights_top1": 60.0, "difference_to_equal_weights": {"points": 2.5, "interval": [-1.0, 6.0]}}


def results(**more) -> Results:
    entries = {"forward10": {**ENTRY, **more}, "uniform": {**ENTRY, "top1": 100.0, **more}}
    return Results(
        CheckpointRecord("last.pth", "ab" * 32, 3, "the last so far"),
        "In some way.",
        seed=1,
        torch="2",
        device="cpu",
        config={"name": "x"},
        distributions={name: DistributionResult.from_json(entry) for name, entry in entries.items()},
    )


RESULTS = results()


def test_json_keeps_its_keys_and_comes_back():
    content = json.loads(json.dumps(RESULTS.to_json()))
    assert list(content) == ["checkpoint", "protocol", "seed", "torch", "device", "config", "distributions"]
    assert list(content["distributions"]["forward10"]) == list(ENTRY) and content["distributions"]["forward10"] == ENTRY
    assert Results.from_json(content) == RESULTS
    learned = results(**ADAPTED, learning={"note": None})
    assert Results.from_json(learned.to_json()) == learned


def test_the_table_has_a_row_for_each_distribution_and_a_column_for_each_number():
    table = RESULTS.table()
    assert list(table.index) == ["forward10", "uniform"]
    assert list(table) == ["images", "top1", "many", "medium", "few", "expert 1", "expert 2", "w1", "w2"]
    assert pd.isna(table.loc["uniform", "few"]) and "nan" not in console_table(table).lower()
    assert markdown_table(table).splitlines()[2] == (
        "| forward10 | 10 | 62.5 | 70.0 | 55.0 | - | 60.0 | 50.0 | 0.75 | 0.25 |"
    )
    more = results(**ADAPTED, top5_accuracy=90.0, per_class_accuracy=[1.0, None])
    assert list(more.table()) == [
        "images",
        "top1",
        "equal weights",
        *list(table)[2:5],
        "top5_accuracy",
        *list(table)[5:],
    ]
    more.config = {"metrics": ["expected_calibration_error"]}  # asked for by name
    assert "expected_calibration_error" in more.table() and "balanced_accuracy" not in more.table()


def test_published_results_are_read():
    content = json.loads((ROOT / "benchmarks" / "results" / "cifar100_ir100_tade_200_epochs.json").read_text())
    old = Results.from_json(content)
    assert old.classes is None and old.to_json()["distributions"] == content["distributions"]
    assert len(old.table()) == 11


def test_every_file_is_written_and_none_of_an_earlier_evaluation_stays(tmp_path):
    adapted = replace(results(**ADAPTED), remark="not of <all> images")
    content = save_results(adapted, tmp_path, "test_train")
    (tmp_path / "notes.txt").write_text("mine")
    assert json.loads((tmp_path / "results.json").read_text()) == content
    row = pd.read_csv(tmp_path / "results.csv", index_col=0).loc["uniform"]
    assert (row["top1 low"], row["top1 high"], row["difference"], row["difference low"]) == (50, 75, 2.5, -1)
    assert row["balanced_accuracy"] == 61
    text = (tmp_path / "results.md").read_text()
    assert "balanced" not in text and "**Not of <all> images.**" in text and "| uniform | 10 | 100.0 |" in text
    for name, title in (
        ("accuracy", "uniform, equal weights: 60.0 %"),
        ("accuracy", "uniform, adaptation: 100.0 % (50.0 to 75.0)"),
        ("accuracy", "Not of &lt;all&gt; images."),
        ("weights", "uniform, expert 1: 75.0 %"),
    ):
        assert title in (tmp_path / f"{name}.svg").read_text()
    alone = results()
    alone.distributions = {"uniform": alone.distributions["uniform"]}
    save_results(alone, tmp_path, "test_train")  # no charts of a single distribution
    kept = {path.name for path in tmp_path.iterdir() if not path.name.startswith("events.")}
    assert kept == {"report.html", "results.csv", "results.md", "results.json", "notes.txt"}


def test_figures_that_are_no_numbers_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_results(results(macro_f1=float("nan")), tmp_path, "test_all")
    assert not (tmp_path / "results.json").exists()


def test_one_folder_holds_results_of_one_job(tmp_path):
    def job(name):
        with results_folder(tmp_path / "last.pth", name, tmp_path / "out") as folder:
            save_results(RESULTS, folder, name)

    job("test_all")
    assert job_of(tmp_path / "out") == "test_all"
    job("test_all")
    with pytest.raises(UserError, match="holds results of test_all: give another --output for those of test_train"):
        job("test_train")
    for text in ("{", "[]", '{"job": 3}', "[" * 10_000):  # whatever is there is replaced
        (tmp_path / "out" / "results.json").write_text(text)
        with results_folder(tmp_path / "last.pth", "test_train", tmp_path / "out"):
            pass


def test_tensorboard_shows_accuracies_under_the_names_of_distributions(tmp_path):
    save_results(RESULTS, tmp_path, "test_all")
    board = EventAccumulator(str(tmp_path)).Reload()
    (point,) = board.Scalars("top1 test_all/forward10")
    assert point.value == pytest.approx(62.55) and point.step == 3
    text = board.Tensors("test_all/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "In some way." in text and "| uniform |" in text
