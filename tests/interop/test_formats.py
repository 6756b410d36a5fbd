"""Folders of other libraries, by the name of the library."""

from pathlib import Path

import pytest

from lightning_sae import UsageError
from lightning_sae.interop import FORMATS, load_foreign
from tests.helpers.foreign import there_and_back, trained


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_sae_is_told_in_one_line(name: str, tmp_path: Path):
    with pytest.raises(UsageError, match=f"^{name}:.*: there is no such folder"):
        load_foreign(f"{name}:{tmp_path / 'none'}")
    with pytest.raises(UsageError, match=f"is no SAE of {name}, or is damaged"):
        load_foreign(f"{name}:{tmp_path}")
    there_and_back(trained("topk"), name, tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UsageError, match=f"is no SAE of {name}, or is damaged"):
        load_foreign(f"{name}:{tmp_path}")


def test_the_name_of_a_library_comes_first(tmp_path: Path):
    with pytest.raises(UsageError, match="begins with none of saelens:, sparsify:, "):
        load_foreign(str(tmp_path))
