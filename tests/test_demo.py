"""What the README shows of `make demo`: the order of equal weights, the published method, and the estimated prior."""

from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT

from evaluation import adapt, load_run
from trainer import train
from utils.parse_config import read_json

MIDDLE = ["uniform", "backward2"]


def adapted(folder: Path, seed: int) -> pd.DataFrame:
    """A row a distribution, a column for each way to predict, with the network of the demo and this seed."""
    config = {**read_json(ROOT / "configs" / "config_demo_tade.json"), "seed": seed}
    config["trainer"] |= {"save_dir": str(folder), "tensorboard": False, "valid_period": 30}
    last = train(config, run_id=f"seed{seed}")["last"]

    def table(way: str) -> pd.DataFrame:
        return adapt(load_run(last, None, read_json(ROOT / "configs" / f"test_time_demo_{way}.json"))).table()

    published, prior = table("tade"), table("prior")
    return pd.DataFrame(
        {
            "equal": published["equal weights"],
            "published": published["top1"],
            "equal, views": prior["equal weights"],
            "prior": prior["top1"],
        }
    )


@pytest.fixture(scope="module")
def top1(tmp_path_factory) -> pd.DataFrame:
    """Mean of two networks: forward50 has 135 images, and rounding, which differs between processors, moves some."""
    folder = tmp_path_factory.mktemp("demo")
    return (adapted(folder, 1) + adapted(folder, 2)) / 2


def test_the_estimated_prior_is_ahead_of_equal_weights_and_of_the_published_way(top1):
    gain = top1["prior"] - top1["equal, views"]
    assert gain["forward50"] > 0.5 and gain["backward50"] > 2 and gain.mean() > 1 and gain.min() > -3
    assert top1["prior"].mean() > top1["published"].mean() + 1


def test_the_published_way_gains_at_the_ends_alone(top1):
    gain = top1["published"] - top1["equal"]
    assert gain[["forward50", "backward50"]].mean() > 1
    assert gain[MIDDLE].mean() < gain[["forward50", "backward50"]].mean() - 1
