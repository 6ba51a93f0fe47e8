"""The earlier report's claims against our tables, and the summary that is rendered from both.

A claim is a sentence whose numbers are table cells and a condition on those cells. ``expected`` is the
verdict the paper commits to: ``./reproduce.sh check`` fails when the tables no longer give it.
"""

import math
import re
import string
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from paper_src.reporting import facts, reported
from paper_src.reporting.claims_zh import WORDS, Words
from paper_src.reporting.facts import Read, Values


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        name: stable identifier.
        reported: what the earlier report says.
        values: from the tables to the numbers of ``ours``; None where an optional section was not run.
        ours: our finding; its fields are filled from ``values``.
        holds: whether the earlier claim holds on our numbers.
        rule: ``holds`` in words.
        expected: the verdict committed to: True, False, or None where it may go either way with the machine.
        source: table and notebook of the numbers.
        each: what ``{each}`` in ``ours`` stands for: filled from each row of ``values["each"]``, joined.
    """

    name: str
    reported: str
    values: Callable[[Read], Values | None]
    ours: str
    holds: Callable[[dict[str, float]], bool]
    rule: str
    expected: bool | None
    source: str
    each: str = ""

    def told(self, values: dict[str, object], words: Words | None = None) -> str:
        """``ours`` with its numbers, in the language of ``words``."""
        ours, each = (words.ours, words.each) if words else (self.ours, self.each)
        prose = _Prose()
        parts = "; ".join(prose.format(each, **row) for row in values.get("each", []))
        return prose.format(ours, **values | {"each": parts})


class _Prose(string.Formatter):
    """Numbers in sentences: ``{x:times}`` is 46,023 or 1.25, and what was not measured is a dash."""

    def format_field(self, value: object, format_spec: str) -> str:
        if isinstance(value, float) and math.isnan(value):
            return "-"
        if format_spec == "times":
            return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        return super().format_field(value, format_spec)


def table(read: Read, claims: tuple[Claim, ...] | None = None, language: str = "") -> pd.DataFrame:
    """t9_claims: name, what was reported, what we find, whether the claim holds, and the source."""
    rows = []
    for claim in claims or CLAIMS:
        words = WORDS[claim.name] if language else None
        values = claim.values(read)
        if values is None:  # a section that was not run
            continue
        rows.append({
            "name": claim.name,
            "reported": words.reported if words else claim.reported,
            "ours": claim.told(values, words),
            "holds": bool(claim.holds(values)),
            "rule": words.rule if words else claim.rule,
            "expected": claim.expected,
            "source": claim.source,
        })  # fmt: skip
    return pd.DataFrame(rows)


def broken(read: Read) -> list[str]:
    """Names of the claims whose verdict is not the expected one; empty when the paper stands."""
    frame = table(read)
    wrong = frame[frame["expected"].notna() & (frame["holds"] != frame["expected"])]
    return wrong["name"].tolist()


def summary(read: Read, claims: pd.DataFrame, language: str = "") -> str:
    """The text of SUMMARY.md, or of SUMMARY.zh-CN.md for the language ``zh-CN``, with the claims of :func:`table`."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False, loader=loader
    )
    template = environment.get_template(f"summary.{language}.md.j2" if language else "summary.md.j2")
    return template.render(claims=claims.to_dict("records"), fidelity=facts.main_rows(read), **facts.all_facts(read))


RECOMMENDS = Claim(
    name="recommendation",
    reported="Left open: is quality kept on real recommendation data (MovieLens, Amazon)?",
    values=facts.still_recommends,
    ours="Trained on a sample of users, ranked over the whole catalogue, the smallest model keeps: {each}.",
    each="{dataset}: NDCG@10 {ndcg10:.4f}, {share_of_full:.0%} [{share_lo:.0%}, {share_hi:.0%}] of the full "
    "model's, at {speedup:.2f} times its speed (without any layer {bare:.4f}, the ratio "
    "[{over_no_layers_lo:.2f}, {over_no_layers_hi:.2f}]; most popular {popular:.4f}; SASRec on the same users "
    "{same:.4f}; on all users SASRec {everyone:.4f}, no layers {bare_everyone:.4f})",
    holds=lambda v: v["lowest"] >= 0.95 and v["lead"] > 0 and v["gain"] > 1,
    rule="on every data set the interval's lower end at 95% of the full model's NDCG@10, more than the most "
    "popular items have, and more than the same training without any layer: else the layers have no say",
    expected=None,
    source="t6_movielens, t6_amazon (06_recommendation)",
)

