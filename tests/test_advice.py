"""Advice follows from a table by rules: what fits, what retains most, ties, and heavy losses."""

import io
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from mllm_compress.study import advice, guide
from mllm_compress.study.profiles import load_profile
from mllm_compress.study.statistics import SETTING, difference


def made(pruning="none", ratio=0.0, share=1.0, recovery="none", fraction=1.0, **more) -> dict:
    "A row as `study.run` gives it: n questions, of which the first `share` were right."
    row = dict(model="tiny-llava", importance="x", train="projector+lm", n=400)
    row |= dict(pruning=pruning, ratio=ratio, recovery=recovery, fraction=fraction)
    row |= dict(epochs=0, calibration="default", seed=0, status="done", error="", profile="p")
    row |= dict(calibration_seed=0, hidden_layers="final")
    row |= dict(benchmark="b", score=100 * share, requested_ratio=ratio, achieved_ratio=ratio)
    row |= more
    return row | {"units": np.arange(row["n"]) < row["n"] * share}


def thrice(rows: list) -> list:
    "The same with three seeds; the original has one."
    return [row | {"seed": s} for row in rows for s in range(1 if row["pruning"] == "none" else 3)]


def larger(rows: list, n: int = 4000) -> list:
    "The same with more questions."
    return [row | {"n": n, "units": np.arange(n) < n * row["score"] / 100} for row in rows]


RESULTS = [
    made(),
    made("layerwise", 0.15, 0.94),
    made("widthwise", 0.15, 0.97),
    made("layerwise", 0.3, 0.7, achieved_ratio=0.31),
    made("widthwise", 0.3, 0.9),
    made("layerwise", 0.3, 0.99, "sft", 1.0),
    made("layerwise", 0.3, 0.9875, "sft", 0.05),
    made("layerwise", 0.3, 0.985, "sft", 0.05, train="projector"),
    made("widthwise", 0.6, 0.6),
    made("widthwise", 0.6, 0.78, "sft", 0.05),
]


@pytest.fixture
def ask(monkeypatch):
    "Advice from made-up results, through the file that ships."

    def asking(model="tiny-llava", rows=RESULTS, guessed={}, **kw):
        frame = pd.DataFrame(rows)
        situations = guide.situations(frame)
        table = guide.advice_table(frame, situations, load_profile("quick"), guessed)
        text = table.to_csv(index=False, float_format="%.6g")
        monkeypatch.setattr(advice, "shipped", lambda: advice.read(io.StringIO(text)))
        return advice.advise(model, **kw)

    return asking


@pytest.mark.parametrize(
    "question, setting",
    [
        (dict(ratio=0.3, training=False), ("widthwise", "none", 1.0)),
        (dict(ratio=0.3, data=0.05), ("layerwise", "sft", 0.05)),
        (dict(ratio=0.3, data=0.5), ("layerwise", "sft", 0.05)),
        (dict(ratio=0.3, data=1.0), ("layerwise", "sft", 1.0)),
        (dict(ratio=0.3, data=0.01), ("widthwise", "none", 1.0)),
        (dict(ratio=0.15), ("widthwise", "none", 1.0)),
        (dict(ratio=0.45), ("widthwise", "sft", 0.05)),  # the next larger step is 0.6
    ],
)
def test_the_setting_that_kept_most_of_what_fits(ask, question, setting):
    given = ask(**question).setting
    assert (given["pruning"], given["recovery"], given["fraction"]) == setting


def test_ties_are_named_with_the_cheapest(ask):
    given = ask(rows=thrice(larger(RESULTS)), ratio=0.3, data=1.0)
    assert list(given.rows.tied) == [True, True, True, False, False] and not given.rows.open.any()
    assert "points less, a tie)" in given.text and "2 settings are tied" in given.text
    cheap = "the cheapest: prune layerwise (x) at ratio 0.30 (achieved 0.300), then train projector"
    assert cheap in given.text
    assert given.rows.behind.round(6).tolist() == [0, 0.25, 0.5, 9, 29]
    assert "tie" not in ask(ratio=0.6).text


