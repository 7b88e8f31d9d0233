"""What a model does to the product of hidden states and output head before it calls the result logits.

`LogitMap` is a scale and a soft cap, `logit_map` reads them from a model's config: ``final_logit_softcapping`` (Gemma),
``logits_scaling`` (Granite, a divisor) and ``logit_scale`` (Cohere, a factor). A loss that leaves them out trains
another distribution than the one that the model will give. Knows nothing of losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compress.errors import ModelError
from compress.model.layers import output_head
from compress.model.shapes import SUPPORTED


@dataclass(frozen=True, slots=True)
class LogitMap:
    """logits = cap * tanh(scale * product / cap); without a cap scale * product alone."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        """Logits (n, V) of ``product`` (n, V), which may be overwritten."""
        if self.scale != 1.0:
            product = product.mul_(self.scale)
        return product if self.cap is None else product.div_(self.cap).tanh_().mul_(self.cap)

    def back(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Gradient by the product from ``grad``, that by the ``logits``; ``grad`` may be overwritten."""
        if self.cap is not None:
            grad = grad.sub_(grad * (logits / self.cap).square_())
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


IDENTITY = LogitMap()


def logit_map(model: nn.Module) -> LogitMap:
    """The map of ``model``, from its config.

    Raises:
        ModelError: the head has a bias or the config a scale of 0 or below, which no loss here accounts for.
    """
    if type(model).__name__ in SUPPORTED:
        return IDENTITY  # these classes ignore such keys
    config: Any = getattr(model, "config", None)
    factor, divisor = (getattr(config, name, None) for name in ("logit_scale", "logits_scaling"))
    cap = getattr(config, "final_logit_softcapping", None)
    for name, value in (("logit_scale", factor), ("logits_scaling", divisor), ("final_logit_softcapping", cap)):
        if value is not None and not value > 0:
            raise ModelError("config.json", f"{name} is {value!r}", "a number above 0, or none")
    if getattr(output_head(model), "bias", None) is not None:
        raise ModelError(type(model).__name__, "its output head has a bias", "a head without one")
    scale = (1.0 if factor is None else float(factor)) / (1.0 if divisor is None else float(divisor))
    return LogitMap(scale, None if cap is None else float(cap))
