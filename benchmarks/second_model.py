"""Train a small decoder of another family and depth on this paper's text, where no second model is at hand.

    python benchmarks/second_model.py FOLDER [--layers 12] [--width 192] [--steps 800]
    ./reproduce.sh --model FOLDER

GPT-NeoX: rotary positions on a part of each head, attention and MLP side by side, biases, LayerNorm, an untied head;
and a byte-level vocabulary of its own. It is trained on calibration text alone. It is no pretrained model and knows
little beyond that text: what it shows is that the paper runs on another family, and what its layers do there.
"""

import argparse
import math

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from paper_src import data, fidelity, models

END = "<|endoftext|>"
LENGTH = 512  # tokens of a block
BATCH = 4


def tokenizer_of(text: str, size: int) -> PreTrainedTokenizerFast:
    """A byte-level vocabulary of ``size`` tokens, learned from ``text``."""
    learned = Tokenizer(BPE())
    learned.pre_tokenizer, learned.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=letters, show_progress=False)
    learned.train_from_iterator(text.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=learned, eos_token=END, bos_token=END, pad_token=END)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    for name, value in (("layers", 12), ("width", 192), ("vocabulary", 4096), ("steps", 800), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value)
    use = parser.parse_args()

    torch.manual_seed(use.seed)
    text, _ = data.load_text("wikitext-2", "train")
    tokenizer = tokenizer_of(text, use.vocabulary)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    blocks = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    config = GPTNeoXConfig(
        vocab_size=use.vocabulary, hidden_size=use.width, num_hidden_layers=use.layers, num_attention_heads=6,
        intermediate_size=4 * use.width, max_position_embeddings=2048, bos_token_id=0, eos_token_id=0,
        attention_dropout=0.0, hidden_dropout=0.0,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    print(f"{models.count_parameters(model):,} parameters, {len(blocks):,} blocks of {LENGTH} tokens", flush=True)
    arguments = TrainingArguments(
        output_dir=use.folder, max_steps=use.steps, per_device_train_batch_size=BATCH, learning_rate=2e-3,
        warmup_steps=50, lr_scheduler_type="cosine", weight_decay=0.1, bf16=models.pick_dtype() == torch.bfloat16,
        save_strategy="no", logging_steps=50, report_to="none", disable_tqdm=True, seed=use.seed,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    rows = [{"input_ids": block, "labels": block} for block in blocks]
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    model.eval().save_pretrained(use.folder)
    tokenizer.save_pretrained(use.folder)

    held_out = data.token_blocks(tokenizer, data.load_text("wikitext-2", "valid")[0], 32, LENGTH, 0)
    found = fidelity.compare(model, fidelity.reference(model, held_out, metrics=["nll_nats"]), metrics=["nll_nats"])
    nll, uniform = found["nll_nats"].mean(), math.log(use.vocabulary)
    print(f"validation text: {nll:.3f} nats/token (uniform {uniform:.3f}), perplexity {math.exp(nll):.1f}")


if __name__ == "__main__":
    main()
