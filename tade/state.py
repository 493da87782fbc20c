"""What an aggregator has learned as plain values, and back, checked on the way in."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def put_aside(value: Any) -> Any:
    """A copy of a tensor that later learning does not change; other values as they are."""
    return value.detach().cpu().clone() if isinstance(value, Tensor) else value


def check_names(state: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise ValueError unless a state has these entries and no others."""
    if not isinstance(state, Mapping) or state.keys() != set(names):
        raise ValueError("the state is not one of this kind of aggregator")


def taken_up(name: str, value: Any, fresh: Any) -> Any:
    """A value of a state, if it is of the kind of the one that a fresh aggregator has: a tensor of its shape, a number,
    a string where that is None.

    Raises:
        ValueError: it is not.
    """
    if isinstance(fresh, Tensor):
        if not isinstance(value, Tensor) or value.shape != fresh.shape or not torch.isfinite(value).all():
            raise ValueError(f'"{name}" in the state must be finite numbers {list(fresh.shape)}')
        return value.to(fresh, copy=True)
    if isinstance(fresh, float):
        if type(value) not in (int, float) or math.isnan(value):
            raise ValueError(f'"{name}" in the state must be a number')
        return float(value)
    if not isinstance(value, str | None):
        raise ValueError(f'"{name}" in the state must be a sentence or None')
    return value
