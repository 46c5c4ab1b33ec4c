"""The plugin answers as our own engine; our prompts beside lmms-eval's.

Where lmms-eval is not installed, the tests that need it are skipped:
`pip install mllm_compress[lmms-eval]`, best in an environment of its own.
"""

import importlib.metadata
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from PIL import Image
from test_benchmarks import SETS, root  # noqa: F401  (root is a fixture)

from mllm_compress.checkpoint import save_pruned
from mllm_compress.evaluation import benchmarks
from mllm_compress.evaluation import lmms_eval as plugin
from mllm_compress.evaluation.generation import answer_questions
from mllm_compress.evaluation.scoring import evaluate
from mllm_compress.importance.criteria import width_importance
from mllm_compress.pruning.plans import plan_widthwise
from mllm_compress.pruning.slicing import apply_plan
from mllm_compress.zoo.models import load_model

KINDS = ("scenes/open", "scenes/hallucination", "scenes/choice")
names = (d.metadata["Name"].lower() for d in importlib.metadata.distributions())
harness = pytest.mark.skipif(
    not {"lmms-eval", "lmms_eval"} & set(names),
    reason="needs the extra: pip install mllm_compress[lmms-eval]",
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    "name -> (what --model_args names, model, processor): a dense model and one pruned blockwise."
    model, processor = load_model("tiny-llava")
    scores = width_importance(model, method="magnitude")
    plan = plan_widthwise(model, scores, ratio=0.2, protect=(1, 1), shape="blockwise")
    small, folder = apply_plan(model, plan), str(tmp_path_factory.mktemp("pruned") / "out")
    save_pruned(small, plan, folder, processor=processor)
    return {"dense": ("tiny-llava", model, processor), "blockwise": (folder, small, processor)}


def requests_of(lm, questions, second):
    lm.task_dict = {"scenes": {"test": questions}}
    return [
        SimpleNamespace(args=(q.prompt, second(q), lambda row: row.images, n, "scenes", "test"))
        for n, q in enumerate(questions)
    ]


def losses(lm, requests):
    "Pairs, out of the parcel in which lmms-eval leaves them alone."
    return [getattr(found, "text", found) for found in lm.loglikelihood(requests)]


@pytest.mark.parametrize("name", ["dense", "blockwise"])
def test_answers_of_the_plugin_are_those_of_the_engine(checkpoints, name):
    pretrained, model, processor = checkpoints[name]
    lm = plugin.CompressedModel(pretrained, device="cpu", batch_size="3")
    questions = [q for kind in KINDS for q in benchmarks.load_questions(kind, "test", 4)]
    # tasks of different lengths in one call, answers in order
    lengths = {q.id: 1 + n % 3 for n, q in enumerate(questions)}
    how = lambda q: {"max_new_tokens": lengths[q.id], "do_sample": False}
    alone = [answer_questions(model, processor, [q], lengths[q.id])[0].text for q in questions]
    assert lm.generate_until(requests_of(lm, questions, how)) == alone


def test_likelihoods_by_a_plain_forward_pass(checkpoints):
    _, model, processor = checkpoints["dense"]
    lm = plugin.CompressedModel("tiny-llava", device="cpu")
    questions = benchmarks.load_questions("scenes/open", "test", 3)
    for option in ("red", "red large circle"):
        pairs = losses(lm, requests_of(lm, questions, lambda q: " " + option))
        for q, (loss, greedy) in zip(questions, pairs):
            content = [{"type": "image"}, {"type": "text", "text": q.prompt}]
            turns = [{"role": "user", "content": content}]
            text = processor.apply_chat_template(turns, add_generation_prompt=True)
            encode = lambda text: processor(text=text, images=q.images[0], return_tensors="pt")
            start, inputs = encode(text)["input_ids"].shape[1], encode(f"{text} {option}")
            with torch.inference_mode():
                logp = model(**inputs).logits[0].log_softmax(-1)
            ids = inputs["input_ids"][0]
            new = range(start, len(ids))
            expected = -sum(logp[i - 1, ids[i]].item() for i in new) / len(new)
            assert loss == pytest.approx(expected, abs=1e-4)
            assert greedy == all(logp[i - 1].argmax() == ids[i] for i in new)
    # a target may be a function of the row
    named = losses(lm, requests_of(lm, questions, lambda q: lambda row: row.answer))
    assert named == losses(lm, requests_of(lm, questions, lambda q: q.answer))
    assert any(greedy for _, greedy in named)


def test_images_are_padded_by_default(checkpoints):
    wide = SimpleNamespace(images=[Image.new("L", (8, 4), 255)], prompt="?")
    for square, size in ((True, (8, 8)), (False, (8, 4))):
        lm = plugin.CompressedModel("tiny-llava", device="cpu", square=square)
        (image,) = lm.question(requests_of(lm, [wide], lambda q: {})[0]).images
        assert image.size == size and image.mode == "RGB"
    film = SimpleNamespace(images=["film.mp4"], prompt="?")
    with pytest.raises(ValueError, match="str"):
        lm.question(requests_of(lm, [film], lambda q: {})[0])


def test_unsupported_settings_are_errors():
    with pytest.raises(ValueError, match="greedily"):
        plugin.settings({"do_sample": True, "temperature": 0.7})
    with pytest.raises(ValueError, match="greedily"):
        plugin.settings({"num_beams": 3})
    assert plugin.settings({"do_sample": True, "temperature": 0}) == (1024, ())
    with pytest.raises(TypeError, match="pretraind"):
        plugin.CompressedModel("tiny-llava", pretraind="x")
    with pytest.raises(ValueError, match="float8"):
        plugin.CompressedModel("tiny-llava", dtype="float8")
    with pytest.raises(NotImplementedError, match="rounds"):
        plugin.CompressedModel("smoke-llava", device="cpu").generate_until_multi_round([])


TASK = """
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {rows}}}}}
task: {name}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: !function utils.{target}
{more}
metadata: [{{version: 0.0}}]
"""
GENERATE = """generation_kwargs: {max_new_tokens: 8, temperature: 0, do_sample: false}
metric_list:
  [{metric: exact_match, aggregation: mean, higher_is_better: true,
    ignore_case: true, ignore_punctuation: true}]"""
CHOOSE = """doc_to_choice: !function utils.choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""
UTILS = """import io
from PIL import Image
def visual(doc): return [Image.open(io.BytesIO(doc["image"]))]
def text(doc, lmms_eval_specific_kwargs=None): return doc["question"]
def answer(doc): return doc["answer"]
def choices(doc): return list(doc["choices"])
def place(doc): return list(doc["choices"]).index(doc["answer"])
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    "A folder with two local tasks over the same scenes: one generates, one chooses."
    folder, rows = tmp_path_factory.mktemp("tasks"), []
    for q in (q for kind in KINDS for q in benchmarks.load_questions(kind, "test", 12)):
        q.images[0].save(out := io.BytesIO(), "PNG")
        row = {"id": q.id, "question": q.prompt, "answer": q.answer}
        rows.append(row | {"choices": list(q.candidates), "image": out.getvalue()})
    pd.DataFrame(rows).to_parquet(folder / "rows.parquet")
    (folder / "utils.py").write_text(UTILS)
    for name, kind, target, more in (
        ("local_generate", "generate_until", "answer", GENERATE),
        ("local_choose", "multiple_choice", "place", CHOOSE),
    ):
        given = dict(rows=folder / "rows.parquet", name=name, kind=kind, target=target, more=more)
        (folder / f"{name}.yaml").write_text(TASK.format(**given))
    return folder


def run_harness(pretrained, tasks, out, launcher=()):
    "The command of the notebook, offline: results, and {task: answers in the order of the rows}."
    homes = {"HF_HOME": str(out / "hf"), "LMMS_EVAL_HOME": str(out / "cache")}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *launcher, *(["-m"] if launcher else []), "lmms_eval"]
    command += ["--model", "mllm_compress", "--model_args", f"pretrained={pretrained}"]
    command += ["--tasks", "local_generate,local_choose", "--include_path", str(tasks)]
    command += ["--batch_size", "auto", "--device", "cpu", "--log_samples"]
    command += ["--output_path", str(out / "logs")]
    env = os.environ | homes | offline
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    found = next((out / "logs").rglob("*_results.json"), None)  # where it fails, it still returns 0
    assert found, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads(found.read_text())["results"]
    answers = {}
    for name in ("local_generate", "local_choose"):
        lines = next((out / "logs").rglob(f"*_samples_{name}.jsonl")).read_text().splitlines()
        rows = sorted(map(json.loads, lines), key=lambda row: row["doc_id"])
        answers[name] = [row["filtered_resps"] for row in rows]
    return results, answers


