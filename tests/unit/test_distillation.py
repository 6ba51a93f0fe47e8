"""Distillation: it learns, it resumes to the same result, and it leaves the teacher alone."""

import copy
import errno
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import build_model
from torch.nn import functional

from paper_src import compaction, distillation, fidelity, models
from paper_src.distillation import Distillation

KEPT = (0, 3)
QUICK = {"learning_rate": 1e-2, "evaluate_every": 4}


def blocks(count, seed=0):
    return torch.randint(3, 96, (count, 16), generator=torch.Generator().manual_seed(seed))


def run(folder, full=None, count=96, progress=None, width=32, **settings):
    full = full or build_model("llama")
    validation = fidelity.reference(full, blocks(8, seed=1), torch.zeros(width))
    small = compaction.compact(full, KEPT)
    chosen = Distillation(**(QUICK | settings))
    return distillation.distil(full, small, blocks(count), validation, folder, chosen, progress), validation


@pytest.mark.parametrize("settings", [{}, {"kl": 0.0}])
def test_it_comes_nearer_to_the_teacher(tmp_path, settings):
    full = build_model("llama")
    before = {name: value.clone() for name, value in full.state_dict().items()}
    found, validation = run(tmp_path, full, count=200, **settings)
    plain = fidelity.compare(compaction.compact(full, KEPT), validation)
    trained = fidelity.compare(found.model, validation)
    assert trained["cosine"].mean() > plain["cosine"].mean() + 0.1
    assert trained["kl_nats"].mean() < 0.8 * plain["kl_nats"].mean()
    assert found.history[-1]["kl_nats"] < found.history[0]["kl_nats"]
    assert min(row["kl_nats"] for row in found.history) == pytest.approx(trained["kl_nats"].mean(), rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in full.state_dict().items())


def test_of_another_teacher_nothing_is_read(tmp_path):
    student, histories = compaction.compact(build_model("llama"), KEPT), []
    for seed in (0, 1):
        full = build_model("llama", seed)
        validation = fidelity.reference(full, blocks(8, seed=1), torch.zeros(32))
        found = distillation.distil(full, student, blocks(16), validation, tmp_path, Distillation(**QUICK))
        histories.append(found.history)
    assert histories[0][0]["kl_nats"] != histories[1][0]["kl_nats"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_divergence_alone_is_enough(tmp_path, dtype):
    full = build_model("llama").to(dtype)
    found, validation = run(tmp_path, full, count=200, hidden=0.0, kl_every=1)
    plain = fidelity.compare(compaction.compact(full, KEPT), validation)["kl_nats"].mean()
    assert found.history[0]["kl_nats"] == pytest.approx(plain, rel=0.02)
    assert found.history[-1]["kl_nats"] < 0.7 * plain
    assert fidelity.compare(found.model, validation)["kl_nats"].mean() < 0.7 * plain
    assert found.model.dtype == dtype


def test_the_divergence_and_its_gradient_are_those_of_autograd():
    generator = torch.Generator().manual_seed(0)
    p, q = (4 * torch.randn(7, 5, 40, generator=generator) for _ in range(2))  # more tokens than are taken at once
    own = q.clone().requires_grad_()
    found = distillation._Divergence.apply(p, own)
    (1.5 * found).backward()
    expected = functional.kl_div(
        q.requires_grad_().log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none"
    )
    (1.5 * expected.sum(-1).mean()).backward()
    torch.testing.assert_close(found, expected.sum(-1).mean())
    torch.testing.assert_close(own.grad, q.grad)


@pytest.mark.parametrize(
    ("hidden", "kl", "step"), [(1.0, 0.0, 0), (0.3, 0.0, 0), (0.0, 1.0, 0), (0.0, 0.7, 6), (0.3, 0.7, 3)]
)
@torch.no_grad()
def test_the_loss_weighs_states_and_the_divergence_at_tokens_that_move_on_with_each_step(tmp_path, hidden, kl, step):
    full, ids = build_model("llama"), blocks(4)
    student = copy.deepcopy(compaction.compact(full, KEPT))
    how = Distillation(batch_size=4, hidden=hidden, kl=kl, kl_every=4)
    trainer = distillation.Distiller(
        full, fidelity.reference(full, blocks(2), torch.zeros(32)), blocks(8), how, None, model=student,
        args=distillation._arguments(full, tmp_path, 8, how),
    )  # fmt: skip
    trainer.state.global_step = step
    found = trainer._loss(student, {"input_ids": ids, "index": torch.arange(4)})
    states = (models.last_hidden(model, ids) for model in (full, student))
    log_p, log_q = (model(ids).logits.log_softmax(-1) for model in (full, student))
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)  # (B, T)
    expected = hidden * (1 - functional.cosine_similarity(*states, dim=-1)).mean()
    expected += kl * divergence[:, step % 4 :: 4].mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_trainer_is_given_steps_warmup_and_seed_of_the_settings_and_decays_no_weight(tmp_path):
    how = Distillation(batch_size=4, warmup=0.25, seed=7)
    found = distillation._arguments(build_model("llama"), tmp_path, 64, how)
    assert (found.max_steps, found.warmup_steps, found.seed, found.weight_decay) == (16, 4, 7, 0.0)


