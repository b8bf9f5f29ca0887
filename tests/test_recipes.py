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
    if "mixtures" not in path.parts and not path.name.startswith("_")
)
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
    return config.load(config_class, [CONFIGS / recipe], [f"{name}=given" for name in missing], fixed=stage.fixed)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_loads_for_its_stage(recipe: str) -> None:
    load(recipe)


def test_every_published_recipe_is_there() -> None:
    assert {path.stem for path in (CONFIGS / "pretrain").glob("[!_]*.yaml")} == set(PUBLISHED)


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
