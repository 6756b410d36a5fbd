"""Checks of constructor arguments that several architectures share."""


def require_k(k: int, n_features: int) -> None:
    """Refuse a number of matches per token that no dictionary of this size can give."""
    if not 1 <= k <= n_features:
        raise ValueError(f"k={k} is out of range: it must be 1 to n_features={n_features}")
