"""Makes the packaged language model and text sample from the Python standard library.

    python -m lightning_sae.quickstart.make corpus      # tokenizer and text sample
    python -m lightning_sae.quickstart.make train       # model, about an hour on two CPU cores
    python -m lightning_sae.quickstart.make evaluate    # the figures in the model card

They write over the packaged files. `train` keeps a checkpoint, and goes on from it if stopped.
"""

import argparse
import contextlib
import hashlib
import itertools
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lightning_sae.quickstart import FOLDER, TEXT

SEED: Final = 0
END: Final = "<|endoftext|>"
VOCABULARY: Final = 4096
CONTEXT: Final = 256
BATCH: Final = 16
SAMPLE_BYTES: Final = 20_000_000
LEARNING_RATE: Final = 6e-3
WARM_UP_STEPS: Final = 100
SAVE_EVERY: Final = 200

# Installed packages, code-page tables, copies of other files as test data, and build outputs.
SKIPPED: Final = re.compile(
    r"(^|/)(site-packages|__pycache__)/|^(encodings|lib2to3/tests/data|config-[^/]*)/|^_sysconfigdata"
)


class Document(NamedTuple):
    """One source file: its path relative to the standard library, and its text."""

    path: str
    text: str


def is_held_out(path: str) -> bool:
    """Whether the file at this standard-library path is kept from the model (about 8 %)."""
    return int(hashlib.sha256(path.encode()).hexdigest(), 16) % 100 < 8


def is_wordy(text: str) -> bool:
    """Whether 60 % of the non-space characters are letters or `_`: not a table, nor near empty."""
    body = "".join(text.split())
    return sum(c == "_" or (c.isascii() and c.isalpha()) for c in body) >= 0.6 * max(len(body), 64)


def read_corpus() -> tuple[list[Document], list[Document]]:
    """Reads the standard library's wordy UTF-8 sources, each content once: seen, and held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents: dict[str, Document] = {}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root).as_posix()
        if not SKIPPED.search(path):
            with contextlib.suppress(UnicodeDecodeError):
                text = file.read_text("utf-8")
                if is_wordy(text):
                    documents.setdefault(text, Document(path, text))
    seen = [document for document in documents.values() if not is_held_out(document.path)]
    return seen, [document for document in documents.values() if is_held_out(document.path)]


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer, GPT-2's kind, on the given documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # not annotated there
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=CONTEXT
    )


def encode(documents: list[Document]) -> npt.NDArray[np.uint16]:
    """Encodes documents as one stream of tokens, with an end-of-text token before each."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER).backend_tokenizer
    encodings = tokenizer.encode_batch([END + document.text for document in documents])
    return np.concatenate([encoding.ids for encoding in encodings]).astype(np.uint16)


def make_corpus() -> None:
    """Writes the tokenizer and the text sample: all held-out files, and a part of those seen."""
    seen, held_out = read_corpus()
    train_tokenizer(seen).save_pretrained(FOLDER)
    sample, room = [], SAMPLE_BYTES
    for document in random.Random(SEED).sample(seen, len(seen)):  # noqa: S311 - no secret
        if (size := len(document.text.encode())) <= room:
            sample.append(document)
            room -= size
    # Pages large enough that the compressor sees many files together.
    settings = {"compression": "zstd", "compression_level": 22, "data_page_size": 1 << 26}
    for name, documents in {"seen": seen, "train": sorted(sample), "validation": held_out}.items():
        size = sum(len(document.text.encode()) for document in documents)
        print(f"{name}: {len(documents)} files, {size} bytes, {len(encode(documents))} tokens")
        if name != "seen":
            table = pa.Table.from_pylist([document._asdict() for document in documents])
            pq.write_table(table, TEXT / f"{name}.parquet", use_dictionary=False, **settings)


def windows(stream: npt.NDArray[np.uint16], starts: npt.NDArray[np.int64]) -> Tensor:
    """Cuts the contexts that begin at `starts`, each with one token more, to predict."""
    return torch.from_numpy(np.stack([stream[s : s + CONTEXT + 1] for s in starts]).astype(int))


def batches(stream: npt.NDArray[np.uint16]) -> Iterator[Tensor]:
    """Yields shuffled batches for ever; every epoch cuts the stream at another offset."""
    for epoch in itertools.count():
        generator = np.random.default_rng([SEED, epoch])
        starts = np.arange(generator.integers(CONTEXT), len(stream) - CONTEXT, CONTEXT)
        generator.shuffle(starts)
        for first in range(0, len(starts) - BATCH + 1, BATCH):
            yield windows(stream, starts[first : first + BATCH])


