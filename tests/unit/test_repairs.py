"""Tables of the recovery section: which selections go in, the control, the rule of the recommended model."""

import math

import pandas as pd
import pytest
import torch
from conftest import build_model

from paper_src import InputError, distillation, recovery
from paper_src.compaction import compact
from paper_src.sections import recovery as rows
from paper_src.sections.judge import Judge


@pytest.fixture
def judge(texts, tokenizer):
    model = build_model("llama", vocab_size=300)
    return model, Judge(model, tokenizer, texts, "valid", (3, 16), torch.zeros(32), seed=0)


def test_the_full_model_has_ratio_one_on_every_kind_of_text(judge):
    model, judge = judge
    row = judge.row(model)
    assert row["cosine"] == pytest.approx(1, abs=1e-6)
    assert [row[f"ppl_ratio_{name}"] for name in ("plain", "other")] == pytest.approx([1, 1])
    assert row["ppl_ratio"] == row["ppl_ratio_plain"]
    assert row["ppl_ratio_lo"] == row["ppl_ratio_hi"] == pytest.approx(1)  # blocks are hard for both
    assert row["ppl_lo"] < row["ppl_hi"]


def test_looks_and_the_constant_answer_are_set_beside_the_full_model(judge):
    model, judge = judge
    nll = judge.row(model)["nll_nats"]
    history = [{"nll_nats": nll}, {"nll_nats": nll + math.log(3)}]
    stages = {2: {"closed_form": rows.Stage(model), "distilled": rows.Stage(model, history=history)}}
    looks = rows.t5_curve(stages, nll)
    assert looks["ppl_ratio"].tolist() == pytest.approx([1, 3])
    constant = judge.constant_row(model)
    assert constant["ppl_ratio"] == pytest.approx(math.exp(constant["nll_nats"] - nll))
    row = rows.stage_row("trivial", (), "none", rows.Stage(model), judge, constant)
    assert [row[name] for name in ("row", "k", "kept", "n_windows", "n_tokens")] == ["trivial", 0, "", 3, 48]


def test_a_training_is_watched_on_all_kinds_of_text(judge):
    model, judge = judge
    watched, nll = rows.looks_at(model, judge)
    assert torch.equal(watched.blocks, torch.cat(list(judge.blocks.values())))
    assert nll == pytest.approx(sum(losses.mean() for losses in judge.full_nll.values()) / 2)


def test_few_windows_are_the_first_of_all(texts, tokenizer, monkeypatch):
    model = build_model("llama", vocab_size=300)
    monkeypatch.setattr("paper_src.sections.judge.ALL_METRICS", 32)  # two windows get all metrics
    judge = Judge(model, tokenizer, texts, "test", (5, 16), torch.zeros(32), seed=0, others=3)
    small = compact(model, (0, 3))
    whole, part = judge.compare(small), judge.few(3, 2).compare(small)
    for kind, count in (("plain", 3), ("other", 2)):
        assert part[kind]["nll_nats"].tolist() == pytest.approx(whole[kind]["nll_nats"][:count])
    assert len(part["plain"]["kl_nats"]) == 2
    summary = judge.few(3, 2).summary(part)
    gaps = [
        (part[kind]["nll_nats"] - judge.full_nll[kind][:count]).mean() for kind, count in (("plain", 3), ("other", 2))
    ]
    assert summary["ppl_ratio_mean"] == pytest.approx(math.exp(sum(gaps) / 2))
    assert set(judge.few(3, 2).windows("x", part)["text"]) == {"plain few", "other few"}
    assert len(judge.compare(small)["plain"]["nll_nats"]) == 5  # as it was


def test_the_mean_over_kinds_of_text_is_geometric(judge):
    model, judge = judge
    small = compact(model, (0, 3))
    row = judge.row(small)
    expected = math.sqrt(row["ppl_ratio_plain"] * row["ppl_ratio_other"])
    assert row["ppl_ratio_mean"] == pytest.approx(expected)
    assert judge.ppl_ratio(small) == pytest.approx(expected)


def test_each_number_of_layers_has_its_distillation():
    assert rows.plan([0.75, 3], 12, [20, 30], [1e-4, 2e-4]) == {9: (20, 1e-4), 3: (30, 2e-4)}
    assert rows.plan([0.5, 0.4], 5, [20, 30], [1e-4, 2e-4]) == {2: (20, 1e-4)}  # 2.5 rounds to 2, as 2 does


def test_a_distillation_without_its_rate_is_an_error():
    with pytest.raises(InputError, match="keep, distil_blocks and learning_rates hold 2, 2 and 1 values"):
        rows.plan([0.75, 3], 12, [20, 30], [1e-4])


def test_candidates_are_the_best_different_selections_of_each_k(refused):
    table = pd.DataFrame({
        "k": [2, 2, 2, 2, 4], "strategy": ["a", "b", "random", "c", "d"], "score": [None] * 5,
        "kept": ["0 1", "0 1", "", "0 2", "0 1 2 3"], "nll_nats": [1.0, 1.0, 0.5, 3.0, 0.2],
    })  # fmt: skip
    found = rows.candidates(table, [2], 2)
    assert found[["strategy", "kept"]].to_numpy().tolist() == [["a", "0 1"], ["c", "0 2"]]
    with refused("k = 3 was not judged .* search_keep"):
        rows.candidates(table, [2, 3], 2)


