"""The model card of an SAE: what a person reads before using it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from huggingface_hub import ModelCard, ModelCardData

__all__ = ["model_card"]

LOADING: Final = """import lightning_sae

sae = lightning_sae.load("this folder, or the name of its repository")
codes = sae.encode(activations)  # (..., d_model) -> (..., n_features)"""
FIGURES: Final = {
    "tokens_seen": "tokens trained on",
    "l0": "features that fire on a token, in inference",
    "l0_in_training": "features that fire on a token, in the last training batch",
    "fvu": "share of the activations' variance not reconstructed (FVU)",
    "loss_recovered_mean": "language model's loss recovered, against mean ablation",
    "loss_recovered_zero": "the same against zero ablation",
    "delta_ce": "rise of that loss by the reconstruction, nats per token",
    "dead_fraction": "share of features that never fired in validation",
}
ACTIVATIONS: Final = {
    "model_name": "model",
    "model_revision": "revision",
    "weights": "fingerprint of its weights",
    "model_dtype": "dtype it computed in",
    "hook_name": "site, as Hugging Face's module",
    "transformer_lens_hook_name": "site, as TransformerLens calls it",
    "context_length": "tokens of a context",
    "positions": "positions",
    "text": "text",
    "text_config": "its configuration",
    "train_split": "its split",
}
SETTINGS: Final = {
    "d_model": "width of the activations",
    "d_target": "width of what is reconstructed",
    "n_features": "features",
    "k": "expected matches per token (k)",
    "l1_coefficient": "weight of the L1 penalty",
    "importance": "pairs are ranked by",
    "normalize_inputs": "brought to the same length",
    "rank_discount": "discount of a token's matches beyond its k-th",
}


def model_card(
    config: Mapping[str, Any],
    library: str = "lightning_sae",
    loading: str = LOADING,
    **data: Any,
) -> ModelCard:
    """Return the card of an SAE.

    Args:
        config: What its `config.json` says. What it does not say is left out.
        library: Whose files it lies in, as the hub calls libraries.
        loading: The lines of Python that load it there.
        data: More of the card's metadata, as `huggingface_hub.ModelCardData` takes it.
    """
    activations, measured = config.get("trained_on", {}), config.get("measured", {})
    name = activations.get("model_name")
    base = {"base_model": name} if _is_on_the_hub(name) else {}
    tags = ["sparse-autoencoder", "mechanistic-interpretability"]
    front = ModelCardData(library_name=library, tags=tags, **base | data)
    of = f" on layer {activations.get('layer')} of {name}" if name else ""
    other = f", in the format of `{library}`" if library != "lightning_sae" else ""
    text = f"""---
{front.to_yaml()}
---

# {config["architecture"]}{of}

A sparse autoencoder, trained with `lightning_sae`{other}.

```python
{loading}
```

{_table("Settings", SETTINGS, config["arguments"])}
{_table("Trained on", ACTIVATIONS, activations)}
{_table("Measured on held-out tokens", FIGURES, measured)}"""
    return ModelCard(text)


def _table(title: str, names: Mapping[str, str], values: Mapping[str, Any]) -> str:
    """Return a section, or nothing if nothing in it is known."""
    rows = "".join(_rows(names, values))
    return f"## {title}\n\n| | |\n|---|---|\n{rows}" if rows else ""


def _rows(names: Mapping[str, str], values: Mapping[str, Any]) -> Iterator[str]:
    for name, meaning in names.items():
        value = values.get(name)
        if value is not None:
            told = f"{value:,.4g}" if isinstance(value, float) else str(value)
            told = f"{value:,}" if type(value) is int else told
            yield f"| {meaning} | {told} |\n"


def _is_on_the_hub(name: Any) -> bool:
    return isinstance(name, str) and name.count("/") == 1 and not Path(name).exists()
