"""Adam for dictionaries so large that their gradient would not fit beside them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT

from lightning_sae.checks import UsageError
from lightning_sae.parallel.share import add_shards, local
from lightning_sae.sparse import gradient_parts, keep_in_parts, rows_at_a_time


class ChunkedAdam(torch.optim.Adam):
    """Adam that forms the gradient of a dictionary some rows at a time, steps, and forgets it.

    It makes the steps of `torch.optim.Adam(fused=True)`, up to rounding, and has the same state in
    checkpoints, but a dictionary's gradient, as large as its weights, is never in memory. For the
    parameters of one `SparseAutoencoder`, on one device or shared out over several; others are
    stepped as Adam steps them. From then on, in a plain loop, that SAE is for this optimizer. It
    takes no `GradScaler`.

    Args:
        params: Parameters, or groups of them. Matrices among them leave their gradient in parts.
        lr: Learning rate.
        betas: Decay of the running averages of gradients and of their squares.
        eps: Added to the denominator.
        weight_decay: L2 penalty.
    """

    _scale: Tensor | float = 1.0  # of the gradient, once it is clipped

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, fused=True)
        for parameter, _ in self._parameters():
            if parameter.dim() == 2:
                keep_in_parts(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step, a thousand rows at a time where the gradient is in parts.

        Raises:
            ValueError: If a `GradScaler` steps it.
        """
        if getattr(self, "found_inf", None) is not None:
            raise UsageError("ChunkedAdam takes no GradScaler, which cannot see gradients in parts")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter, group in self._parameters():
            for rows, gradient in self._gradients(parameter):
                state = self._state_of(parameter)
                if rows.start:
                    state["step"] -= 1  # one step, however many chunks
                self._update(local(parameter)[rows], gradient * self._scale, state, rows, group)
        self._scale = 1.0
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, those in parts too."""
        super().zero_grad(set_to_none)
        for parameter, _ in self._parameters():
            parts = gradient_parts(parameter)
            if parts:
                parts.clear()

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale all gradients, in the next step, so that their norm is at most `max_norm`.

        Returns:
            The norm that they had together, 0-d.
        """
        squares = []
        for parameter, _ in self._parameters():
            chunks = [gradient.square().sum() for _, gradient in self._gradients(parameter)]
            if chunks:
                squares.append(add_shards(torch.stack(chunks), parameter))
        norm = torch.cat(squares).sum().sqrt() if squares else torch.zeros(())
        self._scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as `clip_grad_norm_` does
        return norm

    def _parameters(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                yield parameter, group

    @staticmethod
    def _gradients(parameter: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the gradient of a parameter, if it has one, in chunks of rows."""
        parts = gradient_parts(parameter)
        whole = None if parameter.grad is None else local(parameter.grad)
        if not parts:
            if whole is not None:
                yield slice(0, None), whole
            return
        features, step = len(local(parameter)), rows_at_a_time(parameter)
        for start in range(0, features, step):
            end = min(start + step, features)
            gradient = parts[0].rows(start, end)
            for part in parts[1:]:
                gradient += part.rows(start, end)
            if whole is not None:
                gradient += whole[start:end]
            yield slice(start, end), gradient.to(parameter.dtype)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    @staticmethod
    def _update(
        parameter: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        rows: slice,
        group: dict[str, Any],
    ) -> None:
        beta1, beta2 = group["betas"]
        adam(
            [parameter],
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
