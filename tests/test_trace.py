"""Every committed number follows from its results, and every committed notebook from its source."""

import json
import shutil
import warnings
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from mllm_compress.study import runner, status, store
from mllm_compress.study import runs as study
from mllm_compress.study import statistics as effects
from mllm_compress.study.claims import AT_EQUAL_SIZE, CLAIMS, SECOND_FORM, judged_by
from mllm_compress.study.experiments import Experiment
from mllm_compress.study.notebooks import experiments_of, for_profile
from mllm_compress.study.profile_inputs import missing_inputs
from mllm_compress.study.profiles import load_profile
from mllm_compress.study.stages import name_of, result_of
from mllm_compress.study.statistics import Verdict
from mllm_compress.study.store import Store

ROOT = Path(__file__).parent.parent
MEASURED = ("00_", "09_")  # learning rates are searched by hand; times are another machine's
FOLDERS = sorted(p.parent for p in (ROOT / "figures").glob("*/experiments.csv"))
SETTING = ["model", "pruning", "ratio", "importance", "recovery", "train", "fraction"]
SETTING += ["allocation", "shape", "reconstruct", "quantize", "calibration"]
SETTING += ["epochs", "layer_share", "start", "hidden_layers"]


def means(lines: pd.DataFrame) -> pd.DataFrame:
    "One row per setting: mean score of each benchmark over seeds, AVG-%, and number of seeds."
    setting = [c for c in SETTING if c in lines]
    scores = lines.pivot_table("score", setting, "benchmark", aggfunc="mean").reset_index()
    benchmarks = list(lines.benchmark.unique())
    dense = scores[scores.pruning == "none"].set_index("model")[benchmarks]
    originals = (
        dense.loc[scores.model].replace(0, np.nan).to_numpy()
    )  # what a random model scores 0 on has no ratio
    scores["AVG-%"] = 100 * pd.DataFrame(scores[benchmarks].to_numpy() / originals).mean(axis=1)
    achieved = lines.groupby(setting, as_index=False).agg(
        achieved=("achieved_ratio", "mean"), seeds=("seed", "nunique")
    )
    return scores.merge(achieved, on=setting)


def fits(row: pd.Series, settings: pd.DataFrame) -> pd.Series:
    "Which settings a row of a table may describe: columns that name one count, others are free."
    words = {c: str(v) for c, v in row.items()}
    at = (settings.model == row.model) & np.isclose(settings.ratio, float(row.requested))
    at &= settings.pruning == words["pruning"].replace("original", "none")
    if words["pruning"] == "original":
        return at
    if (trained := words.get("trained")) is not None:
        at &= (
            (settings.recovery == "none")
            if trained == "nothing"
            else (settings.recovery != "none") & (settings.train == trained)
        )
    if (losses := words.get("losses")) is not None:
        at &= settings.recovery == losses
    if (part := words.get("fraction")) is not None:
        percent = float(part.rstrip(" %"))
        at &= (
            (settings.recovery == "none")
            if percent == 0
            else (settings.recovery != "none") & np.isclose(settings.fraction * 100, percent)
        )
    return at


def untraced(table: pd.DataFrame, lines: pd.DataFrame) -> list:  # of rows' descriptions
    "The rows of a table that are not the means of any setting they may speak of."
    settings, found = means(lines), []
    numbers = [c for c in table.columns if c in set(lines.benchmark) | {"AVG-%"}]
    for _, row in table.iterrows():
        shown = pd.to_numeric(row[numbers], errors="coerce").to_numpy(float)
        candidates = settings[fits(row, settings)]
        same = [
            np.allclose(
                c[numbers].astype(float).to_numpy(), shown, rtol=2e-5, atol=1e-6, equal_nan=True
            )
            and ("achieved" not in row or abs(c.achieved - float(row.achieved)) < 6e-4)
            and (
                "seeds" not in row
                or row.pruning == "original"
                or np.isnan(c["AVG-%"])
                or int(row.seeds) == c.seeds
            )
            for _, c in candidates.iterrows()
        ]
        if not any(same):
            found.append(f"{dict(row)} among {len(candidates)} settings")
    return found