@harness
@pytest.mark.parametrize(
    "name, launcher",
    [
        ("dense", ()),
        ("blockwise", ()),
        ("blockwise", ("accelerate.commands.launch", "--cpu", "--num_processes", "2")),
    ],
)
def test_lmms_eval_gets_the_answers_of_our_own_evaluation(
    checkpoints, tasks, tmp_path, name, launcher
):
    pretrained, model, processor = checkpoints[name]
    results, said = run_harness(pretrained, tasks, tmp_path, launcher)
    _, ours = evaluate(model, processor, KINDS, limit=12, return_predictions=True)
    texts = [s[0] if isinstance(s, list) else s for s in said["local_generate"]]
    assert texts == ours.prediction.tolist()
    right = results["local_generate"]["exact_match,none"]
    assert right == pytest.approx((ours.prediction == ours.answer).mean())
    chosen = results["local_choose"]["acc,none"]
    assert chosen == pytest.approx((ours.candidate == ours.answer).mean())
    assert name == "blockwise" or right > 0.8


@harness
def test_the_entry_point_is_found():
    from lmms_eval.models import get_model, get_model_manifest

    assert get_model_manifest("mllm_compress") == plugin.manifest()
    assert get_model("mllm_compress") is plugin.CompressedModel


@harness
def test_prompts_are_those_of_lmms_eval(root, monkeypatch):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", "unused")
    from importlib import import_module
    from pathlib import Path

    import lmms_eval
    import yaml

    class Plain(yaml.SafeLoader):
        pass

    Plain.add_constructor("!function", lambda loader, node: None)
    tasks = Path(lmms_eval.__file__).parent / "tasks"

    def rows(*folders):
        return [r for (folder, _), rows in SETS.items() if folder in folders for r in rows]

    mme = [r for r in rows("MME/data") if r["category"] != "code_reasoning"]
    for name, task, file, sets in (
        ("gqa", "gqa", "gqa.yaml", rows("GQA/testdev_balanced_instructions")),
        ("pope", "pope", "pope.yaml", rows("POPE/data")),
        ("mme_perception", "mme", "mme.yaml", mme),
        ("sqa", "scienceqa", "scienceqa.yaml", rows("ScienceQA/ScienceQA-FULL")),
        ("ai2d", "ai2d", "ai2d.yaml", rows("ai2d/data")),
        ("mmmu", "mmmu", "mmmu_val.yaml", rows("MMMU/data")),
        ("docvqa", "docvqa", "_default_template_docvqa_yaml", rows("DocVQA/DocVQA")),
        ("mathvista", "mathvista", "mathvista_testmini_format.yaml", rows("MathVista/data")),
    ):
        settings = yaml.load((tasks / task / file).read_text(), Plain)["lmms_eval_specific_kwargs"]
        utils = import_module(f"lmms_eval.tasks.{task}.utils")
        names = [f"{short}_doc_to_text" for short in (task, "sqa")]
        text = getattr(utils, next(name for name in names if hasattr(utils, name)))
        questions = benchmarks.benchmark(name).load(split="test", limit=None, root=root)
        expected = {text({"caption": "", "ocr": "", **row}, settings["default"]) for row in sets}
        assert {q.prompt for q in questions} == expected, name
