"""Which features of which tokens a result hangs on, by its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sae.checks import UsageError, require_positive
from lightning_sae.core import Autoencoder
from lightning_sae.interventions.positions import Positions, Run
from lightning_sae.matches import Matches
from lightning_sae.residual_stream import ResidualStream

__all__ = ["Attribution", "attribute"]


@dataclass(frozen=True)
class Attribution:
    """What each feature of each token contributes to a metric, to first order.

    Attributes:
        matches: Tokens and features that fire, and their values: `matches.token` counts through all
            contexts, `context * length + position`. Of shape (contexts * length, n_features).
        of_matches: What each of them contributes, in the units of the metric, (matches,).
        of_error: What the part of each activation contributes that no feature explains,
            (contexts, length).
    """

    matches: Matches
    of_matches: Tensor
    of_error: Tensor

    @property
    def context(self) -> Tensor:
        """The context of each match, int64, (matches,)."""
        return self.matches.token // self.of_error.shape[1]

    @property
    def position(self) -> Tensor:
        """The position of each match in its context, int64, (matches,)."""
        return self.matches.token % self.of_error.shape[1]

    def of_features(self) -> Tensor:
        """Return what each feature contributes on all tokens together, (n_features,)."""
        totals = self.of_matches.new_zeros(self.matches.shape[1])
        return totals.index_add_(0, self.matches.feature, self.of_matches)


def attribute(
    stream: ResidualStream,
    sae: Autoencoder,
    input_ids: Tensor,
    metric: Callable[[Tensor], Tensor],
    *,
    attention_mask: Tensor | None = None,
    where: Tensor | None = None,
    steps: int = 1,
) -> Attribution:
    r"""Return what each feature of each token contributes to a metric of the model's output.

    With x the activation of a token, which is its reconstruction and an error, and z the code of a
    feature that fires on it, it is :math:`z \, \partial m / \partial z`: what ablating it would
    take from the metric m, if m were a linear function of x. (Its factor `scales` is left as it is,
    as an ablation leaves it.) Contributions of all features and errors then add up to what the
    metric is more than with the SAE's origin alone, the reconstruction of a token without features.

    Memory grows with the matches: no tensor of tokens x features is made.

    Args:
        stream: The layer of a model on which the SAE was trained.
        sae: As `splice` takes it.
        input_ids: Token ids, (contexts, length), or pixels, (images, 3, height, width).
        metric: Makes a number of the logits, (contexts, length, vocabulary): a difference of two of
            them, say, ``lambda logits: logits[0, -1, yes] - logits[0, -1, no]``, or a loss. A sum
            over contexts gives what each context's features contribute to its own.
        attention_mask: 1 for a token, 0 for padding, (contexts, length). None: no padding.
        where: Which tokens to look at, as `splice` takes it.
        steps: Where gradients are taken. 1: at the activations as they are. More: at so many points
            of the way from the origin alone to them (integrated gradients, Sundararajan et al.
            2017, arXiv 1703.01365), of which the mean counts. What adds up then does so for any
            metric, the better the more of them; each is a run of the model.

    Raises:
        UsageError: If `where` is no such mask, `steps` is not positive, or the metric is not one
            number that depends on the logits.
    """
    require_positive(steps=steps)
    given = {"input_ids" if input_ids.dim() == 2 else "pixel_values": input_ids}
    given |= {} if attention_mask is None else {"attention_mask": attention_mask}
    with torch.inference_mode(mode=False), torch.no_grad():
        states = stream.read(input_ids, attention_mask)
        here = Positions.of(stream, sae, where).among(states, Run(given))
        x = states[here].to(sae.decoder.weight.device)  # (tokens, d_model)
        scaled, scales, matches = sae.scaled(x), sae.scales(x), sae.match(x)
        origin = sae.decoder.bias.to(scaled) / scales

        def gradient(share: float) -> Tensor:
            leaf = (x.to(scaled) if share == 1 else origin.lerp(scaled / scales, share)).detach()
            with torch.enable_grad():
                leaf.requires_grad_()

                def put(old: Tensor) -> Tensor:  # what it is of tokens that are not looked at
                    return states.to(old).index_put((here,), leaf.to(old))

                logits = stream.replace(input_ids, put, attention_mask, states=states)
                value = metric(logits)
                if value.numel() != 1 or not value.requires_grad:
                    raise UsageError(
                        f"metric of shape {tuple(value.shape)}: it must be one number that depends "
                        "on the logits"
                    )
                (found,) = torch.autograd.grad(value, leaf)
            return found

        points = [1.0] if steps == 1 else [(step + 0.5) / steps for step in range(steps)]
        to_scaled = sum(gradient(share) for share in points) / steps / scales
        error = scaled - sae.reconstruct(matches)
        of_error = states.new_zeros(here.shape, dtype=scaled.dtype)
        of_error[here] = (error * to_scaled).sum(1).to(of_error)
        spots = here.flatten().nonzero().squeeze(1).to(x.device)
        of_matches = matches.value * sae.along_directions(to_scaled, matches)
        shape = (here.numel(), sae.n_features)
        placed = Matches(spots[matches.token], matches.feature, matches.value, shape)
    return Attribution(placed, of_matches, of_error)
