"""What a training step costs, counted: numbers that are the same on every machine, however busy it is.

Enters: a function that does a step, or a part of one. Leaves: floating-point operations, bytes kept for the backward
pass, rows of the largest tensor as wide as the vocabulary, calls of Python. The benchmark prints them, the tests hold
their bounds.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

Step = Callable[[], Any]
ATTENTION = ("bmm", "baddbmm")
"""Products that only attention makes, where it is computed as plain products."""


def flops(step: Step, attention: bool = True) -> float:
    """Operations of all matrix products, forward and backward; without those of attention if wanted. Attention runs as
    plain products, which torch's counter knows on every device: of whole rows, masked pairs among them."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    of_all = counter.get_flop_counts()["Global"]
    return float(sum(n for name, n in of_all.items() if attention or not str(name).endswith(ATTENTION)))


class Held:
    """A tensor that waits for the backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def bytes_for_backward(forward: Step, weights: nn.Module) -> int:
    """Bytes that wait for the backward pass when `forward` is done, each storage once, weights not among them."""
    waiting: weakref.WeakSet[Held] = weakref.WeakSet()

    def keep(tensor: Tensor) -> Held:
        waiting.add(held := Held(tensor))
        return held

    own = {storage(weight) for weight in weights.parameters()}
    with saved_tensors_hooks(keep, lambda held: held.tensor):
        result = forward()  # what it gives back holds all that waits
    sizes = {storage(held.tensor): held.tensor.untyped_storage().nbytes() for held in waiting}
    del result
    return sum(size for place, size in sizes.items() if place not in own)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def rows_of_words(step: Step, words: int, weights: nn.Module) -> int:
    """Rows of the largest tensor [..., vocabulary] that exists in the step; 0 if there is none. Weights and their
    gradients, which are [vocabulary, D] or that turned round, do not count."""
    width = {weight.numel() // words for weight in weights.parameters() if words in weight.shape}
    with Widest(words, width) as widest:
        step()
    return widest.rows


class Widest(TorchDispatchMode):
    """Looks at every tensor that an operation makes."""

    def __init__(self, words: int, but: set[int]) -> None:
        super().__init__()
        self.words, self.but, self.rows = words, but, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for made in tree_iter(out):
            if isinstance(made, Tensor) and made.ndim > 1 and made.shape[-1] == self.words:
                rows = made.numel() // self.words
                self.rows = max(self.rows, 0 if rows in self.but else rows)
        return out


def traffic(step: Step) -> Traffic:
    """The operations of a step, forward and backward, that compute something, and the bytes that pass through them."""
    with Traffic() as counted:
        step()
    return counted


class Traffic(TorchDispatchMode):
    """Counts operations but views, and the bytes that they are given and give back."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            moved = [each for each in tree_iter((args, kwargs, out)) if isinstance(each, Tensor)]
            self.operations += 1
            self.bytes += sum(each.numel() * each.element_size() for each in moved)
        return out


def outside(step: Step, model: nn.Module) -> dict[str, int]:
    """Calls of Python functions and operations of torch in a step, but for what happens while `model` computes."""
    with Outside(model) as counted:
        step()
    return {"python_calls": counted.calls, "operations": counted.operations}


class Outside(TorchDispatchMode):
    """Counts until the model begins, and goes on when it is done."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls, self.operations, self.depth = model, 0, 0, 0

    def __enter__(self) -> Any:
        self.hooks = [
            self.model.register_forward_pre_hook(lambda *_: self.move(1)),
            self.model.register_forward_hook(lambda *_: self.move(-1)),
        ]
        entered = super().__enter__()
        sys.setprofile(self.called)
        return entered

    def __exit__(self, *error: Any) -> None:
        sys.setprofile(None)
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)

    def move(self, by: int) -> None:
        self.depth += by

    def called(self, frame: Any, event: str, argument: Any) -> None:
        if event == "call" and not self.depth and frame.f_code.co_filename != __file__:
            self.calls += 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.depth:
            self.operations += 1
        with quiet():
            return function(*args, **(kwargs or {}))


@contextmanager
def quiet() -> Iterator[None]:
    """What the counting itself calls is not counted."""
    was = sys.getprofile()
    sys.setprofile(None)
    try:
        yield
    finally:
        sys.setprofile(was)
