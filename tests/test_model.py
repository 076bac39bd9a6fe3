"""Model properties that need no reference: packing, caching, loss, strict loading."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import model as model_module
from conftest import DEVICE
from model import (PRESETS, CachedKeys, GroupedLinear, KVCache, LlavaOneVision, MixtureOfExperts,
                   ModelConfig, sample_tokens)
from parallel import Ranks, shard
from vision import VisionConfig, patch_positions

PARITY = Path(__file__).parent / "parity" / "dense"
IMAGE = 199  # image_token_id of the parity checkpoint


def random_prompts(seed: int, prompts: int) -> list[dict[str, Tensor]]:
    """Prompts of random words with none to two pictures each."""
    rng = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(prompts):
        grids, ids = [], torch.randint(0, 190, (3,), generator=rng)
        for _ in range(int(torch.randint(0, 3, (1,), generator=rng))):
            rows, columns = (2 * torch.randint(1, 4, (2,), generator=rng)).tolist()
            grids.append([1, rows, columns])
            words = torch.randint(0, 190, (2,), generator=rng)
            ids = torch.cat([ids, torch.full((rows * columns // 4,), IMAGE), words])
        grid = torch.tensor(grids, dtype=torch.int64).view(-1, 3)
        patches = torch.randn(int(grid.prod(dim=1).sum()), 588, generator=rng)
        made.append({"input_ids": ids, "patches": patches, "grid_thw": grid,
                     "cu_seqlens": torch.tensor([0, len(ids)])})
    return made


def packed_together(prompts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    row = {key: torch.cat([p[key] for p in prompts])
           for key in ("input_ids", "patches", "grid_thw")}
    lengths = torch.tensor([0] + [len(p["input_ids"]) for p in prompts])
    return {**row, "cu_seqlens": lengths.cumsum(0)}


@pytest.fixture(scope="module")
def model() -> LlavaOneVision:
    return LlavaOneVision.from_pretrained(PARITY)


@pytest.mark.parametrize("seed", range(5))
def test_packed_samples_do_not_see_each_other(model: LlavaOneVision, seed: int) -> None:
    prompts = random_prompts(seed, 4)
    together = model(**packed_together(prompts))
    alone = torch.cat([model(**prompt) for prompt in prompts])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_cached_generation_equals_full_passes(model: LlavaOneVision, seed: int) -> None:
    prompts = random_prompts(seed, 3)
    steps = list(model.generate(**packed_together(prompts), max_new_tokens=6))
    for i, prompt in enumerate(prompts):
        for step in steps:
            with torch.no_grad():
                best = model(**prompt)[-1].argmax()
            assert step[i] == best
            ids = torch.cat([prompt["input_ids"], best[None]])
            prompt = {**prompt, "input_ids": ids, "cu_seqlens": torch.tensor([0, len(ids)])}


def test_generation_stops(model: LlavaOneVision) -> None:
    prompt = packed_together(random_prompts(0, 2))
    free = torch.stack(list(model.generate(**prompt, max_new_tokens=8)), dim=1)
    stop = int(free[0, 2])
    steps = torch.stack(list(model.generate(**prompt, max_new_tokens=8, stop_ids=(stop,))), dim=1)
    end = free[0].tolist().index(stop)
    assert (steps[0, end:] == stop).all()
    assert torch.equal(steps[0, :end], free[0, :end])


def test_chunked_loss_equals_plain_cross_entropy(model: LlavaOneVision,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    row = packed_together(random_prompts(1, 4))
    targets = torch.randint(0, 200, row["input_ids"].shape)
    targets[::3] = -100
    plain = torch.nn.functional.cross_entropy(model(**row), targets, reduction="sum")
    expected = torch.autograd.grad(plain, model.lm_head.weight)[0]
    for chunk in (3, 1024):
        monkeypatch.setattr(model_module, "LOSS_CHUNK", chunk)
        loss = model.loss(targets=targets, **row)
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(torch.autograd.grad(loss, model.lm_head.weight)[0], expected)


def test_loss_without_labels_is_zero(model: LlavaOneVision) -> None:
    row = packed_together(random_prompts(1, 2))
    loss = model.loss(targets=torch.full_like(row["input_ids"], -100), **row)
    loss.backward()
    assert loss == 0


def test_wrong_number_of_visual_tokens(model: LlavaOneVision) -> None:
    prompt = next(p for p in random_prompts(2, 9) if len(p["grid_thw"]))
    prompt["input_ids"] = prompt["input_ids"][prompt["input_ids"] != IMAGE]
    prompt["cu_seqlens"] = torch.tensor([0, len(prompt["input_ids"])])
    with pytest.raises(ValueError, match="^0 image or video tokens"):
        model(**prompt)


def test_patch_positions_follow_the_merge_order() -> None:
    positions = patch_positions(torch.tensor([[1, 4, 4], [2, 2, 4]])).tolist()
    picture = [(r + y, c + x) for r in (0, 2) for c in (0, 2) for y in (0, 1) for x in (0, 1)]
    frame = [(y, c + x) for c in (0, 2) for y in (0, 1) for x in (0, 1)]
    assert [tuple(p) for p in positions] == picture + frame + frame


def test_nucleus() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(2000, 1)
    drawn = sample_tokens(logits, temperature=1.0, top_p=0.7)
    assert set(drawn.tolist()) == {0, 1}
    assert abs((drawn == 0).float().mean() - 0.5 / 0.8) < 0.04
    assert (sample_tokens(logits, 0.0, top_p=0.7) == 0).all()
    # of the three likeliest, 0.8 of 0.95 is reached with two
    drawn = sample_tokens(logits, temperature=1.0, top_k=3)
    assert set(drawn.tolist()) == {0, 1, 2}
    assert abs((drawn == 0).float().mean() - 0.5 / 0.95) < 0.04
    drawn = sample_tokens(logits, temperature=1.0, top_k=3, top_p=0.8)
    assert set(drawn.tolist()) == {0, 1}


# ------------------------------------------------------------------------------------------ loading


def copy_checkpoint(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of the parity checkpoint whose tensors went through `change`."""
    shutil.copy(PARITY / "config.json", folder)
    tensors = load_file(PARITY / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_transformers_5_config(tmp_path: Path) -> None:
    raw = json.loads((PARITY / "config.json").read_text())
    raw["text_config"]["rope_parameters"] = {"rope_theta": raw["text_config"].pop("rope_theta"),
                                             "rope_type": "default"}
    raw["dtype"] = raw.pop("torch_dtype")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert ModelConfig.from_dir(tmp_path) == ModelConfig.from_dir(PARITY)


def test_head_is_tied_only_when_absent(tmp_path: Path) -> None:
    folder = copy_checkpoint(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    tied = LlavaOneVision.from_pretrained(folder)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert tied.config.tie_word_embeddings


def test_mismatched_merger_width() -> None:
    config = replace(PRESETS["tiny"], vision=VisionConfig(text_hidden_size=7))
    with pytest.raises(ValueError, match="merger's width 7"):
        LlavaOneVision(config)


def test_cache_keeps_segments_apart() -> None:
    """Slots 0 and 2 of a cache: the keys at hand in the first pass, then those of the slots."""
    config = replace(PRESETS["tiny"], num_hidden_layers=1, num_key_value_heads=1, head_dim=1)
    cache = KVCache(config, slots=3, capacity=4, like=torch.zeros(1))
    first = CachedKeys(cache, [0, 2], fresh=True)
    first.begin(torch.tensor([0, 2, 3]), torch.tensor([0, 1, 0]))
    keys = torch.tensor([1.0, 2.0, 10.0]).view(3, 1, 1)
    k, _, where = first.of_layer(0, keys, keys)
    assert k is keys and where.cu_seqlens.tolist() == [0, 2, 3] and where.q_positions is None
    later = CachedKeys(cache, [0, 2], fresh=False)
    later.begin(torch.tensor([0, 1, 2]), torch.tensor([2, 1]))
    keys = torch.tensor([3.0, 11.0]).view(2, 1, 1)
    k, _, where = later.of_layer(0, keys, keys)
    assert k.flatten().tolist() == [1, 2, 3, 0, 0, 0, 0, 0, 10, 11, 0, 0]
    assert where.cu_seqlens.tolist() == [0, 8, 12] and where.q_positions.tolist() == [2, 1]
    alone = CachedKeys(cache, [2], fresh=False)
    alone.begin(torch.tensor([0, 1]), torch.tensor([2]))
    k, _, where = alone.of_layer(0, keys[:1], keys[:1])
    assert k.flatten().tolist() == [10, 11, 3, 0] and where.cu_seqlens.tolist() == [0, 4]


# ------------------------------------------------------------------------------ mixtures of experts

SMALL_MOE = replace(PRESETS["tiny-moe"], hidden_size=32, moe_intermediate_size=24)


def random_mixture(seed: int) -> tuple[MixtureOfExperts, Tensor]:
    """A mixture of 1 to 9 experts, 1 to all of them a token, and 0 to 60 tokens for it."""
    torch.manual_seed(seed)
    experts = int(torch.randint(1, 10, ()))
    config = replace(SMALL_MOE, num_experts=experts,
                     num_experts_per_tok=int(torch.randint(1, experts + 1, ())))
    mixture = MixtureOfExperts(config)
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return mixture, torch.randn(int(torch.randint(0, 61, ())), 32, requires_grad=True)


def by_definition(mixture: MixtureOfExperts, x: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    gates, ups, downs = (layer.weight.chunk(mixture.gate.out_features) for layer in (
        mixture.experts.gate_proj, mixture.experts.up_proj, mixture.experts.down_proj))
    rows = [x[:0]]
    for row in x:
        p = (mixture.gate.weight @ row).softmax(0)
        chosen = p.argsort(descending=True)[:mixture.experts_per_token].tolist()
        rows.append(sum(p[e] * (downs[e] @ (F.silu(gates[e] @ row) * (ups[e] @ row)))
                        for e in chosen)[None] / p[chosen].sum())
    return torch.cat(rows)


@pytest.mark.parametrize("seed", range(20))
def test_mixture_is_what_its_formula_says(seed: int) -> None:
    mixture, x = random_mixture(seed)
    parameters = [x, *mixture.parameters()]
    ours, theirs = mixture(x), by_definition(mixture, x)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    direction = torch.randn_like(ours)
    for a, b in zip(torch.autograd.grad((ours * direction).sum(), parameters),
                    torch.autograd.grad((theirs * direction).sum(), parameters,
                                        materialize_grads=True)):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(10))
def test_loop_over_experts_equals_the_grouped_product(seed: int) -> None:
    """The CPU's way and the GPU's: some groups are empty, at times all.  In bfloat16 on a GPU."""
    torch.manual_seed(seed)
    counts = torch.randint(0, 8, (6,)) * torch.randint(0, 2, (6,)) * (seed > 0)
    x, layer = torch.randn(int(counts.sum()), 32), GroupedLinear(6, 32, 16)
    weights = layer.weight.detach().unflatten(0, (6, 16))
    direction, found = torch.randn(len(x), 16), []
    native = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    for device, dtype in (("cpu", torch.float32), (DEVICE, native)):
        ours, theirs = (t.to(device, dtype).requires_grad_() for t in (x, weights))
        offsets = counts.cumsum(0).int().to(device)
        y = (layer(ours, counts) if not found else
             F.grouped_mm(ours, theirs.transpose(-2, -1), offs=offsets))
        gradients = list(torch.autograd.grad(y, (ours, theirs if found else layer.weight),
                                             direction.to(y)))
        gradients[1] = gradients[1].view(6, 16, 32)
        found.append([t.detach().float().cpu() for t in (y, *gradients)])
    for loop, grouped in zip(*found):
        torch.testing.assert_close(grouped, loop, atol=1e-5 if DEVICE == "cpu" else 0.1, rtol=0.02)


@pytest.mark.parametrize("seed", range(10))
def test_balance_has_the_gradient_of_its_formula(seed: int) -> None:
    mixture, x = random_mixture(seed)
    mixture.balance_weight = 0.3
    if not len(x):
        x = torch.randn(5, 32, requires_grad=True)
    direction, experts = torch.randn(len(x), 32), mixture.gate.out_features
    mixture.routed = 0
    found = torch.autograd.grad((mixture(x) * direction).sum(), [x, *mixture.parameters()])
    p = (x @ mixture.gate.weight.T).softmax(-1)
    chosen = F.one_hot(p.topk(mixture.experts_per_token).indices, experts)
    balance = experts * (chosen.sum(1).float().mean(0) * p.mean(0)).sum()
    total = (by_definition(mixture, x) * direction).sum() + 0.3 * balance
    expected = torch.autograd.grad(total, [x, *mixture.parameters()])
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    assert mixture.routed[:experts].tolist() == chosen.sum((0, 1)).tolist()
    torch.testing.assert_close(mixture.routed[experts:], torch.stack(
        [balance.detach(), torch.tensor(1.0)]).double(), atol=1e-6, rtol=1e-5)


def test_balance_is_k_when_all_experts_get_the_same() -> None:
    mixture = MixtureOfExperts(replace(SMALL_MOE, num_experts=8, num_experts_per_tok=2))
    for parameter in mixture.parameters():
        torch.nn.init.zeros_(parameter)
    mixture.gate.weight.data[:, :8] = torch.eye(8)
    mixture(torch.eye(32)[:8] + torch.eye(32)[[1, 2, 3, 4, 5, 6, 7, 0]])
    assert mixture.routed[:8].tolist() == [2.0] * 8
    assert float(mixture.routed[8]) == pytest.approx(2.0)


def test_mixture_recomputes_and_caches_like_a_dense_layer() -> None:
    """Balance and recomputing change no gradient but the balance's; a cache changes no word."""
    torch.manual_seed(0)
    net = LlavaOneVision(replace(PRESETS["tiny-moe"], num_hidden_layers=2)).init_weights()
    ids = torch.arange(40) + 20
    starts, gradients = torch.tensor([0, 15, 40]), []
    for recompute in ("none", "layer", "selective"):
        copy = LlavaOneVision(net.config)
        copy.load_state_dict(net.state_dict())
        shard(copy, recompute, False, Ranks(torch.device("cpu"), torch.float32))
        for layer in copy.model.layers:
            layer.mlp.balance_weight = 0.1
        copy.loss(ids, ids.roll(1), starts).backward()
        gradients.append({name: p.grad for name, p in copy.named_parameters()})
    for name, gradient in gradients[0].items():
        for other in gradients[1:]:
            assert (gradient is None) == (other[name] is None), name
            assert gradient is None or torch.equal(gradient, other[name]), name
    words = torch.stack(list(net.generate(ids, starts, max_new_tokens=5)), 1)
    for row, prompt in zip(words.tolist(), (ids[:15], ids[15:])):
        for word in row:
            logits = net(prompt, torch.tensor([0, len(prompt)]))
            assert int(logits[-1].argmax()) == word
            prompt = torch.cat([prompt, torch.tensor([word])])
