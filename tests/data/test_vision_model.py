import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from lightning_sae.data.vision_model import VisionModel
from tests.data.tiny import D_MODEL, LAYERS, PATCHES, pictures

CPU = torch.device("cpu")
SIZES = {"hidden_size": D_MODEL, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
SQUARES = {"image_size": 12, "patch_size": 4}
TOWERS = {
    "text_config": {**SIZES, "vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1},
    "vision_config": {**SIZES, **SQUARES, "intermediate_size": 16},
}
BEFORE_THE_PATCHES = {
    "ViTModel": 1,  # class
    "DeiTModel": 2,  # class, distillation
    "BeitModel": 1,
    "Dinov2Model": 1,
    "Dinov2WithRegistersModel": 5,  # class, 4 registers
    "DINOv3ViTModel": 5,
    "CLIPModel": 1,
    "SiglipModel": 0,
}


def vision_model(name, layer=1, dtype="float32"):
    return VisionModel(str(name), layer, dtype=dtype)


def save(folder, name, **changed):
    """A random model of this class, and a processor that makes its images of 12 x 12 pixels."""
    model_class = getattr(transformers, name)
    sizes = TOWERS if name in ("CLIPModel", "SiglipModel") else {**SIZES, **SQUARES}
    sizes |= {"num_register_tokens": 4} if BEFORE_THE_PATCHES.get(name) == 5 else {}
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**sizes, **changed})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    size = {"height": 12, "width": 12}
    transformers.ViTImageProcessorPil(size=size).save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", BEFORE_THE_PATCHES)
def test_activations_are_those_of_the_patches(tmp_path, name):
    whole = save(tmp_path, name)
    model = vision_model(tmp_path)
    pixels = torch.stack([model.pixels(picture) for picture in pictures(3)])
    assert pixels.shape == (3, 3, 12, 12)
    part = getattr(whole, "vision_model", whole)
    with torch.no_grad():
        states = part(pixels, output_hidden_states=True).hidden_states[2]
    assert model.patches == PATCHES == states.shape[1] - BEFORE_THE_PATCHES[name]
    activations = model.reader(CPU)(pixels)
    torch.testing.assert_close(activations, states[:, BEFORE_THE_PATCHES[name] :])
    assert model.config.hidden_size == D_MODEL


def test_patches_are_in_reading_order(vision_folder):
    """Without the blocks' mixing: a patch changed changes the activation of that place most."""
    model = vision_model(vision_folder, layer=0)
    read = model.reader(CPU)
    pixels = torch.zeros(1, 3, 12, 12)
    for place in range(PATCHES):
        changed = pixels.clone()
        row, column = divmod(place, 3)
        changed[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 5
        assert (read(changed) - read(pixels)).norm(dim=-1).argmax() == place


def test_the_head_of_a_classifier_is_left_out_in_silence(vision_folder, capsys, caplog):
    stream = vision_model(vision_folder).residual_stream(CPU)
    assert type(stream.model).__name__ == "ViTModel"
    assert not stream.model.training
    assert not any(p.requires_grad for p in stream.model.parameters())
    assert "UNEXPECTED" not in capsys.readouterr().err + caplog.text
    assert transformers.utils.logging.get_verbosity() == transformers.utils.logging.WARNING


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_images_are_read_in_the_dtype(vision_folder, dtype):
    model = vision_model(vision_folder, dtype=dtype)
    pixels = model.pixels(pictures(1)[0])[None]
    exact = vision_model(vision_folder).reader(CPU)(pixels)
    activations = model.reader(CPU)(pixels)
    assert activations.dtype == getattr(torch, dtype)
    assert (activations.float() - exact).norm() < 0.1 * exact.norm()


def test_the_cache_is_told_apart_by_pixels(vision_folder, tmp_path, monkeypatch):
    model = vision_model(vision_folder)
    images = [model.pixels(picture)[None] for picture in pictures(2)]
    read = model.reader(CPU, str(tmp_path))
    first = [read(pixels) for pixels in images]
    assert not torch.equal(*first)
    model.write_caches()
    monkeypatch.setattr(AutoModel, "from_pretrained", None)
    again = vision_model(vision_folder).reader(CPU, str(tmp_path))
    assert all(torch.equal(again(pixels), x) for pixels, x in zip(images, first, strict=True))


def test_patches_need_no_weights(vision_folder, monkeypatch):
    monkeypatch.setattr(AutoModel, "from_pretrained", None)
    assert vision_model(vision_folder).patches == PATCHES


def test_patches_that_are_not_square(tmp_path):
    save(tmp_path, "Dinov2Model", patch_size=(6, 4))
    assert vision_model(tmp_path).patches == 6


def test_models_that_do_not_fit(tmp_path, model_folder, vision_folder):
    with pytest.raises(ValueError, match=r"^model_name='.*': gpt2 is no vision transformer$"):
        _ = vision_model(model_folder).patches
    with pytest.raises(ValueError, match=r"^layer=3 is out of range: .* has layers 0 to 2$"):
        _ = vision_model(vision_folder, layer=3).patches
    save(tmp_path, "ViTMAEModel")  # reads a quarter of the patches, at random
    message = r"^model_name='.*': vit_mae turns 9 patches into activations of shape \(3, 8\)"
    with pytest.raises(ValueError, match=message):
        vision_model(tmp_path).reader(CPU)(torch.zeros(1, 3, 12, 12))


def test_images_left_at_their_size(tmp_path):
    save(tmp_path, "ViTModel")
    transformers.ViTImageProcessorPil(do_resize=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its image processor leaves images of several sizes"):
        vision_model(tmp_path).pixels(pictures(1)[0])


def test_incomplete_folders(tmp_path, vision_folder):
    folder = shutil.copytree(vision_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    lacking = {name: x for name, x in weights.items() if "layer.1.output" not in name}
    save_file(lacking, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"^model_name='.*': the files lack 2 weights of ViTModel"):
        vision_model(folder).residual_stream(CPU)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"^model_name='.*model': ") as told:
        _ = vision_model(folder).patches
    assert "\n" not in str(told.value)
