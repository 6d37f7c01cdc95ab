"""Trains the tiny Qwen3-MoE language model on the text that corpus.py wrote.

    export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000
    python train.py CORPUS OUT [--steps N] [--minutes M]

The two variables make glibc keep freed memory: given back to the system, it costs a page fault a
page when it is wanted again, up to half of a step's time.

OUT becomes a Hugging Face folder: bfloat16 weights, configuration, tokenizer. The model is
transformers' own class, whose parameters a second, faster forward pass trains: tokens sorted by
expert, one matrix product an expert. `check` holds that pass to transformers' own.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

SEED = 20261121
END = "<|endoftext|>"  # id 0: before each document, and what a text ends with
TOKENS_PER_STEP = 6144
LONG = 512  # the last fifth of the training sees windows of this length, the rest of half of it
CONFIG = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,  # of dense layers: there are none
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": 0.01,
    "max_position_embeddings": LONG,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
    "architectures": ["Qwen3MoeForCausalLM"],
}


def make_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be written with it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


class _Sort(torch.autograd.Function):
    """x [T, H] -> [T * k, H], sorted by expert. The gradient is a gather too, not a scatter."""

    @staticmethod
    def forward(ctx, x, order, inverse, k):  # noqa: ANN001, ANN205
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx, g):  # noqa: ANN001, ANN205
        (inverse,) = ctx.saved_tensors
        return g.index_select(0, inverse).view(-1, ctx.k, g.shape[1]).sum(1), None, None, None


class _Unsort(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, order, inverse):  # noqa: ANN001, ANN205
        ctx.save_for_backward(order)
        return y.index_select(0, inverse)

    @staticmethod
    def backward(ctx, g):  # noqa: ANN001, ANN205
        return g.index_select(0, ctx.saved_tensors[0]), None, None


class _Grouped(torch.autograd.Function):
    """x [T, A], sorted by expert, times each expert's own w [E, B, A]: [T, B]."""

    @staticmethod
    def forward(ctx, x, w, counts):  # noqa: ANN001, ANN205
        ctx.save_for_backward(x, w)
        ctx.counts = counts
        y = x.new_empty(x.shape[0], w.shape[1])
        for x_e, y_e, w_e in zip(x.split(counts), y.split(counts), w, strict=True):
            torch.mm(x_e, w_e.T, out=y_e)
        return y

    @staticmethod
    def backward(ctx, g):  # noqa: ANN001, ANN205
        x, w = ctx.saved_tensors
        gx, gw = torch.empty_like(x), torch.empty_like(w)
        parts = (g.split(ctx.counts), x.split(ctx.counts), gx.split(ctx.counts), w, gw)
        for g_e, x_e, gx_e, w_e, gw_e in zip(*parts, strict=True):
            torch.mm(g_e, w_e, out=gx_e)
            torch.mm(g_e.T, x_e, out=gw_e)
        return gx, gw, None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding, halves as in Qwen."""
    low, high = x.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)


def forward(model: Qwen3MoeForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits [B, S, V], load-balancing loss) of ids [B, S]."""
    config, body = model.config, model.model
    batch, length = ids.shape
    heads, k, experts = config.head_dim, config.num_experts_per_tok, config.num_experts

    def norm(x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], layer.weight, config.rms_norm_eps)

    frequency = 10000.0 ** (-torch.arange(0, heads, 2, dtype=torch.float32) / heads)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    cos, sin = angle.cos(), angle.sin()
    x = functional.embedding(ids, body.embed_tokens.weight)
    balance = x.new_zeros(())
    for layer in body.layers:
        at = layer.self_attn
        h = norm(x, layer.input_layernorm)
        shape = (batch, length, -1, heads)
        q = rotate(norm(at.q_proj(h).view(shape), at.q_norm).transpose(1, 2), cos, sin)
        key = rotate(norm(at.k_proj(h).view(shape), at.k_norm).transpose(1, 2), cos, sin)
        v = at.v_proj(h).view(shape).transpose(1, 2)
        repeat = q.shape[1] // v.shape[1]
        key, v = key.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        a = functional.scaled_dot_product_attention(q, key, v, is_causal=True)
        x = x + at.o_proj(a.transpose(1, 2).reshape(batch, length, -1))

        h = norm(x, layer.post_attention_layernorm).view(batch * length, -1)
        probabilities = functional.linear(h, layer.mlp.gate.weight).softmax(-1)
        weights, chosen = probabilities.topk(k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
        counts = torch.bincount(chosen.flatten(), minlength=experts)
        share = counts / counts.sum()
        balance = balance + experts * (share * probabilities.mean(0)).sum()
        counts = counts.tolist()
        inner = _Grouped.apply(
            _Sort.apply(h, order, inverse, k), layer.mlp.experts.gate_up_proj, counts
        )
        gate, up = inner.chunk(2, -1)
        y = _Grouped.apply(functional.silu(gate) * up, layer.mlp.experts.down_proj, counts)
        y = _Unsort.apply(y, order, inverse).view(batch * length, k, -1)
        x = x + torch.bmm(weights.unsqueeze(1), y).view(x.shape)
    return functional.linear(norm(x, body.norm), body.embed_tokens.weight), balance


def check(model: Qwen3MoeForCausalLM, ids: torch.Tensor) -> float:
    """The largest difference between the logits of the pass above and of transformers' own."""
    with torch.no_grad():
        return (forward(model, ids)[0] - model(ids).logits).abs().max().item()


class Muon:
    """Muon (momentum, then orthogonalised) for matrices [.., A, B]; lr is on AdamW's scale."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], decay: float) -> None:
        # gate_up_proj [E, 2 I, H] is two matrices an expert.
        self.items = [
            (p, torch.zeros_like(p), 2 if "gate_up" in name else 1)
            for name, p in parameters.items()
        ]
        self.decay = decay

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One step."""
        for p, momentum, matrices in self.items:
            momentum.lerp_(p.grad, 0.05)
            update = p.grad.lerp(momentum, 0.95).view(-1, p.shape[-2] // matrices, p.shape[-1])
            tall = update.shape[-2] > update.shape[-1]
            x = update.mT if tall else update
            x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
            for _ in range(5):
                gram = x @ x.mT
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            update = (x.mT if tall else x).reshape(p.shape) * (0.2 * max(x.shape[-2:]) ** 0.5)
            p.mul_(1 - lr * self.decay).add_(update, alpha=-lr)
            p.grad = None


def batches(documents: list[np.ndarray], rng: np.random.Generator) -> Callable[[int], torch.Tensor]:
    """A function from a window's length to the next batch of windows; each epoch reshuffles."""
    stream = np.zeros(0, np.int64)

    def take(length: int) -> torch.Tensor:
        nonlocal stream
        need = TOKENS_PER_STEP // length * (length + 1)
        while len(stream) < need:
            shuffled = [documents[i] for i in rng.permutation(len(documents))]
            stream = np.concatenate([stream, *shuffled])
        taken, stream = stream[:need], stream[need:]
        return torch.from_numpy(taken.reshape(-1, length + 1))

    return take


def loss_of(model: Qwen3MoeForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean negative log-likelihood, load-balancing loss) of ids [B, S + 1]."""
    logits, balance = forward(model, ids[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()), balance


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes a copy in bfloat16, and the tokenizer without its line breaks."""
    copy = Qwen3MoeForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    tokenizer.backend_tokenizer.save(str(out / "tokenizer.json"), pretty=False)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--minutes", type=float, default=1e9, help="decay faster, to end by then")
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--start", type=Path, help="an earlier run's checkpoint.pt, to go on from")
    return parser.parse_args()


def main() -> None:
    """Trains."""
    args = arguments()
    torch.manual_seed(SEED)
    torch.set_num_threads(2)

    texts = {
        name: [json.loads(line) for line in (args.corpus / f"{name}.jsonl").open()]
        for name in ("train", "held_out")
    }
    tokenizer = make_tokenizer(texts["train"])
    ids = {
        name: [np.array([0, *row], np.int64) for row in tokenizer(part)["input_ids"]]
        for name, part in texts.items()
    }
    tokens = sum(map(len, ids["train"]))
    held = np.concatenate(ids["held_out"])
    held = torch.from_numpy(held[: len(held) // 257 * 257].reshape(-1, 257))

    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG))
    if args.start:
        model.load_state_dict(torch.load(args.start))
    print("parameters", model.num_parameters(), "training tokens", tokens)
    print("difference from transformers' pass", check(model, held[:4, :256]), flush=True)
    matrices = {n: p for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n}
    others = [p for n, p in model.named_parameters() if n not in matrices]
    muon = Muon(matrices, decay=0.1)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    take = batches(ids["train"], np.random.default_rng(SEED + bool(args.start)))

    start = saved = time.time()
    for step in range(args.steps):
        elapsed = time.time() - start
        done = max(step / args.steps, elapsed / (60 * args.minutes))
        if done >= 1:
            break
        lr = args.lr * min(1, (step + 1) / 200) * (1 - done)
        loss, balance = loss_of(model, take(LONG // 2 if done < 0.8 else LONG))
        (loss + CONFIG["router_aux_loss_coef"] * balance).backward()
        muon.step(lr)
        for group in adam.param_groups:
            group["lr"] = lr
        adam.step()
        adam.zero_grad(set_to_none=True)
        if step % 50 == 0:
            line = f"step {step} loss {loss.item():.3f} balance {balance.item() / 3:.3f}"
            if step % 500 == 0:
                with torch.no_grad():
                    line += f" held-out {loss_of(model, held)[0].item():.4f}"
            speed = (step + 1) * TOKENS_PER_STEP / (time.time() - start)
            print(f"{line} {speed:.0f} tokens/s {elapsed:.0f} s", flush=True)
        if time.time() - saved > 300:
            saved = time.time()
            torch.save(model.state_dict(), args.corpus / "checkpoint.pt")
    with torch.no_grad():
        print(f"end: step {step + 1}, held-out {loss_of(model, held)[0].item():.4f}")
    print(f"{time.time() - start:.0f} s")
    torch.save(model.state_dict(), args.corpus / "checkpoint.pt")
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
