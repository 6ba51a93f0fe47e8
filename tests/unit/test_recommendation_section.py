"""Rows of the recommendation section: samples, paired ratios, the gate, and that no test item is learned from."""

import io
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import build_model

from paper_src import compaction
from paper_src.baselines.control import without_layers
from paper_src.models import decoder_layers
from paper_src.recommendation import ranking
from paper_src.recommendation.encoders import Training
from paper_src.recommendation.interactions import Interactions
from paper_src.recommendation.recommenders import RECOMMENDERS, Trial
from paper_src.sections import recommendation as rows
from paper_src.sections.recommendation_findings import f6_recommendation, t6_findings

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


def held(folder, tokenizer, models, seeds=(0, 1)):
    """A contest of all recommenders on ``models``."""
    contest = rows.Contest(trial(), folder, seeds)
    for method in ("most_popular", "item_knn", "sasrec"):
        contest.enter(method, "all")
    for name, model in models.items():
        texts = rows.read_items(model, tokenizer, contest.trial.data.texts)
        contest.enter("frozen", "none", name, texts)
        if name != rows.BARE:
            contest.enter("trained", "sample", name, texts)
            contest.enter("no_layers", "sample", name, texts)
    return contest


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


def test_a_seed_changes_the_trainings_and_no_user():
    one, other = trial(), trial().seeded(3)
    assert (other.training.seed, other.scratch.seed) == (3, 3)
    assert np.array_equal(one.test[1], other.test[1])
    assert all(np.array_equal(*pair) for pair in zip(one.users["sample"], other.users["sample"], strict=True))


def test_an_item_is_unseen_where_no_learner_took_it():
    walks = [np.array([0, 1, 2, 3]), np.array([1, 0, 3, 2]), np.array([0, 1, 3, 4])]  # training: the first two of each
    data = Interactions("few", walks, list("abcde"), {})
    found = Trial(data, learners=3, judged=3, training=TRAINING, scratch=SCRATCH, width=2)
    assert dict(zip(found.test[1].tolist(), found.unseen.tolist(), strict=True)) == {3: True, 2: True, 4: True}
    assert not trial().unseen.any()
    few = replace(trial(), learners=1)
    assert few.unseen.tolist() == [item not in few.users["sample"][0] for item in few.test[1]]
    assert 0 < few.unseen.sum() < len(few.unseen)


def test_item_knn_is_tuned_on_validation_users():
    found = trial()
    _, columns = RECOMMENDERS["item_knn"].fit(found, found.users["all"])
    values = {
        (weighting, neighbours): ranking.metrics_of(
            ranking.target_ranks(ranking.item_knn(found.users["all"], 15, weighting, neighbours), *found.validation)
        )["ndcg10"].mean()
        for weighting in ranking.WEIGHTINGS for neighbours in (10, 30, 100, 300)
    }  # fmt: skip
    assert columns["valid_ndcg10"] == max(values.values())
    assert values[columns["weighting"], columns["neighbours"]] == columns["valid_ndcg10"]


def test_ratios_pair_the_same_users(tmp_path):
    contest = rows.Contest(trial(), tmp_path)
    full = np.random.default_rng(0).uniform(0.1, 1, (2, 16))
    contest.ndcg10 = {
        ("trained", "full", "sample"): full,
        ("trained", "compact", "sample"): full / 2,
        ("no_layers", "compact", "sample"): full / 4,
        ("no_layers", "full", "sample"): full,
        ("frozen", "full", "none"): full,
        ("frozen", rows.BARE, "none"): full / 8,
        ("sasrec", "sasrec", "all"): full[:1],
    }
    ratios = {key: contest.ratios(*key) for key in contest.ndcg10}
    assert list(ratios["trained", "compact", "sample"].values()) == pytest.approx([0.5, 0.5, 0.5, 2, 2, 2])
    assert ratios["trained", "full", "sample"]["over_no_layers"] == 1
    assert ratios["frozen", "full", "none"]["over_no_layers"] == pytest.approx(8)
    assert np.isnan(ratios["trained", "full", "sample"]["share_of_full"])
    for key in (("no_layers", "full", "sample"), ("frozen", rows.BARE, "none"), ("sasrec", "sasrec", "all")):
        assert np.isnan(list(ratios[key].values())).all()


