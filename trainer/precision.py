"""The number format that a network trains in, as a config and the processor have it."""

import torch
from torch import Tensor, nn

from utils import distributed
from utils.logger import get_logger

#: Precision -> what torch.autocast casts to; fp32 trains without autocast.
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

AMPERE = (8, 0)  # the first compute capability with bf16 tensor cores


def has_amx() -> bool:
    """Whether this processor multiplies bf16 matrices in AMX tiles; torch (2.11 to 2.13) has no public name for it."""
    try:
        return bool(torch.cpu._is_amx_tile_supported())
    except (AttributeError, RuntimeError):  # another torch, or one that was built for another kind of processor
        return False


def automatic_precision(device: torch.device) -> tuple[str, str]:
    """What "auto" means on a device, "bf16" or "fp32", and why, in words."""
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        name = f"compute capability {capability[0]}.{capability[1]}"
        return ("bf16", f"{name} has it") if capability >= AMPERE else ("fp32", f"bf16 needs 8.0, this is {name}")
    if device.type == "cpu":
        return ("bf16", "the CPU has AMX") if has_amx() else ("fp32", "the CPU has no AMX, which bf16 needs")
    return "fp32", f"bf16 is not chosen on {device.type}"


def choose_precision(asked: str, device: torch.device, before: str | None = None) -> str:
    """The precision to train in, the same in all processes; the log says what "auto" has become, and why.

    A run that goes on keeps the precision it has been trained in, on another kind of machine, too: its loss curve and
    its results stay those of one precision. Only a precision asked for by name changes it.

    Args:
        asked: "auto", "fp32", "bf16" or "fp16".
        device: of the network.
        before: where a run goes on, its precision so far.
    """
    logger = get_logger()
    chosen = asked
    if asked == "auto":
        automatic, why = distributed.from_first_process(automatic_precision(device))
        chosen = before or automatic
        if chosen == automatic:
            logger.info(f"Precision: {chosen} ({why}{'; as so far' if before else ''}).")
        else:
            logger.warning(
                f"Precision: {chosen}, as this run was trained so far; a new one would take {automatic} here ({why}). "
                f"--precision {automatic} changes it."
            )
    if chosen == "bf16" and device.type == "cpu" and not has_amx():
        logger.warning("bf16 on a CPU without AMX is slower than fp32: --precision auto or fp32 is meant for it.")
    return chosen


class MixedPrecision(nn.Module):
    """Runs a network under autocast and gives its output in float32; the loss is computed outside of autocast.

    Autocast's precision belongs to a thread, and DataParallel starts threads: it is set where the network runs.
    """

    def __init__(self, network: nn.Module, device_type: str, precision: str):
        super().__init__()
        self.network = network
        self.device_type = device_type
        self.dtype = AUTOCAST.get(precision)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None):
            output = self.network(images)
        return {name: tensor.float() for name, tensor in output.items()}
