"""Small record sets that several tests share: deterministic, multilingual, of uneven lengths."""

from __future__ import annotations

import random
from pathlib import Path

from data.index import Index
from data.records import Record
from data.shards import ShardWriter, write_index

_WORDS = {
    "en": ["river", "stone", "light", "window", "paper", "morning", "bread", "copper", "garden", "letter"],
    "de": ["Fluss", "Stein", "Licht", "Fenster", "Papier", "Morgen", "Brot", "Kupfer", "Garten", "Straße"],
    "el": ["ποτάμι", "πέτρα", "φως", "παράθυρο", "χαρτί", "πρωί", "ψωμί", "χαλκός", "κήπος", "γράμμα"],
    "ja": ["川", "石", "光", "窓", "紙", "朝", "パン", "銅", "庭", "手紙"],
}
LANGUAGES = tuple(_WORDS)


def pairs(count: int, *, seed: int = 0, source: str = "", negatives: int = 0) -> list[Record]:
    """`count` records with distinct queries and passages; the language changes from record to record."""
    rng = random.Random(seed)

    def text(lang: str, kind: str, number: int) -> str:
        return " ".join([*rng.choices(_WORDS[lang], k=rng.randint(2, 12)), f"{kind}{seed}.{number}"])

    records = []
    for number in range(count):
        lang = LANGUAGES[number % len(LANGUAGES)]
        hard = tuple(text(lang, f"n{rank}.", number) for rank in range(negatives))
        query, passage = text(lang, "q", number), text(lang, "p", number)
        records.append(Record(query, passage, source, lang, f"{source or 'r'}-{number}", hard))
    return records


def write_shards(
    folder: Path,
    records: list[Record],
    *,
    source: str = "pairs",
    kind: str = "block",
    block_records: int = 8,
    shard_bytes: int = 1 << 20,
) -> Index:
    """Write records as a folder of shards with its index."""
    with ShardWriter(folder, source, kind=kind, block_records=block_records, shard_bytes=shard_bytes) as writer:
        for record in records:
            writer.write(record)
    return write_index(folder, writer.close())
