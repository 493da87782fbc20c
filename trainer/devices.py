"""Where a network runs: CPU, one GPU, several GPUs in one process, several processes."""

from collections.abc import Sequence

import torch
from torch import nn

from utils import distributed
from utils.errors import UserError
from utils.logger import get_logger


def choose_device(request: str | None, n_gpu: int = 1) -> tuple[torch.device, list[int]]:
    """The device of tensors, and the GPU numbers that share the work of this process.

    Args:
        request: "cpu", "cuda", "cuda:1", "mps", GPU numbers such as "0,1", or None for CUDA if present, else CPU.
        n_gpu: GPUs wanted where `request` does not list them.

    Raises:
        UserError: the device does not exist here, or the request cannot be read.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    request = request or ("cuda" if available else "cpu")
    if request.replace(",", "").isdigit():
        gpus = [int(number) for number in request.split(",") if number]
    elif request == "cuda":
        if 0 < available < n_gpu:
            get_logger().warning(f"n_gpu is {n_gpu}, and {available} GPU(s) are here: using {available}.")
        gpus = list(range(max(1, min(n_gpu, available))))
    else:
        try:
            device = torch.device(request)
        except RuntimeError:
            raise UserError(f'Unknown device "{request}": use cpu, cuda, cuda:1, or GPU numbers such as 0,1.') from None
        if device.type not in ("cpu", "cuda", "mps"):
            raise UserError(f'Device "{request}" is not supported: use cpu, cuda, mps, or GPU numbers such as 0,1.')
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise UserError("Device mps is not available here: leave -d out, or use -d cpu.")
        if device.type != "cuda":
            return distributed.start(device), []
        gpus = [device.index or 0]
    if max(gpus) >= available:
        raise UserError(f"GPU {max(gpus)} was asked for and {available} are here: leave -d out, or use -d cpu.")
    return distributed.start(torch.device("cuda", gpus[0])), [] if distributed.launched_by_torchrun() else gpus


def device_name(device: torch.device) -> str:
    """What a device is, for the record: "cuda:0 (NVIDIA H200)", "cpu (2 threads)"."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def compiled(network: nn.Module, device: torch.device) -> nn.Module:
    """The network through torch.compile.

    On one GPU with CUDA graphs, which start a small network's hundreds of kernels at once, where Python takes longer to
    start them than they take to run. They hold memory of their own for each shape of a batch, and the network's outputs
    are overwritten by its next call. Not with several processes, which exchange gradients in the backward pass.
    """
    graphs = device.type == "cuda" and distributed.world_size() == 1
    return torch.compile(network, dynamic=False, mode="reduce-overhead" if graphs else None)  # type: ignore[return-value]


def parallel(model: nn.Module, device: torch.device, gpus: Sequence[int]) -> nn.Module:
    """Wrap a network for the processes or GPUs that share its work; itself where it works alone."""
    if distributed.world_size() > 1:
        if not any(p.requires_grad for p in model.parameters()):
            return model
        return nn.parallel.DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)
    return nn.DataParallel(model, gpus) if len(gpus) > 1 else model
