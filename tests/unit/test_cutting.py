"""One command: a model in, a smaller one with its report out."""

import csv
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel

import paper_src
from paper_src import InputError, NotSupported, compaction, data, models, recovery, timing
from paper_src.cutting import budget, choice, judging, repair, saving, texts
from paper_src.cutting.__main__ import main
from paper_src.cutting.cut import cut
from paper_src.cutting.progress import Progress
from paper_src.cutting.repair import Repaired
from paper_src.cutting.report import Outcome, facts_of
from paper_src.cutting.request import CHOICES, Request
from paper_src.cutting.subject import READ, load, read
from paper_src.selection import kept_tuple

ROOT = Path(__file__).parents[2]
MODEL, TEXT = str(ROOT / "tests/data/tiny-llama"), str(ROOT / "tests/data/tiny-text")


@pytest.fixture(autouse=True)
def own_text_only(monkeypatch):
    """Other kinds of text are downloads."""
    monkeypatch.setattr(texts, "KINDS", ())


def request(tmp_path, **settings):
    return Request(
        **{"model": MODEL, "out": str(tmp_path / "small"), "keep": 0.5, "minutes": 0.2, "texts": (TEXT,)} | settings
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a cut model, and what was said."""
    said, folder = [], tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "KINDS", ())
        out = paper_src.cut(MODEL, folder / "small", keep=0.5, say=said.append, minutes=0.2, texts=(TEXT,))
    return out, said


def begun(asked):
    """A run's subject, its texts read, that says nothing."""
    subject = load(asked, Progress(asked, lambda line: None))
    read(subject)
    return subject


def unrepaired(asked):
    """What a run comes to that repairs and measures nothing."""
    subject = begun(asked)
    candidates = choice.ranked(subject, judging.Validation(subject))
    small = Repaired(compaction.compact(subject.full, kept_tuple(candidates[0]["kept"])), 0, 0)
    return Outcome(subject, candidates, small, small, [], [])


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_checkpoint_is_a_standard_one_of_the_wanted_size(made):
    out, _ = made
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == 4
    assert model.dtype == torch.float32  # as the checkpoint it was made from, whatever it was computed in
    ids = AutoTokenizer.from_pretrained(out)("The layers", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4
    assert (out / "generation_config.json").is_file()


def test_the_report_and_the_card_have_the_numbers_of_the_tables(made):
    out, _ = made
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    found = {row["model"]: row for row in rows(out / "quality.csv")}
    assert list(found) == ["full", "cut", "refitted", "recovered"]
    assert float(found["full"]["ppl_ratio"]) == 1
    for number in (float(found["recovered"]["ppl_ratio"]), float(found["cut"]["ppl_ratio"])):
        assert f"{number:.2f}" in page
    assert f"{float(found['recovered']['ppl_ratio']):.2f}" in card
    assert {row["task"] for row in rows(out / "speed.csv")} == {"prefill_hidden", "decode"}
    assert page.count('class="gone"') == 4
    assert "calibrated on the given text only" in page


def test_the_table_is_what_the_saved_model_does(made):
    out, _ = made
    full, small = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (MODEL, out))
    subject = begun(request(out.parent / "other", keep=4))
    found = {row["model"]: row for row in rows(out / "quality.csv")}
    count = int(found["full"]["n_windows"])
    blocks = data.as_many(subject.tokenizer, data.load_text(TEXT, "test")[0], count, 512, 0)
    with torch.no_grad():
        nll = [torch.nn.functional.cross_entropy(model(blocks).logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten())
               for model in (full, small)]  # fmt: skip
    assert len(blocks) == count
    assert float((nll[1] - nll[0]).exp()) == pytest.approx(float(found["recovered"]["ppl_ratio"]), rel=0.02)  # bfloat16


def test_nothing_is_left_beside_the_checkpoint_and_time_was_told(made):
    out, said = made
    assert not Path(f"{out}.unfinished").exists()
    assert said[-1].startswith("saved: ")
    assert all(line.endswith(" left)") for line in said[:-1])


def test_layers_that_no_repair_changed_are_the_checkpoints_own_bit_for_bit(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "for_training", lambda subject: 0.0)
        out = paper_src.cut(
            MODEL, tmp_path / "x", keep=4, say=lambda line: None, minutes=0.2, texts=(TEXT,), dtype="bfloat16"
        )
    kept = json.loads((out / "README.md").read_text().split("(0-based): ")[1].split("\n")[0])
    old, new = load_file(Path(MODEL) / "model.safetensors"), load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in new.values()} == {torch.float32}
    before = {name: re.sub(r"layers\.(\d+)", lambda at: f"layers.{kept[int(at[1])]}", name) for name in new}
    same = [name for name, tensor in new.items() if torch.equal(tensor, old[before[name]])]
    changed = sorted(set(new) - set(same))
    assert changed and all(name.endswith("mlp.down_proj.weight") for name in changed)


