"""What the auxiliary losses do to dead and dying features, on a problem whose features are known.

    OMP_NUM_THREADS=1 python -m benchmarks.aux_zipf_toy

Tokens of width 64 are sums of a few out of 256 or 512 random directions, whose frequencies follow
(rank + 4)^-0.8, on tokens of three difficulties. A Mutual Choice SAE of 384 features and 4 matches
a token trains on them for 1,800 steps of 512 tokens; a feature is dead after 10,240 tokens. Below:
error and dead share in threshold mode on fresh tokens (dead: no match in 16,384), the share that
`zipf_statistics` finds dying on 65,536 (when this was run, below half of the law), and the share of
directions that a live feature has found (cosine above 0.9). With 256 directions a third of the
features is surplus. "One pool" is the plain form: dead and dying features share slots, codes are
weighted by deficits alone. "Every eighth" is `aux_zipf_loss` of 64 of the tokens.

    directions  seed  loss            error    dead   dying   found
           256     0  aux_zipf_loss  0.1521    1.8%   41.4%   87.1%
           256     0  every eighth   0.1567    2.1%   43.0%   84.8%
           256     0  aux_k_loss     0.1963    7.6%   56.0%   62.9%
           256     0  one pool       0.1719   33.6%   22.1%   74.2%
           256     0  none           0.2163   41.7%   40.6%   54.7%
           256     1  aux_zipf_loss  0.1484    0.5%   40.6%   87.5%
           256     1  every eighth   0.1571    0.5%   43.5%   83.2%
           256     1  aux_k_loss     0.1939    7.8%   53.1%   66.0%
           256     1  one pool       0.1709   35.9%   21.1%   75.0%
           256     1  none           0.2164   46.1%   37.0%   56.6%
           512     0  aux_zipf_loss  0.2929    0.0%   43.2%   36.9%
           512     0  every eighth   0.2924    0.3%   45.1%   36.9%
           512     0  aux_k_loss     0.3167    1.6%   57.6%   29.5%
           512     0  one pool       0.2967   21.9%   33.6%   35.9%
           512     0  none           0.3182   24.0%   50.3%   28.7%
           512     1  aux_zipf_loss  0.2927    0.0%   40.4%   39.6%
           512     1  every eighth   0.2928    0.0%   42.2%   38.5%
           512     1  aux_k_loss     0.3207    1.0%   54.7%   28.9%
           512     1  one pool       0.2926   14.1%   34.6%   40.2%
           512     1  none           0.3203   26.0%   49.5%   28.7%

What is revived where features are surplus fires rarely: hence the share of the dying. A run takes
about 20 seconds of one core. Names of losses as arguments restrict the table to them.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from lightning_sae.allocation import mutual_choice, threshold_choice, token_choice
from lightning_sae.core.revival import aux_k_loss, aux_zipf_loss
from lightning_sae.metrics import zipf_statistics
from lightning_sae.sparse import sum_directions
from lightning_sae.zipf import zipf_deficit

D_MODEL, N_FEATURES, K = 64, 384, 4
TOKENS, STEPS = 512, 1800
DEAD_AFTER, REFIT_STEPS = 10_240, 5
K_AUX, DYING_BELOW, COEFFICIENT = D_MODEL // 2, 0.75, 1 / 32


class Problem:
    """Tokens that sum known directions, a few of them at a time."""

    def __init__(self, n_directions: int, seed: int) -> None:
        # Not the seed of the SAE, which would then start at the very directions it is to find.
        self.random = torch.Generator().manual_seed(1000 + seed)
        directions = torch.randn(n_directions, D_MODEL, generator=self.random)
        self.directions = functional.normalize(directions, dim=1)
        law = (torch.arange(1, n_directions + 1) + 4.0) ** -0.8
        self.density = K * law / law.sum()

    def draw(self, tokens: int) -> Tensor:
        """Return activations (tokens, d_model)."""
        kinds = torch.randint(3, (tokens, 1), generator=self.random)
        difficulty = torch.tensor([0.3, 1.0, 1.7])[kinds]
        shape = (tokens, len(self.directions))
        on = torch.rand(shape, generator=self.random) < self.density * difficulty
        strength = 1 + 0.25 * torch.randn(shape, generator=self.random)
        return (on * strength.clamp_min(0)) @ self.directions


@dataclass
class Use:
    """How much features are used: what decides which of them need help."""

    since_fired: Tensor = field(default_factory=lambda: torch.zeros(N_FEATURES))
    density: Tensor = field(default_factory=lambda: torch.zeros(N_FEATURES))
    deficit: Tensor = field(default_factory=lambda: torch.zeros(N_FEATURES))

    def observe(self, per_feature: Tensor, step: int) -> None:
        """Count a batch's matches, (features,), and measure deficits every few steps."""
        seen = (step + 1) * TOKENS
        self.since_fired = (self.since_fired + TOKENS).where(per_feature == 0, 0.0)
        self.density.lerp_(per_feature / TOKENS, TOKENS / min(seen, DEAD_AFTER))
        if seen >= DEAD_AFTER and step % REFIT_STEPS == 0:
            self.deficit = zipf_deficit(self.density.clamp(0, 1), DEAD_AFTER)

    def dead_and_dying(self) -> tuple[Tensor, Tensor]:
        """Return the indices of the dead features and of the dying ones."""
        dead = self.since_fired >= DEAD_AFTER
        dying = (self.deficit > 1 - DYING_BELOW) & ~dead
        return dead.nonzero().squeeze(1), dying.nonzero().squeeze(1)


