"""What linears that compute with codes have in common: to everything but their arithmetic they are a dense linear."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn


class CodedLinear(nn.Module):
    """A linear whose weight is held as codes."""

    bias: Tensor | None

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The decoded weight, as the dense module would hold it."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """A model of these is saved as the dense model it stands for."""
        destination[f"{prefix}weight"] = self.weight
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()
