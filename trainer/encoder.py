"""A Hugging Face encoder with pooling and normalisation: texts' token ids in, one vector per text out."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging as transformers_logging

from data.errors import UserError
from data.tokens import TextEncoder, load_tokenizer
from trainer.attention import Segments, is_packable, use_own_attention
from trainer.dropout import use_own_dropout
from trainer.firsttoken import is_for_first_tokens, read_all_tokens, read_first_tokens, reads_first_tokens

transformers_logging.disable_progress_bar()  # its bar for loading weights fills a log with carriage returns

POOLINGS = ("mean", "cls", "last")
SETTINGS_FILE = "quintet.json"


class Encoder(nn.Module):
    """Backbone, pooling, a cut and L2 normalisation.

    An embedding is the first `dimensions` of the pooled numbers, or all of them (0): Matryoshka, arXiv 2205.13147.
    forward(input_ids [n, T], attention_mask [n, T] bool) embeds n padded texts;
    forward(input_ids [1, T], segments=...) embeds packed texts, none of which sees another.
    Both return fp32 [n, D].
    """

    def __init__(
        self, backbone: PreTrainedModel, pooling: str = "mean", normalize: bool = True, dimensions: int = 0
    ) -> None:
        super().__init__()
        if getattr(backbone, "pooler", None) is not None:
            backbone.pooler = None  # type: ignore[assignment]  # BERT's tanh head is no part of an embedding, and would be a parameter without use
        self.backbone, self.pooling, self.normalize, self.dimensions = backbone, pooling, normalize, dimensions
        self.first_position = first_position(backbone)
        use_own_attention(backbone)
        use_own_dropout(backbone)
        change = read_first_tokens if pooling == "cls" else read_all_tokens
        change(backbone)

    @property
    def size(self) -> int:
        """D, the size of an embedding."""
        return self.dimensions or int(self.backbone.config.hidden_size)

    @property
    def max_positions(self) -> int:
        """The longest text, in tokens, that the position table holds."""
        return int(self.backbone.config.max_position_embeddings) - self.first_position

    @property
    def packable(self) -> bool:
        """Whether texts may be packed into one row (see Segments)."""
        return is_packable(self.backbone)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, segments: Segments | None = None
    ) -> Tensor:
        if segments is None:
            assert attention_mask is not None, "padded texts come with their mask"
            hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask.long()).last_hidden_state
            pooled = pool(hidden.float(), attention_mask, self.pooling)
        else:
            positions = segments.positions + self.first_position
            hidden = self.backbone(input_ids=input_ids, position_ids=positions, segments=segments).last_hidden_state
            hidden = hidden.squeeze(0).float()
            first_only = reads_first_tokens(self.backbone)
            pooled = hidden if first_only else pool_packed(hidden, segments.offsets, self.pooling)
        if self.dimensions:
            pooled = pooled[:, : self.dimensions]
        return F.normalize(pooled, dim=1) if self.normalize else pooled


def pool(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """One vector per padded text: hidden [n, T, D], mask [n, T] bool -> [n, D]. Texts are padded on the right."""
    if pooling == "cls":
        return hidden[:, 0]
    lengths = mask.sum(1)
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    return (hidden * mask[:, :, None]).sum(1) / lengths[:, None].clamp(min=1)


def pool_packed(hidden: Tensor, offsets: Tensor, pooling: str) -> Tensor:
    """One vector per packed text: hidden [T, D], offsets [n + 1] -> [n, D]."""
    if pooling == "cls":
        return hidden[offsets[:-1].long()]
    if pooling == "last":
        return hidden[offsets[1:].long() - 1]
    lengths = offsets.diff().long()
    # unsafe: without a look at the lengths, for which the host would wait
    sums = torch.segment_reduce(hidden, "sum", lengths=lengths, axis=0, unsafe=True)
    return sums / lengths[:, None].clamp(min=1)


def first_position(backbone: nn.Module) -> int:
    """0 for BERT; padding_idx + 1 for the RoBERTa family, whose position table starts behind the padding's number."""
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


