# One rule a notebook: what it reads, what it writes. ./reproduce.sh calls this; so can you:
#   snakemake --cores 2 --config profile=tiny
#   snakemake --executor slurm --jobs 8 --default-resources mem_mb=64000 gres=gpu:1 --config profile=gpu model=/path
# A later section is one more notebook, one more rule here, and its target below.
import glob
import os
import sys
from pathlib import Path

sys.path.insert(0, os.getcwd())  # for the list of modules, below
from paper_src.reporting.imports import modules_of

PROFILE = config.get("profile", "laptop")
MODEL = config.get("model", "")
DEVICE = config.get("device", "")
DATA_DIR = config.get("data_dir", "")
OUT = config.get("results", f"results/{PROFILE}")
THREADS = config.get("threads") or workflow.resource_settings.cores or 8  # of a notebook; a cluster has no number of cores

os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))


def sources(name):
    """What every rule depends on besides the tables it reads: notebook, profile, lock, modules, a local model."""
    code = {*modules_of(Path(f"notebooks/{name}.ipynb")), *modules_of(Path("paper_src/reporting/run.py"))}
    weights = [MODEL] if os.path.isfile(MODEL) else sorted(glob.glob(f"{glob.escape(MODEL)}/*.*")) if MODEL else []
    return [f"notebooks/{name}.ipynb", f"profiles/{PROFILE}.yaml", "requirements.txt", *sorted(code), *weights]


def tables(*names):
    return [f"{OUT}/tables/{name}.{form}" for name in names for form in ("csv", "md", "tex")]


def figures(*names):
    return [f"{OUT}/figures/{name}.{form}" for name in names for form in ("svg", "pdf", "png")]


def record(name):
    return [f"{OUT}/notebooks/{name}.ipynb", f"{OUT}/tables/{name}.json"]


RUN = (
    f"exec {sys.executable} -m paper_src.reporting.run {{input[0]}} --profile {{input[1]}} --results {OUT}"
    + (f" --model '{MODEL}'" if MODEL else "")
    + (f" --device '{DEVICE}'" if DEVICE else "")
    + (f" --data-dir '{DATA_DIR}'" if DATA_DIR else "")
)


rule all:
    input:
        f"{OUT}/report/index.html",
    default_target: True


rule importance:
    input:
        sources("01_importance"),
    output:
        tables("t1_importance", "t1_angular", "t1_top10", "t1_agreement", "t1_causal", "t1_saturation", "t1_cost"),
        figures("f1_importance", "f1_agreement", "f1_causal", "f1_saturation"),
        record("01_importance"),
    threads: THREADS
    shell:
        RUN


rule selection:
    input:
        sources("02_selection"),
        tables("t1_importance", "t1_angular", "t1_cost"),
    output:
        tables("t2_selection", "t2_strategies"),
        figures("f2_selection", "f2_strategies"),
        record("02_selection"),
    threads: THREADS
    shell:
        RUN


# All cores: a second notebook beside it would distort the times.
rule compaction:
    input:
        sources("03_compaction"),
        tables("t2_selection"),
    output:
        tables("t3_size", "t3_speed"),
        figures("f3_speed"),
        record("03_compaction"),
    threads: THREADS
    shell:
        RUN


rule fidelity:
    input:
        sources("04_fidelity"),
        tables("t2_selection", "t2_strategies", "t3_speed"),
    output:
        tables("t4_fidelity", "t4_random", "t4_strategies"),
        figures("f4_tradeoff"),
        record("04_fidelity"),
    threads: THREADS
    shell:
        RUN


rule recovery:
    input:
        sources("05_recovery"),
        tables("t2_selection", "t2_strategies"),
    output:
        tables("t5_selection", "t5_mix", "t5_forms", "t5_recovery", "t5_curve"),
        figures("f5_recovery"),
        record("05_recovery"),
    threads: THREADS
    shell:
        RUN


# t6_amazon is made only where its data are.
rule recommendation:
    input:
        sources("06_recommendation"),
        tables("t5_recovery"),
        f"{OUT}/notebooks/05_recovery.ipynb",
    output:
        tables("t6_movielens"),
        figures("f6_recommendation"),
        record("06_recommendation"),
    threads: THREADS
    shell:
        RUN


rule baselines:
    input:
        sources("07_baselines"),
        tables("t2_selection", "t5_recovery"),
        f"{OUT}/notebooks/05_recovery.ipynb",
    output:
        tables("t7_baselines", "t7_budgets"),
        figures("f7_pareto"),
        record("07_baselines"),
    threads: THREADS
    shell:
        RUN


rule controls:
    input:
        sources("08_controls"),
        tables("t1_importance", "t2_selection"),
    output:
        tables("t8_controls", "t8_random", "t8_scores", "t8_permuted", "t8_speed", "t8_text"),
        figures("f8_controls"),
        record("08_controls"),
    threads: THREADS
    shell:
        RUN


rule summary:
    input:
        sources("09_summary"),
        "paper_src/reporting/summary.md.j2",
        "paper_src/reporting/summary.zh-CN.md.j2",
        "paper_src/reporting/summary.rows.j2",
        tables("t1_importance", "t1_top10", "t1_agreement", "t1_causal", "t2_selection", "t2_strategies"),
        tables("t3_size", "t3_speed", "t4_fidelity", "t4_random", "t4_strategies", "t8_controls", "t8_scores"),
        tables("t5_selection", "t5_mix", "t5_recovery", "t6_movielens", "t7_baselines", "t7_budgets"),
        sorted(glob.glob("tables/long/*")),  # of a run with larger budgets, where it was on the same model
    output:
        tables("t9_claims"),
        f"{OUT}/SUMMARY.md",
        f"{OUT}/SUMMARY.zh-CN.md",
        record("09_summary"),
    shell:
        RUN


# One page of all notebooks; a section that was asked for alone is in it the next time.
rule page:
    input:
        f"{OUT}/notebooks/09_summary.ipynb",
        f"{OUT}/notebooks/03_compaction.ipynb",
        f"{OUT}/notebooks/04_fidelity.ipynb",
        f"{OUT}/notebooks/06_recommendation.ipynb",
        f"{OUT}/notebooks/07_baselines.ipynb",
        f"{OUT}/notebooks/08_controls.ipynb",
        "paper_src/reporting/page.py",
        "paper_src/reporting/page.html.j2",
    output:
        f"{OUT}/report/index.html",
    shell:
        f"{sys.executable} -m paper_src.reporting.page {OUT} {{output}}"
