"""Every reach of fusekit into what transformers keeps to itself. Checked against transformers 5.16 and 5.23.

`USED` lists the names; a test fails by name when one of them moves.
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer

USED = ("transformers.Trainer._get_grad_norm",)


class TrainerWithGradients(Trainer):
    """A Trainer that shows the norm of its gradients before the optimizer steps: callbacks are not told of it."""

    def check_gradients(self, model: Any, norm: Any) -> None:
        """Called by each process before a step. norm: over all processes, before clipping; DeepSpeed may have None."""
        raise NotImplementedError

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.check_gradients(model, norm)
        return norm
