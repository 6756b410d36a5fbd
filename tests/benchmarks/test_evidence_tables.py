"""Tables of the evidence: a row for each variant, over its seeds."""

from benchmarks.evidence_tables import tables


def result(seed: int, fvu: float, **more):
    run = {"variant": "TopK", "n_features": 8192, "k": 16, "seed": seed}
    return {
        "run": run,
        "fvu": fvu,
        "loss_recovered": 0.97,
        "own": {"l0": 16.0},
        "never_fired": 3,
        "fired_less_than_5_times": 6,
        "fvu_without_rarest": {"quarter": 0.13, "half": 0.15},
        "duplicates": 0.0,
        "cpu_seconds": 500.0,
        **more,
    }


def test_seeds_are_a_mean_and_a_range():
    (table,) = tables([result(0, 0.11), result(1, 0.13)])
    header, _, row = table.splitlines()
    assert header.startswith("| 8192 features, k = 16 | seeds | FVU |")
    assert row.startswith("| TopK | 2 | 0.1200 (0.1100 to 0.1300) | 0.9700 (0.9700 to 0.9700) |")


def test_what_was_not_measured_is_left_open():
    """The model may predict no tokens, and the densities follow no law."""
    (table,) = tables([result(0, 0.11, loss_recovered=None)])
    assert "| TopK | 1 | 0.1100 | - | 16.00 |" in table
    assert table.endswith("| - | 500 |")


def test_each_size_has_a_table():
    other = result(0, 0.11)
    other["run"] = other["run"] | {"k": 32}
    assert len(list(tables([result(0, 0.11), other]))) == 2
