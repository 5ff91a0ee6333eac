from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from acestep.checkpoints.bpe import byte_level_bpe
from acestep.checkpoints.tiny_planner import SPECIAL_TOKENS, write_tiny_planner
from acestep.lm.decoder import Decoder
from acestep.lm.grammar import Grammar
from acestep.lm.loading import load_model
from acestep.lm.model import PlannerModel
from acestep.lm.planner import Planner
from acestep.lm.tokenizer import PlannerTokenizer
from acestep.stage_settings import PlannerSettings

MAX_LEN = 2_048
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anybody imports Triton
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


@pytest.fixture(params=["flat", "static"])
def either_decoder(request: pytest.FixtureRequest, model: PlannerModel, grammar: Grammar) -> Decoder:
    """The way of the CPU, and the static shapes of a GPU run eagerly."""
    static_len = MAX_LEN if request.param == "static" else None
    return Decoder(model, grammar, rows=12, arena_tokens=12 * MAX_LEN, static_len=static_len)


@pytest.fixture(scope="module")
def planner(checkpoint: Path) -> Iterator[Planner]:
    planner = Planner.load(checkpoint, PlannerSettings(slots=12, max_len=4_096))
    yield planner
    planner.close()


@pytest.fixture(scope="module")
def brief_planner(checkpoint: Path) -> Iterator[Planner]:
    """For texts: the tiny planner hardly ever ends one by itself."""
    planner = Planner.load(checkpoint, PlannerSettings(slots=12, max_len=1_024))
    yield planner
    planner.close()


@pytest.fixture(scope="session")
def qwen() -> PlannerTokenizer:
    """The true vocabulary: Qwen's BPE, its special tokens and 65 535 audio codes."""
    folder = os.environ.get("QWEN_BPE_DIR", "")
    if not folder:
        pytest.skip("QWEN_BPE_DIR is not set: it names a folder with Qwen's vocab.json and merges.txt")
    vocab = json.loads((Path(folder) / "vocab.json").read_text(encoding="utf-8"))
    lines = (Path(folder) / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [(a, b) for a, _, b in (line.partition(" ") for line in lines if line and not line.startswith("#version"))]
    names = [*SPECIAL_TOKENS, *(f"<|audio_code_{n}|>" for n in range(65_535))]
    added = {name: len(vocab) + i for i, name in enumerate(names)}
    return PlannerTokenizer(byte_level_bpe(vocab, merges), added, source="qwen")
