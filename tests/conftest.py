"""Shared fixtures: the golden cases and tiny random models that every test may copy."""

import copy
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from small_texts import sizes, write_texts

from mllm_compress.zoo.models import load_model

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="store the golden numbers of new rows and new versions (tests/golden_versions.py)",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: only in `make test-all`")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it


def pytest_collection_modifyitems(items):
    "Tests of a file share its fixtures, so they stay in one process; notebooks are independent."
    for item in items:
        alone = item.name if item.path.stem == "test_lessons" else item.path.stem
        item.add_marker(pytest.mark.xdist_group(alone))
    items.sort(key=lambda item: item.path.stem != "test_lessons")


@pytest.fixture
def update_golden(request) -> bool:
    "Whether --update-golden was given."
    return request.config.getoption("--update-golden")


@pytest.fixture(scope="session")
def golden() -> Path:
    "Models and inputs with what the original implementation selects on them."
    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def tiny_llava():
    "A random 4-layer CLIP + Llama model with its processor; copy it before changing it."

    return load_model("smoke-llava")


@pytest.fixture(scope="session")
def pair(tiny_llava):
    "A student whose decoder was disturbed, its teacher, and the processor."
    from mllm_compress.anatomy.families import anatomy

    teacher, processor = tiny_llava
    student, g = copy.deepcopy(teacher), torch.Generator().manual_seed(1)
    for p in anatomy(student).decoder.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=g)
    return student, teacher, processor


@pytest.fixture(scope="session")
def tiny_bunny():
    "A random 4-layer SigLIP + Phi model with its processor; copy it before changing it."

    return load_model("smoke-bunny")


@pytest.fixture(scope="session", autouse=True)
def small_texts(tmp_path_factory):
    "The texts, made up and small, in place of the packages that a machine may have."
    root = write_texts(tmp_path_factory.mktemp("texts"))
    before = os.environ.get("MLLM_COMPRESS_TEXTS")
    os.environ["MLLM_COMPRESS_TEXTS"] = str(root)
    yield root
    os.environ.pop("MLLM_COMPRESS_TEXTS")
    if before is not None:
        os.environ["MLLM_COMPRESS_TEXTS"] = before


FAMILIES = ["llama", "mistral", "qwen2", "phi", "phi3"]


@pytest.fixture(scope="session")
def tiny_lm():
    "A factory of random plain decoders: tiny_lm('qwen2', layers=4, groups=2, queries=2)."
    from transformers import AutoConfig, AutoModelForCausalLM

    def build(
        family: str,
        layers: int = 4,
        hidden: int = 32,
        groups: int = 2,
        queries: int = 2,
        neurons: int = 48,
        vocab: int = 64,
        seed: int = 0,
        **kw,
    ):
        config = AutoConfig.for_model(
            family,
            **sizes(hidden, neurons, layers, groups * queries, groups, vocab, 128),
            tie_word_embeddings=False,
            **kw,
        )
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()

    return build


@pytest.fixture
def here(shop, tmp_path, monkeypatch) -> Path:
    "A copy of a test file's `shop`, a folder with models and data, as the current folder."
    shutil.copytree(shop, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def away(tmp_path, monkeypatch) -> Path:
    "A current folder outside of the checkout, so that results go there."
    monkeypatch.chdir(tmp_path)
    return tmp_path
