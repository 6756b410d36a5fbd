"""`python -m lightning_sae` is the command `lightning_sae`."""

from lightning_sae.cli import main

main()
