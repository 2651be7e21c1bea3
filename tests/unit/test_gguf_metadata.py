"""Settings in the metadata of GGUF files that transformers does not read are set, or the file is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import AutoConfig

from pocketllm.errors import SourceError
from pocketllm.source import gguf_model, resolve
from pocketllm.source.gguf_metadata import Metadata
from tests import gguf_files

SIZES = {
    **{"block_count": 2, "context_length": 4096, "embedding_length": 64, "feed_forward_length": 96},
    **{"attention.head_count": 2, "attention.head_count_kv": 1},
}
GEMMA = {**SIZES, "attention.key_length": 16, "attention.value_length": 16, "rope.freq_base": 1e4}


def read(tmp_path: Path, architecture: str, keys: dict[str, Any]) -> Any:
    """The configuration of a file, as the conversion makes it."""
    file = gguf_files.write_header(tmp_path / "x.gguf", architecture, {**SIZES, **keys})
    config = AutoConfig.from_pretrained(tmp_path, gguf_file=file.name)
    Metadata.of(gguf.GGUFReader(file), architecture, file).put_into(config)
    return config


@pytest.mark.parametrize("architecture", ["starcoder2", "stablelm"])
def test_base_of_positions(architecture: str, tmp_path: Path) -> None:
    config = read(tmp_path, architecture, {"rope.freq_base": 1e6})
    assert config.rope_parameters["rope_theta"] == 1e6


@pytest.mark.parametrize("architecture", ["stablelm", "nemotron", "phi3"])
@pytest.mark.parametrize("count", [24, 32])
def test_rotated_dimensions(architecture: str, count: int, tmp_path: Path) -> None:
    config = read(tmp_path, architecture, {"rope.dimension_count": count})
    assert config.rope_parameters["partial_rotary_factor"] == count / 32


def test_a_share_of_rotated_dimensions_that_is_not_exact(tmp_path: Path) -> None:
    sizes = {"embedding_length": 98, "rope.dimension_count": 1}
    config = read(tmp_path, "stablelm", sizes)
    assert int(49 * (1 / 49)) == 0 and int(49 * config.rope_parameters["partial_rotary_factor"]) == 1


def test_base_of_positions_by_kind_of_layer(tmp_path: Path) -> None:
    config = read(tmp_path, "gemma3", {**GEMMA, "rope.freq_base": 5e5, "rope.freq_base_swa": 2e4})
    assert config.rope_parameters["full_attention"]["rope_theta"] == 5e5
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 2e4


@pytest.mark.parametrize(
    ("architecture", "key", "value", "name"),
    [
        ("starcoder2", "attention.sliding_window", 2048, "sliding_window"),
        ("gpt-oss", "attention.sliding_window", 64, "sliding_window"),
        ("nemotron", "attention.layer_norm_epsilon", 0.5, "norm_eps"),
        ("falcon", "attention.layer_norm_epsilon", 0.5, "layer_norm_epsilon"),
        ("gemma2", "final_logit_softcapping", 8.0, "final_logit_softcapping"),
        ("qwen2moe", "expert_feed_forward_length", 24, "moe_intermediate_size"),
        ("qwen3", "attention.key_length", 64, "head_dim"),
    ],
)
def test_settings(architecture: str, key: str, value: Any, name: str, tmp_path: Path) -> None:
    keys = {"feed_forward_length": 256} if architecture == "falcon" else {}
    config = read(tmp_path, architecture, {**keys, key: value})
    assert getattr(config, name) == value


@pytest.mark.parametrize(
    ("architecture", "blocks", "scale"),
    [("gemma2", 46, 32), ("gemma2", 42, 16), ("gemma3", 62, 32), ("gemma3", 46, 16)],
)
def test_scale_of_attention(architecture: str, blocks: int, scale: int, tmp_path: Path) -> None:
    """As in llama.cpp: 27B models divide by the width per head, others by the dimension of heads."""
    config = read(tmp_path, architecture, {**GEMMA, "block_count": blocks})
    assert config.query_pre_attn_scalar == scale


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("qwen2", {"attention.sliding_window": 4096}),
        ("llama", {"attention.sliding_window": 8192, "rope.dimension_count": 32}),
        ("mamba", {"feed_forward_length": 0, "attention.head_count": 0, "ssm.inner_size": 128}),
        ("bloom", {"feed_forward_length": 256}),
        ("gemma3", {**GEMMA, "block_count": 6, "attention.sliding_window_pattern": 6}),
        ("gemma3", {**GEMMA, "attention.sliding_window_pattern": [True, True]}),
        ("gemma2", {**GEMMA, "rope.freq_base_swa": 1e4}),
        ("llama", {"logit_scale": 1.0, "attention.scale": 0.0, "attention.causal": True, "pooling_type": 1}),
        ("qwen3moe", {"expert_count": 128, "expert_gating_func": 1, "expert_weights_scale": 1.0}),
        ("llama", {"expert_count": 0, "expert_used_count": 0, "tensor_data_layout": "Meta AI original pth"}),
    ],
)
def test_settings_that_change_nothing(architecture: str, keys: dict[str, Any], tmp_path: Path) -> None:
    file = gguf_files.write_header(tmp_path / "x.gguf", architecture, {**SIZES, **keys})
    alone = AutoConfig.from_pretrained(tmp_path, gguf_file=file.name)
    if architecture.startswith("gemma"):
        alone.query_pre_attn_scalar = 16
    assert read(tmp_path, architecture, keys).to_dict() == alone.to_dict()


def test_blocks_that_predict_further_tokens() -> None:
    """A file counts them as blocks, transformers does not."""
    config, file = AutoConfig.for_model("qwen3", num_hidden_layers=2), Path("x.gguf")
    Metadata(file, "qwen35", {"block_count": 3, "nextn_predict_layers": 1}).put_into(config)
    with pytest.raises(SourceError, match=r"block_count is 3, .* num_hidden_layers 2"):
        Metadata(file, "qwen35", {"block_count": 3}).put_into(config)


def test_layers_of_another_kind() -> None:
    config = AutoConfig.for_model("qwen3_5_text", num_hidden_layers=2, full_attention_interval=2)
    Metadata(Path("x.gguf"), "qwen35", {"attention.recurrent_layers": [True, False]}).put_into(config)
    with pytest.raises(
        SourceError, match=r"recurrent_layers is \[False, True\], .* layer_types \[True, False\]"
    ):
        Metadata(Path("x.gguf"), "qwen35", {"attention.recurrent_layers": [False, True]}).put_into(config)


@pytest.mark.parametrize(
    ("architecture", "keys", "words"),
    [
        (
            "qwen2",
            {"attention.sliding_window": 512},
            "attention.sliding_window is 512, .* sliding_window None",
        ),
        (
            "llama",
            {"attention.sliding_window": 512},
            "attention.sliding_window is 512, .* sliding_window None",
        ),
        ("llama", {"attention.value_length": 16}, "attention.value_length is 16, .* head_dim 32"),
        ("qwen2", {"attention.key_length": 64}, "attention.key_length is 64, .* head_dim 32"),
        ("qwen2", {"rope.dimension_count": 16}, "dimension_count is 16, .* rotated dimensions 32"),
        ("gemma2", {**GEMMA, "rope.freq_base_swa": 5e4}, "freq_base_swa is 50000.0, .* rope_theta 10000.0"),
        (
            "gemma3",
            {**GEMMA, "attention.sliding_window_pattern": [True, False]},
            r"sliding_window_pattern is \[True, False\], .* layer_types \[True, True\]",
        ),
        ("falcon", {"feed_forward_length": 96}, "feed_forward_length is 96, .* ffn_hidden_size 256"),
        ("nemotron", {"attention.layer_norm_epsilon": [0.1, 0.2]}, "is .*0.2.* one value for every layer"),
        (
            "nemotron",
            {"attention.layer_norm_epsilon": 0.5, "attention.layer_norm_rms_epsilon": 0.25},
            "layer_norm_epsilon is 0.5, .*layer_norm_rms_epsilon 0.25",
        ),
        ("llama", {"expert_count": 8, "expert_used_count": 2}, "expert_count is 8, .* no experts"),
        ("qwen2", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, .* no such setting"),
        *(
            (architecture, {key: value}, f"{key} is {value}, .* no such setting")
            for architecture, key, value in [
                ("llama", "logit_scale", 0.5),
                ("llama", "attention.causal", False),
                ("llama", "rope.scale_linear", 4.0),
                ("mamba", "ssm.dt_b_c_rms", True),
                ("qwen3moe", "expert_gating_func", 2),
                ("minimax-m2", "expert_gating_func", 1),
            ]
        ),
    ],
)
def test_another_model_is_refused(
    architecture: str, keys: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(
        SourceError, match=rf"x.gguf: {architecture}\..*{words} from the file, .* original checkpoint"
    ):
        read(tmp_path, architecture, keys)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf"), "many"])
def test_values_that_are_not_possible(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(
        SourceError, match=rf"x.gguf: starcoder2.rope.freq_base is '?{wrong}'?, wanted a positive number"
    ):
        read(tmp_path, "starcoder2", {"rope.freq_base": wrong})


@pytest.mark.parametrize("architecture", ["lfm2", "minimax-m2"])
def test_the_base_of_a_file_that_names_none(architecture: str, tmp_path: Path) -> None:
    """It is that of llama.cpp, whatever the default of transformers is."""
    config = AutoConfig.for_model(
        architecture.replace("-", "_"), rope_parameters={"rope_type": "default", "rope_theta": 5e6}
    )
    Metadata(tmp_path / "x.gguf", architecture, {}).put_into(config)
    assert config.rope_parameters["rope_theta"] == 1e4


@pytest.mark.parametrize("architecture", ["stablelm", "nemotron"])
def test_all_dimensions_of_a_file_that_names_none_are_rotated(architecture: str, tmp_path: Path) -> None:
    assert read(tmp_path, architecture, {}).rope_parameters["partial_rotary_factor"] == 1


NEEDED = {"attention.head_count": 2, "attention.layer_norm_rms_epsilon": 1e-5}


@pytest.mark.parametrize(
    ("architecture", "keys", "missing"),
    [
        ("llama", {"attention.layer_norm_epsilon": 1e-5}, "attention.head_count"),
        ("llama", {"attention.head_count": 2}, "attention.layer_norm_epsilon"),
        ("qwen3moe", {**NEEDED, "expert_count": 4}, "expert_used_count"),
        ("gemma3", NEEDED, "attention.sliding_window"),
    ],
)
def test_settings_that_are_missing(architecture: str, keys: dict[str, Any], missing: str) -> None:
    """transformers would take its default, which is that of another model."""
    Metadata(Path("x.gguf"), "llama", NEEDED).need_readable()
    with pytest.raises(
        SourceError, match=rf"^x.gguf: does not say {architecture}.{missing}, .* original checkpoint"
    ):
        Metadata(Path("x.gguf"), architecture, keys).need_readable()


def test_the_conversion_refuses_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_model, "cache_folder", lambda: tmp_path / "cache")
    file = gguf_files.write(tmp_path / "tiny.gguf", gguf_files.model(), window=16)
    with pytest.raises(SourceError, match=r"tiny.gguf: llama.attention.sliding_window is 16, "):
        resolve(str(file))


@pytest.mark.filterwarnings("ignore:overflow")  # in the reader
@pytest.mark.parametrize(
    ("place", "words"),
    [
        (lambda offset: 0, r"overlaps output_norm.weight|output_norm.weight overlaps"),
        (lambda offset: offset - 32, "output_norm.weight overlaps .* wanted"),
        (lambda offset: 2**64 - 32, "output_norm.weight overlaps the header"),
        (lambda offset: 2**40, "not a readable GGUF file"),
    ],
    ids=["the first", "the one before", "the header", "beyond the end"],
)
def test_tensors_that_overlap(place: Any, words: str, tmp_path: Path) -> None:
    file = gguf_files.write(tmp_path / "tiny.gguf", gguf_files.model())
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "output_norm.weight")
    content, start = bytearray(file.read_bytes()), tensor.field.offset
    position = start + sum(part.nbytes for part in tensor.field.parts[:-1])
    offset = int(tensor.field.parts[-1][0])
    content[position : position + 8] = place(offset).to_bytes(8, "little")
    file.write_bytes(content)
    with pytest.raises(SourceError, match=rf"tiny.gguf: .*({words}).* fetch it again"):
        resolve(str(file))