def test_a_setting_that_loses_the_picture_says_so(ask):
    "Half of what is kept beyond answers from the words alone is the limit."
    for words, loses in ((57, True), (55, False)):  # 78 % is kept
        assert ("loses the picture" in ask(ratio=0.6, guessed={"tiny-llava": words}).text) == loses
    assert "loses the picture" not in ask(ratio=0.6).text


def test_a_tie_must_be_shown(ask):
    "Half a point behind on few questions may be more than a point; with one seed nobody knows."
    few = ask(rows=thrice(RESULTS), ratio=0.3, data=1.0)
    assert list(few.rows.tied) == [True, True, False, False, False]
    assert list(few.rows.open) == [False, False, True, False, False]  # 0.5 [-0.2, 1.2]
    once = ask(ratio=0.3, data=1.0)
    assert "tie" not in once.text and "1 seed (intervals cover questions only)" in once.text
    assert "(n = 400 questions per model, 3 seeds of training, profile quick)" in few.text
    seeds = lambda rows: [row | {"seed": s} for s, row in enumerate(rows)]
    wide = seeds([made("widthwise", 0.3, share) for share in (0.5, 0.9, 0.97)])
    sure = seeds([made("layerwise", 0.3, 0.95, "sft", 0.05)] * 3)
    given = ask(rows=[made(), *sure, *wide], ratio=0.3)
    assert given.rows.open.tolist() == [False, True] and "not shown to be more than" in given.text
    same = [made("layerwise", 0.3, 0.9), made("layerwise", 0.3, 0.8, calibration="first 9")]
    assert "Nothing else that fits" in ask(rows=[made(), *same], ratio=0.3).text


def test_a_pruning_that_was_tried_alone(ask):
    "SFT on 5 % of the data was tried after one pruning only; without training both were."
    note = "The other pruning was not tried with this recovery"
    assert note in ask(ratio=0.3).text and note not in ask(ratio=0.3, training=False).text
    both = ask(rows=RESULTS + [made("widthwise", 0.3, 0.9, "sft", 0.05)], ratio=0.3)
    assert note not in both.text and both.rows.rival.sum() == 4


def test_the_cheapest_needs_no_teacher_and_is_always_written():
    recipes = [("sft+hidden_kd", 0.05)] * 9 + [("hidden_kd", 0.05), ("sft", 0.05), ("sft", 0.1)]
    rows = pd.DataFrame(recipes, columns=["recovery", "fraction"])
    rows = rows.assign(train="projector+lm", epochs=0, tied=True)
    assert advice.cheapest(rows).name == 10


def test_warnings(ask):
    assert "heavy loss" in ask(ratio=0.6).text and "heavy loss" not in ask(ratio=0.3).text
    assert "next larger step" in ask(ratio=0.45).text
    assert "No training on 1% of the data or less was studied" in ask(ratio=0.3, data=0.01).text
    fine = [made(), made("widthwise", 0.6, 0.95)]
    assert "advises against pruning" in ask(ratio=0.64, rows=fine).text
    assert "advises against pruning" not in ask(ratio=0.6, rows=fine).text
    blockwise = ask(ratio=0.3, training=False).text
    assert "prune widthwise, blockwise (x)" in blockwise and "was not measured" in blockwise
    equal = made("widthwise", 0.3, 0.86, importance="x + uniform", calibration="first 4")
    assert (
        "from_pretrained loads, kept 86.0 %"
        in ask(ratio=0.3, training=False, rows=[*RESULTS, equal]).text
    )
    assert "calibration first 4, profile" in ask(ratio=0.3, rows=[made(), equal]).text


@pytest.mark.parametrize(
    "question, says",
    [
        (dict(ratio=0.8), "(?s)Nothing was studied within 0.05.*0.15, 0.30.*0.60.*smaller model"),
        (dict(ratio=0.0), "outside"),
        (dict(ratio=0.3, data=5), "fraction of the training data"),
        (dict(ratio=0.3, profile="huge"), "no results of profile huge.*use one of quick"),
    ],
)
def test_what_cannot_be_answered_is_an_error(ask, question, says):
    with pytest.raises(ValueError, match=says):
        ask(**question)


def test_numbers_of_the_paper_stand_beside(ask):
    reported = "The paper reports for LLaVA-v1.5-7B at ratio 0.30: "
    assert f"{reported}layerwise with sft+hidden_kd on all of its data" in ask(ratio=0.3).text
    assert f"{reported}widthwise without recovery" in ask(ratio=0.3, training=False).text


