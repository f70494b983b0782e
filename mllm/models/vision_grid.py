"""How large a picture an encoder reads and how many patches it becomes, from config files alone.

Enters: the config of a vision model, and the side of the squares that its image processor makes. Leaves: a `Grid`,
so that the data side can plan before any weight is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

ANY_SIZE = ("dinov2", "dinov2_with_registers", "dinov3_vit", "siglip2_vision_model")
"""Architectures that take pictures of any size by themselves: positions are interpolated, or rotary."""


@dataclass(frozen=True)
class Grid:
    """Square pictures of square patches; a rest that fills no patch is not seen."""

    side: int
    """Pixels along a side of the picture."""
    patch: int
    """Pixels along a side of a patch."""

    @property
    def across(self) -> int:
        """Patches along a side."""
        return self.side // self.patch

    @property
    def num_patches(self) -> int:
        """P."""
        return self.across**2

    def __str__(self) -> str:
        return f"{self.across} x {self.across} patches of {self.patch} in {self.side} pixels"


def grid(config: Any, processor_side: int | None = None) -> Grid:
    """The grid of a vision model.

    The size is the config's. One that takes any size is run at the size of its image processor instead: DINOv2's
    configs say 518, where its positions were learned, and its image processors make 224.

    Raises:
        ValueError: the config speaks of no patches, or of pictures or patches that are not square.
    """
    if not hasattr(config, "patch_size"):
        raise ValueError(f"a {config.model_type} has no patches")
    patch = one_side(config, "patch_size")
    if takes_any_size(config) and processor_side:
        return Grid(processor_side, patch)
    if hasattr(config, "image_size"):
        return Grid(one_side(config, "image_size"), patch)
    return Grid(isqrt(config.num_patches) * patch, patch)  # SigLIP2 NaFlex


def takes_any_size(config: Any) -> bool:
    return config.model_type in ANY_SIZE


def one_side(config: Any, name: str) -> int:
    """A number that transformers also allows to be a pair."""
    value = getattr(config, name)
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise ValueError(f"a {config.model_type} with {name} {value}: only squares are supported")
    return int(sides.pop())


def vision_config(config: Any) -> Any:
    """The config of the vision half, for checkpoints that hold a text half too (CLIP, SigLIP)."""
    return getattr(config, "vision_config", config)


def common_grids(grids: list[Grid], any_size: list[bool]) -> list[Grid]:
    """The grids at which several encoders see the same patches: all as many across as the first one's.

    One that takes any size is given the size that makes it so; the others must agree as they are.

    Raises:
        ValueError: a grid cannot be made the first one's.
    """
    first, *rest = grids
    common = [first]
    for own, free in zip(rest, any_size[1:], strict=True):
        common.append(Grid(first.across * own.patch, own.patch) if free and own.across != first.across else own)
        if common[-1].across != first.across:
            raise ValueError(
                f"encoders with different grids cannot be joined patch by patch: {first}, but {own}. Choose encoders "
                f"with equal grids, or put the one of fixed size first (DINOv2, DINOv3 and SigLIP2 NaFlex follow it)"
            )
    return common
