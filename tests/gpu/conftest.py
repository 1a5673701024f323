"""Skips what needs more devices than there are."""

import pytest

from tests.gpu.devices import device_count


@pytest.fixture(autouse=True)
def enough_devices(request):
    size = request.node.callspec.params.get("_world_size", 1) if hasattr(request.node, "callspec") else 1
    if device_count() < size:
        pytest.skip(f"needs {size} device{'s' * (size > 1)}")
