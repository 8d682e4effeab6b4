"""Execute every notebook here from a fresh kernel and keep the outputs; fail on the first error."""

import pathlib
import time

import nbclient
import nbformat

for path in sorted(pathlib.Path(__file__).parent.glob("*.ipynb")):
    start = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": path.parent}}).execute()
    print(f"{path.name}: {time.perf_counter() - start:.0f} s")
