"""Pages and docstrings: what they name is there, and nothing that a reader must decode."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md")) + sorted((ROOT / "docs" / "reference").glob("*.md"))
SOURCES = [path.read_text() for path in (ROOT / "numpyro_maf").rglob("*.py")]


def test_no_description_of_a_parameter_is_read_as_a_list():
    """docutils takes ``N.`` for the first item of a list, and shows nothing."""
    for text in SOURCES:
        assert not re.findall(r":param \w+:[ ]*(?:[A-Za-z]|\d+|[ivxlcdm]+)[.)]\s*$", text, re.M)
        assert not re.findall(r':param \w+:\s*\n\s*(?::|"{3})', text)


def test_errors_of_the_questions_page_are_those_of_the_library():
    text = re.sub(r'"\s*\n\s*f?"', "", "\n".join(SOURCES))  # strings of several lines
    text = re.sub(r"\{[^{}]*\}", "*", text)
    headings = re.findall(r"^### (.*)$", (ROOT / "docs" / "faq.md").read_text(), re.M)
    quoted = [message for heading in headings for message in re.findall(r"`([^`]+)`", heading)]
    assert len(quoted) > 20
    for message in quoted:
        assert message in text or re.sub(r"\d+", "*", message) in text, message


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.stem)
def test_links_between_pages_lead_somewhere(path):
    text = path.read_text()
    pages = re.findall(r"\{doc\}`(?:[^`<]*<)?([^`>]+)>?`", text)
    for page in pages:
        place = path.parent / page
        notebook = ROOT / page if page.startswith("notebooks/") else place
        assert place.with_suffix(".md").exists() or notebook.with_suffix(".ipynb").exists(), page
    for target in re.findall(r"\]\(([^)#\s]+\.md)", text):
        assert (path.parent / target).exists(), target
    assert not re.search("[†‡]", text)


def test_the_first_page_answers_thirty_tasks():
    rows = re.findall(r"^\| ([a-z][^|]*) \| (.*) \|$", (ROOT / "docs" / "index.md").read_text(), re.M)
    tasks = [row for row in rows if row[0] != "task"]
    assert len(tasks) >= 30
    for task, answer in tasks:
        assert "](" in answer or "{doc}" in answer, task


def test_each_picture_of_the_gallery_is_there_with_its_code():
    gallery, code = (ROOT / "docs" / "gallery.md").read_text(), (ROOT / "docs" / "pictures.py").read_text()
    shown = re.findall(r"!\[[^\]]+\]\((gallery/\w+\.png)\)", gallery)
    named = re.findall(r":pyobject: (\w+)", gallery)
    assert [pathlib.Path(image).stem for image in shown] == named and len(named) >= 8
    for image, name in zip(shown, named):
        assert (ROOT / "docs" / image).exists() and f"def {name}()" in code, image


def test_measured_figures_stand_on_one_page():
    """Tables of times and scores are in benchmarks.md, each section with its script and day."""
    for section in (ROOT / "docs" / "benchmarks.md").read_text().split("\n## ")[1:]:
        title = section.split("\n")[0]
        if "|" in section:
            assert re.search(r"2026-\d\d-\d\d", section), title
            assert re.search(r"`?(?:benchmarks|tests)/[\w/]+\.py|numpyro_maf\.examples", section), title
    for path in DOCS:
        if path.stem not in ("benchmarks", "reliability", "smart_home"):
            assert "±" not in path.read_text(), path.name
