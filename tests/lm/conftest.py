from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from acestep.checkpoints.tiny_planner import write_tiny_planner
from acestep.lm.decoder import Decoder
from acestep.lm.grammar import Grammar
from acestep.lm.loading import load_model
from acestep.lm.model import PlannerModel
from acestep.lm.planner import Planner
from acestep.lm.tokenizer import PlannerTokenizer
from acestep.settings import PlannerSettings

MAX_LEN = 2_048
torch.set_num_threads(1)  # tiny products: a second thread only waits


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-planner")
    write_tiny_planner(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(checkpoint: Path) -> PlannerTokenizer:
    return PlannerTokenizer.load(checkpoint)


@pytest.fixture(scope="session")
def grammar(tokenizer: PlannerTokenizer) -> Grammar:
    return Grammar(tokenizer)


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> PlannerModel:
    return load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32, max_len=MAX_LEN)


@pytest.fixture
def decoder(model: PlannerModel, grammar: Grammar) -> Decoder:
    return Decoder(model, grammar, rows=12, arena_tokens=12 * MAX_LEN)


@pytest.fixture(scope="module")
def planner(checkpoint: Path) -> Iterator[Planner]:
    planner = Planner.load(checkpoint, PlannerSettings(slots=12, max_len=4_096))
    yield planner
    planner.close()
