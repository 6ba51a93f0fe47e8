"""Rows of the recommendation section: samples, paired ratios, and that no test item is learned from."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import build_model

from paper_src import compaction
from paper_src.recommendation import ranking
from paper_src.recommendation.encoders import Training
from paper_src.recommendation.interactions import Interactions
from paper_src.recommendation.recommenders import RECOMMENDERS, Trial
from paper_src.sections import recommendation as rows

TRAINING = Training(length=6, batch_size=4, epochs=1)
SCRATCH = replace(TRAINING, batch_size=8, patience=5, learning_rate=1e-3, body_rate=1e-3, residual=0.0)


def trial(users=40, items=15, last=None):
    """Walks along a ring; ``last`` replaces everybody's last item."""
    starts = np.random.default_rng(0).integers(0, items, users)
    walks = [(start + np.arange(7)) % items for start in starts]
    if last:
        walks = [np.append(walk[:-1], (walk[-1] + last) % items) for walk in walks]
    data = Interactions("ring", walks, [f"item {n}" for n in range(items)], {})
    return Trial(data, learners=20, judged=16, training=TRAINING, scratch=SCRATCH, width=8)


def held(folder, tokenizer, models):
    """A contest of all recommenders on ``models``."""
    contest = rows.Contest(trial(), folder)
    for method, users in (("most_popular", "all"), ("item_knn", "all"), ("sasrec", "all"), ("sasrec", "sample")):
        contest.enter(method, users)
    for name, model in models.items():
        texts = rows.read_items(model, tokenizer, contest.trial.data.texts)
        for method, users in (("frozen", "none"), ("trained", "sample"), ("no_layers", "sample")):
            contest.enter(method, users, name, texts)
    contest.enter("no_layers", "all", name, texts)
    return rows.t6_recommenders(contest, contest.speeds(rounds=2))


def test_samples_are_of_users_never_of_items():
    found = trial()
    assert {name: len(users) for name, users in found.users.items()} == {"none": 0, "sample": 20, "all": 40}
    assert (len(found.test[0]), len(found.validation[0])) == (16, 16)
    assert found.items == 15


def test_what_is_learned_from_does_not_depend_on_test_items():
    one, other = trial(), trial(last=3)
    assert not np.array_equal(one.test[1], other.test[1])
    for a, b in zip(one.users["sample"], other.users["sample"], strict=True):
        assert np.array_equal(a, b)
    for a, b in zip(one.validation[0], other.validation[0], strict=True):
        assert np.array_equal(a, b)
    assert np.array_equal(one.validation[1], other.validation[1])
    states = [ranking.most_popular(each.users["all"], 15)([np.array([0])]) for each in (one, other)]
    assert torch.equal(*states)


def test_ratios_pair_the_same_users(tmp_path):
    contest = rows.Contest(trial(), tmp_path)
    full = np.random.default_rng(0).uniform(0.1, 1, 16)
    contest.ndcg10 = {
        ("trained", "full", "sample"): full,
        ("trained", "compact", "sample"): full / 2,
        ("no_layers", "compact", "sample"): full / 4,
        ("no_layers", "compact", "all"): full / 4,
        ("no_layers", "full", "sample"): full,
        ("frozen", "compact", "none"): full,
        ("sasrec", "sasrec", "sample"): full,
    }
    ratios = {key: contest.ratios(*key) for key in contest.ndcg10}
    assert list(ratios["trained", "compact", "sample"].values()) == pytest.approx([0.5, 0.5, 0.5, 2, 2, 2])
    assert ratios["trained", "full", "sample"]["over_no_layers"] == 1
    assert np.isnan(ratios["trained", "full", "sample"]["share_of_full"])
    for key in list(contest.ndcg10)[2:]:  # nothing to compare with: a control, another method's full model, no texts
        assert np.isnan(list(ratios[key].values())).all()


