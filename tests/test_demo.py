"""What the README shows of `make demo`: the order of equal weights, the published method, and the estimated prior."""

import pytest
from conftest import ROOT

from trainer import adapt, load_run, train
from utils.parse_config import read_json


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """One table of each way to adapt, on the network of the demo."""
    config = read_json(ROOT / "configs" / "config_demo_tade.json")
    config["trainer"] |= {"save_dir": str(tmp_path_factory.mktemp("demo")), "tensorboard": False, "valid_period": 30}
    last = train(config)["last"]
    ways = ("tade", "prior")
    return [
        adapt(load_run(last, None, read_json(ROOT / "configs" / f"test_time_demo_{way}.json"))).table() for way in ways
    ]


def test_the_estimated_prior_gains_at_both_ends_and_loses_nowhere_much(tables):
    _, prior = tables
    gain = prior["top1"] - prior["equal weights"]
    assert gain["forward50"] > 2 and gain["backward50"] > 2 and gain.mean() > 1.5 and gain.min() > -2.5


def test_the_published_way_gains_at_the_ends_and_loses_in_the_middle(tables):
    published, prior = tables
    gain = published["top1"] - published["equal weights"]
    assert gain["forward50"] > 1 and gain["backward50"] > 1 and gain[["uniform", "backward2", "backward5"]].min() < -2
    assert prior["top1"].mean() - published["top1"].mean() > 2