PRUNED = Claim(
    name="against-pruning",
    reported="Left open: is cutting layers better than pruning to the same size?",
    values=facts.pruned,
    ours="At the size of k = {k}, after the same short distillation (at most {seconds:.0f} s; cut layers are first "
    "refitted, the others start as they are): layers cut {cut:.2f} [{cut_lo:.2f}, {cut_hi:.2f}] times the full model's "
    "perplexity at {cut_x:.2f} times its speed, narrower layers {width:.2f} [{width_lo:.2f}, {width_hi:.2f}] at "
    "{width_x:.2f}, low rank {thin:.2f} [{thin_lo:.2f}, {thin_hi:.2f}] at {thin_x:.2f} (lowest after it: {best}, "
    "{best_ppl:.2f}). Half of the weights set to zero (Wanda, untrained) make no smaller model: {zeros:.2f} at "
    "{zeros_x:.2f}.",
    holds=lambda v: v["cut"] <= v["best_ppl"] and v["cut_hi"] < v["least_other"] and v["cut_x"] >= 3,
    rule="at 3 times the speed, the lowest perplexity of all at this size, its interval below that of every method "
    "that cuts no layers",
    expected=None,
    source="t7_baselines (07_baselines)",
)

QUANTIZED = Claim(
    name="against-quantization",
    reported="Left open: is cutting layers better than quantization?",
    values=facts.quantized,
    ours="Untrained int8 weights: {int8:.3f} times the full model's perplexity [{int8_lo:.3f}, {int8_hi:.3f}] at "
    "{int8_x:.2f} times its speed and {int8_share:.0%} of the float32 bytes; k = {k}, repaired (section 5): {cut:.2f} "
    "[{cut_lo:.2f}, {cut_hi:.2f}] at {cut_x:.2f} and {cut_share:.0%}; that one in int8: {both:.2f} at {both_x:.2f} and "
    "{both_share:.0%}.",
    holds=lambda v: v["cut_lo"] <= v["int8_hi"],
    rule="the smallest model's perplexity reaches that of int8 weights, by their intervals",
    expected=None,
    source="t7_baselines (07_baselines)",
)


def with_larger_budget(claim: Claim, name: str, asked: str) -> Claim:
    """``claim``, asked of the run with larger budgets: the same rule on the tables of ``long/``."""
    source = re.sub(r"\bt(?=\d_)", "long/t", claim.source)
    return replace(claim, name=name, reported=asked, values=facts.with_larger_budgets(claim.values), source=source)


