"""SAEs that are trained together, against runs of their own: bit for bit."""

import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lightning_sae
from lightning_sae import (
    ActivationDataModule,
    ChunkedAdam,
    FeatureChoiceSAE,
    JumpReLUSAE,
    MutualChoiceSAE,
    SavePretrained,
    SeveralSAEs,
    StandardSAE,
    TopKSAE,
    TopKTranscoder,
    UsageError,
)
from lightning_sae.callbacks import (
    AdaptiveComputationCallback,
    FeatureDensityFigures,
    KDecay,
    LossRecoveredCallback,
    ResampleDeadFeatures,
    TopContexts,
    WriteMatches,
)
from lightning_sae.checkpoint_io import AtomicCheckpointIO
from lightning_sae.parallel import Ranks
from tests.data.tiny import arguments, save_model, save_text
from tests.helpers.ddp import run_on_two

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

STEPS = 10
HELPING = {"dead_after_tokens": 320, "k_aux": 2, "dying_below": 0.5}
ADAM = {"optimizer": partial(torch.optim.Adam, lr=1e-2)}
KINDS: dict[str, Any] = {
    "mutual": partial(MutualChoiceSAE, n_features=32, k=3, **HELPING, **ADAM),
    "feature": partial(FeatureChoiceSAE, n_features=32, k=4, mutual_choice_share=0.5, **HELPING),
    "jumprelu": partial(JumpReLUSAE, n_features=32, k=3, bandwidth=0.1),
    "chunked": partial(TopKSAE, n_features=32, k=3, optimizer=partial(ChunkedAdam, lr=1e-2)),
    "standard": partial(StandardSAE, n_features=32, l1_coefficient=0.5, dead_after_tokens=64),
}
CALLBACKS: dict[str, Any] = {
    "mutual": lambda: [
        LossRecoveredCallback(200),
        AdaptiveComputationCallback(200),
        TopContexts(tokens=200),
        FeatureDensityFigures(),
    ],
    "standard": lambda: [ResampleDeadFeatures(every_tokens=150, sample_tokens=100)],
    "chunked": lambda: [KDecay(8, tokens=300)],
}
LAYERS = [0, 1, 2]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    save_model(folder / "model")
    save_text(folder / "text.jsonl")
    return folder


