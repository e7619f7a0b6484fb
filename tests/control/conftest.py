from collections.abc import Iterator

import pytest

from tests.control.web_service import WebService, web_service


@pytest.fixture
def service() -> Iterator[WebService]:
    with web_service() as running:
        yield running
