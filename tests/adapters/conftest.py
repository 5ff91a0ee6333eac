"""The DiT of a tiny checkpoint, loaded once."""

import pytest
import torch

from acestep.checkpoints import resolve
from acestep.checkpoints.load import load_renderer


@pytest.fixture(scope="session")
def transformer(tmp_path_factory):
    checkpoint = resolve("tiny-xl", "renderer", root=tmp_path_factory.mktemp("checkpoints"))
    return load_renderer(checkpoint, device="cpu", dtype=torch.float32).transformer
