"""Stand-ins that tests of several rooms share."""

from __future__ import annotations

import pytest
from support.counting_server import CountingServer


@pytest.fixture
def counting_server() -> CountingServer:
    return CountingServer()
