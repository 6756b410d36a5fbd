"""What a person reads of an SAE before using it."""

from huggingface_hub import ModelCard

from lightning_sae.model_card import model_card

CONFIG = {
    "architecture": "TopKSAE",
    "arguments": {"d_model": 64, "n_features": 2048, "k": 16, "aux_every": 1},
    "trained_on": {
        "model_name": "someone/model",
        "model_revision": "main",
        "layer": 3,
        "hook_name": "model.layers.3",
        "text": "some/text",
        "positions": "all but the first",
    },
    "measured": {
        "fvu": 0.123456,
        "l0": 15.98,
        "l0_in_training": 16.25,
        "loss_recovered_mean": 0.98765,
        "loss_recovered_zero": 0.99,
        "dead_fraction": 0.0625,
        "delta_ce": None,
        "tokens_seen": 1_000_000,
    },
}


def test_what_is_known_is_said_and_nothing_else():
    text = str(model_card(CONFIG))
    assert "# TopKSAE on layer 3 of someone/model\n" in text
    for line in (
        "| features | 2,048 |",
        "| expected matches per token (k) | 16 |",
        "| site, as Hugging Face's module | model.layers.3 |",
        "| positions | all but the first |",
        "| features that fire on a token, in inference | 15.98 |",
        "| features that fire on a token, in the last training batch | 16.25 |",
        "| share of the activations' variance not reconstructed (FVU) | 0.1235 |",
        "| language model's loss recovered, against mean ablation | 0.9877 |",
        "| the same against zero ablation | 0.99 |",
        "| share of features that never fired in validation | 0.0625 |",
        "| tokens trained on | 1,000,000 |",
    ):
        assert f"\n{line}\n" in text
    assert "None" not in text
    assert "rise of that loss" not in text


def test_hubs_can_read_what_it_is_about():
    data = ModelCard(str(model_card(CONFIG, license="mit"))).data
    assert data.library_name == "lightning_sae"
    assert data.base_model == "someone/model"
    assert data.license == "mit"
    assert "sparse-autoencoder" in data.tags


def test_a_model_that_is_on_no_hub_is_no_base_model():
    trained_on = CONFIG["trained_on"] | {"model_name": "quickstart"}
    assert "base_model" not in str(model_card(CONFIG | {"trained_on": trained_on}))


def test_an_sae_of_which_nothing_is_known_has_a_card_too():
    text = str(model_card({"architecture": "TopKSAE", "arguments": {"n_features": 8}}))
    assert "# TopKSAE\n" in text
    assert "Measured" not in text
