"""The stored form of a plan: every tensor in writing order, config.json, and the copied files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import pocketllm
from pocketllm.config import CodecConfig
from pocketllm.format.layout import STORE, CodebookEntry, DecoderEntry, Layout, MatrixEntry
from pocketllm.format.model_card import dense_card_name, stored_names
from pocketllm.format.report import KEPT_END
from pocketllm.plan.matrices import Dense, Matrix, Plan
from pocketllm.source.dense_checkpoint import DenseCheckpoint
from pocketllm.source.model_files import companions, need_config


@dataclass(frozen=True)
class StoredForm:
    """The stored form of a plan over a dense source. Only the checksums depend on the result of the fit."""

    source: DenseCheckpoint
    plan: Plan

    @cached_property
    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Every stored tensor in writing order: dense ones, encoded ones, codebooks, decoders."""
        sizes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for dense in self.plan.dense:
            sizes[dense.name] = self.dense_dtype(dense), dense.shape
        sizes.update(self.layout(self.no_checksums()).tensors())
        return sizes

    def dense_dtype(self, dense: Dense) -> torch.dtype:
        """The dtype in which a dense tensor is stored: its own; kept embeddings in at most 16 bits."""
        own = self.source.dtype(dense.name)
        return torch.bfloat16 if dense.reason == KEPT_END and own.itemsize > 2 else own

    @property
    def dense_bytes(self) -> int:
        """Bytes of all tensors that are left dense."""
        return sum(torch.Size(d.shape).numel() * self.dense_dtype(d).itemsize for d in self.plan.dense)

    @property
    def codebooks_are_stored(self) -> bool:
        """False if they are generated from a seed."""
        return self.plan.config.codec.codebook_source != "seed"

    def _codebook_shape(self, group: list[Matrix]) -> tuple[int, int]:
        spec = self.plan.specs[group[0].name]
        return spec.codebook_size, spec.vector_len

    @cached_property
    def _decoders(self) -> dict[str, CodecConfig]:
        """Decoder key -> codec settings, group by group: the order of the store."""
        return {
            self.plan.decoder_key(m): self.plan.config.codec_for(self.plan.specs[m.name].vector_len)
            for group in self.plan.groups().values()
            for m in group
        }

    @cached_property
    def copied_files(self) -> dict[str, Path]:
        """Tokenizer, chat templates, licence: what belongs to the model besides its weights, by stored name."""
        stored = stored_names(companions(self.source.folder)[0])
        return {stored[name]: self.source.folder / name for name in stored}

    @property
    def dense_card(self) -> Path | None:
        """The model card of the source, if it has one."""
        return self.copied_files.get(dense_card_name(self.copied_files) or "")

    @property
    def left_out(self) -> dict[str, str]:
        """Files of the source that are not copied, and why."""
        return companions(self.source.folder)[1]

    def layout(self, crcs: Mapping[str, str]) -> Layout:
        """The stored form, given the checksum of each matrix, `codebook N` and `decoder N`."""
        groups = self.plan.groups()
        codebook_of = {m.name: n for n, group in enumerate(groups.values()) for m in group}
        decoder_of = {key: n for n, key in enumerate(self._decoders)}
        return Layout(
            {
                m.name: MatrixEntry(
                    m.shape,
                    m.transposed,
                    codebook_of[m.name],
                    decoder_of[self.plan.decoder_key(m)],
                    self.plan.specs[m.name].stride,
                    m.strip_rows,
                    self.plan.rotation(m),
                    crcs[m.name],
                )
                for m in self.plan.matrices
            },
            tuple(
                CodebookEntry(
                    *self._codebook_shape(group),
                    None if self.codebooks_are_stored else self.plan.config.seed,
                    crcs[f"codebook {n}"],
                    self.plan.specs[group[0].name].window,
                )
                for n, group in enumerate(groups.values())
            ),
            tuple(
                DecoderEntry(codec, crcs[f"decoder {n}"]) for n, codec in enumerate(self._decoders.values())
            ),
        )

    @property
    def format_version(self) -> int:
        """The version of the format that it needs."""
        return self.layout(self.no_checksums()).format_version

    def config_text(self, crcs: Mapping[str, str]) -> str:
        """The body of config.json."""
        config = need_config(self.source.folder)
        config.pop("transformers_weights", None)  # weights have their usual name here
        if self.source.is_untied:
            _untie(config, self.source.model.config)
        config["quantization_config"] = {
            "quant_method": STORE,
            "producer": {"name": "pocketllm-codec", "version": pocketllm.__version__},
            "mode": "auto",
            **self.layout(crcs).to_dict(),
        }
        return json.dumps(config, ensure_ascii=False) + "\n"

    def no_checksums(self) -> dict[str, str]:
        """Checksums of the right width for counting bytes."""
        names = [m.name for m in self.plan.matrices]
        names += [f"codebook {n}" for n in range(len(self.plan.groups()))]
        names += [f"decoder {n}" for n in range(len(self._decoders))]
        return dict.fromkeys(names, "0" * 8)


def _untie(stored: dict[str, Any], config: Any) -> None:
    """Declare in the body of config.json that no parameters are tied, as in the configuration `config`."""
    stored["tie_word_embeddings"] = False
    for name in getattr(config, "sub_configs", {}):
        if isinstance(stored.get(name), dict):
            _untie(stored[name], getattr(config, name))
