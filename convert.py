"""Everything on disk: checkpoint directories are read, written, converted and checked here.

In: a directory with config.json, *.safetensors and tokenizer.json.  Out: a model and its tokenizer;
or the other way round.  The same code reads released checkpoints and those of a training run.
Called by `model.py`, `data.py`, `train.py` and `sample.py`, and by people; calls `model.py`,
`vision.py`, `fp8_kernel.py`, and `data.py` for the special tokens and the command line.

The idea.  A parameter of the model is stored as one tensor, or as several that are joined along
their first dimension.  A layout names these tensors for each parameter:

    parameter                        released, a run's            the sources of stage 0
    visual.blocks.0.norm1.weight     the same                     vision_model.encoder.layers.0.
                                                                  layer_norm1.weight
    visual.blocks.0.attn.qkv.weight  the same                     ...self_attn.{q,k,v}_proj.weight
    model.layers.0.mlp.experts.      model.layers.0.mlp.experts.  as released
      gate_proj                        {0,1,...}.gate_proj.weight

Every conversion is one loop: read a parameter by one layout, write it by another.  Memory holds one
parameter and one file to be written at a time, whatever the size of the model.

Shapes.  A line of a tensor is one index of its first dimension.  A parameter (N, ...) of k tensors
has N / k lines in each.  With FSDP, a rank reads only the lines [begin, end) that it holds:

    tensors  |    expert 0    |    expert 1    |    expert 2    |
    ranks    |         rank 0         |         rank 1          |

Run `python convert.py merge --vit DIR --llm DIR --tokenizer DIR --out DIR`: stage 0, from a ViT and
a Qwen3.  `export RUN --out DIR`: a run's last checkpoint, with all files that Hugging Face code
wants beside it.  `verify DIR [DIR]`: is a directory whole, and how far is it from another.
"""

import argparse
import json
import os
import re
import reprlib
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.tensor import DTensor

from data import (STRUCTURE, facts_of, flag_parser, load_json, refuse_in_one_sentence,
                  show_progress)
from fp8_kernel import BLOCK, Fp8Linear, convert_to_fp8, quantize_fp8
from model import LlavaOneVision, ModelConfig, init_linear, meta_model
from vision import CLIP_MEAN, CLIP_STD, MAX_PIXELS, MIN_PIXELS, Merger, VisionConfig

FILE_BYTES = 5e9  # in one file of weights, at most
WEIGHTS = "model.safetensors"  # a checkpoint in one file
INDEX = f"{WEIGHTS}.index.json"  # of a checkpoint in several files: the file of each tensor
MANIFEST = "manifest.json"  # of a run's state: size and sha256 of its other files
KEPT = 2  # states of a stage that stay on the disk
SCALES = "_scale_inv"  # suffix: the scales of an FP8 weight have its name and this behind it
PUBLISHED = "lmms-lab/LLaVA-OneVision-1.5-8B-Instruct"  # the modelling code config.json points at
# config.json by section: numbers with the names of our fields, and settings that we compute with
TOKEN_IDS = ("image_token_id", "video_token_id")
EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
EXPERT_SETTINGS = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
DECODER_SIZES = [field.name for field in fields(ModelConfig) if field.type in (int, float)
                 and field.name not in TOKEN_IDS + EXPERT_SIZES]
DECODER_SETTINGS = {"attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
                    "use_sliding_window": False}
VISION_SIZES = [field.name for field in fields(VisionConfig) if field.type in (int, float)]
VISION_SETTINGS = {"hidden_act": "gelu", "in_channels": 3, "patch_size": 14,
                   "spatial_merge_size": 2, "temporal_patch_size": 1}
FP8_SETTINGS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
FRACTIONS = {field.name for part in (ModelConfig, VisionConfig) for field in fields(part)
             if field.type is float}  # the other numbers are whole
LARGEST = 2**20  # no size of a model is larger; a product of three of them still has 63 bits
SHORT = reprlib.Repr()
SHORT.maxstring = 300
brief = SHORT.repr  # a value of a file as messages have it: on one line, cut if it is long
# These replacements, in turn, make RICE's own name of a ViT tensor from our name.
VIT_NAMES = (
    ("visual.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.class_pos_emb", "vision_model.class_pos_emb"),
    ("visual.pre_layernorm.", "vision_model.pre_layrnorm."),  # RICE's own spelling
    ("visual.blocks.", "vision_model.encoder.layers."),
    (".norm", ".layer_norm"), (".attn.proj.", ".self_attn.out_proj."))
# Tensors that the sources of stage 0 have and the merged model does not use.
UNUSED = ("post_layernorm.weight", "post_layernorm.bias", "inv_freq")
# ChatML as data.render writes it, in Jinja for Hugging Face's tokenizers.
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


class Stored(NamedTuple):
    """Where a tensor of a checkpoint is."""

    file: Path  # safetensors
    key: str  # the tensor's name in the file
    scales: "Stored | None" = None  # of an FP8 matrix: one for each square of 128 x 128


# torch.distributed.checkpoint remarks on it that one process saves alone
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

Layout = dict[str, list[str]]  # parameter -> the names of its tensors
Pieces = dict[str, list[Stored]]  # parameter -> where these tensors are
Tensors = Iterator[tuple[str, Tensor]]  # names and tensors, read one by one


# ------------------------------------------------------------------------------------------- ranks


