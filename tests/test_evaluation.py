import json
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import evaluation
from data_loader.class_profiles import distribution_indices
from data_loader.data_loaders import ImbalanceDigitsDataLoader
from evaluation.adaptation import fit_all, follow_streams, log_learned, two_view_logits
from evaluation.evaluation import Scorer, results_of
from evaluation.results import DistributionResult
from model.inference import inference_copy
from model.logits import LogitsBuffer, expert_logits, selected
from model.metric import top5_accuracy
from model.model import ResNet32Model
from tade import EMAggregator, GivenPriorAggregator, PriorAggregator, StabilityAggregator
from utils.checkpoint import load_checkpoint
from utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = ResNet32Model(10, reduce_dimension=True, use_norm=True, num_experts=3)
    network.train()
    for _ in range(3):  # batch norm gets statistics that are not the initial ones
        network(torch.randn(16, 3, 16, 16) * 2 + 1)
    return network


def test_expert_logits_are_in_the_order_of_the_images(network):
    loader = ImbalanceDigitsDataLoader(8)
    batches = loader.test.batches()
    logits = expert_logits(inference_copy(network, 16), [batches], CPU, "test")
    assert logits.shape == (500, 3, 10) and not logits.requires_grad
    images = torch.cat([images for images, _ in batches])
    with torch.no_grad():
        torch.testing.assert_close(
            logits[[7, 260, 499]], inference_copy(network, 16)(images[[7, 260, 499]])["logits"], atol=1e-4, rtol=1e-4
        )


def test_logits_buffer():
    buffer = LogitsBuffer(3)
    buffer.put(slice(0, 2), torch.ones(2, 4))
    with pytest.raises(AssertionError, match="2 of 3"):
        buffer.filled()
    buffer.put(slice(2, 3), torch.zeros(1, 4))
    assert buffer.filled().sum(dim=1).tolist() == [4, 4, 0]


def test_a_selection_of_all_images_is_no_copy():
    logits = torch.randn(4, 3, 5)
    assert selected(logits, np.arange(4)) is logits
    assert torch.equal(selected(logits, np.array([2, 0])), logits[[2, 0]])
    assert torch.equal(selected(logits, np.array([1, 0, 2, 3])), logits[[1, 0, 2, 3]])


def test_scores_by_hand():
    counts = [200, 50, 3]  # many, medium, few
    targets = torch.tensor([0, 0, 1, 2])
    right = torch.eye(3)[targets]
    logits = torch.stack([right, torch.eye(3)[[0, 0, 0, 0]] * 1.5], dim=1)  # the second expert always says 0
    scorer = Scorer(logits, targets, counts, {"top5_accuracy": top5_accuracy})
    result = scorer.score(np.arange(4), logits.mean(dim=1))
    assert result.images == 4 and result.experts_top1 == [100, 50]
    expected = {"top1": 50, "many": 100, "medium": 0, "few": 0, "top5_accuracy": 100, "per_class_accuracy": [100, 0, 0]}
    assert {name: result.metrics[name] for name in expected} == expected
    assert result.metrics["balanced_accuracy"] == pytest.approx(100 / 3)
    assert result.metrics["macro_f1"] == pytest.approx(100 * (2 * 2 / (2 * 2 + 2)) / 3)
    beside = scorer.score_beside_equal_weights(np.arange(4), right)
    assert beside.top1 == 100 and beside.equal_weights_top1 == 50
    assert beside.difference_to_equal_weights == {"points": 50, "interval": [0, 100]}
    assert beside.equal_outcomes.prediction.tolist() == [0, 0, 0, 0] and beside.outcomes.indices.tolist() == [
        0,
        1,
        2,
        3,
    ]
    result = scorer.score(np.array([2, 0]), logits[[2, 0], 0])
    assert result.images == 2 and result.experts_top1 == [100, 50]
    expected = {"top1": 100, "many": 100, "medium": 100, "few": None, "per_class_accuracy": [100, 100, None]}
    assert {name: result.metrics[name] for name in expected} == expected and result.metrics["balanced_accuracy"] == 100


def test_selections_equal_a_pass_over_each_distribution(network):
    """The accuracies from stored logits are those of running the network on every distribution's images again."""
    loader, copy = ImbalanceDigitsDataLoader(8), inference_copy(network, 16)
    batches, distributions = loader.test.batches(), loader.test_distributions()
    scorer = Scorer(expert_logits(copy, [batches], CPU, "test"), batches.targets, loader.cls_num_list)
    images = torch.cat([images for images, _ in batches])
    for name in ("forward50", "backward5"):
        indices = torch.as_tensor(distributions[name])
        with torch.no_grad():
            prediction = network.eval()(images[indices])["output"].argmax(1)
        expected = 100 * float((prediction == batches.targets[indices]).float().mean())
        assert scorer.score_equal_weights(distributions[name]).top1 == pytest.approx(expected)
    network.train()


