"""Checkpoints combined and inspected on a running server, through the typed client."""

from __future__ import annotations

import pytest
import tinker
import torch

import lorica
from lorica.client.remote import ServiceClient
from lorica.core.errors import DataError, MissingError
from lorica.methods.dora import DoRA
from lorica.methods.lora import LoRA
from tests.server.conftest import datum

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:unclosed {what}:ResourceWarning")  # the SDK's, when its client is collected
    for what in ("<socket", "transport", "event loop")
]

TOKENS = [5, 6, 7, 8] * 3


@pytest.fixture(scope="module")
def parents(server, tmp_path_factory):
    """Two adapters of different methods, uploaded: their host and their paths."""
    folder, host = tmp_path_factory.mktemp("parents"), lorica.Host(lorica.load("nano"))
    for name, method in (("one", LoRA(rank=2)), ("two", DoRA(rank=3))):
        adapter = host.add(name, method, "q_proj", seed=1)
        with torch.no_grad():
            adapter.flat.add_(torch.randn(adapter.flat.shape, generator=torch.Generator().manual_seed(2)) * 0.02)
        host.save(folder / name, adapter)
    with ServiceClient(base_url=server.url, api_key=server.key) as made:
        return [made.upload_adapter(folder / name, "nano") for name in ("one", "two")], folder


def logprobs(client, path):
    sampler = client.create_sampling_client(path).result()
    found = sampler.compute_logprobs(tinker.types.ModelInput.from_ints(TOKENS)).result()
    return torch.tensor(found[1:])


def test_a_merge_can_be_sampled_and_continued_at_once(client, parents):
    paths, _ = parents
    path = client.merge(paths, "both", "task_arithmetic", weights=[0.5, 0.5])
    assert path.startswith("tinker://merged:") and path in {c.tinker_path for c in client.list_adapters()}
    half = client.merge(paths[:1], "half", "task_arithmetic", weights=[1.0])
    assert torch.allclose(logprobs(client, half), logprobs(client, paths[0]), atol=1e-4)
    assert not torch.allclose(logprobs(client, path), logprobs(client, paths[0]), atol=1e-3)
    run = client.create_training_client_from_state(half).result()
    assert run.forward_backward([datum(TOKENS)], "cross_entropy").result().metrics["loss:sum"] > 0


def test_a_merge_on_the_server_is_the_merge_of_the_library(client, parents):
    from lorica.adapters.merging import make_merging
    from lorica.adapters.merging.combine import combine

    paths, folder = parents
    path = client.merge(paths, "ties", "ties", density=0.5)
    host = lorica.Host(lorica.load("nano"))
    adapters = [host.load(folder / name, name) for name in ("one", "two")]
    made, _ = combine(adapters, host.backbone, make_merging("ties", density=0.5))
    host.put(made)
    again = client.upload_adapter(host.save(folder / "merged", made), "nano")
    assert torch.equal(logprobs(client, path), logprobs(client, again))


def test_a_name_that_is_taken_is_refused_unless_it_shall_be_written_anew(client, parents):
    paths, _ = parents
    client.merge(paths, "taken", "task_arithmetic")
    with pytest.raises(DataError, match="exists already"):
        client.merge(paths, "taken", "task_arithmetic")
    client.merge(paths, "taken", "task_arithmetic", overwrite=True)


@pytest.mark.parametrize(
    ("how", "parameters", "words"),
    [("tie", {}, "Did you mean 'ties'"), ("ties", {"densty": 0.3}, "densty"), ("linear", {}, "ranks|factors|dense")],
)
def test_what_does_not_fit_is_a_sentence(client, parents, how, parameters, words):
    with pytest.raises(DataError, match=words):
        client.merge(parents[0], "never", how, **parameters)


def test_anothers_checkpoint_is_as_one_that_is_not_there(client, parents):
    with pytest.raises(MissingError):
        client.merge([parents[0][0], "tinker://upload:nobody/weights/x"], "never", "task_arithmetic")


