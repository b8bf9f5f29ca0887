"""Stage `mine`: passages that a model ranks high for a query and that do not answer it, as negatives to train on.

Positive-aware mining is that of NV-Retriever (Moreira et al. 2024, arXiv 2407.15831): a candidate whose score comes
near the positive's is more likely an answer that nobody labelled than a negative.
"""

from __future__ import annotations

from dataclasses import dataclass

from data.settings import key
from trainer.monitor import StageWandbConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `quintet mine`."""

    model: str = key(help="model folder, run folder, or hub id")
    data: str | list[str] = key(help="shard folders, globs, or a mixture file")
    corpus: str = key("", help="BEIR folder, JSONL or text file to take negatives from; empty: the shards' passages")
    output: str = key(help="folder for the shards with negatives, and the report")
    negatives: int = key(7, help="negatives of a record; those that it brings along are kept first", low=1)
    within: str = key(
        "source",
        help="whose passages a record may get; a corpus is always taken whole",
        choices=("all", "source", "language"),
    )
    skip_top: int = key(0, help="candidates at the top that are left out", low=0)
    depth: int = key(200, help="candidates that are looked at, known answers not counted", low=1)
    margin: float | None = key(
        0.95, help="a negative scores at most this share of the positive's score; null: any score", above=0, high=1
    )
    absolute_margin: float | None = key(
        None, help="a negative scores at least this much below the positive; null: any score", low=0
    )
    sampling: str = key(
        "top", help="take the best candidates that the margin leaves, or draw from them", choices=("top", "random")
    )
    random_negatives: int = key(0, help="how many of the negatives are drawn at random, not searched", low=0)
    fill: str = key(
        "random",
        help="a record with too few candidates gets random passages, or is dropped",
        choices=("random", "drop"),
    )
    seed: int = key(0, help="of all draws", low=0)
    index: str = key("", help="faiss' name of an index for approximate search, such as IVF4096,Flat; empty: exact")
    index_search: str = key("", help="how the index is searched, in faiss' words, such as nprobe=64; empty: its own")
    unit: int = key(16_384, help="records that are searched together, and what a killed rank may lose", low=1)
    dtype: str = key("float32", help="how vectors of the passages are kept", choices=("float16", "float32"))
    tokens_per_chunk: int | None = key(
        None, help="padded tokens of one forward pass; null: 65536 on a GPU, 512 (bf16: 2048) on a CPU", low=1
    )
    precision: str = key("fp32", help="matrix products of the encoder", choices=("fp32", "bf16"))
    device: str = key("auto", help="where to compute; auto: the GPU if there is one", choices=("auto", "cpu", "cuda"))
    damaged: str = key("strict", help="damaged shards: strict stops, skip counts", choices=("strict", "skip"))
    allow_pipe: bool = key(False, help="let shard lists run commands (pipe:)")
    wandb: StageWandbConfig = key(StageWandbConfig(), help="mirror of progress and results")
    overwrite: bool = key(False, help="replace an output that an earlier mine wrote")

    def check(self) -> list[str]:
        """One message for each setting that cannot be, or not together with another."""
        problems = []
        searched = self.negatives - self.random_negatives
        if searched < 0:
            problems.append(f"random_negatives={self.random_negatives}: more than negatives={self.negatives}; lower it")
        if self.depth - self.skip_top < max(searched, 1):
            problems.append(
                f"depth={self.depth}: leaves {max(self.depth - self.skip_top, 0)} candidates behind skip_top="
                f"{self.skip_top}, and {searched} negatives are searched; raise depth"
            )
        if self.corpus and self.within == "language":
            problems.append(
                f"within=language: cannot be had of corpus={self.corpus}, whose passages name no language; "
                "remove one of them"
            )
        if self.index_search and not self.index:
            problems.append(f"index_search={self.index_search}: there is no index to search; give index, or remove it")
        return problems


def run(config: Config) -> None:
    """Write the records of `config.data` with negatives to `config.output`, and print what they got.

    Collective: every rank of a job calls it. A killed job goes on where it stopped.

    Raises:
        UserError: missing model, data or corpus, too few passages, an output that is in the way, or a full disk.
        DataError: damaged shards, under `strict`.
        NumericError: the model gives NaN or infinity.
    """
    from trainer import minework, work

    work.carry_out(config, minework.open_task, minework.begin, minework.mine, minework.figures)
