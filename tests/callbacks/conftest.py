"""Settings of the tests of callbacks."""

import pytest


def pytest_collection_modifyitems(items):
    # The loaders here hold ready-made batches: no workers to recommend.
    ignored = pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
    for item in items:
        if "callbacks" in item.path.parts:
            item.add_marker(ignored)
