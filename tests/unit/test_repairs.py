"""Tables of the recovery section: which selections go in, the control, the rule of the recommended model."""

import math

import pandas as pd
import pytest
import torch
from conftest import build_model

from paper_src import InputError, recovery
from paper_src.compaction import compact
from paper_src.sections import recovery as recovery_section


@pytest.fixture
def texts(tmp_path):
    """Two folders of text, one all of a kind."""
    for name, words in (("plain", "the cat sat on the mat and the dog ran "), ("other", "zzz yyy xxx www vvv ")):
        (tmp_path / name).mkdir()
        for split in ("train", "valid", "test"):
            (tmp_path / name / f"{split}.txt").write_text(words * 60)
    return [str(tmp_path / "plain"), str(tmp_path / "other")]


@pytest.fixture
def judge(texts, tokenizer):
    model = build_model("llama", vocab_size=300)
    return model, recovery_section.Judge(model, tokenizer, texts, "valid", (3, 16), torch.zeros(32), seed=0)


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
    looks = recovery_section.t5_curve([[{"k": 2, "nll_nats": nll}], [{"k": 2, "nll_nats": nll + math.log(3)}]], judge)
    assert looks["ppl_ratio"].tolist() == pytest.approx([1, 3])
    framed = recovery_section.t5_recovery([], model, judge)
    assert framed["ppl_ratio"].iloc[0] == pytest.approx(1)
    assert framed["ppl_ratio"].iloc[1] == pytest.approx(math.exp(framed["nll_nats"].iloc[1] - nll))


def test_the_mean_over_kinds_of_text_is_geometric(judge):
    model, judge = judge
    small = compact(model, (0, 3))
    row = judge.row(small)
    expected = math.sqrt(row["ppl_ratio_plain"] * row["ppl_ratio_other"])
    assert row["ppl_ratio_mean"] == pytest.approx(expected)
    assert judge.ppl_ratio(small) == pytest.approx(expected)


def test_each_number_of_layers_has_its_distillation():
    assert recovery_section.plan([0.75, 3], 12, [20, 30], [1e-4, 2e-4]) == {9: (20, 1e-4), 3: (30, 2e-4)}
    assert recovery_section.plan([0.5, 0.4], 5, [20, 30], [1e-4, 2e-4]) == {2: (20, 1e-4)}  # 2.5 rounds to 2, as 2 does


def test_a_distillation_without_its_rate_is_an_error():
    with pytest.raises(InputError, match="keep, distil_blocks and learning_rates hold 2, 2 and 1 values"):
        recovery_section.plan([0.75, 3], 12, [20, 30], [1e-4])


def test_candidates_are_the_best_different_selections_of_each_k(refused):
    table = pd.DataFrame({
        "k": [2, 2, 2, 2, 4], "strategy": ["a", "b", "random", "c", "d"], "score": [None] * 5,
        "kept": ["0 1", "0 1", "", "0 2", "0 1 2 3"], "nll_nats": [1.0, 1.0, 0.5, 3.0, 0.2],
    })  # fmt: skip
    found = recovery_section.candidates(table, [2], 2)
    assert found[["strategy", "kept"]].to_numpy().tolist() == [["a", "0 1"], ["c", "0 2"]]
    with refused("k = 3 was not judged .* search_keep"):
        recovery_section.candidates(table, [2, 3], 2)


def test_the_control_judges_only_its_own_k():
    table = pd.DataFrame({"k": [4, 2], "ppl_ratio_refitted": [2.0, 5.0], "chosen": [True, True]})
    control = pd.DataFrame({"k": [2, 2, 2], "ppl_ratio_refitted": [4.0, 6.0, 9.0]})
    found = recovery_section.with_control(table, control)
    assert found["p_refitted"].isna().tolist() == [True, False, True, True, True]
    assert found.loc[1, "p_refitted"] == (1 + 1) / (1 + 3)
    assert found["chosen"].tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(("target", "k"), [(0.9, 15), (0.97, 22), (0.8, 8), (0.99, 22)])
def test_the_recommended_model_has_the_fewest_layers_that_reach_the_target(target, k):
    curve = pd.DataFrame({
        "k": [22, 22, 15, 8, 8], "kl_nats": [0.2, 0.1, 0.3, 0.9, 0.5], "cosine": [0.9, 0.98, 0.95, 0.99, 0.85],
    })  # fmt: skip
    assert (
        recovery_section.recommended(curve, target)["k"] == k
    )  # the look of lowest KL counts, not that of highest cosine


def test_a_refit_is_judged_beside_the_cut_and_the_best_is_chosen(judge):
    model, judge = judge
    table = pd.DataFrame({"k": [2, 2], "strategy": ["a", "b"], "score": [None, None], "kept": ["0 3", "1 2"]})
    blocks = torch.randint(3, 200, (64, 16), generator=torch.Generator().manual_seed(0))
    found = recovery_section.after_refit(model, table, blocks, judge)
    assert found["ppl_ratio_cut"].tolist() == [judge.ppl_ratio(compact(model, kept)) for kept in ((0, 3), (1, 2))]
    assert found["chosen"].sum() == 1
    assert found.loc[found["chosen"], "ppl_ratio_refitted"].item() == found["ppl_ratio_refitted"].min()


def test_a_mix_that_makes_a_kind_of_text_worse_is_not_chosen(judge, texts, tokenizer):
    model, judge = judge
    found = recovery_section.t5_mix(
        model, tokenizer, (0, 3), {"plain": texts[:1], "both": texts}, (32, 16), judge, seed=0
    )
    columns = ["ppl_ratio_plain", "ppl_ratio_other"]
    cut = found.loc[0, columns]
    for row in found.iloc[1:].to_dict("records"):
        assert row["no_domain_worse"] == all(row[column] <= cut[column] for column in columns)
        assert not row["chosen"] or row["no_domain_worse"]


def test_a_family_without_a_closed_form_is_cut_only(judge, make_blocks, capsys):
    model, blocks = build_model("gemma2", vocab_size=300), make_blocks(64, 16)
    with pytest.warns(UserWarning, match="not refitted: layer 0 does not add its MLP's output"):
        found = recovery_section.refit(model, (0, 3), blocks)
    cut = compact(model, (0, 3))
    assert found.tokens == 0
    assert torch.equal(found.model(blocks).logits, cut(blocks).logits)
    table = recovery_section.t5_forms(model, (0, 3), blocks, judge[1], [("down_proj", "gaps"), ("linear", "gaps")])
    assert table[["form", "chosen"]].values.tolist() == [["none", True], ["linear", False]]
    assert "down_proj: layer 0 does not add" in capsys.readouterr().out
    assert recovery_section.refit(model, (0, 3), blocks, ("none", "")).tokens == 0


def test_a_refit_is_the_closed_form(judge, make_blocks):
    model, blocks = judge[0], make_blocks(16, 8)
    found, expected = recovery_section.refit(model, (0, 3), blocks), recovery.closed_form(model, (0, 3), blocks)
    assert found.tokens == expected.tokens == blocks.numel()
    assert torch.equal(found.model(blocks).logits, expected.model(blocks).logits)