CLAIMS = (
    Claim(
        name="first-and-last",
        reported="The most important layers are the first 9 and the last 1 (10 of 32).",
        values=facts.pattern,
        ours="Carried over to {depth} layers, that pattern has {overlap} of the {of} best by our combined score and "
        "{fisher} of {of} by Fisher information (halves of the text agree with tau {tau:.2f}), {chance:.1f} by chance; "
        "by the combined score the first layer ranks {first_rank}, the last {last_rank} of {depth}.",
        holds=lambda v: min(v["overlap"], v["fisher"]) >= 0.8 * v["of"],
        rule="80% of the pattern by both scores",
        expected=None,
        source="t1_importance (01_importance)",
    ),
    Claim(
        name="recommended-layers",
        reported="Distributed selection recommends layers " + ", ".join(map(str, reported.RECOMMENDED)) + " of 32.",
        values=facts.recommended,
        ours="Carried over by relative depth, {fisher} of the {of} layers chosen by Fisher information are among "
        "these, and {combined} of those chosen by our combined score ({chance:.1f} by chance).",
        holds=lambda v: min(v["combined"], v["fisher"]) >= 0.75 * v["of"],
        rule="75% of the layers by both scores",
        expected=None,
        source="t2_selection (02_selection)",
    ),
    Claim(
        name="speed-of-recommended",
        reported=f"Keeping 8 of 32 layers (layer compression {reported.LAYER_COMPRESSION:.2f}) is "
        f"{reported.SPEEDUP:.2f} times as fast.",
        values=facts.largest_speedup,
        ours="k = {k}: {speedup:.2f} times [{speedup_lo:.2f}, {speedup_hi:.2f}] for prefill of hidden states, "
        "{share_of_ideal:.0%} of the ideal {ideal:.2f}.",
        holds=lambda v: v["speedup_hi"] >= reported.SPEEDUP,
        rule="the interval reaches the reported speedup",
        expected=True,
        source="t3_speed (03_compaction)",
    ),
    Claim(
        name="speed-range",
        reported=f"Over all configurations the speedup is {reported.SPEEDUP_RANGE[0]}-{reported.SPEEDUP_RANGE[1]} "
        f"at a layer compression of {reported.COMPRESSION_RANGE[0]}-{reported.COMPRESSION_RANGE[1]}.",
        values=facts.speed_range,
        ours="k = {k} (layers divided by {compression}): {hidden_low:.2f}-{hidden_high:.2f} for prefill of hidden "
        "states, {head_low:.2f}-{head_high:.2f} where the uncut head has a part (prefill with logits, decode).",
        holds=lambda v: min(v["hidden_low"], v["head_low"]) >= reported.SPEEDUP_RANGE[0],
        rule="at these compressions nothing is slower than the reported range",
        expected=None,
        source="t3_speed (03_compaction)",
    ),
    Claim(
        name="parameters",
        reported=f"Keeping 8 of 32 layers divides the parameters by {reported.PARAMETER_COMPRESSION:.2f}.",
        values=facts.smallest_size,
        ours="k = {k}: parameters divided by {parameter_compression:.2f}, layers by {layer_compression:.2f}; "
        "embedding and head are not cut.",
        holds=lambda v: v["parameter_compression"] >= reported.PARAMETER_COMPRESSION,
        rule="at least the reported factor",
        expected=True,
        source="t3_size (03_compaction)",
    ),
    Claim(
        name="cosine-means-something",
        reported=f"The compact models reach cosine {reported.COSINE_RANGE[0]}-{reported.COSINE_RANGE[1]} to the full "
        "model, read as partly kept semantics.",
        values=facts.cosines,
        ours="k = {k}: {own:.2f} for the recommended kind ({low:.2f}-{high:.2f} over gradient scores), but a constant "
        "vector reaches {trivial:.2f}; centred cosine {own_centred:.2f}, perplexity {own_ppl:times} times the full "
        "model's (constant: {trivial_ppl:times} times).",
        holds=lambda v: v["own"] > v["trivial"],
        rule="above the constant's cosine",
        expected=False,
        source="t4_fidelity (04_fidelity)",
    ),
    Claim(
        name="cosine-target",
        reported=f"A cosine above {reported.COSINE_TARGET} is the target.",
        values=facts.cosines,
        ours="k = {k}, no training: the best of all selections reaches {best:.2f} (centred {best_centred:.2f}, "
        "perplexity {best_ppl:times} times the full model's).",
        holds=lambda v: v["best"] > reported.COSINE_TARGET,
        rule="any selection above the target",
        expected=False,
        source="t4_fidelity (04_fidelity)",
    ),
    Claim(
        name="gradient-scores-select",
        reported="Layers with high Fisher information and gradient norm are the ones to keep.",
        values=facts.against_random,
        ours="By gradient scores and the combined one, {top_k_better} of {top_k} different Top-K selections have a "
        "lower perplexity than random selections at p <= 0.05, and {top_k_worse} do worse than most random draws; "
        "spread over the depth, {distributed_better} of {distributed} are better and {distributed_worse} worse.",
        holds=lambda v: v["top_k_better"] > v["top_k"] / 2,
        rule="more than half of the Top-K selections better than random at p <= 0.05",
        expected=False,
        source="t4_fidelity, t4_random (04_fidelity)",
    ),
    Claim(
        name="distributed-beats-top-k",
        reported="Spreading the kept layers over the depth is better than Top-K.",
        values=facts.distributed,
        ours="By gradient scores and the combined one, distributed has the lower perplexity in {wins} of {of} "
        "different pairs (score and k), by activation statistics in {activation_wins} of {activation_of}.",
        holds=lambda v: (
            v["wins"] >= 0.75 * max(v["of"], 1) and v["activation_wins"] >= 0.75 * max(v["activation_of"], 1)
        ),
        rule="lower perplexity in 75% of the pairs of both kinds of scores",
        expected=False,
        source="t4_fidelity (04_fidelity)",
    ),
    Claim(
        name="fisher-says-what-layers-are-worth",
        reported="Fisher information and gradient norm say which layers matter; SHAP was skipped.",
        values=facts.worth,
        ours="Kendall's tau of Fisher with the loss without each layer is {loo:.2f} [{loo_lo:.2f}, {loo_hi:.2f}], with "
        "Shapley values {shapley:.2f} [{shapley_lo:.2f}, {shapley_hi:.2f}]; nearest to leave-one-out is {best} "
        "({best_tau:.2f}, with Shapley {best_shapley:.2f}).",
        holds=lambda v: min(v["loo_lo"], v["shapley_lo"]) > 0.5,
        rule="both intervals above 0.5",
        expected=None,
        source="t1_agreement (01_importance)",
    ),
    Claim(
        name="first-and-last-are-worth-most",
        reported="The most important layers are the first 9 and the last 1, by scores without SHAP.",
        values=facts.causal_pattern,
        ours="Asked of the model itself: that pattern has {leave_one_out} of the {of} layers whose removal costs "
        "most and {shapley} of the {of} of highest Shapley value (standard error at most {relative_error:.1%} of the "
        "largest, {coalitions:,} coalitions).",
        holds=lambda v: min(v["leave_one_out"], v["shapley"]) >= 0.8 * v["of"],
        rule="80% of the pattern by both",
        expected=None,
        source="t1_importance, t1_causal (01_importance)",
    ),
    Claim(
        name="recommended-is-best",
        reported="The distributed selection is the one to recommend.",
        values=facts.recommended_or_chosen,
        ours="k = {k}, test text: {own:times} times the full model's perplexity, cosine {own_cosine:.2f}; layers "
        "{chosen_kept}, chosen on validation text ({name}), {chosen:times} times, cosine {chosen_cosine:.2f}.",
        holds=lambda v: v["own"] <= v["chosen"],
        rule="perplexity no higher than that of what validation text chooses",
        expected=False,
        source="t4_fidelity (04_fidelity), t2_strategies (02_selection)",
    ),
    Claim(
        name="cosine-after-recovery",
        reported=f"Left open: does fine-tuning the kept layers bring a cosine above {reported.COSINE_TARGET}?",
        values=facts.repaired,
        ours="k = {k}, closed form on {refit:,} tokens, distillation on {distil:,}, passes counted: cosine "
        "{cosine:.2f} (centred {centred:.2f}, constant {trivial:.2f}), the same likeliest next token in "
        "{agreement:.0%}, perplexity {ppl:.2f} times the full model's ({cut:times} before), {mean:.2f} times over "
        "all kinds of text; k = {large_k}: cosine {large_cosine:.2f}, {large_ppl:.2f} times.",
        holds=lambda v: v["cosine"] >= reported.COSINE_TARGET,
        rule="the smallest model reaches the target on test text",
        expected=None,
        source="t5_recovery (05_recovery)",
    ),
    Claim(
        name="cosine-after-longer-recovery",
        reported=f"Left open: does fine-tuning bring a cosine above {reported.COSINE_TARGET}? With a larger budget.",
        values=facts.with_larger_budgets(facts.repaired),
        ours="k = {k}, closed form on {refit:,} tokens, distillation on {distil:,}, passes counted: cosine "
        "{cosine:.2f} (centred {centred:.2f}), the same likeliest next token in {agreement:.0%}, "
        "perplexity {ppl:.2f} times the full model's, {mean:.2f} times over all kinds of text.",
        holds=lambda v: v["cosine"] >= reported.COSINE_TARGET,
        rule="the smallest model reaches the target on test text",
        expected=None,
        source="long/t5_recovery (05_recovery)",
    ),
    PRUNED,
    with_larger_budget(
        PRUNED,
        "against-pruning-with-more-training",
        "Left open: is cutting layers better than pruning to the same size? With a larger budget.",
    ),
    QUANTIZED,
    with_larger_budget(
        QUANTIZED,
        "against-quantization-with-more-training",
        "Left open: is cutting layers better than quantization? With a larger budget.",
    ),
    RECOMMENDS,
    with_larger_budget(
        RECOMMENDS,
        "recommendation-with-more-users",
        "Left open: is quality kept on real recommendation data? With more users.",
    ),
)