def test_looks_are_spread_over_all_passes():
    assert Distillation(batch_size=8, epochs=3).with_looks(4, 64).evaluate_every == 6  # of 24 steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_in_the_dtype_of_the_full_model(tmp_path, dtype, monkeypatch):
    seen, real = set(), distillation.Distiller._loss

    def look(self, model, inputs):
        hook = models.decoder_layers(model)[0].mlp.down_proj.register_forward_hook(
            lambda *call: seen.add(call[2].dtype)
        )
        with hook:
            return real(self, model, inputs)

    monkeypatch.setattr(distillation.Distiller, "_loss", look)
    found, _ = run(tmp_path, build_model("llama").to(dtype), count=16)
    assert seen == {dtype}
    assert found.model.dtype == dtype


def test_a_bfloat16_result_says_what_its_checkpoint_says(tmp_path):
    full = build_model("llama")
    full.save_pretrained(tmp_path / "full")
    found, _ = run(tmp_path / "run", type(full).from_pretrained(tmp_path / "full", dtype=torch.bfloat16), count=16)
    found.model.save_pretrained(tmp_path / "model")
    again = type(full).from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    own, other = dict(found.model.named_buffers()), dict(again.named_buffers())
    assert {name: buffer.dtype for name, buffer in own.items()} == {name: other[name].dtype for name in own}
    with torch.no_grad():
        assert torch.equal(found.model(blocks(2)).logits, again(blocks(2)).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_training_stays_on_the_model(tmp_path, dtype):
    full = build_model("llama").to(dtype)
    found, _ = run(tmp_path, full, count=16)
    assert vars(found.model).keys() == vars(compaction.compact(full, KEPT)).keys()


def test_the_result_is_a_standard_checkpoint(tmp_path):
    found, _ = run(tmp_path / "run")
    found.model.save_pretrained(tmp_path / "model")
    again = type(found.model).from_pretrained(tmp_path / "model")
    assert again.state_dict().keys() == compaction.compact(build_model("llama"), KEPT).state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(models.last_hidden(again, blocks(2)), models.last_hidden(found.model, blocks(2)))


def test_the_loss_has_a_gradient_in_every_trained_weight(tmp_path):
    full = build_model("llama")
    student = compaction.compact(full, KEPT)
    found = distillation.distil(
        full, student, blocks(8), fidelity.reference(full, blocks(2), torch.zeros(32)), tmp_path,
        Distillation(learning_rate=1e-2, evaluate_every=1, warmup=0.0),
    )  # fmt: skip
    embeddings = {id(student.get_input_embeddings().weight), id(student.get_output_embeddings().weight)}
    for (name, old), new in zip(student.named_parameters(), found.model.parameters(), strict=True):
        assert torch.equal(old, new) == (id(old) in embeddings), name


def test_in_several_passes_the_teacher_answers_each_block_once(tmp_path, monkeypatch):
    asked, real, full = [], distillation.last_hidden, build_model("llama")
    monkeypatch.setattr(distillation, "last_hidden", lambda model, ids: asked.append((model, ids)) or real(model, ids))
    found, _ = run(tmp_path, full, count=32, epochs=3)
    assert sum(len(ids) for model, ids in asked if model is full) == 32
    assert [row["tokens"] for row in found.history] == [0, *(n * 4 * 8 * 16 for n in (1, 2, 3))]
    assert found.history[-1]["kl_nats"] < 0.8 * found.history[0]["kl_nats"]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),  # states of OPT-350m are half as wide
        ("llama4_text", {}),  # its base_model is the model itself
    ],
)
def test_families_of_other_forms_are_trained(tmp_path, family, settings):
    full = build_model(family, **settings)
    found, _ = run(tmp_path, full, epochs=2, width=full.get_input_embeddings().weight.shape[1])
    assert found.history[-1]["kl_nats"] < found.history[0]["kl_nats"]


def test_answers_that_are_kept_are_those_of_the_teacher(tmp_path):
    full = build_model("llama")
    answers = distillation._Answers(full, blocks(6), 32, tmp_path)
    for index in map(torch.tensor, ([4], [4, 1], [4, 1])):  # none, some and all of them are known
        torch.testing.assert_close(
            answers(blocks(6)[index], index), models.last_hidden(full, blocks(6)[index]).detach()
        )


