"""Zero-shot accuracy: the harness on made-up items against log-likelihoods by hand."""

import gzip
import json

import pytest
import torch
from conftest import build_model

from paper_src.baselines import zero_shot

STORIES = ["the cat sat on the mat", "a dog ran to the door", "one two three four", "red green blue", "up and down"]
GOALS = [
    {"goal": f"make {thing}", "sol1": first, "sol2": second, "label": label}
    for thing, first, second, label in [
        ("tea", "boil it", "freeze all of it", 0), ("ice", "freeze it", "burn", 0), ("bread", "bake", "read", 0),
        ("noise", "be still", "shout aloud", 1), ("light", "sleep", "burn a lamp", 1),
    ]
]  # fmt: skip


@pytest.fixture
def model():
    return build_model("llama", vocab_size=300, max_position_embeddings=256)


def log_likelihood(model, tokenizer, context, continuation):
    """Sum of log p of the continuation's tokens, and whether each is the most probable one."""
    head = tokenizer(context)["input_ids"]  # <s> before it, as this tokenizer does
    tail = tokenizer(continuation, add_special_tokens=False)["input_ids"]
    log_p = model(torch.tensor([[*head, *tail]])).logits[0].log_softmax(-1)[len(head) - 1 : -1]
    return float(log_p[torch.arange(len(tail)), tail].sum()), log_p.argmax(-1).tolist() == tail


@torch.no_grad()
def test_multiple_choice_is_the_highest_log_likelihood_a_byte(model, tokenizer):
    right = []
    for row in GOALS:
        context = f"Question: {row['goal']}\nAnswer:"
        scores = [log_likelihood(model, tokenizer, context, f" {row[key]}")[0] / len(row[key])
                  for key in ("sol1", "sol2")]  # fmt: skip
        right.append(scores.index(max(scores)) == row["label"])
    found = zero_shot.zero_shot(model, tokenizer, [zero_shot.Items("piqa", GOALS, "")])
    share = sum(right) / 5
    assert found["piqa_acc_norm"] == pytest.approx(share)
    half = 1.96 * (share * (1 - share) / 5 + 1.96**2 / 100) ** 0.5  # Wilson's interval, by hand
    middle, scale = share + 1.96**2 / 10, 1 + 1.96**2 / 5
    ends = [found["piqa_acc_norm_lo"], found["piqa_acc_norm_hi"]]
    assert ends == pytest.approx([(middle - half) / scale, (middle + half) / scale], abs=1e-3)
    assert found["piqa_n"] == 5


@torch.no_grad()
def test_lambada_asks_for_the_last_word(model, tokenizer):
    """The model is made to answer the first story rightly: then one of five, by hand as by the harness."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ids = torch.tensor([tokenizer(STORIES[0])["input_ids"]])
    with torch.enable_grad():
        for _ in range(60):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()
    hits = [log_likelihood(model, tokenizer, *_split(story))[1] for story in STORIES]
    assert hits[0]
    rows = [{"text": story} for story in STORIES]
    found = zero_shot.zero_shot(model, tokenizer, [zero_shot.Items("lambada_openai", rows, "")])
    assert found["lambada_openai_acc"] == pytest.approx(sum(hits) / 5)


def _split(story):
    context, _, last = story.rpartition(" ")
    return context, f" {last}"


def test_items_are_read_from_a_folder(tmp_path, refused):
    (tmp_path / "piqa.jsonl").write_text("\n".join(json.dumps(row) for row in GOALS))
    items = zero_shot.load_items("piqa", str(tmp_path))
    assert items.rows == GOALS
    assert len(items.digest) == 64
    with refused("hellaswag.jsonl is missing"):
        zero_shot.load_items("hellaswag", str(tmp_path))
    with refused("task 'winogrande': use one of"):
        zero_shot.load_items("winogrande", str(tmp_path))
    (tmp_path / "piqa.jsonl").write_text('{"goal": ')
    with refused("piqa.jsonl cannot be read"):
        zero_shot.load_items("piqa", str(tmp_path))


def test_requests_of_lambada_become_whole_stories(tmp_path, monkeypatch):
    path = tmp_path / "requests.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps({"request": {"context": "the cat sat on the", "continuation": " mat"}}) + "\n")
    monkeypatch.setattr(zero_shot, "fetch", lambda asset, *others: path)
    assert zero_shot.load_items("lambada_openai").rows == [{"text": "the cat sat on the mat"}]


def test_a_sample_is_without_repetition_and_the_same_for_a_seed():
    items = zero_shot.Items("piqa", [{"n": n} for n in range(20)], "")
    picked = [row["n"] for row in zero_shot.sampled_items(items, 6, 0).rows]
    assert len(set(picked)) == 6
    assert picked == [row["n"] for row in zero_shot.sampled_items(items, 6, 0).rows]
    assert picked != [row["n"] for row in zero_shot.sampled_items(items, 6, 1).rows]
    assert len(zero_shot.sampled_items(items, 99, 0).rows) == 20


def test_columns_name_the_metric():
    assert zero_shot.column("hellaswag") == "hellaswag_acc_norm"
    assert zero_shot.column("lambada_openai") == "lambada_openai_acc"