def rank_and_count() -> tuple[int, int]:
    """The number of this rank, and how many ranks there are."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def on_all_ranks(function: Callable[[], Any], group: dist.ProcessGroup | None = None) -> list:
    """Call a function on each rank; returns the results of all ranks.

    If it fails on one of them, all raise OSError, which names that rank.
    """
    # a rank that raised alone would leave the others waiting for it
    try:
        outcome = function(), ""
    except (OSError, ValueError) as error:
        outcome = None, str(error) or type(error).__name__
    outcomes = [outcome]
    if dist.is_initialized():
        outcomes *= dist.get_world_size(group)
        dist.all_gather_object(outcomes, outcome, group)
    for rank, (_, error) in enumerate(outcomes):
        if error:
            raise OSError(f"rank {rank}: {error}" if len(outcomes) > 1 else error)
    return [result for result, _ in outcomes]


# ------------------------------------------------------------------------------ configuration files


def file_in(path: Path, name: str) -> Path:
    """A file of a directory.  Raises ValueError if it is not there, or no file: a pipe could be
    waited for without end."""
    if not (path / name).is_file():
        raise ValueError(f"{path} has no {name}")
    return path / name


def read_json_object(file: Path) -> dict:
    """The JSON object in a file of a checkpoint.  Raises ValueError naming the file."""
    content = load_json(file_in(file.parent, file.name).read_bytes(), file)
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object")
    return content


def section_of(file: Path, content: dict, key: str, absent: dict | None = None) -> dict:
    """The object under a key of a JSON object, or `absent`.  Raises ValueError without either."""
    section = content.get(key) or absent
    if not isinstance(section, dict):
        raise ValueError(f"{file}: {key} is no object")
    return section


def read_section(file: Path, section: dict, settings: dict[str, Any],
                 sizes: Sequence[str] = ()) -> dict:
    """Check a section of a config.json; return its `sizes`, all of them positive numbers.
    settings: what this project computes with.  A file may omit a setting, but not change it.
    Raises ValueError naming the file, the key and the value."""
    for key, value in settings.items():
        if section.get(key) not in (None, value):
            raise ValueError(f"{file}: {key} is {brief(section[key])}, only {value} is supported")

    numbers = {}
    for key in sizes:
        value = section.get(key)
        # type(), since for isinstance() JSON's true is an int; NaN fails the comparison
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
            raise ValueError(f"{file}: {key} is {brief(value)}, not a positive number")
        if key not in FRACTIONS and (value % 1 or value > LARGEST):
            raise ValueError(f"{file}: {key} is {brief(value)}, not a whole number up to "
                             f"{LARGEST:,}")
        numbers[key] = value if key in FRACTIONS else int(value)
    return numbers


def decoder_fields(file: Path, section: dict) -> dict[str, Any]:
    """The decoder's fields of a ModelConfig, from a `text_config` or from Qwen3's own config.json.
    Raises ValueError naming the file and what is missing or not supported."""
    # transformers 5 writes the rotary base into rope_parameters, transformers 4 beside the sizes
    rope = section_of(file, section, "rope_parameters", section)
    scaling = section_of(file, section, "rope_scaling", rope)
    read_section(file, scaling, {"rope_type": "default", "type": "default"})

    attention = section.get("layer_types") or []
    if not isinstance(attention, list) or any(kind != "full_attention" for kind in attention):
        raise ValueError(f"{file}: layer_types has others than full_attention")
    section = section | {"rope_theta": rope.get("rope_theta")}
    settings = DECODER_SETTINGS | {"partial_rotary_factor": 1.0}
    numbers = read_section(file, section, settings, DECODER_SIZES)

    # a mixture: experts in every layer, and the weights of the chosen ones sum to 1
    if section.get("num_experts"):
        numbers |= read_section(file, section, EXPERT_SETTINGS, EXPERT_SIZES)
        if numbers["num_experts_per_tok"] > numbers["num_experts"]:
            raise ValueError(f"{file}: num_experts_per_tok is {numbers['num_experts_per_tok']}, of "
                             f"{numbers['num_experts']} experts")
    tied = section.get("tie_word_embeddings") is not False
    return numbers | {"tie_word_embeddings": tied}


def read_config(path: str | Path) -> ModelConfig:
    """The sizes of a checkpoint, from its `config.json` as transformers 4 or 5 writes it.

    tie_word_embeddings is true unless the file says false, inside or outside of text_config.
    Published files often say nothing; then the head is tied if the weights have no head.
    Raises ValueError naming the file and what is missing or not supported.
    """
    file = Path(path) / "config.json"
    content = read_json_object(file)
    decoder = section_of(file, content, "text_config")
    vision = section_of(file, content, "vision_config")
    quantized = section_of(file, content, "quantization_config", {})
    read_section(file, quantized, FP8_SETTINGS)

    # transformers 5 says it out here, transformers 4 in text_config
    if content.get("tie_word_embeddings") is False:
        decoder = decoder | {"tie_word_embeddings": False}
    vision = VisionConfig(**read_section(file, vision, VISION_SETTINGS, VISION_SIZES))
    token_ids = read_section(file, content, {}, TOKEN_IDS)
    return ModelConfig(**decoder_fields(file, decoder), **token_ids, vision=vision)


def config_json(config: ModelConfig, dtype: torch.dtype) -> dict:
    """The released `config.json` of a model, as transformers 4 writes it."""
    def numbers(part: ModelConfig | VisionConfig, sizes: Sequence[str]) -> dict:
        return {name: getattr(part, name) for name in sizes}

    # in both places, as `read_config` says
    shared = {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_word_embeddings}
    decoder = numbers(config, DECODER_SIZES) | DECODER_SETTINGS | shared
    if config.num_experts:
        decoder |= numbers(config, EXPERT_SIZES) | EXPERT_SETTINGS
    vision = numbers(config.vision, VISION_SIZES) | VISION_SETTINGS
    # beside what `read_config` reads: what transformers wants to find
    return {
        "architectures": ["LLaVAOneVision1_5_ForConditionalGeneration"],
        "model_type": "llavaonevision1_5", "torch_dtype": str(dtype).removeprefix("torch."),
        **numbers(config, TOKEN_IDS), **shared,
        "text_config": {
            "model_type": "LLaVAOneVision1_5_text", **decoder, "rope_scaling": None,
            "layer_types": ["full_attention"] * config.num_hidden_layers,
            "max_window_layers": config.num_hidden_layers, "sliding_window": None,
            "use_cache": True},
        "vision_config": {
            "model_type": "rice_vit", **vision, "hidden_size": config.vision.embed_dim,
            "initializer_range": config.initializer_range}}


# -------------------------------------------------------------------------- where the tensors are


def check_name(place: Path | str, name: Any) -> None:
    """Raise ValueError unless a name in a file, of a tensor or of a file beside it, is a plain one:
    a path could lead out of the directory, and other letters would garble messages."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}", name, re.ASCII):
        raise ValueError(f"{place} has {brief(name)}, which is no plain name of letters, "
                         "digits, '.', '_' and '-'")


def open_tensors(file: Path) -> Any:
    """Map a safetensors file into memory.  Raises ValueError naming it if it cannot be read."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {brief(str(error))}") from error


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, from a directory's index; empty without an index."""
    index = path / INDEX
    if not index.is_file():
        return {}
    weight_map = section_of(index, read_json_object(index), "weight_map")
    for name in chain(*weight_map.items()):
        check_name(f"{index}: weight_map", name)
    # otherwise the directory has two checkpoints, and nothing says which one is meant
    if (path / WEIGHTS).exists() and WEIGHTS not in weight_map.values():
        raise ValueError(f"{path} has a {WEIGHTS} beside the files of its index")
    return weight_map


