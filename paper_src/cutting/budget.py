"""How much text each step gets, so that the whole run keeps within its minutes."""

from paper_src.cutting.subject import READ, WRITE, Subject
from paper_src.cutting.texts import LENGTH

SEARCH, WRITTEN, REFIT, TEST = 0.2, 0.06, 0.08, 0.12  # shares of the minutes
LEAST = 0.05  # of the minutes: less is not worth a training
SAVE = 0.03  # of the minutes: for the checkpoint and its report


def search_tokens(subject: Subject) -> int:
    """Tokens of text on which greedy removal ends within its share of the minutes, a multiple of ``LENGTH``."""
    # candidates share half of their layers, and the head costs as much again
    passes = sum(n * n for n in range(subject.k + 1, subject.depth + 1)) / subject.depth
    return min(4096, int(SEARCH * subject.progress.limit / (passes * subject.a_token)) // LENGTH * LENGTH)


def refit_blocks(subject: Subject) -> int:
    """Blocks of the closed form, 16 to 192."""
    return max(16, min(192, int(REFIT * subject.progress.limit / (1.5 * subject.a_token)) // LENGTH))


def windows(subject: Subject) -> tuple[int, int]:
    """Test windows of each own text, and of each other kind; the same when a run goes on."""
    if (known := subject.progress.get("windows")) is None:
        window = 3.5 * subject.works[0].length * subject.a_token  # through the full model and three smaller ones
        half = TEST / 2 * subject.progress.limit / window
        own = len(subject.texts.names)
        others = max(1, len(subject.texts.kinds) - own)
        known = [max(4, min(16, int(half / own))), max(2, min(16, int(half / others)))]
        subject.progress.put("windows", known)
    return tuple(known)


def for_training(subject: Subject) -> float:
    """Seconds that are left for a distillation: testing, timing and saving follow; 0 if it is not worth the while."""
    texts, (own, others) = subject.texts, windows(subject)
    count = own * len(texts.names) + others * (len(texts.kinds) - len(texts.names))
    runs = 30 * READ.length + 40 * (WRITE.length + 20 * WRITE.new_tokens)  # rounds of both models, a warm-up
    after = subject.a_token * (5 * count * subject.works[0].length + runs) + SAVE * subject.progress.limit
    rest = subject.progress.left - after
    return rest if rest >= LEAST * subject.progress.limit else 0.0