@pytest.fixture
def plain_run(trained_digits):
    return evaluation.load_run(trained_digits)


def views_of_run(trained_digits, crops, **more):
    return evaluation.load_run(trained_digits, overrides={"averaged_views": crops, **more})


def test_averaged_logits_are_the_mean_of_explicit_passes(trained_digits, plain_run):
    run = views_of_run(trained_digits, 3)
    assert run.mild_views == [0, 2, 3, 4]  # digits have no mirror image
    passes = [expert_logits(run.inference_network, [run.loader.test.mild_view(n)], CPU, "view") for n in run.mild_views]
    assert torch.equal(passes[0], plain_run.test_logits)
    torch.testing.assert_close(run.test_logits, torch.stack(passes).mean(dim=0), atol=1e-5, rtol=1e-5)
    assert torch.equal(run.test_logits, views_of_run(trained_digits, 3).test_logits)
    assert not torch.equal(run.test_logits, views_of_run(trained_digits, 3, seed=9).test_logits)


def test_without_averaged_views_nothing_changes(trained_digits, plain_run, monkeypatch):
    monkeypatch.setattr(type(plain_run.images), "mild_view", None)  # none is asked for
    off = views_of_run(trained_digits, 0)
    assert torch.equal(off.test_logits, plain_run.test_logits)
    expected = evaluation.evaluate(plain_run).to_json()
    assert "averaged_views" not in expected["config"] and expected["protocol"] == (
        "Experts weighted equally (mean of their logits). One pass of the network over the un-augmented test images; "
        "every distribution is a selection of them."
    )
    found = evaluation.evaluate(off).to_json()
    assert found["config"].pop("averaged_views") == 0 and found == expected
    adapted = evaluation.adapt(plain_run, EMAggregator, names=["uniform"])
    assert "; predictions on un-augmented images." in adapted.protocol


def test_every_figure_is_of_the_averaged_logits_and_the_protocol_says_so(trained_digits):
    run = views_of_run(trained_digits, 2)
    views = "3 averaged views of the test images (image, random crops: 2)"
    logits, all_images = run.test_logits, np.arange(500)
    equal = evaluation.evaluate(run, names=["uniform"])
    assert f"One pass of the network over each of {views};" in equal.protocol
    assert equal.config["averaged_views"] == 2
    expected = Scorer(logits, run.targets, run.cls_num_list).score_equal_weights(all_images)
    result = equal.distributions["uniform"]
    assert (result.top1, result.experts_top1) == (expected.top1, expected.experts_top1)
    for make in (EMAggregator, StabilityAggregator):  # strong views come as before where they are wanted
        adapted = evaluation.adapt(run, make, names=["uniform"])
        assert f"; predictions on {views}." in adapted.protocol
        assert adapted.distributions["uniform"].equal_weights_top1 == expected.top1
        assert adapted.distributions["uniform"].experts_top1 == expected.experts_top1
    predicted = evaluation.predict(run, run.loader.test.images)
    torch.testing.assert_close(predicted.log_probabilities, torch.log_softmax(logits.mean(1), 1), atol=1e-5, rtol=0)


class FullSize(TorchDispatchMode):
    """Where tensors of one shape lie that are made in its body."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.places = shape, set()

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor) and result.shape == self.shape:
            self.places.add(result.data_ptr())
        return result


def test_averaging_keeps_one_tensor_of_all_logits(trained_digits):
    run = views_of_run(trained_digits, 4)
    with FullSize((500, 3, 10)) as full:
        logits = run.test_logits
    assert full.places == {logits.data_ptr()}


class Digits:
    """The digits' test images and a network, as `fit_all` wants them."""

    def __init__(self, network):
        self.loader = ImbalanceDigitsDataLoader(8)
        self.network = inference_copy(network, 16)
        self.asked = []  # images of every pass

    def logits(self):
        return expert_logits(self.network, [self.loader.test.batches()], CPU, "test")

    def views_of(self, indices, pass_number):
        self.asked.append(len(indices))
        return two_view_logits(self.network, self.loader.test, indices, pass_number, CPU)

    def fit(self, distributions, lr=0.5, **options):
        aggregators = {name: stability(lr, **options) for name in distributions}
        fit_all(aggregators, self.logits(), distributions, self.views_of, seed=1)
        return aggregators


def stability(lr=0.5, **options):
    return StabilityAggregator(
        torch.zeros(3, 10),
        torch.zeros(10),
        make_optimizer=lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9),
        **{"epochs": 2, "batch_size": 32, **options},
    )


