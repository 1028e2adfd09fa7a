"""Weights by name: the table, the licence gate, the download and its failures."""

import hashlib

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from spark3r_ros.backbone import load_backbone
from spark3r_ros.backbone.download import DownloadError, cache_dir
from spark3r_ros.backbone.registry import MODELS, count_parameters, get_model, list_models, weights_path

CONTENT = b"weights"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARK3R_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def hub(monkeypatch):
    """A hub that serves CONTENT and remembers what was asked for."""
    asked = []

    class Metadata:
        etag = hashlib.sha256(CONTENT).hexdigest()

    def fetch(repo, file, local_dir):
        asked.append((repo, file))
        local_dir.mkdir(parents=True, exist_ok=True)
        (local_dir / file).write_bytes(CONTENT)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: Metadata)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    return asked


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
    assert hub == [("depth-anything/DA3-SMALL", "model.safetensors")]
    assert get_model("da3-small") == path
    assert len(hub) == 1
    assert next(model for model in list_models() if model.name == "da3-small").present


@pytest.mark.parametrize("name", ["vggt", "vggt-commercial", "pi3", "pi3x", "da3-large", "da3-giant", "omega"])
def test_other_licences_must_be_accepted(hub, name):
    with pytest.raises(ValueError, match="--accept-licence"):
        get_model(name)
    assert hub == []
    assert get_model(name, accept_licence=True).exists()


def test_a_damaged_download_is_deleted(hub, monkeypatch):
    class Other:
        etag = hashlib.sha256(b"something else").hexdigest()

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: Other)
    with pytest.raises(DownloadError, match="checksum differs"):
        get_model("da3-small")
    assert not weights_path("da3-small").exists()


@pytest.mark.parametrize("failure", [LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError, ConnectionError])
def test_without_a_network_the_file_to_fetch_by_hand_is_named(hub, monkeypatch, failure):
    def offline(*args, **kwargs):
        raise failure("no connection")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", offline)
    with pytest.raises(DownloadError) as error:
        get_model("da3-base")
    assert "https://huggingface.co/depth-anything/DA3-BASE/resolve/main/model.safetensors" in str(error.value)
    assert str(weights_path("da3-base")) in str(error.value)


def test_gated_weights_say_where_to_accept(hub, monkeypatch):
    class Response:
        headers, request = {}, None

    def gated(*args, **kwargs):
        raise GatedRepoError("gated", response=Response())

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", gated)
    with pytest.raises(DownloadError, match="open https://huggingface.co/facebook/VGGT-Omega, accept"):
        get_model("omega", accept_licence=True)


def test_loading_absent_weights_says_how_to_get_them():
    with pytest.raises(
        ValueError, match="spark3r models get da3-small`, or fetch https://huggingface.co/depth-anything"
    ):
        load_backbone("da3-small")
    with pytest.raises(ValueError, match="models get pi3 --accept-licence"):
        load_backbone("pi3")


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown model 'da4'"):
        get_model("da4")


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("SPARK3R_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "spark3r"
