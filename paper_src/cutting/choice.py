"""Which layers stay: the candidates there is time for, refitted, ranked on validation text."""

from paper_src import InputError, NotSupported, compaction
from paper_src.coalitions import Evaluator, leave_one_out
from paper_src.cutting import budget
from paper_src.cutting.judging import Validation
from paper_src.cutting.repair import closed_form
from paper_src.cutting.subject import Subject
from paper_src.cutting.texts import LENGTH
from paper_src.scale.store import Store
from paper_src.scoring import score_layers, weight_taylor
from paper_src.selection import STRATEGIES, KeptLayers, Search, drop_block, kept_text, sleb, top_k

HOPELESS = 5.0  # times the perplexity of the best candidate: no refit makes up for that


def ranked(subject: Subject, validation: Validation) -> list[dict[str, object]]:
    """A row for each candidate, best first: name, kept layers, ``ppl_ratio`` on validation text after a refit."""
    if (known := subject.progress.get("candidates")) is None:
        rows, blocks = [], subject.texts.blocks("train", 16, subject.request.seed + 1)
        cut, refused = {}, None
        for name, kept in candidates(subject).items():
            try:
                small = compaction.compact(subject.full, kept)
            except InputError as error:  # this family cannot do with these layers alone
                subject.progress.note(f"not {strategy_title(name)}: {error}")
                refused = error
            else:
                cut[name, kept] = validation.ratio(small)
        if not cut:
            raise refused
        for (name, kept), before in cut.items():
            near = len(cut) > 1 and before < HOPELESS * min(cut.values())
            after = validation.ratio(closed_form(subject, kept, blocks)) if near else before
            row = {"name": name, "kept": kept_text(kept), "cut": before, "ppl_ratio": after, "refitted": near}
            rows.append(row)
            then = f"{after:.2f} refitted" if near else "not refitted"
            subject.progress.say(f"{strategy_title(name)}: {before:.2f} times the full perplexity, {then}")
        known = subject.progress.finish("candidates", sorted(rows, key=lambda row: row["ppl_ratio"]))
    subject.progress.say(f"kept layers: {known[0]['kept']}")
    return known


def candidates(subject: Subject) -> dict[str, KeptLayers]:
    """Strategy -> kept layers: the one that is asked for, or those there is time for."""
    request, k = subject.request, subject.k
    if request.layers:
        return {"given": tuple(request.layers)}
    if k == subject.depth:
        return {"evenly_spaced": tuple(range(k))}
    tokens = budget.search_tokens(subject)
    if request.strategy:
        return {request.strategy: by_strategy(subject, request.strategy, max(tokens, LENGTH))}
    scores = score_layers(subject.full, subject.texts.blocks("train", 16, request.seed + 1), batch_size=4)
    found = {"shortgpt": top_k(scores.mean("block_influence"), k), "drop_block": drop_block(scores.angular, k)}
    if tokens >= LENGTH:
        try:
            found |= {"sleb": by_strategy(subject, "sleb", tokens)}
        except NotSupported as error:
            subject.progress.note(f"no search, layers are chosen by scores alone: {error}")
    else:
        subject.progress.note("too little time to search: layers are chosen by scores alone")
    by_layers = {kept: name for name, kept in found.items()}  # of the same layers the last name stays
    return {name: kept for kept, name in by_layers.items()}


def by_strategy(subject: Subject, name: str, tokens: int) -> KeptLayers:
    """The layers that one strategy keeps, on so many tokens of calibration text."""
    full, k, seed, strategy = subject.full, subject.k, subject.request.seed, STRATEGIES[name]
    blocks = subject.texts.blocks("train", max(1, tokens // LENGTH), seed + 3)
    store = Store(subject.progress.folder / "evaluations.sqlite", full)
    match strategy.needs:
        case "depth":
            return strategy.function(subject.depth, k)
        case "search":
            subject.progress.say(f"{strategy.title}: searches on {blocks.numel():,} tokens")
            whole = Evaluator(full, blocks, store=store)
            looks = [Evaluator(full, blocks[: -(-len(blocks) // 4)], store=store), whole, whole]
            evolution = {"generations": 15, "offspring": 16, "initial": 32, "seed": seed}
            greedy = {"sleb": sleb(looks[1], k)} if strategy.builds_on else {}
            return strategy.function(Search(looks, evolution=evolution, found=greedy), k)
        case "angular":
            return strategy.function(score_layers(full, blocks, batch_size=4).angular, k)
        case "leave_one_out":
            (losses,) = leave_one_out([Evaluator(full, blocks, store=store)])
            return strategy.function(losses, k)
        case "weight_taylor":
            return strategy.function(weight_taylor(full, blocks[:16]), k)
        case score:
            return strategy.function(score_layers(full, blocks, batch_size=4).mean(score), k)


def strategy_title(name: str) -> str:
    """How layers were chosen, in a word."""
    return STRATEGIES[name].title if name in STRATEGIES else "given"
