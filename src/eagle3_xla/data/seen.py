"""Which conversations are in the mix already: exact hashes and MinHash signatures in a database on disk, so that
neither memory nor the time for one conversation grows with their number."""

import sqlite3
from pathlib import Path

import numpy as np

SIMILAR, PERMUTATIONS, BANDS = 0.8, 128, 16  # near-duplicates: estimated Jaccard similarity of the word 5-grams
COMPARED = 64  # conversations that share a band; in a crowd that shares one, other bands tell a true near-duplicate
CACHE_KB = 128 << 10
# A random vector per row of a band: its signature values become one number.
MIX = np.random.default_rng(0).integers(1, 1 << 63, PERMUTATIONS // BANDS, np.uint64) | np.uint64(1)


class Seen:
    """Hashes and signatures by the order in which `add` got them; `file` is written anew."""

    def __init__(self, file: Path):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        self.database = sqlite3.connect(file, isolation_level=None)
        for pragma in (
            "journal_mode = OFF",
            "synchronous = OFF",
            "locking_mode = EXCLUSIVE",
            f"cache_size = -{CACHE_KB}",
        ):
            self.database.execute(f"PRAGMA {pragma}")
        self.database.execute("CREATE TABLE exact (hash BLOB PRIMARY KEY) WITHOUT ROWID")
        self.database.execute("CREATE TABLE chats (id INTEGER PRIMARY KEY, signature BLOB)")
        self.database.execute("CREATE TABLE bands (key INTEGER, chat INTEGER, PRIMARY KEY (key, chat)) WITHOUT ROWID")
        self.database.execute("BEGIN")
        one = f"SELECT chat FROM (SELECT chat FROM bands WHERE key = ? LIMIT {COMPARED})"
        self.candidates = f"SELECT signature FROM chats WHERE id IN ({' UNION '.join([one] * BANDS)})"

    def has(self, exact: bytes) -> bool:
        return self.database.execute("SELECT 1 FROM exact WHERE hash = ?", (exact,)).fetchone() is not None

    def has_similar(self, signature: bytes) -> bool:
        """signature: PERMUTATIONS values, uint32."""
        found = [row[0] for row in self.database.execute(self.candidates, band_keys(signature))]
        others = np.frombuffer(b"".join(found), np.uint32).reshape(-1, PERMUTATIONS)
        return bool(((others == np.frombuffer(signature, np.uint32)).mean(1) >= SIMILAR).any())

    def add(self, exact: bytes, signature: bytes | None) -> None:
        self.database.execute("INSERT OR IGNORE INTO exact VALUES (?)", (exact,))
        if signature is not None:
            chat = self.database.execute("INSERT INTO chats (signature) VALUES (?)", (signature,)).lastrowid
            rows = [(key, chat) for key in band_keys(signature)]
            self.database.executemany("INSERT OR IGNORE INTO bands VALUES (?, ?)", rows)

    def close(self) -> None:
        self.database.close()


def band_keys(signature: bytes) -> list[int]:
    """A number for each band; equal bands have equal ones."""
    rows = np.frombuffer(signature, np.uint32).reshape(BANDS, -1).astype(np.uint64)
    keys = (rows * MIX).sum(1) * np.uint64(BANDS) + np.arange(BANDS, dtype=np.uint64)
    return keys.view(np.int64).tolist()