def test_an_inspection_measures_a_checkpoint_beside_another(client, parents):
    paths, _ = parents
    found = client.inspect(paths[0], [paths[1]])
    assert found["adapter"] == paths[0] and found["method"] == "lora" and found["norm"] > 0
    assert found["sites"] and found["similarity"] and found["limits"]


@pytest.mark.slow
def test_weights_are_searched_on_the_server_and_nothing_of_the_search_stays(client, parents):
    pytest.importorskip("nevergrad", reason="nevergrad is not installed: pip install 'lorica[compose]'")
    from lorica.data.example import Example
    from lorica.recipes.compose.config import ComposeConfig
    from lorica.recipes.compose.remote import compose_on_server, hosted_loss

    paths, _ = parents
    examples = [Example.whole(TOKENS)]
    before = {c.tinker_path for c in client.list_adapters()}
    config = ComposeConfig(how="task_arithmetic", budget=4)
    found = compose_on_server(client, paths, examples, config, name="composed", test=examples)
    assert {c.tinker_path for c in client.list_adapters()} == before | {found.path}
    rows = {row.name: row for row in found.rows}
    assert list(rows) == ["zero", "uniform", "best single", "random search", "task_arithmetic"]
    assert all(row.test == pytest.approx(row.loss, abs=1e-5) for row in found.rows if row.name != "best single")
    assert rows["task_arithmetic"].value == min(one["value"] for one in found.log["evaluations"])
    assert hosted_loss(client, found.path, examples) == pytest.approx(rows["task_arithmetic"].loss, abs=1e-5)
    with pytest.raises(DataError, match="exists already"):
        compose_on_server(client, paths, examples, config, name="composed")
    with pytest.raises(DataError, match="no loss"):
        compose_on_server(client, paths, [Example((5, 6), (0.0, 0.0))], config, name="failed")
    assert {c.tinker_path for c in client.list_adapters()} == before | {found.path}


def test_the_command_line_merges_and_inspects_checkpoints_where_they_are(server, parents, monkeypatch):
    from click.testing import CliRunner

    from lorica.cli.main import cli

    paths, _ = parents
    monkeypatch.setenv("TINKER_BASE_URL", server.url)
    monkeypatch.setenv("TINKER_API_KEY", server.key)
    run = CliRunner()
    made = run.invoke(cli, ["merge", *paths, "--how", "ties", "--density", "0.3", "--name", "typed"])
    assert made.exit_code == 0 and made.stdout.strip() == "tinker://merged:default/weights/typed"
    shown = run.invoke(cli, ["inspect", paths[0], "--against", paths[1]])
    assert shown.exit_code == 0 and "change of the weights" in shown.stdout and "what this cannot say" in shown.stdout
    mixed = run.invoke(cli, ["merge", paths[0], "runs/a", "--how", "ties", "--name", "x"])
    assert mixed.exit_code == 2 and "on a server" in mixed.stderr
    local = run.invoke(cli, ["merge", *paths, "--how", "ties", "--name", "x", "--model", "nano"])
    assert local.exit_code == 2 and "--model needs the base on this machine" in local.stderr


@pytest.mark.slow
def test_the_command_line_composes_checkpoints_where_they_are(server, parents, monkeypatch, tmp_path):
    pytest.importorskip("nevergrad", reason="nevergrad is not installed: pip install 'lorica[compose]'")
    from click.testing import CliRunner

    from lorica.cli.main import cli

    monkeypatch.setenv("TINKER_BASE_URL", server.url)
    monkeypatch.setenv("TINKER_API_KEY", server.key)
    (tmp_path / "few.jsonl").write_text('{"prompt": "2 + 2 =", "completion": "4"}\n')
    words = ["--data", str(tmp_path / "few.jsonl"), "--examples", "1", "--how", "cat", "--budget", "3"]
    made = CliRunner().invoke(cli, ["compose", parents[0][0], *words, "--name", "by-hand"])
    assert made.exit_code == 0 and made.stdout.strip() == "tinker://merged:default/weights/by-hand"
    assert "random search" in made.stderr
    assert CliRunner().invoke(cli, ["compose", parents[0][0], *words, "--out", "x"]).exit_code == 2
