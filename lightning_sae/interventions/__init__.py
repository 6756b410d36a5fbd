"""Change what a model's features say while it runs."""

from lightning_sae.interventions.edits import ablate, clamp, splice, steer

__all__ = ["ablate", "clamp", "splice", "steer"]
