"""Everything on disk: checkpoint directories in the released layout, read, written and found.

In and out: a model and its tokenizer, or a directory with config.json, *.safetensors and
tokenizer.json.  What a run writes and what was released are read by the same code.
Called by `train.py` and `sample.py`; calls `model.py`, which reads the weights.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.distributed.tensor import DTensor

from model import LlavaOneVision, ModelConfig, released_names

SHARD = 5e9  # bytes of a file of weights at most


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
        "text_config": {
            "model_type": "LLaVAOneVision1_5_text",
            "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
            "head_dim": config.head_dim, "hidden_size": config.hidden_size,
            "initializer_range": config.initializer_range,
            "intermediate_size": config.intermediate_size,
            "layer_types": ["full_attention"] * config.num_hidden_layers,
            "max_position_embeddings": config.max_position_embeddings,
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


def load_tokenizer(path: Path) -> Tokenizer:
    """Read `tokenizer.json` of a checkpoint directory.  Raises ValueError if it is unfit."""
    file = path / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{path} has no tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for malformed files
        raise ValueError(f"{file} is no tokenizer: {error}") from error
    for name in ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad",
                 "video_pad"):
        if tokenizer.token_to_id(f"<|{name}|>") is None:
            raise ValueError(f"{file} has no token <|{name}|>")
    tokenizer.encode_special_tokens = True  # a special token's name inside a text stays text
    return tokenizer


def load_checkpoint(
    path: str | Path, dtype: torch.dtype, device: torch.device,
    prepare: Callable[[LlavaOneVision], None] | None = None,
) -> tuple[LlavaOneVision, Tokenizer]:
    """Model and tokenizer of a directory; `prepare` as in `LlavaOneVision.from_pretrained`.

    Raises ValueError if they do not belong together.
    """
    path = Path(path)
    config = ModelConfig.from_dir(path)
    tokenizer = load_tokenizer(path)
    for token, expected in (("<|image_pad|>", config.image_token_id),
                            ("<|video_pad|>", config.video_token_id)):
        found = tokenizer.token_to_id(token)
        if found != expected:
            raise ValueError(f"{path}: {token} is {found} in tokenizer.json, "
                             f"but {expected} in config.json")
    if max(tokenizer.get_vocab().values()) >= config.vocab_size:
        raise ValueError(f"{path}: tokenizer.json has more tokens than the model's "
                         f"{config.vocab_size}")
    return LlavaOneVision.from_pretrained(path, dtype, device, prepare), tokenizer


def split_into_files(sizes: dict[str, int]) -> dict[str, list[str]]:
    """The tensors of each file, by its published name: together at most SHARD bytes, or one."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if filled + size > SHARD and groups[-1]:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{number:05}-of-{len(groups):05}.safetensors": names
            for number, names in enumerate(groups, 1)}


def write_directory(path: Path, sizes: dict[str, int], tensors: Iterator[tuple[str, Tensor]],
                    texts: dict[str, str], writes: bool = True) -> None:
    """Write weights and texts (by file name) to the directory `path`, which must be new.

    sizes: bytes of each tensor, in the order in which `tensors` brings them; they are written to
    files of at most SHARD bytes, with an index if there are several, one file in memory at a time.
    All goes to `path`.partial and is moved into place, so `path` is whole or not there.
    writes: False on all ranks but the first, which only help to bring the tensors.
    Raises ValueError if `path` is there already.
    """
    files = split_into_files(sizes)
    partial = path.with_name(path.name + ".partial")
    if writes:
        if path.exists():
            raise ValueError(f"{path} is there already")
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was stopped while it wrote
        partial.mkdir(parents=True)
    try:
        for file, names in files.items():
            state = {name: tensor for name, tensor in islice(tensors, len(names)) if writes}
            if writes:
                save_file(state, partial / file, metadata={"format": "pt"})
        if writes:
            if len(files) > 1:
                weight_map = {name: file for file, names in files.items() for name in names}
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
                texts = {**texts, "model.safetensors.index.json": json.dumps(index, indent=2)}
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8")
            partial.rename(path)
    finally:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)


def pieces_of(tensor: Tensor, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file that a parameter is made of: its rows, split evenly."""
    for name, piece in zip(names, tensor.chunk(len(names))):
        yield name, piece.clone() if len(names) > 1 else piece.contiguous()


def save_checkpoint(model: LlavaOneVision, tokenizer: Tokenizer, path: Path,
                    dtype: torch.dtype = torch.bfloat16) -> None:
    """Write weights, config.json and tokenizer.json, as `write_directory` does.

    All ranks of a sharded model call this together; the first one writes.
    """
    names = released_names(model)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in model.named_parameters():
            tensor = parameter.detach().to(dtype)
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()
            yield from pieces_of(tensor.cpu(), names[name])

    sizes = {piece: p.numel() * dtype.itemsize // len(names[name])
             for name, p in model.named_parameters() for piece in names[name]}
    texts = {"config.json": json.dumps(config_json(model.config, dtype), indent=2),
             "tokenizer.json": tokenizer.to_str(pretty=True)}
    write_directory(path, sizes, tensors(), texts,
                    writes=not dist.is_initialized() or dist.get_rank() == 0)
    if dist.is_initialized():
        dist.barrier()  # nobody reads what is not there yet


def newest_checkpoint() -> tuple[Path, str]:
    """The newest checkpoint under runs/, else the shipped one; with a word on which it is."""
    own = [file for file in Path("runs").glob("*/*/config.json")
           if file.parent.suffix != ".partial"]
    if own:
        return max(own, key=lambda file: file.stat().st_mtime).parent, "your newest run"
    return Path(__file__).parent / "assets" / "tiny", "shipped with the project"