def read_by(notebook: Path) -> list:
    "The names of the results that an executed notebook has read."
    return nbformat.read(notebook, 4).metadata.get("mllm_compress", {}).get("results", [])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_every_score_is_the_mean_of_its_results(folder):
    lines, checked = pd.read_csv(folder / "experiments.csv"), []
    for path in sorted(folder.glob("*-scores.csv")):
        notebook = folder / f"{path.name.removesuffix('-scores.csv')}.ipynb"
        table = pd.read_csv(path)
        if "pruning" not in table:
            continue
        mine = lines[lines.result.isin(read_by(notebook))]
        assert set(mine.benchmark) <= set(table.columns) and not untraced(table, mine), (
            path,
            untraced(table, mine),
        )
        checked.append(path.name)
    assert checked
    assert "02_pruning-scores.csv" in checked or not (folder / "02_pruning.ipynb").exists()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_every_result_that_a_notebook_has_read_is_there_once(folder):
    lines = pd.read_csv(folder / "experiments.csv")
    for notebook in sorted(folder.glob("[0-9]*.ipynb")):
        assert set(read_by(notebook)) <= set(lines.result), notebook
    assert (
        not lines.duplicated(["result", "benchmark"]).any() and lines.score.between(0, 2800).all()
    )
    assert (
        lines.groupby("result")[SETTING + ["seed", "device", "torch", "date", "seconds"]]
        .nunique(dropna=False)
        .eq(1)
        .all(axis=None)
    )
    assert (folder / "experiments.csv").stat().st_size < 4 * 2**20


# ---- from the results themselves


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda p: p.name)
def traced(request, tmp_path_factory, small_texts):  # (folder, name -> (experiment, result))
    "A folder of figures and the results that came with it, each believed only with its seal."
    setup, results = load_profile(request.param.name), Store(tmp_path_factory.mktemp("t") / "runs")
    with pytest.MonkeyPatch.context() as patch:
        if any(
            b.startswith(("text/", "emoji/")) for b in setup.evaluation.benchmarks
        ):  # the real ones, not those that are made up for the tests
            patch.delenv("MLLM_COMPRESS_TEXTS")
            if lacking := missing_inputs(setup):
                pytest.skip("; ".join(lacking))
        yield contents_of(request.param, setup, results)


def contents_of(folder: Path, setup, results: Store) -> tuple:
    "The folder, and its results by name."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taken = store.unpack(folder / "results.zip", results)
    descriptions = [store.read(results, "experiment", k)["inputs"] for k in taken["experiment"]]
    given = [{k: v for k, v in d.items() if k not in ("stage", "version")} for d in descriptions]
    experiments = [Experiment(**d) for d in given]
    contents = {name_of(e, setup): (e, result_of(e, setup, results)) for e in experiments}
    assert all(result is not None for _, result in contents.values())
    return folder, contents


def frame_of(notebook: Path, contents: dict) -> pd.DataFrame:
    "The frame that a notebook was drawn from."
    setup = load_profile(notebook.parent.name)
    source = nbformat.read(ROOT / "nbs/study" / notebook.name, 4)
    own = {name_of(e, setup): e for e in experiments_of(source, {"profile": setup.name})}
    spelled = lambda n: (own.get(n, contents[n][0]), contents[n][1])  # as this notebook names it
    named = [(n, spelled(n)) for n in read_by(notebook)]
    rows = [
        r
        for n, (e, result) in named
        for r in study._with_images(study.rows_of(e, result), n, setup)
    ]
    return pd.DataFrame(rows).assign(profile=notebook.parent.name)


def test_the_lines_of_experiments_csv_are_the_results(traced):
    folder, contents = traced
    lines = pd.read_csv(folder / "experiments.csv", dtype={"result": str})
    assert set(lines.result) == set(contents)
    for line in lines.itertuples():
        _, result = contents[line.result]
        row = next(r for r in result["rows"] if r["benchmark"] == line.benchmark)
        assert line.score == pytest.approx(row["score"], rel=1e-5) and line.n == row["n"]
        assert line.seconds == pytest.approx(result["record"]["seconds"], rel=1e-5)
        worth = 100 * np.mean(result["units"][line.benchmark])
        assert worth == pytest.approx(row["score"], abs=0.01)


