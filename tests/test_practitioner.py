"""The way of a practitioner through all commands, on small models with and without pictures."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from commands import facts, run, save_data, save_models
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import mllm_compress
from mllm_compress.checkpoint import load_pruned, saving
from mllm_compress.cli.measuring import cost_text
from mllm_compress.cli.requests import table_text
from mllm_compress.data import scenes


@pytest.fixture(scope="module")
def shop(tmp_path_factory, tiny_llava, tiny_lm):
    "A folder with a multimodal model, a language model, and data for both."
    folder = tmp_path_factory.mktemp("shop")
    save_models(folder, tiny_llava, tiny_lm)
    asked = (scenes.ask(k, "train")[0] for k in range(6))
    entries = [{key: a[key] for key in ("question", "answer")} for a in asked]
    texts = ["the circle is red " + "and the square is blue " * k for k in range(8)]
    save_data(folder, entries, texts)
    return folder


def test_prune_in_one_step_is_prune_from_scores(here):
    data = ("--data", "mine.json", "--samples", 4)
    run("score", "llava", "-o", "scores", *data)
    run("prune", "llava", "-o", "stored", "--scores", "scores", "--ratio", 0.3)
    run("prune", "llava", "-o", "direct", "--ratio", 0.3, "--method", "block_influence", *data)
    one, two = (load_file(f"{name}/model.safetensors") for name in ("stored", "direct"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert Path("direct/plan.png").is_file()
    step = facts("show", "direct")["provenance"][0]
    assert step["step"] == "prune" and step["calibration"]["samples"] == 4
    assert step["scores"]["kind"] == "block_influence" and "torch" in step["environment"]
    assert facts("show", "scores")["kind"] == "block_influence"


def test_knobs_of_the_plans(here):
    assert facts("prune", "llava", "-o", "a", "--layers", "1-2")["layers"] == 2
    options = ("--method", "magnitude", "--shape", "blockwise", "--protect", "0,1")
    run("prune", "llava", "-o", "b", "--ratio", 0.3, *options, "--round-to", 4)

    plan = load_pruned("b")[2]
    assert 3 not in plan.neurons and all(len(n) % 4 == 0 for n in plan.neurons.values())
    plan.save("plan.json")
    run("prune", "llava", "-o", "c", "--plan", "plan.json")
    assert load_pruned("c")[2] == plan
    run("score", "llava", "-o", "layers", "--method", "random")
    run("score", "llava", "-o", "width", "--method", "magnitude")
    run("prune", "llava", "-o", "d", "--scores", "layers", "--scores", "width", "--ratio", 0.5)
    assert load_pruned("d")[2].method == "layerwise+widthwise"


def test_pruned_twice_knows_the_first_model(here):
    run("prune", "llava", "-o", "once", "--layers", "1")
    args = ("prune", "once", "-o", "twice", "--ratio", 0.3, "--method", "magnitude")
    again = ("--plan", "once/pruning_plan.json")
    assert "make it for the pruned model" in run(*args[:4], *again, code=2)
    done = facts(*args)

    model, _, plan = load_pruned("twice")
    assert plan.removed_layers == (1,) and plan.num_layers == 4 and len(plan.meta["plans"]) == 2
    from mllm_compress.anatomy import lm_parameters

    removed = 1 - lm_parameters(model) / plan.meta["lm_parameters"]
    assert abs(removed - plan.achieved_ratio) < 1e-12 and done["total_ratio"] == plan.achieved_ratio
    assert 0.25 < done["achieved_ratio"] < 0.35 < done["total_ratio"]  # of this step, of both
    assert [s["step"] for s in facts("show", "twice")["provenance"]] == ["prune", "prune"]


def test_a_stopped_recovery_goes_on_to_the_same_bits(here, monkeypatch, caplog):
    from mllm_compress.recovery import training as checkpoints

    run("prune", "llava", "-o", "small", "--layers", "1")
    args = ("recover", "small", "--teacher", "llava", "--data", "mine.json", "--batch-size", 2)
    args = (*args, "--epochs", 3, "--save-every", 2, "--patience", 20)
    run(*args, "-o", "whole")
    write, written = checkpoints.write_checkpoint, []

    def stop_at_the_second(*given):
        write(*given)
        written.append(given[0])
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "write_checkpoint", stop_at_the_second)
    assert "continues from there" in run(*args, "-o", "parts", code=130)
    monkeypatch.setattr(checkpoints, "write_checkpoint", write)
    assert not Path("parts").exists() and len(list(Path(".parts.training").iterdir())) > 1
    Path("other").write_text(Path("llava/chat_template.jinja").read_text() + "{# another #}")
    Path("part.json").write_text(json.dumps(json.loads(Path("mine.json").read_text())[:2:-1]))
    again = (*args, "-o", "parts", "--restart", "--validation", "part.json")
    assert "validation is the data" in run(*again, code=2)  # and deletes nothing
    Path(".parts.restarted").mkdir()
    Path(".parts.restarted/thesis.txt").write_text("years of work")
    assert ".parts.restarted" in run(*again[:-2], code=2)
    assert Path(".parts.restarted/thesis.txt").read_text() == "years of work"
    shutil.rmtree(".parts.restarted")
    more = ("-o", "parts", "--chat-template", "other")
    assert "of another run (different processor)" in run(*args, *more, code=2)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    run(*args, "-o", "parts")
    assert "eval_steps" not in caplog.text  # of the checkpoint and of the run are one
    assert not Path(".parts.training").exists()
    one, two = (Path(name, "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert one == two and Path("parts/learning_curve.png").is_file()
    curve = pd.read_csv("whole/learning_curve.csv", index_col="step")
    assert [*curve.index] == [*range(10)] and curve.loss.isna().tolist() == [True] + [False] * 9
    step = facts("show", "parts")["provenance"][-1]
    assert step["data"]["samples"] == 5 and step["config"]["fraction"] == 1.0  # one is held out
    assert curve.held_out_loss.notna()[step["best_step"]] and step["config"]["held_out"] == 0.1


def test_a_model_writes_its_own_data(here):
    own = ("--data", "self:mine.json")
    run("prune", "llava", "-o", "small", "--ratio", 0.3, "--method", "taylor", *own, "--samples", 4)
    asked = [
        {k: e[k] for k in ("image", "question")} for e in json.loads(Path("mine.json").read_text())
    ]
    shutil.copy("mine.json", "answered.json")
    Path("mine.json").write_text(json.dumps(asked))  # nobody knows the answers
    args = ("recover", "small", "--teacher", "llava", "--batch-size", 2)
    validated = ("--lr", "search", "--validation", "answered.json")
    assert "state" in run(*args, "-o", "out", *own, *validated)
    step = facts("show", "out")["provenance"][-1]
    assert step["data"]["samples"] == len(asked) and len(step["data"]["validation"]) == 16
    assert step["data"]["name"] == "self:mine.json" and 5e-5 < step["config"]["lr"] < 5e-3
    run(*args, "-o", "free", "--data", "self", "--own-tokens", 300, "--held-out", 0)
    assert facts("show", "free")["provenance"][-1]["data"]["samples"] == 3  # of up to 128 tokens
    Path("chat.json").write_text(json.dumps([{"question": "Why?"}, {"question": "Who?"}]))
    Path("t.txt").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    chat = ("--data", "self:chat.json", "--samples", 2, "--chat-template", "t.txt")
    said = run("prune", "lm", "-o", "told", "--ratio", 0.3, *chat, "--method", "taylor")
    assert said.index("template t.txt") < said.index("the dense model writes")
    said = run("prune", "lm", "-o", "own", "--ratio", 0.3, "--data", "self")
    used = facts("show", "own")["provenance"][0]["calibration"]
    assert used["samples"] > 200 and f" {used['tokens']:,} tokens" in said and "kind" not in said
    said = run("recover", "own", "--teacher", "lm", "-o", "kd", *chat[:2], *chat[4:])
    config = facts("show", "kd")["provenance"][-1]["config"]
    assert "outputs" in said and (config["losses"], config["lr"]) == ({"logits_kd": 1.0}, 1e-4)
    assert "dense:" in run("evaluate", "own", "--data", "t.txt", "--dense", "lm")


def test_checkpoints_of_another_run_are_not_mixed_in(here):
    run("prune", "llava", "-o", "small", "--layers", "1")
    data = ("--data", "mine.json", "--batch-size", 2)
    Path(".out.training").mkdir()
    Path(".out.training/run.json").write_text(json.dumps({"config": "another"}))
    args = ("recover", "small", "--teacher", "llava", "-o", "out", *data)
    assert "--restart" in run(*args, code=2)
    run(*args, "--restart")


def test_recovery_options_from_a_file(here):
    run("prune", "llava", "-o", "small", "--layers", "1")
    Path("run.yaml").write_text("train: projector\nlosses: {sft: 1.0}\nlr: 1.0e-4\n")
    args = ("--teacher", "llava", "--data", "mine.json", "--config", "run.yaml", "--epochs", 0.5)
    run("recover", "small", "-o", "out", *args)
    config = facts("show", "out")["provenance"][-1]["config"]
    assert config["train"] == "projector" and config["lr"] == 1e-4 and config["epochs"] == 0.5
    run("recover", "small", "-o", "lora", "--teacher", "llava", "--data", "mine.json", "--lora", 2)
    assert facts("show", "lora")["provenance"][-1]["config"]["lora"]["r"] == 2


def test_large_models_get_adapters_and_say_so(here, monkeypatch):
    from mllm_compress.cli import recovering

    monkeypatch.setattr(recovering, "LARGE", 1000)
    run("prune", "llava", "-o", "small", "--layers", "1")
    args = ("recover", "small", "--teacher", "llava", "--data", "mine.json")
    assert "LoRA of rank 128 at a learning rate of 2e-5" in run(*args, "-o", "out")
    config = facts("show", "out")["provenance"][-1]["config"]
    assert config["lora"]["r"] == 128 and config["lr"] == 2e-5
    run(*args, "-o", "full", "--lora", 0, "--lr", "1e-5")
    assert "lora" not in facts("show", "full")["provenance"][-1]["config"]


def test_own_questions_and_the_comparison(here):
    run("prune", "llava", "-o", "small", "--layers", "1,2")
    asked = ("--questions", "mine.json")
    rows = facts("evaluate", "small", *asked, "-o", "rows.csv")["rows"]
    assert rows[0]["benchmark"].startswith("own/mine-") and rows[0]["n"] == 6
    assert Path("rows.csv").is_file() and not Path(".rows.csv.answers").exists()
    both = facts("compare", "llava", "small", *asked, "-o", "both", "--examples", 3)
    costs = {row["what"]: row for row in both["costs"]}
    assert costs["parameters"]["small / dense"] < 1
    assert 0.4 < costs["KV cache per token, byte"]["small / dense"] < 0.6
    assert len(both["answers"]) == 3 and {"low", "high", "difference"} <= set(both["scores"][0])
    assert [row["model"] for row in both["grounding"]] == ["dense", "pruned"]
    assert both["grounding"][1]["none"] is not None and len(both["scores"]) == 1
    times = dict(zip(("what", "dense", "dense low", "dense high"), ("decode, s", 4e-3, 3e-3, 5e-3)))
    times |= {"small": 3e-3, "small low": 2.9e-3, "small high": 3.1e-3, "small / dense": 0.75}
    assert "own/" not in table_text(pd.DataFrame(both["scores"]))
    text = cost_text(pd.DataFrame([times, times | {"small high": 2.95e-3}]))
    assert "4.00 ms (3.00 ms to 5.00 ms)" in text and text.count("too noisy to say") == 1
    assert text.splitlines()[-1].endswith("0.75")
    tables = mllm_compress.compare("llava", "small", benchmarks="scenes/open", limit=4)
    assert list(tables) == ["costs", "scores", "grounding", "answers"]
    assert len(tables["scores"]) == 1 and tables["grounding"].wrong.notna().all()
    names = {"answers.csv", "comparison.png", "costs.csv", "grounding.csv", "scores.csv"}
    assert {p.name for p in Path("both").iterdir()} == names


def test_a_stopped_evaluation_goes_on(here, monkeypatch):
    from mllm_compress.evaluation import scoring

    asked, answer = [], scoring.answer_questions

    def counted(model, processor, questions, *rest):
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(len(questions))
        return answer(model, processor, questions, *rest)

    args = ("evaluate", "llava", "--benchmark", "scenes/open", "--limit", 600, "-o", "rows.csv")
    monkeypatch.setattr(scoring, "answer_questions", counted)
    assert "continues from there" in run(*args, code=130)
    other = ("--benchmark", "perplexity", "--data", "text.jsonl", "-o", "rows.csv")
    run("evaluate", "lm", *other)  # leaves the answers of llava
    counted = lambda *a: asked.append(len(a[2])) or answer(*a)
    monkeypatch.setattr(scoring, "answer_questions", counted)
    run(*args, "--overwrite")
    assert asked == [512, 88] and not Path(".rows.csv.answers").exists()


def test_a_blockwise_folder_loads_as_a_model_and_as_a_teacher(here):
    from mllm_compress import load_model

    options = ("--ratio", 0.2, "--method", "magnitude", "--shape", "blockwise")
    run("prune", "llava", "-o", "block", *options)
    model, processor = load_model(Path("block"), dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and processor is not None
    run("prune", "block", "-o", "smaller", "--layers", "1")
    data = ("--data", "mine.json", "--batch-size", 2)
    run("recover", "smaller", "--teacher", "block", "-o", "out", *data)
    assert [s["step"] for s in facts("show", "out")["provenance"]] == ["prune", "prune", "recover"]


def test_the_card_is_what_the_hub_reads(here):

    Path("llava/README.md").write_text("---\nlicense: apache-2.0\nbase_model: me/dense\n---\n")
    run("prune", "llava", "-o", "small", "--layers", "1")
    run("recover", "small", "--teacher", "llava", "-o", "out", "--data", "mine.json")
    data = ModelCard.load("out/README.md").data
    assert (data.license, data.base_model) == ("apache-2.0", "me/dense")
    assert data.pipeline_tag == "image-text-to-text"
    assert data.datasets == ["mine"] and data.base_model_relation == "finetune"
    assert "| teacher | llava |" in Path("out/README.md").read_text()


def test_what_data_say_is_no_markup_in_a_card():
    from mllm_compress.checkpoint.saving import card_section

    text = card_section("data", {"<script>": "a|b\n# c [x](y) `z`"})
    assert "<script>" not in text and "\n# c" not in text and "[x](" not in text.replace("\\[", "")


def test_publishing_sends_the_files_of_the_manifest(here, monkeypatch):
    from mllm_compress.checkpoint import loading as hub

    class Recorder:
        def __init__(self, token=None):
            self.files = []

        def create_repo(self, repo_id, private, exist_ok):
            sent.append((repo_id, private))

        def upload_folder(self, allow_patterns, delete_patterns, **options):
            sent.extend([sorted(allow_patterns), delete_patterns])
            return "https://huggingface.co/me/small/commit/1"

    sent = []
    monkeypatch.setattr(hub, "HfApi", Recorder)
    run("prune", "llava", "-o", "small", "--layers", "1")
    Path("small/diary.txt").write_text("private")
    assert "commit/1" in run("push", "small", "me/small")
    assert sent[0] == ("me/small", True) and "diary.txt" not in sent[1] and "plan.png" in sent[1]
    assert "model*.safetensors" in sent[2]  # shards of an earlier push


def test_options_of_the_program(here):

    assert run("--version").strip() == f"mllm_compress {mllm_compress.__version__}"
    command = [sys.executable, "-m", "mllm_compress", "models", "--json"]
    assert "tiny-llava" in json.loads(subprocess.run(command, capture_output=True).stdout)
    run("prune", "llava", "-o", "small", "--layers", "1")
    for command in ("models", "cost llava", "show small", "cost LLaVA-v1.5-7B --memory"):
        assert isinstance(facts(*command.split()), dict)


def test_scores_become_part_of_the_checkpoint(here):

    run("prune", "llava", "-o", "small", "--layers", "1")
    Path("small/diary.txt").write_text("mine")
    asked = ("--questions", "mine.json", "--dense", "llava", "--record")
    run("evaluate", "small", *asked)
    step = facts("show", "small")["provenance"][-1]
    assert step["step"] == "evaluate" and step["results"][0]["n"] == 6 and step["dense_scores"]
    assert [row["model"] for row in step["grounding"]] == ["dense", "pruned"]
    assert "## Grounding of step 2" in Path("small/README.md").read_text()
    results = ModelCard.load("small/README.md").data.eval_results
    assert results and results[0].dataset_name.startswith("own/mine-")
    load_pruned("small")
    Path("small/README.md").write_text("my own words")
    run("evaluate", "small", *asked)
    assert Path("small/README.md").read_text() == "my own words"
    assert len(facts("show", "small")["provenance"]) == 3
    endless = {"step": "evaluate", "results": [{"benchmark": "endless", "score": None}]}
    saving.add_step("small", load_pruned("small")[0], endless)
    assert "endless: null" in run("show", "small")
    run("prune", "llava", "-o", "small", "--layers", "2", "--overwrite")
    assert Path("small/diary.txt").read_text() == "mine"


def test_conversations_for_a_model_without_a_chat_template(here):
    "A plain template is used and named, or that of a file; both are kept and recorded."
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("lm")
    tokenizer.chat_template = None
    tokenizer.save_pretrained("base")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(f"lm/{name}", "base")
    Path("base/chat_template.jinja").unlink(missing_ok=True)
    pairs = [{"question": "is the circle red?", "answer": "yes"}] * 4
    Path("chat.json").write_text(json.dumps(pairs))
    data = ("--data", "chat.json")
    said = run("score", "base", "-o", "scores", "--method", "taylor", *data)
    assert "no chat template" in said and "--chat-template FILE" in said
    assert facts("show", "scores")["meta"]["calibration"]["chat_template"] == "plain"
    run("prune", "base", "-o", "small", "--scores", "scores", "--ratio", 0.2)
    args = ("recover", "small", "--teacher", "base", *data, "--batch-size", 2)
    assert "no chat template" in run(*args, "-o", "plain")
    assert facts("show", "plain")["provenance"][-1]["data"]["chat_template"] == "plain"
    assert "Assistant:" in AutoTokenizer.from_pretrained("plain").chat_template
    assert "no chat template" not in run("evaluate", "plain", "--questions", "chat.json")
    assert "no chat template" not in run("score", "base", "-o", "text", "--data", "text.jsonl")
    mine = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    mine += "{% if add_generation_prompt %}[assistant]{% endif %}"
    Path("mine.jinja").write_text(mine)
    assert "mine.jinja" in run(*args, "-o", "own", "--chat-template", "mine.jinja")
    assert facts("show", "own")["provenance"][-1]["data"]["chat_template"].startswith("mine.jinja")
    assert AutoTokenizer.from_pretrained("own").chat_template == mine
    for content, says in (("{% for", "is no chat template"), ("hello", "does not render")):
        Path("bad.jinja").write_text(content)
        wrong = run(*args, "-o", "bad", "--chat-template", "bad.jinja", code=2)
        assert says in wrong and not Path("bad").exists()
