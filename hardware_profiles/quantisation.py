"""How a stack's linear layers quantise what they multiply: ``quantisation`` of its YAML."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hardware_profiles.sourced import Profile
from hardware_profiles.stack_words import by_prefix

Scaling = Literal["delayed", "tensor", "blocks"]
"""Where an 8-bit operand's scales come from: largest values of earlier steps; its own largest
value, which takes a pass before; or those of its blocks, of rows and of columns apart."""


class QuantisationSpec(Profile):
    """Linear layers that quantise their own part of an operand and gather that (Transformer
    Engine); norms in front of them write in 8 bits where scales are known before."""

    scaling: dict[str, Scaling]
    """By device name prefix, and ``default``."""
    either_way: tuple[str, ...] = ()
    """Prefixes of the devices whose 8-bit products reduce over rows or columns of an operand with
    one scale: it needs no transposed copy."""
    unpipelined: tuple[Literal["fp8", "nvfp4"], ...] = ()
    """Precisions whose products run in no pipeline with gathers and scatters, where the stack has
    one otherwise, and which need no buffers for it."""
    source: Annotated[str, Field(min_length=1)]

    def scaling_on(self, device: str) -> Scaling:
        """Whose scales 8-bit operands have on a device."""
        return by_prefix(self.scaling, device)

    def pipelines(self, precision: str) -> bool:
        """Whether products of a precision run in a pipeline with gathers and scatters."""
        return precision not in self.unpipelined

    def transposes_on(self, device: str) -> bool:
        """Whether operands with one scale need a transposed copy for the backward's products."""
        return not any(device.startswith(prefix) for prefix in self.either_way)
