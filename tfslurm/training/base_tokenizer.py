"""A base model's tokenizer, with what training must know about it."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from tfslurm.errors import InvalidError
from tfslurm.files import read_json


class BaseTokenizer:
    """The tokenizer of a staged folder, read without the network.

    Raises InvalidError where there is no fast tokenizer (one with tokenizer.json: masks need to know
    which characters a token covers) or no end-of-sequence token.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self.hugging_face = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise InvalidError(f"the tokenizer in {folder} does not load: {error}") from error
        if not getattr(self.hugging_face, "is_fast", False):
            raise InvalidError(f"the tokenizer in {folder} has no tokenizer.json", hint="stage the model again with it")
        if self.hugging_face.eos_token_id is None:
            raise InvalidError(f"the tokenizer in {folder} names no eos_token", hint="set it in tokenizer_config.json")
        self.backend = self.hugging_face.backend_tokenizer
        self.backend.no_truncation()
        self.backend.no_padding()
        self.ends = self._ends(folder)
        """Ids at which generation stops."""
        self.size = self._size(folder)
        """Ids are below this: the rows of the model's embedding."""

    def _ends(self, folder: Path) -> frozenset[int]:
        generation = read_json(folder / "generation_config.json") or {}
        ends = generation.get("eos_token_id")
        more = ends if isinstance(ends, list) else [] if ends is None else [ends]
        return frozenset([self.eos, *more])

    @property
    def eos(self) -> int:
        return self.hugging_face.eos_token_id

    @cached_property
    def beginning(self) -> list[int]:
        """The ids that this tokenizer sets before plain text: [BOS] or nothing."""
        bos = self.hugging_face.bos_token_id
        ids = self.backend.encode("", add_special_tokens=True).ids
        return [bos] if bos is not None and ids[:1] == [bos] else []

    def _size(self, folder: Path) -> int:
        config = read_json(folder / "config.json") or {}
        return config.get("text_config", config).get("vocab_size") or len(self.hugging_face)

    @cached_property
    def specials(self) -> tuple[str, ...]:
        """The text of the tokens that stand for no text, such as `<|im_end|>`."""
        added = self.hugging_face.added_tokens_decoder
        ends = [self.hugging_face.convert_ids_to_tokens(end) for end in self.ends if end < len(self.hugging_face)]
        return tuple({token.content for token in added.values() if token.special} | set(ends))

    @property
    def template(self) -> str | None:
        """The chat template, or None; of several, the default."""
        template = self.hugging_face.chat_template
        return template.get("default") if isinstance(template, dict) else template

    @cached_property
    def hash(self) -> str:
        """SHA-256 over all that decides which ids a text becomes, hex."""
        parts = [self.backend.to_str(), sorted(self.ends), self.eos, self.beginning]
        return _sha256(parts)

    @cached_property
    def template_hash(self) -> str:
        return _sha256(self.template)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
