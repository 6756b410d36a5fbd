"""Change what a model's features say while it runs, and ask which of them a result hangs on."""

from lightning_sae.interventions.attribution import Attribution, attribute
from lightning_sae.interventions.edits import ablate, clamp, splice, steer

__all__ = ["Attribution", "ablate", "attribute", "clamp", "splice", "steer"]
