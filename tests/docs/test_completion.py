"""Completion in the shell, as the page says how to get it."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/quickstart.md"
COMPLETE = """
source ~/.local/share/bash-completion/completions/lightning_sae
complete_words() {
    COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
    "$(complete -p lightning_sae | sed 's/.* -F \\([^ ]*\\) .*/\\1/')"
    echo "${COMPREPLY[@]}"
}
complete_words lightning_sae fi
complete_words lightning_sae fit --trainer.max_st
complete_words lightning_sae fit --model.k
complete_words lightning_sae fit --model ''
"""


def test_the_shell_completes_what_the_page_says(tmp_path: Path) -> None:
    (block,) = re.findall(r"^## Completion.*?```bash\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    block = block.replace("lightning_sae -", f"{shlex.quote(sys.executable)} -m lightning_sae -")
    completed = subprocess.run(  # noqa: S603
        ["bash", "-euo", "pipefail", "-c", block + COMPLETE],  # noqa: S607
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    commands, settings, of_model, classes = map(str.split, completed.stdout.splitlines())
    assert commands == ["fit"]
    assert settings == ["--trainer.max_steps"]
    assert "--model.k" in of_model
    assert {"lightning_sae.MutualChoiceSAE", "lightning_sae.TopKSAE"} <= set(classes)
