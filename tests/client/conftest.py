"""A running server for each module, and the typed client of it."""

from __future__ import annotations

import pytest

from tests.server.conftest import InThread


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = InThread(tmp_path_factory.mktemp("server"), deterministic=True, long_poll_seconds=5)
    yield made
    made.stop()


@pytest.fixture
def client(server):
    from lorica.client.remote import ServiceClient

    made = ServiceClient(base_url=server.url, api_key=server.key)
    yield made
    made.close("success").result(30)
