"""Models and adapters by name, from a server that answers as the Hugging Face Hub does."""

import hashlib
import json
import shutil
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants

from mtp_model import load_adapter, load_model, save_adapter
from mtp_model.__main__ import main
from mtp_model.arguments import load_tokenizer
from mtp_model.demo import BASE

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The parts of the Hub's interface that a download takes; repositories are the directories OWNER/NAME below `root`."""

    def __init__(self, *args, root: Path, asked: list[str]):
        self.root, self.asked = root, asked
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def answer(self, content: bytes, **headers):
        self.send_response(200)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, kind, revision, *path = (parts[2:] if api else parts) + [""] * 4
        directory = self.root / owner / name
        if owner == "gated":
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("X-Error-Message", "Access is restricted")
            self.end_headers()
            return
        if not directory.is_dir() or revision not in ("main", "v1", COMMIT):
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound" if not directory.is_dir() else "RevisionNotFound")
            self.end_headers()
            return
        files = [file for file in sorted(directory.rglob("*")) if file.is_file()]
        listed = [
            {"type": "file", "rfilename": str(f.relative_to(directory)), "path": str(f.relative_to(directory)), "size": f.stat().st_size, "oid": COMMIT}
            for f in files
        ]
        self.asked.append("/".join([kind, revision, *path]).rstrip("/"))
        if api and kind == "tree":
            self.answer(json.dumps(listed).encode())
        elif api:
            self.answer(json.dumps({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": listed}).encode())
        else:
            content = (directory / "/".join(path).rstrip("/")).read_bytes()
            self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


def at(monkeypatch, port: int) -> None:
    """Have the client look for the Hub there: what the variable HF_ENDPOINT would do before its import."""
    here = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, here))
    monkeypatch.setattr(constants, "ENDPOINT", here)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """(root, asked): the directory of repositories, and what the server was asked for."""
    root, asked = tmp_path / "hub", []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, root=root, asked=asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    at(monkeypatch, server.server_port)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield root, asked
    server.shutdown()
    server.server_close()


def same(model, other) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_model_and_adapter_from_the_hub(hub, make_hf_dir, toy_adapter_model, monkeypatch):
    root, asked = hub
    repository = make_hf_dir("hub/owner/toy-1.0", seed=4, max_shard_size="10KB")
    for other in ("consolidated.safetensors", "pytorch_model.bin", "original/config.json", "original/model.safetensors", "tokenizer.json"):
        (repository / other).parent.mkdir(exist_ok=True)
        (repository / other).write_bytes(b"not what is wanted")
    model, local = load_model("owner/toy-1.0"), load_model(repository)
    assert same(model, local) and model.fingerprint == local.fingerprint
    wanted = {file.name for file in repository.iterdir() if file.name.startswith(("model", "config", "generation"))}
    assert {name.partition(f"resolve/{COMMIT}/")[2] for name in asked if name.startswith("resolve")} == wanted and len(wanted) > 3

    save_adapter(toy_adapter_model(k=3, rank=2, seed=4), root / "owner" / "adapter", {"from": "a test"})
    adapter = load_adapter("owner/adapter", revision="v1")
    assert adapter.apply(model).mtp.num_masks == 3 and adapter.notes == {"from": "a test"} and "revision/v1" in asked

    asked.clear()
    assert load_adapter("owner/adapter@v1").notes == {"from": "a test"} and "revision/v1" in asked
    with pytest.raises(ValueError, match=r"gave nothing for this name .*revision/refs%2Fpr%2F1"):
        load_adapter("owner/adapter@refs/pr/1")
    with pytest.raises(ValueError, match="revision is 'v1' and owner/adapter@v2 names one too"):
        load_adapter("owner/adapter@v2", revision="v1")
    for name in ("owner/adapter@", "owner/adapter@a@b", "@v1"):
        with pytest.raises(ValueError, match="is not a directory"):
            load_adapter(name)

    asked.clear()
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        load_adapter("owner/toy-1.0")
    assert not any(name.startswith("resolve") for name in asked)  # and nothing was downloaded to find that out

    at(monkeypatch, 9)  # nobody there: the copy serves
    assert same(load_model("owner/toy-1.0"), local)


def test_command_line(hub, capsys):
    root, asked = hub
    shutil.copytree(BASE, root / "owner" / "demo")
    (root / "owner" / "demo" / "chat_template.jinja").write_text("{{ messages }}")
    assert load_tokenizer("owner/demo").chat_template == "{{ messages }}" and not any("safetensors" in name for name in asked)
    assert main(["generate", "--model", "owner/demo", "--mode", "autoregressive", "--max-new-tokens", "5", "def"]) == 0
    from_hub = capsys.readouterr().out
    assert main(["generate", "--mode", "autoregressive", "--max-new-tokens", "5", "def"]) == 0
    assert capsys.readouterr().out == from_hub != ""
    assert load_tokenizer("owner/demo").get_vocab() == load_tokenizer(BASE).get_vocab()


@pytest.mark.parametrize("load", [load_model, load_adapter])
def test_what_the_hub_does_not_have(hub, make_hf_dir, tmp_path, monkeypatch, load):
    with pytest.raises(ValueError, match="owner/none is not a directory, and the Hugging Face Hub gave nothing for this name .*404"):
        load("owner/none")
    with pytest.raises(ValueError, match="gated/toy is not a directory.*403.*Access"):
        load("gated/toy")
    make_hf_dir("hub/owner/toy")
    with pytest.raises(ValueError, match="owner/toy is not a directory.*404"):
        load("owner/toy", revision="v2")
    hub[1].clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "file").touch()
    for name in ("toy", "owner/toy/more", "/owner", "~/toy", "runs/toy", "runs/file", "./runs/toy"):
        with pytest.raises(ValueError, match="is not a directory$"):
            load(name)
    with pytest.raises(ValueError, match="revision is 'v1' and .* is a directory"):
        load(hub[0] / "owner" / "toy", revision="v1")
    assert hub[1] == []
