"""The plan of a run: what it counts agrees with what runs, and the command prints it or says what is wrong."""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import batches
import numpy as np
import pytest
import ranks
import tiny
import torch
from pages import typed
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel

from launcher.cli import main
from trainer import balance, calibrate, cards, costs, distributed, estimate, gradcache
from trainer.costs import PUBLISHED, Shape
from trainer.encoder import Encoder, build_random
from trainer.estimate import Job, Links, Rates

ROOT = Path(__file__).parent.parent
SHAPE = Shape(2, 64, 4, 256, 300, 70, 2)
PRETRAIN = sorted((ROOT / "configs" / "pretrain").glob("[a-z]*.yaml"))
FINETUNE = sorted((ROOT / "configs" / "finetune").glob("[a-z]*.yaml"))
START = {  # of the recipes whose model is the output of another one
    "small": "microsoft/MiniLM-L12-H384-uncased",
    "base": "google-bert/bert-base-uncased",
    "large": "google-bert/bert-large-uncased-whole-word-masking",
    "multilingual-small": "microsoft/Multilingual-MiniLM-L12-H384",
    "multilingual-base": "FacebookAI/xlm-roberta-base",
    "multilingual-large": "FacebookAI/xlm-roberta-large",
    "multilingual-large-instruct": "FacebookAI/xlm-roberta-large",
}


def encoder(shape: Shape, dropout: float = 0.1, *, half: bool = False) -> Any:
    sizes = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.positions,
        "type_vocab_size": shape.types,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    made = Encoder(build_random("bert", shape.vocabulary, 0, **sizes)).train()
    if half:
        made.forward = torch.autocast("cpu", dtype=torch.bfloat16)(made.forward)  # type: ignore[method-assign]
    return made


def rectangle(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(5, 300, (rows, length)), torch.ones(rows, length, dtype=torch.bool)


# --- counts against what runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, Shape(3, 32, 2, 48, 90, 40, 1)])
def test_parameters_are_those_of_a_built_encoder(shape: Shape) -> None:
    assert shape.parameters == sum(parameter.numel() for parameter in encoder(shape).parameters())


@pytest.mark.parametrize(
    ("name", "family", "millions"),
    [
        ("microsoft/MiniLM-L12-H384-uncased", "bert", 33),
        ("google-bert/bert-base-uncased", "bert", 110),
        ("google-bert/bert-large-uncased-whole-word-masking", "bert", 335),
        ("microsoft/Multilingual-MiniLM-L12-H384", "bert", 118),
        ("FacebookAI/xlm-roberta-base", "xlm-roberta", 278),
        ("FacebookAI/xlm-roberta-large", "xlm-roberta", 560),
    ],
)
def test_the_published_models_have_their_published_sizes(name: str, family: str, millions: int) -> None:
    shape = PUBLISHED[name]
    config = AutoConfig.for_model(family, **shape.config)
    with torch.device("meta"):
        whole = AutoModel.from_config(config)
    pooler = shape.hidden**2 + shape.hidden
    assert shape.parameters + pooler == sum(parameter.numel() for parameter in whole.parameters())
    assert shape.parameters + pooler == pytest.approx(1e6 * millions, rel=0.015)


@pytest.mark.parametrize(("rows", "length"), [(3, 17), (8, 64)])
def test_flop_are_those_that_torch_counts_forward_and_backward(rows: int, length: int) -> None:
    model, (ids, mask) = encoder(SHAPE), rectangle(rows, length)
    with FlopCounterMode(display=False) as counter:
        vectors = model(ids, mask)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        vectors.sum().backward()
    wanted = costs.flop(SHAPE, rows * length, rows * length**2)
    assert forward == wanted
    assert counter.get_total_flops() == 2 * wanted


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("rows", "length", "wider"), [(16, 16, 1), (16, 64, 1), (8, 64, 3)])
def test_kept_graphs_hold_what_saved_tensors_are_counted_to(
    dropout: float, half: bool, rows: int, length: int, wider: int
) -> None:
    shape = Shape(4, 64 * wider, 4, 256 * wider, 300, 70, 2)
    model, texts = encoder(shape, dropout, half=half), rectangle(rows, length)
    held = gradcache.activation_bytes(lambda: model(*texts), model.parameters())
    compute = costs.Compute("cpu", 1 << 20, half=half, dropout=dropout > 0)
    assert costs.saved(shape, rows * length, rows * length**2, compute) == pytest.approx(held, rel=0.12)