def test_intervals_of_tables_follow_from_the_answers(traced):
    folder, contents = traced
    for path in sorted(folder.glob("*-scores.csv")):
        table, frame = (
            pd.read_csv(path),
            frame_of(folder / f"{path.name.removesuffix('-scores.csv')}.ipynb", contents),
        )
        rows = effects.summary(frame)
        if "pruning" in table:  # without it, a dense model that is rounded is a row as any other
            rows, table = rows[rows.pruning != "none"], table[table.pruning != "original"]
        ours = {
            tuple(round(v, 3) for v in r) for r in rows[["avg_percent", "low", "high"]].to_numpy()
        }
        shown = table[["AVG-%", "low", "high"]].dropna().to_numpy()
        assert len(shown) and all(
            any(np.allclose(row, r, atol=2e-3) for r in ours) for row in shown
        ), path


def retold(path: Path, claim, contents: dict) -> None:
    "Hold a written verdict against what its results say."
    said = json.loads(path.read_text(encoding="utf-8"))
    frame = frame_of(path.parent / f"{path.name.split('-')[0]}.ipynb", contents)
    frame = frame[(frame.epochs == 0) & (frame.layer_share == 0) & (frame.start == "pruned")]
    frame = frame[frame.hidden_layers == "final"]
    frame = frame[frame.requested_ratio <= 0.6]
    how = judged_by(claim, frame) | {"guessed": said["guessed"]}
    found = Verdict(claim.text, claim.effects(frame), "", **how)
    assert set(said["effects"]) == set(found.settings) and said["word"] == found.word
    parts = {name: part.word for name, part in found.by_part.items() if name}
    assert {name: part["word"] for name, part in said["parts"].items()} == parts
    assert said["words"] == found.words
    average = {"": found.average} if found.settings else {}
    for where, e in (found.settings | average).items():
        written = said["effects"][where] if where else said["average"]
        assert [written[k] for k in ("value", "low", "high")] == pytest.approx(
            [e.value, e.low, e.high], rel=1e-5, abs=1e-9
        )
        assert (written["n"], written["seeds"]) == (e.n, e.seeds)


def test_verdicts_follow_from_the_answers(traced):
    folder, contents = traced
    seen = []
    for number, claim in CLAIMS.items():
        path = next(
            (
                p
                for p in (
                    folder / f"{claim.notebook}-{name}.json" for name in ("verdict", "choice")
                )
                if p.exists() and json.loads(p.read_text())["claim"] == claim.text
            ),
            None,
        )
        if path:
            retold(path, claim, contents)
            seen.append(number)
        even = folder / f"{claim.notebook}-same-size.json"
        if even.exists():
            retold(even, AT_EQUAL_SIZE[number], contents)
            seen.append(f"{number} at equal size")
    second = folder / "05_data-second-form.json"
    if second.exists():
        retold(second, SECOND_FORM, contents)
        seen.append("4, second form")
    if (folder / "10_findings.ipynb").exists():  # else the profile is not complete
        every = {1, 2, 3, 4, 5, "4, second form"}
        assert (every if folder.name == "tiny" else {1}) <= set(seen)


# ---- verdicts once more, by other code


def scores_of(notebook: Path, contents: dict) -> pd.DataFrame:
    "AVG-% of every experiment that a notebook has read: plain means of scores, no package code."
    rows = []
    for experiment, result in (contents[name] for name in read_by(notebook)):
        rows += [
            vars(experiment) | {"benchmark": r["benchmark"], "score": r["score"]}
            for r in result["rows"]
        ]
    frame = pd.DataFrame(rows)  # the claims are about one epoch, one pruning and its weights
    frame = frame[(frame.epochs == 0) & (frame.layer_share == 0) & (frame.start == "pruned")]
    frame = frame[frame.hidden_layers == "final"]
    dense = frame[frame.pruning == "none"].set_index(["model", "benchmark"]).score
    whole = np.array([dense[m, b] for m, b in zip(frame.model, frame.benchmark)])
    frame["avg"] = 100 * frame.score / np.where(whole > 0, whole, np.nan)
    keys = ["model", "pruning", "ratio", "recovery", "train", "fraction", "seed"]
    return frame.groupby(keys, as_index=False).avg.mean()


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

    pairs = {
        1: lambda: [kept(pruning=p, recovery="none") for p in ("widthwise", "layerwise")],
        3: lambda: [
            kept(pruning=advised, **best | {"recovery": r}) for r in (best["recovery"], rival)
        ],
        4: lambda: [kept(pruning=advised, **best), 95.0],
        5: lambda: [kept(pruning=p, **best) for p in (advised, other)],
    }
    first, second = pairs[number]()
    return (first - second).dropna()


