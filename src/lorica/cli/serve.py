"""`lorica serve`: backbones as a service that many clients train and sample with the `tinker` SDK.

In: models and where things are kept. Out: a server's URL, on the first start a key, and a script to begin with. Refuses
to know HTTP.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lorica.cli.output import emit, json_option, say

SCRIPT = """\
import tinker
client = tinker.ServiceClient(base_url={url!r}, api_key={key!r})
run = client.create_lora_training_client({model!r}, rank=8).result()
sampler = run.save_weights_and_get_sampling_client().result()
print(run.get_info().model_dump_json())"""


@click.command()
@click.option("--model", "models", multiple=True, help="A backbone: built-in name, directory or hub id; repeatable.")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1, this machine only]")
@click.option("--port", type=int, help="Port to listen on; 0 takes a free one.  [default: 8000]")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Records and artifacts.  [default: lorica-data]")
@click.option("--database", help="SQLAlchemy URL instead of SQLite in the data directory.")
@click.option("--artifacts", help="Directory or fsspec URL (s3://…) instead of the data directory's.")
@click.option("--public-url", help="The URL that clients reach, for signed links.")
@click.option("--deterministic", is_flag=True, default=None, help="Results do not depend on who shares the engine.")
@click.option("--dtype", help="Dtype of the backbones.  [default: as stored]")
@click.option("--quantize", metavar="KIND[,KEY=VALUE]", help="Pack the backbones' linear weights: nf4, nvfp4, …")
@click.option("--threads", type=int, help="Threads of an engine.")
@click.option("--log-json", is_flag=True, default=None, help="Logs as JSON lines.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any other setting: limits.rank=64.")
@json_option
def command(models: tuple[str, ...], settings: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Serve backbones: fine-tuning and sampling over HTTP, for many tenants at once.

    Nothing else has to be installed. The first start prints an API key, once; with --json, the URL and the key are a
    document on stdout as soon as it listens.
    """
    from lorica.server.serve import serve
    from lorica.server.settings import Settings
    from lorica.server.state import Server

    values = {name: value for name, value in given.items() if value is not None}
    values["models"] = models or ("nano",)
    for word in settings:
        _put(values, word)

    def told(url: str, server: Server) -> None:
        if as_json:
            emit({"url": url, "key": server.first_key, "models": list(server.settings.models)}, "", as_json=True)
        else:
            _greet(url, server.first_key, server.settings.models[0])

    serve(Settings.parse(values), told)


def _put(values: dict[str, Any], word: str) -> None:
    """`limits.rank=64` into nested values."""
    import yaml

    name, mark, text = word.partition("=")
    if not mark or not name:
        raise click.BadParameter(f"{word!r} is not NAME=VALUE.", param_hint="--set")
    *path, last = name.split(".")
    here = values
    for part in path:
        here = here.setdefault(part, {})
    here[last] = yaml.safe_load(text)


def _greet(url: str, key: str | None, model: str) -> None:
    say(f"Serving at {url}")
    if key is not None:
        say(f"API key (shown this once): {key}")
    else:
        say("`lorica keys create` makes another API key.")
    say()
    say(SCRIPT.format(url=url, key=key or "YOUR KEY", model=model))