def test_a_distribution_learns_the_same_weights_alone_and_beside_others(network):
    digits = Digits(network)
    targets = digits.loader.test.targets.numpy()
    distributions = distribution_indices(targets, digits.loader.cls_num_list, ["forward5", "backward5"])
    together = digits.fit(distributions)
    alone = digits.fit({"backward5": distributions["backward5"]})
    torch.testing.assert_close(together["backward5"].weights, alone["backward5"].weights, atol=1e-5, rtol=0)
    assert not torch.equal(together["backward5"].weights, together["forward5"].weights)
    both = len(np.union1d(*distributions.values()))
    assert digits.asked == [both, both, 250, 250]  # every image once a pass


def test_only_the_distributions_own_images_matter(network):
    """Weights of one distribution cannot depend on images that it does not contain."""
    digits, indices = Digits(network), np.arange(0, 500, 5)
    before = digits.fit({"some": indices}, epochs=1)["some"].weights
    outside = np.setdiff1d(np.arange(500), indices)
    digits.loader.test.images[outside] = 255 - digits.loader.test.images[outside]
    torch.testing.assert_close(digits.fit({"some": indices}, epochs=1)["some"].weights, before)


def test_a_stream_sees_every_image_once_and_predicts_it_right_after_its_batch(network):
    digits, indices = Digits(network), np.arange(0, 500, 2)
    seen, logits = [], digits.logits()

    class Witness(StabilityAggregator):
        def update(self, batch, views=None):
            seen.append(batch)
            super().update(batch, views)

    aggregator = Witness(torch.zeros(3, 10), torch.zeros(10))
    ((name, scores),) = follow_streams({"half": aggregator}, logits, {"half": indices}, digits.views_of, 1, 64)
    assert name == "half" and [len(batch) for batch in seen] == [64, 64, 64, 58] and scores.shape == (250, 10)
    own = logits[torch.from_numpy(indices)]
    assert torch.equal(torch.cat(seen).flatten(1).sort(dim=0).values, own.flatten(1).sort(dim=0).values)
    last = [int((own == image).flatten(1).all(dim=1).nonzero()[0]) for image in seen[-1]]
    torch.testing.assert_close(scores[last], aggregator.predict(own[last]))


def test_an_aggregator_without_views_or_weights_goes_all_the_way(trained_digits, monkeypatch):
    run = evaluation.load_run(trained_digits)
    monkeypatch.setattr(type(run.images), "views", None)  # no pass is paid for views
    results = evaluation.adapt(run, EMAggregator, names=["forward10", "uniform"])
    assert list(results.distributions) == ["forward10", "uniform"] and "EMAggregator" in results.protocol
    entry = results.to_json()["distributions"]["uniform"]
    assert "weights" not in entry and len(entry["learning"]["prior"]) == 10
    json.dumps(results.to_json(), allow_nan=False)
    assert "w1" not in results.table()
    with pytest.raises(UserError, match="EMAggregator needs a whole test set: leave --stream out"):
        evaluation.adapt(run, EMAggregator, stream=True)


def test_the_network_of_a_run_is_the_trained_one_and_logits_are_those_of_a_copy(trained_digits):
    run = evaluation.load_run(trained_digits, device="cpu")
    logits = run.test_logits
    state = load_checkpoint(trained_digits)["model"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in run.network.state_dict().items())
    assert all(parameter.requires_grad for parameter in run.network.parameters()) and not run.network.training
    images, _ = next(iter(run.images.batches()))
    output = run.network(images)["logits"]
    torch.testing.assert_close(output.detach(), logits[: len(images)], atol=1e-4, rtol=1e-4)
    output.sum().backward()


def test_from_python_without_a_command_line(trained_digits):
    run = evaluation.load_run(trained_digits, device="cpu", overrides={"seed": 3})
    assert run.num_experts == 3 and run.expert_log_priors.shape == (3, 10) and run.seed == 3
    torch.testing.assert_close(run.expert_log_priors[1], torch.zeros(10))
    torch.testing.assert_close(run.log_prior.exp() * sum(run.cls_num_list), torch.tensor(run.cls_num_list).float())
    equal = evaluation.evaluate(run, names=["backward10"]).distributions["backward10"]
    learned = evaluation.adapt(run, StabilityAggregator, names=["backward10"]).distributions["backward10"]
    assert learned.equal_weights_top1 == equal.top1 and sum(learned.weights) == pytest.approx(1)
    with pytest.raises(UserError, match='Unknown test distribution "backward11": did you mean "backward10"'):
        evaluation.evaluate(run, names=["backward11"])
    with pytest.raises(UserError, match="names is empty"):
        evaluation.adapt(run, StabilityAggregator, names=[])
    assert list(evaluation.evaluate(run, names="uniform").distributions) == ["uniform"]


