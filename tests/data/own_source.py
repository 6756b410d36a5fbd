import torch
from torch import Tensor

from lightning_sae.data import FrozenModelDataModule, LanguageModel


class TokenListDataModule(FrozenModelDataModule):
    """Contexts of token ids that are in memory, all of one length."""

    def __init__(self, train: list[Tensor], held_out: list[Tensor], layer: int = 2, **options):
        super().__init__(LanguageModel("quickstart", layer), **options)
        self.train, self.held_out = train, held_out

    @property
    def positions_per_input(self) -> int:
        return len(self.train[0])

    def kept(self, inputs: Tensor) -> Tensor:
        return torch.arange(inputs.shape[1]).expand_as(inputs) > 0  # not where attention is parked

    def train_inputs(self) -> list[Tensor]:
        return self.train

    def held_out_inputs(self) -> list[Tensor]:
        return self.held_out