@pytest.mark.parametrize("budget", [0.0, math.inf])
def test_chunks_tokens_and_replays_are_those_of_a_step(budget: float) -> None:
    lengths = costs.draw(costs.Law((12, 0.6), (70, 0.9), 64), 12, 0, seed=1)
    compute = costs.Compute("cpu", 256, half=False, dropout=True)
    distributed.start(torch.device("cpu"), 60)
    step = calibrate.stepper(SHAPE, "fp32", torch.device("cpu"), compute)
    step.memory_budget = budget
    outcome = step(calibrate.texts(lengths, 300, 0), 0, 1e-4)
    work = costs.work(SHAPE, lengths, compute, budget)
    assert (work.tokens, work.computed) == (outcome.tokens, outcome.computed_tokens)
    assert (work.chunks, work.kept) == (outcome.chunks, outcome.kept)
    assert work.passes == SHAPE.layers * work.chunks * (2 if budget else 3)


def test_packed_texts_are_counted_without_padding_and_attend_to_themselves_alone() -> None:
    lengths = np.array([10, 4, 3, 3], np.int32)
    padded = costs.work(SHAPE, lengths, costs.Compute("gpu", 1000, half=True, dropout=True, packed=False))
    packed = costs.work(SHAPE, lengths, costs.Compute("gpu", 1000, half=True, dropout=True, packed=True))
    assert (padded.computed, packed.computed) == (40, 20)
    assert packed.flop == 3 * costs.flop(SHAPE, 20, 100 + 16 + 9 + 9)


def lengths_of_a_share() -> np.ndarray:
    whole = batches.make(8, 2, seed=0)
    return balance.deal(batches.share(whole, distributed.rank(), distributed.world())).tokens.lengths


def test_shares_are_what_ranks_get_of_a_batch(tmp_path: Path) -> None:
    job = _job(lengths=batches.make(8, 2, seed=0).tokens.lengths, batch=8, negatives=2)
    for planned, dealt in zip(job.shares(2), ranks.run(lengths_of_a_share, 2, tmp_path), strict=True):
        assert np.array_equal(planned, dealt)


# --- ranks -------------------------------------------------------------------------------------------------------


def collectives_of_a_step(stage: int) -> dict[str, float]:
    """Bytes that a ring sends for what one step hands to torch.distributed, by collective; large tensors alone."""
    import torch.distributed as dist

    sent: dict[str, float] = {}
    part = (distributed.world() - 1) / distributed.world()

    def counting(kind: str, name: str, argument: int, factor: float) -> None:
        function = getattr(dist, name, None)
        if function is None:
            return

        def call(*arguments: Any, **named: Any) -> Any:
            tensor = [*arguments, *(value for value in named.values() if isinstance(value, torch.Tensor))][argument]
            if tensor.numel() > 64:  # the norm, and whether all is well
                sent[kind] = sent.get(kind, 0) + factor * part * tensor.numel() * tensor.element_size()
            return function(*arguments, **named)

        setattr(dist, name, call)

    counting("all_reduce", "all_reduce", 0, 2)
    for name in ("all_gather_into_tensor", "all_gather_single"):
        counting("all_gather", name, 0, 1)
    for name in ("reduce_scatter_tensor", "reduce_scatter_single"):
        counting("reduce_scatter", name, 1, 1)
    step = calibrate.stepper(
        SHAPE, "fp32", torch.device("cpu"), costs.Compute("cpu", 64, half=False, dropout=True), stage
    )
    step(_pairs(), 0, 1e-4)
    sent.clear()
    step(_pairs(), 1, 1e-4)
    return sent


def _pairs() -> Any:
    return calibrate.texts(np.full(64, 8, np.int32), 300, seed=0)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_bytes_of_each_collective_are_those_that_a_step_hands_over(stage: int, tmp_path: Path) -> None:
    sent, other = ranks.run(collectives_of_a_step, 2, tmp_path, stage)
    assert sent == other
    wanted = costs.collectives(
        trained=SHAPE.parameters, gathered=64, size=SHAPE.hidden, zero_stage=stage, world=2, passes=0
    )
    assert sent["all_reduce"] == pytest.approx(wanted["model gradient"], rel=0.01)
    gathered = wanted["embeddings"] + wanted["hashes"] + wanted.get("updated weights", 0)
    assert sent["all_gather"] == pytest.approx(gathered, rel=0.01)
    assert sent["reduce_scatter"] == wanted["their gradient"]


