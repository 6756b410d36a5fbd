"""Resampling of dead features: Bricken et al. 2023,
https://transformer-circuits.pub/2023/monosemantic-features, "Neuron Resampling".
"""  # noqa: D205 - the link is the summary's end

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer

from lightning_sae.callbacks.find_sae import find_saes
from lightning_sae.callbacks.weighted_sample import WeightedSample
from lightning_sae.checks import UsageError, require_positive
from lightning_sae.data.batches import activations_in
from lightning_sae.parallel import Ranks, local, ranks_of, wide_rows
from lightning_sae.part import part_of
from lightning_sae.sae import SparseAutoencoder

ENCODER_NORM = 0.2  # of a new feature, relative to the mean of those alive (the source's)
_OF_FEATURES = {
    "decoder.weight",
    "encoder.weight",
    "encoder.bias",
    "history.tokens_since_fired",
    "history.density",
}
_OF_DIMENSIONS = {"decoder.bias", "input_mean"}  # as long as those if n_features is d_model


class ResampleDeadFeatures(Callback):
    """Gives dead features a new start in the direction of inputs that are reconstructed badly.

    At set times each feature that has not fired for the module's `dead_after_tokens` takes the
    direction of an input, drawn with odds in proportion to the square of its reconstruction loss:
    in the decoder at unit norm, in the encoder at 0.2 times the mean norm of features alive. Its
    encoder bias and the optimizer's moments become zero, and it counts as just having fired.

    Two things differ from the source. It reads inputs for this alone and takes their losses all at
    once; here inputs are drawn as they pass in the batches before, so that a loss may be up to
    `sample_tokens` old. And it may draw an input twice; here none is, as two features that start
    alike would stay alike.

    What is drawn depends on `tokens_seen` and the inputs alone, is equal on every rank, and is kept
    in checkpoints, so that a resumed run goes on as if it had not stopped. While inputs are being
    drawn, memory holds as many of them as there are features, and a step takes another forward
    pass. Architectures that keep more of a feature than its directions and bias are refused, unless
    they name these parameters in `renewable` and let them start anew in `renew_features`, as
    `GatedSAE` does. Where features compete for a budget, new ones seldom win at first: AuxK revives
    more of them.

    Args:
        every_tokens: Tokens between resamplings, over all ranks. Default: twice the module's
            `dead_after_tokens`, as in the source: 25,000 and 12,500 steps of 8,192 tokens.
        times: How often to resample; later in training features are left to settle.
        sample_tokens: The last tokens before each resampling from which inputs are drawn; all since
            the previous one if there are fewer.

    Raises:
        ValueError: If an argument is not positive.
    """

    def __init__(
        self,
        every_tokens: int | None = None,
        *,
        times: int = 4,
        sample_tokens: int = 819_200,
    ) -> None:
        require_positive(times=times, sample_tokens=sample_tokens)
        if every_tokens is not None:
            require_positive(every_tokens=every_tokens)
        self.every_tokens = every_tokens
        self.times = times
        self.sample_tokens = sample_tokens
        self._samples = defaultdict[str, WeightedSample](WeightedSample)  # of each SAE, by its name
        self._saes: list[Any] = []
        self._step = 0
        self._tokens: dict[str, int] = {}  # of each, when the optimizer stepped last

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check that there is an SAE, and that it can be resampled.

        Raises:
            UsageError: If it keeps something of each feature that would be the old feature's.
        """
        self._saes = find_saes(pl_module, "history", "decoder", "ordinary", of=self)
        for sae in self._saes:
            _require_no_more(sae)
            _ = self._samples[part_of(sae).name]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take up where the module stands."""
        self._step = trainer.global_step
        self._tokens = {part_of(sae).name: int(sae.tokens_seen) for sae in self._saes}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw inputs from the batch, or resample, when it is time to."""
        # Where gradients are being accumulated, they belong to the features as they are.
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        for sae in self._saes:
            self._draw_or_renew(sae, part_of(sae).of(activations_in(batch)), trainer, stepped)

    def _draw_or_renew(self, sae: Any, x: Tensor, trainer: pl.Trainer, stepped: bool) -> None:
        name = part_of(sae).name
        every = self.every_tokens or 2 * sae.history.dead_after_tokens
        due = (self._tokens.get(name, 0) // every + 1) * every
        if due > self.times * every:
            return
        tokens = sae.history.seen
        if tokens > due - self.sample_tokens:
            self._draw(sae, x, ranks_of(trainer))
        if not stepped:
            return
        self._tokens[name] = tokens
        if tokens >= due:
            dead = sae.history.dead().nonzero().squeeze(1)
            inputs = self._samples[name].rows[: len(dead)]
            renew(sae, dead[: len(inputs)], inputs, trainer.optimizers)
            self._samples[name] = WeightedSample()
            which = f"{len(inputs)} of {len(dead)} dead features{name and f' of {name}'}"
            rank_zero_info(f"{tokens} tokens: {which} resampled")

    @torch.no_grad()
    def _draw(self, module: SparseAutoencoder, x: Tensor, ranks: Ranks) -> None:
        x = module.ordinary(x.reshape(-1, x.shape[-1]))
        scaled = module.scaled(x)
        error = scaled - module.reconstruct(module.match(x))
        self._samples[part_of(module).name].add(
            scaled,
            error.square().mean(1).square(),
            size=module.n_features,
            seed=module.history.seen,
            ranks=ranks,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the inputs drawn so far, which are equal on every rank."""
        found = {
            name: {"keys": each.keys, "rows": each.rows} for name, each in self._samples.items()
        }
        return found.get("", found)  # of a single SAE without a name

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the inputs drawn so far."""
        by_name = {"": state_dict} if "keys" in state_dict else state_dict
        for name, each in by_name.items():
            self._samples[name] = WeightedSample(each["keys"], each["rows"])


def _require_no_more(sae: Any) -> None:
    """Refuse an SAE that keeps more of a feature than what is made anew."""
    if hasattr(sae, "d_target"):
        raise UsageError(
            f"ResampleDeadFeatures cannot be used with {type(sae).__name__}, whose directions "
            "are not of its inputs: remove it from trainer.callbacks"
        )
    rows, known = (sae.n_features,), _OF_FEATURES | _OF_DIMENSIONS | {*_renewable(sae)}
    stale = [
        name
        for name, value in sae.state_dict().items()
        if value.shape[:1] == rows and name not in known
    ]
    if stale:
        raise UsageError(
            f"ResampleDeadFeatures cannot be used with {type(sae).__name__}, which keeps "
            f"{', '.join(stale)} of each feature: remove it from trainer.callbacks"
        )


def _renewable(sae: Any) -> tuple[str, ...]:
    """Return the names of what an architecture keeps of features besides, and lets start anew."""
    names: tuple[str, ...] = getattr(sae, "renewable", ())
    return names


@torch.no_grad()
def renew(module: Any, features: Tensor, inputs: Tensor, optimizers: Iterable[Optimizer]) -> None:
    """Point features at inputs, and let nothing remember what they were.

    Args:
        module: Changed in place.
        features: Indices of the features, dead ones, int64, shape (n,).
        inputs: Scaled activations, shape (n, d_model).
        optimizers: Those whose state of the features, of the shape of a parameter, becomes zero.
    """
    if len(features) == 0:
        return
    weight, origin = wide_rows(module.encoder.weight, module.decoder.bias)
    norms = module.layout.share.everyones(weight.norm(dim=1))
    alive = ~module.history.dead()
    norm = norms[alive].mean() if bool(alive.any()) else norms.mean()
    directions = functional.normalize(inputs - origin, dim=1)
    module.history.tokens_since_fired[features] = 0
    module.history.density[features] = 0
    here = module.layout.share.here
    mine = (features >= here.start) & (features < here.stop)
    features, directions = features[mine] - here.start, directions[mine]
    decoder, encoder, bias = module.decoder.weight, module.encoder.weight, module.encoder.bias
    local(decoder)[features] = directions.to(decoder.dtype)
    local(encoder)[features] = (ENCODER_NORM * norm * directions).to(encoder.dtype)
    local(bias)[features] = 0
    own = _renewable(module)
    if own:
        module.renew_features(features, alive, ENCODER_NORM)
    for parameter in (decoder, encoder, bias, *map(module.get_parameter, own)):
        for optimizer in optimizers:
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    local(value)[features] = 0
