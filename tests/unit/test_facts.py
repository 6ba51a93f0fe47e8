"""Facts on small tables whose answers are counted by hand."""

import pandas as pd

from paper_src.reporting import facts


def read_of(**tables):
    return lambda name: tables[name]


def selections(rows):
    columns = ["strategy", "score", "k", "kept", "nll_nats", "p_ppl"]
    return pd.DataFrame(rows, columns=columns)


TABLE = selections([
    ("top_k", "fisher", 2, "0 1", 5.0, 0.9),
    ("distributed", "fisher", 2, "0 3", 4.0, 0.05),
    ("top_k", "grad_norm", 2, "0 1", 5.0, 0.9),  # the same pair: counts once
    ("distributed", "grad_norm", 2, "0 3", 4.0, 0.05),
    ("top_k", "weight_taylor", 2, "0 1", 5.0, 0.9),
    ("distributed", "weight_taylor", 2, "0 3", 4.0, 0.05),
    ("top_k", "shapley", 2, "0 1", 5.0, 0.9),  # of neither kind
    ("distributed", "shapley", 2, "1 2", 4.0, 0.05),
    ("top_k", "combined", 2, "0 2", 3.0, 0.01),
    ("distributed", "combined", 2, "0 2", 3.0, 0.01),  # no pair: nothing to compare
    ("top_k", "activation_variance", 2, "2 3", 4.0, 0.3),
    ("distributed", "activation_variance", 2, "1 3", 6.0, 0.6),
    ("random", None, 2, None, 4.5, None),
])  # fmt: skip


def test_distributed_and_top_k_are_compared_where_they_differ_and_once():
    found = facts.distributed(read_of(t4_fidelity=TABLE))
    assert found == {"wins": 1, "of": 1, "activation_wins": 0, "activation_of": 1}


def test_no_pairs_are_no_wins():
    same = TABLE[TABLE["score"] == "combined"]
    assert facts.distributed(read_of(t4_fidelity=same)) == {
        "wins": 0,
        "of": 0,
        "activation_wins": 0,
        "activation_of": 0,
    }


def test_gradient_selections_against_random_by_strategy():
    found = facts.against_random(read_of(t4_fidelity=TABLE))
    assert found == {
        "top_k": 2, "top_k_better": 1, "top_k_worse": 1,
        "distributed": 2, "distributed_better": 2, "distributed_worse": 0,
    }  # fmt: skip


def test_the_speed_range_is_of_the_reported_compression_alone():
    speed = pd.DataFrame({"k": [12, 11, 8, 8, 4], "speedup": [2.0, 2.6, 3.4, 2.5, 6.0],
                          "task": ["decode", *["prefill_hidden"] * 2, *["decode"] * 2]})  # fmt: skip
    found = facts.speed_range(read_of(t3_speed=speed, t1_importance=pd.DataFrame({"layer": range(30)})))
    assert found == {
        "hidden_low": 2.6, "hidden_high": 3.4, "head_low": 2.5, "head_high": 2.5,
        "k": "8, 11", "compression": "3.75, 2.73",
    }  # 2.7 to 4.0 of 30 layers: 8 to 11  # fmt: skip
    speed["k"] = [12, 10, 10, 10, 6]
    assert facts.speed_range(read_of(t3_speed=speed, t1_importance=pd.DataFrame({"layer": range(26)}))) is None
    speed["k"] = [12, 20, 20, 20, 4]  # 32 / 12 is 2.67, which the report gives as 2.7
    assert facts.speed_range(read_of(t3_speed=speed, t1_importance=pd.DataFrame({"layer": range(32)})))["k"] == "12"


def test_int8_stands_beside_the_smallest_repaired_model_not_a_shortly_recovered_one():
    names = ["int8 weights, torchao", "layers cut, section 5", "layers cut, section 5", "cut, section 5, + int8"]
    table = pd.DataFrame({
        "method": [*names, "layers cut, section 5"], "k": [0, 22, 8, 8, 4], "recovered": [False] * 4 + [True],
        "ppl_ratio": [1.0, 1.6, 4.7, 4.8, 99.0], "ppl_ratio_lo": [0.9, 1.5, 3.8, 3.9, 98.0],
        "ppl_ratio_hi": [1.1, 1.7, 5.9, 6.0, 100.0], "prefill_hidden_speedup": [0.9, 1.3, 3.6, 3.4, 7.0],
        "memory_share": [0.3, 0.4, 0.21, 0.16, 0.1],
    })  # fmt: skip
    found = facts.quantized(read_of(t7_baselines=table))
    assert found["k"] == 8 and (found["int8"], found["cut"], found["both"]) == (1.0, 4.7, 4.8)
    assert (found["cut_lo"], found["cut_x"], found["both_share"]) == (3.8, 3.6, 0.16)


def test_a_fact_of_larger_budgets_reads_their_tables_and_is_none_without_them():
    larger = facts.with_larger_budgets(lambda read: {"rows": len(read("t9"))})
    tables = {"long/t9": pd.DataFrame({"x": [1, 2]}), "t9": pd.DataFrame({"x": [1]})}
    assert larger(tables.__getitem__) == {"rows": 2}

    def missing(name):
        raise FileNotFoundError(name)

    assert larger(missing) is None
