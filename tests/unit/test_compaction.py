"""A compact model computes what the full one computes without the removed layers, in memory and from disk."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from paper_src import compaction
from paper_src.compaction import compact, save
from paper_src.configuration import cut_config
from paper_src.models import count_parameters, decoder_layers, locate_layers
from paper_src.support import files

KEPT = [0, 2, 3]  # of 4 layers

FRESH_PROCESS = """
import sys
sys.modules["paper_src"] = None  # an import of it would raise
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
prompt = torch.load(sys.argv[2])
for use_cache in (True, False):
    print(model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=use_cache).tolist())
"""


@pytest.fixture
def blocks(make_blocks):
    return make_blocks(2, 12)


def without_layers(model, kept):
    """A copy in which every other layer hands on its input: removal by brute force."""

    def skip(layer, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    model = copy.deepcopy(model)
    for index, layer in enumerate(decoder_layers(model)):
        if index not in kept:
            layer.register_forward_hook(skip, with_kwargs=True)
    return model


def greedy(model, prompt, use_cache):
    model.generation_config.eos_token_id = None  # a random model may end at once
    return model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=use_cache)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tree_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# In memory


@torch.no_grad()
def test_keeping_all_layers_gives_the_same_logits(full, blocks):
    assert torch.equal(compact(full, range(4))(blocks).logits, full(blocks).logits)


@torch.no_grad()
@pytest.mark.parametrize("kept", [[0, 2, 3], [1, 3], [2]])
def test_compact_model_is_the_full_one_with_layers_skipped(full, blocks, kept):
    small = compact(full, kept)
    assert type(small) is type(full)
    assert not torch.equal(small(blocks).logits, full(blocks).logits)
    expected = without_layers(full, kept)(blocks, use_cache=False).logits
    torch.testing.assert_close(small(blocks).logits, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_generation_agrees_with_and_without_the_cache(full, blocks):
    small = compact(full, KEPT)
    cached = greedy(small, blocks, use_cache=True)
    assert cached.shape == (2, 24)
    assert torch.equal(cached, greedy(small, blocks, use_cache=False))


def test_removed_parameters_are_counted_exactly(full):
    small = compact(full, [1, 3])
    removed = [count_parameters(decoder_layers(full)[index]) for index in (0, 2)]
    assert count_parameters(full) - count_parameters(small) == sum(removed)
    assert len(decoder_layers(small)) == small.config.num_hidden_layers == 2


def test_compact_model_shares_the_callers_memory(full):
    own = {tensor.data_ptr() for tensor in (*full.parameters(), *full.buffers())}
    small = compact(full, KEPT)
    assert {tensor.data_ptr() for tensor in (*small.parameters(), *small.buffers())} <= own
    last = next(decoder_layers(small)[2].parameters())
    assert last is next(decoder_layers(full)[3].parameters())


@torch.no_grad()
def test_callers_model_and_config_are_unchanged(full, blocks):
    config, modules, logits = full.config.to_dict(), dict(full.named_modules()), full(blocks).logits
    small = compact(full, [1, 3])
    small.config.vocab_size = 7
    assert full.config.to_dict() == config
    assert dict(full.named_modules()) == modules
    assert torch.equal(full(blocks).logits, logits)
    assert not set(small.modules()) & set(full.modules())


def test_compacting_twice_equals_compacting_once(llama, blocks):
    twice = compact(compact(llama, [0, 1, 3]), [1, 2])
    assert torch.equal(twice(blocks).logits, compact(llama, [1, 3])(blocks).logits)


def test_tied_head_stays_tied(make_model):
    small = compact(make_model("llama", tie_word_embeddings=True), KEPT)
    assert small.lm_head.weight is small.model.embed_tokens.weight


@torch.no_grad()
def test_mixture_of_experts_can_be_compacted(make_model, blocks):
    model = make_model("mixtral")
    expected = without_layers(model, KEPT)(blocks, use_cache=False).logits
    torch.testing.assert_close(compact(model, KEPT)(blocks).logits, expected, rtol=0, atol=1e-6)


FULL, SLIDING = "full_attention", "sliding_attention"


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "settings", "name", "expected"),
    [
        ("gemma3_text", {"layer_types": [SLIDING, FULL, SLIDING, FULL]}, "layer_types", [FULL, SLIDING]),
        ("qwen2", {}, "layer_types", [FULL, SLIDING]),  # max_window_layers = 2: the last two slide
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "no_rope_layers", [0, 1]),
    ],
)
def test_per_layer_lists_are_cut(make_model, blocks, tmp_path, family, settings, name, expected):
    model = make_model(family, **settings)
    small = compact(model, [1, 2])
    assert getattr(small.config, name) == expected
    assert len(getattr(model.config, name)) == 4
    save(small, None, tmp_path / "cut", "tiny", [1, 2], 4)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    wanted = without_layers(model, [1, 2])(blocks, use_cache=False).logits
    torch.testing.assert_close(reloaded(blocks).logits, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([], "kept layers are empty: keep at least 1"),
        ([0, 4], "kept layer 4: the model's layers are 0 to 3"),
        ([-1, 2], "kept layer -1: the model's layers are 0 to 3"),
        ([2, 1], r"kept layers \[2, 1\]: give each once, in increasing order"),
        ([0, 1.0], "kept layer 1.0: give whole numbers"),
        ([0, True], "kept layer True: give whole numbers"),
        (["0", 1], "kept layer '0': give whole numbers"),
        ([1, 1, 2], r"kept layers \[1, 1, 2\]: give each once, in increasing order"),
    ],
)
def test_bad_layer_indices_are_refused(llama, kept, message, refused):
    with refused(message):
        compact(llama, kept)


def test_layers_rescaled_by_their_number_are_refused(llama, refused):
    llama.config.rescale_every = 6
    with refused("config.rescale_every ties a layer's function to its number"):
        compact(llama, KEPT)


def test_a_model_that_does_something_between_layers_is_refused(llama, refused, monkeypatch):
    last_hidden = compaction.last_hidden
    monkeypatch.setattr(compaction, "last_hidden", lambda model, ids: 1.01 * last_hidden(model, ids))
    with refused("does something between layers"):
        compact(llama, KEPT)


def test_attention_scaled_by_layer_number_is_refused(make_model, refused):
    with refused("config.scale_attn_by_inverse_layer_idx ties a layer's function to its number"):
        compact(make_model("gpt2", scale_attn_by_inverse_layer_idx=True), KEPT)


def test_layers_that_differ_by_position_are_refused(make_model, refused):
    model = make_model("qwen2_moe", decoder_sparse_step=2)  # every second layer holds experts
    with refused("by a layer's position .* cannot be made a standard checkpoint"):
        compact(model, [0, 2])


def test_numbers_of_other_libraries_are_layers(llama, blocks):
    kept = np.array([0, 2, 3])
    assert torch.equal(compact(llama, kept)(blocks).logits, compact(llama, KEPT)(blocks).logits)


def test_counts_lists_and_dictionaries_of_layers_are_those_of_the_kept(make_model):
    config = make_model("llama").config
    config.first_k_dense_replace, config.num_kv_shared_layers, config.num_dense_layers = 3, 3, 2
    config.moe_layers, config.per_layer_widths = [1, 3], {"0": "a", "2": "b"}
    config.layer_switches, config.num_nextn_predict_layers = [True, False, True, True], 1
    config.layer_token_ids, config.widths = [5, 6, 7, 8], [1, 2, 3, 4]
    small = cut_config(config, [0, 2, 3], 4)
    assert (small.first_k_dense_replace, small.num_kv_shared_layers, small.num_dense_layers) == (2, 2, 1)
    assert (small.moe_layers, small.per_layer_widths) == ([2], {"0": "a", "1": "b"})
    assert small.layer_switches == [True, True, True]
    assert (small.num_hidden_layers, small.num_nextn_predict_layers) == (3, 0)
    assert (small.layer_token_ids, small.widths) == ([5, 6, 7, 8], [1, 2, 3, 4])
    assert cut_config(config, [0, 2, 3], 4, named="").widths == [1, 3, 4]
    assert config.num_hidden_layers == 4 and config.moe_layers == [1, 3]


def test_columns_of_a_table_of_all_layers_are_those_of_the_kept():
    small, rebuilt = nn.Module(), nn.Module()
    small.table = nn.Parameter(torch.arange(8.0).repeat(2, 1))  # four layers, two numbers each
    rebuilt.table = nn.Parameter(torch.zeros(2, 4))
    compaction._cut_tables_(small, rebuilt, "layers", [1, 3], 4)
    assert small.table.tolist() == [[2, 3, 6, 7]] * 2


def test_layers_that_share_what_a_removed_one_computed_are_refused(make_model, refused):
    config = make_model("llama").config
    config.layer_indexers = ["full", "shared", "full", "shared"]
    assert cut_config(config, [0, 1, 2], 4).layer_indexers == ["full", "shared", "full"]
    assert cut_config(config, [0, 2, 3], 4).layer_indexers == ["full", "full", "shared"]
    for kept in ([0, 3], [1, 2], [0, 1, 3]):
        with refused(r"layer \d shares what layer \d computes \(config.layer_indexers\): keep both"):
            cut_config(config, kept, 4)


def test_a_configuration_that_refuses_the_layers_is_one_line(make_model, refused, monkeypatch):
    model = make_model("llama")

    def fail(*words, **settings):
        raise KeyError("layer 7\nand more")

    monkeypatch.setattr(type(model.config), "from_dict", fail)
    with refused("LlamaConfig does not allow the layers .*keep others"):
        compact(model, KEPT)


def test_layers_that_leave_no_cache_are_refused(refused):
    config = AutoConfig.for_model("lfm2", vocab_size=96, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
                                  num_key_value_heads=2, intermediate_size=48, conv_L_cache=3,
                                  layer_types=["conv", "full_attention", "conv", "conv"])  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with refused("Lfm2ForCausalLM does not run with only these layers .*keep others"):
        compact(model, [0, 2])
    compact(model, [0, 1])


def test_the_text_decoders_layers_are_cut_where_a_vision_tower_has_as_many(blocks, tmp_path):
    text = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}  # fmt: skip
    vision = {"depth": 4, "hidden_size": 64, "num_heads": 4, "intermediate_size": 256, "out_hidden_size": 32}
    config = AutoConfig.for_model("qwen2_5_vl", text_config=text, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    path, _ = locate_layers(model)
    assert path == "model.language_model.layers"
    wanted = without_layers(model, KEPT)(input_ids=blocks, use_cache=False).logits
    small = compact(model, KEPT)
    assert torch.equal(small(input_ids=blocks, use_cache=False).logits, wanted)
    save(small, None, tmp_path / "cut", "tiny", KEPT, 4)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "cut").eval()
    torch.testing.assert_close(loaded(input_ids=blocks, use_cache=False).logits, wanted, rtol=0, atol=1e-6)


# On disk


@torch.no_grad()
def test_saved_model_reloads_with_the_same_logits(full, blocks, tmp_path):
    small = compact(full, KEPT)
    save(small, None, tmp_path / "cut", "tiny", KEPT, 4)
    reloaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert count_parameters(reloaded) == count_parameters(small)
    assert torch.equal(reloaded.eval()(blocks).logits, small(blocks).logits)


@torch.no_grad()
def test_checkpoint_generates_the_same_tokens_without_this_package(llama, blocks, tmp_path):
    small = compact(llama, KEPT)
    tokens = greedy(small, blocks, use_cache=True).tolist()
    save(small, None, tmp_path / "cut", "tiny", KEPT, 4)
    torch.save(blocks, tmp_path / "prompt.pt")
    command = [sys.executable, "-I", "-c", FRESH_PROCESS, tmp_path / "cut", tmp_path / "prompt.pt"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.splitlines() == [str(tokens)] * 2, done.stderr


def test_tokenizer_is_saved_alongside(llama, tokenizer, tmp_path):
    save(compact(llama, KEPT), tokenizer, tmp_path / "cut", "tiny", KEPT, 4)
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "cut")
    assert reloaded("few layers")["input_ids"] == tokenizer("few layers")["input_ids"]


@pytest.mark.parametrize(
    ("trained", "words"), [(False, "unchanged and nothing was trained"), (True, "repaired against the full model")]
)
def test_model_card_says_what_was_cut(llama, tmp_path, trained, words):
    small = compact(llama, (0, 1))
    save(small, None, tmp_path / "cut", "tiny-llama", (0, 1), 4, note="by hand", trained=trained)
    card = (tmp_path / "cut" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# 2 of 4 layers of tiny-llama" in card
    assert "- kept layers (0-based): [0, 1]\n- removed layers: [2, 3]\n- chosen by: by hand\n" in card
    assert f"the others are {words}." in card
    assert f"- parameters: {count_parameters(small):,} (float32)" in card


def test_folder_is_made_with_its_parents_and_holds_safetensors_only(llama, tmp_path):
    folder = save(compact(llama, KEPT), None, tmp_path / "a" / "b" / "cut", "tiny", KEPT, 4)
    assert folder == tmp_path / "a" / "b" / "cut"
    assert set(files_of(folder)) == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", files.MARK,
    }  # fmt: skip
    assert list(folder.parent.iterdir()) == [folder]


def test_own_folder_is_replaced(llama, tmp_path):
    save(llama, None, tmp_path / "cut", "tiny", range(4), 4)
    save(compact(llama, KEPT), None, tmp_path / "cut", "tiny", KEPT, 4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "cut").config.num_hidden_layers == 3
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


def test_an_empty_folder_is_written_to(llama, tmp_path):
    (tmp_path / "cut").mkdir()
    save(compact(llama, KEPT), None, tmp_path / "cut", "tiny", KEPT, 4)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "cut").config.num_hidden_layers == 3


@pytest.mark.parametrize("mine", ["notes.txt", "sub/notes.txt", "README.md"])
@pytest.mark.parametrize("marked", [False, True])
def test_a_strangers_file_is_never_deleted(llama, tmp_path, refused, mine, marked):
    if marked:
        save(llama, None, tmp_path / "cut", "tiny", range(4), 4)
    (tmp_path / "cut" / mine).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "cut" / mine).write_text("years of work")
    before = tree_of(tmp_path)
    with refused(f"holds {mine}, which this package did not write: give a new or empty folder"):
        save(compact(llama, KEPT), None, tmp_path / "cut", "tiny", KEPT, 4)
    assert tree_of(tmp_path) == before


@pytest.mark.parametrize("target", ["source", ".", "source/cut", "link"])
def test_the_source_model_is_never_touched(llama, tmp_path, refused, target, monkeypatch):
    save(llama, None, tmp_path / "home" / "source", "tiny", range(4), 4)  # even where it carries the package's mark
    (tmp_path / "home" / "link").symlink_to("source")
    before = tree_of(tmp_path)
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "home" / "source")
    for source in (str(tmp_path / "home" / "source"), "another name"):
        with refused("is, holds or lies in .*, which is read: give a folder elsewhere"):
            save(compact(full, KEPT), None, tmp_path / "home" / target, source, KEPT, 4)
    assert tree_of(tmp_path) == before


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/.."])
def test_a_folder_without_a_name_is_refused(llama, tmp_path, refused, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused("give the folder a name of its own"):
        save(compact(llama, KEPT), None, name, "tiny", KEPT, 4)
    assert tree_of(tmp_path) == {}


@pytest.mark.parametrize("name", ["file", "file/cut", "file/a/cut"])
def test_a_file_in_the_way_is_refused(llama, tmp_path, refused, name):
    (tmp_path / "file").write_text("years of work")
    with refused("is or lies below the file .*: give another folder"):
        save(compact(llama, KEPT), None, tmp_path / name, "tiny", KEPT, 4)
    assert tree_of(tmp_path) == {"file": b"years of work"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_written(llama, tmp_path, refused, value):
    small = copy.deepcopy(compact(llama, KEPT))
    small.lm_head.weight.data[0, 0] = value
    with refused("has NaN or Inf in"):
        save(small, None, tmp_path / "cut", "tiny", KEPT, 4)
    assert tree_of(tmp_path) == {}


@pytest.mark.parametrize("error", [OSError("no space left on device"), SafetensorError("no space left on device")])
@pytest.mark.parametrize("older", [False, True])
def test_save_that_fails_leaves_everything_as_it_was(llama, tmp_path, monkeypatch, older, error, refused):
    if older:
        save(llama, None, tmp_path / "cut", "tiny", range(4), 4)
    before = tree_of(tmp_path)
    small = compact(llama, KEPT)

    def fail(folder):
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(small, "save_pretrained", fail)
    with refused("cannot write .* .no space left on device.: free space"):
        save(small, None, tmp_path / "cut", "tiny", KEPT, 4)
    assert tree_of(tmp_path) == before


def test_older_folder_is_put_back_when_the_last_step_fails(llama, tmp_path, monkeypatch, refused):
    save(llama, None, tmp_path / "cut", "tiny", range(4), 4)
    before = tree_of(tmp_path)
    replace = os.replace

    def fail_once(source, target):
        if str(target) == str(tmp_path / "cut"):
            monkeypatch.setattr(files.os, "replace", replace)
            raise OSError("device went away")
        return replace(source, target)

    monkeypatch.setattr(files.os, "replace", fail_once)
    with refused("cannot write .* .device went away."):
        save(compact(llama, KEPT), None, tmp_path / "cut", "tiny", KEPT, 4)
    assert tree_of(tmp_path) == before