Loss = Callable[[Tensor, Tensor, Tensor, Use], Tensor]


def no_loss(affinities: Tensor, error: Tensor, dictionary: Tensor, use: Use) -> Tensor:
    return affinities.new_zeros(())


def aux_k(affinities: Tensor, error: Tensor, dictionary: Tensor, use: Use) -> Tensor:
    dead, _ = use.dead_and_dying()
    return aux_k_loss(error, model(affinities[:, dead], dictionary[dead], K_AUX))


def one_pool(affinities: Tensor, error: Tensor, dictionary: Tensor, use: Use) -> Tensor:
    """Deficit-weighted reconstruction by dead (deficit 1) and dying features alike."""
    both = torch.cat(use.dead_and_dying())
    deficit = use.deficit.where(use.since_fired < DEAD_AFTER, 1.0)[both]
    return aux_k_loss(error, model(affinities[:, both] * deficit, dictionary[both], K_AUX))


def aux_zipf(affinities: Tensor, error: Tensor, dictionary: Tensor, use: Use) -> Tensor:
    dead, dying = use.dead_and_dying()
    weighted = affinities[:, dying] * use.deficit[dying]
    return aux_zipf_loss(
        error,
        model(affinities[:, dead], dictionary[dead], K_AUX),
        model(weighted, dictionary[dying], K_AUX // 8),
        DYING_BELOW,
    )


def every_eighth(affinities: Tensor, error: Tensor, dictionary: Tensor, use: Use) -> Tensor:
    """`aux_zipf` of 64 tokens: `aux_every=8`."""
    return aux_zipf(affinities[::8], error[::8], dictionary, use)


def model(affinities: Tensor, dictionary: Tensor, k: int) -> Tensor:
    """Return what each token's k features of largest affinity add up to."""
    k = min(k, len(dictionary))
    return sum_directions(token_choice(affinities, k), dictionary) if k else affinities @ dictionary


LOSSES: dict[str, Loss] = {
    "none": no_loss,
    "aux_k_loss": aux_k,
    "one pool": one_pool,
    "every eighth": every_eighth,
    "aux_zipf_loss": aux_zipf,
}


def train(problem: Problem, auxiliary: Loss, seed: int) -> dict[str, float]:
    """Train an SAE and return what is measured of it, in threshold mode."""
    torch.manual_seed(seed)
    directions = functional.normalize(torch.randn(N_FEATURES, D_MODEL), dim=1)
    encoder, decoder = directions.clone().requires_grad_(), directions.clone().requires_grad_()
    bias = torch.zeros(N_FEATURES, requires_grad=True)
    sample = problem.draw(8192)
    origin = sample.mean(0).requires_grad_()
    variance = sample.var(0, correction=0).mean()
    optimizer = torch.optim.Adam([encoder, decoder, bias, origin], lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    use, threshold = Use(), torch.tensor(0.0)
    for step in range(STEPS):
        x = problem.draw(TOKENS)
        affinities = (x - origin) @ encoder.T + bias
        matches = mutual_choice(affinities, K * TOKENS)
        dictionary = functional.normalize(decoder, dim=1)
        error = x - origin - sum_directions(matches, dictionary)
        loss = error.square().mean() / variance
        loss = loss + COEFFICIENT * auxiliary(affinities, error, dictionary, use)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            decoder.copy_(functional.normalize(decoder, dim=1))
            use.observe(matches.per_feature(), step)
            threshold = threshold.lerp(matches.value.min(), 0.1 if step else 1.0)
    with torch.no_grad():
        return measure(problem, encoder, bias, origin, decoder, threshold)


def measure(
    problem: Problem, encoder: Tensor, bias: Tensor, origin: Tensor, decoder: Tensor, cut: Tensor
) -> dict[str, float]:
    """Return error and shares of features on fresh tokens."""
    x = problem.draw(65_536)
    codes = threshold_choice((x - origin) @ encoder.T + bias, cut).to_dense()
    error = x - origin - codes @ decoder
    density = (codes > 0).float().mean(0)
    cosine = decoder[density > 0] @ problem.directions.T
    return {
        "error": (error.square().sum() / (x - x.mean(0)).square().sum()).item(),
        "dead": (codes[:16_384] > 0).logical_not().all(0).float().mean().item(),
        "dying": zipf_statistics(density, len(x))["dying_fraction"].item(),
        "found": (cosine.amax(0) > 0.9).float().mean().item(),
    }


def main(names: list[str], seeds: tuple[int, ...] = (0, 1)) -> None:
    """Print a row of the table for each run."""
    print("directions  seed  loss            error    dead   dying   found")
    for n_directions in (256, 512):
        for seed in seeds:
            for name in names or LOSSES:
                found = train(Problem(n_directions, seed), LOSSES[name], seed)
                shares = "".join(f"{found[key]:8.1%}" for key in ("dead", "dying", "found"))
                row = f"{n_directions:10}  {seed:4}  {name:14}{found['error']:7.4f}{shares}"
                print(row, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1:])
