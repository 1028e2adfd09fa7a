"""Weights by name: the table, the licence gate, the download and its failures."""

import fcntl
import hashlib
import os
import pty
import struct
import subprocess
import sys
import termios
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from spark3r_ros.backbone import load_backbone, registry
from spark3r_ros.backbone.download import DownloadError, cache_dir
from spark3r_ros.backbone.registry import MODELS, count_parameters, get_model, list_models, weights_path

CONTENT = b"weights"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARK3R_CACHE", str(tmp_path))
    return tmp_path


class Hub(ThreadingHTTPServer):
    """A hub on this machine: one file for every name, over real HTTP, with ranges and the headers of the real one."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content = CONTENT
        self.digest: str | None = None  # what it says the checksum is; None: the true one
        self.gated = False
        self.stop_after: int | None = None  # bytes, then nothing more comes
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def files(self) -> list[str]:
        """Paths of all files that were sent."""
        return [path for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, wanted = self.server, self.headers.get("Range")
        hub.asked.append((self.command, self.path, wanted))
        first = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted else 0
        data = hub.content[first:]
        status = 403 if hub.gated else 404 if "/resolve/" not in self.path else 206 if wanted else 200
        self.send_response(status)
        if status >= 400:
            data = b""
            self.send_header("X-Error-Code", "GatedRepo")
        digest = hub.digest or hashlib.sha256(hub.content).hexdigest()
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("X-Linked-Etag", f'"{digest}"')
        self.send_header("X-Linked-Size", str(len(hub.content)))
        self.send_header("Content-Length", str(len(data)))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{len(hub.content) - 1}/{len(hub.content)}")
        self.end_headers()
        if self.command == "GET" and data:
            self.wfile.write(data[: hub.stop_after])
            if hub.stop_after is not None:
                self.wfile.flush()
                threading.Event().wait(60)


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield server
    server.shutdown()
    server.server_close()


def test_the_table():
    models = {model.name: model for model in list_models()}
    assert {"nano", "vggt", "pi3", "pi3x", "da3-small", "da3-base", "da3-large", "da3-giant"} <= set(models)
    assert {"da3metric-large", "omega"} <= set(models)
    permissive = {name for name, model in models.items() if model.permissive}
    assert permissive == {"nano", "da3-small", "da3-base", "da3metric-large"}
    assert all("Apache" in models[name].weights_licence for name in permissive)
    assert not models["vggt"].present


@pytest.mark.parametrize(
    ("name", "megabytes"), [("vggt", 102), ("pi3", 94), ("da3-small", 6.0), ("da3-large", 32), ("omega", 82)]
)
def test_context_memory_per_frame(name, megabytes):
    model = next(model for model in list_models() if model.name == name)
    assert model.kv_bytes_per_frame / 1e6 == pytest.approx(megabytes, rel=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts(name):
    assert MODELS[name].parameters in (0, count_parameters(MODELS[name]))


def test_download_goes_to_the_cache_once(hub, cache):
    path = get_model("da3-small")
    assert path == cache / "da3-small" / "model.safetensors" == weights_path("da3-small")
    assert path.read_bytes() == CONTENT
    assert hub.files == ["/depth-anything/DA3-SMALL/resolve/main/model.safetensors"]
    assert get_model("da3-small") == path
    assert len(hub.files) == 1
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]
    assert next(model for model in list_models() if model.name == "da3-small").present


@pytest.mark.parametrize("name", ["vggt", "vggt-commercial", "pi3", "pi3x", "da3-large", "da3-giant", "omega"])
def test_other_licences_must_be_accepted(hub, name):
    with pytest.raises(ValueError, match="--accept-licence"):
        get_model(name)
    assert hub.asked == []
    assert get_model(name, accept_licence=True).exists()


def test_a_killed_download_goes_on_where_it_stopped(hub, cache):
    """The command line in a process of its own, with its progress on a terminal, killed half-way and run again."""
    hub.content, hub.stop_after = bytes(range(256)) * (25 << 12), 12 << 20  # 25 MiB; the client writes 10 at a time
    command = [sys.executable, "-m", "spark3r_ros.cli", "models", "get", "da3-small"]
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while sum(file.stat().st_size for file in cache.glob("da3-small/*.part")) < 10 << 20:
        assert time.monotonic() < deadline, "nothing arrives"
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not weights_path("da3-small").exists()

    hub.stop_after = None
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # rows, columns
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=end, check=True)
    os.close(end)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert [wanted for method, path, wanted in hub.asked if method == "GET" and "/resolve/" in path] == [
        None,
        f"bytes={10 << 20}-",
    ]
    assert weights_path("da3-small").read_bytes() == hub.content
    assert "100%" in shown
    assert "HTTP Request" not in shown


def test_two_downloads_do_not_mix(hub, cache):
    part = cache / "da3-small" / f"model.safetensors.{hashlib.sha256(CONTENT).hexdigest()}.part"
    part.parent.mkdir()
    with part.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="da3-small is being fetched by another process"):
            get_model("da3-small")


def test_a_damaged_download_is_deleted(hub):
    hub.digest = hashlib.sha256(b"something else").hexdigest()
    with pytest.raises(DownloadError, match="checksum differs"):
        get_model("da3-small")
    assert list(weights_path("da3-small").parent.iterdir()) == []


@pytest.mark.parametrize("failure", ["no server", "offline mode", "not there"])
def test_without_a_network_the_file_to_fetch_by_hand_is_named(hub, monkeypatch, failure):
    if failure == "no server":
        hub.shutdown()
        hub.server_close()
    elif failure == "offline mode":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/{revision}/{filename}")
    with pytest.raises(DownloadError) as error:
        get_model("da3-base")
    assert "https://huggingface.co/depth-anything/DA3-BASE/resolve/main/model.safetensors" in str(error.value)
    assert str(weights_path("da3-base")) in str(error.value)


def test_gated_weights_say_where_to_accept(hub):
    hub.gated = True
    with pytest.raises(DownloadError, match="open https://huggingface.co/facebook/VGGT-Omega, accept"):
        get_model("omega", accept_licence=True)


def test_loading_absent_weights_says_how_to_get_them():
    with pytest.raises(
        ValueError, match="spark3r models get da3-small`, or fetch https://huggingface.co/depth-anything"
    ):
        load_backbone("da3-small")
    with pytest.raises(ValueError, match="models get pi3 --accept-licence"):
        load_backbone("pi3")


def test_an_installation_without_its_own_weights_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "EMBEDDED", tmp_path / "nano.safetensors")
    with pytest.raises(ValueError, match="embedded weights .* are missing: the installation is incomplete"):
        load_backbone("nano")


def test_one_architecture_under_two_licences():
    """A file of VGGT alone does not say which of its weights it holds."""
    said = registry._possible_licences(MODELS["vggt"])
    assert "CC BY-NC 4.0 (non-commercial) (vggt) or VGGT License v1" in said
    assert "(vggt-commercial)" in said
    assert registry._possible_licences(MODELS["da3-small"]) == "Apache-2.0"


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown model 'da4'"):
        get_model("da4")


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("SPARK3R_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "spark3r"
