# The sweep as one graph; see sweep.yaml. On a cluster: --executor slurm --jobs 64, or any other executor plugin.
import os
import sys
from pathlib import Path

ROOT = Path(workflow.basedir).parent
OUT = config["out"]
MODELS = {name.strip("/").replace("/", "--"): name for name in config["models"]}
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
TEXT = f"--text '{config['text']}' --length {config['length']} --dtype {config['dtype']} --device {config['device']}"
MANY = f" -m torch.distributed.run --standalone --nproc-per-node {config['processes']}" if config["processes"] > 1 else ""
SCORED = [score for score in config["scores"] if score != "random"]


wildcard_constraints:
    seed=r"\d+",
    k=r"\d+",


rule all:
    input:
        f"{OUT}/sweep.csv",


rule scores:
    output:
        OUT + "/{model}/scores-{seed}.csv",
    params:
        name=lambda wild: MODELS[wild.model],
    shell:
        f"{sys.executable}{MANY} -m paper_src.scale scores '{{params.name}}' {{output}} {TEXT}"
        f" --sequences {config['sequences']} --seed {{wildcards.seed}}"


rule cell:
    input:
        OUT + "/{model}/scores-{seed}.csv",
    output:
        OUT + "/{model}/{strategy}-{score}-{k}-{seed}.csv",
    params:
        name=lambda wild: MODELS[wild.model],
    shell:
        f"{sys.executable} -m paper_src.scale cell '{{params.name}}' {{input}} {{output}} {TEXT} --blocks {config['blocks']}"
        " --strategy {wildcards.strategy} --score {wildcards.score} --k {wildcards.k} --seed {wildcards.seed}"


rule table:
    input:
        expand(OUT + "/{model}/{strategy}-{score}-{k}-{seed}.csv", model=MODELS, strategy=config["strategies"],
               score=SCORED, k=config["keep"], seed=config["seeds"]),
        expand(OUT + "/{model}/random-random-{k}-{seed}.csv", model=MODELS, k=config["keep"], seed=config["seeds"])
        if "random" in config["scores"] else [],
    output:
        f"{OUT}/sweep.csv",
    shell:
        f"{sys.executable} -m paper_src.scale table {{output}} {{input}}"
