"""Pre-training of the embedded default base: a small SmolLM3 from scratch that calls tools and chats a little.

Takes rows of `training.data`; gives a plain transformers checkpoint (config, weights, tokenizer). The run is planned
by wall clock, because it shares its cores: curriculum and learning rate follow the spent part of `max_minutes`,
whatever the throughput.
"""

import json
import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, SmolLM3Config, SmolLM3ForCausalLM

from repo_package import ROOT

from .data import (
    DEFAULT_DATA,
    PromptStyle,
    Row,
    RowStream,
    dev_records,
    evaluation_rows,
    held_out_records,
    is_simple,
    source_weights,
)
from .optimizers import MuonAdamW, trapezoid

logger = logging.getLogger(__name__)

CURRICULUM = (
    (0.15, PromptStyle(max_tools=1, description_chars=0, max_prompt_tokens=256)),
    (0.65, PromptStyle(max_tools=2, description_chars=0, max_prompt_tokens=256)),
    (1.00, PromptStyle()),
)
"""(part of the run until which it holds, style of the prompts)."""


@dataclass(frozen=True)
class BaseRun:
    """Options of one pre-training run; each is an argument of `train_hf.py --stage base`.

    Args:
        output: folder of checkpoints, log and result.
        data: folder with `train/`, `text/` and `dev/`.
        tokenizer: folder or repo of the tokenizer.
        max_minutes: length of the run.
        warm_minutes: of this, first minutes on repeated random tokens, which sharpen the planted copying.
        tokens_per_batch: padded tokens of one step.
        lr: learning rate of Muon.
        adam_lr: learning rate of AdamW.
        prompt_share: part of the prompt positions that are predicted too.
        prompt_weight: loss weight of a predicted prompt position against one of the reply.
        follow_ups: most further requests on the tools of one row.
        talk_weight: multiplies the weights of the sources that want no call (refusals and chat).
        eval_minutes: minutes between evaluations.
        save_minutes: minutes between checkpoints.
        eval_rows: rows of each evaluation set used while training.
        seed: of weights and draws.
        threads: CPU threads.
    """

    output: Path
    data: Path = DEFAULT_DATA
    tokenizer: str = str(ROOT)
    max_minutes: float = 48.0
    warm_minutes: float = 0.25
    tokens_per_batch: int = 4096
    lr: float = 0.01
    adam_lr: float = 3e-3
    prompt_share: float = 0.2
    prompt_weight: float = 0.5
    follow_ups: int = 6
    talk_weight: float = 1.0
    eval_minutes: float = 5.0
    save_minutes: float = 10.0
    eval_rows: int = 100
    seed: int = 0
    threads: int = 2