def test_the_control_judges_only_its_own_k():
    found = rows.t5_selection([
        {"k": k, "strategy": name, "ppl_ratio_cut": 1.0, "ppl_ratio_refitted": refitted}
        for k, name, refitted in [(4, "a", 2.0), (2, "a", 5.0), (2, "b", 3.0)]
        + [(2, "random", value) for value in (4.0, 6.0, 9.0)]
    ])  # fmt: skip
    assert found["p_refitted"].isna().tolist() == [True, False, False, True, True, True]
    assert found["p_refitted"].tolist()[1:3] == [(1 + 1) / (1 + 3), 1 / 4]
    assert found["rank_refitted"].tolist() == [1, 2, 1, 1, 2, 3]
    assert found["chosen"].tolist() == [True, False, True, False, False, False]


@pytest.mark.parametrize(("target", "k"), [(0.9, 15), (0.97, 22), (0.8, 8), (0.99, 22)])
def test_the_recommended_model_has_the_fewest_layers_that_reach_the_target(target, k):
    curve = pd.DataFrame({
        "k": [22, 22, 15, 8, 8], "kl_nats": [0.2, 0.1, 0.3, 0.9, 0.5], "cosine": [0.9, 0.98, 0.95, 0.99, 0.85],
    })  # fmt: skip
    assert rows.recommended(curve, target)["k"] == k  # the look of lowest KL counts, not that of highest cosine


def test_a_refit_is_judged_beside_the_cut_and_the_best_is_chosen(judge):
    model, judge = judge
    blocks = torch.randint(3, 200, (64, 16), generator=torch.Generator().manual_seed(0))
    table = []
    for kept in ((0, 3), (1, 2)):
        ratios = {name: judge.ppl_ratio(rows.refit(model, kept, blocks, form).model)
                  for name, form in (("ppl_ratio_cut", "none"), ("ppl_ratio_refitted", "down_proj"))}  # fmt: skip
        table.append({"k": 2, "strategy": str(kept), **ratios})
    found = rows.t5_selection(table)
    assert found["ppl_ratio_cut"].tolist() == [judge.ppl_ratio(compact(model, kept)) for kept in ((0, 3), (1, 2))]
    assert found["chosen"].sum() == 1
    assert found.loc[found["chosen"], "ppl_ratio_refitted"].item() == found["ppl_ratio_refitted"].min()


def test_a_mix_that_makes_a_kind_of_text_worse_is_not_chosen():
    def row(mix, plain, other, refitted=True):
        found = {"ppl_ratio": plain, "ppl_ratio_lo": 0.0, "ppl_ratio_plain": plain, "ppl_ratio_other": other}
        mean = (plain * other) ** 0.5
        return {"mix": mix, "texts": mix, "tokens": 9, "refitted": refitted, **found, "ppl_ratio_mean": mean}

    cut = row("none", 5.0, 5.0, refitted=False)
    found = rows.t5_mix([cut, row("plain", 1.0, 6.0), row("both", 3.0, 4.0)])
    assert found["no_domain_worse"].tolist() == [True, False, True]
    assert found["chosen"].tolist() == [False, False, True]
    assert list(found)[2:5] == ["ppl_ratio_plain", "ppl_ratio_other", "ppl_ratio_mean"]
    assert not rows.t5_mix([cut, row("plain", 1.0, 2.0, refitted=False)])["chosen"].any()


def test_a_model_without_a_closed_form_is_cut_only(judge, make_blocks, monkeypatch):
    model, blocks = build_model("gemma2", vocab_size=300), make_blocks(64, 16)
    monkeypatch.setattr(type(model.model.layers[0].post_feedforward_layernorm), "forward", lambda self, x: x.sigmoid())
    with pytest.warns(UserWarning, match="down_proj, not refitted: no linear map of layer 0 has"):
        found = rows.refit(model, (0, 3), blocks)
    cut = compact(model, (0, 3))
    assert (found.tokens, found.form) == (0, "none")
    assert torch.equal(found.model(blocks).logits, cut(blocks).logits)
    stages = [found, rows.refit(model, (0, 3), blocks, "linear")]
    table = rows.t5_forms([rows.form_row(stage, (0, 3), judge[1].row(stage.model)) for stage in stages])
    assert table[["form", "standard", "chosen"]].values.tolist() == [["none", True, True], ["linear", False, False]]
    assert rows.refit(model, (0, 3), blocks, form="none").tokens == 0


def test_a_refit_is_the_closed_form(judge, make_blocks):
    model, blocks = judge[0], make_blocks(16, 8)
    found, expected = rows.refit(model, (0, 3), blocks), recovery.closed_form(model, (0, 3), blocks)
    assert found.tokens == expected.tokens == blocks.numel()
    assert torch.equal(found.model(blocks).logits, expected.model(blocks).logits)
    row = rows.stage_row("selected", (0, 3), "closed_form", found, judge[1], {})
    assert (row["form"], row["reach"], row["trained"], row["tokens"]) == ("down_proj", "gaps", False, blocks.numel())


def test_the_cost_of_a_stage_holds_that_of_the_one_before(judge, make_blocks, tmp_path):
    model, judge = judge
    start = rows.Stage(compact(model, (0, 3)), tokens=100, seconds=5.0, form="down_proj", reach="gaps")
    settings = distillation.Distillation(batch_size=4, evaluate_every=2)
    found = rows.distil(model, start, make_blocks(8, 16, vocab=300), judge.first, tmp_path, settings)
    assert (found.tokens, found.training_tokens, found.form) == (100 + 128, 128, "down_proj")
    assert found.seconds > 5
    row, windows = rows.judged("selected", (0, 3), "distilled", found, judge)
    assert row["trained"] and row["row"] == "selected k=2 distilled"
    assert windows.loc[windows["text"] == "plain", "nll_nats"].mean() == pytest.approx(row["nll_nats"])