@pytest.mark.parametrize("number", [1, 3, 4, 5])
def test_verdicts_are_those_of_a_recount_by_other_code(traced, number):
    "Effects by plain means, the average's standard error by statsmodels' clustered regression."
    folder, contents = traced
    name = {1: "02_pruning-verdict", 3: "04_distillation-verdict"}
    name |= {4: "05_data-verdict", 5: "06_best-choice"}
    if not (folder / f"{name[number]}.json").exists():
        pytest.skip(f"{name[number]} is not drawn in this profile")
    said = json.loads((folder / f"{name[number]}.json").read_text(encoding="utf-8"))
    table = scores_of(folder / f"{name[number].split('-')[0]}.ipynb", contents)
    found = {where: by_hand(number, where, table) for where in said["effects"]}
    for where, effect in found.items():
        assert effect.mean() == pytest.approx(said["effects"][where]["value"], abs=2e-3), where
        assert len(effect) == said["effects"][where]["seeds"]
    if not found:
        assert said["word"] == "not tested"
        return
    ranked = ["contradicted", "leans against", "equivalent", "leans for", "supported"]
    parts = list(said["parts"].values()) or [said | {"settings": list(found)}]
    assert said["word"] == min((part["word"] for part in parts), key=ranked.index)
    for part in parts:
        recounted({where: found[where] for where in part["settings"]}, part, said["margin"])


def recounted(found: dict, said: dict, margin: float | None) -> None:
    "Hold the average of some settings, and its word, against plain means and clustered errors."
    import statsmodels.api as sm

    average = np.mean([effect.mean() for effect in found.values()])
    assert average == pytest.approx(said["average"]["value"], abs=2e-3)
    if said["average"]["seeds"] == 1:
        assert said["word"] == ("leans for" if average > 0 else "leans against")
        return
    long = pd.concat(
        [
            pd.DataFrame({"y": e, "cluster": where.split(" at ")[0]}).assign(seed=e.index)
            for where, e in found.items()
        ]
    )
    cluster = (long.cluster + long.seed.astype(str)).factorize()[0]
    setting = np.repeat(range(len(found)), [len(e) for e in found.values()])
    fit = sm.OLS(long.y.to_numpy(), pd.get_dummies(setting).to_numpy(float)).fit(
        cov_type="cluster", cov_kwds={"groups": cluster, "use_correction": False}
    )
    weights = np.full(len(found), 1 / len(found))
    error = np.sqrt(weights @ fit.cov_params() @ weights)
    half = (said["average"]["high"] - said["average"]["low"]) / 2
    assert 1.5 * error < half  # questions add to the seeds, and few seeds widen the interval
    certain = abs(average) > 1.3 * half
    outside = abs(average) > 1 + 1.3 * half or margin is None
    if certain and outside:
        words = ("supported", "leans for") if average > 0 else ("contradicted", "leans against")
        assert said["word"] in words
    if abs(average) + 1.3 * half < 1 and margin is not None:
        assert said["word"] in ("equivalent", "leans for", "leans against")


# ---- from the sources


def code_of(nb) -> list:
    "The code of a notebook, without the parameters that papermill has put in."
    return [
        c.source
        for c in nb.cells
        if c.cell_type == "code" and "injected-parameters" not in c.metadata.get("tags", [])
    ]


@pytest.mark.parametrize(
    "notebook",
    [p for f in FOLDERS for p in sorted(f.glob("[0-9]*.ipynb")) if not p.stem.startswith("00")],
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_committed_notebooks_were_run_from_their_sources(notebook):
    "All that a study runs; the search for learning rates (00) takes hours and is run by hand."
    source = nbformat.read(ROOT / "nbs/study" / notebook.name, 4)
    applies = for_profile(notebook.stem, source, load_profile(notebook.parent.name))
    assert code_of(nbformat.read(notebook, 4)) == code_of(applies)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "figures/quick").glob("[0-9]*.ipynb")), ids=lambda p: p.stem
)
def test_study_notebooks_show_what_the_quick_run_showed(path):
    def shown(notebook):
        outputs = [
            o
            for c in nbformat.read(notebook, 4).cells
            if c.cell_type == "code"
            for o in c.get("outputs", [])
        ]
        return [
            o.text
            if o.output_type == "stream"
            else o.data.get("text/markdown", o.data.get("text/plain"))
            for o in outputs
        ]

    assert shown(ROOT / "nbs/study" / path.name) == shown(path)


