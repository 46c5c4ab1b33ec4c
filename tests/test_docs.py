"""The documentation site: complete, linked, searchable, and readable in a browser of any width."""

import json
import re
import shutil
import subprocess
import time
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import test_house
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from test_site import BROWSER, brightness, browser, look, text_of
from typer.testing import CliRunner

from mllm_compress.cli import app
from mllm_compress.cli.app import TABLES
from mllm_compress.cli.studying import command_reference
from mllm_compress.study import site
from mllm_compress.study.rendering import head_of

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(
    p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The site of this checkout: folder, number of pages, broken links, seconds."
    out = tmp_path_factory.mktemp("docs") / "site"
    begun = time.process_time()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        count, broken = site.build_site(out, command_reference())
    return out, count, broken, time.process_time() - begun


@pytest.fixture(scope="module")
def pages(built) -> dict:  # path in the site -> text
    return {
        p.relative_to(built[0]).as_posix(): p.read_text("utf-8") for p in built[0].rglob("*.html")
    }


def page_of(notebook: Path, pages: dict) -> str:
    "The path of a notebook's page."
    place = notebook.relative_to(ROOT / "nbs").with_suffix(".html").as_posix()
    if place == "index.html" or place in pages:
        return place
    return next(p for p in sorted(pages) if re.fullmatch(rf"study/\w+/{notebook.stem}\.html", p))


@pytest.mark.parametrize(
    "notebook", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix()
)
def test_every_notebook_has_a_page_with_its_title(notebook, pages):
    place = page_of(notebook, pages)
    executed = ROOT / "figures" / "/".join(place.split("/")[1:]).replace(".html", ".ipynb")
    made_from = executed if place.startswith("study/") and executed.is_file() else notebook
    title, line, _ = head_of(nbformat.read(made_from, 4))
    shown = " ".join(text_of(pages[place].partition("<main")[2]).split())
    for text in (title, line):
        assert re.sub("[`*]", "", text) in shown


def test_all_pages_are_counted_and_listed_at_the_left(built, pages):
    assert len(pages) == built[1] > 150
    listed = re.findall('<li><a href="([^"]+)"', pages["index.html"].partition("<main")[0])
    assert sorted(listed) == sorted(pages)


def test_the_study_comes_first_and_what_prepares_it_last(pages):
    side = pages["index.html"].partition("<main")[0]
    headings = re.findall("<h2>(.*?)</h2>", side)
    assert headings[:2] == ["Overview", "The study"] and headings.index("Library") > 2
    study = [p for p in re.findall(r'<li><a href="(study/quick/[^"]+)"', side)]
    assert study[0] == "study/quick/index.html" and study[1] == "study/quick/01_models.html"
    assert re.findall(r'<li><a href="(study/00_\w+\.html)"', side)[-1] == "study/00_teachers.html"


def test_every_public_name_has_its_signature_and_its_notebook(pages):
    for room in test_house.ROOMS:
        text = pages[f"api/{room}.html"]
        assert re.findall(rf'<h2 id="{room}\.(\w+)">', text) == test_house.public(room)
        for link in re.findall(r'from <a href="\.\./([^"]+)"', text):
            path, _, cell = link.partition("#")
            assert f'id="{cell}"' in pages[path], link
    part = pages["api/pruning.html"].partition('<h2 id="pruning.plan_layerwise">')[2]
    listing = text_of(re.search("<pre>(.*?)</pre>", part, flags=re.S)[1])
    assert listing.startswith("def plan_layerwise(") and "    ratio: float" in listing


def test_every_command_has_its_options(pages):
    text = pages["api/command_line.html"]
    for command in command_reference():
        assert not [o for o, help in command["options"] if set(help.split()) & set(TABLES)]
        assert f'<h2 id="{command["name"]}">' in text
    part = text.partition('<h2 id="prune">')[2].partition("<h2 ")[0]
    assert "<dt>MODEL</dt>" in part and "<dt>--ratio</dt>" in part and "taylor_param_mix" in part


def ids_of(text: str) -> set:
    return set(re.findall(r'\bid="([^"]*)"', text))


def test_every_link_leads_somewhere(built, pages):
    out, _, broken, _ = built
    assert broken == []
    ids, wrong = {path: ids_of(text) for path, text in pages.items()}, []
    for page, text in pages.items():
        for link in set(
            re.findall(r'<(?:a|img|link|script)\b[^>]*?\b(?:href|src)="([^"]*)"', text)
        ):
            if re.match(r"https?:|data:", link):
                continue
            path, _, anchor = unquote(unescape(link)).partition("#")
            target = (out / page).parent / path if path else out / page
            place = target.resolve().relative_to(out.resolve()).as_posix()
            if not target.is_file() or anchor and place in ids and anchor not in ids[place]:
                wrong.append((page, link))
    assert not wrong, wrong[:20]


def test_nothing_is_loaded_from_elsewhere(pages):
    for page, text in pages.items():
        loaded = re.findall(r'<(?:img|link|script|iframe)\b[^>]*?\b(?:href|src)="([^"]*)"', text)
        assert not [link for link in loaded if re.match(r"(https?:)?//", link)], page


def test_anchors_are_unique_on_their_page(pages):
    for page, text in pages.items():
        ids = re.findall(r'<[a-z][^<>]*? id="([^"]*)"', text)
        assert len(ids) == len(set(ids)), page


def index_of(folder: Path) -> list:
    text = (folder / "search-index.js").read_text(encoding="utf-8")
    return json.loads(text.removeprefix("window.SEARCH = ").rstrip(";\n"))


def test_the_search_index_has_names_commands_and_sections(built, pages):
    lines = index_of(built[0])
    names = {(title, url) for title, kind, url, _ in lines if kind == "name"}
    for room in test_house.ROOMS:
        assert {(n, f"api/{room}.html#{room}.{n}") for n in test_house.public(room)} <= names
    commands = {title for title, kind, _, _ in lines if kind == "command"}
    assert "mllm-compress prune" in commands
    for _, _, url, text in lines:
        path, _, anchor = url.partition("#")
        assert path in pages and (not anchor or anchor in ids_of(pages[path])), url
        assert "<span" not in text
    assert any("Moments" in text for _, _, url, text in lines if "06b_least_squares" in url)


def test_it_is_made_in_less_than_a_minute(built):
    assert built[3] < 60


def test_what_a_notebook_says_is_escaped(tmp_path, monkeypatch):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for folder in ("nbs/study", "nbs/guides"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "README.md").write_text("# A & B\n\nText.\n")
    printed = new_output("stream", text="<script>alert(1)</script>")
    plain = new_output("execute_result", {"text/plain": "<b>bold</b>"})
    cells = [
        new_markdown_cell("# One `<i>` two\n> A < B"),
        new_code_cell('x = "<u>"', outputs=[printed, plain]),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "nbs/guides/one.ipynb")
    nbformat.write(new_notebook(cells=cells[:1]), tmp_path / "nbs/study/01_one.ipynb")
    monkeypatch.chdir(tmp_path)
    site.build_site(tmp_path / "out", [{"name": "a", "about": "<b>", "options": [("--x", "<i>")]}])
    text = (tmp_path / "out/guides/one.html").read_text(encoding="utf-8")
    body = text.partition("<main")[2]
    assert "alert(1)" in body and "<script>" not in body and "<b>bold" not in body
    assert "<u>" not in body and "<i>" not in text and "<title>One `&lt;i&gt;` two" in text
    commands = (tmp_path / "out/api/command_line.html").read_text(encoding="utf-8")
    assert "<p>&lt;b&gt;</p>" in commands and "<dd>&lt;i&gt;</dd>" in commands


def test_a_folder_that_is_no_site_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "mine.txt").write_text("mine")
    found = CliRunner().invoke(app, ["report", "--site", "--out", str(tmp_path)])
    assert found.exit_code == 2 and "is not a site: give another folder with --out" in found.output
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_make_docs_makes_the_site():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "\ndocs: $(READY)\n\t@$(BIN)/mllm-compress report --site --out _docs\n" in makefile
    assert "_docs/" in (ROOT / ".gitignore").read_text(encoding="utf-8").split()


