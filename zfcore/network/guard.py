"""A model put into eval mode for an analysis, and given back as it was, also when several threads share it."""

from __future__ import annotations

import contextlib
import threading
import weakref

from torch import nn

_lock = threading.Lock()
_holds: weakref.WeakKeyDictionary[nn.Module, _Hold] = weakref.WeakKeyDictionary()


class _Hold:
    """How many calls hold the model in eval mode, and which of its modules were in training mode before the first."""

    def __init__(self, model: nn.Module):
        self.count = 0
        self.training = [module for module in model.modules() if module.training]


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """The model in eval mode. Each module's own mode comes back when the last call that holds the model ends.

    Only the training flags are touched: parameters, buffers, gradients, hooks and random state are not.
    """
    with _lock:
        hold = _holds.get(model)
        if hold is None:
            hold = _holds[model] = _Hold(model)
        hold.count += 1
        for module in hold.training:
            module.training = False  # not .eval(), which a model may override with more than this
    try:
        yield model
    finally:
        with _lock:
            hold.count -= 1
            if hold.count == 0:
                del _holds[model]
                for module in hold.training:
                    module.training = True
