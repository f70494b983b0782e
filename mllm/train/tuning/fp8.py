"""Frozen linear layers of the LLM multiply in 8-bit floats (e4m3; Micikevicius et al. 2022, arXiv 2209.05433).

Enters: a model in which it is chosen what trains, on its device. Leaves: the same model; where a gradient passes
through a frozen `Linear` of its LLM, the product and the gradient of its input are computed from 8-bit copies of the
weight, made once, and of the rows that meet it, each with its own scale. There is no third product, since a frozen
weight has no gradient. Weights, and whatever is asked without a gradient (held-out losses, a chat), stay as they are.

A Hopper GPU multiplies e4m3 nearly twice as fast as bfloat16: four layers of Qwen2.5's 7B, compiled, forward and
backward of 16K tokens on an H200, take 65 ms for 102 in bfloat16, of its 1.5B 19 for 24. On a CPU the same numbers are
multiplied in float32. What it does to the gradient is asked of each model, which may leave some of these products as
they are (`fp8_gate.py`).

M rows, K width of the input, N of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mllm.models.multimodal import MultimodalLM
from mllm.models.quantised import is_quantised
from mllm.train import engine
from mllm.train.tuning.compiling import llm_blocks

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mllm.train.settings import TrainConfig

LARGEST = 448.0
"""Of e4m3."""
LEAST = 1e-30
"""Of a scale: gradients of single numbers are as small as 1e-12, and a row of zeros needs one too."""
FIRST = (8, 9)
"""Compute capability of the first GPUs that multiply such numbers."""
MULTIPLE = 16
"""What cuBLAS asks of both sides of a matrix."""
Which = Callable[[str, int], tuple[bool, bool]]
"""A layer's name in the LLM and the number of its block -> are the product, and the gradient of its input, computed
with 8-bit floats?"""


def everything(name: str, block: int) -> tuple[bool, bool]:
    return True, True


def switch_on(accelerator: Accelerator, model: MultimodalLM, train: TrainConfig) -> None:
    """Where `train.fp8` asks for it.

    Raises:
        ValueError: the device cannot, the LLM trains, or is held in another way.
    """
    check(accelerator, model, train)
    restore(model)
    if train.fp8:
        model.to(accelerator.device)
        convert(model)


def check(accelerator: Accelerator, model: MultimodalLM, train: TrainConfig) -> None:
    """Stop where it is asked for and would not do what it says.

    Raises:
        ValueError: see `switch_on`.
    """
    if not train.fp8:
        return
    refuse_device(accelerator.device)
    if train.learning_rate.llm and not train.lora:
        raise ValueError(
            "train.fp8 multiplies frozen weights, and train.learning_rate.llm trains the LLM: leave one of them out, "
            "or add train.lora, whose base is frozen"
        )
    if is_quantised(model.llm):
        raise ValueError("train.fp8 beside model.quantisation: weights are held in one way, leave one of them out")
    if engine.shards_weights(accelerator):
        raise ValueError(
            "train.fp8 where weights are sharded (ZeRO stage 3, FSDP2): it keeps copies of whole weights; use ZeRO "
            "stage 2 or plain DDP"
        )
    if train.mixed_precision == "no" and model.llm.dtype == torch.float32:
        raise ValueError("train.fp8 where all is computed in float32: set train.mixed_precision to bf16")


def refuse_device(device: torch.device) -> None:
    """Stop on a device without such numbers.

    Raises:
        ValueError: says which there is, and which it takes.
    """
    if device.type != "cuda":
        raise ValueError(
            f"train.fp8 needs a GPU that multiplies 8-bit floats (H100, L40, RTX 40), and this is a {device.type}: "
            f"leave it out"
        )
    if (found := torch.cuda.get_device_capability(device)) < FIRST:
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"train.fp8 needs a GPU of compute capability {FIRST[0]}.{FIRST[1]} or more (H100, L40, RTX 40): {name} "
            f"has {found[0]}.{found[1]}; leave it out"
        )


def convert(model: MultimodalLM, which: Which = everything) -> int:
    """Frozen `Linear`s of the LLM, but its head, in place; the number of those that compute otherwise now. Below an
    adapter too."""
    if next(model.llm.parameters()).is_cuda:
        import mllm.train.kernels.rows_to_fp8  # noqa: F401  # makes torch.ops.mllm.rows_to_fp8

    found = {module: parts for module, parts in products(model, which).items() if any(parts)}
    for module, (forwards, backwards) in found.items():
        module.__class__ = FrozenFp8Linear
        weight = module.weight.detach()
        # not as buffers, which wrappers would send around and state dicts would hold
        module.forwards = quantise(weight) if forwards else None  # type: ignore[assignment]
        module.backwards = quantise(weight.t().contiguous()) if backwards else None  # type: ignore[assignment]
    return len(found)


def products(model: MultimodalLM, which: Which) -> dict[nn.Linear, tuple[bool, bool]]:
    """For each layer that could be converted what `which` says of it."""
    block_of = {layer: number for number, block in enumerate(llm_blocks(model.llm)) for layer in block.modules()}
    names = {module: name for name, module in model.llm.named_modules()}
    return {layer: which(names[layer], block_of.get(layer, 0)) for layer in chosen(model)}


def share(model: MultimodalLM, which: Which) -> float:
    """Of the operations of the LLM's frozen layers, forward and backward, those with 8-bit floats."""
    eight = sum(layer.weight.numel() * sum(parts) for layer, parts in products(model, which).items())
    return eight / max(1, 2 * sum(layer.weight.numel() for layer in frozen(model)))