def test_bytes_are_those_that_a_cable_was_seen_to_carry() -> None:
    """docs/reliability.md: 128 pairs of 256 numbers over two ranks, ZeRO-0 (tests/test_hosts.py)."""
    sent = costs.collectives(trained=3_100_000 // 4 + 1000, gathered=128, size=256, zero_stage=0, world=2)
    assert sum(sent.values()) / 1e6 == pytest.approx(3.1 + 2 * 0.0655 + 0.001, rel=0.01)
    assert sent["embeddings"] == 64 * 256 * 4
    assert sent["hashes"] == 64 * 2 * 8


def state_of_an_engine(stage: int) -> float:
    """Bytes a parameter that an engine's tensors hold after a step of a few tokens."""
    import gc

    shape = Shape(2, 128, 2, 512, 30_000, 70, 2)
    compute = costs.Compute("cpu", 2048, half=False, dropout=True)
    step = calibrate.stepper(shape, "fp32", torch.device("cpu"), compute, stage)
    step(calibrate.texts(np.full(4, 3, np.int32), 300, seed=0), 0, 1e-4)
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) in (torch.Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values()) / shape.parameters


@pytest.mark.parametrize(("stage", "world"), [(0, 2), (1, 2), (2, 2), (1, 1), (3, 1)])
def test_a_rank_holds_the_weights_moments_and_gradients_that_the_plan_counts(stage: int, world: int, tmp_path: Path):
    held = min(ranks.run(state_of_an_engine, world, tmp_path, stage))
    parts = costs.state_parts(1, stage if world > 1 else 0, world)  # one rank shares out nothing
    # the gradient may be given back after a step, and comes again in the next
    assert parts["weights"] + parts["moments"] <= held + 0.1
    assert held <= sum(parts.values()) + 0.3


# --- the model of time -------------------------------------------------------------------------------------------


def test_the_fit_finds_the_rates_that_times_were_made_from_though_one_step_was_held_up() -> None:
    generator = np.random.default_rng(0)
    counts = generator.lognormal(0, 2, (10, 4)) * [1e12, 1e9, 100, 1e9]
    rates = np.array([1e-12, 2e-9, 1e-3, 0.0])
    seconds = counts @ rates
    assert calibrate.fit(counts, seconds, np.zeros(4)) == pytest.approx(rates, rel=1e-3, abs=1e-12)
    held_up = seconds * np.where(np.arange(10) == 3, 2, 1)
    assert calibrate.fit(counts, held_up, np.zeros(4)) == pytest.approx(rates, rel=0.05, abs=1e-11)
    least = np.array([2e-12, 0, 0, 0])
    assert calibrate.fit(counts, seconds, least)[0] == 2e-12  # no product is faster than a bare one


# seconds of encoding 16,384 texts, forward in bf16 on an H100: benchmarks/results/gpu-2026-11-26.json
ENCODINGS = [
    *((384, 16_384, 0.667), (384, 65_536, 0.359), (384, 131_072, 0.324)),
    *((768, 16_384, 0.731), (768, 65_536, 0.639), (768, 131_072, 0.634)),
]


