"""What the README shows of `make demo`: the order of equal weights, the published method, and the estimated prior."""

import pytest
from conftest import ROOT

from evaluation import adapt, load_run
from utils.parse_config import read_json

ENDS = ["forward50", "backward50"]


@pytest.fixture(scope="module")
def tables(trained_digits) -> dict:
    """Of the published method ("tade") and of the estimated prior: a row a distribution."""
    configs = {way: read_json(ROOT / "configs" / f"test_time_demo_{way}.json") for way in ("tade", "prior")}
    return {way: adapt(load_run(trained_digits, None, config)).table() for way, config in configs.items()}


def test_the_estimated_prior_is_ahead_of_equal_weights_and_of_the_published_way(tables):
    gain = tables["prior"]["top1"] - tables["prior"]["equal weights"]
    assert gain["forward50"] > 1 and gain["backward50"] > 2 and gain.mean() > 1 and gain.min() > -3
    assert tables["prior"]["top1"].mean() > tables["tade"]["top1"].mean() + 2


def test_the_published_way_gains_at_the_ends_alone(tables):
    gain = tables["tade"]["top1"] - tables["tade"]["equal weights"]
    assert gain[ENDS].min() > 3 and gain["uniform"] < -5