def test_variants_are_the_kept_the_repaired_and_the_first_layers(tmp_path, llama):
    compaction.compact(llama, (0, 3)).save_pretrained(tmp_path)
    found = rows.variants(llama, (0, 3), tmp_path)
    assert list(found) == ["full", "compact", "recovered", "first_layers"]

    def writers(model):
        return [layer.mlp.down_proj.weight for layer in model.model.layers]

    assert all(a is b for a, b in zip(writers(found["first_layers"]), writers(llama)[:2], strict=True))
    assert torch.equal(writers(found["recovered"])[1], writers(llama)[3])


def test_a_missing_checkpoint_says_what_makes_it(tmp_path, llama, refused):
    with refused("recovered_2 is missing: run ./reproduce.sh --only 05_recovery"):
        rows.variants(llama, (0, 3), tmp_path / "recovered_2")


def test_a_contest_leaves_the_models_alone_and_fills_every_row(tmp_path, tokenizer):
    full = build_model("llama", vocab_size=300)
    before = {name: value.clone() for name, value in full.state_dict().items()}
    models = {"full": full, "compact": compaction.compact(full, (0, 3))}
    table, again = (held(tmp_path, tokenizer, models) for _ in "ab")
    assert all(torch.equal(value, before[name]) for name, value in full.state_dict().items())
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [
        "no_layers-compact-all", "no_layers-compact-sample", "no_layers-full-sample", "sasrec-sasrec-all",
        "sasrec-sasrec-sample", "trained-compact-sample", "trained-full-sample",
    ]  # fmt: skip
    trained = [RECOMMENDERS[method].trained for method in table["method"]]
    assert table.loc[trained, "seconds"].tolist() == again.loc[trained, "seconds"].tolist()  # read, not trained again
    assert table["ndcg10"].tolist() == again["ndcg10"].tolist()
    assert table[["hr5", "hr10", "ndcg5", "ndcg10", "mrr", "ndcg10_lo", "train_users"]].notna().all().all()
    assert not table.duplicated(rows.KEY).any()
    found = table.set_index(rows.KEY).sort_index()
    filled = ["share_of_full", "over_no_layers", "speedup", "users_per_s", "parameters", "seconds"]
    assert found.loc[("trained", "compact", "sample"), filled].notna().all()
    assert found.loc[("no_layers", "compact", "all"), "train_users"] == 40
    assert found.loc[found["layers"]].index.unique("method").tolist() == ["sasrec", "trained"]
    vectors = 15 * 8 + 2 * 8 * full.config.hidden_size + full.config.hidden_size + 8 + 1  # items, adapter, head, scale
    assert found.loc["no_layers", "parameters"].tolist() == [vectors] * 3
    assert table["model"].tolist() == [
        "none", "none", "all users", "same users", "full", "full", "full", "compact", "compact", "compact",
        "compact, all users",
    ]  # fmt: skip
    assert_drawn(table)


def assert_drawn(table):
    """The figure has a row of each recommender, the best on top, and no point at an edge."""
    read = table.assign(layers=table["layers"].astype(bool))
    figure = rows.f6_recommendation({"t6_movielens": read, "t6_amazon": read.drop(index=0)})
    assert len(figure.axes) == 6
    assert all(axis.get_title() and axis.get_xlabel() for axis in figure.axes)
    best = read.sort_values("ndcg10").iloc[-1]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == len(read)
    assert labels[-1].startswith(RECOMMENDERS[best["method"]].title)
    for axis in figure.axes:
        (low, high), points = axis.get_xlim(), [line.get_xdata() for line in axis.lines if line.get_marker() != "None"]
        assert all(low < x < high for x in pd.Series(np.concatenate(points)))


def test_sasrec_has_as_many_steps_on_a_sample_as_on_all_users(tmp_path, monkeypatch):
    seen = []

    def train(body, vectors, users, validation, folder, training):
        seen.append((len(users), training.batch_size, training.epochs, training.patience))
        return torch.nn.Linear(1, 1), [{"epoch": 0, "seconds": 0.0, "ndcg10": 0.0}]

    monkeypatch.setattr("paper_src.recommendation.encoders.train", train)
    found = trial()
    for users in ("all", "sample"):
        RECOMMENDERS["sasrec"].fit(found, found.users[users], None, tmp_path)
    assert seen == [(40, 8, 1, 5), (20, 4, 1, 5)]  # 40 / 8 steps, 20 / 4 steps
