"""Read the built site: python docs/check.py build/docs

No parameter is described by nothing, every link leads to a page and a place that exist, every public name is
in the reference, the first page answers thirty tasks, and no page has marks that readers must decode.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpyro_maf

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """Places, links and parameters of a page."""

    def __init__(self, path):
        super().__init__()
        self.places, self.links, self.empty, self.text = set(), [], [], []
        self._stack, self._fields = [], []  # open tags; open descriptions of parameters
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.places |= {given[k] for k in ("id", "name") if given.get(k)}
        for key in ("href", "src"):
            if given.get(key):
                self.links.append(given[key])
        if tag not in VOID:
            self._stack.append((tag, given.get("class") or "", []))

    def handle_endtag(self, tag):
        while self._stack:
            name, kind, text = self._stack.pop()
            whole = "".join(text)
            if self._stack:
                self._stack[-1][2].append(whole)
            if name in ("p", "li") and re.match(r"\s*[\w\[\], -]+( \([^)]*\))? –\s*$", whole):
                self.empty.append(whole.strip())
            if name == tag:
                break

    def handle_data(self, data):
        self.text.append(data)
        if self._stack:
            self._stack[-1][2].append(data)


def main(folder):
    folder = Path(folder).resolve()
    pages = {path: Page(path) for path in folder.rglob("*.html") if "_modules" not in path.parts}
    faults = []
    for path, page in pages.items():
        name = path.relative_to(folder)
        faults += [f"{name}: no description of {empty!r}" for empty in page.empty]
        if re.search("[†‡]", "".join(page.text)):
            faults.append(f"{name}: a dagger")
        for link in page.links:
            parts = urlparse(link)
            if parts.scheme or parts.netloc or link.startswith(("#", "data:")) and len(link) < 2:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                faults.append(f"{name}: {link} leads to no page")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].places:
                faults.append(f"{name}: {link} leads to no place in its page")
    tasks = len(re.findall(r"<tr class=\"row-(?:odd|even)\">", (folder / "index.html").read_text())) - 6
    if tasks < 30:
        faults.append(f"index.html: {tasks} tasks, expected 30 or more")
    told = {
        place.split(".")[-1]
        for path, page in pages.items()
        if "reference" in path.parts
        for place in page.places
    }
    rooms = {"conditionals", "__version__"}
    faults += [f"the reference lacks {n}" for n in numpyro_maf.__all__ if n not in told | rooms]
    print("\n".join(faults) or f"{len(pages)} pages: every parameter described, every link leads somewhere")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
