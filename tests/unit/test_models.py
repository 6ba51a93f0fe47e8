"""Layers found by structure, logits made as the model makes them, and checkpoints refused with a reason."""

import hashlib
import json
import shutil

import gguf
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from paper_src.models import (
    count_parameters,
    decoder_layers,
    last_hidden,
    layer_counts,
    load_model,
    locate_layers,
    logits_of,
)
from paper_src.support import weights
from paper_src.support.devices import pick_device, pick_dtype
from paper_src.support.sources import sha256

PATHS = dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi"], "model.layers")
PATHS |= {"olmo2": "model.layers", "cohere": "model.layers", "mixtral": "model.layers"}
PATHS |= {"gpt2": "transformer.h", "falcon": "transformer.h", "gpt_neox": "gpt_neox.layers"}
PATHS |= {"opt": "model.decoder.layers", "bert": "encoder.layer"}
UP = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def blocks(make_blocks):
    return make_blocks(2, 12)


@pytest.fixture
def checkpoint(tmp_path, llama, tokenizer):
    folder = tmp_path / "tiny-llama"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def gguf_file(tmp_path, llama):
    """The tiny Llama as llama.cpp stores it: other names, and the halves of each rotary head interleaved."""
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(4)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_vocab_size(96)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(33 + index) for index in range(95)] + ["ab"])
    writer.add_token_merges(["a b"])
    writer.add_token_types([1] * 96)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4)
    for name, parameter in llama.named_parameters():
        tensor = parameter.detach()
        if "q_proj" in name or "k_proj" in name:
            tensor = tensor.view(-1, 2, 4, 32).transpose(1, 2).reshape(-1, 32)  # heads of 8 = 2 halves of 4
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(name):
    return load_model(str(name), dtype="float32", device="cpu")


def rewrite_weights(checkpoint, edit):
    """Apply ``edit`` to the checkpoint's tensors, by name."""
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


# Layers


@pytest.mark.parametrize(("family", "path"), PATHS.items())
def test_layers_are_found_in_every_family(make_model, family, path):
    model = make_model(family)
    found, layers = locate_layers(model)
    assert found == path
    assert layers is model.get_submodule(path) is decoder_layers(model)
    assert len(layers) == 4


def test_layers_are_the_list_with_most_parameters(llama):
    llama.model.before = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    llama.model.empty = nn.ModuleList(nn.Identity() for _ in range(4))
    assert locate_layers(llama)[0] == "model.layers"


def test_encoder_decoder_is_refused(make_model, refused):
    with refused("T5Model has two stacks of layers"):
        locate_layers(make_model("t5"))


def test_model_without_layers_is_refused(llama, refused):
    llama.model.layers = nn.ModuleList(nn.Identity() for _ in range(4))  # a list, but of nothing to cut
    with refused("LlamaForCausalLM has no list of 4 layers"):
        locate_layers(llama)


def test_model_that_is_no_transformer_is_refused(refused):
    config = AutoConfig.for_model("resnet", embedding_size=8, hidden_sizes=[8], depths=[1])
    with refused("ResNetModel has no list of"):
        locate_layers(AutoModel.from_config(config))


def test_tied_parameters_are_counted_once(make_model):
    untied, tied = make_model("llama"), make_model("llama", tie_word_embeddings=True)
    assert count_parameters(untied) - count_parameters(tied) == 96 * 32


# Hidden states and logits


