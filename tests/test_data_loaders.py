import numpy as np
import pytest
import torch

from data_loader.data_loaders import ImbalanceCIFAR100DataLoader, ImbalanceDigitsDataLoader
from data_loader.datasets import load_digits
from data_loader.samplers import batch_slices, process_share
from data_loader.tensor_transforms import normalize
from utils.errors import UserError


@pytest.fixture
def loader():
    return ImbalanceDigitsDataLoader(batch_size=50, imb_factor=0.05)


def test_digits_split():
    train, test = load_digits(train=True), load_digits(train=False)
    assert len(train.targets) + len(test.targets) == 1797
    assert torch.bincount(test.targets).tolist() == [50] * 10
    assert torch.bincount(train.targets).min() >= ImbalanceDigitsDataLoader.largest_class
    flat = {row.numpy().tobytes() for row in train.images}
    assert sum(row.numpy().tobytes() in flat for row in test.images) < 3  # no test image was trained on


def test_training_batches(loader):
    batches = list(loader)
    assert len(batches) == len(loader) == 9
    assert [len(target) for _, target in batches] == [50] * 8 + [sum(loader.cls_num_list) - 400]
    targets = torch.cat([target for _, target in batches])
    assert torch.bincount(targets).tolist() == loader.cls_num_list
    assert batches[0][0].shape == (50, 3, 16, 16) and batches[0][0].dtype == torch.float32


def test_epochs_differ_and_repeat(loader):
    def epoch(number):
        loader.set_epoch(number)
        return torch.cat([images for images, _ in loader])

    assert not torch.equal(epoch(1), epoch(2))
    torch.testing.assert_close(epoch(1), epoch(1), rtol=0, atol=0)
    of_seed_0 = epoch(1)
    loader.prepare(torch.device("cpu"), seed=8)
    assert not torch.equal(epoch(1), of_seed_0)


def test_processes_share_every_global_batch(loader):
    whole = [target for _, target in loader]
    shares = []
    for rank in range(2):
        loader.prepare(torch.device("cpu"), seed=0, rank=rank, world_size=2)
        shares.append(list(loader))
    for step, target in enumerate(whole):
        torch.testing.assert_close(torch.cat([shares[rank][step][1] for rank in range(2)]), target)


def test_shares_and_slices():
    assert [process_share(slice(10, 20), 17, r, 3) for r in range(3)] == [slice(10, 12), slice(12, 14), slice(14, 17)]
    assert batch_slices(10, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert batch_slices(9, 4, smallest=2) == [slice(0, 4), slice(4, 8)]
    assert batch_slices(9, 4)[-1] == slice(8, 9)


def test_test_images_are_all_there_and_not_augmented(loader):
    batches = loader.test_batches()
    images = torch.cat([images for images, _ in batches])
    torch.testing.assert_close(images, normalize(loader.test_set.images, loader.mean, loader.std))
    assert len(batches.targets) == 500 and batches.source == "test set"
    torch.testing.assert_close(torch.cat([target for _, target in batches]), batches.targets)


def test_distributions(loader):
    distributions = loader.test_distributions()
    targets = loader.test_set.targets.numpy()
    assert list(distributions)[0] == "forward50" and list(distributions)[-1] == "backward50"
    counts = np.bincount(targets[distributions["backward50"]], minlength=10)
    assert counts[0] == 1 and counts[-1] == 50 and (np.diff(counts) >= 0).all()
    assert all(len(set(rows)) == len(rows) for rows in distributions.values())


def test_two_views(loader):
    rows = np.array([3, 499, 250])
    ((first, second),) = loader.two_view_batches(rows, draw=0)
    assert first.shape == second.shape == (3, 3, 16, 16)
    assert not torch.equal(first, second)
    ((again, _),) = loader.two_view_batches(np.arange(500)[[250, 3]], draw=0)
    torch.testing.assert_close(again, first[[2, 0]], rtol=0, atol=1e-5)
    ((other, _),) = loader.two_view_batches(rows, draw=1)
    assert not torch.equal(other, first)


def test_bad_values(tmp_path):
    with pytest.raises(UserError, match="batch_size must be at least 1, not 0"):
        ImbalanceDigitsDataLoader(batch_size=0)
    with pytest.raises(ValueError, match="imb_factor"):
        ImbalanceDigitsDataLoader(batch_size=8, imb_factor=2)
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"not CIFAR")
    loader = ImbalanceCIFAR100DataLoader(str(tmp_path), 8)
    with pytest.raises(UserError, match="does not hold the official CIFAR100 files"):
        next(iter(loader))
    assert (tmp_path / "cifar-100-python" / "train").read_bytes() == b"not CIFAR"
