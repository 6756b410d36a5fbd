import itertools
from collections import Counter

import datasets
import lightning.pytorch as pl
import pytest
import torch
from transformers import AutoModel, ViTImageProcessorPil, ViTModel

from lightning_sae import MutualChoiceSAE
from lightning_sae.callbacks import LossRecoveredCallback
from lightning_sae.data import ImageActivationDataModule, StoredActivationsDataModule
from tests.data.tiny import (
    D_MODEL,
    PATCHES,
    Recorder,
    image_arguments,
    pictures,
    same,
    save_images,
    trainer,
)
from tests.helpers.ddp import run_on_two

STEPS = 10  # of training: three blocks, the last one cut short


def take(datamodule, count):
    return list(itertools.islice(datamodule.train_dataloader(), count))


def read_slowly(vision_folder, images):
    """One image at a time: its patches' activations, (images, patches, d_model)."""
    processor = ViTImageProcessorPil.from_pretrained(vision_folder)
    model = ViTModel.from_pretrained(vision_folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        states = [
            model(**processor(image, return_tensors="pt"), output_hidden_states=True).hidden_states
            for image in images
        ]
    return torch.cat([each[2][:, 1:] for each in states])


def test_every_patch_is_trained_on_once_an_epoch(make_images, vision_folder):
    held_out = {make_images().image(number).tobytes() for number in range(20)}
    assert len(held_out) == 20
    images = [image for image in pictures(60) if image.tobytes() not in held_out]
    expected = read_slowly(vision_folder, images).flatten(0, 1).double()
    # One batch that goes through all images once.
    datamodule = make_images(batch_size=40 * PATCHES)
    datamodule.batches_per_block = 0.75 - 1e-9
    (batch,) = take(datamodule, 1)
    distance, match = torch.cdist(batch["activations"].double(), expected).min(1)
    assert distance.max() < 1e-4
    assert set(Counter(match.tolist()).values()) == {1}
    assert match.tolist() != sorted(match.tolist())


def test_held_out_batches_are_those_of_the_model(make_images, vision_folder):
    datamodule = make_images()
    loaders = datamodule.val_dataloader(), datamodule.test_dataloader()
    assert [len(loader) for loader in loaders] == [4, 3]
    numbers = []
    for batch in itertools.chain(*loaders):
        images = [datamodule.image(number) for number in batch["image_numbers"].tolist()]
        expected = read_slowly(vision_folder, images).flatten(0, 1)
        torch.testing.assert_close(batch["activations"], expected)
        assert batch["kept"].shape == (len(images), PATCHES)
        assert batch["kept"].all()
        numbers += batch["image_numbers"].tolist()
    assert numbers == list(range(17))  # the odd token is no image
    predicted = [batch["image_numbers"] for batch in datamodule.predict_dataloader()]
    assert torch.cat(predicted).tolist() == list(range(10, 17))


def test_the_seed_decides_and_nothing_else(make_images):
    datamodule = make_images()
    batches = take(datamodule, 9)
    list(datamodule.val_dataloader())
    for other in (datamodule, make_images(validation_tokens=PATCHES)):
        again = take(other, 9)
        assert [b["cursor"] for b in again] == [b["cursor"] for b in batches]
        assert same([b["activations"] for b in again], [b["activations"] for b in batches])
    differ = take(make_images(seed=1), 9)
    assert not same([b["activations"] for b in differ], [b["activations"] for b in batches])


def test_a_second_run_takes_all_activations_from_the_cache(make_images, tmp_path, monkeypatch):
    batches = [b["activations"] for b in take(make_images(), 9)]
    assert same([b["activations"] for b in take(make_images(cache_dir=str(tmp_path)), 9)], batches)
    monkeypatch.setattr(AutoModel, "from_pretrained", None)
    again = make_images(cache_dir=str(tmp_path))
    assert again.d_model == D_MODEL
    assert same([b["activations"] for b in take(again, 9)], batches)


def test_a_folder_says_which_images_were_held_out(make_images, tmp_path):
    needs = make_images(cache_dir=str(tmp_path)).fill_cache()
    stored = StoredActivationsDataModule(str(needs.folder))
    assert len(stored.held_out_inputs()) == needs.held_out == 17
    assert len(stored.train_inputs()) == 40


class SaveEachStep(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/{trainer.global_step}.ckpt")


def test_a_resumed_run_goes_on_where_it_was(make_images, tmp_path):
    expected = Recorder()
    torch.manual_seed(0)
    trainer(tmp_path, STEPS, callbacks=[SaveEachStep()]).fit(expected, make_images())
    assert {(b.shape, b.dtype) for b in expected.trained} == {((30, D_MODEL), torch.float32)}
    for cut in range(1, STEPS):
        module, datamodule = Recorder(), make_images()
        checkpoint = tmp_path / f"{cut}.ckpt"
        trainer(tmp_path, STEPS).fit(module, datamodule, ckpt_path=checkpoint, weights_only=True)
        assert same(module.trained, expected.trained[cut:])
        assert torch.equal(module.layer.weight, expected.layer.weight)
    other = save_images(tmp_path / "other", 60, seed=1)
    with pytest.warns(UserWarning, match=r"^images=.* of block \d, which is of other images now$"):
        trainer(tmp_path, STEPS).fit(
            Recorder(), make_images(images=str(other)), ckpt_path=checkpoint
        )


def of_rank(rank, settings, cache):
    datasets.config.HF_DATASETS_CACHE = cache
    datamodule = ImageActivationDataModule(**settings)
    train = [batch["activations"] for batch in take(datamodule, 9)]
    return train, [batch["image_numbers"] for batch in datamodule.val_dataloader()]


def test_two_ranks_together_get_what_one_gets(make_images, vision_folder, image_folder, tmp_path):
    ranks = run_on_two(of_rank, image_arguments(vision_folder, image_folder), tmp_path)
    together = [torch.cat(parts) for parts in zip(ranks[0][0], ranks[1][0], strict=True)]
    assert same(together, [batch["activations"] for batch in take(make_images(), 9)])
    in_order = [numbers for pair in zip(ranks[0][1], ranks[1][1], strict=True) for numbers in pair]
    assert torch.cat(in_order).tolist() == list(range(10))


def test_an_autoencoder_is_trained_and_tested_on_patches(make_images, tmp_path):
    """And the callback for language models has nothing to say of them."""
    sae, datamodule = MutualChoiceSAE(d_model=D_MODEL, n_features=16, k=2), make_images()
    run = trainer(tmp_path, 4, callbacks=[LossRecoveredCallback()])
    run.fit(sae, datamodule)
    (results,) = run.test(sae, datamodule, verbose=False)
    assert results["test/tokens"] == 7 * PATCHES
    assert not {"test/loss_recovered_mean", "test/delta_ce"} & set(results)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer": -1}, "layer=-1 must be at least 0"),
        ({"held_out_images": 0}, "held_out_images=0 must be at least 1"),
        ({"model_batch_size": 0}, "model_batch_size=0 must be at least 1"),
        ({"test_tokens": 0}, "test_tokens=0 must be at least 1"),
    ],
)
def test_arguments_out_of_range(make_images, changed, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_images(**changed)


def test_mistakes_found_when_needed(make_images):
    with pytest.raises(ValueError, match=r"^validation_tokens=8 must be at least 9$"):
        make_images(validation_tokens=8).val_dataloader()
    message = r"^test_tokens=63: images='.*' has 0 held-out images for it, and needs one$"
    with pytest.raises(ValueError, match=message):
        make_images(test_tokens=63, held_out_images=10).test_dataloader()
    message = r"^images='.*' gives only 40 images to train on; one batch needs 41$"
    with pytest.raises(ValueError, match=message):
        take(make_images(batch_size=40 * PATCHES + 1), 1)