def made() -> pd.DataFrame:
    "Results of a dense model and of a pruned one with two seeds."
    rows = [
        ("none", 0, 0, "a", 90),
        ("none", 0, 0, "b", 80),
        ("layerwise", 0.3, 0, "a", 45),
        ("layerwise", 0.3, 0, "b", 40),
        ("layerwise", 0.3, 1, "a", 63),
        ("layerwise", 0.3, 1, "b", 60),
    ]
    return pd.DataFrame(
        [
            {
                "model": "m",
                "pruning": p,
                "ratio": r,
                "importance": "i",
                "recovery": "none",
                "train": "t",
                "fraction": 1.0,
                "seed": s,
                "benchmark": b,
                "score": v,
                "achieved_ratio": r,
                "result": f"{p}{s}",
            }
            for p, r, s, b, v in rows
        ]
    )


@pytest.mark.parametrize(
    "change, wrong",
    [
        ({}, 0),
        ({"a": 54.1}, 1),
        ({"AVG-%": 61.0}, 1),
        ({"achieved": 0.31}, 1),
        ({"pruning": "widthwise"}, 1),
        ({"seeds": 3}, 1),
    ],
)
def test_a_changed_number_is_found(change, wrong):
    table = pd.DataFrame(
        [
            {
                "model": "m",
                "requested": 0.0,
                "pruning": "original",
                "achieved": 0.0,
                "a": 90,
                "b": 80,
                "AVG-%": 100.0,
            },
            {
                "model": "m",
                "requested": 0.3,
                "pruning": "layerwise",
                "achieved": 0.3,
                "seeds": 2,
                "a": 54,
                "b": 50,
                "AVG-%": 61.25,
            }
            | change,
        ]
    )
    assert len(untraced(table, made())) == wrong


# ---- from the results once more, by the notebooks themselves


def same_values(ours: Path, again: Path) -> bool:
    "Whether two tables or verdicts say the same, up to rounding."
    if ours.suffix == ".csv":
        return (
            pd.testing.assert_frame_equal(
                pd.read_csv(ours), pd.read_csv(again), rtol=1e-4, atol=1e-6
            )
            is None
        )
    flat = lambda value: (
        [leaf for k in sorted(value) for leaf in flat(value[k])]
        if isinstance(value, dict)
        else [value]
    )
    return len(flat(a := json.loads(ours.read_text()))) == len(
        flat(b := json.loads(again.read_text()))
    ) and all(
        x == pytest.approx(y, rel=1e-5, abs=1e-9) if isinstance(x, float) else x == y
        for x, y in zip(flat(a), flat(b))
    )


@pytest.mark.slow
def test_notebooks_draw_every_table_and_verdict_of_quick_from_the_results_again(
    tmp_path, monkeypatch
):
    committed = ROOT / "figures/quick"
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs/study", tmp_path / "nbs/study")
    without = shutil.ignore_patterns("quick", "*.zip", "*.png")
    shutil.copytree(ROOT / "figures", tmp_path / "figures", ignore=without)
    monkeypatch.chdir(tmp_path)
    runner.take_in(committed / "results.zip", "quick")
    names = [p.stem for p in committed.glob("[0-9]*.ipynb") if not p.stem.startswith(MEASURED)]
    plan = runner.plan_study("quick", names)
    assert not (~status(runner.experiments_of_plan(plan), "quick").cached).any()
    assert runner.run_notebooks(plan, "quick", "local", workers=2) == []
    written = [
        p
        for p in sorted(committed.glob("*-*.*"))
        if p.suffix in (".csv", ".json") and not p.name.startswith(MEASURED)
    ]
    assert len(written) > 15
    for path in written:
        assert same_values(path, tmp_path / "runs/quick/figures" / path.name), path.name