@pytest.mark.parametrize(("hidden", "chunk", "seconds"), ENCODINGS)
def test_what_is_assumed_of_an_h100_is_within_a_quarter_of_what_it_encoded(
    hidden: int, chunk: int, seconds: float
) -> None:
    shape = Shape(12, hidden, hidden // 64, 4 * hidden, 250_002, 514)
    generator = np.random.default_rng(7)
    lengths = np.concatenate(
        [
            np.clip(np.round(generator.lognormal(math.log(median), sigma, 8192)), 3, longest)
            for median, sigma, longest in ((12, 0.6, 64), (70, 0.9, 512))
        ]
    )
    assert lengths.sum() == 955_443  # one more than the file says: the others are rounded alike
    compute = costs.Compute("gpu", chunk, half=True, dropout=False, packed=True)
    there, _ = costs.elements(shape, int(lengths.sum()), int((lengths**2).sum()), compute)
    rates = estimate.assumed(cards.CARDS["h100"], half=True, tf32=True)
    passes = shape.layers * len(gradcache.plan(lengths, chunk))
    flop = costs.flop(shape, int(lengths.sum()), int((lengths**2).sum()))
    wanted = flop / rates.products + there / rates.elements + passes * rates.layer_pass
    assert wanted == pytest.approx(seconds, rel=0.25)


def _job(**changes: Any) -> Job:
    lengths = costs.draw(costs.Law((12, 0.6), (70, 0.9), 64), 64, 0, seed=0)
    job = {
        "shape": SHAPE,
        "trained": SHAPE.parameters,
        "lengths": lengths,
        "batch": 64,
        "negatives": 0,
        "compute": costs.Compute("gpu", 512, half=True, dropout=True, packed=True),
        "zero_stage": 1,
        "sizes": (SHAPE.hidden,),
    }
    return Job(**(job | changes))


RATES = Rates(products=1e9, elements=1e9, layer_pass=1e-4, loss=1e8, update=1e9, step=0.01)
LINKS = Links(node=1e9, network=1e8, per_node=4, hop=1e-5)


def test_a_step_is_the_sum_that_is_worked_by_hand() -> None:
    lengths = np.full(8, 10, np.int32)
    compute = costs.Compute("gpu", 40, half=False, dropout=False, packed=True)
    found = estimate.predict(_job(lengths=lengths, batch=4, compute=compute, budget=0.0), 2, RATES, LINKS, 1e9)
    # a rank: 2 pairs, so 4 texts in one chunk of 40 tokens, forward twice and back, of 2 layers of 64 and 256
    products = 2 * (4 * 64**2 + 2 * 64 * 256)
    assert SHAPE.products == products
    assert found.seconds["encoder products"] == pytest.approx(4 * (2 * products * 40 + 4 * 2 * 64 * 400) / 1e9)
    assert found.seconds["between the products"] == pytest.approx(3 * 2 * (9 * 64 + 2 * 256) * 40 / 1e9)
    assert found.seconds["calls"] == pytest.approx(2 * 3 * 1e-4)
    assert found.seconds["weights of each chunk"] == pytest.approx(16 * products / 1e9)
    assert found.seconds["loss"] == pytest.approx(6 * 2 * 4 * 64 / 1e8)
    assert found.seconds["optimizer"] == pytest.approx(0.01 + SHAPE.parameters * (40 + 56 / 2) / 1e9)
    sent = 2 * 0.5 * 4 * 64 * 4 + 0.5 * 4 * 16 + (1 + 0.5) * 4 * SHAPE.parameters
    assert sum(found.sent.values()) == pytest.approx(sent)
    assert found.seconds["collectives"] == pytest.approx(sent / 1e9 + 6 * 1e-5)
    assert (found.imbalance, found.replayed) == (0, 1)


def test_a_table_larger_than_a_bucket_is_not_copied_into_one() -> None:
    small, large = (estimate.update_bytes(words, 60_000_000, 1, 2) for words in (50_000_000, 50_000_001))
    assert small == (16 + 8 + 16 + (40 + 16) / 2) * 60_000_000
    assert large == small - 16 * 50_000_001
    # without ZeRO there is no such bucket, and one rank has nothing to reduce
    assert estimate.update_bytes(50_000_001, 60_000_000, 0, 2) == (16 + 8 + 16 + 40) * 60_000_000
    assert estimate.update_bytes(50_000_001, 60_000_000, 0, 1) == (16 + 40) * 60_000_000


def test_more_ranks_share_the_encoder_and_the_moments_and_send_no_less() -> None:
    found = [estimate.predict(_job(), world, RATES, LINKS, 1e9) for world in (1, 2, 4, 8, 64)]
    for fewer, more in pairwise(found):
        assert more.seconds["encoder products"] < fewer.seconds["encoder products"]
        assert more.memory["moments"] < fewer.memory["moments"]
        assert sum(more.sent.values()) > sum(fewer.sent.values())
    assert found[0].seconds["collectives"] == 0
    # 8 ranks are two nodes: the network carries a tenth of what the links in a node do
    assert found[3].seconds["collectives"] > 5 * found[2].seconds["collectives"]
    assert all(prediction.tokens == found[0].tokens for prediction in found)


def test_the_rank_with_the_longest_texts_is_waited_for() -> None:
    lengths = np.array([10, 10, 10, 10, 10, 10, 10, 40], np.int32)
    even, odd = (
        estimate.predict(_job(lengths=each, batch=4), 2, RATES, LINKS, 1e9) for each in (np.full(8, 10), lengths)
    )
    assert even.imbalance == 0
    assert odd.imbalance > 0.25  # 70 tokens beside 40
    assert odd.seconds["encoder products"] > 1.5 * even.seconds["encoder products"]


# --- the command -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*PRETRAIN, *FINETUNE], ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_published_recipe_is_planned_by_one_command(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--config", str(config), f"output={tmp_path / 'plan.json'}", "cluster.price=2"]
    if config in FINETUNE:
        words += [f"model.path={START[config.stem]}", "cluster.gpus=[8,64]"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "limited by" in shown
    assert "efficiency" in shown
    content = json.loads((tmp_path / "plan.json").read_text())
    for plan in content["plans"]:
        steps = 3600 * plan["hours"] / plan["step_s"]
        assert f"{round(steps):,} steps" in shown
        assert plan["step_s"] == pytest.approx(sum(plan["seconds"].values()))
        assert plan["gpu_hours"] == pytest.approx(plan["gpus"] * plan["hours"])
        assert plan["cost"] == pytest.approx(2 * plan["gpu_hours"])
        assert plan["fits"]
    assert content["plans"][0]["efficiency"] == 1


def test_a_number_of_gpus_that_lanes_do_not_allow_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", f"model.path={START['small']}", "cluster.gpus=[64,128]", "precision=bf16"]
    assert main(words) == 0
    assert "lanes=64 cannot be dealt to 128 ranks" in capsys.readouterr().out
    assert main([*words, "lanes=128"]) == 0
    assert "lanes" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("gpus", "told"),
    [("[1]", "ZeRO-0 on one GPU,"), ("[1,8]", "ZeRO-0 on one GPU, ZeRO-1 on more,"), ("[8]", "ZeRO-1,")],
)
def test_the_stage_that_runs_is_told(gpus: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One rank has nobody to share the optimizer's state with (trainer/costs.py, stage_that_runs)."""
    assert main(["plan", f"model.path={START['small']}", f"cluster.gpus={gpus}", "precision=bf16"]) == 0
    assert f"bf16, {told} on h100" in capsys.readouterr().out


def test_a_card_that_is_too_small_is_told_by_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"model.path={START['large']}", "cluster.device=l4", "cluster.gpus=[8]", "cluster.memory_gib=4"]
    assert main(["plan", *words, "precision=bf16"]) == 0
    assert "limited by memory" in capsys.readouterr().out


@pytest.mark.parametrize("architecture", ["bert", "xlmr"])
def test_the_sizes_of_a_local_model_are_read_from_its_folder(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = getattr(tiny, architecture)(tmp_path / "model")
    wanted = sum(p.numel() for p in Encoder(AutoModel.from_pretrained(folder)).parameters())
    assert main(["plan", f"model.path={folder}", "precision=bf16", "cluster.gpus=[8]"]) == 0
    assert f"{wanted:,} parameters" in capsys.readouterr().out


def test_a_random_model_has_its_tokenizers_pieces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tiny.unigram()
    tokenizer.save_pretrained(tmp_path)
    words = ["model.path=random", f"tokenizer={tmp_path}", "model.hidden_size=32", "model.layers=2", "model.heads=2"]
    assert main(["plan", *words, "precision=bf16", "cluster.gpus=[8]"]) == 0
    built = build_random(
        *("xlm-roberta", len(tokenizer), 1),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=1536,
        max_position_embeddings=514,
    )
    wanted = sum(parameter.numel() for parameter in Encoder(built).parameters())
    assert f"{wanted:,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "model.path: must be given"),
        (["model.path=runs/nothing/model"], "model.path=runs/nothing/model: no such folder"),
        (["model.path={base}", "cluster.gpus=[3]"], "cluster.gpus=3: does not divide batch_size=32768"),
        (["model.path={base}", "cluster.gpus=[]"], "cluster.gpus=[]"),
        (["model.path={base}", "cluster.device=cpu"], "cluster.device=cpu: nothing is known"),
        (["model.path={base}", "cluster.device=h10"], "did you mean h100"),
        (["model.path={base}", "cluster.device=v100", "precision=bf16"], "precision=bf16: v100 has no bf16"),
        (["model.path={base}", "measured=[/nothing.json]"], "measured=/nothing.json: cannot be read"),
        (["model.path={base}", "measured=[{odd}]"], "is no calibration"),
        (["model.path={base}", "output=/proc/plan.json"], "output=/proc/plan.json: cannot be written"),
        (["model.path={base}", "clusters.gpus=[8]"], "did you mean cluster.gpus"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_one_message(
    words: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd.json").write_text('{"format": 1}')
    given = [word.format(base=START["base"], odd=tmp_path / "odd.json") for word in words]
    assert main(["plan", *given]) == 2
    assert said in capfd.readouterr().err


def calibration(**changes: Any) -> dict[str, Any]:
    content = {
        "format": 1,
        "device": "cpu",
        "precision": "fp32",
        "threads": 1,
        "ranks": 1,
        "memory": 8e9,
        "links": None,
    }
    return content | {"rates": vars(RATES)} | changes


def test_measured_rates_are_those_of_as_many_ranks_as_share_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    slow = {**vars(RATES), "products": 1e8}
    Path("here.json").write_text(json.dumps(calibration()))
    Path("two.json").write_text(json.dumps(calibration(ranks=2, rates=slow, links={**vars(LINKS), "per_node": 2})))
    Path("my.yaml").write_text(f"model.path: {START['small']}\nbatch_size: 64\n")
    (line,) = typed("quintet plan --config my.yaml")
    assert main([*line[1:], "output=plan.json"]) == 0
    first, second = json.loads(Path("plan.json").read_text())["plans"]
    # half of the texts each, at a tenth of the rate
    assert second["seconds"]["encoder products"] == pytest.approx(5 * first["seconds"]["encoder products"], rel=0.2)
    words, both = ["plan", "--config", "my.yaml", "cluster.device=cpu"], "measured=[here.json,two.json]"
    assert main([*words, "measured=[here.json]", "cluster.gpus=[1,2]"]) == 2
    assert "the link of 2 ranks is unknown" in capfd.readouterr().err
    assert main([*words, both, "cluster.gpus=[8]"]) == 2
    assert "cluster.network_gbs: must be given for 8 ranks" in capfd.readouterr().err
    assert main([*words, both, "cluster.gpus=[1,2]", "precision=bf16"]) == 2
    assert "is of precision=fp32, the recipe has bf16" in capfd.readouterr().err
    assert main([*words, both, "cluster.gpus=[1,2]", "cluster.device=h100"]) == 2
    assert "is of cpu" in capfd.readouterr().err


def small_measurement() -> Any:
    calibrate.SHAPES = (Shape(1, 32, 2, 64, 300, 130, 2), Shape(1, 64, 2, 128, 300, 130, 2))
    return calibrate.measure("fp32", torch.device("cpu"))


def test_ranks_measure_together_and_find_their_link(tmp_path: Path) -> None:
    content, _ = ranks.run(small_measurement, 2, tmp_path)
    assert content["ranks"] == 2
    assert content["links"]["per_node"] == 2
    assert content["links"]["node"] > 1e6
    assert len(content["steps"]) * calibrate.REPEATS == 20
    assert all(rate >= 0 and math.isfinite(rate) for rate in content["rates"].values())


def test_the_command_measures_this_machine_and_plans_from_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(calibrate, "SHAPES", (Shape(1, 32, 2, 64, 300, 130, 2), Shape(1, 64, 2, 128, 300, 130, 2)))
    file = tmp_path / "here" / "rates.json"
    assert main(["plan", f"measure={file}", "device=cpu"]) == 0
    assert "20 steps" in capsys.readouterr().out
    words = [f"model.path={START['small']}", "batch_size=64", "cluster.device=cpu", "cluster.gpus=[1]"]
    assert main(["plan", *words, f"measured=[{file}]"]) == 0
    shown = capsys.readouterr().out
    assert "measured: cpu, fp32, ranks in a node: 1" in shown
    assert "1 rank: limited by" in shown


def test_a_plan_from_the_command_line_needs_neither_data_nor_weights(tmp_path: Path) -> None:
    config = partial(main, ["plan", "--config", str(ROOT / "configs" / "pretrain" / "small.yaml"), "cluster.gpus=[8]"])
    assert config() == 0