def compile_layers(backbone: nn.Module) -> None:
    """Run the backbone's layers through torch.compile, which fuses what lies between their matrix products.

    They are equal, so one is compiled for all; word vectors stay outside, and may be looked up in any way.
    Shapes are left open, since the chunks of a batch have many. A last layer for first tokens only is left as it is:
    it is another one, with little between its products.
    """
    count = backbone.config.num_hidden_layers  # type: ignore[union-attr]
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            for layer in module:
                if not is_for_first_tokens(layer):
                    layer.compile(dynamic=True)


def freeze_positions(module: nn.Module) -> int:
    """Stop training the absolute position table, so that untrained places keep working; return its parameters.

    `module` has a `backbone` of transformers, with or without a head on it.
    """
    backbone: Any = module.backbone
    table = getattr(getattr(backbone.base_model, "embeddings", None), "position_embeddings", None)
    if table is None:
        return 0
    table.weight.requires_grad_(False)
    return int(table.weight.numel())


# --- building, opening and saving --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """An encoder with everything that its user must know: tokenizer, prompts, length, pooling."""

    encoder: Encoder
    tokenizer: Any
    query_prompt: str
    passage_prompt: str
    max_length: int
    name: str = ""
    prompts: Mapping[str, str] = field(default_factory=dict)  # for queries of certain tasks, by name

    @property
    def pooling(self) -> str:
        return self.encoder.pooling

    @property
    def normalize(self) -> bool:
        return self.encoder.normalize

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """Texts to ids, cut to the model's length. Made once: it can take longer than to embed a few texts."""
        return TextEncoder(self.tokenizer, self.max_length)


def build_random(architecture: str, vocab_size: int, padding_id: int, **sizes: Any) -> PreTrainedModel:
    """A backbone with random weights from a transformers architecture name and its configuration's own keys.

    Raises:
        UserError: the architecture is unknown or the sizes do not fit together.
    """
    try:
        config = AutoConfig.for_model(architecture, vocab_size=vocab_size, pad_token_id=padding_id, **sizes)
        return AutoModel.from_config(config, attn_implementation="sdpa" if architecture != "mpnet" else "eager")
    except (ValueError, KeyError) as error:
        raise UserError(f"model.architecture={architecture}: {error}") from None


def load_backbone(path: str, **changes: Any) -> PreTrainedModel:
    """Open a transformers folder or hub id, weights from safetensors only, in fp32; never runs code that comes along.

    Raises:
        UserError: there is no such model, or it has no safetensors weights.
    """
    backbone, missing = load_weights(AutoModel, path, **changes)
    missing = [name for name in missing if not name.startswith("pooler.")]
    if missing:
        raise UserError(f"model.path={path}: the weights lack {', '.join(missing[:3])}; it is not this architecture's")
    return backbone


