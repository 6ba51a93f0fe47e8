"""Do searches keep the same layers: overlaps by hand, and looks on other text for each generation."""

import pandas as pd
import pytest

from paper_src.coalitions import Cost, Evaluator
from paper_src.reporting.findings import Findings
from paper_src.sections import searches


def test_overlaps_by_hand():
    found = [
        ("sleb", "nll_nats", 0, (0, 1, 2)), ("sleb", "nll_nats", 1, (0, 1, 3)), ("sleb", "nll_nats", 2, (0, 1, 2)),
        ("sleb", "kl_nats", 0, (0, 4, 5)), ("swap", "nll_nats", 0, (0, 1, 2)),
    ]  # fmt: skip
    runs = [dict(zip(("strategy", "objective", "seed", "kept"), row, strict=True), k=3) for row in found]
    table = searches.t2_stability(runs)
    assert table.columns.tolist() == ["strategy", "k", "objective", "seed", "kept"]
    draws = pd.DataFrame({"strategy": "random", "k": 3, "kept": ["0 1 2", "3 4 5", "0 1 2"]})
    rows = searches.t2_overlap(table, draws).set_index(["strategy", "differs"])
    # three pairs of seeds by the first loss: 2 of 4, 3 of 3, 2 of 4 layers; none by the second
    assert rows.loc[("sleb", "seed"), ["pairs", "identical"]].tolist() == [3, 1]
    assert rows.loc[("sleb", "seed"), "jaccard"] == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert rows.loc[("sleb", "objective"), ["pairs", "jaccard", "identical"]].tolist() == [1, 1 / 5, 0]
    assert rows.loc[("random", "draw"), ["pairs", "identical"]].tolist() == [3, 1]
    assert rows.loc[("random", "draw"), "jaccard"] == pytest.approx(1 / 3)
    assert rows.loc[("swap", "seed"), "pairs"] == 0  # one run has no pair
    assert rows.loc[[("swap", "seed")], "jaccard"].isna().all()
    collected = Findings()
    searches.stability(collected, rows.reset_index())
    frame = collected.frame().set_index("name")
    assert frame.loc["same_layers_seed_sleb", ["n", "text"]].tolist() == [3, "1 of 3"]
    assert frame.loc["same_layers_by_chance", "value"] == pytest.approx(1 / 3)


def test_each_generation_sees_the_next_blocks_and_their_cost_is_counted(llama, make_blocks):
    pool, cost = make_blocks(5, 12), Cost()
    looks = searches.fresh_looks(llama, pool, [1, 2], cost)
    for generation in range(4):  # the third part has one block, the fourth generation the first part again
        [(few, survivors), (many, last)] = next(looks)
        part = pool[[[0, 1], [2, 3], [4], [0, 1]][generation]]
        assert (survivors, last) == (2, 1)
        assert few.losses([(0, 2)]) == Evaluator(llama, part[:1], ["kl_nats"]).losses([(0, 2)])
        assert many.losses([(0, 2)]) == Evaluator(llama, part, ["kl_nats"]).losses([(0, 2)])
    looks.close()
    assert cost.evaluations == 8
    assert cost.forward_tokens == sum(2 * 12 * blocks // 4 for blocks in (1, 2, 1, 2, 1, 1, 1, 2))
