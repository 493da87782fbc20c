"""What an aggregator has learned as plain values, and back, checked on the way in."""

import math
from typing import Any

import torch
from torch import Tensor


def finite_or_none(value: float) -> float | None:
    """A number for JSON, which has none that is not finite."""
    return value if math.isfinite(value) else None


def copied(value: Any) -> Any:
    """A copy that later learning does not change, its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    return type(value)(map(copied, value)) if isinstance(value, list | tuple) else value


def fitting(name: str, value: Any, fresh: Any) -> Any:
    """A copy of `value`, if it is of the kind of `fresh`: the same containers, shapes and types.

    A tensor without rows in `fresh` may have any number of them, in a tuple all the same; a list holds any count of
    numbers; None may be a sentence.

    Raises:
        ValueError: it is not.
    """
    if isinstance(fresh, Tensor):
        any_rows = int(fresh.ndim > 0 and not len(fresh))
        shaped = isinstance(value, Tensor) and (value.ndim, value.shape[any_rows:]) == (
            fresh.ndim,
            fresh.shape[any_rows:],
        )
        if shaped and torch.isfinite(value).all():
            return value.to(fresh, copy=True)
    elif isinstance(fresh, dict):
        if isinstance(value, dict) and value.keys() == fresh.keys():
            return {key: fitting(key, value[key], part) for key, part in fresh.items()}
    elif isinstance(fresh, tuple):
        if isinstance(value, tuple) and len(value) == len(fresh) and len({len(part) for part in value}) == 1:
            return tuple(fitting(name, part, one) for part, one in zip(value, fresh, strict=True))
    elif isinstance(fresh, list):
        if isinstance(value, list):
            return [fitting(name, part, 0.0) for part in value]
    elif isinstance(fresh, float):
        if type(value) in (int, float) and not math.isnan(value):
            return float(value)
    elif isinstance(value, str | None):
        return value
    raise ValueError(f'"{name}" in the state is not that of this kind of aggregator')