@torch.no_grad()
def test_last_hidden_is_the_state_after_the_final_norm(full, blocks):
    expected = full(blocks, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(last_hidden(full, blocks), expected, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", [*(name for name in PATHS if name != "bert")])
def test_logits_of_the_last_hidden_state_are_the_models_own(make_model, family, blocks):
    model = make_model(family)
    expected = model(blocks).logits
    torch.testing.assert_close(logits_of(model, last_hidden(model, blocks)), expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_logits_of_leaves_the_model_as_it_was(llama, blocks):
    modules, expected = dict(llama.named_modules()), llama(blocks).logits
    logits_of(llama, torch.ones(2, 12, 32))
    assert dict(llama.named_modules()) == modules
    assert torch.equal(llama(blocks).logits, expected)


def test_logits_of_passes_gradients_to_the_hidden_state(llama):
    hidden = torch.ones(1, 3, 32, requires_grad=True)
    logits_of(llama, hidden).sum().backward()
    torch.testing.assert_close(hidden.grad[0, 0], llama.lm_head.weight.sum(dim=0))


# Loading


def test_local_folder_loads_with_tokenizer_and_digest(checkpoint, llama, tokenizer, blocks):
    loaded = load(checkpoint)
    assert torch.equal(loaded.model(blocks).logits, llama(blocks).logits)
    assert loaded.tokenizer("layers")["input_ids"] == tokenizer("layers")["input_ids"]
    assert not loaded.model.training
    assert (loaded.name, loaded.digest) == (str(checkpoint), sha256(checkpoint / "model.safetensors"))


def test_home_folder_is_expanded(checkpoint, monkeypatch):
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert load("~/tiny-llama").model.config.num_hidden_layers == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_model_has_the_asked_dtype(checkpoint, dtype):
    assert load_model(str(checkpoint), dtype, "cpu").model.dtype == getattr(torch, dtype)


def test_tied_head_is_no_missing_weight(make_model, tokenizer, tmp_path):
    make_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    model = load(tmp_path / "tied").model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_hub_id_loads_from_the_local_cache(checkpoint, tmp_path, monkeypatch, llama, blocks):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, commit = tmp_path / "hub" / "models--somebody--tiny-llama", "0123456789abcdef" * 2 + "01234567"
    shutil.copytree(checkpoint, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    loaded = load("somebody/tiny-llama")
    assert loaded.name == "somebody/tiny-llama"
    assert torch.equal(loaded.model(blocks).logits, llama(blocks).logits)


def test_gguf_file_loads_by_its_path_and_by_its_folder(gguf_file, llama, blocks):
    for name in (gguf_file, gguf_file.parent):
        loaded = load(name)
        assert torch.equal(loaded.model(blocks).logits, llama(blocks).logits)
        assert loaded.tokenizer("ab")["input_ids"] == [95]
        assert loaded.digest == sha256(gguf_file)


def test_pinned_name_loads_the_fetched_file(gguf_file, monkeypatch, llama, blocks):
    assets = []
    monkeypatch.setattr(weights, "fetch", lambda asset: assets.append(asset) or gguf_file)
    assert torch.equal(load("smollm2-135m-instruct").model(blocks).logits, llama(blocks).logits)
    assert assets == [weights.PINNED["smollm2-135m-instruct"]]


def test_pinned_packed_weights_are_converted_once(gguf_file, monkeypatch, llama, blocks, capsys):
    monkeypatch.setattr(weights, "fetch", lambda asset: gguf_file)
    first = load("smollm2-135m-instruct")
    assert "converting smollm2-135m-instruct, once" in capsys.readouterr().err
    monkeypatch.setattr("transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint", pytest.fail)
    again = load("smollm2-135m-instruct")
    assert torch.equal(again.model(blocks).logits, llama(blocks).logits)
    assert again.tokenizer("ab")["input_ids"] == [95]
    assert (again.digest, again.stored) == (first.digest, None) == (sha256(gguf_file), None)


def test_half_a_conversion_is_made_anew(gguf_file, monkeypatch, llama, blocks):
    monkeypatch.setattr(weights, "fetch", lambda asset: gguf_file)
    load("smollm2-135m-instruct")
    (converted,) = gguf_file.parent.glob("tiny-*/model.safetensors")
    converted.write_bytes(converted.read_bytes()[:100])
    assert torch.equal(load("smollm2-135m-instruct").model(blocks).logits, llama(blocks).logits)


def test_model_from_gguf_saves_as_a_standard_checkpoint(gguf_file, tmp_path, llama, blocks):
    load(gguf_file).model.save_pretrained(tmp_path / "plain")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(reloaded(blocks).logits, llama(blocks).logits)


def test_unknown_hub_id_is_refused(tmp_path, monkeypatch, refused):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with refused("cannot get nobody/nothing from the hub .*: check the name and the network"):
        load("nobody/nothing")


def test_hub_error_without_a_message_is_refused(monkeypatch, refused):
    def fail(*args, **kwargs):
        raise TimeoutError

    monkeypatch.setattr(weights, "snapshot_download", fail)
    with refused("TimeoutError"):
        load("nobody/nothing")


def test_a_chat_template_in_a_file_of_its_own_is_fetched(checkpoint, monkeypatch):
    asked = {}
    monkeypatch.setattr(weights, "snapshot_download", lambda name, **how: asked.update(how) or str(checkpoint))
    load("somebody/something")
    wanted = ["model.safetensors", "config.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    assert list(filter_repo_objects([*wanted, "pytorch_model.bin", "run.py"], **asked)) == wanted


@pytest.mark.parametrize("name", ["gpt7", "./absent", "../absent/model", "/absent/model", "a/b/c"])
def test_name_that_is_no_path_and_no_hub_id_is_refused(name, refused):
    with refused(f"no model '{name}': give one of .*smollm2-135m-instruct.*, an existing path, or a hub id"):
        load(name)


def test_checkpoint_of_pickles_is_refused(checkpoint, refused):
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with refused(r"holds only pickled weights \(pytorch_model.bin\), which can run code"):
        load(checkpoint)


def test_pickle_beside_safetensors_is_not_read(checkpoint):
    (checkpoint / "pytorch_model.bin").write_bytes(b"not even a pickle")
    assert load(checkpoint).digest == sha256(checkpoint / "model.safetensors")


def test_folder_without_weights_is_refused(checkpoint, refused):
    (checkpoint / "model.safetensors").unlink()
    with refused("holds no weights"):
        load(checkpoint)


def test_file_that_is_no_model_is_refused(checkpoint, refused):
    with refused("config.json is a file: give a model folder or a .gguf file"):
        load(checkpoint / "config.json")


def test_folder_of_several_gguf_files_is_refused(tmp_path, refused):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with refused("holds 2 .gguf files: name one of them"):
        load(tmp_path)


def test_damaged_gguf_is_refused(tmp_path, refused):
    (tmp_path / "a.gguf").write_bytes(b"GGUF then nothing")
    with refused("cannot load"):
        load(tmp_path)


@pytest.mark.parametrize("length", [0, 5, 1000, -100])
def test_truncated_safetensors_are_refused(checkpoint, length, refused):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    with refused("cannot load .*: fetch the model again"):
        load(checkpoint)


@pytest.mark.parametrize("name", [UP, "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_missing_tensor_is_refused_by_name(checkpoint, name, refused):
    rewrite_weights(checkpoint, lambda weights: weights.pop(name))
    with refused(f"lacks 1 weights, the first is {name}"):
        load(checkpoint)


def test_config_deeper_than_the_weights_is_refused(checkpoint, refused):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with refused("lacks 9 weights, the first is model.layers.4"):
        load(checkpoint)


def test_tensor_of_another_shape_is_refused(checkpoint, refused):
    rewrite_weights(checkpoint, lambda weights: weights.update({UP: torch.zeros(3, 3)}))
    with refused("cannot load"):
        load(checkpoint)


def test_missing_shard_is_refused(llama, tokenizer, tmp_path, refused):
    llama.save_pretrained(tmp_path, max_shard_size="60KB")
    tokenizer.save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert load(tmp_path).digest == hashlib.sha256("".join(sha256(shard) for shard in shards).encode()).hexdigest()
    shards[-1].unlink()
    with refused("cannot load|lacks"):
        load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(checkpoint, value, refused):
    rewrite_weights(checkpoint, lambda weights: weights[UP][3, 4].fill_(value))
    with refused(f"has NaN or Inf in {UP}"):
        load(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_folder_that_lacks_a_file_is_refused(checkpoint, name, refused):
    (checkpoint / name).unlink()
    with refused("cannot load"):
        load(checkpoint)


def test_code_of_a_checkpoint_is_refused_without_asking(checkpoint, monkeypatch, refused):
    config = json.loads((checkpoint / "config.json").read_text())
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": auto}))
    (checkpoint / "own.py").touch()
    asked = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "n")
    with refused("custom code"):
        load(checkpoint)
    assert not asked


def test_unknown_dtype_is_refused(checkpoint, refused):
    with refused("dtype 'int8': use float32, bfloat16, float16 or auto"):
        load_model(str(checkpoint), "int8", "cpu")


def test_unknown_dtype_is_not_blamed_on_the_checkpoint(checkpoint, refused):
    with refused("^dtype 'int8'"):
        load_model(str(checkpoint), "int8", "cpu")


def test_cuda_without_a_device_is_refused(checkpoint, monkeypatch, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused("device 'cuda:1': this machine shows no CUDA device; use cpu"):
        load_model(str(checkpoint), "float32", "cuda:1")


def test_unknown_device_is_refused(checkpoint, refused):
    with refused("device 'abacus'"):
        load_model(str(checkpoint), "float32", "abacus")


@pytest.mark.parametrize(("device", "message"), [("cuda:2", "shows 2 CUDA devices"), ("mps", "sums are in float64")])
def test_a_device_that_cannot_be_used_is_refused(device, message, monkeypatch, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == "cuda:1"
    with refused(f"device '{device}': .*{message}"):
        pick_device(device)


@pytest.mark.parametrize(("available", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_device_is_cuda_where_there_is_one(monkeypatch, available, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert pick_device("auto") == expected
    assert pick_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("ability", "dtype"),
    [("avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx2", "float32")],
)
def test_auto_dtype_is_bfloat16_where_the_processor_multiplies_in_it(monkeypatch, ability, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {ability: True})
    assert pick_dtype("auto", "cpu") == getattr(torch, dtype)


def test_token_ids_of_another_vocabulary_are_refused(llama, refused):
    with refused("token id 96, but the embedding has 96 rows"):
        last_hidden(llama, torch.tensor([[3, 96, 4]]))


def test_packed_weights_cannot_stay_on_the_disk(gguf_file, refused):
    with refused("is packed: save it as safetensors"):
        load_model(str(gguf_file), device="disk")


def test_shares_of_the_depth_are_numbers_of_layers(refused):
    assert layer_counts([0.25, 0.4, 0.5, 0.75], 32) == [8, 13, 16, 24]  # 12.8 is 13
    assert layer_counts([0, 0.01, 5, 12.0], 12) == [0, 1, 5, 12]
    assert layer_counts([0.4, 0.5], 5) == [2]  # 2.5 is 2 as well
    for wrong in (13, -1, 2.5, "8"):
        with refused("keep .*: the model has 12 layers; give 1 to 12, or a share such as 0.25"):
            layer_counts([wrong], 12)


def test_quantized_weights_are_refused_before_they_are_read(checkpoint, refused):
    config = json.loads((checkpoint / "config.json").read_text())
    for method in ("bitnet", "torchao", "of-next-year"):
        (checkpoint / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
        (checkpoint / "model.safetensors").write_bytes(b"never read")
        with refused(rf"is quantized \({method}\): give the checkpoint it was made from"):
            load(checkpoint)


def test_an_adapter_is_refused_with_the_line_that_merges_it(checkpoint, refused):
    (checkpoint / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    with refused(r"is an adapter: merge it first, PeftModel.from_pretrained\(AutoModelForCausalLM.from_pretrained"
                 r"\('owner/base'\)"):  # fmt: skip
        load(checkpoint)


def test_the_dtype_of_the_checkpoint_is_known(checkpoint):
    assert load_model(str(checkpoint), dtype="bfloat16", device="cpu").stored == torch.float32


def test_a_vision_language_model_is_loaded_with_its_text_decoder(tokenizer, tmp_path):
    text = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 48}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
              "image_size": 16, "patch_size": 8, "projection_dim": 32}  # fmt: skip
    config = AutoConfig.for_model("llava", text_config=text | {"model_type": "llama"},
                                  vision_config=vision | {"model_type": "clip_vision_model"})  # fmt: skip
    AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert len(decoder_layers(loaded.model)) == 4
    assert type(loaded.model).__name__ == "LlavaForConditionalGeneration"
