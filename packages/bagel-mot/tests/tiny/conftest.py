"""A recipe so small that a CPU trains it, and a model of it with weights that mean nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bagel_mot.model.bagel import Bagel
from bagel_mot.parallel import ParallelConfig, start
from bagel_mot.pipeline import build_model
from bagel_mot.tiny.recipe import Recipe
from bagel_mot.tiny.vocabulary import write_tokenizer
from bagel_mot.tiny.weights import initialise
from bagel_mot.tokenizer import BagelTokenizer

SMALL = Recipe(hidden=64, layers=2, mlp=128, vit_hidden=32, vit_layers=1, vit_mlp=64, vae_width=32)

# Dynamo looks at the gradients of everything it is given, of what is no leaf, too. It keeps the
# warning of that from being shown, which is too late where warnings are errors.
compiles = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration and the tokenizer of `SMALL`."""
    folder = tmp_path_factory.mktemp("tiny")
    SMALL.write_configs(folder)
    write_tokenizer(folder, SMALL.vocabulary, samples=500)
    return folder


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> BagelTokenizer:
    return BagelTokenizer.from_folder(folder)


@pytest.fixture
def model(folder: Path) -> Bagel:
    start(ParallelConfig(), "cpu")
    torch.manual_seed(0)
    model = build_model(SMALL.config(folder), device=torch.device("cpu"), dtype=torch.float32)
    initialise(model, 0)
    with torch.no_grad():  # it starts at zero, which would hide everything behind it
        model.llm2vae.weight.normal_(std=0.1)
    return model
