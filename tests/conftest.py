"""One thread and one hypothesis profile for every test: spinning threads are slow on shared machines. A Postgres and an
S3 that tests start, where this machine can.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import HealthCheck, settings

from lorica import models
from tests.postgres import ABSENT, Cluster, binaries, cluster

torch.set_num_threads(1)
settings.register_profile("lorica", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lorica")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a model of nano's kind, with its vocabulary and template, whose step takes a tenth of the time.
    Recipes run on it; what is about nano itself runs on nano.
    """
    nano = models.load("nano")
    assert nano.tokenizer is not None
    folder = tmp_path_factory.mktemp("small")
    sizes = {"vocab_size": nano.module.config.vocab_size, "intermediate_size": 48, "head_dim": 8}
    models.tiny("qwen3", max_position_embeddings=512, **sizes).module.save_pretrained(folder)
    nano.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    if binaries() is None:
        pytest.skip(ABSENT)
    with cluster() as running:
        yield running


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The URL of a bucket on a local server that speaks S3."""
    server = pytest.importorskip("moto.server", reason="moto, flask and flask-cors are not installed")
    fsspec = pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'lorica[s3]'")
    running = server.ThreadedMotoServer("127.0.0.1", 0)
    running.start()
    host, port = running.get_host_and_port()
    settings = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        fsspec.S3FileSystem().mkdir("lorica")
        yield "s3://lorica"
    running.stop()
