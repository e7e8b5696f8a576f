"""A pool of training pairs, from which batches of mixed degradations are drawn."""

from typing import Any

import torch

from ..checks import is_integer


class PairPool:
    """
    Mixes the pairs of the last batches, so that the images of a batch do not share the settings that were drawn for a
    whole batch (the "training pair pool" of section 4.1 of [Real-ESRGAN](https://arxiv.org/abs/2107.10833)).

    The pool needs the memory of `num_batches` batches, on the device of the first one.

    Args:
        num_batches (`int`): Batches that the pool holds. With 0, [`~PairPool.exchange`] returns its arguments.

    Raises:
        ValueError: If `num_batches` is not an integer, or negative.
    """

    def __init__(self, num_batches: int):
        if not is_integer(num_batches) or num_batches < 0:
            raise ValueError(f"`num_batches` must be an integer greater than or equal to 0, got {num_batches!r}.")
        self.num_batches = int(num_batches)
        self.filled = 0  # batches
        self.tensors: list[torch.Tensor] = []

    @torch.no_grad()
    def exchange(self, *tensors: torch.Tensor, generator: torch.Generator | None = None) -> tuple[torch.Tensor, ...]:
        """
        Put a batch into the pool and take one out. Until the pool is full, the batch itself is returned. After that it
        replaces as many pairs, drawn at random without replacement, and those are returned.

        Args:
            *tensors (`torch.Tensor`):
                Aligned tensors `(batch, ...)`, such as HR and LR images; the same entry of each forms a pair. All
                calls need the same number, shapes and types.
            generator (`torch.Generator`, *optional*): Source of the random draw, on any device.

        Returns:
            `tuple[torch.Tensor]`: Aligned tensors of the same shapes.

        Raises:
            ValueError: If the tensors differ in batch size, or from those in the pool in number, shape or type.
        """
        if not tensors or any(tensor.ndim == 0 or len(tensor) != len(tensors[0]) for tensor in tensors):
            raise ValueError(
                f"`tensors` must have the same first dimension, got the shapes {[tuple(t.shape) for t in tensors]}."
            )
        if self.num_batches == 0:
            return tensors
        batch = len(tensors[0])
        if not self.tensors:
            self.tensors = [t.new_zeros(self.num_batches * batch, *t.shape[1:]) for t in tensors]
        expected = [((len(pool) // self.num_batches, *pool.shape[1:]), pool.dtype) for pool in self.tensors]
        if (given := [(tuple(t.shape), t.dtype) for t in tensors]) != expected:
            raise ValueError(
                f"`tensors` must have the shapes and types of the pool's first batch, {expected}, got {given}."
            )
        # A pool read from a checkpoint may be on another device.
        self.tensors = [pool.to(t.device) for pool, t in zip(self.tensors, tensors)]

        if self.filled < self.num_batches:
            for pool, tensor in zip(self.tensors, tensors):
                pool[self.filled * batch : (self.filled + 1) * batch] = tensor
            self.filled += 1
            return tensors

        # The first `batch` pairs of a shuffled pool; the others need not move.
        device = "cpu" if generator is None else generator.device
        places = torch.randperm(self.num_batches * batch, generator=generator, device=device)[:batch]
        taken = []
        for pool, tensor in zip(self.tensors, tensors):
            index = places.to(pool.device)
            taken.append(pool[index])
            pool[index] = tensor
        return tuple(taken)

    def state_dict(self) -> dict[str, Any]:
        """The pool's pairs and how many batches it holds. The tensors are not copied."""
        return {"num_batches": self.num_batches, "filled": self.filled, "tensors": list(self.tensors)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """
        Copy the state of another pool.

        Raises:
            ValueError: If that pool has another size.
        """
        if state_dict["num_batches"] != self.num_batches:
            raise ValueError(
                f"`state_dict` must be from a pool of {self.num_batches} batches, got one of"
                f" {state_dict['num_batches']}."
            )
        self.filled = state_dict["filled"]
        self.tensors = [tensor.clone() for tensor in state_dict["tensors"]]
