"""Stage a base model: bring it under the storage root as an ordinary Hugging Face folder.

`python -m tfslurm.training.staging (--gguf FILE | --path FOLDER | --hf ID[@REVISION]) DESTINATION` runs where
torch is installed; the last line of its standard output is a `StagedModel` as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from tfslurm.errors import InvalidError, StatusError
from tfslurm.files import fsync_folder
from tfslurm.training.programs import answering

INDEX = "model.safetensors.index.json"
COPIED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    INDEX,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
    "NOTICE*",
    "README.md",
)
NOT_FETCHED = ("*/*.safetensors", "consolidated*.safetensors")
"""The same weights again, in the layout of other programs."""


class StagedModel(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a staged folder holds; `parameters` counts tied weights once, `revision` is the Hub's commit."""

    architecture: str
    parameters: int
    vocabulary_size: int
    max_position_embeddings: int
    revision: str | None = None


def stage_gguf(gguf: Path, destination: Path) -> StagedModel:
    """Unpack a GGUF file into a Hugging Face folder at `destination`: bfloat16 weights, tokenizer, chat template.

    `destination` appears whole or not at all. Raises InvalidError where transformers cannot read
    the file, StatusError where `destination` exists.
    """
    if not gguf.is_file():
        raise InvalidError(f"{gguf} is no file", hint="give the path of a .gguf file")
    return _publish(destination, lambda folder: _unpack_gguf(gguf, folder))


def stage_folder(source: Path, destination: Path) -> StagedModel:
    """Copy a Hugging Face folder's weights, configuration and tokenizer to `destination`.

    Links, as in the hub's cache, are followed. `destination` appears whole or not at all. Raises
    InvalidError where a needed file is missing or broken, StatusError where `destination` exists.
    """
    _require_weights(source)
    return _publish(destination, lambda folder: _copy_files(source, folder))


def stage_hub(reference: str, destination: Path) -> StagedModel:
    """Copy the model that the Hub calls `ID[@REVISION]`, pinned to the commit that this is now.

    Raises what `hub.fetch` and `stage_folder` raise.
    """
    from tfslurm.training.hub import fetch

    _say(f"fetching {reference}")
    snapshot = fetch(reference, COPIED, NOT_FETCHED)
    return msgspec.structs.replace(stage_folder(snapshot.folder, destination), revision=snapshot.commit)


def inspect_folder(folder: Path) -> StagedModel:
    """Read what `StagedModel` tells from config.json and the safetensors headers; loads no weights."""
    config = read_config(folder)
    text = config.get("text_config", config)
    missing = [key for key in ("vocab_size", "max_position_embeddings") if not isinstance(text.get(key), int)]
    if missing:
        raise InvalidError(f"{folder / 'config.json'} lacks {', '.join(missing)}")
    architectures = config.get("architectures") or ["?"]
    return StagedModel(
        architecture=architectures[0],
        parameters=sum(math.prod(shape) for shape in shapes(folder).values()),
        vocabulary_size=text["vocab_size"],
        max_position_embeddings=text["max_position_embeddings"],
    )


def _publish(destination: Path, fill: Callable[[Path], None]) -> StagedModel:
    if destination.exists():
        raise StatusError(f"{destination} exists already", hint="remove the model first, or give another name")
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=destination.parent, prefix=f".{destination.name}."))
    try:
        fill(temporary)
        staged = inspect_folder(temporary)
        _check_tokenizer(temporary)
        settle(temporary)
        os.rename(temporary, destination)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    fsync_folder(destination.parent)
    return staged


def _unpack_gguf(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _say(f"unpacking {gguf.name}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise InvalidError(f"{gguf} cannot be read as a model: {error}") from error
    _forget_quantization(model)
    tokenizer.model_max_length = model.config.max_position_embeddings
    _say("saving as bfloat16")
    model.save_pretrained(folder, max_shard_size="5GB")
    tokenizer.save_pretrained(folder)


def _forget_quantization(model) -> None:
    """What is saved is dense: left alone, `save_pretrained` refuses, and loaders look for the GGUF file."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "_name_or_path"):
        model.config._name_or_path = ""


def weights(folder: Path) -> list[Path]:
    """The files with the weights: those that the index names, else model.safetensors, else all there are.

    Raises InvalidError where one of them is missing.
    """
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    elif (folder / "model.safetensors").is_file():
        names = ["model.safetensors"]
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise InvalidError(
            f"{folder} holds no .safetensors file",
            hint="pickled weights are not taken: save the model with save_pretrained first",
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InvalidError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names", hint="download the rest")
    return [folder / name for name in names]


def shapes(folder: Path) -> dict[str, list[int]]:
    """Every weight's shape by its name, from the headers of the files. Raises InvalidError."""
    return {name: shape for path in weights(folder) for name, shape in _header_shapes(path)}


def read_config(folder: Path) -> dict:
    """config.json of an unquantized model. Raises InvalidError."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InvalidError(f"{folder} holds no config.json", hint="give a Hugging Face model folder") from None
    except ValueError as error:
        raise InvalidError(f"{path} is not JSON: {error}") from error
    if config.get("quantization_config"):
        raise InvalidError(f"{path} has a quantization_config", hint="stage the unquantized model")
    return config


def _require_weights(source: Path) -> None:
    read_config(source)
    weights(source)


def _copy_files(source: Path, folder: Path) -> None:
    paths = {path for pattern in COPIED for path in source.glob(pattern) if path.is_file()}
    other = set(source.glob("*.safetensors")) - set(weights(source))
    for path in sorted(paths - other):
        _say(f"copying {path.relative_to(source)} ({path.stat().st_size / 1e6:,.1f} MB)")
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def _check_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidError(f"the tokenizer does not load: {error}", hint="is tokenizer.json in the folder?") from error


def _header_shapes(path: Path) -> list[tuple[str, list[int]]]:
    """Of one file, from its header: u64 length, JSON (https://huggingface.co/docs/safetensors)."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (struct.error, ValueError) as error:
        raise InvalidError(f"{path.name} is no safetensors file: {error}") from error
    return [(name, entry["shape"]) for name, entry in header.items() if name != "__metadata__"]


def settle(folder: Path, umask: int = 0o022) -> None:
    """Readable by everyone, or as `umask` says, and on disk before a rename makes it visible."""
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    fsync_folder(folder)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tfslurm.training.staging", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--gguf", type=Path, help="a GGUF file, to be unpacked to bfloat16")
    source.add_argument("--path", type=Path, help="a Hugging Face folder, to be copied")
    source.add_argument("--hf", metavar="ID[@REVISION]", help="a model of the Hugging Face Hub")
    parser.add_argument("destination", type=Path)
    arguments = parser.parse_args(argv)
    return answering(lambda: _stage(arguments))


def _stage(arguments: argparse.Namespace) -> StagedModel:
    if arguments.gguf:
        return stage_gguf(arguments.gguf, arguments.destination)
    if arguments.hf is not None:
        return stage_hub(arguments.hf, arguments.destination)
    return stage_folder(arguments.path, arguments.destination)


if __name__ == "__main__":
    sys.exit(main())
