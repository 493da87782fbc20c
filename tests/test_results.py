import json
from xml.etree import ElementTree

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
    "experts_top1": [60.0, 50.0],
    "weights": [0.75, 0.25],
}
DIFFERENCE = {"points": 2.0, "interval": [1.0, 3.0]}


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
    learned = results(equal_weights_top1=50.0, learning={"note": None})
    assert Results.from_json(learned.to_json()) == learned


def test_a_new_metric_is_a_column_and_a_list_is_not():
    table = results(top5_accuracy=90.0, per_class_accuracy=[1.0, None]).table()
    assert list(table)[:6] == ["images", "top1", "many", "medium", "few", "top5_accuracy"]
    assert "per_class_accuracy" not in table and "90.0" in console_table(table)
    assert results(per_class_accuracy=[1.0]).to_json()["distributions"]["uniform"]["per_class_accuracy"] == [1.0]


def test_details_are_columns_of_the_csv_and_not_of_the_console(tmp_path):
    more = results(
        top1_interval=[50.0, 75.0],
        balanced_accuracy=61.0,
        expected_calibration_error=7.0,
        equal_weights_top1=60.0,
        difference_to_equal_weights={"points": 2.5, "interval": [-1.0, 6.0]},
    )
    assert Results.from_json(more.to_json()) == more
    assert list(more.table()) == [
        "images",
        "top1",
        "equal weights",
        "many",
        "medium",
        "few",
        *list(RESULTS.table())[5:],
    ]
    save_results(more, tmp_path, "test_train")
    row = pd.read_csv(tmp_path / "results.csv", index_col=0).loc["uniform"]
    assert (row["top1 low"], row["top1 high"], row["difference"], row["difference low"]) == (50, 75, 2.5, -1)
    assert row["balanced_accuracy"] == 61 and "balanced" not in (tmp_path / "results.md").read_text()
    more.config = {"metrics": ["expected_calibration_error"]}  # asked for by name
    assert "expected_calibration_error" in more.table() and "balanced_accuracy" not in more.table()


def test_published_results_are_read():
    content = json.loads((ROOT / "benchmarks" / "results" / "cifar100_ir100_tade_200_epochs.json").read_text())
    old = Results.from_json(content)
    assert old.classes is None and old.to_json()["distributions"] == content["distributions"]
    assert len(old.table()) == 11


def test_files_of_an_evaluation(tmp_path):
    adapted = results(equal_weights_top1=50.0, difference_to_equal_weights=DIFFERENCE)
    content = save_results(adapted, tmp_path, "test_train")
    written = [path.name for path in tmp_path.iterdir() if not path.name.startswith("events.")]
    assert {*written} == {"report.html", "results.csv", "results.md", "results.json", "accuracy.svg", "weights.svg"}
    assert json.loads((tmp_path / "results.json").read_text()) == content
    assert "<title>uniform, expert 2: 25.0</title>" in (tmp_path / "weights.svg").read_text()
    chart = ElementTree.parse(tmp_path / "accuracy.svg").getroot()
    assert chart.tag.endswith("svg") and "Top-1 accuracy" in "".join(chart.itertext())
    broken = results()
    broken.distributions["uniform"].metrics["few"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_results(broken, tmp_path, "test_train")
    assert json.loads((tmp_path / "results.json").read_text()) == content


def test_without_learned_weights_there_are_no_columns_and_no_chart_of_them(tmp_path):
    plain = results()
    for result in plain.distributions.values():
        result.weights = None
    assert list(plain.table())[-1] == "expert 2"
    save_results(plain, tmp_path, "test_all")
    assert not (tmp_path / "weights.svg").exists() and (tmp_path / "accuracy.svg").exists()


def test_table_has_a_row_for_each_distribution_in_order():
    table = RESULTS.table()
    assert list(table.index) == ["forward10", "uniform"]
    assert list(table) == ["images", "top1", "many", "medium", "few", "expert 1", "expert 2", "w1", "w2"]
    assert pd.isna(table.loc["uniform", "few"])


def test_a_group_without_images_is_a_dash_never_a_nan():
    assert "nan" not in console_table(RESULTS.table()).lower()
    assert (
        markdown_table(RESULTS.table()).splitlines()[2]
        == "| forward10 | 10 | 62.5 | 70.0 | 55.0 | - | 60.0 | 50.0 | 0.75 | 0.25 |"
    )


def test_learned_weights_stand_beside_equal_ones():
    assert list(results(equal_weights_top1=50.0).table())[:3] == ["images", "top1", "equal weights"]


def test_evaluating_again_leaves_nothing_of_before(tmp_path):
    save_results(RESULTS, tmp_path, "test_all")
    assert (tmp_path / "accuracy.svg").exists()
    plain = results()
    plain.distributions = {"uniform": plain.distributions["uniform"]}
    (tmp_path / "notes.txt").write_text("mine")
    save_results(plain, tmp_path, "test_all")
    kept = {path.name for path in tmp_path.iterdir() if not path.name.startswith("events.")}
    assert kept == {
        "report.html",
        "results.csv",
        "results.md",
        "results.json",
        "notes.txt",
    }  # no chart of a single distribution


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
    tags = board.Tags()
    assert {f"top1 test_all/{name}" for name in RESULTS.distributions} <= set(tags["scalars"])
    (point,) = board.Scalars("top1 test_all/uniform")
    assert point.value == pytest.approx(RESULTS.distributions["uniform"].top1, abs=1e-4)
    assert point.step == (RESULTS.checkpoint.epoch or 0)
    text = board.Tensors("test_all/text_summary")[0].tensor_proto.string_val[0].decode()
    assert RESULTS.protocol in text and "| uniform |" in text