# Links of the repository

TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "nbs/README.md"]


def links_of(path: Path) -> list:
    "The links in a text, or in the Markdown cells and outputs of a notebook."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        shown = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown"]
        outputs = [o.get("data", {}) for c in cells for o in c.get("outputs", [])]
        text = "\n".join(shown + ["".join(o.get("text/markdown", "")) for o in outputs])
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:href|src)="([^"]+)"', text)


@pytest.mark.parametrize("path", TEXTS + NOTEBOOKS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_of_texts_and_notebooks_exist(path):
    for link in links_of(path):
        if not re.match(r"[a-z]+:|#", link):
            assert (path.parent / unquote(link.partition("#")[0])).exists(), link


# In a browser

LOOKED_AT = [
    "index",
    "study/quick/index",
    "study/quick/02_pruning",
    "api/pruning",
    "api/command_line",
]
LOOKED_AT += ["library/pruning/06_reconstruction", "library/importance/02_influence"]


@browser
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("name", LOOKED_AT)
def test_pages_fit_any_window(built, name, width):
    page = built[0] / f"{name}.html"
    seen = look(page, page.parent, width, dark=width < 1000)
    assert seen["needed"] <= width and seen["outside"] == 0, seen
    assert all(request.startswith("file:") for request in seen["requests"])


@browser
def test_light_and_dark_are_a_preference_and_a_button(built, tmp_path):
    page = built[0] / "index.html"
    light, dark = look(page, built[0], 800), look(page, built[0], 800, dark=True)
    assert brightness(light["back"]) > 230 and brightness(light["text"]) < 60
    assert brightness(dark["back"]) < 40 and brightness(dark["text"]) > 200
    pressed = built[0] / "pressed.html"
    press = (
        "<script>addEventListener('load', () => document.getElementById('theme').click())</script>"
    )
    pressed.write_text(page.read_text("utf-8").replace("</body>", press + "</body>"), "utf-8")
    assert brightness(look(pressed, built[0], 800)["back"]) < 40


@browser
@pytest.mark.parametrize(
    "query, first",
    [
        ("apply_plan", "api/pruning.html#pruning.apply_plan"),
        ("numbers come from", "library/study/29_page.html#where-every-number-comes-from"),
    ],
)
def test_a_search_finds_names_and_pages(built, query, first):
    url = (built[0] / "search.html").as_uri() + "?q=" + query.replace(" ", "+")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=20000",
    ]
    command += [f"--user-data-dir={built[0] / 'browser'}", "--dump-dom", url]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search('<ul id="all" class="found">(.*?)</ul>', dom, flags=re.S)[1]
    assert re.findall('href="([^"]*)"', found)[0] == first
