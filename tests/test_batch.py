"""The commands and files of the guide on batch use: they parse, and name what exists."""

import os
import re
import shlex
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import nbformat
import pytest
import yaml
from commands import options_of
from jupyter_core.command import list_subcommands
from nbclient.cli import NbClientApp
from nbconvert.nbconvertapp import NbConvertApp

from mllm_compress.study.notebooks import check_parameters, parameters_of
from mllm_compress.study.profiles import PROFILES, Slurm, load_profile

ROOT = Path(__file__).parents[1]
GUIDE = "\n".join(c.source for c in nbformat.read(ROOT / "nbs/guides/run_in_batch.ipynb", 4).cells)


def blocks(language: str) -> list:
    "The fenced blocks of the guide in a language."
    return re.findall(rf"(?s)```{language}\n(.*?)\n```", GUIDE)


def checked_papermill(words: list) -> dict:
    "The parameters of a papermill command, as its notebook accepts them."
    notebook = Path(re.search(r"nbs/study/.*", words[1])[0])
    options, given = words[2:], {}
    while options:
        if options[0] == "-p":
            _, name, value, *options = options
            given[name] = yaml.safe_load(value)
        elif options[0] == "-y":
            _, text, *options = options
            given |= yaml.safe_load(text)
        else:
            assert not options[0].startswith("-"), words
            options = options[1:]
    if "profile" in given:
        load_profile(given["profile"])
    return check_parameters(parameters_of(nbformat.read(ROOT / notebook, 4)), given)


LINES = [shlex.split(s) for s in "\n".join(blocks("sh")).splitlines() if s and "export" not in s]


@pytest.mark.parametrize("words", LINES, ids=" ".join)
def test_a_command_names_what_exists(words):
    options = {w.partition("=")[0] for w in words if w.startswith("--")}
    if words[0] == "papermill" and "--help-notebook" not in words:
        assert checked_papermill(words)["profile"] in ("quick", "smoke")
    elif words[0] == "mllm-compress":
        assert options <= options_of(words[1])
    elif words[0] == "jupyter":
        assert words[1] in list_subcommands()
        known = {"execute": NbClientApp, "nbconvert": NbConvertApp}[words[1]]
        assert options <= {f"--{o}" for o in (*known.flags, *known.aliases)}
    elif words[0] == "sbatch":
        wrapped = shlex.split(words[words.index("--wrap") + 1])
        assert checked_papermill(wrapped) == {"profile": "tiny"}
    for word in (w for w in words if w.endswith(".ipynb") and "nbs/" in w):
        assert (ROOT / re.search("nbs/.*", word)[0]).is_file()


def test_each_job_of_the_array_runs_another_ratio(tmp_path):
    (script,) = blocks("bash")
    jobs = re.search(r"--array=0-(\d+)", script)[1]
    (tmp_path / "papermill").write_text("#!/bin/sh\nprintf '%s\\n' papermill \"$@\"\n")
    (tmp_path / "papermill").chmod(0o755)
    ratios = []
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(ROOT.parent)}
    how = dict(capture_output=True, text=True, check=True)
    for k in range(int(jobs) + 1):
        here = env | {"SLURM_ARRAY_TASK_ID": str(k)}
        run = subprocess.run(["bash", "-c", script], env=here, **how)
        given = checked_papermill(run.stdout.splitlines())
        assert given["profile"] == "tiny"
        ratios += given["ratios"]
    assert ratios == load_profile("tiny").notebooks["02_pruning"]["ratios"]


def test_the_slurm_section_is_one_of_a_profile(tmp_path):
    section = yaml.safe_load(blocks("yaml")[0])
    text = (PROFILES / "tiny.yaml").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(text + yaml.safe_dump(section))
    assert load_profile(tmp_path / "mine.yaml").slurm == Slurm(**section["slurm"])


def test_the_argo_workflow_runs_notebooks_with_parameters_that_they_have():
    spec = yaml.safe_load(blocks("yaml")[1])["spec"]
    templates = {t["name"]: t for t in spec["templates"]}
    tasks = {t["name"]: t for t in templates[spec["entrypoint"]]["dag"]["tasks"]}
    container = templates["notebook"]["container"]
    (profile,) = spec["arguments"]["parameters"]
    mounted = {m["name"] for m in container["volumeMounts"]}
    assert mounted == {v["name"] for v in spec["volumes"]}
    for task in tasks.values():
        (given,) = task["arguments"]["parameters"]
        assert [{"name": given["name"]}] == templates[task["template"]]["inputs"]["parameters"]
        values = {
            f"inputs_parameters_{given['name']}": given["value"],
            f"workflow_parameters_{profile['name']}": profile["value"],
        }
        value = lambda match: str(values[match[1].replace(".", "_")])  # of Argo's placeholder
        words = container["command"] + container["args"]
        words = [re.sub(r"\{\{(.+?)\}\}", value, word) for word in words]
        assert checked_papermill(words) == {"profile": "tiny"}
    order = TopologicalSorter({n: t.get("dependencies", []) for n, t in tasks.items()})
    assert [*order.static_order()][-1] == "findings"


def test_the_image_installs_what_is_in_the_checkout():
    (image,) = blocks("dockerfile")
    minor = int(re.search(r"FROM python:3\.(\d+)", image)[1])
    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    assert minor >= int(re.search(r"min_python = 3\.(\d+)", settings)[1])
    assert (ROOT / re.search(r"-c /source/(\S+)", image)[1]).is_file()
    extra = re.search(r'"/source\[(\w+)\]"', image)[1]
    assert f"\n{extra}_requirements = " in settings