def test_tokens_and_seconds_are_counted(tmp_path):
    found, _ = run(tmp_path)
    assert [(row["step"], row["tokens"]) for row in found.history] == [(n, n * 8 * 16) for n in (0, 4, 8, 12)]
    seconds = [row["seconds"] for row in found.history]
    assert 0 == seconds[0] < seconds[1] < seconds[2] < seconds[3]


def test_it_stops_when_validation_text_gets_no_better(tmp_path):
    found, _ = run(tmp_path, count=800, learning_rate=0.0, patience=2)
    assert found.history[-1]["step"] == 3 * 4  # the first look, and two without progress


def test_steps_that_make_it_worse_are_not_taken(tmp_path):
    full = build_model("llama")
    whole = compaction.compact(full, range(4))  # nothing is missing
    validation = fidelity.reference(full, blocks(8, seed=1), torch.zeros(32))
    settings = Distillation(learning_rate=0.3, evaluate_every=4)
    assert distillation.distil(full, whole, blocks(64), validation, tmp_path, settings).model is whole


def test_the_best_look_counts_where_the_last_one_is_worse_than_the_start(tmp_path, monkeypatch):
    full = build_model("llama")
    student = compaction.compact(full, KEPT)
    monkeypatch.setattr(distillation.Distiller, "fit", lambda self, *names: [{"kl_nats": kl} for kl in (1.0, 0.5, 2.0)])
    validation = fidelity.reference(full, blocks(2), torch.zeros(32))
    assert distillation.distil(full, student, blocks(8), validation, tmp_path, Distillation()).model is not student


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, epochs):
    count = 96 // epochs
    whole, _ = run(tmp_path / "whole", count=count, epochs=epochs)
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from test_distillation import run
die_at_8 = lambda line: os.kill(os.getpid(), signal.SIGKILL) if line.startswith('step 8 ') else None
run(Path({str(tmp_path / "killed")!r}), count={count}, epochs={epochs}, progress=die_at_8)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in (tmp_path / "killed").glob("*/checkpoint-*")] == ["checkpoint-4"]
    resumed, _ = run(tmp_path / "killed", count=count, epochs=epochs)
    assert [row["step"] for row in resumed.history] == [0, 4, 8, 12]
    assert [list(row) for row in resumed.history] == [list(row) for row in whole.history]
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_checkpoint_that_was_being_written_is_not_resumed_from(tmp_path):
    whole, _ = run(tmp_path / "whole")

    def stop(line):
        if line.startswith("step 12 "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", progress=stop)
    (last,) = (tmp_path / "killed").glob("*/checkpoint-8")
    (last / "optimizer.pt").write_bytes(b"half")
    (last / "trainer_state.json").write_text('{"epoch": 0.')
    resumed, _ = run(tmp_path / "killed")
    assert [row["step"] for row in resumed.history] == [0, 4, 8, 12]
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_full_disk_ends_it_in_one_line_and_keeps_the_last_state(tmp_path, monkeypatch, refused):
    real = distillation.Distiller._save_optimizer_and_scheduler

    def full(self, folder):
        if self.state.global_step == 8:
            monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
            raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed")
        real(self, folder)

    monkeypatch.setattr(distillation.Distiller, "_save_optimizer_and_scheduler", full)
    with refused("the disk of .* is full: free space and run again; the last good state is there"):
        run(tmp_path)
    monkeypatch.undo()
    resumed, _ = run(tmp_path)
    assert [row["step"] for row in resumed.history] == [0, 4, 8, 12]
    assert resumed.model.state_dict().keys()


def test_states_that_do_not_fit_on_the_disk_are_refused_before_the_first_step(tmp_path, monkeypatch, refused):
    def full(*ignored):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with refused("answers.bin takes 0.0 GB .No space left on device.: free space, or give fewer blocks"):
        run(tmp_path, epochs=3)


def test_bad_input(tmp_path, refused):
    with refused("give at least one batch"):
        run(tmp_path, count=4)


@pytest.mark.parametrize("tied", [False, True])
def test_a_run_that_has_ended_is_read_and_not_repeated(tmp_path, monkeypatch, tied):
    def ended(**settings):
        full = build_model("llama", tie_word_embeddings=tied)
        return run(tmp_path, full, count=32, **settings)[0]

    first = ended()
    assert not list(tmp_path.glob("*/checkpoint-*"))
    other = ended(learning_rate=1e-3)  # another run, beside it
    monkeypatch.setattr(distillation, "Distiller", None)
    again = ended()
    assert again.history == first.history != other.history
    for (name, a), b in zip(first.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_loss_that_is_not_a_number_stops_it_and_keeps_the_last_state(tmp_path, refused):
    with refused("the loss is (nan|inf) at step .* lower the learning rate"):
        run(tmp_path, count=400, learning_rate=1e38, evaluate_every=1, warmup=0.5)
    assert list(tmp_path.glob("*/checkpoint-*/model.safetensors"))