def test_variants_are_the_kept_the_repaired_and_the_controls(tmp_path, llama):
    compaction.compact(llama, (0, 3)).save_pretrained(tmp_path)
    found = rows.variants(llama, (0, 3), tmp_path, seed=0)
    assert list(found) == ["full", rows.BARE, "compact", "recovered", "random_layers", "first_layers"]

    def writers(model):
        return [layer.mlp.down_proj.weight for layer in model.model.layers]

    assert all(a is b for a, b in zip(writers(found["first_layers"]), writers(llama)[:2], strict=True))
    assert torch.equal(writers(found["recovered"])[1], writers(llama)[3])
    assert not any(torch.equal(*pair) for pair in zip(writers(found["random_layers"]), writers(llama)[:2], strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen2"])
@torch.no_grad()
def test_without_layers_embedding_norm_and_head_are_left(family):
    full = build_model(family)
    bare, ids = without_layers(full), torch.arange(12)[None]
    assert len(decoder_layers(full)) == full.config.num_hidden_layers > 0  # the full model keeps its own
    assert {id(weight) for weight in bare.parameters()} < {id(weight) for weight in full.parameters()}
    changed = ids.clone()
    changed[0, 0] = 5
    assert torch.equal(bare(ids).logits[:, 1:], bare(changed).logits[:, 1:])  # a token says nothing of another
    assert not torch.equal(full(ids).logits[:, 1:], full(changed).logits[:, 1:])


def test_a_missing_checkpoint_says_what_makes_it(tmp_path, llama, refused):
    with refused("recovered_2 is missing: run ./reproduce.sh --only 05_recovery"):
        rows.variants(llama, (0, 3), tmp_path / "recovered_2", seed=0)


def test_a_contest_leaves_the_models_alone_and_fills_every_row(tmp_path, tokenizer):
    full = build_model("llama", vocab_size=300)
    before = {name: value.clone() for name, value in full.state_dict().items()}
    models = {"full": full, rows.BARE: without_layers(full), "compact": compaction.compact(full, (0, 3))}
    contests = [held(tmp_path, tokenizer, models) for _ in "ab"]
    table, again = (rows.t6_recommenders(contest, contest.speeds(rounds=2)) for contest in contests)
    assert all(torch.equal(value, before[name]) for name, value in full.state_dict().items())
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [
        *(f"no_layers-{body}-sample-{seed}" for body in ("compact", "full") for seed in (0, 1)), "sasrec-sasrec-all-0",
        *(f"trained-{body}-sample-{seed}" for body in ("compact", "full") for seed in (0, 1)),
    ]  # fmt: skip
    trained = [RECOMMENDERS[method].trained for method in table["method"]]
    assert table.loc[trained, "seconds"].tolist() == again.loc[trained, "seconds"].tolist()  # read, not trained again
    assert table["ndcg10"].tolist() == again["ndcg10"].tolist()
    assert table[["hr5", "hr10", "ndcg5", "ndcg10", "mrr", "ndcg10_lo", "train_users"]].notna().all().all()
    assert not table.duplicated(rows.KEY).any()
    found = table.set_index(rows.KEY).sort_index()
    filled = ["share_of_full", "over_no_layers", "speedup", "users_per_s", "parameters", "seconds"]
    assert found.loc[("trained", "compact", "sample"), filled].notna().all()
    assert found["trainings"].to_dict() == {key: 2 if key[0] in ("trained", "no_layers") else 1 for key in found.index}
    assert found.loc[found["layers"]].index.unique("method").tolist() == ["sasrec", "trained"]
    vectors = 15 * 8 + 2 * 8 * full.config.hidden_size + full.config.hidden_size + 8 + 1  # items, adapter, head, scale
    assert found.loc["no_layers", "parameters"].tolist() == [vectors] * 2
    means = [values.mean() for values in contests[0].ndcg10.values()]
    assert table["ndcg10"].tolist() == pytest.approx(means)
    assert_judged(contests[0], table, models, tokenizer)


def assert_judged(contest, table, models, tokenizer):
    """Gate, titles, findings and figure of one data set that is there, and one that is not."""
    asked = rows.Asked(contest.trial, users=8, count=5, length=3)
    for name, model in models.items():
        asked.enter(name, model, tokenizer)
    gates, titles = rows.t6_gate([contest], [asked]), asked.table()
    assert gates["design"].tolist() == ["trained", "frozen", "titles"]
    assert gates["trainings"].tolist() == [2, 1, 1]
    assert gates.loc[0, "verdict"] == "too few trainings"
    everyone = titles.set_index("model")
    assert everyone.index.tolist() == ["most_popular", "item_knn", "full", rows.BARE, "compact"]
    assert (everyone["n_users"] == 8).all()
    assert everyone.loc["compact", "share_of_full"] == pytest.approx(
        everyone.loc["compact", "ndcg10"] / everyone.loc["full", "ndcg10"]
    )
    assert everyone.loc["full", "over_knn"] == pytest.approx(
        everyone.loc["full", "ndcg10"] / everyone.loc["item_knn", "ndcg10"]
    )
    assert everyone["users_per_s"].notna().tolist() == [False, False, True, True, True]
    assert everyone["ndcg10_summed"].notna().tolist() == [False, False, True, True, True]
    assert everyone.loc[rows.BARE, "ndcg10_summed"] == everyone.loc[rows.BARE, "ndcg10"]  # all gains are zero
    made = {"t6_movielens": table, "t6_titles": titles, "t6_gate": gates}

    def read(name):
        if name not in made:
            raise FileNotFoundError(name)
        return pd.read_csv(io.StringIO(made[name].to_csv(index=False)))

    found = t6_findings(read).set_index("name")
    assert found.loc["designs_that_judge", "value"] == (gates["verdict"] == "passes").sum()
    assert found.loc["gate_trained_movielens", "value"] == pytest.approx(gates.loc[0, "ratio"])
    figure = f6_recommendation({"ring": table}, titles, gates)
    assert len(figure.axes) == 3
    assert all(axis.get_title() and axis.get_xlabel() for axis in figure.axes)
    assert [label.get_text() for label in figure.axes[2].get_yticklabels()] == gates["design"].tolist()


def test_a_compact_model_is_judged_where_a_gate_passes():
    gates = pd.DataFrame({"dataset": ["ring", "ring"], "design": ["trained", "titles"], "ndcg10_full": 0.2,
                          "ndcg10_no_layers": 0.1, "ratio": [2.0, 1.0], "lo": [1.5, 0.9], "hi": [2.5, 1.1],
                          "trainings": 3, "users": 16, "verdict": ["passes", "fails"]})  # fmt: skip
    row = {"dataset": "ring", "n_users": 16, "train_on": "sample", "body": "none", "ndcg10": 0.1, "share_of_full": 0.9,
           "share_of_full_lo": 0.8, "share_of_full_hi": 0.95, "n_unseen": 0}  # fmt: skip
    table = pd.DataFrame([{**row, "method": name} for name in ("most_popular", "item_knn", "sasrec")]
                         + [{**row, "method": "trained", "body": "recovered"}])  # fmt: skip
    row |= {"share_of_full": 0.5, "candidates": 4}
    titles = pd.DataFrame([{**row, "model": name} for name in ("full", "recovered", rows.KNN)])
    made = {"t6_movielens": table, "t6_amazon": table, "t6_titles": titles, "t6_gate": gates}
    found = t6_findings(made.__getitem__).set_index("name")
    assert found.loc["share_of_full_least", ["value", "lo", "hi", "n"]].tolist() == [0.9, 0.8, 0.95, 16]
    assert "share_of_full_titles_movielens" not in found.index
    gains = [1, 1 / np.log2(3), 1 / 2, 1 / np.log2(5)]
    assert found.loc["ndcg10_titles_by_chance", "value"] == pytest.approx(np.mean(gains))
    made["t6_gate"] = gates.assign(verdict="fails")
    assert "share_of_full_least" not in t6_findings(made.__getitem__)["name"].tolist()
