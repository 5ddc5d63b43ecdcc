"""`lorica keys`: API keys of a server's tenants and what each tenant may use, beside a running server.

In: a data directory or a database's URL. Out: a new key's secret, once; records without secrets. Refuses to know HTTP.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lorica.cli.output import emit, json_option, table


def _store(function: Any) -> Any:
    function = click.option("--database", help="SQLAlchemy URL instead of SQLite in the data directory.")(function)
    return click.option(
        "--data-dir",
        type=click.Path(path_type=Path),
        default=Path("lorica-data"),
        show_default=True,
        help="The server's.",
    )(function)


def _open(data_dir: Path, database: str | None) -> Any:
    from lorica.store.database import Database

    return Database.open(database or f"sqlite:///{(data_dir / 'lorica.db').absolute()}", own=False)


@click.group()
def command() -> None:
    """Make, list and revoke API keys, and set what a tenant may use."""


@command.command()
@click.option("--tenant", default="default", show_default=True, help="Whose work it opens; `default` is the operator.")
@click.option("--label", default="", help="A note to tell keys apart.")
@_store
@json_option
def create(tenant: str, label: str, data_dir: Path, database: str | None, as_json: bool) -> None:
    """Make a key and print it, once."""
    from lorica.store import keys

    with _open(data_dir, database) as store:
        key, secret = store.submit(lambda c: keys.create_key(c, tenant, label)).result()
    emit({"id": key.id, "tenant": key.tenant, "label": key.label, "key": secret}, secret, as_json=as_json)


@command.command("list")
@click.option("--tenant", help="Only this tenant's.")
@_store
@json_option
def list_(tenant: str | None, data_dir: Path, database: str | None, as_json: bool) -> None:
    """List keys, without their secrets."""
    from lorica.store import keys

    with _open(data_dir, database) as store:
        found = store.read(lambda c: keys.list_keys(c, tenant))
    rows = [(k.id, k.prefix, k.tenant, k.label, f"{k.created:%Y-%m-%d %H:%M}", k.revoked is None) for k in found]
    document = [
        {
            "id": k.id,
            "prefix": k.prefix,
            "tenant": k.tenant,
            "label": k.label,
            "created": k.created.isoformat(),
            "revoked": None if k.revoked is None else k.revoked.isoformat(),
        }
        for k in found
    ]
    emit(document, table(("id", "key begins", "tenant", "label", "created", "open"), rows), as_json=as_json)


@command.command()
@click.argument("key_id")
@_store
@json_option
def revoke(key_id: str, data_dir: Path, database: str | None, as_json: bool) -> None:
    """Close a key for good. Work that it began goes on."""
    from lorica.core.errors import MissingError, did_you_mean
    from lorica.store import keys

    with _open(data_dir, database) as store:
        if not store.submit(lambda c: keys.revoke_key(c, key_id)).result():
            known = [key.id for key in store.read(keys.list_keys) if key.revoked is None]
            raise MissingError(f"There is no open key {key_id!r}.{did_you_mean(key_id, known)}")
    emit({"id": key_id, "revoked": True}, f"Revoked {key_id}.", as_json=as_json)


@command.command()
@click.argument("tenant")
@click.option("--set", "changes", multiple=True, metavar="NAME=VALUE", help="storage_bytes=1e9; null is the server's.")
@_store
@json_option
def quota(tenant: str, changes: tuple[str, ...], data_dir: Path, database: str | None, as_json: bool) -> None:
    """Show or change what a tenant may use; a running server heeds it in a few seconds.

    Names: tokens_per_minute, resident_adapters, storage_bytes, concurrent_samples, max_rank.
    """
    import yaml

    from lorica.core.errors import MissingError, did_you_mean
    from lorica.store import keys

    values = {}
    for word in changes:
        name, mark, text = word.partition("=")
        if not mark:
            raise click.BadParameter(f"{word!r} is not NAME=VALUE.", param_hint="--set")
        found = yaml.safe_load(text)
        values[name] = float(text) if isinstance(found, str) and _is_number(text) else found
    with _open(data_dir, database) as store:
        tenants = store.read(keys.list_tenants)
        if tenant not in tenants:
            raise MissingError(
                f"There is no tenant {tenant!r}.{did_you_mean(tenant, tenants)}",
                hint="`lorica keys create --tenant NAME` makes one.",
            )
        quotas = store.read(lambda c: keys.get_quotas(c, tenant)).replace(**values)
        if values:
            store.submit(lambda c: keys.set_quotas(c, tenant, quotas)).result()
    rows = [(name, "the server's" if value is None else f"{value:,}") for name, value in quotas.model_dump().items()]
    emit(quotas.model_dump(), table(("what", "at most"), rows), as_json=as_json)


def _is_number(text: str) -> bool:
    """Whether it is what YAML takes for text: `1e9`."""
    try:
        float(text)
    except ValueError:
        return False
    return True
