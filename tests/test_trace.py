"""Every committed number follows from its results, and every committed notebook from its source."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm

from mllm_compress.study import runner, status
from mllm_compress.study.notebooks import for_profile
from mllm_compress.study.profiles import load_profile

ROOT = Path(__file__).parent.parent
FOLDERS = sorted(p.parent for p in (ROOT / "figures").glob("*/experiments.csv.xz"))
MEASURED = ("00_", "09_")  # learning rates are searched by hand; times are another machine's
KEYS = ["model", "pruning", "ratio", "recovery", "train", "fraction", "seed"]


def scores_of(notebook: Path) -> pd.DataFrame:  # columns KEYS, avg, achieved, and the benchmarks
    "AVG-% of every experiment that a notebook has read: plain means of scores, no package code."
    lines = pd.read_csv(notebook.parent / "experiments.csv.xz", dtype={"result": str})
    results = nbformat.read(notebook, 4).metadata["mllm_compress"]["results"]
    assert set(results) <= set(lines.result)
    usual = {"epochs": 0, "layer_share": 0, "start": "pruned", "hidden_layers": "final"}
    usual |= {"reconstruct": "none", "quantize": "none", "adapters": "none"}
    frame = lines[lines.result.isin(results)]
    for column, value in usual.items():  # claims are about one epoch, nothing refitted or rounded
        frame = frame[frame[column] == value] if column in frame else frame
    dense = frame[frame.pruning == "none"].set_index(["model", "benchmark"]).score
    whole = np.array([dense[m, b] for m, b in zip(frame.model, frame.benchmark)])
    frame = frame.assign(avg=100 * frame.score / np.where(whole > 0, whole, np.nan))
    means = frame.rename(columns={"achieved_ratio": "achieved"})
    means = means.groupby(KEYS, as_index=False)[["avg", "achieved"]].mean()
    return means.merge(frame.pivot_table("score", KEYS, "benchmark").reset_index(), on=KEYS)


PRUNED = [folder for folder in FOLDERS if (folder / "02_pruning.ipynb").exists()]


@pytest.mark.parametrize("folder", PRUNED, ids=lambda p: p.name)
def test_every_score_without_recovery_is_the_mean_of_its_results(folder):
    table = pd.read_csv(folder / "02_pruning-scores.csv")
    rows = scores_of(folder / "02_pruning.ipynb")
    assert (names := [c for c in table if c in rows and c not in [*KEYS, "achieved"]])
    for row in table.to_dict("records"):
        pruning = row["pruning"].replace("original", "none")
        its = rows[(rows.model == row["model"]) & np.isclose(rows.ratio, row["requested"])]
        its = its[its.pruning == pruning]
        shown = [row[c] for c in ("AVG-%", *names)]
        means = its[["avg", *names]].mean().to_numpy(float)
        assert np.allclose(means, np.array(shown, float), rtol=2e-5, equal_nan=True), row
        removed = row.get("achieved", row.get("of the layers"))
        assert abs(its.achieved.mean() - float(str(removed).split()[0])) < 6e-4


@pytest.mark.parametrize("profile, draws, count", [("power", [6, 3], 31), ("unseen", [3, 3], 24)])
def test_scores_and_leads_are_those_of_a_recount(profile, draws, count):
    folder = ROOT / "figures" / profile
    lines = pd.read_csv(folder / "experiments.csv.xz")
    dense = lines[lines.pruning == "none"].set_index("benchmark").score
    lines["avg"] = 100 * lines.score / lines.benchmark.map(dense)
    fields = {  # score, refit, rounds, recovery -> way
        "block_influence none 1 sft+hidden_kd": "paper, trained",
        "taylor none 1 sft+hidden_kd": "paper, trained",
        "block_influence stream 1 sft+hidden_kd": "layers + refit, trained",
        "gauss_newton stream 2 logits_kd": "ours, two rounds, trained on logits_kd",
        "block_influence stream 1 none": "layers + refit",
        "taylor stream 1 none": "paper's ranking + refit",
        "block_influence refit 1 none": "layers as `prune` has them, untrained",
        "gauss_newton refit 1 none": "ours as `prune` has it, untrained",
        "gauss_newton stream 1 none": "ours, untrained",
        "gauss_newton stream 2 none": "ours, two rounds",
        "gauss_newton stream 1 sft+hidden_kd": "ours, paper's objective",
        "gauss_newton stream 1 logits_kd": "ours, trained on logits_kd",
        "gauss_newton refit 1 sft+hidden_kd": "ours as `prune` has it, paper's objective",
        "gauss_newton refit 1 logits_kd": "ours as `prune` has it, trained on logits_kd",
    }
    how = lines[["importance", "reconstruct", "rounds", "recovery"]].astype(str).agg(" ".join, 1)
    how = how.replace("gauss_newton refit 2 none", "gauss_newton refit 1 none")  # as `prune` has it
    avg_of = lambda rows: rows.groupby([how.map(fields), "ratio", "seed"]).avg.mean()
    for row in pd.read_csv(folder / "11_beyond-scores.csv")[1:].to_dict("records"):
        assert np.isclose(avg_of(lines)[row["way"], row["requested"]].mean(), row["AVG-%"], 2e-5)
    verdicts = json.loads((folder / "11_beyond-verdicts.json").read_text(encoding="utf-8"))
    known, layers = lines.benchmark.isin(["text/quotes", "text/glosses"]), "layers + refit"
    lines["kind"] = lines.benchmark.where(~known, "texts of the kinds trained on")
    mine, kinds = "ours, untrained", {k: lines.kind == k for k in set(lines.kind)}
    judged = {f"untrained, {k}": (mine, "paper, trained", of, draws) for k, of in kinds.items()}
    own, theirs = (fields[f"{score} refit 1 none"] for score in ("gauss_newton", "block_influence"))
    twice, paper, every = "ours, two rounds", "paper, trained", ~known | known
    for fit, start in (("stream", mine), ("refit", own)):
        for loss in ("sft+hidden_kd", "logits_kd"):
            way = fields[f"gauss_newton {fit} 1 {loss}"]
            judged[f"{way} − {start}"] = way, start, every, [3]
            judged |= {f"{way} − {start}, {k}": (way, start, of, [3]) for k, of in kinds.items()}
    judged |= {"untrained": (mine, paper, every, draws)}
    pairs = (own, theirs, [6, 3]), (own, paper, draws), (twice, paper, [3]), (mine, layers, draws)
    both = f"{layers}, trained"
    pairs += (f"{own.partition(',')[0]}, trained on logits_kd", both, [3]), (own, both, [3, 3])
    judged |= {f"{a} − {b}": (a, b, every, seeds) for a, b, seeds in pairs}
    assert len(judged := {n: how for n, how in judged.items() if n in verdicts}) == count
    for name, (first, rival, rows, seeds) in judged.items():
        avg = avg_of(lines[rows])
        assert [e["seeds"] for e in verdicts[name]["effects"].values()] == seeds
        for where, e in verdicts[name]["effects"].items():
            leads = (avg[first] - avg[rival])[float(where[-4:])].dropna()
            assert (len(leads), leads.mean()) == (e["seeds"], pytest.approx(e["value"], abs=1e-3))


def by_hand(number: int, where: str, table: pd.DataFrame) -> pd.Series:  # seed -> effect
    "The effect of a claim at one place, from its definition in words."
    model, _, rest = where.partition(" at ")
    ratio, rival = float(rest[:4]), rest.partition(", over ")[2]
    advised = "layerwise" if ratio < 0.375 else "widthwise"
    other = {"layerwise": "widthwise", "widthwise": "layerwise"}[advised]
    best = dict(recovery="sft+hidden_kd", train="projector+lm", fraction=0.05)

    def kept(**wanted) -> pd.Series:
        own = table[(table.model == model) & np.isclose(table.ratio, ratio)]
        for column, value in wanted.items():
            own = own[own[column] == value]
        return own.set_index("seed").avg

    if number == 1:
        first, second = (kept(pruning=p, recovery="none") for p in ("widthwise", "layerwise"))
    elif number == 3:
        losses = best["recovery"], rival
        first, second = (kept(pruning=advised, **best | {"recovery": r}) for r in losses)
    elif number == 4:
        first, second = kept(pruning=advised, **best), 95.0
    elif number == 5:
        first, second = (kept(pruning=p, **best) for p in (advised, other))
    return (first - second).dropna()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
@pytest.mark.parametrize("number", [1, 3, 4, 5])
def test_verdicts_are_those_of_a_recount_by_other_code(folder, number):
    "Effects by plain means, the average's standard error by statsmodels' clustered regression."
    name = {1: "02_pruning-verdict", 3: "04_distillation-verdict"}
    name |= {4: "05_data-verdict", 5: "06_best-choice"}
    notebook, verdict_name = name[number].split("-")
    if not (path := folder / f"{notebook}-verdicts.json").exists():
        pytest.skip(f"{notebook} is not drawn in this profile")
    verdict = json.loads(path.read_text(encoding="utf-8"))[verdict_name]
    table = scores_of(folder / f"{notebook}.ipynb")
    effects = {where: by_hand(number, where, table) for where in verdict["effects"]}
    for where, effect in effects.items():
        assert effect.mean() == pytest.approx(verdict["effects"][where]["value"], abs=2e-3), where
        assert len(effect) == verdict["effects"][where]["seeds"]
    if not effects:
        assert verdict["word"] == "not tested"
        return
    ranks = ["contradicted", "undecided", "equivalent", "supported"]
    parts = list(verdict["parts"].values()) or [verdict | {"settings": list(effects)}]
    assert verdict["word"] == min([part["word"] for part in parts], key=ranks.index)
    for part in parts:
        recount({where: effects[where] for where in part["settings"]}, part, verdict["margin"])


def recount(effects: dict, part: dict, margin: float | None) -> None:
    "Hold the average of some settings, and its word, against plain means and clustered errors."
    average = np.mean([effect.mean() for effect in effects.values()])
    assert average == pytest.approx(part["average"]["value"], abs=2e-3)
    if part["average"]["seeds"] == 1:
        assert part["word"] == "undecided"
        return
    long = pd.concat(
        pd.DataFrame({"y": e, "cluster": where.split(" at ")[0]}).assign(seed=e.index)
        for where, e in effects.items()
    )
    cluster = (long.cluster + long.seed.astype(str)).factorize()[0]
    setting = np.repeat(range(len(effects)), [len(e) for e in effects.values()])
    how = dict(cov_type="cluster", cov_kwds={"groups": cluster, "use_correction": False})
    fit = sm.OLS(long.y.to_numpy(), pd.get_dummies(setting).to_numpy(float)).fit(**how)
    error = np.sqrt(fit.cov_params().mean(axis=None))  # of the mean of all settings
    low, high = (part["average"][end] for end in ("low", "high"))
    # questions add to the seeds, and few seeds widen the interval
    assert 1.5 * error < (high - low) / 2
    if margin is not None and -margin < low and high < margin:
        assert part["word"] in ("equivalent", "undecided")
    elif low > 0 or high < 0:
        assert part["word"] in ("supported" if low > 0 else "contradicted", "undecided")
    else:
        assert part["word"] == "undecided"


ENDS = "value", "low", "high"  # of an effect


@pytest.mark.parametrize(
    "folder", [f for f in FOLDERS if (f / "10_findings-advice.csv").exists()], ids=lambda f: f.name
)
def test_the_advice_is_that_of_the_verdicts_that_it_names(folder):
    "A notebook that is drawn again needs 10_findings drawn again, which reads its verdicts."
    table = pd.read_csv(folder / "10_findings-advice.csv", dtype=str).fillna("")
    for row in table.to_dict("records"):
        notebook, _, profile = row["notebook"].partition(" of ")
        path = folder.parent / (profile or folder.name) / f"{notebook}-verdicts.json"
        known = set()
        for verdict in json.loads(path.read_text(encoding="utf-8")).values():
            for effect in [verdict["average"], *verdict["effects"].values()]:
                known |= {tuple(round(effect[n], 1) for n in ENDS)} if effect else set()
        shown = re.findall(r"([+-]\d+\.\d) \[(\S+), (\S+)\]", row["points of AVG-%"])
        assert {tuple(map(float, numbers)) for numbers in shown} <= known, row["difference"]


# ---- from the sources


def code_of(nb) -> list:
    "The code of a notebook, without the parameters that papermill has put in."
    code = [c for c in nb.cells if c.cell_type == "code"]
    return [c.source for c in code if "injected-parameters" not in c.metadata.get("tags", [])]


QUICK = sorted((ROOT / "figures/quick").glob("[0-9]*.ipynb"))


@pytest.mark.parametrize(
    "notebook", [p for p in QUICK if not p.stem.startswith(MEASURED)], ids=lambda p: p.stem
)
def test_committed_notebooks_were_run_from_their_sources(notebook):
    "Those of quick; a new table does not wait for the larger profiles to be drawn again."
    source = nbformat.read(ROOT / "nbs/study" / notebook.name, 4)
    applies = for_profile(notebook.stem, source, load_profile(notebook.parent.name))
    assert code_of(nbformat.read(notebook, 4)) == code_of(applies)


@pytest.mark.parametrize("path", QUICK, ids=lambda p: p.stem)
def test_study_notebooks_show_what_the_quick_run_showed(path):
    def shown(notebook):
        cells = [c for c in nbformat.read(notebook, 4).cells if c.cell_type == "code"]
        outputs = [o for c in cells for o in c.get("outputs", [])]
        texts = [{"text/plain": o.get("text")} | o.get("data", {}) for o in outputs]
        return [text.get("text/markdown", text["text/plain"]) for text in texts]

    assert shown(ROOT / "nbs/study" / path.name) == shown(path)


# ---- from the results once more, by the notebooks themselves


def leaves(value) -> list:
    "The values of a nested dictionary, in the order of their sorted keys."
    if not isinstance(value, dict):
        return [value]
    return [leaf for key in sorted(value) for leaf in leaves(value[key])]


def compare(ours: Path, again: Path) -> None:
    "Two tables or verdicts must say the same, up to rounding."
    if ours.suffix == ".csv":
        tables = pd.read_csv(ours), pd.read_csv(again)
        return pd.testing.assert_frame_equal(*tables, rtol=1e-4, atol=1e-6)
    pairs = zip(*(leaves(json.loads(path.read_text())) for path in (ours, again)), strict=True)
    for x, y in pairs:
        assert x == (pytest.approx(y, rel=1e-5, abs=1e-9) if isinstance(x, float) else y), ours


@pytest.mark.slow
def test_notebooks_draw_all_tables_and_verdicts_of_quick_again(tmp_path, monkeypatch):
    committed = ROOT / "figures/quick"
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs/study", tmp_path / "nbs/study")
    without = shutil.ignore_patterns("quick", "*.zip", "*.png")
    shutil.copytree(ROOT / "figures", tmp_path / "figures", ignore=without)
    monkeypatch.chdir(tmp_path)
    runner.take_in(committed / "results.zip", "quick")
    names = [p.stem for p in committed.glob("[0-9]*.ipynb") if not p.stem.startswith(MEASURED)]
    plan = runner.plan_study("quick", names)
    assert status(runner.experiments_of_plan(plan), load_profile("quick")).cached.all()
    assert runner.run_notebooks(plan, "quick") == []
    written = sorted([*committed.glob("*-*.csv"), *committed.glob("*-*.json")])
    written = [p for p in written if not p.name.startswith(MEASURED)]
    assert len(written) > 15
    for path in written:
        compare(path, tmp_path / "runs/quick/figures" / path.name)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_no_seed_of_a_refit_is_a_copy_of_another(folder):
    "Every seed fits the weights to other samples, so its students answer some questions otherwise."
    lines = pd.read_csv(folder / "experiments.csv.xz")
    lines = lines[(lines.reconstruct != "none") & (lines.quantize == "none")]
    fields = [*lines.loc[:, "model":"returned"].columns.drop(["seed", "calibration_seed"])]
    scores = lines.pivot(index=[*fields, "result"], columns="benchmark", values="score")
    scores = scores[scores.mean(axis=1).between(5, 95)].droplevel("result").reset_index()
    assert not scores.duplicated().any(), scores[scores.duplicated(keep=False)]
