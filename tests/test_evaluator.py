import numpy as np
import pytest
import torch

from data_loader.class_profiles import draw_distributions
from data_loader.data_loaders import ImbalanceDigitsDataLoader
from model.inference import inference_copy
from model.model import ResNet32Model
from trainer.aggregator import StabilityAggregator
from trainer.evaluator import DistributionScorer, RowBuffer, expert_logits, score_equal_weights
from trainer.test_time_training import fit_aggregators

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = ResNet32Model(10, True, True, 3)
    network.train()
    for _ in range(3):  # batch norm gets statistics that are not the initial ones
        network(torch.randn(16, 3, 16, 16) * 2 + 1)
    return network


def test_expert_logits_are_in_the_order_of_the_images(network):
    loader = ImbalanceDigitsDataLoader(8)
    batches = loader.test_batches()
    logits = expert_logits(inference_copy(network, 16), batches, CPU, "test")
    assert logits.shape == (500, 3, 10) and not logits.requires_grad
    images = torch.cat([images for images, _ in batches])
    with torch.no_grad():
        torch.testing.assert_close(
            logits[[7, 260, 499]], inference_copy(network, 16)(images[[7, 260, 499]])["logits"], atol=1e-4, rtol=1e-4
        )


def test_row_buffer():
    buffer = RowBuffer(3)
    buffer.append(torch.ones(2, 4))
    with pytest.raises(AssertionError, match="2 of 3"):
        buffer.filled()
    buffer.append(torch.zeros(1, 4))
    assert buffer.filled().sum(dim=1).tolist() == [4, 4, 0]


def test_scores_by_hand():
    counts = [200, 50, 3]  # many, medium, few
    targets = torch.tensor([0, 0, 1, 2])
    right = torch.eye(3)[targets]
    logits = torch.stack([right, torch.eye(3)[[0, 0, 0, 0]] * 1.5], dim=1)  # the second expert always says 0
    scorer = DistributionScorer(logits, targets, counts)
    entry = scorer.score(np.arange(4), lambda logits: logits.mean(dim=1))
    assert entry == {"images": 4, "top1": 50, "many": 100, "medium": 0, "few": 0, "experts_top1": [100, 50]}
    entry = scorer.score(np.array([2, 0]), lambda logits: logits[:, 0])
    assert entry == {"images": 2, "top1": 100, "many": 100, "medium": 100, "few": None, "experts_top1": [100, 50]}


def test_row_selections_equal_a_pass_over_each_distribution(network):
    """The accuracies from stored logits are those of running the network on every distribution's images again."""
    loader, copy = ImbalanceDigitsDataLoader(8), inference_copy(network, 16)
    batches, distributions = loader.test_batches(), loader.test_distributions()
    scorer = DistributionScorer(expert_logits(copy, batches, CPU, "test"), batches.targets, loader.cls_num_list)
    images = torch.cat([images for images, _ in batches])
    for name, entry in score_equal_weights(scorer, distributions, ["forward50", "backward5"]).items():
        rows = torch.as_tensor(distributions[name])
        with torch.no_grad():
            prediction = network.eval()(images[rows])["output"].argmax(1)
        assert entry["top1"] == pytest.approx(100 * float((prediction == batches.targets[rows]).float().mean()))
    network.train()


def test_a_distribution_learns_the_same_weights_alone_and_beside_others(network):
    loader, copy = ImbalanceDigitsDataLoader(8), inference_copy(network, 16)
    distributions = draw_distributions(loader.test_set.targets.numpy(), loader.cls_num_list, ["forward5", "backward5"])

    def fit(chosen):
        def make():
            return StabilityAggregator(3, lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9), epochs=2, batch_size=32)

        return fit_aggregators(copy, loader, chosen, make, seed=1, device=CPU)

    together, alone = fit(distributions), fit({"backward5": distributions["backward5"]})
    torch.testing.assert_close(together["backward5"].weights, alone["backward5"].weights, atol=1e-5, rtol=0)
    assert not torch.equal(together["backward5"].weights, together["forward5"].weights)


def test_only_the_distributions_own_images_matter(network):
    """Weights of one distribution cannot depend on images that it does not contain."""
    loader, copy = ImbalanceDigitsDataLoader(8), inference_copy(network, 16)
    rows = np.arange(0, 500, 5)

    def fit():
        return fit_aggregators(
            copy,
            loader,
            {"some": rows},
            lambda: StabilityAggregator(3, lambda p: torch.optim.SGD(p, lr=0.5), epochs=1, batch_size=32),
            seed=1,
            device=CPU,
        )["some"].weights

    before = fit()
    outside = np.setdiff1d(np.arange(500), rows)
    loader.test_set.images[outside] = 255 - loader.test_set.images[outside]
    torch.testing.assert_close(fit(), before)
