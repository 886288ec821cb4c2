"""A pytest plugin: tests for a GPU are like all others, to rehearse one that a CPU can do."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Take the marker away, wherever it was put."""
    for item in items:
        for node in item.listchain():
            node.own_markers = [marker for marker in node.own_markers if marker.name != "gpu"]