def test_predicting_images_in_memory(trained_digits):
    run = evaluation.load_run(trained_digits)
    images = run.loader.test.images[:20]
    plain = evaluation.predict(run, images)
    torch.testing.assert_close(
        plain.log_probabilities, torch.log_softmax(run.test_logits[:20].mean(1), 1), atol=1e-4, rtol=0
    )
    assert list(plain.table())[:3] == ["path", "class", "probability"] and plain.learning == {}
    adapted = evaluation.predict(run, images, StabilityAggregator)
    assert adapted.log_probabilities.shape == (20, 10) and len(adapted.learning["weights"]) == 3
    streamed = evaluation.predict(run, images, StabilityAggregator, stream=True, stream_batch=8)
    assert len(streamed.names) == 20 and streamed.learning["weights"] != adapted.learning["weights"]
    with pytest.raises(UserError):
        evaluation.predict(run, "photos")


def test_the_checkpoint_is_read_once(trained_digits):
    with patch("evaluation.loaded_run.load_checkpoint", wraps=load_checkpoint) as read:
        evaluation.load_run(trained_digits)
    read.assert_called_once()


def test_what_was_learned_is_one_line(capsys):
    learned = {"beta": 0.5, "beta_error": 0.1, "stability_in_pass": [0.5, 0.6, 0.7], "steps": 12}
    result = DistributionResult(10, [60.0, 50.0], {"top1": 62.5}, [0.75, 0.25], learning=learned)
    log_learned("uniform", result)
    result.learning = {"note": "equal weights are used"}
    log_learned("forward50", result)
    result.learning = result.weights = None
    log_learned("backward50", result)
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "uniform     beta 0.50  passes 3  expert weights 0.750 0.250",
        "forward50   expert weights 0.750 0.250  (equal weights are used)",
        "backward50",
    ]


@pytest.mark.parametrize(
    ("make", "stream", "said"),
    [
        (StabilityAggregator, False, "Test-time training (StabilityAggregator): learned WHOLE, VIEWS"),
        (StabilityAggregator, True, "Test-time training (StabilityAggregator): learned STREAM, VIEWS"),
        (partial(PriorAggregator, debias=False, classwise=False), True, "Adaptation (PriorAggregator): learned STREAM"),
        (
            partial(GivenPriorAggregator, prior=[1] * 10),
            False,
            "Known test prior (GivenPriorAggregator), the same for all: nothing learned",
        ),
    ],
)
def test_the_protocol_says_how_it_was_learned(trained_digits, make, stream, said):
    for short, text in {
        "WHOLE": "on each distribution's own unlabeled test images",
        "STREAM": "from a stream of the test images in batches of 40, each predicted right after learning from it",
        "VIEWS": "random views shared between distributions",
    }.items():
        said = said.replace(short, text)
    results = evaluation.adapt(evaluation.load_run(trained_digits), make, ["backward50"], stream, 40)
    assert results.protocol.startswith(f"{said}; predictions on un-augmented images.")


def test_results_name_the_aggregator_that_the_config_chose(trained_digits):
    section = {"aggregator": {"type": "EMAggregator", "args": {"steps": 3}}}
    run = evaluation.load_run(trained_digits, overrides=section)
    chosen = evaluation.adapt(run, names=["uniform"])
    assert chosen.config["aggregator"] == {"type": "EMAggregator", "args": {"steps": 3}}
    run = evaluation.load_run(trained_digits)
    assert "aggregator" not in evaluation.adapt(run, EMAggregator, names=["uniform"]).config  # not the config's


def test_what_is_left_out_is_remarked():
    common = {"checkpoint": None, "seed": 1, "device": CPU, "config": SimpleNamespace(config={})}
    common |= {"loader": SimpleNamespace(class_names=["ant", "bee"]), "images": SimpleNamespace(thumbnails=None)}
    labeled = "20 labeled test images calibrate and are left out of every figure"
    broken = "1 test images cannot be decoded and are left out"
    for left_out, bad, remark in (
        ([], {}, None),
        (range(20), {}, labeled),
        ([], {3: None}, broken),
        (range(20), {3: None}, f"{labeled}; {broken}"),
    ):
        run = SimpleNamespace(cls_num_list=[5, 1], targets=torch.zeros(50), left_out=left_out, bad_images=bad, **common)
        results = results_of(run, "In some way.")
        assert results.remark == remark and (results.protocol == "In some way.") == (remark is None)
        assert ("1 of 50" in results.protocol) == bool(bad) and ("20 labeled" in results.protocol) == bool(left_out)
