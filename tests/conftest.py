"""Settings that all tests share."""

import os

import torch

# Before the libraries are imported: nothing may ask a hub, whatever a test names.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Without a GPU, Triton's interpreter runs the kernels. Lightning imports Triton where it finds it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Lightning 2.6 calls functions that jsonargparse deprecates from 4.49 on.
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

# The tensors are tiny: a second thread costs more than it does, many times more on a busy machine,
# as one is where each core has tests of its own. The second is for processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
