"""The page in a headless browser: complete, alone, light and dark, and readable on a phone; skipped where there is no browser."""
import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from mllm_compress import site

ROOT = Path(__file__).parent.parent
PAGES = sorted(p.parent for p in (ROOT / "figures").glob("*/index.html"))
BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))), None)
browser = pytest.mark.skipif(not BROWSER, reason="no Chromium here")
DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PROBE = """<script>addEventListener('load', () => { const box = e => e.getBoundingClientRect(), images = [...document.images];
const ids = [...document.querySelectorAll('nav a')].map(a => a.getAttribute('href').slice(1));
parent.postMessage(JSON.stringify({width: innerWidth, needed: document.documentElement.scrollWidth, back: getComputedStyle(document.body).backgroundColor,
text: getComputedStyle(document.body).color, requests: performance.getEntriesByType('resource').map(e => e.name), images: images.length,
shown: images.filter(i => i.complete && i.naturalWidth && box(i).right <= innerWidth).length, tables: document.querySelectorAll('table').length,
lost: ids.filter(id => !document.getElementById(id)), outside: [...document.querySelectorAll('h1,h2,h3,p,li,figure,summary')].filter(e => box(e).right > innerWidth + 1).length}), '*') })</script>"""
WRAPPER = """<body style="margin:0"><iframe src="probed.html" style="border:0;width:{width}px;height:4000px"></iframe>
<script>addEventListener('message', e => document.body.dataset.probe = e.data)</script></body>"""


def look(page: Path, folder: Path, width: int, dark: bool = False) -> dict:
    "What a browser of this width makes of a page."
    (folder / "probed.html").write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    (folder / "wrapper.html").write_text(WRAPPER.format(width=width), encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}", "--virtual-time-budget=20000",
               f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom", (folder / "wrapper.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    return json.loads(html.unescape(re.search('data-probe="([^"]*)"', dom)[1]))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    "The page of a study with everything that makes pages too wide."
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "settings.ini", folder)
    (folder / "nbs/study").mkdir(parents=True)
    (folder / "figures/smoke").mkdir(parents=True)
    wide = "<table><thead><tr>" + "".join(f"<th>scenes/benchmark {k}</th>" for k in range(20)) + "</tr></thead></table>"
    nb = new_notebook(cells=[
        new_markdown_cell("# A title that names a_function_with_a_very_long_name_indeed_and_then_some_more\n> A claim with `inline_code_that_cannot_be_broken_anywhere_and_is_long`."),
        new_markdown_cell("A link: https://example.org/" + "long/" * 30 + "\n\n| a | b |\n|---|---|\n| " + "wide " * 30 + "| 2 |"),
        new_code_cell("x = 1", outputs=[new_output("display_data", {"text/html": wide, "text/plain": "a table"}),
                                        new_output("display_data", {"image/png": DOT, "text/plain": "a caption: " + "word" * 60}),
                                        new_output("stream", text="a line that goes on " * 20)])])
    nbformat.write(nb, folder / "nbs/study/01_wide.ipynb")
    nbformat.write(nb, folder / "figures/smoke/01_wide.ipynb")
    for name in ("01_wide-t.csv", "01_wide-f.png"): (folder / "figures/smoke" / name).touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return site.build("smoke")


def complete(seen: dict) -> bool:
    "Whether all is there and nothing was asked of anyone."
    return seen["requests"] == [] and seen["lost"] == [] and seen["shown"] == seen["images"] > 0 and seen["tables"] > 0


def brightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


@browser
@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_sticks_out(made, tmp_path, width):
    seen = look(made, tmp_path, width)
    assert complete(seen) and seen["width"] == width and seen["needed"] <= width and seen["outside"] == 0, seen


@browser
def test_light_and_dark(made, tmp_path):
    light, dark = look(made, tmp_path, 800), look(made, tmp_path, 800, dark=True)
    assert brightness(light["back"]) > 230 and brightness(light["text"]) < 60
    assert brightness(dark["back"]) < 40 and brightness(dark["text"]) > 200


@browser
@pytest.mark.parametrize("folder", PAGES, ids=lambda p: p.name)
def test_committed_pages_on_a_phone(folder, tmp_path):
    seen = look(folder / "index.html", tmp_path, 400, dark=True)
    assert complete(seen) and seen["needed"] <= 400 and seen["outside"] == 0, seen


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
