"""The same vectors in every layout that is read."""

import datasets
import numpy as np
import torch
from safetensors.torch import save_file

from tests.data.tiny import D_MODEL, LENGTH

CONTEXTS = 60


def vectors(contexts=CONTEXTS, seed=0):
    """Of contexts, (contexts, length, d_model) in float16."""
    draw = np.random.default_rng(seed)
    return draw.standard_normal((contexts, LENGTH, D_MODEL)).astype("float16")


def save_npy(folder, contexts, files=3):
    """Several files, of which the first contexts come first."""
    folder.mkdir()
    for number, part in enumerate(np.array_split(contexts, files)):
        np.save(folder / f"{number}.npy", part)
    return folder


def save_safetensors(folder, contexts, files=3, name="activation"):
    """As OpenMOSS' `ActivationWriter` does: chunks with tokens, and a file beside each."""
    folder.mkdir()
    for number, part in enumerate(np.array_split(contexts, files)):
        tokens = torch.zeros(part.shape[:2], dtype=torch.int64)
        file = folder / f"chunk-{number:08d}.safetensors"
        save_file({name: torch.from_numpy(part), "tokens": tokens}, file)
        file.with_suffix(".meta.json").write_text("[]")
    return folder


def save_dataset(folder, contexts):
    """As SAELens' `CacheActivationsRunner` does."""
    shape = contexts.shape[1:]
    features = datasets.Features(
        {
            "blocks.1.hook_resid_post": datasets.Array2D(shape=shape, dtype="float16"),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=shape[0]),
        }
    )
    columns = {
        "blocks.1.hook_resid_post": torch.from_numpy(contexts),
        "token_ids": torch.zeros(contexts.shape[:2], dtype=torch.int32),
    }
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder)
    return folder


def save_parquet(folder, contexts, column="vector"):
    folder.mkdir()
    for number, part in enumerate(np.array_split(contexts.astype("float32"), 2)):
        columns = {column: part.tolist(), "number": list(range(len(part)))}
        kind = datasets.List(datasets.Value("float32"))
        kind = datasets.List(kind) if part.ndim == 3 else kind
        features = datasets.Features({column: kind, "number": datasets.Value("int64")})
        file = folder / f"{number}.parquet"
        datasets.Dataset.from_dict(columns, features=features).to_parquet(file)
    return folder


LAYOUTS = {
    "npy": save_npy,
    "safetensors": save_safetensors,
    "dataset": save_dataset,
    "parquet": save_parquet,
}