def test_a_run_that_was_stopped_goes_on(tmp_path):
    class Stop(Exception):
        pass

    def stop(line):
        if line.startswith("refitted"):
            raise Stop

    with pytest.raises(Stop):
        cut(**vars(request(tmp_path)), say=stop)
    before = json.loads((tmp_path / "small.unfinished/progress.json").read_text())
    assert before["candidates"] and before["spent"] > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "candidates", lambda subject: pytest.fail("it searches again"))
        patch.setattr(recovery, "closed_form", lambda *args, **settings: pytest.fail("it refits again"))
        patch.setattr(budget, "for_training", lambda subject: 0.0)
        out = cut(**vars(request(tmp_path)), say=lambda line: None)
    changed = rows(out / "quality.csv")
    assert float(changed[2]["ppl_ratio"]) != float(changed[1]["ppl_ratio"])  # the refit was read


def test_without_any_repair_the_report_says_so_also_over_a_stop(tmp_path, refused):
    class Stop(Exception):
        pass

    def stop(line):
        if line.startswith("cut: "):
            raise Stop

    def none(*args, **settings):
        raise NotSupported("not of this family")

    text = tmp_path / "own.txt"
    text.write_text((Path(TEXT) / "train.txt").read_text() * 4)
    asked = vars(request(tmp_path, texts=(str(text),)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "closed_form", none)
        patch.setattr(budget, "for_training", lambda subject: 0.0)
        with pytest.raises(Stop):
            cut(**asked, say=stop)
        out = cut(**asked, say=lambda line: None)
        assert "no closed form: not of this family" in (out / "report.html").read_text()
        assert "the same, as this family has no closed form" in (out / "report.html").read_text()
        assert "unchanged and nothing was trained" in (out / "README.md").read_text()

        with pytest.raises(Stop):
            cut(**asked | {"out": str(tmp_path / "later")}, say=stop)
        text.write_text(text.read_text().replace("the", "a"))
        with refused("later.unfinished is of other texts: delete it, or give another --out"):
            cut(**asked | {"out": str(tmp_path / "later")}, say=lambda line: None)


def test_another_request_begins_anew(tmp_path):
    Progress(request(tmp_path)).put("candidates", [1])
    assert Progress(request(tmp_path)).get("candidates") == [1]
    assert Progress(request(tmp_path, minutes=9.0)).get("candidates") == [1]
    assert Progress(request(tmp_path, keep=0.25)).get("candidates") is None


def test_a_progress_file_that_was_cut_off_begins_anew(tmp_path):
    progress = Progress(request(tmp_path))
    progress.put("candidates", [1])
    (progress.folder / "progress.json").write_text('{"request": "')
    assert Progress(request(tmp_path)).get("candidates") is None


def test_a_speed_gives_the_number_of_layers_that_has_it(tmp_path):
    subject = begun(request(tmp_path, keep=0.0, speed=1.5))
    flops = []
    for k in (subject.depth, subject.k, subject.k + 1):
        small = compaction.compact(subject.full, range(k))
        flops.append(timing.count_flops(small, READ, timing.random_prompt(subject.full, READ, 0)))
    assert flops[0] / flops[1] >= 1.5 > flops[0] / flops[2]


def saved(folder, model):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return str(folder)


def test_given_layers_are_the_only_candidate(tmp_path):
    subject = begun(request(tmp_path, keep=0, layers=(0, 1, 2, 5)))
    rows = choice.ranked(subject, judging.Validation(subject))
    outcome = Outcome(subject, rows, None, None, [], [])
    assert [row["name"] for row in rows] == ["given"]
    assert (outcome.kept, subject.k, outcome.chosen_by) == ((0, 1, 2, 5), 4, "the reader")


def test_layers_that_a_family_cannot_keep_alone_are_no_candidate(tmp_path, refused, monkeypatch):
    def no_first(model, kept):
        if 0 not in kept:
            raise InputError(f"kept layers {kept}: keep others")
        return compact(model, kept)

    compact, found = compaction.compact, {"shortgpt": (1, 2, 5, 7), "sleb": (0, 1, 2, 5)}
    monkeypatch.setattr(compaction, "compact", no_first)
    monkeypatch.setattr(choice, "candidates", lambda subject: found)
    subject = begun(request(tmp_path / "some"))
    assert [row["name"] for row in choice.ranked(subject, judging.Validation(subject))] == ["sleb"]
    assert [line for line in subject.progress.notes if "keep others" in line]
    del found["sleb"]
    subject = begun(request(tmp_path / "none"))
    with refused(r"kept layers \(1, 2, 5, 7\): keep others"):
        choice.ranked(subject, judging.Validation(subject))


def test_an_output_may_have_the_name_of_a_known_model(tmp_path, monkeypatch):
    """What is loaded again is the folder, not the pinned model."""
    monkeypatch.chdir(tmp_path)
    outcome = unrepaired(request(tmp_path, out="smollm2-135m-instruct"))
    assert saving.save(outcome).resolve() == tmp_path / "smollm2-135m-instruct"
    assert models.load_model(str(tmp_path / "smollm2-135m-instruct")).model.config.num_hidden_layers == 4


def test_weights_of_another_precision_take_that_of_the_model(make_model):
    small = make_model("llama")
    name, old = next(iter(small.named_parameters()))
    repair.with_weights_(small, {name: old.detach().bfloat16()})
    assert small.get_parameter(name).dtype == torch.float32


def test_a_model_of_few_positions_is_read_and_timed_as_far_as_it_goes(tmp_path, make_model):
    full = make_model("gpt2", max_position_embeddings=256, vocab_size=512)
    subject = begun(request(tmp_path, model=saved(tmp_path / "short", full), keep=2))
    rows = judging.speed(subject, compaction.compact(subject.full, (0, 1)))
    assert [(row["task"], row["length"]) for row in rows] == [("prefill_hidden", 256), ("decode", 128)]
    assert judging.task_title({"task": "prefill_hidden", "length": 256}) == "reading 256 tokens"


def test_a_model_that_sees_what_comes_is_refused(tmp_path, refused):
    words = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    encoder = BertLMHeadModel(BertConfig(vocab_size=512, initializer_range=0.2, **words))
    asked = request(tmp_path, model=saved(tmp_path / "bert", encoder), dtype="float32")
    with refused("BertLMHeadModel reads tokens that come later"):
        begun(asked)


def test_a_report_compares_sizes_in_the_checkpoints_own_dtype(tmp_path):
    outcome = unrepaired(request(tmp_path, dtype="bfloat16"))
    full, small = outcome.subject.full, outcome.recovered.model
    facts = facts_of(outcome, saving.as_stored(outcome.subject, outcome.kept, small))
    counts = [models.count_parameters(model) for model in (full, small)]
    assert (facts["dtype"], facts["computing"]) == ("float32", "bfloat16")
    assert [facts["sizes"][name]["bytes"] for name in ("full", "recovered")] == [4 * count for count in counts]


@pytest.mark.parametrize("strategy", CHOICES)
def test_every_strategy_can_be_asked_for(tmp_path, strategy):
    subject = begun(request(tmp_path, strategy=strategy))
    ((name, kept),) = choice.candidates(subject).items()
    assert name == strategy and len(kept) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, "give either keep"),
        ({"speed": 2.0}, "give either keep"),
        ({"keep": 1.0}, "keep 1.0: a share is below 1"),
        ({"layers": (0, 1)}, "give either keep"),
        ({"keep": 0.0, "layers": (0, 1), "strategy": "sleb"}, "strategy 'sleb' beside given layers"),
        ({"texts": MODEL, "out": MODEL}, "which is read: give a folder elsewhere"),
        ({"keep": 2.5}, "keep 2.5: give a number of layers, or a share"),
        ({"keep": -1.0}, "keep -1.0"),
        ({"keep": 0.0, "speed": 0.9}, "speed 0.9: give more than 1"),
        ({"keep": 0.0, "speed": float("inf")}, "speed inf: give more than 1"),
        ({"keep": float("nan")}, "keep nan: give a number of layers"),
        ({"seed": -1}, "seed -1: give a number from 0"),
        ({"minutes": 0.0}, "minutes 0.0: give more than 0"),
        ({"minutes": float("nan")}, "minutes nan: give more than 0"),
        ({"strategy": "best"}, "strategy 'best': use one of "),
        ({"out": MODEL}, "which is read: give a folder elsewhere"),
        ({"out": str(ROOT / "tests")}, "which is read: give a folder elsewhere"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_anything_is_loaded(tmp_path, settings, message, refused):
    with refused(message):
        request(tmp_path, **settings).checked()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/at-all/here", "--keep", "0.5"], "no model 'nowhere/at-all/here'"),
        ([MODEL, "--keep", "9"], "keep 9: the model has 8 layers"),
        ([MODEL, "--layers", "0,5,3"], "kept layers [0, 5, 3]: give each once, in increasing order"),
        ([MODEL, "--speed", "50"], "speed 50.0: with a single layer this model is"),
        ([MODEL, "--keep", "4", "--text", "no-such-text"], "no text no-such-text: give wikitext-2"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, words, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--out", str(tmp_path / "x"), "--minutes", "0.1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_short_texts_are_refused_by_name(tmp_path, refused):
    text = tmp_path / "short.txt"
    text.write_text("Too few words. " * 10)
    with refused("short.txt is too short"):
        begun(request(tmp_path, texts=(str(text),)))


def test_a_text_of_one_training_block_is_refused_before_anything_is_searched(tmp_path, refused):
    folder = tmp_path / "text"
    folder.mkdir()
    for split, characters in {"train": 600, "valid": 4000, "test": 4000}.items():
        (folder / f"{split}.txt").write_text((Path(TEXT) / f"{split}.txt").read_text()[:characters])
    with refused("is too short: its training part holds no 2 blocks"):
        begun(request(tmp_path, texts=(str(folder),)))


def test_a_checkpoint_that_loads_as_another_model_is_not_kept(tmp_path, refused, monkeypatch):
    outcome = unrepaired(request(tmp_path))
    wrong = models.load_model(MODEL)
    monkeypatch.setattr(models, "load_model", lambda *words: wrong)
    monkeypatch.setattr(saving, "as_stored", lambda subject, kept, recovered: recovered)
    with refused("loads as another model than was saved: nothing is kept"):
        saving.save(outcome)
    assert not (tmp_path / "small").exists()


# --- the package by itself


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def names(requirements):
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def test_the_package_and_its_extras_are_the_direct_dependencies():
    lines = (ROOT / "requirements.in").read_text().splitlines()
    listed = names(line for line in lines if line and not line.startswith("#"))
    parts = [names(PROJECT["dependencies"]), *map(names, PROJECT["optional-dependencies"].values())]
    assert set().union(*parts) == listed
    assert sum(map(len, parts)) == len(listed)  # each in one


def closure(wanted):
    """Distributions that these need, with their own needs."""
    found, left = set(), list(wanted)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            try:
                needs = map(Requirement, distribution(name).requires or [])
            except PackageNotFoundError:  # of other systems
                continue
            left += [
                canonicalize_name(item.name)
                for item in needs
                if item.marker is None or item.marker.evaluate({"extra": ""})
            ]
    return found


def bare_environment(folder):
    """A folder of packages that holds what the package itself needs, and nothing else."""
    folder.mkdir()
    for name in closure(names(PROJECT["dependencies"]) | {"setuptools"}):
        try:
            found = distribution(name)
        except PackageNotFoundError:  # of other systems
            continue
        for top in {path.parts[0] for path in found.files if path.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))
    return folder


RUN = """
import sys
sys.path[:0] = {paths!r}
import paper_src
assert paper_src.__file__.startswith({paths[0]!r}), paper_src.__file__
from paper_src.cutting import texts
texts.KINDS = ()
from paper_src.cutting.__main__ import main
assert "pandas" not in sys.modules
sys.exit(main({words!r}))
"""


def test_the_wheel_cuts_a_model_with_its_own_dependencies_alone(tmp_path):
    source, wheels = tmp_path / "source", tmp_path / "wheels"  # a build leaves files where it is made
    listing = ["git", "-C", str(ROOT), "ls-files", "-coz", "--exclude-standard"]
    files = subprocess.run(
        [*listing, "paper_src", "pyproject.toml", "README.md", "LICENSE"], check=True, capture_output=True
    )
    for name in filter(None, files.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(wheels)]
    subprocess.run([*pip, str(source)], check=True, timeout=300)
    (wheel,) = wheels.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    entry = (next((tmp_path / "installed").glob("*.dist-info")) / "entry_points.txt").read_text()
    assert "cut-layers = paper_src.cutting.__main__:main" in entry

    words = [MODEL, "--keep", "0.5", "--out", "cut", "--minutes", "0.2", "--text", TEXT]
    paths = [str(tmp_path / "installed"), str(bare_environment(tmp_path / "bare"))]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = RUN.format(paths=paths, words=words)
    done = subprocess.run([sys.executable, "-S", "-c", code], check=False, cwd=tmp_path, env=alone, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "cut").config.num_hidden_layers == 4


def test_the_command_runs_the_notebook_and_tells_how_far_it_is(tmp_path):
    words = ["cut", "mine", "--keep", "4", "--out", "small", "--minutes", "0.2", "--text", TEXT]
    (tmp_path / "mine").symlink_to(MODEL)
    offline = {**os.environ, "PIP_NO_INDEX": "1", "PAPER_CACHE": str(tmp_path / "cache"), "MPLBACKEND": "agg"}
    done = subprocess.run(["bash", str(ROOT / "reproduce.sh"), *words], check=False, cwd=tmp_path, env=offline,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"saved: {tmp_path}/small (open {tmp_path}/small/report.html)\n"
    assert "4 of 8 layers are to be kept (about 0:" in done.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.num_hidden_layers == 4
    assert (tmp_path / "small.run/10_your_model.ipynb").is_file()
    assert "not tested on c4" in (tmp_path / "small/report.html").read_text()


def test_harm_done_by_a_repair_is_said_once_for_all_texts(tmp_path):
    subject = begun(request(tmp_path))
    ppl = {"a": (9.0, 30.0, 20.0), "b": (9.0, 30.0, 40.0), "c": (1000.0, 30.0, 40.0)}  # full, cut, recovered
    rows = [{"text": text, "model": model, "ppl": value, "n_windows": 8} for text, values in ppl.items()
            for model, value in zip(("full", "cut", "recovered"), values, strict=True)]  # fmt: skip
    judging.note_quality(subject, rows)
    harm = ["on b, c the repaired model is worse than the cut one",
            "on c the full model itself is worse than a uniform guess"]  # fmt: skip
    assert subject.progress.notes == harm
    judging.note_quality(subject, [{**row, "n_windows": 7} for row in rows])
    assert subject.progress.notes == [
        *harm,
        "as few as 7 test windows: intervals are rough, more minutes give more windows",
    ]
