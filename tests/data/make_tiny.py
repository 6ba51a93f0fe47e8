"""Make the test fixture: a synthetic text (tiny-text) and a small Llama trained on it (tiny-llama).

Run it from the root of the repository: ``python tests/data/make_tiny.py``. Every run writes the same
text and tokenizer; the weights depend on the machine in their last digits, so the files in the
repository are the reference and the tests read those.
"""

import itertools
import math
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
SEED = 7
SIZES = {"train": 150_000, "valid": 40_000, "test": 40_000}  # bytes of text
SPECIAL = "<|endoftext|>"  # begins some training windows; also the end and padding token
WINDOW, BATCH, STEPS, PEAK_LR = 512, 8, 500, 3e-3

WOMEN = ["Anna", "Bela", "Cora", "Dina", "Edda", "Fenna", "Greta", "Hilde", "Irma", "Jona", "Karin", "Lena"]
MEN = ["Adam", "Boris", "Carl", "David", "Emil", "Felix", "Georg", "Hugo", "Ivan", "Jakob", "Klaus", "Lukas"]
JOBS = ["baker", "weaver", "sailor", "miller", "potter", "farmer", "painter", "teacher"]
TIES = ["friend", "cousin", "neighbour", "helper"]
PLACES = ["mill", "harbour", "market", "bridge", "forest", "tower", "garden", "well"]
ADJECTIVES = ["red", "blue", "small", "heavy", "broken", "golden"]
VOWEL_ADJECTIVES = ["old", "empty"]  # apart, since "an" goes before them
NOUNS = ["lamp", "drum", "key", "rope", "bowl", "knife", "book", "coat", "ring", "basket", "umbrella", "axe"]
FRUITS = ["apples", "pears", "plums", "nuts", "eggs", "onions"]
MOODS = ["tired", "happy", "hungry", "quiet"]
TIMES = ["Then", "Later", "After that", "At noon", "Before long"]
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
KINDS = [WOMEN, MEN, JOBS, TIES, PLACES, ADJECTIVES, VOWEL_ADJECTIVES, NOUNS, FRUITS, MOODS]


@dataclass
class Person:
    """One character of a story, with all that a later sentence may ask about."""

    name: str
    female: bool
    job: str
    place: str
    things: list[str] = field(default_factory=list)
    fruit: str = ""
    count: int = 0

    @property
    def they(self) -> str:
        """Return the pronoun of the subject."""
        return "she" if self.female else "he"

    @property
    def their(self) -> str:
        """Return the possessive pronoun."""
        return "her" if self.female else "his"


def listed(words: list[str]) -> str:
    """Join words as in a sentence: a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def some(thing: str) -> str:
    """Put the indefinite article before a thing."""
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


def number_of_things(person: Person) -> str:
    """Say how many things a person has."""
    count = len(person.things)
    return "nothing" if not count else f"{NUMBERS[count]} thing{'s' if count > 1 else ''}"


def held(person: Person) -> str:
    """List the things of a person, in the order in which they came."""
    return listed([f"the {thing}" for thing in person.things]) if person.things else "nothing"


def move(people: list[Person], rng: random.Random) -> str:
    """Let somebody walk to another place, and say who was there already."""
    who = rng.choice(people)
    old, who.place = who.place, rng.choice([place for place in PLACES if place != who.place])
    met = [other.name for other in people if other is not who and other.place == who.place]
    there = f"{listed(met)} {'were' if len(met) > 1 else 'was'}" if met else "Nobody was"
    return f"{rng.choice(TIMES)} {who.name} walked from the {old} to the {who.place}. {there} there."


def give(people: list[Person], rng: random.Random) -> str:
    """Hand a thing over and count what both have now."""
    giver = rng.choice([person for person in people if person.things])
    taker = rng.choice([person for person in people if person is not giver])
    thing = giver.things.pop(rng.randrange(len(giver.things)))
    taker.things.append(thing)
    now = f"{giver.name} had {number_of_things(giver)} and {taker.name} had {number_of_things(taker)}"
    return f"{rng.choice(TIMES)} {giver.name} gave the {thing} to {taker.name}. Now {now}."


def ask_who(people: list[Person], rng: random.Random) -> str:
    """Ask who has a thing."""
    holder = rng.choice([person for person in people if person.things])
    asking, answering = rng.sample(people, 2)
    thing = rng.choice(holder.things)
    answer = "I have" if answering is holder else f"{holder.name} has"
    return f'"Who has the {thing}?" asked {asking.name}. "{answer} it," said {answering.name}.'


def ask_where(people: list[Person], rng: random.Random) -> str:
    """Ask where a person is."""
    who = rng.choice(people)
    return f"Where was {who.name} the {who.job}? {who.they.capitalize()} was at the {who.place}."


def lay_out(people: list[Person], rng: random.Random) -> str:
    """List everything a person has."""
    who = rng.choice([person for person in people if person.things])
    return f"{who.name} laid out all that {who.they} had: {held(who)}."


def count_fruit(people: list[Person], rng: random.Random) -> str:
    """Count somebody's fruit one by one."""
    who = rng.choice(people)
    if not who.count:
        return f"{who.name} had no {who.fruit} to count."
    return f"{who.name} counted {who.their} {who.fruit}: {', '.join(NUMBERS[1 : who.count + 1])}."


def eat_fruit(people: list[Person], rng: random.Random) -> str:
    """Eat some fruit and say how much is left."""
    who = rng.choice(people)
    if not who.count:
        return f"{who.name} had no {who.fruit} to eat."
    eaten = rng.randint(1, who.count)
    who.count -= eaten
    left = f"{NUMBERS[who.count]} {'was' if who.count == 1 else 'were'} left"
    return f"{rng.choice(TIMES)} {who.name} ate {NUMBERS[eaten]} of {who.their} {who.fruit}, so {left}."


