"""`lorica serve`, `lorica keys` and `lorica store` from the command line; and what the API process does not load."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from lorica.cli.main import cli
from lorica.store.database import Database


@pytest.fixture
def home(tmp_path):
    Database.open(f"sqlite:///{tmp_path / 'lorica.db'}").close()
    (tmp_path / "artifacts").mkdir()
    return tmp_path


def run(*words):
    return CliRunner().invoke(cli, list(words))


def test_the_api_process_loads_no_torch():
    program = "import sys, lorica.server.serve; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_key_is_made_listed_and_revoked(home):
    made = json.loads(run("keys", "create", "--tenant", "ann", "--data-dir", str(home), "--json").stdout)
    assert made["key"].startswith("tml-") and made["tenant"] == "ann"
    listed = run("keys", "list", "--data-dir", str(home))
    assert made["id"] in listed.stdout and made["key"] not in listed.stdout
    assert run("keys", "revoke", made["id"], "--data-dir", str(home)).exit_code == 0
    again = run("keys", "revoke", made["id"], "--data-dir", str(home))
    assert again.exit_code == 1 and "no open key" in again.stderr


def test_a_tenants_quotas_are_shown_and_changed_one_by_one(home):
    where = ("--data-dir", str(home))
    assert run("keys", "create", "--tenant", "ann", *where).exit_code == 0
    assert run("keys", "quota", "ann", "--set", "max_rank=8", *where).exit_code == 0
    changed = run("keys", "quota", "ann", "--set", "storage_bytes=1e9", *where, "--json")
    assert json.loads(changed.stdout)["storage_bytes"] == 10**9
    assert "8" in run("keys", "quota", "ann", *where).stdout
    reset = run("keys", "quota", "ann", "--set", "max_rank=null", *where, "--json")
    assert json.loads(reset.stdout)["max_rank"] is None
    for words, told in ((["bob"], "no tenant 'bob'"), (["ann", "--set", "rank=3"], "no setting 'rank'")):
        done = run("keys", "quota", *words, *where)
        assert done.exit_code == 1 and told in done.stderr


def test_a_store_that_is_well_is_said_to_be(home):
    assert run("store", "check", "--data-dir", str(home)).stdout.strip() == "All is well."
    (home / "artifacts" / "stray").write_text("x")
    found = run("store", "check", "--data-dir", str(home), "--json")
    assert found.exit_code == 1 and json.loads(found.stdout)["findings"][0]["kind"] == "orphan"


def test_a_data_directory_without_a_store_is_refused(tmp_path):
    done = run("store", "check", "--data-dir", str(tmp_path))
    assert done.exit_code == 1 and "no store" in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [(["--set", "limits.rnk=3"], "rank"), (["--set", "nonsense"], "NAME=VALUE"), (["--port", "99999"], "port")],
)
def test_a_wrong_setting_is_named_before_anything_starts(tmp_path, words, told):
    done = run("serve", "--data-dir", str(tmp_path), *words)
    assert done.exit_code in (1, 2) and told in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_where_it_listens_is_a_document_with_json(tmp_path):
    words = ["serve", "--model", "nano", "--port", "0", "--data-dir", str(tmp_path), "--json"]
    command = [sys.executable, "-m", "lorica.cli.main", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        told = json.loads(server.stdout.readline())
        server.terminate()
    assert told["url"].startswith("http://127.0.0.1:") and told["key"].startswith("tml-") and told["models"] == ["nano"]
    assert server.returncode == 0


@pytest.mark.slow
def test_a_model_that_is_not_there_is_a_sentence(tmp_path):
    words = ["serve", "--model", "no-such-model", "--port", "0", "--data-dir", str(tmp_path / "d")]
    done = subprocess.run(
        [sys.executable, "-m", "lorica.cli.main", *words], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1 and "no model 'no-such-model'" in done.stderr and "Traceback" not in done.stderr
