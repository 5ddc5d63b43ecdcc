"""`lorica store`: whether a server's data directory holds what it says.

In: a data directory, or the URLs of a database and an artifact store. Out: findings; exit code 1 where there are any.
Refuses to know how to repair.
"""

from __future__ import annotations

from pathlib import Path

import click

from lorica.cli.output import emit, json_option, table


@click.group()
def command() -> None:
    """Look after a server's records and artifacts."""


@command.command()
@click.option(
    "--data-dir", type=click.Path(path_type=Path), default=Path("lorica-data"), show_default=True, help="The server's."
)
@click.option("--database", help="SQLAlchemy URL instead of SQLite in the data directory.")
@click.option("--artifacts", help="Directory or fsspec URL instead of the data directory's.")
@json_option
def check(data_dir: Path, database: str | None, artifacts: str | None, as_json: bool) -> None:
    """Verify records, journal and artifacts. Nothing is changed."""
    from lorica.core.errors import MissingError
    from lorica.store.artifacts import Artifacts
    from lorica.store.check import check as find
    from lorica.store.database import Database

    file = data_dir / "lorica.db"
    if database is None and not file.is_file():
        raise MissingError(f"{data_dir} holds no store: there is no {file.name} in it.", hint="Give --data-dir.")
    with Database.open(database or f"sqlite:///{file.absolute()}", own=False) as store:
        place = Artifacts(artifacts or (data_dir / "artifacts").absolute())
        findings = find(store, place)
        place.close()
    document = [{"kind": f.kind, "subject": f.subject, "message": f.message} for f in findings]
    text = table(("kind", "what"), [(f.kind, f.message) for f in findings]) if findings else "All is well."
    emit({"findings": document}, text, as_json=as_json)
    if findings:
        click.get_current_context().exit(1)
