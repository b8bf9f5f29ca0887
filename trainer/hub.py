"""An exported folder on the Hugging Face hub: the files of the export and no others, private unless asked otherwise."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path

from data.errors import UserError

# What an export consists of. Anything else in the folder stays here: states of an optimizer, logs, vectors.
_FILES = (
    "README.md",
    "model.safetensors",
    "config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "sentencepiece.bpe.model",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "pairing.json",
    "[1-3]_*/config.json",
    "2_Dense/model.safetensors",
    "onnx/*.onnx",
    "onnx/*.onnx_data",
    "onnx/*.onnx.data",
)
_NAME = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}")


def problem(push: str) -> str:
    """What is wrong with the name of a repository; empty when nothing is."""
    if _NAME.fullmatch(push):
        return ""
    return f"push={push}: not a repository; write push=ORGANISATION/NAME or push=USER/NAME"


def require_token() -> None:
    """Raise UserError when there is no token, before any work is done."""
    from huggingface_hub import get_token

    if not get_token():
        raise UserError(
            "push: there is no token for the hub; log in with `hf auth login` or set HF_TOKEN, with a token that may "
            "write (https://huggingface.co/settings/tokens), or set dry_run=true to see what would go up"
        )


def listing(folder: Path) -> tuple[dict[str, int], list[str]]:
    """The files that go up, with their bytes, and those that stay here; names are relative to the folder."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    going = {name: (folder / name).stat().st_size for name in names if _is_ours(name)}
    return going, [name for name in names if name not in going]


def _is_ours(name: str) -> bool:
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in _FILES)


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload the files of `listing` in one commit; the repository is made when it is not there. Returns its address.

    What an earlier export left there and this one has not, such as a graph of older weights, goes in the same commit.

    Raises:
        UserError: no token, a refusal of the hub, or a public repository where a private one was asked for.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    require_token()
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise UserError(
                f"push={repository}: is there and public; set private=false if everybody may see the model, or name "
                "another repository"
            )
        files = list(listing(folder)[0])
        api.upload_folder(
            folder_path=folder,
            repo_id=repository,
            allow_patterns=files,
            delete_patterns=list(_FILES),
            commit_message="Upload the exported model",
        )
    except OfflineModeIsEnabled:
        raise UserError(f"push={repository}: HF_HUB_OFFLINE is set; unset it to upload") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"push={repository}: the hub refused: {reason}; the export is in {folder}, so start again when it is mended"
        ) from None
    return str(address)