def restore(model: MultimodalLM) -> None:
    """Undo what an earlier training in this process did: its copies may be of other weights by now."""
    for module in model.llm.modules():
        if type(module) is FrozenFp8Linear:
            del module.forwards, module.backwards
            module.__class__ = nn.Linear  # type: ignore[assignment]


def chosen(model: MultimodalLM) -> list[nn.Linear]:
    """The layers that can be converted."""
    return [layer for layer in frozen(model) if fits(layer.weight)]


def frozen(model: MultimodalLM) -> list[nn.Linear]:
    """Every frozen `Linear` of the LLM but its head."""
    head = model.llm.get_output_embeddings()
    found = [m for m in model.llm.modules() if type(m) in (nn.Linear, FrozenFp8Linear) and m is not head]
    return [module for module in found if not module.weight.requires_grad]


def bytes_of_copies(model: MultimodalLM) -> int:
    """What the 8-bit copies take, with their scales."""
    return sum(2 * layer.weight.numel() + 4 * sum(layer.weight.shape) for layer in chosen(model))


def fits(weight: Tensor) -> bool:
    return all(size % MULTIPLE == 0 for size in weight.shape)


class FrozenFp8Linear(nn.Linear):
    """A `Linear` with its weight [N, K], and one or both 8-bit forms of it."""

    forwards: tuple[Tensor, Tensor] | None
    """[N, K] e4m3, [N, 1]: a scale for each output. None: the product is of the weight as it is."""
    backwards: tuple[Tensor, Tensor] | None
    """[K, N] e4m3, [K, 1]: the transpose, a scale for each input. None: so is the gradient."""

    def forward(self, states: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        if not (torch.is_grad_enabled() and states.requires_grad):
            return linear(states, self.weight, self.bias)
        kind = states.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.dtype
        forwards, backwards = self.forwards or (self.weight, None), self.backwards or (self.weight.t(), None)
        out = FrozenProduct.apply(states.to(dtype), *forwards, *backwards)
        return out if self.bias is None else out + self.bias.to(dtype)


class FrozenProduct(torch.autograd.Function):
    """A product with a frozen matrix: one gradient, and nothing of the input is kept for it."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        transposed: Tensor,
        scale_of_transposed: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(transposed, scale_of_transposed)
        return product(states, weight, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return product(gradients[0], *ctx.saved_tensors), None, None, None, None


def product(states: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """[..., K] with e4m3 [N, K] and its scales [N, 1] -> [..., N], in the type of the states. Without scales the
    weight is as it is, and the product too."""
    if scale is None:
        return linear(states, weight.to(states.dtype))
    rows, row_scale = quantise(states.reshape(-1, states.shape[-1]))  # [M, K], [M, 1]
    if states.is_cuda:
        out = torch._scaled_mm(
            rows, weight.t(), row_scale, scale.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        ).to(states.dtype)
    else:
        out = ((rows.float() @ weight.float().t()) * row_scale * scale.t()).to(states.dtype)
    return out if states.ndim == 2 else out.view(*states.shape[:-1], len(weight))  # [..., N]


def quantise(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """[M, K] -> [M, K] e4m3 and the scale of each row [M, 1] float32, their product the matrix but for rounding."""
    if matrix.is_cuda:
        return torch.ops.mllm.rows_to_fp8(matrix.contiguous())  # type: ignore[no-any-return]
    scale = (matrix.abs().amax(-1, keepdim=True).float() / LARGEST).clamp(min=LEAST)
    return (matrix.float() / scale).to(torch.float8_e4m3fn), scale