def train(
    rank: int,
    text: Path,
    folder: Path,
    kind: str,
    layer: Any,
    site: Any = "resid_post",
    start: Path | None = None,
    **options: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a run ends with, and what it logged last."""
    os.environ["LOCAL_RANK"] = str(rank)  # so that Lightning starts no processes of its own
    datasets.config.HF_DATASETS_CACHE = text / "cache"
    datasets.disable_progress_bars()
    torch.manual_seed(0 if start is None else 1)
    data = ActivationDataModule(
        **arguments(text / "model", text / "text.jsonl") | {"layer": layer, "site": site}
    )
    several = len(data.sites) > 1
    module = SeveralSAEs(KINDS[kind], data.sites) if several else KINDS[kind](data.d_model)
    trainer = pl.Trainer(
        accelerator="cpu",
        strategy="ddp" if Ranks().size > 1 else "auto",
        devices=Ranks().size,
        plugins=AtomicCheckpointIO(),
        max_steps=STEPS,
        max_epochs=-1,
        val_check_interval=10,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        gradient_clip_val=0.05,  # which clips every step
        logger=CSVLogger(folder, name="", version=""),
        callbacks=[
            SavePretrained(),
            LearningRateMonitor(),
            ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1),
            *CALLBACKS.get(kind, list)(),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data, ckpt_path=start, weights_only=True)
    del os.environ["LOCAL_RANK"]
    return module.state_dict(), dict(trainer.callback_metrics)


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are equal, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def is_a_run_of_its_own(name: str, together: Any, alone: Any) -> None:
    """Check weights, state and all figures that a run of its own logs."""
    (state, logged), (own, own_logged) = together, alone
    assert same({key: state[f"{name}.{key}"] for key in own}, own)
    assert len(own_logged) > 15
    for key, value in own_logged.items():
        stage, _, rest = key.partition("/")
        assert torch.equal(logged[f"{stage}/{name}/{rest}".rstrip("/")], value), key


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_what_a_run_of_its_own_makes_of_it(kind: str, text: Path, tmp_path: Path):
    together = train(0, text, tmp_path / "together", kind, LAYERS, accumulate_grad_batches=2)
    saved = torch.load(tmp_path / "together" / f"step={STEPS}.ckpt", weights_only=True)
    folder = tmp_path / "together" / "pretrained"
    assert sorted(each.name for each in folder.iterdir()) == ["layer_0", "layer_1", "layer_2"]
    for layer in LAYERS[:2]:
        alone = train(0, text, tmp_path / str(layer), kind, layer, accumulate_grad_batches=2)
        name = f"layer_{layer}"
        is_a_run_of_its_own(name, together, alone)
        raw = torch.load(tmp_path / str(layer) / f"step={STEPS}.ckpt", weights_only=True)
        (own,), (all_,) = raw["optimizer_states"], saved["optimizer_states"]
        places = all_["param_groups"][layer]["params"]
        assert same([all_["state"][place] for place in places], [*own["state"].values()])
        sae = lightning_sae.load(folder / name)
        of_its_own = lightning_sae.load(tmp_path / str(layer) / "pretrained")
        assert sae.config() == of_its_own.config()
        assert sae.record["trained_on"]["layer"] == layer
        assert sae.record["trained_on"]["hook_name"] == f"transformer.h.{layer}"
        assert same(dict(sae.state_dict()), dict(of_its_own.state_dict()))


def test_sites_of_a_layer_are_told_apart(text: Path, tmp_path: Path):
    sites = ["resid_post", "mlp_out"]
    together = train(0, text, tmp_path / "together", "mutual", [1, 2], sites)
    alone = train(0, text, tmp_path / "alone", "mutual", 2, "mlp_out")
    is_a_run_of_its_own("layer_2_mlp_out", together, alone)
    sae = lightning_sae.load(tmp_path / "together" / "pretrained" / "layer_2_mlp_out")
    assert sae.record == lightning_sae.load(tmp_path / "alone" / "pretrained").record


@pytest.mark.parametrize("kind", ["feature", "standard", "chunked"])
def test_a_run_that_is_resumed_ends_as_one_that_never_stopped(
    kind: str, text: Path, tmp_path: Path
):
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(0, text, whole, kind, LAYERS)
    train(0, text, part, kind, LAYERS, start=whole / "step=5.ckpt")
    one, other = (
        torch.load(each / f"step={STEPS}.ckpt", weights_only=True) for each in (whole, part)
    )
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert same(one[key], other[key]), key
    assert one["parts"].keys() == other["parts"].keys()


def test_two_processes_train_each_as_they_train_it_alone(text: Path, tmp_path: Path):
    # The folder is that of the first: the second one's Lightning knows no other.
    together, _ = run_on_two(train, text, tmp_path / "together", "feature", [1, 2])
    alone, _ = run_on_two(train, text, tmp_path / "alone", "feature", 2)
    is_a_run_of_its_own("layer_2", together, alone)


SITES = {"layer_1": 8, "layer_2": 8}


@pytest.fixture
def both() -> SeveralSAEs:
    return SeveralSAEs(KINDS["mutual"], SITES)


def test_one_of_them_may_be_trained_on_alone(both: SeveralSAEs, text: Path):
    data = ActivationDataModule(**arguments(text / "model", text / "text.jsonl"))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(both.layer_2, data)
    assert "train/l0" in trainer.callback_metrics
    assert both.layer_2.record["trained_on"]["layer"] == 1


def test_what_cannot_be_is_refused(both: SeveralSAEs):
    with pytest.raises(UsageError, match=r"^SeveralSAEs trains .* the data have one: name more, "):
        SeveralSAEs(KINDS["mutual"], {"layer_1": 8})
    with pytest.raises(UsageError, match=r"^sae=TopKTranscoder: SeveralSAEs trains SAEs, "):
        SeveralSAEs(partial(TopKTranscoder, n_features=32, k=3), SITES)
    with pytest.raises(UsageError, match=r"^activations are 8 wide, and not of layer_1 8, layer_2"):
        both.training_step(torch.zeros(4, 8), 0)


def test_a_trainer_that_would_mix_them_is_refused(both: SeveralSAEs):
    both._trainer = SimpleNamespace(precision="16-mixed")
    with pytest.raises(UsageError, match=r"^trainer\.precision=16-mixed: steps of all SAEs"):
        both.configure_model()
    both._device_mesh = object()  # as a ModelParallelStrategy sets it
    message = r"^trainer\.strategy=ModelParallelStrategy shares out the features of one SAE: train"
    with pytest.raises(UsageError, match=message):
        both.configure_model()


def test_a_checkpoint_of_all_tells_where_each_is(text: Path, tmp_path: Path):
    train(0, text, tmp_path, "chunked", [1, 2])
    path = tmp_path / "step=10.ckpt"
    where = r"holds several SAEs: name the folder of one, layer_1, layer_2, in `pretrained` in"
    with pytest.raises(UsageError, match=where):
        lightning_sae.load(path)
    with pytest.raises(UsageError, match=where):
        TopKSAE.load_from_checkpoint(path)
    again = SeveralSAEs.load_from_checkpoint(path, sae=KINDS["chunked"])
    one = lightning_sae.load(tmp_path / "pretrained" / "layer_2")
    assert torch.equal(again.saes["layer_2"].W_dec, one.W_dec)
    other = SeveralSAEs(KINDS["chunked"], {"layer_1": 8, "layer_3": 8})
    asked = r"^the checkpoint holds SAEs of layer_1, layer_2, the configuration asks for .* layer_3"
    with pytest.raises(UsageError, match=asked):
        other.on_load_checkpoint(torch.load(path, weights_only=True))
    with pytest.raises(UsageError, match=r"^k=4: the SAE in the checkpoint was trained with k=3$"):
        SeveralSAEs.load_from_checkpoint(path, sae=partial(KINDS["chunked"], k=4))


def test_each_may_start_from_a_trained_one(text: Path, tmp_path: Path):
    train(0, text, tmp_path, "chunked", [1, 2])
    folder = tmp_path / "pretrained"
    begun = SeveralSAEs(partial(KINDS["chunked"], start_from=str(folder)), SITES)
    begun.trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    begun.setup("fit")
    for name, sae in begun.saes.items():
        assert torch.equal(sae.W_dec, lightning_sae.load(folder / name).W_dec)


def test_matches_of_each_have_a_folder(text: Path, tmp_path: Path):
    train(0, text, tmp_path, "chunked", [1, 2])
    module = SeveralSAEs.load_from_checkpoint(tmp_path / "step=10.ckpt", sae=KINDS["chunked"])
    data = ActivationDataModule(
        **arguments(text / "model", text / "text.jsonl") | {"layer": [1, 2]}
    )
    written = tmp_path / "matches"
    for again in (False, True):
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            callbacks=[WriteMatches(written)],
        )
        if again:
            with pytest.raises(UsageError, match="holds matches already"):
                trainer.predict(module, data, return_predictions=False)
        else:
            trainer.predict(module, data, return_predictions=False)
    assert [each.name for each in sorted(written.iterdir())] == ["layer_1", "layer_2"]
    assert list((written / "layer_2").glob("rank0-batch*.safetensors"))
