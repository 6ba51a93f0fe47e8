"""The README's Python, run as it stands but for a tiny model, text and sizes."""

import re
from pathlib import Path

from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
TINY = {
    '"owner/name"': repr(str(ROOT / "tests/data/tiny-llama")),
    '"wikitext-2"': repr(str(ROOT / "tests/data/tiny-text")),
    '"movielens-100k"': repr(str(ROOT / "tests/data/tiny-movielens")),
    "count=256, length=128": "count=16, length=32",
    "count=2048, length=128": "count=16, length=32",
    "8, 128, seed=0": "8, 32, seed=0",
    "16: small": "4: small",
    "k=16": "k=4",
    "512)": "32)",
}
README, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))


def code_of(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_readme_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    text = README
    for old, new in TINY.items():
        assert old in text
        text = text.replace(old, new)
    blocks = code_of(text)
    assert len(blocks) == 4
    assert len(blocks[0].strip().splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in blocks:
        exec(block, scope)
    assert "speedup" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained("my-model").config.num_hidden_layers == 4
    assert scope["trained"].history


def test_the_chinese_readme_has_the_same_code():
    assert code_of(CHINESE) == code_of(README)


def test_the_readme_is_read_in_five_minutes():
    assert len(README.split()) <= 1200
