"""What the tests read instead of real models, real text and real images."""

import itertools
import json

import lightning.pytorch as pl
import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

D_MODEL = 8
LENGTH = 16
STEPS = 11  # of training: three blocks, the last one cut short
END = "<|end|>"
LAYERS = 3
PATCHES = 9  # of an image
POSITIONS = 64
WORDS = [f"{a}{b}" for a, b in itertools.product(("ka", "to", "mi", "ru", "se"), repeat=2)]


def documents(count, seed=0, longest=60):
    """Documents of 1 to `longest` words; each starts with its number."""
    draw = np.random.default_rng(seed)
    return [
        " ".join([str(i), *draw.choice(WORDS, draw.integers(1, longest, endpoint=True))])
        for i in range(count)
    ]


def tokenizer(bos=None, eos=None, pad=None, extra=()):
    """A byte-level BPE tokenizer with these special tokens."""
    special = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    special = {role: token for role, token in special.items() if token is not None}
    names = list(dict.fromkeys([*special.values(), *extra]))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(documents(50), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens=[*extra], **special)


def save_model(folder):
    """GPT-2 in miniature, with its one special token."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "n_embd": D_MODEL, "n_layer": LAYERS, "n_head": 2}
    config = GPT2Config(**sizes, n_positions=POSITIONS, bos_token_id=0, eos_token_id=0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tokenizer(END, END).save_pretrained(folder)
    return folder


def save_text(file, count=120, seed=0):
    rows = [json.dumps({"text": text, "id": i}) for i, text in enumerate(documents(count, seed))]
    file.write_text("\n".join(rows))
    return file


def arguments(model_folder, text_file):
    return {
        "model_name": str(model_folder),
        "layer": 1,
        "text": str(text_file),
        "held_out_documents": 20,
        "context_length": LENGTH,
        "batch_size": 64,
        "batches_per_block": 4,
        "model_batch_size": 5,
        "validation_tokens": 20 * LENGTH,
        "test_tokens": 12 * LENGTH,
    }


class Recorder(pl.LightningModule):
    """Learns a little, and remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(D_MODEL, 1)
        self.trained, self.validated, self.tested = [], [], []

    def training_step(self, batch, batch_idx):
        self.trained.append(batch)
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch)

    def test_step(self, batch, batch_idx):
        self.tested.append(batch)

    def predict_step(self, batch, batch_idx):
        return batch["input_ids"]

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def trainer(folder, max_steps=STEPS, **changed):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "enable_checkpointing": False, "limit_val_batches": 0}
    return pl.Trainer(default_root_dir=folder, max_steps=max_steps, **{**quiet, **changed})


def same(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))


def save_vision_model(folder):
    """A ViT in miniature, saved with the head of a classifier, as most are."""
    torch.manual_seed(0)
    sizes = {"hidden_size": D_MODEL, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    model = ViTForImageClassification(
        ViTConfig(**sizes, intermediate_size=16, image_size=12, patch_size=4)
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 12, "width": 12}).save_pretrained(folder)
    return folder


def pictures(count, seed=0):
    """Images of several sizes, no two the same."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(8, 20, (count, 2))
    return [Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def save_images(folder, count=60, seed=0):
    """A folder of a folder for each of two classes."""
    for i, picture in enumerate(pictures(count, seed)):
        file = folder / f"class{2 * i // count}" / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
    return folder


def image_arguments(vision_folder, image_folder):
    return {
        "model_name": str(vision_folder),
        "layer": 1,
        "images": str(image_folder),
        "held_out_images": 20,
        "batch_size": 30,
        "batches_per_block": 4,
        "model_batch_size": 3,
        "validation_tokens": 10 * PATCHES,
        "test_tokens": 7 * PATCHES + 1,
    }