def tensor_files(path: Path) -> dict[str, Stored]:
    """Where each tensor of a checkpoint directory is, by our name for it.
    Raises ValueError for a file that is missing or unreadable, a tensor that occurs twice, and an
    index that disagrees with the files."""
    weight_map = read_index(path)
    tensors = {}
    # every tensor of every file is in the index, and every tensor of the index in its file
    for file_name in sorted(set(weight_map.values())) or [WEIGHTS]:
        file = file_in(path, file_name)
        for key in open_tensors(file).keys():
            check_name(file, key)
            # the two published layouts differ in their prefixes
            name = re.sub(r"^model\.visual\.", "visual.", key)
            name = re.sub(r"^model\.language_model\.", "model.", name)
            if name in tensors:
                raise ValueError(f"{file}: {key} is also in {tensors[name].file}")
            if weight_map and weight_map.get(key) != file_name:
                raise ValueError(f"{file}: {INDEX} does not say that {key} is here")
            tensors[name] = Stored(file, key)
    for key in weight_map.keys() - {piece.key for piece in tensors.values()}:
        raise ValueError(f"{path / INDEX}: {weight_map[key]} does not have {key}")

    # an FP8 matrix and its scales are two tensors of the files, and one of the model
    for name in list(tensors):
        if name in tensors and name + SCALES in tensors:
            tensors[name] = tensors[name]._replace(scales=tensors.pop(name + SCALES))
    return tensors


def released_names(model: LlavaOneVision) -> Layout:
    """The released layout: each parameter under its own name, but each expert apart."""
    layout = {}
    for name, _ in model.named_parameters():
        layout[name] = [name]
        # one parameter has the matrices of all experts, one below the other
        if ".experts." in name:
            layout[name] = [name.replace(".experts.", f".experts.{expert}.")
                            for expert in range(model.config.num_experts)]
    return layout


def find_pieces(path: Path, tensors: dict[str, Stored], layout: Layout,
                ignored: tuple[str, ...] = ()) -> Pieces:
    """Where a directory has the tensors of each parameter.
    ignored: prefixes or suffixes of tensors that may be there although the layout lacks them.
    Raises ValueError naming a tensor that is missing, or one that belongs to no parameter."""
    wanted = dict.fromkeys(chain(*layout.values()))
    for name in wanted:
        if name not in tensors:
            raise ValueError(f"{path} lacks the tensor {name}")
    # a tensor that nobody reads means that the files are of another model
    for name, piece in tensors.items():
        if not (name in wanted or name.startswith(ignored) or name.endswith(ignored)):
            raise ValueError(f"{piece.file} has a tensor {piece.key} that the model does not have")
    return {parameter: [tensors[name] for name in names] for parameter, names in layout.items()}


def empty_model(path: Path | str, config: ModelConfig, tensors: int,
                side: str = "") -> LlavaOneVision:
    """A model on the meta device.  tensors: how many its directory has.
    Raises ValueError if its sizes do not fit together, or ask for more than the files have."""
    # layers and experts have tensors of their own; to build a million of them would take hours
    parts = config.vision.depth + config.num_hidden_layers
    if side != "vision":
        parts += config.num_hidden_layers * config.num_experts
    if parts > tensors:
        raise ValueError(f"{path}: config.json asks for {parts:,} layers and experts, but there "
                         f"are {tensors:,} tensors")
    try:
        return meta_model(config)
    except ValueError as error:
        raise ValueError(f"{path}: config.json does not fit: {error}") from error


def find_checkpoint(path: Path, side: str = "") -> tuple[LlavaOneVision, Pieces]:
    """A directory's model, on the meta device, and where the tensors of its parameters are.
    side: "vision" or "decoder"; then the model's other side becomes None.
    Raises ValueError naming what is missing or does not belong to the model."""
    config, tensors = read_config(path), tensor_files(path)
    # tie the head to the embedding if the config allows it and the files have no head
    tied = config.tie_word_embeddings and "lm_head.weight" not in tensors
    config = replace(config, tie_word_embeddings=tied)
    model = empty_model(path, config, len(tensors), side)
    left_out = {"": [], "vision": ["model", "lm_head"], "decoder": ["visual"]}
    if side not in left_out:
        raise ValueError(f"there is no side {side!r} of a model, only vision and decoder")
    for module in left_out[side]:
        setattr(model, module, None)
    ignored = tuple(f"{module}." for module in left_out[side])
    return model, find_pieces(path, tensors, released_names(model), ignored)


# ------------------------------------------------------------------------------ weights, as read


