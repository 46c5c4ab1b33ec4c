"""A pruned model as a draft: the text stays that of the dense model, and the counts are right."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from mllm_compress.cli import app
from mllm_compress.data import small_data
from mllm_compress.evaluation.speculative import (
    agreement,
    check_draft,
    drafted_passes,
    greedy,
    prompts_of,
    speculative_table,
    timed_drafts,
)
from mllm_compress.pruning import apply_plan, plan_layerwise

WORDS = torch.Generator().manual_seed(0)
PROMPTS = [{"input_ids": torch.randint(3, 60, (1, n), generator=WORDS)} for n in (5, 9, 14)]
PROMPTS = [p | {"attention_mask": torch.ones_like(p["input_ids"])} for p in PROMPTS]


@pytest.fixture
def dense(tiny_lm):
    model = tiny_lm("llama")
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture
def small(dense):
    draft = apply_plan(dense, plan_layerwise(dense, layers=[1]))
    draft.generation_config.eos_token_id = None
    return draft


def counted(model) -> list:
    "A list that grows with every forward pass of a model."
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_the_text_is_that_of_the_dense_model(dense, small):
    assert timed_drafts(dense, small, PROMPTS, 20, drafted=3)["same text"]


@pytest.mark.parametrize("drafted", [2, 3, 5])
def test_the_counts_are_those_of_generate(dense, small, drafted):
    from mllm_compress.evaluation.speculative import draft_settings

    draft_settings(small, drafted)
    calls, drafts = counted(dense), counted(small)
    for inputs in PROMPTS:
        expected = drafted_passes(agreement(dense, small, inputs, 20), drafted)[:2]
        calls.clear(), drafts.clear()
        greedy(dense, inputs, 20, assistant_model=small)
        assert (len(calls), len(drafts)) == expected


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 8))
def test_every_token_is_accepted_or_the_dense_models_own(agrees, drafted):
    passes, total, accepted = drafted_passes(agrees, drafted)
    assert passes + accepted == len(agrees)
    assert accepted <= total <= drafted * passes


def test_behind_pictures_the_share_stands_alone(tiny_llava):
    model, processor = tiny_llava
    prompts = prompts_of(small_data("test"), processor, n=3)
    table = speculative_table(model, copy.deepcopy(model), prompts, new_tokens=8)
    assert (table.accepted.dropna() == 1).all() and "speed-up" not in table


def test_another_vocabulary_is_refused(dense, tiny_lm):
    with pytest.raises(ValueError, match="64 tokens are not 80"):
        check_draft(dense, tiny_lm("llama", vocab=80))


def test_compare_shows_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = lambda line: CliRunner().invoke(app, line.split())
    assert run("prune smoke-llava -o small --layers 1").exit_code == 0
    line = "compare smoke-llava small --limit 4 --benchmark scenes/open --speculative 4 -o out"
    result = run(f"{line} --json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["speculative"]
    assert [row["drafted"] for row in rows] == [3, 5] and rows[0]["prompts"] == 4
    assert (tmp_path / "out/speculative.csv").read_text().startswith("drafted,prompts,tokens")
