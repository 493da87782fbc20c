"""A test prior that is known; and that no aggregator but the oracle can see a label."""

import pytest
import torch

import evaluation
from commands.command_line import parse
from commands.jobs import run_test_train
from evaluation.given_prior import read_prior
from tade import GivenPriorAggregator, PriorAggregator, StabilityAggregator
from utils.errors import UserError

COUNTS = [120, 60, 6]
PREDICTED = ("prediction", "confidence")


class Pets:
    """What `read_prior` asks of a loader."""

    num_classes = 3
    cls_num_list = COUNTS
    class_map = None
    class_names = ("cat", "dog", "sea horse")


class Renumbered(Pets):
    class_map = (2, 0, 1)
    class_names = ("2", "0", "1")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prior.json", '{"dog": 70, "cat": 30, "sea horse": 0.5}'),
        ("prior.csv", "class,images\ndog,70\ncat,30\nsea horse,0.5\n"),
        ("prior.csv", '"dog", 70\r\n"cat", 30\r\n"sea horse", 0.5\r\n'),
        ("prior.txt", "sea horse 0.5\n\ncat 30\ndog\t70\n"),
        ("prior.txt", "0 30\n2 0.5\n1 70"),
    ],
)
def test_files(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_prior(str(tmp_path / name), Pets) == [30, 70, 0.5]


def test_words_and_inline():
    assert read_prior("uniform", Pets) == [1, 1, 1] and read_prior("training", Pets) == COUNTS
    assert read_prior("cat=30, dog=70,sea horse=0", Pets) == [30, 70, 0]
    assert read_prior({"cat": 1, "dog": 2, "2": 3}, Pets) == [1, 2, 3]
    assert read_prior("0=10,1=20,2=30", Renumbered) == [30, 10, 20]  # numbers are the data set's own


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "cat 1\ndgo 2\nsea horse 3", 'Unknown class in .*p.txt "dgo": did you mean "dog"'),
        ("p.txt", "cat 1\ndog 2", r"no number for 1 of 3 classes \(sea horse\): give every class one"),
        ("p.csv", "cat,1\ndog,-2\nsea horse,3", 'has "-2" for class "dog": give a number of at least 0'),
        ("p.csv", "cat,1\ndog,two\nsea horse,3", 'has "two" for class "dog"'),
        ("p.csv", "cat,1,2\ndog,2\nsea horse,3", '"cat 1 2" should be a class and a number'),
        ("p.txt", "cat 1\ncat 2", 'has class "cat" twice'),
        ("p.txt", "cat 0\ndog 0\nsea horse 0", "is 0 for every class"),
        ("p.json", '{"cat": null}', 'has "None" for class "cat"'),
        ("p.json", "{", "is not valid JSON: line 1"),
        ("p.json", "[1, 2]", "must hold one JSON object"),
        ("p.txt", "", "no number for 3 of 3 classes"),
    ],
)
def test_what_is_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_prior(str(tmp_path / name), Pets)


def test_what_is_no_prior_at_all(tmp_path):
    with pytest.raises(UserError, match='The prior "unifrom" is no file that can be read'):
        read_prior("unifrom", Pets)
    with pytest.raises(UserError, match='has "nan" for class "cat"'):
        read_prior("cat=nan,dog=1", Pets)
    with pytest.raises(UserError, match="should be a class and a number"):
        read_prior("cat=1,dog", Pets)


def test_the_flag_of_the_scripts(trained_digits, tmp_path):
    arguments = ["-c", "configs/test_time_digits_tade.json", "-r", str(trained_digits), "--prior", "training"]
    options = parse(run_test_train, "", [*arguments, "-o", str(tmp_path)])
    content = run_test_train(**options)
    run = evaluation.load_run(trained_digits)
    counts = torch.tensor(run.cls_num_list, dtype=torch.float64)
    by_hand = evaluation.adapt(run, lambda *priors: GivenPriorAggregator(*priors, prior=run.cls_num_list))
    for name, entry in content["distributions"].items():
        assert entry["learning"]["prior"] == pytest.approx((counts / counts.sum()).tolist(), abs=1e-6)
        assert entry["top1"] == by_hand.distributions[name].top1
    assert content["protocol"].startswith("Known test prior (GivenPriorAggregator), the same for all: nothing learned;")
    assert content["config"]["aggregator"]["args"]["prior"] == run.cls_num_list
    with pytest.raises(UserError, match="no number for 9 of 10 classes"):
        run_test_train(**{**options, "prior": "3=1"})


def test_a_calibration_of_the_config_stays(trained_digits):
    section = {"aggregator": {"type": "PriorAggregator", "args": {"calibration": [0.5, 0.0, 0.0], "bound": 2.0}}}
    run = evaluation.with_prior(evaluation.load_run(trained_digits, overrides=section), "uniform")
    assert run.config["aggregator"]["args"] == {"calibration": [0.5, 0.0, 0.0], "prior": [1.0] * 10}
    predicted = evaluation.predict(run, run.loader.test.images[:5], run.make_aggregator)
    assert predicted.learning["prior"] == pytest.approx([0.1] * 10) and predicted.calibration["a"] == 0.5


def test_the_oracle_is_a_bound_and_says_so(trained_digits):
    run = evaluation.load_run(trained_digits)
    results = evaluation.adapt_oracle(run, ["forward50", "backward50"])
    assert "a bound, uses the labels" in results.protocol and "bound" in results.remark
    own = torch.bincount(run.targets[run.loader.test_distributions()["backward50"]], minlength=10).double()
    learning = results.distributions["backward50"].learning
    assert learning["prior"] == pytest.approx((own / own.sum()).tolist(), abs=1e-6)
    uniform = evaluation.adapt(run, lambda *p: GivenPriorAggregator(*p, prior=[1] * 10), names=["backward50"])
    assert results.distributions["backward50"].top1 > uniform.distributions["backward50"].top1 + 5


@pytest.mark.parametrize("kind", [StabilityAggregator, PriorAggregator, None])
def test_no_aggregator_but_the_oracle_sees_a_label(trained_digits, kind):
    """What is learned and predicted does not change when every test label does."""

    def adapted(shuffle: bool):
        run = evaluation.load_run(trained_digits)
        distributions = run.loader.test_distributions()
        run.loader.test_distributions = lambda: distributions  # the same images
        if shuffle:
            run.targets = run.targets[torch.randperm(len(run.targets), generator=torch.Generator().manual_seed(0))]
        names = ["backward10"]
        results = evaluation.adapt(run, kind, names) if kind else evaluation.adapt_oracle(run, names)
        return results.distributions["backward10"]

    one, other = adapted(False), adapted(True)
    same = (one.weights, one.learning) == (other.weights, other.learning)
    same = same and all(torch.equal(getattr(one.outcomes, key), getattr(other.outcomes, key)) for key in PREDICTED)
    assert same == (kind is not None) and one.top1 != other.top1
