"""RLEKF for any trainer: a prediction and a label in, one update out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlekf_ext.optim import RLEKF


class Stepper:
    """A training step in a call: from a prediction and its label to an update of `optimizer` (Algorithm 2 of the paper,
    lines 1 to 14).

    `backward` takes the gradient of a loss, by default `loss.backward()`; in PyTorch Lightning, pass
    `self.manual_backward`.
    """

    def __init__(self, optimizer: RLEKF, backward: Callable[[Tensor], None] = Tensor.backward):
        if not isinstance(optimizer, RLEKF):
            raise ValueError(f"Stepper needs an RLEKF but got: {type(optimizer).__name__}.")
        self.optimizer, self._backward = optimizer, backward

    def __call__(self, prediction: Tensor, label: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """One update from a prediction with its graph and a label of the same shape, both in the unit of the quantity
        measured (eV per atom, say). ε and H are multiplied by `scale`. Returns ε = mean |label - prediction|.

        Predict again before each call: the weights have moved. Several outputs in one unit are one prediction. Raises
        ValueError if the shapes differ.
        """
        label = torch.as_tensor(label, device=prediction.device)
        if prediction.shape != label.shape:
            raise ValueError(
                f"label should have the shape of the prediction {tuple(prediction.shape)} but has {tuple(label.shape)}."
            )
        error = (prediction - label).abs().mean()
        self.optimizer.zero_grad()

        def closure() -> Tensor:
            loss = scale * error
            self._backward(loss)
            return loss

        self.optimizer.step(closure)
        return error.detach()
