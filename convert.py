"""Everything on disk: checkpoint directories in the released layout, read, written and converted.

In and out: a model and its tokenizer, or a directory with config.json, *.safetensors and
tokenizer.json.  What a run writes and what was released are read by the same code.
Called by `model.py`, `train.py` and `sample.py`, and by people; calls `model.py`, `vision.py`,
`fp8_kernel.py`, and `data.py` for its kind of command line.

The idea.  A layout says for each parameter of the model which tensors of a directory its rows are:

    parameter                        released, a run's            the sources of stage 0
    visual.blocks.0.norm1.weight     the same                     vision_model.encoder.layers.0.
                                                                  layer_norm1.weight
    visual.blocks.0.attn.qkv.weight  the same                     ...self_attn.{q,k,v}_proj.weight
    model.layers.0.mlp.experts.      model.layers.0.mlp.experts.  as released
      gate_proj                        {0,1,...}.gate_proj.weight

so every conversion is one loop: read a parameter's rows by one layout, write them by another.  One
parameter and one file to be written are in memory at a time, whatever the size of the model.

Run `python convert.py merge --vit DIR --llm DIR --tokenizer DIR --out DIR`: stage 0, from a ViT and
a Qwen3.  `export RUN --out DIR`: what training wrote, with
all the files that Hugging Face code wants beside it.  `verify DIR [DIR]`: is a directory whole, and
how far is it from another.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from data import STRUCTURE, flag_parser, refuse_in_one_sentence
from fp8_kernel import BLOCK, Fp8Linear, convert_to_fp8, quantize_fp8
from model import LlavaOneVision, ModelConfig, init_linear, meta_model
from vision import CLIP_MEAN, CLIP_STD, MAX_PIXELS, MIN_PIXELS, Merger, VisionConfig

SHARD = 5e9  # bytes of a file of weights at most
SCALES = "_scale_inv"  # behind the name of a weight in FP8: the name of its scales
PUBLISHED = "lmms-lab/LLaVA-OneVision-1.5-8B-Instruct"  # whose modelling code config.json points at
VIT_NAMES = (  # in turn: what in our names of the ViT is what in those of its own checkpoint
    ("visual.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.class_pos_emb", "vision_model.class_pos_emb"),
    ("visual.pre_layernorm.", "vision_model.pre_layrnorm."),  # spelt so
    ("visual.blocks.", "vision_model.encoder.layers."),
    (".norm", ".layer_norm"), (".attn.proj.", ".self_attn.out_proj."))
NOT_OURS = ("post_layernorm.weight", "post_layernorm.bias", "inv_freq")  # sources have, we do not
# ChatML as data.render writes it, in Jinja for Hugging Face's tokenizers
CHAT_TEMPLATE = r"""
{%- macro begin(role) %}{{ '<|im_start|>' + role + '\n' }}{% endmacro -%}
{%- if messages[0].role != 'system' %}
{{- begin('system') + 'You are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
{{- begin(message.role) }}
{%- if message.content is string %}{{ message.content }}
{%- else %}
{%- for item in message.content %}
{%- if 'text' in item %}{{ item.text }}
{%- elif item.type == 'video' or 'video' in item %}
{{- '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- endif %}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ begin('assistant') }}{% endif %}
""".strip()
Layout = dict[str, list[str]]  # the tensors whose rows, one after the other, are a parameter's



# ------------------------------------------------------------------------------ configuration files


def read_json_object(file: Path) -> dict:
    """The JSON object in a file.  Raises ValueError naming the file if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object")
    return content


def number(file: Path, section: dict, key: str) -> float:
    """A positive number of a configuration file.  Raises ValueError if it is none."""
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{file}: {key} is {value!r}, not a positive number")
    return value


def whole_numbers(file: Path, section: dict, *keys: str) -> dict[str, int]:
    """Positive whole numbers of a configuration file, by name.  Raises ValueError."""
    for key in keys:
        if number(file, section, key) % 1:
            raise ValueError(f"{file}: {key} is {section[key]}, not a whole number")
    return {key: int(section[key]) for key in keys}


def refuse_others(file: Path, section: dict, supported: dict[str, Any]) -> None:
    """Raise ValueError if a setting is there and has another value than the one supported."""
    for key, value in supported.items():
        if section.get(key) not in (None, value):
            raise ValueError(f"{file}: {key} is {section[key]}, only {value} is supported")


def decoder_fields(file: Path, text: dict) -> dict[str, Any]:
    """The decoder's fields of a ModelConfig, from a `text_config` or Qwen3's own `config.json`.

    Raises ValueError naming the file and what it lacks.
    """
    rope = text.get("rope_parameters") or text  # transformers 5 nests the base
    scaling = text.get("rope_scaling") or rope
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        raise ValueError(f"{file}: rope_parameters or rope_scaling is no object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{file}: rotary scaling {kind!r} is not supported")
    refuse_others(file, text, {"attention_bias": False, "hidden_act": "silu",
                               "use_sliding_window": False, "partial_rotary_factor": 1.0,
                               "attention_dropout": 0.0})
    kinds = text.get("layer_types") or []
    if not isinstance(kinds, list) or {*map(str, kinds)} - {"full_attention"}:
        raise ValueError(f"{file}: layer_types has others than full_attention, which is not "
                         "supported")
    fields = whole_numbers(
        file, text, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings")
    fields |= {key: number(file, text, key) for key in ("rms_norm_eps", "initializer_range")}
    if text.get("num_experts"):
        refuse_others(file, text, {"decoder_sparse_step": 1, "mlp_only_layers": [],
                                   "norm_topk_prob": True})
        fields |= whole_numbers(file, text, "num_experts", "num_experts_per_tok",
                                "moe_intermediate_size")
        if fields["num_experts_per_tok"] > fields["num_experts"]:
            raise ValueError(f"{file}: num_experts_per_tok is {fields['num_experts_per_tok']}, of "
                             f"{fields['num_experts']} experts")
    return {**fields, "rope_theta": number(file, rope, "rope_theta"),
            "tie_word_embeddings": text.get("tie_word_embeddings") is not False}


def read_config(path: str | Path) -> ModelConfig:
    """The sizes of a checkpoint, from its `config.json` as transformers 4 or 5 writes it.

    tie_word_embeddings is true unless the file says false, inside or outside of text_config:
    published files often say nothing, and then the head is tied if there is none.
    Raises ValueError naming the file and what it lacks.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} is no checkpoint: it has no config.json")
    raw = read_json_object(file)
    text, vision = raw.get("text_config"), raw.get("vision_config")
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise ValueError(f"{file} lacks text_config or vision_config")
    quantized = raw.get("quantization_config") or {}
    if not isinstance(quantized, dict):
        raise ValueError(f"{file}: quantization_config is no object")

    refuse_others(file, quantized, {"quant_method": "fp8", "fmt": "e4m3",
                                    "weight_block_size": [BLOCK, BLOCK]})
    refuse_others(file, vision, {"patch_size": 14, "spatial_merge_size": 2, "in_channels": 3,
                                 "temporal_patch_size": 1, "hidden_act": "gelu"})
    if raw.get("tie_word_embeddings") is False:  # transformers 5 says it here, 4 in text_config
        text = {**text, "tie_word_embeddings": False}
    sizes = whole_numbers(file, vision, "depth", "embed_dim", "num_heads", "intermediate_size",
                          "text_hidden_size")
    eps = number(file, vision, "layer_norm_eps")
    return ModelConfig(
        **decoder_fields(file, text),
        image_token_id=int(number(file, raw, "image_token_id")),
        video_token_id=int(number(file, raw, "video_token_id")),
        vision=VisionConfig(**sizes, layer_norm_eps=eps))


def config_json(config: ModelConfig, dtype: torch.dtype) -> dict:
    """The released `config.json` for a model, as transformers 4 writes it."""
    vision, experts = config.vision, {}
    if config.num_experts:
        experts = {"num_experts": config.num_experts, "decoder_sparse_step": 1,
                   "num_experts_per_tok": config.num_experts_per_tok, "mlp_only_layers": [],
                   "moe_intermediate_size": config.moe_intermediate_size, "norm_topk_prob": True}
    return {
        "architectures": ["LLaVAOneVision1_5_ForConditionalGeneration"],
        "model_type": "llavaonevision1_5",
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "text_config": {
            "model_type": "LLaVAOneVision1_5_text",
            "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
            "head_dim": config.head_dim, "hidden_size": config.hidden_size,
            "initializer_range": config.initializer_range,
            "intermediate_size": config.intermediate_size,
            "layer_types": ["full_attention"] * config.num_hidden_layers,
            "max_position_embeddings": config.max_position_embeddings,
            "max_window_layers": config.num_hidden_layers,
            "num_attention_heads": config.num_attention_heads,
            "num_hidden_layers": config.num_hidden_layers,
            "num_key_value_heads": config.num_key_value_heads,
            "rms_norm_eps": config.rms_norm_eps, "rope_scaling": None,
            "rope_theta": config.rope_theta, "sliding_window": None,
            "tie_word_embeddings": config.tie_word_embeddings, "use_cache": True,
            "use_sliding_window": False, "vocab_size": config.vocab_size, **experts,
        },
        "vision_config": {
            "model_type": "rice_vit", "depth": vision.depth, "embed_dim": vision.embed_dim,
            "hidden_act": "gelu", "hidden_size": vision.embed_dim, "in_channels": 3,
            "initializer_range": config.initializer_range,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.layer_norm_eps, "num_heads": vision.num_heads,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 1,
            "text_hidden_size": vision.text_hidden_size,
        },
    }


# --------------------------------------------------------------------------------- weights, as read


class Stored(NamedTuple):
    """Where a tensor of a checkpoint is."""

    file: Path
    key: str  # the file's name for it
    scales: "Stored | None" = None  # of squares of 128 x 128, if it is in FP8


def canonical_name(key: str) -> str:
    """The name of a file's tensor in this model: both published layouts become the first one."""
    for prefix, ours in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if key.startswith(prefix):
            return ours + key.removeprefix(prefix)
    return key


def open_tensors(file: Path) -> Any:
    """The safetensors file, memory-mapped.  Raises ValueError naming it if it cannot be read."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from error


def tensor_files(path: Path) -> dict[str, Stored]:
    """Where each tensor of a checkpoint directory is, by our name for it; its scales with it.

    Raises ValueError for a directory without weights, an unreadable file, an index that names a
    tensor its file does not have, or a tensor that is there twice.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
                isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index} has no weight_map of file names")
        if (path / "model.safetensors").exists() and "model.safetensors" not in weight_map.values():
            raise ValueError(f"{path} has a model.safetensors beside the files of its index")
        files = sorted({path / name for name in weight_map.values()})
    else:
        weight_map, files = {}, [path / "model.safetensors"]
    found: dict[str, Stored] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{path} has no {file.name}")
        for key in open_tensors(file).keys():
            name = canonical_name(key)
            if name in found:
                raise ValueError(f"{file}: {key} is also in {found[name][0]}")
            if weight_map and key not in weight_map:
                raise ValueError(f"{file}: {key} is not in {index.name}")
            found[name] = Stored(file, key)
    for key, name in weight_map.items():
        if found.get(canonical_name(key), (None,))[0] != path / name:
            raise ValueError(f"{index} places {key} in {name}, which does not have it")
    for name in [name for name in found if name.endswith(SCALES)]:
        if (weight := name.removesuffix(SCALES)) in found:
            found[weight] = found[weight]._replace(scales=found.pop(name))
    return found


def released_names(model: LlavaOneVision) -> dict[str, list[str]]:
    """The names in files of each parameter: its own, but for stacked experts one for each."""
    def names(name: str) -> list[str]:
        stem, stacked, matrix = name.partition(".experts.")
        if not stacked:
            return [name]
        return [f"{stem}.experts.{e}.{matrix}" for e in range(model.config.num_experts)]

    return {name: names(name) for name, _ in model.named_parameters()}


def check_names(path: Path, tensors: dict[str, Stored],
                names: dict[str, list[str]], prefixes: tuple[str, ...] = (),
                suffixes: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless a directory has the tensors named, and no others but such as begin or
    end so."""
    known = dict.fromkeys(name for pieces in names.values() for name in pieces)
    for name in known:
        if name not in tensors:
            raise ValueError(f"{path} lacks the tensor {name}")
    for name, (file, key, _) in tensors.items():
        if not (name in known or name.startswith(prefixes) or name.endswith(suffixes)):
            raise ValueError(f"{file} has a tensor {key} that the model does not have")


def with_head(config: ModelConfig, tensors: dict[str, Stored]) -> ModelConfig:
    """The configuration of files that have these tensors: a head that may be tied is, if it is not
    among them."""
    tied = config.tie_word_embeddings and "lm_head.weight" not in tensors
    return replace(config, tie_word_embeddings=tied)


def find_checkpoint(path: Path, side: str = "",
                    ) -> tuple[LlavaOneVision, dict[str, Stored]]:
    """The model that a directory is of, on the meta device, and where its tensors are.

    side: "vision" or "decoder" makes the other side None.
    Raises ValueError naming what is missing or not the model's.
    """
    config, tensors = read_config(path), tensor_files(path)
    model, others = meta_model(with_head(config, tensors)), ()
    if side == "vision":
        model.model = model.lm_head = None
        others = "model.", "lm_head."
    elif side == "decoder":
        model.visual, others = None, ("visual.",)
    elif side:
        raise ValueError(f"there is no side {side!r} of a model, only vision and decoder")
    check_names(path, tensors, released_names(model), prefixes=others)
    return model, tensors


def from_fp8(part: Tensor, top: int, shape: list[int], scales: Stored) -> Tensor:
    """Rows of a matrix in e4m3 from the row `top` on, times the scales of their squares: float32.

    Raises ValueError naming the scales if they are not those of a matrix of this shape.
    """
    reader = open_tensors(scales.file).get_slice(scales.key)
    squares = [-(-size // BLOCK) for size in shape]
    kind = reader.get_dtype()
    if len(shape) != 2 or reader.get_shape() != squares or kind not in ("F32", "BF16"):
        raise ValueError(f"{scales.file}: {scales.key} is of type {kind} and shape "
                         f"{reader.get_shape()}, an FP8 matrix of {shape} needs F32 and {squares}")
    rows = torch.arange(top, top + len(part)) // BLOCK
    factors = reader[:].float()[rows].repeat_interleave(BLOCK, 1)[:, :shape[1]]
    return part.float() * factors


def read_parameter(pieces: list[Stored], like: Tensor, dtype: torch.dtype | None,
                   device: str | torch.device | None) -> Tensor:
    """A parameter whose rows are those of one or more tensors, in turn.

    Distributed like `like`: then this rank reads its own rows alone.  They are copied from the
    mapped file, which is opened for each parameter, so that its pages do not stay.
    """
    begin, end = 0, len(like)
    if isinstance(like, DTensor):
        chunk, = like.__create_chunk_list__()  # what distributed checkpoints ask it, too
        begin, end = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]  # shards are of rows
    rows = len(like) // len(pieces)  # of a piece
    wanted = range(begin // rows, -(-end // rows)) if begin < end else range(1)
    read, reader, opened = [], None, None
    for number in wanted:
        file, key, scales = pieces[number]
        if file != opened:
            reader, opened = open_tensors(file), file
        stored = reader.get_slice(key)
        if (shape := tuple(stored.get_shape())) != (rows, *like.shape[1:]):
            raise ValueError(f"{file}: {key} has shape {shape}, "
                             f"the model needs {(rows, *like.shape[1:])}")
        kinds = ("F64", "F32", "F16", "BF16") if scales is None else ("F8_E4M3",)
        if stored.get_dtype() not in kinds:
            raise ValueError(f"{file}: {key} has numbers of type {stored.get_dtype()}, the model "
                             + ("needs floating point" if scales is None else "has scales for FP8"))
        first = number * rows
        part = stored[(top := max(begin - first, 0)):max(min(end - first, rows), 0)]
        if scales is not None:
            part = from_fp8(part, top, stored.get_shape(), scales).to(dtype or torch.bfloat16)
        read.append(part.to(device=device, dtype=dtype, copy=len(wanted) == 1))
    local = read[0] if len(read) == 1 else torch.cat(read)
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(local, like.device_mesh, like.placements, shape=like.shape,
                              stride=like.stride())


class ProgressBar:
    """A line with a bar and MB/s on standard error, if that is a terminal; erased at the end."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.total = sum(parameter.numel() for parameter in parameters)
        self.numbers, self.megabytes, self.started = 0, 0.0, time.monotonic()
        self.shown = sys.stderr.isatty() and int(os.environ.get("RANK", 0)) == 0

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error: object) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def advance(self, parameter: Tensor) -> None:
        """A parameter was read, or this rank's part of it."""
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        self.numbers += parameter.numel()
        self.megabytes += local.nbytes / 1e6
        if self.shown:
            speed = self.megabytes / (time.monotonic() - self.started)
            bar = "#" * (30 * self.numbers // self.total)
            print(f"\r\033[Kreading [{bar:30}] {self.megabytes:,.0f} MB, {speed:,.0f} MB/s",
                  end="", file=sys.stderr, flush=True)


def load_model(path: str | Path, dtype: torch.dtype | None = None,
               device: str | torch.device | None = None,
               prepare: Callable[[LlavaOneVision], None] | None = None,
               side: str = "") -> LlavaOneVision:
    """Read a model from a directory of safetensors, one file or several with an index.

    Both published key layouts are read (`visual.*`, `model.*` and `model.visual.*`,
    `model.language_model.*`).  FP8 matrices with `weight_scale_inv` beside them become bfloat16.
    The head is tied to the embedding if the files have no head and config.json allows it.
    dtype, device: default to those of the files and the CPU.
    prepare: called with the model while it is on the meta device.  If it shards parameters
    (`fully_shard`), this rank reads only its slices of them.
    side: "vision" loads the ViT and merger alone (the decoder is None), "decoder" all the rest.
    Raises ValueError naming the tensor and the file if one is missing, unknown, misshapen or
    not of floating point.
    """
    model, tensors = find_checkpoint(Path(path), side)
    if prepare is not None:
        prepare(model)
    parameters, names = dict(model.named_parameters()), released_names(model)
    state: dict[str, Tensor] = {}
    with ProgressBar(parameters.values()) as bar:
        for name, parameter in parameters.items():
            pieces = [tensors[piece] for piece in names[name]]
            state[name] = read_parameter(pieces, parameter, dtype, device)
            bar.advance(state[name])
    tied = model.config.tie_word_embeddings and side != "vision"
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if tied:  # loading with assign has made two parameters of the one
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


# ------------------------------------------------------------------------------------ the tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """`tokenizer.json` of a directory, with all that it switches on.  Raises ValueError."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{path} has no tokenizer.json")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for malformed files
        raise ValueError(f"{file} is no tokenizer: {error}") from error


def load_tokenizer(path: Path) -> Tokenizer:
    """Read `tokenizer.json` of a checkpoint directory.  Raises ValueError if it is unfit.

    What the file switches on by itself is switched off: truncation and padding, which transformers
    may leave in it, and dropout of merges.  `switched_on` tells of them.
    """
    file, tokenizer = path / "tokenizer.json", read_tokenizer(path)
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for name in sorted(STRUCTURE - {"<|vision_pad|>"}):  # which no text of ours needs
        if name not in added:
            raise ValueError(f"{file} has no added token {name}")
        if not added[name].special:
            raise ValueError(f"{file}: {name} is not special, so it would be found in any text")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if isinstance(tokenizer.model, BPE):
        tokenizer.model.dropout = None
    tokenizer.encode_special_tokens = True  # a special token's name inside a text stays text
    return tokenizer


def switched_on(path: Path) -> Iterator[str]:
    """What files of a checkpoint directory ask for and is not heeded, a sentence each."""
    tokenizer = read_tokenizer(path)
    dropout = getattr(tokenizer.model, "dropout", None)
    for what, setting in (("truncation", tokenizer.truncation), ("padding", tokenizer.padding),
                          ("dropout of merges", dropout)):
        if setting:
            yield f"tokenizer.json asks for {what}, {setting}: it is ignored, and not exported"


def check_tokenizer(path: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raise ValueError unless a directory's tokenizer is one for the model."""
    for token, expected in (("<|image_pad|>", config.image_token_id),
                            ("<|video_pad|>", config.video_token_id)):
        found = tokenizer.token_to_id(token)
        if found != expected:
            raise ValueError(f"{path}: {token} is {found} in tokenizer.json, "
                             f"but {expected} in config.json")
    if max(tokenizer.get_vocab().values()) >= config.vocab_size:
        raise ValueError(f"{path}: tokenizer.json has more tokens than the model's "
                         f"{config.vocab_size}")


def load_checkpoint(
    path: str | Path, dtype: torch.dtype, device: torch.device,
    prepare: Callable[[LlavaOneVision], None] | None = None,
) -> tuple[LlavaOneVision, Tokenizer]:
    """Model and tokenizer of a directory; `prepare` as in `load_model`.

    Raises ValueError if they do not belong together.
    """
    path = Path(path)
    tokenizer = load_tokenizer(path)
    check_tokenizer(path, tokenizer, read_config(path))
    return load_model(path, dtype, device, prepare), tokenizer


# -------------------------------------------------------------------------- checkpoints, as written


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to write to, which becomes `path` if all goes well, and else is removed.

    Raises ValueError if `path` is there already, or its parent is not.
    """
    if path.exists():
        raise ValueError(f"{path} is there already")
    if not path.parent.is_dir():
        raise ValueError(f"there is no directory {path.parent}")
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_directory(path: Path, tensors: Iterable[tuple[str, Tensor]],
                    texts: dict[str, str]) -> None:
    """Write weights and texts (by file name) to the directory `path`, which must be new.

    Weights go to files of at most SHARD bytes or one tensor, with an index if there are several;
    one file's are in memory at a time.  `path` is whole or not there.
    """
    groups: list[dict[str, int]] = []  # bytes of the tensors of each file

    def write(group: dict[str, Tensor]) -> None:
        groups.append({name: tensor.nbytes for name, tensor in group.items()})
        save_file(group, partial / str(len(groups)), metadata={"format": "pt"})

    with new_directory(path) as partial:
        group: dict[str, Tensor] = {}
        for name, tensor in tensors:
            if group and sum(t.nbytes for t in group.values()) + tensor.nbytes > SHARD:
                write(group)
                group = {}
            group[name] = tensor
        write(group)
        files = ["model.safetensors"]
        if len(groups) > 1:
            files = [f"model-{number:05}-of-{len(groups):05}.safetensors"
                     for number in range(1, len(groups) + 1)]
            weight_map = {name: file for file, names in zip(files, groups) for name in names}
            size = sum(sum(names.values()) for names in groups)
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            texts = {**texts, "model.safetensors.index.json": json.dumps(index, indent=2)}
        for number, file in enumerate(files, 1):
            (partial / str(number)).rename(partial / file)
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")


def pieces_of(tensor: Tensor, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file that a parameter is made of: its rows, split evenly."""
    for name, piece in zip(names, tensor.chunk(len(names))):
        yield name, piece.clone() if len(names) > 1 else piece.contiguous()


def check_finite(model: LlavaOneVision, dtype: torch.dtype) -> None:
    """Raise ValueError naming the first parameter with a number that is not finite as `dtype`.

    Each rank looks at its own part, and all of them learn what any one finds.
    """
    names = [name for name, _ in model.named_parameters()]
    first = len(names)
    for i, parameter in enumerate(model.parameters()):
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not local.detach().to(dtype).isfinite().all():
            first = min(first, i)
    if dist.is_initialized():
        found = torch.tensor(first, device=local.device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        first = int(found)
    if first < len(names):
        raise ValueError(f"{names[first]} has a number that is not finite as {dtype}: no "
                         "checkpoint is written")


def save_checkpoint(model: LlavaOneVision, tokenizer: Tokenizer, path: Path,
                    dtype: torch.dtype = torch.bfloat16) -> None:
    """Write weights, config.json and tokenizer.json, as `write_directory` does.

    All ranks of a sharded model call this together; the first one writes.  Raises ValueError, on
    all of them and with nothing written, if a number is not finite.
    """
    check_finite(model, dtype)
    names = released_names(model)
    first = not dist.is_initialized() or dist.get_rank() == 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            tensor = parameter.detach().to(dtype)
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            if first:
                yield from pieces_of(tensor.cpu(), names[name])

    if first:
        texts = {"config.json": json.dumps(config_json(model.config, dtype), indent=2),
                 "tokenizer.json": tokenizer.to_str(pretty=True)}
        write_directory(path, tensors(), texts)
    else:
        list(tensors())  # nothing, but this rank has brought its parts
    if dist.is_initialized():
        dist.barrier()  # nobody reads what is not there yet


def newest_checkpoint() -> tuple[Path, str]:
    """The newest checkpoint under runs/, else the shipped one; with a word on which it is."""
    own = [file for file in Path("runs").glob("*/*/config.json")
           if file.parent.suffix != ".partial"]
    if own:
        return max(own, key=lambda file: file.stat().st_mtime).parent, "your newest run"
    return Path(__file__).parent / "assets" / "tiny", "shipped with the project"


# ---------------------------------------------------------------------------- from layout to layout


def source_layouts(layout: Layout) -> tuple[Layout, Layout]:
    """Those of the ViT's and of the decoder's own checkpoint; the merger is in neither."""
    vit: Layout = {}
    for name in layout:
        if name.startswith("visual.") and not name.startswith("visual.merger."):
            theirs = name
            for our_part, their_part in VIT_NAMES:
                theirs = theirs.replace(our_part, their_part)
            stem, stacked, kind = theirs.partition(".attn.qkv.")
            vit[name] = ([f"{stem}.self_attn.{matrix}_proj.{kind}" for matrix in "qkv"] if stacked
                         else [theirs])
    return vit, {name: pieces for name, pieces in layout.items() if not name.startswith("visual.")}


def read_tensors(model: LlavaOneVision, source: Layout, tensors: dict[str, Stored],
                 target: Layout, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """Read the parameters that `target` has by `source`, yield them by `target`.

    dtype: None keeps that of the files.
    Raises ValueError naming tensor and file where a number is not finite.
    """
    wanted = {name: p for name, p in model.named_parameters() if name in target}
    with ProgressBar(wanted.values()) as bar:
        for name, parameter in wanted.items():
            pieces = [tensors[piece] for piece in source[name]]
            tensor = read_parameter(pieces, parameter, dtype, None)
            bar.advance(tensor)
            for (file, key, _), part in zip(pieces, tensor.chunk(len(pieces))):
                if not part.isfinite().all():
                    raise ValueError(f"{file}: {key} is not finite everywhere, as {part.dtype}")
            yield from pieces_of(tensor, target[name])


def tokenizer_files(tokenizer: Tokenizer, max_length: int) -> dict[str, str]:
    """The files that Hugging Face's Qwen2Tokenizer is read from, by name, of a tokenizer.json.

    max_length: tokens of a text at most.  Raises ValueError for a tokenizer of another kind.
    """
    model = json.loads(tokenizer.to_str())["model"]
    if model["type"] != "BPE":
        raise ValueError(f"tokenizer.json is of the kind {model['type']}, only BPE can be exported")
    merges = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    added = {number: {"content": token.content, "special": token.special, "lstrip": token.lstrip,
                      "rstrip": token.rstrip, "normalized": token.normalized,
                      "single_word": token.single_word}
             for number, token in tokenizer.get_added_tokens_decoder().items()}
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": [
        token["content"] for token in added.values()
        if token["special"] and token["content"] != "<|endoftext|>"]}
    objects = {
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer", "processor_class": "Qwen2_5_VLProcessor",
            **roles, "added_tokens_decoder": added, "chat_template": CHAT_TEMPLATE,
            "bos_token": None, "unk_token": None, "add_bos_token": False, "errors": "replace",
            "add_prefix_space": False, "clean_up_tokenization_spaces": False,
            "split_special_tokens": False, "model_max_length": max_length},
        "special_tokens_map.json": roles,
        "added_tokens.json": {token["content"]: number for number, token in added.items()},
        "vocab.json": model["vocab"]}
    return {"tokenizer.json": tokenizer.to_str(pretty=True), "chat_template.jinja": CHAT_TEMPLATE,
            "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
            **{name: json.dumps(content, indent=2, ensure_ascii=False)
               for name, content in objects.items()}}


def side_files(config: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype, code: str = PUBLISHED,
               **more: object) -> dict[str, str]:
    """All files but the weights that Hugging Face's loaders want, by name.

    code: the repository whose modelling code is to be loaded; it has none for mixtures of experts.
    more: goes to config.json.
    """
    about = config_json(config, dtype) | more
    about |= {f"vision_{end}_token_id": tokenizer.token_to_id(f"<|vision_{end}|>")
              for end in ("start", "end")}
    if not config.num_experts:
        config_class = "configuration_llavaonevision1_5.Llavaonevision1_5Config"
        model_class = "modeling_llavaonevision1_5.LLaVAOneVision1_5_ForConditionalGeneration"
        about["auto_map"] = {name: f"{code}--{found}" for name, found in (
            ("AutoConfig", config_class), ("AutoModel", model_class),
            ("AutoModelForCausalLM", model_class))}
    end, stop = (tokenizer.token_to_id(f"<|{name}|>") for name in ("endoftext", "im_end"))
    words = {"bos_token_id": end, "eos_token_id": [stop, end], "pad_token_id": end}
    pictures = {
        "do_convert_rgb": True, "do_resize": True, "do_rescale": True, "do_normalize": True,
        "image_mean": [round(x, 8) for x in CLIP_MEAN.tolist()], "resample": 3,
        "image_std": [round(x, 8) for x in CLIP_STD.tolist()], "rescale_factor": 1 / 255,
        "min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}, "patch_size": 14,
        "merge_size": 2, "temporal_patch_size": 1, "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor"}
    return {**tokenizer_files(tokenizer, config.max_position_embeddings),
            "config.json": json.dumps(about, indent=2),
            "generation_config.json": json.dumps(words, indent=2),
            "preprocessor_config.json": json.dumps(pictures, indent=2)}


# ---------------------------------------------------------------------------------------- commands


def stage0_config(vit: Path, llm: Path, tokenizer: Tokenizer) -> ModelConfig:
    """The merged model's sizes, from the configurations of its parts.  Raises ValueError."""
    for path in (vit, llm):
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} is no checkpoint: it has no config.json")
    file = vit / "config.json"
    raw = read_json_object(file)
    refuse_others(file, raw, {"patch_size": 14, "num_channels": 3, "hidden_act": "gelu"})
    seen = whole_numbers(file, raw, "num_hidden_layers", "hidden_size", "num_attention_heads",
                         "intermediate_size")
    eps = number(file, raw, "layer_norm_eps")
    file = llm / "config.json"
    decoder = decoder_fields(file, read_json_object(file))
    if max(tokenizer.get_vocab().values()) >= decoder["vocab_size"]:
        raise ValueError(f"the tokenizer has more tokens than the {decoder['vocab_size']} of {llm}")
    return ModelConfig(
        **decoder, image_token_id=tokenizer.token_to_id("<|image_pad|>"),
        video_token_id=tokenizer.token_to_id("<|video_pad|>"),
        vision=VisionConfig(*seen.values(), decoder["hidden_size"], eps))


def fresh_merger(model: LlavaOneVision, seed: int, dtype: torch.dtype,
                 ) -> Iterator[tuple[str, Tensor]]:
    """The merger's tensors, as LlavaOneVision.init_weights has them."""
    merger, generator = Merger(model.config.vision), torch.Generator().manual_seed(seed)
    for module in merger.modules():
        init_linear(module, model.config.initializer_range, generator)
    for name, parameter in merger.named_parameters():
        yield f"visual.merger.{name}", parameter.detach().to(dtype)


def merge(flags: argparse.Namespace) -> Iterator[str]:
    """Stage 0: a ViT and a decoder, each as published, with a random merger between them."""
    tokenizer = load_tokenizer(flags.tokenizer)
    config = stage0_config(flags.vit, flags.llm, tokenizer)
    vit_tensors, llm_tensors = tensor_files(flags.vit), tensor_files(flags.llm)
    tensors = vit_tensors | llm_tensors
    tied = with_head(config, tensors).tie_word_embeddings
    model = meta_model(replace(config, tie_word_embeddings=False))  # the released ones have a head
    released = released_names(model)
    vit_layout, llm_layout = source_layouts(released)
    if tied:
        llm_layout["lm_head.weight"] = llm_layout["model.embed_tokens.weight"]
    check_names(flags.vit, vit_tensors, vit_layout, suffixes=NOT_OURS)
    check_names(flags.llm, llm_tensors, llm_layout, suffixes=NOT_OURS)
    source = vit_layout | llm_layout
    target = {name: released[name] for name in source}
    read = read_tensors(model, source, tensors, target, flags.dtype)
    write_directory(flags.out, chain(fresh_merger(model, flags.seed, flags.dtype), read),
                    side_files(model.config, tokenizer, flags.dtype, flags.code))
    yield (f"{flags.out}: {sum(p.numel() for p in model.parameters()):,} parameters, merger from "
           f"seed {flags.seed}" + (", head copied from the embedding" if tied else ""))
    if flags.verify:
        merged = tensor_files(flags.out)
        for path, layout in ((flags.vit, vit_layout), (flags.llm, llm_layout)):
            apart = list(differences(model, layout, tensors, released, merged, flags.dtype))
            wrong = [name for name, distance in apart if distance]
            if wrong:
                raise ValueError(f"{wrong[0]} of {path} is not in {flags.out} as it was")
            yield f"{path}: all {len(apart)} tensors are in {flags.out}, equal as {flags.dtype}"


def to_fp8(tensors: Iterable[tuple[str, Tensor]], names: set[str],
           dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Those named in e4m3, each followed by the scales of its squares; the others as dtype."""
    for name, tensor in tensors:
        if name in names:
            values, scales = quantize_fp8(tensor.float(), square=True)[0]
            yield from ((name, values), (name + SCALES, scales))
        elif not (converted := tensor.to(dtype)).isfinite().all():
            raise ValueError(f"{name} is not finite everywhere, as {dtype}")
        else:
            yield name, converted


def export(flags: argparse.Namespace) -> Iterator[str]:
    """A checkpoint, or a run's last, to the released format with all its files."""
    path = flags.path
    for stage in ("align", "mid", "instruct"):
        if (flags.path / stage / "config.json").is_file():
            path = flags.path / stage
    model, tensors = find_checkpoint(path)
    tokenizer, released = load_tokenizer(path), released_names(model)
    check_tokenizer(path, tokenizer, model.config)
    more = {}
    found = read_tensors(model, released, tensors, released, None if flags.fp8 else flags.dtype)
    if flags.fp8:
        convert_to_fp8(model)
        linear = {name: module for name, module in model.named_modules()
                  if isinstance(module, nn.Linear)}
        in_fp8 = {piece for name, module in linear.items() if isinstance(module, Fp8Linear)
                  for piece in released[f"{name}.weight"]}
        found = to_fp8(found, in_fp8, flags.dtype)
        more["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": [
                piece.removesuffix(".weight") for name in linear  # a tied head is in no file
                for piece in released.get(f"{name}.weight", [f"{name}.weight"])
                if piece not in in_fp8]}
    write_directory(flags.out, found,
                    side_files(model.config, tokenizer, flags.dtype, flags.code, **more))
    yield (f"{path} -> {flags.out}: {len(tensors):,} tensors, {flags.dtype}, "
           + (f"{len(in_fp8):,} matrices in FP8, " if flags.fp8 else "")
           + (f"code of {flags.code}" if not model.config.num_experts else
              "no auto_map: there is no published code that reads mixtures of experts"))


def differences(model: LlavaOneVision, layout: Layout, tensors: dict[str, Stored],
                other_layout: Layout, others: dict[str, Stored],
                dtype: torch.dtype | None = None) -> Iterator[tuple[str, float]]:
    """For each tensor of a layout, how far the numbers of two directories are apart at most, both
    read as `dtype`."""
    pairs = zip(read_tensors(model, layout, tensors, layout, dtype),
                read_tensors(model, other_layout, others, layout, dtype))
    for (name, a), (_, b) in pairs:
        blocks = zip(a.split(4096), b.split(4096))
        yield name, max(float((x.double() - y.double()).abs().max()) for x, y in blocks)


def verify(flags: argparse.Namespace) -> Iterator[str]:
    """Is a directory whole: names, shapes, types, finite numbers; hashes; distance to another."""
    model, tensors = find_checkpoint(flags.path)
    layout = released_names(model)
    kinds = Counter("FP8 with scales" if tensors[name].scales else
                    str(tensor.dtype).removeprefix("torch.") for name, tensor in
                    read_tensors(model, layout, tensors, layout, None))
    for file in sorted(file for file in flags.path.iterdir() if file.is_file()):
        with open(file, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        yield f"{digest}  {file.stat().st_size:>14,}  {file.name}"
    yield (f"the weights of {flags.path} are whole: {len(tensors):,} tensors, "
           f"{sum(p.numel() for p in model.parameters()):,} parameters, all finite, "
           + ", ".join(f"{count:,} of {kind}" for kind, count in kinds.items()))
    if model.config.tie_word_embeddings:
        yield "lm_head.weight is not there: the head is the embedding"
    absent = [name for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json",
                                "preprocessor_config.json") if not (flags.path / name).is_file()]
    if absent:
        yield f"not there: {', '.join(absent)}"
    if "tokenizer.json" not in absent:
        yield from switched_on(flags.path)
    if flags.other:
        yield from compare(flags.path, flags.other)


def compare(path: Path, other: Path) -> Iterator[str]:
    """How far two directories are apart: settings that differ, then the largest difference of each
    tensor that does.  Raises ValueError if their tensors are not the same ones."""
    (model, tensors), (other_model, others) = find_checkpoint(path), find_checkpoint(other)
    shapes, other_shapes = ({name: tuple(p.shape) for name, p in m.named_parameters()}
                            for m in (model, other_model))
    for name in shapes | other_shapes:
        if shapes.get(name) != other_shapes.get(name):
            raise ValueError(f"{name} has shape {shapes.get(name)} in {path}, "
                             f"{other_shapes.get(name)} in {other}")
    for entry in fields(ModelConfig):
        ours, theirs = (getattr(m.config, entry.name) for m in (model, other_model))
        if ours != theirs:
            yield f"config.json: {entry.name} is {ours} and {theirs}"
    layout = released_names(model)
    apart = dict(differences(model, layout, tensors, layout, others))
    yield from (f"{distance:12.4g}  {name}" for name, distance in apart.items() if distance)
    farthest = max(apart, key=apart.get)
    yield (f"{path} and {other} differ most in {farthest}, by {apart[farthest]:.4g}"
           if apart[farthest] else f"{path} and {other} have the same numbers")


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """The command line; `run` is the command, a function of what this returns."""
    parser = flag_parser("Convert and check checkpoint directories.", arguments)
    commands = parser.add_subparsers(
        dest="command", required=True,
        parser_class=lambda prog, description: flag_parser(description))
    for command in (merge, export, verify):
        # what goes in
        what = command.__doc__.splitlines()[0]
        sub = commands.add_parser(command.__name__, help=what, description=what)
        sub.prog = f"convert.py {command.__name__}"
        sub.set_defaults(run=command)
        if command is merge:
            for name, what in (("vit", "the ViT's checkpoint, rice-vit-large-patch14-560"),
                               ("llm", "the decoder's, a Qwen3 of any size"),
                               ("tokenizer", "directory with the tokenizer.json to use")):
                sub.add_argument(f"--{name}", type=Path, required=True, metavar="DIR", help=what)
            sub.add_argument("--seed", type=int, default=0, help="of the merger's weights")
            sub.add_argument("--verify", action="store_true",
                             help="compare the parts with their sources afterwards")
        else:
            sub.add_argument("path", type=Path, metavar="RUN" if command is export else "DIR")
        if command is verify:
            sub.add_argument("other", type=Path, metavar="DIR2", nargs="?",
                             help="tell how far this one is from it")
            continue
        # what comes out
        sub.add_argument("--out", type=lambda name: Path(os.path.abspath(name)), required=True,
                         metavar="DIR", help="to be written, must be new")
        sub.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
        if command is export:
            sub.add_argument("--fp8", action="store_true",
                             help="the decoder's large matrices in FP8, to be served")
        sub.add_argument("--code", default=PUBLISHED, metavar="OWNER/NAME",
                         help="repository whose code config.json's auto_map names")
    flags = parser.parse_args(arguments)
    if flags.command != "verify":
        flags.dtype = getattr(torch, flags.dtype)
    return flags


def run() -> None:
    flags = parse_flags(sys.argv[1:])
    for line in flags.run(flags):
        print(line, flush=True)


def main() -> None:
    refuse_in_one_sentence("convert.py", run)


if __name__ == "__main__":
    main()
