"""The container files: they parse, agree with each other, and start the server with words that it accepts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from lorica.cli.serve import _put
from lorica.server import assets
from lorica.server.settings import Settings
from tests.project.test_command_lines import parse

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
VARIABLE = re.compile(r"\$\{(\w+)(?::?([-?])([^}]*))?\}")


def filled(word):
    """A word of compose.yaml as Compose gives it on, with its defaults."""
    return VARIABLE.sub(lambda m: m[3] if m[2] == "-" else f"a-{m[1].lower()}", str(word))


def exec_form(name):
    return json.loads(re.search(rf"^{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)[1])


COMPOSED = [filled(word) for word in COMPOSE["services"]["lorica"]["command"]]


@pytest.mark.parametrize("words", [exec_form("CMD"), COMPOSED], ids=["Dockerfile", "compose.yaml"])
def test_the_server_is_started_with_words_that_it_accepts(words):
    assert exec_form("ENTRYPOINT") == ["lorica"]
    command, *rest = words
    given = parse(f"lorica {command}", rest)
    values = {"models": tuple(given["models"]), "data_dir": given["data_dir"], "host": given["host"]}
    for word in given.get("settings") or ():
        _put(values, word)
    settings = Settings.parse(values)
    assert settings.host == "0.0.0.0" and settings.data_dir == Path("/data")


def test_only_this_machine_reaches_the_published_ports():
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


def test_files_volumes_and_services_that_are_named_exist():
    services, volumes = COMPOSE["services"], COMPOSE["volumes"]
    for service in services.values():
        assert set(service.get("depends_on", [])) <= set(services)
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).is_file() if source.startswith("./") else source in volumes
    for copied in re.findall(r"^COPY ([^-].*) \S+$", DOCKERFILE, re.MULTILINE):
        assert all((ROOT / name).exists() for name in copied.split())


def test_what_is_copied_into_the_image_is_not_ignored():
    kept = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    copied = {name for line in re.findall(r"^COPY ([^-].*) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()}
    assert copied == set(kept)


def test_the_image_runs_without_root_and_has_the_pinned_charts():
    assert re.findall(r"^USER (\w+)$", DOCKERFILE, re.MULTILINE) == ["lorica"]
    assert f"npm pack {assets.PACKAGE}@{assets.VERSION} " in DOCKERFILE
    assert f"lorica.server.assets /charts/{assets.PACKAGE}-{assets.VERSION}.tgz" in DOCKERFILE


def test_prometheus_scrapes_the_server():
    config = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"][0]["targets"] == ["lorica:8000"]
    assert "metrics_open=true" in COMPOSE["services"]["lorica"]["command"]


def test_the_guide_names_the_pinned_charts():
    text = (ROOT / "docs" / "guides" / "operate.md").read_text(encoding="utf-8")
    assert f"npm pack {assets.PACKAGE}@{assets.VERSION}" in text