def base_config(tokenizer: PreTrainedTokenizerFast) -> SmolLM3Config:
    """Default base: 6.5M parameters in SmolLM3's layout (grouped queries, tied embeddings, one layer without RoPE)."""
    return SmolLM3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def plant_induction(model: SmolLM3ForCausalLM, generator: torch.Generator, scale: float = 12.5) -> None:
    """Set four heads of two layers so that the fresh model already copies: what followed the last occurrence of this
    token?

    Copying values out of the prompt is most of a tool call, and finding it by gradient alone costs more tokens than a
    short CPU run sees. In layer 0 one head of each group looks at the previous position and writes that token's
    projection into the residual; in the first layer without RoPE one head of each group matches the current token
    with those projections and adds the embedding found there. All weights stay trainable.

    Args:
        model: a freshly initialised model with tied embeddings.
        generator: of the random projections.
        scale: growth of the embeddings over transformers' default.
    """
    # Blocks start silent (zero output matrices): random ones would drown what the planted heads write.
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    config = model.config
    width, groups = config.hidden_size, config.num_key_value_heads
    head = width // config.num_attention_heads
    per_group = config.num_attention_heads // groups
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    constant = basis[0]
    token = basis[1 : 1 + groups * head].view(groups, head, width)  # projections that stand for a token
    slot = torch.linalg.qr(torch.randn(width, groups * head, generator=generator)).Q.T.reshape(groups, head, width)
    # A direction shared by all embeddings acts as the bias that attention by position alone needs; it shifts all
    # logits alike.
    # Muon moves every matrix by its learning rate in spectral norm, AdamW every embedding entry by its own: planted
    # matrices and embeddings of order one survive that, small ones are gone after thirty steps. The small last norm
    # keeps the tied logits in range.
    embeddings = model.model.embed_tokens.weight
    embeddings.mul_(scale)
    model.model.norm.weight.fill_(2 / scale)
    embeddings.add_(0.5 * embeddings.norm(dim=1).mean() * constant)
    theta = config.rope_parameters["rope_theta"]
    pairs = head // 2
    frequency = theta ** (-torch.arange(pairs) / pairs)
    fast = (torch.arange(pairs) < 6).float()  # slow rotations cannot tell neighbours apart
    key = torch.cat([fast, torch.zeros(pairs)])
    query = torch.cat([fast * frequency.cos(), -fast * frequency.sin()])  # rotated back by one position
    first = model.model.layers[0].self_attn
    match = model.model.layers[config.no_rope_layers.index(0)].self_attn
    for group in range(groups):
        rows = slice(group * head, (group + 1) * head)
        heads = slice(group * per_group * head, (group * per_group + 1) * head)
        first.q_proj.weight[heads] = 1.2 * torch.outer(query, constant)
        first.k_proj.weight[rows] = 1.2 * torch.outer(key, constant)
        first.v_proj.weight[rows] = token[group]
        first.o_proj.weight[:, heads] = 0.03 * scale * slot[group].T
        match.q_proj.weight[heads] = 2.2 * token[group]
        match.k_proj.weight[rows] = 2.2 * slot[group]
        match.v_proj.weight[rows] = token[group]
        match.o_proj.weight[:, heads] = 0.15 * scale * token[group].T


@dataclass
class Batch:
    """Right-padded rows. Causal attention never looks right, so no mask is needed.

    Args:
        input_ids: int64 [rows, length].
        weights: float32 [rows, length - 1], loss weight of predicting the token at position i + 1; 0 is not predicted.
        is_target: bool [rows, length - 1], the predicted token belongs to the reply.
    """

    input_ids: Tensor
    weights: Tensor
    is_target: Tensor


def collate(
    rows: list[Row], pad_id: int, prompt_share: float, prompt_weight: float, generator: torch.Generator
) -> Batch:
    """Pad rows and choose the positions to predict: the whole reply and a random share of the prompt."""
    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), pad_id)
    is_target = torch.zeros(len(rows), length, dtype=torch.bool)
    is_prompt = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        start = 0
        for context, reply in row.spans():
            middle, end = start + len(context), start + len(context) + len(reply)
            input_ids[index, start:end] = torch.tensor(context + reply)
            is_prompt[index, start:middle] = True
            is_target[index, middle:end] = True
            start = end
    drawn = is_prompt & (torch.rand(is_prompt.shape, generator=generator) < prompt_share)
    weights = is_target.float() + prompt_weight * drawn.float()
    return Batch(input_ids, weights[:, 1:], is_target[:, 1:])


