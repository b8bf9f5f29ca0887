"""Every recipe loads, and the published ones say what the papers say (the numbers are typed in here by hand)."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from pairs import pairs, write_shards

from data import mixture
from launcher import config
from launcher.cli import STAGES

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in CONFIGS.rglob("*.yaml")
    if not {"mixtures", "cluster"} & set(path.parts) and not path.name.startswith(("_", "published"))
)
# The recipes of demo-full.sh leave the places to it. What it gives beside the keys that must be given:
PLACES = {
    "collect-student": ["keep_vocab=[pairs.jsonl]"],
    "collect-guide": ["keep_vocab=[pairs.jsonl]"],
    "pack": ["output=shards"],
    "pretrain": ["loss.guide.path=guide"],
    "pretrain-kept": ["loss.guide.path=guide"],
    "finetune": ["scores=scores", "loss.guide.path=guide"],
    "evaluate": ["data=pairs.jsonl"],
}
MIXTURE = CONFIGS / "mixtures/me5-pretrain.yaml"

# (initial model, peak learning rate, steps)
PUBLISHED = {
    "small": ("microsoft/MiniLM-L12-H384-uncased", 3e-4, 20_000),
    "base": ("google-bert/bert-base-uncased", 2e-4, 20_000),
    "large": ("google-bert/bert-large-uncased-whole-word-masking", 1e-4, 20_000),
    "multilingual-small": ("microsoft/Multilingual-MiniLM-L12-H384", 3e-4, 30_000),
    "multilingual-base": ("FacebookAI/xlm-roberta-base", 2e-4, 30_000),
    "multilingual-large": ("FacebookAI/xlm-roberta-large", 1e-4, 30_000),
}
# (peak learning rate, batch, epochs, pairs of an epoch); how many of the English ones are from NQ is not published
FINETUNED = {
    "small": (3e-5, 256, 3, 835_000),
    "base": (2e-5, 256, 3, 835_000),
    "large": (1e-5, 256, 3, 835_000),
    "multilingual-small": (3e-5, 512, 2, 1_596_000),
    "multilingual-base": (2e-5, 512, 2, 1_596_000),
    "multilingual-large": (1e-5, 512, 2, 1_596_000),
    "multilingual-large-instruct": (1e-5, 512, 2, 1_800_000),
}
THOUSANDS = {
    "msmarco-passage": 500,
    "msmarco-document": 70,
    "open-qa": 220,
    "nli": 275,
    "eli5": 100,
    "nllb": 100,
    "dureader": 86,
    "fever": 70,
    "hotpotqa": 70,
    "quora": 15,
    "mrtydi": 50,
    "miracl": 40,
}
MILLIONS_SAMPLED = {
    "wikipedia": 150,
    "mc4": 160,
    "ccnews": 160,
    "nllb": 160,
    "reddit": 160,
    "s2orc": 50,
    "stackexchange": 50,
    "xp3": 80,
    "sbert": 10,
}


def stage_of(recipe: str) -> str:
    """configs/pretrain/base.yaml and configs/tiny/pretrain.yaml are both for the stage pretrain."""
    names = [part.partition("-")[0] for part in Path(recipe).with_suffix("").parts]
    stages = [name for name in names if name in STAGES]
    assert stages, f"configs/{recipe}: neither its folder nor its name begins with a stage"
    return stages[0]


def load(recipe: str) -> Any:
    stage = STAGES[stage_of(recipe)]
    config_class = importlib.import_module(stage.module).Config
    given = yaml.safe_load((CONFIGS / recipe).read_text())
    missing = [key.name for key in config.describe(config_class) if key.mandatory and key.name not in given]
    missing = [name for name in missing if name.partition(".")[0] not in given]
    places = PLACES.get(Path(recipe).stem, []) if Path(recipe).parent.name in ("full", "best", "gpu") else []
    words = [*(f"{name}=given" for name in missing), *places]
    return config.load(config_class, [CONFIGS / recipe], words, fixed=stage.fixed)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_loads_for_its_stage(recipe: str) -> None:
    load(recipe)


def test_every_published_recipe_is_there() -> None:
    assert {path.stem for path in (CONFIGS / "pretrain").glob("[!_]*.yaml")} == set(PUBLISHED)
    assert {path.stem for path in (CONFIGS / "finetune").glob("[!_]*.yaml")} == set(FINETUNED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipe_has_the_published_values(name: str) -> None:
    recipe = load(f"pretrain/{name}.yaml")
    assert (recipe.model.path, recipe.lr, recipe.steps) == PUBLISHED[name]
    assert recipe.batch_size == 32_768
    assert recipe.temperature == 0.01
    assert recipe.max_length == 128
    assert recipe.warmup_steps == 1_000
    assert recipe.weight_decay == 0.01
    assert recipe.model.pooling == "mean"
    assert recipe.model.freeze_positions is True
    assert (recipe.prompts.query, recipe.prompts.passage) == ("query: ", "passage: ")


@pytest.mark.parametrize("name", FINETUNED)
def test_the_recipe_of_fine_tuning_has_the_published_values(name: str) -> None:
    recipe = load(f"finetune/{name}.yaml")
    lr, batch_size, epochs, pairs_of_an_epoch = FINETUNED[name]
    assert (recipe.lr, recipe.batch_size) == (lr, batch_size)
    assert recipe.steps * batch_size == pytest.approx(epochs * pairs_of_an_epoch, rel=0.01)
    assert recipe.objective == "distillation"
    assert recipe.loss.distill == "kl"
    assert (recipe.alpha, recipe.temperature, recipe.negatives) == (0.2, 0.01, 7)
    assert (recipe.max_length, recipe.warmup_steps, recipe.weight_decay) == (192, 400, 0.01)
    assert recipe.model.pooling == "mean"
    assert recipe.model.freeze_positions is True
    assert recipe.missing_scores == "error"
    passage = "" if name.endswith("instruct") else "passage: "
    assert recipe.prompts.passage == passage


def test_the_instruct_recipe_asks_in_the_published_form() -> None:
    query = load("finetune/multilingual-large-instruct.yaml").prompts.query
    assert query == "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "


def opened(name: str, tmp_path: Path) -> mixture.Mixture:
    """A mixture of configs/mixtures over shards that stand where it looks for them."""
    folder = tmp_path / "configs/mixtures"
    folder.mkdir(parents=True)
    (folder / name).write_text((CONFIGS / "mixtures" / name).read_text())
    sources = yaml.safe_load((folder / name).read_text())["sources"]
    for number, (source, entry) in enumerate(sources.items()):
        write_shards((folder / entry["shards"]).resolve(), pairs(8, seed=number, source=source), source=source)
    return mixture.load(str(folder / name))


def test_the_mixture_of_fine_tuning_has_the_published_thousands(tmp_path: Path) -> None:
    found = opened("me5-finetune.yaml", tmp_path)
    assert {source.name: source.weight for source in found.sources} == THOUSANDS
    assert sum(THOUSANDS.values()) == 1_596
    assert {source.name for source in found.sources if source.symmetric} == {"nli", "nllb", "quora"}


def test_nli_goes_without_a_teacher_and_with_queries_on_both_sides(tmp_path: Path) -> None:
    flags = {source.name: (source.scores, source.symmetric) for source in opened("e5-finetune.yaml", tmp_path).sources}
    assert flags == {"msmarco": (True, None), "nq": (True, None), "nli": (False, True)}


def test_every_public_source_of_the_instruct_mixture_has_an_instruction(tmp_path: Path) -> None:
    found = opened("me5-instruct.yaml", tmp_path)
    assert [source.name for source in found.sources if not source.instruction] == ["synthetic"]
    assert len(found.sources) == 15
    assert {source.name for source in found.sources if source.symmetric} == {"nli", "quora"}


@pytest.mark.parametrize(("size", "gpus", "per_gpu"), [("small", 16, 2_048), ("base", 32, 1_024), ("large", 64, 512)])
def test_the_batch_divides_over_the_gpus_of_the_paper(size: str, gpus: int, per_gpu: int) -> None:
    recipe = load(f"pretrain/{size}.yaml")
    assert recipe.batch_size == gpus * per_gpu
    assert recipe.lanes % gpus == 0


def test_the_mixture_samples_the_published_millions(tmp_path: Path) -> None:
    folder = tmp_path / "configs/mixtures"
    folder.mkdir(parents=True)
    (folder / MIXTURE.name).write_text(MIXTURE.read_text())
    for number, name in enumerate(MILLIONS_SAMPLED):
        write_shards(tmp_path / "shards/me5" / name, pairs(8, seed=number, source=name), source=name)
    opened = mixture.load(str(folder / MIXTURE.name))
    assert {source.name: source.weight for source in opened.sources} == MILLIONS_SAMPLED
    assert opened.homogeneous
    assert all(source.symmetric is None for source in opened.sources)


def test_thirty_thousand_steps_are_one_pass_over_the_mixture() -> None:
    recipe = load("pretrain/multilingual-base.yaml")
    sampled = sum(MILLIONS_SAMPLED.values()) * 1_000_000
    assert recipe.batch_size * recipe.steps == pytest.approx(sampled, rel=0.01)