def load_weights(kind: Any, path: str, *, key: str = "model.path", **changes: Any) -> tuple[PreTrainedModel, list[str]]:
    """Open a model as `load_backbone` does: the model, and the names of the parameters that its files lack.

    Args:
        kind: a class of transformers such as AutoModel.
        key: the configuration key that names the model, for messages.

    Raises:
        UserError: there is no such model, or it has no safetensors weights.
    """
    options = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False, **changes}
    try:
        model, report = _load_quietly(kind, path, options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{key}={path}: cannot be opened: {reason}; give a model folder or a hub id") from None
    return model, sorted(report["missing_keys"])


def _load_quietly(kind: Any, path: str, options: dict[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, without the pooler that embeddings do not use, and transformers' report on the weights."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it prints a table of every weight that a pretraining head left over
    try:
        return kind.from_pretrained(path, output_loading_info=True, add_pooling_layer=False, **options)
    except TypeError:  # a kind that has no pooler to leave out
        return kind.from_pretrained(path, output_loading_info=True, **options)
    finally:
        transformers_logging.set_verbosity(level)


def open_model(path: str | Path, *, device: str | torch.device = "cpu") -> Model:
    """Open a model for use: a folder written by Quintet or sentence-transformers, a transformers folder, or a hub id.

    Prompts, length and pooling are read from the folder; a bare transformers model gets E5's (mean pooling,
    "query: " and "passage: ").

    Raises:
        UserError: missing model, or one whose settings cannot be read.
    """
    folder = local_folder(str(path))
    settings = _settings(folder)
    backbone = load_backbone(str(folder))
    encoder = Encoder(backbone, settings.pooling, settings.normalize, settings.dimensions)
    tokenizer = load_tokenizer(str(folder))
    longest = min(settings.max_length or encoder.max_positions, encoder.max_positions)
    encoder = encoder.to(device).eval()
    query, passage = settings.query_prompt, settings.passage_prompt
    return Model(encoder, tokenizer, query, passage, longest, Path(path).name, settings.prompts)


def local_folder(path: str, key: str = "model") -> Path:
    """The model's folder; a hub id is fetched into the hub's own cache first. Raises UserError naming the `key`."""
    if os.path.isdir(path):
        if not (Path(path) / "config.json").is_file():
            raise UserError(f"{key}={path}: the folder has no config.json; give the folder of an exported model")
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, ignore_patterns=["*.bin", "*.h5", "*.onnx", "*.msgpack", "*.py", "*.pt"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{key}={path}: no such folder, and not to be had from the hub: {reason}") from None


@dataclass(frozen=True)
class ModelSettings:
    """How embeddings are made from the backbone; stored beside the weights as quintet.json."""

    query_prompt: str = "query: "
    passage_prompt: str = "passage: "
    pooling: str = "mean"
    normalize: bool = True
    max_length: int = 0  # 0: as long as the position table allows
    prompts: dict[str, str] = field(default_factory=dict)  # for queries of certain tasks, by name
    dimensions: int = 0  # numbers of an embedding; 0: all that the backbone gives


def _settings(folder: Path) -> ModelSettings:
    try:
        if (folder / SETTINGS_FILE).is_file():
            return ModelSettings(**json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8")))
        if (folder / "modules.json").is_file():
            return _sentence_transformers_settings(folder)
    except (ValueError, TypeError, KeyError, OSError, SafetensorError) as error:
        raise UserError(f"model={folder}: its settings cannot be read: {error}") from None
    return ModelSettings()


def _sentence_transformers_settings(folder: Path) -> ModelSettings:
    """Read the sentence-transformers layout: modules.json names the folders of its parts."""

    def read(name: str) -> dict[str, Any]:
        file = folder / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    parts = {str(module["type"]).rsplit(".", 1)[-1]: str(module["path"]) for module in modules}
    unknown = sorted(set(parts) - {"Transformer", "Pooling", "Dense", "Normalize"})
    if unknown:
        raise ValueError(f"modules.json has {', '.join(unknown)}, which this encoder does not have")
    prompts = read("config_sentence_transformers.json").get("prompts", {})
    sides = ("query", "document", "passage")
    settings = ModelSettings(
        query_prompt=prompts.get("query", ""),
        passage_prompt=prompts.get("document", prompts.get("passage", "")),
        pooling=_pooling(read(f"{parts.get('Pooling', '1_Pooling')}/config.json")),
        normalize="Normalize" in parts,
        prompts={name: text for name, text in prompts.items() if name not in sides and isinstance(text, str)},
        dimensions=_cut(folder / parts["Dense"]) if "Dense" in parts else 0,
    )
    return replace(settings, max_length=int(read("sentence_bert_config.json").get("max_seq_length") or 0))


def _cut(folder: Path) -> int:
    """How many numbers are left by a dense layer that only cuts: the first rows of the identity, and nothing else."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "model.safetensors")
    matrix = weights.get("linear.weight")
    linear = str(config.get("activation_function", "")).endswith(".Identity")
    cuts = matrix is not None and matrix.equal(torch.eye(*matrix.shape, dtype=matrix.dtype))
    if not cuts or not linear or list(weights) != ["linear.weight"]:
        raise ValueError("modules.json has a Dense layer that does more than cut, which this encoder does not have")
    return len(weights["linear.weight"])


def _pooling(config: dict[str, Any]) -> str:
    """The pooling of a sentence-transformers folder, in the classic flags or the newer single key."""
    classic = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}
    modes = [name for key, name in classic.items() if config.get(f"pooling_mode_{key}")]
    modes = modes or [str(config.get("pooling_mode", "mean")).replace("lasttoken", "last")]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(f"pooling {modes} is not one of {', '.join(POOLINGS)}")
    return modes[0]


def save_settings(folder: Path, settings: ModelSettings) -> None:
    """Write quintet.json."""
    (folder / SETTINGS_FILE).write_text(json.dumps(vars(settings), indent=2) + "\n", encoding="utf-8")
