"""A process that appends to a journal from several threads and prints each id once it is acknowledged.

`python writer_process.py URL THREADS BODY_BYTES [FILE_LIMIT]`; the last is the largest file that it may write.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading

from lorica.core.errors import StorageError
from lorica.store import journal
from lorica.store.database import Database
from lorica.store.journal import Entry


def main(url: str, threads: int, size: int, limit: int = 0) -> None:
    database = Database.open(url)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    def work(scope: str) -> None:
        for seq in range(1, 1_000_000):
            entry = Entry("anna", scope, "train", os.urandom(size), seq=seq)
            try:
                request, _ = database.submit(lambda c, e=entry: journal.append(c, e)).result()
            except StorageError as error:
                tell(f"full {error}")
                return
            tell(f"ok {scope} {seq} {request}")

    working = [threading.Thread(target=work, args=(f"s{i}",)) for i in range(threads)]
    for thread in working:
        thread.start()
    for thread in working:
        thread.join()


def tell(line: str) -> None:
    os.write(1, f"{line}\n".encode())  # one write: lines of two threads do not mix


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
