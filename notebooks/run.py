"""Execute the notebooks of this folder, warnings being errors; ``--save`` keeps the outputs.

python notebooks/run.py            # check that all run
python notebooks/run.py --save     # and write their outputs into the files
python notebooks/run.py prior      # only that one
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from traitlets.config import Config

FOLDER = Path(__file__).parent
# Without ipywidgets, tqdm warns that progress bars are plain text.
STRICT = """
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="IProgress not found")
from matplotlib_inline.backend_inline import set_matplotlib_formats
set_matplotlib_formats("retina")
"""
# Which begin first.
LONGEST = ["tour", "likelihood", "guide", "posterior", "epidemics", "flat", "models", "homes", "prior"]
RELAX = "warnings.simplefilter('ignore')"  # the kernel's own, at its end


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="of notebooks, without .ipynb; none for all")
    parser.add_argument("--save", action="store_true", help="write outputs into the notebooks")
    parser.add_argument("--jobs", type=int, default=1, help="how many to run at the same time")
    arguments = parser.parse_args()
    if arguments.jobs > 1:
        names = arguments.names or sorted(path.stem for path in FOLDER.glob("*.ipynb"))
        names.sort(key=LONGEST.index)
        save = ["--save"] * arguments.save
        with ThreadPoolExecutor(arguments.jobs) as pool:
            ended = pool.map(lambda name: subprocess.run([sys.executable, __file__, name, *save]), names)
            sys.exit(max(run.returncode for run in ended))
    paths = [os.fspath(FOLDER.parent.resolve()), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    for path in sorted(FOLDER.glob("*.ipynb")):
        if arguments.names and path.stem not in arguments.names:
            continue
        start = time.perf_counter()
        notebook = nbformat.read(path, as_version=4)
        notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT))
        notebook.cells.append(nbformat.v4.new_code_cell(RELAX))
        options = dict(kernel_name="python3", timeout=600, record_timing=False)
        with tempfile.TemporaryDirectory() as folder:
            # The kernel is reached over files of its own, not network ports.
            config = Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}})
            NotebookClient(notebook, config=config, **options).execute()
        notebook.cells = notebook.cells[1:-1]
        notebook.metadata["language_info"] = {"name": "python"}  # not the version at hand
        for i, cell in enumerate((c for c in notebook.cells if c.cell_type == "code"), start=1):
            cell.execution_count = i
            for output in cell.outputs:
                if "execution_count" in output:
                    output["execution_count"] = i
        if arguments.save:
            nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
