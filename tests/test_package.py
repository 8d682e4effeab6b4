"""What a package page and a citation say, beside what the package is."""

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

import numpyro_maf as nm

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HOME = PROJECT["urls"]["Homepage"]


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {nm.__version__}\n" in text and f"repository-code: {HOME}\n" in text
    assert f"license: {PROJECT['license']}" in text


def test_links_of_the_readme_are_absolute_and_lead_somewhere():
    """A package page is elsewhere: what it links to must be a whole address, of a file that is there."""
    text = (ROOT / "README.md").read_text()
    raw = HOME.replace("github.com", "raw.githubusercontent.com")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    assert len(links) > 10
    for link in links:
        address, _, anchor = link.partition("#")
        if not address:
            heading = re.sub(r"[^\w\- ]", "", anchor.replace("-", " ")).strip()
            assert any(
                re.sub(r"[^\w ]", "", h).lower().strip() == heading
                for h in re.findall(r"^#+ (.*)$", text, re.M)
            )
            continue
        for base in (f"{HOME}/blob/main/", f"{HOME}/tree/main/", f"{raw}/main/"):
            if address.startswith(base):
                assert (ROOT / address.removeprefix(base)).exists(), link
                break
        else:
            assert address.startswith("https://"), f"{link} is relative"
            assert not address.startswith(HOME) or address == HOME or address == f"{HOME}/issues", link
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert images and all(image.startswith(raw) for image in images)


def test_extras_that_messages_and_pages_name_exist():
    extras = PROJECT["optional-dependencies"]
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.rglob("numpyro_maf/**/*.py")]
    named = {
        e
        for f in files
        for found in re.findall(r"numpyro_maf\[([\w,]+)\]", f.read_text())
        for e in found.split(",")
    }
    assert {"plots", "examples", "ode", "host", "all"} <= set(extras) and named <= set(extras)
    assert not any("<" in requirement for group in extras.values() for requirement in group)  # no upper pins
    assert not any("<" in requirement for requirement in PROJECT["dependencies"])


def test_public_names_are_imported_on_first_use():
    code = (
        "import sys, numpyro_maf as nm;"
        "heavy = ('sbi', 'answers', 'io', 'plots', 'datasets', 'inference', 'train');"
        "assert not [m for m in heavy if f'numpyro_maf.{m}' in sys.modules];"
        "assert nm.npe.__name__ == 'npe' and nm.load.__name__ == 'load' and nm.infer and nm.plots.pairs;"
        "assert set(nm.__all__) <= set(dir(nm)) and all(getattr(nm, n) is not None for n in nm.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="has no attribute 'npr'"):
        nm.npr  # noqa: B018


def test_the_command_is_installed():
    assert PROJECT["scripts"] == {"numpyro-maf": "numpyro_maf.__main__:main"}