def repeated_tokens(vocab: int, rows: int, length: int, generator: torch.Generator) -> Batch:
    """Random tokens that repeat with a random period: predictable from the second round on, by copying alone."""
    input_ids = torch.empty(rows, length, dtype=torch.long)
    predictable = torch.zeros(rows, length, dtype=torch.bool)
    for index in range(rows):
        period = int(torch.randint(8, length // 2, (1,), generator=generator))
        word = torch.randint(0, vocab, (period,), generator=generator)
        input_ids[index] = word.repeat(length // period + 1)[:length]
        predictable[index, period + 1 :] = True
    return Batch(input_ids, predictable[:, 1:].float(), predictable[:, 1:])


def selected_logits(model: SmolLM3ForCausalLM, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the model and the vocabulary matrix only where a prediction is wanted: full logits would dominate the cost.

    Returns:
        logits [positions, vocab], labels [positions], weights [positions], is_target [positions].
    """
    hidden = model.model(input_ids=batch.input_ids[:, :-1], use_cache=False).last_hidden_state
    chosen = batch.weights > 0
    logits = model.lm_head(hidden[chosen])
    return logits, batch.input_ids[:, 1:][chosen], batch.weights[chosen], batch.is_target[chosen]


def batches(stream: RowStream, style: PromptStyle, tokens_per_batch: int, rng: random.Random) -> Iterator[list[Row]]:
    """Some batches of rows of similar length, together about 256 rows, in random order."""
    rows = sorted((stream.draw(style) for _ in range(256)), key=len)
    groups: list[list[Row]] = [[]]
    for row in reversed(rows):
        longest = groups[-1][0] if groups[-1] else row
        if (len(groups[-1]) + 1) * len(longest) > tokens_per_batch:
            groups.append([])
        groups[-1].append(row)
    rng.shuffle(groups)
    yield from groups


@torch.no_grad()
def evaluate(model: SmolLM3ForCausalLM, rows: list[Row], pad_id: int) -> dict[str, float]:
    """Reply loss, token accuracy, decision accuracy and exact replies, with the gold reply as context.

    A reply whose every token is the most likely one is what greedy generation would write, so `exact` is the share of
    greedy replies that equal the gold one token for token.
    """
    model.eval()
    generator = torch.Generator()
    loss = correct = tokens = decisions = exact = 0.0
    for start in range(0, len(rows), 8):
        part = rows[start : start + 8]
        batch = collate(part, pad_id, 0.0, 0.0, generator)
        logits, labels, _, _ = selected_logits(model, batch)
        hits = logits.argmax(-1) == labels
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
        correct, tokens = correct + float(hits.sum()), tokens + len(labels)
        for row_hits in hits.split([len(row.target_ids) for row in part]):
            decisions, exact = decisions + float(row_hits[0]), exact + float(row_hits.all())
    model.train()
    count = max(len(rows), 1)
    per_token = {"loss": loss / max(tokens, 1), "token": correct / max(tokens, 1)}
    return per_token | {"decision": decisions / count, "exact": exact / count}


class BaseTrainer:
    """One pre-training run; `run()` trains until the time is up and saves the result under `output`."""

    def __init__(self, options: BaseRun, tokenizer: PreTrainedTokenizerFast) -> None:
        torch.manual_seed(options.seed)
        torch.set_num_threads(options.threads)
        self.options, self.tokenizer = options, tokenizer
        self.model = SmolLM3ForCausalLM(base_config(tokenizer)).train()
        plant_induction(self.model, torch.Generator().manual_seed(options.seed))
        self.optimizer = MuonAdamW(self.model.named_parameters(), lr=options.lr, adam_lr=options.adam_lr)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.step, self.tokens, self.spent = 0, 0, 0.0
        options.output.mkdir(parents=True, exist_ok=True)
        self._resume()
        # A resumed run goes on with fresh draws instead of repeating the first ones.
        self.generator = torch.Generator().manual_seed(options.seed + self.step)
        self.rng = random.Random(options.seed + self.step)
        self.stream = RowStream(
            options.data,
            tokenizer,
            seed=options.seed + self.step,
            follow_ups=options.follow_ups,
            weights=source_weights(options.talk_weight),
        )
        simple = [record for record in dev_records(options.data) if is_simple(record)]
        self.sets = {
            "seen tools": evaluation_rows(held_out_records(options.data)[: options.eval_rows], tokenizer),
            "unseen tools": evaluation_rows(simple[:: max(1, len(simple) // options.eval_rows)], tokenizer),
        }

    def run(self) -> None:
        """Train until the time is up, then save the weights in bfloat16 with config and tokenizer in `output/final`."""
        total = self.options.max_minutes * 60
        origin = time.monotonic() - self.spent
        next_eval = self.spent + self.options.eval_minutes * 60
        next_save = self.spent + self.options.save_minutes * 60
        bar = tqdm(total=round(total), initial=round(self.spent), unit="s", mininterval=30)
        while self.spent < total:
            for batch in self._next_batches():
                loss = self._update(batch)
                self.spent = time.monotonic() - origin
                bar.n = round(self.spent)
                bar.set_postfix_str(f"step {self.step} loss {loss:.3f} tokens {self.tokens / 1e6:.2f}M", refresh=False)
                bar.update(0)
                if self.step % 50 == 0:
                    self._log(step=self.step, minutes=self.spent / 60, tokens=self.tokens, loss=loss)
                if self.spent >= next_eval:
                    self._evaluate()
                    next_eval += self.options.eval_minutes * 60
                if self.spent >= next_save:
                    self._save()
                    next_save += self.options.save_minutes * 60
                if self.spent >= total:
                    break
        bar.close()
        self._evaluate()
        self._save()
        final = self.options.output / "final"
        self.model.to(torch.bfloat16).save_pretrained(final)
        self.tokenizer.save_pretrained(final)
        logger.info("base saved to %s; rows left out: %s", final, dict(self.stream.skipped))

    def _next_batches(self) -> Iterator[Batch]:
        options = self.options
        if self.spent < options.warm_minutes * 60:
            yield repeated_tokens(len(self.tokenizer), options.tokens_per_batch // 128, 128, self.generator)
            return
        progress = self.spent / (options.max_minutes * 60)
        style = next((style for until, style in CURRICULUM if progress < until), CURRICULUM[-1][1])
        for rows in batches(self.stream, style, options.tokens_per_batch, self.rng):
            pad_id = self.tokenizer.pad_token_id
            yield collate(rows, pad_id, options.prompt_share, options.prompt_weight, self.generator)

    def _update(self, batch: Batch) -> float:
        """One optimizer step; returns the mean loss of the reply tokens."""
        factor = trapezoid(self.spent / (self.options.max_minutes * 60), warmup=0.01, hold=0.4)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        logits, labels, weights, is_target = selected_logits(self.model, batch)
        losses = functional.cross_entropy(logits, labels, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.tokens += batch.input_ids.numel()
        value = float(losses.detach()[is_target].mean())
        if not math.isfinite(value):
            raise FloatingPointError(f"The loss is {value} at step {self.step}: lower --lr and run again to resume.")
        return value

    def _evaluate(self) -> None:
        scores = {name: evaluate(self.model, rows, self.tokenizer.pad_token_id) for name, rows in self.sets.items()}
        self._log(step=self.step, minutes=self.spent / 60, tokens=self.tokens, evaluation=scores)

    def _log(self, **entry: object) -> None:
        with (self.options.output / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
        logger.info("%s", json.dumps(entry))

    def _save(self) -> None:
        """Write weights, optimizer state and counters to a fresh folder, then put it in the place of the old one."""
        fresh = self.options.output / "checkpoint.new"
        fresh.mkdir(exist_ok=True)
        save_file({name: p.detach().clone() for name, p in self.model.named_parameters()}, fresh / "model.safetensors")
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        states = {
            f"{names[id(parameter)]}/{key}": value
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            for key, value in self.optimizer.state[parameter].items()
        }
        save_file(states, fresh / "optimizer.safetensors")
        counters = {"step": self.step, "tokens": self.tokens, "spent": self.spent}
        (fresh / "counters.json").write_text(json.dumps(counters))
        old = self.options.output / "checkpoint"
        if old.exists():
            for file in old.iterdir():
                file.unlink()
            old.rmdir()
        fresh.rename(old)

    def _resume(self) -> None:
        """Go on from `output/checkpoint` where there is one."""
        folder = self.options.output / "checkpoint"
        if not folder.exists():
            return
        self.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        parameters = dict(self.model.named_parameters())
        for key, value in load_file(folder / "optimizer.safetensors").items():
            name, _, entry = key.rpartition("/")
            self.optimizer.state[parameters[name]][entry] = value
        counters = json.loads((folder / "counters.json").read_text())
        self.step, self.tokens, self.spent = counters["step"], counters["tokens"], counters["spent"]
        logger.info("resumed at step %d, minute %.1f", self.step, self.spent / 60)
