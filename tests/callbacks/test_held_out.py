"""What only shows on two devices; the rest is tested with the callbacks that there are."""

from types import SimpleNamespace

import torch
import torch.distributed as dist

from lightning_sae.callbacks import LossRecoveredCallback
from tests.callbacks.fakes import FakeData, FakeSAE
from tests.helpers.ddp import run_on_two


def measure_on_rank(rank, tokens, together=True):
    """Callback's values of a rank that has every other batch, one context less on the second.

    If they are not together, each has a strategy in which no other has tokens of its own.
    """
    data, module, logged = FakeData(count=6), FakeSAE().eval(), {}
    module.factor.data.fill_(0.5)
    module.log = lambda name, value, sync_dist: logged.update({name: value.item()})
    trainer = SimpleNamespace(sanity_checking=False, datamodule=data)
    if not together:
        alone = [dist.new_group([each]) for each in range(2)][rank]
        mesh = {"data_parallel": SimpleNamespace(get_group=lambda: alone)}
        trainer.strategy = SimpleNamespace(device_mesh=mesh)
    callback = LossRecoveredCallback(tokens=tokens)
    callback.on_validation_epoch_start(trainer, module)
    for index, batch in enumerate(data.batches[rank::2]):
        if rank == 1:
            batch = {name: batch[name][:-1] for name in ("input_ids", "kept")}
        callback.on_validation_batch_end(trainer, module, None, batch, index)
    callback.on_validation_epoch_end(trainer, module)
    return logged, callback._measured


def test_ranks_share_the_tokens_and_may_need_different_numbers_of_batches():
    # Batches of 30 and of 24 tokens: half of 50 takes one of the first, but two of the second.
    for tokens, measured in ((1, [30, 24]), (50, [30, 48]), (1000, [90, 72])):
        (first, on_first), (second, on_second) = run_on_two(measure_on_rank, tokens)
        assert [on_first, on_second] == measured
        assert first == second
        assert torch.tensor(list(first.values())).isfinite().all()


def test_only_processes_with_other_tokens_measure_together():
    (first, on_first), (second, on_second) = run_on_two(measure_on_rank, 50, False)
    assert [on_first, on_second] == [60, 72]  # 50 of its own, in whole batches
    assert first["val/ce_clean"] > 0
    assert first != second