def test_an_unknown_model_gets_what_was_studied(ask):
    both = RESULTS + [made(model="tiny-bunny"), made("widthwise", 0.3, 0.9, model="tiny-bunny")]
    given = ask("their/own", rows=both, ratio=0.3)
    assert given.text.startswith("their/own was not studied.") and "they disagree" in given.text
    assert set(given.rows.model) == {"tiny-llava", "tiny-bunny"}
    alike = ask("liuhaotian/llava-v1.5-7b", rows=both, ratio=0.3)
    assert set(alike.rows.model) == {"tiny-llava"} and "disagree" not in alike.text


def test_advice_names_a_larger_ratio_that_kept_more(ask):
    better = made("widthwise", 0.6, 0.9, importance="y")
    rows = [made(), made("widthwise", 0.3, 0.8), better]
    text = ask(rows=rows, ratio=0.3).text
    assert "Removing 60% kept more (90.0 %)" in text and "not studied at 30%" in text
    assert "kept more" not in ask(rows=rows, ratio=0.6).text
    known = [*rows[:2], better | {"importance": "x"}]  # the recipe was studied here
    assert "kept more" not in ask(rows=known, ratio=0.3).text


def test_the_distances_are_those_of_the_paired_differences():
    "The ranking takes its rows from groups; `difference` looks each setting up."
    rng, rows = np.random.default_rng(0), []
    answers = lambda share: (rng.random(400) < share) * 1.0
    for row in RESULTS:
        if row["requested_ratio"] in (0.0, 0.3):
            seeds = [0] if row["pruning"] == "none" else [0, 1, 2]
            seeds = seeds[1:] if row["train"] == "projector" else seeds  # one seed is missing
            rows += [row | {"seed": s, "units": answers(row["score"] / 100)} for s in seeds]
    frame = pd.DataFrame([row | {"images": [f"i{k // 2}" for k in range(400)]} for row in rows])
    order = guide.ranked(frame, "tiny-llava", 0.3, data=1.0)
    assert len(order) == 5 and order.avg_percent.is_monotonic_decreasing
    settings = [dict(row[SETTING].drop("model")) for _, row in order.iterrows()]
    for (_, row), setting in zip(order.iterrows(), settings):
        gap = difference(frame, "tiny-llava", settings[0], setting)
        assert (row.behind, row.behind_low, row.behind_high) == (gap.value, gap.low, gap.high)


# ---- what ships


def test_the_recommended_profile_is_the_one_that_says_most():
    table = advice.shipped()
    order = [p for p in advice.PROFILES if p in set(table.profile)]
    assert advice.recommended_profile(table, "tiny-llava") == "tiny"
    assert advice.recommended_profile(table, "BAAI/Bunny-v1_0-3B") == "tiny"
    assert advice.recommended_profile(table, "another") == order[0]
    assert advice.advise("tiny-llava", 0.3, profile="quick").profile == "quick"


def test_command_function_and_guide_give_the_same_answer():
    "08_guide prints what the command prints for the profile that it shows."
    root = Path(__file__).parents[1]
    for path in sorted(root.glob("figures/*/08_guide.ipynb")):
        outputs = [c.get("outputs", []) for c in nbformat.read(path, 4).cells]
        texts = ["".join(o.get("text", "") for o in its) for its in outputs]
        (printed,) = [text for text in texts if text.startswith("$ mllm-compress advise")]
        command, _, text = printed.partition("\n\n")
        words = dict(zip(command.split()[3::2], command.split()[4::2]))
        numbers = {k: float(words[f"--{k}"]) for k in ("ratio", "data")}
        given = advice.advise(words["--model"], **numbers, profile=words.get("--profile"))
        assert given.profile == path.parent.name and given.text == text.strip(), path


def test_advice_needs_no_torch_and_no_checkout(tmp_path):
    code = (
        "import sys; from mllm_compress import advise; print(advise('tiny-llava', 0.3).profile); "
        "assert not {'torch', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules)"
    )
    how = dict(capture_output=True, text=True, cwd=tmp_path)
    done = subprocess.run([sys.executable, "-c", code], **how)
    assert done.stdout == "tiny\n", done.stderr
