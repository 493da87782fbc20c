import pandas as pd

from utils.report import console_table, figures, markdown_table, results_table

ENTRY = {
    "images": 10,
    "top1": 62.55,
    "many": 70.0,
    "medium": 55.0,
    "few": None,
    "experts_top1": [60.0, 50.0],
    "weights": [0.75, 0.25],
}
RESULTS = {"distributions": {"forward10": ENTRY, "uniform": {**ENTRY, "top1": 100.0}}}


def test_table_has_a_row_for_each_distribution_in_order():
    table = results_table(RESULTS)
    assert list(table.index) == ["forward10", "uniform"]
    assert list(table) == ["images", "top1", "many", "medium", "few", "expert 1", "expert 2", "w1", "w2"]
    assert pd.isna(table.loc["uniform", "few"])


def test_a_group_without_images_is_a_dash_never_a_nan():
    assert "nan" not in console_table(RESULTS).lower()
    assert (
        markdown_table(results_table(RESULTS)).splitlines()[2]
        == "| forward10 | 10 | 62.5 | 70.0 | 55.0 | - | 60.0 | 50.0 | 0.75 | 0.25 |"
    )


def test_learned_weights_stand_beside_equal_ones():
    compared = {"distributions": {k: {**v, "equal_weights_top1": 50.0} for k, v in RESULTS["distributions"].items()}}
    table = results_table(compared)
    assert list(table)[:3] == ["images", "top1", "equal weights"]
    labels = [line.get_label() for line in figures(table)["accuracy"].axes[0].lines]
    assert labels == ["expert 1", "expert 2", "equal weights", "learned weights"]


def test_no_figure_of_a_single_distribution():
    assert figures(results_table(RESULTS).head(1)) == {}
