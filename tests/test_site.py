"""The page in a headless browser: complete, self-contained and readable on a phone."""

import base64
import html
import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbconvert import HTMLExporter
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from mllm_compress.study import page as site
from mllm_compress.study.claims import CLAIMS
from mllm_compress.study.profiles import load_profile
from mllm_compress.study.rendering import notebook_html
from mllm_compress.study.report import Report
from mllm_compress.study.style import panels
from mllm_compress.study.tables import Table, to_html

ROOT = Path(__file__).parent.parent
PAGES = sorted(p.parent for p in (ROOT / "figures").glob("*/index.html"))
BROWSER = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
        if (found := shutil.which(name))
    ),
    None,
)
browser = pytest.mark.skipif(not BROWSER, reason="no Chromium here")
DOT = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAA"
    "AABJRU5ErkJggg=="
)
PROBE = """<script>
addEventListener('load', () => {
  const box = e => e.getBoundingClientRect(), images = [...document.images];
  const all = selector => [...document.querySelectorAll(selector)];
  const ids = all('nav a').map(a => a.getAttribute('href').slice(1));
  const visible = i => i.complete && i.naturalWidth
    && box(i.closest('.wide') || i).right <= innerWidth;
  const first = e => {
    e.scrollLeft = 150;
    const cell = e.querySelector('td');
    return {moved: e.scrollLeft, at: box(cell).left - box(e).left,
            back: getComputedStyle(cell).backgroundColor};
  };
  parent.postMessage(JSON.stringify({
    width: innerWidth,
    needed: document.documentElement.scrollWidth,
    back: getComputedStyle(document.body).backgroundColor,
    text: getComputedStyle(document.body).color,
    requests: performance.getEntriesByType('resource').map(e => e.name),
    images: images.length,
    shown: images.filter(visible).length,
    tables: all('table').length,
    picture: images.length ? box(images[0]).width : 0,
    lost: ids.filter(id => !document.getElementById(id)),
    outside: all('h1,h2,h3,p,li,figure,figcaption,.wide,summary')
      .filter(e => box(e).right > innerWidth + 1).length,
    captions: all('caption,figcaption').map(e => ({left: box(e).left, right: box(e).right})),
    long: all('td.long').map(e => ({width: box(e).width, lines: lines(e)})),
    short: all('.study td:not(.long)').filter(e => e.innerText).map(lines),
    first: all('.wide').filter(e => e.querySelector('td')).map(first).filter(e => e.moved),
  }), '*');
});
function lines(e) {
  const range = document.createRange();
  range.selectNodeContents(e);
  return new Set([...range.getClientRects()].map(r => Math.round(r.top))).size;
}
</script>"""
WRAPPER = """<body style="margin:0">
<iframe src="probed.html" style="border:0;width:{width}px;height:4000px"></iframe>
<script>addEventListener('message', e => document.body.dataset.probe = e.data)</script></body>"""


def look(page: Path, folder: Path, width: int, dark: bool = False) -> dict:
    "What a browser of this width makes of a page."
    (folder / "probed.html").write_text(
        page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8"
    )
    (folder / "wrapper.html").write_text(WRAPPER.format(width=width), encoding="utf-8")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'browser'}",
        "--virtual-time-budget=20000",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--dump-dom",
        (folder / "wrapper.html").as_uri(),
    ]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return json.loads(html.unescape(re.search('data-probe="([^"]*)"', dom)[1]))


SENTENCE = "A sentence that says why, at some length, so that it has to wrap"
VERDICTS = {
    "02_pruning-verdict": (CLAIMS[1].text, "contradicted", -1.5),
    "03_projector-gain": ("Training helps.", "leans for", 0.5),
    "03_projector-verdict": (CLAIMS[2].text, "supported", 0.5),
    "06_best-choice": (CLAIMS[5].text, "equivalent", 0.1),
    "10_findings-claim-1": (CLAIMS[1].text, "contradicted", -1.5),
    "10_findings-claim-2": (CLAIMS[2].text, "supported", 0.5),
}


def heads(text: str) -> list:
    "The headings of the second level, in their order."
    return [text_of(found) for found in re.findall("<h2[^>]*>(.*?)</h2>", text, flags=re.S)]


