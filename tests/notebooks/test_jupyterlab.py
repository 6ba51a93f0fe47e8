"""A notebook in a real JupyterLab server: opened over its REST interface and run cell by cell in its kernel."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid

import pytest
import websocket
from harness import NOTEBOOKS, ROOT


@pytest.fixture
def server(tmp_path):
    """JupyterLab over a copy of the notebooks, beside committed tables in the place of results: port and token."""
    (tmp_path / "notebooks").mkdir()
    for path in NOTEBOOKS:
        shutil.copy(path, tmp_path / "notebooks")
    for place in (tmp_path / "tables", tmp_path / "results" / "laptop" / "tables"):
        shutil.copytree(ROOT / "tables", place)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
               f"--IdentityProvider.token={token}", "--notebook-dir", str(tmp_path / "notebooks")]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            try:
                asked(port, token, "/api/status")
                break
            except OSError:
                time.sleep(0.2)
        yield port, token
    finally:
        process.terminate()
        process.wait(timeout=30)


def asked(port: int, token: str, path: str, body: dict | None = None) -> dict:
    """What the server answers to a GET, or to a POST of ``body``."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Authorization": f"token {token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def run(channel: websocket.WebSocket, code: str) -> list[dict]:
    """Messages of one cell, once its kernel is idle again."""
    header = {
        "msg_id": uuid.uuid4().hex,
        "username": "test",
        "session": "s",
        "msg_type": "execute_request",
        "version": "5.3",
    }
    content = {"code": code, "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
    channel.send(json.dumps({"header": header, "parent_header": {}, "metadata": {}, "content": content,
                             "channel": "shell"}))  # fmt: skip
    seen = []
    while True:
        message = json.loads(channel.recv())
        if message["parent_header"].get("msg_id") != header["msg_id"]:
            continue
        seen.append(message)
        if message["msg_type"] == "status" and message["content"]["execution_state"] == "idle":
            return seen


def test_run_all_in_jupyterlab(server, tmp_path):
    port, token = server
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/lab?token={token}", timeout=60).read().decode()
    assert "JupyterLab" in page
    name = "09_summary.ipynb"
    book = asked(port, token, f"/api/contents/{name}")["content"]
    session = asked(port, token, "/api/sessions",
                    {"path": name, "name": name, "type": "notebook", "kernel": {"name": "python3"}})  # fmt: skip
    address = f"ws://127.0.0.1:{port}/api/kernels/{session['kernel']['id']}/channels?token={token}"
    channel = websocket.create_connection(address, timeout=180)
    shown = []
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            messages = run(channel, "".join(cell["source"]))
            errors = [message["content"] for message in messages if message["msg_type"] == "error"]
            assert errors == []
            shown += [message for message in messages if message["msg_type"] == "execute_result"]
    channel.close()
    assert any("text/markdown" in message["content"]["data"] for message in shown)
    made = tmp_path / "results" / "laptop"
    assert (made / "SUMMARY.md").read_text(encoding="utf-8") == (ROOT / "SUMMARY.md").read_text(encoding="utf-8")
    assert (made / "tables" / "09_summary.json").is_file()
