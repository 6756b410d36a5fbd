"""The frozen model that is read: its configuration and weights, each when needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from lightning_sae.checks import UsageError
from lightning_sae.data.cache import ActivationCache
from lightning_sae.data.fingerprints import commit_of, model_fingerprint, weights_fingerprint
from lightning_sae.data.shards import Shards
from lightning_sae.layers import check_layer
from lightning_sae.quickstart import FOLDER
from lightning_sae.residual_stream import ResidualStream
from lightning_sae.several_sites import SeveralSites
from lightning_sae.sites import Layers, Sites, hook_name_of, name_of, pairs_of, width_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Dtype", "FrozenModel", "Reader"]

Dtype = Literal["float32", "bfloat16", "float16"]


class Reader(Protocol):
    """Maps inputs to activations, (inputs, length, d_model)."""

    def __call__(
        self, inputs: Tensor, kept: Tensor | None = None, held_out: bool = False, /
    ) -> Tensor:
        """Return the activations of inputs, of whose positions those count that are kept."""


_LOADING = Lock()
"""Held while a model is loaded: transformers changes what all threads see, and puts it back."""


class FrozenModel(ABC):
    """A frozen transformer, read at a layer or at several; a subclass says how it is loaded.

    Args:
        name: A folder or a hub id; "quickstart" is the language model that ships with the package.
        layer: Block whose output is read, from 0, or the path of a module, "model.layers.3" say.
            A list: several, whose activations are beside each other.
        site: What of the block is read: `lightning_sae.sites.Site`. A list: several.
        revision: Branch, tag or commit on the hub. None: the main branch.
        dtype: What the model computes in: "float32", "bfloat16" or "float16".

    Raises:
        UsageError: If the layer is negative, or the dtype none of these, or the site.
    """

    def __init__(
        self,
        name: str,
        layer: Layers,
        *,
        site: Sites = "resid_post",
        revision: str | None = None,
        dtype: Dtype = "float32",
    ) -> None:
        self._pairs = pairs_of(layer, site)
        if dtype not in get_args(Dtype):
            raise UsageError(f"model_dtype={dtype!r} must be one of {', '.join(get_args(Dtype))}")
        self.name = name = str(name)  # a `Path` will do
        self.layer = layer if isinstance(layer, str | list) else int(layer)  # as checkpoints note
        self.site = site
        self.dtype = dtype
        # Not `str(Path(name))`, which would make a hub id of "./name".
        home = Path(name).expanduser() if name.startswith("~") else name
        self._path = str(FOLDER if name == "quickstart" else home)
        self._revision = revision or "main"
        self._streams: list[ResidualStream] = []
        self._shards: dict[Path, Shards] = {}

    def __str__(self) -> str:
        site = "" if self.site == "resid_post" else f"site={self.site!r}, "
        return f"model_name={self.name!r}, layer={self.layer}, {site}model_dtype={self.dtype!r}"

    @cached_property
    def config(self) -> PretrainedConfig:
        """The configuration, read without any weights.

        Raises:
            UsageError: If there is no such model, or it has no such layer.
        """
        config = self._config_read(self._config_saved)
        for layer, _ in self._pairs:
            check_layer(config, layer)
        return config

    @property
    def description(self) -> dict[str, Any]:
        """What an activation is: the model, by name and weights, the layer, the site, the dtype."""
        return {
            "model_name": self.name,
            "weights": self.fingerprint,
            "layer": self.layer,
            "site": self.site,
            "model_dtype": self.dtype,
        }

    @cached_property
    def fingerprint(self) -> str:
        """What tells the weights from all others.

        That of the files, or of the weights themselves where there are none: `load` of a subclass
        may have them from elsewhere. A subclass that overrides it can do without loading them.
        """
        try:
            _ = self._config_saved  # first, so that the cache of the hub has it
        except UsageError:
            device = self._streams[0].device if self._streams else torch.device("cpu")
            return weights_fingerprint(self.residual_stream(device).model.state_dict())
        return model_fingerprint(self._path, self._revision)

    @property
    def names_elsewhere(self) -> dict[str, Any]:
        """What others call the model and the layer.

        Returns:
            `model_revision`: branch, tag or commit on the hub, the commit of the main branch, which
            moves, and None for a folder; `hook_name`: the path of the module whose output is read,
            None before the model is loaded, or where it is the input; `transformer_lens_hook_name`:
            None if the layer is named by its path. The latter two are lists where there are several
            sites.
        """
        paths = [None if each.before else each.path for each in self._streams]
        theirs = [hook_name_of(*pair) for pair in self._pairs]
        several = len(self._pairs) > 1
        return {
            "model_revision": None if Path(self._path).is_dir() else self._revision_read,
            "hook_name": (paths or None) if several else next(iter(paths), None),
            "transformer_lens_hook_name": theirs if several else theirs[0],
        }

    @property
    def sites(self) -> dict[str, int]:
        """The width of each of the sites by its name, known without any weights."""
        return {name_of(*pair): width_of(self.config, pair[1]) for pair in self._pairs}

    @property
    def d_model(self) -> int:
        """Width of the activations: of all sites together."""
        return sum(self.sites.values())

    def residual_stream(self, device: torch.device) -> ResidualStream | SeveralSites:
        """Return the layer, or all of the sites, on this device; the first call loads the weights.

        Raises:
            UsageError: If there are no weights in safetensors files.
        """
        # Weights made or moved in inference mode, which `Trainer.test` runs in, could not be
        # differentiated through in a later `fit`.
        with _LOADING, torch.inference_mode(mode=False):
            if not self._streams:
                model = self.load().eval().requires_grad_(requires_grad=False)
                self._streams = [ResidualStream(model, *pair) for pair in self._pairs]
            if self._streams[0].device != device:
                moved: nn.Module = self._streams[0].model
                moved.to(device)
        return self._streams[0] if len(self._streams) == 1 else SeveralSites(self._streams)

    def reader(
        self,
        device: torch.device,
        cache_dir: str | None = None,
        cache_dtype: Dtype | None = None,
        cache_limit_gb: float = float("inf"),
    ) -> Reader:
        """Return what maps inputs to activations on this device, through a cache if asked for.

        Args:
            device: Where the model runs, and activations are.
            cache_dir: Folder to keep activations in. None: keep none.
            cache_dtype: What they are rounded to. None: they are kept as they are.
            cache_limit_gb: Gigabytes that they may take there.
        """
        if cache_dir is None:
            return partial(self._read_only, device=device)
        return self.cache(device, cache_dir, cache_dtype, cache_limit_gb)

    def cache(
        self,
        device: torch.device,
        cache_dir: str,
        cache_dtype: Dtype | None = None,
        cache_limit_gb: float = float("inf"),
    ) -> ActivationCache:
        """Return the cache that `reader` reads through; its arguments are the same."""
        folder = self.cache_folder(cache_dir, cache_dtype)
        if folder not in self._shards:
            self._shards[folder] = Shards(folder, cache_limit_gb * 1e9)
        return ActivationCache(
            partial(self.read, device=device),
            self._shards[folder],
            device,
            shape=lambda inputs: (len(inputs), self.positions(inputs), self.d_model),
            dtype=getattr(torch, self.dtype),
            kept_dtype=None if cache_dtype is None else getattr(torch, cache_dtype),
            made_of=lambda: self.description | self.names_elsewhere,
        )

    def cache_folder(self, cache_dir: str, cache_dtype: Dtype | None = None) -> Path:
        """Return where activations are kept: their model, layer and dtype are in its name."""
        as_kept = "" if cache_dtype is None else f"-as-{cache_dtype}"
        where = str(self.layer) if self.site == "resid_post" else f"{self.layer}-{self.site}"
        where = "".join(each for each in where if each not in "[]' ")  # of lists
        name = f"{Path(self.name).name}-layer-{where}-{self.dtype}-{self.fingerprint}{as_kept}"
        return Path(cache_dir).expanduser() / name

    def write_caches(self) -> None:
        """Write what is to be kept and is in no file yet.

        Raises:
            UsageError: If it cannot be written.
        """
        for shards in self._shards.values():
            shards.write()

    @property
    def _revision_read(self) -> str:
        named = self._revision
        return commit_of(self._path, named) if named == "main" else named

    @abstractmethod
    def load(self) -> Any:
        """Return the model, a `PreTrainedModel`, with its weights."""

    @abstractmethod
    def positions(self, inputs: Tensor) -> int:
        """Return at how many positions of each of the inputs the model is read: the length."""

    @abstractmethod
    def read(self, inputs: Tensor, device: torch.device) -> Tensor:
        """Return the activations of the inputs, (inputs, length, d_model), on this device."""

    def _read_only(
        self,
        inputs: Tensor,
        kept: Tensor | None = None,
        held_out: bool = False,
        *,
        device: torch.device,
    ) -> Tensor:
        return self.read(inputs, device)

    def _config_read(self, saved: PretrainedConfig) -> PretrainedConfig:
        """Return the part of the configuration that is of the transformer to read."""
        return saved

    @cached_property
    def _config_saved(self) -> PretrainedConfig:
        from transformers import AutoConfig

        config: PretrainedConfig = self._from_pretrained(AutoConfig)
        return config

    def _from_pretrained(self, auto_class: Any, **options: Any) -> Any:
        with self._one_line_errors():
            return auto_class.from_pretrained(
                self._path, revision=self._revision, trust_remote_code=False, **options
            )

    @contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # there is no end to what a configuration may make them raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if self._path.startswith((".", "/")) and not Path(self._path).is_dir():
                reason = "there is no such folder"
            elif "ignore_mismatched_sizes" in reason:  # which transformers advises to set
                reason = "its weights have other shapes than its config.json says"
            elif not isinstance(error, ImportError | OSError | ValueError):
                reason = f"{type(error).__name__}: {reason}"
            raise UsageError(f"model_name={self.name!r}: {reason}") from error
