from __future__ import annotations

from uuid import uuid4

import pytest

from aae_batch.store.base import Storage
from aae_batch.store.open import open_storage


@pytest.fixture(params=["local", "s3", "memory"])
def storage(request, tmp_path) -> Storage:
    """An empty root of every kind."""
    if request.param == "local":
        return open_storage(tmp_path / "out")
    if request.param == "s3":
        return open_storage(f"{request.getfixturevalue('bucket').url}/some/out")
    return open_storage(f"memory://{uuid4().hex}/out")
