"""Sites: what of a block is read, and which of its modules that goes into or comes out of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_sae.checks import UsageError, require_at_least, require_choice
from lightning_sae.hooks import hooked

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "Layers",
    "Site",
    "Sites",
    "find_site",
    "hook_name_of",
    "name_of",
    "pairs_of",
    "site_of",
    "width_of",
]

Site = Literal["resid_post", "mlp_in", "mlp_out", "z"]
"""What of a block is read, by TransformerLens' names but for one:

* `resid_post`: the residual stream after it;
* `mlp_in`: what its MLP is given, after the norm. (TransformerLens' `hook_mlp_in` is before it.);
* `mlp_out`: what its MLP adds to the residual stream, so after a norm that follows it;
* `z`: what its attention heads put out, before they are projected, one head beside the other.
"""
Layers = int | str | list[int | str]
"""A block, from 0, or the path of one; or several."""
Sites = Site | list[Site]
"""A site, or several."""

_HOOKS: Final = {
    "resid_post": "blocks.{}.hook_resid_post",
    # In `TransformerBridge`. `ln2.hook_normalized` is before the norm's weights, unless folded.
    "mlp_in": "blocks.{}.mlp.hook_in",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "z": "blocks.{}.attn.hook_z",
}


def pairs_of(layer: Layers, site: Sites) -> list[tuple[int | str, Site]]:
    """Return each layer with each site, those of a layer beside each other.

    Raises:
        UsageError: If there is none, one is named twice, or a layer is negative or a site unknown.
    """
    layers: list[int | str] = list(layer) if isinstance(layer, list) else [layer]
    sites: list[Site] = list(site) if isinstance(site, list) else [site]
    for each in layers:
        if not isinstance(each, str):
            require_at_least(0, layer=each)
    for name in sites:
        require_choice(of=get_args(Site), site=name)
    for key, value, named in (("layer", layer, layers), ("site", site, sites)):
        if not named or len({*named}) < len(named):
            raise UsageError(f"{key}={value!r} must name at least one, and none of them twice")
    return [(each, name) for each in layers for name in sites]


def name_of(layer: int | str, site: Site) -> str:
    """Return what curves and folders call a site, `layer_2` or `layer_2_mlp_out` say."""
    where = f"layer_{layer}".replace(".", "_")
    return where if site == "resid_post" else f"{where}_{site}"


def hook_name_of(layer: int | str, site: Site) -> str | None:
    """Return what TransformerLens calls a site; None of a layer that is named by its path."""
    return None if isinstance(layer, str) else _HOOKS[site].format(layer)


def site_of(hook_name: str) -> tuple[int, Site] | None:
    """Return the block and the site that TransformerLens calls by a name; None if there is none."""
    parts = hook_name.split(".", 2)
    if parts[0] != "blocks" or len(parts) < 3 or not parts[1].isdecimal():
        return None
    layer = int(parts[1])
    return next(
        ((layer, each) for each in get_args(Site) if hook_name_of(layer, each) == hook_name), None
    )


def width_of(config: PretrainedConfig, site: Site) -> int:
    """Return how wide the activations of a site are, by a model's configuration alone."""
    text: Any = config.get_text_config()
    if site != "z":
        return int(text.hidden_size)
    own = (getattr(text, name, None) for name in ("v_head_dim", "head_dim"))
    width = next((each for each in own if each), text.hidden_size // text.num_attention_heads)
    return int(text.num_attention_heads * width)


@torch.no_grad()
def find_site(
    model: PreTrainedModel, path: str, site: Site, run: Callable[[], Any]
) -> tuple[str, bool]:
    """Return where a site of a block is: the path of a module, and whether its input is meant.

    Found out by what runs: of the parts of a block, those with weight matrices, the first is the
    attention, and the last the MLP if the block adds to its stream what that puts out, perhaps
    after a norm. The last matrix in the attention is its output projection.

    Args:
        model: The model.
        path: Its block.
        site: What of it.
        run: Runs the model on a few inputs.

    Raises:
        UsageError: If the block has no such parts.
    """
    if site == "resid_post":
        return path, False
    block = model.get_submodule(path)
    names = list(_outputs(block, run))  # in the order in which they are through
    children = [name for name in names if name and "." not in name]
    parts = [name for name in children if _is_part(block.get_submodule(name))]
    if len(parts) > 1:
        attention, mlp = parts[0], parts[-1]
        maps = [name for name in names if _is_map(block, name, attention)]
        if site == "z" and maps:
            return f"{path}.{maps[-1]}", True
        after = children[children.index(mlp) :]
        added = next((name for name in after if _is_added(block, name, run)), None)
        if site != "z" and added is not None:
            return (f"{path}.{mlp}", True) if site == "mlp_in" else (f"{path}.{added}", False)
    raise UsageError(
        f"site={site!r}: where it is in {path} of {type(model).__name__} cannot be told; layer may "
        "be the path of a module whose output is to be read"
    )


def _outputs(block: nn.Module, run: Callable[[], Any], silent: str = "") -> dict[str, Any]:
    """Return what the modules of a block put out in a run, the block itself under "".

    Args:
        block: The block.
        run: Runs the model.
        silent: A module that is to put out zeros. Default: none is.
    """
    found: dict[str, Any] = {}

    def noting(name: str) -> Callable[..., Any]:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            several = isinstance(output, tuple | list)
            found[name] = first = output[0] if several else output
            if not name or name != silent:
                return output
            return type(output)([0 * first, *output[1:]]) if several else 0 * first

        return note

    with ExitStack() as hooks:
        for name, module in block.named_modules():
            hooks.enter_context(hooked(module, noting(name)))
        run()
    return found


def _is_added(block: nn.Module, name: str, run: Callable[[], Any]) -> bool:
    """Return whether a block adds what a module puts out to a stream of its own."""
    found = _outputs(block, run)
    part, whole, rest = found[name], found[""], _outputs(block, run, silent=name)[""]
    if not isinstance(part, Tensor) or part.shape != whole.shape:
        return False
    rounding = 8 * torch.finfo(whole.dtype).eps * whole.abs().max()
    return bool(rest.any() and (whole - rest - part).abs().max() <= rounding)


def _is_part(module: nn.Module) -> bool:
    return any(module.children()) and any(weight.dim() > 1 for weight in module.parameters())


def _is_map(block: nn.Module, name: str, attention: str) -> bool:
    """Return whether a module of the attention is a matrix."""
    module = block.get_submodule(name)
    inside = name.startswith(f"{attention}.") and not any(module.children())
    return inside and getattr(getattr(module, "weight", None), "ndim", 0) == 2