def from_fp8(values: Tensor, first: int, shape: list[int], scales: Stored) -> Tensor:
    """Lines of an e4m3 matrix, from line `first` on, times the scales of their squares: float32.
    shape: of the whole matrix.  Raises ValueError if the scales do not fit it."""
    reader = open_tensors(scales.file).get_slice(scales.key)
    # rounded up: the last squares of a line or column may lie half outside of the matrix
    squares = [-(-size // BLOCK) for size in shape]
    dtype, stored_shape = reader.get_dtype(), reader.get_shape()
    if len(shape) != 2 or stored_shape != squares or dtype not in ("F32", "BF16"):
        raise ValueError(f"{scales.file}: {scales.key} is of type {dtype} and shape "
                         f"{stored_shape}, an FP8 matrix of {shape} needs F32 and {squares}")
    # a scale serves 128 lines and 128 columns; this rank's lines may begin inside a square
    square_of_line = torch.arange(first, first + len(values)) // BLOCK
    factors = reader[:].float()[square_of_line].repeat_interleave(BLOCK, 1)
    return values.float() * factors[:, :shape[1]]


def read_piece(reader: Any, piece: Stored, shape: tuple[int, ...], begin: int, end: int,
               dtype: torch.dtype | None) -> Tensor:
    """Lines [begin, end) of one tensor of an open file; from FP8, as `dtype` or bfloat16.
    shape: what the model needs.  Raises ValueError for another shape or another type of number."""
    place, stored = f"{piece.file}: {piece.key}", reader.get_slice(piece.key)
    stored_shape = tuple(stored.get_shape())
    if stored_shape != shape:
        raise ValueError(f"{place} has shape {stored_shape}, the model needs {shape}")
    # scales beside a matrix, and only they, say that its numbers are FP8
    types, reason = ("F64", "F32", "F16", "BF16"), "needs floating point"
    if piece.scales is not None:
        types, reason = ("F8_E4M3",), "has scales for FP8"
    if stored.get_dtype() not in types:
        raise ValueError(f"{place} has numbers of type {stored.get_dtype()}, the model {reason}")
    part = stored[begin:end]
    if piece.scales is not None:
        part = from_fp8(part, begin, list(shape), piece.scales).to(dtype or torch.bfloat16)
    return part


def read_parameter(pieces: list[Stored], like: Tensor, dtype: torch.dtype | None,
                   device: str | torch.device | None) -> Tensor:
    """Read a parameter from its tensors; of a DTensor `like`, only the lines of this rank.
    Files are opened anew for each parameter, so that mapped pages do not stay in memory."""
    begin, end = 0, len(like)
    if isinstance(like, DTensor):
        # DTensor has no public method for this; torch.distributed.checkpoint asks this one, too.
        # FSDP cuts the first dimension alone, so there is one chunk, and it is of whole lines.
        chunk, = like.__create_chunk_list__()
        begin = chunk.offsets[0]
        end = begin + chunk.sizes[0]
    lines = len(like) // len(pieces)  # of each tensor
    # the tensors with this rank's lines; a rank without lines reads none of the first tensor, but
    # learns its type
    numbers = range(begin // lines, -(-end // lines)) or range(1)
    opened = cache(open_tensors)

    parts = []
    for number in numbers:
        piece, first = pieces[number], number * lines
        top = max(begin - first, 0)
        bottom = min(end - first, lines)
        shape = (lines, *like.shape[1:])
        part = read_piece(opened(piece.file), piece, shape, top, bottom, dtype)
        # torch.cat copies several parts; a single one is copied here, so that nothing stays mapped
        parts.append(part.to(device=device, dtype=dtype, copy=len(numbers) == 1))
    local = torch.cat(parts) if len(parts) > 1 else parts[0]
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(local, like.device_mesh, like.placements, shape=like.shape,
                              stride=like.stride())


def read_parameters(model: LlavaOneVision, pieces: Pieces, dtype: torch.dtype | None,
                    device: str | torch.device | None = None) -> Tensors:
    """Read the parameters of `pieces` in turn, with a line of progress on a terminal."""
    try:
        for number, (name, stored) in enumerate(pieces.items()):
            show_progress(number, len(pieces), "parameters are read")
            yield name, read_parameter(stored, model.get_parameter(name), dtype, device)
    finally:
        # remove the line, also before an error message
        show_progress(1, 1, "")


def load_model(path: str | Path, dtype: torch.dtype | None = None,
               device: str | torch.device | None = None,
               prepare: Callable[[LlavaOneVision], None] | None = None,
               side: str = "") -> LlavaOneVision:
    """Read a model from a directory of safetensors, one file or several with an index.

    Both published key layouts are read (`visual.*`, `model.*` and `model.visual.*`,
    `model.language_model.*`).  FP8 matrices become `dtype`, or bfloat16 without one.
    dtype, device: default to those of the files and to the CPU.
    prepare: called with the model on the meta device.  If it shards parameters (`fully_shard`),
    this rank reads only its own lines of them.
    side: "vision" loads the ViT and the merger, and the decoder is None; "decoder" the reverse.
    Raises ValueError naming tensor and file if a tensor is missing, unknown, of another shape, or
    not of floating point.
    """
    model, pieces = find_checkpoint(Path(path), side)
    if prepare is not None:
        prepare(model)
    state = dict(read_parameters(model, pieces, dtype, device))
    # a tied head is no parameter of its own, yet load_state_dict wants it; with assign=True it
    # makes two parameters of the shared one, so we tie them again
    tied = model.config.tie_word_embeddings and side != "vision"
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


# ------------------------------------------------------------------------------------ the tokenizer


def read_tokenizer(path: Path) -> Tokenizer:
    """A directory's `tokenizer.json` as it is.  Raises ValueError if it cannot be read."""
    file = file_in(path, "tokenizer.json")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for malformed files
        raise ValueError(f"{file} is no tokenizer: {brief(str(error))}") from error


def load_tokenizer(path: Path, config: ModelConfig | None = None) -> Tokenizer:
    """Read `tokenizer.json` of a checkpoint directory, and switch off what it switches on.
    config: of a model that it must fit.
    Raises ValueError if it does not, or lacks one of our special tokens."""
    tokenizer = read_tokenizer(path)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()
               if token.special}
    for name in sorted(STRUCTURE - {"<|vision_pad|>"}):  # no text of ours has <|vision_pad|>
        if name not in special:
            raise ValueError(f"{path}: in tokenizer.json {name} is not special, so it would be "
                             "found in any text, or is not there at all")
    if config is not None:
        check_tokenizer(path, tokenizer, config)

    # transformers may leave truncation and padding in the file, training dropout of merges
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if hasattr(tokenizer.model, "dropout"):
        tokenizer.model.dropout = None
    # the name of a special token inside a user's text stays text
    tokenizer.encode_special_tokens = True
    return tokenizer


def switched_on(path: Path) -> list[str]:
    """What a directory's tokenizer.json asks for and `load_tokenizer` ignores: a sentence each."""
    tokenizer = read_tokenizer(path)
    settings = {"truncation": tokenizer.truncation, "padding": tokenizer.padding,
                "dropout of merges": getattr(tokenizer.model, "dropout", None)}
    return [f"tokenizer.json asks for {name}, {value}: it is ignored, and not exported"
            for name, value in settings.items() if value]


def check_tokenizer(path: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raise ValueError unless a directory's tokenizer fits the model."""
    for token, expected in (("<|image_pad|>", config.image_token_id),
                            ("<|video_pad|>", config.video_token_id)):
        number = tokenizer.token_to_id(token)
        if number != expected:
            raise ValueError(f"{path}: {token} is {number} in tokenizer.json, "
                             f"but {expected} in config.json")
    if max(tokenizer.get_vocab().values()) >= config.vocab_size:
        raise ValueError(f"{path}: tokenizer.json has more tokens than the model's "
                         f"{config.vocab_size}")


def load_checkpoint(path: str | Path, dtype: torch.dtype, device: torch.device,
                    ) -> tuple[LlavaOneVision, Tokenizer]:
    """Model and tokenizer of a directory.  Raises ValueError if they do not belong together."""
    path = Path(path)
    # the small files first: to read the weights may take minutes
    tokenizer = load_tokenizer(path, read_config(path))
    return load_model(path, dtype, device), tokenizer


# -------------------------------------------------------------------------- checkpoints, as written


def file_groups(tensors: Tensors) -> Iterator[dict[str, Tensor]]:
    """Collect tensors for one file after the other: at most FILE_BYTES, or a single tensor."""
    group, size = {}, 0
    for name, tensor in tensors:
        if group and size + tensor.nbytes > FILE_BYTES:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += tensor.nbytes
    yield group


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise what fails in here as OSError that names `path`: a full disk names no file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def write_files(folder: Path, tensors: Tensors, contents: dict[str, object]) -> None:
    """Write weights, an index if they need several files, and other files to a folder."""
    groups, total = [], 0  # names of the tensors in each file; bytes of all tensors
    for group in file_groups(tensors):
        unnamed = folder / str(len(groups))
        with writing(folder):
            save_file(group, unnamed, metadata={"format": "pt"})
            # safetensors lets only its owner read it; the folder's mode has the user's umask
            unnamed.chmod(folder.stat().st_mode & 0o666)
        total += sum(tensor.nbytes for tensor in group.values())
        groups.append([*group])
        group.clear()  # free this file's tensors before the next file's are read

    # the names of the files contain how many they are, which is known only now
    count = len(groups)
    files = [WEIGHTS]
    if count > 1:
        files = [f"model-{place:05}-of-{count:05}.safetensors" for place in range(1, count + 1)]
        weight_map = {name: file for file, names in zip(files, groups) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        contents = contents | {INDEX: index}
    for number, file in enumerate(files):
        (folder / str(number)).rename(folder / file)
    for name, content in contents.items():
        if not isinstance(content, str):
            content = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(content, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file, or the list of a directory's files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(unfinished: Path, path: Path) -> None:
    """Rename a complete file or directory to `path`, which is whole even after a power cut."""
    for file in [*unfinished.glob("*"), unfinished]:
        sync(file)
    unfinished.rename(path)
    sync(path.parent)


def write_file(path: Path, text: str) -> None:
    """Write a text file, or replace it: after a power cut, too, it is the old or the new one."""
    unfinished = path.with_name(f"{path.name}.partial")
    with writing(path):
        unfinished.write_text(text, encoding="utf-8")
        publish(unfinished, path)


def write_directory(path: Path, tensors: Tensors, contents: dict[str, object]) -> None:
    """Write weights and other files to the directory `path`, which must be new.
    contents: of the other files, by name; a text as it is, anything else as JSON.
    Raises ValueError if `path` exists, or its parent does not."""
    if os.path.lexists(path):  # also a link to nowhere
        raise ValueError(f"{path} is there already")
    if not path.parent.is_dir():
        raise ValueError(f"there is no directory {path.parent}")
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.partial")
    unfinished.mkdir()
    # renaming is one step for the file system: `path` is complete or does not exist
    try:
        write_files(unfinished, tensors, contents)
        publish(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def pieces_of(tensor: Tensor, names: list[str]) -> Tensors:
    """Cut a parameter into tensors of these names, each with the same number of lines."""
    return zip(names, tensor.contiguous().chunk(len(names)))


def check_finite(model: LlavaOneVision, dtype: torch.dtype) -> None:
    """Raise ValueError naming a parameter with a number that is not finite as `dtype`."""
    bad = []
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        if not local.detach().to(dtype).isfinite().all():
            bad.append(name)
    # each rank has seen its own part alone; all ranks must raise, or none
    bad = [*chain(*on_all_ranks(lambda: bad))]
    if bad:
        raise ValueError(f"{bad[0]} has a number that is not finite as {dtype}: no checkpoint is "
                         "written")


def save_checkpoint(model: LlavaOneVision, tokenizer: Tokenizer, path: Path,
                    dtype: torch.dtype = torch.bfloat16) -> None:
    """Write weights, config.json and tokenizer.json, as `write_directory` does.
    All ranks of a sharded model call this together; the first one writes.  If a number is not
    finite, all ranks raise ValueError and nothing is written."""
    check_finite(model, dtype)
    layout = released_names(model)
    rank, _ = rank_and_count()

    def tensors() -> Tensors:
        for name, parameter in model.named_parameters():
            tensor = parameter.detach().to(dtype)
            # a collective: each rank brings its lines
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            if rank == 0:
                yield from pieces_of(tensor.cpu(), layout[name])

    if rank == 0:
        write_directory(path, tensors(), {"config.json": config_json(model.config, dtype),
                                          "tokenizer.json": tokenizer.to_str(pretty=True)})
    else:
        list(tensors())  # yields nothing, but takes part in every collective
    # nobody reads the directory before it exists
    if dist.is_initialized():
        dist.barrier()


def newest_checkpoint() -> tuple[Path, str]:
    """The newest checkpoint under runs/, or else the shipped one; and words that say which."""
    # runs/RUN/STAGE/config.json; a directory that is still being written ends in .partial
    configs = [file for file in Path("runs").glob("*/*/config.json")
               if file.parent.suffix != ".partial"]
    if not configs:
        return Path(__file__).parent / "assets" / "tiny", "shipped with the project"
    return max(configs, key=lambda file: file.stat().st_mtime).parent, "your newest run"


# ------------------------------------------------------------------------------ the state of a run


def fingerprint(file: Path) -> list:
    """Size and sha256 of a file, as a manifest has them."""
    return [*facts_of(file, digest=True).values()]


def write_state(path: Path, tensors: dict[str, Tensor], about: dict,
                group: dist.ProcessGroup | None) -> None:
    """Write the state of a run to the directory `path`.  All ranks call this together.

        step-00000500.partial/   shard-00001-....safetensors   what rank 0 holds of the tensors
                                 shard-00002-....safetensors   ... rank 1
                                 state.json                    `about`
                                 manifest.json                 size and sha256 of each other file

    When all ranks have written, the first one renames it to step-00000500.  If a rank fails, all
    raise OSError, and nothing is left.
    """
    rank, _ = rank_and_count()
    unfinished = path.with_name(f"{path.name}.partial")

    def begin() -> None:
        if rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
            unfinished.mkdir()
            (unfinished / "state.json").write_text(json.dumps(about))

    def fingerprints() -> dict[str, list]:
        own = [*unfinished.glob(f"shard-{rank + 1:05}-*")]
        if rank == 0:
            own.append(unfinished / "state.json")
        return {file.name: fingerprint(file) for file in own}

    def commit() -> None:
        if rank == 0:
            manifest = {name: entry for part in found for name, entry in part.items()}
            (unfinished / MANIFEST).write_text(json.dumps(manifest))
            publish(unfinished, path)

    try:
        on_all_ranks(begin, group)
        checkpoint.save(tensors, process_group=group, storage_writer=(
            checkpoint.HuggingFaceStorageWriter(str(unfinished), save_distributed=True)))
        found = on_all_ranks(fingerprints, group)
        on_all_ranks(commit, group)
    except checkpoint.api.CheckpointException as error:
        raise OSError(f"{path} cannot be written: {first_failure(error)}") from error
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        if rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)


def first_failure(error: checkpoint.api.CheckpointException) -> str:
    """What went wrong on which rank, when all ranks raise because one has failed."""
    rank, (cause, _) = next(iter(error.failures.items()))
    return f"rank {rank}: {cause}"


def states_in(folder: Path) -> list[Path]:
    """The states of a run's stage, the oldest first; nothing says that they are whole."""
    return sorted(folder.glob("step-" + "[0-9]" * 8))


def damage_of_state(path: Path, part: int = 0, parts: int = 1) -> str:
    """What is wrong with a state, in a sentence; empty if its manifest holds.

    Of the files, only every `parts`-th is read, from number `part` on.
    """
    try:
        manifest = read_json_object(path / MANIFEST)
        present = {file.name for file in path.iterdir()} - {MANIFEST}
        # a file too many would be read as well
        if present != {*manifest}:
            names = ", ".join(sorted(present ^ {*manifest}))
            return f"{path}: {MANIFEST} has not the files that are there, they differ in {names}"
        for name in sorted(manifest)[part::parts]:
            if fingerprint(path / name) != manifest[name]:
                return f"{path / name} has another size or sha256 than {MANIFEST} says"
    except (OSError, ValueError) as error:
        return f"{path} is damaged: {error}"
    return ""


def newest_state(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole state of a run's stage, and what is wrong with those that are newer.

    All ranks call this together: they share the reading.  Damaged ones are renamed, since the run
    will come to the same step again.  Raises OSError if there are states, but none is whole.
    """
    rank, count = rank_and_count()
    damaged, said = [], []

    def set_aside() -> None:
        for path in damaged if rank == 0 else ():
            aside = path.with_suffix(".damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)

    # all ranks go by what the first one sees
    for path in reversed(on_all_ranks(partial(states_in, folder))[0]):
        damage = max(on_all_ranks(partial(damage_of_state, path, rank, count)))
        if not damage:
            on_all_ranks(set_aside)
            return path, said
        damaged.append(path)
        said.append(damage)
    if said:
        raise OSError(f"no state in {folder} is whole ({'; '.join(said)}): remove it to begin the "
                      "stage again")
    return None, []


def read_state(path: Path, tensors: dict[str, Tensor]) -> None:
    """Read a state into these tensors, in place, whatever number of ranks has written it."""
    try:
        checkpoint.load(tensors, storage_reader=checkpoint.HuggingFaceStorageReader(str(path)))
    except checkpoint.api.CheckpointException as error:
        raise ValueError(f"{path} cannot be read: {first_failure(error)}") from error


class StateWriter:
    """Writes the states of a stage while the training goes on, one at a time."""

    def __init__(self, folder: Path, from_gpu: bool = False) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        # its messages must not mix with those of the training
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        # what is inside of DefaultStager, which PyTorch 2.11 closes after the first state
        self.stager = StateDictStager(pin_memory=from_gpu)
        self.thread = ThreadPoolExecutor(1)
        self.writing = Future()
        self.writing.set_result(None)  # nothing so far

    def write(self, step: int, tensors: dict[str, Tensor], about: dict) -> None:
        """Copy the state and begin to write it; first wait for the state before."""
        self.wait()
        copies = self.stager.stage(tensors, non_blocking=self.stager.pin_memory)
        if self.stager.pin_memory:
            torch.accelerator.synchronize()
        self.writing = self.thread.submit(self.write_and_tidy, self.folder / f"step-{step:08}",
                                          copies, about)

    def write_and_tidy(self, path: Path, tensors: dict[str, Tensor], about: dict) -> None:
        """Write a state; only then remove the oldest ones."""
        write_state(path, tensors, about, self.group)
        if rank_and_count()[0] == 0:
            for old in states_in(self.folder)[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)

    def failed(self) -> bool:
        """Has the last state failed to be written?"""
        return self.writing.done() and self.writing.exception() is not None

    def wait(self) -> None:
        """Wait until the last state is on the disk.  Raises OSError if it could not be written."""
        self.writing.result()


# ---------------------------------------------------------------------------- from layout to layout


def source_layouts(layout: Layout) -> tuple[Layout, Layout]:
    """The layouts of a ViT's and of a decoder's own checkpoint; the merger is in neither."""
    vit, decoder = {}, {}
    for name, names in layout.items():
        if not name.startswith("visual."):
            decoder[name] = names
        elif not name.startswith("visual.merger."):
            theirs = name
            for our_part, their_part in VIT_NAMES:
                theirs = theirs.replace(our_part, their_part)
            # RICE has three matrices for queries, keys and values, we have one
            vit[name] = [theirs]
            if ".attn.qkv." in theirs:
                vit[name] = [theirs.replace(".attn.qkv.", f".self_attn.{matrix}_proj.")
                             for matrix in "qkv"]
    return vit, decoder


def read_tensors(model: LlavaOneVision, pieces: Pieces, dtype: torch.dtype | None = None,
                 layout: Layout | None = None) -> Tensors:
    """Read the parameters of `pieces`, and yield them as the tensors that `layout` names.
    dtype: None keeps that of the files; layout: by default the released one.
    Raises ValueError naming tensor and file where a number is not finite."""
    layout = layout or released_names(model)
    for name, tensor in read_parameters(model, pieces, dtype):
        stored = pieces[name]
        # by tensor and not by parameter, so that the message can name the tensor
        for piece, part in zip(stored, tensor.chunk(len(stored))):
            if not part.isfinite().all():
                raise ValueError(f"{piece.file}: {piece.key} is not finite everywhere, as "
                                 f"{part.dtype}")
        yield from pieces_of(tensor, layout[name])


def tokenizer_files(tokenizer: Tokenizer, max_length: int) -> dict[str, object]:
    """All files from which Hugging Face reads a Qwen2Tokenizer, by name; see `write_directory`.
    max_length: tokens of a text at most.  Raises ValueError for a tokenizer of another kind."""
    model = json.loads(tokenizer.to_str())["model"]
    if model["type"] != "BPE":
        raise ValueError(f"tokenizer.json is of the kind {model['type']}, only BPE can be exported")
    # some versions write a merge as "a b", others as ["a", "b"]; merges.txt has "a b"
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    properties = ("content", "special", "lstrip", "rstrip", "normalized", "single_word")
    added = {number: {name: getattr(token, name) for name in properties}
             for number, token in tokenizer.get_added_tokens_decoder().items()}
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": [
        token["content"] for token in added.values()
        if token["special"] and token["content"] != "<|endoftext|>"]}
    # their fast tokenizer reads tokenizer.json, the slow one vocab.json and merges.txt
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True), "chat_template.jinja": CHAT_TEMPLATE,
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer", "processor_class": "Qwen2_5_VLProcessor",
            **roles, "added_tokens_decoder": added, "chat_template": CHAT_TEMPLATE,
            "bos_token": None, "unk_token": None, "add_bos_token": False, "errors": "replace",
            "add_prefix_space": False, "clean_up_tokenization_spaces": False,
            "split_special_tokens": False, "model_max_length": max_length},
        "special_tokens_map.json": roles,
        "added_tokens.json": {token["content"]: number for number, token in added.items()},
        "vocab.json": model["vocab"], "merges.txt": "\n".join(["#version: 0.2", *merges, ""])}


def side_files(config: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype, code: str = PUBLISHED,
               quantization: dict | None = None) -> dict[str, object]:
    """All files but the weights that Hugging Face's loaders want, by name; see `write_directory`.
    code: the repository of the modelling code to load; there is none for mixtures of experts.
    quantization: the `quantization_config` of an FP8 checkpoint."""
    about = config_json(config, dtype)
    if quantization is not None:
        about["quantization_config"] = quantization
    for edge in ("start", "end"):
        about[f"vision_{edge}_token_id"] = tokenizer.token_to_id(f"<|vision_{edge}|>")
    # transformers imports the class OWNER/NAME--MODULE.CLASS from the hub
    if not config.num_experts:
        model_class = (f"{code}--modeling_llavaonevision1_5."
                       "LLaVAOneVision1_5_ForConditionalGeneration")
        about["auto_map"] = {
            "AutoConfig": f"{code}--configuration_llavaonevision1_5.Llavaonevision1_5Config",
            "AutoModel": model_class, "AutoModelForCausalLM": model_class}

    # <|im_end|> ends an answer, <|endoftext|> a document; generation stops at both
    end = tokenizer.token_to_id("<|endoftext|>")
    stops = [tokenizer.token_to_id("<|im_end|>"), end]
    pictures = {
        "do_convert_rgb": True, "do_resize": True, "do_rescale": True, "do_normalize": True,
        "image_mean": [round(x, 8) for x in CLIP_MEAN.tolist()], "resample": 3,
        "image_std": [round(x, 8) for x in CLIP_STD.tolist()], "rescale_factor": 1 / 255,
        "min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}, "patch_size": 14,
        "merge_size": 2, "temporal_patch_size": 1, "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor"}
    generation = {"bos_token_id": end, "eos_token_id": stops, "pad_token_id": end}
    return tokenizer_files(tokenizer, config.max_position_embeddings) | {
        "config.json": about, "generation_config.json": generation,
        "preprocessor_config.json": pictures}


# ---------------------------------------------------------------------------------------- commands


def stage0_config(vit: Path, llm: Path, tokenizer: Tokenizer) -> ModelConfig:
    """The merged model's sizes, from the configurations of its parts.  Raises ValueError."""
    # RICE's config.json has transformers' names for the sizes of a ViT, not those of ours
    names = {"depth": "num_hidden_layers", "embed_dim": "hidden_size",
             "num_heads": "num_attention_heads", "intermediate_size": "intermediate_size",
             "layer_norm_eps": "layer_norm_eps"}
    settings = {"patch_size": 14, "num_channels": 3, "hidden_act": "gelu"}
    file = vit / "config.json"
    sizes = read_section(file, read_json_object(file), settings, [*names.values()])
    file = llm / "config.json"
    decoder = decoder_fields(file, read_json_object(file))
    vision = VisionConfig(text_hidden_size=decoder["hidden_size"],
                          **{ours: sizes[theirs] for ours, theirs in names.items()})
    return ModelConfig(**decoder, vision=vision,
                       image_token_id=tokenizer.token_to_id("<|image_pad|>"),
                       video_token_id=tokenizer.token_to_id("<|video_pad|>"))


def fresh_merger(model: LlavaOneVision, seed: int, dtype: torch.dtype) -> Tensors:
    """Random tensors of the merger, drawn as LlavaOneVision.init_weights draws them."""
    merger, generator = Merger(model.config.vision), torch.Generator().manual_seed(seed)
    for module in merger.modules():
        init_linear(module, model.config.initializer_range, generator)
    for name, parameter in merger.named_parameters():
        yield f"visual.merger.{name}", parameter.detach().to(dtype)


def merge(flags: argparse.Namespace) -> None:
    """Stage 0: a ViT and a decoder, each as published, with a random merger between them."""
    tokenizer = load_tokenizer(flags.tokenizer)
    config = stage0_config(flags.vit, flags.llm, tokenizer)
    check_tokenizer(flags.tokenizer, tokenizer, config)
    vit_tensors = tensor_files(flags.vit)
    decoder_tensors = tensor_files(flags.llm)
    # released checkpoints always have a head, so a tied head of a source is copied
    model = empty_model(f"{flags.vit} and {flags.llm}", replace(config, tie_word_embeddings=False),
                        len(vit_tensors) + len(decoder_tensors))
    layout = released_names(model)

    # where the sources have each parameter; the merger's tensors come from a seed
    vit_layout, decoder_layout = source_layouts(layout)
    remark = ""
    if config.tie_word_embeddings and "lm_head.weight" not in decoder_tensors:
        decoder_layout["lm_head.weight"] = decoder_layout["model.embed_tokens.weight"]
        remark = ", head copied from the embedding"
    vit = find_pieces(flags.vit, vit_tensors, vit_layout, UNUSED)
    decoder = find_pieces(flags.llm, decoder_tensors, decoder_layout, UNUSED)

    merger = fresh_merger(model, flags.seed, flags.dtype)
    sources = read_tensors(model, vit | decoder, flags.dtype)
    write_directory(flags.out, chain(merger, sources),
                    side_files(model.config, tokenizer, flags.dtype, flags.code))
    print(f"{flags.out}: {sum(p.numel() for p in model.parameters()):,} parameters, merger from "
          f"seed {flags.seed}{remark}", flush=True)
    if not flags.verify:
        return

    _, merged = find_checkpoint(flags.out)
    for path, pieces in ((flags.vit, vit), (flags.llm, decoder)):
        apart = dict(differences(model, pieces, merged, flags.dtype))
        for name, distance in apart.items():
            if distance:
                raise ValueError(f"{name} of {flags.out} is not what it was in {path}")
        print(f"{path} makes {len(apart)} tensors of {flags.out}, equal as {flags.dtype}")


def fp8_names(model: LlavaOneVision) -> tuple[set[str], dict]:
    """Names of the matrices that an FP8 export quantises, and its `quantization_config`.
    Raises ValueError if a matrix does not consist of whole squares of 128 x 128."""
    # replaces the layers that training computes in FP8; the model has no numbers here
    convert_to_fp8(model)
    layout = released_names(model)
    quantised, kept = set(), []
    for path, layer in model.named_modules():
        # a tied head is a layer of the model, but in no file
        names = layout.get(f"{path}.weight", [f"{path}.weight"])
        if isinstance(layer, Fp8Linear):
            quantised.update(names)
        elif isinstance(layer, nn.Linear):
            kept += [name.removesuffix(".weight") for name in names]
    return quantised, FP8_SETTINGS | {
        "activation_scheme": "dynamic", "modules_to_not_convert": kept}


def to_fp8(tensors: Tensors, names: set[str], dtype: torch.dtype) -> Tensors:
    """Quantise the tensors in `names` to e4m3, each followed by its scales; the others to dtype."""
    for name, tensor in tensors:
        if name in names:
            quantised, _ = quantize_fp8(tensor.float(), square=True)
            yield name, quantised.values
            yield name + SCALES, quantised.scales
            continue
        # a finite bfloat16 number may be infinite as float16, which ends at 65,504
        converted = tensor.to(dtype)
        if not converted.isfinite().all():
            raise ValueError(f"{name} is not finite everywhere, as {dtype}")
        yield name, converted


def export(flags: argparse.Namespace) -> None:
    """A checkpoint, or a run's last, to the released format with all its files."""
    path = flags.path
    # a run has a directory for each stage; the last one of these is taken
    for stage in ("align", "mid", "instruct"):
        if (flags.path / stage / "config.json").is_file():
            path = flags.path / stage
    model, pieces = find_checkpoint(path)
    tokenizer = load_tokenizer(path, model.config)
    about = f"{sum(map(len, pieces.values())):,} tensors, {flags.dtype}"
    tensors, quantization = read_tensors(model, pieces, flags.dtype), None
    if flags.fp8:
        names, quantization = fp8_names(model)
        # quantised from the numbers of the files, not from a rounding of them to --dtype
        tensors = to_fp8(read_tensors(model, pieces), names, flags.dtype)
        about += f", {len(names):,} matrices in FP8"

    write_directory(flags.out, tensors,
                    side_files(model.config, tokenizer, flags.dtype, flags.code, quantization))
    code = f"code of {flags.code}"
    if model.config.num_experts:
        code = "no auto_map: there is no published code that reads mixtures of experts"
    print(f"{path} -> {flags.out}: {about}, {code}")


def differences(model: LlavaOneVision, pieces: Pieces, others: Pieces,
                dtype: torch.dtype | None = None) -> Iterator[tuple[str, float]]:
    """For each tensor made from `pieces`: how far are its numbers from `others`, at most?
    dtype: both are read as this type; None keeps the types of the files."""
    others = {parameter: others[parameter] for parameter in pieces}
    pairs = zip(read_tensors(model, pieces, dtype), read_tensors(model, others, dtype))
    for (name, ours), (_, theirs) in pairs:
        # in blocks of 4,096 lines, since float64 takes 8 bytes a number
        blocks = zip(ours.split(4096), theirs.split(4096))
        yield name, max(float((a.double() - b.double()).abs().max()) for a, b in blocks)


def verify(flags: argparse.Namespace) -> None:
    """Is a directory whole: names, shapes, types, finite numbers; hashes; distance to another."""
    model, pieces = find_checkpoint(flags.path)
    types = Counter()
    # to read is to check; tensors come in the order of `pieces`
    tensors = read_tensors(model, pieces)
    for (_, tensor), piece in zip(tensors, chain(*pieces.values())):
        kind = "FP8 with scales" if piece.scales else tensor.dtype
        types[kind] += 1

    for file in sorted(flags.path.iterdir()):
        if file.is_file():
            size, digest = fingerprint(file)
            print(f"{digest}  {size:>14,}  {file.name}", flush=True)
    counts = ", ".join(f"{count:,} of {kind}" for kind, count in types.items())
    print(f"the weights of {flags.path} are whole: {types.total():,} tensors, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters, all finite, {counts}")
    if model.config.tie_word_embeddings:
        print("lm_head.weight is not there: the head is the embedding")

    # remarks, not errors: this project reads the directory all the same
    absent = [name for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json",
                                "preprocessor_config.json") if not (flags.path / name).is_file()]
    if absent:
        print(f"not there: {', '.join(absent)}")
    if "tokenizer.json" not in absent:
        for sentence in switched_on(flags.path):
            print(sentence)
    if flags.other:
        compare(flags.path, model, pieces, flags.other)


def compare(path: Path, model: LlavaOneVision, pieces: Pieces, other: Path) -> None:
    """Print how far another directory is from `path`: settings, then each tensor that differs.
    Raises ValueError if their tensors have other names or shapes."""
    other_model, other_pieces = find_checkpoint(other)
    # shapes are checked when the tensors are read: both must be those of `model`
    for name in pieces.keys() ^ other_pieces.keys():
        raise ValueError(f"{name} is in one of {path} and {other}, but not in the other")
    theirs = vars(other_model.config)
    for name, value in vars(model.config).items():
        if value != theirs[name]:
            print(f"config.json: {name} is {value} and {theirs[name]}")
    # compare all tensors before printing: a tensor that is not finite is an error
    apart = dict(differences(model, pieces, other_pieces))
    for name, distance in apart.items():
        if distance:
            print(f"{distance:12.4g}  {name}")
    farthest = max(apart, key=apart.get)
    if apart[farthest]:
        print(f"{path} and {other} differ most in {farthest}, by {apart[farthest]:.4g}")
    else:
        print(f"{path} and {other} have the same numbers")


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """The flags of a command line; `flags.run` is the command, a function that takes them."""
    parser = flag_parser("Convert and check checkpoint directories.", arguments)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=flag_parser)
    subs = []
    for command in (merge, export, verify):
        # the first line of a command's docstring is its help
        summary = command.__doc__.splitlines()[0]
        sub = commands.add_parser(command.__name__, help=summary, description=summary)
        sub.set_defaults(run=command)
        subs.append(sub)
    merge_flags, export_flags, verify_flags = subs

    for name, source in (("--vit", "the ViT's checkpoint, rice-vit-large-patch14-560"),
                         ("--llm", "the decoder's checkpoint, a Qwen3 of any size"),
                         ("--tokenizer", "directory with the tokenizer.json to use")):
        merge_flags.add_argument(name, type=Path, required=True, metavar="DIR", help=source)
    merge_flags.add_argument("--seed", type=int, default=0, help="of the merger's weights")
    merge_flags.add_argument("--verify", action="store_true",
                             help="compare the parts with their sources afterwards")
    for sub in (export_flags, verify_flags):
        sub.add_argument("path", type=Path, metavar="DIR")
    export_flags.add_argument("--fp8", action="store_true",
                              help="quantise the decoder's large matrices, for serving")
    verify_flags.add_argument("other", type=Path, metavar="DIR2", nargs="?",
                              help="print how far DIR is from it")

    # both of these write a checkpoint
    for sub in (merge_flags, export_flags):
        sub.add_argument("--out", type=Path, required=True, metavar="DIR",
                         help="the directory to write; it must be new")
        sub.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
        sub.add_argument("--code", default=PUBLISHED, metavar="OWNER/NAME",
                         help="repository whose code config.json's auto_map names")
    flags = parser.parse_args(arguments)
    if flags.command != "verify":
        flags.dtype = getattr(torch, flags.dtype)
    return flags


def main() -> None:
    def run() -> None:
        flags = parse_flags(sys.argv[1:])
        flags.run(flags)

    refuse_in_one_sentence("convert.py", run)


if __name__ == "__main__":
    main()
