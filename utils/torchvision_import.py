"""The one place that imports torchvision, and late: it costs about two seconds and most jobs do without."""

import functools
import types

import torch

_libraries = []  # a torch.library.Library must stay alive for its operators to stay declared


@functools.cache
def torchvision() -> types.ModuleType:
    """The torchvision package, with `datasets`, `models` and `transforms` imported.

    A CPU build of torch beside a CUDA build of torchvision cannot load torchvision's compiled operators, and the
    import fails for want of two of their declarations. Only then are these declared here; datasets and transforms
    need no more.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        import torchvision
    import torchvision.datasets
    import torchvision.models
    import torchvision.transforms

    return torchvision
