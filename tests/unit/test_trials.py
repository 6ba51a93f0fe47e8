"""The recommendation section's samples, paired shares, and that no test item is learned from."""

import numpy as np
import pytest
import torch
from conftest import build_model

from paper_src import compaction
from paper_src.recommendation import encoders, ranking
from paper_src.recommendation.interactions import Interactions
from paper_src.sections import recommendation as recommendation_section


def data(users=40, items=15, last=None):
    """Walks along a ring; ``last`` replaces everybody's last item."""
    starts = np.random.default_rng(0).integers(0, items, users)
    rows = [(start + np.arange(7)) % items for start in starts]
    if last:
        rows = [np.append(row[:-1], (row[-1] + last) % items) for row in rows]
    return Interactions("ring", rows, [f"item {n}" for n in range(items)], {}, 0, 0)


def bench(**settings):
    return recommendation_section.Bench(data(**settings), learners=20, judged=16, seed=0)


def test_samples_are_of_users_never_of_items():
    found = bench()
    assert (len(found.sample), len(found.users), len(found.validation[0])) == (20, 16, 16)
    assert len(found.data.texts) == 15


def test_what_is_learned_from_does_not_depend_on_test_items():
    one, other = bench(), bench(last=3)
    assert not np.array_equal(one.test[1], other.test[1])
    for a, b in zip(one.sample, other.sample, strict=True):
        assert np.array_equal(a, b)
    for a, b in zip(one.validation[0], other.validation[0], strict=True):
        assert np.array_equal(a, b)
    assert np.array_equal(one.validation[1], other.validation[1])
    states = [ranking.most_popular(each.split.train, 15)([np.array([0])]) for each in (one, other)]
    assert torch.equal(*states)


def test_shares_pair_the_same_users():
    held = recommendation_section.Contest(bench(), report=lambda line: None)
    full = np.random.default_rng(0).uniform(0.1, 1, 16)
    held.users = {("trained", "full"): full, ("trained", "compact"): full / 2, ("frozen", "compact"): full}
    held.users["no_layers", "compact"] = full / 4
    ratios = held._ratios("trained", "compact")
    assert list(ratios.values()) == pytest.approx([0.5, 0.5, 0.5, 2, 2, 2])  # users differ, the ratios do not
    assert np.isnan(list(held._ratios("trained", "full").values())).all()
    assert np.isnan(list(held._ratios("frozen", "compact").values())).all()
    assert np.isnan(held._ratios("no_layers", "compact")["over_no_layers"])
    held.users["no_layers", "full"] = full
    assert np.isnan(held._ratios("no_layers", "compact")["share_of_full"])  # there is nothing that was cut


def test_variants_are_the_kept_the_repaired_and_the_first_layers(tmp_path, llama):
    repaired = compaction.compact(llama, (0, 3))
    repaired.save_pretrained(tmp_path)
    found = recommendation_section.variants(llama, (0, 3), tmp_path)
    assert list(found) == ["full", "compact", "recovered", "first_layers"]

    def writers(model):
        return [layer.mlp.down_proj.weight for layer in model.model.layers]

    assert all(a is b for a, b in zip(writers(found["first_layers"]), writers(llama)[:2], strict=True))
    assert torch.equal(writers(found["recovered"])[1], writers(llama)[3])


def test_a_missing_checkpoint_says_what_makes_it(tmp_path, llama, refused):
    with refused("recovered_2 is missing: run ./reproduce.sh --only 05_recovery"):
        recommendation_section.variants(llama, (0, 3), tmp_path / "recovered_2")


def test_a_contest_leaves_the_models_alone_and_fills_every_row(tmp_path, tokenizer):
    full = build_model("llama", vocab_size=300)
    before = {name: value.clone() for name, value in full.state_dict().items()}
    models = {"full": full, "compact": compaction.compact(full, (0, 3))}
    settings = encoders.Settings(length=6, batch_size=4, epochs=1)
    table, again = (
        recommendation_section.contest(bench(), models, tokenizer, settings, 8, tmp_path / "trial", rounds=2)
        for _ in "ab"
    )
    assert all(torch.equal(value, before[name]) for name, value in full.state_dict().items())
    assert sorted(folder.name for folder in (tmp_path / "trial").iterdir()) == [
        "ring-no_layers-compact", "ring-no_layers-compact-all_users", "ring-no_layers-full",
        "ring-sasrec-all_users", "ring-sasrec-same_users", "ring-trained-compact", "ring-trained-full",
    ]  # fmt: skip
    trained = table["method"].isin(["sasrec", "trained", "no_layers"])
    assert table.loc[trained, "seconds"].tolist() == again.loc[trained, "seconds"].tolist()  # read, not trained again
    assert table["ndcg10"].tolist() == again["ndcg10"].tolist()
    assert table["method"].value_counts().to_dict() == {
        "no_layers": 3, "sasrec": 2, "frozen": 2, "trained": 2, "most_popular": 1, "item_knn": 1
    }  # fmt: skip
    assert table[["hr5", "hr10", "ndcg5", "ndcg10", "mrr", "ndcg10_lo", "train_users"]].notna().all().all()
    rows = table.set_index(["method", "model"])
    filled = ["share_of_full", "over_no_layers", "speedup", "users_per_s", "parameters", "seconds"]
    assert rows.loc[("trained", "compact"), filled].notna().all()
    assert rows.loc[("no_layers", "compact, all users"), "train_users"] == 40
    vectors = 15 * 8 + 2 * 8 * full.config.hidden_size + full.config.hidden_size + 8 + 1  # items, adapter, head, scale
    assert rows.loc["no_layers", "parameters"].tolist() == [vectors] * 3
