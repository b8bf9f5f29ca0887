"""Stage `decontaminate`: training pairs that stand in evaluation data, counted, and left out on request.

The rule is that of Brown et al. 2020 (arXiv 2005.14165, section 4 and appendix C): 13 words in a row, or the whole text
where it is shorter. Equal queries, passages and pairs are counted apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from data.settings import key

_REASONS = ("query", "passage", "pair", "query_ngram", "passage_ngram")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `quintet decontaminate`."""

    data: str | list[str] = key(help="training data: shard folders, globs, or a mixture file")
    against: str | list[str] = key(help="evaluation data: JSONL files of pairs and BEIR folders")
    output: str = key("", help="folder for overlap.json and the kept shards; empty: only the table is printed")
    drop: list[str] = key([], help=f"reasons to leave a pair out, of {', '.join(_REASONS)}; empty: none, count only")
    split: str = key("test", help="which qrels/SPLIT.tsv of a BEIR folder")
    ngram: int = key(13, help="words in a row that are an overlap", low=2, high=100)
    shortest: int = key(
        8, help="words of the shortest text that is looked for inside of others; a shorter one must be all", low=1
    )
    characters: int = key(
        2, help="characters that count as a word where a script has no blanks between words", low=1, high=20
    )
    examples: int = key(5, help="examples of each source, evaluation set and reason in overlap.json", low=0)
    texts: bool = key(False, help="put the texts of examples and of dropped pairs into the files, not only their ids")
    workers: int = key(0, help="processes; 0: one for each core", low=0)
    shard_mib: int = key(64, help="size of a shard, in MiB", low=1, high=4096)
    damaged: str = key("strict", help="damaged shards: strict stops, skip counts", choices=("strict", "skip"))
    allow_pipe: bool = key(False, help="let shard lists run commands (pipe:)")
    overwrite: bool = key(False, help="replace an output that an earlier decontaminate wrote")

    def check(self) -> list[str]:
        """One message for each setting that cannot be, or not together with another."""
        problems = [f"drop={word}: no reason; take some of {', '.join(_REASONS)}" for word in _unknown(self.drop)]
        if self.drop and not self.output:
            problems.append(f"drop={self.drop}: what is kept needs a place; give output=FOLDER")
        if self.shortest > self.ngram:
            problems.append(f"shortest={self.shortest}: is above ngram={self.ngram}; lower it, or raise ngram")
        return problems


def _unknown(words: list[str]) -> list[str]:
    return [word for word in words if word not in _REASONS]


def run(config: Config) -> None:
    """Compare training pairs with evaluation data, print a table, and write what `output` and `drop` ask for.

    Raises:
        UserError: missing data, an output that is in the way, a full disk, or nothing that would be kept.
        DataError: damaged shards, under `strict`.
    """
    from trainer import overlap

    overlap.carry_out(config)
