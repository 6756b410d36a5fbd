"""The vision transformer that is read, and how it wants its images."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sae.checks import UsageError
from lightning_sae.data.frozen_model import FrozenModel

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PretrainedConfig

__all__ = ["VisionModel"]


class VisionModel(FrozenModel):
    """A frozen vision transformer, read at its patches; arguments are those of `FrozenModel`.

    Any that `AutoModel` can load and that keeps its patches as they were cut: ViT, DeiT, BEiT,
    DINOv2 and v3, and the image half of CLIP or SigLIP. The tokens before the patches (class,
    distillation, registers) take part in the model, but are not among the activations. Its inputs
    are pixels, (images, 3, height, width).
    """

    @cached_property
    def patches(self) -> int:
        """Patches of an image, known without any weights.

        Raises:
            UsageError: If it is no vision transformer, or does not say how to prepare images.
        """
        size = getattr(self.config, "patch_size", None)
        if size is None:
            raise UsageError(
                f"model_name={self.name!r}: {self.config.model_type} is no vision transformer"
            )
        height, width = (size, size) if isinstance(size, int) else size
        return (self._shape[1] // height) * (self._shape[2] // width)

    def pixels(self, image: Image) -> Tensor:
        """Return an RGB image as the model was trained on them, (3, height, width) float32.

        Raises:
            UsageError: If the model does not make all images of one size.
        """
        pixels = self._prepare(image)
        if pixels.shape != self._shape:
            raise UsageError(
                f"model_name={self.name!r}: its image processor leaves images of several sizes, "
                f"such as {tuple(self._shape[1:])} and {tuple(pixels.shape[1:])}"
            )
        return pixels

    def positions(self, inputs: Tensor) -> int:
        """Return the number of patches, which is that of every image."""
        return self.patches

    def read(self, inputs: Tensor, device: torch.device) -> Tensor:
        """Return the activations of images' patches, (images, patches, d_model), on this device.

        Raises:
            UsageError: If the model does not keep one activation a patch.
        """
        pixels = inputs.to(device, getattr(torch, self.dtype))
        states = self.residual_stream(device).read(pixels)  # (images, positions, d_model)
        if states.dim() != 3 or states.shape[1] < self.patches:
            raise UsageError(
                f"model_name={self.name!r}: {self.config.model_type} turns {self.patches} patches "
                f"into activations of shape {tuple(states.shape[1:])}, which should be one a patch"
            )
        return states[:, -self.patches :]

    def _config_read(self, saved: PretrainedConfig) -> PretrainedConfig:
        read: PretrainedConfig = getattr(saved, "vision_config", saved)
        return read

    def load(self) -> Any:
        """Return the model with its weights.

        Raises:
            UsageError: If there are none in safetensors files, or not all that are read.
        """
        from transformers import AutoModel

        with _without_report():
            model, found = self._from_pretrained(
                AutoModel,
                config=self.config,
                dtype=getattr(torch, self.dtype),
                use_safetensors=True,
                output_loading_info=True,
            )
        # What comes after the blocks is not read, and a classifier's file has no pooler.
        missing = sorted(name for name in found["missing_keys"] if "pooler" not in name)
        if missing:
            raise UsageError(
                f"model_name={self.name!r}: the files lack {len(missing)} weights of "
                f"{type(model).__name__}, among them {missing[0]}"
            )
        return model

    def _prepare(self, image: Image) -> Tensor:
        pixels: Tensor = self._processor(image, return_tensors="pt")["pixel_values"]
        return pixels.squeeze(0)

    @cached_property
    def _shape(self) -> torch.Size:
        from PIL import Image

        return self._prepare(Image.new("RGB", (64, 64))).shape

    @cached_property
    def _processor(self) -> Any:
        from transformers import AutoImageProcessor

        # The other backend, torchvision, gives slightly different pixels: what an activation is
        # must not depend on whether that is installed.
        return self._from_pretrained(AutoImageProcessor, backend="pil")


@contextmanager
def _without_report() -> Iterator[None]:
    """Silence the table of weights not used: the head of a classifier, the text half of CLIP."""
    from transformers.utils.logging import get_verbosity, set_verbosity

    level = get_verbosity()
    set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        set_verbosity(level)
