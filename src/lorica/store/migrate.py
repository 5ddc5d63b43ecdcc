"""Migrations: a database is brought to the tables of this Lorica, or refused in a sentence.

In: an engine. Out: nothing; the database is current. Refuses to know what the revisions do.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from lorica.core.errors import StorageError


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "lorica.store:migrations")
    config.set_main_option("path_separator", "os")
    return config


def is_current(engine: sa.Engine) -> bool:
    """Whether the tables are those of this Lorica."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision() == head


def upgrade(engine: sa.Engine, where: str) -> None:
    """Run what is missing, in one transaction. Raises StorageError for a database of a later Lorica."""
    config = _config()
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    with engine.begin() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
        if found is not None and found not in known:
            raise StorageError(
                f"{where} was written by a later version of Lorica (revision {found!r}).",
                hint="Upgrade Lorica, or restore the copy of the database from before its upgrade.",
            )
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
