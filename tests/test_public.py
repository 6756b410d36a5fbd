"""What `lightning_sae` gives is there whichever is asked for first, and costs nothing before."""

import pickle
import subprocess
import sys

import pytest

import lightning_sae
from lightning_sae import public

LIBRARIES = {"torch", "lightning", "torchmetrics", "transformers", "datasets", "jsonargparse"}


def python(code: str) -> str:
    """Return what a new process prints."""
    done = subprocess.run(  # noqa: S603 - our own code
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_package_by_itself_imports_no_library():
    code = f"import lightning_sae, sys; print({LIBRARIES} & set(sys.modules))"
    assert python(code) == "set()"


@pytest.mark.parametrize(
    ("code", "printed"),
    [
        ("from lightning_sae import *; print(MutualChoiceSAE.__name__)", "MutualChoiceSAE"),
        ("import lightning_sae; print(lightning_sae.callbacks.KDecay.__name__)", "KDecay"),
        # whose class is found by the name in its file
        (
            "import lightning_sae as ls; print(type(ls.load('quickstart/mutual_choice')).__name__)",
            "MutualChoiceSAE",
        ),
        ("import lightning_sae; print('TopKSAE' in dir(lightning_sae))", "True"),
    ],
)
def test_it_is_there_when_it_is_the_first_thing_asked_for(code: str, printed: str):
    assert python(code) == printed


def test_every_name_is_there_and_no_other():
    assert lightning_sae.__all__ == public.__all__
    assert set(public.__all__) <= set(dir(lightning_sae))
    for name in public.__all__:
        assert getattr(lightning_sae, name) is getattr(public, name)
    with pytest.raises(AttributeError, match=r"'lightning_sae' has no attribute 'TopK'"):
        _ = lightning_sae.TopK
    with pytest.raises(ImportError, match="cannot import name 'TopK'"):
        from lightning_sae import TopK  # noqa: F401 - there is none


def test_classes_are_pickled_by_where_they_are_defined():
    assert pickle.loads(pickle.dumps(lightning_sae.TopKSAE)) is lightning_sae.TopKSAE  # noqa: S301 - ours
    assert lightning_sae.TopKSAE.__module__ == "lightning_sae.architectures.topk"
