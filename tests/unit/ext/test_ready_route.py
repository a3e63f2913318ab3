"""`GET /sere/ready`, the pods' readiness probe: 503 until the first policy is applied."""

from __future__ import annotations

from types import SimpleNamespace

import pytest


def test_ready_follows_the_first_application() -> None:
    fastapi = pytest.importorskip("fastapi", reason="the engine's web framework is missing: pip install 'sere[vllm]'")
    testclient = pytest.importorskip("fastapi.testclient")
    from sere_ext.control.routes import SereControl

    app = fastapi.FastAPI()
    SereControl().attach_router(app)
    client = testclient.TestClient(app)
    assert client.get("/sere/ready").status_code == 503  # no engine

    async def state() -> SimpleNamespace:
        return SimpleNamespace(ready=applied)

    applied = False
    app.state.sere = SimpleNamespace(ready=False, state=state)
    assert client.get("/sere/ready").status_code == 503
    applied = True  # by the watcher of another API server; this one reads it from the workers
    assert client.get("/sere/ready").status_code == 200
    app.state.sere = SimpleNamespace(ready=True)
    assert client.get("/sere/ready").json() == {"ready": True}