def make_model() -> GPT2LMHeadModel:
    """Makes the untrained model, of about 4.3 million parameters."""
    torch.manual_seed(SEED)
    shape = {"n_positions": CONTEXT, "n_embd": 256, "n_layer": 4, "n_head": 4}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    gelu = {"activation_function": "gelu_pytorch_tanh"}  # GPT-2's, computed faster
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config: dict[str, Any] = {"vocab_size": VOCABULARY, **shape, **dropout, **gelu, **special}
    return GPT2LMHeadModel(GPT2Config(**config))


def make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Gives Muon the matrices within the blocks, and AdamW the embeddings and vectors."""
    named = dict(model.named_parameters())
    blocks = [p for name, p in named.items() if p.ndim == 2 and ".h." in name]
    tables = [p for name, p in named.items() if p.ndim == 2 and ".h." not in name]
    vectors = [p for p in named.values() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": tables}, {"params": vectors, "weight_decay": 0.0}]
    muon = torch.optim.Muon(blocks, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1, fused=True)]


def schedule(step: int, steps: int) -> float:
    """The learning rate: warm-up, constant, then linear to zero over the last half of the run."""
    return LEARNING_RATE * min((step + 1) / WARM_UP_STEPS, 1.0, 2 * (steps - step) / steps)


def cross_entropy(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats; in training the model computes in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16, enabled=model.training):
        logits: Tensor = model(ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def train(tokens: int, work: Path) -> None:
    """Trains the model on a number of tokens, and writes it in float16.

    Args:
        tokens: Number of training tokens; the learning-rate schedule depends on it alone.
        work: Folder of the checkpoint, from which a run that was stopped goes on.
    """
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / "checkpoint.pt"
    model = make_model()
    optimizers = make_optimizers(model)
    parts: list[Any] = [model, *optimizers]
    first, steps = 0, tokens // (BATCH * CONTEXT)
    if checkpoint.exists():
        state = torch.load(checkpoint)
        first = state["step"]
        for part, saved in zip(parts, state["parts"], strict=True):
            part.load_state_dict(saved)
    compiled = torch.compile(cross_entropy)
    losses: list[float] = []
    data = batches(encode(read_corpus()[0]))
    for step, ids in enumerate(itertools.islice(data, first, steps), first):
        loss = compiled(model, ids)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = schedule(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) == SAVE_EVERY or step + 1 == steps:
            print(f"step {step + 1}: {sum(losses) / len(losses):.4f} nats/token", flush=True)
            losses.clear()
            state = {"step": step + 1, "parts": [part.state_dict() for part in parts]}
            torch.save(state, work / "checkpoint.new")
            (work / "checkpoint.new").replace(checkpoint)
    model.half().save_pretrained(FOLDER)  # type: ignore[no-untyped-call]  # not annotated


@torch.inference_mode()
def evaluate() -> None:
    """Prints the held-out cross-entropy, and what each block's output carries."""
    model = GPT2LMHeadModel.from_pretrained(FOLDER, dtype=torch.float32)
    table = pq.read_table(TEXT / "validation.parquet")
    stream = encode([Document(**row) for row in table.to_pylist()])
    ids = windows(stream, np.arange(0, len(stream) - CONTEXT, CONTEXT))
    loss = sum(cross_entropy(model, x) * len(x) for x in torch.split(ids, BATCH)) / len(ids)
    print(f"held out: {loss:.4f} nats/token over {ids[:, 1:].numel()} tokens")
    norms: list[Tensor] = []

    def zero(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        norms.append(output.norm(dim=-1).mean(0))
        return torch.zeros_like(output)

    probe = ids[:: len(ids) // 64][:64]
    print(f"probe of {probe[:, 1:].numel()} tokens: {cross_entropy(model, probe):.4f} nats/token")
    for layer, block in enumerate(model.transformer.h):
        with block.register_forward_hook(zero):
            ablated = cross_entropy(model, probe)
        first, rest = norms[layer][0], norms[layer][1:].mean()
        print(f"block {layer}: zeroed {ablated:.4f}; mean norm {first:.2f} first, {rest:.2f} rest")


def main() -> None:
    """Runs the step named on the command line."""
    parser = argparse.ArgumentParser(description="Makes the packaged language model and text.")
    parser.add_argument("step", choices=["corpus", "train", "evaluate"])
    parser.add_argument("--tokens", type=int, default=18_022_400, help="training tokens")
    parser.add_argument("--work", type=Path, default=Path("build/quickstart"), help="checkpoint")
    options = parser.parse_args()
    if options.step == "train":
        train(options.tokens, options.work)
    else:
        {"corpus": make_corpus, "evaluate": evaluate}[options.step]()


if __name__ == "__main__":
    main()