def mood(people: list[Person], rng: random.Random) -> str:
    """Make a verb agree with a subject that stands some words before it."""
    one, two = rng.sample(people, 2)
    if rng.random() < 0.5:
        return f"The {one.job} with the {one.fruit} was {rng.choice(MOODS)}."
    return f"The {one.fruit} of the {one.job} and the {two.fruit} of the {two.job} were good."


EVENTS = [move, move, give, give, ask_who, ask_who, ask_where, lay_out, count_fruit, eat_fruit, mood]


def opening(people: list[Person], rng: random.Random) -> str:
    """Introduce the people and what they have."""
    first, second, third = people
    lines = [
        f"{first.name} was a {first.job}.",
        f"{second.name} was {first.their} {rng.choice(TIES)}, a {second.job}.",
        f"They knew {third.name}, a {third.job}.",
    ]
    for who in people:
        had = f"{number_of_things(who)}: {listed([some(thing) for thing in who.things])}"
        lines.append(f"{who.name} was at the {who.place} and had {had}.")
        lines.append(f"{who.they.capitalize()} also had {NUMBERS[who.count]} {who.fruit}.")
    return " ".join(lines)


def make_story(pair: tuple[str, str], rng: random.Random) -> str:
    """Tell one story about a pair of names and a third person: the opening, some events, the end."""
    pair = rng.sample(pair, 2)
    names = [*pair, rng.choice([name for name in WOMEN + MEN if name not in pair])]
    jobs, fruits, nouns = rng.sample(JOBS, 3), rng.sample(FRUITS, 3), rng.sample(NOUNS, 6)
    adjectives = ADJECTIVES + VOWEL_ADJECTIVES
    people = []
    for name, job, fruit in zip(names, jobs, fruits, strict=True):
        who = Person(name, name in WOMEN, job, rng.choice(PLACES), fruit=fruit, count=rng.randint(2, 7))
        who.things = [f"{rng.choice(adjectives)} {nouns.pop()}" for _ in range(rng.randint(1, 2))]
        people.append(who)
    lines = [opening(people, rng)]
    for _ in range(rng.randint(2, 3)):
        lines.append(" ".join(rng.choice(EVENTS)(people, rng) for _ in range(4)))
    end = listed([f"{who.name} went home with {held(who)}" for who in people])
    return "\n".join([*lines, f"In the evening {end}."])


def make_texts() -> dict[str, str]:
    """Make the three texts; each story has its own pair of names, so no two parts share a story."""
    rng = random.Random(SEED)
    pairs = list(itertools.combinations(WOMEN + MEN, 2))
    rng.shuffle(pairs)
    texts = {}
    for part, size in SIZES.items():
        stories = []
        while sum(map(len, stories)) + 2 * len(stories) < size:
            stories.append(make_story(pairs.pop(), rng))
        texts[part] = "\n\n".join(stories) + "\n"
    return texts


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of 512 entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=[SPECIAL], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL,
        eos_token=SPECIAL,
        pad_token=SPECIAL,
        model_max_length=512,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """Return the token ids of a text as one row."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def make_model() -> LlamaForCausalLM:
    """Make the untrained model."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, ids: torch.Tensor, window: int = 512) -> float:
    """Return the perplexity over whole windows that do not overlap."""
    model.eval()
    batch = ids[: len(ids) // window * window].view(-1, window)
    return math.exp(model(input_ids=batch, labels=batch).loss.item())


def renamed(story: str, rng: random.Random) -> str:
    """Swap the words of every kind among themselves: the same story about other people and things.

    >>> renamed("Anna saw Anna.", random.Random(0))
    'Greta saw Greta.'
    """
    other = {}
    for words in KINDS:
        other.update(zip(words, rng.sample(words, len(words)), strict=True))
    return re.sub(r"\w+", lambda match: other.get(match[0], match[0]), story)


def windows(text: str, tokenizer: PreTrainedTokenizerFast) -> Iterator[torch.Tensor]:
    """Yield batches of windows without end, the stories renamed and shuffled for each pass."""
    rng = random.Random(SEED)
    stories = text.strip().split("\n\n")
    while True:
        rng.shuffle(stories)
        ids = encode(tokenizer, "\n\n".join(renamed(story, rng) for story in stories))
        size = BATCH * WINDOW
        for start in range(0, len(ids) - size + 1, size):
            batch = ids[start : start + size].view(BATCH, WINDOW)
            batch[: BATCH // 2, 0] = 0  # half of the windows begin with the special token
            yield batch


def train(model: LlamaForCausalLM, batches: Iterator[torch.Tensor], valid: torch.Tensor) -> None:
    """Train with AdamW: a short warm-up, then a cosine down to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
    )
    start = time.perf_counter()
    for step, batch in enumerate(itertools.islice(batches, STEPS), start=1):
        model.train()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            now = f"train {loss.exp():.3f}, valid {perplexity(model, valid):.3f}"
            print(f"step {step}: {now}, {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    """Write the texts, the tokenizer and the trained model beside this script."""
    torch.set_num_threads(1)  # a model this small gains little from more
    texts = make_texts()
    (HERE / "tiny-text").mkdir(exist_ok=True)
    for part, text in texts.items():
        (HERE / "tiny-text" / f"{part}.txt").write_text(text, encoding="utf-8", newline="\n")
    tokenizer = train_tokenizer(texts["train"])
    model = make_model()
    train(model, windows(texts["train"], tokenizer), encode(tokenizer, texts["valid"]))
    model.save_pretrained(HERE / "tiny-llama")
    tokenizer.save_pretrained(HERE / "tiny-llama")


if __name__ == "__main__":
    main()
