"""Run the notebook on a survey's folder and keep what it shows.

python examples/execute.py demo-out        # part of `make figures`
"""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("demo.ipynb")


def main(folder: str) -> None:
    os.environ["SURVEY"] = str(Path(folder).resolve())
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of the day, which would differ in every run
        for output in cell.get("outputs", []):
            if len(output.get("data", {})) > 1:
                output["data"].pop("text/plain")  # the whole record as text, with this machine's folders in it
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    nbformat.validate(notebook)
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "demo-out")
