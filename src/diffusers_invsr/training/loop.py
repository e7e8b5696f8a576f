"""Parts of a training loop: the update of a network, and the request to stop."""

import math
import signal
from types import FrameType

import torch
from accelerate import Accelerator


class StopRequest:
    """
    A context in which Ctrl-C and SIGTERM only set `received`, so that the loop can stop after its iteration. The next
    signal stops at once.
    """

    def __init__(self):
        self.received = False

    def __enter__(self) -> "StopRequest":
        self.previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None):
        self.received = True
        self.__exit__()


def clipped_step(
    accelerator: Accelerator,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None = None,
) -> float:
    r"""
    One update of a network, which is skipped if a gradient is not finite.

    Args:
        accelerator (`Accelerator`): The one that prepared the network and the optimizer.
        network (`torch.nn.Module`): The network, whose gradients are there.
        optimizer (`torch.optim.Optimizer`): Its optimizer. The gradients are set to zero afterwards.
        max_grad_norm (`float`, *optional*): Bound of the gradients' norm; by default there is none.

    Returns:
        `float`: The gradients' norm before clipping, the same in all processes; not finite if the step was skipped.
    """
    norm = accelerator.clip_grad_norm_(network.parameters(), math.inf if max_grad_norm is None else max_grad_norm)
    norm = float(norm)
    # The gradient scaler of float16 skips by itself, and must see the step to lower its scale. With DeepSpeed,
    # `backward` has done all of this already, skipping included: only the norm remains to be read.
    if math.isfinite(norm) or accelerator.scaler is not None:
        optimizer.step()
    optimizer.zero_grad()
    return norm
