"""Which device a request names: GPUs that are not here are made up."""

import pytest
import torch

from trainer import devices
from trainer.devices import choose_device
from utils.errors import UserError


@pytest.fixture
def gpus(monkeypatch):
    """Say how many GPUs there are."""

    def some(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(devices.distributed, "start", lambda device: device)

    return some


@pytest.mark.parametrize(
    ("count", "request_", "n_gpu", "device", "used"),
    [
        (0, None, 2, "cpu", []),
        (2, "cpu", 2, "cpu", []),
        (2, None, 1, "cuda:0", [0]),
        (2, None, 2, "cuda:0", [0, 1]),
        (2, None, 3, "cuda:0", [0, 1]),
        (2, "cuda:0", 2, "cuda:0", [0]),
        (2, "1", 1, "cuda:1", [1]),
        (4, "3,1", 1, "cuda:3", [3, 1]),
    ],
)
def test_the_device_and_its_gpus(gpus, capsys, count, request_, n_gpu, device, used):
    gpus(count)
    assert choose_device(request_, n_gpu) == (torch.device(device), used)
    assert capsys.readouterr().out == ("n_gpu is 3, and 2 GPU(s) are here: using 2.\n" if n_gpu == 3 else "")


@pytest.mark.parametrize(
    ("count", "request_", "message"),
    [
        (0, "cuda", "GPU 0 was asked for and 0 are here: leave -d out, or use -d cpu."),
        (2, "cuda:2", "GPU 2 was asked for and 2 are here"),
        (2, "0,2", "GPU 2 was asked for and 2 are here"),
        (2, "gpu", 'Unknown device "gpu"'),
        (2, "meta", 'Device "meta" is not supported'),
        (0, "mps", "Device mps is not available here"),
    ],
)
def test_what_is_not_here_is_refused(gpus, monkeypatch, count, request_, message):
    gpus(count)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError) as refused:
        choose_device(request_)
    assert message in str(refused.value)


def test_under_torchrun_each_process_has_its_own(gpus, monkeypatch):
    gpus(2)
    monkeypatch.setattr(devices.distributed, "launched_by_torchrun", lambda: True)
    assert choose_device(None, 2)[1] == []


def test_several_gpus_share_a_network_and_one_does_not(monkeypatch):
    network = torch.nn.Linear(1, 1)
    monkeypatch.setattr(torch.nn, "DataParallel", lambda module, gpus: (module, gpus))
    assert devices.parallel(network, torch.device("cpu"), []) is network
    assert devices.parallel(network, torch.device("cuda", 0), [0]) is network
    assert devices.parallel(network, torch.device("cuda", 0), [0, 1]) == (network, [0, 1])
