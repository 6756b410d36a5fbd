"""Each check names the argument, its value, and what it may be."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from lightning_sae.checks import (
    UsageError,
    require_at_least,
    require_choice,
    require_k,
    require_not_negative,
    require_positive,
    require_share,
)

REFUSED: list[tuple[Callable[..., None], dict[str, Any], str]] = [
    (require_positive, {"steps": 0}, "steps=0 must be at least 1"),
    (require_positive, {"steps": 3, "tokens": -1}, "tokens=-1 must be at least 1"),
    (require_not_negative, {"weight": -0.5}, "weight=-0.5 must be a finite number, 0 or more"),
    (require_not_negative, {"weight": math.inf}, "weight=inf must be a finite number, 0 or more"),
    (require_not_negative, {"weight": math.nan}, "weight=nan must be a finite number, 0 or more"),
    (require_share, {"part": 1.0}, "part=1.0 must be a share, 0 to less than 1"),
    (require_share, {"part": math.nan}, "part=nan must be a share, 0 to less than 1"),
    (require_choice, {"of": ("a", "b"), "rule": "c"}, "rule='c' is none of a, b"),
    (
        require_k,
        {"k": 9, "n_features": 8},
        "k=9 is out of range: it must be 1 to n_features=8",
    ),
]


@pytest.mark.parametrize(("check", "arguments", "message"), REFUSED, ids=[r[2] for r in REFUSED])
def test_what_is_out_of_range_is_told(
    check: Callable[..., None], arguments: dict[str, Any], message: str
):
    with pytest.raises(UsageError) as raised:
        check(**arguments)
    assert str(raised.value) == message


def test_what_is_at_a_bound_is_taken():
    require_at_least(2, batches=2)
    require_positive(steps=1)
    require_not_negative(weight=0)
    require_share(part=0)
    require_k(8, n_features=8)
    require_choice(of=("a", "b"), rule="b")


def test_a_usage_error_is_a_value_error():
    assert issubclass(UsageError, ValueError)
