"""Adam for dictionaries so large that their gradient would not fit beside them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT

from lightning_sae.checks import UsageError
from lightning_sae.parallel import local
from lightning_sae.sparse import RowGradient

__all__ = ["ChunkedAdam", "require_all_tokens"]


class ChunkedAdam(torch.optim.Adam):
    """Adam that forms the gradient of a dictionary some rows at a time, steps, and forgets it.

    It makes the steps of `torch.optim.Adam(fused=True)`, up to rounding, and has the same state in
    checkpoints. Where gradients come in parts, as `SparseAutoencoder.leave_gradients_in_parts` has
    them come (a Trainer asks for it by itself), it makes none that is as large as the weights; all
    others are stepped by as Adam steps. It takes no `GradScaler`, which leaves to fused optimizers
    the work of scaling back. Clipping by norm leaves gradients in parts, by value forms them.

    Args:
        params: Parameters, or groups of them, on one device or with features shared out.
        lr: Learning rate.
        betas: Decay of the running averages of gradients and of their squares.
        eps: Added to the denominator.
        weight_decay: L2 penalty.

    Example:
        >>> from lightning_sae import TopKSAE
        >>> sae = TopKSAE(d_model=8, n_features=64, k=2)
        >>> sae.leave_gradients_in_parts()  # in a plain loop
        >>> optimizer = ChunkedAdam(sae.parameters(), lr=1e-3)
        >>> sae.loss(torch.randn(16, 8))[0].backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step, a thousand rows at a time where the gradient is in parts.

        Raises:
            ValueError: If a `GradScaler` steps it.
        """
        if getattr(self, "found_inf", None) is not None:
            raise UsageError("ChunkedAdam takes no GradScaler: it does not scale gradients back")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, local(parameter.grad), group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        if not (isinstance(gradient, RowGradient) and gradient.in_parts):
            _step_rows(parameter, gradient, state, slice(None), group)
            return
        for rows, some in gradient.chunks():
            if rows.start:
                state["step"] -= 1  # one step, however many chunks
            _step_rows(parameter, some, state, rows, group)


def require_all_tokens(trainer: Any, devices: int) -> None:
    """Refuse what would form gradients, data parallelism, and what scales them.

    Args:
        trainer: Lightning's.
        devices: How many share out the features.

    Raises:
        ValueError: If the trainer has more devices, or scales gradients.
    """
    if trainer.world_size > devices or trainer.precision == "16-mixed":
        raise UsageError(
            "optimizer=ChunkedAdam is for one device, or data_parallel_size=1, and no 16-mixed "
            f"precision, not for devices={trainer.world_size}, precision={trainer.precision}: use "
            "torch.optim.Adam"
        )


def _step_rows(
    parameter: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    rows: slice,
    group: dict[str, Any],
) -> None:
    beta1, beta2 = group["betas"]
    adam(
        [local(parameter)[rows]],
        [gradient],
        [local(state["exp_avg"])[rows]],
        [local(state["exp_avg_sq"])[rows]],
        [],
        [state["step"]],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