def wide_notebook():
    "A notebook with everything that makes pages too wide."
    table = (
        "<table><caption>Benchmarks.</caption><thead><tr>"
        + "".join(f"<th>scenes/benchmark {k}</th>" for k in range(20))
        + "</tr></thead></table>"
    )
    frame = pd.DataFrame(
        {
            "model": ["tiny-llava", "tiny-bunny"],
            "why": [SENTENCE + "."] * 2,
            **{f"scenes/some benchmark {k}": [97.1, 98.2] for k in range(16)},
        }
    )
    study = to_html(
        Table(frame, "n = 7,000 questions per model, 3 seeds, " + "and so on, " * 30, {})
    )
    return new_notebook(
        cells=[
            new_markdown_cell(
                "# A title that names a_function_with_a_very_long_name_indeed_and_then_some_more\n"
                "> A claim with `inline_code_that_cannot_be_broken_anywhere_and_is_long`."
            ),
            new_markdown_cell(
                "## Heading\n\nA link: https://example.org/"
                + "long/" * 30
                + "\n\n| a | b |\n|---|---|\n| "
                + "wide " * 30
                + "| 2 |"
            ),
            new_code_cell("import math"),
            new_code_cell("import json"),
            new_code_cell(
                "x = 1",
                outputs=[
                    new_output("display_data", {"text/html": table, "text/plain": "a table"}),
                    new_output("display_data", {"text/html": study, "text/plain": "a table"}),
                    new_output(
                        "display_data",
                        {"image/png": DOT, "text/plain": "a caption: " + "word" * 60},
                    ),
                    new_output("stream", text="a line that goes on " * 20),
                ],
            ),
            new_markdown_cell("## Heading"),
            new_code_cell("y = 2"),
        ]
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    "The page of a study that would be too wide, with verdicts."
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "settings.ini", folder)
    for part in ("nbs/study", "figures/smoke"):
        (folder / part).mkdir(parents=True)
    nb = wide_notebook()
    for name in ("01_wide", *sorted({file.partition("-")[0] for file in VERDICTS})):
        for part in ("nbs/study", "figures/smoke"):
            nbformat.write(
                nb if name == "01_wide" else new_notebook(cells=nb.cells[:1]),
                folder / part / f"{name}.ipynb",
            )
    (folder / "figures/smoke/01_wide-t.csv").touch()
    (folder / "figures/smoke/01_wide-f.png").write_bytes(base64.b64decode(DOT))
    (folder / "figures/smoke/06_best-retained.png").write_bytes(base64.b64decode(DOT))
    (folder / "figures/smoke/06_best-retained.txt").write_text("Retained scores, n < 7,000.")
    shutil.copy(ROOT / "CITATION.cff", folder)
    for file, (claim, word, value) in VERDICTS.items():
        average = {"value": value, "low": value - 0.3, "high": value + 0.3, "n": 7000, "seeds": 3}
        record = {"claim": claim, "word": word, "settings": f"2 settings: {word} (2)"}
        (folder / f"figures/smoke/{file}.json").write_text(
            json.dumps(record | {"unit": "points", "average": average, "effects": {}}),
            encoding="utf-8",
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return site.build("smoke")


def test_a_page_opens_with_the_study_the_verdicts_and_the_figures(made):
    page = made.read_text(encoding="utf-8")
    assert heads(page)[:3] == [
        "Verdicts",
        "Key figures",
        "Which section is which table or figure of the paper",
    ]
    before = page.partition('<section id="verdicts">')[0]
    assert "Investigating Structural Pruning and Recovery Techniques" in before
    figures = re.search('<section id="figures">.*?</section>', page, flags=re.S)[0]
    assert figures.count("<img") == 1 and "Retained scores, n &lt; 7,000." in figures


def test_what_prepares_the_study_comes_last(made, tmp_path, monkeypatch):
    copy = tmp_path / "checkout"
    shutil.copytree(made.parents[2], copy)
    monkeypatch.chdir(copy)
    for part in ("nbs/study", "figures/smoke"):
        nb = new_notebook(cells=[new_markdown_cell("# Learning rates\n> A")])
        nbformat.write(nb, copy / part / "00_learning_rates.ipynb")
    assert heads(site.build("smoke").read_text(encoding="utf-8"))[-2:] == [
        "Learning rates",
        "Provenance",
    ]


def test_a_notebook_that_failed_is_named(made, tmp_path, monkeypatch):
    copy = tmp_path / "checkout"
    shutil.copytree(made.parents[2], copy)
    monkeypatch.chdir(copy)
    assert "failed when it was last run" not in made.read_text(encoding="utf-8")
    nbformat.write(wide_notebook(), copy / "figures/smoke/01_wide.failed.ipynb")
    assert '01_wide failed when it was last run (<a href="01_wide.failed.ipynb">' in site.build(
        "smoke"
    ).read_text(encoding="utf-8")


def test_a_notebook_with_parameters_of_its_own_says_so_and_speaks_last(made, tmp_path, monkeypatch):
    copy, whole = tmp_path / "checkout", made.read_text(encoding="utf-8")
    shutil.copytree(made.parents[2], copy)
    monkeypatch.chdir(copy)
    nb = nbformat.read(copy / "figures/smoke/03_projector.ipynb", 4)
    nb.metadata["mllm_compress"] = {"parameters": {"profile": "smoke", "ratios": [0.3]}}
    nbformat.write(nb, copy / "figures/smoke/03_projector.ipynb")
    part, claim = site.build("smoke").read_text(encoding="utf-8"), CLAIMS[2].text.rstrip(".")
    assert "Run with ratios=[0.3]" in part and f'<a href="#10_findings">{claim}' in part
    assert "Run with" not in whole and f'<a href="#03_projector">{claim}' in whole


def text_of(part: str) -> str:
    "What a reader sees of a piece of HTML."
    return html.unescape(re.sub("<[^>]*>", "", part)).strip()


def listed(page: Path) -> list:  # of texts
    "The verdicts at the top."
    return [
        text_of(item)
        for ul in re.findall(
            '<ul class="findings">(.*?)</ul>', page.read_text(encoding="utf-8"), flags=re.S
        )
        for item in re.findall("<li.*?</li>", ul)
    ]


def claim_of(line: str) -> str:
    "The claim without its mark and number, and without what came of it."
    return re.match(r"[✓↗≈↘✗–](\d\. )?(.*): [^:]* \((?:[^()]|\([^()]*\))*\)$", line)[2]


def complete(seen: dict) -> bool:
    "Whether all is there and nothing was asked of anyone."
    return (
        seen["requests"] == []
        and seen["lost"] == []
        and seen["shown"] == seen["images"] > 0
        and seen["tables"] > 0
    )


def brightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


def test_each_verdict_is_listed_once_with_the_claims_of_the_paper_first(made):
    claims = {n: CLAIMS[n].text.rstrip(".") for n in (1, 2, 5)}
    assert listed(made) == [
        f"✗1. {claims[1]}: contradicted, -1.5 [-1.8, -1.2] points (2 settings: contradicted (2))",
        f"✓2. {claims[2]}: supported, +0.5 [0.2, 0.8] points (2 settings: supported (2))",
        f"≈5. {claims[5]}: equivalent, +0.1 [-0.2, 0.4] points (2 settings: equivalent (2))",
        "↗Training helps: leans for, +0.5 [0.2, 0.8] points (2 settings: leans for (2))",
    ]
    page = made.read_text(encoding="utf-8")
    assert re.findall(
        '<a href="#([^"]*)">(?:Without recovery|At ratios|With recovery|Training helps)', page
    ) == ["02_pruning", "03_projector", "06_best", "03_projector"]


def test_a_caption_is_shown_once_on_the_page_and_in_the_html_export(tmp_path, monkeypatch):
    "A notebook's output carries its caption in every form; each export shows one of them."
    monkeypatch.chdir(tmp_path)
    fig, _ = panels(1)
    shown = Report("99_demo", "smoke").figure(fig, "f", "Scores, n < 7,000.")
    picture, below = (new_output("display_data", data) for data in shown.outputs())
    cell = new_code_cell("out.figure(fig)", outputs=[picture, below])
    nb = new_notebook(cells=[new_markdown_cell("# Title"), cell])
    on_page = notebook_html("99_demo", nb, list(Path("figures/smoke").iterdir()))["body"]
    exported, _ = HTMLExporter().from_notebook_node(nb)
    for text in (on_page, exported):
        assert text.count("Scores, n &lt; 7,000.") == text.count("<figcaption") == 1
        assert len(re.findall("<img[^>]*data:image/png;base64,", text)) == 1
    assert '<a href="99_demo-f.png"><img' in on_page


def test_a_picture_leads_to_its_file_and_code_shares_a_fold(made):
    section = re.search(
        '<section id="01_wide">.*?</section>', made.read_text(encoding="utf-8"), flags=re.S
    )[0]
    assert section.count("<img") == section.count('<a href="01_wide-f.png"><img') == 1
    assert [
        [text_of(listing) for listing in re.findall("<pre>(.*?)</pre>", fold, flags=re.S)]
        for fold in re.findall("<details>.*?</details>", section, flags=re.S)
    ] == [["import math", "import json", "x = 1"], ["y = 2"]]


def test_headings_descend_by_one_and_sections_lead_back(made):
    page = made.read_text(encoding="utf-8")
    levels = [1, *(int(level) for level in re.findall(r"<h(\d)", page.partition("</h1>")[2]))]
    assert {1, 2, 3} == set(levels) and all(
        after - before <= 1 for before, after in zip(levels, levels[1:])
    )
    assert (
        page.count("<section ") == page.count('<a href="#top">↑ top</a></p></section>') == 9
        and page.count('id="contents"') == page.count('id="top"') == 1
    )
    assert len(ids := re.findall(r' id="([^"]*)"', page)) == len(set(ids))


@pytest.mark.skipif(not shutil.which("git"), reason="no git here")
def test_a_page_names_the_commit_of_its_checkout_if_there_is_one(made, tmp_path):
    assert "made at commit" not in made.read_text(encoding="utf-8") and site.commit(tmp_path) == ""
    git = lambda *words: (
        subprocess.run(
            [
                "git",
                "-C",
                str(tmp_path),
                "-c",
                "user.name=a",
                "-c",
                "user.email=a@example.org",
                *words,
            ],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    git("init"), git("commit", "--allow-empty", "-m", "first")
    assert len(site.commit(tmp_path)) >= 7 and git("rev-parse", "HEAD").startswith(
        site.commit(tmp_path)
    )


def test_no_git_no_commit(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert site.commit(ROOT) == ""


@browser
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out(made, tmp_path, width):
    seen = look(made, tmp_path, width)
    assert (
        complete(seen)
        and seen["width"] == width
        and seen["needed"] <= width
        and seen["outside"] == 0
    ), seen


@browser
@pytest.mark.parametrize("width", [390, 1280])
def test_a_wide_table_is_read_with_its_caption_and_its_first_column(made, tmp_path, width):
    seen = look(made, tmp_path, width)
    assert len(seen["captions"]) == 4 and all(
        0 <= c["left"] < c["right"] <= width for c in seen["captions"]
    ), seen["captions"]
    wrapped = [cell["lines"] > 1 and cell["width"] < 400 for cell in seen["long"]]
    assert sum(wrapped) >= 2, seen["long"]
    assert set(seen["short"]) == {1}
    assert seen["first"] and all(
        abs(cell["at"]) < 1 and cell["back"] == seen["back"] for cell in seen["first"]
    ), seen["first"]


@browser
def test_a_figure_keeps_its_size_on_a_phone(made, tmp_path):
    assert look(made, tmp_path, 390)["picture"] == 44 * 16


@browser
def test_light_and_dark(made, tmp_path):
    light, dark = look(made, tmp_path, 800), look(made, tmp_path, 800, dark=True)
    assert brightness(light["back"]) > 230 and brightness(light["text"]) < 60
    assert brightness(dark["back"]) < 40 and brightness(dark["text"]) > 200


@browser
@pytest.mark.parametrize("folder", PAGES, ids=lambda p: p.name)
def test_committed_pages_on_a_phone(folder, tmp_path):
    seen = look(folder / "index.html", tmp_path, 390, dark=True)
    assert complete(seen) and seen["needed"] <= 390 and seen["outside"] == 0, seen


@pytest.fixture(scope="module", params=PAGES, ids=lambda p: p.name)
def again(request, tmp_path_factory) -> Path:
    "A committed page, made again from its notebooks."
    folder = tmp_path_factory.mktemp("again")
    shutil.copy(ROOT / "settings.ini", folder)
    shutil.copytree(ROOT / "nbs/study", folder / "nbs/study")
    shutil.copytree(request.param, folder / "figures" / request.param.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return site.build(request.param.name)


def whole(page: Path) -> bool:
    "Whether a page has the findings, which come last; only then must it have all claims."
    return (page.parent / "10_findings.ipynb").exists()


def test_making_a_page_again_keeps_its_results(again):  # also without its model or its texts
    kept, now = ROOT / "figures" / again.parent.name, again.parent
    with zipfile.ZipFile(kept / "results.zip") as a, zipfile.ZipFile(now / "results.zip") as b:
        for stage in a.namelist():
            assert set(a.read(stage).splitlines()) <= set(b.read(stage).splitlines())
    lines = [pd.read_csv(folder / "experiments.csv").result for folder in (kept, now)]
    assert set(lines[0]) == set(lines[1])


def test_a_page_is_packed_again_only_where_something_changed(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "nbs/study", tmp_path / "nbs/study")
    shutil.copytree(ROOT / "figures/quick", tmp_path / "figures/quick")
    monkeypatch.chdir(tmp_path)
    quick, packed, real = load_profile("quick"), [], site.store.pack
    monkeypatch.setattr(site.store, "pack", lambda *a, **kw: packed.append(real(*a, **kw)))
    first = site.write_experiments(quick)
    csv, note = tmp_path / "figures/quick/experiments.csv", tmp_path / "runs/quick/page.json"
    text = csv.read_text(encoding="utf-8")
    assert len(packed) == 1 and site.write_experiments(quick).equals(first) and len(packed) == 1
    changes = [
        lambda: os.utime(next((tmp_path / "runs/quick/score").glob("*.json")), (1, 1)),
        lambda: csv.write_text("result\n", encoding="utf-8"),
        lambda: note.write_text("[", encoding="utf-8"),
    ]
    for n, change in enumerate(changes, 2):
        change()
        assert site.write_experiments(quick).equals(first) and len(packed) == n
        assert csv.read_text(encoding="utf-8") == text


def test_a_study_lists_every_claim_once_in_order(again):
    lines = listed(again)
    numbers = [int(line[1]) if re.match(r".\d\. ", line) else 9 for line in lines]
    tested = whole(again) or (again.parent / "02_pruning-verdict.json").exists()
    assert (
        numbers[0] == (1 if tested else 9)
        and numbers == sorted(numbers)
        and len(set(map(claim_of, lines))) == len(lines)
    )
    suite = load_profile(again.parent.name).evaluation.benchmarks
    text = again.read_text(encoding="utf-8")
    assert f" · benchmarks: <b>{len(suite)}</b> · seeds: <b>" in text
    assert again.parent.name != "quick" or "questions per model: <b>1,750</b> ·" in text


@browser
@pytest.mark.parametrize("width", [390, 1280])
def test_captions_of_a_study_are_in_view(again, tmp_path, width):
    seen = look(again, tmp_path, width)
    assert complete(seen) and seen["needed"] <= width and seen["outside"] == 0, seen
    assert len(seen["captions"]) > (20 if whole(again) else 9) and all(
        0 <= c["left"] < c["right"] <= width for c in seen["captions"]
    )


@pytest.mark.parametrize("folder", PAGES, ids=lambda p: p.name)
def test_links_of_committed_pages_lead_somewhere(folder):
    text = (folder / "index.html").read_text(encoding="utf-8")
    links = re.findall(r'(?:href|src)="([^":]+)"', text)
    ids = set(re.findall(r' id="([^"]+)"', text))
    for link in links:
        path, _, anchor = link.partition("#")
        assert (folder / path).exists() if path else anchor in ids, link


@pytest.mark.parametrize("folder", PAGES, ids=lambda p: p.name)
def test_committed_pages_show_and_link_everything(folder):
    text = (folder / "index.html").read_text(encoding="utf-8")
    sections = dict(re.findall(r'<section id="([^"]+)">(.*?)</section>', text, flags=re.S))
    for notebook in sorted(folder.glob("[0-9]*.ipynb")):
        files = sorted(p.name for p in folder.glob(f"{notebook.stem}-*.*") if p.suffix != ".txt")
        links = re.findall(r'href="([^"#]+)"', sections[notebook.stem])
        assert set(files) | {notebook.name} <= set(links), notebook
        assert sections[notebook.stem].count("<img") >= sum(f.endswith(".png") for f in files)
        assert sections[notebook.stem].count("<table") >= sum(f.endswith(".csv") for f in files)
    assert all((folder / link).exists() for link in re.findall(r'href="([^"#:]+)"', text))
