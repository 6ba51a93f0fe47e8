# The graph of the paper: one rule a notebook. What a notebook writes and reads stands in the notebook; here it becomes
# outputs and inputs, so that no list is kept twice. ./reproduce.sh calls this; so can you:
#   snakemake --cores 2 --config profile=tiny
#   snakemake --executor slurm --jobs 8 --default-resources mem_mb=64000 gres=gpu:1 --config profile=gpu model=/path
import functools
import glob
import hashlib
import os
import sys
from pathlib import Path

sys.path.insert(0, os.getcwd())
from paper_src.reporting.graph import files_of, modules_of

PROFILE = config.get("profile", "laptop")
MODEL = config.get("model", "")
DEVICE = config.get("device", "")
DATA_DIR = config.get("data_dir", "")
OUT = config.get("results", f"results/{PROFILE}")
THREADS = config.get("threads") or workflow.resource_settings.cores or 8  # of a notebook; a cluster has no number of cores
NOTEBOOKS = sorted(Path("notebooks").glob("0*.ipynb"))
SUMMARIES = [f"{OUT}/SUMMARY.md", f"{OUT}/SUMMARY.zh-CN.md"]

os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))


def tables(names):
    return [f"{OUT}/tables/{name}.{form}" for name in names for form in ("csv", "md", "tex")]


def figures(names):
    return [f"{OUT}/figures/{name}.{form}" for name in names for form in ("svg", "pdf", "png")]


def record(notebook):
    return [f"{OUT}/notebooks/{notebook.name}", f"{OUT}/tables/{notebook.stem}.json"]


@functools.cache  # inputs and digest both ask
def sources(notebook):
    """The notebook and its profile first; lock, modules, a local model's files.

    The summary also reads the committed tables of larger budgets and other models.
    """
    weights = [MODEL] if os.path.isfile(MODEL) else sorted(glob.glob(f"{glob.escape(MODEL)}/*.*")) if MODEL else []
    needed = [str(notebook), f"profiles/{PROFILE}.yaml", "requirements.txt", *modules_of(notebook), *weights]
    if notebook.stem == "09_summary":
        needed += sorted(glob.glob("paper_src/reporting/summary*.j2") + glob.glob("paper_src/reporting/*.yaml"))
        needed += sorted(glob.glob("tables/*/*"))
    return needed


def inputs(notebook):
    """Its sources, and the tables it reads; the summary reads all sections."""
    if notebook.stem != "09_summary":
        return sources(notebook) + tables(files_of(notebook).reads)
    return sources(notebook) + [file for other in NOTEBOOKS if other.name < notebook.name for file in outputs(other)]


def digest(files):
    """Of what files hold (of a large one its size): dates lie where a clock was set back."""
    found = hashlib.sha256()
    for file in map(Path, files):
        size = file.stat().st_size
        found.update(f"{file} {size} ".encode() + (file.read_bytes() if size < 2**24 else b""))
    return found.hexdigest()


def outputs(notebook):
    made = files_of(notebook)
    summaries = SUMMARIES if notebook.stem == "09_summary" else []
    return tables(made.tables) + figures(made.figures) + summaries + record(notebook)


RUN = (
    f"exec {sys.executable} -m paper_src.reporting run {{input[0]}} --profile {{input[1]}} --results {OUT}"
    + (f" --model '{MODEL}'" if MODEL else "")
    + (f" --device '{DEVICE}'" if DEVICE else "")
    + (f" --data-dir '{DATA_DIR}'" if DATA_DIR else "")
    + (" --verbose" if config.get("verbose") else "")
)


# The paper on one page, from sources, tables, figures and summary.
rule page:
    input:
        SUMMARIES,
        [file for notebook in NOTEBOOKS for file in record(notebook)],
        modules_of(Path("paper_src/reporting/page.py")),
        "paper_src/reporting/page.py",
        "paper_src/reporting/page.html.j2",
    output:
        f"{OUT}/report/index.html",
    default_target: True
    shell:
        f"{sys.executable} -m paper_src.reporting page {OUT} {{output}}"


# A notebook has all cores: a second one beside it would distort the times.
for notebook in NOTEBOOKS:

    rule:
        name:
            notebook.stem[3:]
        input:
            inputs(notebook),
        output:
            outputs(notebook),
        params:
            sources=digest(sources(notebook)),
        threads: THREADS
        priority: 100 - int(notebook.stem[:2])  # in the paper's order, as far as they are free
        shell:
            RUN
